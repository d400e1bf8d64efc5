"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is `<output>/checkpoints/step_00010/` with the adapter, the value head, the optimizer, random
states and `state.json`. It is written to a temporary folder and renamed, so a folder of that name is always
whole. Which questions and seeds come next follows from the step alone (see `rollout`).
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from looper_trainer.errors import CheckpointError
from looper_trainer.folders import file_digest, policy_id
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.policy import Policy
from looper_trainer.sampling.options import SamplerOptions

# What may differ when a run is resumed: how long it goes on, where, in how much memory, how fast it learns
# (a step takes its learning rates from the settings, see `set_learning_rates`).
FREE_ON_RESUME = frozenset(
    {
        "learning_rate",
        "value_learning_rate",
        "resume",
        "steps",
        "patience",
        "max_minutes",
        "result",
        "save_every",
        "keep_checkpoints",
        "merge",
        "give_up_after_s",
        "on_unscored",
    }
    | {"output", "run_id", "device", "sample_batch_size", "micro_batch_tokens", "logit_chunk_tokens"}
    | {
        "activation_checkpointing",
        "torch_compile",
        "dry_run",
        "memory_limit_gb",
        "offload",
        "preset",
        "score_chunk",
        "score_connections",
    }
    | {name for name in SamplerOptions.model_fields if name.startswith("vllm_") and name != "vllm_seeded"}
)


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` completed steps; `inputs` is what `digest_inputs` says."""

    step: int
    kl_coef: float
    scorer_id: str | None = None
    best_step: int | None = None
    best_accuracy: float | None = None
    stale_evaluations: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)


def digest_inputs(config: PPOConfig) -> dict[str, str]:
    """What a run is made from, by the names of its settings: digests of the files and the model's weights."""
    files = {
        "train_file": config.train_file,
        "dev_file": config.dev_file if config.eval_every else None,
        "rollouts_file": config.rollouts_file,
    }
    digests = {name: file_digest(file) for name, file in files.items() if file}
    return digests | {"model": policy_id(config.model)}


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
    policy.save(partial)
    torch.save({"optimizer": optimizer.state_dict(), "torch_rng": _torch_rng()}, partial / "optimizer.pt")
    document = {"state": asdict(state), "rng": _plain_rng(), "config": _fixed_settings(config)}
    (partial / "state.json").write_text(json.dumps(document), encoding="utf-8")
    _flush(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    _prune(config, state)
    return folder


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
            f"{folder}: is no readable PPO checkpoint; remove it, and --resume takes the one before"
        ) from None
    now = _fixed_settings(config)
    for key in sorted((saved.keys() | now.keys()) - FREE_ON_RESUME):
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
        policy.load_saved(folder)
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        _restore_rng(
            json.loads((folder / "state.json").read_text(encoding="utf-8"))["rng"], saved["torch_rng"]
        )
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder}: cannot load the checkpoint: {reason}; remove it, and --resume takes the one before"
        ) from error
    return state


def export(state: TrainState, policy: Policy, config: PPOConfig) -> int:
    """Put the result into `policy` and into `config.output`; returns the step it is from.

    The result is the best checkpoint where dev accuracy was measured and `result` says so, else the last
    state: `adapter/`, or with every weight trained a plain folder `merged/`, and `value_head.safetensors`.
    """
    chosen = state.step if state.best_step is None or config.result == "last" else state.best_step
    source = step_folder(config.output, chosen)
    if chosen != state.step:
        policy.load_saved(source)
    partial = config.output / "result.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if config.train == "full":
        _write_plain(policy, partial / "merged", config)
    else:
        shutil.copytree(source / "adapter", partial / "adapter")
    for folder in list(partial.iterdir()):
        shutil.rmtree(config.output / folder.name, ignore_errors=True)
        folder.rename(config.output / folder.name)
    shutil.rmtree(partial)
    shutil.copy(source / "value_head.safetensors", config.output / "value_head.safetensors")
    result = replace(state, step=chosen)
    (config.output / "result.json").write_text(
        json.dumps({"from_step": chosen, "trained_steps": state.step, **asdict(result)}, indent=2) + "\n",
        encoding="utf-8",
    )
    return chosen


def _write_plain(policy: Policy, folder: Path, config: PPOConfig) -> None:
    """The trained model as `transformers` loads it, in the dtype in which its start is stored."""
    from transformers import AutoConfig, AutoTokenizer

    stored = AutoConfig.from_pretrained(config.model).dtype or torch.float32
    copy.deepcopy(policy.causal_lm).to("cpu", stored).save_pretrained(folder)
    AutoTokenizer.from_pretrained(config.model).save_pretrained(folder)


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
