"""Compose file and Dockerfiles before judges that others wrote.

`docker compose` itself (its parser and schema), compose-lint (OWASP and CIS rules) and hadolint; each sees
what is planted, too. They come from PyPI with the other development tools.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PROFILES = ("cpu", "gpu", "replicas", "keys", "train", "train-gpu", "eval", "vllm")


def run(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / words[0]), *map(str, words[1:])]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("profile", PROFILES)
def test_docker_compose_accepts_every_profile(profile: str, project: Path) -> None:
    done = run("docker-compose", "--profile", profile, "config", "--format", "json", cwd=project)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    services = json.loads(done.stdout)["services"]
    assert "gateway" in services
    assert len(services) > 1
    assert all(service["cap_drop"] == ["ALL"] for service in services.values())


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ("read_only: true", "readonly: true", "readonly"),
        ("pids_limit: 64", "pids_limit: many", "pids_limit"),
        ("networks: [database]", "networks: [databse]", "databse"),
    ],
    ids=["an unknown key", "a value of another type", "an unknown network"],
)
def test_docker_compose_refuses_a_planted_mistake(before: str, after: str, what: str, project: Path) -> None:
    file = project / "docker-compose.yml"
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    done = run("docker-compose", "--profile", "*", "config", "--quiet", cwd=project)
    assert done.returncode != 0
    assert what in done.stderr


def findings(file: Path) -> dict[str, set[str]]:
    done = run("compose-lint", "--format", "json", file)
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, set[str]] = {}
    for finding in json.loads(done.stdout)["findings"]:
        found.setdefault(finding["rule_id"], set()).add(finding["service"])
    return found


def test_compose_lint_finds_nothing_but_what_was_decided(project: Path) -> None:
    found = findings(project / "docker-compose.yml")
    # Tags, not digests: the images are built here, or pulled by whoever deploys.
    assert set(found.pop("CL-0019")) >= {"gateway", "postgres", "vllm"}
    # vLLM compiles kernels and loads them from its temporary folder.
    assert found == {"CL-0022": {"vllm"}}


def test_compose_lint_sees_a_planted_privilege(project: Path) -> None:
    file = project / "docker-compose.yml"
    file.write_text(
        file.read_text().replace("    networks: [database]", "    networks: [database]\n    privileged: true")
    )
    assert "postgres" in set().union(*findings(file).values())
    assert len(findings(file)) == 3


@pytest.mark.parametrize("name", ["reward_service", "trainer"])
def test_hadolint_has_nothing_to_say(name: str) -> None:
    done = run("hadolint", f"docker/{name}.Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_sees_a_planted_mistake(tmp_path: Path) -> None:
    text = (ROOT / "docker/trainer.Dockerfile").read_text()
    (tmp_path / "Dockerfile").write_text(text + "RUN sudo apt-get install curl\n")
    done = run("hadolint", tmp_path / "Dockerfile")
    assert done.returncode == 1
    assert "DL3004" in done.stdout
