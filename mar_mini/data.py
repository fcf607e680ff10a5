"""Images in: the bundled parquet files and your own, and what a step of a training sees."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64, UInt8
from torch import Tensor

BLOCK = 32


def data_dir() -> Path:
    """Return the folder of the bundled data: MAR_MINI_DATA, or `data/` beside the package.

    In a wheel it is inside of the package. Raises ValueError if that folder does not exist.
    """
    package = Path(__file__).resolve().parent
    bundled = package / "_data" if (package / "_data").is_dir() else package.parent / "data"
    folder = Path(os.environ.get("MAR_MINI_DATA") or bundled)
    if not folder.is_dir():
        raise ValueError(
            f"no data folder {folder}; install the package from a clone (pip install -e .), or "
            "set the environment variable MAR_MINI_DATA to the clone's data folder"
        )
    return folder


def load_images(name_or_path: str | Path, split: str = "train"):
    """Load labelled images from parquet into memory; nothing is downloaded or cached on disk.

    name_or_path  a bundled name (`digits`, `cifar10_mini`), a folder with `{split}.parquet`, or
                  one .parquet file; a bare word is a bundled name, write `./faces` for a folder

    Raises ValueError if there is no such file, or it is damaged or lacks one of the columns
    `image` (PIL images) and `label` (ClassLabel) of the datasets.Dataset.
    """
    import datasets  # here, so that importing this module stays quick
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = _find(name_or_path, split)
    try:
        # partitioning=None: a folder called `a=b` on the way must not become a column.
        table = pq.read_table(file, partitioning=None, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} is damaged or not a parquet file ({error}); copy it again, or if it is "
            f"bundled: `git checkout -- {file}` or `python tools/make_{file.parent.name}.py`"
        ) from error
    dataset = datasets.Dataset(table)  # the features come from the metadata in the file
    for column, kind in (("image", datasets.Image), ("label", datasets.ClassLabel)):
        found = dataset.features.get(column, "missing")
        if not isinstance(found, kind):
            raise ValueError(
                f"{file}: column `{column}` is {found}, expected datasets.{kind.__name__}; there "
                f"are {table.column_names}; rename (rename_column) or convert (cast_column) yours"
            )
    return dataset.select_columns(["image", "label"])


def _find(name_or_path: str | Path, split: str) -> Path:
    """Return the parquet file that `load_images` is asked for, or raise ValueError."""
    path = Path(name_or_path).expanduser()
    if path.suffix == ".parquet":
        if not path.is_file():
            raise ValueError(f"no file {path}; check the path")
        return path
    if os.fspath(name_or_path) == path.name:
        bundled = sorted({file.parent.name for file in data_dir().glob("*/*.parquet")})
        if path.name not in bundled:
            raise ValueError(
                f"no bundled images called '{path.name}' in {data_dir()}, there are {bundled}; "
                f"write './{path.name}' for a folder of your own"
            )
        path = data_dir() / path.name
    splits = sorted(file.stem for file in path.glob("*.parquet"))
    if not splits:
        raise ValueError(f"no folder {path} with .parquet files in it; check the path")
    if split not in splits:
        raise ValueError(f"no split '{split}' in {path}, there are {splits}; choose one of these")
    return path / f"{split}.parquet"


def class_names(dataset) -> list[str]:
    """Return the names of the classes; label i is called `class_names(dataset)[i]`."""
    return dataset.features["label"].names


def to_tensors(dataset) -> tuple[UInt8[Tensor, "N C H W"], Int64[Tensor, " N"]]:
    """Decode all images (C = 1 if all are grey, else RGB) and labels of a dataset.

    Raises ValueError if it is empty or the images differ in size.
    """
    pictures = list(dataset["image"])
    if not pictures:
        raise ValueError("the dataset has no images; expected one or more")
    for i, picture in enumerate(pictures):
        if picture.size != pictures[0].size:
            raise ValueError(
                f"image {i} is {picture.width} x {picture.height} pixels, image 0 is "
                f"{pictures[0].width} x {pictures[0].height}; resize or crop them to one size"
            )
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    pixels = np.stack([np.asarray(picture.convert(mode)) for picture in pictures])
    images = torch.from_numpy(pixels.reshape(*pixels.shape[:3], -1))  # (N, H, W, C)
    labels = torch.tensor(list(dataset["label"]), dtype=torch.int64)  # (N,)
    return images.permute(0, 3, 1, 2).contiguous(), labels  # (N, C, H, W), (N,)


def normalise(images: Tensor) -> Float32[Tensor, "..."]:
    """Map uint8 pixels, 0 to 255, to the model's range, -1 to 1. Raises ValueError for others."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}, expected torch.uint8 in 0 to 255")
    return images.float() / 127.5 - 1


def denormalise(x: Tensor) -> Float32[Tensor, "..."]:
    """Map model values, -1 to 1 and clamped to it, to the range of pictures, 0 to 1."""
    return ((x.float() + 1) / 2).clamp(0, 1)


# What a step of a training sees -------------------------------------------------------------------


@runtime_checkable
class Images(Protocol):
    """Images as a training asks for them; `InMemory` is the simplest kind."""

    labels: Tensor  # (N,) int64, the index of each image's class

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, flip: Tensor, generator: torch.Generator) -> Tensor:
        """Give images of n indices as (n, C, H, W) float32, mirrored where `flip` (n,) is True.

        generator  on the CPU, for what is random in them (a draw from the posterior)
        """


class InMemory:
    """Images that are tensors, on any device; nothing in them is random.

    latents   (N, C, H, W) float, as `MAR.patchify` takes them
    labels    (N,) int64; ValueError if they are not as many
    mirrored  latents of the mirrored images; without them the last axis is reversed, which is
              right for pixels only
    """

    def __init__(self, latents: Tensor, labels: Tensor, mirrored: Tensor | None = None):
        shape = tuple(latents.shape)
        if len(labels) != len(latents):
            raise ValueError(f"{shape[0]} images but {len(labels)} labels; expected one for each")
        if mirrored is not None and mirrored.shape != shape:
            raise ValueError(f"mirrored is {tuple(mirrored.shape)}; expected {shape} as latents")
        self.latents, self.labels, self.mirrored = latents, labels, mirrored

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices, flip, generator=None) -> Float[Tensor, "B C H W"]:
        indices, flip = indices.to(self.latents.device), flip.to(self.latents.device)
        straight = self.latents[indices]
        if not flip.any():
            return straight
        mirrored = straight.flip(-1) if self.mirrored is None else self.mirrored[indices]
        return torch.where(flip[:, None, None, None], mirrored, straight)


def fetch(images: Images, picked: Tensor, flip: Tensor, rows: slice, seed: int) -> Tensor:
    """Read some rows of the batch `picked` (B,), the same whoever asks for which rows.

    Blocks of 32 rows have random numbers of their own: who needs a part need not read all.
    """
    first = rows.start - rows.start % BLOCK
    parts = []
    for start in range(first, rows.stop, BLOCK):
        block = slice(start, min(start + BLOCK, len(picked)))
        parts.append(images.batch(picked[block], flip[block], step_generator(seed, start)))
    return torch.cat(parts)[rows.start - first : rows.stop - first]


def step_seed(seed: int, step: int) -> int:
    """One number from two, such that neighbours share nothing."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step: a function of (seed, step) and nothing else."""
    return torch.Generator(device).manual_seed(step_seed(seed, step))


@lru_cache(maxsize=2)
def shuffled(seed: int, epoch: int, num_images: int) -> Int[Tensor, " N"]:
    generator = step_generator(seed, 2**32 + epoch)  # apart from those of the steps
    return torch.randperm(num_images, generator=generator)


def batch_indices(seed: int, step: int, num_images: int, batch_size: int) -> Int[Tensor, " B"]:
    """Which images step `step` (from 0) sees: epoch after epoch, each image once in each."""
    first = step * batch_size
    picked = []
    while len(picked) < batch_size:
        epoch, offset = divmod(first + len(picked), num_images)
        rest = batch_size - len(picked)
        picked.extend(shuffled(seed, epoch, num_images)[offset : offset + rest].tolist())
    return torch.tensor(picked)


def coins(n: int, generator: torch.Generator) -> Bool[Tensor, " n"]:
    """True with probability 1/2."""
    return torch.rand(n, generator=generator, device=generator.device) < 0.5
