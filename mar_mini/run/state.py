"""Training runs that survive: checkpoints in a folder, and a loop that writes and reads them.

A checkpoint is one safetensors file with everything that the next step depends on: weights, their
average, optimiser, counters. Random states are not in it, since everything random in a step follows
from (seed, step). So a run that was killed goes on to the same bits, on the same kind of machine.
"""

import json
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mar_mini.files import write_atomically
from mar_mini.training import Step, Training

KEPT = 2


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run, after everything was saved; says how to go on."""


@dataclass(frozen=True)
class Restored:
    """Which checkpoint a run goes on from (None: from the beginning), and which were refused."""

    path: Path | None
    refused: tuple[str, ...]


class Checkpoints:
    """The last two states of a run, in a folder of its own.

    identity  what must be the same for a state to be this run's (configuration, data, seed, ...);
              anything that JSON can hold
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder, self.identity = Path(folder), json.loads(json.dumps(identity))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tidy()

    def tidy(self) -> None:
        """Remove what a run left behind that was killed while it wrote."""
        for left_over in self.folder.glob(".state-*"):
            remove(left_over)

    def paths(self) -> list[Path]:
        """The checkpoints, latest first: files, and the folders that `sharded` writes."""
        return sorted(self.folder.glob("state-*"), key=lambda path: path.stem, reverse=True)

    def save(self, training: Training) -> Path:
        """Write the state, then remove all but the last two. A full disk leaves those as they are.

        Raises OSError if it cannot be written.
        """
        state = training.state()
        path = self.folder / f"state-{training.step:09d}.safetensors"
        metadata = {"identity": json.dumps(self.identity), "checksum": str(checksum(state))}
        write_atomically(path, lambda temporary: save_file(state, temporary, metadata))
        for old in self.paths()[KEPT:]:
            remove(old)
        return path

    def read(self, path: Path, training: Training) -> tuple[dict[str, Tensor], dict]:
        """State and identity of a checkpoint. Raises ValueError if it is not whole."""
        if path.is_dir():
            from mar_mini.run.sharded import read_shards

            return read_shards(path, training, self.identity)
        return read(path)

    def restore(self, training: Training) -> Restored:
        """Go on from the latest checkpoint that is whole and of this run.

        Raises ValueError if there are checkpoints of another run here and none of this one.
        """
        refused, foreign = [], None
        for path in self.paths():
            try:
                state, identity = self.read(path, training)
                differences = differing(identity, self.identity)
                if differences:
                    foreign = f"{path} is of another run ({differences})"
                    refused.append(foreign)
                    continue
                training.load(state)
                return Restored(path, tuple(refused))
            except ValueError as error:
                refused.append(str(error))
        if foreign:
            raise ValueError(
                f"{foreign}; choose another folder, or the settings of that run to continue it"
            )
        return Restored(None, tuple(refused))


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """State and identity of a checkpoint. Raises ValueError if it is truncated or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if "identity" not in metadata:
        raise ValueError(f"{path} is no checkpoint of a training run")
    if metadata["checksum"] != str(checksum(state)):
        raise ValueError(f"{path} is damaged (its checksum does not fit)")
    return state, json.loads(metadata["identity"])


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def resumable(training: Training, checkpoints: Checkpoints, every: float = 120.0) -> Iterator[Step]:
    """The steps of a training, with a checkpoint every so many seconds and one at the end.

    The state is that of the last checkpoint in the folder, if there is one.

    Ctrl-C (or SIGTERM) lets the step finish, saves, and raises `Interrupted`; a second one does
    not wait. Raises ValueError as `Checkpoints.restore`.
    """
    checkpoints.restore(training)
    saved = time.monotonic()
    with deferred_interrupt() as interrupted:
        for step in training:
            yield step
            asked, due = interrupted.is_set(), time.monotonic() - saved > every
            asked, due = map(any, zip(*training.processes.gather((asked, due)), strict=True))
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
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(*_) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class History:
    """The course of a run, thin enough to ship: means over equal shares of the budget, as JSON.

    path     of the JSON file; what is there already is continued
    entries  so many at most
    """

    def __init__(self, path: Path, entries: int = 200):
        self.path, self.entries = Path(path), entries
        self.rows: list[dict] = json.loads(path.read_text()) if path.is_file() else []
        self.window: list[Step] = []

    def add(self, step: Step) -> bool:
        """Take note of a step; True if that completed a row."""
        while self.rows and self.rows[-1]["step"] >= step.step:  # done again after a kill
            self.rows.pop()
        if self.rows and step.progress < self.rows[-1]["progress"]:  # the budget has grown
            share = step.progress / self.rows[-1]["progress"]
            for row in self.rows:
                row["progress"] *= share
        self.window.append(step)
        last = self.rows[-1]["progress"] if self.rows else 0.0
        if step.progress - last < 1 / self.entries and step.progress < 1.0:
            return False
        steps, self.window = self.window, []
        self.rows.append(
            {
                "step": step.step,
                "progress": step.progress,
                "seconds": step.seconds,
                "images_seen": step.images_seen,
                "learning_rate": step.learning_rate,
                "grad_norm": sum(s.grad_norm for s in steps) / len(steps),
                **{name: sum(s.terms[name] for s in steps) / len(steps) for name in step.terms},
            }
        )
        return True

    def save(self) -> None:
        text = json.dumps(self.rows) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda path: path.write_text(text))
