"""Two GPUs against one: the same steps trained by one process and by two, and sampling on a card of its own.

    python benchmarks/gpu/two_gpus.py --out two_gpus.json [--work /dev/shm/two]

1. `equal`: --equal-steps steps of the small shape on one GPU and under `accelerate launch` on two, with the
   transformers sampler and a reward of random numbers; the largest difference of an adapter weight, also
   relative to the largest weight of the matrices that begin at zero.
2. `overlap`: steps of --shape with sampler and trainer on one GPU (shares), then on two with `overlap`; also
   without activation checkpointing (`kept`), for which a trainer with a card of its own has the memory
   sooner, by the size of its micro-batches, and with the sampler's GPU giving the reference's logprobs too
   (`reference`); then with both work on both (`parallel`: two trainers, two samplers, every step on policy).
   The ratios of the median step times; the first two steps do not count.

What is skipped, and the ways of part 2 that are not asked for, stay as --out has them of the same --commit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from device import device_name, versions
from shapes import SHAPES, problems, write_model

from looper_schemas.records import write_records

KEY = "benchmark"
ONE = {"vllm_memory_share": 0.45}
TWO = {"vllm_memory_share": 0.85, "vllm_devices": "1", "overlap": "true"}
BOTH = {"vllm_servers": 2, "vllm_devices": "0,1"}
KEPT = {"activation_checkpointing": "false"}
WAYS: dict[str, dict[str, object]] = {
    "one_gpu": ONE,
    "one_gpu_kept": ONE | KEPT | {"micro_batch_tokens": 8192},
    "two_gpus": TWO,
    "two_gpus_kept": TWO | KEPT | {"micro_batch_tokens": 4096},
    "two_gpus_kept_8192": TWO | KEPT | {"micro_batch_tokens": 8192},
    "two_gpus_kept_16384": TWO | KEPT | {"micro_batch_tokens": 16384},
    "two_gpus_kept_compiled": TWO | KEPT | {"micro_batch_tokens": 8192, "torch_compile": "true"},
    "two_gpus_kept_reference": TWO | KEPT | {"micro_batch_tokens": 16384, "reference_on_sampler": "true"},
    "two_gpus_parallel": ONE | BOTH,
    "two_gpus_parallel_kept": ONE | BOTH | KEPT | {"micro_batch_tokens": 8192},
}


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--small", choices=SHAPES, default="small")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=150)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--equal-steps", type=int, default=2)
    parser.add_argument("--device", default="cuda", help="cpu: part 1 alone, with gloo")
    parser.add_argument("--dtype", default="bfloat16", help="of part 2")
    parser.add_argument("--skip", default="", help="of equal,overlap")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of part 2")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def looper(arguments: dict[str, object], url: str, processes: int = 1, **environment: str) -> None:
    """`looper ppo` with `arguments`, by `processes` processes."""
    command = [sys.executable, "-m"]
    if processes > 1 and arguments["device"] == "cuda":
        command += ["accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu", "-m"]
    elif processes > 1:  # on a CPU accelerate's launcher starts one
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command += ["looper_trainer.cli", "ppo"]
    for name, value in arguments.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    known = {"LOOPER_REWARD_URL": url, "LOOPER_REWARD_KEY": KEY}
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | known | environment)


def common(options: argparse.Namespace, model: Path, data: Path, output: Path) -> dict[str, object]:
    return {
        "model": model, "train_file": data, "dev_file": "none", "eval_every": 0, "output": output,
        "run_id": "benchmark", "samples_per_question": options.samples, "max_new_tokens": options.max_tokens,
        "ppo_epochs": 1, "learning_rate": 1e-5, "target_kl": 1000, "save_every": 1000, "merge": "false",
        "device": options.device,
    }  # fmt: skip


def equal(options: argparse.Namespace, work: Path, url: str) -> dict[str, Any]:
    """The adapter after the same steps on one and on two processes."""
    import torch
    from safetensors.torch import load_file

    model = work / f"model-{options.small}"
    if not (model / "config.json").is_file():
        write_model(model, options.small, options.device, "float32")
    data = work / "equal.jsonl"
    vocabulary = SHAPES[options.small]["vocab_size"]
    write_records(data, problems(8 * options.equal_steps, options.prompt_tokens, vocabulary))
    weights = {}
    for processes in (1, 2):
        output = work / f"equal-{processes}"
        settings = common(options, model, data, output) | {
            "sampler": "transformers", "batch_size": 8, "mini_batch_size": 4, "steps": options.equal_steps,
            "max_new_tokens": 32, "dtype": "float32", "micro_batch_tokens": 512, "learning_rate": 1e-4,
        }  # fmt: skip
        visible = {"CUDA_VISIBLE_DEVICES": "0"} if processes == 1 and options.device == "cuda" else {}
        looper(settings, url, processes, **visible)
        weights[processes] = load_file(output / "adapter" / "adapter_model.safetensors")
    change = max(float(w.abs().max()) for name, w in weights[1].items() if "lora_B" in name)
    gap = max(float((weights[1][name] - weights[2][name]).abs().max()) for name in weights[1])
    assert torch.isfinite(torch.tensor(change))
    return {"largest_change": change, "largest_difference": gap, "relative": gap / change}


def overlap(
    options: argparse.Namespace, work: Path, url: str, found: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Median step times of each of `--ways` and of those `found` before; the ratios of two GPUs to one."""
    model = work / f"model-{options.shape}"
    if not (model / "config.json").is_file():
        write_model(model, options.shape, options.device, options.dtype)
    data = work / "overlap.jsonl"
    vocabulary = SHAPES[options.shape]["vocab_size"]
    write_records(data, problems(options.questions * options.steps, options.prompt_tokens, vocabulary))
    for name in options.ways:
        output = work / name
        settings = common(options, model, data, output) | {
            "sampler": "vllm", "batch_size": options.questions,
            "mini_batch_size": max(1, options.questions // 4),
            "steps": options.steps, "dtype": options.dtype, "activation_checkpointing": "true",
            "vllm_max_num_seqs": options.questions * options.samples, "vllm_folder": work / f"vllm-{name}",
            "vllm_max_model_len": options.prompt_tokens + options.max_tokens + 16,
        } | WAYS[name]  # fmt: skip
        looper(settings, url, processes=2 if "parallel" in name else 1)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][2:]
        seconds = {key: statistics.median(line["seconds"].get(key, 0.0) for line in lines)
                   for key in ("sample", "logprobs", "update", "score_wait", "record", "sync")}  # fmt: skip
        seconds["whole"] = statistics.median(line["step_seconds"] for line in lines)
        found[name] = seconds | {"importance_mean": statistics.median(x["importance_mean"] for x in lines)}
    ratios = {
        f"{two} / {one}": found[two]["whole"] / found[one]["whole"]
        for two in found if two.startswith("two")
        for one in found if one.startswith("one")
    }  # fmt: skip
    return {"ways": found, "ratios": ratios}


def main() -> None:
    """Measure, print one JSON document, write it to --out."""
    options = options_from_command_line()
    skip = set(options.skip.split(",")) | ({"overlap"} if options.device == "cpu" else set())
    command = [sys.executable, "-m", "looper_trainer.testing", "--key", KEY, "--mode", "random"]
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        reward = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert reward.stdout is not None
            url = reward.stdout.readline().strip()
            before = json.loads(options.out.read_text()) if options.out.is_file() else {}
            document: dict[str, Any] = (before if before.get("commit") == options.commit else {}) | {
                "benchmark": "two_gpus", "device": device_name(), "versions": versions(),
                "commit": options.commit,
            }  # fmt: skip
            with tempfile.TemporaryDirectory(dir=work) as runs:
                for name in {"model-" + options.small, "model-" + options.shape}:
                    if (work / name).is_dir():
                        (Path(runs) / name).symlink_to(work / name)
                if "equal" not in skip:
                    document["equal"] = equal(options, Path(runs), url)
                if "overlap" not in skip:
                    found = document.get("overlap", {}).get("ways", {})
                    document["overlap"] = overlap(options, Path(runs), url, found)
        finally:
            reward.terminate()
            reward.wait()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
