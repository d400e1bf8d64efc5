"""The shared trunk against the plain transformers forward pass of one row at a time."""

from __future__ import annotations

import random
import shutil
from typing import Literal

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from looper_trainer.errors import CheckpointError
from looper_trainer.ppo.batch import MicroBatch, Row, micro_batch, plan_micro_batches, plan_packs
from looper_trainer.ppo.policy import Policy, chunked_logprobs

from .conftest import EOS_ID, make_model, make_policy


def make_rows(count: int = 5, seed: int = 0) -> list[Row]:
    """Rows of random lengths; pairs share a prompt."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for i in range(count):
        prompt = rows[-1].prompt_ids if i % 2 else [rng.randrange(80) for _ in range(rng.randrange(1, 9))]
        completion = [rng.randrange(80) for _ in range(rng.randrange(1, 9))]
        rows.append(Row(prompt, completion, [0.0] * len(completion)))
    return rows


def whole_batch(rows: list[Row], pad_id: int = 0) -> MicroBatch:
    return micro_batch(rows, plan_packs(rows, range(len(rows)), 100), pad_id=pad_id)


def naive(policy: Policy, row: Row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs, entropies and values of one row's completion from full logits, without padding."""
    ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
    output = policy.model(input_ids=ids, output_hidden_states=True)
    start, end = len(row.prompt_ids) - 1, ids.shape[1] - 1
    distribution = torch.distributions.Categorical(logits=output.logits[0, start:end])
    logprobs = distribution.log_prob(torch.tensor(row.completion_ids))
    values = policy.value_head(output.hidden_states[-1][0, start:end])[:, 0]
    return logprobs, distribution.entropy(), values


def test_logprobs_entropies_and_values_equal_those_of_each_row_alone() -> None:
    policy, rows = make_policy(logit_chunk_tokens=3), make_rows()
    output = policy(whole_batch(rows))
    for line, row in enumerate(rows):
        n = len(row.completion_ids)
        for ours, theirs in zip(output, naive(policy, row), strict=True):
            torch.testing.assert_close(ours[line, :n], theirs, rtol=1e-5, atol=1e-5)
            assert not ours[line, n:].any()


def test_the_reference_is_the_base_model_without_its_adapter() -> None:
    policy, rows = make_policy(), make_rows()
    base = make_model().eval()  # the same seed, never wrapped
    ref_logprobs = policy.ref_logprobs(whole_batch(rows))
    for line, row in enumerate(rows):
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        logits = base(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(ref_logprobs[line, : len(expected)], expected, rtol=1e-5, atol=1e-5)
    # and the adapter is on again afterwards, and differs
    assert (policy(whole_batch(rows)).logprobs_nT - ref_logprobs).abs().max() > 0.01


def test_a_new_policy_is_its_reference_and_values_everything_at_zero() -> None:
    policy, batch = Policy(make_model().requires_grad_(False).eval()), whole_batch(make_rows())
    output = policy(batch)
    assert torch.equal(output.logprobs_nT, policy.ref_logprobs(batch))
    assert not output.values_nT.any()


def test_the_padding_id_changes_no_bit_even_when_it_is_the_eos() -> None:
    policy, rows = make_policy(), make_rows()
    rows[0] = Row([7, EOS_ID, 4], [EOS_ID, 9, EOS_ID], [0.0] * 3)
    plain = policy(whole_batch(rows, pad_id=0))
    for pad_id in (EOS_ID, 33):
        other = policy(whole_batch(rows, pad_id=pad_id))
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_longer_neighbours_change_nothing() -> None:
    policy, rows = make_policy(), make_rows()
    longer = Row([3] * 20, [4] * 30, [0.0] * 30)
    alone = policy(micro_batch(rows, [[2]])).logprobs_nT[0]
    beside = policy(micro_batch([*rows, longer], [[len(rows)], [2]])).logprobs_nT[1]
    torch.testing.assert_close(beside[: len(alone)], alone, rtol=1e-5, atol=1e-5)
    assert not beside[len(alone) :].any()


def test_arms_in_a_pack_do_not_see_each_other() -> None:
    policy = make_policy()
    mine, loud = Row([5, 6, 7], [8, 9], [0.0] * 2), Row([5, 6, 7], [10] * 12, [0.0] * 12)
    alone = policy(micro_batch([mine], [[0]])).logprobs_nT[0]
    for pack in ([0, 1], [1, 0]):
        together = policy(micro_batch([mine, loud], [pack])).logprobs_nT[pack.index(0), :2]
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_temperature_divides_the_logits_of_policy_and_reference() -> None:
    rows = make_rows(1)
    cold, warm = make_policy(temperature=1.0), make_policy(temperature=2.0)
    ids = torch.tensor([[*rows[0].prompt_ids, *rows[0].completion_ids]])
    logits = cold.model(input_ids=ids).logits[0, len(rows[0].prompt_ids) - 1 : -1]
    expected = (logits / 2).log_softmax(-1).gather(1, torch.tensor(rows[0].completion_ids)[:, None])[:, 0]
    torch.testing.assert_close(warm(whole_batch(rows)).logprobs_nT[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_gradients_of_chunked_logprobs_equal_autograd_on_full_logits(chunk: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=False, dtype=torch.float64)
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (7,))
    upstream = torch.randn(2, 7)  # float32, as the function's results

    distribution = torch.distributions.Categorical(logits=head(hidden) / 1.7)
    expected = torch.stack([distribution.log_prob(targets), distribution.entropy()])
    gradients = torch.autograd.grad((expected * upstream).sum(), [hidden, head.weight])

    ours = torch.stack(chunked_logprobs(hidden, targets, head, temperature=1.7, chunk=chunk))
    our_gradients = torch.autograd.grad((ours * upstream).sum(), [hidden, head.weight])
    torch.testing.assert_close(ours, expected.float())
    for ours_one, expected_one in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(ours_one, expected_one, rtol=1e-5, atol=1e-6)


def test_backward_never_holds_logits_of_more_than_a_chunk() -> None:
    head, hidden = torch.nn.Linear(6, 50, bias=False), torch.randn(40, 6, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        chunked_logprobs(hidden, torch.zeros(40, dtype=torch.long), head, chunk=4)
    assert sum(saved) < 40 * 50  # autograd on full logits keeps several tensors of 40 x 50
    assert max(saved) <= 4 * 50


def test_without_entropy_gradient_the_entropy_is_the_same_number_and_a_constant() -> None:
    policy, batch = make_policy(), whole_batch(make_rows())
    with_gradient, without = policy(batch, with_entropy_gradient=True), policy(batch)
    assert torch.equal(with_gradient.entropy_nT, without.entropy_nT)
    assert with_gradient.entropy_nT.requires_grad
    assert not without.entropy_nT.requires_grad


def test_only_adapter_and_value_head_learn_and_critic_only_leaves_the_adapter_alone() -> None:
    policy, batch = make_policy(), whole_batch(make_rows())
    output = policy(batch)
    (output.logprobs_nT.sum() + output.values_nT.sum()).backward()
    learning = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {n for n, p in policy.named_parameters() if "lora_" in n or n.startswith("value_head")}
    policy.zero_grad(set_to_none=True)
    policy.values(batch).sum().backward()
    assert {n for n, p in policy.named_parameters() if p.grad is not None} == {
        "value_head.weight",
        "value_head.bias",
    }


def test_activation_checkpointing_changes_neither_outputs_nor_gradients() -> None:
    batch = whole_batch(make_rows())
    gradients = []
    for on in (False, True):
        policy = make_policy(activation_checkpointing=on)
        with policy.updating():
            policy(batch).logprobs_nT.sum().backward()
        gradients.append([p.grad for p in policy.adapter_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_architecture_that_changes_its_logits_after_the_head_is_refused() -> None:
    model = make_model().requires_grad_(False).eval()
    forward = model.forward

    def capped(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output

    model.forward = capped
    with pytest.raises(CheckpointError, match="one output layer"):
        Policy(model)


def test_an_architecture_that_ignores_the_attention_mask_is_refused() -> None:
    model = make_model().requires_grad_(False).eval()
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **(kwargs | {"attention_mask": None}))
    with pytest.raises(CheckpointError, match="causal attention"):
        Policy(model)


SIZES = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 24,
    "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": EOS_ID, "bos_token_id": 2,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 12,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": 12}


@pytest.mark.parametrize(
    ("kind", "settings", "longest"),
    [
        ("mistral", {"sliding_window": 12}, 12),
        ("mistral", {"sliding_window": None}, None),
        ("gemma3_text", {"sliding_window": 12, "initializer_range": 0.2}, 12),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}, 12),
        ("qwen2", {"sliding_window": 12}, None),
        ("llama", {"rope_parameters": DYNAMIC}, 24),
        ("llama", {"rope_parameters": LONG}, 12),
        ("llama", {"rope_parameters": YARN}, None),
    ],
)
def test_texts_up_to_the_longest_are_reproduced_and_longer_ones_are_not(
    kind: str, settings: dict[str, object], longest: int | None
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | settings)
    policy = Policy(AutoModelForCausalLM.from_config(config).requires_grad_(False).eval(), lora_rank=2)
    assert policy.longest_text == longest

    def gap(length: int) -> float:
        prompt = [5, 9, 13]
        rows = [Row(prompt, [(7 * i + n) % 70 for i in range(n - 3)], [0.0] * (n - 3)) for n in (6, length)]
        packed = policy(micro_batch(rows, [[0, 1]])).logprobs_nT
        return max(
            float((packed[line, : len(row.completion_ids)] - naive(policy, row)[0]).detach().abs().max())
            for line, row in enumerate(rows)
        )

    assert gap(longest or 40) < 1e-4
    if longest:
        assert gap(longest + 12) > 1e-2


@pytest.mark.parametrize("train", ["lora", "full"])
def test_frozen_weights_that_left_and_returned_are_the_same_bits(train: Literal["lora", "full"]) -> None:
    policy = Policy(make_model().requires_grad_(False).eval(), lora_rank=4, train=train)
    (batch,) = plan_micro_batches(make_rows(3), range(3), 10_000)
    before, reference = policy(batch), policy.ref_logprobs(batch)
    trained = {id(p) for p in policy.adapter_parameters()}
    for _ in range(2):
        policy.leave_gpu()
        assert all(p.numel() == 0 for p in policy.reference.parameters() if id(p) not in trained)
        assert all(p.numel() for p in policy.adapter_parameters())
        policy.return_to_gpu()
        policy.return_to_gpu()  # once is enough
        assert torch.equal(policy(batch).logprobs_nT, before.logprobs_nT)
        assert torch.equal(policy.ref_logprobs(batch), reference)


class Casts(TorchDispatchMode):
    """Counts copies of bfloat16 tensors to float32."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.float32:
            self.count += args[0].dtype == torch.bfloat16
        return func(*args, **kwargs)


def test_in_bfloat16_no_adapter_copies_its_input_and_no_bit_changes() -> None:
    found = {}
    for casting in (False, True):
        model = make_model().to(torch.bfloat16).requires_grad_(False).eval()
        policy = Policy(model, lora_rank=4, lora_alpha=8)
        generator = torch.Generator().manual_seed(1)
        for weight in policy.adapter_parameters():
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        adapted = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
        if casting:  # as PEFT leaves it
            for module in adapted:
                module.cast_input_dtype_enabled = True
        with Casts() as casts:
            output = policy(whole_batch(make_rows()))
        output.logprobs_nT.sum().backward()
        gradients = [weight.grad for weight in policy.adapter_parameters()]
        assert all(gradient.any() for gradient in gradients)
        found[casting] = (casts.count, output.logprobs_nT, gradients)
    assert found[True][0] - found[False][0] == len(adapted) == 14
    assert torch.equal(found[True][1], found[False][1])
    for cast, not_cast in zip(found[True][2], found[False][2], strict=True):
        assert torch.equal(cast, not_cast)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
@pytest.mark.parametrize(("train", "dtype"), [("lora", torch.bfloat16), ("full", torch.float32)])
def test_compiled_layers_say_the_same_with_and_without_gradients_and_as_plain_ones(
    train: Literal["lora", "full"], dtype: torch.dtype
) -> None:
    torch.compiler.reset()
    batch = whole_batch(make_rows())
    found = {}
    for compiled in (False, True):
        counters.clear()
        model = make_model().to(dtype).requires_grad_(False).eval()
        policy = Policy(
            model, lora_rank=4, activation_checkpointing=True, train=train, torch_compile=compiled
        )
        generator = torch.Generator().manual_seed(1)
        for weight in policy.adapter_parameters():
            weight.data.add_(0.1 * torch.randn(weight.shape, generator=generator).to(weight.dtype))
        with torch.no_grad():
            measured = policy(batch).logprobs_nT
        with policy.updating():
            output = policy(batch)
            output.logprobs_nT.sum().backward()
        assert torch.equal(output.logprobs_nT, measured)  # the first ratio is exactly 1
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
        gradients = torch.cat([p.grad.flatten().float() for p in policy.adapter_parameters()])
        found[compiled] = (measured, policy.ref_logprobs(batch), gradients)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    for plain, compiled_ in zip(found[False], found[True], strict=True):
        scale = plain.abs().max()
        assert torch.allclose(compiled_ / scale, plain / scale, atol=tolerance)
    assert not torch.equal(found[True][0], found[True][1])  # the adapter, or the training, counts


def test_layers_that_cannot_be_compiled_are_said_to_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with pytest.raises(CheckpointError, match=r"torch_compile: .*needs a C compiler"):
        Policy(make_model().requires_grad_(False).eval(), torch_compile=True)
