"""The three public wheels install and import alone, and bring nothing private with them."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {"shared_schemas": "looper_schemas", "trainer": "looper_trainer", "eval": "looper_eval"}

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheels")]


def run(*command: object, cwd: Path) -> str:
    # The environment's own packages are judged, not those that this process was told to look for.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheels")
    # Built from copies: setuptools leaves a build/ beside the source, and would pick up an old one.
    sources = tmp_path_factory.mktemp("sources")
    for folder in PUBLIC:
        shutil.copytree(ROOT / folder, sources / folder, ignore=shutil.ignore_patterns("build", "*.egg-info"))
        build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out]
        run(sys.executable, *build, sources / folder, cwd=out)
    return out


@pytest.fixture(scope="module")
def python(wheels, tmp_path_factory) -> Path:
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", venv, cwd=venv)
    interpreter = venv / "bin/python"
    run(
        interpreter, "-m", "pip", "install", "-q", "--disable-pip-version-check",
        "-c", ROOT / "constraints.txt", *sorted(wheels.glob("*.whl")), cwd=venv,
    )  # fmt: skip
    return interpreter


def test_public_packages_import_in_a_venv_of_their_own(python, tmp_path):
    run(python, "-c", "import looper_trainer, looper_eval, looper_schemas", cwd=tmp_path)


def test_commands_explain_themselves_without_the_training_extra(python, tmp_path):
    for command in ("looper", "looper-eval"):
        assert "usage" in run(python.parent / command, "--help", cwd=tmp_path).lower()


@pytest.mark.parametrize("name", ["fastapi", "regime_w", "reward_service", "torch"])
def test_that_venv_has_nothing_private_and_nothing_heavy(python, tmp_path, name):
    found = run(python, "-c", f"import importlib.util as u; print(u.find_spec({name!r}))", cwd=tmp_path)
    assert found.strip() == "None"


def test_public_wheels_hold_public_packages_only(wheels):
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            tops = {name.split("/")[0] for name in archive.namelist()}
        assert tops - set(PUBLIC.values()) == {top for top in tops if top.endswith(".dist-info")}, wheel.name
