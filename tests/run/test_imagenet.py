"""The ImageNet recipe, command by command as recipes/README.md gives it, on forty pictures."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mar_mini import load_pretrained
from mar_mini.data import class_names, load_images

README = Path(__file__).resolve().parents[2] / "recipes" / "README.md"
SMALLER = {  # what stands in the recipe, and what here
    "build/kl16": "cifar10",
    "--config kl16": "--config cifar10 --shard-size 10",
    "--config mar_base": "--config cifar10 --max-steps 40 --no-samples",
    "--workers 8": "",
    "--size 256": "--size 32",
    "--count 50000": "--count 40 --shard-size 10 --num-iter 4",
}


def recipe(smaller: dict[str, str] = SMALLER) -> list[list[str]]:
    """The commands in the section's first block of code, made smaller."""
    section = README.read_text().split("\n## ImageNet\n")[1].split("\n## ")[0]
    block = re.search(r"(?:^    .*\n)+", section, re.MULTILINE)[0].replace("\\\n", " ")
    for given, here in smaller.items():
        assert given in block, f"{given} is not in the recipe any more"
        block = block.replace(given, here)
    lines = [shlex.split(line) for line in block.strip().splitlines()]
    assert all(words[0] == "mar-mini" for words in lines) and len(lines) == 6
    return [words[1:] for words in lines]


def start(words, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mar_mini", *words],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )


def run(words, folder: Path) -> str:
    process = start(words, folder)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


def stopped(words, folder: Path, moment: Path, how: signal.Signals) -> tuple[int, str]:
    """Start a command, stop it when that file is there; its status and messages."""
    process, begin = start(words, folder), time.monotonic()
    while not moment.exists() and process.poll() is None and time.monotonic() - begin < 120:
        time.sleep(0.01)
    process.send_signal(how)
    errors = process.communicate(timeout=120)[1]
    return process.returncode, errors


@pytest.mark.slow
def test_the_recipe_runs_as_it_is_written(tmp_path):
    rows = load_images("cifar10_mini", "test")
    names = class_names(rows)
    for label in range(10):
        (tmp_path / "ILSVRC" / "train" / names[label]).mkdir(parents=True)
    for i, row in zip(range(40), rows, strict=False):
        row["image"].save(tmp_path / "ILSVRC" / "train" / names[row["label"]] / f"{i}.JPEG")
    encode, check, train, generate, real, judge = recipe()
    build = tmp_path / "build"

    first = build / "latents" / "shard-00000-of-00004.safetensors"
    status, _ = stopped(encode, tmp_path, first, signal.SIGKILL)
    assert status == -signal.SIGKILL
    os.utime(first, (1, 1))
    assert "40 pictures, 10 classes, latents (16, 8, 8)" in run(encode, tmp_path)
    assert first.stat().st_mtime == 1, "a whole shard was made again"
    assert "whole, 40 pictures" in run(check, tmp_path)

    history = build / "mar_base" / "history_masked.json"
    status, errors = stopped(train, tmp_path, history, signal.SIGINT)
    assert status == 130 and "give the same command again" in errors, errors
    before = json.loads(history.read_text())[-1]["step"]
    run(train, tmp_path)
    steps = [row["step"] for row in json.loads(history.read_text())]
    assert 0 < before < 40 and steps == list(range(1, 41))
    pipeline = load_pretrained(build / "mar_base")
    assert pipeline.card["steps"] == 40 and pipeline.classes == sorted(names)

    piece = build / "generated" / "train-00000-of-00004.parquet"
    status, _ = stopped(generate, tmp_path, piece, signal.SIGKILL)
    assert status == -signal.SIGKILL
    os.utime(piece, (1, 1))
    run(generate, tmp_path)
    assert piece.stat().st_mtime == 1, "whole images were made again"
    assert "40 images of 32 pixels" in run(real, tmp_path)
    said = run(judge, tmp_path)
    value = float(re.search(r"Fréchet distance ([\d.]+) \(.*; 40 images", said)[1])
    assert value > 100 and "these are 40 images" in said
