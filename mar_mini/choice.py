"""One entry of many by its name."""


def choose(kind: str, name: str, known: dict):
    """The entry of that name. Raises ValueError that lists the names which exist."""
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; expected one of: {', '.join(known)}")
    return known[name]
