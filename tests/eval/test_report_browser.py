"""The report in a real browser: search, filter and links are driven, and what is seen is checked.

What must be shown is counted from the answers below, not from the page. With LOOPER_EVAL_SCREENSHOTS set to
a folder, each test leaves a picture there.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from looper_eval.cli import main

pytestmark = pytest.mark.slow

_spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("_browser.py"))
assert _spec is not None
assert _spec.loader is not None
_browser = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_browser)

COUNT = 60
ANIMALS = ("owls", "foxes", "hares", "newts", "toads")
QUESTIONS = [f"Question {n}: how many {ANIMALS[n % 5]} do {n} farmers feed?" for n in range(COUNT)]
GOLDS = [str(n) for n in range(COUNT)]
RIGHT = {
    "base": {n for n in range(COUNT) if n % 6 == 0},
    "sft": {n for n in range(COUNT) if n % 2 == 0},
    "ppo": {n for n in range(COUNT) if n % 3 != 1},
}
CUT = {n for n in range(COUNT) if n % 7 == 3}  # of base, when it is not right
HOSTILE = (
    '</pre><img src="https://example.invalid/x.png" onerror="document.title=1">'
    "<script>document.title=2</script>"
)
VISIBLE = "return [...document.querySelectorAll('#viewer > details')].filter(d => !d.hidden).map(d => d.id)"


def answer(model: str, n: int) -> tuple[str, str]:
    if n in RIGHT[model]:
        return f"Counted by-{model}.\nAnswer: #### {n}", "stop"
    if model == "base" and n in CUT:
        return "one and one and " * 30, "length"
    return f"{HOSTILE}\nAnswer: #### {n + 1}", "stop"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browser") / "results"
    data = out.parent / "hand-made.jsonl"
    rows = [
        {"question": question, "answer": f"Line one {ANIMALS[n % 5]}.\nLine two.\n#### {gold}"}
        for n, (question, gold) in enumerate(zip(QUESTIONS, GOLDS, strict=True))
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_results(out, data)
    assert main(["report", str(out)]) == 0
    return out / "report.html"


def write_results(out: Path, data: Path) -> None:
    from looper_eval.dataset import load_dataset
    from looper_eval.engines import Answer
    from looper_eval.generate import grade
    from looper_eval.manifest import ModelEntry, open_folder
    from looper_eval.settings import resolve_settings
    from looper_schemas.records import to_line

    dataset = load_dataset(str(data))
    entries = {name: ModelEntry(place=name, identity=name) for name in RIGHT}
    manifest = open_folder(out, dataset, resolve_settings("looper"), entries)
    for name in RIGHT:
        records = []
        for n, item in enumerate(dataset.questions):
            text, reason = answer(name, n)
            records.append(grade(item, Answer(text, reason, len(text.split())), manifest.digest(name)))  # type: ignore[arg-type]
        (out / f"{name}.jsonl").write_text("".join(map(to_line, records)), encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with _browser.Browser() as running:
        yield running


@pytest.fixture
def shown(browser: Any, page: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    browser.resize(1280, 900, dark=False)
    browser.open(page)
    browser.run("location.hash = ''; return scrollTo(0, 0)")
    yield browser
    if folder := os.environ.get("LOOPER_EVAL_SCREENSHOTS"):
        browser.screenshot(Path(folder, f"{request.node.name.replace('/', '-')[:80]}.png"))
    assert browser.complaints() == []


def ids(numbers: set[int]) -> list[str]:
    return [f"q{n + 1}" for n in sorted(numbers)]


def test_search_shows_the_questions_that_hold_every_word_in_question_or_answer(shown: Any) -> None:
    shown.type("#search", "FOXES")
    foxes = {n for n in range(COUNT) if n % 5 == 1}
    assert shown.run(VISIBLE) == ids(foxes)
    assert shown.run("return document.getElementById('count').textContent") == f"{len(foxes)} of 60 questions"
    shown.type("#search", "by-ppo foxes")
    assert shown.run(VISIBLE) == ids(foxes & RIGHT["ppo"])
    shown.type("#search", "nothing holds this")
    assert shown.run(VISIBLE) == []
    shown.type("#search", " ")
    assert len(shown.run(VISIBLE)) == COUNT


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        ("right:ppo", RIGHT["ppo"]),
        ("wrong:sft", set(range(COUNT)) - RIGHT["sft"]),
        ("fixed:sft:ppo", RIGHT["ppo"] - RIGHT["sft"]),
        ("broken:sft:ppo", RIGHT["sft"] - RIGHT["ppo"]),
        ("fixed:base:sft", RIGHT["sft"] - RIGHT["base"]),
        ("none", set(range(COUNT)) - RIGHT["base"] - RIGHT["sft"] - RIGHT["ppo"]),
        ("disagree", set.union(*RIGHT.values()) - set.intersection(*RIGHT.values())),
        ("truncated", CUT - RIGHT["base"]),
        ("unparsed", set()),
    ],
)
def test_each_filter_shows_what_it_says(shown: Any, value: str, numbers: set[int]) -> None:
    shown.choose("#filter", value)
    assert shown.run(VISIBLE) == ids(numbers)


def test_search_and_filter_hold_together(shown: Any) -> None:
    shown.choose("#filter", "right:sft")
    shown.type("#search", "hares")
    assert shown.run(VISIBLE) == ids({n for n in RIGHT["sft"] if n % 5 == 2})


def test_a_button_of_the_changes_shows_them_and_a_link_leads_to_all_answers(shown: Any) -> None:
    selector = "button[data-show='broken:sft:ppo']"
    shown.click(selector)
    assert shown.run(VISIBLE) == ids(RIGHT["sft"] - RIGHT["ppo"])
    fixed = min(RIGHT["sft"] - RIGHT["base"])  # hidden now: the link must bring it back
    shown.run("document.querySelector('main details.question').open = true")
    shown.click(f"main details.question a[href='#q{fixed + 1}']")
    target = f"document.getElementById('q{fixed + 1}')"
    settled = f"const t = {target}; return [t.open, t.hidden, t.getBoundingClientRect().top]"
    shown.run("return new Promise(done => setTimeout(done, 300))")
    is_open, hidden, top = shown.run(settled)
    assert (is_open, hidden) == (True, False)
    assert 0 <= top < 900
    assert len(shown.run(VISIBLE)) == COUNT
    assert f"Answer: #### {fixed}" in shown.run(f"return {target}.innerText")


def test_a_fragment_opens_its_question_when_the_page_is_opened(browser: Any, page: Path) -> None:
    browser.resize(1280, 900, dark=False)
    browser.open(page.parent / "report.html", "#q42")
    browser.run("location.reload(); return 0")
    browser.run("return new Promise(done => setTimeout(done, 500))")
    opened = browser.run("return [...document.querySelectorAll('#viewer > details[open]')].map(d => d.id)")
    assert opened == ["q42"]
    assert browser.run("return document.getElementById('q42').innerText").count("base") >= 1


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_page_fits_its_window_and_its_text_can_be_read(shown: Any, width: int, dark: bool) -> None:
    shown.resize(width, 900, dark=dark)
    shown.run(
        "document.getElementById('q3').open = true; document.getElementById('questions').scrollIntoView()"
    )
    assert shown.run("return document.documentElement.scrollWidth <= innerWidth")
    assert shown.run("return document.getElementById('search').getBoundingClientRect().width") >= 200
    paper, *inks = shown.run(COLOURS)
    assert (luminance(paper) < 0.1) == dark
    for ink in inks:
        lighter, darker = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, ink  # WCAG 2.2, 1.4.3


COLOURS = """
const colour = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
return [colour('body', 'backgroundColor'), colour('body', 'color'), colour('.muted', 'color'),
        colour('.right', 'color'), colour('.miss', 'color'), colour('#viewer a', 'color'),
        colour('th', 'color'), getComputedStyle(document.getElementById('search'), '::placeholder').color]
"""


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.2)."""
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear: Callable[[float], float] = lambda c: c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4  # noqa: E731
    red, green, blue = map(linear, channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_nothing_is_loaded_and_no_answer_runs(shown: Any) -> None:
    shown.run("for (const one of document.querySelectorAll('details')) one.open = true")
    assert shown.run("return performance.getEntriesByType('resource').length") == 0
    assert shown.run("return document.title") == "Evaluation on hand-made.jsonl"
    assert shown.run("return document.querySelectorAll('#viewer img, #viewer script').length") == 0
    assert HOSTILE in shown.run("return document.getElementById('q2').innerText")
