"""TRL's GRPO or RLOO with rewards from the service: one import and one argument more than without.

    export LOOPER_REWARD_URL=http://127.0.0.1:8080 LOOPER_REWARD_KEY_FILE=trainer.key
    python examples/trl_training.py --model checkpoints/sft --data data/gsm8k_train.jsonl --steps 20

The data are records of `looper prepare-data`. Logs go to standard output, `<out>/trainer_state.json` and,
with every completion and its scores, `<out>/completions/*.parquet`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from looper_schemas.prompt import format_prompt
from looper_schemas.records import Problem, read_records
from looper_trainer.integrations.trl import AsyncLooperReward, LooperReward  # the import

TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def main() -> None:
    """Train for a few steps and save the logs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="checkpoints/sft")
    parser.add_argument("--data", type=Path, default=Path("data/gsm8k_train.jsonl"))
    parser.add_argument("--algorithm", choices=tuple(TRAINERS), default="grpo")
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--questions", type=int, default=8, help="questions a step")
    parser.add_argument("--samples", type=int, default=4, help="completions of each")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--give-up-after-s", type=float, default=300.0)
    options = parser.parse_args()

    problems = read_records(options.data, Problem)
    dataset = Dataset.from_list(
        [{"prompt": format_prompt(p.question), "question": p.question, "answer": p.answer} for p in problems]
    )
    reward_class = AsyncLooperReward if options.asynchronous else LooperReward
    trainer_class, config_class = TRAINERS[options.algorithm]
    trainer = trainer_class(
        model=options.model,
        reward_funcs=reward_class(give_up_after_s=options.give_up_after_s),  # the argument
        train_dataset=dataset,
        args=config_class(
            output_dir=str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=options.questions * options.samples,
            num_generations=options.samples,
            max_completion_length=options.max_new_tokens,
            learning_rate=options.learning_rate,
            logging_steps=1,
            log_completions=True,
            num_completions_to_print=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
    )
    trainer.train()
    trainer.save_state()


if __name__ == "__main__":
    main()
