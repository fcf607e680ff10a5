"""Train a preset on prepared arrays, in parts that resume: for a rented GPU, or a CPU overnight.

    python recipes/train.py --config cifar10 --data ~/.cache/mar_mini/cifar10 --out build/cifar10
    python recipes/train.py ... --part-minutes 9          exit status 75: give the command again
    torchrun --nproc-per-node=8 recipes/train.py --config mar_large --latents DIR --out DIR \
        --strategy fsdp                                   many processes, see recipes/README.md

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

from mar_mini.configs import Config, for_batch_size, get_config
from mar_mini.data import normalise
from mar_mini.run.distributed import Alone, join, own_device
from mar_mini.run.images import open_images
from mar_mini.run.train import MOMENTS, recorded, train_latents, train_pipeline

GO_ON = 75  # "temporary failure": a part has ended, the run has not


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="cifar10")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", help="folder of arrays, or a bundled name")
    data.add_argument("--latents", type=Path, help="folder of latents, for the full-size presets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="budget of the MAR; the preset's by default")
    parser.add_argument("--vae-minutes", type=float, help="budget of the autoencoder")
    parser.add_argument("--steps", type=int, help="budget of either in steps instead (a rehearsal)")
    parser.add_argument("--batch-size", type=int, help="of all processes together")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--accumulate", type=int, default=1, help="micro batches a step")
    parser.add_argument("--checkpoint-activations", action="store_true", help="less memory")
    parser.add_argument("--strategy", default="ddp", help="of many processes: ddp or fsdp")
    parser.add_argument("--save-minutes", type=float, default=2.0, help="between checkpoints")
    parser.add_argument("--part-minutes", type=float, help="stop and save after so long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", help="auto, float32 or bf16; the preset's by default")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with join(arguments.strategy, own_device(arguments.device)) as processes:
        return run(arguments, processes)


def configure(arguments: argparse.Namespace) -> Config:
    """The preset with what the command line changes."""
    config = get_config(arguments.config)
    training = config.training
    if arguments.batch_size and arguments.latents:
        training = for_batch_size(training, arguments.batch_size)
    elif arguments.batch_size:  # the small presets' rates are not made for this rule
        training = replace(training, batch_size=arguments.batch_size)
    common = {"compile": arguments.compile}
    if arguments.steps:
        common |= {"max_steps": arguments.steps, "max_seconds": None}
    training = replace(training, accumulate=arguments.accumulate, **common)
    if arguments.minutes:
        training = replace(training, max_seconds=60 * arguments.minutes)
    if arguments.precision:
        training = replace(training, precision=arguments.precision)
    if arguments.learning_rate:
        training = replace(training, learning_rate=arguments.learning_rate)
    config = replace(config, training=training)
    if config.vae_training is not None:
        vae_training = replace(config.vae_training, **common)
        if arguments.vae_minutes:
            vae_training = replace(vae_training, max_seconds=60 * arguments.vae_minutes)
        config = replace(config, vae_training=vae_training)
    if arguments.checkpoint_activations and config.mar is not None:
        config = replace(config, mar=replace(config.mar, grad_checkpointing=True))
    return config


def run(arguments: argparse.Namespace, processes: Alone) -> int:
    """Train, with reports and results from the first process only."""
    config, first = configure(arguments), processes.rank == 0

    def say(text: str) -> None:
        if first:
            print(text, flush=True)

    common = {
        "seed": arguments.seed,
        "device": own_device(arguments.device),
        "processes": processes,
        "folder": arguments.out / "state",
        "save_every": 60 * arguments.save_minutes,
    }
    training = config.training
    say(
        f"batch size {training.batch_size} = {processes.count} processes x {training.accumulate} "
        f"micro batches, learning rate {training.learning_rate:.3g}"
    )
    if arguments.latents:
        from mar_mini.run.latents import LatentShards

        images = LatentShards(arguments.latents)
        steps = train_latents(config, images, **common)
        config = replace(config, vae=images.autoencoder()[1])  # that which made them
        source, moments = {"data": str(arguments.latents), "data_crc32": images.checksum}, ()
    else:
        images = open_images(arguments.data, "train")
        steps = train_pipeline(
            config, normalise(images.images), images.labels, images.classes, **common
        )
        source = {"data": arguments.data, "data_md5": images.checksum}
        moments = MOMENTS if processes.count == 1 else ()  # nobody may be kept waiting for samples
    if arguments.part_minutes:
        # a job in the background inherits that SIGINT is ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        timer = threading.Timer(60 * arguments.part_minutes, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()
    out, rows, stage = arguments.out, 0, None
    if first:
        steps = recorded(steps, out, moments)
    try:
        while True:
            progress = next(steps)
            step = progress.step
            if progress.stage != stage:
                stage, rows = progress.stage, -1
                say(f"training the {stage} from step {step.step}")
            if int(50 * step.progress) > rows:
                rows = int(50 * step.progress)
                terms = ", ".join(f"{name} {value:.4f}" for name, value in step.terms.items())
                rate = f"{step.images_seen / step.seconds:.0f} images/s"
                share, seconds = f"{step.progress:4.0%}", f"{step.seconds:.0f} s"
                say(f"{share}, step {step.step}, {seconds}, {rate}, {terms}")
    except StopIteration as end:
        pipeline = end.value
    except KeyboardInterrupt as interruption:  # between two stages nobody says why
        say(str(interruption) or "stopped; the same command goes on")
        return GO_ON if arguments.part_minutes else 130
    if first:
        pipeline.card.update(
            **source, command=" ".join(["python", "recipes/train.py", *sys.argv[1:]])
        )
        pipeline.save(out, config)
    say(f"saved in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
