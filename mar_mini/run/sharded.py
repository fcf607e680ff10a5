"""Checkpoints that many processes write and read together, each its part (PyTorch's DCP).

A checkpoint is a folder of safetensors files, with names, sizes and checksums of all of them in
`run.json`. A tensor may be cut into any parts, so what N processes wrote M others can read, under
another strategy too, and a single process as well. PyTorch's usual storage keeps a pickle beside
the tensors and trusts it; this one has nothing that could be unpickled.

The folder has to be one that all processes see.
"""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor

from mar_mini.files import write_atomically
from mar_mini.run.distributed import Alone
from mar_mini.run.state import KEPT, Checkpoints, differing, remove
from mar_mini.training import Training

RUN = "run.json"


def open_checkpoints(folder: Path, identity: dict, processes: Alone) -> Checkpoints:
    """Those of one process, or of many; either goes on from what the other wrote."""
    if processes.count == 1:
        return Checkpoints(folder, identity)
    return ShardedCheckpoints(folder, identity, processes)


class ShardedCheckpoints(Checkpoints):
    """The last two states of a run of many processes; every process calls every method.

    folder, identity  as for `Checkpoints`; the folder on a file system that all processes share
    """

    def __init__(self, folder: Path, identity: dict, processes: Alone):
        self.processes = processes
        super().__init__(folder, identity)

    def tidy(self) -> None:
        if self.processes.rank == 0:
            super().tidy()
        self.processes.gather(None)  # nobody goes on before it is done

    def paths(self) -> list[Path]:
        return self.processes.first(super().paths())

    def save(self, training: Training) -> Path:
        """See `Checkpoints.save`; the folder gets its name when everything is in it."""
        path = self.folder / f"state-{training.step:09d}"
        temporary = self.folder / f".{path.name}"
        if self.processes.rank == 0:
            remove(temporary)
            temporary.mkdir()
        self.processes.gather(None)
        write_shards(temporary, training, self.identity)
        if self.processes.rank == 0:
            put_in_place(temporary, path)
        for old in self.paths()[KEPT:]:
            if self.processes.rank == 0:
                remove(old)
        self.processes.gather(None)
        return path


def write_shards(folder: Path, training: Training, identity: dict) -> None:
    """Fill an empty folder: each process its part, then the first one `run.json`.

    Raises OSError in all of them if one could not write.
    """
    processes = training.processes
    # without axes there is nothing to cut, and the storage insists on cutting
    tensors = {name: x if x.ndim else x.reshape(1) for name, x in training.tensors().items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with talking(processes) as how:
            dcp.save(tensors, storage_writer=writer, **how)
    except dcp.CheckpointException as error:
        raise OSError(f"{folder} could not be written: {error}") from error
    files = checksums(folder, processes.first(names(folder)), processes)
    if processes.rank == 0:
        text = json.dumps({"identity": identity, "step": training.step, "files": files})
        write_atomically(folder / RUN, lambda path: path.write_text(text))
    processes.gather(None)


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a complete folder its name; one of that name is replaced."""
    old = path.with_name(f".{path.name}-old")
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def read_shards(folder: Path, training: Training, ours: dict) -> tuple[dict[str, Tensor], dict]:
    """State and identity of a checkpoint; of the tensors that are in shards, those shards.

    ours  the identity that it should have; with another one the state is left out

    Raises ValueError, in all processes, if it is incomplete, damaged or of another model.
    """
    processes = training.processes
    try:
        run = json.loads((folder / RUN).read_text())
        files, identity = run["files"], run["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no complete checkpoint ({error})") from error
    if differing(identity, ours):
        return {}, identity
    there = processes.first(names(folder))
    if there != sorted(files):
        odd = ", ".join(sorted(set(there) ^ set(files)))
        raise ValueError(f"{folder} is damaged ({odd}: missing, or not of this checkpoint)")
    found = checksums(folder, there, processes)
    damaged = [name for name in there if found[name] != files[name]]
    if damaged:
        raise ValueError(f"{folder / damaged[0]} is damaged (its checksum does not fit)")
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        shapes = {k: v.size for k, v in reader.read_metadata().state_dict_metadata.items()}
    except SafetensorError as error:
        raise ValueError(f"{folder} is damaged ({error})") from error
    state = empty_state(shapes, training)
    flat = {name: x if x.ndim else x.reshape(1) for name, x in state.items()}  # the same memory
    with talking(processes) as how:
        dcp.load(flat, storage_reader=reader, **how)
    return state, identity


def empty_state(shapes: dict[str, torch.Size], training: Training) -> dict[str, Tensor]:
    """Tensors to read a state into, laid out as those of the training."""
    likes = training.tensors()
    parameters = [p for group in training.optimiser.param_groups for p in group["params"]]
    for i, p in enumerate(parameters):  # there are no moments before the first step
        moments = {"exp_avg": p, "exp_avg_sq": p, "step": torch.zeros(())}
        likes |= {f"optimiser.{i}.{name}": x for name, x in moments.items()}
    state = {}
    for name, shape in shapes.items():
        like = likes.get(name)
        if like is None or (like.shape or (1,)) != shape:
            raise ValueError(
                f"the state has {name} {tuple(shape)}, this model "
                f"{'no such tensor' if like is None else tuple(like.shape)}: it is of another model"
            )
        state[name] = torch.empty_like(like).detach()
    return state


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def checksums(folder: Path, files: list[str], processes: Alone) -> dict[str, int]:
    """CRC-32 of each file by name; each process reads some of them. -1: not readable."""
    own = {}
    for name in files[processes.rank :: processes.count]:
        own[name] = 0
        try:
            with open(folder / name, "rb") as file:
                while chunk := file.read(2**24):
                    own[name] = zlib.crc32(chunk, own[name])
        except OSError:
            own[name] = -1
    return {name: value for part in processes.gather(own) for name, value in part.items()}


@contextmanager
def talking(processes: Alone) -> Iterator[dict]:
    """How PyTorch's checkpoints reach the other processes."""
    if dist.is_initialized():
        yield {"process_group": processes.control}
        return
    with warnings.catch_warnings():  # it is told, and warns all the same
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield {"no_dist": True}
