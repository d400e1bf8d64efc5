"""The client against a real HTTP server that fails in every way a service can."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from looper_schemas import records
from looper_schemas.problems import ProblemCode
from looper_schemas.scoring import (
    Arm,
    Disclosure,
    FailedQuestion,
    FinishReason,
    Limits,
    Purpose,
    Question,
    RewardMode,
    ScoredQuestion,
)
from looper_trainer.errors import ConfigError, RewardRejected, RewardUnavailable, ScorerMismatch
from looper_trainer.reward_client import Announcer, RewardClient, Waiting, as_question
from looper_trainer.sampling.base import Completion
from looper_trainer.testing import FakeRewardServer


def question(name: str, *texts: str, gold: str = "72") -> Question:
    arms = tuple(Arm(id=str(place), full_text=text) for place, text in enumerate(texts))
    return Question(id=name, question=f"What is {name}?", gold_answer=gold, arms=arms)


RIGHT, WRONG = "So 36 + 36 = 72.\nAnswer: #### 72", "So 30 + 30 = 60.\nAnswer: #### 60"
QUESTIONS = [question(f"q{n}", RIGHT, WRONG) for n in range(5)]


@pytest.fixture
def server() -> Iterator[FakeRewardServer]:
    with FakeRewardServer() as running:
        yield running


def client_of(server: FakeRewardServer, **options: Any) -> RewardClient:
    options = {"run_id": "test", "give_up_after_s": 20.0, "on_wait": lambda _: None} | options
    return RewardClient(server.url, options.pop("key", server.key), **options)


def rewards(result: ScoredQuestion | FailedQuestion) -> dict[str, float]:
    assert isinstance(result, ScoredQuestion)
    return {arm.id: arm.reward for arm in result.arms}


def test_every_question_comes_back_under_its_id_with_its_rewards(server: FakeRewardServer) -> None:
    with client_of(server) as client:
        results = client.score(QUESTIONS, step=3, purpose=Purpose.TRAIN)
    assert set(results) == {"q0", "q1", "q2", "q3", "q4"}
    assert all(rewards(result) == {"0": 1.0, "1": -0.5} for result in results.values())
    (request,) = server.requests
    assert (request.run_id, request.step, request.purpose) == ("test", 3, Purpose.TRAIN)
    assert request.reward_mode is RewardMode.ARM_GATED
    assert request.disclosure is Disclosure.COMPONENTS


def test_batches_follow_the_limits_of_the_service() -> None:
    limits = Limits(max_questions=2, max_arms=4, max_text_chars=1000, max_body_bytes=10**6)
    with FakeRewardServer(limits=limits) as server, client_of(server) as client:
        assert len(client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)) == 5
        assert [len(request.questions) for request in server.requests] == [2, 2, 1]


def test_batches_follow_the_limit_of_bytes() -> None:
    limits = Limits(max_questions=64, max_arms=4, max_text_chars=10_000, max_body_bytes=8000)
    long = [question(f"q{n}", "x" * 2500) for n in range(5)]
    with FakeRewardServer(limits=limits) as server, client_of(server) as client:
        assert len(client.score(long, step=0, purpose=Purpose.TRAIN)) == 5
        assert [len(request.questions) for request in server.requests] == [2, 2, 1]


@pytest.mark.parametrize(
    "monster", [question("m", "x" * 1001), question("m", "a", "b", "c"), question("m", "é" * 900, "é" * 900)]
)
def test_a_question_beyond_the_limits_fails_alone(monster: Question) -> None:
    limits = Limits(max_questions=8, max_arms=2, max_text_chars=1000, max_body_bytes=5000)
    with FakeRewardServer(limits=limits) as server, client_of(server) as client:
        results = client.score([monster, question("q", RIGHT)], step=0, purpose=Purpose.TRAIN)
    failed = results["m"]
    assert isinstance(failed, FailedQuestion)
    assert failed.error.retryable is False
    assert rewards(results["q"]) == {"0": 1.0}


@pytest.mark.parametrize("fault", ["unavailable", "dropped", "corrupt"])
def test_faults_are_waited_out_and_change_no_reward(server: FakeRewardServer, fault: str) -> None:
    waits: list[Waiting] = []
    with client_of(server, on_wait=waits.append) as client:
        undisturbed = client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
        setattr(server.faults, fault, 2)
        disturbed = client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
    assert disturbed == undisturbed
    assert [wait.attempt for wait in waits] == [1, 2]


def test_many_waits_are_announced_once_for_each_reason_and_again_later(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    announce = Announcer(every_s=30.0, clock=lambda: now)

    def said(reason: str) -> str:
        announce(Waiting(reason, attempt=1, next_try_s=2.0, waited_s=now, gives_up_after_s=1800.0))
        return capsys.readouterr().err

    assert said("connection refused") == (
        "waiting for the reward service: connection refused; attempt 1 failed, next in 2.0 s, "
        "0 of 1800 s waited\n"
    )
    assert said("connection refused") == ""
    assert "HTTP 503" in said("HTTP 503")
    now = 29.0
    assert said("connection refused") == ""
    now = 30.0
    assert "30 of 1800 s" in said("connection refused")


def test_a_lost_reply_is_asked_for_again_under_the_same_key(server: FakeRewardServer) -> None:
    with client_of(server) as client:
        client.info()
        server.faults.corrupt = 1
        client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
        client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
    # Three replies, but the repeated one was not scored again, and a new call is a new request.
    assert (len(server.requests), server.replayed) == (2, 1)


def test_retry_after_is_honoured(server: FakeRewardServer) -> None:
    waits: list[Waiting] = []
    with client_of(server, on_wait=waits.append) as client:
        client.info()
        server.faults.unavailable, server.faults.retry_after_s = 1, 2
        began = time.monotonic()
        client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
    assert time.monotonic() - began >= 2.0
    assert waits[0].next_try_s == 2.0


def test_a_retry_after_beyond_the_deadline_ends_at_once(server: FakeRewardServer) -> None:
    with client_of(server, give_up_after_s=5.0) as client:
        client.info()
        server.faults.unavailable, server.faults.retry_after_s = 1, 3600
        began = time.monotonic()
        with pytest.raises(RewardUnavailable, match=r"answers HTTP 503 overloaded; see its log"):
            client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize(
    ("retry_after_s", "said"),
    [
        (3600, r"limits the rate \(HTTP 429 rate_limited\) for another 3600 s; "),
        (None, "limits the rate .*; "),
    ],
)
def test_a_limited_rate_is_no_silence_and_says_how_long(
    server: FakeRewardServer, monkeypatch: pytest.MonkeyPatch, retry_after_s: int | None, said: str
) -> None:
    monkeypatch.setattr(server, "disturbance", lambda: ProblemCode.RATE_LIMITED)
    server.faults.retry_after_s = retry_after_s
    with (
        client_of(server, give_up_after_s=0.5) as client,
        pytest.raises(RewardUnavailable, match=f"{said}.*a key with a higher rate") as caught,
    ):
        client.info()
    assert "no answer" not in str(caught.value)


def test_only_failed_questions_are_sent_again(
    server: FakeRewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.faults.failing = {"q1": 2, "q3": 1}
    with client_of(server) as client:
        results = client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
    assert all(rewards(result) == {"0": 1.0, "1": -0.5} for result in results.values())
    sent = [[item.id for item in request.questions] for request in server.requests]
    assert sent == [["q0", "q1", "q2", "q3", "q4"], ["q1", "q3"], ["q1"]]


def test_an_unscorable_question_stays_failed_and_never_becomes_a_number(server: FakeRewardServer) -> None:
    server.faults.failing = {"q1": 1}
    server.faults.failing_is_retryable = False
    with client_of(server) as client:
        results = client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
    assert isinstance(results["q1"], FailedQuestion)
    assert len(server.requests) == 1
    assert sum(isinstance(result, ScoredQuestion) for result in results.values()) == 4


def test_a_question_that_always_times_out_is_given_up_after_three_more_rounds(
    server: FakeRewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.faults.failing = {"q1": 100}
    with client_of(server) as client:
        results = client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
    assert isinstance(results["q1"], FailedQuestion)
    assert len(server.requests) == 4


def test_a_service_that_comes_back_is_waited_for(server: FakeRewardServer) -> None:
    with client_of(server) as client:
        before = client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
        server.stop()
        threading.Timer(1.5, server.start).start()
        assert client.score(QUESTIONS, step=1, purpose=Purpose.TRAIN) == before


def test_a_service_that_stays_away_is_an_error_at_the_deadline(server: FakeRewardServer) -> None:
    with client_of(server, give_up_after_s=2.0) as client:
        client.info()
        server.stop()
        began = time.monotonic()
        with pytest.raises(RewardUnavailable, match="within 2 s"):
            client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
    assert time.monotonic() - began < 4.0


def test_an_address_where_nothing_ever_answered_ends_after_the_first_contact_limit() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        client = RewardClient(url, "k", run_id="r", first_contact_s=1.0, on_wait=lambda _: None)
        with client, pytest.raises(RewardUnavailable, match="check LOOPER_REWARD_URL"):
            client.info()


def test_a_silent_service_is_bounded_by_the_timeout(server: FakeRewardServer) -> None:
    with client_of(server, timeout_s=0.5) as client:
        client.info()
        server.faults.hang_s = 3.0
        began = time.monotonic()
        client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
    assert time.monotonic() - began < 2.5


def test_a_reply_in_drops_is_bounded_too() -> None:
    class Trickle(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """The client hangs up: that is the point."""

    http = Quiet(("127.0.0.1", 0), Trickle)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{http.server_address[1]}"
        client = RewardClient(
            url, "k", run_id="r", timeout_s=0.5, first_contact_s=1.2, on_wait=lambda _: None
        )
        began = time.monotonic()
        with client, pytest.raises(RewardUnavailable, match="took more than"):
            client.info()
        assert time.monotonic() - began < 3.0
    finally:
        http.shutdown()
        http.server_close()


def test_a_wrong_key_is_refused_at_once(server: FakeRewardServer) -> None:
    with (
        client_of(server, key="wrong") as client,
        pytest.raises(RewardRejected, match=r"expired.*LOOPER_REWARD_KEY"),
    ):
        client.info()


def test_a_key_that_may_not_see_components_is_never_downgraded() -> None:
    with FakeRewardServer(reward_key="less") as server:
        with (
            client_of(server, key="less") as client,
            pytest.raises(RewardRejected, match=r"403 forbidden: .*score:components.*disclosure"),
        ):
            client.info()  # what every stage asks before it loads a model
        with client_of(server, key="less", disclosure="reward") as client:
            result = client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)["q0"]
    assert rewards(result) == {"0": 1.0, "1": -0.5}
    assert isinstance(result, ScoredQuestion)
    assert result.scores is None
    assert result.correct_flags is None


def test_an_address_where_nobody_scores_is_refused(server: FakeRewardServer) -> None:
    client = RewardClient(server.url + "/elsewhere", server.key, run_id="r")
    with client, pytest.raises(RewardRejected, match="404 not_found: there is no reward service"):
        client.info()


def test_the_first_scorer_is_pinned_and_another_one_is_an_error(server: FakeRewardServer) -> None:
    with client_of(server) as client:
        client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
        assert client.scorer_id == server.scorer_id == server.requests[0].scorer_id
        server.scorer_id = "redeployed"
        with pytest.raises(ScorerMismatch, match="another scorer"):
            client.score(QUESTIONS, step=1, purpose=Purpose.TRAIN)


def test_a_run_resumed_against_another_scorer_ends_before_any_score(server: FakeRewardServer) -> None:
    with client_of(server, scorer_id="the-one-before") as client, pytest.raises(ScorerMismatch):
        client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
    assert server.requests == []


def test_info_of_another_scorer_is_an_error_already(server: FakeRewardServer) -> None:
    both = f"{server.scorer_id}.*the-one-before"
    with client_of(server, scorer_id="the-one-before") as client, pytest.raises(ScorerMismatch, match=both):
        client.info()


def test_a_reply_in_another_scorers_name_is_an_error(
    server: FakeRewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = server._response
    monkeypatch.setattr(
        server, "_response", lambda *a: real(*a).model_copy(update={"scorer_id": "behind-the-balancer"})
    )
    with client_of(server) as client, pytest.raises(ScorerMismatch, match="behind-the-balancer"):
        client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)


def test_replies_that_do_not_answer_the_request_are_never_used(
    server: FakeRewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = server._result

    def renamed(item: Question, request: Any) -> Any:
        return real(item, request).model_copy(update={"id": "another"})

    def fewer_arms(item: Question, request: Any) -> Any:
        result = real(item, request)
        return result.model_copy(update={"arms": result.arms[:1]})

    def infinite(item: Question, request: Any) -> Any:
        return real(item, request).model_copy(update={"reward": float("inf")})

    def without_scores(item: Question, request: Any) -> Any:
        return real(item, request).model_copy(update={"scores": None})

    for broken in (renamed, fewer_arms, infinite, without_scores):
        monkeypatch.setattr(server, "_result", broken)
        with client_of(server) as client, pytest.raises(RewardRejected, match="outside the contract"):
            client.score(QUESTIONS[:1], step=0, purpose=Purpose.TRAIN)


def test_the_order_of_results_carries_no_meaning(
    server: FakeRewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client_of(server) as client:
        straight = client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN)
        real = server._response
        monkeypatch.setattr(
            server,
            "_response",
            lambda *a: (reply := real(*a)).model_copy(update={"results": reply.results[::-1]}),
        )
        assert client.score(QUESTIONS, step=0, purpose=Purpose.TRAIN) == straight


def test_repeated_question_ids_are_a_defect_of_the_caller(server: FakeRewardServer) -> None:
    with client_of(server) as client, pytest.raises(ValueError, match="repeat"):
        client.score([QUESTIONS[0], QUESTIONS[0]], step=0, purpose=Purpose.TRAIN)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://rewards.example:8080", "plain http"),
        ("ftp://127.0.0.1", "no http"),
        ("127.0.0.1:8080", "no http"),
        ("", "no http"),
        ("https://user:secret@rewards.example", "LOOPER_REWARD_KEY"),
    ],
)
def test_unusable_addresses_are_refused(url: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        RewardClient(url, "k", run_id="r")
    assert "user:secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("proxy", "complaint"),
    [
        ("socks5://gateway:1080", "httpx\\[socks\\]"),
        ("http://gateway:port", "no address"),
        ("ftp://g", "no address"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, proxy: str, complaint: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ConfigError, match=f"{complaint}.*; .*ALL_PROXY"):
        RewardClient("https://rewards.example", "k", run_id="r")
    RewardClient("http://127.0.0.1:8080", "k", run_id="r").close()  # no proxy stands between


def test_a_proxy_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with (
        RewardClient("https://rewards.example", "k", run_id="r", give_up_after_s=0.1) as client,
        pytest.raises(RewardUnavailable, match="HTTPS_PROXY"),
    ):
        client.info()


def test_plain_http_within_the_machine_or_when_allowed_is_fine() -> None:
    for url, allow in (("http://localhost:1", False), ("http://[::1]:1", False), ("http://gateway:1", True)):
        RewardClient(url, "k", run_id="r", allow_http=allow).close()


def test_the_environment_names_service_and_key(
    server: FakeRewardServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in ("LOOPER_REWARD_URL", "LOOPER_REWARD_KEY", "LOOPER_REWARD_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="LOOPER_REWARD_URL is not set"):
        RewardClient.from_environment(run_id="r")
    monkeypatch.setenv("LOOPER_REWARD_URL", server.url)
    with pytest.raises(ConfigError, match="LOOPER_REWARD_KEY"):
        RewardClient.from_environment(run_id="r")
    monkeypatch.setenv("LOOPER_REWARD_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(ConfigError, match="cannot read"):
        RewardClient.from_environment(run_id="r")
    (tmp_path / "key").write_text(server.key + "\n", encoding="utf-8")
    with RewardClient.from_environment(run_id="r") as client:
        assert client.info().scorer_id == server.scorer_id
    monkeypatch.setenv("LOOPER_REWARD_KEY", "not-the-key")
    with RewardClient.from_environment(run_id="r") as client, pytest.raises(RewardRejected):
        client.info()


def test_completions_become_arms_named_by_their_places() -> None:
    problem = records.Problem(id="p", question="q?", answer="4", cot="2 + 2")
    completions = [
        Completion("four", (5, 6, 1), (-0.1, -0.2, -0.3), "stop"),
        Completion("", (7,), (-1.0,), "length"),
    ]
    made = as_question(problem, completions)
    assert (made.id, made.question, made.gold_answer) == ("p", "q?", "4")
    assert [(a.id, a.full_text, a.tokens_out, a.finish_reason) for a in made.arms] == [
        ("0", "four", 3, FinishReason.STOP),
        ("1", "", 1, FinishReason.LENGTH),
    ]


def test_a_waiting_message_says_why_and_how_long() -> None:
    message = str(Waiting("HTTP 503 overloaded", 2, 1.25, 10.0, 1800.0))
    assert message == (
        "waiting for the reward service: HTTP 503 overloaded; attempt 2 failed, next in 1.2 s, "
        "10 of 1800 s waited"
    )


def test_a_sample_with_nul_or_a_lone_surrogate_is_sent_with_replacement_characters() -> None:
    arm = Arm(id="0", full_text="3\x00 + \ud800 4\nAnswer: #### 7")
    assert arm.full_text == "3\ufffd + \ufffd 4\nAnswer: #### 7"
    assert b"\\u0000" not in Question(id="q", question="\x00", arms=(arm,)).model_dump_json().encode()


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A certificate for localhost that signs itself, and its key, in one file."""
    file = tmp_path / "localhost.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=localhost",
        "-days",
        "1",
    ]
    command += [
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        str(file),
        "-out",
        str(tmp_path / "crt"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    with file.open("ab") as out:
        out.write((tmp_path / "crt").read_bytes())
    return file


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_an_own_authority_is_trusted_on_loopback_where_the_environment_names_it(
    server: FakeRewardServer, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority)
    assert server._http is not None
    server._http.socket = context.wrap_socket(server._http.socket, server_side=True)
    monkeypatch.setenv("LOOPER_REWARD_URL", server.url.replace("http://127.0.0.1", "https://localhost"))
    monkeypatch.setenv("LOOPER_REWARD_KEY", server.key)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with RewardClient.from_environment(run_id="tls") as client:
        assert len(client.score(QUESTIONS, step=1, purpose=Purpose.TRAIN)) == len(QUESTIONS)
    monkeypatch.delenv("SSL_CERT_FILE")
    with (
        RewardClient.from_environment(run_id="tls", first_contact_s=0.5, on_wait=lambda _: None) as client,
        pytest.raises(RewardUnavailable, match=r"CERTIFICATE_VERIFY_FAILED.*; set SSL_CERT_FILE"),
    ):
        client.score(QUESTIONS, step=1, purpose=Purpose.TRAIN)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.parent / "missing.pem"))
    with pytest.raises(ConfigError, match=r"missing\.pem: is no file of trusted certificates"):
        RewardClient.from_environment(run_id="tls")
