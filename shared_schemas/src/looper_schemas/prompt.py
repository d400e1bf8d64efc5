"""The one prompt that SFT, rollouts, PPO and evaluation share.

A model is trained on `format_prompt(question) + " " + format_target(cot, answer)`-shaped text, so every
other stage must ask with exactly the same bytes.
"""

from __future__ import annotations

PROMPT_TEMPLATE = (
    "You are a careful math tutor. Solve the problem step by step, then give the final numeric answer.\n\n"
    "Problem:\n{q}\n\nSolution:"
)
TARGET_TEMPLATE = "{cot}\nAnswer: #### {a}"


def format_prompt(question: str) -> str:
    """The prompt for `question`, which is inserted verbatim (braces in it are plain text)."""
    return PROMPT_TEMPLATE.replace("{q}", question)


def format_target(cot: str, answer: str) -> str:
    """The completion that SFT teaches: reasoning, then the final answer line."""
    return f"{cot}\nAnswer: #### {answer}"
