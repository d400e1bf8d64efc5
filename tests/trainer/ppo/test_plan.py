"""Memory told before anything is loaded, against published sizes of Llama-3.1-8B and sums worked by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from looper_trainer.config import load_config, save_resolved
from looper_trainer.errors import ConfigError
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.plan import check_fit, make_plan, read_shape

from ..conftest import RunLooper

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(scope="module")
def shape_8b(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    (folder / "model.safetensors").write_bytes(b"never read")
    return str(folder)


def preset(name: str, model: str, **settings: str) -> PPOConfig:
    return load_config(PPOConfig, None, {"preset": name, "model": model, "sampler": "vllm"} | settings)


def test_an_8b_model_is_counted_as_published(shape_8b: str) -> None:
    shape = read_shape(PPOConfig(model=shape_8b, dtype="bfloat16", lora_rank=16))
    assert shape.parameters == 8_030_261_248  # Llama-3.1-8B
    assert shape.adapter == 41_943_040  # LoRA r16 on all linear layers
    assert shape.cache_bytes_per_token == 128 * 1024


@pytest.mark.parametrize("name", ["80gb", "40gb", "24gb"])
def test_every_preset_fits_its_card_and_leaves_the_server_room(name: str, shape_8b: str) -> None:
    config = preset(name, shape_8b)
    plan = make_plan(config)
    check_fit(config)
    assert plan.peak_gb < float(name.removesuffix("gb"))
    assert plan.server_gb - plan.server_weights_gb > 4


def test_the_sums_are_those_of_the_parts(shape_8b: str) -> None:
    plan = make_plan(preset("80gb", shape_8b))
    assert plan.frozen_gb == pytest.approx(16.06, abs=0.01)
    assert plan.trained_gb == pytest.approx(0.671, abs=0.001)  # 41.9M x (4 weight + 4 gradient + 8 moments)
    assert plan.training_gb == pytest.approx(0.6 + 16.06 + 0.671 + plan.activations_gb + 38.6, abs=0.01)
    turns = make_plan(preset("40gb", shape_8b))
    assert turns.training_gb == pytest.approx(turns.trainer_gb + 2.0)
    assert turns.sampling_gb == pytest.approx(0.6 + 0.671 + 34.6, abs=0.01)
    small = make_plan(preset("24gb", shape_8b))
    assert small.frozen_gb == pytest.approx(5.7, abs=0.1)  # NF4: 5.3 GiB


def test_a_reference_on_the_sampler_moves_one_pass_in_the_estimate(
    shape_8b: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("looper_trainer.ppo.plan._mean_prompt_tokens", lambda *_: 150.0)

    def seconds(**settings: str) -> list[float]:
        config = preset("80gb", shape_8b, vllm_devices="1", batch_size="64", **settings)
        told = make_plan(config).describe(config, []).splitlines()[-1]
        return [float(x) for x in re.findall(r"(?:sample|logprobs|update) (\d+\.\d)", told)]

    own, given = seconds(), seconds(reference_on_sampler="true")
    assert own[1] > 1
    assert given[0] - own[0] == pytest.approx(own[1] / 2, abs=0.11)  # printed to tenths
    assert given[1] == pytest.approx(own[1] / 2, abs=0.11)
    assert given[2] == own[2]


def test_what_cannot_fit_is_refused_with_the_sums(shape_8b: str) -> None:
    with pytest.raises(ConfigError, match=r"does not fit 40.0 GB.*frozen weights 16.1") as error:
        check_fit(preset("40gb", shape_8b, offload="false", vllm_sleep="false"))
    numbers = [float(x) for x in re.findall(r"(?<= )\d+\.\d", str(error.value))]
    total, parts = numbers[1], numbers[2:]
    assert sum(parts) == pytest.approx(total, abs=0.3)
    with pytest.raises(ConfigError, match="nothing for keys and values"):
        check_fit(preset("24gb", shape_8b, quantize="none"))


@pytest.mark.parametrize(
    ("devices", "visible", "rank", "servers", "here"),
    [
        (None, "", 0, 2, 2),
        ("1", "", 0, 1, 0),  # the trainer's is card 0
        ("0", "", 0, 1, 1),
        ("0, 1", "", 1, 2, 1),  # one each
        ("0,1", "", 0, 3, 2),  # dealt out in turn
        ("1", "", 1, 1, 1),  # the second of a launcher's processes
        ("0", "3,5", 0, 1, 0),  # the trainer sees card 3 as its first
        ("5", "3,5", 1, 1, 1),
    ],
)
def test_a_server_counts_where_it_shares_the_trainers_card(
    shape_8b: str, monkeypatch: pytest.MonkeyPatch,
    devices: str | None, visible: str, rank: int, servers: int, here: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    more = {} if devices is None else {"vllm_devices": devices}
    config = preset("80gb", shape_8b, vllm_servers=str(servers), **more)
    plan = make_plan(config)
    assert plan.server_weights_gb == pytest.approx(here * 16.06, abs=0.01)
    assert plan.server_gb == pytest.approx(38 + 0.6 * here if here else 0)
    reference = config.model_copy(update={"reference_on_sampler": True})
    if here and devices:
        with pytest.raises(ConfigError, match="names the one that trains"):
            check_fit(reference)
    elif not here:
        check_fit(reference)


def test_what_is_given_wins_over_the_preset_and_is_read_back_equal(shape_8b: str, tmp_path: Path) -> None:
    config = preset("24gb", shape_8b, micro_batch_tokens="512")
    assert (config.micro_batch_tokens, config.quantize, config.memory_limit_gb) == (512, "nf4", 24.0)
    file = save_resolved(config, tmp_path)
    assert load_config(PPOConfig, file, {}) == config


def test_a_dry_run_prints_the_plan_and_touches_nothing(
    looper: RunLooper, tiny_model: Path, gsm8k_file: Path, tmp_path: Path
) -> None:
    looper("prepare-data", "--input", gsm8k_file, "--output", tmp_path / "data")
    done = looper(
        "ppo", "--dry-run", "--model", tiny_model, "--train-file", tmp_path / "data" / "gsm8k_train.jsonl",
        "--dev-file", "none", "--batch-size", "4", "--max-new-tokens", "10", "--steps", "3600",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a step: 4 questions x 4 completions, at most 160 sampled tokens" in done.stdout
    assert "for 3600 steps" in done.stdout
    assert not (tmp_path / "checkpoints").exists()
