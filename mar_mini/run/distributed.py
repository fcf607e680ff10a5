"""The same training on several processes: each computes some rows of every batch.

`torchrun --nproc-per-node=4 -m mar_mini train ...` starts them. What is random in a step is drawn
for the whole batch, so the losses do not depend on the number of processes, up to rounding.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mar_mini.configs import choose
from mar_mini.fast.compiling import repeated_parts
from mar_mini.training import Training

STEP_TIMEOUT = timedelta(seconds=50)  # of what happens in a step: nobody is waited for longer
WAIT_TIMEOUT = timedelta(minutes=30)  # of what may take long, such as writing a checkpoint


class DistributedTraining(Training):
    """Each process holds the whole model; gradients are averaged (Li et al. 2020, DDP)."""

    def __init__(self, model, images, terms, config, seed=0):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        backend = "nccl" if next(model.parameters()).is_cuda else "gloo"
        self.group = dist.new_group(backend=backend, timeout=STEP_TIMEOUT)
        dist.barrier()  # preparing the data may have taken some processes longer than others
        for x in (*model.parameters(), *model.buffers()):
            dist.broadcast(x.detach(), 0, group=self.group)
        super().__init__(model, images, terms, config, seed)

    def distribute(self) -> nn.Module:
        ddp = nn.parallel.DistributedDataParallel
        return ddp(self.model, process_group=self.group, init_sync=False)

    def sync(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.network.no_sync()

    def mean(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, group=self.group)
        return values / self.world_size


class ShardedTraining(DistributedTraining):
    """Each process holds a shard of weights, averages and moments (Zhao et al. 2023, FSDP)."""

    def distribute(self) -> nn.Module:
        mesh = DeviceMesh.from_group(self.group, self.device.type)
        for module in (self.model, self.ema.module):
            for part in (*repeated_parts(module), module):
                fully_shard(part, mesh=mesh)
        return self.model

    def sync(self, last: bool) -> AbstractContextManager:
        self.network.set_requires_gradient_sync(last)
        self.network.set_is_last_backward(last)
        return nullcontext()


STRATEGIES = {"ddp": DistributedTraining, "fsdp": ShardedTraining}


@contextmanager
def join(strategy: str = "ddp", device: torch.device | str = "cpu") -> Iterator[type[Training]]:
    """Join the processes that torchrun started; gives their kind of `Training`.

    Without torchrun that is `Training` itself. device: of this process.
    """
    kind = choose("strategy", strategy, STRATEGIES)
    if not dist.is_torchelastic_launched():
        yield Training
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo", timeout=WAIT_TIMEOUT)  # a training adds a group for its steps
    yield kind
    dist.destroy_process_group()  # not after an error: it could wait for those who are gone


def own_device(kind: str = "auto") -> torch.device:
    """The device of this process ("auto": a GPU if there is one), of many GPUs its own one."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind.startswith("cuda") and dist.is_torchelastic_launched():
        kind = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(kind)


def in_all(work: Callable) -> list:
    """What `work(rank, world_size)` gives in each process; an OSError of one is raised in all."""
    if not dist.is_initialized():
        return [work(0, 1)]
    results = [None] * dist.get_world_size()
    try:
        result = work(dist.get_rank(), len(results))
    except OSError as error:
        result = error
    dist.all_gather_object(results, result)
    if errors := [x for x in results if isinstance(x, OSError)]:
        raise errors[0]
    return results


def in_first(work: Callable):
    """What `work` gives in the first process; the others wait for it."""
    return in_all(lambda rank, _: work() if rank == 0 else None)[0]
