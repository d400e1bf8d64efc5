"""The `looper` command: a subcommand for each entry of `commands`, its options generated from its settings.

Options are the fields of the command's configuration model, with their descriptions and defaults, so that a
setting exists in the file, on the command line and in the help, or not at all. Commands are imported when
they are asked for: `looper --help` needs no training library.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from looper_schemas.records import RecordError
from looper_trainer import __version__
from looper_trainer.commands import COMMANDS, STAGES, TOOLS, Command, action_of, settings_of
from looper_trainer.completion import CompletionConfig, Option, script
from looper_trainer.config import StageConfig, load_config, unknown_key
from looper_trainer.errors import ConfigError, UserError, refused_file

_TRAINING_LIBRARIES = {"torch", "transformers", "trl", "peft", "accelerate", "datasets"}
_WATCHING_LIBRARIES = {"tensorboard", "wandb"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `looper`; 0 on success, 2 after a failure that the user can mend, 130 when interrupted.

    141 when nobody reads what it prints.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except (UserError, RecordError) as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in _WATCHING_LIBRARIES:
            return _fail(f"this needs {library}; run: pip install {library}")
        if error.name not in _TRAINING_LIBRARIES:
            raise
        return _fail(f"this stage needs {error.name}; run: pip install 'looper-trainer[train]'")
    except BrokenPipeError:  # `... | head` has read enough
        if arguments and arguments[0] in STAGES:
            raise  # a stage has other pipes too, and should not end unseen
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is flushed at the exit
        return 141  # what a shell says of a program that SIGPIPE ended
    except OSError as error:
        message = refused_file(error)
        if message is None:
            raise
        return _fail(message)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
    elif arguments[0] == "--version":
        print(f"looper {__version__}")
    elif arguments[0] not in COMMANDS:
        raise ConfigError(unknown_key(arguments[0], COMMANDS, "command"))
    else:
        config = read_config(arguments[0], settings_of(arguments[0]), arguments[1:])
        if config is not None:
            action_of(arguments[0])(config)


def _overview() -> str:
    width = max(map(len, COMMANDS))

    def listed(commands: dict[str, Command]) -> list[str]:
        return [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]

    return "\n".join(
        [
            "usage: looper COMMAND [--config FILE.toml] [--SETTING VALUE ...]",
            "",
            "stages of a run:",
            *listed(STAGES),
            "",
            "around it:",
            *listed(TOOLS),
            "",
            "examples:",
            "  looper doctor              is this machine ready?",
            "  looper run run.toml        every stage of a file",
            "  looper ppo --help          the settings of one of them, with examples",
            "",
            "A file holds the settings of the stages in tables [prepare_data], [sft], [rollouts], [ppo],",
            "[merge]. The reward service is found by LOOPER_REWARD_URL and LOOPER_REWARD_KEY (or",
            "LOOPER_REWARD_KEY_FILE).",
        ]
    )


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage: one line, like every other failure."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def read_config(name: str, kind: type[StageConfig], arguments: Sequence[str]) -> StageConfig | None:
    """The configuration of subcommand `name` from its command line; None when that asked for help only.

    Raises:
        ConfigError: unknown option or bad value.
    """
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"looper {name}",
        description=(kind.__doc__ or "").split("\n\n")[0],
        epilog=_examples(command),
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this and exit")
    if command.from_file:
        text = f"settings in a table [{kind.table()}]"
        parser.add_argument("--config", metavar="FILE.toml", type=Path, help=text)
    for field, info in kind.model_fields.items():
        _add_option(parser, field, info)
    arguments = list(arguments)
    if command.positional is not None and arguments and not arguments[0].startswith("-"):
        arguments[:1] = [f"--{_dashed(command.positional)}", arguments[0]]
    known, others = parser.parse_known_args(arguments)
    if known.help:
        parser.print_help()
        return None
    for other in others:
        if other.startswith("--"):
            typed = other.removeprefix("--").split("=")[0]
            raise ConfigError(unknown_key(typed, [_dashed(field) for field in kind.model_fields], "option"))
        raise ConfigError(f"unexpected argument: {other}; see looper {name} --help")
    overrides = {field: getattr(known, field) for field in kind.model_fields}
    given = {key: value for key, value in overrides.items() if value is not None}
    needed = command.positional
    if needed is not None and kind.model_fields[needed].is_required() and needed not in given:
        raise ConfigError(f"looper {name} needs a {needed}; for example: {command.examples[0][0]}")
    return load_config(kind, known.config if command.from_file else None, given)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Room for long option names, and examples as they were written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)


def _examples(command: Command) -> str:
    lines = [f"  {line}" + (f"\n      {what}" if what else "") for line, what in command.examples]
    return "\n".join(["examples:", *lines])


def print_completion(config: CompletionConfig) -> None:
    """`looper completion`: print the script for a shell."""
    found = {}
    for name, command in COMMANDS.items():
        fields = settings_of(name).model_fields
        options = {"--help": Option("the settings, with examples", flag=True)}
        if command.from_file:
            options["--config"] = Option("settings in a TOML file")
        for field, info in fields.items():
            kinds = _kinds(info.annotation)
            options[f"--{_dashed(field)}"] = Option(
                info.description or field, tuple(_choices(kinds)), flag=bool in kinds
            )
        found[name] = (command.summary, options)
    print(script(config.shell, found), end="")


def _dashed(field: str) -> str:
    return field.replace("_", "-")


def _add_option(parser: argparse.ArgumentParser, field: str, info: FieldInfo) -> None:
    kinds = _kinds(info.annotation)
    default = "required" if info.is_required() else f"default: {_shown(info.default)}"
    text = f"{info.description} ({default})" if info.description else f"({default})"
    options: dict[str, Any] = {"dest": field, "help": text.replace("%", "%%"), "metavar": _metavar(kinds)}
    if bool in kinds:
        options |= {"nargs": "?", "const": "true"}
    parser.add_argument(f"--{_dashed(field)}", **options)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for kind in get_args(annotation) if kind is not type(None))
    return (annotation,)


def _choices(kinds: tuple[Any, ...]) -> list[str]:
    """The values that a setting is limited to; none for one that is not."""
    choices: list[str] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            choices += [str(value) for value in get_args(kind)]
        elif isinstance(kind, type) and issubclass(kind, Enum):
            choices += [str(value.value) for value in kind]
    return choices


def _metavar(kinds: tuple[Any, ...]) -> str:
    if choices := _choices(kinds):
        return "{" + ",".join(choices) + "}"
    names = {int: "N", float: "X", bool: "BOOL", Path: "PATH"}
    return next((names[kind] for kind in kinds if kind in names), "TEXT")


def _shown(default: object) -> str:
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    sys.exit(main())
