"""What this machine has and which files are whole, before one wonders about anything else."""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mar_mini.checkpoints import load_pretrained
from mar_mini.course.symptoms import stored_evidence
from mar_mini.data import data_dir, load_images
from mar_mini.fast.compiling import COMPILERS
from mar_mini.judge.statistics import Reference
from mar_mini.run.images import FETCHERS, cache_dir, is_arrays
from mar_mini.training import multiplies_bf16

PACKAGES = ("torch", "numpy", "datasets", "jupyterlab", "matplotlib", "ipywidgets", "safetensors")


def findings() -> Iterator[tuple[bool, str]]:
    """One line for each thing looked at, and whether it is as it should be."""
    yield True, f"Python {platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        try:
            yield True, f"{name} {version(name)}"
        except PackageNotFoundError:
            yield False, f"{name} is not installed; run: pip install -e ."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield True, f"{cores} cores, torch uses {torch.get_num_threads()} threads"
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.7 * cores:
        yield (
            False,
            (
                f"other processes keep {os.getloadavg()[0]:.1f} cores busy; training is several "
                "times slower beside them (docs/faq.md)"
            ),
        )
    cpu = torch.device("cpu")
    fast = "has units for them" if multiplies_bf16(cpu) else "no units for them: float32 is used"
    yield True, f"bfloat16 products on this CPU: {fast}"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        yield True, f"GPU {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    else:
        yield True, "no CUDA GPU; nothing in the course needs one"
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    yield True, f"C++ compiler {found}" if found else "no C++ compiler: --compile is not available"
    yield from space(cache_dir())
    yield from bundled()
    for name in FETCHERS:
        there = is_arrays(cache_dir() / name / "train")
        yield True, f"{name}: " + ("fetched" if there else f"not fetched (mar-mini data {name})")


def space(folder: Path) -> Iterator[tuple[bool, str]]:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    yield free > 2, f"{free:.1f} GiB free in {folder}" + ("" if free > 2 else "; 2 are needed")


def bundled() -> Iterator[tuple[bool, str]]:
    """Each bundled data set and model, opened."""
    try:
        root = data_dir()
    except ValueError as error:
        yield False, str(error)
        return
    for path in sorted(root.glob("*/*.parquet")):
        try:
            yield True, f"{path.relative_to(root)}: whole, {len(load_images(path))} images"
        except ValueError as error:
            yield False, str(error)
    for path in sorted(root.glob("reference/*.safetensors")):
        try:
            reference = Reference.load(path)
            yield True, f"{path.relative_to(root)}: whole, {len(reference.train):,} features"
        except ValueError as error:
            yield False, str(error)
    try:
        yield True, f"symptoms/evidence.json: whole, {len(stored_evidence())} trainings"
    except ValueError as error:
        yield False, str(error)
    for path in sorted(root.glob("weights/*/config.json")):
        try:
            pipeline = load_pretrained(path.parent)
            count = sum(p.numel() for p in pipeline.mar.parameters())
            yield True, f"weights {path.parent.name}: whole, {count:,} parameters"
        except (ValueError, json.JSONDecodeError) as error:
            yield False, str(error)


# The command -------------------------------------------------------------------------------------


def doctor() -> int:
    """Say what this machine has and which bundled files are whole."""
    good = True
    for fine, line in findings():
        print("  ok  " if fine else "  !!  ", line)
        good = good and fine
    return 0 if good else 1
