"""Work shared out among processes that never talk to each other: which part is mine."""

import os


def parse_part(text: str | None = None) -> tuple[int, int]:
    """(which, of how many) from "I/N", counted from 0.

    Without a text it is what torchrun says in RANK and WORLD_SIZE, else all of it: (0, 1). Raises
    ValueError for anything else.
    """
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


def place() -> str:
    """The device of this process: cuda (of this rank under torchrun) where there is one, or cpu."""
    import torch

    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "cpu"
