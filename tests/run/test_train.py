"""The recipes as they are given: one command trains, and the same command goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mar_mini import load_pretrained

REPO = Path(__file__).resolve().parents[2]


def train(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        REPO / "recipes" / "train.py",
        "--config",
        "digits",
        "--data",
        "digits",
        "--out",
        out,
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_one_command_trains_and_goes_on(tmp_path):
    out = tmp_path / "run"
    # so many steps that the part ends first, however fast the machine is
    stopped = train(out, "--steps", "1000000", "--part-minutes", "0.001")
    assert stopped.returncode == 75, stopped.stderr
    assert "the same command" in stopped.stdout and not (out / "mar.safetensors").exists()
    states = [path.stem for path in (out / "state" / "masked").glob("state-*")]
    steps = 3 + max([int(name.removeprefix("state-")) for name in states], default=0)
    done = train(out, "--steps", str(steps))
    assert done.returncode == 0, done.stderr
    card = json.loads((out / "config.json").read_text())["card"]
    rows = json.loads((out / "history_masked.json").read_text())
    assert card["steps"] == steps and card["data"] == "digits"
    assert card["losses"]["loss"] == pytest.approx(rows[-1]["loss"], abs=1e-4)
    assert len(list((out / "moments").glob("average-*.safetensors"))) >= 3
    assert load_pretrained(out).generate([3], num_iter=2).shape == (1, 1, 16, 16)
