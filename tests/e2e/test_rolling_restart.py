"""Two replicas on PostgreSQL behind the gateway, restarted one by one while PPO trains: no step fails.

Every part is the real one: `reward-service init`, HAProxy with its configuration and certificates, `looper
ppo` over TLS with the local authority's certificate, SIGTERM as `docker compose` sends it. Needs haproxy, and
in LOOPER_TEST_POSTGRES the URL of a PostgreSQL where a database may be created.
"""

import json
import os
import secrets
import shutil
import subprocess
import time
from contextlib import contextmanager

import httpx
import pytest
import sqlalchemy as sa

from looper_schemas.records import RolloutRecord, read_records
from reward_service.audit import read_records as read_audit
from reward_service.compose import Profile, prepare_project

from .conftest import BIN, ROOT, environment
from .gateway import COMMAND, free_port, gateway

POSTGRES = os.environ.get("LOOPER_TEST_POSTGRES")
STEPS, QUESTIONS, SAMPLES = 60, 4, 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("postgres"),
    pytest.mark.skipif(
        not COMMAND[0] or not POSTGRES, reason="needs haproxy and a PostgreSQL in LOOPER_TEST_POSTGRES"
    ),
]


@pytest.fixture
def database():
    """The URL of a new, empty database."""
    server = sa.create_engine(POSTGRES, isolation_level="AUTOCOMMIT")
    name = f"looper_rolling_{secrets.token_hex(4)}"
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield sa.make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


class Replica:
    """One service of several, in a folder of its own."""

    def __init__(self, home, shared, address, port, key):
        self.home, self.address, self.port = home, address, port
        self.url, self.headers = f"http://{address}:{port}", {"Authorization": f"Bearer {key}"}
        self.environment = environment(REWARD_SERVICE_HOME=str(home))
        command = [BIN / "reward-service", "init", "--shares", shared]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)
        self.process = None

    def start(self):
        with (self.home / "log.txt").open("ab") as log:
            command = [BIN / "reward-service", "serve", "--host", self.address, "--port", str(self.port)]
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def wait_until_ready(self):
        deadline = time.monotonic() + 180
        while True:
            assert self.process.poll() is None, (self.home / "log.txt").read_text()
            assert time.monotonic() < deadline, (self.home / "log.txt").read_text()
            try:
                if httpx.get(f"{self.url}/readyz", headers=self.headers, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)

    def stop(self):
        """What `docker compose restart` does first: SIGTERM, and time to finish."""
        self.process.terminate()
        assert self.process.wait(timeout=60) == 0, (self.home / "log.txt").read_text()


@contextmanager
def replicas(folder, database):
    """Two of them, ready, and the folder with the gateway's certificates and the trainer's key."""
    folder.mkdir()
    shutil.copy(ROOT / "docker-compose.yml", folder)
    prepare_project(folder, Profile.REPLICAS)
    state, port = folder / "docker/state", free_port()
    (state / "reward/settings.toml").write_text(f'state_url = "{database}"\n')
    key = (folder / "docker/secrets/trainer.key").read_text().strip()
    several = [
        Replica(state / f"replica-{number}", state / "reward", f"127.0.0.{number + 1}", port, key)
        for number in (1, 2)
    ]
    try:
        for replica in several:
            replica.start()
        for replica in several:
            replica.wait_until_ready()
        yield several, folder / "docker/secrets"
    finally:
        for replica in several:
            if replica.process is not None and replica.process.poll() is None:
                replica.process.kill()
                replica.process.wait()


def test_no_step_fails_while_the_replicas_are_restarted_one_after_the_other(base_model, tmp_path, database):
    with (
        replicas(tmp_path / "project", database) as (several, certificates),
        gateway(tmp_path, certificates, [one.address for one in several], several[0].port) as running,
    ):
        out, log = tmp_path / "ppo", tmp_path / "ppo.log"
        command = [
            BIN / "looper", "ppo", "--model", base_model, "--train-file",
            base_model.parent / "data/gsm8k_train.jsonl", "--dev-file", "none", "--output", out,
            "--steps", STEPS, "--batch-size", QUESTIONS, "--mini-batch-size", 2,
            "--samples-per-question", SAMPLES,
            "--max-new-tokens", 16, "--lora-rank", 2, "--reward-mode", "arm", "--merge", "false",
            "--save-every", STEPS,
        ]  # fmt: skip
        variables = environment(
            LOOPER_REWARD_URL=f"https://localhost:{running.tls}",
            LOOPER_REWARD_KEY_FILE=str(certificates / "trainer.key"),
            SSL_CERT_FILE=str(certificates / "ca-bundle.pem"),
        )
        with log.open("wb") as file:
            ppo = subprocess.Popen([str(word) for word in command], env=variables, stdout=file, stderr=file)

        def steps():
            assert ppo.poll() in (None, 0), log.read_text()
            return len(list((out / "trajectories").glob("step_*.jsonl")))

        def wait_for_steps(wanted):
            while steps() < wanted:
                time.sleep(0.05)

        try:
            wait_for_steps(3)
            seen = []
            for replica in several:
                before = steps()
                replica.stop()
                replica.start()
                replica.wait_until_ready()
                seen.append(steps() - before)
                wait_for_steps(min(steps() + 3, STEPS))
            in_the_middle = ppo.poll() is None
            assert ppo.wait(timeout=600) == 0, log.read_text()
        finally:
            if ppo.poll() is None:
                ppo.kill()
                ppo.wait()
        for replica in several:
            replica.stop()

    assert in_the_middle, "the run ended before both replicas were back: more steps are needed"
    assert all(seen), f"steps while each replica was away: {seen}"
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    trained = [
        read_records(out / f"trajectories/step_{step:05d}.jsonl", RolloutRecord)
        for step in range(1, STEPS + 1)
    ]
    assert [len(records) for records in trained] == [QUESTIONS] * STEPS
    rewards = [t.reward for records in trained for record in records for t in record.trajectories]
    assert len(rewards) == STEPS * QUESTIONS * SAMPLES
    assert None not in rewards

    # Both answered, before and after their restart; what was charged is what was trained on, once.
    audits = [list(read_audit(replica.home)) for replica in several]
    for replica, audit in zip(several, audits, strict=True):
        assert sum(record["event"] in ("score", "repeat") for record in audit) > 3
        verify = [BIN / "reward-service", "audit", "verify"]
        done = subprocess.run(verify, env=replica.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    engine = sa.create_engine(database)
    with engine.connect() as connection:
        used = connection.scalar(sa.text("SELECT sum(used) FROM usage"))
    engine.dispose()
    assert used == sum(record.get("cost", 0) for audit in audits for record in audit) == len(rewards)
