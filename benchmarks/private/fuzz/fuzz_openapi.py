"""schemathesis against the service's own OpenAPI document (`reward_service.openapi`), over HTTP.

    python benchmarks/private/fuzz/fuzz_openapi.py --examples 2000 --keep

All of its phases and checks: no server error; status codes, content types and bodies as documented,
where errors are constants; bad data refused, good data accepted; no access without a key. Behind
/v1/arms/rollout is a generator over HTTP that answers every prompt alike.
The last long run is kept in benchmarks/results/private/fuzz_openapi.json.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(ROOT / "tests/reward_service/service"))
from kept import keep, stamp  # noqa: E402
from openai_server import TinyGenerator  # noqa: E402

from reward_service import auth  # noqa: E402
from reward_service.auth import Scope  # noqa: E402
from reward_service.home import prepare_home  # noqa: E402
from reward_service.openapi import document  # noqa: E402
from reward_service.settings import Settings  # noqa: E402

_CONFIG = """
hooks = "hooks.py"

[auth.openapi.key]
bearer = "{key}"

[generation]
allow-x00 = false  # strict JSON refuses NUL, which JSON Schema cannot say
allow-extra-parameters = false  # HTTP lets a server ignore headers it does not know

[checks.positive_data_acceptance]
expected-statuses = [200, 409]  # 409: another scorer was asked for

[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 431]
"""
# What JSON Schema cannot say: ids are distinct, an idempotency key has one body, 93.0 is no integer.
_HOOKS = """
import itertools
import re

import schemathesis

numbers = itertools.count()

def whole(value):
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    return [whole(inner) for inner in value] if isinstance(value, list) else value

def distinct(items):
    if isinstance(items, list):
        for place, item in enumerate(items):
            if isinstance(item, dict) and isinstance(item.get("id"), str) and item["id"]:
                item["id"] = f"{item['id'][:190]}{place}"
    return items

@schemathesis.hook
def before_call(context, case, kwargs):
    key = (case.headers or {}).get("Idempotency-Key")
    if isinstance(key, str) and re.fullmatch("[!-~]{1,150}", key):
        case.headers["Idempotency-Key"] = f"{key}{next(numbers)}"
    case.body = whole(case.body)
    if isinstance(case.body, dict):
        questions = distinct(case.body.get("questions"))
        for question in questions if isinstance(questions, list) else ():
            if isinstance(question, dict):
                distinct(question.get("arms"))
"""


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=20, help="at most, for each operation (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="of schemathesis (default 1)")
    parser.add_argument("--keep", action="store_true", help="keep the result as the last one")
    options = parser.parse_args()
    stamped = stamp()
    with (
        tempfile.TemporaryDirectory() as name,
        TinyGenerator(lambda body: "3 + 5 = 8\n#### 8") as generator,
    ):
        folder = Path(name)
        home = folder / "home"
        prepare_home(home)
        scopes = [Scope.SCORE_REWARD, Scope.SCORE_COMPONENTS, Scope.ARMS_ROLLOUT]
        key = auth.create_key(home, "fuzz", scopes)
        described = document(Settings(home=home, generator_url=generator.url))
        (folder / "openapi.json").write_text(json.dumps(described))
        (folder / "schemathesis.toml").write_text(_CONFIG.format(key=key))
        (folder / "hooks.py").write_text(_HOOKS)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        service = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests/faults/stub_service.py"),
                str(home),
                str(port),
                json.dumps({"generator_url": generator.url}),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert service.stdout is not None
            assert service.stdout.readline() == "ready\n"
            command = ["schemathesis.cli", "run", "openapi.json", "--url", f"http://127.0.0.1:{port}"]
            command += ["--checks", "all", "--no-color"]
            command += ["--max-examples", str(options.examples), "--seed", str(options.seed)]
            command += ["--continue-on-failure", "--suppress-health-check", "all", "--request-timeout", "60"]
            run = subprocess.run(
                [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False
            )
        finally:
            service.terminate()
            service.wait(30)
    print(run.stdout[-6000:], run.stderr[-2000:])
    cases = re.search(r"(\d[\d,]*) generated", run.stdout)
    if run.returncode != 0 or cases is None:
        return 1
    result = {
        **stamped,
        "schemathesis": version("schemathesis"),
        "seed": options.seed,
        "cases": int(cases[1].replace(",", "")),
        "operations": [
            f"{method} {path}" for path, methods in described["paths"].items() for method in methods
        ],
        "arms_prompted": len(generator.requests),
        "failures": 0,
    }
    if options.keep:
        keep("fuzz_openapi", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
