"""A small process between OpenRLHF and the reward service: its remote reward protocol in, ours out.

    export LOOPER_REWARD_URL=http://127.0.0.1:8080 LOOPER_REWARD_KEY_FILE=trainer.key
    python -m looper_trainer.integrations.openrlhf --port 5000 --samples-per-prompt 8
    ... openrlhf.cli.train_ppo_ray --reward.remote_url http://127.0.0.1:5000/get_reward \\
        --rollout.n_samples_per_prompt 8 --data.label_key answer

OpenRLHF (0.11) posts one completion at a time as `{"query": [..], "prompts": [..], "labels": [..]}` and reads
`rewards`, `scores` (0 to 1, for its dynamic filtering: here, correctness) and `extra_logs`. Its protocol has
no key and no TLS, so the adapter listens on this machine only and keeps the service's key to itself.

The completions of one prompt are collected and scored together. A score that stays away is a 503: OpenRLHF
asks four times more and then records None. It is never a zero.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import json
import math
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from looper_schemas.scoring import Disclosure, Purpose, RewardMode
from looper_trainer.errors import RewardUnavailable, UserError
from looper_trainer.integrations.gathering import Gatherer
from looper_trainer.integrations.groups import COMPONENTS, Outcome, Sample, score_groups
from looper_trainer.integrations.trl import gold_of
from looper_trainer.reward_client import RewardClient

# OpenRLHF stops listening after 180 s, so collecting and scoring together must be done before.
_COLLECT_S, _SCORE_S, _ANSWER_S = 90.0, 75.0, 170.0
_LONGEST_BODY_BYTES = 16 * 2**20
# A query ends with the tokens that ended it, written out: <|im_end|>, </s>, and DeepSeek's full-width form.
_END_TOKENS = re.compile(r"(?:\s*(?:<\|[^<>|]+\|>|</s>|<eos>|<\uff5c[^<>]+\uff5c>))+\s*\Z")


class Adapter:
    """Speaks OpenRLHF's protocol on 127.0.0.1; a context manager that starts and stops it.

    Args:
        client: of the reward service.
        samples_per_prompt: completions of a prompt that OpenRLHF samples.
        port: 0 for any free one.
        collect_s: how long the first completion of a prompt waits for the others.
    """

    def __init__(
        self, client: RewardClient, samples_per_prompt: int, *, port: int = 0, collect_s: float = _COLLECT_S
    ) -> None:
        self.client = client
        self.samples_per_prompt = samples_per_prompt
        self.calls = 0
        self._gatherer = Gatherer(self._score, collect_s)
        self._loop = asyncio.new_event_loop()
        handler = type("Handler", (_Handler,), {"adapter": self})
        self._http = _Server(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/get_reward"

    def __enter__(self) -> Self:
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        """The outcomes of `samples` once their groups are scored; blocks.

        Raises:
            RewardUnavailable: no score in the time that OpenRLHF listens.
            RewardRejected, ScorerMismatch: see `looper_trainer.errors`.
        """

        async def gather() -> list[Outcome]:
            waiting = (self._gatherer.outcome(sample, self.samples_per_prompt) for sample in samples)
            return list(await asyncio.gather(*waiting))

        future = asyncio.run_coroutine_threadsafe(gather(), self._loop)
        try:
            return future.result(_ANSWER_S)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise RewardUnavailable(f"no score within {_ANSWER_S:.0f} s") from None

    def _score(self, groups: Sequence[Sequence[Sample]]) -> list[list[Outcome]]:
        self.calls += 1
        return score_groups(self.client, groups, step=self.calls, purpose=Purpose.TRAIN)


def samples_of(body: bytes) -> list[Sample]:
    """The completions in a request of OpenRLHF.

    Raises:
        ValueError: the body does not follow OpenRLHF's protocol.
    """
    document = json.loads(body)
    if not isinstance(document, dict):
        raise ValueError("the body is no JSON object")
    lists = [document.get(key) for key in ("query", "prompts", "labels")]
    if not all(isinstance(one, list) for one in lists) or len({len(one) for one in lists if one}) != 1:
        raise ValueError("query, prompts and labels must be lists of the same length")
    queries, prompts, labels = lists
    return [
        Sample(
            question=str(prompt),
            gold_answer=None if label in (None, "") else gold_of(str(label)),
            text=completion_of(str(query), str(prompt)),
        )
        for query, prompt, label in zip(queries or [], prompts or [], labels or [], strict=True)
    ]


def completion_of(query: str, prompt: str) -> str:
    """What follows `prompt` in `query`, without the tokens that end it.

    Raises:
        ValueError: the prompt is not there (OpenRLHF cuts prompts that are too long from the left).
    """
    start = query.find(prompt)
    if start >= 0:
        rest = query[start + len(prompt) :]
    else:
        # The longest end of the prompt that the query begins with.
        cut = next((n for n in range(1, len(prompt)) if query.startswith(prompt[n:])), None)
        if cut is None or len(prompt) - cut < min(64, len(prompt) // 2):
            raise ValueError("a query does not hold its prompt; raise --data.max_len")
        rest = query[len(prompt) - cut :]
    return _END_TOKENS.sub("", rest)


def reply_of(outcomes: Sequence[Outcome], disclosure: Disclosure) -> dict[str, Any]:
    """The reply to OpenRLHF for completions that all have a score."""
    logs: dict[str, list[float]] = {"looper_group_size": [float(o.group_size) for o in outcomes]}
    if disclosure is Disclosure.COMPONENTS:
        for name in COMPONENTS:
            logs[f"looper_{name}"] = [_number(getattr(o.scores, name, None)) for o in outcomes]
    flags = [outcome.correct for outcome in outcomes]
    rewards = [outcome.reward for outcome in outcomes]
    known = all(flag is not None for flag in flags)
    return {
        "rewards": rewards,
        "scores": [float(flag or 0.0) for flag in flags] if known else rewards,
        "extra_logs": logs,
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # OpenRLHF opens a connection for each completion of a step


class _Handler(BaseHTTPRequestHandler):
    adapter: Adapter
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "looper-openrlhf", ""

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _LONGEST_BODY_BYTES:
            self.close_connection = True
            return self._send(413, {"error": "no Content-Length, or too long"})
        body = self.rfile.read(int(length))
        if self.path.rstrip("/") != "/get_reward":
            return self._send(404, {"error": "post to /get_reward"})
        try:
            samples = samples_of(body)
        except (ValueError, UserError) as error:
            return self._refuse(400, str(error))
        try:
            outcomes = self.adapter.outcomes(samples)
        except UserError as error:
            return self._refuse(503, str(error))
        failed = sorted({outcome.error or "" for outcome in outcomes if outcome.reward is None})
        if failed:
            return self._refuse(503, f"no score: {', '.join(failed)}")
        return self._send(200, reply_of(outcomes, self.adapter.client.disclosure))

    def _refuse(self, status: int, reason: str) -> None:
        print(f"looper: {status}: {reason}", file=sys.stderr, flush=True)
        self._send(status, {"error": reason})

    def _send(self, status: int, document: Mapping[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; the address goes to standard output once the port is open."""
    parser = argparse.ArgumentParser(
        prog="python -m looper_trainer.integrations.openrlhf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1; 0 is any free one")
    parser.add_argument("--samples-per-prompt", type=int, required=True, help="as OpenRLHF samples them")
    parser.add_argument("--run-id", default="openrlhf", help="name of the run in the service's log")
    parser.add_argument("--reward-mode", choices=[mode.value for mode in RewardMode], default="arm_gated")
    parser.add_argument("--disclosure", choices=[one.value for one in Disclosure], default="components")
    parser.add_argument("--collect-s", type=float, default=_COLLECT_S, help="wait for a prompt's others")
    options = parser.parse_args(argv)
    try:
        with (
            RewardClient.from_environment(
                run_id=options.run_id,
                reward_mode=options.reward_mode,
                disclosure=options.disclosure,
                give_up_after_s=_SCORE_S,
            ) as client,
            Adapter(
                client, options.samples_per_prompt, port=options.port, collect_s=options.collect_s
            ) as adapter,
        ):
            client.info()  # a wrong address or key should end this before a trainer is started
            print(adapter.url, flush=True)
            threading.Event().wait()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
