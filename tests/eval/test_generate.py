"""Appending, resuming and refusing: a record file is complete, of one kind, and nobody is asked twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from looper_eval.dataset import EvalQuestion
from looper_eval.engines import Answer, Answered, Ask
from looper_eval.generate import Unfinished, answer_all, grade, load_answers
from looper_eval.settings import Settings
from looper_trainer.errors import UserError

QUESTIONS = [EvalQuestion(id=f"q/{n}", question=f"What is {n} plus é?", answer=str(n)) for n in range(7)]
SETTINGS = Settings(temperature=0.8, seed=5)
DIGEST = SETTINGS.digest("folder:x")


class RecordingEngine:
    """Answers with what it was asked, and remembers each call."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.closed = False

    def answers(self, batches: Sequence[Sequence[Ask]]) -> Iterator[Answered]:
        place = 0
        for batch in batches:
            self.calls.append([ask.question for ask in batch])
            yield [
                (
                    place + index,
                    [Answer(f"{ask.question} ü\nAnswer: #### {seed % 10}", "stop", 9) for seed in ask.seeds],
                )
                for index, ask in enumerate(batch)
            ]
            place += len(batch)

    def close(self) -> None:
        self.closed = True

    @property
    def asked(self) -> list[str]:
        return [question for call in self.calls for question in call]


def run(path: Path, questions: Sequence[EvalQuestion] = QUESTIONS, digest: str = DIGEST) -> RecordingEngine:
    engine = RecordingEngine()
    answer_all(path, questions, SETTINGS, digest, lambda: engine, batch_size=3)
    return engine


def test_each_question_is_asked_once_in_batches_of_the_dataset_order(tmp_path: Path) -> None:
    engine = run(tmp_path / "m.jsonl")
    assert [len(call) for call in engine.calls] == [3, 3, 1]
    assert engine.asked == [one.question for one in QUESTIONS]
    assert engine.closed
    records = load_answers(tmp_path / "m.jsonl", QUESTIONS, DIGEST)
    assert [one.id for one in records] == [one.id for one in QUESTIONS]
    assert all(one.settings_digest == DIGEST for one in records)


@hypothesis_settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(share=st.floats(0, 1))
def test_a_file_cut_at_any_byte_resumes_to_the_same_records_and_asks_only_the_lost(
    tmp_path: Path, share: float
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    whole.unlink(missing_ok=True)
    run(whole)
    content = whole.read_bytes()
    kept = content[: round(share * len(content))]
    cut.write_bytes(kept)
    engine = run(cut)
    assert engine.asked == [one.question for one in QUESTIONS[kept.count(b"\n") :]]
    assert sorted(cut.read_bytes().splitlines()) == sorted(content.splitlines())


def test_a_finished_file_opens_no_engine(tmp_path: Path) -> None:
    run(tmp_path / "m.jsonl")
    progress: list[int] = []

    def refuse() -> RecordingEngine:
        raise AssertionError("the model was loaded for nothing")

    answer_all(
        tmp_path / "m.jsonl", QUESTIONS, SETTINGS, DIGEST, refuse, batch_size=3, on_progress=progress.append
    )
    assert progress == [7]


def test_a_wider_limit_asks_only_the_new_questions(tmp_path: Path) -> None:
    run(tmp_path / "m.jsonl", QUESTIONS[:4])
    engine = run(tmp_path / "m.jsonl")
    assert engine.asked == [one.question for one in QUESTIONS[4:]]
    # And a narrower one afterwards reads its own part alone.
    assert len(load_answers(tmp_path / "m.jsonl", QUESTIONS[:2], DIGEST)) == 2


def test_records_of_other_settings_are_never_continued_and_stay_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    run(path, QUESTIONS[:4])
    before = path.read_bytes()
    with pytest.raises(UserError, match="other settings or by another model"):
        run(path, digest=Settings(max_new_tokens=7).digest("folder:x"))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda lines: [lines[0], *lines], "answered twice"),
        (lambda lines: [*lines[:2], b'{"id": "q/9"}\n'], "no evaluation record"),
        (lambda lines: [lines[0].replace(b"What is 0", b"What is 9"), *lines[1:]], "is another question"),
    ],
)
def test_spoilt_files_are_refused_with_their_line(tmp_path: Path, spoil, complaint: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "m.jsonl"
    run(path)
    path.write_bytes(b"".join(spoil(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(UserError, match=rf"^\S+m\.jsonl:\d+: [^\n]*{complaint}"):
        run(path)


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"

    class Nested(RecordingEngine):
        def answers(self, batches: Sequence[Sequence[Ask]]) -> Iterator[Answered]:
            with pytest.raises(UserError, match="another looper-eval run is writing it"):
                run(path)
            return super().answers(batches)

    engine = Nested()
    answer_all(path, QUESTIONS[:1], SETTINGS, DIGEST, lambda: engine, batch_size=1)
    assert len(engine.calls) == 1


def test_missing_answers_are_counted_and_not_invented(tmp_path: Path) -> None:
    with pytest.raises(Unfinished, match="no such file"):
        load_answers(tmp_path / "m.jsonl", QUESTIONS, DIGEST)
    run(tmp_path / "m.jsonl", QUESTIONS[:4])
    with pytest.raises(Unfinished, match="3 of 7 questions have no answer"):
        load_answers(tmp_path / "m.jsonl", QUESTIONS, DIGEST)


@pytest.mark.parametrize(
    ("text", "reason", "correct", "robust", "platinum"),
    [
        ("So 40 + 2 = 42.\nAnswer: #### 42", "stop", True, True, True),
        ("So 40 + 2 = 42.\nAnswer: #### 42", "length", False, True, True),
        ("Answer: 50 - 8 = 42", "stop", True, True, False),  # the official rule reads 50
        ("Answer: #### 41", "stop", False, False, False),
        ("I do not know.", "stop", False, False, False),
    ],
)
def test_both_graders_judge_the_text_and_a_truncated_answer_is_never_correct(
    text: str, reason: str, correct: bool, robust: bool, platinum: bool
) -> None:
    question = EvalQuestion(id="a", question="Q?", answer="42")
    record = grade(question, Answer(text, reason, 5), DIGEST)  # type: ignore[arg-type]
    assert (record.correct, record.graders) == (correct, {"robust": robust, "platinum": platinum})
    assert (record.final_answer is None) == (text == "I do not know.")
