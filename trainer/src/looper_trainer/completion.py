"""`looper completion SHELL`: a completion script for bash, zsh or fish, made from the commands themselves.

looper completion bash > ~/.local/share/bash-completion/completions/looper
looper completion zsh > "${fpath[1]}/_looper"
looper completion fish > ~/.config/fish/completions/looper.fish
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from looper_trainer.config import StageConfig


class CompletionConfig(StageConfig):
    """Print a completion script for your shell."""

    shell: Annotated[Literal["bash", "zsh", "fish"], Field(description="which shell")]


class Option(NamedTuple):
    """One option: what it is, the values it is limited to (none: files are offered), whether it takes one."""

    help: str
    choices: tuple[str, ...] = ()
    flag: bool = False


Commands = Mapping[str, tuple[str, Mapping[str, Option]]]
"""Summary and options of each command."""


def script(shell: str, commands: Commands) -> str:
    """The script for `shell`: bash, zsh or fish."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def _bash(commands: Commands) -> str:
    cases = "\n".join(
        f'    {name}) options="{" ".join(options)}" ;;' for name, (_, options) in commands.items()
    )
    values = "\n".join(
        f'    "{name} {word}") values="{" ".join(option.choices)}" ;;'
        for name, (_, options) in commands.items()
        for word, option in options.items()
        if option.choices
    )
    return f"""_looper() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" options="" values=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
  esac
  case "$values$word" in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    "$word") COMPREPLY=($(compgen -f -- "$word")) ;;
    *) COMPREPLY=($(compgen -W "$values" -- "$word")) ;;
  esac
}}
complete -o filenames -F _looper looper
"""


def _quoted(text: str) -> str:
    return text.replace("\\", "").replace("'", "").replace("[", "(").replace("]", ")").replace(":", " ")


def _zsh(commands: Commands) -> str:
    def value(option: Option) -> str:
        if option.flag:
            return ""
        return f":value:({' '.join(option.choices)})" if option.choices else ":value:_files"

    verbs = "\n".join(f"    '{name}:{_quoted(summary)}'" for name, (summary, _) in commands.items())
    cases = "\n".join(
        f"    {name}) _arguments "
        + " ".join(f"'{word}[{_quoted(option.help)}]{value(option)}'" for word, option in options.items())
        + " '*:file:_files' ;;"
        for name, (_, options) in commands.items()
    )
    return f"""#compdef looper
_looper() {{
  local -a verbs=(
{verbs}
  )
  if (( CURRENT == 2 )); then
    _describe command verbs
    return
  fi
  local verb=$words[2]
  shift words; (( CURRENT-- ))
  case $verb in
{cases}
  esac
}}
_looper "$@"
"""


def _fish(commands: Commands) -> str:
    lines = ["complete -c looper -n __fish_use_subcommand -f"]
    for name, (summary, options) in commands.items():
        lines.append(f"complete -c looper -n __fish_use_subcommand -a {name} -d '{_quoted(summary)}'")
        for word, option in options.items():
            parts = [f"complete -c looper -n '__fish_seen_subcommand_from {name}'"]
            parts += [f"-l {word.removeprefix('--')} -d '{_quoted(option.help)}'"]
            if option.choices:
                parts.append(f"-x -a '{' '.join(option.choices)}'")
            elif not option.flag:
                parts.append("-r")
            lines.append(" ".join(parts))
    return "\n".join(lines) + "\n"
