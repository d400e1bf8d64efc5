"""Sanity check: one or two questions through all eight arms on a real model, with every score and reward.

python -m regime_w.demo --model FOLDER_OR_NAME [--question "..." --gold 42]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from looper_schemas.scoring import Arm, FailedQuestion, Question, RewardMode
from regime_w.arms import ArmSpec, build_all_arms
from regime_w.model_files import EmbeddingUnavailable
from regime_w.scorer import Scorer, parse_arm
from regime_w.settings import RegimeWSettings

if TYPE_CHECKING:
    import torch

QUESTIONS = (
    (
        "A baker packs 6 boxes with 4 rolls each. She sells half of the rolls for $3 apiece and gives "
        "the rest away. How many dollars does she take in?",
        "36",
    ),
    (
        "A hose fills 15 litres a minute into a tank that holds 240 litres and is a quarter full. After "
        "how many minutes is the tank full?",
        "12",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when every question was scored, 2 (one line on stderr) when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m regime_w.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--question", help="a question of your own, in place of the two built in")
    parser.add_argument("--gold", help="its answer, if known")
    parser.add_argument("--embedding-model", default=RegimeWSettings().embedding_model)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--mode", type=RewardMode, choices=list(RewardMode), default=RewardMode.ARM_GATED)
    options = parser.parse_args(arguments)
    if options.gold is not None and options.question is None:
        parser.error("--gold needs --question")
    if options.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")

    problems = QUESTIONS if options.question is None else ((options.question, options.gold),)
    try:
        scorer = Scorer(RegimeWSettings(embedding_model=options.embedding_model))
        model, tokenizer = load_generator(options.model)
    except (EmbeddingUnavailable, OSError, ValueError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2

    failed = False
    for number, (text, gold) in enumerate(problems, start=1):
        print(f"\nQuestion {number}: {text}\ngold answer: {gold if gold is not None else 'unknown'}")
        arms = []
        for index, spec in enumerate(build_all_arms()):
            completion, tokens = generate(model, tokenizer, spec, text, options.max_new_tokens)
            arms.append(Arm(id=str(index), arm=index, full_text=completion, tokens_out=tokens))
            print(f"  {spec.family:8} {spec.name:20} {tokens:4} tokens, answer {parse_arm(arms[-1]).answer}")
        question = Question(id=str(number), question=text, gold_answer=gold, arms=tuple(arms))
        failed |= not _report(scorer, question, options.mode)
    return 1 if failed else 0


def _report(scorer: Scorer, question: Question, mode: RewardMode) -> bool:
    (result,) = scorer.score([question], mode)
    if isinstance(result, FailedQuestion):
        print(f"  failed: {result.error.code.value}")
        return False
    scores, flags = result.scores, result.correct_flags
    if scores is None or flags is None:
        raise TypeError("a scorer gives full components")
    components = {"s_end": scores.s_end, "s_path": scores.s_path, "s_cf": scores.s_cf, "s_wm": scores.s_wm}
    print("  " + "  ".join(f"{key} {value:.4f}" for key, value in components.items() if value is not None))
    for spec, arm, correct in zip(build_all_arms(), result.arms, flags, strict=True):
        verdict = {True: "correct", False: "wrong", None: "unknown"}[correct]
        print(f"  {spec.family:8} {spec.name:20} {verdict:8} reward {arm.reward:+.4f}")
    print(f"  reward ({mode.value}) {result.reward:+.4f}" + ("  degenerate" if result.degenerate else ""))
    return True


def load_generator(name: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub name.

    Raises:
        OSError, ValueError: there is no such model.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    return model, tokenizer


def prompt_ids(tokenizer: Any, spec: ArmSpec, question: str) -> torch.Tensor:
    """Token ids (1, T) of the arm's prompt, by the tokenizer's chat template where it has one."""
    system, user = spec.system_prompt, spec.user_prompt(question)
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    else:
        ids = tokenizer(f"{system}\n\n{user}\n\nSolution:", return_tensors="pt").input_ids
    return ids


def generate(
    model: Any, tokenizer: Any, spec: ArmSpec, question: str, max_new_tokens: int
) -> tuple[str, int]:
    """One completion, sampled with the arm's temperature, top_p and seed, and its length in tokens."""
    import torch

    fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids_1T = prompt_ids(tokenizer, spec, question).to(model.device)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(spec.seed)
        output_1T = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            do_sample=True,
            temperature=spec.temperature,
            top_p=spec.top_p,
            top_k=0,
            max_new_tokens=max_new_tokens,
            pad_token_id=fill,
        )
    completion = output_1T[0, ids_1T.shape[1] :]
    return tokenizer.decode(completion, skip_special_tokens=True), len(completion)


if __name__ == "__main__":
    sys.exit(main())
