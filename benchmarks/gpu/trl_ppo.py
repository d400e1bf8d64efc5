"""Tokens/s and memory of TRL 1.12.0's PPOTrainer, beside `looper ppo` on the same shape, batch and lengths.

    python benchmarks/gpu/trl_ppo.py --trl trl-1.12.0-py3-none-any.whl --out trl_ppo.json \
        [--ours "" --ours "--set torch_compile=true" ...]

TRL removed its PPO after 1.12, so that release's wheel is unpacked and put first on the path of the
process that runs it. What it is given: a policy with the same LoRA, its reference by disabling that
adapter, a critic with a backbone of its own (it has no other form) that is frozen but for its score, and
a reward model of one tiny layer; all of this spares it memory and time. Both sides make --steps steps of
--questions x --samples completions of --max-tokens tokens; the first does not count. When TRL runs out of
memory its batch is halved until it fits, and its rate is that of the smaller batch. Each --ours is one more
way to run our side. All run one after the other, alone on the card; what is done is in --out at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from device import CardMemory, device_name, versions
from shapes import SHAPES, problems, write_model

from looper_schemas.prompt import format_prompt

# What is printed when the card is full: by torch's allocator, and by a library that asks the driver itself.
NO_MEMORY = ("OutOfMemoryError", "CUBLAS_STATUS_ALLOC_FAILED")


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", type=Path, help="wheel of TRL 1.12.0; none: the installed one")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=150)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of TRL's passes")
    parser.add_argument("--rollout-batch", type=int, default=64, help="rows that TRL generates together")
    parser.add_argument("--trl-rows", type=int, help="completions a step that TRL is tried with first")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", type=Path, help="folder for weights; default: a temporary one")
    parser.add_argument("--skip-ours", action="store_true")
    parser.add_argument("--ours", action="append", help="arguments of step_8b.py, for one run of our side")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--inner", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_trl(options: argparse.Namespace, model: Path, rows: int) -> dict[str, Any]:
    """`options.steps` steps of `rows` completions, timed but for the first; in a process of its own."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaConfig,
        LlamaForSequenceClassification,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    dtype, on_gpu = getattr(torch, options.dtype), options.device == "cuda"
    vocabulary = SHAPES[options.shape]["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    asked = problems(rows * options.steps // options.samples, options.prompt_tokens, vocabulary)
    prompts = [tokenizer(format_prompt(p.question))["input_ids"] for p in asked]
    data = Dataset.from_dict({"input_ids": [ids for ids in prompts for _ in range(options.samples)]})
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(options.device)
    critic = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=dtype)
    critic = critic.to(options.device).requires_grad_(False)
    critic.score.requires_grad_(True)
    tiny = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_labels=1, pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=4096,
    )  # fmt: skip
    reward = LlamaForSequenceClassification(tiny).to(options.device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder, per_device_train_batch_size=options.micro_batch,
            gradient_accumulation_steps=rows // options.micro_batch, num_mini_batches=1, num_ppo_epochs=1,
            total_episodes=rows * options.steps, response_length=options.max_tokens, temperature=1.0,
            local_rollout_forward_batch_size=min(options.rollout_batch, rows), num_sample_generations=0,
            learning_rate=1e-5, bf16=on_gpu and dtype == torch.bfloat16, use_cpu=not on_gpu,
            gradient_checkpointing=on_gpu, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                if on_gpu:
                    torch.cuda.synchronize()
                ends.append(time.perf_counter())

        trainer = PPOTrainer(
            args=arguments, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward,
            value_model=critic, train_dataset=data, eval_dataset=data.select(range(2)), callbacks=[Clock()],
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )  # fmt: skip
        trainer.train()
    steps = [after - before for before, after in itertools.pairwise(ends)]
    return {
        "trl": trl.__version__, "rows": rows, "step_s": steps,
        "completion_tokens_per_s": rows * options.max_tokens / (sum(steps) / len(steps)),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }  # fmt: skip


def trl_side(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """TRL with the largest batch that fits."""
    rows = options.trl_rows or options.questions * options.samples
    result_file = work / "trl.json"
    environment = dict(os.environ)
    if options.trl is not None:
        with zipfile.ZipFile(options.trl) as wheel:
            wheel.extractall(work / "trl-wheel")
        environment["PYTHONPATH"] = f"{work / 'trl-wheel'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    while rows >= options.micro_batch:
        result_file.unlink(missing_ok=True)
        command = [sys.executable, *sys.argv, "--inner", str(rows), "--work", str(work)]
        command[command.index("--out") + 1] = str(result_file)
        with CardMemory() as card:
            outcome = subprocess.run(
                command, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, text=True
            )
        sys.stderr.write(outcome.stderr[-3000:])
        if outcome.returncode == 0:
            return json.loads(result_file.read_text()) | {"card_peak_gib": card.peak_gib}
        if not any(sign in outcome.stderr for sign in NO_MEMORY):
            sys.exit("error: TRL failed; see above")
        print(f"TRL: out of memory with {rows} completions a step", file=sys.stderr)
        rows //= 2
    sys.exit("error: TRL does not fit at all")


def our_side(options: argparse.Namespace, work: Path, more: str) -> dict[str, Any]:
    """`looper ppo` as step_8b.py measures it, with `more` of its arguments."""
    out = work / "ours.json"
    command = [sys.executable, str(Path(__file__).with_name("step_8b.py")), "--skip", "plain,floor"]
    for name in ("shape", "questions", "samples", "prompt_tokens", "max_tokens", "device", "dtype"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--steps", str(max(2, options.steps)), "--work", str(work), "--out", str(out)]
    subprocess.run([*command, *shlex.split(more)], check=True, stdout=sys.stderr)
    document: dict[str, Any] = json.loads(out.read_text())
    return {k: v for k, v in document.items() if k not in ("steps", "versions", "device", "commit")}


def beside(ours: dict[str, Any], trl: dict[str, Any]) -> dict[str, Any]:
    """`ours` with its ratios to `trl`."""
    ours["tokens_per_s_ratio"] = ours["completion_tokens_per_s"] / trl["completion_tokens_per_s"]
    if ours["card_peak_gib"]:
        ours["memory_ratio"] = max(ours["card_peak_gib"]) / max(trl["card_peak_gib"])
    return ours


def main() -> None:
    """Measure both sides, print one JSON document, write it to --out after each of them."""
    options = options_from_command_line()
    if options.inner:
        model = options.work / f"model-{options.shape}"
        options.out.write_text(json.dumps(run_trl(options, model, options.inner)))
        return
    document: dict[str, Any] = {
        "benchmark": "trl_ppo", "device": device_name(), "versions": versions(), "commit": options.commit,
    }  # fmt: skip

    def write() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        model = work / f"model-{options.shape}"
        if not (model / "config.json").is_file():
            write_model(model, options.shape, options.device, options.dtype)
        document["trl"] = trl_side(options, work)
        document["ours"] = []
        write()
        for more in [] if options.skip_ours else options.ours or [""]:
            try:
                found = beside(our_side(options, work, more), document["trl"])
            except subprocess.CalledProcessError as error:  # step_8b.py has said why; the others go on
                found = {"failed": error.returncode}
            document["ours"].append({"arguments": more} | found)
            write()
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
