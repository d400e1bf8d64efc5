"""Logs as JSON lines that cannot carry a caller's text: constant messages, an allow-list of fields.

Arguments of log messages, texts of exceptions and messages of other libraries are left out: any of them may
quote a request. What remains of an exception is its type and where it was raised.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime

FIELDS = (
    "request_id",
    "route",
    "status",
    "code",
    "seconds",
    "key_id",
    "questions",
    "arms",
    "failed",
    "reply_id",
    "scorer_id",
    "reason",
    "server",
)
_OURS = ("reward_service", "regime_w")


class SafeFormatter(logging.Formatter):
    """One record as one JSON line."""

    def format(self, record: logging.LogRecord) -> str:
        ours = record.name.split(".")[0] in _OURS
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": str(record.msg) if ours else f"{record.module}:{record.lineno}",
        }
        if ours:
            line.update({name: record.__dict__[name] for name in FIELDS if name in record.__dict__})
        if record.exc_info and record.exc_info[0] is not None:
            frames = traceback.extract_tb(record.exc_info[2])
            line["exception"] = record.exc_info[0].__name__
            line["at"] = [f"{frame.name}:{frame.lineno}" for frame in frames[-3:]]
        return json.dumps(line)


def say(logger: logging.Logger, event: str, fields: Mapping[str, object]) -> None:
    """Log `event` with `fields`, as `logger.info` would, without looking for the line that says it."""
    if logger.isEnabledFor(logging.INFO):
        logger.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, event, (), None, extra=fields))


def configure_logging(level: str = "INFO") -> None:
    """Send every log record of this process through `SafeFormatter` to stderr."""
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # nobody prints them
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
