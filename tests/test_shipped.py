"""What ships for CIFAR-10: small enough, whole, honest about itself, and better than it looks."""

import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mar_mini import data, load_pretrained
from mar_mini.evaluation import psnr
from mar_mini.judge.features import features_of, load_features
from mar_mini.judge.statistics import Reference
from mar_mini.viz.figures import image_grid, png

FOLDER = data.data_dir() / "weights" / "cifar10"


@pytest.fixture(scope="module")
def pipeline():
    return load_pretrained("cifar10")


def test_size_and_precision(pipeline):
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= 24e6
    assert sum(p.numel() for p in pipeline.mar.parameters()) <= 10e6
    assert sum(p.numel() for p in pipeline.vae.parameters()) <= 2e6
    for name in ("mar", "vae"):
        with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
            assert all(file.get_tensor(key).dtype == torch.bfloat16 for key in file.keys())  # noqa: SIM118


def test_the_card_lets_anyone_repeat_the_training(pipeline):
    known = {
        "steps",
        "seconds",
        "seed",
        "images_seen",
        "device",
        "torch",
        "commit",
        "training",
        "vae_training",
        "data",
        "data_md5",
        "command",
    }
    assert known <= pipeline.card.keys()
    assert pipeline.card["command"].startswith("python recipes/train.py --")


@pytest.mark.slow
def test_the_autoencoder_is_no_ceiling(pipeline):
    images = data.to_tensors(data.load_images("cifar10_mini", "test"))[0]
    images = data.denormalise(data.normalise(images))
    again = pipeline.decode(pipeline.encode(images))
    assert float(psnr(again, images).mean()) >= 32.0


@pytest.mark.slow
def test_sixteen_images_in_twenty_seconds(pipeline):
    start = time.perf_counter()
    images = pipeline.generate(torch.arange(16) % 10)
    assert images.shape == (16, 3, 32, 32)
    seconds = time.perf_counter() - start
    assert seconds < 20, f"16 images took {seconds:.0f} s"


@pytest.mark.slow
def test_the_command_line_makes_the_same_images(pipeline, tmp_path):
    """The model's bound on x0 among them: without it the pixels are all black or white."""
    path = tmp_path / "two.png"
    command = [
        sys.executable,
        "-m",
        "mar_mini",
        "sample",
        "cifar10",
        "--labels",
        "0",
        "8",
        "--out",
        str(path),
    ]
    assert subprocess.run(command, capture_output=True).returncode == 0
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    figure = image_grid(
        pipeline.generate([0, 8], generator=generators), columns=2, titles=["airplane", "ship"]
    )
    with Image.open(path) as ours, Image.open(io.BytesIO(png(figure))) as theirs:
        difference = np.abs(np.asarray(ours, float) - np.asarray(theirs, float))
    assert difference.mean() < 0.5, "other images than those of `generate`"


@pytest.mark.slow
def test_samples_are_nearer_to_real_images_than_noise_and_the_wrong_class(pipeline):
    """Nearer than half way between real images and one normal distribution of all pixels."""
    reference = Reference.load(data.data_dir() / "reference" / "cifar10.safetensors")
    network, asked = load_features(), torch.arange(300) % 10
    images = pipeline.generate(asked, generator=torch.Generator().manual_seed(0))
    real = data.to_tensors(data.load_images("cifar10_mini", "train"))[0].flatten(1).double() / 255
    values, vectors = torch.linalg.eigh(torch.cov(real.T))
    noise = torch.randn(300, len(values), generator=torch.Generator().manual_seed(0)).double()
    gaussian = real.mean(0) + noise * values.clamp(min=0).sqrt() @ vectors.T
    gaussian = gaussian.view(-1, 3, 32, 32).clamp(0, 1).float()
    samples, blobs = (reference.distance(features_of(network, x)) for x in (images, gaussian))
    floor = reference.distance(reference.test[:300])
    assert floor < samples and samples - floor < 0.6 * (blobs - floor), (samples, blobs, floor)


def test_the_history_can_be_drawn():
    rows = json.loads((FOLDER / "history_masked.json").read_text())
    assert len(rows) >= 50 and rows[-1]["progress"] == 1.0
    assert {"step", "images_seen", "loss", "mse", "vb", "learning_rate"} <= rows[0].keys()
    moments = json.loads((FOLDER / "moments.json").read_text())
    assert len(moments["moments"]) >= 10
    for row in moments["moments"]:
        assert row["average"] > moments["floor"] and row["raw"] > moments["floor"]
    assert moments["moments"][-1]["average"] < 0.5 * moments["moments"][0]["average"]
    with Image.open(FOLDER / "growth.png") as growth:
        assert growth.size == (32 * len(moments["moments"]), 8 * 32)


def test_samples_ship_for_those_who_judge():
    with np.load(data.data_dir() / "reference" / "cifar10_samples.npz") as file:
        assert file["images"].shape == (1000, 3, 32, 32) and file["images"].dtype == np.uint8
        assert file["labels"].shape == (1000,)
