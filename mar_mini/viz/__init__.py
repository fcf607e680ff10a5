"""Pictures of what the model does. They look at the model; the model never looks at them."""

WIDGETS = {
    "MaskOrderExplorer": "explorer",
    "GenerationTheatre": "theatre",
    "Inpainter": "inpainter",
}
__all__ = list(WIDGETS)


def __getattr__(name: str):
    """The widgets, imported when they are asked for: figures alone need no ipywidgets."""
    if name not in WIDGETS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{WIDGETS[name]}"), name)
