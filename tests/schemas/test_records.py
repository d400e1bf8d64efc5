"""JSONL files: errors name the file, the line and the field; a failed write leaves the old file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from looper_schemas.records import (
    EvalRecord,
    Problem,
    Record,
    RecordError,
    RolloutRecord,
    Trajectory,
    read_objects,
    read_records,
    to_line,
    write_records,
)
from looper_schemas.scoring import Question, Scores

PROBLEM = Problem(id="gsm8k/train/0", question="How many\nare there? “½”", answer="72", cot="48 + 24 = 72")
ROLLOUT = RolloutRecord(
    id="gsm8k/train/0",
    question="How many?",
    gold_answer="72",
    trajectories=(
        Trajectory(
            output="#### 72", final_answer="72", reward=1.25, finish_reason="stop", tokens_out=3, seed=7
        ),
        Trajectory(output="", final_answer=None, reward=None),
    ),
    scores=Scores(s_end=0.25, s_path=0.5, s_cf=None, s_wm=0.75),
    policy="sft",
    scorer_id="s",
    reward_mode="arm_gated",
)
EVALUATION = EvalRecord(
    id="gsm8k/test/0",
    question="How many?",
    gold_answer="72",
    output="?",
    final_answer=None,
    correct=False,
    graders={"platinum": False},
    settings_digest="d",
)


@pytest.mark.parametrize("record", [PROBLEM, ROLLOUT, EVALUATION], ids=lambda record: type(record).__name__)
def test_a_file_gives_back_what_was_written(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file.jsonl"
    write_records(path, [record, record])
    assert read_records(path, type(record)) == [record, record]
    assert path.read_text(encoding="utf-8") == to_line(record) * 2
    assert [entry.name for entry in path.parent.iterdir()] == ["file.jsonl"]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_stays_on_one_line(text: str) -> None:
    problem = Problem(id="i", question=text, answer=text, cot=text)
    line = to_line(problem)
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert Problem.model_validate_json(line) == problem


def test_text_is_written_readably() -> None:
    assert "“½”" in to_line(PROBLEM)


def test_an_unscored_trajectory_is_null_and_never_zero() -> None:
    written = json.loads(to_line(ROLLOUT))
    assert written["trajectories"][1]["reward"] is None
    with pytest.raises(ValidationError):
        Trajectory(output="", final_answer=None)  # type: ignore[call-arg]


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_refused(reward: float) -> None:
    with pytest.raises(ValidationError):
        Trajectory(output="", final_answer=None, reward=reward)


def _line(**changes: Any) -> str:
    fields = {**PROBLEM.model_dump(), **changes}
    return json.dumps({name: value for name, value in fields.items() if value is not None})


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ("not json", "line"),
        ("[1, 2]", "line"),
        (_line(answer=None), "answer"),
        (_line(answer=""), "answer"),
        (_line(answer=72), "answer"),
        (_line(question=None), "question"),
        (_line(id=""), "id"),
        (_line(surprise=1), "surprise"),
        ('{"id": "a", "question": "q"', "line"),
    ],
)
def test_the_first_bad_line_is_named_with_its_field_and_what_to_do(
    bad: str, field: str, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(_line() + "\n\n" + bad + "\n" + "also bad\n", encoding="utf-8")
    with pytest.raises(RecordError) as caught:
        read_records(path, Problem)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: {field}: ")
    assert message.endswith("mend or remove this line")
    assert "\n" not in message


def test_a_missing_an_empty_and_a_blank_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"absent\.jsonl: no such file"):
        read_records(tmp_path / "absent.jsonl", Problem)
    with pytest.raises(RecordError, match="is a folder; name a JSONL file"):
        read_records(tmp_path, Problem)
    for text in ("", "\n\n  \n"):
        path = tmp_path / "empty.jsonl"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RecordError, match=r"empty\.jsonl: holds no records; write at least one"):
            read_records(path, Problem)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    write_records(file, [PROBLEM])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as some editors write it
    assert read_records(file, Problem) == [PROBLEM]


def test_a_problem_has_the_bounds_of_the_wire(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    longest = {"id": "i" * 200, "question": "q" * 400_000, "answer": "7" * 10_000}
    path.write_text(_line(**longest), encoding="utf-8")
    (problem,) = read_records(path, Problem)
    Question(id=problem.id, question=problem.question, gold_answer=problem.answer, arms=())
    for field, text in longest.items():
        path.write_text(_line(**{field: text + text[0]}), encoding="utf-8")
        with pytest.raises(RecordError, match=rf"train\.jsonl:1: {field}: .*at most {len(text)} characters"):
            read_records(path, Problem)


def test_gsm8ks_own_file_and_a_json_array_are_told_from_problems(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    for line in (
        {"question": "q", "answer": "1 + 1 = 2\n#### 2"},
        {"id": "a", "question": "q", "answer": "1 + 1 = 2\n#### 2"},
    ):
        path.write_text(json.dumps(line) + "\n", encoding="utf-8")
        with pytest.raises(RecordError, match=r"train\.jsonl:1: GSM8K's own line.*prepare-data first$"):
            read_records(path, Problem)
    for text in (f"[{_line()}]", f"\n [\n{_line()}\n]\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RecordError, match=r"train\.jsonl: is a JSON array; write each object"):
            read_records(path, Problem)


def test_objects_come_with_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"b": [2]}\r\n[3]\r\n')
    rows = read_objects(path)
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (3, {"b": [2]})]
    with pytest.raises(RecordError, match=r"rows\.jsonl:4: line: Input should be an object"):
        next(rows)


def test_a_line_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(_line().encode() + b"\n" + b'{"id": "caf\xe9"}\n')
    with pytest.raises(RecordError, match=r"latin\.jsonl:2: line: .*mend or remove"):
        read_records(path, Problem)


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    write_records(path, [PROBLEM])
    before = path.read_bytes()

    def broken() -> Iterator[Problem]:
        yield PROBLEM
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_records(path, broken())
    assert path.read_bytes() == before
    write_records(path, [PROBLEM, PROBLEM])
    assert len(read_records(path, Problem)) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.jsonl"]


def test_a_first_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Iterator[Problem]:
        yield PROBLEM
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_records(tmp_path / "file.jsonl", broken())
    assert list(tmp_path.iterdir()) == []


def test_records_are_closed_and_frozen() -> None:
    for kind in (Problem, Trajectory, RolloutRecord, EvalRecord):
        assert kind.model_config["extra"] == "forbid"
        assert kind.model_config["frozen"]
    with pytest.raises(ValidationError, match="frozen"):
        PROBLEM.answer = "73"  # type: ignore[misc]
