"""Fréchet distance to statistics in a file, as published ones are: mean and covariance of features.

A published distance is of Inception's features (2,048 numbers an image). Its weights are not among
what this package installs, and it was never run here; the features here are those of `features`,
and distances of different features must not be compared.
"""

import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mar_mini.evaluation import frechet_from_moments
from mar_mini.files import write_atomically
from mar_mini.run.pictures import Pictures, crops

ENOUGH = 10_000
INCEPTION = 2048


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features of a set of images.

    mean, cov   float64 (D,), (D, D)
    features    name of the network, count and image_size of the images; None where a file does not
                say
    """

    mean: Tensor
    cov: Tensor
    features: str | None = None
    count: int | None = None
    image_size: int | None = None

    @classmethod
    def of(cls, features: Float[Tensor, "N D"], name: str, image_size: int) -> "Statistics":
        """Raises ValueError for fewer than two images."""
        if len(features) < 2:
            raise ValueError(f"{len(features)} images; expected two at least")
        x = features.double()
        return cls(x.mean(0), torch.cov(x.T), name, len(x), image_size)

    def save(self, path: Path) -> None:
        """As .npz with `mu` and `sigma`, the names of published files, and what they lack."""
        known = {"features": self.features, "count": self.count, "image_size": self.image_size}
        known = {key: value for key, value in known.items() if value is not None}

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, mu=self.mean.numpy(), sigma=self.cov.numpy(), **known)

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Raises ValueError if the file is missing or damaged, or has no `mu` and `sigma`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, cov = (
                    torch.from_numpy(file[key].astype(np.float64)) for key in ("mu", "sigma")
                )
                known = {
                    key: file[key].item()
                    for key in ("features", "count", "image_size")
                    if key in file
                }
        except (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            zipfile.BadZipFile,
            AttributeError,
            TypeError,
        ) as error:
            raise ValueError(
                f"{path} is missing, damaged or no .npz with `mu` and `sigma` ({error})"
            ) from error
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{path}: mu is {tuple(mean.shape)} and sigma {tuple(cov.shape)}; expected (D,) "
                "and (D, D)"
            )
        return cls(mean, cov, **known)


def check_comparable(
    theirs: Statistics, numbers: int, features: str | None, image_size: int | None
) -> None:
    """Raises ValueError where a distance to these statistics would mean nothing.

    numbers, features, image_size  of our images: numbers an image, name of the network, pixels
    """
    other = len(theirs.mean)
    if other != numbers or theirs.features not in (None, features):
        whose = theirs.features or ("Inception" if other == INCEPTION else "an unknown network")
        raise ValueError(
            f"the statistics are of {other} numbers an image ({whose}), these images' features of "
            f"{numbers} ({features}); for published statistics write the images with `mar-mini "
            "generate --png` and run the evaluator that they belong to, or make statistics of real "
            "images here: mar-mini evaluate --images SOURCE --size SIDE --write-statistics FILE"
        )
    if theirs.image_size not in (None, image_size):
        raise ValueError(
            f"the statistics are of images of {theirs.image_size} pixels, these have {image_size}; "
            "make them of the same size"
        )


def distance(ours: Statistics, theirs: Statistics) -> float:
    """Fréchet distance of two sets of images (Heusel et al. 2017). Raises as `check_comparable`."""
    check_comparable(theirs, len(ours.mean), ours.features, ours.image_size)
    return frechet_from_moments(ours.mean, ours.cov, theirs.mean, theirs.cov)


def doubts(ours: Statistics, theirs: Statistics | None = None) -> list[str]:
    """What makes a distance of these worth less than it seems, a sentence each."""
    found = []
    for whose, count in (("these", ours.count), ("the statistics", theirs and theirs.count)):
        if count is not None and count < ENOUGH:
            found.append(
                f"{whose} are {count:,} images: a distance falls with their number; compare only "
                f"figures of as many, at least {ENOUGH:,} (published: 50,000)"
            )
    if theirs is not None and theirs.image_size is None:
        found.append(
            "the file does not say how its images were brought to their size: another crop or "
            "filter moves the distance by more than a better model does"
        )
    return found


def picture_side(pictures: Pictures) -> int:
    """The side of the first picture. Raises ValueError if it is not square."""
    width, height = pictures.picture(0).size
    if width != height:
        raise ValueError(
            f"{pictures.name(0)} is {width}x{height} pixels; say to which side pictures are to be "
            "brought: --size"
        )
    return width


def features_in(
    pictures: Pictures,
    network: nn.Module,
    size: int | None = None,
    *,
    batch_size: int = 100,
    workers: int = 0,
) -> Iterator[Float[Tensor, "B D"]]:
    """Features of all pictures on the CPU, a batch at a time.

    size  side that they are cropped to (`pictures.center_crop`); None: they must be of one size

    Raises ValueError that names pictures which cannot be read or are of another size.
    """
    device = next(network.parameters()).device
    side = size or picture_side(pictures)
    read = partial(crops, pictures, range(len(pictures)), side, batch_size, workers)
    for images, errors in read(exact=size is None):
        wrong = [error for error in errors if error]
        if wrong:
            raise ValueError(f"{', '.join(wrong[:5])}; mend or remove these pictures")
        with torch.no_grad():
            features = network(images.to(device).float() / 255).cpu()
        yield features


# The command -------------------------------------------------------------------------------------


def evaluate(
    model: str | None = None,
    *,
    samples: int = 1000,
    reference: Path | None = None,
    seed: int = 0,
    fast: bool = False,
    images: str | None = None,
    statistics: Path | None = None,
    write_statistics: Path | None = None,
    size: int | None = None,
    split: str = "train",
    workers: int = 0,
) -> int:
    """Judge a model's samples against real images, or a set of images against statistics.

    With a model each figure stands beside its floor. With --images it is the Fréchet distance of
    images in a folder (`generate` makes them) to the statistics in a file.

    Args:
        model: bundled model, or a folder that `train` wrote.
        samples: how many; figures of different numbers cannot be compared.
        reference: what they are compared with; the bundled one of CIFAR-10 by default.
        seed: decides everything that is random.
        fast: judge the approximate sampler.
        images: judge these instead of a model's samples: a folder with parquet files or pictures.
        statistics: .npz with mu and sigma of the features of real images.
        write_statistics: write those of --images to this .npz, for later comparisons.
        size: side in pixels that the images are cropped to; else they must all be of one size.
        split: which parquet files, where there are several kinds: train or validation.
        workers: processes that read pictures.
    """
    import torch
    from tqdm import tqdm

    from mar_mini import load_pretrained
    from mar_mini.data import data_dir

    if images is not None:
        return judge_images(images, statistics, write_statistics, size, split, workers)
    if model is None:
        raise ValueError("nothing to judge; give a model, or --images FOLDER --statistics FILE")
    from mar_mini.evaluation import Reference, judge
    from mar_mini.fast import FAST
    from mar_mini.judge.features import features_of, load_features

    pipeline, network = load_pretrained(model), load_features()
    known = Reference.load(reference or data_dir() / "reference" / "cifar10.safetensors")
    asked = torch.arange(samples) % len(pipeline.classes)
    features, start = [], time.perf_counter()
    for i, part in enumerate(tqdm(asked.split(100), desc="sampling", unit="00 images")):
        generator = torch.Generator().manual_seed(1_000_003 * seed + i)
        images = pipeline.generate(part, generator=generator, **(FAST if fast else {}))
        features.append(features_of(network, images.expand(-1, 3, -1, -1)))
    seconds = time.perf_counter() - start
    print(
        f"{samples} samples in {seconds:.0f} s; {known.features_name}; against "
        f"{known.train_count:,} training images"
    )
    print(f"{'':12} {'samples':>10} {'floor':>10}   (as many real test images)")
    for name, (value, floor) in judge(torch.cat(features), asked, known, seed).items():
        print(f"{name:12} {value:10.3f} {floor:10.3f}")
    return 0


def judge_images(images, statistics, write_statistics, size, split, workers) -> int:
    """`evaluate --images`."""
    import torch
    from tqdm import tqdm

    from mar_mini.judge import statistics as of
    from mar_mini.judge.features import NUM_FEATURES, load_features
    from mar_mini.run.generate import check_complete
    from mar_mini.run.parts import place
    from mar_mini.run.pictures import open_pictures

    if statistics is None and write_statistics is None:
        raise ValueError("give --statistics FILE to compare with, or --write-statistics FILE")
    known = None if statistics is None else of.Statistics.load(statistics)
    pictures, network, features = open_pictures(images, split), load_features().to(place()), []
    check_complete(Path(images), len(pictures))
    side = size or of.picture_side(pictures)
    if known is not None:
        of.check_comparable(known, NUM_FEATURES, network.name, side)
    with tqdm(total=len(pictures), desc="features", unit="image") as bar:
        for batch in of.features_in(pictures, network, size, workers=workers):
            features.append(batch)
            bar.update(len(batch))
    ours = of.Statistics.of(torch.cat(features), network.name, side)
    if write_statistics is not None:
        ours.save(write_statistics)
        print(f"wrote {write_statistics}: {ours.count:,} images of {ours.image_size} pixels")
    if known is not None:
        value = of.distance(ours, known)
        number = f"{known.count:,}" if known.count else "an unknown number of"
        print(
            f"Fréchet distance {value:.3f} ({ours.features}; {ours.count:,} images; statistics "
            f"of {number} images)"
        )
    for doubt in of.doubts(ours, known):
        print(f"  careful: {doubt}")
    return 0
