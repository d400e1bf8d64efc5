"""What rank 0 alone does in a run: sampling, asking for scores, bringing the policy to the sampler."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path

from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.data import Data
from looper_trainer.ppo.policy import Policy
from looper_trainer.ppo.publish import publish
from looper_trainer.ppo.rollout import solved_greedily, solved_in_samples
from looper_trainer.ppo.scoring import Scorer
from looper_trainer.ppo.step import Samples, collect
from looper_trainer.sampling.base import Sampler, SamplingParams


class Source:
    """Samples of the current policy with their scores, one step ahead where `config.overlap` says so."""

    def __init__(
        self, config: PPOConfig, data: Data, policy: Policy, sampler: Sampler, scorer: Scorer
    ) -> None:
        self.config, self.data, self.policy, self.sampler, self.scorer = config, data, policy, sampler, scorer
        self._version = 0
        self._ahead: tuple[int, Future[Samples]] | None = None

    def publish(self, version: int) -> None:
        """Sample from the policy as it is now from here on, and know it as `version`."""
        publish(self.policy, self.sampler, version, self._folder() / "next", self.config)
        self._version = version

    def collect(self, step: int) -> Samples:
        """The samples of `step`. With overlap, those of the next one are begun, with the same policy."""
        if self._ahead is not None and self._ahead[0] == step:
            samples = self._ahead[1].result()
        else:
            samples = self._collect(step)
        if self.config.overlap and step < self.config.steps:
            self._ahead = step + 1, _in_background(self, step + 1)
        return samples

    def dev_solved(self) -> list[bool]:
        """Which dev questions the published policy solves greedily."""
        with self.policy.precision():
            return solved_greedily(self.sampler, self.data.dev, self.config.max_new_tokens)

    def dev_in_samples(self) -> list[int]:
        """Of each dev question, in how many of `dev_samples` answers the published policy solves it."""
        config = self.config
        params = SamplingParams(config.max_new_tokens, config.dev_temperature or config.temperature)
        with self.policy.precision():
            return solved_in_samples(self.sampler, self.data.dev, params, config.dev_samples, config.seed)

    def _collect(self, step: int) -> Samples:
        return collect(step, self._version, self.config, self.data, self.policy, self.sampler, self.scorer)

    def _folder(self) -> Path:
        return self.config.vllm_folder or self.config.output / "vllm"


def _in_background(source: Source, step: int) -> Future[Samples]:
    future: Future[Samples] = Future()

    def work() -> None:
        try:
            future.set_result(source._collect(step))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="sample-ahead", daemon=True).start()
    return future
