"""Two processes that train one policy take the steps that one process takes."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from looper_schemas.records import Problem
from looper_trainer.ppo.checkpoint import step_folder
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.data import Data
from looper_trainer.ppo.loop import train
from looper_trainer.ppo.ranks import Elsewhere, Group, join

from .conftest import CountingScorer, build
from .test_loop import DyingScorer, go, metrics_of

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def in_two_processes(work: Callable[[int], None]) -> list[int]:
    """Exit codes of two forked processes that find each other as `accelerate launch` has them do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
                os.environ.update({k: str(v) for k, v in names.items()}, MASTER_ADDR="127.0.0.1")
                work(rank)
                if dist.is_initialized():  # the first keeps the store by which the other still connects
                    dist.barrier()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def train_here(config: PPOConfig, problems: list[Problem], scorer: CountingScorer) -> None:
    ranks = join()
    assert isinstance(ranks, Group)
    policy, sampler = build(config)
    ends = (sampler, scorer) if ranks.rank == 0 else (Elsewhere(), Elsewhere())
    train(config, Data(problems, problems[:2], []), policy, *ends, ranks)
    torch.save(
        [p.detach() for p in policy.adapter_parameters()], config.output.with_name(f"rank{ranks.rank}.pt")
    )


@pytest.mark.parametrize("warmup", [0, 1], ids=["policy", "critic first"])
def test_two_gloo_processes_train_what_one_process_trains(
    ppo_config: PPOConfig, problems: list[Problem], tmp_path: Path, warmup: int
) -> None:
    settings = {
        "steps": 2, "micro_batch_tokens": 120, "critic_warmup_steps": warmup, "eval_every": 2,
        "dev_file": Path("dev"), "learning_rate": 1e-3, "entropy_coef": 0.01,
    }  # fmt: skip
    one = ppo_config.model_copy(update=settings)
    go(one, problems, CountingScorer("aeiou"), dev=2)
    two = one.model_copy(update={"output": tmp_path / "two", "run_id": one.run_name})
    assert in_two_processes(lambda rank: train_here(two, problems, CountingScorer("aeiou"))) == [0, 0]

    def adapter(config: PPOConfig) -> dict[str, torch.Tensor]:
        return load_file(step_folder(config.output, 2) / "adapter" / "adapter_model.safetensors")

    alone, together = adapter(one), adapter(two)
    assert any(weight.any() for name, weight in alone.items() if "lora_B" in name)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-3, atol=1e-6)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))
    for here, there in zip(metrics_of(one), metrics_of(two), strict=True):
        assert here.keys() == there.keys()
        # Counts of clipped values turn on the last bit of values that have not moved.
        for key in here.keys() - {"seconds", "step_seconds", "clip_fraction", "value_clip_fraction"}:
            number = isinstance(here[key], int | float)
            near = pytest.approx(here[key], rel=1e-3, abs=1e-5) if number else here[key]
            assert there[key] == near, key


def test_the_others_wait_for_the_first_rank_longer_than_for_any_outage() -> None:
    def work(rank: int) -> None:
        join()
        backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        # torch's own limit is half an hour for gloo, ten minutes for NCCL
        assert backend.options._timeout > timedelta(
            seconds=10 * PPOConfig.model_fields["give_up_after_s"].default
        )

    assert in_two_processes(work) == [0, 0]


def test_a_failure_on_the_first_rank_ends_the_others_too(
    ppo_config: PPOConfig, problems: list[Problem], capfd: pytest.CaptureFixture[str]
) -> None:
    codes = in_two_processes(lambda rank: train_here(ppo_config, problems, DyingScorer(dies_at=2)))
    assert codes == [1, 1]
    assert "rank 0 failed: no answer from the reward service" in capfd.readouterr().err
    assert step_folder(ppo_config.output, 1).is_dir()
