"""A PPO step with vLLM on one GPU against its floor: plain vLLM sampling and plain Hugging Face passes.

    python benchmarks/gpu/step_8b.py --out step_8b.json [--work /dev/shm/step]
    python benchmarks/gpu/step_8b.py --out preset_24gb.json --preset 24gb --skip plain,floor --steps 2

In one run, on a model of the shape with random weights:
  1. plain vLLM (`LLM.generate`, no adapter, seeds or logprobs, all of the card): completion tokens/s
  2. `looper ppo`'s own loop for --steps steps, with a reward server over HTTP; the first step warms up
  3. plain Hugging Face passes of the same model in the same process (padded rows, whole logits, gradient
     checkpointing, the best of several micro-batches): tokens/s of logprobs, reference and update
floor = completion tokens / (1) + tokens of prompts and completions / each rate of (3). Reported: the
step's time over the floor, its sampling rate over (1), the share of waiting for scores, seconds of the
adapter's way to the server, and the most memory the card had in use by all processes (nvidia-smi). With a
preset its limit is enforced: vLLM's share of the card, and the trainer's allocator.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from device import CardMemory, device_name, versions
from shapes import SHAPES, problems, write_model

from looper_schemas.prompt import format_prompt
from looper_trainer.config import load_config
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.data import Data
from looper_trainer.ppo.loop import policy_and_sampler, train
from looper_trainer.ppo.policy import Policy
from looper_trainer.reward_client import RewardClient

KEY = "benchmark"
PRIVATE = ("out", "python", "work", "skip")


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=150)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory-share", type=float, default=0.45, help="vLLM's, in the step")
    parser.add_argument("--plain-share", type=float, default=0.85, help="vLLM's, alone")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--preset", choices=("80gb", "40gb", "24gb"), help="instead of the two above")
    parser.add_argument("--compilation", choices=("full", "graphs", "eager"), default="graphs")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter with vLLM")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--plain-micro-batches", default="8,16", help="rows of the plain passes")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="more PPO settings")
    parser.add_argument("--skip", default="", help="of plain,floor: what is left out, comma-separated")
    parser.add_argument("--work", type=Path, help="folder for weights; default: a temporary one")
    parser.add_argument("--commit", default="", help="what to write down as the code's version")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def plain_vllm(options: argparse.Namespace, model: Path, work: Path) -> float:
    """Completion tokens/s of `LLM.generate` alone on the card."""
    count = options.questions * 3
    vocabulary = SHAPES[options.shape]["vocab_size"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        tokenizer(format_prompt(p.question))["input_ids"]
        for p in problems(count, options.prompt_tokens, vocabulary, seed=1)
    ]
    engine: dict[str, Any] = {
        "model": str(model), "dtype": options.dtype, "seed": 0,
        "max_num_seqs": options.questions * options.samples,
        "max_model_len": options.prompt_tokens + options.max_tokens + 16,
    }  # fmt: skip
    if options.device == "cuda":
        engine["gpu_memory_utilization"] = options.plain_share
    if options.compilation == "eager":
        engine["enforce_eager"] = True
    elif options.compilation == "graphs":
        engine["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    rounds = [prompts[i : i + options.questions] for i in range(0, count, options.questions)]
    job = {"engine": engine, "prompts": rounds, "n": options.samples, "max_tokens": options.max_tokens,
           "adapter": None}  # fmt: skip
    job_file, result_file = work / "job.json", work / "plain.json"
    job_file.write_text(json.dumps(job))
    script = Path(__file__).with_name("plain_generate.py")
    subprocess.run([options.python, script, job_file, result_file], check=True, stdout=sys.stderr)
    (result,) = json.loads(result_file.read_text())
    return statistics.median(row["tokens"] / row["seconds"] for row in result["rounds"])


def ppo_config(options: argparse.Namespace, model: Path, work: Path) -> PPOConfig:
    on_gpu = options.device == "cuda"
    settings: dict[str, Any] = {
        "model": str(model), "output": str(work / "run"), "sampler": "vllm", "dev_file": "none",
        "eval_every": 0, "batch_size": options.questions, "samples_per_question": options.samples,
        "ppo_epochs": 1, "mini_batch_size": options.questions // 4 or 1, "max_new_tokens": options.max_tokens,
        "steps": options.steps, "save_every": 1000, "merge": "false", "lora_rank": options.rank,
        "lora_alpha": 2 * options.rank, "learning_rate": 1e-5, "target_kl": 1000,
        "device": options.device, "dtype": options.dtype,
        "activation_checkpointing": "true" if on_gpu else "false",
        "micro_batch_tokens": options.micro_batch_tokens, "vllm_compilation": options.compilation,
        "vllm_max_num_seqs": options.questions * options.samples, "vllm_python": str(options.python),
        "vllm_max_model_len": options.prompt_tokens + options.max_tokens + 16,
        "vllm_folder": str(work / "vllm"), "vllm_memory_share": options.memory_share if on_gpu else "none",
    }  # fmt: skip
    if options.preset is not None:
        settings["preset"] = options.preset
        for name in ("activation_checkpointing", "micro_batch_tokens", "vllm_memory_share"):
            del settings[name]
    settings |= dict(given.split("=", 1) for given in options.set)
    return load_config(PPOConfig, None, {key: str(value) for key, value in settings.items()})


def our_steps(
    options: argparse.Namespace, config: PPOConfig, url: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The steps of the run, and the plain passes of the same model after it."""
    vocabulary = SHAPES[options.shape]["vocab_size"]
    data = Data(problems(options.questions * options.steps, options.prompt_tokens, vocabulary), [], [])
    began = time.perf_counter()
    with (
        CardMemory() as card,
        RewardClient(url, KEY, run_id="benchmark", reward_mode="arm_gated") as client,
        policy_and_sampler(config) as (policy, sampler),
    ):
        start_s = time.perf_counter() - began
        train(config, data, policy, sampler, client)
        peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None
        with torch.compiler.set_stance("force_eager"):  # plain, also where --set torch_compile=true
            passes = {} if "floor" in options.skip else plain_passes(options, policy)
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    ours = {
        "start_s": start_s, "lines": lines, "trainer_peak_gib": peak,
        "card_peak_gib": card.peak_gib, "card_before_gib": card.before_gib,
    }  # fmt: skip
    return ours, passes


def plain_passes(options: argparse.Namespace, policy: Policy) -> dict[str, float]:
    """Best tokens/s of plain passes over padded rows: whole logits, log_softmax, gradient checkpointing."""
    model, device = policy.model, policy.device
    width = options.prompt_tokens + options.max_tokens
    vocabulary = SHAPES[options.shape]["vocab_size"]
    best: dict[str, float] = {}

    def logprob_sum(ids: torch.Tensor) -> torch.Tensor:
        with policy.precision():
            logits = model(input_ids=ids, use_cache=False).logits[:, options.prompt_tokens - 1 : -1]
        targets = ids[:, options.prompt_tokens :]
        return logits.float().log_softmax(-1).gather(2, targets[..., None]).sum()

    def update(ids: torch.Tensor) -> None:
        policy.train(policy.activation_checkpointing)
        logprob_sum(ids).backward()
        policy.zero_grad(set_to_none=True)
        policy.eval()

    def logprobs(ids: torch.Tensor) -> None:
        with torch.no_grad():
            logprob_sum(ids)

    def reference(ids: torch.Tensor) -> None:
        with torch.no_grad(), model.disable_adapter():
            logprob_sum(ids)

    for rows in map(int, options.plain_micro_batches.split(",")):
        ids = torch.randint(3, vocabulary, (rows, width), device=device)
        for name, one in (("logprobs", logprobs), ("reference", reference), ("update", update)):
            try:
                one(ids)  # warm-up
                _wait(device)
                began = time.perf_counter()
                for _ in range(3):
                    one(ids)
                _wait(device)
                rate = 3 * rows * width / (time.perf_counter() - began)
            except torch.cuda.OutOfMemoryError:
                gc.collect()
                torch.cuda.empty_cache()
                print(f"plain {name} at {rows} rows: out of memory", file=sys.stderr)
                continue
            print(f"plain {name} at {rows} rows: {rate:.0f} tokens/s", file=sys.stderr)
            best[name] = max(best.get(name, 0.0), rate)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def summary(
    options: argparse.Namespace, vllm_rate: float | None, ours: dict[str, Any], passes: dict[str, float]
) -> dict[str, Any]:
    """Medians over the steps after the first, and their ratios to the floor."""
    lines = ours["lines"][1:] or ours["lines"]
    parts = {
        name: statistics.median(line["seconds"].get(name, 0.0) for line in lines)
        for name in ("sample", "hand_over", "logprobs", "score_wait", "record", "update", "sync")
    }
    parts["whole"] = statistics.median(line["step_seconds"] for line in lines)
    completion_tokens = statistics.median(line["tokens"] for line in lines)
    all_tokens = completion_tokens + options.questions * options.samples * options.prompt_tokens
    found: dict[str, Any] = {
        "step_s": parts, "completion_tokens": completion_tokens,
        "sample_tokens_per_s": completion_tokens / parts["sample"],
        "score_wait_share": parts["score_wait"] / parts["whole"],
        "sync_s": [line["seconds"]["sync"] for line in ours["lines"]],
        "completion_tokens_per_s": completion_tokens / parts["whole"],
        "trainer_peak_gib": ours["trainer_peak_gib"], "card_peak_gib": ours["card_peak_gib"],
        "card_before_gib": ours["card_before_gib"],
    }  # fmt: skip
    if options.preset and ours["card_peak_gib"]:
        found["preset_limit_gb"] = float(options.preset.removesuffix("gb"))
        found["card_peak_gb"] = max(ours["card_peak_gib"]) * 2**30 / 1e9
    if vllm_rate is not None:
        found["plain_vllm_tokens_per_s"] = vllm_rate
        found["sample_share_of_plain"] = found["sample_tokens_per_s"] / vllm_rate
    if vllm_rate is not None and len(passes) == 3:
        floor = {"sample": completion_tokens / vllm_rate} | {n: all_tokens / r for n, r in passes.items()}
        found |= {"plain_tokens_per_s": passes, "floor_s": floor, "floor_whole_s": sum(floor.values())}
        found["step_over_floor"] = parts["whole"] / sum(floor.values())
    return found


def main() -> None:
    """Measure, print one JSON document, write it to --out."""
    options = options_from_command_line()
    options.skip = set(options.skip.split(","))
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        model = work / f"model-{options.shape}"
        if not (model / "config.json").is_file():
            parameters = write_model(model, options.shape, options.device, options.dtype)
            print(f"{options.shape}: {parameters:,} parameters", file=sys.stderr)
        vllm_rate = None if "plain" in options.skip else plain_vllm(options, model, work)
        command = [sys.executable, "-m", "looper_trainer.testing", "--key", KEY, "--mode", "random"]
        reward = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        try:
            assert reward.stdout is not None
            url = reward.stdout.readline().strip()
            with tempfile.TemporaryDirectory(dir=work) as run:
                ours, passes = our_steps(options, ppo_config(options, model, Path(run)), url)
        finally:
            reward.terminate()
            reward.wait()
    document = {
        "benchmark": "step_8b", "device": device_name(), "versions": versions(), "commit": options.commit,
        "settings": {k: str(v) for k, v in vars(options).items() if k not in PRIVATE},
        **summary(options, vllm_rate, ours, passes), "steps": ours["lines"],
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({k: v for k, v in document.items() if k not in ("steps", "settings")}, indent=1))


if __name__ == "__main__":
    main()
