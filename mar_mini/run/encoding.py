"""Pictures to latents on disk: once for all trainings, by any number of processes, resumable.

What the shards hold, and how they are read: `latents`.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float16
from safetensors.torch import save_file
from torch import Tensor

from mar_mini.checkpoints import load_weights, save_weights
from mar_mini.configs import VAEConfig, from_json, get_config
from mar_mini.data import data_dir, normalise
from mar_mini.files import write_atomically
from mar_mini.run.latents import FORMAT, MANIFEST, read_metadata, shard_names, state_of
from mar_mini.run.parts import pieces
from mar_mini.run.pictures import Pictures, crops
from mar_mini.run.state import checksum, differing
from mar_mini.sampling import evaluating
from mar_mini.vae import AutoencoderKL


@dataclass(frozen=True)
class Autoencoder:
    """A trained autoencoder and the configuration that it was built from."""

    model: AutoencoderKL
    config: VAEConfig


def open_vae(name: str | Path, preset: str | None = None) -> Autoencoder:
    """An autoencoder by the name of a bundled model, or from a folder.

    name    a bundled model, or a folder with vae.safetensors
    preset  whose autoencoder it is, where the folder has no config.json

    Raises ValueError if there is none, or it does not fit the preset.
    """
    folder = Path(name)
    if str(name) == folder.name and (data_dir() / "weights" / folder).is_dir():
        folder = data_dir() / "weights" / folder
    if preset is not None:
        config = get_config(preset).vae
    elif (folder / "config.json").is_file():
        values = json.loads((folder / "config.json").read_text())["vae"]
        config = values and from_json(VAEConfig, values)
    else:
        raise ValueError(
            f"{folder} has no config.json; say which preset its vae.safetensors is of: --config"
        )
    if config is None:
        raise ValueError(f"{preset or folder} has no autoencoder; its tokens are pixels")
    vae = AutoencoderKL(**asdict(config)).eval()
    load_weights(vae, folder / "vae.safetensors")
    return Autoencoder(vae, config)


def write_latents(
    vae: AutoencoderKL,
    vae_config: VAEConfig,
    pictures: Pictures,
    folder: Path,
    *,
    side: int,
    command: str,
    shard_size: int = 2000,
    part: tuple[int, int] = (0, 1),
    batch_size: int = 50,
    workers: int = 0,
    skip_unreadable: bool = False,
) -> Iterator[int]:
    """Encode pictures into shards; yields how many of them are done, after each batch.

    Shards that are there already are not made again, and one is there wholly or not at all: give
    the same again after a kill. Whoever finds all shards there writes the manifest.

    side             pixels of a side that pictures are brought to
    command          that makes what is missing, for messages
    part             (I, N): only shards I, I + N, I + 2N, ...
    workers          processes that read pictures; 0: this one
    skip_unreadable  leave such pictures out, and list them in the manifest

    Raises ValueError that names unreadable pictures, or if the folder holds other latents.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranges = pieces(len(pictures), shard_size)
    identity = {
        "pictures": pictures.checksum,
        "count": len(pictures),
        "image_size": side,
        "vae": checksum(state_of(vae)),
        "shard_size": shard_size,
    }
    names = shard_names(len(ranges))
    done = present(folder, identity)
    if not (folder / "vae.safetensors").is_file():
        save_weights(vae, folder / "vae.safetensors")
    for number in range(part[0], len(ranges), part[1]):
        if names[number] in done:
            yield len(ranges[number])
            continue
        loader = crops(pictures, ranges[number], side, batch_size, workers)
        tensors, card = yield from encode_shard(
            vae, pictures, ranges[number], loader, skip_unreadable
        )
        metadata = {
            "format": FORMAT,
            "identity": json.dumps(identity),
            "command": command,
            "checksum": str(checksum(tensors)),
            "card": json.dumps(card),
        }
        for left_over in folder.glob(f".{names[number]}.*"):  # of a process killed while it wrote
            left_over.unlink(missing_ok=True)
        write_atomically(folder / names[number], partial(save_file, tensors, metadata=metadata))
    done = present(folder, identity)
    if len(done) == len(names):
        manifest = summary(done, identity, command, pictures.classes, asdict(vae_config))
        text = json.dumps(manifest, indent=1) + "\n"
        write_atomically(folder / MANIFEST, lambda path: path.write_text(text))


def encode_shard(vae, pictures, indices, loader, skip_unreadable) -> Iterator[int]:
    """The tensors of one shard and what the manifest wants to know of them."""
    device = next(vae.parameters()).device
    moments, kept, unreadable, number = [], [], [], indices.start
    for images, errors in loader:
        good = [i for i, error in enumerate(errors) if not error]
        unreadable += [error for error in errors if error]
        kept += [number + i for i in good]
        number += len(errors)
        if good and (skip_unreadable or not unreadable):
            x = normalise(images[good]).to(device)
            with torch.no_grad(), evaluating(vae):
                both = [vae.encode(y) for y in (x, x.flip(-1))]
            moments.append(torch.stack([torch.cat([p.mean, p.logvar], 1) for p in both], 1).half())
        yield len(errors)
    if unreadable and not skip_unreadable:
        more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise ValueError(
            f"these pictures cannot be read: {', '.join(unreadable[:5])}{more}; mend or remove "
            "them, or leave them out with --skip-unreadable"
        )
    if not kept:
        raise ValueError(f"none of pictures {indices.start} to {indices.stop - 1} can be read")
    together = torch.cat(moments).cpu()  # (n, 2, 2C, h, w)
    if not together.isfinite().all():
        raise ValueError(
            f"latents of pictures {indices.start} to {indices.stop - 1} are not finite in float16 "
            "(65504 at most); is this the right autoencoder?"
        )
    tensors = {"moments": together, "labels": pictures.labels[kept], "pictures": torch.tensor(kept)}
    return tensors, {**sums(together), "skipped": unreadable}


def sums(moments: Float16[Tensor, "N F C2 H W"]) -> dict:
    """What the scale and the bound of all shards together follow from."""
    mean, logvar = moments.float().chunk(2, dim=2)
    spread = (0.5 * logvar).exp()
    return {
        "count": len(moments),
        "shape": list(mean.shape[2:]),
        "values": mean.numel(),
        "sum": float(mean.sum(dtype=torch.float64)),
        "squares": float((mean.square() + spread.square()).sum(dtype=torch.float64)),
        "bound": float((mean.abs() + 3 * spread).max()),
    }


def summary(done: dict[str, dict], identity, command, classes, vae_config) -> dict:
    """The manifest: what is in the shards, and the scale measured over all of them.

    latent_scale  1 / std of the latents as they are drawn (the spread of the posterior included)
    clip          no scaled latent is larger but for draws beyond three standard deviations
    """
    cards = [json.loads(metadata["card"]) for metadata in done.values()]
    values, total, squares = (sum(c[key] for c in cards) for key in ("values", "sum", "squares"))
    scale = (squares / values - (total / values) ** 2) ** -0.5
    shards = [
        {"file": name, "count": card["count"], "checksum": int(metadata["checksum"])}
        for (name, metadata), card in zip(done.items(), cards, strict=True)
    ]
    return {
        "format": FORMAT,
        "command": command,
        "identity": identity,
        "classes": classes,
        "count": sum(c["count"] for c in cards),
        "shape": cards[0]["shape"],
        "skipped": [name for card in cards for name in card["skipped"]],
        "latent_scale": scale,
        "clip": scale * max(card["bound"] for card in cards),
        "vae": vae_config,
        "shards": shards,
    }


def present(folder: Path, identity: dict) -> dict[str, dict]:
    """Name -> metadata of the whole shards in a folder; ValueError if one is of other latents."""
    found = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            metadata = read_metadata(path)
        except ValueError:
            continue  # it will be made again
        differences = differing(json.loads(metadata["identity"]), identity)
        if differences:
            raise ValueError(
                f"{path} is of other latents ({differences}); choose another folder, or the "
                "settings of those"
            )
        found[path.name] = metadata
    return found


# The command -------------------------------------------------------------------------------------


def latents(
    source: str | None = None,
    *,
    vae: str | None = None,
    out: Path = Path("build") / "latents",
    config: str | None = None,
    size: int | None = None,
    split: str = "train",
    shard_size: int = 2000,
    part: str | None = None,
    batch_size: int = 50,
    workers: int = 0,
    skip_unreadable: bool = False,
    check: Path | None = None,
) -> int:
    """Encode pictures and their mirror images once, for `train --latents`.

    A run that was stopped or killed goes on when the same command is given again.

    Args:
        source: a folder with parquet files, imagefolder:PATH (one folder for each class), or a
            bundled name.
        vae: bundled model, or a folder with vae.safetensors.
        out: folder for the latents.
        config: preset whose autoencoder it is, where its folder has no config.json.
        size: side in pixels that pictures are cropped to; the autoencoder's by default.
        split: train, validation, ...
        shard_size: pictures in a file.
        part: I/N, for N processes: 0/N to N-1/N. By default what torchrun says, or all.
        batch_size: pictures encoded at once.
        workers: processes that read pictures.
        skip_unreadable: leave out pictures that cannot be read; they are listed in manifest.json.
        check: read all latents in this folder and compare their checksums; nothing is encoded.
    """
    from tqdm import tqdm

    from mar_mini.run.latents import MANIFEST, LatentShards
    from mar_mini.run.parts import parse_part, place
    from mar_mini.run.pictures import open_pictures

    if check is not None:
        data = LatentShards(check)
        for _ in tqdm(data.check(), total=len(data.moments), desc="checking", unit="shard"):
            pass
        print(f"{check}: whole, {len(data):,} pictures, {len(data.classes)} classes")
        return 0
    if source is None or vae is None:
        raise ValueError("expected what to encode and by what: mar-mini latents SOURCE --vae MODEL")
    autoencoder, pictures = open_vae(vae, config), open_pictures(source, split)
    side = size or autoencoder.config.resolution
    command = shlex.join(["mar-mini", "latents", source, "--vae", vae, "--out", str(out)])
    for name, value, default in (
        ("config", config, None),
        ("size", size, None),
        ("split", split, "train"),
        ("shard-size", shard_size, 2000),
    ):
        command += f" --{name} {value}" if value != default else ""
    command += " --skip-unreadable" if skip_unreadable else ""
    mine = parse_part(part)
    steps = write_latents(
        autoencoder.model.to(place()),
        autoencoder.config,
        pictures,
        out,
        side=side,
        command=command,
        shard_size=shard_size,
        part=mine,
        batch_size=batch_size,
        workers=workers,
        skip_unreadable=skip_unreadable,
    )
    with tqdm(total=len(pictures) // mine[1], desc="encoding", unit="picture") as bar:
        for number in steps:
            bar.update(number)
    if not (out / MANIFEST).is_file():
        print(f"part {mine[0]}/{mine[1]} is in {out}; the others are not there yet")
        return 0
    data = LatentShards(out)
    print(
        f"{out}: {len(data):,} pictures, {len(data.classes)} classes, latents {data.shape}, "
        f"scale {data.latent_scale:.4f}, bound {data.clip:.2f}"
    )
    if data.skipped:
        print(f"  left out: {len(data.skipped)} that cannot be read, listed in {MANIFEST}")
    return 0
