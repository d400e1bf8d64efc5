"""The demonstration runs all eight arms on a real, tiny model, and says what is wrong when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from regime_w.arms import build_all_arms
from regime_w.demo import main


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights over bytes, with no chat template."""
    import tokenizers
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate(["</s>", *sorted(alphabet)])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
        eos_token_id=0,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_all_eight_arms_are_run_scored_and_rewarded(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_model), "--question", "What is 2 + 3?", "--gold", "5"]
    assert main([*arguments, "--max-new-tokens", "12"]) == 0
    first = capsys.readouterr().out
    for arm in build_all_arms():
        assert first.count(arm.name) == 2  # once for its answer, once for its reward
    assert all(name in first for name in ("s_end", "s_path", "s_cf", "s_wm", "reward (arm_gated)"))
    assert main([*arguments, "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == first  # each arm has its own seed


@pytest.mark.slow
def test_a_model_that_is_not_there_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tmp_path / "nothing")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_gold_needs_a_question(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--model", "m", "--gold", "5"])
    assert stop.value.code == 2
