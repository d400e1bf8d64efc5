"""Coherence over HTTP against the public fake service; figures against naive loops and scikit-learn."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import stamina
from sklearn.metrics import roc_auc_score

from looper_eval.cli import main
from looper_eval.coherence import auroc, plurality_is_right, selective_accuracy
from looper_schemas.records import EvalRecord
from looper_schemas.scoring import Disclosure, Purpose
from looper_trainer.reward_client import RewardClient, Waiting
from looper_trainer.testing import FakeRewardServer

Models = tuple[Path, Path]
SAMPLES = 3


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRewardServer]:
    with FakeRewardServer(reward_key="rewards-only") as server:
        monkeypatch.setenv("LOOPER_REWARD_URL", server.url)
        monkeypatch.setenv("LOOPER_REWARD_KEY", server.key)
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The seconds of every wait for the service, which pass on the client's clock alone."""
    seconds: list[float] = []
    from_environment = RewardClient.from_environment

    def on_wait(waiting: Waiting) -> None:
        seconds.append(waiting.next_try_s)

    def client(**options: Any) -> RewardClient:
        return from_environment(**options, on_wait=on_wait)

    monkeypatch.setattr(RewardClient, "from_environment", client)
    clock = SimpleNamespace(monotonic=lambda: sum(seconds))
    monkeypatch.setattr("looper_trainer.reward_http.time", clock)
    with stamina.set_testing(True, attempts=10_000):
        yield seconds


def call(models: Models, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "run", "--model", f"m={models[0]}", "--dataset", str(data), "--out", str(out), "--device", "cpu",
        "--max-new-tokens", "6", "--coherence", str(SAMPLES), *more,
    ]  # fmt: skip


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_scored_apart_and_the_accuracy_stays_that_of_single_answers(
    service: FakeRewardServer, tiny_models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    command = call(tiny_models, dataset_file, out)
    assert main(command) == 0
    assert main([*call(tiny_models, dataset_file, plain)[:-2]]) == 0
    assert (out / "m.jsonl").read_bytes() == (plain / "m.jsonl").read_bytes()
    assert len(rows(out / "m.samples.jsonl")) == 12 * SAMPLES
    assert len({row["output"] for row in rows(out / "m.samples.jsonl")}) > 12  # drawn, not greedy

    sent = {question.id: question for request in service.requests for question in request.questions}
    assert {request.purpose for request in service.requests} == {Purpose.EVAL}
    assert {request.disclosure for request in service.requests} == {Disclosure.COMPONENTS}
    for row in rows(out / "m.samples.jsonl"):
        question = sent[str(row["id"])]
        assert question.gold_answer is None  # the service is not told
        assert question.arms[int(str(row["sample"]))].full_text == row["output"]

    # The command again: nothing is drawn or scored twice.
    before, requests = (out / "m.coherence.jsonl").read_bytes(), len(service.requests)
    assert main(command) == 0
    assert (out / "m.coherence.jsonl").read_bytes() == before
    assert len(service.requests) == requests

    found = json.loads((out / "summary.json").read_text())["coherence"]["m"]
    assert (found["scored"], found["unscored"], found["scorer_id"]) == (12, 0, service.scorer_id)
    assert found["mean"] == pytest.approx(
        mean(row["scores"]["s_wm"] for row in rows(out / "m.coherence.jsonl"))
    )
    assert main(["report", str(out)]) == 0
    assert "Coherence against correctness" in (out / "report.md").read_text()
    assert "Accuracy on the most coherent questions" in (out / "report.html").read_text()


def test_the_service_may_be_away_while_samples_are_drawn_and_once_all_are_scored(
    tiny_models: Models,
    dataset_file: Path,
    tmp_path: Path,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = call(tiny_models, dataset_file, out)
    monkeypatch.setenv("LOOPER_REWARD_URL", "http://127.0.0.1:1")  # nobody listens there
    monkeypatch.setenv("LOOPER_REWARD_KEY", "a-key")
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("error: no answer from the reward service")
    assert sum(waits) < 45  # the client's 30 s once, not twice
    drawn = (out / "m.samples.jsonl").read_bytes()
    assert len(drawn.splitlines()) == 12 * SAMPLES

    with FakeRewardServer() as server, monkeypatch.context() as there:
        there.setenv("LOOPER_REWARD_URL", server.url)
        there.setenv("LOOPER_REWARD_KEY", server.key)
        assert main(command) == 0
    assert (out / "m.samples.jsonl").read_bytes() == drawn
    waits.clear()
    (out / "summary.json").unlink()
    assert main(command) == 0
    assert json.loads((out / "summary.json").read_text())["coherence"]["m"]["scored"] == 12
    assert waits == []


def test_a_question_without_a_score_is_counted_and_asked_again_and_is_never_zero(
    service: FakeRewardServer, tiny_models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    service.faults.failing_is_retryable = False
    service.faults.failing = {"train/3": 1, "train/5": 1}
    assert main(call(tiny_models, dataset_file, out)) == 0
    found = json.loads((out / "summary.json").read_text())["coherence"]["m"]
    assert (found["scored"], found["unscored"]) == (10, 2)
    assert not {"train/3", "train/5"} & {row["id"] for row in rows(out / "m.coherence.jsonl")}
    # A kill within a line: that question and the two others are scored now.
    content = (out / "m.coherence.jsonl").read_bytes()
    (out / "m.coherence.jsonl").write_bytes(content[:-20])
    service.requests.clear()
    assert main(call(tiny_models, dataset_file, out)) == 0
    assert sum(len(request.questions) for request in service.requests) == 3
    assert json.loads((out / "summary.json").read_text())["coherence"]["m"]["scored"] == 12


def test_scores_of_another_scorer_or_other_samples_never_mix(
    service: FakeRewardServer,
    tiny_models: Models,
    dataset_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    service.faults.failing_is_retryable = False
    service.faults.failing = {"train/3": 1}
    assert main(call(tiny_models, dataset_file, out)) == 0
    with FakeRewardServer(scorer_id="another") as other:
        monkeypatch.setenv("LOOPER_REWARD_URL", other.url)
        monkeypatch.setenv("LOOPER_REWARD_KEY", other.key)
        assert main(call(tiny_models, dataset_file, out)) == 2
        assert "another" in capsys.readouterr().err
        assert other.requests == []


def test_a_key_without_the_scope_a_missing_address_or_one_sample_is_one_line(
    service: FakeRewardServer,
    tiny_models: Models,
    dataset_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = call(tiny_models, dataset_file, tmp_path / "out")
    assert main([*command[:-1], "1"]) == 2
    assert "--coherence is 1" in capsys.readouterr().err
    most = service.limits.max_arms
    assert main([*command[:-1], str(most + 1)]) == 2
    assert f"the reward service takes at most {most} samples" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("LOOPER_REWARD_KEY", "rewards-only")
    assert main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    monkeypatch.delenv("LOOPER_REWARD_URL")
    assert main(call(tiny_models, dataset_file, tmp_path / "new")) == 2
    assert "LOOPER_REWARD_URL" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_scikit_learns_ties_included(seed: int) -> None:
    rng = random.Random(seed)
    flags = [True, False] + [rng.random() < 0.4 for _ in range(60)]
    scores = [round(rng.random() + 0.3 * flag, 1) for flag in flags]
    assert auroc(scores, flags) == pytest.approx(roc_auc_score(flags, scores))
    assert auroc(scores, [True] * len(flags)) is None


def test_selective_accuracy_is_the_mean_over_all_orders_of_equal_scores() -> None:
    scores, correct = [0.9, 0.5, 0.5, 0.5, 0.1], [True, True, False, False, True]
    expected = []
    for kept in range(1, 6):
        orders = [
            [correct[0], *(correct[1 + i] for i in order), correct[4]]
            for order in itertools.permutations(range(3))
        ]
        expected.append(mean(mean(map(float, order[:kept])) for order in orders))
    assert selective_accuracy(scores, correct, [0.2, 0.4, 0.6, 0.8, 1.0]) == pytest.approx(expected)
    assert selective_accuracy(scores, correct, [0.01]) == [1.0]  # at least one question


def test_plurality_is_of_finished_answers_and_the_first_wins_a_tie() -> None:
    def sample(answer: str | None, reason: str = "stop") -> EvalRecord:
        return EvalRecord(
            id="q", question="Q?", gold_answer="5", output="", final_answer=answer, correct=False,
            finish_reason=reason, settings_digest="d",
        )  # fmt: skip

    assert plurality_is_right([sample("5"), sample("6"), sample("5")], "5")
    assert plurality_is_right([sample("5"), sample("6")], "5")
    assert not plurality_is_right([sample("6"), sample("5")], "5")
    assert plurality_is_right([sample("6", "length"), sample("6", "length"), sample("5")], "5")
    assert not plurality_is_right([sample(None), sample(None), sample("6")], "5")
    assert not plurality_is_right([sample(None)], "5")
