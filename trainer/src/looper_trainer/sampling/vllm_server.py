"""A vLLM server of our own on this host: started, watched, restarted and taken down again.

    with VLLMServer(model, settings, log_file=folder / "vllm.log") as server:
        ...  # OpenAI-compatible at server.url

The server binds 127.0.0.1 only: its adapter endpoint loads any path on this machine. It runs in a process
group of its own under `vllm_guard`, which ends the group when this process goes away, however it goes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Literal, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from looper_trainer.errors import UserError

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the only ones vLLM allocates
_LOADER_THREADS = 8
_VLLM_SHARE = 0.9  # of the GPU's memory, where nothing is said
_SAY_EVERY_S = 20.0
_MESSAGE = re.compile(r"\w*(?:Error|Exception|error): .*")  # of an exception or argparse, not a line of code
# How several trainers find each other; a server that reads it looks for them instead of starting.
_OF_A_LAUNCHER = {
    "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_USE_AGENT_STORE",
}  # fmt: skip


class SamplerError(UserError):
    """The vLLM server cannot be started or reached, refuses a request, or answers nonsense."""


class ServerLost(SamplerError):
    """One server stays away; others may still answer."""


class _Cancelled(SamplerError):
    """Nobody waits for a server's start any longer; it goes on."""


class VLLMSettings(BaseModel):
    """How to reach vLLM, or how to start it on this host when `urls` is empty."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    urls: tuple[str, ...] = ()
    """Servers that are running already, such as http://127.0.0.1:8000; work is spread over them. They need
    `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`, `--enable-lora`, `--logprobs-mode processed_logprobs`; for
    logprobs of the base model also `--lora-target-modules` without the output layer, and a window that is one
    token longer than the longest text."""
    connections: int = Field(64, ge=1)
    """Questions in flight at a time to each server."""
    seeded: bool = True
    """Send each completion's seed. Without, vLLM draws from one generator: faster on a GPU (it serves
    seeded rows one by one), but no completion can be repeated."""
    request_timeout_s: float = Field(600.0, gt=0)
    give_up_after_s: float = Field(180.0, gt=0)
    """How long a server given by URL may stay away before the run stops."""

    python: Path = Path(sys.executable)
    """The interpreter that has vLLM installed."""
    servers: int = Field(1, ge=1)
    """Servers of ours: over several GPUs, or side by side on one where the processor is what bounds them."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of a server of ours, dealt out among several; None leaves the environment's."""
    lora: bool = True
    """Serve with run-time adapters; without, the base model alone, which starts and samples faster."""
    whole_weights: bool = False
    """Let a server of ours take new weights of the whole model (vLLM's development mode)."""
    sleep: bool = False
    """Let a server of ours give its memory back between samplings (the same mode)."""
    log_stats: bool = False
    """Let a server of ours keep statistics and log them, for a quarter more processor time a token."""
    tokens_only: bool = False
    """Start a server of ours without a tokenizer: it costs half the processor time for each token, and texts
    are decoded here."""
    nf4: bool = False
    """Hold the weights in 4 bits, as QLoRA does (bitsandbytes)."""
    start_timeout_s: float = Field(900.0, gt=0)
    max_restarts: int = Field(3, ge=0)
    """Restarts in a row, without a completed question between them, before the run stops."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of the GPU's memory for weights and KV cache of all servers there; None leaves it to vLLM."""
    max_num_seqs: int = Field(256, ge=1)
    max_model_len: int | None = Field(None, ge=2)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_lora_rank: int = Field(16, ge=1, le=_LORA_RANKS[-1])
    """The largest rank of an adapter; rounded up to one that vLLM knows."""
    lora_layers: tuple[str, ...] = ()
    """Names of the layers that adapters sit on, such as q_proj; none: every layer that vLLM can adapt. The
    output layer is one of them, whose adapter kernels are not made for the logprobs of given texts."""
    compilation: Literal["full", "graphs", "eager"] = "full"
    """`full` compiles and captures (slow to start, fastest after); `graphs` only captures decode steps;
    `eager` does neither."""
    seed: int = Field(0, ge=0)
    extra_args: tuple[str, ...] = ()
    """More arguments for the server, verbatim."""

    @field_validator("urls")
    @classmethod
    def _plain_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"a server's URL begins with http:// or https://, not {url!r}")
        plain = tuple(url.rstrip("/").removesuffix("/v1") for url in urls)
        if len(set(plain)) != len(plain):
            raise ValueError("the same server is given twice")
        return plain

    @model_validator(mode="after")
    def _several_are_ours(self) -> Self:
        if self.servers > 1 and self.urls:
            raise ValueError("servers is for servers of our own; leave it out with urls")
        if self.servers > 1 and self.sleep:
            raise ValueError("sleep needs the one server's memory whole; leave servers at 1")
        return self

    def of_each_server(self) -> list[VLLMSettings]:
        """The settings of each server of ours: devices, the share of a GPU's memory, and another seed."""
        cards = [card.strip() for card in (self.devices or "").split(",")]
        here = math.ceil(self.servers / len(cards))  # servers on a card
        each = max(len(cards) // self.servers, 1)  # cards of a server
        share, found = self.gpu_memory_utilization, []
        for number in range(self.servers):
            first = number * each % len(cards)
            more = {
                "devices": ",".join(cards[first : first + each]) or self.devices,
                "gpu_memory_utilization": share if here == 1 else (share or _VLLM_SHARE) / here,
                "seed": self.seed + number,
            }
            found.append(self.model_copy(update=more))
        return found

    def command(self, model: str, port: int) -> list[str]:
        """The command line that serves `model` at 127.0.0.1:`port` with these settings."""
        rank = next(known for known in _LORA_RANKS if known >= self.max_lora_rank)
        command = [str(self.python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
        if self.lora:
            # One version samples at a time; the one before it stays for requests that are still running.
            command += ["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2"]
            command += ["--max-lora-rank", str(rank)]
            if self.lora_layers:
                command += ["--lora-target-modules", *self.lora_layers]
        command += ["--logprobs-mode", "processed_logprobs", "--dtype", self.dtype, "--seed", str(self.seed)]
        command += ["--max-num-seqs", str(self.max_num_seqs)]
        if not self.log_stats:
            command += ["--disable-log-stats"]
        if self.tokens_only:
            command += ["--skip-tokenizer-init"]
        if self.sleep:
            command += ["--enable-sleep-mode"]
        if self.nf4:
            command += ["--quantization", "bitsandbytes"]
        if self.gpu_memory_utilization is not None:
            command += ["--gpu-memory-utilization", str(self.gpu_memory_utilization)]
        if self.max_model_len is not None:
            command += ["--max-model-len", str(self.max_model_len)]
        if self.compilation == "eager":
            command += ["--enforce-eager"]
        elif self.compilation == "graphs":
            graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
            command += ["--compilation-config", json.dumps(graphs)]
        return [*command, *self.extra_args]


def say_on_stderr(line: str) -> None:
    """The default way to tell the user something."""
    print(line, file=sys.stderr, flush=True)


class VLLMServer:
    """`vllm serve` of `model` on a free port of 127.0.0.1; output goes to `log_file`.

    Raises:
        SamplerError: it does not come up, or dies `settings.max_restarts` + 1 times in a row.
    """

    def __init__(
        self,
        model: str,
        settings: VLLMSettings,
        *,
        log_file: Path,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        self.model = model
        self.settings = settings
        self.log_file = log_file
        self.url = ""
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._log_offset = 0  # where the log of this process begins
        self._starting = False
        self._restarts = 0

    def __enter__(self) -> VLLMServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Id of the server's process group, None while it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def is_up(self) -> bool:
        """Whether the server runs and has answered since its start."""
        return self.pid is not None and not self._starting

    def start(self, cancelled: Event | None = None) -> None:
        """Start the server and wait until it answers. `cancelled` ends the wait early, not the start."""
        self.stop()
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        guard = Path(__file__).with_name("vllm_guard.py")
        # An adapter is hundreds of small tensors on the processor; with a thread for each of many cores, some
        # of them busy, loading one took seconds instead of a third of one (decision 0067).
        environment = (
            {"OMP_NUM_THREADS": str(min(_LOADER_THREADS, os.cpu_count() or 1))}
            | {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
            | {
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            }
        )
        if self.settings.whole_weights or self.settings.sleep:
            environment["VLLM_SERVER_DEV_MODE"] = "1"  # /collective_rpc, /sleep and such, on 127.0.0.1
        if self.settings.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.settings.devices
        with self.log_file.open("ab") as log:
            self._log_offset = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, str(guard), *self.settings.command(self.model, port)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        self._starting = True
        self._say(f"starting vLLM at {self.url} (log: {self.log_file})")
        self._wait(cancelled)

    def restart(self, cancelled: Event | None = None) -> None:
        """Start a server again that died or no longer answers; one that is still starting is waited for."""
        if self._starting and self.pid is not None:
            self._wait(cancelled)
            return
        if self._restarts >= self.settings.max_restarts:
            raise SamplerError(
                f"vLLM died {self._restarts + 1} times in a row; see {self.log_file} "
                "(often memory: lower gpu_memory_utilization, max_num_seqs or max_model_len)"
            )
        self._restarts += 1
        self._say(f"vLLM died; restart {self._restarts} of at most {self.settings.max_restarts}")
        self.start(cancelled)

    def has_worked(self) -> None:
        """Tell that a request was answered: restarts are counted from here again."""
        self._restarts = 0

    def stop(self) -> None:
        """Take the whole process group down, in order at first, by force after that."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()  # the guard takes its group down within seconds, and itself with it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # in case something had killed the guard alone
        self._process = None

    def _wait(self, cancelled: Event | None) -> None:
        assert self._process is not None
        try:
            self._wait_until_healthy(self._process, cancelled or Event())
        except _Cancelled:
            raise
        except BaseException:
            self.stop()
            raise
        self._starting = False

    def _wait_until_healthy(self, process: subprocess.Popen[bytes], cancelled: Event) -> None:
        began = said = time.monotonic()
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while not cancelled.is_set():
                if process.poll() is not None:
                    raise SamplerError(f"vLLM did not start: {self._last_error()}; see {self.log_file}")
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        self._say(f"vLLM is ready after {time.monotonic() - began:.0f} s")
                        return
                except httpx.TransportError:
                    pass  # not listening yet
                now = time.monotonic()
                if now - began > self.settings.start_timeout_s:
                    raise SamplerError(
                        f"vLLM did not answer within start_timeout_s = {self.settings.start_timeout_s:.0f}; "
                        f"see {self.log_file}"
                    )
                if now - said >= _SAY_EVERY_S:
                    said = now
                    self._say(f"vLLM is still starting ({now - began:.0f} s)")
                cancelled.wait(0.25)
        raise _Cancelled("the wait for vLLM's start was cancelled")

    def _last_error(self) -> str:
        """The most telling line of the log since the last start."""
        with self.log_file.open("rb") as log:
            log.seek(self._log_offset)
            lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines()]
        if any("No module named 'vllm'" in line for line in lines):
            return (
                f"{self.settings.python} has no vLLM (pip install 'looper-trainer[vllm]' there, "
                "or name another interpreter with the setting python)"
            )
        # The front end's last word is that the engine failed; the engine's own, before it, says why.
        telling = [found[0] for line in lines if " WARNING " not in line and (found := _MESSAGE.search(line))]
        telling = [line for line in telling if "See root cause above" not in line] or telling
        return (telling or lines or ["it wrote nothing"])[-1][:400]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
