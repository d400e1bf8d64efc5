"""What docker-compose.yml and the Dockerfiles may never say, and that the policy sees it when they do."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from reward_service import compose as compose_init

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
REPLICAS = tuple(f"reward-replica-{number}" for number in range(1, compose_init.REPLICAS + 1))
# Which networks each of these may be on; everything else stays off the inner ones.
INNER: dict[str, set[str]] = {
    "gateway": {"edge", "inside"},
    "reward-service": {"inside"},
    "reward-service-gpu": {"inside"},
    **{name: {"inside", "database"} for name in REPLICAS},
    "postgres": {"database"},
}
ALONE = ("reward-service-gpu", "keys")  # never run beside `reward-service`, or only for a moment
DOCKERFILES = ("reward_service", "trainer")


def violations(compose: dict[str, Any]) -> Iterator[str]:
    """Everything in a parsed compose file that the policy forbids, as `service: what`."""
    for name, service in compose["services"].items():
        yield from (f"{name}: {what}" for what in _of_service(name, service, compose))
    for name in ("inside", "database"):
        if (compose["networks"].get(name) or {}).get("internal") is not True:
            yield f"{name}: has a route out"
    writers: dict[str, list[str]] = {}
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            folder, _, rest = str(volume).partition(":")
            if folder.startswith("./docker/state/") and not rest.endswith(":ro"):
                writers.setdefault(folder, []).append(name)
    for folder, several in writers.items():
        together = [name for name in several if name not in ALONE]
        if len(together) > 1:
            yield f"{folder}: is written by {' and '.join(together)}"
    for name, secret in compose["secrets"].items():
        if not str(secret.get("file", "")).startswith("./docker/secrets/"):
            yield f"{name}: is no file of docker/secrets"


def _of_service(name: str, service: dict[str, Any], compose: dict[str, Any]) -> Iterator[str]:
    if service.get("privileged") or service.get("cap_add") or service.get("devices"):
        yield "has privileges"
    if service.get("cap_drop") != ["ALL"]:
        yield "keeps capabilities"
    if service.get("security_opt") != ["no-new-privileges:true"]:
        yield "may gain privileges"
    if service.get("read_only") is not True:
        yield "has a writable root"
    for key in ("network_mode", "pid", "ipc", "uts", "userns_mode"):
        if service.get(key) not in (None, "none", "private"):
            yield f"shares {key} with another"
    for key in ("pids_limit", "mem_limit", "cpus"):
        if not service.get(key) or service[key] == -1:
            yield f"has no {key}"
    if not re.match(r"[1-9]\d*:[1-9]\d*$", _resolved(str(service.get("user", "0:0")))):
        yield "runs as root"
    if "max-size" not in service.get("logging", {}).get("options", {}):
        yield "may fill the disk with its log"
    for port in service.get("ports", []):
        if not re.match(r"127\.0\.0\.1:\d+:\d+$", str(port)):
            yield f"publishes {port} beyond loopback"
        if name != "gateway":
            yield "publishes a port beside the gateway"
    for volume in service.get("volumes", []):
        source = str(volume).split(":")[0]
        if not source.startswith("./") and source not in compose.get("volumes", {}):
            yield f"mounts {source} of the host"
        if ".." in source:
            yield f"mounts {source} outside this folder"
    networks = service.get("networks") or []
    if name in INNER and set(networks) != INNER[name]:
        yield f"is on {', '.join(sorted(networks))}, not on {', '.join(sorted(INNER[name]))}"
    if name not in INNER and {"inside", "database"} & set(networks):
        yield "leads from the inside out"
    if not networks and service.get("network_mode") != "none":
        yield "is on the default network"
    for key, value in (service.get("environment") or {}).items():
        if re.search(r"(KEY|SECRET|TOKEN|PASSWORD)$", key):
            yield f"has the secret {key} in its environment"
        if str(value).startswith("/run/secrets/") and str(value).split("/")[3] not in service.get(
            "secrets", []
        ):
            yield f"is told of {value}, which it is not given"
    for secret in service.get("secrets", []):
        if secret not in compose["secrets"]:
            yield f"asks for the unknown secret {secret}"
    if re.search(r":latest$|^[^:]+$", _resolved(service["image"])):
        yield f"runs the moving image {service['image']}"


def _resolved(text: str) -> str:
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_the_compose_file_keeps_the_policy() -> None:
    assert list(violations(COMPOSE)) == []


def _set(service: str, key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda compose: compose["services"][service].__setitem__(key, value)


def _without(service: str, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda compose: compose["services"][service].pop(key) and None


PLANTED: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("privileged", _set("trainer", "privileged", True), "has privileges"),
    ("a capability", _set("gateway", "cap_add", ["NET_ADMIN"]), "has privileges"),
    ("capabilities kept", _without("reward-service", "cap_drop"), "keeps capabilities"),
    ("new privileges", _without("vllm", "security_opt"), "may gain privileges"),
    ("a writable root", _set("reward-service", "read_only", False), "has a writable root"),
    ("the host's network", _set("trainer", "network_mode", "host"), "shares network_mode with another"),
    ("the host's processes", _set("vllm", "pid", "host"), "shares pid with another"),
    ("the host's memory", _set("vllm", "ipc", "host"), "shares ipc with another"),
    ("no limit of processes", _without("eval", "pids_limit"), "has no pids_limit"),
    ("no end of processes", _set("eval", "pids_limit", -1), "has no pids_limit"),
    ("no limit of memory", _without("reward-service-gpu", "mem_limit"), "has no mem_limit"),
    ("no limit of cores", _without("keys", "cpus"), "has no cpus"),
    ("root", _set("gateway", "user", "0:0"), "runs as root"),
    ("root by omission", _without("reward-service", "user"), "runs as root"),
    ("an endless log", _without("gateway", "logging"), "may fill the disk with its log"),
    (
        "a port on every address",
        _set("gateway", "ports", ["8443:8443"]),
        "publishes 8443:8443 beyond loopback",
    ),
    ("a port on 0.0.0.0", _set("gateway", "ports", ["0.0.0.0:1:1"]), "publishes 0.0.0.0:1:1 beyond loopback"),
    (
        "a port of the service",
        _set("reward-service", "ports", ["127.0.0.1:1:1"]),
        "publishes a port beside the gateway",
    ),
    ("a port of vLLM", _set("vllm", "ports", ["127.0.0.1:8000:8000"]), "publishes a port beside the gateway"),
    (
        "the engine's socket",
        _set("trainer", "volumes", ["/var/run/docker.sock:/x"]),
        "mounts /var/run/docker.sock of the host",
    ),
    ("a parent folder", _set("trainer", "volumes", ["./../x:/x"]), "mounts ./../x outside this folder"),
    (
        "the service with a way out",
        _set("reward-service", "networks", ["inside", "edge"]),
        "is on edge, inside, not on inside",
    ),
    (
        "the database within the gateway's reach",
        _set("postgres", "networks", ["inside"]),
        "is on inside, not on database",
    ),
    (
        "a replica that writes the folder of all",
        _set("reward-replica-2", "volumes", ["./docker/state/reward:/var/lib/looper/reward"]),
        "is written by reward-service and reward-replica-2",
    ),
    (
        "two replicas with one folder",
        _set("reward-replica-2", "volumes", ["./docker/state/replica-1:/var/lib/looper/replica-1"]),
        "is written by reward-replica-1 and reward-replica-2",
    ),
    ("a trainer on the inside", _set("trainer", "networks", ["inside", "edge"]), "leads from the inside out"),
    ("the default network", _without("eval", "networks"), "is on the default network"),
    (
        "a key in the environment",
        _set("trainer", "environment", {"LOOPER_REWARD_KEY": "x"}),
        "has the secret LOOPER_REWARD_KEY in its environment",
    ),
    (
        "a secret that is not given",
        _set("eval", "environment", {"X": "/run/secrets/ca.crt"}),
        "is told of /run/secrets/ca.crt, which it is not given",
    ),
    ("a moving image", _set("gateway", "image", "haproxy:latest"), "runs the moving image haproxy:latest"),
    ("an image without a tag", _set("gateway", "image", "haproxy"), "runs the moving image haproxy"),
]


@pytest.mark.parametrize(("title", "plant", "what"), PLANTED, ids=[planted[0] for planted in PLANTED])
def test_the_policy_sees_a_planted_violation(
    title: str, plant: Callable[[dict[str, Any]], None], what: str
) -> None:
    compose = copy.deepcopy(COMPOSE)
    plant(compose)
    assert [found.partition(": ")[2] for found in violations(compose)].count(what) >= 1


def test_the_policy_sees_an_inside_with_a_route_out_and_a_secret_elsewhere() -> None:
    compose = copy.deepcopy(COMPOSE)
    compose["networks"]["inside"] = {}
    compose["secrets"]["trainer.key"] = {"file": "./work/trainer.key"}
    assert list(violations(compose)) == [
        "inside: has a route out",
        "trainer.key: is no file of docker/secrets",
    ]


def test_there_is_one_way_in_and_the_trainer_takes_it() -> None:
    inside = [
        name for name, service in COMPOSE["services"].items() if "inside" in service.get("networks", [])
    ]
    assert inside == ["gateway", "reward-service", "reward-service-gpu", *REPLICAS]
    for name in inside[1:]:
        assert COMPOSE["services"][name]["networks"]["inside"]["aliases"] == ["reward"]
    assert COMPOSE["services"]["gateway"]["environment"]["LOOPER_REWARD_HOST"] == "reward"
    environment = COMPOSE["services"]["trainer"]["environment"]
    assert environment["LOOPER_REWARD_URL"] == "https://gateway:8443"
    assert environment["LOOPER_REWARD_KEY_FILE"] == "/run/secrets/trainer.key"


@pytest.mark.parametrize("profile", compose_init.Profile)
def test_what_init_writes_is_what_the_services_of_its_profile_ask_for(
    profile: compose_init.Profile, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    compose_init.prepare_project(tmp_path, profile)
    written = dict(row.split("=") for row in (tmp_path / ".env").read_text().split())
    assert set(written) - {"COMPOSE_PROFILES"} <= set(
        re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    )
    started = [
        service
        for service in COMPOSE["services"].values()
        if written["COMPOSE_PROFILES"] in service.get("profiles", [profile])
    ]
    assert len(started) == (4 if profile is compose_init.Profile.REPLICAS else 2)
    for service in started:
        for secret in service.get("secrets", []):
            assert (tmp_path / COMPOSE["secrets"][secret]["file"]).is_file()
        for volume in service.get("volumes", []):
            source = str(volume).split(":")[0]
            assert (tmp_path / source).exists() or source.startswith("./docker/gateway/")
    database = COMPOSE["services"]["postgres"]["environment"]
    user, _, where = compose_init.STATE_URL.removeprefix("postgresql+psycopg://").partition("@")
    assert (user, where.partition("?")[0]) == (
        database["POSTGRES_USER"], f"postgres:5432/{database['POSTGRES_DB']}",
    )  # fmt: skip
    secret = where.partition("passfile=/run/secrets/")[2]
    assert secret in COMPOSE["services"]["reward-replica-1"]["secrets"]


# Dockerfiles


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of docker/NAME.Dockerfile, continuation lines joined."""
    text = (ROOT / f"docker/{name}.Dockerfile").read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.strip() and not row.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(rows))
    return [(row.split()[0], row.partition(" ")[2].strip()) for row in joined.splitlines()]


def copied(name: str) -> set[str]:
    """Files and folders that come from this repository."""
    return {
        source
        for word, rest in instructions(name)
        if word in ("COPY", "ADD") and "--from=" not in rest
        for source in rest.split()[:-1]
    }


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_copies_named_sources_that_exist_and_nothing_else(name: str) -> None:
    assert "ADD" not in {word for word, _ in instructions(name)}
    for source in copied(name):
        assert re.fullmatch(r"[\w./-]+", source), source
        assert source not in (".", "./")
        assert (ROOT / source).exists(), source
    ignored = (ROOT / f"docker/{name}.Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert next(row for row in ignored if not row.startswith("#")) == "*"
    assert {row[1:] for row in ignored if row.startswith("!")} == copied(name)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_built_in_stages_and_runs_as_a_user(name: str) -> None:
    words = instructions(name)
    assert [word for word, _ in words].count("FROM") == 2
    last = max(i for i, (word, _) in enumerate(words) if word == "FROM")
    final = words[last + 1 :]
    assert "RUN" not in {word for word, _ in final}
    assert [rest for word, rest in final if word == "USER"] == ["65532:65532"]
    assert not [
        rest for word, rest in words if word in ("ENV", "ARG") and re.search(r"(KEY|SECRET|PASSWORD)=", rest)
    ]
    assert ("ARG", "TORCH_INDEX=https://download.pytorch.org/whl/cpu") in words


def test_the_trainer_image_has_nothing_private() -> None:
    text = (ROOT / "docker/trainer.Dockerfile").read_text(encoding="utf-8")
    assert not re.search(r"regime|reward|minilm|offline", text, re.IGNORECASE)
    assert {source.split("/")[0] for source in copied("trainer")} == {
        "constraints.txt",
        "shared_schemas",
        "trainer",
        "eval",
    }


def test_the_service_image_answers_for_its_health_and_needs_no_way_out() -> None:
    words = dict(instructions("reward_service"))
    assert "/livez" in words["HEALTHCHECK"]
    assert "HF_HUB_OFFLINE=1" in words["ENV"]
    assert "[offline,fast,postgresql]" in " ".join(
        rest for word, rest in instructions("reward_service") if word == "RUN"
    )
    assert words["ENTRYPOINT"].startswith('["/opt/looper/bin/python"')
