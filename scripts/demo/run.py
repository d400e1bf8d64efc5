"""The whole journey through the public commands: data, SFT, rollouts, PPO with rewards over HTTP, evaluation.

    python scripts/demo/run.py [--model tiny|smollm2] [--data FOLDER] [--seed N] [--out DIR]
                               [--service COMMAND | --reward correct|random] [--config FILE]

The reward comes from a server in a process of its own. `--service COMMAND` starts any server of the public
contract: the command gets `--port P --key-file FILE --home DIR`, writes its API key to FILE and serves until
it is terminated. Without it, `--reward` starts the public fake server (`random` is the control experiment).

A stage whose result is already in `--out` is skipped, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
from report import write_demo_report
from rich.console import Console

HERE = Path(__file__).resolve().parent
SERVICE_START_SECONDS = 180
QUIET = {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every stage; 0 when the report is written, else the failing stage's exit code."""
    options = parse(argv)
    out: Path = options.out
    (out / "logs").mkdir(parents=True, exist_ok=True)
    refuse_other_settings(options)
    config = str(options.config or HERE / f"{options.model}.toml")
    seed = str(options.seed)
    base, sft, ppo = out / "base", out / "checkpoints/sft", out / "checkpoints/ppo_rl"
    problems = options.data or out / "problems"
    train, dev, rollouts = (
        out / "data" / name for name in ("gsm8k_train.jsonl", "gsm8k_dev.jsonl", "ppo_rollouts.jsonl")
    )
    began = time.monotonic()
    try:
        if options.data is None:
            stage(
                out,
                "problems",
                problems / "test.jsonl",
                module("looper_trainer.demo.problems"),
                problems,
                "--seed",
                seed,
            )
        model = (problems,) if options.model == "tiny" else ()
        sums = ("--sums", options.sums) if options.sums is not None else ()
        stage(
            out, "base", base / "config.json", module("looper_trainer.demo.model"), base,
            *(("--data", *model, "--seed", seed, *sums) if model else ("--smollm2",)),
        )  # fmt: skip
        stage(
            out, "prepare-data", dev, "looper", "prepare-data", "--config", config,
            "--input", problems / "train.jsonl", "--output", out / "data", "--name", "gsm8k",
        )  # fmt: skip
        stage(
            out, "sft", sft / "config.json", "looper", "sft", "--config", config, "--model", base,
            "--train-file", train, "--output", sft, "--seed", seed,
        )  # fmt: skip
        rolled_out, trained = out / "data/.rollouts-done", ppo / "merged/config.json"
        needed = not (rolled_out.exists() and trained.exists())
        with reward_server(options) if needed else nullcontext({}) as environment:
            stage(
                out, "rollouts", rolled_out, "looper", "rollouts", "--config", config, "--model", sft,
                "--questions-file", train, "--output", rollouts, "--seed", seed,
                environment=environment, mark=True,
            )  # fmt: skip
            stage(
                out, "ppo", trained, "looper", "ppo", "--config", config, "--model", sft,
                "--train-file", train, "--dev-file", dev, "--output", ppo,
                "--seed", seed, *(("--resume", "true") if (ppo / "checkpoints").exists() else ()),
                environment=environment,
            )  # fmt: skip
        stage(
            out, "eval", None, "looper-eval", "run",
            "--model", f"base={base}", "--model", f"sft={sft}", "--model", f"ppo={ppo / 'merged'}",
            "--dataset", problems / "test.jsonl", "--out", out / "eval", *eval_options(options),
        )  # fmt: skip
    except subprocess.CalledProcessError as failure:
        console.print(
            f"[red]stopped[/]: see the lines above and {out / 'logs'}; the same command goes on from here"
        )
        return failure.returncode if failure.returncode > 0 else 1
    page = write_demo_report(out)
    console.print(f"[bold green]done[/] in {time.monotonic() - began:.0f} s: open {page}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and test.jsonl in GSM8K's format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--config", type=Path, help="TOML file of stage settings (default: the model's own)")
    parser.add_argument("--service", help="command that starts a reward server")
    parser.add_argument("--reward", choices=("correct", "random"), help="use the public fake server instead")
    parser.add_argument("--sums", type=int, help="steps that the tiny base model practises sums")
    parser.add_argument("--eval-limit", type=int, help="evaluate on the first N test questions only")
    parser.add_argument("--fresh", action="store_true", help="remove --out first")
    options = parser.parse_args(argv)
    if options.data and not (options.data / "train.jsonl").is_file():
        parser.error(
            f"--data {options.data}: has no train.jsonl; name a folder with train.jsonl and test.jsonl"
        )
    if options.model == "smollm2" and options.data is None:
        console.print("no --data: SmolLM2 is trained on the demo's own problem set")
    if not options.service and not options.reward:
        options.reward = "correct"
    if options.fresh:
        shutil.rmtree(options.out, ignore_errors=True)
    return options


def refuse_other_settings(options: argparse.Namespace) -> None:
    """Stop when `--out` holds a demo of other settings, whose stages would be skipped wrongly."""
    wanted = {
        "model": options.model, "seed": options.seed, "data": str(options.data or ""),
        "config": str(options.config or ""), "sums": options.sums, "reward": options.reward or "service",
    }  # fmt: skip
    file = options.out / "demo.json"
    if file.is_file() and (found := json.loads(file.read_text())) != wanted:
        changed = ", ".join(f"{key} {found.get(key)!r}" for key in wanted if found.get(key) != wanted[key])
        print(
            f"error: {options.out} holds a demo with other settings ({changed}); choose another --out "
            "(make: OUT=...) or begin anew with --fresh (make: DEMO_ARGS=--fresh)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    file.write_text(json.dumps(wanted, indent=1))


def module(name: str) -> tuple[str, str, str]:
    """The command that runs the Python module `name`."""
    return sys.executable, "-m", name


def stage(
    out: Path,
    name: str,
    result: Path | None,
    *command: object,
    environment: dict[str, str] | None = None,
    mark: bool = False,
) -> None:
    """Run one command unless its `result` exists, showing its output live and keeping it in a log.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    if result is not None and result.exists():
        console.print(f"[dim]{name}: {result} is there, skipped[/]")
        return
    words = [str(word) for part in command for word in (part if isinstance(part, tuple) else (part,))]
    if not Path(words[0]).is_absolute():
        words[0] = str(Path(sys.executable).parent / words[0])
    console.rule(f"[bold]{name}", align="left")
    console.print("[dim]$ " + shlex.join([Path(words[0]).name, *words[1:]]) + "[/]")
    began = time.monotonic()
    with (out / "logs" / f"{name}.log").open("a", encoding="utf-8") as log:
        child = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
            env={**os.environ, **QUIET, **(environment or {})},
        )  # fmt: skip
        assert child.stdout is not None
        for line in child.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            log.write(line)
        code = child.wait()
    if code:
        raise subprocess.CalledProcessError(code, words)
    if mark and result is not None:
        result.touch()
    seconds = round(time.monotonic() - began, 1)
    with (out / "timings.jsonl").open("a", encoding="utf-8") as timings:
        timings.write(json.dumps({"stage": name, "seconds": seconds}) + "\n")
    console.print(f"[dim]{name}: {seconds} s[/]")


@contextmanager
def reward_server(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """A reward server in its own process while the block runs; yields the client's environment."""
    home = options.out / "service"
    home.mkdir(mode=0o700, exist_ok=True)
    key_file = home / "client.key"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if options.service:
        command = [
            *shlex.split(options.service),
            "--port",
            str(port),
            "--key-file",
            str(key_file),
            "--home",
            str(home),
        ]
    else:
        key_file.write_text(secrets.token_urlsafe(32))
        key_file.chmod(0o600)
        command = [
            *module("looper_trainer.testing"), "--port", str(port), "--key", key_file.read_text(),
            "--seed", str(options.seed), *getattr(options, "fake", ("--mode", options.reward)),
        ]  # fmt: skip
    console.rule("[bold]reward service", align="left")
    with (options.out / "logs/service.log").open("a", encoding="utf-8") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_alive(server, url, options.out / "logs/service.log")
            console.print(f"[dim]process {server.pid} serves {url}[/]")
            yield {"LOOPER_REWARD_URL": url, "LOOPER_REWARD_KEY_FILE": str(key_file)}
        finally:
            server.terminate()
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_until_alive(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return once `/livez` answers.

    Raises:
        subprocess.CalledProcessError: the process ended or did not answer in time.
    """
    deadline = time.monotonic() + SERVICE_START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/livez", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    console.print(f"error: the reward service did not start; its last words are in {log}")
    raise subprocess.CalledProcessError(server.returncode or 1, "reward service")


def eval_options(options: argparse.Namespace) -> tuple[object, ...]:
    """Settings of the evaluation: short completions on the shipped problems, few questions for SmolLM2."""
    length, limit = (96, options.eval_limit) if options.model == "tiny" else (200, options.eval_limit or 20)
    return "--max-new-tokens", length, *(("--limit", limit) if limit else ())


if __name__ == "__main__":
    sys.exit(main())
