"""What the base model practises: true sums, and nothing else."""

from __future__ import annotations

import random
import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from looper_trainer.demo.model import train_tokenizer
from looper_trainer.demo.sums import SumsPlan, practise_sums, random_sum

TOKENIZER = train_tokenizer(["Answer: #### 12\n 3 + 4 = 7 * - /"], 300)


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **sizes))


def test_every_sum_is_true_whole_and_not_negative() -> None:
    rng, operators = random.Random(0), set()
    for _ in range(2000):
        a, operator, b, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", random_sum(rng)).groups()
        operators.add(operator)
        if operator == "/":
            assert int(a) == int(b) * int(result)
        else:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator] == int(result)
    assert operators == set("+-*/")


def test_practice_lowers_the_loss_and_says_how_far_it_is() -> None:
    said: list[str] = []
    first = practise_sums(small_llama(), TOKENIZER, 0, SumsPlan(steps=1, pages=4), said.append)
    later = practise_sums(small_llama(), TOKENIZER, 0, SumsPlan(steps=60, pages=4), said.append)
    assert later < first - 0.5
    assert said[-1].startswith("base: sums 60/60, loss ")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    models = [small_llama() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        practise_sums(model, TOKENIZER, seed, SumsPlan(steps=3, pages=2), lambda _: None)
    same, again, other = (model.lm_head.weight for model in models)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
