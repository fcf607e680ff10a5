"""The command line: `mar-mini ...` or `python -m mar_mini ...`.

A command is a function that lives beside what it configures. What Python lets you pass by position
is positional here too, keyword-only parameters (or the fields of a dataclass) are options, and the
docstring (or the comments) are the help.
"""

import inspect
import sys
from dataclasses import is_dataclass
from importlib import import_module
from typing import get_type_hints

import tyro

COMMANDS = {  # name: (where it lives, what it does)
    "course": ("course.chapters:course", "run all chapters, solved"),
    "lab": ("course.chapters:lab", "open the course in JupyterLab"),
    "lab-reset": ("course.chapters:lab_reset", "a fresh copy of a chapter"),
    "app": ("viz.app:app", "the widgets as one page"),
    "test": ("course.chapters:test", "style checks, notebooks and tests"),
    "train": ("run.train:train", "train a preset, on one process or under torchrun"),
    "sample": ("run.generate:sample", "sample a few images"),
    "data": ("run.images:data", "fetch a data set once"),
    "doctor": ("course.doctor:doctor", "what this machine has, which files are whole"),
    "evaluate": ("judge.statistics:evaluate", "judge samples against real images"),
    "convert": ("run.hub:convert", "published weights to a folder"),
    "info": ("planner.report:info", "what a preset takes"),
    "latents": ("run.latents:latents", "encode pictures once"),
    "generate": ("run.generate:generate", "many images, to be judged"),
}

FLAT = (tyro.conf.OmitArgPrefixes,)  # --cfg, not --settings.cfg


def command(name: str):
    """The function behind a command, its positional parameters and options marked for tyro."""
    module, _, function = COMMANDS[name][0].partition(":")
    function = getattr(import_module(f"mar_mini.{module}"), function)
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            hints[parameter.name] = tyro.conf.Positional[hints[parameter.name]]
        elif is_dataclass(hints[parameter.name]):
            hints[parameter.name] = tyro.conf.OmitArgPrefixes[hints[parameter.name]]
    inspect.unwrap(function).__annotations__ = hints
    return function


def main() -> None:
    """Run one command; a message instead of a traceback for input that cannot be right."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        print("usage: mar-mini COMMAND ...; mar-mini COMMAND --help says more\n")
        print("\n".join(f"  {known:<10} {does}" for known, (_, does) in COMMANDS.items()))
        sys.exit(0 if name in ("-h", "--help") else f"\nmar-mini: no command {name!r}")
    try:
        status = tyro.cli(command(name), prog=f"mar-mini {name}", args=arguments, config=FLAT)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"mar-mini: {error}")
    except KeyboardInterrupt as interruption:
        if str(interruption):
            print(f"\nmar-mini: {interruption}", file=sys.stderr)
        sys.exit(130)
    sys.exit(status)
