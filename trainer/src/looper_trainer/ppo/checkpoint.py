"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is `<output>/checkpoints/step_00010/` with the adapter, the value head, the optimizer, random
states and `state.json`. It is written to a temporary folder and renamed, so a folder of that name is always
whole. Which questions and seeds come next follows from the step alone (see `rollout`).
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from looper_trainer.errors import CheckpointError
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.policy import Policy

# What may differ when a run is resumed: how long it goes on, where, and in how much memory.
FREE_ON_RESUME = frozenset(
    {
        "resume",
        "steps",
        "patience",
        "max_minutes",
        "save_every",
        "keep_checkpoints",
        "merge",
        "give_up_after_s",
        "on_unscored",
    }
    | {"output", "run_id", "device", "sample_batch_size", "micro_batch_tokens", "logit_chunk_tokens"}
    | {"activation_checkpointing"}
)


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` completed steps."""

    step: int
    kl_coef: float
    scorer_id: str | None = None
    best_step: int | None = None
    best_accuracy: float | None = None
    stale_evaluations: int = 0


def step_folder(output: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return output / "checkpoints" / f"step_{step:05d}"


def save_checkpoint(
    state: TrainState, policy: Policy, optimizer: torch.optim.Optimizer, config: PPOConfig
) -> Path:
    """Write the checkpoint of `state`, then drop old ones (never the best, nor the newest)."""
    folder = step_folder(config.output, state.step)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_policy(policy, partial)
    torch.save({"optimizer": optimizer.state_dict(), "torch_rng": _torch_rng()}, partial / "optimizer.pt")
    document = {"state": asdict(state), "rng": _plain_rng(), "config": _fixed_settings(config)}
    (partial / "state.json").write_text(json.dumps(document), encoding="utf-8")
    _flush(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    _prune(config, state)
    return folder


def save_policy(policy: Policy, folder: Path) -> None:
    """Write `adapter/` (a PEFT adapter) and `value_head.safetensors` into `folder`."""
    from safetensors.torch import save_file

    policy.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    head = {name: weight.contiguous() for name, weight in policy.value_head.state_dict().items()}
    save_file(head, folder / "value_head.safetensors")


def latest_checkpoint(output: Path) -> Path:
    """The newest checkpoint of the run in `output`.

    Raises:
        CheckpointError: there is none.
    """
    found = sorted(
        path.parent for path in output.glob("checkpoints/step_*/state.json") if path.parent.suffix == ""
    )
    if not found:
        raise CheckpointError(f"{output}: holds no PPO checkpoint to resume; start without --resume")
    return found[-1]


def read_state(folder: Path, config: PPOConfig) -> TrainState:
    """The state in checkpoint `folder`, after checking that `config` goes on with the same run.

    Raises:
        CheckpointError: no readable checkpoint, or a setting that would change the run.
    """
    try:
        document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        state, saved = TrainState(**document["state"]), dict(document["config"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder}: is no readable PPO checkpoint; remove it or resume another"
        ) from None
    now = _fixed_settings(config)
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key):
            raise CheckpointError(
                f"{folder}: was made with {key} = {saved.get(key)!r}, not {now.get(key)!r}; "
                "resume with the same setting, or start a new run in another output folder"
            )
    return state


def load_checkpoint(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, config: PPOConfig
) -> TrainState:
    """Put the weights, optimizer and random states of `folder` in place; returns its state.

    Raises:
        CheckpointError: no readable checkpoint, one of another run or of another model.
    """
    state = read_state(folder, config)
    try:
        load_policy(policy, folder)
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        _restore_rng(
            json.loads((folder / "state.json").read_text(encoding="utf-8"))["rng"], saved["torch_rng"]
        )
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: cannot load the checkpoint: {reason}; resume another") from error
    return state


def load_policy(policy: Policy, folder: Path) -> None:
    """Put the adapter and value head in `folder` in place."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    outcome = set_peft_model_state_dict(policy.model, adapter)
    missing = [name for name in outcome.missing_keys if "lora_" in name]
    if missing or outcome.unexpected_keys:
        raise ValueError("the adapter does not fit the model")
    policy.value_head.load_state_dict(load_file(folder / "value_head.safetensors"))


def export(state: TrainState, policy: Policy, config: PPOConfig) -> int:
    """Copy the result to `<output>/adapter` and `<output>/value_head.safetensors`; returns its step.

    The result is the best checkpoint where dev accuracy was measured, else the last state.
    """
    chosen = state.step if state.best_step is None else state.best_step
    source = step_folder(config.output, chosen)
    partial = config.output / "result.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(config.output / "adapter", ignore_errors=True)
    (partial / "adapter").rename(config.output / "adapter")
    (partial / "value_head.safetensors").replace(config.output / "value_head.safetensors")
    shutil.rmtree(partial)
    result = replace(state, step=chosen)
    (config.output / "result.json").write_text(
        json.dumps({"from_step": chosen, "trained_steps": state.step, **asdict(result)}, indent=2) + "\n",
        encoding="utf-8",
    )
    return chosen


def _fixed_settings(config: PPOConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=set(FREE_ON_RESUME))


def _plain_rng() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)]
    return {"python": [version, list(internal), gauss], "numpy": numpy_state}


def _torch_rng() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _restore_rng(plain: dict[str, Any], torch_rng: dict[str, Any]) -> None:
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch_rng["cpu"])
    if torch_rng["cuda"] and len(torch_rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(torch_rng["cuda"])


def _flush(folder: Path) -> None:
    """Bring every file of `folder` to the disk before its rename makes it count."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _prune(config: PPOConfig, state: TrainState) -> None:
    whole = sorted(path for path in (config.output / "checkpoints").glob("step_*") if path.suffix == "")
    best = None if state.best_step is None else step_folder(config.output, state.best_step)
    for path in whole[: -config.keep_checkpoints]:
        if path != best:
            shutil.rmtree(path)
