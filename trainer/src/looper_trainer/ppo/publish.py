"""Bringing the policy that was trained to the sampler that draws from it, and proof that it is the same.

A sampler in this process reads the policy's own weights. One that runs elsewhere holds a copy: after every
update it is given the new one under the number of the step that made it, and before every sampling it is
asked which number it holds.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol, runtime_checkable

from looper_trainer.errors import UserError
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.policy import Policy
from looper_trainer.sampling.base import Sampler


@runtime_checkable
class RemoteSampler(Protocol):
    """A sampler with a copy of the policy."""

    @property
    def policy_version(self) -> int | None:
        """What `load_adapter` said last; None: the base model."""

    def load_adapter(self, folder: Path, version: int, *, take: bool = False) -> None:
        """Sample from the adapter in `folder` from now on."""

    def load_weights(self, folder: Path, version: int, *, take: bool = False) -> None:
        """Sample from the whole model in `folder` from now on."""

    def sleep(self) -> None:
        """Give the GPU's memory back until `wake`."""

    def wake(self) -> None:
        """Take it again."""


def publish(policy: Policy, sampler: Sampler, version: int, scratch: Path, config: PPOConfig) -> None:
    """Let `sampler` draw from `policy` as it is now, and know it as `version`.

    Where the two take turns on the GPU, it is the sampler's from here until `hand_to_trainer`.

    Args:
        scratch: a folder that does not exist yet, on the sampler's file system.
    """
    if not isinstance(sampler, RemoteSampler):
        return
    shutil.rmtree(scratch, ignore_errors=True)
    policy.save_for_sampler(scratch)
    if config.offload:
        policy.leave_gpu()
    if config.vllm_sleep:
        sampler.wake()
    load = sampler.load_weights if policy.train_what == "full" else sampler.load_adapter
    load(scratch, version, take=True)


def hand_to_trainer(policy: Policy, sampler: Sampler, config: PPOConfig) -> None:
    """The sampler is done for this step: its memory is the trainer's, where they take turns."""
    if isinstance(sampler, RemoteSampler) and config.vllm_sleep:
        sampler.sleep()
    if config.offload:
        policy.return_to_gpu()


def require_version(sampler: Sampler, version: int) -> None:
    """Refuse to sample from another policy than the one of `version`."""
    if isinstance(sampler, RemoteSampler) and sampler.policy_version != version:
        raise UserError(
            f"the sampler holds policy {sampler.policy_version}, but {version} is the one that is trained; "
            "go on with --resume"
        )
