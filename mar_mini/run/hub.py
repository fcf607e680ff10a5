"""The published weights: fetched, checked, told apart by their shapes."""

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from mar_mini.configs import PRESETS, Config, MARConfig, VAEConfig, choose
from mar_mini.mar import MAR
from mar_mini.run.foreign import read
from mar_mini.vae import AutoencoderKL

REPOSITORY = "jadechoghari/mar"
LATENT_SCALE = 0.2325  # 1 / std of KL-16's latents over ImageNet, as published
POSITIONS = {f"{part}_pos_embed_learned" for part in ("encoder", "decoder", "diffusion")}
CONFIGS = {name: config for name, config in PRESETS.items() if config.data == "imagenet"}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class HubFile:
    """A file in `REPOSITORY`: its name, bytes and sha256, None where they are not known."""

    name: str
    size: int | None = None
    sha256: str | None = None


FILES = {
    "mar_base": HubFile("mar-base.safetensors", 831_736_456),
    "mar_large": HubFile("mar-large.safetensors"),
    "mar_huge": HubFile("mar-huge.safetensors"),
    "kl16": HubFile(
        "kl16.safetensors",
        265_856_244,
        "ae6e66b66cce64248cace5aa6cf8bdb3e834947801cbf7e059028592e2b1de31",
    ),
}


# Fetching -----------------------------------------------------------------------------------------


def fetch(name: str) -> Path:
    """The file of published weights, from the Hub's cache or, with a progress bar, from the Hub.

    Raises FileNotFoundError that says what to do if it cannot be had (no network, full disk, ...),
    ValueError for an unknown name or if what came is not what was published (`check`).
    """
    file = choose("published model", name, FILES)
    try:
        path = Path(hf_hub_download(REPOSITORY, file.name))
    except (OSError, EntryNotFoundError) as error:
        use = "load_autoencoder(path)" if name == "kl16" else "load_published(path, vae=path)"
        raise FileNotFoundError(
            f"{file.name} could not be had from the Hugging Face Hub ({type(error).__name__}: "
            f"{error}). Without a network: fetch "
            f"https://huggingface.co/{REPOSITORY}/resolve/main/{file.name} elsewhere and use "
            f"mar_mini.{use}, or mar-mini convert; or copy a filled cache (HF_HOME) here and set "
            "HF_HUB_OFFLINE=1, which uses the cache alone"
        ) from error
    check(path, file)
    return path


def check(path: Path, file: HubFile) -> None:
    """Raises ValueError unless size and sha256 are the published ones, where those are known."""
    path = path.resolve()  # in the Hub's cache a link, and what it leads to is to be removed
    size = path.stat().st_size
    if file.size not in (None, size):
        raise ValueError(
            f"{path} has {size:,} bytes, the published {file.name} has {file.size:,}: half of a "
            "download, or another file; remove it and fetch it again"
        )
    if file.sha256 and sha256(path) != file.sha256:
        raise ValueError(
            f"{path} has sha256 {sha256(path)}, the published {file.name} has {file.sha256}; "
            "remove it and fetch it again"
        )


def sha256(path: Path) -> str:
    """Of the file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Which model it is --------------------------------------------------------------------------------


def empty(config: MARConfig | VAEConfig) -> nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return (MAR if isinstance(config, MARConfig) else AutoencoderKL)(**asdict(config))


@lru_cache
def shapes(config: MARConfig | VAEConfig) -> Shapes:
    return {key: tuple(value.shape) for key, value in empty(config).state_dict().items()}


def differing(own: Shapes, found: Shapes) -> list[str]:
    """Names that only one of the two has, or that have other shapes."""
    return [key for key in {**own, **found} if own.get(key) != found.get(key)]


def misfit(own: Shapes, found: Shapes) -> str:
    """How weights differ from those expected, as text; empty if they do not."""
    problems = {
        "missing": [key for key in own if key not in found],
        "unexpected": [key for key in found if key not in own],
        "of another shape": [
            f"{key} {tuple(found[key])} instead of {tuple(own[key])}"
            for key in own
            if key in found and found[key] != own[key]
        ],
    }
    return "; ".join(
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems.items()
        if keys
    )


def identify(
    state: dict[str, Tensor], path: Path, config: str | Config | None = None, part: str = "mar"
) -> Config:
    """The preset that weights are of, by their names and shapes.

    config  what they must be of: a published preset's name or any Config; None for whichever it is
    part    "mar" or "vae", the model that is wanted

    Raises ValueError that says what they are instead, and how they differ.
    """
    found = {key: tuple(value.shape) for key, value in state.items()}
    known = {name: shapes(preset.mar or preset.vae) for name, preset in CONFIGS.items()}
    nearest = min(known, key=lambda name: len(differing(known[name], found)))
    if config is None:
        config = nearest if getattr(CONFIGS[nearest], part) else "kl16"
    if isinstance(config, str):
        config = choose("published preset", config, CONFIGS)
    wanted = config.mar if part == "mar" else config.vae
    own = shapes(wanted) if wanted else {}
    if found == own:
        return config
    faults = [misfit(own, found)] if own else []
    positions = found.get("diffusion_pos_embed_learned", ())
    if found == known[nearest]:
        loader = "load_autoencoder(path)" if nearest == "kl16" else "load_published(path)"
        faults.insert(0, f"its weights are of {nearest!r}, which {loader} loads")
    elif set(differing(own, found)) == POSITIONS and len(positions) == 3:
        side = math.isqrt(positions[1]) * wanted.vae_stride * wanted.patch_size
        faults.append(
            f"these position tables are for {positions[1]} tokens, {side}x{side} pixels: pass "
            f"config=replace(preset, mar=replace(preset.mar, img_size={side}))"
        )
    else:
        faults.append("pass config=, the Config that it was trained with")
    kind = "MAR" if part == "mar" else "autoencoder"
    raise ValueError(f"{path} is not the {kind} of preset {config.name!r}: {'; '.join(faults)}")


def filled(config: MARConfig | VAEConfig, state: dict[str, Tensor]) -> nn.Module:
    """The model with those weights, float32, in eval mode."""
    model = empty(config).to_empty(device="cpu")
    model.load_state_dict(state)  # a copy: the file may go
    return model.eval()


def load_mar(
    path: str | Path, config: str | Config | None = None, raw: bool = False
) -> tuple[MAR, Config]:
    """The model of a file and the preset that it is of; see `checkpoints.load_published`.

    MAR has no buffers, so the average of the parameters alone is a whole model.
    """
    path = Path(path)
    if raw and path.suffix == ".safetensors":
        raise ValueError(f"{path} holds one set of weights; leave out raw (--raw)")
    state = read(path, "model" if raw else "model_ema")
    config = identify(state, path, config)
    return filled(config.mar, state), config


def load_autoencoder(
    path: str | Path | None = None, config: str | Config = "kl16"
) -> AutoencoderKL:
    """The published autoencoder KL-16, float32, in eval mode.

    path    kl16.safetensors or kl16.ckpt; None fetches the former
    config  preset with another autoencoder

    Raises as `fetch`, `read` and `identify`.
    """
    path = fetch("kl16") if path is None else Path(path)
    state = read(path, "model")
    config = identify(state, path, config, part="vae")
    return filled(config.vae, state)


# The command -------------------------------------------------------------------------------------


def convert(
    file: Path,
    *,
    out: Path,
    config: str | None = None,
    vae: Path | None = None,
    raw: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> int:
    """Turn published weights into a folder that `sample` and `evaluate` take.

    Args:
        file: .safetensors with the published names, or the authors' checkpoint-last.pth.
        out: the folder; it must not hold a model.
        config: preset that the file must be of; found out if left out.
        vae: kl16.safetensors or kl16.ckpt; fetched from the Hugging Face Hub if left out.
        raw: a checkpoint's raw weights in place of their average.
        dtype: of the weights in the folder; bfloat16 halves it.
    """
    import torch

    from mar_mini.checkpoints import convert

    folder = convert(file, out, config, vae=vae, raw=raw, dtype=getattr(torch, dtype))
    print(f"saved in {folder}: config.json, mar.safetensors, vae.safetensors")
    return 0
