"""The `looper` command as a process: help without training libraries, and one line for every bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from looper_schemas.records import Problem, write_records
from looper_trainer.cli import COMMANDS, STAGES, main, read_config
from looper_trainer.data import PrepareDataConfig
from looper_trainer.testing import FakeRewardServer

RunLooper = Callable[..., subprocess.CompletedProcess[str]]

PROBLEMS = [Problem(id=f"p/{n}", question=f"{n} + 1?", answer=str(n + 1), cot="Add.") for n in range(4)]


@pytest.fixture
def server() -> Iterator[FakeRewardServer]:
    with FakeRewardServer(key="the-key") as running:
        yield running


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    write_records(tmp_path / "q.jsonl", PROBLEMS)
    return tmp_path / "q.jsonl"


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """Exit code 2, nothing on standard output, and one line on standard error that holds `expected`."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for text in expected:
        assert text in line


# Help.


def test_help_names_every_command_and_imports_no_training_library() -> None:
    program = (
        "import sys\nfrom looper_trainer.cli import COMMANDS, main\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'accelerate', 'datasets'}\n"
        "main(['--help'])\n"
        "for name in COMMANDS:\n    main([name, '--help'])\nmain(['completion', 'bash'])\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"usage: looper {name}" in done.stdout


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_every_setting_is_an_option_with_its_default(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([stage, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--config FILE.toml" in shown
    assert "(default: " in shown


def test_without_the_training_libraries_a_stage_says_what_to_install() -> None:
    program = (
        "import sys\nsys.modules['torch'] = None\n"
        "from looper_trainer.cli import main\nsys.exit(main(['merge', '--adapter', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert_refused(done, "needs torch", "pip install 'looper-trainer[train]'")


# Settings.


def test_options_and_file_make_one_configuration(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[prepare_data]\nseed = 3\nlimit = 9\n", encoding="utf-8")
    arguments = ["--config", str(tmp_path / "c.toml"), "--limit", "12", "--allow-test", "--dev-fraction=0.5"]
    config = read_config("prepare-data", PrepareDataConfig, arguments)
    assert config == PrepareDataConfig(seed=3, limit=12, allow_test=True, dev_fraction=0.5)


def test_a_flag_can_be_said_to_be_false() -> None:
    config = read_config("prepare-data", PrepareDataConfig, ["--strip-annotations", "false"])
    assert config == PrepareDataConfig(strip_annotations=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prepare-dta"], "unknown command: prepare-dta; did you mean prepare-data?"),
        (["sft", "--learnin-rate", "1"], "unknown option: learnin-rate; did you mean learning-rate?"),
        (["sft", "--learn", "1"], "unknown option: learn"),
        (["sft", "--epochs", "many"], "[sft] epochs: "),
        (["sft", "--epochs"], "expected one argument"),
        (["sft", "stray"], "unexpected argument: stray"),
        (["sft", "--config", "absent.toml"], "absent.toml: cannot read"),
        (["run"], "looper run needs a file; for example: looper run run.toml --plan"),
        (["ppo", "--clip-rang", "1"], "unknown option: clip-rang; did you mean clip-range"),
    ],
)
def test_a_wrong_command_line_is_one_line(looper: RunLooper, arguments: list[str], expected: str) -> None:
    assert_refused(looper(*arguments), expected)


def test_an_unknown_configuration_key_is_named_with_its_neighbours(looper: RunLooper, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[sft]\nlearning_rte = 1e-5\n", encoding="utf-8")
    assert_refused(looper("sft", "--config", "c.toml"), "learning_rte", "did you mean learning_rate")
    assert tree(tmp_path) == {"c.toml"}


# Data.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no records"),
        ("\n\n", "holds no records"),
        ('{"question": "q", "answer": "x\\n#### 1"}\n{"question": "q2"}\n', "train.jsonl:2: has no answer"),
        ('{"question": "q", "answer": "x\\n#### 1"}\n', "too few"),
        ('{"question": "q", "answer": "x\\n#### 1"}\n{"quest', "train.jsonl:2: line: Invalid JSON"),
    ],
)
def test_a_dataset_that_cannot_be_used_leaves_nothing(
    looper: RunLooper, tmp_path: Path, text: str, expected: str
) -> None:
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
    assert_refused(looper("prepare-data", "--input", "train.jsonl"), expected)
    assert tree(tmp_path) == {"train.jsonl"}


def test_a_bad_file_leaves_earlier_data_as_they_were(
    looper: RunLooper, gsm8k_file: Path, tmp_path: Path
) -> None:
    assert looper("prepare-data", "--input", gsm8k_file).returncode == 0
    before = (tmp_path / "data" / "gsm8k_train.jsonl").read_bytes()
    gsm8k_file.write_text('{"question": "q"}\n', encoding="utf-8")
    assert_refused(looper("prepare-data", "--input", gsm8k_file), "has no answer")
    assert (tmp_path / "data" / "gsm8k_train.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no such file"),
        ("", "holds no records"),
        (json.dumps({"id": "p", "question": "q"}) + "\n", "answer: Field required"),
        (json.dumps({"question": "q", "answer": "x\n#### 1"}) + "\n", "run looper prepare-data first"),
    ],
)
def test_sft_refuses_data_that_are_no_problems(
    looper: RunLooper, tmp_path: Path, tiny_model: Path, text: str | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
    before = tree(tmp_path)
    assert_refused(looper("sft", "--model", tiny_model, "--train-file", "train.jsonl"), expected)
    assert tree(tmp_path) == before


# Checkpoints.


@pytest.mark.parametrize("kind", ["absent", "empty", "weightless", "damaged", "no tokenizer"])
@pytest.mark.parametrize("stage", ["sft", "rollouts"])
def test_a_folder_that_is_no_checkpoint_is_refused(
    tmp_path: Path,
    tiny_model: Path,
    questions: Path,
    server: FakeRewardServer,
    kind: str,
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    if kind == "empty":
        folder.mkdir()
    elif kind != "absent":
        shutil.copytree(tiny_model, folder)
        if kind == "weightless":
            (folder / "model.safetensors").unlink()
        elif kind == "damaged":
            (folder / "model.safetensors").write_bytes(b"not tensors")
        else:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).unlink()
    before = tree(tmp_path)
    monkeypatch.setenv("LOOPER_REWARD_URL", server.url)
    monkeypatch.setenv("LOOPER_REWARD_KEY", "the-key")
    data = "--train-file" if stage == "sft" else "--questions-file"
    arguments = [stage, "--model", str(folder), data, str(questions), "--output", str(tmp_path / "result")]
    code = main(arguments)
    shown = capsys.readouterr()
    assert_refused(subprocess.CompletedProcess(arguments, code, shown.out, shown.err), str(folder))
    assert tree(tmp_path) == before


# The reward service.


@pytest.fixture
def rollouts(looper: RunLooper, tiny_model: Path, questions: Path) -> RunLooper:
    """Runs `looper rollouts` on four questions, one a request, with one second of patience."""

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        return looper(
            *("rollouts", "--model", tiny_model, "--questions-file", questions, "--output", "out/r.jsonl"),
            *("--max-new-tokens", "4", "--give-up-after-s", "1", "--questions-per-batch", "1"),
            **environment,
        )

    return run


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "LOOPER_REWARD_URL is not set"),
        ({"LOOPER_REWARD_URL": "SERVER"}, "set LOOPER_REWARD_KEY"),
        ({"LOOPER_REWARD_URL": "SERVER", "LOOPER_REWARD_KEY": "wrong"}, "check LOOPER_REWARD_KEY"),
        ({"LOOPER_REWARD_URL": "SERVER/x", "LOOPER_REWARD_KEY": "the-key"}, "check LOOPER_REWARD_URL"),
        ({"LOOPER_REWARD_URL": "http://10.1.2.3:80", "LOOPER_REWARD_KEY": "k"}, "plain http"),
        ({"LOOPER_REWARD_URL": "nonsense", "LOOPER_REWARD_KEY": "k"}, "no http(s) address"),
    ],
)
def test_a_wrong_address_or_key_is_refused_before_any_sampling(
    rollouts: RunLooper,
    questions: Path,
    server: FakeRewardServer,
    tmp_path: Path,
    environment: dict[str, str],
    expected: str,
) -> None:
    before = tree(tmp_path)
    done = rollouts(**{name: value.replace("SERVER", server.url) for name, value in environment.items()})
    assert_refused(done, expected)
    assert "the-key" not in done.stderr
    assert tree(tmp_path) == before


def test_a_service_that_is_not_there_is_waited_for_and_then_named(
    rollouts: RunLooper, questions: Path, server: FakeRewardServer, tmp_path: Path
) -> None:
    server.stop()
    before = tree(tmp_path)
    done = rollouts(LOOPER_REWARD_URL=server.url, LOOPER_REWARD_KEY="the-key")
    *waits, last = done.stderr.splitlines()
    assert done.returncode == 2
    assert last.startswith("error: no answer from the reward service at")
    assert all(line.startswith("waiting for the reward service: cannot connect") for line in waits)
    assert tree(tmp_path) == before


def test_a_service_with_another_scorer_is_refused(
    questions: Path,
    server: FakeRewardServer,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LOOPER_REWARD_URL", server.url)
    monkeypatch.setenv("LOOPER_REWARD_KEY", "the-key")
    arguments = ["rollouts", "--model", str(tiny_model), "--questions-file", str(questions)]
    arguments += ["--output", str(tmp_path / "r.jsonl"), "--max-new-tokens", "4", "--give-up-after-s", "5"]
    arguments += ["--questions-per-batch", "1"]
    real = server._response

    def go_away_after_this(*given: Any) -> Any:
        server.faults.unavailable = 99
        return real(*given)

    monkeypatch.setattr(server, "_response", go_away_after_this)
    assert main(arguments) == 2
    assert "run the same command again" in capsys.readouterr().err
    server.faults.unavailable, server.scorer_id = 0, "redeployed"
    kept = (tmp_path / "r.jsonl.partial").read_bytes()
    assert kept.count(b"\n") == 1
    code = main(arguments)
    shown = capsys.readouterr()
    done = subprocess.CompletedProcess(arguments, code, shown.out, shown.err)
    assert_refused(done, "was begun with another", "scorer_id")
    assert (tmp_path / "r.jsonl.partial").read_bytes() == kept
    assert not (tmp_path / "r.jsonl").exists()


# The whole public journey up to PPO, by its commands alone.


@pytest.mark.slow
def test_data_sft_and_rollouts_run_one_after_the_other(
    looper: RunLooper, tiny_model: Path, gsm8k_file: Path, server: FakeRewardServer, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(
        f'[prepare_data]\ninput = "{gsm8k_file}"\n'
        f'[sft]\nmodel = "{tiny_model}"\nepochs = 1\nbatch_size = 8\n'
        "[rollouts]\nlimit = 5\nmax_new_tokens = 8\n",
        encoding="utf-8",
    )
    service = {"LOOPER_REWARD_URL": server.url, "LOOPER_REWARD_KEY": "the-key"}
    for stage in ("prepare-data", "sft", "rollouts"):
        done = looper(stage, "--config", "run.toml", **service)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    lines = (tmp_path / "data" / "ppo_rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5
    assert (tmp_path / "checkpoints" / "sft" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("code", "name", "expected"),
    [
        (errno.ENOSPC, None, "No space left on device; make room"),
        (errno.EROFS, "out/x", "out/x: Read-only file system; choose another path"),
        (errno.ENAMETOOLONG, "long", "long: File name too long; choose another path"),
    ],
)
def test_what_the_file_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    name: str | None,
    expected: str,
) -> None:
    def refuse(arguments: list[str]) -> None:
        raise OSError(code, os.strerror(code), *([name] if name else []))

    monkeypatch.setattr("looper_trainer.cli._dispatch", refuse)
    assert main(["sft"]) == 2
    assert expected in capsys.readouterr().err


def test_a_command_whose_output_nobody_reads_ends_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "looper_trainer.cli", "doctor"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_status_goes_on_past_a_line_that_is_no_row_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ['{"step": 4, "reward_mean": 0.25}', '{"step": 5, "reward_mean": "high"}', '{"step": 5, "kl', "no"]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*rows, ""]), encoding="utf-8")
    assert main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "step 5, running, reward +0.250" in shown
    assert "warning: skipped 2 lines of metrics.jsonl" in shown
