"""What the demo's base model knows before SFT: sums, and nothing of words.

A base model has read a lot; this one reads pages of single calculations such as `48 - 36 = 12` until it does
them reliably. It cannot read a question: that is what SFT teaches, and what its accuracy of about zero shows.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LARGEST_ADDEND, LARGEST_FACTOR = 45, 12


@dataclass(frozen=True)
class SumsPlan:
    """How long to practise: `steps` optimizer steps on `pages` pages of `page_tokens` tokens each."""

    steps: int = 1400
    pages: int = 16
    page_tokens: int = 128
    learning_rate: float = 3e-3


def random_sum(rng: random.Random) -> str:
    """One calculation with one operator; its operands and result are whole and not negative."""
    kind = rng.choices("+-*/", weights=(35, 30, 25, 10))[0]
    if kind in "+-":
        a, b = rng.randint(1, LARGEST_ADDEND), rng.randint(1, LARGEST_ADDEND)
        return f"{a} + {b} = {a + b}" if kind == "+" else f"{a + b} - {b} = {a}"
    a, b = rng.randint(2, LARGEST_FACTOR), rng.randint(2, LARGEST_FACTOR)
    return f"{a} * {b} = {a * b}" if kind == "*" else f"{a * b} / {b} = {a}"


def practise_sums(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    plan: SumsPlan,
    say: Callable[[str], None] = print,
) -> float:
    """Train `model` in place on pages of sums; returns the mean loss of the last steps, in nats a token."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.0)
    pages = _pages(tokenizer, random.Random(f"sums-{seed}"), plan.page_tokens)
    began, recent = time.monotonic(), 0.0
    for step in range(1, plan.steps + 1):
        ids_BT = torch.tensor([next(pages) for _ in range(plan.pages)], device=model.device)
        loss = _loss(model, ids_BT)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * _schedule(step / plan.steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = loss.item() if step == 1 else 0.95 * recent + 0.05 * loss.item()
        if step % 100 == 0 or step == plan.steps:
            left = (time.monotonic() - began) / step * (plan.steps - step)
            say(f"base: sums {step}/{plan.steps}, loss {recent:.3f}, {timedelta(seconds=round(left))} left")
    model.eval()
    return recent


def _loss(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    from torch.nn import functional

    logits_BTV = model(input_ids=ids_BT[:, :-1]).logits
    return functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())


def _schedule(progress: float) -> float:
    """Warm up over the first twentieth, then a cosine down to a twentieth."""
    return min(progress * 20, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def _pages(tokenizer: PreTrainedTokenizerBase, rng: random.Random, tokens: int) -> Iterator[list[int]]:
    """Pages of exactly `tokens` tokens: BOS, then sums, each on a line, the last one cut."""
    known: dict[str, list[int]] = {}

    def encoded(text: str) -> list[int]:
        # A sum follows a label in a solution, so its first number has a space before it.
        if text not in known:
            known[text] = tokenizer(f" {text}\n", add_special_tokens=False)["input_ids"]
        return known[text]

    while True:
        page = [tokenizer.bos_token_id]
        while len(page) < tokens:
            page += encoded(random_sum(rng))
        yield page[:tokens]
