"""What this machine has and which files are whole, before one wonders about anything else."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mar_mini import load_pretrained
from mar_mini.course.chapters import cores
from mar_mini.course.symptoms import stored_evidence
from mar_mini.data import data_dir, load_images
from mar_mini.fast.compiling import COMPILERS
from mar_mini.judge.statistics import Reference
from mar_mini.run.images import FETCHERS, cache_dir, is_arrays

PACKAGES = ("torch", "numpy", "datasets", "jupyterlab", "matplotlib", "ipywidgets", "safetensors")
BUNDLED = {  # a pattern of files in data/, and what reading one finds
    "*/*.parquet": lambda path: f"{len(load_images(path))} images",
    "reference/*.safetensors": lambda path: f"{len(Reference.load(path).train):,} features",
    "symptoms/evidence.json": lambda path: f"{len(stored_evidence())} trainings",
    "weights/*/config.json": lambda path: f"{parameters(path):,} parameters",
}


def findings() -> Iterator[tuple[bool, str]]:
    """One line for each thing looked at, and whether it is as it should be."""
    yield True, f"Python {platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        try:
            yield True, f"{name} {version(name)}"
        except PackageNotFoundError:
            yield False, f"{name} is not installed; run: pip install -e ."
    yield True, f"{cores()} cores, torch uses {torch.get_num_threads()} threads"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.7 * cores():
        others = f"other processes keep {load:.1f} cores busy; training is several times slower"
        yield False, f"{others} beside them (docs/faq.md)"
    yield True, f"bfloat16 products on this CPU: {bf16_units()}"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        yield True, f"GPU {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    else:
        yield True, "no CUDA GPU; nothing in the course needs one"
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    yield True, f"C++ compiler {found}" if found else "no C++ compiler: --compile is not available"
    folder = next(path for path in (cache_dir(), *cache_dir().parents) if path.exists())
    free = shutil.disk_usage(folder).free / 2**30
    yield free > 2, f"{free:.1f} GiB free in {folder}" + ("" if free > 2 else "; 2 are needed")
    yield from bundled()
    for name in FETCHERS:
        there = is_arrays(cache_dir() / name / "train")
        yield True, f"{name}: " + ("fetched" if there else f"not fetched (mar-mini data {name})")


def bf16_units() -> str:
    """What the CPU multiplies bfloat16 with, and whether precision "auto" uses it."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX, units of their own"
    if torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16, no AMX: float32 is used unless you ask for bf16"
    return "neither AMX nor avx512_bf16: float32 is used"


def bundled() -> Iterator[tuple[bool, str]]:
    """Each bundled data set and model, opened."""
    try:
        root = data_dir()
    except ValueError as error:
        yield False, str(error)
        return
    for pattern, what in BUNDLED.items():
        for path in sorted(root.glob(pattern)) or [root / pattern]:
            try:
                yield True, f"{path.relative_to(root)}: whole, {what(path)}"
            except ValueError as error:
                yield False, str(error)


def parameters(card: Path) -> int:
    """Of the MAR beside that card, which is loaded."""
    return sum(p.numel() for p in load_pretrained(card.parent).mar.parameters())


# The command -------------------------------------------------------------------------------------


def doctor() -> int:
    """Say what this machine has and which bundled files are whole."""
    found = []
    for fine, line in findings():
        print("  ok  " if fine else "  !!  ", line)
        found.append(fine)
    return 0 if all(found) else 1
