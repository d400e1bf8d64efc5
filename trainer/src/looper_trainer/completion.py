"""`looper completion SHELL`: a completion script for bash, zsh or fish, made from the commands themselves.

looper completion bash > ~/.local/share/bash-completion/completions/looper
looper completion zsh > "${fpath[1]}/_looper"
looper completion fish > ~/.config/fish/completions/looper.fish
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from looper_trainer.config import StageConfig


class CompletionConfig(StageConfig):
    """Print a completion script for your shell."""

    shell: Annotated[Literal["bash", "zsh", "fish"], Field(description="which shell")]


def script(shell: str, commands: Mapping[str, tuple[str, Mapping[str, str]]]) -> str:
    """The script for `shell`.

    Args:
        shell: bash, zsh or fish.
        commands: summary and options (with their help) of each command.
    """
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


Commands = Mapping[str, tuple[str, Mapping[str, str]]]


def _bash(commands: Commands) -> str:
    cases = "\n".join(
        f'    {name}) options="{" ".join(["--help", *options])}" ;;'
        for name, (_, options) in commands.items()
    )
    return f"""_looper() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" options=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _looper looper
"""


def _quoted(text: str) -> str:
    return text.replace("\\", "").replace("'", "").replace("[", "(").replace("]", ")").replace(":", " ")


def _zsh(commands: Commands) -> str:
    verbs = "\n".join(f"    '{name}:{_quoted(summary)}'" for name, (summary, _) in commands.items())
    cases = "\n".join(
        f"    {name}) _arguments "
        + " ".join(f"'{option}[{_quoted(text)}]:value:_files'" for option, text in options.items())
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
        for option, text in options.items():
            after = f"complete -c looper -n '__fish_seen_subcommand_from {name}' -r"
            lines.append(f"{after} -l {option.removeprefix('--')} -d '{_quoted(text)}'")
    return "\n".join(lines) + "\n"
