"""What SFT trains on, against TRL's own preparation; what it leaves on disk, against the promises."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from looper_schemas.prompt import format_prompt, format_target
from looper_schemas.records import Problem, RecordError, write_records
from looper_trainer.errors import CheckpointError, DataError, UserError
from looper_trainer.folders import written_alone
from looper_trainer.sampling.base import SamplingParams
from looper_trainer.sampling.transformers import load_sampler
from looper_trainer.sft import LengthGroupedOrder, SFTStageConfig, _log_to, encode_problems, run

PROBLEMS = [
    Problem(
        id=f"p/{n}",
        question=f"Ann has {n} apples and buys {n + 2} more. How many apples does she have?",
        answer=str(2 * n + 2),
        cot=f"She has {n} + {n + 2} = {2 * n + 2} apples.",
    )
    for n in range(1, 13)
]


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    write_records(file, PROBLEMS)
    return file


def settings(tiny_model: Path, train_file: Path, **changes: Any) -> SFTStageConfig:
    return SFTStageConfig(
        **{
            "model": str(tiny_model),
            "train_file": train_file,
            "output": train_file.parent / "sft",
            "device": "cpu",
            "batch_size": 4,
            "epochs": 1,
            "learning_rate": 3e-3,
            "log_every": 1,
            **changes,
        }
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict())


def test_labels_cover_the_solution_and_eos_and_nothing_else(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    columns, too_long = encode_problems(tokenizer, PROBLEMS, 256)
    assert too_long == 0
    for problem, ids, labels in zip(PROBLEMS, columns["input_ids"], columns["labels"], strict=True):
        prompt_ids = load_sampler(str(tiny_model)).encode(format_prompt(problem.question))
        assert ids[: len(prompt_ids)] == prompt_ids  # the ids that rollouts and PPO ask with
        assert labels[: len(prompt_ids)] == [-100] * len(prompt_ids)
        assert labels[len(prompt_ids) :] == ids[len(prompt_ids) :]
        taught = tokenizer.decode(ids[len(prompt_ids) : -1])
        assert taught == f" {format_target(problem.cot, problem.answer)}"
        assert taught.endswith(f"\nAnswer: #### {problem.answer}")
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1


def test_columns_equal_those_of_trl(tiny_model: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [
        {"prompt": format_prompt(p.question), "completion": f" {format_target(p.cot, p.answer)}"}
        for p in PROBLEMS
    ]
    theirs = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train_dataset
    ours, _ = encode_problems(tokenizer, PROBLEMS, 256)
    assert theirs["input_ids"][:] == ours["input_ids"]
    assert theirs["labels"][:] == ours["labels"]


def test_a_batch_teaches_eos_although_it_is_the_padding_token(tiny_model: Path) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    longer = PROBLEMS[0].model_copy(update={"question": PROBLEMS[0].question * 2})
    columns, _ = encode_problems(tokenizer, [PROBLEMS[0], longer], 256)
    rows = [{key: columns[key][place] for key in ("input_ids", "labels")} for place in range(2)]
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)
    for row in range(2):
        length = columns["length"][row]
        assert batch["labels"][row, length - 1] == tokenizer.eos_token_id
        assert batch["attention_mask"][row].sum() == length
        assert (batch["labels"][row, length:] == -100).all()


def test_problems_that_do_not_fit_are_left_out_whole(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    whole, _ = encode_problems(tokenizer, PROBLEMS, 256)
    limit = sorted(whole["length"])[5]
    columns, too_long = encode_problems(tokenizer, PROBLEMS, limit)
    assert too_long == sum(length > limit for length in whole["length"])
    assert all(ids[-1] == tokenizer.eos_token_id for ids in columns["input_ids"])


def test_a_tokenizer_that_appends_eos_does_not_double_it(tiny_model: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain, _ = encode_problems(tokenizer, PROBLEMS[:2], 256)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)],
    )
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode_problems(tokenizer, PROBLEMS[:2], 256)[0] == plain


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=300),
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
def test_an_epoch_shows_every_problem_once_in_an_order_of_its_own(
    lengths: list[int], batch_size: int, epoch: int
) -> None:
    order, again = (LengthGroupedOrder(lengths, batch_size, seed=7) for _ in range(2))
    for one in (order, again):
        one.set_epoch(epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert list(order) == list(again)


def test_batches_hold_similar_lengths_and_come_in_random_order() -> None:
    lengths = [(37 * n) % 101 for n in range(640)]
    order = LengthGroupedOrder(lengths, 8, seed=0)
    first = list(order)
    order.set_epoch(1)
    assert first != list(order)
    batches = [[lengths[place] for place in first[i : i + 8]] for i in range(0, 640, 8)]
    spread = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    assert spread < 5  # a random batch of 8 spreads over about 80
    means = [sum(batch) / 8 for batch in batches]
    rising = sum(b > a for a, b in itertools.pairwise(means)) / (len(means) - 1)
    assert 0.3 < rising < 0.7


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_sft_leaves_a_plain_model_its_settings_and_its_data(
    tiny_model: Path, train_file: Path, mode: str
) -> None:
    run(settings(tiny_model, train_file, mode=mode, epochs=2, dev_file=train_file))
    out = train_file.parent / "sft"
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "config.toml", "metrics.jsonl"}
    assert not any("adapter" in name or "checkpoint" in name or "partial" in name for name in names)
    assert not (train_file.parent / "sft.partial").exists()
    before, after = weights(tiny_model), weights(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    touched = {name for name in before if "_proj" in name} if mode == "lora" else set(before)
    assert changed == touched - {"lm_head.weight"} or changed == touched
    described = json.loads((out / "training_data.json").read_text(encoding="utf-8"))
    assert described["sha256"] == hashlib.sha256(train_file.read_bytes()).hexdigest()
    assert described["problems"] == len(described["questions"]) == len(PROBLEMS)
    first = "ann has 1 apples and buys 3 more. how many apples does she have?"
    assert described["questions"][0] == hashlib.sha256(first.encode()).hexdigest()
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 6  # 12 problems, batches of 4, 2 epochs
    assert losses[-1] < losses[0]
    assert sum("eval_loss" in line for line in log) == 2


def test_loss_of_the_first_step_is_the_mean_over_solution_tokens(tiny_model: Path, train_file: Path) -> None:
    run(settings(tiny_model, train_file, mode="full", batch_size=12))
    (line, *_) = (train_file.parent / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    columns, _ = encode_problems(AutoTokenizer.from_pretrained(tiny_model), PROBLEMS, 256)
    total = count = 0.0
    for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True):
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            if labels[place] != -100:
                total -= log_probs[place - 1, ids[place]].item()
                count += 1
    assert json.loads(line)["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.slow
def test_a_trained_model_gives_the_solutions_it_was_taught_and_stops(
    tiny_model: Path, train_file: Path
) -> None:
    run(settings(tiny_model, train_file, mode="full", epochs=60, scheduler="constant_with_warmup"))
    sampler = load_sampler(str(train_file.parent / "sft"), device="cpu")
    prompts = [sampler.encode(format_prompt(problem.question)) for problem in PROBLEMS]
    outputs = sampler.sample(prompts, SamplingParams(60, temperature=0), [[0]] * len(prompts))
    right = [
        completion.text == f" {format_target(problem.cot, problem.answer)}"
        and completion.finish_reason == "stop"
        for problem, (completion,) in zip(PROBLEMS, outputs, strict=True)
    ]
    assert sum(right) >= 11


def test_the_same_seed_gives_the_same_weights(tiny_model: Path, train_file: Path) -> None:
    for name in ("one", "two"):
        run(settings(tiny_model, train_file, output=train_file.parent / name))
    one, two = weights(train_file.parent / "one"), weights(train_file.parent / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def stop_after_step_5(config: SFTStageConfig) -> None:
    """An interrupted run; its last saved state is of step 4."""
    import looper_trainer.sft as stage

    make = stage._make_trainer

    def make_stopping(*arguments: Any) -> Any:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 5:
                    raise KeyboardInterrupt

        trainer = make(*arguments)
        trainer.add_callback(Stop())
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_make_trainer", make_stopping)
        with pytest.raises(KeyboardInterrupt):
            run(config)


def test_an_interrupted_run_resumes_to_the_weights_of_an_uninterrupted_one(
    tiny_model: Path, train_file: Path
) -> None:
    run(settings(tiny_model, train_file, mode="full", epochs=2, output=train_file.parent / "whole"))
    stopped = settings(tiny_model, train_file, mode="full", epochs=2, save_every=4)
    stop_after_step_5(stopped)
    assert not stopped.output.exists()
    run(stopped.model_copy(update={"resume": True}))
    whole, resumed = weights(train_file.parent / "whole"), weights(stopped.output)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (stopped.output / "begun_with.json").exists()


def test_an_interrupted_run_is_resumed_with_its_own_settings_and_data_or_not_at_all(
    tiny_model: Path, train_file: Path
) -> None:
    base = train_file.parent / "base"
    shutil.copytree(tiny_model, base)
    stopped = settings(base, train_file, epochs=2, save_every=4)
    stop_after_step_5(stopped)
    states = sorted((train_file.parent / "sft.partial").glob("checkpoint-*/*"))
    with pytest.raises(
        CheckpointError, match="holds the saved state of an interrupted run; go on with --res"
    ):
        run(stopped)
    resumed = stopped.model_copy(update={"resume": True})
    with pytest.raises(CheckpointError, match="was begun with another learning_rate, seed;"):
        run(resumed.model_copy(update={"learning_rate": 1e-3, "seed": 1}))
    lines, weights_file = train_file.read_bytes(), base / "model.safetensors"
    whole = weights_file.read_bytes()
    train_file.write_bytes(lines.replace(b"apples", b"pears"))
    with pytest.raises(CheckpointError, match="was begun with another train_file;"):
        run(resumed)
    train_file.write_bytes(lines)
    weights_file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="was begun with another model;"):
        run(resumed)
    weights_file.write_bytes(whole)
    assert sorted((train_file.parent / "sft.partial").glob("checkpoint-*/*")) == states
    (train_file.parent / "sft.partial" / "begun_with.json").unlink()  # as an earlier version left it
    run(resumed.model_copy(update={"log_every": 2, "save_every": 2}))
    assert stopped.output.exists()


def test_a_resumed_run_may_find_its_base_elsewhere(tiny_model: Path, train_file: Path) -> None:
    base = train_file.parent / "base"
    shutil.copytree(tiny_model, base)
    stopped = settings(base, train_file, epochs=2, save_every=4)
    stop_after_step_5(stopped)
    base.rename(train_file.parent / "moved")
    run(stopped.model_copy(update={"resume": True, "model": str(train_file.parent / "moved")}))
    assert stopped.output.exists()


def test_a_folder_that_another_command_writes_is_left_alone(tiny_model: Path, train_file: Path) -> None:
    config = settings(tiny_model, train_file)
    lock = config.output.with_name("sft.lock")
    with (
        written_alone(config.output, lock),
        pytest.raises(UserError, match="sft: another looper command is writing it"),
    ):
        run(config)
    assert not lock.exists()
    assert not config.output.with_name("sft.partial").exists()


def test_an_earlier_model_survives_a_failing_run(tiny_model: Path, train_file: Path) -> None:
    run(settings(tiny_model, train_file))
    kept = (train_file.parent / "sft" / "model.safetensors").read_bytes()
    with pytest.raises(DataError, match="exceed"):
        run(settings(tiny_model, train_file, max_length=8))
    with pytest.raises(RecordError):
        run(settings(tiny_model, train_file.parent / "absent.jsonl", output=train_file.parent / "sft"))
    assert (train_file.parent / "sft" / "model.safetensors").read_bytes() == kept


def test_a_training_that_diverges_ends_and_keeps_the_earlier_model(
    tiny_model: Path, train_file: Path
) -> None:
    run(settings(tiny_model, train_file))
    kept = (train_file.parent / "sft" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="gradient is not finite; lower learning_rate"):
        run(settings(tiny_model, train_file, learning_rate=1e30, epochs=9))
    assert (train_file.parent / "sft" / "model.safetensors").read_bytes() == kept


def test_the_model_that_is_trained_is_not_replaced(tiny_model: Path, train_file: Path) -> None:
    base = train_file.parent / "base"
    shutil.copytree(tiny_model, base)
    with pytest.raises(CheckpointError, match="which is read from; choose another --output"):
        run(settings(base, train_file, output=base))
    assert (base / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_a_folder_with_other_files_is_never_replaced(tiny_model: Path, train_file: Path) -> None:
    precious = train_file.parent / "sft" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match="choose another --output"):
        run(settings(tiny_model, train_file))
    assert precious.exists()


def test_resuming_nothing_is_refused(tiny_model: Path, train_file: Path) -> None:
    with pytest.raises(CheckpointError, match="no saved state"):
        run(settings(tiny_model, train_file, resume=True))


def test_a_training_without_log_records_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    log = _log_to(tmp_path / "metrics.jsonl", clock=lambda: now)
    state = SimpleNamespace(global_step=10, max_steps=30, is_world_process_zero=True)  # resumed after step 10
    log.on_train_begin(None, state, None)
    for step, seconds in ((11, 3.0), (12, 6.0), (13, 8.0), (14, 12.0)):
        state.global_step, now = step, 100.0 + seconds
        log.on_step_end(None, state, None)
    state.global_step, now = 15, 115.0
    log.on_log(None, state, None, {"loss": 0.5, "mean_token_accuracy": 0.75})
    log.on_step_end(None, state, None)
    assert capsys.readouterr().out.splitlines() == [
        "sft: step 12/30, 0:00:54 left",  # 2 steps in 6 s, so 18 take 54 s
        "sft: step 14/30, 0:00:48 left",
        "sft: step 15/30, loss 0.5000, token accuracy 0.750, 0:00:45 left",
    ]
