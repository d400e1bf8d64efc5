"""`looper sft`: supervised fine-tuning with TRL's `SFTTrainer`, loss on the solution alone.

A training text is `format_prompt(question)`, a space, `format_target(cot, answer)` and EOS, tokenised here in
one pass: the prompt's ids are the very ids that every later stage asks with, BOS stands once, and EOS is
learnt also where it is the padding token, since labels come from lengths. Problems too long for the
model's window are left out and counted: cut off, they would teach to stop before the answer.

The result is one plain Hugging Face folder (a LoRA adapter is merged into its base once), with the settings
(`config.toml`), the log (`metrics.jsonl`) and digests of what it was trained on (`training_data.json`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from looper_schemas.prompt import format_prompt, format_target
from looper_schemas.records import Problem, read_records
from looper_trainer.config import NamedPath, StageConfig, save_resolved
from looper_trainer.errors import CheckpointError, DataError, UserError
from looper_trainer.folders import (
    check_output,
    differing,
    file_digest,
    policy_id,
    require_checkpoint,
    written_alone,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

DEFAULT_BASE = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
_SAY_EVERY_S = 5.0
_SETTINGS = "begun_with.json"  # of an interrupted run, until it is complete


class SFTStageConfig(StageConfig):
    """Supervised fine-tuning on question, solution and answer."""

    model: Annotated[str, Field(description="base model: a folder or a hub name")] = DEFAULT_BASE
    train_file: Annotated[Path, Field(description="problems to train on")] = Path("data/gsm8k_train.jsonl")
    dev_file: Annotated[
        Path | None, Field(description="problems for a loss after each epoch; none to skip it")
    ] = None
    dev_limit: Annotated[int, Field(ge=1, description="how many of them")] = 256
    output: Annotated[NamedPath, Field(description="folder of the resulting model")] = Path("checkpoints/sft")
    mode: Annotated[
        Literal["lora", "full"], Field(description="train an adapter and merge it, or every weight")
    ] = "lora"
    epochs: Annotated[float, Field(gt=0, description="passes over the data")] = 2.0
    learning_rate: Annotated[float, Field(gt=0, description="peak learning rate of AdamW")] = 1e-5
    scheduler: Annotated[
        Literal["constant_with_warmup", "linear", "cosine"], Field(description="after the warm-up")
    ] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1, description="share of the steps that warm up")] = 0.03
    batch_size: Annotated[int, Field(ge=1, description="problems in a forward pass")] = 16
    gradient_accumulation_steps: Annotated[int, Field(ge=1, description="passes in an optimizer step")] = 1
    weight_decay: Annotated[float, Field(ge=0, description="of AdamW")] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, description="gradients are clipped to this norm")] = 1.0
    max_length: Annotated[int, Field(ge=8, description="tokens; longer problems are left out")] = 1024
    lora_rank: Annotated[int, Field(ge=1, description="rank of the adapter on all linear layers")] = 16
    lora_alpha: Annotated[float, Field(gt=0, description="its scale is alpha / rank")] = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="dropout before the adapter")] = 0.0
    limit: Annotated[int | None, Field(ge=1, description="train on the first N problems only")] = None
    seed: Annotated[int, Field(ge=0, description="of order and adapter")] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="auto: a GPU if there is one")] = (
        "auto"
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="of the weights; auto: float32 on a CPU and for full, else bfloat16"),
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool | None, Field(description="recompute activations to save memory; none: on a GPU only")
    ] = None
    log_every: Annotated[int, Field(ge=1, description="optimizer steps between log lines")] = 10
    save_every: Annotated[
        int | None, Field(ge=1, description="optimizer steps between saved states, for --resume")
    ] = None
    resume: Annotated[bool, Field(description="continue an interrupted run from its last saved state")] = (
        False
    )


# What may differ when a run is resumed: it changes no weight.
_FREE_ON_RESUME = frozenset(
    {
        "resume",
        "output",
        "device",
        "dev_file",
        "dev_limit",
        "gradient_checkpointing",
        "log_every",
        "save_every",
    }
)


def run(config: SFTStageConfig) -> None:
    """Write `config.output`; an earlier model there is replaced only once the new one is complete.

    Raises:
        RecordError, DataError: the problems are missing or unusable.
        CheckpointError: the base model cannot be loaded, or the output is no place for a model, or an
            interrupted run is there that this one does not go on with.
    """
    writes = os.environ.get("RANK", "0") == "0"  # of a launcher's processes, the first
    lock = config.output.with_name(config.output.name + ".lock")
    with written_alone(config.output, lock) if writes else nullcontext():
        _train(config)


def _train(config: SFTStageConfig) -> None:
    check_output(config.output, config.model)
    require_checkpoint(config.model)
    train = read_records(config.train_file, Problem)[: config.limit]
    dev = read_records(config.dev_file, Problem)[: config.dev_limit] if config.dev_file else []
    partial = config.output.with_name(config.output.name + ".partial")
    settings = config.model_dump(mode="json", exclude=set(_FREE_ON_RESUME))
    weights = policy_id(config.model).rpartition("@")[2]  # wherever they lie
    settings |= {"train_file": file_digest(config.train_file), "model": weights}
    _check_saved_state(config, partial, settings)
    _quiet()
    trainer = _make_trainer(config, train, dev, partial)
    if trainer.is_world_process_zero() and not config.resume:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    trainer.train(resume_from_checkpoint=config.resume or None)
    if trainer.is_world_process_zero():
        _save(config, trainer, partial)
        training_data = describe_data(config.train_file, train)
        (partial / "training_data.json").write_text(json.dumps(training_data) + "\n", encoding="utf-8")
        save_resolved(config, partial)
        (partial / _SETTINGS).unlink(missing_ok=True)
        for folder in (*partial.glob("checkpoint-*"), partial / "adapter"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(config.output, ignore_errors=True)
        partial.rename(config.output)
        print(f"sft: {config.output} holds the model")


def _check_saved_state(config: SFTStageConfig, partial: Path, settings: dict[str, Any]) -> None:
    """Refuse to resume what is not there or was begun otherwise, and to throw away what can be resumed."""
    saved = any(partial.glob("checkpoint-*"))
    if not config.resume:
        if saved:
            raise CheckpointError(
                f"{partial}: holds the saved state of an interrupted run; go on with --resume, or remove it "
                "to begin anew"
            )
        return
    if not saved:
        raise CheckpointError(
            f"{partial}: holds no saved state; run without --resume (and with --save-every)"
        )
    if (partial / _SETTINGS).exists():
        before = json.loads((partial / _SETTINGS).read_text(encoding="utf-8"))
        if found := differing(before, settings):
            raise CheckpointError(
                f"{partial}: was begun with another {found}; use the same, or remove it to begin anew"
            )


def encode_problems(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], max_length: int
) -> tuple[dict[str, list[Any]], int]:
    """Columns `input_ids`, `labels` and `length` of the problems that fit, and how many do not.

    Labels are -100 on the prompt and the ids themselves on the solution and the EOS behind it.
    """
    eos_id = tokenizer.eos_token_id
    if not isinstance(eos_id, int):
        raise CheckpointError(
            "the tokenizer has no EOS token, so no model can learn to stop; use another base"
        )
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    too_long = 0
    if not problems:
        return columns, too_long
    prompts = [format_prompt(problem.question) for problem in problems]
    targets = [" " + format_target(problem.cot, problem.answer) for problem in problems]
    prompt_ids = tokenizer(prompts)["input_ids"]
    whole_ids = tokenizer([p + t for p, t in zip(prompts, targets, strict=True)])["input_ids"]
    for prompt, whole, target in zip(prompt_ids, whole_ids, targets, strict=True):
        asked, ids = _without_eos(prompt, eos_id), _without_eos(whole, eos_id)
        if ids[: len(asked)] != asked:
            # A token spans the boundary: keep the prompt that later stages will send.
            ids = asked + _without_eos(tokenizer(target, add_special_tokens=False)["input_ids"], eos_id)
        ids = [*ids, eos_id]
        if len(ids) > max_length:
            too_long += 1
            continue
        columns["input_ids"].append(ids)
        columns["labels"].append([-100] * len(asked) + ids[len(asked) :])
        columns["length"].append(len(ids))
    return columns, too_long


def _without_eos(ids: list[int], eos_id: int) -> list[int]:
    """Some tokenizers append EOS by themselves; we put it where we want it."""
    while len(ids) > 1 and ids[-1] == eos_id:
        ids = ids[:-1]
    return ids


def describe_data(file: Path, problems: Sequence[Problem]) -> dict[str, Any]:
    """What a model was trained on, so that an evaluation can tell whether it has seen a question.

    `questions` are SHA-256 digests of the questions in lower case with single spaces.
    """
    return {
        "file": str(file),
        "sha256": file_digest(file),
        "problems": len(problems),
        "questions": [question_digest(problem.question) for problem in problems],
    }


def question_digest(question: str) -> str:
    """SHA-256 of `question` in lower case with single spaces."""
    return hashlib.sha256(" ".join(question.casefold().split()).encode()).hexdigest()


class LengthGroupedOrder:
    """The order of an epoch: random batches of problems of similar length, to waste little on padding.

    A function of (seed, epoch) alone, so that a resumed run sees what the interrupted one would have seen;
    the libraries' own length grouping draws from a generator that a resume does not restore.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        shuffled = rng.sample(range(len(self)), len(self))
        pool = 32 * self.batch_size  # sorted within pools only, so that batches differ between epochs
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), pool):
            alike = sorted(shuffled[start : start + pool], key=lambda place: self.lengths[place])
            batches += [alike[i : i + self.batch_size] for i in range(0, len(alike), self.batch_size)]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rng.shuffle(whole)
        rest = [place for batch in batches if len(batch) < self.batch_size for place in batch]
        return iter([place for batch in whole for place in batch] + rest)


def _make_trainer(
    config: SFTStageConfig, train: Sequence[Problem], dev: Sequence[Problem], partial: Path
) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from looper_trainer.sampling.transformers import resolve_device

    on_gpu = resolve_device(config.device).type == "cuda"
    model, tokenizer = _load_base(config, on_gpu)
    window = getattr(model.config, "max_position_embeddings", None) or config.max_length
    longest = min(config.max_length, window)
    columns, too_long = encode_problems(tokenizer, train, longest)
    if not columns["input_ids"]:
        raise DataError(f"{config.train_file}: all problems exceed {longest} tokens; raise --max-length")
    dev_columns, _ = encode_problems(tokenizer, dev, longest)
    print(f"sft: {len(columns['length'])} problems to train on, {too_long} left out as too long", flush=True)
    checkpointing = on_gpu if config.gradient_checkpointing is None else config.gradient_checkpointing
    arguments = SFTConfig(
        output_dir=str(partial),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup_ratio,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=checkpointing,
        max_length=None,  # encode_problems has seen to it
        completion_only_loss=True,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        eval_strategy="epoch" if dev_columns["input_ids"] else "no",
        prediction_loss_only=True,
        save_strategy="no" if config.save_every is None else "steps",
        save_steps=config.save_every or 1,
        save_total_limit=1,
        logging_steps=config.log_every,
        disable_tqdm=True,
        report_to="none",
        seed=config.seed,
    )
    adapter = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    order = LengthGroupedOrder(columns["length"], config.batch_size, config.seed)

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedOrder:
            return order

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        eval_dataset=Dataset.from_dict(dev_columns) if dev_columns["input_ids"] else None,
        processing_class=tokenizer,
        peft_config=adapter if config.mode == "lora" else None,
        callbacks=[_log_to(partial / "metrics.jsonl")],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _load_base(config: SFTStageConfig, on_gpu: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from looper_trainer.sampling.transformers import load_pretrained

    dtype = config.dtype
    if dtype == "auto":
        # Steps of 1e-5 vanish in bfloat16 weights; an adapter is float32 whatever its base is.
        dtype = "bfloat16" if on_gpu and config.mode == "lora" else "float32"
    return load_pretrained(config.model, dtype)


def _save(config: SFTStageConfig, trainer: Any, partial: Path) -> None:
    """The trained model as a plain folder, in the dtype in which its base is stored."""
    import torch
    from transformers import AutoConfig

    if config.mode == "lora":
        from looper_trainer.models import merge_adapter

        trainer.save_model(str(partial / "adapter"))
        merge_adapter(partial / "adapter", partial / "merged", config.model)
        for file in (partial / "merged").iterdir():
            file.rename(partial / file.name)
        (partial / "merged").rmdir()
    else:
        stored = AutoConfig.from_pretrained(config.model).dtype or torch.float32
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.to(stored).save_pretrained(partial)
        trainer.processing_class.save_pretrained(partial)


def _log_to(file: Path, clock: Callable[[], float] = time.monotonic) -> TrainerCallback:
    """A callback that appends each log record to `file` and shows it on one line.

    Between log records it says every few seconds how far the training is: a short one may have none.
    """
    from transformers import TrainerCallback

    class Log(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.started = self.said = clock()
            self.first_step = state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero and clock() - self.said >= _SAY_EVERY_S:
                self._say(state, "")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            # The library logs a loss that is no number as 0.
            if not all(math.isfinite(logs.get(name, 0.0)) for name in ("loss", "grad_norm")):
                raise UserError(
                    f"step {state.global_step}: the gradient is not finite; lower learning_rate (what was in "
                    "the output is still there)"
                )
            if not state.is_world_process_zero:
                return
            record = {"step": state.global_step, "elapsed_s": round(clock() - self.started, 3), **logs}
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(record) + "\n")
            if "loss" in logs:
                accuracy = logs["mean_token_accuracy"]
                self._say(state, f", loss {logs['loss']:.4f}, token accuracy {accuracy:.3f}")
            elif "eval_loss" in logs:
                print(f"sft: step {state.global_step}, dev loss {logs['eval_loss']:.4f}", flush=True)

        def _say(self, state: Any, figures: str) -> None:
            self.said = clock()
            each = (self.said - self.started) / (state.global_step - self.first_step)
            left = timedelta(seconds=round(each * (state.max_steps - state.global_step)))
            print(f"sft: step {state.global_step}/{state.max_steps}{figures}, {left} left", flush=True)

    return Log()


def _quiet() -> None:
    """One progress of our own instead of the libraries' bars and notices."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
