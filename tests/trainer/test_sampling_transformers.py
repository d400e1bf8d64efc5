"""The decode loop against `transformers.generate`, against exact distributions, and against itself."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from looper_schemas.prompt import format_prompt
from looper_trainer.errors import CheckpointError, ConfigError
from looper_trainer.sampling.base import SamplingParams
from looper_trainer.sampling.transformers import TransformersSampler, choose_tokens, load_sampler

QUESTIONS = [
    "Ann has 3 apples. How many?",
    "Ben has 14 apples and buys 20 more. How many apples does he have now?",
    "One?",
    "Cora buys 2 apples, then 3 apples, then 4 apples, and eats 5 apples. How many apples are left over?",
]


@pytest.fixture(scope="module")
def sampler(tiny_model: Path) -> TransformersSampler:
    return load_sampler(str(tiny_model), device="cpu")


@pytest.fixture(scope="module")
def prompts(sampler: TransformersSampler) -> list[list[int]]:
    return [sampler.encode(format_prompt(question)) for question in QUESTIONS]


def raw_logits(sampler: TransformersSampler, ids: list[int]) -> Tensor:
    """Logits (T, V) of one unpadded forward pass without a cache: the oracle of the decode loop."""
    with torch.no_grad():
        return sampler.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()


def test_prompts_begin_with_one_bos_and_do_not_end_in_eos(sampler: TransformersSampler) -> None:
    ids = sampler.encode("Ann has 3 apples.")
    assert ids.count(sampler.tokenizer.bos_token_id) == 1
    assert ids[0] == sampler.tokenizer.bos_token_id
    assert ids[-1] != sampler.tokenizer.eos_token_id


def test_greedy_gives_the_tokens_of_generate(sampler: TransformersSampler, prompts: list[list[int]]) -> None:
    ours = sampler.sample(prompts, SamplingParams(24, temperature=0), [[0]] * len(prompts))
    for prompt, (completion,) in zip(prompts, ours, strict=True):
        theirs = sampler.model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        assert list(completion.token_ids) == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_logprobs_are_those_of_a_plain_forward_pass(
    sampler: TransformersSampler, prompts: list[list[int]], temperature: float
) -> None:
    samples = sampler.sample(prompts, SamplingParams(12, temperature=temperature), [[5, 6]] * len(prompts))
    for prompt, completions in zip(prompts, samples, strict=True):
        for completion in completions:
            logits = raw_logits(sampler, prompt + list(completion.token_ids))[len(prompt) - 1 : -1]
            expected = (logits / temperature).log_softmax(-1)
            chosen = expected[torch.arange(len(completion.token_ids)), list(completion.token_ids)]
            assert completion.logprobs == pytest.approx(chosen.tolist(), abs=1e-5)


def test_first_tokens_follow_the_exact_distribution(
    sampler: TransformersSampler, prompts: list[list[int]]
) -> None:
    n = 4000
    probs = (raw_logits(sampler, prompts[0])[-1] / 1.2).softmax(-1)
    (completions,) = sampler.sample(prompts[:1], SamplingParams(1, temperature=1.2), [list(range(n))])
    counts = torch.bincount(
        torch.tensor([completion.token_ids[0] for completion in completions]), minlength=len(probs)
    )
    common = probs * n >= 5  # the rare ones share one cell
    observed = [*counts[common].tolist(), int(counts[~common].sum())]
    expected = [*(probs[common] * n).tolist(), float(probs[~common].sum() * n)]
    assert len(observed) > 20
    assert chisquare(observed, expected).pvalue > 1e-3


def test_second_tokens_follow_the_distribution_after_the_first(
    sampler: TransformersSampler, prompts: list[list[int]]
) -> None:
    n = 6000
    (completions,) = sampler.sample(prompts[2:3], SamplingParams(2), [list(range(n))])
    firsts = [completion.token_ids[0] for completion in completions]
    first = max(set(firsts), key=firsts.count)
    seconds = [c.token_ids[1] for c in completions if c.token_ids[0] == first and len(c.token_ids) > 1]
    probs = raw_logits(sampler, [*prompts[2], first])[-1].softmax(-1)
    counts = torch.bincount(torch.tensor(seconds), minlength=len(probs))
    common = probs * len(seconds) >= 5
    observed = [*counts[common].tolist(), int(counts[~common].sum())]
    expected = [*(probs[common] * len(seconds)).tolist(), float(probs[~common].sum() * len(seconds))]
    assert len(observed) > 3
    assert chisquare(observed, expected).pvalue > 1e-3


def test_a_completion_depends_on_its_prompt_and_seed_alone(
    sampler: TransformersSampler, prompts: list[list[int]], tiny_model: Path
) -> None:
    params = SamplingParams(16)
    together = sampler.sample(prompts, params, [[1, 2, 3]] * 4)
    alone = [[sampler.sample([p], params, [[seed]])[0][0] for seed in (1, 2, 3)] for p in prompts]
    small = TransformersSampler(sampler.model, sampler.tokenizer, batch_size=5)
    reordered = small.sample(prompts[::-1], params, [[3, 2, 1]] * 4)
    for i in range(4):
        for j in range(3):
            for other in (alone[i][j], reordered[3 - i][2 - j]):
                assert other.token_ids == together[i][j].token_ids
                assert other.logprobs == pytest.approx(together[i][j].logprobs, abs=1e-5)
    assert len({completion.token_ids for row in together for completion in row}) == 12


def test_a_longer_limit_only_adds_tokens(sampler: TransformersSampler, prompts: list[list[int]]) -> None:
    short = sampler.sample(prompts, SamplingParams(5), [[7]] * 4)
    long = sampler.sample(prompts, SamplingParams(15), [[7]] * 4)
    for (a,), (b,) in zip(short, long, strict=True):
        assert b.token_ids[: len(a.token_ids)] == a.token_ids


def test_rows_end_at_eos_and_keep_it_though_it_is_the_padding_token(
    sampler: TransformersSampler, prompts: list[list[int]]
) -> None:
    eos = sampler.tokenizer.eos_token_id
    assert eos == sampler.tokenizer.pad_token_id
    rows = sampler.sample(prompts, SamplingParams(150), [list(range(16))] * 4)
    completions = [completion for row in rows for completion in row]
    stopped = [completion for completion in completions if completion.finish_reason == "stop"]
    assert len(stopped) > 0
    for completion in completions:
        assert len(completion.logprobs) == len(completion.token_ids)
        if completion.finish_reason == "stop":
            assert completion.token_ids.index(eos) == len(completion.token_ids) - 1
            body = [i for i in completion.token_ids[:-1] if i != sampler.tokenizer.bos_token_id]
            assert sampler.tokenizer.decode(body) == completion.text
        else:
            assert eos not in completion.token_ids
            assert len(completion.token_ids) == 150
        assert sampler.tokenizer.eos_token not in completion.text


def test_any_of_several_eos_ids_ends_a_row(sampler: TransformersSampler, prompts: list[list[int]]) -> None:
    free = TransformersSampler(sampler.model, sampler.tokenizer, eos_ids=[])
    (whole,) = free.sample(prompts[:1], SamplingParams(20), [[3]])[0]
    assert whole.finish_reason == "length"
    stops = TransformersSampler(sampler.model, sampler.tokenizer, eos_ids=[whole.token_ids[4], 10**6])
    (cut,) = stops.sample(prompts[:1], SamplingParams(20), [[3]])[0]
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[4]) + 1]
    assert cut.finish_reason == "stop"


def test_training_mode_and_gradients_are_left_as_they_were(
    sampler: TransformersSampler, prompts: list[list[int]]
) -> None:
    sampler.model.train()
    try:
        sampler.sample(prompts[:1], SamplingParams(2), [[0]])
        assert sampler.model.training
        assert all(parameter.requires_grad for parameter in sampler.model.parameters())
    finally:
        sampler.model.eval()


def test_no_completions_and_no_prompts_are_fine(
    sampler: TransformersSampler, prompts: list[list[int]]
) -> None:
    assert sampler.sample([], SamplingParams(4), []) == []
    assert [len(row) for row in sampler.sample(prompts[:2], SamplingParams(4), [[], [1]])] == [0, 1]


@pytest.mark.parametrize(
    "bad",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"temperature": math.nan}],
)
def test_impossible_parameters_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


# The choice of one token, on distributions small enough to work out by hand.

LOGITS = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.6001, 3), (0.9999999, 3)],
)
def test_uniform_numbers_invert_the_cumulative_distribution(uniform: float, token: int) -> None:
    chosen, logprobs = choose_tokens(LOGITS, SamplingParams(1), [uniform])
    assert chosen.item() == token
    assert logprobs.item() == pytest.approx(math.log((token + 1) / 10))


def test_temperature_sharpens_before_the_draw() -> None:
    # At T = 1/2 the weights 1, 2, 3, 4 become 1, 4, 9, 16 of 30.
    for uniform, token in ((0.03, 0), (0.05, 1), (0.2, 2), (0.5, 3)):
        chosen, logprobs = choose_tokens(LOGITS, SamplingParams(1, temperature=0.5), [uniform])
        assert chosen.item() == token
        assert logprobs.item() == pytest.approx(math.log((token + 1) ** 2 / 30))


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, [3]), (0.41, [2, 3]), (0.7, [2, 3]), (0.71, [1, 2, 3])])
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p: float, kept: list[int]) -> None:
    mass = sum(token + 1 for token in kept)
    seen = set()
    for step in range(100):
        chosen, logprobs = choose_tokens(LOGITS.double(), SamplingParams(1, top_p=top_p), [step / 100])
        seen.add(chosen.item())
        assert logprobs.item() == pytest.approx(math.log((chosen.item() + 1) / mass), abs=1e-6)
    assert seen == set(kept)


def test_greedy_takes_the_mode_with_its_own_probability() -> None:
    chosen, logprobs = choose_tokens(LOGITS, SamplingParams(1, temperature=0, top_p=0.5), None)
    assert (chosen.item(), logprobs.item()) == (3, pytest.approx(math.log(0.4)))


@given(
    logits=st.lists(st.floats(-30, 30) | st.just(-math.inf), min_size=2, max_size=50),
    uniform=st.floats(0, 1, exclude_max=True),
    top_p=st.floats(0.01, 1),
)
def test_a_token_without_mass_is_never_drawn(logits: list[float], uniform: float, top_p: float) -> None:
    if max(logits) == -math.inf:
        logits[0] = 0.0
    chosen, logprobs = choose_tokens(torch.tensor([logits]), SamplingParams(1, top_p=top_p), [uniform])
    assert 0 <= chosen.item() < len(logits)
    assert logits[int(chosen.item())] > -math.inf
    assert -math.inf < logprobs.item() <= 0


def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for name in ("empty", "weightless", "file", "absent"):
        with pytest.raises(CheckpointError) as caught:
            load_sampler(str(tmp_path / name))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_unknown_devices_and_dtypes_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="unknown device"):
        load_sampler(str(tiny_model), device="abacus")
    for device in ("mps:9", "xpu:99", "cuda:99", "meta"):
        with pytest.raises(
            ConfigError, match=f"device {device}: this machine has [0-9]+ .* devices; use auto"
        ):
            load_sampler(str(tiny_model), device=device)
    with pytest.raises(ConfigError, match="unknown dtype"):
        load_sampler(str(tiny_model), dtype="int8")


def test_eos_ids_come_from_generation_config_and_tokenizer() -> None:
    from looper_trainer.sampling.transformers import default_eos_ids

    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[3, 4]))
    tokenizer: Any = SimpleNamespace(eos_token_id=5)
    assert default_eos_ids(model, tokenizer) == {3, 4, 5}
