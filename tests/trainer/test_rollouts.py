"""Rollouts: who made them, what they earned, and what an interruption leaves."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from looper_schemas.answers import answers_match, extract_answer
from looper_schemas.prompt import format_prompt
from looper_schemas.records import Problem, RolloutRecord, Trajectory, read_records, write_records
from looper_schemas.scoring import Limits
from looper_trainer.errors import ConfigError, DataError, RewardUnavailable, ScorerMismatch, UserError
from looper_trainer.folders import policy_id
from looper_trainer.groups import longest_prompt, require_window
from looper_trainer.rollouts import Progress, RolloutsConfig, run, trajectory_seed
from looper_trainer.sampling.base import SamplingParams
from looper_trainer.sampling.transformers import load_sampler
from looper_trainer.testing import FakeRewardServer

_spec = importlib.util.spec_from_file_location(
    "fake_vllm", Path(__file__).parent / "vllm/fake_site/vllm/entrypoints/openai/api_server.py"
)
fake_vllm = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_vllm)

PROBLEMS = [
    Problem(id=f"p/{n}", question=f"Ann has {n} apples. How many?", answer=str(n), cot=f"She has {n}.")
    for n in range(10)
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRewardServer]:
    with FakeRewardServer("random", key="rollout-key") as running:
        monkeypatch.setenv("LOOPER_REWARD_URL", running.url)
        monkeypatch.setenv("LOOPER_REWARD_KEY", "rollout-key")
        yield running


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> RolloutsConfig:
    write_records(tmp_path / "q.jsonl", PROBLEMS)
    return RolloutsConfig(
        model=str(tiny_model),
        questions_file=tmp_path / "q.jsonl",
        output=tmp_path / "out" / "r.jsonl",
        max_new_tokens=12,
        questions_per_batch=3,
        give_up_after_s=1.0,
        device="cpu",
    )


def changed(config: RolloutsConfig, **changes: Any) -> RolloutsConfig:
    return config.model_copy(update=changes)


def test_every_question_has_its_trajectories_with_the_services_rewards(
    config: RolloutsConfig, server: FakeRewardServer
) -> None:
    run(config)
    records = read_records(config.output, RolloutRecord)
    assert [record.id for record in records] == [problem.id for problem in PROBLEMS]
    sent = {item.id: item for request in server.requests for item in request.questions}
    for record, problem in zip(records, PROBLEMS, strict=True):
        assert (record.question, record.gold_answer) == (problem.question, problem.answer)
        assert record.scorer_id == server.scorer_id
        assert record.policy == policy_id(config.model)
        assert record.reward_mode == "arm_gated"
        assert record.scores is not None
        assert len(record.trajectories) == 4
        assert len({trajectory.seed for trajectory in record.trajectories}) == 4
        for arm, trajectory in zip(sent[record.id].arms, record.trajectories, strict=True):
            assert arm.full_text == trajectory.output.replace("\0", "\ufffd")  # the wire carries no NUL
            assert trajectory.reward == server._reward(sent[record.id], arm)
            assert trajectory.final_answer == extract_answer(trajectory.output)
    assert {request.purpose.value for request in server.requests} == {"rollout"}
    assert sorted(path.name for path in config.output.parent.iterdir()) == ["r.jsonl", "r_config.toml"]


def test_a_trajectory_can_be_drawn_again_from_its_record(
    config: RolloutsConfig, server: FakeRewardServer
) -> None:
    run(changed(config, limit=2))
    record = read_records(config.output, RolloutRecord)[1]
    sampler = load_sampler(config.model, device="cpu")
    prompt = sampler.encode(format_prompt(record.question))
    for trajectory in record.trajectories:
        assert trajectory.seed is not None
        ((again,),) = sampler.sample([prompt], SamplingParams(12), [[trajectory.seed]])
        assert (again.text, len(again.token_ids)) == (trajectory.output, trajectory.tokens_out)


def test_correct_solutions_earn_more(config: RolloutsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeRewardServer("correct", key="k") as server:
        monkeypatch.setenv("LOOPER_REWARD_URL", server.url)
        monkeypatch.setenv("LOOPER_REWARD_KEY", "k")
        run(config)
    for record in read_records(config.output, RolloutRecord):
        for trajectory in record.trajectories:
            right = answers_match(trajectory.output, record.gold_answer)
            assert trajectory.reward == (1.0 if right else -0.5)


def test_an_interrupted_run_goes_on_to_the_same_file(
    config: RolloutsConfig, server: FakeRewardServer, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = changed(config, output=config.output.with_name("whole.jsonl"))
    run(whole)
    scored = len(server.requests)
    partial = config.output.with_name("r.jsonl.partial")

    real = server._response

    def fail_third(request: Any, digest: str) -> Any:
        if len(server.requests) == scored + 2:
            server.faults.unavailable = 1000
        return real(request, digest)

    server._response = fail_third  # type: ignore[method-assign]
    server.faults.corrupt = 0
    with pytest.raises(RewardUnavailable):
        run(config)
    server._response = real  # type: ignore[method-assign]
    server.faults.unavailable = 0
    assert not config.output.exists()
    kept = partial.read_text(encoding="utf-8")
    assert 0 < kept.count("\n") < 10
    partial.write_text(kept + '{"id": "p/9", "quest', encoding="utf-8")  # the machine died while writing
    run(config)
    assert f"continuing after {kept.count(chr(10))} of 10" in capsys.readouterr().out
    assert config.output.read_bytes() == whole.output.read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"temperature": 0.5}, "temperature"),
        ({"samples_per_question": 2}, "samples_per_question"),
        ({"reward_mode": "question"}, "reward_mode"),
    ],
)
def test_other_settings_refuse_to_continue_it(
    config: RolloutsConfig, server: FakeRewardServer, change: dict[str, Any], named: str
) -> None:
    interrupt(config, server)
    other = RolloutsConfig.model_validate(config.model_dump() | change)
    with pytest.raises(DataError, match=f"another {named};"):
        run(other)


def test_another_scorer_refuses_to_continue_it(config: RolloutsConfig, server: FakeRewardServer) -> None:
    interrupt(config, server)
    server.scorer_id = "redeployed"
    with pytest.raises(DataError, match="another scorer_id;"):
        run(config)


def test_another_policy_refuses_to_continue_it(
    config: RolloutsConfig, server: FakeRewardServer, tmp_path: Path
) -> None:
    import shutil

    model = tmp_path / "policy"
    shutil.copytree(config.model, model)
    config = changed(config, model=str(model))
    interrupt(config, server)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(DataError, match="another policy;"):
        run(config)


def interrupt(config: RolloutsConfig, server: FakeRewardServer) -> None:
    """Leave a partial file of at least one batch behind."""
    real = server._response

    def fail_later(request: Any, digest: str) -> Any:
        server.faults.unavailable = 1000
        return real(request, digest)

    server._response = fail_later  # type: ignore[method-assign]
    with pytest.raises(RewardUnavailable):
        run(config)
    server._response = real  # type: ignore[method-assign]
    server.faults.unavailable = 0
    assert config.output.with_name("r.jsonl.partial").stat().st_size > 0


def test_settings_of_a_run_that_has_no_record_yet_bind_nobody(
    config: RolloutsConfig, server: FakeRewardServer
) -> None:
    server.faults.corrupt = 99
    with pytest.raises(UserError):
        run(config)
    assert config.output.with_name("r.jsonl.partial").read_bytes() == b""
    server.faults.corrupt = 0
    run(changed(config, seed=1, limit=1))
    assert len(read_records(config.output, RolloutRecord)) == 1


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that comes as far as the model."""
    import looper_trainer.sampling.transformers as engine

    def load(*_: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(engine, "load_sampler", load)


def test_what_cannot_be_written_or_continued_is_refused_before_the_model_is_loaded(
    config: RolloutsConfig, server: FakeRewardServer, request: pytest.FixtureRequest
) -> None:
    interrupt(config, server)
    request.getfixturevalue("unloadable")
    with pytest.raises(DataError, match="another seed;"):
        run(changed(config, seed=1))
    with pytest.raises(OSError, match=r"q\.jsonl"):  # a file, where a folder is needed
        run(changed(config, output=config.questions_file / "r.jsonl"))


@pytest.mark.usefixtures("unloadable")
def test_more_completions_than_the_service_takes_are_refused_before_any_is_sampled(
    config: RolloutsConfig, server: FakeRewardServer
) -> None:
    server.limits = Limits(max_questions=8, max_arms=3, max_text_chars=10_000, max_body_bytes=10**6)
    with pytest.raises(ConfigError, match=r"samples_per_question is 4, .* at most 3 completions"):
        run(config)
    assert not config.output.parent.exists()


def test_texts_beyond_the_models_window_are_refused_before_any_is_sampled(
    config: RolloutsConfig, server: FakeRewardServer
) -> None:
    encode = load_sampler(config.model, device="cpu").encode
    longest = max(len(encode(format_prompt(problem.question))) for problem in PROBLEMS)
    with pytest.raises(ConfigError, match=f"at most 256 tokens: the longest question has {longest},"):
        run(changed(config, max_new_tokens=257 - longest))
    assert not server.requests
    assert not config.output.parent.exists()
    run(changed(config, max_new_tokens=256 - longest, limit=1, samples_per_question=1))


@pytest.mark.parametrize(
    ("rope", "window"),
    [
        ({"rope_type": "default"}, 1000),
        ({"rope_type": "linear", "factor": 4.0}, 4000),
        # As Qwen's model cards have users write it for longer texts, and as DeepSeek's configurations are.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, 4000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250}, 1000),
    ],
)
def test_a_stretched_window_is_what_texts_may_fill(
    config: RolloutsConfig, tmp_path: Path, rope: dict[str, object], window: int
) -> None:
    folder = tmp_path / "stretched"
    LlamaConfig(max_position_embeddings=1000, rope_parameters={"rope_theta": 1e4} | rope).save_pretrained(
        folder
    )
    sampler = load_sampler(config.model, device="cpu")
    longest = max(len(sampler.encode(format_prompt(problem.question))) for problem in PROBLEMS)
    assert longest_prompt(sampler, PROBLEMS) == longest
    require_window(str(folder), longest, window - longest)
    with pytest.raises(ConfigError, match=f"at most {window} tokens"):
        require_window(str(folder), longest, window - longest + 1)


def test_two_commands_do_not_write_one_file_and_a_killed_one_stands_in_nobodys_way(
    config: RolloutsConfig, server: FakeRewardServer
) -> None:
    lock = config.output.with_name("r.jsonl.lock")
    holder = (
        "import sys, time\nfrom pathlib import Path\nfrom looper_trainer.folders import written_alone\n"
        "with written_alone(Path(sys.argv[1]), Path(sys.argv[2])):\n    print('locked', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", holder, str(config.output), str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=r"r.jsonl: another looper command is writing it; wait for it"):
            run(config)
        assert lock.exists()  # the other's
        other.kill()
    assert not server.requests
    run(changed(config, limit=1))
    assert not lock.exists()


def test_a_scorer_that_changes_meanwhile_ends_the_run(
    config: RolloutsConfig, server: FakeRewardServer
) -> None:
    real = server._response

    def redeploy(request: Any, digest: str) -> Any:
        reply = real(request, digest)
        server.scorer_id = "redeployed"
        return reply

    server._response = redeploy  # type: ignore[method-assign]
    with pytest.raises(ScorerMismatch):
        run(config)
    assert not config.output.exists()


def test_a_finished_file_is_never_overwritten(config: RolloutsConfig, server: FakeRewardServer) -> None:
    run(changed(config, limit=1))
    before = config.output.read_bytes()
    with pytest.raises(DataError, match="exists already"):
        run(config)
    assert config.output.read_bytes() == before


def test_an_unscorable_question_keeps_reward_null_and_is_counted(
    config: RolloutsConfig, server: FakeRewardServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults.failing = {"p/2": 100}
    server.faults.failing_is_retryable = False
    run(config)
    record = read_records(config.output, RolloutRecord)[2]
    assert [trajectory.reward for trajectory in record.trajectories] == [None] * 4
    assert record.scores is None
    assert "unscored 1" in capsys.readouterr().out
    line = json.loads(config.output.read_text(encoding="utf-8").splitlines()[2])
    assert line["trajectories"][0]["reward"] is None


def test_small_limits_of_the_service_change_no_record(
    config: RolloutsConfig, server: FakeRewardServer
) -> None:
    run(config)
    server.limits = Limits(max_questions=1, max_arms=4, max_text_chars=10_000, max_body_bytes=10**6)
    again = changed(config, output=config.output.with_name("again.jsonl"), questions_per_batch=10)
    run(again)
    assert again.output.read_bytes() == config.output.read_bytes()


class Watched(list):
    """Requests to vLLM, and how many the reward service had had when each arrived."""

    def __init__(self, server: FakeRewardServer) -> None:
        self.server, self.scored = server, []

    def append(self, request: dict[str, Any]) -> None:
        self.scored.append(sum(len(one.questions) for one in self.server.requests))
        super().append(request)


def first_token(config: RolloutsConfig) -> int:
    """Of every prompt; the fake's delays go by it."""
    return load_sampler(config.model, device="cpu").encode(format_prompt(PROBLEMS[0].question))[0]


def test_with_vllm_questions_are_scored_while_others_are_sampled_and_stay_in_order(
    config: RolloutsConfig, server: FakeRewardServer
) -> None:
    with fake_vllm.FakeVLLM(model=config.model) as vllm:
        vllm.requests = Watched(server)
        vllm.faults = [500]  # of the check at the start, which is repeated
        streamed = changed(
            config, sampler="vllm", vllm_urls=(vllm.url,), vllm_connections=1, vllm_seeded=True
        )
        vllm.delay = {first_token(config): 0.1}
        run(streamed)
        asked = {tuple(request["prompt"]): request for request in vllm.sampled()}
        assert vllm.requests.scored[-1] >= 6  # of the ten, when the last was asked
    records = read_records(config.output, RolloutRecord)
    assert [record.id for record in records] == [problem.id for problem in PROBLEMS]
    assert len(asked) == len(PROBLEMS)
    encode = load_sampler(config.model, device="cpu").encode
    for record in records:
        prompt = encode(format_prompt(record.question))
        for trajectory in record.trajectories:
            expected = fake_vllm.completion("base", prompt, trajectory.seed, 12)
            assert trajectory.output == expected["text"]
            assert trajectory.reward is not None


def test_a_service_that_goes_away_ends_the_sampling_and_keeps_what_was_scored(
    config: RolloutsConfig, server: FakeRewardServer
) -> None:
    with fake_vllm.FakeVLLM(model=config.model) as vllm:
        streamed = changed(
            config, sampler="vllm", vllm_urls=(vllm.url,), vllm_connections=1, vllm_seeded=True
        )
        real = server._response

        def fail_after_third(request: Any, digest: str) -> Any:
            if len(server.requests) == 2:  # this one is answered
                server.faults.unavailable = 1000
            return real(request, digest)

        server._response = fail_after_third  # type: ignore[method-assign]
        vllm.delay = {first_token(config): 0.1}  # so that one batch is scored before the next is whole
        with pytest.raises(RewardUnavailable):
            run(streamed)
        assert "vllm-sampler" not in {thread.name for thread in threading.enumerate()}
    done = read_records(config.output.with_name("r.jsonl.partial"), RolloutRecord)
    assert [record.id for record in done] == [problem.id for problem in PROBLEMS[:9]]


def test_seeds_differ_by_question_place_and_run_and_by_nothing_else() -> None:
    seeds = {trajectory_seed(s, q, i) for s in range(5) for q in ("a", "b", "1\n2") for i in range(5)}
    assert len(seeds) == 75
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert trajectory_seed(1, "a", 2) == trajectory_seed(1, "a", 2)


def test_repeated_ids_are_refused(config: RolloutsConfig, server: FakeRewardServer) -> None:
    write_records(config.questions_file, [PROBLEMS[0], PROBLEMS[0]])
    with pytest.raises(DataError, match="ids repeat"):
        run(config)


def test_progress_says_what_is_left_by_the_pace_of_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    def record(n: int) -> RolloutRecord:
        trajectories = tuple(Trajectory(output="x", final_answer=None, reward=r) for r in (1.0, 0.0))
        return RolloutRecord(
            id=str(n), question="Q?", gold_answer="1", trajectories=trajectories, scores=None, policy="p"
        )

    now = 0.0
    progress = Progress(10, [record(0), record(1)], clock=lambda: now)  # two of an earlier process
    for n, seconds in ((2, 1.0), (3, 6.0), (4, 7.0), (5, 12.0)):
        now = seconds
        progress.add(record(n))
    assert capsys.readouterr().out.splitlines() == [
        # 2 questions in 6 s and 6 to come; then 4 in 12 s and 4 to come.
        "rollouts: 4/10 questions, mean reward 0.500, unscored 0, 0.7 completions/s, 0:00:18 left",
        "rollouts: 6/10 questions, mean reward 0.500, unscored 0, 0.7 completions/s, 0:00:12 left",
    ]
