from __future__ import annotations

import json
import logging

import pytest

from reward_service.logs import FIELDS, SafeFormatter, say


def line(
    name: str, message: str, *arguments: object, extra: dict[str, object] | None = None
) -> dict[str, object]:
    record = logging.LogRecord(name, logging.WARNING, "/x/module.py", 7, message, arguments, None)
    record.__dict__.update(extra or {})
    parsed: dict[str, object] = json.loads(SafeFormatter().format(record))
    return parsed


def test_our_messages_keep_their_words_and_lose_their_arguments() -> None:
    assert line("reward_service.x", "took %s", "SECRET")["event"] == "took %s"


def test_messages_of_others_are_only_a_place() -> None:
    written = line("uvicorn.error", "SECRET %s", "SECRET")
    assert written["event"] == "module:7"
    assert "SECRET" not in json.dumps(written)


def test_only_listed_fields_are_written() -> None:
    written = line("reward_service.x", "e", extra={"status": 200, "body": "SECRET", "arms": 3})
    assert set(written) - {"time", "level", "logger", "event"} == {"status", "arms"}
    assert "body" not in FIELDS
    assert line("other", "e", extra={"status": 200}).get("status") is None


def test_an_exception_is_its_type_and_its_place() -> None:
    try:
        raise ValueError("SECRET")
    except ValueError as error:
        record = logging.LogRecord(
            "regime_w.x", logging.ERROR, "f", 1, "failed", (), (ValueError, error, error.__traceback__)
        )
    text = SafeFormatter().format(record)
    assert json.loads(text)["exception"] == "ValueError"
    assert json.loads(text)["at"][0].startswith("test_an_exception_is_its_type_and_its_place:")
    assert "SECRET" not in text
    assert "\n" not in text


def test_what_is_said_reads_as_what_is_logged_and_obeys_the_level(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("reward_service.test")
    with caplog.at_level(logging.INFO, "reward_service.test"):
        logger.info("request", extra={"status": 200, "body": "SECRET"})
        say(logger, "request", {"status": 200, "body": "SECRET"})
    logged, said = (json.loads(SafeFormatter().format(record)) for record in caplog.records)
    assert {**said, "time": ""} == {**logged, "time": ""}
    with caplog.at_level(logging.WARNING, "reward_service.test"):
        say(logger, "request", {})
    assert len(caplog.records) == 2
