"""Whole runs of a tiny policy: it learns, it stops when scores are missing, and it goes on bit-exactly."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from looper_schemas.prompt import format_prompt
from looper_schemas.records import Problem, RolloutRecord, Trajectory, read_records, write_records
from looper_schemas.scoring import Purpose, Question, RewardMode, ServiceInfo
from looper_trainer.config import load_config, save_resolved
from looper_trainer.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RewardError,
    RewardUnavailable,
    UserError,
)
from looper_trainer.folders import written_alone
from looper_trainer.ppo.checkpoint import digest_inputs, read_state, step_folder
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.critic import scored_rows
from looper_trainer.ppo.data import Data, read_data
from looper_trainer.ppo.log import RunLog
from looper_trainer.ppo.loop import run, train
from looper_trainer.ppo.policy import Policy
from looper_trainer.ppo.scoring import Results
from looper_trainer.ppo.step import train_step
from looper_trainer.ppo.update import make_optimizer
from looper_trainer.reward_client import RewardClient
from looper_trainer.testing import FakeRewardServer

from .conftest import EOS_ID, CountingScorer, build


def metrics_of(config: PPOConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def without_seconds(config: PPOConfig) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "step_seconds")} for line in metrics_of(config)
    ]


def saved(config: PPOConfig, step: int) -> dict[str, Any]:
    """Everything learned that the checkpoint of `step` holds."""
    folder = step_folder(config.output, step)
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "value_head": (folder / "value_head.safetensors").read_bytes(),
        "moments": [m.tolist() for s in optimizer["optimizer"]["state"].values() for m in s.values()],
        "rng": optimizer["torch_rng"]["cpu"].tolist(),
        "state": json.loads((folder / "state.json").read_text())["state"],
    }


def go(config: PPOConfig, problems: Sequence[Problem], scorer: CountingScorer, dev: int = 0) -> Policy:
    policy, sampler = build(config)
    train(config, Data(problems, problems[:dev], []), policy, sampler, scorer)
    return policy


class DyingScorer(CountingScorer):
    """Goes down at one step."""

    def __init__(self, dies_at: int, wanted: str = "7") -> None:
        super().__init__(wanted)
        self.dies_at = dies_at

    def score(self, questions: Sequence[Question], *, step: int, purpose: Purpose) -> Results:
        if step == self.dies_at:
            raise RewardUnavailable("no answer from the reward service")
        return super().score(questions, step=step, purpose=purpose)


def test_training_raises_a_reward_that_the_policy_can_earn(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    config = ppo_config.model_copy(update={"steps": 25, "kl_coef": 0.001, "save_every": 100})
    go(config, problems, CountingScorer("7"))
    rewards = [line["reward_mean"] for line in metrics_of(config)]
    start, end = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    # A random policy writes 7 once in 80 characters; learned means most of them.
    assert start < 0.15
    assert end > 0.5


def test_a_reward_that_ignores_the_text_leaves_the_policy_near_its_reference(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    config = ppo_config.model_copy(update={"steps": 5})
    go(config, problems, CountingScorer(wanted=""))
    assert [line["reward_mean"] for line in metrics_of(config)] == [0.0] * 5
    assert metrics_of(config)[-1]["kl_k1_per_completion"] < 0.1


def test_a_run_in_bfloat16_learns_and_evaluates(ppo_config: PPOConfig, problems: list[Problem]) -> None:
    config = ppo_config.model_copy(update={"dtype": "bfloat16", "dev_file": Path("dev"), "steps": 25})
    go(config, problems, CountingScorer("7"), dev=2)
    lines = metrics_of(config)[1:]
    assert [line["first_ratio_min"] for line in lines] == [1.0] * 25
    assert sum(line["reward_mean"] for line in lines[-5:]) / 5 > 0.3 > 0.15 > lines[0]["reward_mean"]


def test_every_step_begins_with_ratio_exactly_one_and_agrees_with_its_sampler(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    config = ppo_config.model_copy(update={"micro_batch_tokens": 300})
    go(config, problems, CountingScorer())
    for line in metrics_of(config):
        assert line["first_ratio_min"] == line["first_ratio_max"] == 1.0
        assert line["sampler_gap_max"] < 1e-4
        assert line["importance_truncated_share"] == 0.0


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(
    ppo_config: PPOConfig, problems: list[Problem], tmp_path: Path
) -> None:
    settings = {"kl_controller": "adaptive", "eval_every": 2, "dev_file": Path("dev"), "run_id": "same"}
    whole = ppo_config.model_copy(update=settings)
    go(whole, problems, CountingScorer(), dev=3)

    halves = whole.model_copy(update={"output": tmp_path / "halves"})
    with pytest.raises(RewardUnavailable, match="--resume"):
        go(halves, problems, DyingScorer(dies_at=3), dev=3)
    torch.manual_seed(999)  # a new process begins with other random states
    go(halves.model_copy(update={"resume": True}), problems, CountingScorer(), dev=3)

    assert saved(whole, 4) == saved(halves, 4)
    assert saved(whole, 4)["adapter"] != saved(whole, 3)["adapter"]
    assert without_seconds(whole) == without_seconds(halves)
    assert len(metrics_of(halves)) == 5  # step 0's evaluation and four steps
    for step in range(1, 5):
        name = f"trajectories/step_{step:05d}.jsonl"
        assert (whole.output / name).read_bytes() == (halves.output / name).read_bytes()


def test_a_resumed_run_of_every_weight_is_bit_equal_too_and_its_reference_is_the_start(
    ppo_config: PPOConfig, problems: list[Problem], tmp_path: Path
) -> None:
    settings = {"train": "full", "learning_rate": 1e-3, "steps": 3, "run_id": "same", "keep_checkpoints": 9}
    whole = ppo_config.model_copy(update=settings)
    policy = go(whole, problems, CountingScorer("aeiou"))
    halves = whole.model_copy(update={"output": tmp_path / "halves"})
    with pytest.raises(RewardUnavailable):
        go(halves, problems, DyingScorer(dies_at=2, wanted="aeiou"))
    go(halves.model_copy(update={"resume": True}), problems, CountingScorer("aeiou"))
    for name in ("model/model.safetensors", "value_head.safetensors"):
        assert (step_folder(whole.output, 3) / name).read_bytes() == (
            step_folder(halves.output, 3) / name
        ).read_bytes()
    assert without_seconds(whole) == without_seconds(halves)
    assert metrics_of(whole)[0]["kl_k3"] == 0.0
    assert metrics_of(whole)[2]["kl_k3"] > 0.0
    start = build(whole)[0].causal_lm
    for mine, first in zip(policy.reference.parameters(), start.parameters(), strict=True):
        assert torch.equal(mine, first)


def test_a_kill_between_checkpoints_repeats_the_lost_steps(
    ppo_config: PPOConfig, problems: list[Problem], tmp_path: Path
) -> None:
    whole = ppo_config.model_copy(update={"save_every": 2})
    go(whole, problems, CountingScorer())

    class Kill(BaseException):
        """What nobody catches, as a signal."""

    class Killer(CountingScorer):
        def score(self, questions: Sequence[Question], *, step: int, purpose: Purpose) -> Results:
            if step == 4:
                raise Kill
            return super().score(questions, step=step, purpose=purpose)

    killed = whole.model_copy(update={"output": tmp_path / "killed"})
    with pytest.raises(Kill):
        go(killed, problems, Killer())
    with (killed.output / "metrics.jsonl").open("a") as out:
        out.write('{"step": 4, "rew')  # a line that the kill cut short
    again = CountingScorer()
    go(killed.model_copy(update={"resume": True}), problems, again)
    assert again.steps == [3, 4]  # step 3 was done but not saved
    assert saved(whole, 4) == saved(killed, 4)
    assert without_seconds(whole) == without_seconds(killed)


def test_an_unscored_question_pauses_the_run_and_nothing_is_trained_on_it(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    scorer = CountingScorer(
        fail=lambda question, step: step == 2 and question.id.endswith(("1", "3", "5", "7", "9"))
    )
    with pytest.raises(RewardError, match="scorer_timeout"):
        go(ppo_config, problems, scorer)
    assert [line["step"] for line in metrics_of(ppo_config)] == [1]
    assert (ppo_config.output / "checkpoints" / "step_00001" / "state.json").is_file()


def test_dropping_unscored_questions_is_counted_and_never_goes_below_nine_in_ten(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    config = ppo_config.model_copy(update={"on_unscored": "drop", "batch_size": 10, "steps": 1})
    failing = {"p0", "p1"}
    go(config, problems[2:] + problems[:1], CountingScorer(fail=lambda q, s: q.id == "p5"))
    (line,) = metrics_of(config)
    assert (line["questions_scored"], line["questions_failed"]) in [(9, 1), (10, 0)]
    records = read_records(config.output / "trajectories" / "step_00001.jsonl", RolloutRecord)
    unscored = [r for r in records if any(t.reward is None for t in r.trajectories)]
    assert len(unscored) == line["questions_failed"]

    below = config.model_copy(update={"output": config.output.with_name("below"), "batch_size": 12})
    with pytest.raises(RewardError, match="2 of 12 questions have no score"):
        go(below, problems, CountingScorer(fail=lambda q, s: q.id in failing))


def test_trajectories_hold_the_rewards_that_the_service_gave(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    config = ppo_config.model_copy(update={"steps": 1})
    scorer = CountingScorer("aeiou")
    go(config, problems, scorer)
    records = read_records(config.output / "trajectories" / "step_00001.jsonl", RolloutRecord)
    assert len(records) == 4
    for record in records:
        assert record.policy == f"{config.run_name}@0"
        assert record.scorer_id == "counting"
        for trajectory in record.trajectories:
            assert trajectory.reward == scorer._reward(trajectory.output)


def test_patience_ends_a_run_whose_dev_accuracy_stands_still_and_the_best_is_kept(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    settings = {"steps": 50, "eval_every": 1, "patience": 2, "dev_file": Path("dev"), "keep_checkpoints": 1}
    config = ppo_config.model_copy(update=settings)
    policy = go(config, problems, CountingScorer(), dev=2)  # writing sevens answers no question
    lines = metrics_of(config)
    assert [line["dev_accuracy"] for line in lines] == [0.0, 0.0, 0.0]
    result = json.loads((config.output / "result.json").read_text())
    assert (result["from_step"], result["trained_steps"], result["best_accuracy"]) == (0, 2, 0.0)
    assert {p.name for p in (config.output / "checkpoints").iterdir()} == {"step_00000", "step_00002"}
    # The policy in memory and the exported adapter are the best: the start.
    assert not any(w.any() for n, w in policy.model.named_parameters() if "lora_B" in n)


def test_the_last_step_is_the_result_where_that_is_asked_for(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    settings = {"steps": 2, "eval_every": 1, "dev_file": Path("dev"), "result": "last", "dev_samples": 2}
    config = ppo_config.model_copy(update=settings)
    policy = go(config, problems, CountingScorer(), dev=2)
    result = json.loads((config.output / "result.json").read_text())
    assert (result["from_step"], result["best_step"]) == (2, 0)
    assert any(w.any() for n, w in policy.model.named_parameters() if "lora_B" in n)
    last = metrics_of(config)[-1]
    assert (last["dev_gained"], last["dev_lost"], last["dev_sampled_accuracy"]) == (0, 0, 0.0)


def test_a_run_out_of_minutes_is_saved_evaluated_and_goes_on_with_resume(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    settings = {"steps": 3, "eval_every": 3, "save_every": 3, "dev_file": Path("dev")}
    config = ppo_config.model_copy(update=settings | {"max_minutes": 1e-9})
    go(config, problems, CountingScorer(), dev=2)
    assert [(line["step"], "dev_accuracy" in line) for line in metrics_of(config)] == [(0, True), (1, True)]
    resumed = config.model_copy(update={"max_minutes": None, "resume": True})
    go(resumed, problems, CountingScorer(), dev=2)
    assert [line["step"] for line in metrics_of(config)] == [0, 1, 2, 3]


@pytest.mark.parametrize("stop", [{"steps": 3}, {"steps": 7, "max_minutes": 1e-9}], ids=str)
def test_an_evaluation_at_a_commands_end_takes_no_patience(
    ppo_config: PPOConfig, problems: list[Problem], stop: dict[str, float]
) -> None:
    """No dev question is ever solved: with patience 2 the evaluations of steps 2 and 4 end the run."""
    settings = {"steps": 7, "eval_every": 2, "patience": 2, "dev_file": Path("dev"), "keep_checkpoints": 9}
    config = ppo_config.model_copy(update=settings)
    go(config, problems, CountingScorer(), dev=2)
    assert metrics_of(config)[-1]["step"] == 4
    parts = config.model_copy(update={"output": config.output.with_name("parts")})
    go(parts.model_copy(update=stop), problems, CountingScorer(), dev=2)
    assert "dev_accuracy" in metrics_of(parts)[-1]
    go(parts.model_copy(update={"resume": True}), problems, CountingScorer(), dev=2)
    assert metrics_of(parts)[-1]["step"] == 4
    assert saved(parts, 4) == saved(config, 4)
    assert read_state(step_folder(parts.output, 4), parts) == read_state(
        step_folder(config.output, 4), config
    )


def test_resuming_with_fewer_steps_than_are_done_is_at_its_end(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    go(ppo_config.model_copy(update={"steps": 2}), problems, CountingScorer())
    go(ppo_config.model_copy(update={"steps": 1, "resume": True}), problems, CountingScorer())
    assert [line["step"] for line in metrics_of(ppo_config)] == [1, 2]


def test_a_rollout_that_ended_warms_the_critic_up_to_its_end(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    """The reward lands on the EOS token in PPO, so the critic must know the state in which it is chosen."""
    policy, sampler = build(ppo_config)
    text, limit = problems[0].answer, ppo_config.max_new_tokens
    trajectories = tuple(
        Trajectory(output=output, final_answer=None, reward=0.5, finish_reason=how)
        for output, how in ((text, "stop"), (text, "length"), ("", "stop"), ("7" * limit, "stop"))
    )
    record = RolloutRecord(
        id="p",
        question="q",
        gold_answer="7",
        trajectories=trajectories,
        policy="sft",
        reward_mode="arm_gated",
    )
    rows, _ = scored_rows([record], sampler, ppo_config, policy.eos_id)
    ids = sampler.encode(text)
    assert [list(row.completion_ids) for row in rows] == [
        [*ids, EOS_ID], ids, [EOS_ID], sampler.encode("7" * limit),
    ]  # fmt: skip


def test_the_critic_learns_alone_for_the_first_steps(ppo_config: PPOConfig, problems: list[Problem]) -> None:
    config = ppo_config.model_copy(update={"critic_warmup_steps": 2, "steps": 3})
    go(config, problems, CountingScorer("aeiou"))
    lines = metrics_of(config)
    assert [line["critic_only"] for line in lines] == [True, True, False]
    assert [line["kl_k3"] for line in lines] == [0.0, 0.0, 0.0]  # measured before each update
    assert lines[1]["value_mean"] > 0.0
    assert lines[2]["ratio_max"] > 1.0


def test_rollouts_warm_up_the_critic_towards_their_rewards(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    rollouts = [
        RolloutRecord(
            id=p.id,
            question=p.question,
            gold_answer=p.answer,
            trajectories=(Trajectory(output=f"#### {p.answer}", final_answer=p.answer, reward=0.8),),
            policy="sft",
            reward_mode="arm_gated",
        )
        for p in problems
    ]
    config = ppo_config.model_copy(update={"critic_warmup_steps": 40, "steps": 1})
    policy, sampler = build(config)
    train(config, Data(problems, [], rollouts), policy, sampler, CountingScorer())
    (line,) = metrics_of(config)
    assert line["value_mean"] == pytest.approx(0.8, abs=0.25)
    assert line["critic_only"] is False
    other = config.model_copy(
        update={"output": config.output.with_name("other"), "reward_mode": RewardMode.QUESTION}
    )
    with pytest.raises(DataError, match="mode arm_gated"):
        train(other, Data(problems, [], rollouts), policy, sampler, CountingScorer())


def test_the_coefficient_of_the_state_prices_the_kl_not_the_one_in_the_settings(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    policy, sampler = build(ppo_config)
    data = Data(problems, [], [])
    state = train(ppo_config, data, policy, sampler, CountingScorer("aeiou"))  # the policy has moved
    log = RunLog(ppo_config.output, ppo_config.steps, state.step)
    figures = [
        train_step(
            replace(state, kl_coef=coef),
            ppo_config,
            data,
            policy,
            sampler,
            CountingScorer(wanted=""),  # every score is zero: returns are the KL's price alone
            make_optimizer(policy, ppo_config),
            log,
        )
        for coef in (0.0, 2.0)
    ]
    assert [line["kl_coef"] for line in figures] == [0.0, 2.0]
    assert figures[0]["return_mean"] == pytest.approx(0.0, abs=1e-6)
    assert figures[1]["return_mean"] < -0.1


def test_resuming_with_another_setting_names_it(ppo_config: PPOConfig, problems: list[Problem]) -> None:
    go(ppo_config.model_copy(update={"steps": 1}), problems, CountingScorer())
    with pytest.raises(CheckpointError, match="kl_coef"):
        go(ppo_config.model_copy(update={"resume": True, "kl_coef": 0.5}), problems, CountingScorer())


def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    config = ppo_config.model_copy(update={"resume": True})
    with pytest.raises(CheckpointError, match="no PPO checkpoint"):
        go(config, problems, CountingScorer())
    broken = ppo_config.output / "checkpoints" / "step_00003"
    broken.mkdir(parents=True)
    (broken / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no readable PPO checkpoint"):
        go(config, problems, CountingScorer())


@pytest.fixture
def files(ppo_config: PPOConfig, problems: list[Problem], tmp_path: Path) -> PPOConfig:
    write_records(tmp_path / "train.jsonl", problems)
    write_records(tmp_path / "dev.jsonl", problems[:2])
    settings = {
        "train_file": tmp_path / "train.jsonl",
        "dev_file": tmp_path / "dev.jsonl",
        "steps": 2,
        "merge": True,
        "give_up_after_s": 30.0,
    }
    return ppo_config.model_copy(update=settings)


def test_run_trains_over_http_and_leaves_a_plain_model_that_transformers_loads(
    files: PPOConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with FakeRewardServer(mode="random", seed=3) as server:
        monkeypatch.setenv("LOOPER_REWARD_URL", server.url)
        monkeypatch.setenv("LOOPER_REWARD_KEY", server.key)
        run(files)
        with pytest.raises(ConfigError, match="holds a PPO run"):
            run(files)
    lines = metrics_of(files)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {line["scorer_id"] for line in lines[1:]} == {server.scorer_id}
    model = AutoModelForCausalLM.from_pretrained(files.output / "merged")
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert AutoTokenizer.from_pretrained(files.output / "merged").eos_token == "<eos>"


class OutageAtStep2:
    """A real client whose server goes down just before step 2 is scored, and comes back after a second."""

    def __init__(self, client: RewardClient, server: FakeRewardServer) -> None:
        self.client, self.server = client, server

    def info(self) -> ServiceInfo:
        return self.client.info()

    def score(self, questions: Sequence[Question], *, step: int, purpose: Purpose) -> Results:
        if step == 2:
            self.server.stop()
            threading.Timer(1.0, self.server.start).start()
        return self.client.score(questions, step=step, purpose=purpose)


def test_an_outage_in_the_middle_changes_no_reward_and_no_weight(
    ppo_config: PPOConfig, problems: list[Problem], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calm, troubled = (
        ppo_config.model_copy(update={"output": tmp_path / name, "run_id": "same", "steps": 3})
        for name in ("calm", "troubled")
    )
    for config in (calm, troubled):
        with (
            FakeRewardServer(mode="random", seed=3) as server,
            RewardClient(server.url, server.key, run_id="same", give_up_after_s=30.0) as client,
        ):
            policy, sampler = build(config)
            scorer = client if config is calm else OutageAtStep2(client, server)
            train(config, Data(problems, [], []), policy, sampler, scorer)
            assert [request.step for request in server.requests] == [1, 2, 3]
    assert "waiting for the reward service" in capfd.readouterr().err
    assert metrics_of(troubled)[1]["seconds"]["score_wait"] > 0.5
    assert without_seconds(calm) == without_seconds(troubled)
    assert saved(calm, 3) == saved(troubled, 3)


def test_a_service_that_stays_away_pauses_the_run_and_resume_ends_it_with_the_same_weights(
    files: PPOConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPER_REWARD_KEY", "test-key")
    whole, paused = (
        files.model_copy(update={"output": files.output / name, "run_id": "same", "steps": 3, "merge": False})
        for name in ("whole", "paused")
    )
    with FakeRewardServer(mode="random", seed=3) as server:
        monkeypatch.setenv("LOOPER_REWARD_URL", server.url)
        run(whole)
        server.faults.failing = {f"p{i}": 100 for i in range(12)}
        server.faults.failing_is_retryable = False
        with pytest.raises(RewardError, match=r"step 0 is saved.*--resume"):
            run(paused)
        server.faults.failing = {}
        run(paused.model_copy(update={"resume": True}))
    with FakeRewardServer(mode="random", seed=4) as other:
        monkeypatch.setenv("LOOPER_REWARD_URL", other.url)
        with pytest.raises(RewardError, match="pinned"):
            run(paused.model_copy(update={"resume": True, "steps": 4}))
    assert saved(whole, 3) == saved(paused, 3)


def test_a_resumed_run_goes_on_at_the_learning_rates_that_are_given(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    go(ppo_config.model_copy(update={"steps": 1}), problems, CountingScorer("aeiou"))
    slower = {"learning_rate": 1e-9, "value_learning_rate": 1e-9, "steps": 2, "resume": True}
    go(ppo_config.model_copy(update=slower), problems, CountingScorer("aeiou"))
    assert [line["learning_rate"] for line in metrics_of(ppo_config)] == [1e-2, 1e-9]
    one, two = (
        load_file(step_folder(ppo_config.output, step) / "adapter" / "adapter_model.safetensors")
        for step in (1, 2)
    )
    assert any(weight.abs().max() > 1e-3 for name, weight in one.items() if "lora_B" in name)
    for name, weight in two.items():
        torch.testing.assert_close(weight, one[name], rtol=0, atol=1e-7)


@pytest.mark.usefixtures("reward")
def test_a_run_is_not_resumed_on_other_data_or_another_model(
    files: PPOConfig, base_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(base_folder, tmp_path / "sft")
    config = files.model_copy(update={"model": str(tmp_path / "sft"), "steps": 1, "merge": False})
    run(config)
    resumed = config.model_copy(update={"resume": True, "steps": 2})
    for name, file in (
        ("train_file", config.train_file),
        ("dev_file", config.dev_file),
        ("model", tmp_path / "sft" / "model.safetensors"),
    ):
        assert file is not None
        content = file.read_bytes()
        file.write_bytes(content[:-3] + content[-3:].replace(b"}", b" }") + b"\n")
        with pytest.raises(CheckpointError, match=f"was made when {name} held something else"):
            run(resumed)
        file.write_bytes(content)
    state_file = step_folder(config.output, 1) / "state.json"
    document = json.loads(state_file.read_text())
    del document["state"]["inputs"]  # as an earlier version wrote it
    document["config"] |= {
        "learning_rate": 5e-06,
        "value_learning_rate": 1e-4,
        "steps": 9,
    }  # those were fixed
    state_file.write_text(json.dumps(document))
    run(resumed)
    assert [line["step"] for line in metrics_of(config)] == [0, 1, 2]
    assert read_state(step_folder(config.output, 2), resumed).inputs == digest_inputs(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_question": 17}, "samples_per_question is 17, .* at most 16 completions"),
        ({"device": "mps:9"}, "device mps:9: this machine has [0-9]+ mps devices"),
        ({"output": Path("busy")}, "busy: another looper command is writing it"),
        ({"output": Path("a_file")}, "File exists: .*a_file"),
    ],
    ids=lambda x: str(x)[:24],
)
@pytest.mark.usefixtures("reward")
def test_what_stands_in_the_way_is_said_before_any_model_is_loaded(
    files: PPOConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(Policy, "load", lambda config: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    before = set(tmp_path.rglob("*"))
    with (
        written_alone(Path("busy"), Path("busy/.lock")),
        pytest.raises((UserError, OSError), match=message),
    ):
        run(files.model_copy(update=change))
    assert set(tmp_path.rglob("*")) == before


def test_texts_beyond_the_models_window_are_refused_before_any_is_sampled(
    ppo_config: PPOConfig, problems: list[Problem]
) -> None:
    policy, sampler = build(ppo_config)
    longest = max(len(sampler.encode(format_prompt(problem.question))) for problem in problems)
    config = ppo_config.model_copy(update={"max_new_tokens": 513 - longest})
    scorer = CountingScorer()
    with pytest.raises(ConfigError, match=f"at most 512 tokens: the longest question has {longest},"):
        train(config, Data(problems, [], []), policy, sampler, scorer)
    assert not scorer.steps


def test_bad_files_are_refused_before_any_model_is_loaded(files: PPOConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_data(files.model_copy(update={"train_file": tmp_path / "absent.jsonl"}))
    with pytest.raises(DataError, match="fewer than batch_size"):
        read_data(files.model_copy(update={"batch_size": 13}))
    (tmp_path / "twice.jsonl").write_text((tmp_path / "train.jsonl").read_text() * 2)
    with pytest.raises(DataError, match="ids repeat"):
        read_data(files.model_copy(update={"train_file": tmp_path / "twice.jsonl"}))


@pytest.mark.parametrize(
    "settings",
    [
        {"mini_batch_size": 17},
        {"patience": 2, "dev_file": None},
        {"lam": 1.1},
        {"top_p": 0.9},
        {"min_pass_rate": 0.1},
        {"max_pass_rate": 0.9},
        {"vllm_urls": ("http://127.0.0.1:8000",)},
        {"vllm_memory_gb": 10.0, "preset": "80gb"},
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        PPOConfig(**settings)


def test_settings_of_vllm_that_nobody_gave_are_no_reason_to_refuse(tmp_path: Path) -> None:
    for config in (PPOConfig(), PPOConfig(preset="80gb"), PPOConfig(preset="24gb", vllm_memory_share=0.4)):
        assert config.sampler == "transformers"
        assert load_config(PPOConfig, save_resolved(config, tmp_path), {}) == config


def test_errors_of_the_run_are_user_errors() -> None:
    assert issubclass(RewardUnavailable, UserError)
