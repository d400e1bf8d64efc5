"""Properties of the service over generated cases, through ASGI and through the parser.

    python benchmarks/private/fuzz/fuzz_hypothesis.py --cases 50000 --keep

Four properties share the cases:
- a well-formed message is answered 200, with the rewards of the stub for its texts, and the same bytes again;
- a message with any JSON value at any of its places gets no server error and tells nothing;
- any headers, path, method and body get no server error and tell nothing;
- the parser agrees with `oracle` on any bytes that look somewhat like JSON.

The last long run is kept in benchmarks/results/private/fuzz_hypothesis.json; a fault is shrunk and raised.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from kept import keep, stamp
from oracle import verdict
from target import CANARY, LIMITS, Sent, Target, expected_reward, opened

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
ARM = st.fixed_dictionaries(
    {"full_text": TEXT},
    optional={
        "answer": TEXT | st.none(),
        "reasoning": TEXT | st.none(),
        "tokens_out": st.integers(0, 10_000) | st.none(),
        "finish_reason": st.sampled_from(["stop", "length", None]),
    },
)


def named(values: st.SearchStrategy[Any], most: int, least: int = 0) -> st.SearchStrategy[list[Any]]:
    """Lists of `values` with distinct ids."""
    return st.dictionaries(NAMES, values, min_size=least, max_size=most).map(
        lambda them: [{"id": name, **value} for name, value in them.items()]
    )


QUESTION = st.fixed_dictionaries(
    {"question": TEXT, "arms": named(ARM, LIMITS["max_arms"])}, optional={"gold_answer": TEXT | st.none()}
)
MESSAGE = st.fixed_dictionaries(
    {
        "contract": st.just("1.0"),
        "run_id": NAMES,
        "step": st.integers(0, 2**53),
        "purpose": st.sampled_from(["train", "rollout", "eval"]),
        "questions": named(QUESTION, LIMITS["max_questions"], 1),
    },
    optional={
        "reward_mode": st.sampled_from(["question", "arm", "arm_gated"]),
        "disclosure": st.sampled_from(["reward", "components"]),
        "scorer_id": st.sampled_from([None, "stub-1"]),
    },
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(CANARY),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
LIKE_JSON = st.lists(
    st.sampled_from(
        [
            b"{",
            b"}",
            b"[",
            b"]",
            b":",
            b",",
            b'"a"',
            b'"b"',
            b"1",
            b"-0.0",
            b"1e5",
            b"1e999",
            b"NaN",
            b"true",
            b"null",
            b'"\\ud83d',
            b'\\ude00"',
            b'"\\u0000"',
            b'"\\u0061"',
            b" ",
            b"\xef\xbb\xbf",
            b"\xff",
            b'"',
            b"9" * 19,
            b"9" * 20,
            b'{"a":' * 15,
            b"}" * 15,
        ]
    )
    | st.binary(max_size=4),
    max_size=30,
).map(b"".join) | st.dictionaries(st.text(max_size=5), ANY_JSON, max_size=4).map(
    lambda value: json.dumps(value).encode()
)
HEADER_VALUES = st.binary(max_size=30) | st.sampled_from([CANARY.encode(), b"application/json", b"1", b"0"])
HEADER_NAMES = st.sampled_from(
    [
        b"content-type",
        b"content-length",
        b"content-encoding",
        b"idempotency-key",
        b"x-deadline-ms",
        b"host",
        b"authorization",
        b"expect",
        b"transfer-encoding",
    ]
) | st.binary(max_size=10).map(bytes.lower)


class Cases:
    """The properties over one running service, and how many cases each has seen."""

    def __init__(self, target: Target, run: Callable[[Any], Any]) -> None:
        self.target = target
        self.run = run
        self.seen: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()

    def check(self, sent: Sent) -> tuple[int, bytes]:
        """Send, and raise where the reply or the log is at fault."""
        reply = self.run(self.target.send(sent))
        self.statuses[reply.status] += 1
        fault = self.target.fault(sent, reply)
        assert fault is None, (fault, sent, reply)
        assert not self.target.log.leaks, (sent, self.target.log.leaks)
        return reply.status, reply.body

    def score(self, body: bytes, *headers: tuple[bytes, bytes]) -> tuple[int, bytes]:
        """POST /v1/score with the key that may see everything."""
        usual = [
            (b"authorization", f"Bearer {self.target.keys['full']}".encode()),
            (b"content-type", b"application/json"),
        ]
        return self.check(Sent("POST", "/v1/score", b"", [*usual, *headers], [body]))

    def well_formed(self, message: dict[str, Any]) -> None:
        """The first property."""
        self.seen["well-formed messages"] += 1
        body = json.dumps(message).encode()
        name = (b"idempotency-key", str(self.seen["well-formed messages"]).encode())
        status, reply = self.score(body, name)
        if len(body) > LIMITS["max_body_bytes"]:
            assert status == 413
            return
        if any("poison" in question["question"] for question in message["questions"]):
            return
        assert status == 200, (status, message)
        for question, result in zip(message["questions"], json.loads(reply)["results"], strict=True):
            assert result["id"] == question["id"]
            for arm, told in zip(question["arms"], result["arms"], strict=True):
                assert told == {"id": arm["id"], "reward": expected_reward(arm["full_text"])}
        assert self.score(body, name) == (200, reply)

    def spoiled(self, message: dict[str, Any], data: st.DataObject) -> None:
        """The second."""
        self.seen["spoiled messages"] += 1
        node: Any = message
        while True:
            place = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if not (isinstance(node[place], dict | list) and node[place] and data.draw(st.booleans())):
                break
            node = node[place]
        node[place] = data.draw(ANY_JSON)
        self.score(json.dumps(message).encode())

    def any_request(self, sent: Sent, sound_key: bool) -> None:
        """The third."""
        self.seen["any requests"] += 1
        headers = [*sent.headers]
        if sound_key:
            headers = [(name, value) for name, value in headers if name != b"authorization"]
            headers.append((b"authorization", f"Bearer {self.target.keys['full']}".encode()))
        self.check(sent._replace(headers=headers))

    def parsed(self, body: bytes) -> None:
        """The fourth."""
        self.seen["parser inputs"] += 1
        fault = verdict(body)
        assert fault is None, (fault, body)


REQUESTS = st.builds(
    Sent,
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]) | st.text(max_size=10),
    st.sampled_from(["/v1/score", "/v1/info", "/readyz", "/livez", f"/{CANARY}"]) | TEXT.map("/{}".format),
    st.binary(max_size=30),
    st.lists(st.tuples(HEADER_NAMES, HEADER_VALUES), max_size=5),
    st.lists(st.binary(max_size=40) | LIKE_JSON, max_size=4),
    st.booleans(),
)


def run_cases(home: Path, cases: int, first_seed: int) -> dict[str, Any]:
    """Counts of a run over at least `cases` cases."""
    with asyncio.Runner() as runner:
        service = opened(home)
        target = runner.run(service.__aenter__())
        them = Cases(target, runner.run)
        properties: dict[str, tuple[float, Any, Any]] = {
            "well-formed messages": (0.2, given(MESSAGE), them.well_formed),
            "spoiled messages": (0.3, given(MESSAGE, st.data()), them.spoiled),
            "any requests": (0.25, given(REQUESTS, st.booleans()), them.any_request),
            "parser inputs": (0.25, given(LIKE_JSON), them.parsed),
        }
        try:
            for name, (share, given_, test) in properties.items():
                wanted, round_ = round(share * cases), 0
                while them.seen[name] < wanted:
                    limited = settings(
                        max_examples=min(wanted - them.seen[name], 5_000),
                        deadline=None,
                        database=None,
                        suppress_health_check=list(HealthCheck),
                    )
                    seed(first_seed + round_)(limited(given_(test)))()
                    round_ += 1
        finally:
            runner.run(service.__aexit__(None, None, None))
    return {
        "cases": sum(them.seen.values()),
        "by_property": dict(them.seen),
        "statuses": {str(status): count for status, count in sorted(them.statuses.items())},
        "faults": 0,
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500, help="how many at least (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="of hypothesis (default 0)")
    parser.add_argument("--keep", action="store_true", help="keep the result as the last one")
    options = parser.parse_args()
    stamped, started = stamp(), time.process_time()
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        counts = run_cases(Path(folder) / "home", options.cases, options.seed)
    result = {
        **stamped,
        "seed": options.seed,
        **counts,
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    if options.keep:
        keep("fuzz_hypothesis", result)
    else:
        print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
