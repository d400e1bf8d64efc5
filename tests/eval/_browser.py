"""A headless Chromium over the W3C WebDriver protocol: just what the tests of our pages drive.

Chromium and its driver come with the operating system (Debian: `chromium chromium-driver`); where they are
missing, `start` skips the test.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

START_S = 60.0
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def axe_script() -> Path:
    """axe-core's `axe.min.js`, which `LOOPER_AXE` names; without it the test is skipped."""
    if not (named := os.environ.get("LOOPER_AXE")):
        pytest.skip("LOOPER_AXE names no axe.min.js: npm pack axe-core, unpack it, set LOOPER_AXE")
    return Path(named)


class Browser:
    """One window; a context manager that ends the browser and its driver."""

    def __init__(self) -> None:
        driver = shutil.which("chromedriver")
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        if driver is None or chromium is None:
            pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
        self._profile = tempfile.TemporaryDirectory(prefix="looper-browser-", ignore_cleanup_errors=True)
        self._driver = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{self._port()}", timeout=120.0, trust_env=False)
        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", f"--user-data-dir={self._profile.name}",
        ]  # fmt: skip
        options = {"binary": chromium, "args": arguments}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        session = self._send("POST", "/session", {"capabilities": wanted})
        self._session = f"/session/{session['sessionId']}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._http.delete(self._session)
        finally:
            self._http.close()
            self._driver.terminate()
            self._driver.wait()
            self._profile.cleanup()

    def open(self, page: Path, fragment: str = "") -> None:
        """Show `page`."""
        self.visit(page.resolve().as_uri() + fragment)

    def visit(self, url: str) -> None:
        """Show the page at an address."""
        self._send("POST", f"{self._session}/url", {"url": url})

    def press(self, key: str) -> None:
        """Press and release one key (a character, or a code point of WebDriver) where the focus is."""
        strokes = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        body = {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]}
        self._send("POST", f"{self._session}/actions", body)

    def axe(self, script: Path, *, dark: bool) -> list[str]:
        """What axe-core (its `axe.min.js`) finds on the page in one colour scheme: rule and element."""
        self._prefer(dark)
        self.run(script.read_text(encoding="utf-8"))
        ask = "const done = arguments[0]; axe.run().then(done, error => done(String(error)))"
        result = self._send("POST", f"{self._session}/execute/async", {"script": ask, "args": []})
        assert isinstance(result, dict), result
        assert len(result["passes"]) > 10
        return [
            f"{broken['id']}: {node['html'][:120]}"
            for broken in result["violations"]
            for node in broken["nodes"]
        ]

    def run(self, script: str, *arguments: Any) -> Any:
        """What the JavaScript function body `script` returns."""
        body = {"script": script, "args": list(arguments)}
        return self._send("POST", f"{self._session}/execute/sync", body)

    def click(self, selector: str) -> None:
        """Click the first element that `selector` finds, as a user does (it must be visible)."""
        self._send("POST", f"{self._element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Replace the text of an input with `text`, key by key."""
        element = self._element(selector)
        self._send("POST", f"{element}/clear", {})
        self._send("POST", f"{element}/value", {"text": text})

    def choose(self, selector: str, value: str) -> None:
        """Click the option `value` of a select."""
        self.click(f"{selector} option[value='{value}']")

    def resize(self, width: int, height: int, *, dark: bool) -> None:
        """The size of the page in CSS pixels, and the colour scheme that the user prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._cdp("Emulation.setDeviceMetricsOverride", metrics)
        self._prefer(dark)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write what is seen to `path` as PNG, or the whole page."""
        if whole:
            shot = self._cdp("Page.captureScreenshot", {"captureBeyondViewport": True})["data"]
        else:
            shot = self._send("GET", f"{self._session}/screenshot")
        path.write_bytes(base64.b64decode(shot))

    def complaints(self) -> list[str]:
        """Errors and warnings on the console since the last call, broken policies included."""
        log = self._send("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in log if entry["level"] in ("SEVERE", "WARNING")]

    def _prefer(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._cdp("Emulation.setEmulatedMedia", {"features": [scheme]})

    def _element(self, selector: str) -> str:
        body = {"using": "css selector", "value": selector}
        found = self._send("POST", f"{self._session}/element", body)
        return f"{self._session}/element/{found[_ELEMENT]}"

    def _cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._send("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        reply = self._http.request(method, path, json=body).json()["value"]
        if isinstance(reply, dict) and "error" in reply:
            raise AssertionError(f"{reply['error']}: {reply['message']}")
        return reply

    def _port(self) -> int:
        assert self._driver.stdout is not None
        deadline = time.monotonic() + START_S
        for line in self._driver.stdout:
            if "started successfully on port" in line:
                return int(line.rstrip().rstrip(".").rpartition(" ")[2])
            if time.monotonic() > deadline:
                break
        raise AssertionError("chromedriver did not start")
