"""OpenRLHF's own executor against the adapter, and its requests recorded for the tests.

    git clone https://github.com/OpenRLHF/OpenRLHF && git -C OpenRLHF checkout v0.11.0
    pip install aiohttp
    python benchmarks/openrlhf_protocol.py OpenRLHF/openrlhf/utils/agent.py \\
        > tests/trainer/integrations/openrlhf_0_11_0.json

Runs `SingleTurnAgentExecutor.execute` of that file with a stand-in for vLLM, twice: against a server that
only records, and against the adapter in front of the public fake service. Standard error says what came back.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from looper_trainer.integrations.openrlhf import Adapter
from looper_trainer.reward_client import RewardClient
from looper_trainer.testing import FakeRewardServer

PROMPTS = [
    ("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n", "4"),
    ("Q: 3 * 3?\nA:", "9"),
]
COMPLETIONS = [[" 2 + 2 = 4\n#### 4", " 2 + 2 = 5\n#### 5"], [" 3 * 3 = 9\n#### 9", " I guess.\n#### 6"]]
EXPECTED = [1.0, -0.5, 1.0, -0.5]
END = "<|im_end|>"


class Tokenizer:
    """Characters as tokens."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        import torch

        return {"input_ids": torch.tensor([[ord(c) for c in text]])}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


class Engine:
    """Gives the next of its completions, as `vllm.AsyncLLM` would."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = iter(texts)

    async def generate(self, prompt_token_ids: list[int], params: Any, multi_modal_data: Any) -> Any:
        ids = [ord(c) for c in next(self.texts) + END]
        output = types.SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)
        return types.SimpleNamespace(outputs=[output])


def load_executor(file: Path) -> Any:
    """`SingleTurnAgentExecutor` of OpenRLHF's agent.py, without the rest of the package."""
    for name in ("openrlhf", "openrlhf.utils", "openrlhf.utils.logging_utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["openrlhf.utils.logging_utils"].init_logger = logging.getLogger  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("openrlhf.utils.agent", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SingleTurnAgentExecutor


async def roll_out(executor: Any) -> list[dict[str, Any]]:
    """Every completion of every prompt at the same time, as the engine's actor does."""
    params = types.SimpleNamespace(max_tokens=64, logprobs=None)
    calls = []
    for (prompt, label), texts in zip(PROMPTS, COMPLETIONS, strict=True):
        engine = Engine(texts)
        calls += [executor.execute(prompt, label, params, 512, Tokenizer(), engine) for _ in texts]
    return await asyncio.gather(*calls)


def record(executor_class: Any) -> list[dict[str, Any]]:
    """The bodies that OpenRLHF posts."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = b'{"rewards": [0.0], "scores": [0.0], "extra_logs": {}}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asyncio.run(roll_out(executor_class(f"http://127.0.0.1:{server.server_address[1]}/get_reward")))
        server.shutdown()
    texts = [prompt + text for (prompt, _), texts in zip(PROMPTS, COMPLETIONS, strict=True) for text in texts]
    return sorted(bodies, key=lambda body: texts.index(body["query"][0].removesuffix(END)))


def main() -> None:
    """Record, then run against the adapter and compare."""
    executor_class = load_executor(Path(sys.argv[1]))
    requests = record(executor_class)
    with (
        FakeRewardServer(key="k") as service,
        RewardClient(service.url, "k", run_id="record") as client,
        Adapter(client, samples_per_prompt=2) as adapter,
    ):
        outputs = asyncio.run(roll_out(executor_class([adapter.url])))
    rewards = [output["reward"] for output in outputs]
    print(f"rewards that OpenRLHF read: {rewards}, extra_logs: {outputs[0]['extra_logs']}", file=sys.stderr)
    if rewards != [[reward] for reward in EXPECTED]:
        sys.exit("not the expected rewards")
    if [len(question.arms) for request in service.requests for question in request.questions] != [2, 2]:
        sys.exit("the completions of a prompt were not scored together")
    recorded = {
        "requests": requests,
        "completions": [text for texts in COMPLETIONS for text in texts],
        "expected_rewards": EXPECTED,
    }
    print(json.dumps(recorded, indent=1))


if __name__ == "__main__":
    main()
