"""Which tokens to hide in training: small models of digits, alike but for their mask ratios.

    python benchmarks/mask_ratio.py                 about 6 minutes
    python benchmarks/mask_ratio.py --seconds 1 --samples 100 --out build/rehearsal.json

Each training gets the same seconds of processor time on one thread, so that a model whose encoder
reads more tokens makes fewer steps. Chapter 6 reads results/mask_ratio.json.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import torch
from ablations import DIGITS, SEEDS, images_of, load_judge, save_judge, trained
from tqdm import tqdm

from mar_mini import MAR, data, generate, get_config, masking, train_mar
from mar_mini.evaluation import frechet_distance
from mar_mini.files import write_atomically

RESULT = Path(__file__).resolve().parent / "results" / "mask_ratio.json"


class Uniform(MAR):
    """Hides any number of tokens, 1 to L, each as likely as another."""

    def draw_mask(self, batch_size, generator=None):
        hidden = int(torch.randint(1, self.seq_len + 1, (), generator=generator))
        order = masking.random(self.seq_h, self.seq_w, batch_size, generator)
        return masking.mask_by_order(order, hidden)


ROWS = {  # label -> the model's class, and the smallest ratio; "uniform" does not use the second
    "0.7 to 1": (MAR, 0.7),
    "0.5 to 1": (MAR, 0.5),
    "uniform": (Uniform, 0.7),
}


def train(kind: type[MAR], lowest: float, seed: int, seconds: float, samples: int, judge) -> dict:
    """One training; `value` is the distance of its samples."""
    config = get_config("digits")
    torch.manual_seed(seed)
    mar = kind(**asdict(replace(config.mar, mask_ratio_min=lowest)))
    budget = replace(config.training, max_seconds=seconds)
    training = train_mar(mar, *images_of("digits", "train"), budget, seed=seed)
    mar = trained(training)
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        generate(
            mar,
            labels,
            num_iter=mar.seq_len,
            clip=config.sampling.clip,
            generator=generator,
            num_sampling_steps=config.sampling.num_sampling_steps,
        )
        for labels in (torch.arange(samples) % 10).split(250)
    ]
    network, reference = judge
    with torch.no_grad():
        features = network.see(data.denormalise(mar.unpatchify(torch.cat(drawn))))
    return {"value": frechet_distance(features, reference), "steps": training.step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=14.0, help="processor time of a training")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "judge.safetensors"
        floor, judge = save_judge(path), load_judge(path)
    begin, rows = time.time(), {name: {"label": name, "seeds": [], "steps": []} for name in ROWS}
    with tqdm(total=len(ROWS) * len(SEEDS), desc="trainings") as bar:
        for seed in SEEDS:  # all rows of a seed before the next: they meet the same machine
            for name, (kind, lowest) in ROWS.items():
                done = train(kind, lowest, seed, options.seconds, options.samples, judge)
                rows[name]["seeds"].append(done["value"])
                rows[name]["steps"].append(done["steps"])
                bar.update()
    result = {
        "date": str(date.today()),
        "measure": DIGITS.format(samples=f"{options.samples:,}"),
        "floor": floor,
        "seconds": options.seconds,
        "minutes": round((time.time() - begin) / 60, 1),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": 1,
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "load_at_end": os.getloadavg()[0],
        },
        "rows": list(rows.values()),
    }
    write_atomically(options.out, lambda file: file.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
