"""Latents encoded once, for training that never sees a picture: sharded files, mapped into memory.

A shard holds, for each of its pictures and its mirror image, the means and log variances that the
autoencoder gives, in float16. That takes half the space of float32, and moves the mean by 1.5% of
the spread that a latent is drawn with (bfloat16: 12%; tests/run/test_latents.py measures both).
"""

import json
import re
import shlex
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mar_mini.checkpoints import empty, load_weights, save_weights
from mar_mini.configs import VAEConfig, from_json, get_config
from mar_mini.data import data_dir, normalise
from mar_mini.run.distributed import own_device
from mar_mini.run.images import Pictures, check_readable, crops, open_pictures
from mar_mini.run.parts import claim, fill, parse_part, pieces, read_card, weights_checksum
from mar_mini.run.state import checksum
from mar_mini.sampling import evaluating
from mar_mini.vae import AutoencoderKL, DiagonalGaussian

FORMAT, MANIFEST = "mar_mini latents 2", "manifest.json"


class LatentShards:
    """Latents on disk, mapped into memory: what is asked for is read, and nothing else.

    They are `data.Images`; each step of a training draws its own from the posterior.

    labels        int64 (N,), indices into `classes`
    classes       their names
    shape         (C, h, w) of a latent
    latent_scale  1 / std of the latents as they are drawn (the spread of the posterior included)
    clip          bound on scaled latents: 3 standard deviations of the posterior
    checksum      to tell them from others
    skipped       names of pictures that could not be read

    Raises ValueError that names a shard which is missing, truncated or not of these latents, and
    says which command makes it. Whether each byte is right only `check` looks.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise ValueError(
                f"no latents in {folder}; make them with: mar-mini latents SOURCE --vae MODEL "
                f"--out {folder}"
            )
        self.manifest = read_card(self.folder / MANIFEST)
        self.files = shard_files(self.folder, self.manifest)
        missing = [path.name for path in self.files if not path.is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.files)} shards are missing in {folder} "
                f"({', '.join(missing[:3])}); make them with: {self.manifest['command']}"
            )
        cards, shards = zip(*map(self.open, range(len(self.files))), strict=True)
        self.moments = [shard["moments"] for shard in shards]
        self.labels = torch.cat([shard["labels"] for shard in shards])
        self.starts = torch.tensor([0, *accumulate(map(len, self.moments))])
        self.classes = self.manifest["classes"]
        self.skipped = [name for card in cards for name in card["skipped"]]
        _, _, channels, height, width = self.moments[0].shape
        self.shape = (channels // 2, height, width)
        values = sum(x.numel() for x in self.moments) / 2
        mean, square = (sum(card[key] for card in cards) / values for key in ("sum", "squares"))
        self.latent_scale = (square - mean**2) ** -0.5
        self.clip = self.latent_scale * max(card["bound"] for card in cards)
        self.sums = [card["checksum"] for card in cards]
        self.checksum = checksum({"shards": torch.tensor(self.sums)})

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, number: int) -> tuple[dict, dict[str, Tensor]]:
        """What is known of one shard, and its tensors, mapped into memory."""
        path = self.files[number]
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if metadata.get("identity") == shard_identity(self.manifest, number):
                return json.loads(metadata["card"]), tensors
            wrong = "not of these latents"
        except (SafetensorError, OSError) as error:
            wrong = f"damaged ({error})"
        raise self.refused(f"{path} is {wrong}")

    def refused(self, why: str) -> ValueError:
        return ValueError(f"{why}; remove it and make it again with: {self.manifest['command']}")

    def batch(self, indices, flip, generator=None) -> Float[Tensor, "B C H W"]:
        """See `data.Images`: scaled latents, drawn from the autoencoder's posterior."""
        shards = torch.searchsorted(self.starts, indices, right=True) - 1
        rows = indices - self.starts[shards]
        picked = zip(shards.tolist(), rows.tolist(), flip.tolist(), strict=True)
        moments = torch.stack([self.moments[shard][row, int(side)] for shard, row, side in picked])
        device = "cpu" if generator is None else generator.device
        moments = moments.to(device).float()  # (B, 2C, h, w)
        return DiagonalGaussian(moments).sample(generator) * self.latent_scale

    def autoencoder(self) -> tuple[AutoencoderKL, VAEConfig]:
        """That which made these latents. Raises ValueError if its weights are not the same."""
        vae, config = open_vae(self.folder)
        if weights_checksum(vae) != self.manifest["weights"]:
            raise self.refused(f"{self.folder / 'vae.safetensors'} did not make these latents")
        return vae, config

    def check(self) -> Iterator[str]:
        """Read every byte; yields the name of each shard. Raises ValueError that names bad ones."""
        damaged = []
        for number, path in enumerate(self.files):
            yield path.name
            if checksum(self.open(number)[1]) != self.sums[number]:
                damaged.append(path.name)
        if damaged:
            raise self.refused(f"{self.folder}: the checksum does not fit in {', '.join(damaged)}")


def shard_files(folder: Path, manifest: dict) -> list[Path]:
    count = len(pieces(manifest["count"], manifest["shard_size"]))
    return [folder / f"shard-{i:05d}-of-{count:05d}.safetensors" for i in range(count)]


def shard_identity(manifest: dict, number: int) -> str:
    """Of a shard: of which latents, and which of them."""
    text = json.dumps({**manifest, "command": None}, sort_keys=True)
    return f"{number} of {zlib.crc32(text.encode())}"


def open_vae(name: str | Path, preset: str | None = None) -> tuple[AutoencoderKL, VAEConfig]:
    """An autoencoder by the name of a bundled model, or from a folder with vae.safetensors.

    preset  whose autoencoder it is, where the folder has no config.json

    Raises ValueError if there is none, or it does not fit the preset.
    """
    folder = Path(name)
    if str(name) == folder.name and (data_dir() / "weights" / folder).is_dir():
        folder = data_dir() / "weights" / folder
    cards = [path for path in (folder / "config.json", folder / MANIFEST) if path.is_file()]
    if preset is not None:
        config = get_config(preset).vae
    elif cards:
        values = json.loads(cards[0].read_text())["vae"]
        config = values and from_json(VAEConfig, values)
    else:
        raise ValueError(
            f"{folder} has no config.json; say which preset its vae.safetensors is of: --config"
        )
    if config is None:
        raise ValueError(f"{preset or folder} has no autoencoder; its tokens are pixels")
    vae = empty(config).to_empty(device="cpu").eval()
    load_weights(vae, folder / "vae.safetensors")
    return vae, config


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
    skip_unreadable: bool = False,
    **reading: int,
) -> Iterator[int]:
    """Encode pictures into shards, as `parts.fill` does; yields how many of them are done.

    side             pixels of a side that pictures are cropped to
    command          that makes what is missing, for messages
    skip_unreadable  leave such pictures out, and list them in the shard
    **reading        batch_size and workers of `images.crops`

    Raises ValueError that names unreadable pictures, or if the folder holds other latents.
    """
    manifest = {
        "format": FORMAT,
        "pictures": pictures.checksum,
        "count": len(pictures),
        "image_size": side,
        "weights": weights_checksum(vae),
        "shard_size": shard_size,
        "classes": pictures.classes,
        "vae": asdict(vae_config),
        "command": command,
    }
    claim(folder / MANIFEST, "latents", manifest)
    if not (folder / "vae.safetensors").is_file():
        save_weights(vae, folder / "vae.safetensors")
    ranges, files = pieces(len(pictures), shard_size), shard_files(folder, manifest)
    device = next(vae.parameters()).device

    def make(number: int) -> Iterator[int]:
        moments, kept, errors, indices = [], [], [], ranges[number]
        for images, wrong in crops(pictures, indices, side, **reading):
            good = [i for i, error in enumerate(wrong) if not error]
            kept += [indices[len(errors) + i] for i in good]
            errors += wrong
            if good:
                x = normalise(images[good]).to(device)
                with torch.no_grad(), evaluating(vae):
                    both = [vae.encode(y) for y in (x, x.flip(-1))]
                both = [torch.cat([p.mean, p.logvar], 1) for p in both]
                moments.append(torch.stack(both, 1).half().cpu())  # (b, 2, 2C, h, w)
            yield len(wrong)
        if not skip_unreadable:
            check_readable(errors, "mend or remove them, or leave them out with --skip-unreadable")
        where = f"pictures {indices.start} to {indices.stop - 1}"
        if not kept:
            raise ValueError(f"none of {where} can be read")
        tensors = {"moments": torch.cat(moments), "labels": pictures.labels[kept]}
        tensors["pictures"] = torch.tensor(kept)
        if not tensors["moments"].isfinite().all():
            raise ValueError(
                f"latents of {where} are not finite in float16 (65504 at most); is this the right "
                "autoencoder?"
            )
        mean, logvar = tensors["moments"].float().chunk(2, dim=2)
        spread = (0.5 * logvar).exp()
        card = {  # what the scale and the bound of all shards together follow from
            "checksum": checksum(tensors),
            "sum": float(mean.sum(dtype=torch.float64)),
            "squares": float((mean.square() + spread.square()).sum(dtype=torch.float64)),
            "bound": float((mean.abs() + 3 * spread).max()),
            "skipped": [error for error in errors if error],
        }
        metadata = {"identity": shard_identity(manifest, number), "card": json.dumps(card)}
        return [partial(save_file, tensors, metadata=metadata)]

    yield from fill(ranges, part, lambda number: [files[number]], make)


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
        skip_unreadable: leave out pictures that cannot be read, and list them.
        check: read all latents in this folder and compare their checksums; nothing is encoded.
    """
    from tqdm import tqdm

    if check is not None:
        data = LatentShards(check)
        for _ in tqdm(data.check(), total=len(data.files), desc="checking", unit="shard"):
            pass
    elif source is None or vae is None:
        raise ValueError("expected what to encode and by what: mar-mini latents SOURCE --vae MODEL")
    else:
        (model, vae_config), pictures = open_vae(vae, config), open_pictures(source, split)
        mine = parse_part(part)
        # of any part: what is missing may be of another one
        command = re.sub(r" --part[ =]\S+", "", shlex.join(["mar-mini", *sys.argv[1:]]))
        options = {"side": size or vae_config.resolution, "shard_size": shard_size, "part": mine}
        options |= {"batch_size": batch_size, "workers": workers, "command": command}
        options |= {"skip_unreadable": skip_unreadable}
        steps = write_latents(model.to(own_device()), vae_config, pictures, out, **options)
        with tqdm(total=len(pictures) // mine[1], desc="encoding", unit="picture") as bar:
            for number in steps:
                bar.update(number)
        if not all(path.is_file() for path in shard_files(out, read_card(out / MANIFEST))):
            print(f"part {mine[0]}/{mine[1]} is in {out}; the others are not there yet")
            return 0
        data = LatentShards(out)
    print(
        f"{data.folder}: {'whole, ' * (check is not None)}{len(data):,} pictures, "
        f"{len(data.classes)} classes, latents {data.shape}, scale {data.latent_scale:.4f}, "
        f"bound {data.clip:.2f}"
    )
    for name in data.skipped:
        print(f"  left out: {name}")
    return 0
