"""Settings of `looper ppo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from looper_schemas.scoring import Disclosure, RewardMode
from looper_trainer.config import StageConfig

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Coefficient = Annotated[float, Field(ge=0)]
Discount = Annotated[float, Field(ge=0, le=1)]


class PPOConfig(StageConfig):
    """One PPO run.

    A step takes `batch_size` questions with `samples_per_question` completions each, and goes over them
    `ppo_epochs` times; an optimizer step takes `mini_batch_size * gradient_accumulation_steps` questions
    with all their completions. Forward passes are cut by tokens, not rows: `micro_batch_tokens` is a limit
    of memory and changes no result. Training samples use the full distribution (top_p is always 1).
    """

    # What is trained, on what, and where the result goes.
    model: str = "checkpoints/sft"
    train_file: Path = Path("data/gsm8k_train.jsonl")
    dev_file: Path | None = Path("data/gsm8k_dev.jsonl")
    rollouts_file: Path | None = None
    output: Path = Path("checkpoints/ppo_rl")
    run_id: str | None = None
    seed: Count = 0
    resume: bool = False

    # Sampling.
    sampler: Literal["transformers"] = "transformers"
    batch_size: Positive = 16
    samples_per_question: Positive = 4
    max_new_tokens: Positive = 256
    temperature: Rate = 1.0
    sample_batch_size: Positive = 64

    # The reward.
    reward_mode: RewardMode = RewardMode.ARM_GATED
    disclosure: Disclosure = Disclosure.COMPONENTS
    on_unscored: Literal["pause", "drop"] = "pause"
    give_up_after_s: Rate = 1800.0

    # The update.
    steps: Positive = 200
    mini_batch_size: Positive = 4
    gradient_accumulation_steps: Positive = 1
    ppo_epochs: Positive = 2
    learning_rate: Rate = 5e-6
    value_learning_rate: Rate = 1e-4
    warmup_steps: Count = 0
    weight_decay: Coefficient = 0.0
    max_grad_norm: Rate = 1.0
    lora_rank: Positive = 16
    lora_alpha: Positive = 32
    gamma: Discount = 1.0
    lam: Discount = 1.0
    clip_range: Rate = 0.2
    value_clip_range: Rate = 0.2
    vf_coef: Coefficient = 0.1
    entropy_coef: Coefficient = 0.0
    target_kl: Rate = 0.1
    kl_coef: Coefficient = 0.01
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    adaptive_kl_target: Rate = 6.0
    importance_weight_cap: Rate = 2.0
    critic_warmup_steps: Count = 0

    # Evaluation, stopping, saving.
    eval_every: Count = 20
    eval_questions: Count = 0
    patience: Count = 0
    save_every: Positive = 10
    keep_checkpoints: Positive = 2
    merge: bool = True

    # The machine.
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    micro_batch_tokens: Positive = 16384
    logit_chunk_tokens: Positive = 1024
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.questions_per_update > self.batch_size:
            raise ValueError(
                "mini_batch_size * gradient_accumulation_steps is more than batch_size; lower it, "
                "or take more questions a step"
            )
        if self.patience and not (self.eval_every and self.dev_file):
            raise ValueError("patience needs eval_every and dev_file")
        return self

    @property
    def questions_per_update(self) -> int:
        """Questions whose completions make one optimizer step."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    @property
    def run_name(self) -> str:
        """What the reward service and the records know this run as."""
        return self.run_id or f"{self.output.name}-seed{self.seed}"
