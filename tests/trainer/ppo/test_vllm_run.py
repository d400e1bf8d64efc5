"""`looper ppo` with a vLLM server that speaks the dialect: what is trained is what samples, whatever dies."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from looper_schemas.prompt import format_prompt
from looper_schemas.records import Problem, RolloutRecord, read_records, write_records
from looper_trainer.config import save_resolved
from looper_trainer.errors import ConfigError
from looper_trainer.ppo.batch import MicroBatch
from looper_trainer.ppo.checkpoint import step_folder
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.loop import run
from looper_trainer.ppo.policy import Policy
from looper_trainer.sampling.vllm import SamplerError
from looper_trainer.testing import FakeRewardServer

from .test_ranks import in_two_processes

FAKE_SITE = Path(__file__).parents[1] / "vllm" / "fake_site"
_spec = importlib.util.spec_from_file_location(
    "fake_vllm", FAKE_SITE / "vllm" / "entrypoints" / "openai" / "api_server.py"
)
assert _spec is not None
assert _spec.loader is not None
fake_vllm = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_vllm)

STEPS = 3


@pytest.fixture
def config(tiny_model: Path, problems: list[Problem], tmp_path: Path) -> PPOConfig:
    write_records(tmp_path / "train.jsonl", problems)
    write_records(tmp_path / "dev.jsonl", problems[:3])
    return PPOConfig(
        model=str(tiny_model),
        train_file=tmp_path / "train.jsonl",
        dev_file=tmp_path / "dev.jsonl",
        output=tmp_path / "ppo",
        run_id="same",
        sampler="vllm",
        vllm_seeded=True,
        batch_size=4,
        samples_per_question=4,
        mini_batch_size=2,
        max_new_tokens=6,
        learning_rate=1e-2,
        steps=STEPS,
        save_every=1,
        keep_checkpoints=9,
        eval_every=2,
        merge=False,
        device="cpu",
        dtype="float32",
        lora_rank=4,
        lora_alpha=8,
        score_chunk=1,
        give_up_after_s=30.0,
    )


def metrics_of(config: PPOConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def adapter_digest(config: PPOConfig, step: int) -> str:
    """SHA-256 of the adapter's file in the checkpoint of `step`: what the fake names its weights by."""
    file = step_folder(config.output, step) / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def trajectories(config: PPOConfig, step: int) -> list[RolloutRecord]:
    return read_records(config.output / "trajectories" / f"step_{step:05d}.jsonl", RolloutRecord)


def test_two_processes_of_a_launcher_train_with_one_server_of_their_own(
    config: PPOConfig, reward: FakeRewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE_SITE))
    config = config.model_copy(
        update={"vllm_devices": "0", "reference_on_sampler": True, "vllm_max_model_len": 400}
    )
    settings = save_resolved(config, config.output.parent)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    launcher = ["torch.distributed.run", *where, "--nproc-per-node", "2", "-m"]
    command = ["looper_trainer.cli", "ppo", "--config", settings]
    done = subprocess.run([sys.executable, "-m", *launcher, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = metrics_of(config)
    assert [(line["step"], line["policy_version"]) for line in lines] == [(0, 0), (1, 0), (2, 1), (3, 2)]
    log = (config.output / "vllm" / "vllm.log").read_text()
    assert log.count("fake vllm") == 1
    assert "'--max-model-len', '401'" in log  # vLLM gives a text's logprobs only with one token more
    assert "'--lora-target-modules', 'down_proj', 'gate_proj', 'k_proj', 'o_proj'" in log
    assert abs(lines[1]["kl_k1_per_completion"]) > 1  # to the fake's; to the trainer's own it would be 0
    assert done.stdout.count("step 3/3") == 1  # one of them speaks


def test_several_processes_leave_their_group_when_they_are_done(
    config: PPOConfig, reward: FakeRewardServer
) -> None:
    with fake_vllm.FakeVLLM(model=config.model) as vllm:
        given = config.model_copy(update={"vllm_urls": (vllm.url,), "steps": 1})

        def work(rank: int) -> None:
            run(given)
            assert not torch.distributed.is_initialized()

        assert in_two_processes(work) == [0, 0]
    assert metrics_of(given)[-1]["step"] == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_a_run_with_compiled_layers_begins_every_update_at_a_ratio_of_exactly_1(
    config: PPOConfig, reward: FakeRewardServer
) -> None:
    torch.compiler.reset()
    counters.clear()
    with fake_vllm.FakeVLLM(model=config.model) as vllm:
        run(config.model_copy(update={"vllm_urls": (vllm.url,), "torch_compile": True}))
    lines = [line for line in metrics_of(config) if line["step"]]
    assert [(line["first_ratio_min"], line["first_ratio_max"]) for line in lines] == [(1.0, 1.0)] * STEPS
    assert all(line["ratio_min"] < 1 < line["ratio_max"] for line in lines)  # later ones of the step
    assert counters["stats"]["unique_graphs"] > 0  # it was compiled


def test_compiled_layers_are_for_a_trainer_that_does_not_sample() -> None:
    with pytest.raises(ValidationError, match="torch_compile needs sampler vllm"):
        PPOConfig(torch_compile=True, sampler="transformers")


def test_the_version_that_was_trained_is_the_version_that_samples(
    config: PPOConfig, reward: FakeRewardServer
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model)
    with fake_vllm.FakeVLLM(model=config.model) as vllm:
        run(config.model_copy(update={"vllm_urls": (vllm.url,)}))
        loaded = [name for verb, name in vllm.log if verb == "load"]
        assert [name.split("-")[1] for name in loaded] == ["v0", "v1", "v2", "v3"]
        by_name = defaultdict(list)
        for request in vllm.sampled():
            by_name[request["model"]].append(request)
        assert set(by_name) == set(loaded)
    for step in range(1, STEPS + 1):
        digest = adapter_digest(config, step - 1)
        for record in trajectories(config, step):
            prompt = tokenizer(format_prompt(record.question))["input_ids"]
            for trajectory in record.trajectories:
                made = fake_vllm.completion(digest, prompt, trajectory.seed, 6)
                assert trajectory.output == made["text"]
                assert trajectory.tokens_out == len(made["ids"])
    assert len({adapter_digest(config, step) for step in range(STEPS + 1)}) == STEPS + 1


def test_questions_are_scored_in_chunks_under_keys_of_their_own_and_all_of_it_is_timed(
    config: PPOConfig, reward: FakeRewardServer
) -> None:
    with fake_vllm.FakeVLLM(model=config.model) as vllm:
        run(config.model_copy(update={"vllm_urls": (vllm.url,)}))
    assert sorted(request.step for request in reward.requests) == [1] * 4 + [2] * 4 + [3] * 4
    assert all(len(request.questions) == 1 for request in reward.requests)
    assert reward.replayed == 0
    lines = metrics_of(config)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines[1:]:
        assert line["questions_scored"] == 4
        assert {"sample", "score_wait", "logprobs", "update", "sync"} <= line["seconds"].keys()
    assert [line.get("dev_accuracy") is not None for line in lines] == [True, False, True, True]


def without_seconds(config: PPOConfig) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "step_seconds")} for line in metrics_of(config)
    ]


def test_a_sampler_that_dies_and_broken_replies_of_both_services_change_no_weight(
    config: PPOConfig,
    reward: FakeRewardServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE_SITE))
    monkeypatch.setenv("FAKE_VLLM_DIE", str(tmp_path / "die"))
    calm, troubled = (config.model_copy(update={"output": tmp_path / name}) for name in ("calm", "troubled"))
    run(calm)
    (tmp_path / "die").touch()  # our own server's process ends within a request
    reward.faults.corrupt = 1
    reward.faults.unavailable = 1
    reward.faults.dropped = 1
    run(troubled)
    said = capfd.readouterr().err
    assert "vLLM died; restart 1" in said
    assert said.count("waiting for the reward service") == 3
    assert without_seconds(calm) == without_seconds(troubled)
    assert adapter_digest(calm, STEPS) == adapter_digest(troubled, STEPS)
    assert all(line["questions_failed"] == 0 for line in metrics_of(troubled)[1:])


def whole_digest(config: PPOConfig, step: int) -> str:
    file = step_folder(config.output, step) / "model" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_whole_weights_that_were_trained_sample_also_after_the_server_has_died(
    config: PPOConfig, reward: FakeRewardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model)
    monkeypatch.setenv("PYTHONPATH", str(FAKE_SITE))
    monkeypatch.setenv("FAKE_VLLM_DIE", str(tmp_path / "die"))
    (tmp_path / "die").touch()  # a new process has the start's weights until it is given the current ones
    full = config.model_copy(update={"train": "full", "learning_rate": 1e-3, "dev_file": None})
    run(full)
    for step in range(1, STEPS + 1):
        digest = whole_digest(full, step - 1)
        for record in trajectories(full, step):
            prompt = tokenizer(format_prompt(record.question))["input_ids"]
            for trajectory in record.trajectories:
                assert trajectory.output == fake_vllm.completion(digest, prompt, trajectory.seed, 6)["text"]
    assert len({whole_digest(full, step) for step in range(STEPS + 1)}) == STEPS + 1
    lines = metrics_of(full)
    assert lines[0]["kl_k3"] == 0.0
    assert lines[-1]["kl_k3"] > 0.0
    start = AutoModelForCausalLM.from_pretrained(full.model)
    result = AutoModelForCausalLM.from_pretrained(full.output / "merged")
    assert AutoTokenizer.from_pretrained(full.output / "merged").eos_token == tokenizer.eos_token
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(start.parameters(), result.parameters(), strict=True)
    ]
    assert all(0 < change < 1e-2 for change in moved)


def test_taking_turns_on_the_gpu_changes_no_weight(
    config: PPOConfig, reward: FakeRewardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE_SITE))
    monkeypatch.setenv("FAKE_VLLM_EVENTS", str(tmp_path / "events"))
    together, in_turns = (config.model_copy(update={"output": tmp_path / name}) for name in ("one", "two"))
    run(together)
    run(in_turns.model_copy(update={"vllm_sleep": True, "offload": True}))
    # Asleep while the policy is loaded and while it is trained; the fake refuses to sample then.
    assert (tmp_path / "events").read_text().split() == ["/sleep?level=1", "/wake_up"] * (STEPS + 1)
    assert without_seconds(together) == without_seconds(in_turns)
    assert adapter_digest(together, STEPS) == adapter_digest(in_turns, STEPS)


def test_with_overlap_a_step_samples_from_the_version_before_the_last_and_says_so(
    config: PPOConfig, reward: FakeRewardServer
) -> None:
    from transformers import AutoTokenizer

    ahead = config.model_copy(update={"overlap": True})
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    with fake_vllm.FakeVLLM(model=config.model) as vllm:
        run(ahead.model_copy(update={"vllm_urls": (vllm.url,)}))
    for step in range(1, STEPS + 1):
        version = max(0, step - 2)
        digest = adapter_digest(ahead, version)
        for record in trajectories(ahead, step):
            assert record.policy == f"same@{version}"
            prompt = tokenizer(format_prompt(record.question))["input_ids"]
            for trajectory in record.trajectories:
                assert trajectory.output == fake_vllm.completion(digest, prompt, trajectory.seed, 6)["text"]
    assert [line["policy_version"] for line in metrics_of(ahead)] == [0, 0, 0, 1]


def test_dev_questions_are_answered_greedily_and_sampled_at_a_temperature_of_their_own(
    config: PPOConfig, reward: FakeRewardServer
) -> None:
    with fake_vllm.FakeVLLM(model=config.model) as vllm:
        asked = {"dev_samples": 2, "dev_temperature": 0.6, "steps": 1, "vllm_urls": (vllm.url,)}
        run(config.model_copy(update=asked))
        drawn = Counter((request["temperature"], request["n"]) for request in vllm.sampled())
    # Three dev questions at step 0 and at the end; four training questions.
    assert drawn == {(0.0, 1): 6, (0.6, 2): 6, (1.0, 4): 4}
    with pytest.raises(ValidationError, match="say how many with dev_samples"):
        PPOConfig(dev_temperature=0.6)


def test_a_reference_on_the_sampler_is_what_the_penalty_is_measured_against(
    config: PPOConfig,
    reward: FakeRewardServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """KL of step 1 by hand: transformers' logprobs of the base model (a fresh adapter changes nothing) less
    those that the server gives for the same texts. One completion has its distance told too."""
    with fake_vllm.FakeVLLM(model=config.model) as vllm:
        given = config.model_copy(
            update={"vllm_urls": (vllm.url,), "steps": 1, "reference_on_sampler": True, "dev_file": None}
        )
        passes: list[MicroBatch] = []
        own = Policy.ref_logprobs
        monkeypatch.setattr(
            Policy, "ref_logprobs", lambda policy, batch: passes.append(batch) or own(policy, batch)
        )
        run(given)
        asked = [request for request in vllm.requests if "prompt_logprobs" in request]
        sampled = {tuple(request["prompt"]) for request in vllm.sampled()}
    assert len(passes) == 2  # the look at the architecture, before the run, and one completion
    assert len(asked) == len(sampled) == 4
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    (compared,) = passes[1].completion_ids_nT.tolist()
    expected, gaps = [], []
    for text in (text for request in asked for text in request["prompt"]):
        start = max(len(prompt) for prompt in sampled if tuple(text[: len(prompt)]) == prompt)
        with torch.no_grad():
            logprobs = model(torch.tensor([text])).logits[0].log_softmax(-1)
        distances = [
            float(logprobs[place - 1, text[place]]) - fake_vllm.reference("base", text[place], place)
            for place in range(start, len(text))
        ]
        expected.append(sum(distances))
        if text[start:] == compared:
            gaps.append(sum(map(abs, distances)) / len(distances))
    assert len(expected) == 16
    line = metrics_of(given)[-1]
    assert line["kl_k1_per_completion"] == pytest.approx(sum(expected) / 16, abs=1e-4)
    assert gaps == [pytest.approx(line["reference_gap"], abs=1e-5)]
    assert (
        f"warning: the sampler's logprobs of the reference are {gaps[0]:.2f} nats" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"sampler": "transformers", "vllm_devices": None},
        {"vllm_devices": None},
        {"train": "full"},
        {"temperature": 0.9},
    ],
    ids=str,
)
def test_a_reference_on_the_sampler_is_refused_where_it_would_be_another(wrong: dict[str, Any]) -> None:
    settings = {"sampler": "vllm", "vllm_devices": "1", "reference_on_sampler": True}
    assert PPOConfig(**settings).reference_on_sampler
    with pytest.raises(ValidationError, match="reference_on_sampler needs"):
        PPOConfig(**settings | wrong)


def test_a_sampler_that_stays_away_saves_the_run_and_resume_goes_on_to_the_same_weights(
    config: PPOConfig, reward: FakeRewardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, paused = (config.model_copy(update={"output": tmp_path / name}) for name in ("calm", "paused"))
    with fake_vllm.FakeVLLM(model=config.model) as vllm:
        run(calm.model_copy(update={"vllm_urls": (vllm.url,)}))
    with fake_vllm.FakeVLLM(model=config.model) as vllm:
        given = paused.model_copy(update={"vllm_urls": (vllm.url,)})
        run(given.model_copy(update={"steps": 1}))
        vllm.always = 400
        with pytest.raises(SamplerError, match=r"refuses"):
            run(given.model_copy(update={"resume": True}))
        vllm.always = None
        run(given.model_copy(update={"resume": True}))
    assert adapter_digest(calm, STEPS) == adapter_digest(paused, STEPS)


def test_vllm_settings_that_cannot_be_are_refused_in_one_line(config: PPOConfig) -> None:
    with pytest.raises(ConfigError, match="http"):
        config.model_copy(update={"vllm_urls": ("localhost:8000",)}).vllm_settings()
    with pytest.raises(ValueError, match="vllm_args"):
        PPOConfig(vllm_args="--a 'open")
