"""verl's own reward manager with rewards from the service, without its trainer: to see that the two meet.

    export LOOPER_REWARD_URL=http://127.0.0.1:8080 LOOPER_REWARD_KEY_FILE=trainer.key
    python examples/verl_reward_loop.py --tokenizer checkpoints/sft

Needs verl, in an environment of its own (it pins another transformers than the trainer). A training run takes
the same four settings on its command line; `looper_trainer.integrations.verl` shows them.
"""

from __future__ import annotations

import argparse
import asyncio

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager

QUESTIONS = [("What is 2 + 2?", "4"), ("What is 3 * 3?", "9")]
SOLUTIONS = ["So it is\n#### 4", "Then\n#### 9", "That makes\n#### 4", "I guess\n#### 7"]


def main() -> None:
    """Score four solutions of each of two questions through verl and print its reward tensor's sums."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", default="checkpoints/sft")
    tokenizer = AutoTokenizer.from_pretrained(parser.parse_args().tokenizer)
    config = OmegaConf.create(
        {
            "reward": {
                "num_workers": 1,
                "custom_reward_function": {
                    "path": "pkg://looper_trainer.integrations.verl",
                    "name": "compute_score",
                    "reward_kwargs": {"group_size": len(SOLUTIONS), "run_id": "verl-example"},
                },
                "reward_manager": {"source": "register", "name": "naive"},
            }
        }
    )
    rows = [(index, *question, text) for index, question in enumerate(QUESTIONS) for text in SOLUTIONS]
    data = batch_of(rows, tokenizer)

    async def score() -> list[dict]:
        manager = load_reward_manager(config, tokenizer)
        return await asyncio.gather(*(manager.run_single(data[i : i + 1]) for i in range(len(data))))

    results = asyncio.run(score())
    manager_class = type(load_reward_manager(config, tokenizer))
    rm_scores = manager_class.assemble_rm_scores(data, [result["reward_score"] for result in results])
    for (_, question, _, text), result in zip(rows, results, strict=True):
        print(f"{question} {text!r}: {result}")
    print("rm_scores", rm_scores.sum(dim=1).tolist())


def batch_of(rows: list[tuple[int, str, str, str]], tokenizer) -> DataProto:
    """Completions in verl's own container, padded on the right as its rollouts are."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for *_, text in rows]
    length = max(map(len, ids))
    responses = torch.tensor([one + [0] * (length - len(one)) for one in ids])
    mask = torch.tensor([[1] + [1] * len(one) + [0] * (length - len(one)) for one in ids])
    return DataProto.from_dict(
        tensors={"prompts": torch.zeros(len(rows), 1, dtype=torch.long), "responses": responses}
        | {"attention_mask": mask},
        non_tensors={
            "data_source": np.array(["openai/gsm8k"] * len(rows), dtype=object),
            "reward_model": np.array([{"ground_truth": gold} for _, _, gold, _ in rows], dtype=object),
            "extra_info": np.array(
                [{"split": "train", "index": index, "question": question} for index, question, _, _ in rows],
                dtype=object,
            ),
        },
    )


if __name__ == "__main__":
    main()
