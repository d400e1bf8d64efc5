"""Planted leaks are found by the right look, and honest data gives none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looper_eval.cli import main
from looper_eval.contamination import find_contamination
from looper_eval.dataset import EvalQuestion

EVAL = (
    "Tom buys 3 boxes of 12 pens at the shop on Monday and gives 5 pens to each of his friends. "
    "How many are left?"
)
# So few different words that runs of 13 are often shared.
WORDS = st.lists(st.sampled_from(["a"] * 9 + ["b", "1", "2"]), max_size=40)


def item(name: str, question: str) -> EvalQuestion:
    return EvalQuestion(id=name, question=question, answer="1")


@pytest.mark.parametrize(
    ("train", "kind"),
    [
        (EVAL, "exact"),
        (EVAL.upper().replace(".", " !") + "\n", "exact"),
        (EVAL.replace("3", "7").replace("12", "1,250.5"), "masked"),
        ("Yesterday Ann read: " + EVAL, "ngram"),
        # The first 13 words, and then another story.
        ("Tom buys 3 boxes of 12 pens at the shop on Monday and sings.", "ngram"),
        # Only the first 12.
        ("Tom buys 3 boxes of 12 pens at the shop on Monday. He sings.", None),
        ("Ann has 3 apples.", None),
    ],
)
def test_a_planted_leak_is_found_by_the_most_certain_look(train: str, kind: str | None) -> None:
    hits = find_contamination([item("t", train), item("u", "Nothing alike.")], [item("e", EVAL)])
    assert [(hit.kind, hit.eval_id, hit.train_id) for hit in hits] == ([(kind, "e", "t")] if kind else [])


@given(train=WORDS, evaluation=WORDS)
def test_hits_agree_with_a_naive_comparison(train: list[str], evaluation: list[str]) -> None:
    a, b = " ".join(train), " ".join(evaluation)
    found = find_contamination([item("t", a or ".")], [item("e", b or ".")])
    if train == evaluation:
        expected = ["exact"]
    elif [w if w.isalpha() else "0" for w in train] == [w if w.isalpha() else "0" for w in evaluation]:
        expected = ["masked"]
    elif any(
        train[i : i + 13] == evaluation[j : j + 13]
        for i in range(len(train) - 12)
        for j in range(len(evaluation) - 12)
    ):
        expected = ["ngram"]
    else:
        expected = []
    assert [hit.kind for hit in found] == expected


def test_command_lists_the_hits_and_says_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, evaluation, out = tmp_path / "train.jsonl", tmp_path / "test.jsonl", tmp_path / "hits.jsonl"
    train.write_text(
        json.dumps({"question": EVAL, "answer": "1"}) + "\n" + '{"question": "Else?", "answer": "1"}\n'
    )
    evaluation.write_text(json.dumps({"question": EVAL, "answer": "1"}) + "\n")
    call = ["contamination", "--train", str(train), "--dataset", str(evaluation), "--out", str(out)]
    assert main(call) == 0
    assert "1 of 1 evaluation questions" in capsys.readouterr().out
    (hit,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (hit["kind"], hit["eval_id"], hit["train_id"]) == ("exact", "test/0", "train/0")
