"""The search of built images sees what is planted in a small image made here, whatever layer it is in."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts/images"))

import scan  # noqa: E402

SITE = "opt/looper/lib/python3.11/site-packages"
PEM = "-----BEGIN PRIVATE KEY-----\n" + "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg\n" * 4
HUB_TOKEN = "hf_" + 34 * "a"
API_KEY = "rw_" + 12 * "0" + "_" + 64 * "a" + "_00000000"


def wheel(name: str, version: str, files: dict[str, str]) -> dict[str, str]:
    """Files of an installed wheel, with the RECORD that vouches for them."""
    rows = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},1"
        for path, text in files.items()
    ]
    info = f"{name}-{version}.dist-info"
    files = files | {f"{info}/METADATA": f"Name: {name}\n", f"{info}/RECORD": "\n".join(rows)}
    return {f"{SITE}/{path}": text for path, text in files.items()}


class Plan:
    """What an image is made of: a base, a layer with packages, one more layer, and a configuration."""

    def __init__(self) -> None:
        trainer = {"looper_trainer/__init__.py": '"""Public."""\n'}
        self.layers: list[dict[str, str]] = [
            {"etc/os-release": "NAME=x\n"},
            wheel("httpx", _pinned("httpx"), {"httpx/__init__.py": "x = 1\n"})
            | wheel("looper_trainer", "0.1.0", trainer)
            | {"opt/looper/pyvenv.cfg": "home = /usr/bin\n"},
            {},
        ]
        self.modes: dict[str, int] = {}
        self.config: dict[str, Any] = {"User": "65532:65532", "Env": ["PATH=/opt/looper/bin"]}
        self.history: list[dict[str, str]] = [{"created_by": "COPY /opt/looper /opt/looper"}]

    def write(self, folder: Path) -> scan.Image:
        folder.mkdir()

        def blob(data: bytes) -> dict[str, str]:
            digest = hashlib.sha256(data).hexdigest()
            (folder / digest).write_bytes(data)
            return {"digest": f"sha256:{digest}"}

        config = blob(json.dumps({"config": self.config, "history": self.history}).encode())
        layers = []
        for files in self.layers:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                for name, text in files.items():
                    member = tarfile.TarInfo(name)
                    member.size, member.mode = len(text.encode()), self.modes.get(name, 0o644)
                    tar.addfile(member, io.BytesIO(text.encode()))
            layers.append(blob(buffer.getvalue()))
        (folder / "manifest.json").write_text(json.dumps({"config": config, "layers": layers}))
        return scan.Image(folder)


def _pinned(name: str) -> str:
    rows = (ROOT / "constraints.txt").read_text().splitlines()
    return next(row.partition("==")[2] for row in rows if row.startswith(f"{name}=="))


def found(plan: Plan, folder: Path) -> list[str]:
    return [str(one) for one in scan.scan(plan.write(folder / "image"), public=True, no_tools=True)]


def test_an_image_with_nothing_in_it_passes(tmp_path: Path) -> None:
    assert found(Plan(), tmp_path) == []


def test_a_test_token_that_others_publish_in_their_wheel_is_no_secret_of_ours(tmp_path: Path) -> None:
    plan = Plan()
    plan.layers[1] |= wheel("httpx", _pinned("httpx"), {"httpx/testing.py": HUB_TOKEN})
    assert found(plan, tmp_path) == []


def _add(layer: int, name: str, text: str) -> Callable[[Plan], None]:
    return lambda plan: plan.layers[layer].__setitem__(name, text)


def _removed_later(plan: Plan) -> None:
    plan.layers[1]["src/docker/secrets/x.pem"] = PEM
    plan.layers[2]["src/docker/.wh.secrets"] = ""


def _private_source(plan: Plan) -> None:
    source = next((ROOT / "reward_service/src/regime_w").glob("scoring.py")).read_text()
    plan.layers[1][f"{SITE}/looper_trainer/odd.py"] = source.replace("regime_w", "x")


def _set_user_id(plan: Plan) -> None:
    plan.layers[2]["opt/looper/bin/x"] = "x"
    plan.modes["opt/looper/bin/x"] = 0o4755


PLANTED: list[tuple[str, Callable[[Plan], None], str]] = [
    ("a key that a later layer removes", _removed_later, "has a private key"),
    ("a key in the base", _add(0, "etc/x", PEM), "has a private key"),
    ("an API key in a note", _add(2, "opt/looper/note.txt", API_KEY), "has an API key of the service"),
    (
        "an environment file",
        _add(1, "src/.env", "COMPOSE_PROFILES=cpu\n"),
        "named like a secret or a history",
    ),
    ("a pepper", _add(2, "var/lib/looper/reward/pepper", "00\n"), "named like a secret or a history"),
    ("a git folder", _add(1, "src/.git/HEAD", "ref: refs/heads/main\n"), "named like a secret or a history"),
    (
        "a key in the environment",
        lambda plan: plan.config["Env"].append(f"LOOPER_REWARD_KEY={API_KEY}"),
        "is a secret by its name",
    ),
    (
        "a token in the history",
        lambda plan: plan.history.append({"created_by": "RUN pip install --token " + HUB_TOKEN}),
        "has a hub token",
    ),
    (
        "a password in an index's address",
        lambda plan: plan.history.append({"created_by": "ARG INDEX=https://me:hunter22@index.example.org/"}),
        "has a password in an address",
    ),
    ("root", lambda plan: plan.config.update(User=""), "is root, not a number above 0"),
    ("a private package", _add(1, f"{SITE}/regime_w/__init__.py", ""), "has 'regime_w'"),
    ("a private name in a binary", _add(2, "opt/x.so", "\x7fELF\x01REGIME_W"), "has 'regime_w'"),
    (
        "a private name in the history",
        lambda plan: plan.history.append({"created_by": "COPY reward_service/src /src"}),
        "has 'reward_service'",
    ),
    ("private source under another name", _private_source, "[shingles]"),
    ("a changed file of a wheel", _add(1, f"{SITE}/httpx/__init__.py", "x = 2\n"), "differs from its wheel"),
    (
        "a token in our own wheel",
        lambda plan: plan.layers[1].update(
            wheel("looper_trainer", "0.1.0", {"looper_trainer/x.py": HUB_TOKEN})
        ),
        "has a hub token",
    ),
    (
        "a package that nobody pinned",
        lambda plan: plan.layers[1].update(wheel("typosquat", "1.0", {"typosquat/__init__.py": ""})),
        "typosquat 1.0 is not in constraints.txt",
    ),
    ("a shell", _add(0, "usr/bin/bash", "x"), "is a tool that a service does not need"),
    ("a set-user-id file", _set_user_id, "runs as another user than its caller"),
]


@pytest.mark.parametrize(("title", "plant", "what"), PLANTED, ids=[planted[0] for planted in PLANTED])
def test_what_is_planted_in_an_image_is_found(
    title: str, plant: Callable[[Plan], None], what: str, tmp_path: Path
) -> None:
    plan = Plan()
    plant(plan)
    assert [one for one in found(plan, tmp_path) if what in one]
