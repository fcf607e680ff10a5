"""Trained models by name or from other people's files: fetched, checked, told apart by shapes.

Safetensors and checkpoints of torch.save are read; what would run code is refused.
"""

import argparse
import math
import os
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, NamedTuple

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mar_mini.checkpoints import Pipeline, empty, misfit
from mar_mini.configs import PRESETS, Config, MARConfig, VAEConfig, choose
from mar_mini.data import data_dir
from mar_mini.vae import AutoencoderKL

REPOSITORY = "jadechoghari/mar"
LATENT_SCALE = 0.2325  # 1 / std of KL-16's latents over ImageNet, as published
POSITIONS = {f"{part}_pos_embed_learned" for part in ("encoder", "decoder", "diffusion")}
CONFIGS = {name: config for name, config in PRESETS.items() if config.data == "imagenet"}
KL16_SHA256 = "ae6e66b66cce64248cace5aa6cf8bdb3e834947801cbf7e059028592e2b1de31"


class HubFile(NamedTuple):
    """A file in `REPOSITORY`; bytes and sha256 are None where they are not known."""

    name: str
    size: int | None = None
    sha256: str | None = None


FILES = {
    "mar_base": HubFile("mar-base.safetensors", 831_736_456),
    "mar_large": HubFile("mar-large.safetensors"),
    "mar_huge": HubFile("mar-huge.safetensors"),
    "kl16": HubFile("kl16.safetensors", 265_856_244, KL16_SHA256),
}


def load_pretrained(name: str | Path) -> Pipeline:
    """A trained model by name, or from a folder that `Pipeline.save` wrote.

    name  a bundled model, or mar_base, mar_large or mar_huge, fetched from the Hugging Face Hub;
          a bare word is always one of these, write `./mine` for a folder

    Raises ValueError for an unknown name (lists those which exist), a damaged file, or weights
    that do not fit the configuration (names the keys); FileNotFoundError if nothing can be fetched.
    """
    bundled, folder, name = data_dir() / "weights", Path(name), os.fspath(name)
    if name == folder.name:
        folder = bundled / name
    if (folder / "config.json").is_file():
        return Pipeline.load(folder)
    if name == "kl16":
        raise ValueError("kl16 is an autoencoder and paints nothing; use load_autoencoder()")
    if name in FILES:
        return load_published(fetch(name), name)
    there = ", ".join(sorted(path.parent.name for path in bundled.glob("*/config.json")))
    raise ValueError(
        f"no trained model {name!r}; expected one of: {there or '(none)'}, or the path of a folder "
        "with config.json and mar.safetensors, such as ./mine; published, and fetched once: "
        + ", ".join(file for file in FILES if file != "kl16")
    )


def load_published(
    path: str | Path,
    config: str | Config | None = None,
    *,
    vae: str | Path | None = None,
    raw: bool = False,
) -> Pipeline:
    """Published weights from a file, with the published latent scale, no bound, numbers as classes.

    path    .safetensors with the published names, or the authors' checkpoint-last.pth
    config  preset that it must be of (or a Config with tokens of 0.2325 * latents); found if None
    vae     kl16.safetensors or kl16.ckpt; fetched if None
    raw     take a checkpoint's raw weights in place of their average

    Raises ValueError if a file is damaged, would run code, or is of another model (says of which);
    FileNotFoundError if the autoencoder cannot be fetched.
    """
    mar, config = load(Path(path), config, "mar", raw)
    card = {"preset": config.name, "source": Path(path).name, "raw": raw}
    sampling, classes = config.sampling, [str(label) for label in range(mar.class_num)]
    vae = load_autoencoder(vae, config)
    return Pipeline(mar, vae, LATENT_SCALE, sampling.clip, classes, sampling, card)


def load_autoencoder(
    path: str | Path | None = None, config: str | Config = "kl16"
) -> AutoencoderKL:
    """The published autoencoder KL-16, or that of another preset, float32, in eval mode.

    path  kl16.safetensors or kl16.ckpt; None fetches the former

    Raises as `load_published`.
    """
    return load(fetch("kl16") if path is None else Path(path), config, "vae")[0]


def load(
    path: Path, config: str | Config | None, part: str, raw: bool = False
) -> tuple[nn.Module, Config]:
    """A file's model, and the preset that it is of. An average is whole: MAR has no buffers."""
    if raw and path.suffix == ".safetensors":
        raise ValueError(f"{path} holds one set of weights; leave out raw (--raw)")
    state = read(path, "model_ema" if part == "mar" and not raw else "model")
    config = identify(state, path, config, part)
    model = empty(getattr(config, part)).to_empty(device="cpu")
    model.load_state_dict(state)  # a copy: the file may go
    return model.eval(), config


# Files -------------------------------------------------------------------------------------------


def fetch(name: str) -> Path:
    """The file of published weights, from the Hub's cache or, with a progress bar, from the Hub.

    Raises FileNotFoundError that says what to do if it cannot be had (no network, full disk, ...),
    ValueError for an unknown name, or if size or sha256 are not the published ones.
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
    whole = path.resolve()  # in the Hub's cache a link, and what it leads to is to be removed
    size, found, expected = whole.stat().st_size, None, None
    if file.size not in (None, size):
        found, expected = f"{size:,} bytes", f"{file.size:,}"
    elif file.sha256 and digest(whole) != file.sha256:
        found, expected = f"sha256 {digest(whole)}", file.sha256
    if found:
        raise ValueError(
            f"{whole} has {found}, the published {file.name} has {expected}: half of a download, "
            "or another file; remove it and fetch it again"
        )
    return path


def digest(path: Path) -> str:
    """The file's sha256."""
    return sha256(np.memmap(path, mode="r")).hexdigest()


def read(path: Path, entry: str) -> dict[str, Tensor]:
    """Weights by name, mapped from the file: nothing is read before it is needed.

    entry  of a checkpoint: model, or model_ema for the average

    Raises ValueError if the file is missing, damaged, of another kind, without that entry, or if
    it would run code: that is found without running it.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}; expected .safetensors, .pth or .ckpt: check the path")
    with open(path, "rb") as file:
        is_checkpoint = file.read(4) == b"PK\x03\x04"
    if not is_checkpoint and path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is neither .safetensors nor a checkpoint of torch.save (1.6 or later); it was "
            "not opened any further, as a bare pickle may run code. Fetch it again, or save it anew"
        )
    try:
        if not is_checkpoint:
            return load_file(path)
        # the authors' checkpoints carry their arguments as a Namespace, which runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            forbidden = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not forbidden:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        # the last line of a long text is about something else
        forbidden = [str(error).split("Check the documentation")[0].strip().splitlines()[-1]]
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        size, why = path.stat().st_size, (str(error).splitlines() or ["no text"])[0]
        raise ValueError(
            f"{path} ({size:,} bytes) is damaged or half of a download ({why}); fetch it again"
        ) from error
    if forbidden:
        raise ValueError(
            f"{path} is refused: there is more than weights in it, and reading that would run code "
            f"({', '.join(forbidden)}); nothing of it was run. Take the weights from another "
            "source, best as .safetensors"
        )
    found = checkpoint if isinstance(checkpoint, dict) else {}
    if is_state(found):
        return found  # with nothing around them
    if is_state(found.get(entry)):
        return found[entry]
    raise ValueError(
        f"{path} has no weights called {entry!r}, only: {', '.join(map(str, found)) or 'nothing'}"
        + ("; raw=True (--raw) takes those of 'model'" if is_state(found.get("model")) else "")
    )


def is_state(value: object) -> bool:
    """Whether it is weights by name, one at least."""
    pairs = value.items() if isinstance(value, dict) else ()
    return bool(pairs) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in pairs)


# Which model it is -------------------------------------------------------------------------------


@lru_cache
def weights_of(config: MARConfig | VAEConfig | None) -> dict[str, Tensor]:
    """A model's weights by name, without memory for them."""
    return empty(config).state_dict() if config else {}


def differing(own: dict[str, Tensor], found: dict[str, Tensor]) -> set[str]:
    """Names that only one of the two has, or that have other shapes."""
    own, found = ({(name, value.shape) for name, value in state.items()} for state in (own, found))
    return {name for name, _ in own ^ found}


def identify(
    state: dict[str, Tensor], path: Path, config: str | Config | None = None, part: str = "mar"
) -> Config:
    """The preset that weights are of, by their names and shapes.

    config  what they must be of: a published preset's name or any Config; None for whichever it is
    part    "mar" or "vae", the model that is wanted

    Raises ValueError that says what they are instead, and how they differ.
    """
    known = {name: weights_of(preset.mar or preset.vae) for name, preset in CONFIGS.items()}
    nearest = min(known, key=lambda name: len(differing(known[name], state)))
    if config is None:
        config = nearest if getattr(CONFIGS[nearest], part) else "kl16"
    if isinstance(config, str):
        config = choose("published preset", config, CONFIGS)
    wanted = getattr(config, part)
    differ = differing(own := weights_of(wanted), state)
    if not differ:
        return config
    faults = [misfit(own, state)] if own else []
    if not differing(known[nearest], state):
        loader = "load_autoencoder(path)" if nearest == "kl16" else "load_published(path)"
        faults.insert(0, f"its weights are of {nearest!r}, which {loader} loads")
    elif differ == POSITIONS and (table := state["diffusion_pos_embed_learned"]).ndim == 3:
        side = math.isqrt(table.shape[1]) * wanted.vae_stride * wanted.patch_size
        faults.append(
            f"these position tables are for {table.shape[1]} tokens, {side}x{side} pixels: pass "
            f"config=replace(preset, mar=replace(preset.mar, img_size={side}))"
        )
    else:
        faults.append("pass config=, the Config that it was trained with")
    kind = "MAR" if part == "mar" else "autoencoder"
    raise ValueError(f"{path} is not the {kind} of preset {config.name!r}: {'; '.join(faults)}")


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
    """Turn published weights into a folder that `sample`, `evaluate` and `load_pretrained` take.

    The card in it names the sources with their sha256. It is written last: a folder is whole or no
    model at all.

    Args:
        file: .safetensors with the published names, or the authors' checkpoint-last.pth.
        out: the folder; it must not hold a model.
        config: preset that the file must be of; found out if left out.
        vae: kl16.safetensors or kl16.ckpt; fetched from the Hugging Face Hub if left out.
        raw: a checkpoint's raw weights in place of their average.
        dtype: of the weights in the folder; float32 keeps every bit, bfloat16 halves it.
    """
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a model already; choose another folder, or remove it")
    config = identify(read(file, "model" if raw else "model_ema"), file, config)
    vae = fetch("kl16") if vae is None else vae
    pipeline = load_published(file, config, vae=vae, raw=raw)
    pipeline.card |= {"sha256": digest(file), "vae": vae.name, "vae_sha256": digest(vae)}
    pipeline.save(out, config, getattr(torch, dtype))
    print(f"saved in {out}: config.json, mar.safetensors, vae.safetensors")
    return 0
