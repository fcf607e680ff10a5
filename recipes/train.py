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
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare machine has no installation

from mar_mini.configs import get_config
from mar_mini.data import normalise
from mar_mini.recipes import recorded, train_pipeline
from mar_mini.sources import open_images

GO_ON = 75  # "temporary failure": a part has ended, the run has not


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
    out, rows, stage = arguments.out, 0, None
    run = recorded(train_pipeline(
        config, normalise(images.images), images.labels, images.classes, seed=arguments.seed,
        device=arguments.device, folder=out / "state",
    ), out)  # fmt: skip
    try:
        while True:
            progress = next(run)
            step = progress.step
            if progress.stage != stage:
                stage, rows = progress.stage, -1
                print(f"training the {stage} from step {step.step}", flush=True)
            if int(50 * step.progress) > rows:
                rows = int(50 * step.progress)
                terms = ", ".join(f"{name} {value:.4f}" for name, value in step.terms.items())
                rate = f"{step.images_seen / step.seconds:.0f} images/s"
                share, seconds = f"{step.progress:4.0%}", f"{step.seconds:.0f} s"
                print(f"{share}, step {step.step}, {seconds}, {rate}, {terms}", flush=True)
    except StopIteration as end:
        pipeline = end.value
    except KeyboardInterrupt as interruption:  # between two stages nobody says why
        print(str(interruption) or "stopped; the same command goes on", flush=True)
        return GO_ON if arguments.part_minutes else 130
    pipeline.card.update(
        data=arguments.data, data_md5=images.checksum,
        command=" ".join(["python", "recipes/train.py", *sys.argv[1:]]),
    )  # fmt: skip
    pipeline.save(out, config)
    print(f"saved in {out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
