"""`looper-eval run | compare | report | card | contamination | import`.

A failure that users can mend is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from looper_eval.settings import PRESETS
from looper_trainer.errors import UserError, refused_file


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after a failure that the user can mend."""
    options = _parser().parse_args(argv)
    try:
        options.command(options)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        message = refused_file(error)
        if message is None:
            raise
        return _fail(message)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from looper_eval.dataset import load_dataset
    from looper_eval.engines import EngineOptions
    from looper_eval.models import parse_models
    from looper_eval.run import RunOptions, run
    from looper_eval.settings import Shot, resolve_settings

    if options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}; ask at least one question at a time")
    if options.samples < 1:
        raise UserError(f"--samples is {options.samples}; ask for at least one answer")
    if options.coherence is not None and options.coherence < 2:
        raise UserError(f"--coherence is {options.coherence}; samples agree or not from two on")
    temperature = options.coherence_temperature
    if temperature is not None and options.coherence is None:
        raise UserError("--coherence-temperature is of the samples of --coherence; give both")
    if temperature is not None and not 0 < temperature < math.inf:
        raise UserError(f"--coherence-temperature is {temperature}; samples are drawn above 0")
    if options.shots is not None and not options.few_shot:
        raise UserError("--shots counts the worked examples of --few-shot; give both")
    vllm = {}
    for text in options.vllm:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--vllm {text}: write KEY=VALUE, for example --vllm max_model_len=4096")
        vllm[key] = value
    shots = None
    if options.few_shot:
        examples = load_dataset(options.few_shot, 8 if options.shots is None else options.shots).questions
        shots = tuple(
            Shot(question=one.question, solution=one.solution, answer=one.answer) for one in examples
        )
    settings = resolve_settings(
        options.preset,
        template=options.template,
        chat=options.chat,
        system=options.system,
        shots=shots,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        dtype=options.dtype,
        engine=options.engine,
        stop=tuple(options.stop) if options.stop else None,
    )
    if vllm and settings.engine == "transformers":
        raise UserError("--vllm is of the engine vLLM; add --engine vllm (or vllm-in-process)")
    console = Console()
    run_options = RunOptions(
        models=parse_models(options.model),
        dataset=options.dataset,
        out=options.out,
        settings=settings,
        limit=options.limit,
        samples=options.samples,
        coherence=options.coherence,
        coherence_temperature=0.7 if temperature is None else temperature,
        engine=EngineOptions(
            device=options.device, batch_size=options.batch_size, vllm=vllm, logs=options.out / "vllm"
        ),
    )
    _print(run(run_options, console))


def _compare(options: argparse.Namespace) -> None:
    from looper_eval.summary import compare

    _print(compare(options.folder, options.grader))


def _report(options: argparse.Namespace) -> None:
    from looper_eval.report import write_report

    print(write_report(options.folder))


def _card(options: argparse.Namespace) -> None:
    from looper_eval.card import write_card

    print(write_card(options.folder, options.name, options.baseline, options.out))


def _import(options: argparse.Namespace) -> None:
    from looper_eval.published import check_name, import_file
    from looper_eval.summary import compare

    import_file(options.file, check_name(options.name), options.out, options.dataset)
    _print(compare(options.out))


def _contamination(options: argparse.Namespace) -> None:
    import json

    from looper_eval.contamination import find_contamination
    from looper_eval.dataset import load_dataset
    from looper_eval.page import write_page

    evaluation = load_dataset(options.dataset).questions
    hits = find_contamination(load_dataset(options.train).questions, evaluation)
    if options.out:
        write_page(options.out, "".join(json.dumps(hit._asdict(), ensure_ascii=False) + "\n" for hit in hits))
    for hit in hits:
        print(f"{hit.kind}: {hit.eval_id} in {hit.train_id}: {hit.shared[:120]}")
    touched = len({hit.eval_id for hit in hits})
    print(f"{touched} of {len(evaluation)} evaluation questions have a match in {options.train}")


def _print(summary: object) -> None:
    from rich.console import Console

    from looper_eval.summary import Summary
    from looper_eval.tables import rich_tables

    assert isinstance(summary, Summary)
    # A pipe has no width of its own, and a narrow default would cut the cells.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    for table in rich_tables(summary):
        console.print(table)
    if summary.unfinished:
        console.print(f"not finished, left out: {', '.join(summary.unfinished)}")


EXAMPLES = {
    "run": """
looper-eval run --model sft=checkpoints/sft --model ppo=checkpoints/ppo_rl/merged \\
    --dataset madrylab/gsm8k-platinum --out runs/eval
looper-eval run --model r1=deepseek-ai/DeepSeek-R1-Distill-Llama-8B --preset deepseek-r1 --engine vllm \\
    --dataset openai/gsm8k --out runs/r1
looper-eval run --model mine=http://127.0.0.1:8000/v1#NAME --dataset mine_test.jsonl --out runs/mine""",
    "compare": "looper-eval compare runs/eval --grader platinum",
    "report": "looper-eval report runs/eval",
    "card": "looper-eval card runs/eval --name ppo --baseline sft",
    "contamination": "looper-eval contamination --train data/gsm8k_train.jsonl --dataset openai/gsm8k",
    "import": "looper-eval import samples_gsm8k.jsonl --name theirs --out runs/published",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="looper-eval",
        description="Paired evaluation on grade-school mathematics.",
        epilog=_examples(EXAMPLES["run"] + "\n" + EXAMPLES["report"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=_examples(EXAMPLES[name]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    run = command("run", "ask models every question, grade, compare")
    run.set_defaults(command=_run)
    run.add_argument(
        "--model", action="append", default=[], metavar="NAME=PLACE",
        help="checkpoint folder, LoRA adapter folder (ADAPTER or ADAPTER@BASE), hub name, or URL#MODEL of an "
        "OpenAI-compatible endpoint; repeat for each",
    )  # fmt: skip
    run.add_argument("--dataset", required=True, help="JSONL file or hub name, e.g. madrylab/gsm8k-platinum")
    run.add_argument("--out", type=Path, required=True, help="folder of results; the same command resumes it")
    run.add_argument("--preset", default="looper", help=f"how to ask: {', '.join(PRESETS)} (default: looper)")
    run.add_argument("--engine", help="for local weights: transformers (default), vllm or vllm-in-process")
    run.add_argument(
        "--vllm", action="append", default=[], metavar="KEY=VALUE",
        help="setting of vLLM, e.g. python=INTERPRETER, max_model_len=4096, compilation=graphs, or "
        "urls=http://127.0.0.1:8000 for a server that runs already; repeat for each",
    )  # fmt: skip
    run.add_argument("--samples", type=int, default=1, help="answers to each question (default: 1)")
    run.add_argument(
        "--coherence", type=int, metavar="K",
        help="also draw K samples a question and have the reward service of LOOPER_REWARD_URL score them",
    )  # fmt: skip
    run.add_argument(
        "--coherence-temperature", type=float, metavar="T",
        help="of those samples where the run is greedy (default: 0.7)",
    )  # fmt: skip
    run.add_argument("--limit", type=int, help="ask the first N questions only")
    run.add_argument("--batch-size", type=int, default=32, help="questions asked together (default: 32)")
    run.add_argument("--device", default="auto", help="auto, cpu or cuda")
    run.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    run.add_argument("--max-new-tokens", type=int, help="token limit of an answer")
    run.add_argument("--temperature", type=float, help="0 is greedy decoding")
    run.add_argument("--top-p", type=float)
    run.add_argument("--seed", type=int, help="for temperatures above 0")
    run.add_argument("--chat", action="store_true", default=None, help="use the model's chat template")
    run.add_argument("--system", help="system prompt (with --chat)")
    run.add_argument("--template", help="prompt with {q} in the place of the question")
    run.add_argument("--stop", action="append", help="text that ends an answer; repeat for each")
    run.add_argument(
        "--few-shot", metavar="FILE", help="JSONL of worked examples to put before each question"
    )
    run.add_argument("--shots", type=int, help="how many of them (default: 8)")

    compare = command("compare", "recompute summary.json from the records")
    compare.set_defaults(command=_compare)
    compare.add_argument("folder", type=Path)
    compare.add_argument(
        "--grader",
        default="robust",
        help="robust, platinum, lm-eval-strict, lm-eval-cot-strict or lm-eval-flexible",
    )

    report = command("report", "write report.html, report.md and report.json")
    report.set_defaults(command=_report)
    report.add_argument("folder", type=Path)

    card = command("card", "write a model card")
    card.set_defaults(command=_card)
    card.add_argument("folder", type=Path)
    card.add_argument("--name", required=True, metavar="MODEL", help="the model that the card is about")
    card.add_argument(
        "--baseline", metavar="MODEL", help="what it is compared with (default: the one before it)"
    )
    card.add_argument("--out", type=Path, help="file (default: <folder>/card-<model>.md)")

    contamination = command("contamination", "look for evaluation questions in training data")
    contamination.set_defaults(command=_contamination)
    contamination.add_argument("--train", required=True, help="JSONL file that a model was trained on")
    contamination.add_argument("--dataset", required=True, help="evaluation questions, as in run")
    contamination.add_argument("--out", type=Path, help="JSONL file for the hits")

    published = command("import", "grade answers that others published")
    published.set_defaults(command=_import)
    published.add_argument("file", type=Path, help="lm-eval samples JSONL, or an inspect log (.eval, .json)")
    published.add_argument("--name", required=True, metavar="MODEL", help="its name in tables")
    published.add_argument("--out", type=Path, required=True, help="folder of imports, new or to be added to")
    published.add_argument("--dataset", help="keep the answers to these questions only, as in run")
    return parser


def _examples(lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines.strip().splitlines())


if __name__ == "__main__":
    sys.exit(main())
