"""Every command shows examples in its help, and takes what they say."""

from __future__ import annotations

import shlex

import pytest

from looper_eval.cli import EXAMPLES, _parser, main
from looper_eval.settings import PRESETS


def calls(name: str) -> list[list[str]]:
    """The examples of a command as lists of words, continued lines joined."""
    return [shlex.split(line) for line in EXAMPLES[name].strip().replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_shown_by_the_help_and_taken_by_the_parser(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    shown = capsys.readouterr().out
    for program, command, *rest in calls(name):
        assert (program, command) == ("looper-eval", name)
        assert f"looper-eval {name} {rest[0]}" in shown
        options = _parser().parse_args([command, *rest])
        assert getattr(options, "preset", "looper") in PRESETS


def test_the_overview_names_every_command_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n    {name}" in shown for name in EXAMPLES)
    assert "examples:\n  looper-eval run --model" in shown
