"""The command line does what it says, and says what is wrong."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from mar_mini.course import chapters as course

pytestmark = pytest.mark.slow


def run(*arguments):
    command = [sys.executable, "-m", "mar_mini", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_train_then_sample(tmp_path):
    done = run("train", "--config", "digits", "--max-steps", 3, "--out", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "model" / "config.json").read_text())
    assert card["card"]["steps"] == 3 and card["classes"] == [str(i) for i in range(10)]
    with Image.open(tmp_path / "model" / "samples.png") as grid:
        assert grid.width == 700
    done = run(
        "sample",
        tmp_path / "model",
        "--labels",
        3,
        1,
        4,
        "--out",
        tmp_path / "deep" / "grid.png",
        "--num-iter",
        4,
        "--filmstrip",
        tmp_path / "strip.png",
    )
    assert done.returncode == 0, done.stderr
    assert "3, 1, 4" in done.stdout and "strip.png: 3, step by step" in done.stdout
    with (
        Image.open(tmp_path / "deep" / "grid.png") as grid,
        Image.open(tmp_path / "strip.png") as strip,
    ):
        assert grid.format == strip.format == "PNG"
        assert (grid.width, strip.width) == (420, 350)  # a fifth of 700 each, an eighth each


def test_the_autoencoder_alone(tmp_path):
    few = ["--config", "cifar10", "--max-steps", 2, "--out", tmp_path]
    done = run("train", "vae", *few)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {
        "vae.safetensors",
        "state",
        "history_autoencoder.json",
        "history_autoencoder.png",
    }
    history = json.loads((tmp_path / "history_autoencoder.json").read_text())
    assert [row["step"] for row in history] == [1, 2] and history[0]["mse"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "vae", "--config", "digits"], "preset 'digits' has no autoencoder"),
        (["train", "--config", "digit"], "unknown preset 'digit'; expected one of: digits"),
        (["train", "--config", "kl16"], "no MAR to train"),
        (["train", "--config", "cifar10", "--data", "digits"], "made for 32x32 pixels"),
        (["sample", "nothing"], "no trained model 'nothing'; expected one of: cifar10"),
        (["sample", "mar_base"], "mar-base.safetensors could not be had from the Hugging Face Hub"),
        (["sample", "digits", "--labels", "12"], "label 12 is out of range"),
        (["sample", "digits", "--num-iter", "17"], "num_iter is 17; expected 1 to 16"),
        (["sample", "digits", "--order", "zigzag"], "unknown order 'zigzag'"),
        (["lab-reset", "99"], "no chapter '99'"),
    ],
)
def test_wrong_input_is_one_clear_line(arguments, message, tmp_path):
    out = ["--out", tmp_path / "out"] if arguments[0] != "lab-reset" else []
    done = run(*arguments, *out)
    assert done.returncode != 0
    assert done.stderr.startswith("mar-mini: ") and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_tests_run_in_steps_and_stop_at_the_first_that_fails(monkeypatch):
    ran = []

    def call(command, cwd, env):
        ran.append(" ".join(command))
        assert env["OMP_NUM_THREADS"] == "1"  # the cores are for other tests
        return int("codespell" in ran[-1]) * failing

    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.setattr(course, "cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    failing = True
    assert course.test() == 1 and len(ran) == 3
    ran.clear()
    failing = False
    assert course.test() == 0 and "pytest" in ran[-1] and "-n 4" in ran[-1]
    assert "not slow" not in ran[-1]
    assert course.test(fast=True) == 0 and "not slow" in ran[-1] and len(ran) == 8
