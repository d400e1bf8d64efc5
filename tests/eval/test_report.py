"""The page tells what summary.json tells, loads nothing, and runs nothing that a model wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from looper_eval.cli import main
from looper_eval.report import write_report

MakeResults = Callable[..., Path]
EVIL = '</pre><script>alert("x")</script><img src="https://evil.example/x.png" onerror=alert(1)>{{ 7 * 7 }}'
RIGHT, WRONG, CUT = "Answer: #### 5", f"{EVIL}\nAnswer: #### 4", "So we"


class Page(HTMLParser):
    """Every tag with its attributes, and every table as rows of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def out(make_results: MakeResults) -> Path:
    base = [(RIGHT, "stop")] * 3 + [(WRONG, "stop")] * 6 + [(CUT, "length")]
    ppo = [(WRONG, "stop")] + [(RIGHT, "stop")] * 8 + [("Well.", "stop")]
    solutions = ["1 + 4 = 5"] * 5 + ["1 + 1 = 2\n2 + 3 = 5"] * 5
    questions = [f"{EVIL} Question {index} & more?" for index in range(10)]
    return make_results({"base": base, "ppo": ppo}, ["5"] * 10, solutions, questions)


@pytest.fixture
def page(out: Path) -> Page:
    return Page(write_report(out).read_text(encoding="utf-8"))


def test_numbers_in_the_page_equal_summary_json(out: Path, page: Page) -> None:
    summary = json.loads((out / "summary.json").read_text())
    for one in summary["models"]:
        (row,) = [row for row in page.rows if row[0] == one["name"] and len(row) == 9]
        low, high = one["interval"]
        assert row[1:7] == [
            f"{100 * one['accuracy']:.2f}%",
            f"[{100 * low:.1f}, {100 * high:.1f}]",
            f"{one['correct']}/{one['n']}",
            str(one["wrong"]),
            str(one["unparsed"]),
            str(one["truncated"]),
        ]
    (pair,) = summary["pairs"]
    (row,) = [row for row in page.rows if row[0] == "ppo - base"]
    # By hand: base is right on 0-2, ppo on 1-8: 6 fixed, 1 broken, +5 of 10.
    assert (pair["table"]["only_b"], pair["table"]["only_a"], pair["difference"]) == (6, 1, 0.5)
    assert (row[1], row[4], row[5]) == ("+50.00", "6", "1")
    assert "6 fixed" in page.text
    assert "1 broken" in page.text
    # The same cut by solution lines and by calculator steps, since each line here is one step.
    levels = [row for row in page.rows if row[:2] == ["2", "5"]]
    assert [[cell.split("%")[0] for cell in row[2:]] for row in levels] == [["0.0", "80.0"]] * 2


def test_page_asks_no_network_for_anything(page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, name, value)
    assert not {"img", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}


def test_output_of_a_model_is_shown_as_text_and_cannot_run(out: Path, page: Page) -> None:
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert EVIL in page.text  # as text, braces and all
    source = (out / "report.html").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", source, re.S)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_policy_allows_the_pages_own_script_by_its_hash_and_nothing_else(out: Path, page: Page) -> None:
    import base64
    import hashlib

    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    source = (out / "report.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>\s*</body>", source, re.S)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_viewer_holds_every_question_with_every_answer_and_its_tags(page: Page) -> None:
    items = {
        a["id"]: set((a["data-tags"] or "").split())
        for t, a in page.tags
        if t == "details" and a.get("data-tags")
    }
    assert list(items) == [f"q{n}" for n in range(1, 11)]
    assert items["q1"] == {"right:base", "wrong:ppo", "disagree", "broken:base:ppo"}
    assert items["q2"] == {"right:base", "right:ppo"}
    assert items["q4"] == {"wrong:base", "right:ppo", "disagree", "fixed:base:ppo"}
    assert items["q10"] == {"wrong:base", "wrong:ppo", "none", "truncated", "unparsed"}
    offered = {a["value"] for t, a in page.tags if t == "option"}
    assert set().union(*items.values()) <= offered
    shown = {a["data-show"] for t, a in page.tags if "data-show" in a}
    assert shown == {"fixed:base:ppo", "broken:base:ppo"}
    targets = {a["href"] for t, a in page.tags if t == "a"}
    assert targets <= {f"#{name}" for name in items}


def test_markdown_and_json_beside_the_page_agree_with_it(out: Path, page: Page) -> None:
    summary = json.loads((out / "summary.json").read_text())
    report = json.loads((out / "report.json").read_text())
    assert report["summary"] == summary
    assert report["changes"] == [
        {"a": "base", "b": "ppo", "fixed": [f"q/{n}" for n in range(3, 9)], "broken": ["q/0"]}
    ]
    text = (out / "report.md").read_text()
    assert "| ppo | 80.00% |" in text
    assert "6 fixed: `q/3`, `q/4`" in text


def test_report_keeps_the_grader_that_was_chosen_last(out: Path) -> None:
    assert main(["compare", str(out), "--grader", "lm-eval-flexible"]) == 0
    assert main(["report", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["grader"] == "lm-eval-flexible"


def test_card_says_what_the_records_say_and_names_no_place(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", str(out), "--name", "ppo"]) == 0
    card = (out / "card-ppo.md").read_text()
    # 6 against 1 of 7 discordant: exact two-sided p = 2 * (1 + 7) / 2^7 = .125, so no claim is made.
    assert "ppo and base cannot be told apart on these questions (+50.0 points" in card
    assert "p = 0.12" in card
    assert "value: 80.00" in card
    assert "models/" not in card
    assert main(["card", str(out), "--name", "base"]) == 2
    assert main(["card", str(out), "--name", "rl"]) == 2
    assert "no finished model 'rl'; it has base, ppo" in capsys.readouterr().err
