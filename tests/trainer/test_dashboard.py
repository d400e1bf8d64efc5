"""The dashboard: what it serves and to whom, and its page in a headless Chromium, on a desk and on a phone.

The second needs `chromium` and `chromedriver`; axe's rules are run where `LOOPER_AXE` names an `axe.min.js`
(of npm's axe-core), and with `LOOPER_SCREENSHOTS` set to a folder each size leaves a picture there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from looper_schemas.records import RolloutRecord, Trajectory, write_records
from looper_schemas.scoring import Scores
from looper_trainer.cli import main
from looper_trainer.dashboard import Dashboard

_spec = importlib.util.spec_from_file_location("browser", Path(__file__).parents[1] / "eval/_browser.py")
assert _spec is not None
assert _spec.loader is not None
_browser = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_browser)

EVIL = "<img src=x onerror=document.title='owned'>"


def row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "reward_mean": -0.4 + 0.03 * step,
        "correct_rate": 0.2 + 0.01 * step,
        "s_wm": 0.3,
        "s_end": 0.2,
        "s_path": 0.7,
        "s_cf": None,
        "entropy": 0.9 - 0.01 * step,
        "kl_k1_per_completion": 0.002 * step,
        "distinct_answers_mean": 2.5,
        "length_mean": 40.0 + step,
        "truncation_rate": 0.02,
        "questions_scored": 16,
        "questions_failed": 0,
        "policy_loss": -0.01,
        "seconds": {"sample": 0.9, "update": 2.1, "score_wait": 0.2},
        **({"dev_accuracy": 0.3 + 0.002 * step} if step % 10 == 0 else {}),
        **more,
    }


def append(folder: Path, *rows: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as out:
        out.write("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("[ppo]\nsteps = 60\n", encoding="utf-8")
    append(run, *(row(step) for step in range(1, 25)))
    records = [
        RolloutRecord(
            id=f"q/{n}",
            question=f"How many apples has Ann, who had {n}? {EVIL}",
            gold_answer="4",
            trajectories=tuple(
                Trajectory(output=f"She has {k}. {EVIL}", final_answer=str(k), reward=reward, tokens_out=9)
                for k, reward in ((3, -0.5), (4, 1.2), (5, None))
            ),
            scores=Scores(s_end=0.2, s_path=0.7, s_cf=None, s_wm=0.4),
            policy="p",
        )
        for n in range(3)
    ]
    write_records(run / "trajectories/step_00024.jsonl", records)
    return run


@pytest.fixture
def dashboard(folder: Path) -> Iterator[Dashboard]:
    with Dashboard(folder) as running:
        yield running


def get(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers=headers, trust_env=False)


def test_the_data_come_once_and_the_state_each_time(dashboard: Dashboard, folder: Path) -> None:
    first = get(dashboard.url + "data.json").json()
    assert [one["step"] for one in first["rows"]] == list(range(1, 25))
    assert first["steps"] == 60
    assert first["alarms"] == []
    assert list(first["seconds"]) == ["update", "sample", "score_wait"]
    assert first["trajectories"]["step"] == 24
    append(folder, row(25, policy_loss=None))
    second = get(f"{dashboard.url}data.json?offset={first['offset']}").json()
    assert [one["step"] for one in second["rows"]] == [25]
    assert [alarm["name"] for alarm in second["alarms"]] == ["not_finite"]


def test_only_this_machine_is_answered_and_nothing_may_be_loaded_from_elsewhere(dashboard: Dashboard) -> None:
    assert dashboard.url.startswith("http://127.0.0.1:")
    port = dashboard.url.rstrip("/").rpartition(":")[2]
    assert get(dashboard.url, Host=f"localhost:{port}").status_code == 200
    assert get(dashboard.url, Host=f"rebound.example:{port}").status_code == 403
    assert get(dashboard.url + "data.json", Host="rebound.example").status_code == 403
    assert get(dashboard.url + "../../etc/passwd").status_code == 404
    page = get(dashboard.url)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.text


def test_what_cannot_be_followed_is_said(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    port = dashboard.url.rstrip("/").rpartition(":")[2]
    assert main(["dashboard", str(dashboard.folder), "--port", port]) == 2
    assert "choose another --port" in capsys.readouterr().err
    assert main(["dashboard", "absent"]) == 2
    assert "absent: no such folder" in capsys.readouterr().err


# In a browser.

TAB, ENTER = "\ue004", "\ue007"


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desk", "phone"])
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    with _browser.Browser() as running:
        running.resize(*request.param, dark=False)
        yield running


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the page did not get there"
        time.sleep(0.1)


@pytest.mark.slow
def test_the_page_follows_a_live_run(dashboard: Dashboard, folder: Path, browser: Any) -> None:
    def text(selector: str) -> str:
        return str(browser.run("return document.querySelector(arguments[0]).innerText", selector))

    browser.visit(dashboard.url)
    wait_until(lambda: bool(browser.run("return document.body.dataset.ready === 'yes'")))
    assert text("#state").startswith("Step 24 of 60, about ")
    assert browser.run("return document.querySelectorAll('#panels figure').length") >= 9
    label = browser.run("return document.querySelector('#panels svg').getAttribute('aria-label')")
    assert label.startswith("Reward, steps 1 to 24. Now: mean reward")
    assert "None." in text("#alarms")

    # By keyboard alone: the skip link first, then every control in order, each visibly focused.
    reached = []
    for _ in range(3):
        browser.press(TAB)
        reached.append(browser.run("const it = document.activeElement; return it.id || it.className"))
        assert browser.run("return getComputedStyle(document.activeElement).outlineWidth") == "3px"
    assert reached == ["skip", "pause", "smooth"]
    browser.run("document.getElementById('pause').focus()")
    for shown, pressed in (("Go on", "true"), ("Pause", "false")):
        browser.press(ENTER)
        assert text("#pause") == shown
        assert browser.run("return document.getElementById('pause').ariaPressed") == pressed

    append(folder, *(row(step, entropy=0.01) for step in range(25, 31)))
    wait_until(lambda: text("#state").startswith("Step 30 of 60"))
    wait_until(lambda: "Entropy fell" in text("#alarms"))

    # A model's text stays text, and no part of the page is wider than the window.
    browser.click("#questions summary")
    assert EVIL in text("#questions")
    assert "owned" not in browser.run("return document.title")
    inner, outer = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert inner <= outer
    assert browser.complaints() == []

    if os.environ.get("LOOPER_SCREENSHOTS"):
        browser.screenshot(Path(os.environ["LOOPER_SCREENSHOTS"]) / f"dashboard-{outer}.png", whole=True)
    if os.environ.get("LOOPER_AXE"):
        for dark in (False, True):
            assert browser.axe(Path(os.environ["LOOPER_AXE"]), dark=dark) == []
