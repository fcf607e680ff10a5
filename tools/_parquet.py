"""Shared by the scripts that make the bundled images: a balanced choice, a parquet writer."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


def choose(labels: np.ndarray, counts: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Choose disjoint, balanced, shuffled sets of images.

    labels  int (N,)  class of each image
    counts  images per class in each set

    Returns one int64 index array per count, `count` times the number of classes long. The images
    are shuffled, each set takes the next `count` of every class, and is shuffled in itself.
    Raises ValueError if a class has too few images.
    """
    # RandomState, unlike default_rng, promises the same stream in every numpy version.
    rng = np.random.RandomState(seed)
    order = rng.permutation(len(labels))
    shuffled = labels[order]
    rank = np.empty(len(labels), dtype=np.int64)  # how many of the same class came before
    for label in np.unique(labels):
        members = np.flatnonzero(shuffled == label)
        if len(members) < sum(counts):
            raise ValueError(
                f"class {label} has {len(members)} images, {sum(counts)} are wanted; choose fewer"
            )
        rank[members] = np.arange(len(members))
    edges = np.cumsum([0, *counts])
    sets = [order[(rank >= edges[i]) & (rank < edges[i + 1])] for i in range(len(counts))]
    # Taken in order, a class whose turn comes early would crowd the front of the next set.
    return [rng.permutation(chosen) for chosen in sets]


def png(image: np.ndarray) -> bytes:
    """Encode one image as a lossless PNG.

    image  uint8 (C, H, W)  C = 1 grey (mode L), C = 3 colour (mode RGB)
    """
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_split(path: Path, images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> str:
    """Write one parquet file of images and labels, and return its sha256.

    images  uint8 (N, C, H, W)  C = 1 or 3
    labels  int (N,)            indices into `names`
    """
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    columns = {
        "image": [{"bytes": png(image), "path": None} for image in images],
        "label": [int(label) for label in labels],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Page checksums let the reader notice a damaged byte in the middle of the file.
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.to_parquet(path, write_page_checksum=True)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_splits(
    folder: Path, splits: Mapping[str, tuple[np.ndarray, np.ndarray]], names: Sequence[str]
) -> None:
    """Write `{split}.parquet` for each split into `folder` and print the sha256 of each file.

    splits  name of the split -> (images uint8 (N, C, H, W), labels int (N,))
    """
    for split, (images, labels) in splits.items():
        path = folder / f"{split}.parquet"
        digest = write_split(path, images, labels, names)
        print(f"{digest}  {path}  {len(images)} images, {path.stat().st_size} bytes")
