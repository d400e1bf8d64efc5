"""The stub service with one thing different: `python varied_stub.py HOME PORT OPTIONS VARIANT`."""

from __future__ import annotations

import asyncio
import gc
import json
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[3] / "tests/faults"))
import stub_service
from few_at_a_time import FewAtATime

from reward_service import state, tls

CHECKPOINT_EVERY_S = 0.5


def main(home: str, port: str, options: str, variant: str) -> None:
    """Serve until killed."""
    different = json.loads(variant)
    if "ready_a_turn" in different:
        FewAtATime.most = different["ready_a_turn"]
        tls.DeadlineLoop.__init__ = _few_at_a_time  # type: ignore[method-assign]
    tune = stub_service.tune_interpreter

    def tuned() -> None:
        tune()
        gc.set_threshold(*different.get("collect", gc.get_threshold()))
        sys.setswitchinterval(different.get("switch_interval_s", sys.getswitchinterval()))

    stub_service.tune_interpreter = tuned
    if different.get("checkpoints_elsewhere"):
        _checkpoint_elsewhere(Path(home) / state.STATE_FILE)
    stub_service.main(home, port, json.dumps({**json.loads(options), **different.get("settings", {})}))


def _few_at_a_time(loop: asyncio.SelectorEventLoop) -> None:
    asyncio.SelectorEventLoop.__init__(loop, FewAtATime())


def _checkpoint_elsewhere(file: Path) -> None:
    """Keep SQLite's checkpoints out of the commits: a thread makes them."""
    connect = state._connect

    def without_checkpoints(home: Path, url: str | None) -> sa.Engine:
        engine = connect(home, url)

        def configure(opened: Any, _: object) -> None:
            opened.execute("PRAGMA wal_autocheckpoint = 0")

        sa.event.listen(engine, "connect", configure)
        return engine

    def run() -> None:
        time.sleep(1)
        connection = sqlite3.connect(file, timeout=5)
        while True:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            time.sleep(CHECKPOINT_EVERY_S)

    state._connect = without_checkpoints
    threading.Thread(target=run, daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
