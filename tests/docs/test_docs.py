"""Every snippet of the documentation works: programs run, commands exist with these options, settings load.

The quickstart is followed to its end, command by command, as a reader would. Blocks marked `text` belong to
other programs (TRL's, OpenRLHF's, verl's command lines) and have tests of their own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from looper_trainer.cli import COMMANDS, read_config
from looper_trainer.commands import settings_of
from looper_trainer.config import load_config
from looper_trainer.data import parse_problem
from looper_trainer.testing import FakeRewardServer

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [p for p in (ROOT / "docs").rglob("*.md") if not {"decisions", "lambda.md", "security.md"} & set(p.parts)]
    + [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")]
)
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)
STAGES = {"prepare_data": "prepare-data", "sft": "sft", "rollouts": "rollouts", "ppo": "ppo"}
ELSEWHERE = {"export", "pip", "cd", "source", "docker", "git", "curl", "wandb", "cat"}
LANGUAGES = {"python", "console", "toml", "json", "text"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(kind: str, *, of_looper: bool = False) -> list[tuple[str, int, str]]:
    """(page, number, content) of every block of one kind; `of_looper`: none titled `settings.toml`, which is
    a service's file, read by that service's tests."""
    return [
        (name_of(page), number, content)
        for page in PAGES
        for number, (language, title, content) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if language == kind and not (of_looper and title == "settings.toml")
    ]


def commands_in(content: str) -> list[str]:
    """The commands of a console block, with continued lines joined and comments dropped."""
    joined = content.replace("\\\n", " ")
    lines = [line[2:].split("  #")[0].split(" # ")[0] for line in joined.splitlines() if line[:2] == "$ "]
    return [part.strip() for line in lines for part in line.split(" && ")]


def test_the_documentation_has_snippets_of_known_kinds_only() -> None:
    found = {lang for page in PAGES for lang, _, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert {"python", "console", "toml", "json"} <= found
    assert found <= LANGUAGES | {"sh", "bash", "ini", "dockerfile", "yaml"}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeRewardServer]:
    with FakeRewardServer(key="docs-key") as running:
        yield running


@pytest.mark.parametrize(("page", "number", "content"), blocks("python"))
def test_programs_run(server: FakeRewardServer, tmp_path: Path, page: str, number: int, content: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", content],
        cwd=tmp_path,
        env=os.environ | {"LOOPER_REWARD_URL": server.url, "LOOPER_REWARD_KEY": "docs-key"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"


@pytest.mark.parametrize(("page", "number", "content"), blocks("toml", of_looper=True))
def test_settings_load(tmp_path: Path, page: str, number: int, content: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(content, encoding="utf-8")
    tables = tomllib.loads(content)
    assert tables.keys() <= STAGES.keys()
    for table in tables:
        load_config(settings_of(STAGES[table]), file, {})


@pytest.mark.parametrize(("page", "number", "content"), blocks("json"))
def test_lines_of_data_are_read(page: str, number: int, content: str) -> None:
    for line in content.splitlines():
        if '"question"' in line and '"answer"' in line:
            assert parse_problem(json.loads(line), "x", page).answer


def help_of(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def options_of(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--") and word != "--help"]


@pytest.mark.parametrize(
    ("page", "command"),
    sorted({(page, command) for page, _, content in blocks("console") for command in commands_in(content)}),
)
def test_commands_exist_with_these_options(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command.split(" > ")[0])
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program, *arguments = words
    if program == "looper":
        assert arguments[0] in COMMANDS, page
        found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
        text = next((content for language, _, content in found if language == "toml"), "")
        monkeypatch.chdir(tmp_path)
        Path("run.toml").write_text(text, encoding="utf-8")
        read_config(arguments[0], settings_of(arguments[0]), arguments[1:])
    elif program == "python":
        target = arguments[:2] if arguments[0] == "-m" else arguments[:1]
        if arguments[0].startswith("examples/"):  # their tests run them; importing TRL or verl takes long
            source = (ROOT / arguments[0]).read_text(encoding="utf-8")
            assert all(f'"{option}"' in source for option in options_of(arguments)), page
            return
        shown = help_of([sys.executable, *target, "--help"])
        assert all(option in shown for option in options_of(arguments)), page
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in arguments if "=" not in word]
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), page
    elif program not in ELSEWHERE:
        installed = Path(sys.executable).with_name(program)
        if not installed.exists():
            pytest.skip(f"{program} is not installed")
        # A verb, or two where the first has verbs of its own.
        verbs = [word for word in arguments[:2] if re.fullmatch(r"[a-z][a-z-]*", word)]
        verbs = verbs if program != "looper-eval" else verbs[:1]
        shown = help_of([str(installed), *verbs, "--help"])
        assert all(option in shown for option in options_of(arguments)), page


# The quickstart, to its end.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_leads_to_a_report(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    port = str(free_port())
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    service: subprocess.Popen[bytes] | None = None
    printed = ""
    try:
        page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8").replace("8080", port)
        for language, title, content in BLOCK.findall(page):
            if language == "toml":
                (tmp_path / title).write_text(content, encoding="utf-8")
                continue
            for command in commands_in(content):
                if command.startswith("export "):
                    environment |= dict(word.split("=", 1) for word in shlex.split(command)[1:])
                elif "my_reward.py" in command:
                    service = subprocess.Popen(shlex.split(command), cwd=tmp_path, env=environment)
                    wait_for(f"http://127.0.0.1:{port}/livez", service)
                else:
                    done = subprocess.run(
                        shlex.split(command),
                        cwd=tmp_path,
                        env=environment,
                        capture_output=True,
                        text=True,
                        check=False,
                    )
                    # A machine that is short of memory may fail doctor; everything else must work.
                    if command != "looper doctor":
                        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr}"
                    printed += done.stdout
    finally:
        if service is not None:
            service.kill()
            service.wait()
    assert (tmp_path / "runs/eval/report.html").exists()
    assert "my-reward-1" in printed
    assert "checkpoints/ppo_rl: step 2 of 2, complete" in printed


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError("the service did not start")
