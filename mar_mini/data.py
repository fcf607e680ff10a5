"""Images in: the bundled parquet files and your own, through the `datasets` library.

`datasets` is imported where it is used, so that importing this module stays quick.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

if TYPE_CHECKING:
    import datasets


def data_dir() -> Path:
    """Return the folder of the bundled data.

    It is `data/` beside the package, or the folder in the environment variable MAR_MINI_DATA.
    Raises ValueError if that folder does not exist.
    """
    folder = Path(os.environ.get("MAR_MINI_DATA") or Path(__file__).resolve().parents[1] / "data")
    if not folder.is_dir():
        raise ValueError(
            f"no data folder {folder}; install the package from a clone (pip install -e .), or "
            "set the environment variable MAR_MINI_DATA to the clone's data folder"
        )
    return folder


def load_images(name_or_path: str | Path, split: str = "train") -> "datasets.Dataset":
    """Load labelled images from parquet into memory; nothing is downloaded or cached on disk.

    name_or_path  a bundled name (`digits`, `cifar10_mini`), a folder with `{split}.parquet`, or
                  one .parquet file; a bare word is a bundled name, write `./faces` for a folder
    split         `train` or `test`; not used if `name_or_path` is a file
    returns       dataset with columns `image` (read as PIL images) and `label` (ClassLabel)

    Raises ValueError if there is no such name, split or file, if the file is damaged or not
    parquet, or if it does not hold these two columns.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = _find(name_or_path, split)
    try:
        # partitioning=None: a folder called `a=b` on the way must not become a column.
        table = pq.read_table(file, partitioning=None, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} is damaged or not a parquet file ({error}); if it is bundled, restore it with "
            f"`git checkout -- {file}` or `python tools/make_{file.parent.name}.py`, "
            "else copy it again"
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


def class_names(dataset: "datasets.Dataset") -> list[str]:
    """Return the names of the classes; label i is called `class_names(dataset)[i]`."""
    return dataset.features["label"].names


def to_tensors(
    dataset: "datasets.Dataset",
) -> tuple[UInt8[Tensor, "N C H W"], Int64[Tensor, " N"]]:
    """Decode all images and labels of a dataset.

    returns  images  uint8 (N, C, H, W)  0 to 255; C = 1 if all are grey (mode L), else 3 (RGB)
             labels  int64 (N,)          class of each image

    Raises ValueError if the dataset is empty or the images differ in size.
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
    images = torch.from_numpy(pixels.reshape(*pixels.shape[:3], -1))        # (N, H, W, C)
    labels = torch.tensor(list(dataset["label"]), dtype=torch.int64)        # (N,)
    return images.permute(0, 3, 1, 2).contiguous(), labels                  # (N, C, H, W), (N,)


def normalise(images: Tensor) -> Float32[Tensor, "..."]:
    """Map pixel values to the range that the model works in.

    images   uint8 (...)    0 to 255
    returns  float32 (...)  -1 to 1

    Raises ValueError for another dtype, such as that of images normalised before.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}, expected torch.uint8 in 0 to 255")
    return images.float() / 127.5 - 1


def denormalise(x: Tensor) -> Float32[Tensor, "..."]:
    """Map model values to the range that pictures are shown in.

    x        float (...)    -1 to 1; what lies outside is clamped
    returns  float32 (...)  0 to 1; pixel values are 255 times this
    """
    return ((x.float() + 1) / 2).clamp(0, 1)
