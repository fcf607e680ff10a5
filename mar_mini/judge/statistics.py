"""What samples are compared with, and how far they are from it: `mar-mini evaluate`.

A published distance is of Inception's features (2,048 numbers an image). Its weights are not among
what this package installs, and it was never run here; the features here are those of `features`,
and distances of different features must not be compared.
"""

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mar_mini import evaluation, load_pretrained
from mar_mini.data import data_dir
from mar_mini.fast import FAST
from mar_mini.files import write_atomically
from mar_mini.judge.features import NUM_FEATURES, features_of, load_features
from mar_mini.run.distributed import own_device
from mar_mini.run.generate import check_complete
from mar_mini.run.images import Pictures, check_readable, crops, open_pictures

ENOUGH, INCEPTION = 10_000, 2048
STORED = {torch.float32: torch.float16, torch.int64: torch.uint8}
READ = {stored: dtype for dtype, stored in STORED.items()}


@dataclass(frozen=True)
class Reference:
    """Mean and covariance of features of real images, and maybe some of the features themselves.

    mean, cov                  float64 (D,), (D, D) of all images
    features                   name of the network that made them; None where a file does not say
    count, image_size          of the images; None where a file does not say
    train, test                float32 (N, D) features of some training images, and of test images
    train_labels, test_labels  int64 (N,) their classes
    """

    mean: Float[Tensor, " D"]
    cov: Float[Tensor, "D D"]
    features: str | None = None
    count: int | None = None
    image_size: int | None = None
    train: Float[Tensor, "N D"] | None = None
    test: Float[Tensor, "M D"] | None = None
    train_labels: Int[Tensor, " N"] | None = None
    test_labels: Int[Tensor, " M"] | None = None

    @classmethod
    def of(
        cls, rows: Float[Tensor, "N D"], name: str, image_size: int | None = None, **some
    ) -> "Reference":
        """From the features of all images; `some` of them go with it."""
        if len(rows) < 2:
            raise ValueError(f"{len(rows)} images; expected two at least")
        return cls(*evaluation.moments(rows), name, len(rows), image_size, **some)

    def distance(self, other: "Float[Tensor, 'N D'] | Reference") -> float:
        """Fréchet distance of others to these. Raises ValueError as `check_comparable`."""
        if isinstance(other, Tensor):
            other = Reference.of(other, self.features, self.image_size)
        self.check_comparable(len(other.mean), other.features, other.image_size)
        return evaluation.frechet_from_moments(other.mean, other.cov, self.mean, self.cov)

    def check_comparable(self, numbers: int, features: str | None, image_size: int | None) -> None:
        """Raises ValueError where a distance of others, with so many numbers, means nothing."""
        mine = len(self.mean)
        if mine != numbers or self.features not in (None, features):
            whose = self.features or ("Inception" if mine == INCEPTION else "an unknown network")
            raise ValueError(
                f"the statistics are of {mine} numbers an image ({whose}), these images' features "
                f"of {numbers} ({features}); for published ones run the evaluator that they belong "
                "to on what `mar-mini generate --png` writes, or make statistics of real images: "
                "mar-mini evaluate --images SOURCE --size SIDE --write-statistics FILE"
            )
        if self.image_size not in (None, image_size):
            raise ValueError(
                f"the statistics are of images of {self.image_size} pixels, these have "
                f"{image_size}; make them of the same size"
            )

    def save(self, path: Path) -> None:
        """Write mean and covariance as .npz, the way published ones are, or all as .safetensors."""
        known = {"features": self.features, "count": self.count, "image_size": self.image_size}
        known = {key: value for key, value in known.items() if value is not None}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".safetensors":
            np.savez(data := io.BytesIO(), mu=self.mean.numpy(), sigma=self.cov.numpy(), **known)
            return write_atomically(path, lambda temporary: temporary.write_bytes(data.getbuffer()))
        names = ("mean", "cov", "train", "test", "train_labels", "test_labels")
        tensors = {name: x for name in names if (x := getattr(self, name)) is not None}
        tensors = {name: x.to(STORED.get(x.dtype, x.dtype)) for name, x in tensors.items()}
        card = {"features": self.features, "train_count": str(self.count)}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, card))

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Raises ValueError if the file is missing or damaged, or holds something else."""
        try:
            if path.suffix != ".safetensors":
                with np.load(path) as file:
                    x = {key: file[key] for key in file}
                known = {k: x[k].item() for k in ("features", "count", "image_size") if k in x}
                mu, sigma = (torch.from_numpy(x[key].astype(np.float64)) for key in ("mu", "sigma"))
                if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
                    shapes = f"mu is {tuple(mu.shape)} and sigma {tuple(sigma.shape)}"
                    raise ValueError(f"{shapes}; expected (D,) and (D, D)")
                return cls(mu, sigma, **known)
            with safe_open(path, framework="pt") as file:
                x = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                card = file.metadata()
            x = {name: y.to(READ.get(y.dtype, y.dtype)) for name, y in x.items()}
            return cls(features=card["features"], count=int(card["train_count"]), **x)
        except Exception as error:  # whatever a damaged or foreign file does to those who read it
            raise ValueError(
                f"{path} is missing or damaged ({error}); expected .npz with `mu` and `sigma`, or "
                ".safetensors as the bundled one"
            ) from error


def doubts(ours: Reference, theirs: Reference | None = None) -> list[str]:
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


def judge(
    features: Float[Tensor, "N D"], asked: Int[Tensor, " N"], reference: Reference, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Each figure of some samples, and beside it its floor: that of as many real test images.

    features  (N, D) of the samples, by the network of the reference
    asked     (N,) the classes that were asked for
    returns   name -> (of the samples, floor); "distance", "KID" lower is better, "precision"
              and "recall" higher; "class found" is the share in which a linear discriminant finds
              the class, "nearest" the median distance to the nearest training image

    Raises ValueError for more samples than the reference has test images.
    """
    n = len(features)
    if n > len(reference.test):
        raise ValueError(
            f"{n} samples, but the reference has {len(reference.test)} test images to give the "
            "floor; judge fewer samples"
        )
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(reference.test), generator=generator)[:n]
    train = reference.train[torch.randperm(len(reference.train), generator=generator)[:n]]
    classify = evaluation.linear_discriminant(reference.train, reference.train_labels)

    def figures(x: Tensor, labels: Tensor) -> list[float]:
        kid = evaluation.kernel_distance(x, train, generator=torch.Generator().manual_seed(seed))[0]
        found = float((classify(x) == labels).double().mean())
        near = float(evaluation.nearest(x, reference.train)[0].median())
        return [reference.distance(x), kid, *evaluation.precision_recall(x, train), found, near]

    names = ("distance", "KID", "precision", "recall", "class found", "nearest")
    floor = figures(reference.test[picked], reference.test_labels[picked])
    return dict(zip(names, zip(figures(features, asked), floor, strict=True), strict=True))


def picture_side(pictures: Pictures) -> int:
    """The side of the first picture. Raises ValueError if it is not square."""
    width, height = pictures.picture(0).size
    if width != height:
        raise ValueError(
            f"{pictures.names[0]} is {width}x{height} pixels; say to which side pictures are to be "
            "brought: --size"
        )
    return width


def features_in(
    pictures: Pictures, network: nn.Module, size: int | None = None, **reading: int
) -> Iterator[Float[Tensor, "B D"]]:
    """Features of all pictures on the CPU, a batch at a time.

    size       side that they are cropped to (`images.center_crop`); None: they must be of one size
    **reading  batch_size and workers of `images.crops`

    Raises ValueError that names pictures which cannot be read or are of another size.
    """
    side, indices = size or picture_side(pictures), range(len(pictures))
    for images, errors in crops(pictures, indices, side, exact=size is None, **reading):
        check_readable(errors)
        yield features_of(network, images.float() / 255)


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
    from tqdm import tqdm

    if images is not None:
        return judge_images(images, statistics, write_statistics, size, split, workers)
    if model is None:
        raise ValueError("nothing to judge; give a model, or --images FOLDER --statistics FILE")
    pipeline, network = load_pretrained(model), load_features()
    known = Reference.load(reference or data_dir() / "reference" / "cifar10.safetensors")
    asked = torch.arange(samples) % len(pipeline.classes)
    features, start = [], time.perf_counter()
    for i, part in enumerate(tqdm(asked.split(100), desc="sampling", unit="00 images")):
        generator = torch.Generator().manual_seed(1_000_003 * seed + i)
        made = pipeline.generate(part, generator=generator, **(FAST if fast else {}))
        features.append(features_of(network, made.expand(-1, 3, -1, -1)))
    seconds = time.perf_counter() - start
    print(
        f"{samples} samples in {seconds:.0f} s; {known.features}; against {known.count:,} "
        "training images"
    )
    print(f"{'':12} {'samples':>10} {'floor':>10}   (as many real test images)")
    for name, (value, floor) in judge(torch.cat(features), asked, known, seed).items():
        print(f"{name:12} {value:10.3f} {floor:10.3f}")
    return 0


def judge_images(images, statistics, write_statistics, size, split, workers) -> int:
    """`evaluate --images`."""
    from tqdm import tqdm

    if statistics is None and write_statistics is None:
        raise ValueError("give --statistics FILE to compare with, or --write-statistics FILE")
    known = None if statistics is None else Reference.load(statistics)
    pictures, network, features = (
        open_pictures(images, split),
        load_features().to(own_device()),
        [],
    )
    check_complete(Path(images), len(pictures))
    side = size or picture_side(pictures)
    if known is not None:
        known.check_comparable(NUM_FEATURES, network.name, side)
    with tqdm(total=len(pictures), desc="features", unit="image") as bar:
        for batch in features_in(pictures, network, size, workers=workers):
            features.append(batch)
            bar.update(len(batch))
    ours = Reference.of(torch.cat(features), network.name, side)
    if write_statistics is not None:
        ours.save(write_statistics)
        print(f"wrote {write_statistics}: {ours.count:,} images of {ours.image_size} pixels")
    if known is not None:
        number = f"{known.count:,}" if known.count else "an unknown number of"
        print(
            f"Fréchet distance {known.distance(ours):.3f} ({ours.features}; {ours.count:,} images; "
            f"statistics of {number} images)"
        )
    for doubt in doubts(ours, known):
        print(f"  careful: {doubt}")
    return 0
