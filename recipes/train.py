"""Train a preset on prepared arrays, in parts that resume: for a rented GPU, or a CPU overnight.

    python recipes/train.py --config cifar10 --data ~/.cache/mar_mini/cifar10 --out build/cifar10
    python recipes/train.py ... --part-minutes 9          exit status 75: give the command again

The arrays are what `mar-mini data cifar10` writes. Needs torch, numpy, einops, jaxtyping,
safetensors, huggingface_hub, tqdm and pillow, and no network. In OUT come: config.json,
mar.safetensors, vae.safetensors (bfloat16, averaged weights), history_*.json, and, for some moments
of the run, moments/ with averaged and raw weights and grids/ with their samples from fixed seeds.
Its state is in OUT/state.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare machine has no installation

from mar_mini.checkpoints import save_weights
from mar_mini.configs import get_config
from mar_mini.data import normalise
from mar_mini.recipes import MASKED, train_pipeline
from mar_mini.runs import History, Interrupted
from mar_mini.sources import open_images

MOMENTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
GO_ON = 75  # "temporary failure": a part has ended, the run has not


def save_grid(images: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Images (N, C, H, W) in [0, 1] as one PNG, a row after the other."""
    rows = images.expand(-1, 3, -1, -1).unflatten(0, (-1, columns))         # (R, K, 3, H, W)
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)         # (R * H, K * W, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet * 255).round().byte().cpu().numpy().astype(np.uint8)).save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="cifar10")
    parser.add_argument("--data", required=True, help="folder of arrays, or a bundled name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="budget of the MAR; the preset's by default")
    parser.add_argument("--vae-minutes", type=float, help="budget of the autoencoder")
    parser.add_argument("--steps", type=int, help="budget of either in steps instead (a rehearsal)")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--part-minutes", type=float, help="stop and save after so long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    config = get_config(arguments.config)
    common = {"compile": arguments.compile}
    if arguments.steps:
        common |= {"max_steps": arguments.steps, "max_seconds": None}
    training = replace(config.training, **common)
    if arguments.minutes:
        training = replace(training, max_seconds=60 * arguments.minutes)
    if arguments.batch_size:
        training = replace(training, batch_size=arguments.batch_size)
    if arguments.learning_rate:
        training = replace(training, learning_rate=arguments.learning_rate)
    config = replace(config, training=training)
    if config.vae_training is not None:
        vae_training = replace(config.vae_training, **common)
        if arguments.vae_minutes:
            vae_training = replace(vae_training, max_seconds=60 * arguments.vae_minutes)
        config = replace(config, vae_training=vae_training)

    images = open_images(arguments.data, "train")
    if arguments.part_minutes:
        timer = threading.Timer(60 * arguments.part_minutes, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()
    out, history, stage = arguments.out, None, None
    out.mkdir(parents=True, exist_ok=True)
    run = train_pipeline(
        config, normalise(images.images), images.labels, images.classes, seed=arguments.seed,
        device=arguments.device, folder=out / "state",
    )  # fmt: skip
    try:
        while True:
            stage_now, step, pipeline_of = next(run)
            if stage_now != stage:
                stage = stage_now
                history = History(out / f"history_{stage.split()[0]}.json")
                print(f"training the {stage} from step {step.step}", flush=True)
            before = history.rows[-1]["progress"] if history.rows else 0.0
            if history.add(step):
                history.save()
                row = history.rows[-1]
                print(json.dumps({k: round(v, 5) for k, v in row.items()}), flush=True)
                if stage == MASKED and any(before < m <= step.progress for m in MOMENTS):
                    moment(step, pipeline_of, len(images.classes), out)
    except StopIteration as end:
        pipeline = end.value
    except Interrupted as interruption:
        print(interruption, flush=True)
        return GO_ON if arguments.part_minutes else 130
    pipeline.card.update(
        data=str(config.data), data_md5=images.checksum, device=device_name(arguments.device),
        command=" ".join(["python", "recipes/train.py", *sys.argv[1:]]), commit=commit(),
    )  # fmt: skip
    pipeline.save(out, config)
    print(f"saved in {out}", flush=True)
    return 0


def moment(step, pipeline_of, num_classes: int, out: Path) -> None:
    """Averaged and raw weights, and samples of both from the same seeds."""
    labels = torch.arange(64) % num_classes
    for name, model in (("average", step.ema), ("raw", step.model)):
        images = pipeline_of(model).generate(labels, generator=torch.Generator().manual_seed(0))
        save_grid(images, out / "grids" / f"{name}-{step.step:07d}.png")
        weights = out / "moments" / f"{name}-{step.step:07d}.safetensors"
        weights.parent.mkdir(exist_ok=True)
        save_weights(model, weights, torch.bfloat16)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                          cwd=Path(__file__).parent)  # fmt: skip
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
