"""`looper-eval run` on real (tiny, random) Llamas: whole runs, killed runs, refused runs."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from looper_eval.cli import main
from looper_eval.dataset import load_dataset
from looper_eval.settings import Settings
from looper_schemas.answers import answers_match
from looper_schemas.prompt import format_prompt

Models = tuple[Path, Path]
KILLS = int(os.environ.get("LOOPER_EVAL_TEST_KILLS", "2"))


def arguments(models: Models, dataset: Path, out: Path, *more: str) -> list[str]:
    first, second = models
    return [
        "run", "--model", f"a={first}", "--model", f"b={second}", "--dataset", str(dataset),
        "--out", str(out), "--max-new-tokens", "12", "--batch-size", "2", "--device", "cpu", *more,
    ]  # fmt: skip


def lines(path: Path) -> list[str]:
    return sorted(path.read_text(encoding="utf-8").splitlines())


@pytest.fixture(scope="module")
def finished(tiny_models: Models, dataset_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert main(arguments(tiny_models, dataset_file, out)) == 0
    return out


def test_answers_equal_greedy_generation_by_transformers(
    finished: Path, tiny_models: Models, dataset_file: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, folder in zip("ab", tiny_models, strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        records = [json.loads(line) for line in (finished / f"{name}.jsonl").read_text().splitlines()]
        for question, record in zip(load_dataset(str(dataset_file)).questions, records, strict=True):
            ids = tokenizer(format_prompt(question.question), return_tensors="pt")
            with torch.no_grad():
                output = model.generate(**ids, do_sample=False, max_new_tokens=12)[
                    0, ids["input_ids"].shape[1] :
                ]
            assert record["output"] == tokenizer.decode(output, skip_special_tokens=True)
            assert record["tokens_out"] == len(output)
            ended = output[-1].item() == tokenizer.eos_token_id
            assert record["finish_reason"] == ("stop" if ended else "length")
            assert record["graders"]["robust"] == answers_match(record["output"], question.answer)


def test_run_prints_the_table_and_writes_one_record_for_each_question(
    finished: Path, tiny_models: Models, dataset_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert main(arguments(tiny_models, dataset_file, finished)) == 0
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    assert set(before) == {"a.jsonl", "b.jsonl", "questions.jsonl", "run.json", "summary.json"}
    printed = capsys.readouterr().out
    assert "0/12" in printed
    assert "b - a" in printed


@pytest.mark.slow
def test_killed_runs_resume_to_the_records_of_an_uninterrupted_one(
    tiny_models: Models, tmp_path: Path
) -> None:
    finished, out, rng, kills = tmp_path / "finished", tmp_path / "out", random.Random(), 0
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(8 + 2 * KILLS)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(tiny_models, questions, finished)) == 0
    command = [sys.executable, "-m", "looper_eval.cli", *arguments(tiny_models, questions, out)]
    while True:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        if kills == KILLS:
            assert child.wait() == 0
            break
        # Killed at a random moment after it wrote something new, so that each start makes progress.
        size = sum(path.stat().st_size for path in out.glob("[ab].jsonl"))
        while child.poll() is None and sum(p.stat().st_size for p in out.glob("[ab].jsonl")) == size:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        assert child.poll() is None, "the run ended before it could be killed"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        kills += 1
    for name in ("a.jsonl", "b.jsonl"):
        assert lines(out / name) == lines(finished / name)
    assert (out / "summary.json").read_bytes() == (finished / "summary.json").read_bytes()


def test_a_wider_limit_and_a_new_model_join_an_old_folder(
    finished: Path, tiny_models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    both = arguments(tiny_models, dataset_file, out)
    only_a = [*both[:3], *both[5:]]
    assert main([*only_a, "--limit", "4"]) == 0
    assert json.loads((out / "summary.json").read_text())["n"] == 4
    assert main(both) == 0
    assert lines(out / "a.jsonl") == lines(finished / "a.jsonl")
    assert (out / "summary.json").read_bytes() == (finished / "summary.json").read_bytes()


def test_other_settings_data_or_weights_never_touch_an_old_folder(
    finished: Path,
    tiny_models: Models,
    dataset_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = tiny_models
    other_data = tmp_path / "other.jsonl"
    other_data.write_text('{"question": "Another?", "answer": "#### 4"}\n')
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    lm_eval = arguments(tiny_models, dataset_file, finished, "--preset", "lm-eval-cot")
    for call, complaint in (
        (arguments(tiny_models, dataset_file, finished, "--seed", "5"), "other settings (seed)"),
        (lm_eval, "(template, shot_target, stop)"),
        (arguments(tiny_models, other_data, finished), "answers to other questions"),
        (arguments((second, first), dataset_file, finished), "a was another model then"),
    ):  # fmt: skip
        assert main(call) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert complaint in error
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing(
    tiny_models: Models, dataset_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.write_text("\n")
    broken.write_text('{"question": "How many?"}\n')
    (tmp_path / "folder").mkdir()
    hollow = tmp_path / "hollow"
    shutil.copytree(tiny_models[0], hollow, ignore=shutil.ignore_patterns("*.safetensors"))
    cut = shutil.copytree(tiny_models[1], tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-1])
    lacking = shutil.copytree(tiny_models[1], tmp_path / "lacking")
    (lacking / "model.safetensors").rename(lacking / "model-1.safetensors")
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (lacking / "model.safetensors.index.json").write_text(json.dumps(shards))
    unnamed = shutil.copytree(lacking, tmp_path / "unnamed")
    (unnamed / "model.safetensors.index.json").unlink()
    (unnamed / "model-2.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    garbled = []
    for number, index in enumerate(
        ("[]", "{}", '{"weight_map": null}', '{"weight_map": {"a": 1}}', "no JSON")
    ):
        garbled.append(shutil.copytree(lacking, tmp_path / f"garbled-{number}"))
        (garbled[-1] / "model.safetensors.index.json").write_text(index)
    good = ["--dataset", str(dataset_file), "--out", str(out), "--device", "cpu"]
    model = ["--model", f"a={tiny_models[0]}"]
    for call, complaint in (
        (["run", *good], "no model to evaluate"),
        (["run", "--model", "a=missing/model/folder", *good], "missing/model/folder is no folder"),
        (["run", "--model", f"a={tmp_path / 'folder'}", *good], "holds no config.json"),
        (["run", "--model", f"a={hollow}", *good], "holds no model weights"),
        (["run", *model, "--dataset", str(empty), "--out", str(out)], "holds no records"),
        (["run", *model, "--dataset", str(broken), "--out", str(out)], "broken.jsonl:1: has no answer"),
        (["run", *model, *good, "--batch-size", "0"], "--batch-size is 0"),
        (["run", *model, *good, "--limit", "0"], "--limit is 0"),
        (["run", *model, *good, "--top-p", "2"], "--top-p"),
        (["run", *model, *good, "--vllm", "max_model_len=512"], "add --engine vllm"),
        (["run", *model, *good, "--shots", "4"], "--few-shot; give both"),
        (["run", *model, *good, "--coherence-temperature", "1"], "--coherence; give both"),
        (
            ["run", *model, *good, "--coherence", "2", "--coherence-temperature", "-1"],
            "--coherence-temperature is -1.0",
        ),
        (["run", *model, "--model", "b=http://127.0.0.1:1/v1", *good], "model b: write an endpoint as URL#"),
        (["run", *model, "--model", f"b={cut}", *good], "model.safetensors is no whole file of weights"),
        (["run", *model, "--model", f"b={lacking}", *good], "model-2.safetensors is no whole file of"),
        (["run", *model, "--model", f"b={unnamed}", *good], "model-2.safetensors is no whole file of"),
        *(
            (["run", *model, "--model", f"b={folder}", *good], "index.json is no index of weights")
            for folder in garbled
        ),
        (
            ["run", *model, "--dataset", str(dataset_file), "--out", str(tmp_path)],
            "is not a folder of looper-eval",
        ),
        (["compare", str(tmp_path / "folder")], "holds no results"),
        (["report", str(tmp_path / "folder")], "holds no results"),
        (["card", str(tmp_path / "folder"), "--name", "a"], "holds no results"),
    ):
        assert main(call) == 2, call
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert complaint in error
        assert not out.exists(), call


def test_what_the_file_system_refuses_is_one_line(
    tiny_models: Models, dataset_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(arguments(tiny_models, dataset_file, tmp_path / "file" / "out")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("Not a directory; choose another path\n")


def test_a_full_disk_is_one_line_and_what_was_answered_stays(
    tiny_models: Models,
    dataset_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert main(arguments(tiny_models, dataset_file, out)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: No space left on device; make room")
    assert error.count("\n") == 1
    assert main(arguments(tiny_models, dataset_file, out)) == 0


def test_a_model_that_could_not_be_loaded_binds_nothing_once_it_is_mended(
    tiny_models: Models, dataset_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_models[0], model)
    (model / "config.json").write_text('{"model_type": "no such thing"}')
    call = ["run", "--model", f"a={model}", "--dataset", str(dataset_file), "--limit", "1", "--out", str(out)]
    assert main([*call, "--max-new-tokens", "2"]) == 2
    assert "cannot load the model" in capsys.readouterr().err
    shutil.copy(tiny_models[0] / "config.json", model)
    assert main([*call, "--max-new-tokens", "3"]) == 0


def test_sampled_answers_do_not_depend_on_the_batch(
    tiny_models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    more = ("--temperature", "0.9", "--top-p", "0.95", "--seed", "3")
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(arguments(tiny_models, dataset_file, one, *more)) == 0
    assert main([*arguments(tiny_models, dataset_file, two, *more), "--batch-size", "5"]) == 0
    assert lines(one / "a.jsonl") == lines(two / "a.jsonl")
    assert json.loads((one / "run.json").read_text())["settings"]["seed"] == 3
    greedy = Settings(max_new_tokens=12)
    assert json.loads((one / "a.jsonl").read_text().splitlines()[0])["settings_digest"] != greedy.digest("x")
