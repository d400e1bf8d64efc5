"""What the reward service may do in its image, asked from inside by the image's own interpreter.

Run by confined.sh. Each line is a question, its answer and whether that is right. Then the service starts,
scores the golden question over HTTP, and the reply is compared with what can be worked out by hand.
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

PYTHON = "/opt/looper/bin/python"
PORT = 8080
wrong = 0


def line(question: str, answer: object, right: bool) -> None:
    """Print one question, its answer and the verdict."""
    global wrong
    wrong += not right
    print(f"{'ok   ' if right else 'WRONG'}  {question}: {answer}", flush=True)


def refusal(path: str) -> str:
    """The error's name when a file is made below `path`."""
    try:
        pathlib.Path(path, "written").write_text("x")
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "written"


def rights() -> None:
    """User, capabilities, file system, network."""
    line("user and group", f"{os.getuid()}:{os.getgid()}", (os.getuid(), os.getgid()) == (65532, 65532))
    line("supplementary groups", os.getgroups(), set(os.getgroups()) <= {65532, 65534})
    status = dict(
        row.split(":\t") for row in pathlib.Path("/proc/self/status").read_text().splitlines() if ":\t" in row
    )
    for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        line(name, status[name], int(status[name], 16) == 0)
    line("NoNewPrivs", status["NoNewPrivs"].strip(), status["NoNewPrivs"].strip() == "1")
    for folder in ("/", "/opt/looper", "/usr/bin", "/etc", "/var/lib/looper"):
        answer = refusal(folder)
        line(f"writing to {folder}", answer, answer in ("EROFS", "EACCES"))
    root = next(
        row.split()
        for row in pathlib.Path("/proc/self/mounts").read_text().splitlines()
        if row.split()[1] == "/"
    )
    line("the root is mounted", root[3].split(",")[0], root[3].split(",")[0] == "ro")
    for folder in ("/tmp", os.environ["REWARD_SERVICE_HOME"]):
        answer = refusal(folder)
        line(f"writing to {folder}", answer, answer == "written")
        pathlib.Path(folder, "written").unlink(missing_ok=True)
    names = [name for _, name in socket.if_nameindex()]
    line("interfaces", names, names == ["lo"])
    routes = pathlib.Path("/proc/net/route").read_text().splitlines()[1:]
    line("routes", routes, routes == [])
    if names == ["lo"] and not routes:
        try:
            socket.create_connection(
                ("192.0.2.1", 443), timeout=2
            )  # an address that no one may use (RFC 5737)
            answer = "connected"
        except OSError as error:
            answer = errno.errorcode.get(error.errno or 0, str(error))
        line("a connection to elsewhere", answer, answer == "ENETUNREACH")
    tools = [
        name for name in ("sh", "bash", "busybox", "apt-get", "pip", "gcc", "curl") if shutil.which(name)
    ]
    line("shells and tools", tools, tools == [])
    processes = [name for name in os.listdir("/proc") if name.isdigit()]
    line("processes in sight", len(processes), len(processes) <= 3)


def ask(path: str, key: str | None = None, body: bytes | None = None) -> tuple[int, dict[str, object]]:
    """Status and JSON of one request."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.loads(reply.read() or b"{}")
    except urllib.error.HTTPError as error:
        return error.code, {}


def service() -> None:
    """Start it as the image does, score the golden question, stop it."""
    module = [PYTHON, "-m", "reward_service.cli"]
    create = [*module, "keys", "create", "--name", "inside", "--scopes", "score:components"]
    key = subprocess.run(create, capture_output=True, text=True, check=True).stdout.strip()
    line("a key", re.sub(r"[0-9a-f]{64}", "...", key), key.startswith("rw_"))
    began = time.monotonic()
    serve = subprocess.Popen([*module, "serve", "--host", "0.0.0.0", "--port", str(PORT)])
    try:
        while time.monotonic() - began < 300 and serve.poll() is None:
            try:
                if ask("/livez")[0] == 200:
                    break
            except OSError:
                time.sleep(0.5)
        status, _ = ask("/readyz", key)
        line("ready", f"{status} after {time.monotonic() - began:.0f} s", status == 200)
        line("without a key", ask("/v1/info")[0], ask("/v1/info")[0] == 401)
        from reward_service.readiness import GOLDEN

        body = {
            "contract": "1.0", "run_id": "confined", "step": 1, "purpose": "eval", "scorer_id": None,
            "reward_mode": "arm_gated", "disclosure": "components",
            "questions": [GOLDEN.model_dump(mode="json")],
        }  # fmt: skip
        status, reply = ask("/v1/score", key, json.dumps(body).encode())
        (result,) = reply["results"]  # type: ignore[misc]
        line("the golden question", f"{status} {json.dumps(result)}", status == 200)
        # Four arms are six pairs, of which one agrees; two of the four are right.
        line("s_end", result["scores"]["s_end"], abs(result["scores"]["s_end"] - 1 / 6) < 1e-6)
        line("correct", result["correct_flags"], result["correct_flags"] == [True, True, False, False])
        wrong_arms = [arm["reward"] for arm in result["arms"][2:]]
        line("rewards of wrong arms", wrong_arms, wrong_arms == [-0.5, -0.5])
    finally:
        serve.terminate()
        line("SIGTERM ends it with", serve.wait(timeout=60), serve.returncode == 0)


rights()
service()
print(f"{wrong} wrong", flush=True)
sys.exit(1 if wrong else 0)
