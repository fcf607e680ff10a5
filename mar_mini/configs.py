"""Named presets, from a model that trains in 75 seconds to the published ones."""

from dataclasses import dataclass, replace


def from_json(kind: type, values: dict):
    """Build a configuration (dataclass) from its JSON, which has lists in place of tuples."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def choose(kind: str, name, known: dict):
    """Look a name up; a function is taken as it is. Raises ValueError that lists the names."""
    if callable(name):
        return name
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; expected one of: {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class VAEConfig:
    """Settings of `AutoencoderKL`; the defaults are the published KL-16."""

    ch: int = 128  # width of the first level; level i has ch * ch_mult[i] channels
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # each level but the last halves the resolution
    num_res_blocks: int = 2  # residual blocks a level in the encoder (the decoder has one more)
    attn_resolutions: tuple[int, ...] = (16,)  # at which the encoder's levels have attention
    resolution: int = 256  # pixels of a side in training (only decides where attention goes)
    z_channels: int = 16  # channels of the latent
    in_channels: int = 3  # channels of the image
    num_groups: int = 32  # groups of every GroupNorm
    # A linear map of patches beside encoder and decoder, which then learn what it lacks: many times
    # quicker to train, and not in the published model (compare the shortcuts of Chen et al. 2024,
    # "Deep compression autoencoder")
    linear_path: bool = False


@dataclass(frozen=True)
class MARConfig:
    """Settings of `MAR`; the defaults are those of MAR-L but for its head."""

    img_size: int = 256  # pixels of a side
    vae_stride: int = 16  # pixels of a side that become one latent; 1: tokens are patches of pixels
    patch_size: int = 1  # latents of a side that become one token
    vae_embed_dim: int = 16  # channels of the latents (or of the image)
    class_num: int = 1000
    encoder_embed_dim: int = 1024
    encoder_depth: int = 16
    encoder_num_heads: int = 16
    decoder_embed_dim: int = 1024
    decoder_depth: int = 16
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0  # hidden width of a block's MLP / its width
    buffer_size: int = 64  # extra tokens in front that carry the class
    mask_ratio_min: float = 0.7  # smallest share of tokens hidden in training
    label_drop_prob: float = 0.1  # share of labels dropped in training, for guidance
    attn_dropout: float = 0.1
    proj_dropout: float = 0.1
    diffloss_d: int = 3  # depth of the head
    diffloss_w: int = 1024  # width of the head
    num_sampling_steps: int = 100  # diffusion steps while sampling, by default
    diffusion_batch_mul: int = 4  # noise levels drawn for each token in a training step
    grad_checkpointing: bool = False  # recompute activations in the backward pass: less memory


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; the defaults are the paper's (MAR section 4) where it has one."""

    batch_size: int = 128
    learning_rate: float = 8e-4
    weight_decay: float = 0.02
    max_steps: int | None = None  # the budget is this or max_seconds, whichever is reached first;
    max_seconds: float | None = None  # at least one of them is needed
    warmup: float = 0.02  # share of the budget in which the learning rate rises from 0
    decay: str = "cosine"  # down to 0 at the end of the budget; or "constant"
    ema_decay: float = 0.9999  # largest decay of the weight average
    ema_window: float = 0.1  # share of the steps so far over which the average reaches back
    grad_clip: float = 3.0  # largest norm of the gradient
    flip: bool = False  # mirror half of the images
    precision: str = "auto"  # bfloat16 where the hardware multiplies it; or "float32", "bf16"
    kl_weight: float = 1e-4  # of the VAE's KL term, per latent value
    accumulate: int = 1  # micro batches of a step, one after the other: less memory, same result


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults of `sample` for a preset; `clip` bounds x0 for models of a small budget."""

    num_iter: int = 64
    num_sampling_steps: int = 100
    cfg: float = 1.0
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    clip: float | None = None


@dataclass(frozen=True)
class Config:
    """A preset: models (None where it has none), data, and how to train and sample."""

    name: str
    data: str
    vae: VAEConfig | None
    mar: MARConfig | None
    training: TrainingConfig
    sampling: SamplingConfig
    vae_training: TrainingConfig | None = None


def scaled_recipe(
    micro_batch: int, accumulate: int, processes: int, *, images: int, epochs: float, blr=1e-4
) -> tuple[int, float, int]:
    """Effective batch, learning rate and steps of a training (MAR section 4).

    A step averages the gradients of `processes`, each of which adds up those of `accumulate` micro
    batches. Each image is seen `epochs` times, in whole steps. The rate is in proportion to the
    batch; `blr` is that of 256 images.
    """
    batch = micro_batch * accumulate * processes
    return batch, blr * batch / 256, int(epochs * images) // batch


def for_batch_size(training: TrainingConfig, batch_size: int) -> TrainingConfig:
    """Fit a recipe to another batch: as many images seen, the learning rate in proportion.

    Source: MAR section 4, blr * batch size / 256. Raises ValueError for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    factor = batch_size / training.batch_size
    steps = training.max_steps and max(1, round(training.max_steps / factor))
    rate = training.learning_rate * factor
    return replace(training, batch_size=batch_size, learning_rate=rate, max_steps=steps)


def transformer(width: int, depth: int, heads: int, **settings) -> MARConfig:
    """A MAR whose encoder and decoder are alike, unless the settings say otherwise."""
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads}
    both = {f"{half}_{k}": v for half in ("encoder", "decoder") for k, v in sizes.items()}
    return MARConfig(**{**both, **settings})


# fmt: off
def published(name: str, mar: MARConfig | None, cfg: float = 1.0) -> Config:
    """A full-size preset: ImageNet at 256x256 in the latents of KL-16, the paper's recipe."""
    batch, rate, steps = scaled_recipe(64, 1, 32, images=1_281_167, epochs=400)  # on 32 GPUs
    training = TrainingConfig(batch_size=batch, learning_rate=rate, max_steps=steps, warmup=0.25,
                              decay="constant", ema_window=1.0, flip=True)
    return Config(name, "imagenet", VAEConfig(), mar, training, SamplingConfig(256, cfg=cfg))


NO_DROPOUT = {"attn_dropout": 0.0, "proj_dropout": 0.0}
SMALL_VAE = VAEConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(),
                      resolution=32, num_groups=8, linear_path=True)


def small(name: str, data: str, vae: VAEConfig | None, **tokens) -> Config:
    """Colour images for two cores or one GPU: one model, and several ways to make tokens for it."""
    stride, channels = (4, 16) if vae else (1, 3)
    mar = transformer(
        128, 4, 4, encoder_depth=2, vae_stride=stride, vae_embed_dim=channels, class_num=10,
        buffer_size=8, diffloss_w=192, num_sampling_steps=50, **tokens, **NO_DROPOUT,
    )
    training = TrainingConfig(batch_size=32, learning_rate=2e-3, max_seconds=90 * 60, warmup=0.03,
                              flip=True)
    vae_training = TrainingConfig(batch_size=16, learning_rate=5e-4, max_seconds=5 * 60,
                                  weight_decay=0.0, grad_clip=1.0, flip=True)
    sampling = SamplingConfig(  # the bound on x0 is that of pixels, or measured on the latents
        16, 50, cfg=4.5, cfg_schedule="constant", temperature=0.95, clip=None if vae else 1.0
    )
    return Config(name, data, vae, mar, training, sampling, vae_training if vae else None)


PRESETS = {
    config.name: config
    for config in (
        Config(  # so small that it learns in a minute: what counts then is how many steps it makes
            "digits", "digits", None,
            transformer(
                64, 2, 4, encoder_depth=1, img_size=16, vae_stride=1, patch_size=4, vae_embed_dim=1,
                class_num=10, buffer_size=2, diffloss_w=64, num_sampling_steps=25,
                diffusion_batch_mul=2, **NO_DROPOUT,
            ),
            TrainingConfig(batch_size=48, learning_rate=3e-3, max_seconds=75, warmup=0.1),
            SamplingConfig(16, 25, cfg=3.0, temperature=0.9, clip=1.0),
        ),
        # 16 tokens of 2x2 latents (64 numbers), fewer of them masked, so that there is something
        # to predict from; or 64 tokens of one latent (16 numbers) or of 4x4 pixels (48)
        small("cifar10", "cifar10_mini", SMALL_VAE, img_size=32, patch_size=2, mask_ratio_min=0.3,
              diffusion_batch_mul=2),
        small("cifar10_latents", "cifar10_mini", SMALL_VAE, img_size=32, patch_size=1,
              diffusion_batch_mul=1),
        small("cifar10_pixels", "cifar10_mini", None, img_size=32, patch_size=4,
              diffusion_batch_mul=1),
        small("imagenette64", "imagenette64", replace(SMALL_VAE, resolution=64), img_size=64,
              patch_size=2, diffusion_batch_mul=1),
        published("mar_base", transformer(768, 12, 12, diffloss_d=6, diffloss_w=1024), cfg=2.9),
        published("mar_large", transformer(1024, 16, 16, diffloss_d=8, diffloss_w=1280), cfg=3.0),
        published("mar_huge", transformer(1280, 20, 16, diffloss_d=12, diffloss_w=1536), cfg=3.2),
        published("mar_large_12x1536", transformer(1024, 16, 16, diffloss_d=12, diffloss_w=1536),
                  cfg=3.0),
        published("kl16", None),
    )
}
# fmt: on


def get_config(name: str) -> Config:
    """Look a preset up by its name. Raises ValueError that lists the presets which exist."""
    return choose("preset", name, PRESETS)
