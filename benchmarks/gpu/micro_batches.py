"""How long a small model's PPO passes take by the size of a micro-batch, and how long the GPU works in them.

    python benchmarks/gpu/micro_batches.py --out micro_batches.json [--sizes 8192 16384 32768] [--compiled]

A model of SmolLM2-135M's shape (random weights, all trained) and rows of GSM8K's lengths: 64 questions with 8
completions, 4 optimizer steps. For each size: seconds of `measure` (old logprobs, reference, values) and of
`update`, the median of --rounds after one that warms up; and the GPU's busy share of both, by the
profiler's sum of kernel times over the unprofiled seconds. A small share says that launching kernels, not the
GPU, is what takes the time: larger micro-batches then cost almost nothing but memory. With --compiled each
size is also measured with `torch_compile`; `first_s` is the start and the first pass, which compiles.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from device import device_name, versions
from transformers import LlamaConfig, LlamaForCausalLM

from looper_trainer.ppo.batch import Row, completion_mask, plan_micro_batches, sampler_logprobs
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.experience import assess, measure
from looper_trainer.ppo.policy import Policy
from looper_trainer.ppo.update import MiniBatch, make_optimizer, update

QUESTIONS, SAMPLES, IN_A_MINIBATCH = 64, 8, 16
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    },
}  # fmt: skip


def rows_like_gsm8k(rng: random.Random, vocabulary: int) -> list[Row]:
    """The step's completions: prompts of 60 to some 230 tokens, completions of 20 to 200."""
    rows = []
    for _ in range(QUESTIONS):
        prompt = [rng.randrange(vocabulary) for _ in range(max(60, int(rng.gauss(130, 35))))]
        usual = max(30.0, rng.gauss(80, 25))
        for _ in range(SAMPLES):
            length = min(200, max(20, int(rng.gauss(usual, 20))))
            ids = [rng.randrange(vocabulary) for _ in range(length)]
            rows.append(Row(prompt, ids, [-1.0] * length))
    return rows


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` returns and its seconds, the GPU's included."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = work()
    if on_gpu:
        torch.cuda.synchronize()
    return found, time.perf_counter() - began


def of_size(size: int, shape: dict[str, Any], device: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """The figures of one size."""
    torch.compiler.reset()
    began = time.perf_counter()
    torch.manual_seed(0)
    rng = random.Random(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).to(device)
    compute = torch.bfloat16 if device == "cuda" else None
    chunk = max(1024, size // 8)
    policy = Policy(
        model.eval(), train="full", compute_dtype=compute, logit_chunk_tokens=chunk, torch_compile=compiled
    )
    config = PPOConfig(
        train="full", batch_size=QUESTIONS, samples_per_question=SAMPLES, mini_batch_size=IN_A_MINIBATCH,
        ppo_epochs=1, advantages="leave_one_out", learning_rate=1e-6, target_kl=1e6,
    )  # fmt: skip
    optimizer = make_optimizer(policy, config)
    rows = rows_like_gsm8k(rng, shape["vocab_size"])
    completions = IN_A_MINIBATCH * SAMPLES
    minibatches: list[MiniBatch] = [
        plan_micro_batches(rows, range(start, start + completions), size, device)
        for start in range(0, len(rows), completions)
    ]
    batches = [batch for minibatch in minibatches for batch in minibatch]
    mask = completion_mask(rows, device)
    drawn = sampler_logprobs(rows, device)

    def learn() -> tuple[float, float]:
        measured, measure_s = timed(lambda: measure(policy, batches, (mask.shape[0], mask.shape[1])))
        experience = assess(measured, [rng.random() for _ in rows], mask, drawn, 0.001, config)
        _, update_s = timed(
            lambda: update(policy, optimizer, minibatches, experience, config, random.Random(0))
        )
        return measure_s, update_s

    learn()
    first_s = time.perf_counter() - began
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = [learn() for _ in range(rounds)]
    measure_s, update_s = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
    found = {"first_s": first_s, "micro_batches": len(batches), "measure_s": measure_s, "update_s": update_s}
    if device == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            learn()
        busy_s = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
        found["gpu_busy_share"] = busy_s / (measure_s + update_s)
    return found


def main() -> None:
    """Measure, print one JSON document, write it to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sizes = {
        f"{size}, compiled" if compiled else str(size): of_size(
            size, SHAPES[options.shape], options.device, options.rounds, compiled
        )
        for compiled in (False, True)[: 1 + options.compiled]
        for size in options.sizes
    }
    first = sizes[str(options.sizes[0])]
    for found in sizes.values():
        found["ratio"] = (found["measure_s"] + found["update_s"]) / (first["measure_s"] + first["update_s"])
    document = {
        "benchmark": "micro_batches", "device": device_name(), "versions": versions(),
        "commit": options.commit, "shape": options.shape, "sizes": sizes,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
