"""Trained models in and out: safetensors and a JSON card, never a pickle."""

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mar_mini.configs import Config, MARConfig, SamplingConfig, VAEConfig
from mar_mini.files import write_atomically
from mar_mini.mar import MAR
from mar_mini.sampling import Frame, evaluating, sample
from mar_mini.vae import AutoencoderKL

PLAIN = ("latent_scale", "clip", "classes", "card")  # a pipeline's fields that are JSON as they are


@dataclass(frozen=True)
class ImageFrame(Frame):
    """A `Frame` that knows its pictures; what is still masked shows as the mean token."""

    decode: Callable[[Tensor], Tensor] = field(repr=False)

    def images(self) -> Float[Tensor, "B C H W"]:
        """(B, 3 or 1, H, W) float32 in [0, 1]."""
        return self.decode(self.tokens)


@dataclass
class Pipeline:
    """A trained model with all that it takes to make pictures."""

    mar: MAR
    vae: AutoencoderKL | None = None  # None where tokens are patches of pixels
    latent_scale: float = 1.0  # 1 / std of the latents: the model sees latents times this
    clip: float | None = None  # bound on |x0| while sampling
    classes: list[str] = field(default_factory=list)  # their names
    defaults: SamplingConfig = SamplingConfig()
    card: dict = field(default_factory=dict)  # how it was trained, for people

    def sample(self, labels=None, **arguments) -> Iterator[ImageFrame]:
        """`mar_mini.sample` with this model's defaults; frames know their `.images()`."""
        settings = {**asdict(self.defaults), "clip": self.clip, **arguments}
        frames = sample(self.mar, labels, **settings)
        return (ImageFrame(f.step, f.tokens, f.predicted, f.mask, self.decode) for f in frames)

    def generate(self, labels=None, **arguments) -> Float[Tensor, "B C H W"]:
        """Pictures (B, 3 or 1, H, W), float32 in [0, 1]; arguments as for `sample`."""
        return deque(self.sample(labels, **arguments), maxlen=1)[0].images()

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B L D"]:
        """Pictures in [0, 1] to tokens: the mean of the posterior, scaled."""
        x = images.to(self.mar.fake_latent.device) * 2 - 1
        if self.vae is not None:
            with evaluating(self.vae) as vae:
                x = vae.encode(x.to(vae.quant_conv.weight.dtype)).mode().float()
        return self.mar.patchify(x * self.latent_scale)

    @torch.no_grad()
    def decode(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B C H W"]:
        """Tokens to pictures, float32 in [0, 1]."""
        latents = self.mar.unpatchify(tokens) / self.latent_scale
        if self.vae is not None:
            with evaluating(self.vae) as vae:
                latents = vae.decode(latents.to(vae.quant_conv.weight.dtype))
        return ((latents.float() + 1) / 2).clamp(0, 1)

    def save(self, folder: str | Path, config: Config, dtype: torch.dtype = torch.bfloat16) -> Path:
        """Write weights (`dtype`) and card to a folder that `load` reads; the card comes last.

        Each file is written under another name first, so that a crash leaves the old one whole.
        Raises ValueError, before anything is written, if `config` is not that of the models.
        """
        parts = {"mar": self.mar} | ({} if self.vae is None else {"vae": self.vae})
        for part, model in parts.items():
            own = getattr(config, part)
            if own is None or misfit(empty(own).state_dict(), model.state_dict()):
                raise ValueError(
                    f"preset {config.name!r} does not describe this {type(model).__name__}; pass "
                    "the configuration that it was built from, or dataclasses.replace() of it"
                )
        card = {"config": config.name, "mar": None, "vae": None}
        card |= {part: asdict(getattr(config, part)) for part in parts}
        card |= {name: getattr(self, name) for name in PLAIN} | {"defaults": asdict(self.defaults)}
        text, folder = json.dumps(card, indent=2) + "\n", Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for part, model in parts.items():
            save_weights(model, folder / f"{part}.safetensors", dtype)
        write_atomically(folder / "config.json", lambda path: path.write_text(text))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Pipeline":
        """What `save` wrote, in eval mode; weights become float32.

        Raises ValueError if a file is missing or damaged, or if weights do not fit the card.
        """
        path = Path(folder) / "config.json"
        try:
            card = json.loads(path.read_text())
            mar, vae = MAR(**card["mar"]), card["vae"] and AutoencoderKL(**card["vae"])
            defaults = SamplingConfig(**card["defaults"])
            pipeline = cls(mar, vae, defaults=defaults, **{name: card[name] for name in PLAIN})
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); restore it, or train the model again"
            ) from error
        for part, model in {"mar": mar, "vae": vae}.items():
            if model is not None:
                load_weights(model.eval(), path.with_name(f"{part}.safetensors"))
        return pipeline


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
            vae = config.vae and AutoencoderKL(**asdict(config.vae)).eval()
    finally:
        torch.set_default_dtype(before)
    card = {"config": config.name, "seed": seed, "trained": False}
    classes = [f"class {i}" for i in range(config.mar.class_num)]
    return Pipeline(mar, vae, 1.0, config.sampling.clip, classes, config.sampling, card)


def empty(config: MARConfig | VAEConfig) -> MAR | AutoencoderKL:
    """The model of a configuration, without memory for its weights."""
    with torch.device("meta"):
        return (MAR if isinstance(config, MARConfig) else AutoencoderKL)(**asdict(config))


def misfit(own: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """How weights differ from those expected in names and shapes; empty if they do not."""
    problems = {
        "missing": [name for name in own if name not in found],
        "unexpected": [name for name in found if name not in own],
        "of another shape": [
            f"{name} {tuple(found[name].shape)} instead of {tuple(value.shape)}"
            for name, value in own.items()
            if name in found and found[name].shape != value.shape
        ],
    }
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in problems.items()
        if names
    )


def save_weights(model: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """A model's weights as safetensors, atomically."""
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
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
    found = misfit(model.state_dict(), state)
    if found:
        raise ValueError(
            f"{path} does not fit this {type(model).__name__}: {found}; "
            "build the model from the configuration that the weights were trained with"
        )
    model.load_state_dict(state)
