"""Typed configuration: one frozen model for each stage, read from TOML and the command line.

A file holds a table for each stage (`[prepare_data]`, `[sft]`, `[rollouts]`, `[ppo]`, `[merge]`), so that one
file describes a whole run. A command-line value replaces the file's. An unknown key is an error that
names its nearest known ones: a misspelt setting must never be a silent default.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from looper_trainer.errors import ConfigError

KNOWN_TABLES = ("prepare_data", "sft", "rollouts", "ppo", "merge", "eval")


def _named(path: Path) -> Path:
    if not path.name:
        raise ValueError("name a file or folder of its own; partial results lie beside it")
    return path


NamedPath = Annotated[Path, AfterValidator(_named)]


class StageConfig(BaseModel):
    """Base of every stage's settings: immutable and closed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @classmethod
    def table(cls) -> str:
        """The stage's TOML table: the class name without Config or StageConfig, in snake case."""
        stem = re.sub(r"(Stage)?Config$", "", cls.__name__)
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).lower()


ConfigT = TypeVar("ConfigT", bound=StageConfig)


def load_config(kind: type[ConfigT], path: Path | None, overrides: Mapping[str, str]) -> ConfigT:
    """`kind` from its table in the TOML file at `path` (if any), with `overrides` by field name on top.

    An override is text as typed: numbers and booleans are parsed, commas separate the items of a
    sequence, and "none" is None where the field allows it.

    Raises:
        ConfigError: unreadable file, unknown key or bad value; one line that names the key.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values.update(_read_table(kind, path))
    values.update(overrides)
    for key in values:
        if key not in kind.model_fields:
            raise ConfigError(unknown_key(key, kind.model_fields, f"setting of [{kind.table()}]"))
    values = {key: _parsed(value, kind.model_fields[key].annotation) for key, value in values.items()}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        given = f" (given: {first['input']!r})" if where in values else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"[{kind.table()}] {where}: {message}{given}".replace("] : ", "] ")) from None


def unknown_key(key: str, known: Collection[str], what: str) -> str:
    """One line saying that `key` is no `what`, with its nearest known names, or all of them."""
    near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
    return f"unknown {what}: {key}; {hint}"


def save_resolved(config: StageConfig, folder: Path, stem: str = "config") -> Path:
    """Write `config`, defaults included, as `<folder>/<stem>.toml`; `load_config` reads it back as equal."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{stem}.toml"
    partial = target.with_name(target.name + ".partial")
    partial.write_text(_resolved(config), encoding="utf-8")
    partial.replace(target)
    return target


def differing_from(config: StageConfig, saved: Path) -> list[str]:
    """Names of settings that are not what `save_resolved` wrote as `saved`, maybe in an earlier version.

    What such a version wrote may be refused today; of a setting that it did not know it did the default.

    Raises:
        ConfigError: it is no file of this stage's settings.
    """
    then = read_toml(saved).get(config.table())
    if not isinstance(then, dict):
        raise ConfigError(f"{saved}: holds no [{config.table()}]")
    now, default = (
        tomllib.loads(_resolved(one))[config.table()] for one in (config, type(config).model_construct())
    )
    return sorted(key for key in now if now[key] != then.get(key, default.get(key)))


def _resolved(config: StageConfig) -> str:
    lines = [f"[{config.table()}]"]
    for key, value in config.model_dump(mode="json").items():
        lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of the TOML file at `path`.

    Raises:
        ConfigError: unreadable file.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: cannot read the configuration: {reason}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _read_table(kind: type[StageConfig], path: Path) -> dict[str, Any]:
    document = read_toml(path)
    for name, table in document.items():
        if name not in KNOWN_TABLES:
            raise ConfigError(f"{path}: {unknown_key(name, KNOWN_TABLES, 'table')}")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: [{name}] must be a table of settings")
    values: dict[str, Any] = document.get(kind.table(), {})
    return values


def _parsed(value: Any, annotation: Any) -> Any:
    """`value` with the two conventions of text applied: "none", and commas in sequences."""
    if not isinstance(value, str):
        return value
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if type(None) in options and value.strip().lower() == "none":
        return None
    if any(get_origin(option) in (tuple, list) for option in options):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    # JSON's literals for booleans, numbers and strings are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
