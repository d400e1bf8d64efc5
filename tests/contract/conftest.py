"""The services of the contract suite: the public fake server, the template, the private one if installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from looper_schemas.scoring import Disclosure, RewardMode
from looper_trainer.serving import RewardServer
from looper_trainer.testing import FakeRewardServer


@dataclass(frozen=True)
class Service:
    """A running service with two keys: one may see components, the other rewards only."""

    url: str
    full_key: str
    reward_key: str

    def client(self, key: str | None = None, **headers: str) -> httpx.Client:
        """An HTTP client with a key (the full one unless another is given; "" for none)."""
        chosen = self.full_key if key is None else key
        sent = ({"Authorization": f"Bearer {chosen}"} if chosen else {}) | headers
        return httpx.Client(base_url=self.url, headers=sent, timeout=60, trust_env=False)


def private_command() -> list[str] | None:
    """The private service's command, or None where it is not installed."""
    beside = Path(sys.executable).with_name("reward-service")
    found = str(beside) if beside.exists() else shutil.which("reward-service")
    return [found] if found else None


def template() -> RewardServer:
    """The private service that docs/bring-your-own-reward.md starts from."""
    path = Path(__file__).parents[2] / "examples/private_service/my_reward.py"
    spec = importlib.util.spec_from_file_location("my_reward", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ranges = dict.fromkeys(RewardMode, (module.WRONG, module.RIGHT + module.AGREEMENT))
    server: RewardServer = module.MyReward("template", ranges, key="full-key", reward_key="reward-key")
    return server


@pytest.fixture(scope="session", params=["public fake", "template", "private service"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    if request.param == "public fake":
        with FakeRewardServer(key="full-key", reward_key="reward-key") as server:
            yield Service(server.url, "full-key", "reward-key")
        return
    if request.param == "template":
        with template() as server:
            yield Service(server.url, "full-key", "reward-key")
        return
    command = private_command()
    if command is None:
        pytest.skip("the private service is not installed")
    home = tmp_path_factory.mktemp("reward-service-home")
    environment = os.environ | {"REWARD_SERVICE_HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def create_key(name: str, scopes: str) -> str:
        made = subprocess.run(
            [*command, "keys", "create", "--name", name, "--scopes", scopes],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return made.stdout.strip()

    full_key = create_key("contract-full", f"score:{Disclosure.REWARD},score:{Disclosure.COMPONENTS}")
    reward_key = create_key("contract-reward", f"score:{Disclosure.REWARD}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = home / "contract.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "serve", "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        running = Service(f"http://127.0.0.1:{port}", full_key, reward_key)
        _wait_until_ready(running, process, log)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(running: Service, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    with running.client() as client:
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")
            try:
                if client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
    raise AssertionError("not ready after 180 s: " + log.read_text(encoding="utf-8", errors="replace"))
