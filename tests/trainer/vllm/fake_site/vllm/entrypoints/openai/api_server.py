"""A server that speaks vLLM's HTTP dialect without a model, for tests of the sampler.

In a test's process: `FakeVLLM()`. As a process: with this `fake_site` on PYTHONPATH, the sampler's own
command line (`python -m vllm.entrypoints.openai.api_server ...`) starts it.

A completion is a function of (adapter bytes, prompt, seed), written out in `completion`, which tests use as
their oracle. An adapter's bytes are read when it is loaded, as vLLM does.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

EOS = 2
# Of vLLM 0.31's log where the memory for keys and values is not there, without most of its traceback.
NO_MEMORY = """\
(Worker pid=22191) ERROR 12-01 02:18:49 [multiproc_executor.py:1058]     raise ValueError(
(Worker pid=22191) ERROR 12-01 02:18:49 [multiproc_executor.py:1058] ValueError: Available memory on node 0 \
(20.54/23.54 GiB) on kv cache allocation is less than requested memory for kv (200.0 GiB). Decrease \
--kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes.
    raise RuntimeError(
RuntimeError: Worker failed with error 'Available memory on node 0 (20.54/23.54 GiB) on kv cache allocation \
is less than requested memory for kv (200.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, \
or reduce CPU memory used by other processes.', please check the stack trace above for the root cause
Traceback (most recent call last):
    wait_for_engine_startup(
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
"""


def completion(weights: str, prompt: list[int], seed: int | None, max_tokens: int) -> dict:
    """What the fake samples: ids, logprobs, finish reason, text."""
    text = f"{weights}|{','.join(map(str, prompt))}|{seed}"
    digest = hashlib.sha256(text.encode()).digest()
    length = 1 + digest[0] % 7
    ids = [3 + byte for byte in digest[1 : 1 + length]]
    if length < max_tokens:
        ids, finish = [*ids, EOS], "stop"
    else:
        ids, finish = ids[:max_tokens], "length"
    return {"ids": ids, "logprobs": [-token / 100 for token in ids], "finish": finish, "text": text}


def reference(weights: str, token: int, place: int) -> float:
    """How likely the fake finds the token at `place` of a text that it is given: a logprob."""
    return -(token + place + len(weights)) / 200


class FakeVLLM:
    """The server and its knobs.

    faults: consumed one by completion request: an HTTP status, or "drop", "short", "nan", "ids", "model",
        "prompt", "abort", "json", "sicken" (dropped, and the server's health fails from then on).
    reference_faults: the same for requests that ask for the logprobs of given texts: "short", "nan", "ids",
        "prompt", "model".
    delay: seconds that a prompt's completions take, by its first token.
    """

    def __init__(self, port: int = 0, model: str = "base", processed: bool = True, lora: bool = True) -> None:
        self.model, self.processed, self.lora = model, processed, lora
        self.adapters: dict[str, str] = {}
        self.base = self.loaded = "base"  # what samples, and what was put in its place
        self.requests: list[dict] = []
        self.log: list[tuple[str, str]] = []  # (load|unload, adapter name)
        self.faults: list[int | str] = []
        self.reference_faults: list[str] = []
        self.always: int | str | None = None
        self.healthy = True
        self.asleep = False
        self.delay: dict[int, float] = {}
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        fake = self

        class Handler(_Handler):
            server_state = fake

        self.http = _Server(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeVLLM:
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def sampled(self) -> list[dict]:
        """The completion requests of callers, without the sampler's one-token check of the server."""
        return [
            request
            for request in self.requests
            if request["top_p"] > 1e-3 and "prompt_logprobs" not in request
        ]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default of 5 makes the kernel drop connections of a full pool

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.connections: list[socket.socket] = []

    def process_request(self, request: socket.socket, address: object) -> None:
        self.connections.append(request)
        super().process_request(request, address)

    def server_close(self) -> None:
        """Like a process that ends: connections that idle are cut too."""
        super().server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: FakeVLLM

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        fake = self.server_state
        if self.path == "/health":
            return self._send(200 if fake.healthy else 503, {})
        cards = [{"id": fake.model, "parent": None}]
        cards += [{"id": name, "parent": fake.model} for name in fake.adapters]
        return self._send(200, {"data": cards})

    def do_POST(self) -> None:
        fake = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"null")
        if self.path == "/v1/completions":
            with fake.lock:
                fake.in_flight += 1
                fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
            try:
                return self._complete(body)
            finally:
                with fake.lock:
                    fake.in_flight -= 1
        if self.path.split("?")[0] in ("/collective_rpc", "/reset_prefix_cache", "/sleep", "/wake_up"):
            return self._develop(body)
        if fake.asleep:
            return self._error(400, "asleep")
        if not fake.lora:
            return self._send(404, {"detail": "Not Found"})
        name = body["lora_name"]
        if self.path == "/v1/load_lora_adapter":
            weights = _weights(Path(body["lora_path"]) / "adapter_model.safetensors")
            if weights == "misfit":
                return self._error(500, "the adapter's shapes do not fit")
            if name in fake.adapters:
                return self._error(400, "has already been loaded")
            fake.adapters[name] = weights
        elif fake.adapters.pop(name, None) is None:
            return self._error(404, "cannot be found")
        fake.log.append((self.path.split("/")[-1].split("_")[0], name))
        return self._send(200, {})

    def _develop(self, body: dict | None) -> None:
        """vLLM's development mode: other weights of the whole model; the prefix cache remembers the old."""
        fake = self.server_state
        if os.environ.get("VLLM_SERVER_DEV_MODE") != "1":
            return self._send(404, {"detail": "Not Found"})
        if self.path in ("/sleep?level=1", "/wake_up"):
            assert fake.asleep == (self.path == "/wake_up")
            fake.asleep = not fake.asleep
            with Path(os.environ["FAKE_VLLM_EVENTS"]).open("a") as events:
                print(self.path, file=events)
        elif self.path == "/collective_rpc":
            assert body is not None
            assert body["method"] == "reload_weights"
            fake.loaded = _weights(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
        else:
            fake.base = fake.loaded
        return self._send(200, {})

    def _complete(self, body: dict) -> None:
        fake = self.server_state
        fake.requests.append(body)
        if fake.asleep:
            return self._error(400, "asleep")
        if "prompt_logprobs" in body:
            return self._refer(body)
        probe = body["top_p"] < 1e-3
        with fake.lock:
            fault = fake.always if fake.always is not None else None
            if fault is None and fake.faults and not probe:
                fault = fake.faults.pop(0)
        if fault == "sicken":
            fake.healthy, fault = False, "drop"
        elif not probe:
            time.sleep(fake.delay.get(body["prompt"][0], 0.0))
            _die_if_told()
        if isinstance(fault, int):
            return self._error(fault, "planted\n failure")
        if fault == "drop":
            self.close_connection = True
            return None
        if body["model"] != fake.model and body["model"] not in fake.adapters:
            return self._error(404, f"The model `{body['model']}` does not exist.")
        if body["temperature"] == 0 and body["n"] > 1:
            return self._error(400, "n must be 1 when using greedy sampling")
        weights = fake.adapters.get(body["model"], fake.base)
        choices = []
        for j in range(body["n"]):
            seed = None if body.get("seed") is None else body["seed"] + j
            made = completion(weights, body["prompt"], seed, body["max_tokens"])
            logprobs = [0.0 if fake.processed else -0.7] if probe else made["logprobs"]
            choices.append(
                {
                    "index": j,
                    "text": made["text"],
                    "token_ids": made["ids"],
                    "prompt_token_ids": body["prompt"],
                    "finish_reason": made["finish"],
                    "logprobs": {"token_logprobs": logprobs},
                }
            )
        reply = {"model": body["model"], "choices": choices[::-1]}
        if fault == "short":
            choices.pop()
            reply["choices"] = choices
        elif fault == "nan":
            choices[0]["logprobs"]["token_logprobs"][0] = float("nan")
        elif fault == "ids":
            choices[0]["token_ids"] = choices[0]["token_ids"][1:]
        elif fault == "model":
            reply["model"] = "another"
        elif fault == "prompt":
            choices[0]["prompt_token_ids"] = [0, *body["prompt"]]
        elif fault == "abort":
            choices[0]["finish_reason"] = "abort"
        elif fault == "json":
            return self._raw(200, b"<html>proxy</html>")
        return self._send(200, reply)

    def _refer(self, body: dict) -> None:
        """The logprobs of texts given as token ids; `prompt_logprobs` is how many other tokens to name."""
        fake = self.server_state
        assert body["prompt_logprobs"] == 0
        weights = fake.adapters.get(body["model"], fake.base)
        choices = []
        for index, ids in enumerate(body["prompt"]):
            places = [
                {str(token): {"logprob": reference(weights, token, place), "rank": 1}}
                for place, token in enumerate(ids)
            ]
            choices.append({"index": index, "prompt_token_ids": ids, "prompt_logprobs": [None, *places[1:]]})
        last = choices[-1]["prompt_logprobs"][-1]
        fault = fake.reference_faults.pop(0) if fake.reference_faults else None
        if fault == "short":
            choices.pop()
        elif fault == "nan":
            next(iter(last.values()))["logprob"] = float("nan")
        elif fault == "ids":
            choices[-1]["prompt_logprobs"][-1] = {"100000": {"logprob": -1.0}}
        elif fault == "prompt":
            choices[0]["prompt_token_ids"] = choices[0]["prompt_token_ids"][1:]
        model = "another" if fault == "model" else body["model"]
        return self._send(200, {"model": model, "choices": choices[::-1]})

    def _error(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "x", "code": status}})

    def _send(self, status: int, body: dict) -> None:
        self._raw(status, json.dumps(body).encode())

    def _raw(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _weights(file: Path) -> str:
    """The file's text, or the digest of a real adapter's bytes."""
    data = file.read_bytes()
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        return hashlib.sha256(data).hexdigest()


def _die_if_told() -> None:
    """FAKE_VLLM_DIE names a file: while it exists, it is removed and the server dies in mid-request."""
    if _told("FAKE_VLLM_DIE"):
        os._exit(1)


def _told(variable: str) -> bool:
    """Whether the file that `variable` names is there; it is removed, so that one process is told, once."""
    flag = os.environ.get(variable)
    if flag is None:
        return False
    try:
        Path(flag).unlink()
    except FileNotFoundError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--model", required=True)
    args, rest = parser.parse_known_args()
    if Path(args.model).name == "broken":
        raise ValueError(f"Error: no such model: {args.model}")
    if Path(args.model).name == "too-large":
        sys.exit(NO_MEMORY)
    if _told("FAKE_VLLM_FAIL"):
        print("AssertionError: Error in memory profiling", flush=True)  # the engine's process
        raise RuntimeError("Engine core initialization failed. See root cause above.")
    helper = subprocess.Popen(["sleep", "300"])  # vLLM's engine is a process of its own
    print("fake vllm", os.getpid(), "helper", helper.pid, rest, flush=True)
    assert args.host == "127.0.0.1"
    assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    time.sleep(float(os.environ.get("FAKE_VLLM_START", "0")))
    fake = FakeVLLM(args.port, model=args.model, processed="processed_logprobs" in rest)
    fake.delay = {int(k): v for k, v in json.loads(os.environ.get("FAKE_VLLM_DELAY", "{}")).items()}
    fake.http.serve_forever()


if __name__ == "__main__":
    main()
