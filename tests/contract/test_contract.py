"""Wire contract 1.0, the same promises asked of the public fake server and of the private service."""

from __future__ import annotations

import json
import uuid
from typing import Any

import httpx
import pytest

from looper_schemas.problems import PROBLEM_CONTENT_TYPE, PROBLEMS, Problem, ProblemCode
from looper_schemas.scoring import (
    Arm,
    Purpose,
    Question,
    RewardMode,
    ScoredQuestion,
    ScoreResponse,
    ServiceInfo,
)
from looper_trainer.errors import RewardRejected, ScorerMismatch
from looper_trainer.reward_client import RewardClient

from .conftest import Service

TEXTS = {
    "right": "Natalia sold 48 / 2 = 24 clips in May.\nTogether 48 + 24 = 72.\nAnswer: #### 72",
    "also": "April gives 48 clips and May half of it, 24.\nIn total 24 + 48 = 72 clips.\nAnswer: #### 72",
    "wrong": "She sold 48 * 2 = 96 in May.\nTogether 48 + 96 = 144.\nAnswer: #### 144",
    "none": "I cannot tell.",
}


def body(**changes: Any) -> dict[str, Any]:
    """A request of two questions with ids that are no indices and arms whose ids are no places."""
    questions = [
        {
            "id": name,
            "question": f"How many clips did Natalia sell ({name})?",
            "gold_answer": "72",
            "arms": [
                {"id": f"arm-{key}", "full_text": TEXTS[key], "tokens_out": 30, "finish_reason": "stop"}
                for key in keys
            ],
        }
        for name, keys in (
            ("gsm8k/train/17", ("right", "wrong", "none")),
            ("x", ("wrong", "also", "right", "none")),
        )
    ]
    return {
        "contract": "1.0",
        "run_id": "contract",
        "step": 0,
        "purpose": "train",
        "reward_mode": "arm_gated",
        "disclosure": "components",
        "questions": questions,
        **changes,
    }


def post(
    service: Service,
    content: dict[str, Any] | bytes,
    *,
    key: str | None = None,
    idempotency: str | None = None,
) -> httpx.Response:
    payload = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency or uuid.uuid4().hex}
    with service.client(key) as client:
        return client.post("/v1/score", content=payload, headers=headers)


def scored(reply: httpx.Response) -> dict[str, ScoredQuestion]:
    assert reply.status_code == 200, reply.text
    parsed = ScoreResponse.model_validate_json(reply.content)
    results = {result.id: result for result in parsed.results}
    assert len(results) == len(parsed.results)
    for result in results.values():
        assert isinstance(result, ScoredQuestion)
    return results  # type: ignore[return-value]


def assert_problem(reply: httpx.Response, code: ProblemCode) -> None:
    assert reply.status_code == PROBLEMS[code].status, reply.text
    assert reply.headers["content-type"].split(";")[0] == PROBLEM_CONTENT_TYPE
    problem = Problem.model_validate_json(reply.content)
    assert problem.type == f"urn:looper:problem:{code.value}"
    assert problem.title == PROBLEMS[code].title
    assert problem.status == reply.status_code
    assert problem.retryable is PROBLEMS[code].retryable


# /livez and /v1/info


def test_liveness_needs_no_key(service: Service) -> None:
    with service.client("") as client:
        assert client.get("/livez").status_code == 200


def test_info_states_contract_scorer_limits_modes_and_ranges(service: Service) -> None:
    with service.client() as client:
        info = ServiceInfo.model_validate_json(client.get("/v1/info").content)
    assert info.contract_min == info.contract_max == "1.0"
    assert set(info.reward_modes) == set(RewardMode)
    assert info.ranges.keys() == {mode.value for mode in RewardMode}
    assert all(span.low < span.high for span in info.ranges.values())


# What a score request answers


def test_results_and_arms_are_keyed_by_their_ids(service: Service) -> None:
    results = scored(post(service, body()))
    assert set(results) == {"gsm8k/train/17", "x"}
    assert {arm.id for arm in results["x"].arms} == {"arm-wrong", "arm-also", "arm-right", "arm-none"}
    assert {arm.id for arm in results["gsm8k/train/17"].arms} == {"arm-right", "arm-wrong", "arm-none"}


def test_right_answers_earn_more_than_wrong_ones_and_flags_say_which_is_which(service: Service) -> None:
    result = scored(post(service, body()))["x"]
    rewards = {arm.id: arm.reward for arm in result.arms}
    assert result.correct_flags == (False, True, True, False)
    assert min(rewards["arm-right"], rewards["arm-also"]) > max(rewards["arm-wrong"], rewards["arm-none"])
    assert result.reward == pytest.approx(sum(rewards.values()) / 4)


@pytest.mark.parametrize("mode", [mode.value for mode in RewardMode])
def test_rewards_lie_in_the_announced_range(service: Service, mode: str) -> None:
    with service.client() as client:
        span = ServiceInfo.model_validate_json(client.get("/v1/info").content).ranges[mode]
    for result in scored(post(service, body(reward_mode=mode))).values():
        for arm in result.arms:
            assert span.low - 1e-9 <= arm.reward <= span.high + 1e-9


def test_mode_question_gives_every_arm_the_same(service: Service) -> None:
    for result in scored(post(service, body(reward_mode="question"))).values():
        assert len({arm.reward for arm in result.arms}) == 1


def test_without_a_gold_answer_correctness_is_unknown(service: Service) -> None:
    content = body()
    content["questions"][1]["gold_answer"] = None
    assert scored(post(service, content))["x"].correct_flags == (None,) * 4


def test_a_question_with_one_arm_is_degenerate_and_one_without_arms_is_answered(service: Service) -> None:
    content = body()
    content["questions"][0]["arms"] = content["questions"][0]["arms"][:1]
    content["questions"][1]["arms"] = []
    results = scored(post(service, content))
    assert results["gsm8k/train/17"].degenerate
    assert len(results["gsm8k/train/17"].arms) == 1
    assert results["x"].degenerate
    assert results["x"].arms == ()


# Determinism


def test_the_same_request_gives_the_same_results(service: Service) -> None:
    first, second = (post(service, body()) for _ in range(2))
    strip = {"request_id"}
    one, two = ({k: v for k, v in reply.json().items() if k not in strip} for reply in (first, second))
    assert one == two


def test_a_batch_gives_what_its_questions_give_alone(service: Service) -> None:
    together = scored(post(service, body()))
    for question in body()["questions"]:
        alone = scored(post(service, body(questions=[question])))
        assert alone[question["id"]] == together[question["id"]]


def test_the_order_of_arms_changes_no_reward(service: Service) -> None:
    content = body()
    for question in content["questions"]:
        question["arms"].reverse()
    straight, turned = scored(post(service, body())), scored(post(service, content))
    for name, result in straight.items():
        before = {arm.id: arm.reward for arm in result.arms}
        after = {arm.id: arm.reward for arm in turned[name].arms}
        assert after == pytest.approx(before, abs=1e-9)
        assert result.scores is not None
        assert turned[name].scores is not None
        assert turned[name].scores.model_dump() == pytest.approx(result.scores.model_dump(), abs=1e-9)


# Idempotency


def test_a_repeated_key_gives_the_same_bytes(service: Service) -> None:
    key = uuid.uuid4().hex
    first = post(service, body(), idempotency=key)
    again = post(service, body(), idempotency=key)
    assert first.status_code == again.status_code == 200
    assert again.content == first.content


def test_a_repeated_key_with_another_body_is_refused(service: Service) -> None:
    key = uuid.uuid4().hex
    assert post(service, body(), idempotency=key).status_code == 200
    assert_problem(post(service, body(step=1), idempotency=key), ProblemCode.IDEMPOTENCY_MISMATCH)


# Authentication and disclosure


@pytest.mark.parametrize("key", ["", "wrong", "x" * 500])
@pytest.mark.parametrize("path", ["/v1/info", "/v1/score"])
def test_without_a_valid_key_nothing_is_answered(service: Service, key: str, path: str) -> None:
    with service.client(key) as client:
        reply = client.get(path) if path == "/v1/info" else client.post(path, json=body())
    assert_problem(reply, ProblemCode.UNAUTHENTICATED)
    assert "www-authenticate" in reply.headers


def test_a_key_without_the_scope_is_refused_and_never_downgraded(service: Service) -> None:
    assert_problem(post(service, body(), key=service.reward_key), ProblemCode.FORBIDDEN)


def test_disclosure_reward_reveals_neither_scores_nor_flags(service: Service) -> None:
    full = scored(post(service, body()))
    for key in (service.reward_key, service.full_key):
        for name, result in scored(post(service, body(disclosure="reward"), key=key)).items():
            assert result.scores is None
            assert result.correct_flags is None
            assert result.arms == full[name].arms


# Refusals


def test_another_scorer_is_a_conflict(service: Service) -> None:
    assert_problem(post(service, body(scorer_id="another")), ProblemCode.SCORER_MISMATCH)
    own = ScoreResponse.model_validate_json(post(service, body()).content).scorer_id
    assert post(service, body(scorer_id=own)).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"contract": "2.0"},
        {"purpose": "fun"},
        {"step": -1},
        {"step": "1"},
        {"questions": []},
        {"reward_mode": None},
        {"run_id": ""},
    ],
)
def test_a_request_outside_the_contract_is_refused(service: Service, change: dict[str, Any]) -> None:
    assert_problem(post(service, body(**change)), ProblemCode.INVALID_REQUEST)


def test_unknown_fields_of_arms_and_repeated_ids_are_refused(service: Service) -> None:
    surprising, textless, twins = body(), body(), body()
    surprising["questions"][0]["arms"][0]["surprise"] = 1
    textless["questions"][0]["arms"][0]["full_text"] = None
    twins["questions"][1]["id"] = twins["questions"][0]["id"]
    for content in (surprising, textless, twins):
        assert_problem(post(service, content), ProblemCode.INVALID_REQUEST)


@pytest.mark.parametrize("content", [b"{", b"", b'{"contract": "1.0"', b"\xff\xfe{}"])
def test_what_is_no_json_is_malformed(service: Service, content: bytes) -> None:
    assert_problem(post(service, content), ProblemCode.MALFORMED_REQUEST)


def test_nothing_that_was_sent_comes_back_in_an_error(service: Service) -> None:
    secret = "do-not-repeat-me"
    refused = [
        post(service, body(**{secret: secret})),
        post(service, body(run_id=secret, scorer_id=secret)),
        post(service, body(run_id=secret), key=secret),
        post(service, f'{{"{secret}'.encode()),
    ]
    for reply in refused:
        assert reply.status_code >= 400
        assert secret not in reply.text


def test_other_content_types_and_paths_and_methods_are_refused(service: Service) -> None:
    with service.client() as client:
        form = client.post("/v1/score", content=b"a=1", headers={"Content-Type": "text/plain"})
        assert_problem(form, ProblemCode.UNSUPPORTED_MEDIA_TYPE)
        assert_problem(client.get("/v1/secrets"), ProblemCode.NOT_FOUND)
        assert_problem(client.get("/v1/score"), ProblemCode.METHOD_NOT_ALLOWED)


def test_a_body_beyond_the_announced_limit_is_refused(service: Service) -> None:
    with service.client() as client:
        limit = ServiceInfo.model_validate_json(client.get("/v1/info").content).limits.max_body_bytes
    content = b'{"contract": "1.0", "padding": "' + b"x" * limit + b'"}'
    assert_problem(post(service, content), ProblemCode.REQUEST_TOO_LARGE)


# The public client against either


def question(name: str) -> Question:
    arms = tuple(Arm(id=key, full_text=text) for key, text in TEXTS.items())
    return Question(id=name, question="How many clips?", gold_answer="72", arms=arms)


def test_the_client_scores_more_questions_than_one_request_may_hold(service: Service) -> None:
    with RewardClient(service.url, service.full_key, run_id="contract", give_up_after_s=60) as client:
        limit = client.info().limits.max_questions
        names = [f"q{n}" for n in range(min(limit + 1, 70))]
        results = client.score([question(name) for name in names], step=0, purpose=Purpose.TRAIN)
    assert list(results) == names
    assert len({result.model_copy(update={"id": ""}) for result in results.values()}) == 1


def test_the_client_names_what_is_wrong(service: Service) -> None:
    with RewardClient(service.url, "wrong", run_id="c") as client, pytest.raises(RewardRejected, match="401"):
        client.info()
    with (
        RewardClient(service.url, service.reward_key, run_id="c") as client,
        pytest.raises(RewardRejected, match="403"),
    ):
        client.score([question("q")], step=0, purpose=Purpose.TRAIN)
    with (
        RewardClient(service.url, service.full_key, run_id="c", scorer_id="before") as client,
        pytest.raises(ScorerMismatch),
    ):
        client.score([question("q")], step=0, purpose=Purpose.TRAIN)
