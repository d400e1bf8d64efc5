"""The `looper` command: one subcommand for each stage, its options generated from the stage's settings.

Options are the fields of the stage's configuration model, with their descriptions and defaults, so that a
setting exists in the file, on the command line and in the help, or not at all. Stages are imported when
they are asked for: `looper --help` needs no training library.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from looper_schemas.records import RecordError
from looper_trainer import __version__
from looper_trainer.config import StageConfig, load_config, unknown_key
from looper_trainer.errors import ConfigError, UserError

_TRAINING_LIBRARIES = {"torch", "transformers", "trl", "peft", "accelerate", "datasets"}


@dataclass(frozen=True)
class Stage:
    """A subcommand. `config` imports its settings, `run` the stage itself: help needs the former only."""

    summary: str
    config: Callable[[], type[StageConfig]]
    run: Callable[[Any], None]


def _prepare_data() -> type[StageConfig]:
    from looper_trainer.data import PrepareDataConfig

    return PrepareDataConfig


def _run_prepare_data(config: Any) -> None:
    from looper_trainer.data import run

    run(config)


def _sft() -> type[StageConfig]:
    from looper_trainer.sft import SFTStageConfig

    return SFTStageConfig


def _run_sft(config: Any) -> None:
    from looper_trainer.sft import run

    run(config)


def _rollouts() -> type[StageConfig]:
    from looper_trainer.rollouts import RolloutsConfig

    return RolloutsConfig


def _run_rollouts(config: Any) -> None:
    from looper_trainer.rollouts import run

    run(config)


def _ppo() -> type[StageConfig]:
    from looper_trainer.ppo.config import PPOConfig

    return PPOConfig


def _run_ppo(config: Any) -> None:
    from looper_trainer.ppo.loop import run

    run(config)


def _merge() -> type[StageConfig]:
    from looper_trainer.models import MergeConfig

    return MergeConfig


def _run_merge(config: Any) -> None:
    from looper_trainer.models import run_merge

    run_merge(config)


STAGES = {
    "prepare-data": Stage("split GSM8K into a train and a dev file", _prepare_data, _run_prepare_data),
    "sft": Stage("teach a base model the solution format (supervised fine-tuning)", _sft, _run_sft),
    "rollouts": Stage("sample solutions of every question and have them scored", _rollouts, _run_rollouts),
    "ppo": Stage("train with PPO on the reward service's scores", _ppo, _run_ppo),
    "merge": Stage("merge a LoRA adapter into a plain model folder", _merge, _run_merge),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `looper`; 0 on success, 2 after a failure that the user can mend, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
    except (UserError, RecordError) as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in _TRAINING_LIBRARIES:
            raise
        return _fail(f"this stage needs {error.name}; run: pip install 'looper-trainer[train]'")
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        return _fail(f"{error.filename}: {error.strerror}; choose another path")
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
    elif arguments[0] not in STAGES:
        raise ConfigError(unknown_key(arguments[0], STAGES, "command"))
    else:
        name, stage = arguments[0], STAGES[arguments[0]]
        config = read_config(name, stage.config(), arguments[1:])
        if config is not None:
            stage.run(config)


def _overview() -> str:
    width = max(map(len, STAGES))
    lines = [f"  {name:<{width}}  {stage.summary}" for name, stage in STAGES.items()]
    return "\n".join(
        [
            "usage: looper COMMAND [--config FILE.toml] [--SETTING VALUE ...]",
            "",
            *lines,
            "",
            "`looper COMMAND --help` lists the settings of a command; a file holds them in tables",
            "[prepare_data], [sft], [rollouts], [ppo], [merge]. The reward service is found by",
            "LOOPER_REWARD_URL and LOOPER_REWARD_KEY (or LOOPER_REWARD_KEY_FILE).",
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
    parser = _Parser(
        prog=f"looper {name}",
        description=(kind.__doc__ or "").split("\n\n")[0],
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this and exit")
    parser.add_argument(
        "--config", metavar="FILE.toml", type=Path, help=f"settings in a table [{kind.table()}]"
    )
    for field, info in kind.model_fields.items():
        _add_option(parser, field, info)
    known, others = parser.parse_known_args(list(arguments))
    if known.help:
        parser.print_help()
        return None
    for other in others:
        if other.startswith("--"):
            typed = other.removeprefix("--").split("=")[0]
            raise ConfigError(unknown_key(typed, [_dashed(field) for field in kind.model_fields], "option"))
        raise ConfigError(f"unexpected argument: {other}; see looper {name} --help")
    overrides = {field: getattr(known, field) for field in kind.model_fields}
    return load_config(
        kind, known.config, {key: value for key, value in overrides.items() if value is not None}
    )


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


def _metavar(kinds: tuple[Any, ...]) -> str:
    choices: list[str] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            choices += [str(value) for value in get_args(kind)]
        elif isinstance(kind, type) and issubclass(kind, Enum):
            choices += [str(value.value) for value in kind]
    if choices:
        return "{" + ",".join(choices) + "}"
    names = {int: "N", float: "X", bool: "BOOL", Path: "PATH"}
    return next((names[kind] for kind in kinds if kind in names), "TEXT")


def _shown(default: object) -> str:
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    sys.exit(main())
