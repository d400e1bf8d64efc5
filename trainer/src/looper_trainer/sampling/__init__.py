"""Completions from the current policy: the `Sampler` protocol in `base`, one module for each engine."""

from __future__ import annotations

from looper_trainer.sampling.base import Completion, Sampler, SamplingParams

__all__ = ["Completion", "Sampler", "SamplingParams"]
