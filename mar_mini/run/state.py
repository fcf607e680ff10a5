"""Checkpoints of a run in a folder, and a loop that writes them and goes on from them.

A checkpoint is a folder: safetensors files that PyTorch's distributed checkpoint (DCP) writes, each
process its part, and `run.json` with their checksums. Random states are not in it, since everything
random in a step follows from (seed, step). So a run that was killed goes on to the same bits, on
the same kind of machine. Any number of processes reads what any other number wrote, under another
strategy too; all of them have to see the folder. Nothing is ever unpickled.
"""

import json
import math
import shutil
import signal
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict

from mar_mini.files import write_atomically
from mar_mini.run.distributed import in_all, in_first
from mar_mini.training import Step, Training

KEPT = 2
RUN = "run.json"


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or its deadline, with everything saved; says how to go on."""


@dataclass(frozen=True)
class Restored:
    """Which checkpoint a run goes on from (None: from the beginning), and which were refused."""

    path: Path | None
    refused: tuple[str, ...]


class Foreign(ValueError):
    """A checkpoint is of another run, or of an earlier version."""


class Checkpoints:
    """The last two states of a run, in a folder of its own; all processes call every method.

    identity  what a state and the run must have in common (configuration, data, seed, ...), as JSON
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder, self.identity = Path(folder), json.loads(json.dumps(identity))
        self.folder.mkdir(parents=True, exist_ok=True)

    def paths(self) -> list[Path]:
        """The checkpoints, latest first."""
        return in_first(lambda: sorted(self.folder.glob("state-*"), reverse=True))

    def tidy(self) -> None:
        """Remove what a run left behind that was killed while it wrote."""
        for path in self.folder.glob(".state-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def save(self, training: Training) -> Path:
        """Write the state, then remove all but the last two. A full disk leaves those as they are.

        Raises OSError if it cannot be written.
        """
        path = self.folder / f"state-{training.step:09d}"
        unfinished = self.folder / f".{path.name}"
        run = {"identity": self.identity, "step": training.step, "seconds": training.seconds}

        def finish() -> None:
            text = json.dumps({"run": run, "checksum": zlib.crc32(json.dumps(run).encode())})
            (unfinished / RUN).write_text(text)
            if path.exists():
                shutil.rmtree(path)
            unfinished.rename(path)
            made = (old for old in self.folder.glob("state-*[0-9]") if old <= path)
            for old in sorted(made)[:-KEPT]:  # those of later steps were refused
                shutil.rmtree(old)

        in_first(lambda: (self.tidy(), unfinished.mkdir()))
        try:
            writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
            quietly(dcp.save, tensors(training), storage_writer=writer)
            run["files"] = checksums(unfinished)
            in_first(finish)
        except (OSError, dcp.CheckpointException) as error:
            in_first(self.tidy)
            (cause, _), *_ = getattr(error, "failures", {0: (error, None)}).values()
            raise OSError(f"{path} could not be written: {cause}") from error
        return path

    def restore(self, training: Training) -> Restored:
        """Go on from the latest checkpoint that is whole and of this run.

        Raises ValueError if there is none, but one of another run or of an earlier version.
        """
        in_first(self.tidy)
        refused = []
        for path in self.paths():
            try:
                load(path, self.identity, training)
                return Restored(path, tuple(map(str, refused)))
            except ValueError as error:
                refused.append(error)
        if foreign := [error for error in refused if isinstance(error, Foreign)]:
            raise ValueError(
                f"{foreign[0]}; choose another folder, or continue it with its own settings and "
                "version"
            )
        return Restored(None, tuple(map(str, refused)))


def load(path: Path, identity: dict, training: Training) -> None:
    """Go on from a checkpoint. Raises ValueError, and changes nothing, if it does not fit."""
    try:
        content = {} if path.is_file() else json.loads(in_first((path / RUN).read_bytes))
        found = checksums(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no complete checkpoint ({error})") from error
    if "run" not in content:
        raise Foreign(f"{path} is of an earlier version of mar_mini")
    run, found[RUN] = content["run"], zlib.crc32(json.dumps(content["run"]).encode())
    files = {**run.get("files", {}), RUN: content.get("checksum")}
    if odd := ", ".join(sorted(found.keys() ^ files.keys())):
        raise ValueError(f"{path} is damaged ({odd}: missing, or not of this checkpoint)")
    for name, value in found.items():
        if value != files[name]:
            raise ValueError(f"{path / name} is damaged (its checksum does not fit)")
    if differences := differing(run["identity"], identity):
        raise Foreign(f"{path} is of another run ({differences})")
    reader, state = dcp.HuggingFaceStorageReader(str(path)), tensors(training)
    there = {k: tuple(v.size) for k, v in reader.read_metadata().state_dict_metadata.items()}
    here = {name: tuple(x.shape) for name, x in state.items()}
    for name in {**here, **there}:
        theirs, ours = (shapes.get(name, "no such tensor") for shapes in (there, here))
        if theirs != ours:
            raise ValueError(
                f"{path} has {name} {theirs}, this model {ours}: it is of another model"
            )
    quietly(dcp.load, state, storage_reader=reader)  # into the tensors of the training
    training.resume(run["step"], run["seconds"])


def tensors(training: Training) -> dict[str, Tensor]:
    """Weights, their average and moments by name: no copies, and of a model in shards the shards.

    With `Training.step` and `Training.seconds` they are all that the next step depends on.
    """
    fresh = not training.optimizer.state
    model, optimizer = get_state_dict(training.model, training.optimizer)
    if fresh:  # PyTorch made the moments by a step at learning rate 0, and has counted it
        for moments in optimizer["state"].values():
            moments["step"].zero_()
    parts = {"model": model, "average": training.ema.state_dict()}
    parts |= {f"optimizer.{name}": moments for name, moments in optimizer["state"].items()}
    state = {f"{part}.{name}": x.detach() for part, xs in parts.items() for name, x in xs.items()}
    # without axes there is nothing to cut, and the storage insists on cutting
    return {name: x if x.ndim else x.reshape(1) for name, x in state.items()}


def quietly(transfer: Callable, state: dict[str, Tensor], **storage) -> None:
    """Save or load; PyTorch is told of a single process, and warns all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        transfer(state, no_dist=not dist.is_initialized(), **storage)


def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each file by name; each process reads some of them."""

    def crc(path: Path) -> int:
        value = 0
        with open(path, "rb") as file:
            while chunk := file.read(2**24):
                value = zlib.crc32(chunk, value)
        return value

    names = in_first(lambda: sorted(path.name for path in folder.glob("*.safetensors")))
    parts = in_all(lambda rank, size: {name: crc(folder / name) for name in names[rank::size]})
    return {name: value for part in parts for name, value in part.items()}


def checksum(state: dict[str, Tensor]) -> int:
    """CRC-32 of names and bytes, in the order of the names."""
    value = 0
    for name in sorted(state):
        tensor = state[name].contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(tensor.numpy(), zlib.crc32(name.encode(), value))
    return value


def differing(theirs: dict, ours: dict) -> str:
    """What is not the same in two identities, as text; empty if all is."""
    return ", ".join(
        f"{key} is {theirs.get(key)} there and {ours.get(key)} here"
        for key in {**ours, **theirs}
        if theirs.get(key) != ours.get(key)
    )


def resumable(
    training: Training, checkpoints: Checkpoints, every: float = 120.0, until: float | None = None
) -> Iterator[Step]:
    """The steps after the last checkpoint, with a new one every so many seconds and at the end.

    until  the `time.monotonic()` at which to stop as if by Ctrl-C

    Ctrl-C (or SIGTERM) lets the step finish, saves, and raises `Interrupted`; a second one does
    not wait. Raises ValueError as `Checkpoints.restore`.
    """
    checkpoints.restore(training)
    saved, until = time.monotonic(), math.inf if until is None else until
    with deferred_interrupt() as interrupted:
        for step in training:
            yield step
            now = time.monotonic()
            flags = interrupted.is_set() or now >= until, now - saved > every
            asked, due = map(any, zip(*in_all(lambda *_, flags=flags: flags), strict=True))
            if asked or due:
                checkpoints.save(training)
                saved = time.monotonic()
            if asked:
                raise Interrupted(
                    f"stopped after step {step.step}; the state is saved in {checkpoints.folder}: "
                    "give the same command again to go on"
                )
        checkpoints.save(training)


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; outside the main thread it stays unset."""
    asked, before = threading.Event(), {}

    def ask(*_) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class History:
    """The course of a run, thin enough to ship: means over equal shares of the budget, as JSON.

    path     of the JSON file; what is there already is continued
    entries  so many rows at most
    """

    def __init__(self, path: Path, entries: int = 200):
        self.path, self.entries = Path(path), entries
        self.rows: list[dict] = json.loads(path.read_text()) if path.is_file() else []
        self.window: list[Step] = []

    def add(self, step: Step) -> bool:
        """Take note of a step; True if that completed a row."""
        while self.rows and self.rows[-1]["step"] >= step.step:  # done again after a kill
            self.rows.pop()
        last = self.rows[-1]["progress"] if self.rows else 0.0
        if step.progress < last:  # the budget has grown
            for row in self.rows:
                row["progress"] *= step.progress / last
            last = self.rows[-1]["progress"]
        self.window.append(step)
        if step.progress - last < 1 / self.entries and step.progress < 1.0:
            return False
        names = ("step", "progress", "seconds", "images_seen", "learning_rate")
        means = [{"grad_norm": s.grad_norm, **s.terms} for s in self.window]
        row = {name: getattr(step, name) for name in names}
        row |= {name: sum(m[name] for m in means) / len(means) for name in means[0]}
        self.rows.append(row)
        self.window = []
        return True

    def save(self) -> None:
        """Write the rows."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda path: path.write_text(json.dumps(self.rows) + "\n"))
