"""GSM8K lines become problems; the split is fair, stable and complete."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looper_schemas.records import Problem, RecordError, read_records
from looper_trainer.data import PrepareDataConfig, parse_problem, run, split_problems
from looper_trainer.errors import DataError


def problem(question: str, place: int = 0) -> Problem:
    return Problem(id=f"p/{place}", question=question, answer="1", cot="One.")


def test_a_gsm8k_line_becomes_question_solution_and_answer() -> None:
    row = {
        "question": "Weng earns $12 an hour. How much for 50 minutes?",
        "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n"
        "She earned 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10",
    }
    assert parse_problem(row, "gsm8k/train/1", "f:2") == Problem(
        id="gsm8k/train/1",
        question="Weng earns $12 an hour. How much for 50 minutes?",
        answer="10",
        cot="Weng earns 12/60 = $0.2 per minute.\nShe earned 0.2 x 50 = $10.",
    )


def test_annotations_stay_when_asked() -> None:
    row = {"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"}
    assert parse_problem(row, "i", "f:1", strip_annotations=False).cot == "1+1=<<1+1=2>>2"


@pytest.mark.parametrize(
    ("final", "expected"),
    [("72", "72"), ("1,000", "1000"), ("-3", "-3"), ("$5", "5"), (" 18 ", "18"), ("0.5", "0.5")],
)
def test_answers_lose_their_dress_and_keep_their_value(final: str, expected: str) -> None:
    assert parse_problem({"question": "q", "answer": f"x\n#### {final}"}, "i", "f:1").answer == expected


def test_a_record_of_our_own_keeps_its_id_and_solution() -> None:
    row = {"id": "demo/7", "question": "q", "answer": "4", "cot": "2 + 2 = 4"}
    assert parse_problem(row, "other", "f:1") == Problem(
        id="demo/7", question="q", answer="4", cot="2 + 2 = 4"
    )


def test_an_answer_that_is_a_number_is_taken_as_its_text() -> None:
    assert parse_problem({"question": "q", "answer": 72, "cot": ""}, "i", "f:1").answer == "72"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "q"}, "has no answer"),
        ({"question": "q", "answer": " "}, "has no answer"),
        ({"question": "q", "answer": "Seven."}, "has no final line"),
        ({"question": "q", "answer": "x\n#### many"}, "is no number"),
        ({"answer": "x\n#### 1"}, "has no question"),
        (["q", "a"], "is no JSON object"),
    ],
)
def test_a_line_that_is_no_problem_is_named(row: object, complaint: str) -> None:
    with pytest.raises(DataError, match=f"f.jsonl:3: .*{complaint}"):
        parse_problem(row, "i", "f.jsonl:3")


@given(st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=40), st.integers(0, 5))
def test_every_problem_is_on_one_side_and_equal_questions_on_the_same(letters: list[str], seed: int) -> None:
    problems = [problem(letter, place) for place, letter in enumerate(letters)]
    train, dev = split_problems(problems, 0.2, seed)
    assert sorted([*train, *dev], key=lambda p: int(p.id[2:])) == problems
    assert {p.question for p in train}.isdisjoint(p.question for p in dev)
    assert [p.id for p in train] == sorted((p.id for p in train), key=lambda i: int(i[2:]))


@given(st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order_of_the_source(shuffler: random.Random) -> None:
    problems = [problem(f"question {n}", n) for n in range(30)]
    shuffled = shuffler.sample(problems, len(problems))
    assert {p.id for p in split_problems(problems, 0.2, 0)[1]} == {
        p.id for p in split_problems(shuffled, 0.2, 0)[1]
    }


def test_questions_that_differ_in_case_and_spaces_count_as_equal() -> None:
    pairs = [problem(f"Ann has {n} apples", n) for n in range(20)]
    pairs += [problem(f"ANN  has {n}\napples", 20 + n) for n in range(20)]
    _, dev = split_problems(pairs, 0.2, 3)
    places = {int(p.id[2:]) for p in dev}
    assert places == {n for n in range(40) if n % 20 in {place % 20 for place in places}}


def test_another_seed_is_another_split_of_the_same_size() -> None:
    problems = [problem(f"question {n}", n) for n in range(100)]
    first, second = (split_problems(problems, 0.2, seed)[1] for seed in (0, 1))
    assert len(first) == len(second) == 20
    assert first != second


def test_prepare_data_writes_both_files_and_its_settings(gsm8k_file: Path, tmp_path: Path) -> None:
    run(PrepareDataConfig(input=gsm8k_file.parent, output=tmp_path / "data"))
    train = read_records(tmp_path / "data" / "gsm8k_train.jsonl", Problem)
    dev = read_records(tmp_path / "data" / "gsm8k_dev.jsonl", Problem)
    assert (len(train), len(dev)) == (32, 8)
    lines = [json.loads(line) for line in gsm8k_file.read_text(encoding="utf-8").splitlines()]
    for record in [*train, *dev]:
        source = lines[int(record.id.removeprefix("gsm8k/train/"))]
        assert record.question == source["question"]
        assert source["answer"].endswith(f"#### {record.answer}")
        assert "<<" not in record.cot
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "gsm8k_config.toml",
        "gsm8k_dev.jsonl",
        "gsm8k_train.jsonl",
    ]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([{"question": "\ud800", "answer": "#### 1"}], r":1: line: Invalid JSON: .* hex escape"),
        (['{"question": ' + "[" * 100_000], r":1: line: Invalid JSON: recursion limit"),
        (['[{"question": "q", "answer": "#### 1"}]'], r": is a JSON array"),
        ([{"id": "i" * 201, "question": "q", "answer": "#### 1"}], r":1: id: .* at most 200 characters"),
        ([{"question": "q", "answer": "#### " + "1" * 10_001}], r":1: answer: .* at most 10000 characters"),
        (
            [{"id": "a", "question": letter, "answer": "#### 1"} for letter in "qr"],
            r":2: the id 'a' is used twice",
        ),
    ],
    ids=["lone surrogate", "deep", "array", "long id", "long answer", "repeated id"],
)
def test_a_line_that_no_stage_could_use_is_named(
    lines: list[dict[str, str] | str], complaint: str, tmp_path: Path
) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    with pytest.raises((DataError, RecordError), match=rf"^\S*train\.jsonl{complaint}"):
        run(PrepareDataConfig(input=file, output=tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_file_from_windows_gives_the_same_problems(gsm8k_file: Path, tmp_path: Path) -> None:
    run(PrepareDataConfig(input=gsm8k_file, output=tmp_path / "plain"))
    gsm8k_file.write_bytes(b"\xef\xbb\xbf" + gsm8k_file.read_bytes().replace(b"\n", b"\r\n"))
    run(PrepareDataConfig(input=gsm8k_file, output=tmp_path / "windows"))
    for name in ("gsm8k_train.jsonl", "gsm8k_dev.jsonl"):
        assert (tmp_path / "windows" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_preparing_twice_gives_the_same_bytes(gsm8k_file: Path, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        run(PrepareDataConfig(input=gsm8k_file, output=tmp_path / folder))
    for name in ("gsm8k_train.jsonl", "gsm8k_dev.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_limit_takes_the_first_problems(gsm8k_file: Path, tmp_path: Path) -> None:
    run(PrepareDataConfig(input=gsm8k_file, output=tmp_path, limit=10))
    ids = {
        record.id
        for name in ("train", "dev")
        for record in read_records(tmp_path / f"gsm8k_{name}.jsonl", Problem)
    }
    assert ids == {f"gsm8k/train/{n}" for n in range(10)}


@pytest.mark.parametrize("name", ["test.jsonl", "gsm8k_test.jsonl", "test-00000.jsonl", "GSM8K-Test.jsonl"])
def test_a_test_file_is_refused_unless_allowed(gsm8k_file: Path, tmp_path: Path, name: str) -> None:
    file = gsm8k_file.rename(tmp_path / name)
    with pytest.raises(DataError, match="allow-test"):
        run(PrepareDataConfig(input=file, output=tmp_path / "data"))
    assert not (tmp_path / "data").exists()
    run(PrepareDataConfig(input=file, output=tmp_path / "data", allow_test=True))
    assert (tmp_path / "data" / "gsm8k_train.jsonl").exists()


def test_the_hub_test_split_is_refused_before_any_download() -> None:
    with pytest.raises(DataError, match="for evaluation"):
        run(PrepareDataConfig(split="test"))


def test_a_file_called_contest_is_no_test_file(gsm8k_file: Path, tmp_path: Path) -> None:
    run(PrepareDataConfig(input=gsm8k_file.rename(tmp_path / "contest.jsonl"), output=tmp_path / "data"))
    assert (tmp_path / "data" / "gsm8k_dev.jsonl").exists()


def test_the_hub_loader_asks_for_the_train_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked: list[object] = []

    def load_dataset(*arguments: object, **options: object) -> list[dict[str, str]]:
        asked.extend([*arguments, options])
        return [{"question": f"q{n}", "answer": f"x\n#### {n}"} for n in range(5)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run(PrepareDataConfig(output=tmp_path))
    assert asked == ["openai/gsm8k", "main", {"split": "train"}]
    assert len(read_records(tmp_path / "gsm8k_train.jsonl", Problem)) == 4
