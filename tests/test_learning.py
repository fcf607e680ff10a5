"""The learner's first model: 1,500 steps make digits that can be recognised.

As many as two idle cores take in the preset's 75 seconds; a budget in seconds would test the load
of the machine.
"""

import dataclasses
import os
import signal

import pytest
import torch

from mar_mini import data, evaluation, get_config
from mar_mini.run.images import ImageSet, open_images
from mar_mini.run.state import Interrupted
from mar_mini.run.train import TrainingRun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits():
    images = open_images("digits", "train")
    pixels = data.denormalise(data.normalise(images.images))
    config = get_config("digits")
    training = dataclasses.replace(config.training, max_steps=1500, max_seconds=None)
    config = dataclasses.replace(config, training=training)
    run = TrainingRun(config, images)
    assert [progress.step.step for progress in run] == list(range(1, 1501))
    return run.pipeline, evaluation.class_means(pixels, images.labels)


def sample(pipeline, **arguments):
    asked = torch.arange(500) % 10
    generator = torch.Generator().manual_seed(0)
    return asked, pipeline.generate(
        asked, cfg=1.0, temperature=1.0, generator=generator, **arguments
    )


def test_the_asked_class_is_found(digits):
    pipeline, means = digits
    asked, images = sample(pipeline)
    share = evaluation.recognised(images, asked, means)
    assert share >= 0.70, f"{share:.0%} of 500 samples recognised after {pipeline.card}"


def test_without_the_bound_on_x0_the_samples_are_noise(digits):
    """The terminal step: see the text of `mar_mini.diffusion`."""
    pipeline, means = digits
    model, asked = pipeline.mar, torch.arange(100) % 10

    def tokens(clip):
        from mar_mini import generate

        return generate(
            model,
            asked,
            num_iter=16,
            clip=clip,
            num_sampling_steps=25,
            generator=torch.Generator().manual_seed(0),
        )

    bounded, unbounded = tokens(1.0), tokens(None)
    assert bounded.std() < 1.0, f"std {bounded.std():.2f} with the bound"
    assert unbounded.std() > 10 * bounded.std(), f"std {unbounded.std():.2f} without it"


def test_the_judge_can_fail(digits):
    """Random labels are not recognised, so a model that ignores its labels would not pass."""
    pipeline, means = digits
    asked, images = sample(pipeline, num_iter=8)
    shuffled = asked[torch.randperm(500, generator=torch.Generator().manual_seed(1))]
    assert evaluation.recognised(images, shuffled, means) < 0.25
    real, truth = data.to_tensors(data.load_images("digits", "test"))
    share = evaluation.recognised(data.denormalise(data.normalise(real)), truth, means)
    assert 0.75 < share < 0.90, f"real digits: {share:.0%}"


def test_another_budget_is_another_run():
    config = get_config("digits")
    short = dataclasses.replace(config.training, max_steps=3, max_seconds=None)
    config = dataclasses.replace(config, training=short)
    steps = [step for _, step, _ in TrainingRun(config, open_images("digits", "train"))]
    assert [step.step for step in steps] == [1, 2, 3]
    assert steps[-1].progress == 1.0


@pytest.fixture
def two_stages():
    """A preset with an autoencoder, four steps for each, and forty images."""
    config = get_config("cifar10")
    few = {"max_steps": 4, "max_seconds": None, "batch_size": 16, "precision": "float32"}
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, **few),
        vae_training=dataclasses.replace(config.vae_training, **few),
    )
    images = open_images("cifar10_mini", "test")
    return config, ImageSet(images.images[:40], images.labels[:40], images.classes)


def test_a_preset_with_an_autoencoder_measures_its_latents(two_stages):
    run = TrainingRun(*two_stages)
    stages = [progress.stage for progress in run]
    pipeline, images = run.pipeline, two_stages[1].images
    assert stages == ["autoencoder"] * 4 + ["masked autoregressive model"] * 4
    tokens = pipeline.encode(data.denormalise(data.normalise(images)))
    assert tokens.shape == (40, 16, 64)
    assert float(tokens.std()) == pytest.approx(1.0, rel=1e-3)
    assert float(tokens.abs().max()) == pytest.approx(pipeline.clip, rel=1e-3)
    made = pipeline.generate([0, 9], num_iter=2, num_sampling_steps=2)
    assert made.shape == (2, 3, 32, 32) and 0 <= made.min() and made.max() <= 1


def test_a_pipeline_in_two_stages_goes_on_after_a_stop(two_stages, tmp_path):
    """Stopped in either stage and begun again: the same weights as in one go."""

    def train(folder, stops):
        """Until the next of the stops, a number of steps after which Ctrl-C comes."""
        run = TrainingRun(*two_stages, folder=folder)
        try:
            for count, _ in enumerate(run, 1):
                if stops and count == stops[0]:
                    stops.pop(0)
                    os.kill(os.getpid(), signal.SIGINT)
        except Interrupted:
            return train(folder, stops)
        return run.pipeline

    whole, parts = train(tmp_path / "whole", []), train(tmp_path / "parts", [2, 3])
    for name in ("vae", "mar"):
        a, b = (getattr(x, name).state_dict() for x in (whole, parts))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert whole.latent_scale == parts.latent_scale and whole.clip == parts.clip
