"""The vLLM sampler against a server that speaks its dialect; `vllm/test_real_vllm.py` has the real engine."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from httpcore._async.connection import AsyncHTTPConnection
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from looper_trainer.errors import CheckpointError
from looper_trainer.sampling.base import SamplingParams
from looper_trainer.sampling.vllm import SamplerError, VLLMSampler, VLLMServer, VLLMSettings
from looper_trainer.sampling.vllm_run import plan_requests

FAKE_SITE = Path(__file__).parent / "vllm" / "fake_site"
_spec = importlib.util.spec_from_file_location(
    "fake_vllm", FAKE_SITE / "vllm" / "entrypoints" / "openai" / "api_server.py"
)
fake_vllm = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_vllm)

PARAMS = SamplingParams(max_new_tokens=6)
PROMPTS = [[10 + i, *range(i)] for i in range(12)]
SEEDS = [[100 * i + j for j in range(4)] for i in range(12)]


@pytest.fixture
def fake() -> Iterator[fake_vllm.FakeVLLM]:
    with fake_vllm.FakeVLLM() as server:
        yield server


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE_SITE))


def quick(*urls: str, **settings: object) -> VLLMSettings:
    return VLLMSettings(urls=urls, give_up_after_s=0.6, start_timeout_s=30, **settings)


def adapter(folder: Path, weights: str, rank: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (folder / "adapter_model.safetensors").write_text(weights)
    return folder


def check(found, weights="base", prompts=PROMPTS, seeds=SEEDS, params=PARAMS) -> None:
    """`found` is what one naive call per (prompt, seed) gives."""
    assert len(found) == len(prompts)
    for prompt, row_seeds, row in zip(prompts, seeds, found, strict=True):
        assert len(row) == len(row_seeds)
        for seed, got in zip(row_seeds, row, strict=True):
            wanted = fake_vllm.completion(weights, prompt, seed, params.max_new_tokens)
            assert list(got.token_ids) == wanted["ids"]
            assert list(got.logprobs) == wanted["logprobs"]
            assert got.finish_reason == wanted["finish"]
            assert got.text == wanted["text"]
            assert (got.token_ids[-1] == fake_vllm.EOS) == (got.finish_reason == "stop")


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_each_completion_belongs_to_its_prompt_and_seed_whatever_finishes_first(fake):
    rng = random.Random(3)
    fake.delay = {prompt[0]: rng.random() / 10 for prompt in PROMPTS}
    with VLLMSampler("base", quick(fake.url)) as sampler:
        check(sampler.sample(PROMPTS, PARAMS, SEEDS))
    assert len(fake.sampled()) == len(PROMPTS)  # consecutive seeds: one request a question


def test_scattered_seeds_mean_the_same_as_consecutive_ones(fake):
    seeds = [[7, 8, 9, 2**63 + 5, 4, 5, 3, 7], [], [1, 3, 2]]
    masked = [[seed % 2**62 for seed in row] for row in seeds]
    with VLLMSampler("base", quick(fake.url)) as sampler:
        check(sampler.sample(PROMPTS[:3], PARAMS, seeds), prompts=PROMPTS[:3], seeds=masked)


@given(st.lists(st.integers(0, 12), max_size=12))
def test_planned_requests_give_every_place_its_own_seed_once(seeds):
    seen = {}
    for request in plan_requests(0, seeds, greedy=False, seeded=True):
        assert request.n == len(request.places)
        for j, place in enumerate(request.places):
            assert place not in seen
            seen[place] = request.seed + j
    assert [seen[place] for place in range(len(seeds))] == seeds
    breaks = sum(b != a + 1 for a, b in itertools.pairwise(seeds))
    assert len(plan_requests(0, seeds, greedy=False, seeded=True)) == (breaks + 1 if seeds else 0)


def test_greedy_asks_once_and_gives_the_one_answer_to_every_seed(fake):
    params = SamplingParams(max_new_tokens=6, temperature=0.0, top_p=0.5)
    with VLLMSampler("base", quick(fake.url)) as sampler:
        (row,) = sampler.sample([[5]], params, [[1, 2, 9]])
    (request,) = fake.sampled()
    assert (request["n"], request["temperature"], request["top_p"]) == (1, 0.0, 1.0)
    assert "seed" not in request
    assert list(row[0].token_ids) == fake_vllm.completion("base", [5], None, 6)["ids"]
    assert row == [row[0]] * 3


def test_every_parameter_is_stated_so_that_the_generation_config_has_no_say(fake):
    params = SamplingParams(max_new_tokens=6, temperature=0.7, top_p=0.9)
    with VLLMSampler("base", quick(fake.url, seeded=False)) as sampler:
        sampler.sample([[5]], params, [[1, 7]])
    (request,) = fake.sampled()
    expected = {"n": 2, "max_tokens": 6, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0}
    expected |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 0}
    assert expected.items() <= request.items()
    assert "seed" not in request


def test_a_finished_question_is_yielded_while_a_slow_one_still_runs(fake):
    fake.delay = {PROMPTS[0][0]: 1.0}
    with VLLMSampler("base", quick(fake.url)) as sampler:
        began = time.monotonic()
        arrivals = [
            (index, time.monotonic() - began) for index, _ in sampler.sample_iter(PROMPTS, PARAMS, SEEDS)
        ]
    assert sorted(index for index, _ in arrivals) == list(range(12))
    assert arrivals[-1][0] == 0
    assert arrivals[-1][1] >= 1.0
    assert all(when < 0.9 for _, when in arrivals[:-1])


@pytest.mark.parametrize(("stride", "requests"), [(1, 1), (2, 4)], ids=["consecutive", "scattered"])
def test_as_many_questions_are_in_flight_as_connections_and_no_more(fake, stride, requests):
    seeds = [[1000 * i + stride * j for j in range(4)] for i in range(12)]
    fake.delay = {prompt[0]: 0.5 for prompt in PROMPTS}
    with VLLMSampler("base", quick(fake.url, connections=3)) as sampler:
        check(sampler.sample(PROMPTS, PARAMS, seeds), seeds=seeds)
    assert fake.most_in_flight == 3 * requests


def test_more_connections_do_not_make_every_request_dearer(fake, monkeypatch):
    """httpcore's pool compares each idle connection with each other one, for every request and reply."""
    compared = 0
    is_idle = AsyncHTTPConnection.is_idle

    def counted(self: AsyncHTTPConnection) -> bool:
        nonlocal compared
        compared += 1
        return is_idle(self)

    monkeypatch.setattr(AsyncHTTPConnection, "is_idle", counted)
    prompts = [[10, i] for i in range(192)]
    seeds = [[1000 * i] for i in range(192)]
    fake.delay = {10: 1.0}
    with VLLMSampler("base", quick(fake.url, connections=64)) as sampler:
        check(sampler.sample(prompts, PARAMS, seeds), prompts=prompts, seeds=seeds)
    assert compared < 192 * 20


def test_a_request_imports_nothing(fake, monkeypatch):
    """httpcore looks for `sniffio` for every lock it makes; Python looks anew for what is not installed."""
    sought = []

    class Notes:
        def find_spec(self, name, path=None, target=None):
            sought.append(name)

    with VLLMSampler("base", quick(fake.url)) as sampler:
        sampler.sample(PROMPTS, PARAMS, SEEDS)
        monkeypatch.setattr(sys, "meta_path", [Notes(), *sys.meta_path])
        sampler.sample(PROMPTS, PARAMS, SEEDS)
    assert sought == []


def test_closing_the_iterator_early_ends_the_sampling_thread_and_the_requests(fake):
    fake.delay = {prompt[0]: 0.0 if i == 0 else 5.0 for i, prompt in enumerate(PROMPTS)}
    with VLLMSampler("base", quick(fake.url, connections=2)) as sampler:
        iterator = sampler.sample_iter(PROMPTS, PARAMS, SEEDS)
        assert next(iterator)[0] == 0
        began = time.monotonic()
        iterator.close()
        assert time.monotonic() - began < 1.0
        assert not [t for t in threading.enumerate() if t.name == "vllm-sampler"]
    assert len(fake.sampled()) <= 4


@pytest.mark.parametrize(
    "fault", [500, 503, 429, "drop", "short", "nan", "ids", "model", "prompt", "abort", "json"]
)
def test_a_failed_or_unsound_reply_is_asked_again_and_changes_nothing(fake, said, fault):
    fake.faults = [fault, fault]
    with VLLMSampler("base", quick(fake.url), say=said.append) as sampler:
        check(sampler.sample(PROMPTS, PARAMS, SEEDS))
    assert len(fake.sampled()) == len(PROMPTS) + 2


@pytest.mark.parametrize("fault", [None, "short", "nan", "ids", "prompt", "model"])
def test_the_reference_is_the_base_model_whatever_adapter_samples(fake, tmp_path, fault):
    params = SamplingParams(max_new_tokens=6, with_reference=True)
    with VLLMSampler("base", quick(fake.url)) as sampler:
        sampler.load_adapter(adapter(tmp_path / "a", "an adapter"), 1)
        fake.reference_faults = [fault] if fault else []
        found = sampler.sample(PROMPTS, params, SEEDS)
        check(found, "an adapter")
        check(sampler.sample(PROMPTS, PARAMS, SEEDS), "an adapter")
        assert {row[0].reference_logprobs for row in sampler.sample(PROMPTS, PARAMS, SEEDS)} == {None}
    for prompt, row in zip(PROMPTS, found, strict=True):
        for completion in row:
            assert completion.reference_logprobs == tuple(
                fake_vllm.reference("base", token, place)
                for place, token in enumerate(completion.token_ids, start=len(prompt))
            )
    asked = [request for request in fake.requests if "prompt_logprobs" in request]
    assert len(asked) == len(PROMPTS) + bool(fault)  # one request a question, and one again
    assert len(fake.sampled()) == 3 * len(PROMPTS)  # whose completions are not sampled again


def test_a_prompt_that_always_fails_ends_the_call_with_the_reason(fake):
    with VLLMSampler("base", quick(fake.url)) as sampler:
        fake.always = 500
        with pytest.raises(SamplerError, match="failed 5 times on one prompt: HTTP 500: planted failure"):
            sampler.sample([[5]], PARAMS, [[1]])
    assert len(fake.sampled()) == 5


def test_a_refused_request_is_not_repeated(fake):
    with VLLMSampler("base", quick(fake.url)) as sampler:
        fake.always = 400
        with pytest.raises(SamplerError, match="refuses: HTTP 400: planted failure"):
            sampler.sample([[5]], PARAMS, [[1]])
    assert len(fake.sampled()) == 1


def test_a_server_that_is_not_there_is_named_with_what_to_do(said):
    with fake_vllm.FakeVLLM() as gone:
        pass
    began = time.monotonic()
    with (
        pytest.raises(SamplerError, match="start it again and resume") as error,
        VLLMSampler("base", quick(gone.url), say=said.append),
    ):
        pass
    assert gone.url in str(error.value)
    assert 0.6 <= time.monotonic() - began < 5
    assert "waiting for it" in said[0]


def test_with_one_of_two_servers_gone_the_other_does_all_the_work(fake, said):
    with fake_vllm.FakeVLLM() as second:
        sampler = VLLMSampler("base", quick(fake.url, second.url), say=said.append).__enter__()
        # Neither can answer its share before the other is connected, however busy the machine.
        fake.delay = second.delay = {prompt[0]: 0.5 for prompt in PROMPTS}
        check(sampler.sample(PROMPTS, PARAMS, SEEDS))
        assert fake.sampled()
        assert second.sampled()
    fake.delay = {}
    before = len(fake.sampled())
    check(sampler.sample(PROMPTS, PARAMS, SEEDS))
    assert len(fake.sampled()) == before + len(PROMPTS)
    assert any("waiting for it" in line for line in said)
    sampler.close()


def test_what_hangs_on_a_lost_server_is_asked_of_the_other(fake, said):
    with (
        fake_vllm.FakeVLLM() as sick,
        VLLMSampler("base", quick(fake.url, sick.url, connections=4), say=said.append) as sampler,
    ):
        sick.delay = {prompt[0]: 30.0 for prompt in PROMPTS}  # its other requests are never answered
        sick.faults = ["sicken"]
        began = time.monotonic()
        check(sampler.sample(PROMPTS, PARAMS, SEEDS))
        assert time.monotonic() - began < 15
        assert len(sick.sampled()) == 4
    assert len(fake.sampled()) == len(PROMPTS)
    assert any("going on with the others" in line for line in said)


def test_a_server_that_comes_back_during_a_call_is_used_again(fake, said, tmp_path):
    with VLLMSampler("base", quick(fake.url), say=said.append) as sampler:
        sampler.load_adapter(adapter(tmp_path / "a", "one"), 1)
        fake.faults = ["drop"] * 12
        fake.adapters.clear()  # restarted by others: it knows no adapter any more
        check(sampler.sample(PROMPTS, PARAMS, SEEDS), weights="one")
        assert [action for action, _ in fake.log] == ["load", "load"]
        assert fake.log[0] == fake.log[1]


def test_a_server_that_now_serves_another_model_is_refused(fake):
    with VLLMSampler("base", quick(fake.url)) as sampler:
        fake.model = "other"
        with pytest.raises(SamplerError, match="serves other now, not base"):
            sampler.sample([[5]], PARAMS, [[1]])


def test_logprobs_of_raw_logits_are_found_out_before_any_sampling():
    with (
        fake_vllm.FakeVLLM(processed=False) as raw,
        pytest.raises(SamplerError, match="--logprobs-mode processed_logprobs"),
        VLLMSampler("base", quick(raw.url)),
    ):
        pass


def test_the_version_loaded_is_the_version_that_samples(fake, tmp_path):
    with VLLMSampler("base", quick(fake.url), folder=tmp_path / "work") as sampler:
        assert sampler.policy_version is None
        check(sampler.sample(PROMPTS, PARAMS, SEEDS), weights="base")
        for version in (1, 2, 3):
            # The trainer may write every version to the same folder.
            sampler.load_adapter(adapter(tmp_path / "latest", f"weights{version}"), version)
            assert sampler.policy_version == version
            check(sampler.sample(PROMPTS, PARAMS, SEEDS), weights=f"weights{version}")


def test_a_call_keeps_the_version_it_began_with(fake, tmp_path):
    with VLLMSampler("base", quick(fake.url, connections=1)) as sampler:
        sampler.load_adapter(adapter(tmp_path / "a", "one"), 1)
        iterator = sampler.sample_iter(PROMPTS, PARAMS, SEEDS)
        found = dict([next(iterator)])
        sampler.load_adapter(adapter(tmp_path / "b", "two"), 2)
        found |= dict(iterator)
        check([found[i] for i in range(12)], weights="one")
        check(sampler.sample(PROMPTS, PARAMS, SEEDS), weights="two")


def test_old_adapters_leave_server_and_disk_one_version_late(fake, tmp_path):
    work = tmp_path / "work"
    with VLLMSampler("base", quick(fake.url), folder=work) as sampler:
        for version in (1, 2, 3, 4):
            sampler.load_adapter(adapter(tmp_path / "a", f"w{version}"), version)
            kept = [f"w{v}" for v in (version - 1, version) if v > 0]
            assert list(fake.adapters.values()) == kept
            on_disk = sorted(p.read_text() for p in work.glob("policies/*/adapter_model.safetensors"))
            assert on_disk == kept
        loads = [name for action, name in fake.log if action == "load"]
        assert len(set(loads)) == 4
    assert fake.adapters == {}
    assert list(work.glob("policies/*")) == []


def test_the_same_version_twice_never_meets_the_weights_of_an_earlier_run(fake, tmp_path):
    for run in ("first", "second"):
        sampler = VLLMSampler("base", quick(fake.url)).__enter__()  # never closed: as after a kill -9
        sampler.load_adapter(adapter(tmp_path / run, run), 7)
        check(sampler.sample(PROMPTS, PARAMS, SEEDS), weights=run)


def test_an_adapter_that_does_not_fit_is_refused_and_the_one_before_goes_on(fake, tmp_path):
    with VLLMSampler("base", quick(fake.url)) as sampler:
        sampler.load_adapter(adapter(tmp_path / "a", "one"), 1)
        with pytest.raises(SamplerError, match=r"cannot load the adapter .* shapes do not fit"):
            sampler.load_adapter(adapter(tmp_path / "b", "misfit"), 2)
        assert sampler.policy_version == 1
        check(sampler.sample(PROMPTS, PARAMS, SEEDS), weights="one")


def test_a_server_without_runtime_adapters_is_told_how_to_start(tmp_path):
    advice = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
    with (
        fake_vllm.FakeVLLM(lora=False) as plain,
        VLLMSampler("base", quick(plain.url)) as sampler,
        pytest.raises(SamplerError, match=advice),
    ):
        sampler.load_adapter(adapter(tmp_path / "a", "one"), 1)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_holds_no_adapter_is_a_checkpoint_error(fake, tmp_path, missing):
    folder = adapter(tmp_path / "a", "one")
    (folder / missing).unlink()
    with VLLMSampler("base", quick(fake.url)) as sampler, pytest.raises(CheckpointError, match="adapter"):
        sampler.load_adapter(folder, 1)


def test_bad_calls_are_refused_before_anything_is_sent(fake):
    with VLLMSampler("base", quick(fake.url)) as sampler:
        with pytest.raises(ValueError, match="2 prompts but 1"):
            sampler.sample_iter([[1], [2]], PARAMS, [[1]])
        with pytest.raises(ValueError, match="no tokens"):
            sampler.sample_iter([[]], PARAMS, [[1]])
        assert sampler.sample([], PARAMS, []) == []
        assert sampler.sample([[1]], PARAMS, [[]]) == [[]]
    assert fake.sampled() == []


# A server of our own. With `fake_site` on PYTHONPATH the real command line starts the fake.


def test_a_supervised_server_is_started_used_and_taken_down_with_its_helpers(site, tmp_path, said):
    with VLLMSampler("base", quick(), folder=tmp_path, say=said.append) as sampler:
        sampler.load_adapter(adapter(tmp_path / "a", "one"), 1)
        check(sampler.sample(PROMPTS, PARAMS, SEEDS), weights="one")
        group = sampler.servers[0].pid
        match = re.search(r"fake vllm (\d+) helper (\d+)", (tmp_path / "vllm.log").read_text())
        pids = [group, *map(int, match.groups())]
        assert all(map(alive, pids))
    wait_until(lambda: not any(map(alive, pids)))
    assert "starting vLLM" in said[0]
    assert str(tmp_path / "vllm.log") in said[0]
    assert "ready" in said[1]


def test_a_server_that_dies_in_mid_sample_is_restarted_with_its_adapter(site, tmp_path, said, monkeypatch):
    flag = tmp_path / "die"
    monkeypatch.setenv("FAKE_VLLM_DIE", str(flag))
    with VLLMSampler("base", quick(), folder=tmp_path / "work", say=said.append) as sampler:
        sampler.load_adapter(adapter(tmp_path / "a", "one"), 1)
        sampler.load_adapter(adapter(tmp_path / "a", "two"), 2)
        first = sampler.servers[0].pid
        flag.touch()
        check(sampler.sample(PROMPTS, PARAMS, SEEDS), weights="two")
        assert not flag.exists()
        assert sampler.servers[0].pid != first
    assert sum("restart 1 of at most 3" in line for line in said) == 1


def test_kill_9_of_the_whole_server_in_mid_sample_is_survived(site, tmp_path, said, monkeypatch):
    slow = {str(prompt[0]): 0.3 for prompt in PROMPTS[6:]}
    monkeypatch.setenv("FAKE_VLLM_DELAY", json.dumps(slow))
    with VLLMSampler("base", quick(), folder=tmp_path, say=said.append) as sampler:
        found = {}
        for index, completions in sampler.sample_iter(PROMPTS, PARAMS, SEEDS):
            if not found:
                os.killpg(sampler.servers[0].pid, signal.SIGKILL)
            found[index] = completions
        check([found[i] for i in range(12)])
    assert any("restart 1" in line for line in said)


def test_a_server_that_dies_on_its_last_question_is_survived_too(site, tmp_path, said, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_DELAY", json.dumps({str(PROMPTS[5][0]): 1.0}))
    with VLLMSampler("base", quick(), folder=tmp_path, say=said.append) as sampler:
        found = {}
        for index, completions in sampler.sample_iter(PROMPTS, PARAMS, SEEDS):
            found[index] = completions
            if len(found) == 11:  # the other workers are idle and will see the question come back
                os.killpg(sampler.servers[0].pid, signal.SIGKILL)
        check([found[i] for i in range(12)])


def test_a_restart_that_outlasts_the_call_is_waited_for_by_the_next_one(site, tmp_path, said, monkeypatch):
    delays = {str(prompt[0]): 0.05 for prompt in PROMPTS}
    monkeypatch.setenv("FAKE_VLLM_DELAY", json.dumps(delays))
    with VLLMSampler(
        "base", quick(servers=2, max_restarts=1), folder=tmp_path / "work", say=said.append
    ) as sampler:
        check(sampler.sample(PROMPTS, PARAMS, SEEDS))
        monkeypatch.setenv("FAKE_VLLM_START", "3")
        os.killpg(sampler.servers[1].pid, signal.SIGKILL)
        for _ in range(3):
            check(sampler.sample(PROMPTS, PARAMS, SEEDS))  # by the other one
        sampler.load_adapter(adapter(tmp_path / "a", "one"), 1)
        assert all(httpx.get(f"{server.url}/health").status_code == 200 for server in sampler.servers)
        check(sampler.sample(PROMPTS, PARAMS, SEEDS), weights="one")
    assert (tmp_path / "work" / "vllm-2.log").read_text().count("fake vllm") == 2
    assert sum("restart 1 of at most 1" in line for line in said) == 1


def test_several_servers_of_ours_share_the_work_and_the_adapter(site, tmp_path, said, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_DELAY", json.dumps({str(prompt[0]): 0.05 for prompt in PROMPTS}))
    settings = quick(servers=2, gpu_memory_utilization=0.5, seed=7)
    with VLLMSampler("base", settings, folder=tmp_path / "work", say=said.append) as sampler:
        sampler.load_adapter(adapter(tmp_path / "a", "one"), 1)
        check(sampler.sample(PROMPTS, PARAMS, SEEDS), weights="one")
        os.killpg(sampler.servers[1].pid, signal.SIGKILL)
        check(sampler.sample(PROMPTS, PARAMS, SEEDS), weights="one")
        sampler.load_adapter(adapter(tmp_path / "b", "two"), 2)  # by now both are there
        check(sampler.sample(PROMPTS, PARAMS, SEEDS), weights="two")
        logs = [(tmp_path / "work" / name).read_text() for name in ("vllm.log", "vllm-2.log")]
        groups = [server.pid for server in sampler.servers]
    assert [log.count("fake vllm") for log in logs] == [1, 2]  # the second was started again
    for log, seed in zip(logs, "78", strict=True):
        assert f"'--seed', '{seed}'" in log
        assert "'--gpu-memory-utilization', '0.25'" in log
    wait_until(lambda: not any(map(alive, groups)))


def test_a_server_that_fails_beside_another_is_started_again_alone(site, tmp_path, said, monkeypatch):
    flag = tmp_path / "fail"
    flag.touch()
    monkeypatch.setenv("FAKE_VLLM_FAIL", str(flag))  # whichever comes first
    with VLLMSampler("base", quick(servers=2), folder=tmp_path / "work", say=said.append) as sampler:
        check(sampler.sample(PROMPTS, PARAMS, SEEDS))
        assert all(server.pid for server in sampler.servers)
    assert sum("memory profiling" in line and line.endswith("starting it again, alone") for line in said) == 1


def test_servers_that_cannot_start_leave_none_behind(site, tmp_path, said):
    sampler = VLLMSampler("broken", quick(servers=2), folder=tmp_path, say=said.append)
    with pytest.raises(SamplerError, match="no such model"):
        sampler.__enter__()
    assert [server.pid for server in sampler.servers] == [None, None]


def test_a_server_under_a_launcher_of_processes_makes_a_group_of_its_own(site, tmp_path, said, monkeypatch):
    # What `accelerate launch` leaves behind; torch would look for its store and wait for it.
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with VLLMServer("base", quick(), log_file=tmp_path / "vllm.log", say=said.append) as server:
        lines = Path(f"/proc/{server.pid}/environ").read_bytes().decode().split("\0")
    started_with = dict(line.split("=", 1) for line in lines if line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    program = f"""
import datetime, torch.distributed
torch.distributed.init_process_group(
    "gloo", init_method={where!r}, rank=0, world_size=1, timeout=datetime.timedelta(seconds=5)
)
"""
    subprocess.run([sys.executable, "-c", program], env=started_with, check=True, timeout=120)


@pytest.mark.parametrize(
    ("servers", "devices", "each", "shares"),
    [
        (1, None, [None], [0.8]),
        (2, None, [None, None], [0.4, 0.4]),
        (1, "0,1", ["0,1"], [0.8]),
        (2, "1, 2", ["1", "2"], [0.8, 0.8]),
        (2, "0,1,2,3", ["0,1", "2,3"], [0.8, 0.8]),
        (4, "0,1", ["0", "1", "0", "1"], [0.4] * 4),
        (3, "0,1", ["0", "1", "0"], [0.4] * 3),
        (2, "3", ["3", "3"], [0.4, 0.4]),
    ],
)
def test_devices_and_memory_are_dealt_out_among_servers(servers, devices, each, shares):
    settings = VLLMSettings(servers=servers, devices=devices, gpu_memory_utilization=0.8, seed=5)
    found = settings.of_each_server()
    assert [one.devices for one in found] == each
    assert [one.gpu_memory_utilization for one in found] == pytest.approx(shares)
    assert [one.seed for one in found] == [5, 6, 7, 8][:servers]
    without = VLLMSettings(servers=servers, devices=devices).of_each_server()  # vLLM's own share is 0.9
    expected = [None if share == 0.8 else pytest.approx(share * 0.9 / 0.8) for share in shares]
    assert [one.gpu_memory_utilization for one in without] == expected


def test_a_server_that_cannot_start_says_why_and_where_the_log_is(site, tmp_path, said):
    with pytest.raises(SamplerError, match=r"Error: no such model: broken; see .*vllm\.log"):
        VLLMServer("broken", quick(), log_file=tmp_path / "vllm.log", say=said.append).start()


def test_the_reason_is_a_message_and_no_line_of_its_traceback(site, tmp_path, said):
    reason = r"did not start: RuntimeError: Worker failed with error 'Available memory on node 0 .*; see "
    with pytest.raises(SamplerError, match=reason):
        VLLMServer("too-large", quick(), log_file=tmp_path / "vllm.log", say=said.append).start()


def test_an_interpreter_without_vllm_is_named(tmp_path, said, monkeypatch):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(SamplerError, match="has no vLLM"):
        VLLMServer("base", quick(), log_file=tmp_path / "vllm.log", say=said.append).start()


def test_a_server_that_keeps_dying_ends_the_run(site, tmp_path, said, monkeypatch):
    flag = tmp_path / "die"
    monkeypatch.setenv("FAKE_VLLM_DIE", str(flag))
    settings = quick(max_restarts=2, connections=1)
    with VLLMSampler("base", settings, folder=tmp_path / "work", say=said.append) as sampler:
        stop = threading.Event()

        def replant() -> None:
            while not stop.wait(0.01):
                flag.touch()

        thread = threading.Thread(target=replant)
        thread.start()
        try:
            with pytest.raises(SamplerError, match="died 3 times in a row"):
                sampler.sample(PROMPTS, PARAMS, SEEDS)
        finally:
            stop.set()
            thread.join()


def test_the_server_goes_when_its_owner_is_killed(site, tmp_path):
    script = tmp_path / "owner.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import time
            from pathlib import Path
            from looper_trainer.sampling.vllm import VLLMServer, VLLMSettings
            server = VLLMServer("base", VLLMSettings(), log_file=Path({str(tmp_path / "vllm.log")!r}))
            server.start()
            print(server.pid, flush=True)
            time.sleep(300)
            """
        )
    )
    owner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        group = int(owner.stdout.readline())
        match = re.search(r"fake vllm (\d+) helper (\d+)", (tmp_path / "vllm.log").read_text())
        pids = [group, *map(int, match.groups())]
        assert all(map(alive, pids))
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    wait_until(lambda: not any(map(alive, pids)))


def test_an_adapter_of_too_high_a_rank_is_refused_with_the_setting_to_change(site, tmp_path, said):
    with (
        VLLMSampler("base", quick(max_lora_rank=16), folder=tmp_path, say=said.append) as sampler,
        pytest.raises(CheckpointError, match=r"rank 17.*max_lora_rank = 16"),
    ):
        sampler.load_adapter(adapter(tmp_path / "a", "one", rank=17), 1)


def test_settings_become_the_command_line_of_the_server():
    settings = VLLMSettings(
        python=Path("/opt/py"), max_lora_rank=17, max_num_seqs=7, max_model_len=512, dtype="float32",
        gpu_memory_utilization=0.45, compilation="graphs", extra_args=("--swap-space", "0"),
    )  # fmt: skip
    command = settings.command("folder/model", 8123)
    assert command[:3] == ["/opt/py", "-m", "vllm.entrypoints.openai.api_server"]
    assert command[-2:] == ["--swap-space", "0"]
    values = dict(itertools.pairwise(command))
    expected = {"--model": "folder/model", "--port": "8123", "--host": "127.0.0.1", "--max-lora-rank": "32"}
    expected |= {"--max-num-seqs": "7", "--max-model-len": "512", "--dtype": "float32"}
    expected |= {"--gpu-memory-utilization": "0.45", "--logprobs-mode": "processed_logprobs"}
    assert expected.items() <= values.items()
    assert json.loads(values["--compilation-config"])["cudagraph_mode"] == "FULL_DECODE_ONLY"
    assert "--enforce-eager" in VLLMSettings(compilation="eager").command("m", 1)
    adapted = VLLMSettings(lora_layers=("down_proj", "q_proj")).command("m", 1)
    first = adapted.index("--lora-target-modules")
    assert adapted[first + 1 : first + 4] == ["down_proj", "q_proj", "--logprobs-mode"]
    assert "--lora-target-modules" not in command
    bare = VLLMSettings(lora=False, sleep=True, nf4=True, tokens_only=True).command("m", 1)
    assert {"--enable-sleep-mode", "--skip-tokenizer-init"} <= set(bare)
    assert "--enable-lora" not in bare
    assert bare[bare.index("--quantization") + 1] == "bitsandbytes"


@pytest.mark.parametrize(
    "bad",
    [
        {"urls": ["localhost:8000"]},
        {"urls": ["http://a", "http://a/v1/"]},
        {"gpu_memory": 0.5},
        {"servers": 2, "urls": ["http://a"]},
        {"servers": 2, "sleep": True},
    ],
)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValidationError):
        VLLMSettings(**bad)
