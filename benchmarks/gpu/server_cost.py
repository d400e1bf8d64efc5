"""Processor time that vLLM's API server spends on a token, by what it is asked and how it was started.

    python benchmarks/gpu/server_cost.py --python PYTHON_WITH_VLLM --out server_cost.json

The API server is one Python process in front of the engine: what it costs a token bounds the rate of
sampling over HTTP, however fast the GPU is. Completions of a tiny model end all together, as in
`step_8b.py`, so the replies are written after the GPU is done. Processor seconds are those of the process
itself (/proc), so a busy machine or a slow engine does not change them; the client's are of this process,
JSON included. Runs on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from device import device_name, versions
from shapes import write_model

from looper_trainer.sampling.base import SamplingParams
from looper_trainer.sampling.vllm_link import completion_request
from looper_trainer.sampling.vllm_server import VLLMServer, VLLMSettings

QUESTIONS, SAMPLES, TOKENS = 16, 4, 128
SIDES: dict[str, dict[str, Any]] = {
    "log statistics, tokenizer": {"log_stats": True},
    "tokenizer": {},
    "tokens only": {"tokens_only": True},
}


def processor_s(pid: int) -> float:
    """User and system seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def api_server(guard: int) -> int:
    """The process under the guard that answers HTTP."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == guard and b"api_server" in (entry / "cmdline").read_bytes():
                return int(entry.name)
    raise RuntimeError("the server has no process that answers HTTP")


async def ask(url: str, model: str, round_: int, logprobs: bool) -> list[httpx.Response]:
    params = SamplingParams(max_new_tokens=TOKENS)
    bodies = []
    for question in range(QUESTIONS):
        prompt = [1, *(5 + (round_ + question + j) % 400 for j in range(100))]
        body = completion_request(model, prompt, params, SAMPLES, None) | {"ignore_eos": True}
        bodies.append(body if logprobs else body | {"logprobs": None})
    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
        replies = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=b) for b in bodies))
    for reply in replies:
        reply.raise_for_status()
    return list(replies)


def measure(url: str, model: str, pid: int, rounds: int, logprobs: bool) -> dict[str, float]:
    """Microseconds of the server and of this process a token, and bytes a token."""
    asyncio.run(ask(url, model, 0, logprobs))
    server, client, size = processor_s(pid), time.process_time(), 0
    for round_ in range(1, rounds + 1):
        for reply in asyncio.run(ask(url, model, round_, logprobs)):
            size += len(reply.content)
            reply.json()
    tokens = rounds * QUESTIONS * SAMPLES * TOKENS
    return {
        "server_us": 1e6 * (processor_s(pid) - server) / tokens,
        "client_us": 1e6 * (time.process_time() - client) / tokens,
        "bytes": size / tokens,
    }


def vllm_version(python: Path) -> str:
    """The vLLM that `python` has."""
    code = "import vllm; print(vllm.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def main() -> None:
    """Measure all sides, print a table, write --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter with vLLM")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--commit", default="")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sides: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        write_model(model, "tiny", "cpu", "float32")
        for side, more in SIDES.items():
            settings = VLLMSettings(
                python=options.python, dtype="float32", max_model_len=512, max_num_seqs=64, lora=False,
                compilation="eager", start_timeout_s=600, **more,
            )  # fmt: skip
            with VLLMServer(str(model), settings, log_file=Path(scratch, "vllm.log")) as server:
                assert server.pid is not None
                pid = api_server(server.pid)
                for logprobs in (True, False):
                    name = f"{side}, {'logprobs' if logprobs else 'no logprobs'}"
                    sides[name] = measure(server.url, str(model), pid, options.rounds, logprobs)
    for name, found in sides.items():
        print(f"{name:40s} " + "  ".join(f"{key} {value:6.1f}" for key, value in found.items()))
    first = sides["log statistics, tokenizer, logprobs"]["server_us"]
    ratios = {name: found["server_us"] / first for name, found in sides.items()}
    document = {
        "benchmark": "server_cost", "device": device_name(),
        "versions": versions() | {"vllm": vllm_version(options.python)}, "commit": options.commit,
        "date": options.date, "sides": sides, "server_ratio_to_first": ratios,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
