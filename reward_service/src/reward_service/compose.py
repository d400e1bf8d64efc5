"""`reward-service init --compose PROFILE`: all that `docker compose up` needs, in the project's folder.

    .env                     the profile, the user of the containers, the index of torch
    docker/secrets/          local CA, certificates of gateway and client, trainer's key, database password
    docker/state/reward/     the folder of the service: pepper, keys, audit, state
    docker/state/replica-N/  (profile `replicas`) a folder of its own for each replica, which shares pepper,
                             keys and settings with `reward`
    docker/state/postgres/   (profile `replicas`) the database

All of it belongs to one user, as whom the containers run: who calls this, or 65532 where that is root. What
is there is kept; a certificate is renewed when it ends within 30 days.
"""

from __future__ import annotations

import os
import secrets
from enum import StrEnum
from pathlib import Path

from reward_service import auth
from reward_service.auth import KEYS_FILE, Scope
from reward_service.certificates import CLIENT, SERVER, LocalCA
from reward_service.errors import StartError
from reward_service.home import prepare_home, prepare_replica, write_atomically
from reward_service.settings import load_settings_of

REPLICAS = 2
NOBODY = 65532
STATE_URL = "postgresql+psycopg://looper@postgres:5432/looper?passfile=/run/secrets/postgres.pgpass"
_TORCH = "https://download.pytorch.org/whl/"
_SYSTEM_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")


class Profile(StrEnum):
    """What `docker compose up` starts behind the gateway."""

    CPU = "cpu"
    GPU = "gpu"
    REPLICAS = "replicas"


def prepare_project(project: Path, profile: Profile) -> None:
    """Write what is missing below `project`, the folder with docker-compose.yml.

    Raises:
        StartError: it is another folder, was prepared for another profile, or cannot be written.
    """
    if not (project / "docker-compose.yml").is_file():
        raise StartError(f"{project}: has no docker-compose.yml; run this in the project's folder")
    environment = _environment(profile)
    try:
        if (project / ".env").exists():
            _refuse_another(project / ".env", environment)
        folder, state = project / "docker/secrets", project / "docker/state"
        for made in (folder, state):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        home = state / "reward"
        prepare_home(home)
        _settings(home, profile)
        _secrets(folder, home)
        if profile is Profile.REPLICAS:
            (state / "postgres").mkdir(mode=0o700, exist_ok=True)
            for number in range(1, REPLICAS + 1):
                prepare_replica(state / f"replica-{number}", home)
        if os.geteuid() == 0:
            for top in (folder, state):
                _give_away(top)
        if not (project / ".env").exists():
            rows = (f"{name}={value}\n" for name, value in environment.items())
            write_atomically(project / ".env", "".join(rows))
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}; run this as who owns the folder") from None


def _environment(profile: Profile) -> dict[str, str]:
    user, group = (NOBODY, NOBODY) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    return {
        "COMPOSE_PROFILES": profile.value,
        "LOOPER_TORCH_INDEX": _TORCH + ("cu128" if profile is Profile.GPU else "cpu"),
        "LOOPER_UID": str(user),
        "LOOPER_GID": str(group),
    }


def _refuse_another(file: Path, wanted: dict[str, str]) -> None:
    """Stop where `.env` says anything else: whoever edited it must decide."""
    rows = [row.partition("=") for row in file.read_text(encoding="utf-8").splitlines()]
    found = {name: value for name, _, value in rows}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise StartError(
                f"{file}: has {name}={found.get(name, '')}, not {value}; mend that line, or remove the file"
            )


def _settings(home: Path, profile: Profile) -> None:
    file = home / "settings.toml"
    if profile is Profile.REPLICAS and not file.exists():
        write_atomically(file, f'state_url = "{STATE_URL}"\n')
    replicated = load_settings_of(home).state_url is not None
    if replicated and profile is not Profile.REPLICAS:
        raise StartError(
            f"{file}: has a state_url, which only the profile `replicas` serves; remove that line"
        )
    if not replicated and profile is Profile.REPLICAS:
        raise StartError(f'{file}: replicas share a database; add the line state_url = "{STATE_URL}"')


def _secrets(folder: Path, home: Path) -> None:
    authority = LocalCA(folder)
    authority.issue("gateway", ["gateway", "localhost", "127.0.0.1"], SERVER)
    authority.issue("client", ["client"], CLIENT)
    # The trainer trusts this CA beside the usual ones, which it needs for the model hub.
    usual = next((Path(name).read_text() for name in _SYSTEM_BUNDLES if Path(name).is_file()), "")
    write_atomically(folder / "ca-bundle.pem", usual + (folder / "ca.crt").read_text())
    if not (folder / "trainer.key").exists():
        scopes = {Scope.SCORE_REWARD, Scope.SCORE_COMPONENTS}
        write_atomically(folder / "trainer.key", auth.create_key(home, "trainer", scopes) + "\n")
    elif not (home / KEYS_FILE).exists():
        raise StartError(
            f"{folder / 'trainer.key'}: opens nothing, because {home} has no keys; restore them or remove it"
        )
    if not (folder / "postgres.password").exists():
        password = secrets.token_hex(32)
        write_atomically(folder / "postgres.pgpass", f"*:*:*:looper:{password}\n")
        write_atomically(folder / "postgres.password", password + "\n")


def _give_away(top: Path) -> None:
    for folder, _, files in os.walk(top):
        for name in (folder, *(os.path.join(folder, file) for file in files)):
            os.chown(name, NOBODY, NOBODY, follow_symlinks=False)
