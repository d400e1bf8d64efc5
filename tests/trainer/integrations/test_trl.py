"""The reward function of TRL, called as TRL calls it, and inside TRL's own trainers on a tiny Llama."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from looper_schemas.records import Problem, write_records
from looper_trainer.errors import DataError, RewardRejected, RewardUnavailable
from looper_trainer.integrations.trl import AsyncLooperReward, LooperReward, gold_of, question_of
from looper_trainer.reward_client import RewardClient
from looper_trainer.testing import FakeRewardServer

EXAMPLE = Path(__file__).parents[3] / "examples" / "trl_training.py"


@pytest.fixture
def server() -> Iterator[FakeRewardServer]:
    with FakeRewardServer(key="k") as running:
        yield running


@pytest.fixture
def client(server: FakeRewardServer) -> Iterator[RewardClient]:
    with RewardClient(server.url, "k", run_id="r", give_up_after_s=0.5, on_wait=lambda waiting: None) as made:
        yield made


def batch(*answers: str, question: str = "2+2?", gold: str = "4") -> dict[str, Any]:
    """A group of completions in the arguments that TRL gives to a reward function."""
    return {
        "prompts": [f"Solve: {question}"] * len(answers),
        "completions": [f"Answer: #### {answer}" for answer in answers],
        "completion_ids": [[1] * 9] * len(answers),
        "question": [question] * len(answers),
        "answer": [gold] * len(answers),
        "trainer_state": SimpleNamespace(global_step=3),
    }


def test_rewards_come_back_in_order_and_the_group_in_one_question(
    server: FakeRewardServer, client: RewardClient
) -> None:
    assert LooperReward(client=client)(**batch("4", "5", "4")) == [1.0, -0.5, 1.0]
    (request,) = server.requests
    (question,) = request.questions
    assert (question.question, question.gold_answer, request.step) == ("2+2?", "4", 3)
    assert [arm.tokens_out for arm in question.arms] == [9, 9, 9]


def test_conversations_are_read_as_their_last_question_and_answer(
    server: FakeRewardServer, client: RewardClient
) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    said = [[{"role": "assistant", "content": [{"type": "text", "text": f"#### {n}"}]}] for n in (4, 5)]
    reward = LooperReward(client=client)
    assert reward(prompts=[asked, asked], completions=said, answer=["x\n#### 4"] * 2) == [1.0, -0.5]
    assert server.requests[0].questions[0].question == "2+2?"
    with pytest.raises(DataError, match="no user message"):
        question_of([{"role": "system", "content": "Be brief."}])
    assert gold_of("She has 2 + 2 = <<2+2=4>>4.\n#### 4") == gold_of("4") == "4"


def test_scores_are_logged_through_the_hooks_of_trl(client: RewardClient) -> None:
    metrics: dict[str, float] = {}
    columns: dict[str, list[Any]] = {}
    LooperReward(client=client)(
        **batch("4", "5"), log_metric=metrics.__setitem__, log_extra=columns.__setitem__
    )
    assert metrics["looper/correct_rate"] == 0.5
    assert metrics["looper/failed_share"] == 0.0
    assert {"looper/s_end", "looper/s_path", "looper/s_cf", "looper/s_wm"} <= metrics.keys()
    assert columns["looper_correct"] == [True, False]
    assert columns["looper_s_wm"] == [metrics["looper/s_wm"]] * 2


def test_a_service_that_dies_gives_none_and_never_zero(
    server: FakeRewardServer, client: RewardClient, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = LooperReward(client=client, stop_after=2)
    assert reward(**batch("4")) == [1.0]
    server.stop()
    metrics: dict[str, float] = {}
    assert reward(**batch("4", "5"), log_metric=metrics.__setitem__) == [None, None]
    assert metrics == {"looper/failed_share": 1.0}
    assert "no score" in capsys.readouterr().err
    server.start()
    assert reward(**batch("4")) == [1.0]
    server.stop()
    assert reward(**batch("4")) == [None]
    with pytest.raises(RewardUnavailable, match="2 batches in a row have no score"):
        reward(**batch("4"))


def test_a_service_that_never_answered_or_refuses_ends_the_run(server: FakeRewardServer) -> None:
    with RewardClient(server.url, "wrong", run_id="r") as wrong, pytest.raises(RewardRejected):
        LooperReward(client=wrong)(**batch("4"))
    server.stop()
    with (
        RewardClient(server.url, "k", run_id="r", give_up_after_s=0.3, on_wait=lambda _: None) as absent,
        pytest.raises(RewardUnavailable),
    ):
        LooperReward(client=absent)(**batch("4"))


def test_the_asynchronous_form_gives_the_same(client: RewardClient) -> None:
    assert asyncio.run(AsyncLooperReward(client=client)(**batch("4", "5"))) == [1.0, -0.5]


def test_a_pickled_reward_function_carries_no_key(
    server: FakeRewardServer, client: RewardClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPER_REWARD_URL", server.url)
    monkeypatch.setenv("LOOPER_REWARD_KEY", "k")
    copy = pickle.loads(pickle.dumps(LooperReward(client=client)))
    assert copy.__name__ == "looper_reward"
    assert copy(**batch("4")) == [1.0]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--algorithm", "grpo"], ["--algorithm", "rloo", "--asynchronous"]])
def test_the_trainers_of_trl_train_on_it_and_show_a_dead_service_as_none(
    server: FakeRewardServer, tiny_model: Path, tmp_path: Path, flags: list[str]
) -> None:
    """The example as a user runs it; the service goes away after the second step."""
    problems = [Problem(id=str(n), question=f"{n}+1?", answer=str(n + 1)) for n in range(8)]
    write_records(tmp_path / "train.jsonl", problems)
    out = tmp_path / "out"
    command = [
        sys.executable,
        EXAMPLE,
        "--model",
        tiny_model,
        "--data",
        tmp_path / "train.jsonl",
        "--out",
        out,
    ]
    command += ["--steps", 4, "--questions", 2, "--samples", 3, "--max-new-tokens", 8, *flags]
    command += ["--learning-rate", 1e-3, "--give-up-after-s", 0.5]
    environment = os.environ | {"LOOPER_REWARD_URL": server.url, "LOOPER_REWARD_KEY": "k"}
    real = server._response

    def die_after_two(*given: Any) -> Any:
        if len(server.requests) == 1:
            server.faults.unavailable = 10**6  # from the next request on
        return real(*given)

    server._response = die_after_two  # type: ignore[method-assign]
    done = subprocess.run(
        [str(word) for word in [*command]],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [len(request.questions) for request in server.requests] == [2, 2]
    assert {len(q.arms) for request in server.requests for q in request.questions} == {3}
    steps = [
        row for row in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ]
    assert [row["reward"] is None for row in steps] == [False, False, True, True]
    assert [row["rewards/looper_reward/mean"] is None for row in steps] == [False, False, True, True]
    assert [row["looper/failed_share"] for row in steps] == [0.0, 0.0, 1.0, 1.0]
    assert [row["grad_norm"] > 0 for row in steps][2:] == [False, False]
    assert "looper: step 2: no score" in done.stderr
