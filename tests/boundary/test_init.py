"""`reward-service init`: a service's folder, a replica's, and all that `docker compose up` needs."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from reward_service import certificates
from reward_service.auth import KeyRing, create_key, read_keys
from reward_service.cli import main
from reward_service.errors import StartError
from reward_service.home import prepare_home, prepare_replica

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(ROOT / "docker-compose.yml", folder)
    return folder


def init(project: Path, profile: str) -> None:
    main(["init", "--compose", profile, "--project", str(project)])


def files(project: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in project.rglob("*") if path.is_file()}


def test_the_trainers_key_opens_the_service_that_init_prepared(project: Path) -> None:
    init(project, "cpu")
    principal = KeyRing(project / "docker/state/reward").authenticate(
        (project / "docker/secrets/trainer.key").read_text().strip()
    )
    assert principal is not None
    assert {scope.value for scope in principal.scopes} == {"score:reward", "score:components"}


def test_a_second_init_keeps_everything(project: Path) -> None:
    init(project, "replicas")
    before = files(project)
    init(project, "replicas")
    assert files(project) == before


def test_everything_belongs_to_one_user_who_alone_may_read_it(project: Path) -> None:
    init(project, "replicas")
    owner = 65532 if os.geteuid() == 0 else os.geteuid()
    for top in ("docker/secrets", "docker/state"):
        for path in (project / top, *(project / top).rglob("*")):
            assert path.lstat().st_uid == owner
            assert path.is_symlink() or path.stat().st_mode & 0o077 == 0
    rows = (project / ".env").read_text().splitlines()
    assert f"LOOPER_UID={owner}" in rows
    assert "COMPOSE_PROFILES=replicas" in rows


def test_no_secret_is_in_what_compose_itself_reads(project: Path) -> None:
    init(project, "replicas")
    secret = [
        (project / "docker/secrets" / name).read_text().strip()
        for name in ("trainer.key", "postgres.password")
    ]
    secret.append((project / "docker/state/reward/pepper").read_text().strip())
    for file in (project / ".env", project / "docker/state/reward/settings.toml"):
        assert not [value for value in secret if value in file.read_text()]
    assert secret[1] in (project / "docker/secrets/postgres.pgpass").read_text()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_openssl_accepts_the_certificates_for_their_use_alone(project: Path) -> None:
    init(project, "cpu")
    secrets = project / "docker/secrets"

    def verify(name: str, purpose: str, *more: str) -> int:
        command = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", "-purpose", purpose, *more]
        return subprocess.run(
            [*command, f"{name}.crt"], cwd=secrets, capture_output=True, check=False
        ).returncode

    assert verify("gateway", "sslserver", "-verify_hostname", "localhost") == 0
    assert verify("gateway", "sslserver", "-verify_ip", "127.0.0.1") == 0
    assert verify("gateway", "sslserver", "-verify_hostname", "elsewhere") != 0
    assert verify("gateway", "sslclient") != 0
    assert verify("client", "sslclient") == 0
    assert verify("client", "sslserver") != 0


def test_the_trainer_trusts_the_local_authority_beside_the_usual_ones(project: Path) -> None:
    init(project, "cpu")
    secrets = project / "docker/secrets"
    bundle = ssl.create_default_context(cafile=str(secrets / "ca-bundle.pem")).get_ca_certs()
    (own,) = ssl.create_default_context(cafile=str(secrets / "ca.crt")).get_ca_certs()
    assert own in bundle
    assert len(bundle) > 1 or not Path("/etc/ssl/certs/ca-certificates.crt").exists()


class InTwoYears(datetime):
    @classmethod
    def now(cls, tz: object = None) -> datetime:
        return datetime.now(UTC) + timedelta(days=800)


def test_a_certificate_that_ends_soon_is_renewed_by_the_same_authority(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init(project, "cpu")
    before = files(project / "docker/secrets")
    monkeypatch.setattr(certificates, "datetime", InTwoYears)
    init(project, "cpu")
    changed = {
        Path(name).name for name, data in files(project / "docker/secrets").items() if before[name] != data
    }
    assert changed == {f"{who}.{kind}" for who in ("gateway", "client") for kind in ("key", "crt", "pem")}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["init", *words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_another_profile_is_a_decision_that_init_leaves_to_its_caller(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init(project, "replicas")
    words = ("--compose", "gpu", "--project", str(project))
    assert "COMPOSE_PROFILES=replicas, not gpu" in refused(capsys, *words)
    (project / ".env").unlink()
    assert "remove that line" in refused(capsys, *words)
    (project / "docker/state/reward/settings.toml").write_text("port = 8080\n")
    init(project, "gpu")
    (project / ".env").unlink()
    assert "add the line state_url" in refused(capsys, "--compose", "replicas", "--project", str(project))


def test_a_folder_without_a_compose_file_and_half_an_authority_are_refused(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no docker-compose.yml" in refused(
        capsys, "--compose", "cpu", "--project", str(project.parent)
    )
    init(project, "cpu")
    (project / "docker/secrets/ca.key").unlink()
    assert "belong together" in refused(capsys, "--compose", "cpu", "--project", str(project))


def test_a_replica_sees_new_keys_at_once_and_cannot_make_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared, replica = tmp_path / "shared", tmp_path / "replica"
    prepare_home(shared)
    first = create_key(shared, "first", ["score:reward"])  # type: ignore[list-item]
    monkeypatch.setenv("REWARD_SERVICE_HOME", str(replica))
    assert "set state_url" in refused(capsys, "--shares", str(shared))
    (shared / "settings.toml").write_text('state_url = "postgresql+psycopg://localhost/x"\n')
    main(["init", "--shares", str(shared)])
    ring = KeyRing(replica)
    assert ring.authenticate(first) is not None
    second = create_key(shared, "second", ["score:reward"])  # type: ignore[list-item]
    assert ring.authenticate(second) is not None
    with pytest.raises(SystemExit):
        main(["keys", "create", "--name", "third", "--scopes", "score:reward"])
    assert f"a replica has the keys of {shared}; set REWARD_SERVICE_HOME" in capsys.readouterr().err
    assert len(read_keys(shared).keys) == 2
    assert (replica / "keys.json").is_symlink()
    assert not (replica / "audit.jsonl").exists()


def test_a_folder_with_a_pepper_of_its_own_becomes_no_replica(tmp_path: Path) -> None:
    prepare_home(tmp_path / "own")
    with pytest.raises(StartError, match="empty folder"):
        prepare_replica(tmp_path / "own", tmp_path / "shared")
