"""From images to a trained pipeline: the autoencoder where there is one, latents, then the MAR."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mar_mini.checkpoints import Pipeline
from mar_mini.configs import Config, MARConfig
from mar_mini.mar import MAR
from mar_mini.runs import Checkpoints, resumable
from mar_mini.sampling import evaluating
from mar_mini.training import Step, Training, train_mar, train_vae
from mar_mini.vae import AutoencoderKL


def train_pipeline(
    config: Config,
    images: Float[Tensor, "N C H W"],
    labels: Int[Tensor, " N"],
    classes: list[str],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
) -> Iterator["Progress"]:
    """Train a preset; yields `Progress` and returns a `Pipeline` with the averaged weights.

    images  (N, C, H, W) float in [-1, 1], of the size that the preset was made for
    labels  (N,) int64, indices into `classes`
    folder  where checkpoints are kept; what is there already is continued (see `runs`)

    Raises ValueError if the images or classes do not fit the preset, or the checkpoints not the
    run; `runs.Interrupted` after Ctrl-C, with everything saved.
    """
    mar_config = trainable(config)
    if len(classes) != mar_config.class_num:
        raise ValueError(
            f"{len(classes)} classes, but preset {config.name!r} is made for {mar_config.class_num}"
        )
    if images.shape[-1] != mar_config.img_size or images.shape[-2] != mar_config.img_size:
        raise ValueError(
            f"images are {tuple(images.shape)}; preset {config.name!r} is made for "
            f"{mar_config.img_size}x{mar_config.img_size} pixels, so resize or crop them"
        )
    return stages(config, images, labels, classes, seed, device, folder)


def trainable(config: Config) -> MARConfig:
    """The preset's MAR. Raises ValueError if it has none, or no recipe for its autoencoder."""
    if config.mar is None:
        raise ValueError(f"preset {config.name!r} has no MAR to train; choose one that has")
    if config.vae is not None and config.vae_training is None:
        raise ValueError(f"preset {config.name!r} does not say how to train its autoencoder")
    return config.mar


class Progress(NamedTuple):
    """Where a training is: which stage, its last step, and what a model of that stage would make.

    pipeline  a MAR -> the `Pipeline` with it, to look at its samples; None while there is none
    """

    stage: str
    step: Step
    pipeline: Callable[[MAR], Pipeline] | None = None


AUTOENCODER, MASKED = "autoencoder", "masked autoregressive model"


def stages(config, images, labels, classes, seed, device, folder) -> Iterator[Progress]:
    """The stages of `train_pipeline`, one after the other."""
    torch.manual_seed(seed)
    vae, mirrored, scale, clip = None, None, 1.0, config.sampling.clip
    latents, data = images, zlib.crc32(images.contiguous().numpy())

    def steps(training: Training, stage: str, models: dict) -> Iterator[Step]:
        """Those of a training; with a folder from its last checkpoint on."""
        if folder is None:
            return training
        identity = {"stage": stage, "data": data, "seed": seed, **models, **settings(training)}
        return resumable(training, Checkpoints(folder / stage.split()[0], identity))

    if config.vae is not None:
        vae = AutoencoderKL(**asdict(config.vae)).to(device)
        if vae.linear_path:
            vae.start_linear(images[:2000].to(device))
        training = train_vae(vae, images, config.vae_training, seed=seed)
        for step in steps(training, AUTOENCODER, {"vae": asdict(config.vae)}):
            yield Progress(AUTOENCODER, step)
        vae = training.ema.module.eval()
        latents, mirrored = encode(vae, images), encode(vae, images.flip(-1))
        scale = 1.0 / float(latents.std())
        latents, mirrored = latents * scale, mirrored * scale
        clip = float(latents.abs().max())
    mar = MAR(**asdict(config.mar)).to(device)
    training = train_mar(mar, latents, labels, config.training, mirrored=mirrored, seed=seed)
    models = {"mar": asdict(config.mar), "vae": config.vae and asdict(config.vae)}
    pipeline = partial(
        Pipeline, vae=vae, latent_scale=scale, clip=clip, classes=list(classes),
        defaults=config.sampling,
    )  # fmt: skip
    for step in steps(training, MASKED, models):
        yield Progress(MASKED, step, pipeline)
    card = {"steps": training.step, "seconds": round(training.seconds, 1), "seed": seed,
            "images_seen": training.step * config.training.batch_size,
            "torch": torch.__version__}  # fmt: skip
    return pipeline(training.ema.module.eval(), card=card)


def settings(training: Training) -> dict:
    """What a run must have in common with its checkpoints: all but the budget, which may grow."""
    values = asdict(training.config)
    return {k: v for k, v in values.items() if k not in ("max_steps", "max_seconds")}


@torch.no_grad()
def encode(
    vae: AutoencoderKL, images: Float[Tensor, "N C H W"], batch_size: int = 250
) -> Float[Tensor, "N D H2 W2"]:
    """The means of the latents of many images, unscaled, a batch at a time."""
    device = next(vae.parameters()).device
    with evaluating(vae):
        return torch.cat([vae.encode(x.to(device)).mode() for x in images.split(batch_size)])
