"""Latents encoded once, for training that never sees a picture: sharded files, mapped into memory.

A shard holds, for each of its pictures and its mirror image, the means and log variances that the
autoencoder gives, in float16. That takes half the space of float32, and moves the mean by 1.5% of
the spread that a latent is drawn with (bfloat16: 12%; tests/test_latents.py measures both). They
are written by `encoding`.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mar_mini.checkpoints import load_weights
from mar_mini.configs import VAEConfig, from_json
from mar_mini.run.state import checksum
from mar_mini.vae import AutoencoderKL, DiagonalGaussian

FORMAT, MANIFEST = "mar_mini latents 1", "manifest.json"


class LatentShards:
    """Latents on disk, mapped into memory: what is asked for is read, and nothing else.

    They are `batches.Images`; each step of a training draws its own from the posterior.

    labels        int64 (N,), indices into `classes`
    classes       their names
    shape         (C, h, w) of a latent
    latent_scale  1 / std of the latents, measured over all of them
    clip          bound on scaled latents
    checksum      to tell them from others
    skipped       names of pictures that could not be read

    Raises ValueError that names a shard which is missing, truncated or not of these latents, and
    says which command makes it. Whether each byte is right only `check` looks.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        labels, self.moments = [], []
        for shard in self.manifest["shards"]:
            tensors = self.open(shard)
            labels.append(tensors["labels"].clone())
            self.moments.append(tensors["moments"])
        self.labels = torch.cat(labels)
        self.starts = torch.tensor([0, *accumulate(len(x) for x in labels)])
        self.classes, self.skipped = self.manifest["classes"], self.manifest["skipped"]
        self.latent_scale, self.clip = self.manifest["latent_scale"], self.manifest["clip"]
        self.shape = tuple(self.manifest["shape"])
        sums = [shard["checksum"] for shard in self.manifest["shards"]]
        self.checksum = checksum({"shards": torch.tensor(sums)})

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, shard: dict) -> dict[str, Tensor]:
        """The tensors of one shard of the manifest, mapped into memory."""
        path = self.folder / shard["file"]
        remedy = f"remove it and make it again with: {self.manifest['command']}"
        if not path.is_file():
            raise ValueError(f"{path} is missing; make it with: {self.manifest['command']}")
        try:
            metadata = read_metadata(path)
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        if metadata["checksum"] != str(shard["checksum"]):
            raise ValueError(f"{path} is not the shard that the manifest lists; {remedy}")
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in ("moments", "labels", "pictures")}
        channels, height, width = self.manifest["shape"]
        if tensors["moments"].shape != (shard["count"], 2, 2 * channels, height, width):
            raise ValueError(
                f"{path} holds moments {tuple(tensors['moments'].shape)}, expected {shard['count']}"
                f" of {tuple(self.manifest['shape'])}; {remedy}"
            )
        return tensors

    def batch(
        self,
        indices: Int64[Tensor, " B"],
        flip: Bool[Tensor, " B"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Scaled latents of some pictures, drawn from the autoencoder's posterior.

        indices  (B,) which pictures, 0 to N - 1
        flip     (B,) True = of the mirror image
        returns  (B, C, h, w) float32 on the generator's device
        """
        shards = torch.searchsorted(self.starts, indices, right=True) - 1
        rows = indices - self.starts[shards]
        picked = zip(shards.tolist(), rows.tolist(), flip.tolist(), strict=True)
        moments = torch.stack([self.moments[shard][row, int(side)] for shard, row, side in picked])
        device = "cpu" if generator is None else generator.device
        moments = moments.to(device).float()  # (B, 2C, h, w)
        return DiagonalGaussian(moments).sample(generator) * self.latent_scale

    def autoencoder(self) -> tuple[AutoencoderKL, VAEConfig]:
        """That which made these latents. Raises ValueError if its weights are not the same."""
        config = from_json(VAEConfig, self.manifest["vae"])
        vae = AutoencoderKL(**asdict(config)).eval()
        path = self.folder / "vae.safetensors"
        load_weights(vae, path)
        if checksum(state_of(vae)) != self.manifest["identity"]["vae"]:
            raise ValueError(
                f"{path} did not make these latents; remove it and restore it with: "
                f"{self.manifest['command']}"
            )
        return vae, config

    def check(self) -> Iterator[str]:
        """Read every byte; yields the name of each shard. Raises ValueError that names bad ones."""
        damaged = []
        for shard in self.manifest["shards"]:
            yield shard["file"]
            if checksum(self.open(shard)) != shard["checksum"]:
                damaged.append(shard["file"])
        if damaged:
            raise ValueError(
                f"{self.folder}: the checksum does not fit in {', '.join(damaged)}; remove what is "
                f"damaged and make it again with: {self.manifest['command']}"
            )


def read_manifest(folder: Path) -> dict:
    """Raises ValueError if there is none (says what is missing), or it is damaged."""
    path = folder / MANIFEST
    if path.is_file():
        try:
            manifest = json.loads(path.read_text())
            if manifest["format"] == FORMAT:
                return manifest
        except (json.JSONDecodeError, KeyError, TypeError):
            pass
        raise ValueError(f"{path} is damaged; remove it and give the command of the latents again")
    shards = sorted(folder.glob("shard-*-of-*.safetensors"))
    if not shards:
        raise ValueError(
            f"no latents in {folder}; make them with: mar-mini latents SOURCE --vae MODEL --out "
            f"{folder}"
        )
    there = {path.name for path in shards}
    names = shard_names(int(shards[0].stem.split("-")[-1]))
    missing = [name for name in names if name not in there]
    command = read_metadata(shards[0])["command"]
    raise ValueError(
        f"{len(missing)} of {len(names)} shards are missing in {folder} "
        f"({', '.join(missing[:3]) or 'only the manifest'}); make them with: {command}"
    )


def shard_names(count: int) -> list[str]:
    return [f"shard-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]


def read_metadata(path: Path) -> dict[str, str]:
    """Of one shard. Raises ValueError if it is truncated or no shard."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no shard of latents")
    return metadata


def state_of(vae: AutoencoderKL) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in vae.state_dict().items()}
