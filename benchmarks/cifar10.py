"""How good the bundled CIFAR-10 model is, at its default and with each option of `sample` changed.

    mar-mini data cifar10 && python benchmarks/cifar10.py        about half an hour on two cores
    python benchmarks/cifar10.py build/cifar10 --out build       another model, results elsewhere
    python benchmarks/cifar10.py --draw                          tables of README.md, from the JSON

The default setting is judged with 5,000 samples by all measures, each option with 1,000 by the
Fréchet distance. Beside them stand a floor (real test images), a ceiling (test images through the
autoencoder) and two references below: a normal distribution of pixels for each class, and real
images with noise of standard deviation 16 (of 255).
"""

import argparse
import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mar_mini import load_pretrained
from mar_mini.data import data_dir
from mar_mini.evaluation import bootstrap, psnr
from mar_mini.fast import FAST, Reuse, dpm_solver
from mar_mini.files import write_atomically
from mar_mini.judge.features import features_of, load_features
from mar_mini.judge.statistics import Reference, judge
from mar_mini.run.images import open_images

HERE = Path(__file__).resolve().parent
OPTIONS = {
    "no guidance": {"cfg": 1.0},
    "guidance 3": {"cfg": 3.0},
    "guidance 7": {"cfg": 7.0},
    "guidance 4.5, linear": {"cfg_schedule": "linear"},
    "temperature 0.9": {"temperature": 0.9},
    "temperature 1": {"temperature": 1.0},
    "4 iterations": {"num_iter": 4},
    "8 iterations": {"num_iter": 8},
    "10 diffusion steps": {"num_sampling_steps": 10},
    "25 diffusion steps": {"num_sampling_steps": 25},
    "100 diffusion steps": {"num_sampling_steps": 100},
    "raster order": {"order": "raster"},
    "spiral order": {"order": "spiral"},
    "checkerboard order": {"order": "checkerboard"},
    "50 to 5 diffusion steps": {"num_sampling_steps": (50, 5)},
    "ddim, 25 steps": {"solver": "ddim", "num_sampling_steps": 25},
    "dpm_solver, 10 steps": {"solver": dpm_solver, "num_sampling_steps": 10},
    "guidance from 1/4 known": {"guidance_interval": (0.25, 1.0)},
    "guidance up to 1/4 known": {"guidance_interval": (0.0, 0.25)},
    "features each 4th iteration": {"conditions": Reuse(refresh_features=4)},
    "guidance each 4th iteration": {"conditions": Reuse(refresh_guidance=4)},
    "fast": FAST,
    "chapter 8's choice": {
        "solver": dpm_solver,
        "num_sampling_steps": 10,
        "num_iter": 8,
        "cfg": 3.0,
        "temperature": 1.0,
    },
}


def samples(pipeline, count: int, seed: int, **settings) -> tuple[torch.Tensor, float]:
    """Images (count, 3, H, W) in [0, 1], classes in turn, and the processor's seconds for them."""
    asked, parts, start = torch.arange(count) % len(pipeline.classes), [], time.process_time()
    for i, part in enumerate(asked.split(250)):
        generator = torch.Generator().manual_seed(1_000_003 * seed + i)
        parts.append(pipeline.generate(part, generator=generator, **settings))
    return torch.cat(parts), time.process_time() - start


def class_gaussian(images: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Images drawn from one normal distribution of all pixels for each class."""
    generator, drawn = torch.Generator().manual_seed(0), []
    for label in range(int(labels.max()) + 1):
        x = images[labels == label].flatten(1).double()  # (N, 3072)
        cov = torch.cov(x.T) + 1e-6 * torch.eye(x.shape[1])  # (3072, 3072)
        noise = torch.randn(count // 10, len(cov), generator=generator, dtype=torch.float64)
        drawn.append(x.mean(0) + noise @ torch.linalg.cholesky(cov).T)
    return torch.cat(drawn).view(-1, *images.shape[1:]).clamp(0, 1).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="cifar10")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--samples", type=int, default=1000, help="of each option")
    parser.add_argument("--default-samples", type=int, default=5000)
    parser.add_argument("--draw", action="store_true", help="the tables only, from the JSON")
    arguments = parser.parse_args()
    path = arguments.out / "cifar10.json"
    if arguments.draw:
        draw(json.loads(path.read_text()))
        return
    pipeline, network = load_pretrained(arguments.model), load_features()
    reference = Reference.load(data_dir() / "reference" / "cifar10.safetensors")
    train, test = (open_images("cifar10", split) for split in ("train", "test"))
    real = test.images[: arguments.samples].float() / 255
    count = arguments.samples

    def distance(images: torch.Tensor) -> float:
        return reference.distance(features_of(network, images))

    result = {
        "model": str(arguments.model),
        "steps": pipeline.card.get("steps"),
        "samples": count,
        "defaults": asdict(pipeline.defaults),
        "features": reference.features_name,
        "train_count": reference.train_count,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "rows": {},
    }
    rows = result["rows"]

    def note(name: str, value: float, seconds: float | None = None) -> None:
        rows[name] = {"distance": value, "seconds": seconds}
        write_atomically(path, lambda p: p.write_text(json.dumps(result, indent=1) + "\n"))

    arguments.out.mkdir(parents=True, exist_ok=True)
    if path.exists():  # go on with what was begun with the same model and settings
        before = json.loads(path.read_text())
        if all(before.get(key) == result[key] for key in ("model", "steps", "defaults", "samples")):
            result |= before
            rows = result["rows"]
    note("real test images", distance(real))
    if pipeline.vae is not None:
        again = torch.cat([pipeline.decode(pipeline.encode(x)) for x in real.split(250)])
        result["psnr"] = float(psnr(again, real).mean())
        note("test images through the autoencoder", distance(again))
    if "a normal distribution for each class" not in rows:
        gaussian = class_gaussian(train.images.float() / 255, train.labels, count)
        note("a normal distribution for each class", distance(gaussian))
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    note("real, noise of 16", distance((real + 16 / 255 * noise).clamp(0, 1)))
    images, seconds = samples(pipeline, arguments.default_samples, seed=2)
    features = features_of(network, images)
    asked = torch.arange(len(images)) % len(pipeline.classes)
    result["default"] = judge(features, asked, reference)
    low, high = bootstrap(
        lambda i: reference.distance(features[i]),
        len(features),
        rounds=50,
        generator=torch.Generator().manual_seed(0),
    )
    result["default_samples"], result["default_width"] = len(images), high - low
    if arguments.out == HERE / "results":
        eight_bit = (images[:1000] * 255).round().byte().numpy()
        target = data_dir() / "reference" / "cifar10_samples.npz"
        with open(target, "wb") as file:
            np.savez_compressed(file, images=eight_bit, labels=asked[:1000].numpy())
    note("default", distance(images[:count]), seconds * count / len(images))
    for name, settings in tqdm(OPTIONS.items(), unit="setting"):
        if name not in rows and settings.get("num_iter", 1) <= pipeline.mar.seq_len:
            images, seconds = samples(pipeline, count, seed=1, **settings)
            note(name, distance(images), seconds)
    draw(result)


def draw(result: dict) -> None:
    """Print both tables; they go into README.md if it has a place for them."""
    lines = [
        f"{result['default_samples']:,} samples at the default setting ({settings_of(result)}), "
        f"{result['features']}, against {result['train_count']:,} training images:",
        "",
        "| measure | samples | floor: as many real test images |",
        "|---|---|---|",
        *(
            f"| {name} | {value:.3g} | {floor:.3g} |"
            for name, (value, floor) in result["default"].items()
        ),
        "",
        f"The interval of the distance is {result['default_width']:.1f} wide (95%, bootstrap). "
        f"The autoencoder reaches {result.get('psnr', float('nan')):.1f} dB on test images.",
        "",
        f"{result['samples']:,} samples each:",
        "",
        "| setting | distance | processor seconds |",
        "|---|---|---|",
        *(
            f"| {name} | {row['distance']:.1f} | "
            f"{'' if row['seconds'] is None else format(row['seconds'], '.0f')} |"
            for name, row in result["rows"].items()
        ),
    ]
    print("\n".join(lines))
    path = HERE / "README.md"
    before, mark, rest = path.read_text().partition("<!-- cifar10 -->\n")
    if mark:
        after = rest.partition("<!-- end of cifar10 -->")[2]
        table = "\n".join(lines)
        path.write_text(f"{before}{mark}{table}\n<!-- end of cifar10 -->{after}")


def settings_of(result: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in result["defaults"].items())


def commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    )
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
