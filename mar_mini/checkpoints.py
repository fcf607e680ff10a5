"""Trained models in and out: safetensors and a JSON card, never a pickle."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mar_mini.configs import Config, MARConfig, SamplingConfig, VAEConfig
from mar_mini.data import data_dir
from mar_mini.files import write_atomically
from mar_mini.mar import MAR
from mar_mini.run.foreign import read
from mar_mini.run.hub import (
    FILES,
    LATENT_SCALE,
    fetch,
    identify,
    load_autoencoder,
    load_mar,
    misfit,
    sha256,
)
from mar_mini.sampling import Frame, evaluating, sample
from mar_mini.vae import AutoencoderKL


@dataclass(frozen=True)
class ImageFrame(Frame):
    """A `Frame` that knows its pictures; what is still masked shows as the mean token."""

    decode: Callable[[Tensor], Tensor] = field(repr=False)

    def images(self) -> Float[Tensor, "B C H W"]:
        """(B, 3 or 1, H, W) float32 in [0, 1]."""
        return self.decode(self.tokens)


@dataclass
class Pipeline:
    """A trained model with all that it takes to make pictures.

    mar           the model
    vae           its autoencoder; None where tokens are patches of pixels
    latent_scale  1 / std of the latents: the model sees latents times this
    clip          bound on |x0|, None for none
    classes       their names
    defaults      of `sample`
    card          how it was trained, for people
    """

    mar: MAR
    vae: AutoencoderKL | None = None
    latent_scale: float = 1.0
    clip: float | None = None
    classes: list[str] = field(default_factory=list)
    defaults: SamplingConfig = SamplingConfig()
    card: dict = field(default_factory=dict)

    def sample(self, labels=None, **arguments) -> Iterator[ImageFrame]:
        """`mar_mini.sample` with this model's defaults; frames know their `.images()`."""
        settings = {**asdict(self.defaults), "clip": self.clip, **arguments}
        frames = sample(self.mar, labels, **settings)
        return (ImageFrame(f.step, f.tokens, f.predicted, f.mask, self.to_images) for f in frames)

    def generate(self, labels=None, **arguments) -> Float[Tensor, "B C H W"]:
        """Pictures (B, 3 or 1, H, W), float32 in [0, 1]; arguments as for `sample`."""
        return deque(self.sample(labels, **arguments), maxlen=1)[0].images()

    @torch.no_grad()
    def to_images(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B C H W"]:
        """Tokens to pictures, float32 in [0, 1]."""
        latents = self.mar.unpatchify(tokens) / self.latent_scale
        if self.vae is not None:
            with evaluating(self.vae) as vae:
                latents = vae.decode(latents.to(vae.quant_conv.weight.dtype))
        return ((latents.float() + 1) / 2).clamp(0, 1)

    @torch.no_grad()
    def to_tokens(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B L D"]:
        """Pictures in [0, 1] to tokens: the mean of the posterior, scaled."""
        x = images.to(self.mar.fake_latent.device) * 2 - 1
        if self.vae is not None:
            with evaluating(self.vae) as vae:
                x = vae.encode(x.to(vae.quant_conv.weight.dtype)).mode().float()
        return self.mar.patchify(x * self.latent_scale)

    def save(self, folder: str | Path, config: Config, dtype: torch.dtype = torch.bfloat16) -> Path:
        """Write weights (`dtype`) and card to a folder that `load_pretrained` reads.

        Each file is written under another name first, so that a crash leaves the old one whole.
        Raises ValueError, before anything is written, if `config` is not that of the models.
        """
        check_config(self.mar, MAR, config.mar, config.name)
        if self.vae is not None:
            check_config(self.vae, AutoencoderKL, config.vae, config.name)
        card = {
            "config": config.name,
            "mar": asdict(config.mar),
            "vae": None if self.vae is None else asdict(config.vae),
            "latent_scale": self.latent_scale,
            "clip": self.clip,
            "classes": self.classes,
            "defaults": asdict(self.defaults),
            "card": self.card,
        }
        text = json.dumps(card, indent=2) + "\n"
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.mar, folder / "mar.safetensors", dtype)
        if self.vae is not None:
            save_weights(self.vae, folder / "vae.safetensors", dtype)
        write_atomically(folder / "config.json", lambda path: path.write_text(text))
        return folder


def load_pretrained(name: str | Path) -> Pipeline:
    """A trained model by name, or from a folder that `Pipeline.save` wrote.

    name  a bundled model, or mar_base, mar_large or mar_huge, fetched from the Hugging Face Hub;
          a bare word is always one of these, write `./mine` for a folder

    Raises ValueError for an unknown name (lists those which exist), a damaged file, or weights
    that do not fit the configuration (names the keys); FileNotFoundError if nothing can be fetched.
    """
    weights, folder = data_dir() / "weights", Path(name)
    if os.fspath(name) == folder.name:
        folder = weights / folder
    if not (folder / "config.json").is_file():
        if os.fspath(name) == "kl16":
            raise ValueError("kl16 is an autoencoder and paints nothing; use load_autoencoder()")
        if os.fspath(name) in FILES:
            return load_published(fetch(os.fspath(name)), os.fspath(name))
        bundled = sorted(path.parent.name for path in weights.glob("*/config.json"))
        raise ValueError(
            f"no trained model {str(name)!r}; expected one of: {', '.join(bundled) or '(none)'}, "
            "or the path of a folder with config.json and mar.safetensors, such as ./mine; "
            f"published, and fetched once: {', '.join(file for file in FILES if file != 'kl16')}"
        )
    try:
        card = json.loads((folder / "config.json").read_text())
        defaults = SamplingConfig(**known_fields(SamplingConfig, card["defaults"]))
        mar = MAR(**known_fields(MARConfig, card["mar"]))
        vae = AutoencoderKL(**known_fields(VAEConfig, card["vae"])) if card["vae"] else None
        pipeline = Pipeline(
            mar.eval(),
            vae and vae.eval(),
            card["latent_scale"],
            card["clip"],
            card["classes"],
            defaults,
            card["card"],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is damaged ({error}); restore it, or train the model again"
        ) from error
    load_weights(mar, folder / "mar.safetensors")
    if vae is not None:
        load_weights(vae, folder / "vae.safetensors")
    return pipeline


def load_published(
    path: str | Path,
    config: str | Config | None = None,
    *,
    vae: str | Path | None = None,
    raw: bool = False,
) -> Pipeline:
    """Published weights from a file, with the published latent scale, no bound, numbers as classes.

    path    .safetensors with the published names, or the authors' checkpoint-last.pth, which is
            read without running anything
    config  preset that it must be of (or a Config with tokens of 0.2325 * latents); found if None
    vae     kl16.safetensors or kl16.ckpt; fetched if None
    raw     take a checkpoint's raw weights in place of their average

    Raises ValueError if a file is damaged, would run code, or is of another model (says of which);
    FileNotFoundError if the autoencoder cannot be fetched.
    """
    mar, config = load_mar(path, config, raw)
    return Pipeline(
        mar,
        load_autoencoder(vae, config),
        LATENT_SCALE,
        config.sampling.clip,
        [str(label) for label in range(mar.class_num)],
        config.sampling,
        {"preset": config.name, "source": Path(path).name, "raw": raw},
    )


def convert(
    path: str | Path,
    folder: str | Path,
    config: str | Config | None = None,
    *,
    vae: str | Path | None = None,
    raw: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Published weights to a folder that `load_pretrained` reads; arguments of `load_published`.

    dtype  of the files; float32 keeps every bit

    The card, which names the sources with their sha256, is written last: a folder is whole or no
    model at all. Raises as `load_published`, and ValueError if the folder holds a model already.
    """
    path, folder = Path(path), Path(folder)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model already; choose another folder, or remove it")
    config = identify(read(path, "model" if raw else "model_ema"), path, config)
    vae = fetch("kl16") if vae is None else Path(vae)
    pipeline = load_published(path, config, vae=vae, raw=raw)
    pipeline.card.update(sha256=sha256(path), vae=vae.name, vae_sha256=sha256(vae))
    return pipeline.save(folder, config, dtype)


def untrained(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Pipeline:
    """A preset's models with random weights: it samples as a trained one does, and makes noise.

    dtype  of the weights; they are drawn in it, so that no float32 copy is ever there

    Raises ValueError if the preset has no MAR.
    """
    if config.mar is None:
        raise ValueError(f"preset {config.name!r} has no MAR to sample; choose one that has")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            mar = MAR(**asdict(config.mar)).eval()
            vae = AutoencoderKL(**asdict(config.vae)).eval() if config.vae else None
    finally:
        torch.set_default_dtype(before)
    return Pipeline(
        mar,
        vae,
        clip=config.sampling.clip,
        defaults=config.sampling,
        classes=[f"class {i}" for i in range(config.mar.class_num)],
        card={"config": config.name, "seed": seed, "trained": False},
    )


def check_config(model: nn.Module, kind: type[nn.Module], config, name: str) -> None:
    """Raises ValueError unless a model built from that configuration has the same weights."""
    with torch.device("meta"):
        expected = kind(**asdict(config)).state_dict() if config else {}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if shapes != {key: value.shape for key, value in expected.items()}:
        raise ValueError(
            f"preset {name!r} does not describe this {kind.__name__}; pass the configuration that "
            "the model was built from, or dataclasses.replace() of it"
        )


def known_fields(kind: type, values: dict) -> dict:
    """Values for a dataclass; lists become tuples, as JSON has none."""
    names = {f.name for f in fields(kind)}
    if set(values) - names:
        raise KeyError(f"unknown setting {sorted(set(values) - names)[0]!r} for {kind.__name__}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def save_weights(model: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """A model's weights as safetensors, atomically."""
    state = {
        key: value.detach().to("cpu", dtype).contiguous()
        for key, value in model.state_dict().items()
    }
    write_atomically(path, lambda temporary: save_file(state, temporary))


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model from a safetensors file.

    Raises ValueError if the file is missing, damaged or of another model (names the keys).
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; restore it, or train the model again")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or train again") from error
    own = {key: value.shape for key, value in model.state_dict().items()}
    found = misfit(own, {key: value.shape for key, value in state.items()})
    if found:
        raise ValueError(
            f"{path} does not fit this {type(model).__name__}: {found}; "
            "build the model from the configuration that the weights were trained with"
        )
    model.load_state_dict(state)
