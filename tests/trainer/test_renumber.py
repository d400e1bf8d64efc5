"""`benchmarks/gpu/renumber.py` on solutions whose programs were worked out by hand."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest

from looper_schemas.records import Problem, read_records, to_line

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/gpu"))

import renumber

CLIPS = Problem(
    id="clips/0",
    question="Ana sold 48 clips in April, and half as many in May. How many in all?",
    answer="72",
)
CLIPS_STEPS = "In May she sold <<48/2=24>>24.\nIn all <<48+24=72>>72."


def test_the_answer_follows_the_new_number() -> None:
    program = renumber.read_program(CLIPS, CLIPS_STEPS)
    assert program is not None
    rng, seen = random.Random(0), set()
    for _ in range(200):
        new = renumber.renumbered(CLIPS, program, rng)
        if new is None:
            continue
        sold = int(re.findall(r"\d+", new.question)[0])
        assert sold % 2 == 0  # half a clip cannot be sold
        assert int(new.answer) == sold + sold // 2
        assert new.question == CLIPS.question.replace("48", str(sold))
        seen.add(sold)
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("question", "answer", "steps", "why"),
    [
        ("He has 48 clips.", "16", "<<48/3=16.1>>", "the result is not the formula's"),
        ("He has 48 clips.", "17", "<<48/3=16>>", "the answer is not the last result"),
        ("He has 5 of 50.", "45", "<<10*5=50>> <<50-5=45>>", "50 is the question's and a step's"),
        ("He has 48 clips and 48 pins.", "96", "<<48+48=96>>", "48 stands in two places"),
        ("He works 7 days.", "14", "<<7*2=14>>", "7 may be the days of a week"),
        ("He has 48 clips.", "16", "48/3 = 16", "no step is marked"),
        ("He has 48 clips.", "16", "<<min(48,16)=16>>", "no formula of four operations"),
        ("He has 1/48 of it.", "16", "<<48/3=16>>", "48 is part of a fraction"),
    ],
)
def test_a_solution_that_can_be_read_otherwise_is_left_out(
    question: str, answer: str, steps: str, why: str
) -> None:
    problem = Problem(id="one", question=question, answer=answer)
    assert renumber.read_program(problem, steps) is None, why


def test_shares_stay_below_a_hundred_and_thousands_keep_their_comma() -> None:
    problem = Problem(id="one", question="Of 1,200 pages he read 80%. How many?", answer="960")
    program = renumber.read_program(problem, "<<80/100=0.8>> <<1200*0.8=960>>")
    assert program is not None
    rng = random.Random(1)
    drawn = [new for new in (renumber.renumbered(problem, program, rng) for _ in range(100)) if new]
    assert drawn
    for new in drawn:
        found = re.fullmatch(r"Of ([\d,]+) pages he read (\d+)%. How many\?", new.question)
        assert found is not None
        pages, share = int(found[1].replace(",", "")), int(found[2])
        assert share < 100
        assert int(new.answer) * 100 == pages * share
        assert found[1] == f"{pages:,}"


def test_the_script_keeps_to_the_problems_it_is_given(tmp_path: Path) -> None:
    source, kept, out = (tmp_path / name for name in ("source.jsonl", "kept.jsonl", "out.jsonl"))
    line = '{"question": "%s", "answer": "%s\\n#### 72"}\n'
    steps = CLIPS_STEPS.replace("\n", "\\n")
    source.write_text(line % (CLIPS.question, steps) + line % (CLIPS.question.replace("Ana", "Bo"), steps))
    kept.write_text(to_line(CLIPS).rstrip("\n") + "\n")
    arguments = ["--solutions", str(source), "--input", str(kept), "--output", str(out), "--copies", "3"]
    assert renumber.main(arguments) == 0
    problems = read_records(out, Problem)
    assert sorted(problem.id for problem in problems) == ["clips/0-n1", "clips/0-n2", "clips/0-n3"]
    assert all(problem.question.startswith("Ana") for problem in problems)
