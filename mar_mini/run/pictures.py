"""More pictures than fit into memory: known by where they are, read one at a time.

A folder with one folder of pictures for each class (ImageNet as it was published), or parquet
files with the columns `image` and `label` (ImageNet on the Hugging Face Hub).
"""

import io
import json
import os
import zlib
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mar_mini.data import data_dir
from mar_mini.run.sources import SUFFIXES, to_rgb

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class Pictures:
    """Labelled pictures; subclasses know how one of them is found.

    labels   int64 (N,), indices into `classes`
    classes  their names
    """

    def __init__(self, labels: Int64[Tensor, " N"], classes: list[str]):
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Where a picture is, within its source."""
        raise NotImplementedError

    def data(self, index: int) -> bytes:
        """The picture as it is stored."""
        raise NotImplementedError

    def picture(self, index: int) -> Image.Image:
        """A picture in colour. Raises ValueError that names it if it cannot be read."""
        try:
            with Image.open(io.BytesIO(self.data(index))) as picture:
                return to_rgb(picture)
        except UnidentifiedImageError as error:
            raise ValueError(f"{self.name(index)} (no image format that is known)") from error
        except UNREADABLE as error:
            raise ValueError(f"{self.name(index)} ({error or type(error).__name__})") from error

    @property
    def checksum(self) -> int:
        """CRC-32 of names and labels, not of what is in the pictures."""
        text = "\n".join([*self.classes, *map(self.name, range(len(self)))])
        return zlib.crc32(self.labels.numpy().tobytes(), zlib.crc32(text.encode()))


class FolderPictures(Pictures):
    """Files in one folder for each class, or in one folder without classes.

    Raises ValueError if there are none.
    """

    def __init__(self, folder: Path, split: str = "train"):
        self.root = folder / split if (folder / split).is_dir() else folder
        names = sorted(p.name for p in self.root.iterdir() if p.is_dir() and p.name[0] != ".")
        self.files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            found = files_below(self.root, name)
            self.files += found
            labels += [label] * len(found)
        if not names:
            names, self.files = [self.root.name], files_below(self.root, "")
            labels = [0] * len(self.files)
        if not self.files:
            raise ValueError(
                f"no pictures in {self.root}; expected one folder for each class with files "
                f"{', '.join(sorted(SUFFIXES))}"
            )
        super().__init__(torch.tensor(labels, dtype=torch.int64), names)

    def name(self, index: int) -> str:
        return self.files[index]

    def data(self, index: int) -> bytes:
        return (self.root / self.files[index]).read_bytes()


def files_below(root: Path, name: str) -> list[str]:
    """Pictures in a folder and those in it, relative to `root`, in an order that never changes."""
    found = []
    for folder, _, files in os.walk(root / name):
        inside = Path(folder).relative_to(root)
        found += [str(inside / f) for f in files if Path(f).suffix.lower() in SUFFIXES]
    return sorted(found)


class ParquetPictures(Pictures):
    """Rows of parquet files with the columns `image` (a struct with `bytes`) and `label`.

    Raises ValueError for a file that is damaged or has other columns, or labels below 0.
    """

    def __init__(self, files: list[Path]):
        self.files, labels, counts, classes = files, [], [], None
        open_again()  # files may have changed since they were last looked at
        for file in files:
            opened = open_parquet(file)
            classes = classes or names_in(opened.schema_arrow)
            column = read_parquet(file, lambda o: o.read(columns=["label"]))["label"]
            labels.append(torch.from_numpy(column.to_numpy().astype(np.int64)))
            counts.append(opened.metadata.num_rows)
        every = torch.cat(labels)
        if not len(every) or every.min() < 0:
            raise ValueError(
                f"{files[0]}: expected labels of 0 or more, got "
                f"{int(every.min()) if len(every) else 'no rows'}; the test split of ImageNet has "
                "no labels: use train or validation"
            )
        self.starts = [0, *accumulate(counts)]
        super().__init__(every, classes or [str(i) for i in range(int(every.max()) + 1)])

    def place(self, index: int) -> tuple[Path, int]:
        file = bisect_right(self.starts, index) - 1
        return self.files[file], index - self.starts[file]

    def name(self, index: int) -> str:
        file, row = self.place(index)
        return f"{file.name}, row {row}"

    def data(self, index: int) -> bytes:
        file, row = self.place(index)
        metadata, group = open_parquet(file).metadata, 0
        while row >= metadata.row_group(group).num_rows:
            row -= metadata.row_group(group).num_rows
            group += 1
        return row_group(file, group)[row].as_py()["bytes"]


@lru_cache(maxsize=8)
def open_parquet(file: Path):
    """A parquet file, opened. Raises ValueError if it is damaged or has other columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged or not parquet ({error}); copy it again") from error
    names = opened.schema_arrow.names
    if "image" not in names or "label" not in names:
        raise ValueError(f"{file} has the columns {names}; expected `image` and `label`")
    return opened


def read_parquet(file: Path, read):
    """What `read` takes from a parquet file. Raises ValueError if the file is damaged."""
    import pyarrow as pa

    try:
        return read(open_parquet(file))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again") from error


@lru_cache(maxsize=2)  # pictures are read in the order of the file, a group holds many of them
def row_group(file: Path, group: int):
    return read_parquet(file, lambda o: o.read_row_group(group, columns=["image"]))["image"]


def names_in(schema) -> list[str] | None:
    """Names of the classes, which `datasets` writes beside the columns."""
    try:
        card = json.loads((schema.metadata or {})[b"huggingface"])
        return card["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, json.JSONDecodeError):
        return None


def open_pictures(source: str | Path, split: str = "train") -> Pictures:
    """Pictures from wherever they are; none of them is read yet.

    source  a folder with `*{split}*.parquet`, in it or below; `imagefolder:PATH` or a folder with
            one folder for each class, in a folder called like the split or without; a bundled name

    Raises ValueError that says what is missing.
    """
    text = os.fspath(source)
    folder = Path(text.removeprefix("imagefolder:")).expanduser()
    if text == folder.name and (data_dir() / text).is_dir():
        folder = data_dir() / text
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; check the path")
    files = sorted(folder.rglob("*.parquet"))
    if text.startswith("imagefolder:") or not files:
        return FolderPictures(folder, split)
    chosen = [file for file in files if split in file.name]
    if not chosen:
        raise ValueError(
            f"no file called *{split}*.parquet in {folder}, there are "
            f"{', '.join(file.name for file in files[:3])}; choose another split"
        )
    return ParquetPictures(chosen)


def center_crop(picture: Image.Image, side: int) -> UInt8[np.ndarray, "3 S S"]:
    """The middle of a picture, the way published figures of ImageNet are made (ADM, DiT).

    Halved with a box filter while the shorter side is at least twice `side`, then bicubic until it
    is `side`, then cropped. Source: Dhariwal & Nichol 2021, their data loader.
    """
    while min(picture.size) >= 2 * side:
        half = (picture.width // 2, picture.height // 2)
        picture = picture.resize(half, Image.Resampling.BOX)
    scale = side / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    return np.array(picture).transpose(2, 0, 1)


class Crops(Dataset):
    """Some pictures as what a `DataLoader` wants: (uint8 (3, side, side), what is wrong or "").

    exact  pictures of another size are wrong, instead of cropped
    """

    def __init__(self, pictures: Pictures, indices: range, side: int, exact: bool = False):
        self.pictures, self.indices, self.side, self.exact = pictures, indices, side, exact

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, str]:
        try:
            picture = self.pictures.picture(self.indices[item])
            if self.exact and picture.size != (self.side, self.side):
                raise ValueError(
                    f"{self.pictures.name(self.indices[item])} is {picture.width}x{picture.height} "
                    f"pixels, expected {self.side}x{self.side}"
                )
        except ValueError as error:
            return torch.zeros(3, self.side, self.side, dtype=torch.uint8), str(error)
        return torch.from_numpy(np.ascontiguousarray(center_crop(picture, self.side))), ""


def crops(
    pictures: Pictures,
    indices: range,
    side: int,
    batch_size: int,
    workers: int = 0,
    exact: bool = False,
) -> DataLoader:
    """Batches of `Crops`, in order: uint8 (B, 3, side, side) and B texts, "" where all is well."""
    return DataLoader(
        Crops(pictures, indices, side, exact),
        batch_size,
        num_workers=workers,
        worker_init_fn=open_again,
    )


def open_again(worker: int = 0) -> None:
    """A process does not go on reading from files that another has opened."""
    open_parquet.cache_clear()
    row_group.cache_clear()
