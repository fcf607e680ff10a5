"""A folder filled piece by piece, by any number of processes that never talk to each other."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from mar_mini.files import write_atomically
from mar_mini.run.state import checksum, differing


def parse_part(text: str | None = None) -> tuple[int, int]:
    """(which, of how many) from "I/N", counted from 0; without a text what torchrun says."""
    if text is None:
        text = f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    which, slash, of = text.partition("/")
    if not (slash and which.isdecimal() and of.isdecimal() and int(which) < int(of)):
        raise ValueError(f"part is {text!r}; expected I/N from 0/N to N-1/N, such as 0/4")
    return int(which), int(of)


def pieces(count: int, size: int) -> list[range]:
    """0 .. count - 1 cut into pieces of `size`, the last one shorter."""
    if count < 1 or size < 1:
        raise ValueError(f"count is {count}, size of a piece {size}; expected 1 or more of both")
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def fill(
    ranges: list[range],
    part: tuple[int, int],
    files: Callable[[int], list[Path]],
    make: Callable[[int], Iterator[int]],
) -> Iterator[int]:
    """Make the missing pieces of a part; yields how many rows are done, after each batch.

    part   (I, N): only pieces I, I + N, I + 2N, ...
    files  number of a piece -> its files, which are there wholly or not at all
    make   number of a piece -> yields as this does, returns what writes each of its files
    """
    for number in range(part[0], len(ranges), part[1]):
        paths = files(number)
        if all(path.is_file() for path in paths):
            yield len(ranges[number])
            continue
        for path, write in zip(paths, (yield from make(number)), strict=True):
            for left_over in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
                left_over.unlink(missing_ok=True)
            write_atomically(path, write)


def claim(path: Path, what: str, card: dict) -> None:
    """Write down what a folder holds, but if it is there. Raises ValueError if it holds others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    card = json.loads(json.dumps(card, default=lambda x: getattr(x, "__name__", repr(x))))
    if not path.is_file():
        text = json.dumps(card, indent=1) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text))
    theirs = read_card(path)
    differences = differing({**theirs, "command": card.get("command")}, card)
    if differences:
        raise ValueError(
            f"{path.parent} holds other {what} ({differences}); choose another folder, or the "
            "settings of those"
        )


def read_card(path: Path) -> dict:
    """What `claim` wrote. Raises ValueError if it is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged; remove it and give its command again") from error


def weights_checksum(model: nn.Module) -> int:
    return checksum({name: x.cpu() for name, x in model.state_dict().items()})
