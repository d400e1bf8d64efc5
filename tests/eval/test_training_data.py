"""What a checkpoint records of its training data is looked at by `looper-eval run` without being asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from looper_eval.cli import main
from looper_eval.dataset import EvalQuestion
from looper_eval.models import ModelSpec
from looper_eval.training_data import check_models, read_contamination, training_sources
from looper_schemas.records import Problem, write_records
from looper_trainer.sft import describe_data

LONG = "Ann walks to the market with nine baskets and sells every one of them before noon. How many are left?"
EVALUATION = [
    EvalQuestion(id="e/0", question="Tom has 3 pens and buys 4 pens. How many pens has Tom?", answer="7"),
    EvalQuestion(id="e/1", question="Ida reads 5 pages a day for 6 days. How many pages?", answer="30"),
    EvalQuestion(id="e/2", question=LONG, answer="0"),
    EvalQuestion(id="e/3", question="What is left of a dozen eggs when 5 break?", answer="7"),
]
TRAINED_ON = [
    Problem(id="t/0", question="tom has 3  pens and buys 4 pens. How many pens has Tom?", answer="7"),
    Problem(id="t/1", question="Ida reads 8 pages a day for 9 days. How many pages?", answer="72"),
    Problem(id="t/2", question=f"Yesterday {LONG[0].lower()}{LONG[1:-23]} A hen is 2.", answer="2"),
]


def checkpoint(folder: Path, train: Path, *, recorded: bool, base: Path | None = None) -> Path:
    """A folder as the trainer leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        f'[stage]\ntrain_file = "{train}"\nmodel = "{base or "nowhere"}"\n', encoding="utf-8"
    )
    if recorded:
        (folder / "training_data.json").write_text(json.dumps(describe_data(train, TRAINED_ON)))
    return folder


@pytest.fixture
def train(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "train.jsonl"
    write_records(path, TRAINED_ON)
    return path


def touched(out: Path, name: str = "m") -> dict[str, int]:
    return read_contamination(out)[name].touched


def test_a_training_file_that_is_still_there_is_looked_at_in_all_three_ways(
    tmp_path: Path, train: Path
) -> None:
    folder = checkpoint(tmp_path / "sft", train, recorded=True)
    check_models([ModelSpec("m", str(folder))], EVALUATION, tmp_path / "out")
    assert touched(tmp_path / "out") == {"exact": 1, "masked": 1, "ngram": 1}
    found = read_contamination(tmp_path / "out")["m"]
    assert found.files == ("train.jsonl",)
    assert {hit[:3] for hit in found.hits} == {
        ("exact", "e/0", "t/0"), ("masked", "e/1", "t/1"), ("ngram", "e/2", "t/2"),
    }  # fmt: skip


@pytest.mark.parametrize("change", ["gone", "another"])
def test_of_a_file_that_is_gone_or_changed_the_digests_tell_equal_questions(
    tmp_path: Path, train: Path, change: str
) -> None:
    folder = checkpoint(tmp_path / "sft", train, recorded=True)
    if change == "gone":
        train.unlink()
    else:
        write_records(train, [Problem(id="x", question="Another?", answer="1")])
    check_models([ModelSpec("m", str(folder))], EVALUATION, tmp_path / "out")
    assert touched(tmp_path / "out") == {"exact": 1, "masked": 0, "ngram": 0}
    assert read_contamination(tmp_path / "out")["m"].digests_only == ("train.jsonl",)


def test_merged_models_and_adapters_are_followed_through_ppo_back_to_sft(tmp_path: Path, train: Path) -> None:
    sft = checkpoint(tmp_path / "sft", train, recorded=True)
    other = tmp_path / "data" / "ppo.jsonl"
    write_records(other, [Problem(id="p/0", question=EVALUATION[3].question, answer="7")])
    ppo = checkpoint(tmp_path / "ppo", other, recorded=False, base=sft)
    (ppo / "merged").mkdir()
    (ppo / "adapter").mkdir()
    (ppo / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(sft)}))
    for place in ("merged", "adapter"):
        files = {source.file.name for source in training_sources(ModelSpec("m", str(ppo / place)))}
        assert files == {"ppo.jsonl", "train.jsonl"}
    check_models([ModelSpec("m", str(ppo / "merged"))], EVALUATION, tmp_path / "out")
    assert touched(tmp_path / "out") == {"exact": 2, "masked": 1, "ngram": 1}


def test_relative_paths_are_found_from_the_checkpoint_wherever_the_evaluation_runs(
    tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = checkpoint(tmp_path / "runs" / "sft", Path("data/train.jsonl"), recorded=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    check_models([ModelSpec("m", str(folder))], EVALUATION, tmp_path / "out")
    assert touched(tmp_path / "out") == {"exact": 1, "masked": 1, "ngram": 1}


def test_a_checkpoint_that_records_nothing_is_not_said_to_be_clean(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    check_models([ModelSpec("m", str(folder)), ModelSpec("n", "http://h/v1#n")], EVALUATION, tmp_path / "out")
    assert read_contamination(tmp_path / "out") == {}
    assert not (tmp_path / "out").exists()


def test_run_report_and_card_say_what_was_found(
    tiny_models: tuple[Path, Path], tmp_path: Path, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    trained = tmp_path / "trained"
    shutil.copytree(tiny_models[0], trained)
    (trained / "training_data.json").write_text(json.dumps(describe_data(train, TRAINED_ON)))
    data, out = tmp_path / "eval.jsonl", tmp_path / "out"
    rows = [{"id": one.id, "question": one.question, "answer": one.answer} for one in EVALUATION]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = ["run", "--model", f"base={tiny_models[1]}", "--model", f"m={trained}", "--dataset", str(data)]
    assert main([*call, "--out", str(out), "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert "evaluation questions in the training data" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["contamination"]["m"]["touched"]["exact"] == 1
    assert main(["report", str(out)]) == 0
    assert "| m | train.jsonl | 1 | 1 | 1 | 4 |" in (out / "report.md").read_text()
    page = (out / "report.html").read_text()
    assert '<a href="#q3">e/2</a></th><td>ngram</td><td>t/2</td>' in page
    for name, sentence in (
        ("m", "Of the 4 evaluation questions, 1 stand in the training data word for word, 1 more"),
        ("base", "does not record what it was trained on"),
    ):
        assert main(["card", str(out), "--name", name, *(["--baseline", "base"] if name == "m" else [])]) == (
            0 if name == "m" else 2
        )
        if name == "m":
            assert sentence in " ".join((out / "card-m.md").read_text().split())
