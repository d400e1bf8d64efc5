"""Questions from files: the formats that are read, and the one line that says what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from looper_eval.dataset import EvalQuestion, load_dataset
from looper_trainer.errors import UserError

JANET = {
    "question": "Janet's ducks lay 16 eggs a day.",
    "answer": "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18",
}


def write(path: Path, *rows: Any) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8"
    )
    return str(path)


def test_gsm8k_line_is_split_into_solution_and_gold_number(tmp_path: Path) -> None:
    (question,) = load_dataset(write(tmp_path / "test.jsonl", JANET)).questions
    assert question.id == "test/0"
    assert question.answer == "18"
    assert question.solution.endswith("$<<9*2=18>>18.")
    assert "####" not in question.solution
    assert (question.solution_lines, question.calculator_steps) == (2, 2)


def test_problem_record_keeps_its_id_and_its_cot_becomes_the_solution(tmp_path: Path) -> None:
    row = {"id": "p/7", "question": "Q?", "answer": "7", "cot": "First 3 + 4 = 7 pens.\n\nDone, $7 = 7."}
    (question,) = load_dataset(write(tmp_path / "dev.jsonl", row)).questions
    assert (question.id, question.answer, question.solution_lines) == ("p/7", "7", 2)
    # No calculator annotations: the equations are counted.
    assert question.calculator_steps == 2


def test_numeric_answer_blank_lines_and_line_separators_inside_text_are_read(tmp_path: Path) -> None:
    row = {"question": "One\u2028two?", "answer": 385000, "cleaning_status": "revised"}
    text = json.dumps(row, ensure_ascii=False)
    (question,) = load_dataset(write(tmp_path / "q.jsonl", "", text, "")).questions
    assert (question.question, question.answer, question.cleaning_status) == (
        "One\u2028two?",
        "385000",
        "revised",
    )


def test_limit_takes_the_first_questions_and_leaves_the_digest_of_the_source(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *({"question": f"{n}?", "answer": f"#### {n}"} for n in range(5)))
    whole, some = load_dataset(path), load_dataset(path, limit=2)
    assert [one.answer for one in some.questions] == ["0", "1"]
    assert some.digest == whole.digest
    changed = write(
        tmp_path / "r.jsonl", *({"question": f"{n}?", "answer": f"#### {n + 1}"} for n in range(5))
    )
    assert load_dataset(changed).digest != whole.digest


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "holds no records"),
        ([{"question": "Q?"}], ":1: has no answer"),
        ([JANET, {"question": "Q?", "answer": "  "}], ":2: has no answer"),
        (
            [{"question": "Q?", "answer": "many steps\nbut no number line 3"}],
            ":1: its answer states no number",
        ),
        ([{"question": "Q?", "answer": "#### none"}], ":1: its answer states no number"),
        ([{"answer": "#### 3"}], ":1: has no question"),
        (["{not json"], ":1: line: Invalid JSON"),
        (["[1, 2]"], "bad.jsonl: is a JSON array"),
        ([JANET, "[1, 2]"], ":2: line: Input should be an object"),
        (['{"question": "\\ud800", "answer": "3"}'], ":1: line: Invalid JSON"),
        ([{**JANET, "id": "i" * 201}], ":1: id: String should have at most 200 characters"),
        ([{**JANET, "id": "a"}, {**JANET, "id": "a"}], "the id 'a' is used twice"),
    ],
)
def test_bad_file_is_refused_with_the_place_and_the_reason(
    tmp_path: Path, rows: list[Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as failure:
        load_dataset(write(tmp_path / "bad.jsonl", *rows))
    assert complaint in str(failure.value)


def test_missing_file_unknown_name_and_useless_limit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such dataset file"):
        load_dataset(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match="ask at least one"):
        load_dataset(write(tmp_path / "q.jsonl", JANET), limit=0)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"question": "Pr\xeames?", "answer": "3"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl:1: line: Invalid JSON"):
        load_dataset(str(latin))
    with pytest.raises(UserError, match="is a folder; name a JSONL file"):
        load_dataset(str(tmp_path))


def test_a_file_from_windows_holds_the_same_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    plain = load_dataset(write(path, JANET, JANET | {"question": "And then?"}))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_dataset(str(path)) == plain


def test_hub_name_is_loaded_through_datasets_with_ids_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def fake(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{**JANET, "cleaning_status": "consensus"}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    (question,) = load_dataset("madrylab/gsm8k-platinum").questions
    assert asked == [("madrylab/gsm8k-platinum", "main", "test")]
    assert (question.id, question.cleaning_status) == ("gsm8k-platinum/test/0", "consensus")

    def offline(name: str, config: str | None, split: str) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"^cannot load openai/gsm8k from the hub \(no route\)[^\n]*$"):
        load_dataset("openai/gsm8k")


def test_equations_are_counted_by_their_results_and_not_by_their_terms() -> None:
    question = EvalQuestion(
        id="a", question="?", answer="1", solution="x = y\ncost = $12\ntotal = 3 * 4 = 12"
    )
    # "= $12" and "= 12"; neither "= y" nor "= 3 * 4".
    assert question.calculator_steps == 2
