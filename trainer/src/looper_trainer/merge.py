"""`looper merge`: a LoRA adapter and its base model as one plain model folder."""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict

from looper_trainer.config import StageConfig


class MergeConfig(StageConfig):
    """Merge a LoRA adapter into its base model."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    adapter: Path = Path("checkpoints/ppo_rl/adapter")
    """folder of the adapter"""
    base: str | None = None
    """model it belongs to; none: the one it says it was trained on"""
    output: Path = Path("checkpoints/ppo_rl/merged")
    """folder of the plain model"""


def run(config: MergeConfig) -> None:
    """Write the base model with the adapter merged into it to `config.output`.

    Raises:
        CheckpointError, UserError: see `models.merge_adapter`.
    """
    from looper_trainer.models import merge_adapter

    print(f"merging {config.adapter} into {config.base or 'the model it was trained on'}", flush=True)
    merge_adapter(config.adapter, config.output, config.base)
    print(f"wrote {config.output}")
