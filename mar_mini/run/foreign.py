"""Weights from other people's files: safetensors and checkpoints, read without running them."""

import argparse
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

ZIP = b"PK\x03\x04"


def read(path: Path, entry: str) -> dict[str, Tensor]:
    """Weights by their names, mapped from the file: nothing is read before it is needed.

    path   safetensors, or a checkpoint that torch.save wrote
    entry  of a checkpoint: model, or model_ema for the average

    Raises ValueError if the file is missing, damaged, of another kind, without that entry, or if
    it would run code: that is found without running it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}; expected .safetensors, .pth or .ckpt: check the path")
    with open(path, "rb") as file:
        is_checkpoint = file.read(len(ZIP)) == ZIP
    if is_checkpoint:
        return entry_of(read_checkpoint(path), entry, path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is neither .safetensors nor a checkpoint of torch.save (1.6 or later); it was "
            "not opened any further, as a bare pickle may run code. Fetch it again, or save it anew"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise damaged(path, error) from error


def read_checkpoint(path: Path) -> object:
    """What torch.save wrote, if it is tensors, plain values and argparse.Namespace alone."""
    try:
        # the authors' checkpoints carry their arguments as a Namespace, which runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not foreign:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        # the last line of a long text is about something else
        foreign = [str(error).split("Check the documentation")[0].strip().splitlines()[-1]]
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise damaged(path, error) from error
    raise ValueError(
        f"{path} is refused: there is more than weights in it, and reading that would run code "
        f"({', '.join(foreign)}); nothing of it was run. Take the weights from another source, "
        "best as .safetensors"
    )


def damaged(path: Path, error: Exception) -> ValueError:
    size, why = path.stat().st_size, str(error).splitlines()[0] if str(error) else "no text"
    return ValueError(
        f"{path} ({size:,} bytes) is damaged or half of a download ({why}); fetch it again"
    )


def entry_of(checkpoint: object, entry: str, path: Path) -> dict[str, Tensor]:
    """That entry of a checkpoint; weights with nothing around them are taken as they are."""
    if is_state(checkpoint):
        return checkpoint
    found = checkpoint if isinstance(checkpoint, dict) else {}
    if is_state(found.get(entry)):
        return found[entry]
    raw = entry == "model_ema" and is_state(found.get("model"))
    raise ValueError(
        f"{path} has no weights called {entry!r}, only: {', '.join(map(str, found)) or 'nothing'}"
        + ("; raw=True (--raw) takes those of 'model'" if raw else "")
    )


def is_state(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()
        )
    )
