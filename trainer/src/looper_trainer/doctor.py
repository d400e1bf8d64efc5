"""`looper doctor`: whether this machine can train, each finding with its fix.

Looks at Python and the libraries' versions, the GPU, memory, disk, the port of the dashboard, and the reward
service with its scorer. It changes nothing and imports no training library.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from looper_trainer.config import StageConfig
from looper_trainer.errors import RewardError, RewardRejected, UserError

if TYPE_CHECKING:
    from looper_schemas.scoring import ServiceInfo

Level = Literal["ok", "note", "problem"]

# The versions that the trainer is tested with, by the prefix that must agree.
TESTED = {
    "torch": "2.",
    "transformers": "5.",
    "trl": "1.",
    "peft": "0.",
    "accelerate": "1.",
    "datasets": "5.",
}
DISK_NEEDED = 20 * 2**30  # an 8B model's adapter checkpoints and one merged copy in bfloat16
GPU_NEEDED_MIB = 24_000
DEMO_MEMORY = 3 * 2**30


class Finding(NamedTuple):
    """What was looked at, how it stands, and what to do about it."""

    level: Level
    subject: str
    text: str
    fix: str = ""


class DoctorConfig(StageConfig):
    """Check this machine, its libraries and the reward service."""

    output: Annotated[Path, Field(description="where runs are written")] = Path()
    port: Annotated[int, Field(ge=1, le=65535, description="port the dashboard will use")] = 7007
    service: Annotated[bool, Field(description="ask the reward service too")] = True


def run(config: DoctorConfig) -> None:
    """Print every finding.

    Raises:
        UserError: something stands in the way of training.
    """
    problems = 0
    for finding in examine(config):
        problems += finding.level == "problem"
        print(f"{finding.level:<8} {finding.subject:<15} {finding.text}", flush=True)
        if finding.fix:
            print(f"{'':<24} fix: {finding.fix}", flush=True)
    if problems:
        raise UserError(f"doctor: {problems} problem{'s' * (problems > 1)}; mend what is marked above")
    print("doctor: nothing stands in the way")


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """Every finding, the quick ones first."""
    yield python_version(sys.version_info[:3])
    yield from libraries(_installed)
    yield from gpu()
    yield memory(_memory_bytes())
    yield disk(config.output)
    yield dashboard_port(config.port)
    if config.service:
        yield from service()


def python_version(version: tuple[int, ...]) -> Finding:
    """Whether the interpreter is one that the project supports."""
    shown = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("problem", "python", shown, "install Python 3.11 or newer")
    return Finding("ok", "python", shown)


def libraries(installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """The training libraries and what samples fast."""
    missing = [name for name in TESTED if installed(name) is None]
    if missing:
        fix = "pip install 'looper-trainer[train]'"
        yield Finding("problem", "libraries", f"missing: {', '.join(missing)}", fix)
    for name, prefix in TESTED.items():
        version = installed(name)
        if version is None:
            continue
        if version.startswith(prefix):
            yield Finding("ok", name, version)
        else:
            yield Finding("problem", name, version, f"pip install '{name}=={prefix}*'")
    vllm = installed("vllm")
    if vllm is None:
        yield Finding(
            "note", "vllm", "not installed: sampling uses transformers", "pip install vllm, on a GPU"
        )
    else:
        yield Finding("ok", "vllm", vllm)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> Iterator[Finding]:
    """The GPUs that the driver reports."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        yield Finding(
            "note",
            "gpu",
            "none: the demo and small models train on the CPU",
            "use a CUDA machine for an 8B model",
        )
        return
    for line in done.stdout.splitlines():
        name, total, free = (part.strip() for part in line.split(","))
        text = f"{name}, {int(free) / 1024:.0f} of {int(total) / 1024:.0f} GiB free"
        if int(total) < GPU_NEEDED_MIB:
            yield Finding("note", "gpu", text, "an 8B model needs 24 GiB: choose a smaller --model")
        elif int(free) < GPU_NEEDED_MIB:
            yield Finding("note", "gpu", text, "end what else uses it (nvidia-smi shows it)")
        else:
            yield Finding("ok", "gpu", text)


def _memory_bytes() -> int | None:
    """Memory that is available now; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
    return values.get("MemAvailable")


def memory(available: int | None) -> Finding:
    """Whether the demo fits into the memory that is free."""
    if available is None:
        return Finding("note", "memory", "unknown on this system")
    text = f"{available / 2**30:.1f} GiB available"
    if available < DEMO_MEMORY:
        return Finding("problem", "memory", text, "free some: the smallest run needs 3 GiB")
    return Finding("ok", "memory", text)


def disk(folder: Path) -> Finding:
    """Room and rights where runs are written."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    text = f"{free / 2**30:.0f} GiB free in {place}"
    if not place.is_dir():
        return Finding("problem", "disk", f"{place} is no folder", "choose another --output")
    if not os.access(place, os.W_OK):
        return Finding("problem", "disk", f"{place} is read-only for you", "choose another --output")
    if free < 2**30:
        return Finding("problem", "disk", text, "free some, or choose another --output")
    if free < DISK_NEEDED:
        return Finding("note", "disk", text, "an 8B run wants 20 GiB")
    return Finding("ok", "disk", text)


def dashboard_port(port: int) -> Finding:
    """Whether `looper dashboard` can listen."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            fix = f"looper dashboard --port {port + 1 if port < 65535 else 0}"
            return Finding("note", "dashboard port", f"{port} is in use", fix)
    return Finding("ok", "dashboard port", f"{port} is free")


def service() -> Iterator[Finding]:
    """Whether the reward service answers, and which scorer it runs."""
    from looper_trainer.reward_client import RewardClient

    if not os.environ.get("LOOPER_REWARD_URL", "").strip():
        fix = "export LOOPER_REWARD_URL and LOOPER_REWARD_KEY_FILE (rollouts and ppo need them)"
        yield Finding("note", "reward service", "LOOPER_REWARD_URL is not set", fix)
        return

    def ask(disclosure: str) -> tuple[str, ServiceInfo]:
        with RewardClient.from_environment(
            run_id="doctor", disclosure=disclosure, first_contact_s=3.0, on_wait=lambda _: None
        ) as client:
            return client.url, client.info()

    rewards_alone = False
    try:
        try:
            url, info = ask("components")
        except RewardRejected:  # the key may be for rewards alone
            url, info = ask("reward")
            rewards_alone = True
    except (RewardError, UserError) as error:
        text, _, fix = str(error).partition("; ")
        yield Finding("problem", "reward service", text, fix)
        return
    limits = info.limits
    modes = ", ".join(mode.value for mode in info.reward_modes)
    yield Finding("ok", "reward service", f"{url}, contract {info.contract_max}")
    if rewards_alone:
        yield Finding("note", "disclosure", "the key gets rewards alone", "rollouts, ppo --disclosure reward")
    yield Finding("ok", "scorer", info.scorer_id)
    yield Finding("ok", "reward modes", modes)
    yield Finding("ok", "limits", f"{limits.max_questions} questions, {limits.max_arms} arms a question")
