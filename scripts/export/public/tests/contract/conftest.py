"""The services of the contract suite: the public fake server, the template of one, and one of your own.

Your own service takes part when `LOOPER_CONTRACT_URL` names it, with two keys: `LOOPER_CONTRACT_KEY` may see
components, `LOOPER_CONTRACT_REWARD_KEY` rewards only.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from looper_schemas.scoring import RewardMode
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


@pytest.fixture(scope="session", params=["public fake", "template", "your service"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    if request.param == "public fake":
        with FakeRewardServer(key="full-key", reward_key="reward-key") as server:
            yield Service(server.url, "full-key", "reward-key")
        return
    if request.param == "template":
        with template() as server:
            yield Service(server.url, "full-key", "reward-key")
        return
    names = ("LOOPER_CONTRACT_URL", "LOOPER_CONTRACT_KEY", "LOOPER_CONTRACT_REWARD_KEY")
    if not all(os.environ.get(name) for name in names):
        pytest.skip(f"no service of your own: set {', '.join(names)}")
    yield Service(*(os.environ[name] for name in names))
