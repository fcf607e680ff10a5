"""What the choices are worth: small models trained with one thing changed, three seeds each.

    python benchmarks/ablations.py                  all of it: about 40 minutes
    python benchmarks/ablations.py --minutes-scale 0.05 --samples 100 --out /tmp/rehearsal.json

Each training of an experiment gets the same seconds of processor time on one thread, so that a
slower model makes fewer steps, and other work on the machine takes nothing from it. What is
finished is in results/ablations.json at once: the same command goes on from there. Chapters read
that file.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import lru_cache, partial
from multiprocessing.connection import wait
from pathlib import Path

import torch
from quality import Judge, train_judge
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from mar_mini import MAR, AutoencoderKL, data, generate, get_config, train_mar, train_vae
from mar_mini.evaluation import frechet_distance, psnr
from mar_mini.files import write_atomically
from mar_mini.training import Training, progress

RESULT = Path(__file__).resolve().parent / "results" / "ablations.json"
SAMPLES = 1000
SEEDS = (0, 1, 2)
DIGITS = (
    "Fréchet distance of {samples} samples to the 4,500 training digits, on 64 features of a small "
    "network that tells digits apart; lower is better. Sampled without guidance, at temperature 1: "
    "guidance grows with the share of known tokens, so that few tokens would get less of it. The "
    "floor is what the 500 test digits get."
)
PSNR = "PSNR in dB of reconstructed test images, from the means of the latents; higher is better"


@dataclass(frozen=True)
class Row:
    """One setting: what the results say about it, and what it changes in the preset.

    kind     "digits" (a MAR on digits) or "vae" (an autoencoder on cifar10_mini)
    changes  of MARConfig, or of VAEConfig and of "kl_weight"
    """

    kind: str
    facts: dict
    changes: dict = field(default_factory=dict)

    def key(self, seed: int) -> str:
        """Names the training; rows of two experiments that are the same training share it."""
        changes = ", ".join(f"{name} {value:g}" for name, value in sorted(self.changes.items()))
        return f"{self.kind}: {changes}, seed {seed}"


def patches(patch: int) -> Row:
    tokens, width = (16 // patch) ** 2, patch**2
    label = f"patch {patch}: {tokens} token{'s' * (tokens > 1)} of {width}"
    facts = {"label": label, "patch": patch, "tokens": tokens, "width": width}
    return Row("digits", facts, digits(patch_size=patch))


def digits(**changes) -> dict:
    """With what the preset has spelt out, so that the same training is recognised as the same."""
    preset = get_config("digits").mar
    names = ("patch_size", "buffer_size", "encoder_depth", "decoder_depth")
    return {name: getattr(preset, name) for name in names} | changes


EXPERIMENTS = {
    "token_width": {
        "seconds": 14,
        "measure": DIGITS,
        "rows": [patches(patch) for patch in (1, 2, 4, 8, 16)],
    },
    "latent_channels": {
        "seconds": 8,
        "measure": PSNR + ". The autoencoder starts from the principal components of 4x4 patches.",
        "rows": [
            Row("vae", {"label": str(n), "channels": n}, {"z_channels": n, "kl_weight": 1e-4})
            for n in (2, 4, 8, 16)
        ],
    },
    "kl_weight": {
        "seconds": 26,
        "measure": PSNR + "; kl: nats per latent value on the test images. Trained without the "
        "linear path: that starts from latents that say much, and in so short a training no weight "
        "takes it back.",
        "rows": [
            Row(
                "vae",
                {"label": f"{weight:g}", "kl_weight": weight},
                {"z_channels": 16, "kl_weight": weight, "linear_path": False},
            )
            for weight in (1e-6, 1e-4, 1e-2, 1e-1, 1.0)
        ],
    },
    "buffers": {
        "seconds": 14,
        "measure": DIGITS,
        "rows": [
            Row("digits", {"label": str(n), "buffer_size": n}, digits(buffer_size=n))
            for n in (1, 2, 4, 16)
        ],
    },
    "encoder_decoder": {
        "seconds": 14,
        "measure": DIGITS,
        "rows": [
            Row(
                "digits",
                {"label": f"{encoder} + {decoder}", "encoder": encoder, "decoder": decoder},
                digits(encoder_depth=encoder, decoder_depth=decoder),
            )
            for encoder, decoder in ((0, 3), (1, 2), (2, 1))
        ],
    },
}


# The worker: one training -------------------------------------------------------------------------


def end_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for its next training for ever."""

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache
def images_of(name: str, split: str) -> tuple[Tensor, Tensor]:
    images, labels = data.to_tensors(data.load_images(name, split))
    return data.normalise(images), labels


def trained(training: Training) -> nn.Module:
    """The averaged model at the end; the clock is the processor's, not the one on the wall."""
    start = time.process_time()
    averaged = training.ema.module
    for _ in training:
        training.seconds = time.process_time() - start
        training.used = progress(training.config, training.step, training.seconds)
    return averaged.eval()


def train_digits(changes: dict, seed: int, seconds: float, samples: int, judge: Path) -> dict:
    """Train a MAR on digits; `value` is the distance of its samples."""
    config = get_config("digits")
    torch.manual_seed(seed)
    mar = MAR(**asdict(replace(config.mar, **changes)))
    budget = replace(config.training, max_seconds=seconds)
    training = train_mar(mar, *images_of("digits", "train"), budget, seed=seed)
    mar = trained(training)
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        generate(
            mar,
            labels,
            num_iter=min(config.sampling.num_iter, mar.seq_len),
            num_sampling_steps=config.sampling.num_sampling_steps,
            clip=config.sampling.clip,
            generator=generator,
        )
        for labels in (torch.arange(samples) % 10).split(250)
    ]
    network, reference = load_judge(judge)
    with torch.no_grad():
        features = network.see(data.denormalise(mar.unpatchify(torch.cat(drawn))))
    return {
        "value": frechet_distance(features, reference),
        "steps": training.step,
        "seconds_per_step": training.seconds / training.step,
    }


def load_judge(path: Path) -> tuple[Judge, Tensor]:
    """The network that all workers share, and its features of the training digits."""
    weights = load_file(path)
    reference = weights.pop("reference")
    judge = Judge()
    judge.load_state_dict(weights)
    return judge.eval(), reference


@torch.no_grad()
def save_judge(path: Path) -> float:
    """Train the network that judges digits and write it; returns the floor."""
    torch.manual_seed(0)
    (train, labels), (test, _) = (images_of("digits", split) for split in ("train", "test"))
    train, test = data.denormalise(train), data.denormalise(test)
    with torch.enable_grad():
        judge = train_judge(train, labels)
    reference = judge.see(train)
    save_file({**judge.state_dict(), "reference": reference}, path)
    return frechet_distance(judge.see(test), reference)


def train_autoencoder(changes: dict, seed: int, seconds: float) -> dict:
    """Train an autoencoder on cifar10_mini; `value` is the PSNR of what it reconstructs."""
    config = get_config("cifar10")
    changes = dict(changes)
    budget = replace(config.vae_training, max_seconds=seconds, kl_weight=changes.pop("kl_weight"))
    images, test = images_of("cifar10_mini", "train")[0], images_of("cifar10_mini", "test")[0]
    torch.manual_seed(seed)
    vae = AutoencoderKL(**asdict(replace(config.vae, **changes)))
    if vae.linear_path:
        vae.start_linear(images)
    training = train_vae(vae, images, budget, seed=seed)
    vae = trained(training)
    decibels, kl = [], []
    with torch.no_grad():
        for batch in test.split(100):
            posterior = vae.encode(batch)
            again = data.denormalise(vae.decode(posterior.mode()))
            decibels.append(psnr(again, data.denormalise(batch)))
            kl.append(posterior.kl() / posterior.mean[0].numel())
    return {
        "value": float(torch.cat(decibels).mean()),
        "kl": float(torch.cat(kl).mean()),
        "steps": training.step,
        "seconds_per_step": training.seconds / training.step,
    }


def train_one(job: "Job", judge: Path) -> dict:
    """One training, in whatever process; what it gives goes to the results as it is."""
    torch.set_num_threads(1)
    if job.row.kind == "vae":
        return train_autoencoder(job.row.changes, job.seed, job.seconds)
    return train_digits(job.row.changes, job.seed, job.seconds, job.samples, judge)


# All of them --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One training: `seconds` of processor time, judged by so many samples if it makes any."""

    row: Row
    seed: int
    seconds: float
    samples: int

    @property
    def budget(self) -> dict:
        """What a finished training must have had to be taken for this one."""
        return {"budget": self.seconds, "samples": self.samples}


def all_jobs(scale: float, samples: int) -> dict[str, Job]:
    """Every training by name; all rows of a seed before the next, so that early results compare."""
    return {
        row.key(seed): Job(row, seed, scale * experiment["seconds"], samples)
        for seed in SEEDS
        for experiment in EXPERIMENTS.values()
        for row in experiment["rows"]
    }


def load(path: Path, jobs: dict[str, Job]) -> dict[str, dict]:
    """Those trainings of a result file that are of these jobs, budget included."""
    there = json.loads(path.read_text())["trainings"] if path.exists() else {}
    return {
        key: there[key]
        for key, job in jobs.items()
        if key in there and job.budget.items() <= there[key].items()
    }


def tables(finished: dict[str, dict], floor: float, scale: float, samples: int) -> dict:
    """What chapters read: of each experiment the rows, each with one value a seed."""
    experiments = {}
    for name, experiment in EXPERIMENTS.items():
        rows = []
        for row in experiment["rows"]:
            done = [finished[row.key(s)] for s in SEEDS if row.key(s) in finished]
            if not done:
                continue
            filled = row.facts | {"seeds": [d["value"] for d in done]}
            filled["steps"] = [d["steps"] for d in done]
            if name == "kl_weight":
                filled["kl"] = [d["kl"] for d in done]
            if name == "encoder_decoder":
                each = [d["seconds_per_step"] for d in done]
                filled["seconds_per_step"] = sum(each) / len(each)
            rows.append(filled)
        experiments[name] = {
            "rows": rows,
            "measure": experiment["measure"].format(samples=f"{samples:,}"),
            "seconds": scale * experiment["seconds"],
        }
        if experiment["rows"][0].kind == "digits":
            experiments[name]["floor"] = floor
    return experiments


def run(
    path: Path,
    scale: float,
    samples: int,
    facts: dict,
    floor: float,
    pool: Executor,
    train: Callable[[Job], dict],
) -> dict:
    """Do what is not in the file yet, write the file after each training, return its content.

    scale  of the seconds of every training
    train  job -> value, steps, seconds_per_step and, of an autoencoder, kl; called in `pool`
    """
    jobs = all_jobs(scale, samples)
    finished = load(path, jobs)
    futures = {pool.submit(train, job): key for key, job in jobs.items() if key not in finished}
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(done: Iterable[Future]) -> None:
        for future in done:
            finished[futures[future]] = future.result() | jobs[futures[future]].budget
        result = facts | tables(finished, floor, scale, samples) | {"trainings": finished}
        text = json.dumps(result, indent=1) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text))

    with tqdm(total=len(jobs), initial=len(finished), desc="trainings") as bar:
        try:
            for future in as_completed(futures):
                keep([future])
                bar.set_postfix_str(futures[future])
                bar.update()
        except BaseException:  # what waits must not run on after Ctrl-C, what is done must not go
            pool.shutdown(wait=False, cancel_futures=True)
            ended = [future for future in futures if future.done() and not future.cancelled()]
            keep(future for future in ended if future.exception() is None)
            raise
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time")
    parser.add_argument("--minutes-scale", type=float, default=1.0, help="0.05 for a rehearsal")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    full = options.minutes_scale == 1 and options.samples == SAMPLES
    if not full and options.out == RESULT:
        parser.error("a rehearsal: say with --out where its results go")
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=RESULT.parents[1],
        capture_output=True,
        text=True,
    ).stdout.strip()
    facts = {
        "date": str(date.today()),
        "commit": commit,
        "command": shlex.join(["python", "benchmarks/ablations.py", *sys.argv[1:]]),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": 1,
            "cores": os.cpu_count(),
            "workers": options.workers,
            "torch": torch.__version__,
            "load_at_start": os.getloadavg()[0],
        },
    }
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        judge = Path(folder) / "judge.safetensors"
        floor = save_judge(judge)
        with ProcessPoolExecutor(options.workers, context, end_with_parent) as pool:
            result = run(
                options.out,
                options.minutes_scale,
                options.samples,
                facts,
                floor,
                pool,
                partial(train_one, judge=judge),
            )
    for name in EXPERIMENTS:
        print(f"\n{name}: {result[name]['measure']}")
        for row in result[name]["rows"]:
            values = "  ".join(f"{value:8.2f}" for value in row["seeds"])
            print(f"  {row['label']:28} {values}   {row['steps'][0]} steps")


if __name__ == "__main__":
    main()
