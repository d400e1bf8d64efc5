"""The wire contract refuses whatever is not exactly it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from looper_schemas import scoring
from looper_schemas.scoring import (
    Arm,
    ArmReward,
    Disclosure,
    FailedQuestion,
    Limits,
    Purpose,
    Question,
    RewardMode,
    RewardRange,
    ScoredQuestion,
    ScoreRequest,
    ScoreResponse,
    Scores,
    ServiceInfo,
    WireModel,
)

REQUEST: dict[str, Any] = {
    "contract": "1.0",
    "run_id": "ppo-7",
    "step": 12,
    "purpose": "train",
    "scorer_id": None,
    "reward_mode": "arm_gated",
    "disclosure": "components",
    "questions": [
        {
            "id": "gsm8k/train/17",
            "question": "How many?",
            "gold_answer": "72",
            "arms": [
                {
                    "id": "0",
                    "arm": None,
                    "answer": "72",
                    "reasoning": "48 + 24",
                    "full_text": "48 + 24\n#### 72",
                    "tokens_out": 143,
                    "finish_reason": "stop",
                }
            ],
        }
    ],
}
RESPONSE: dict[str, Any] = {
    "contract": "1.0",
    "request_id": "r",
    "scorer_id": "s",
    "request_digest": "d",
    "results": [
        {
            "id": "gsm8k/train/17",
            "status": "scored",
            "reward": 1.25,
            "degenerate": False,
            "scores": {"s_end": 0.5, "s_path": 0.25, "s_cf": 0.75, "s_wm": 0.125},
            "correct_flags": [True, None],
            "arms": [{"id": "0", "reward": 1.25}],
        },
        {
            "id": "gsm8k/train/18",
            "status": "failed",
            "error": {"code": "scorer_timeout", "retryable": True},
        },
    ],
}
INFO: dict[str, Any] = {
    "contract_min": "1.0",
    "contract_max": "1.0",
    "scorer_id": "s",
    "limits": {"max_questions": 64, "max_arms": 8, "max_text_chars": 1000, "max_body_bytes": 1 << 20},
    "reward_modes": ["question", "arm", "arm_gated"],
    "ranges": {"arm_gated": {"low": -1.0, "high": 2.0}},
}
MESSAGES = [(ScoreRequest, REQUEST), (ScoreResponse, RESPONSE), (ServiceInfo, INFO)]


def _changed(message: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A deep copy of `message` with the field at the dotted `path` set."""
    copy: dict[str, Any] = json.loads(json.dumps(message))
    node: Any = copy
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parents:
        node = node[part]
    node[last] = value
    return copy


def _refused(kind: type[WireModel], message: dict[str, Any]) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps(message))
    return caught.value


@pytest.mark.parametrize(("kind", "message"), MESSAGES, ids=["request", "response", "info"])
def test_messages_of_the_contract_survive_json(kind: type[WireModel], message: dict[str, Any]) -> None:
    parsed = kind.model_validate_json(json.dumps(message))
    assert kind.model_validate_json(parsed.model_dump_json()) == parsed
    written = json.loads(parsed.model_dump_json(exclude_unset=True))
    assert written == message


def test_a_reply_is_scored_or_failed_by_its_status() -> None:
    scored, failed = ScoreResponse.model_validate_json(json.dumps(RESPONSE)).results
    assert isinstance(scored, ScoredQuestion)
    assert isinstance(failed, FailedQuestion)
    assert scored.reward == 1.25
    assert failed.error.retryable


def test_defaults_are_the_gated_mode_and_the_least_disclosure() -> None:
    request = ScoreRequest.model_validate_json(
        json.dumps({key: REQUEST[key] for key in ("run_id", "step", "purpose", "questions")})
    )
    assert request.contract == "1.0"
    assert request.reward_mode is RewardMode.ARM_GATED
    assert request.disclosure is Disclosure.REWARD
    assert request.purpose is Purpose.TRAIN
    assert request.scorer_id is None


@pytest.mark.parametrize(
    ("kind", "message", "path"),
    [
        (ScoreRequest, REQUEST, "surprise"),
        (ScoreRequest, REQUEST, "questions.0.surprise"),
        (ScoreRequest, REQUEST, "questions.0.arms.0.surprise"),
        (ScoreResponse, RESPONSE, "surprise"),
        (ScoreResponse, RESPONSE, "results.0.surprise"),
        (ScoreResponse, RESPONSE, "results.0.scores.surprise"),
        (ScoreResponse, RESPONSE, "results.0.arms.0.surprise"),
        (ScoreResponse, RESPONSE, "results.1.reward"),
        (ScoreResponse, RESPONSE, "results.1.error.surprise"),
        (ServiceInfo, INFO, "limits.surprise"),
    ],
)
def test_unknown_fields_are_refused_at_every_depth(
    kind: type[WireModel], message: dict[str, Any], path: str
) -> None:
    error = _refused(kind, _changed(message, path, 0))
    named = {
        ".".join(map(str, detail["loc"])) for detail in error.errors() if detail["type"] == "extra_forbidden"
    }
    assert len(named) == 1
    assert named.pop().endswith(path.rpartition(".")[2])


def test_every_message_kind_is_closed_and_frozen() -> None:
    kinds = [
        kind for kind in vars(scoring).values() if isinstance(kind, type) and issubclass(kind, WireModel)
    ]
    assert len(kinds) >= 13
    for kind in kinds:
        assert kind.model_config["extra"] == "forbid", kind
        assert kind.model_config["frozen"], kind
        assert kind.model_config["strict"], kind
        assert not kind.model_config["allow_inf_nan"], kind
    reward = ArmReward(id="0", reward=1.0)
    with pytest.raises(ValidationError, match="frozen"):
        reward.reward = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "path", ["reward", "scores.s_end", "scores.s_path", "scores.s_cf", "scores.s_wm", "arms.0.reward"]
)
def test_nan_and_infinity_are_refused_in_python_and_in_json(path: str, number: float) -> None:
    message = _changed(RESPONSE, f"results.0.{path}", number)
    _refused(ScoreResponse, message)
    with pytest.raises(ValidationError):
        ScoreResponse.model_validate(message)


def test_overflowing_json_numbers_are_refused() -> None:
    for number in ("1e999", "-1e999"):
        with pytest.raises(ValidationError):
            ArmReward.model_validate_json(f'{{"id": "0", "reward": {number}}}')
        with pytest.raises(ValidationError):
            RewardRange.model_validate_json(f'{{"low": {number}, "high": 1.0}}')


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("contract", "1.1"),
        ("contract", 1.0),
        ("run_id", ""),
        ("run_id", "x" * 201),
        ("run_id", None),
        ("step", -1),
        ("step", 2**53 + 1),
        ("step", "12"),
        ("step", 1.5),
        ("step", True),
        ("purpose", "benchmark"),
        ("reward_mode", "sum"),
        ("disclosure", "everything"),
        ("scorer_id", ""),
        ("questions", []),
        ("questions", {}),
        ("questions", None),
        ("questions.0.id", ""),
        ("questions.0.id", 17),
        ("questions.0.question", None),
        ("questions.0.question", "x" * (scoring.MAX_TEXT_CHARS + 1)),
        ("questions.0.gold_answer", 72),
        ("questions.0.gold_answer", "7" * 10_001),
        ("questions.0.arms.0.arm", -1),
        ("questions.0.arms.0.arm", scoring.MAX_ARMS),
        ("questions.0.arms.0.answer", 72),
        ("questions.0.arms.0.answer", "7" * 10_001),
        ("questions.0.arms.0.tokens_out", -1),
        ("questions.0.arms.0.tokens_out", 10_000_001),
        ("questions.0.arms.0.finish_reason", "tired"),
        ("questions.0.arms.0.full_text", "x" * (scoring.MAX_TEXT_CHARS + 1)),
    ],
)
def test_values_outside_the_contract_are_refused(path: str, value: Any) -> None:
    error = _refused(ScoreRequest, _changed(REQUEST, path, value))
    location = ".".join(str(part) for part in error.errors()[0]["loc"])
    assert location.startswith(path), "the error names another field"


@pytest.mark.parametrize("value", [-1e-9, 1 + 1e-9, "0.5", True])
@pytest.mark.parametrize("name", ["s_end", "s_path", "s_cf", "s_wm"])
def test_scores_lie_between_zero_and_one(name: str, value: Any) -> None:
    _refused(ScoreResponse, _changed(RESPONSE, f"results.0.scores.{name}", value))


def test_only_the_blend_of_scores_is_always_defined() -> None:
    assert Scores(s_end=None, s_path=None, s_cf=None, s_wm=0.0).s_wm == 0.0
    _refused(ScoreResponse, _changed(RESPONSE, "results.0.scores.s_wm", None))


def test_an_arm_needs_some_text_and_one_kind_is_enough() -> None:
    assert Arm(id="0", reasoning="r").full_text is None
    assert Arm(id="0", full_text="").reasoning is None
    with pytest.raises(ValidationError, match="reasoning or full_text"):
        Arm(id="0", answer="72")


def test_repeated_ids_are_refused() -> None:
    arm = Arm(id="0", full_text="x")
    with pytest.raises(ValidationError, match="arm ids repeat"):
        Question(id="q", question="?", arms=(arm, arm))
    question = Question(id="q", question="?", arms=(arm,))
    with pytest.raises(ValidationError, match="question ids repeat"):
        ScoreRequest(run_id="r", step=0, purpose=Purpose.TRAIN, questions=(question, question))
    other = Question(id="p", question="?", arms=(arm,))
    assert (
        len(ScoreRequest(run_id="r", step=0, purpose=Purpose.EVAL, questions=(question, other)).questions)
        == 2
    )


def test_counts_are_bounded_and_no_arm_is_allowed() -> None:
    arms = [{"id": str(i), "full_text": ""} for i in range(scoring.MAX_ARMS + 1)]
    _refused(Question, {"id": "q", "question": "?", "arms": arms})
    assert (
        len(Question.model_validate({"id": "q", "question": "?", "arms": arms[:-1]}).arms) == scoring.MAX_ARMS
    )
    assert Question(id="q", question="?", arms=()).arms == ()
    questions = [{"id": str(i), "question": "?", "arms": []} for i in range(scoring.MAX_QUESTIONS + 1)]
    _refused(ScoreRequest, _changed(REQUEST, "questions", questions))


def test_an_empty_limit_is_refused() -> None:
    for name in ("max_questions", "max_arms", "max_text_chars", "max_body_bytes"):
        _refused(ServiceInfo, _changed(INFO, f"limits.{name}", 0))
    assert Limits(max_questions=1, max_arms=1, max_text_chars=1, max_body_bytes=1).max_arms == 1


UNIT = st.floats(0, 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(
    st.lists(IDS, min_size=1, max_size=4, unique=True),
    TEXT,
    st.none() | TEXT,
    st.integers(0, 2**53),
    st.sampled_from(list(RewardMode)),
    st.sampled_from(list(Disclosure)),
)
def test_any_request_round_trips(
    ids: list[str], text: str, gold: str | None, step: int, mode: RewardMode, disclosure: Disclosure
) -> None:
    arms = tuple(Arm(id=name, full_text=text, answer=gold) for name in ids)
    questions = tuple(Question(id=name, question=text, gold_answer=gold, arms=arms) for name in ids)
    request = ScoreRequest(
        run_id="r",
        step=step,
        purpose=Purpose.ROLLOUT,
        questions=questions,
        reward_mode=mode,
        disclosure=disclosure,
    )
    assert ScoreRequest.model_validate_json(request.model_dump_json()) == request


@given(st.floats(allow_nan=False, allow_infinity=False), UNIT, st.none() | UNIT, st.booleans())
def test_any_score_round_trips_to_the_last_bit(
    reward: float, s_wm: float, s_end: float | None, flag: bool
) -> None:
    result = ScoredQuestion(
        id="q",
        reward=reward,
        degenerate=flag,
        scores=Scores(s_end=s_end, s_path=None, s_cf=s_end, s_wm=s_wm),
        correct_flags=(flag, None),
        arms=(ArmReward(id="0", reward=reward),),
    )
    assert ScoredQuestion.model_validate_json(result.model_dump_json()) == result
