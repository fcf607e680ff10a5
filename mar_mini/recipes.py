"""From images to a trained pipeline: the autoencoder where there is one, latents, then the MAR."""

from collections.abc import Iterator
from dataclasses import asdict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mar_mini.checkpoints import Pipeline
from mar_mini.configs import Config, MARConfig
from mar_mini.mar import MAR
from mar_mini.sampling import evaluating
from mar_mini.training import Step, train_mar, train_vae
from mar_mini.vae import AutoencoderKL


def train_pipeline(
    config: Config,
    images: Float[Tensor, "N C H W"],
    labels: Int[Tensor, " N"],
    classes: list[str],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Step]]:
    """Train a preset; yields (stage, `Step`) and returns a `Pipeline` with the averaged weights.

    images  (N, C, H, W) float in [-1, 1], of the size that the preset was made for
    labels  (N,) int64, indices into `classes`

    Raises ValueError if the images or classes do not fit the preset.
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
    return stages(config, images, labels, classes, seed, device)


def trainable(config: Config) -> MARConfig:
    """The preset's MAR. Raises ValueError if it has none, or no recipe for its autoencoder."""
    if config.mar is None:
        raise ValueError(f"preset {config.name!r} has no MAR to train; choose one that has")
    if config.vae is not None and config.vae_training is None:
        raise ValueError(f"preset {config.name!r} does not say how to train its autoencoder")
    return config.mar


def stages(config, images, labels, classes, seed, device) -> Iterator[tuple[str, Step]]:
    """The stages of `train_pipeline`, one after the other."""
    torch.manual_seed(seed)
    vae, mirrored, scale, clip = None, None, 1.0, config.sampling.clip
    latents = images
    if config.vae is not None:
        vae = AutoencoderKL(**asdict(config.vae)).to(device)
        for step in train_vae(vae, images, config.vae_training, seed=seed):
            yield "autoencoder", step
        vae = step.ema.eval()
        latents, mirrored = encode(vae, images), encode(vae, images.flip(-1))
        scale = 1.0 / float(latents.std())
        latents, mirrored = latents * scale, mirrored * scale
        clip = float(latents.abs().max())
    mar = MAR(**asdict(config.mar)).to(device)
    for step in train_mar(mar, latents, labels, config.training, mirrored=mirrored, seed=seed):
        yield "masked autoregressive model", step
    card = {"steps": step.step, "seconds": round(step.seconds, 1), "loss": round(step.loss, 4),
            "images_seen": step.images_seen, "seed": seed, "torch": torch.__version__}  # fmt: skip
    return Pipeline(step.ema.eval(), vae, scale, clip, list(classes), config.sampling, card)


@torch.no_grad()
def encode(
    vae: AutoencoderKL, images: Float[Tensor, "N C H W"], batch_size: int = 250
) -> Float[Tensor, "N D H2 W2"]:
    """The means of the latents of many images, unscaled, a batch at a time."""
    device = next(vae.parameters()).device
    with evaluating(vae):
        return torch.cat([vae.encode(x.to(device)).mode() for x in images.split(batch_size)])
