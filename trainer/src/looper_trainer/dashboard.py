"""`looper dashboard`: a local page that follows a run while it trains, from the files it writes anyway.

Listens on 127.0.0.1 only, answers only requests that name this machine as their host (so that no web page can
read a run through DNS rebinding), and serves a page that may load nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
import webbrowser
from collections.abc import Mapping
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import Field

from looper_trainer.config import StageConfig
from looper_trainer.errors import ConfigError
from looper_trainer.health import alarms
from looper_trainer.run_folder import (
    last_write,
    read_metrics,
    read_settings,
    read_trajectories,
    require_run,
    seconds_by_part,
)

HOSTS = frozenset({"127.0.0.1", "localhost"})


class DashboardConfig(StageConfig):
    """Follow a run in the browser."""

    run: Annotated[Path, Field(description="folder of the run: the --output of ppo or sft")] = Path(
        "checkpoints/ppo_rl"
    )
    port: Annotated[int, Field(ge=0, le=65535, description="port on 127.0.0.1; 0: any free one")] = 7007
    open: Annotated[bool, Field(description="open the page in a browser")] = False


def run(config: DashboardConfig) -> None:
    """Serve until interrupted.

    Raises:
        DataError: there is no such folder.
        ConfigError: the port is taken.
    """
    with Dashboard(config.run, config.port) as dashboard:
        print(f"dashboard: {dashboard.url} follows {config.run}; Ctrl-C ends it", flush=True)
        if config.open:
            webbrowser.open(dashboard.url)
        threading.Event().wait()


class Dashboard:
    """The server of one run's page; a context manager that starts and stops it.

    Args:
        folder: of the run.
        port: 0 for any free one.

    Raises:
        DataError, ConfigError: see `run`.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = require_run(folder)
        handler = type("Handler", (_Handler,), {"folder": folder})
        try:
            self._http = _Server(("127.0.0.1", port), handler)
        except OSError as error:
            raise ConfigError(
                f"port {port}: {error.strerror}; choose another --port, or 0 for any free one"
            ) from None
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()


def snapshot(folder: Path, offset: int = 0) -> dict[str, Any]:
    """What the page asks for: the rows behind `offset`, and the present state of everything else."""
    rows = read_metrics(folder).rows
    new = read_metrics(folder, offset)
    settings = read_settings(folder)
    expected = settings.get("steps")
    written = last_write(folder)
    silent_s = None if written is None else max(0.0, time.time() - written)
    step, questions = read_trajectories(folder)
    return {
        "run": str(folder),
        "settings": settings,
        "steps": expected if isinstance(expected, int) else None,
        "rows": new.rows,
        "offset": new.offset,
        "restarted": new.restarted,
        "silent_s": silent_s,
        "alarms": [alarm._asdict() for alarm in alarms(rows, silent_s, expected)],
        "seconds": seconds_by_part(rows),
        "trajectories": {"step": step, "questions": questions},
    }


@cache
def page() -> tuple[bytes, str]:
    """The page with its style and script inside, and the policy that allows these two and nothing else."""
    folder = files("looper_trainer") / "pages"
    html, css, script = (
        (folder / f"dashboard.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'sha256-{style}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.replace("/*CSS*/", css).replace("/*SCRIPT*/", script).encode(), policy


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "looper-dashboard", ""

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in HOSTS:
            return self._send(403, b"this page is for this machine", "text/plain")
        address = urlsplit(self.path)
        if address.path == "/":
            content, policy = page()
            return self._send(200, content, "text/html; charset=utf-8", {"Content-Security-Policy": policy})
        if address.path == "/data.json":
            asked = parse_qs(address.query).get("offset", ["0"])[0]
            offset = int(asked) if asked.isdecimal() else 0
            body = json.dumps(snapshot(self.folder, offset)).encode()
            return self._send(200, body, "application/json")
        return self._send(404, b"nothing here", "text/plain")

    def _send(self, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
