"""The same training on several processes: each computes some rows of every batch.

    torchrun --nproc-per-node=4 recipes/train.py ...

What is random in a step is drawn for the whole batch from (seed, step), so the losses do not depend
on how many processes there are, up to rounding. PyTorch does the work: `DistributedDataParallel`
(each process holds the whole model) or `fully_shard` (each holds a part of all weights, averages
and moments).
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mar_mini.configs import choose

STEP_TIMEOUT = timedelta(seconds=50)  # of what happens in a step: nobody is waited for longer
WAIT_TIMEOUT = timedelta(minutes=30)  # of what may take long, such as writing a checkpoint


class Alone:
    """One process trains by itself; and what a training asks of several of them."""

    rank, count = 0, 1

    def micro_batches(self, batch_size: int, accumulate: int = 1) -> list[slice]:
        """The rows of a batch that this process computes, one slice after the other.

        Raises ValueError if the batch cannot be cut into equal parts.
        """
        parts = self.count * accumulate
        if batch_size % parts:
            raise ValueError(
                f"batch_size is {batch_size}; expected a multiple of {parts} "
                f"({self.count} processes with {accumulate} micro batches each), such as "
                f"{max(1, round(batch_size / parts)) * parts}"
            )
        size = batch_size // parts
        first = self.rank * accumulate * size
        return [slice(first + i * size, first + (i + 1) * size) for i in range(accumulate)]

    def own_seed(self, seed: int) -> int:
        """For random numbers that no other process may have; the first one's are `seed`."""
        if self.rank == 0:
            return seed
        return int(np.random.SeedSequence((seed, self.rank)).generate_state(1)[0])

    def equalise(self, model: nn.Module) -> None:
        """Give all processes the weights of the first one."""

    def distribute(self, model: nn.Module, average: nn.Module) -> nn.Module:
        """Prepare a model and its average for training; returns what to call instead of it."""
        return model

    def micro_step(self, network: nn.Module, last: bool) -> AbstractContextManager:
        """Around each forward and backward pass: gradients travel in the last one of a step."""
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """Over the processes."""
        return values

    def whole(self, x: Tensor) -> Tensor:
        """All of a tensor that may be in shards."""
        return x

    def part(self, x: Tensor, like: Tensor) -> Tensor:
        """Of a whole tensor the shard of this process, if `like` is one."""
        return x

    def gather(self, value: Any) -> list:
        """The values of all processes, in the order of their ranks."""
        return [value]

    def first(self, value: Any) -> Any:
        """The value of the first process."""
        return self.gather(value)[0]


class Replicated(Alone):
    """Each process holds the whole model; gradients are averaged (Li et al. 2020, DDP)."""

    def __init__(self):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        # talks on CPUs, and has patience
        self.control = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)

    def equalise(self, model):
        self.gather(None)  # to prepare the data may take some longer than others
        for x in (*model.parameters(), *model.buffers()):
            dist.broadcast(x.detach(), 0)

    def distribute(self, model, average):
        return nn.parallel.DistributedDataParallel(model, init_sync=False)

    def micro_step(self, network, last):
        return nullcontext() if last else network.no_sync()

    def mean(self, values):
        values = values.clone()
        dist.all_reduce(values)
        return values / self.count

    def gather(self, value):
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self.control)
        return values


class Sharded(Replicated):
    """Each process holds a part of all weights, averages and moments (Zhao et al. 2023, FSDP)."""

    def distribute(self, model, average):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from mar_mini.fast.compiling import repeated_parts

        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, (self.count,))
        for module in (model, average):
            for part in (*repeated_parts(module), module):
                fully_shard(part, mesh=mesh)
        return model

    @contextmanager
    def micro_step(self, network, last):
        network.set_requires_gradient_sync(last)
        network.set_is_last_backward(last)
        yield

    def whole(self, x):
        return x.full_tensor() if hasattr(x, "full_tensor") else x

    def part(self, x, like):
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(x, DTensor) or not isinstance(like, DTensor) or x.shape != like.shape:
            return x
        # cut by each process for itself: all have the whole
        return distribute_tensor(
            x.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )


STRATEGIES = {"ddp": Replicated, "fsdp": Sharded}


def started_by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def own_device(kind: str) -> torch.device:
    """The device of this process: of many GPUs the one that torchrun's numbering gives it."""
    if torch.device(kind).type == "cuda" and started_by_torchrun():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(kind)


@contextmanager
def join(strategy: str = "ddp", device: torch.device | str = "cpu") -> Iterator[Alone]:
    """The processes that torchrun started, this one among them; `Alone` where it did not.

    strategy  "ddp": each holds the whole model; "fsdp": each a part of it
    device    of this process: talks over nccl if it is a GPU, else over gloo

    A process that waits for another one in a step gives up after 50 seconds. Raises ValueError
    for an unknown strategy.
    """
    kind = choose("strategy", strategy, STRATEGIES)
    if not started_by_torchrun():
        yield Alone()
        return
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=STEP_TIMEOUT)
    yield kind()
    dist.destroy_process_group()  # not after an error: it could wait for those who are gone
