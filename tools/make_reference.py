"""Make data/reference/cifar10.safetensors: what samples of CIFAR-10 are compared with.

    mar-mini data cifar10 && python tools/make_reference.py
    python tools/make_reference.py imagenette64 --out build/imagenette64.safetensors

Mean and covariance of the features of all training images, and the features themselves of 10,000
of them at most and of the test images, as float16. About two minutes on two cores for CIFAR-10.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from mar_mini.data import denormalise, normalise
from mar_mini.judge.features import features_of, load_features
from mar_mini.judge.statistics import Reference
from mar_mini.run.images import open_images

OUT = Path(__file__).resolve().parents[1] / "data" / "reference" / "cifar10.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="cifar10", help="as `mar-mini train --data`")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    network, features, labels = load_features(), {}, {}
    for split in ("train", "test"):
        opened = open_images(arguments.data, split)
        images, labels[split] = opened.images, opened.labels
        features[split] = torch.cat(
            [
                features_of(network, denormalise(normalise(part)))
                for part in tqdm(images.split(1000), desc=split)
            ]
        )
    train = features["train"]
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:10_000]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    Reference.of(
        train,
        network.name,
        train=train[some],
        test=features["test"],
        train_labels=labels["train"][some],
        test_labels=labels["test"],
    ).save(arguments.out)


if __name__ == "__main__":
    main()
