"""Several processes that train one policy: `accelerate launch --num_processes 2 -m looper_trainer.cli ppo`.

Data parallel: every process holds the policy and takes its share of the micro-batches. Measured logprobs and
gradients are summed over the processes before they are used, so all of them take the optimizer steps that one
process would take, but for the order of sums. Only rank 0 samples, talks to the reward service and writes
files; what it learns is broadcast. A failure on rank 0 is broadcast too, so that the others end with it
instead of waiting for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from looper_trainer.errors import UserError

T = TypeVar("T")
# Rank 0 may wait long, for its sampler's start or a reward service that is away; the others wait for it. When
# it dies, the launcher ends them.
LONGEST_WAIT = timedelta(days=7)


class Ranks(Protocol):
    """This process among those that train together."""

    rank: int
    size: int

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of `items`; every item is some process's."""
        ...

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        ...

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank.

        Raises:
            UserError: rank 0 failed; there, whatever it raised.
        """
        ...

    def on_first(self, make: Callable[[], T]) -> T | None:
        """What `make` gives on rank 0, there alone; None elsewhere. Fails like `from_first`."""
        ...


class Alone:
    """One process, the usual case."""

    rank = 0
    size = 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """All of them."""
        return items

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Nothing to add."""

    def from_first(self, make: Callable[[], T]) -> T:
        """What it gives."""
        return make()

    def on_first(self, make: Callable[[], T]) -> T | None:
        """What it gives."""
        return make()


class Elsewhere:
    """Stands for what only rank 0 has."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name}: rank 0 alone has this")


class Group:
    """The processes of torch.distributed's default group."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every `size`-th item, beginning with the `rank`-th."""
        return items[self.rank :: self.size]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """One reduction over all of them, flattened together."""
        listed = list(tensors)
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in listed])
        self._dist.all_reduce(flat)
        start = 0
        for tensor in listed:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def from_first(self, make: Callable[[], T]) -> T:
        """See `Ranks`."""
        told: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.rank == 0:
            try:
                told = [make(), None]
            except BaseException as error:
                failure, told = error, [None, str(error) or type(error).__name__]
        # Over the processors: a GPU that waits for a message would keep a sampler on it from its work.
        self._dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if failure is not None:
            raise failure
        if told[1] is not None:
            raise UserError(f"rank 0 failed: {told[1]}")
        made: T = told[0]
        return made

    def on_first(self, make: Callable[[], T]) -> T | None:
        """See `Ranks`."""
        made: list[T] = []
        self.from_first(lambda: made.append(make()))
        return made[0] if made else None


def join() -> Ranks:
    """The processes that `accelerate launch` started, or this one alone.

    Each process uses the GPU of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Alone()
    import torch.distributed as dist

    if not dist.is_initialized():
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=LONGEST_WAIT)
    return Group()


def leave() -> None:
    """End what `join` began, once every process is done."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sum_gradients(ranks: Ranks, parameters: Iterable[nn.Parameter]) -> None:
    """Sum `.grad` over the processes; one that a process did not need counts as zero there."""
    if ranks.size == 1:
        return
    needed = [p for p in parameters if p.requires_grad]
    for parameter in needed:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.sum_(p.grad for p in needed if p.grad is not None)
