"""A small OpenAI-compatible server over a real language model: what vLLM is to the service, for tests.

`TinyGenerator` answers /v1/chat/completions with a random Llama over bytes (transformers), each request from
its own seed. `faults` is consumed a request at a time: "500", "400", "nonsense", "hang", "echo".
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import torch
import transformers


class TinyGenerator:
    """A context manager; `url` once started, `requests` as they came."""

    def __init__(self, write: Callable[[dict[str, Any]], str] | None = None) -> None:
        self.write = write or self._write
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8192, eos_token_id=256, bos_token_id=None,
        )  # fmt: skip
        self._model = transformers.LlamaForCausalLM(config).eval()
        generator = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, reply = generator._answer(self.path, body, self.headers.get("authorization"))
                self.send_response(status)
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str, body: dict[str, Any], key: str | None) -> tuple[int, bytes]:
        with self._lock:
            self.requests.append(body)
            self.keys.append(key)
            fault = self.faults.pop(0) if self.faults else ""
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if fault in ("400", "500"):
                return int(fault), json.dumps({"error": body}).encode()
            if fault == "nonsense":
                return 200, b"{}"
            if fault == "hang":
                time.sleep(3)
            prompt = "\n".join(message["content"] for message in body["messages"])
            text = prompt if fault == "echo" else self.write(body)
        finally:
            with self._lock:
                self.in_flight -= 1
        reply = {
            "id": "x",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            ],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(text.encode()),
                "total_tokens": 0,
            },
        }
        return (200, json.dumps(reply).encode()) if path == "/v1/chat/completions" else (404, b"{}")

    def _write(self, body: dict[str, Any]) -> str:
        prompt = "\n".join(message["content"] for message in body["messages"])
        ids = torch.tensor([list(prompt.encode())])
        with self._lock, torch.inference_mode():
            torch.manual_seed(body["seed"])
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=body["temperature"],
                top_p=body["top_p"], top_k=0, max_new_tokens=min(body["max_tokens"], 12), pad_token_id=256,
            )  # fmt: skip
        return bytes(token for token in out[0, ids.shape[1] :].tolist() if token < 256).decode(
            errors="replace"
        )
