"""axe-core finds nothing on the pages that we write: desktop and phone width, light and dark, all opened.

Needs Chromium, and axe-core where LOOPER_AXE names it. With LOOPER_EVAL_SCREENSHOTS set to a folder, each
page leaves a picture there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from looper_eval.report import _change, html
from looper_eval.summary import compare, read_results
from looper_eval.summary_types import Coherence, Contamination, Recorded

pytestmark = pytest.mark.slow

_spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("_browser.py"))
assert _spec is not None
assert _spec.loader is not None
_browser = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_browser)

MakeResults = Callable[..., Path]
RIGHT, CUT = ("Answer: #### 5", "stop"), ("So we go on and on.\n" * 60, "length")
WRONG = ("Work.\n" * 50 + "A line that is too wide for a phone, " * 9 + "\nAnswer: #### 4", "stop")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    _browser.axe_script()
    with _browser.Browser() as running:
        yield running


@pytest.fixture
def report_page(make_results: MakeResults) -> Path:
    """A report with every section that there can be."""
    answers = {
        "base": [WRONG] * 6 + [CUT] * 2 + [RIGHT] * 2,
        "sft": [RIGHT] * 3 + [WRONG] * 4 + [RIGHT] * 3,
        "ppo-with-a-rather-long-name": [RIGHT] * 8 + [WRONG] * 2,
    }
    solutions = ["1 + 4 = 5"] * 5 + ["1 + 1 = 2\n2 + 3 = 5"] * 5
    out = make_results(answers, ["5"] * 10, solutions)
    results, summary = read_results(out), compare(out)
    hits = (("exact", "q/3", "train/17", "Question number 3?"), ("ngram", "q/4", "train/18", "a b c " * 20))
    found = Contamination(
        files=("train.jsonl",),
        digests_only=("other.jsonl",),
        questions=7000,
        touched={"exact": 1, "masked": 0, "ngram": 1},
        hits=hits,
    )
    coherent = Coherence(
        samples=4,
        scored=9,
        unscored=1,
        degenerate=0,
        scorer_id="s1",
        mean=0.4,
        auroc=0.8,
        auroc_plurality=None,
        plurality_accuracy=0.5,
        selective=((0.5, 0.9), (1.0, 0.7)),
        components={"s_end": 0.7},
    )
    models = [
        one.model_copy(
            update={
                "recorded": {"strict": Recorded(accuracy=0.5, differing=1)},
                "pass_at": {"1": 0.4, "4": 0.8},
                "majority": 0.6,
            }
        )
        for one in summary.models
    ]
    whole = summary.model_copy(
        update={
            "models": tuple(models),
            "contamination": {"sft": found},
            "coherence": {"sft": coherent},
            "unfinished": ("other",),
        }
    )
    changes = [_change(results, whole, a, b) for a, b in pairwise(results.records)]
    page = out / "report.html"
    page.write_text(html(results, whole, changes), encoding="utf-8")
    for title in ("Scores that came", "pass@k", "Paired", "Answer length", "By difficulty", "Coherence",
                  "in the training data", "What changed"):  # fmt: skip
        assert title in page.read_text(encoding="utf-8")
    return page


@pytest.fixture
def demo_page(demo_report: Any, demo_run: Path) -> Path:
    """The demo's report."""
    return Path(demo_report.write_demo_report(demo_run))


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
@pytest.mark.parametrize("kind", ["report", "demo"])
def test_axe_finds_nothing(kind: str, width: int, browser: Any, request: pytest.FixtureRequest) -> None:
    page = request.getfixturevalue(f"{kind}_page")
    browser.resize(width, 900, dark=False)
    browser.open(page)
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    for dark in (False, True):
        assert browser.axe(_browser.axe_script(), dark=dark) == []
        if folder := os.environ.get("LOOPER_EVAL_SCREENSHOTS"):
            shade = "dark" if dark else "light"
            browser.screenshot(Path(folder, f"axe-{kind}-{width}-{shade}.png"), whole=True)


def test_everything_that_scrolls_can_be_reached_and_scrolled_by_keyboard(
    browser: Any, report_page: Path
) -> None:
    browser.resize(390, 900, dark=False)
    browser.open(report_page)
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    scrolling = browser.run(
        "return [...document.querySelectorAll('main *')].filter(e => "
        "['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1 || "
        "['auto', 'scroll'].includes(getComputedStyle(e).overflowY) && e.scrollHeight > e.clientHeight + 1)"
        ".map(e => [e.tagName, e.tabIndex, e.getAttribute('aria-label')])"
    )
    assert len(scrolling) > 10
    for tag, tab_index, label in scrolling:
        assert tab_index == 0, tag
        assert label, tag
