"""The trainer's image trains on the scores of the service's image, through the gateway's TLS.

Run by together.sh with a folder that has both images' roots and environments. `reward-service init --compose`
writes keys and certificates; HAProxy runs with its configuration; each image runs as the user 65532, without
capabilities, its root read-only, with the folders, variables and commands of docker-compose.yml. Then every
stage, from the data to the report, on a small model.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/e2e"), str(ROOT / "reward_service/src"), str(ROOT / "shared_schemas/src")]

from gateway import gateway  # noqa: E402

from reward_service.compose import Profile, prepare_project  # noqa: E402

USER = 65532
PORT = 8080
AS_USER = (
    "setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--inh-caps=-all",
    "--bounding-set=-all", "--no-new-privs",
)  # fmt: skip
SERVE = (
    "--as-pid-1", "/opt/looper/bin/python", "-m", "reward_service.cli", "serve", "--host", "0.0.0.0",
    "--port", str(PORT),
)  # fmt: skip
RIGHTS = """\
import os, pathlib
def refused(path):
    try:
        pathlib.Path(path, "written").write_text("x")
    except OSError as error:
        return error.errno in (13, 30)
    return False
status = pathlib.Path("/proc/self/status").read_text()
assert os.getuid() == 65532 and "CapEff:\\t0000000000000000" in status and "NoNewPrivs:\\t1" in status
assert all(map(refused, ("/", "/opt/looper", "/usr/bin", "/etc")))
"""
SMALL = ("--max-new-tokens", "24")
STAGES: tuple[tuple[str, ...], ...] = (
    ("python", "-c", RIGHTS),
    ("python", "-m", "looper_trainer.demo.problems", "problems"),
    ("python", "-m", "looper_trainer.demo.model", "base", "--data", "problems", "--sums", "0"),
    ("looper", "doctor"),
    ("looper", "prepare-data", "--input", "problems/train.jsonl", "--limit", "200"),
    ("looper", "sft", "--model", "base", "--mode", "full", "--learning-rate", "2e-3", "--epochs", "1"),
    ("looper", "rollouts", "--limit", "8", *SMALL),
    (
        "looper", "ppo", "--steps", "2", "--batch-size", "4", "--mini-batch-size", "2", "--eval-every", "2",
        "--eval-questions", "8", *SMALL,
    ),
    (
        "looper-eval", "run", "--model", "sft=checkpoints/sft", "--model", "ppo=checkpoints/ppo_rl/merged",
        "--dataset", "problems/test.jsonl", "--limit", "8", "--out", "runs/eval", *SMALL,
    ),
    ("looper-eval", "report", "runs/eval"),
)  # fmt: skip


def confined(folder: Path, image: str, binds: Sequence[str], variables: dict[str, str]) -> list[str]:
    """The words before a command that run it in `image` as compose would, in this network."""
    given = dict(row.split("=", 1) for row in (folder / f"{image}.env").read_text().splitlines())
    words = [*AS_USER, "bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--die-with-parent"]
    words += ["--cap-drop", "ALL", "--clearenv"]
    for name, value in (given | variables).items():
        words += ["--setenv", name, value]
    words += ["--ro-bind", str((folder / image).resolve()), "/", "--proc", "/proc", "--dev", "/dev"]
    return [*words, "--tmpfs", "/tmp", "--tmpfs", "/run", *binds]


def main(folder: Path) -> int:
    """0: every stage ended with 0 and every question has its reward."""
    project = folder / "project"
    project.mkdir()
    shutil.copy(ROOT / "docker-compose.yml", project)
    prepare_project(project, Profile.CPU)
    secrets, state = project / "docker/secrets", project / "docker/state/reward"
    for place in (project, project / "docker"):
        place.chmod(0o711)
    work = folder / "work"
    work.mkdir()
    shutil.chown(work, USER, USER)

    home = "/var/lib/looper/reward"
    serve = confined(folder, "reward-service", ["--bind", str(state), home], {"REWARD_SERVICE_HOME": home})
    with (folder / "service.log").open("wb") as log:
        service = subprocess.Popen([*serve, *SERVE], stdout=log, stderr=log)
    failed = []
    try:
        with gateway(folder, secrets, ["127.0.0.1"], PORT) as running:
            binds = ["--bind", str(work), "/work", "--chdir", "/work"]
            for name in ("trainer.key", "ca-bundle.pem"):
                binds += ["--ro-bind", str(secrets / name), f"/run/secrets/{name}"]
            variables = {
                "LOOPER_REWARD_URL": f"https://127.0.0.1:{running.tls}",
                "LOOPER_REWARD_KEY_FILE": "/run/secrets/trainer.key",
                "SSL_CERT_FILE": "/run/secrets/ca-bundle.pem",
                "HF_HOME": "/work/.cache/huggingface",
                "HF_HUB_OFFLINE": "1",  # there is no network here
                "HOME": "/tmp",
            }
            for stage in STAGES:
                began = time.monotonic()
                command = [*confined(folder, "trainer", binds, variables), "--", *stage]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                shown = " ".join(stage if stage[1] != "-c" else ("the rights of a process",))
                print(f"{done.returncode}  {time.monotonic() - began:4.0f} s  {shown}", flush=True)
                if done.returncode:
                    failed.append(shown)
                    print((done.stdout + done.stderr)[-3000:], flush=True)
    finally:
        # As `docker stop` does: the signal is the service's own, not bubblewrap's.
        (own,) = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
        os.kill(int(own), signal.SIGTERM)
        ended = service.wait(timeout=60)
        print(f"{ended}  SIGTERM to the service", flush=True)
        if ended:
            failed.append(f"the service: {(folder / 'service.log').read_text()[-2000:]}")
    rows = [json.loads(row) for row in (work / "data/ppo_rollouts.jsonl").read_text().splitlines()]
    rewards = [trajectory["reward"] for row in rows for trajectory in row["trajectories"]]
    print(f"{len(rows)} questions, {len(rewards)} rewards, {rewards.count(None)} missing")
    report = (work / "runs/eval/report.html").stat().st_size
    print(f"report of {report} bytes; {len(failed)} failed", *failed, sep="\n")
    return 1 if failed or len(rows) != 8 or None in rewards else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
