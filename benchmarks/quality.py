"""What each approximation of the sampler costs, on the bundled `digits` model.

    python benchmarks/quality.py [--samples 2000]

Two rulers that see failure: the share of samples in which a small network, trained here on real
digits, finds the digit that was asked for; and the Fréchet distance of that network's features to
those of real digits. The exact sampler with two seeds shows how much both move by chance. A setting
is worth the name `fast` if it costs at most a tenth of the exact sampler's distance above the floor
- the distance between real digits and other real digits. Writes results/quality.json.
"""

import argparse
import json
import time
from datetime import date
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from mar_mini import data, load_pretrained
from mar_mini.evaluation import frechet_distance
from mar_mini.fast import FAST, Reuse, dpm_solver

RESULT = Path(__file__).parent / "results" / "quality.json"
SETTINGS = {
    "exact": {},
    "exact, another seed": {},
    "8 iterations": {"num_iter": 8},
    "4 iterations": {"num_iter": 4},
    "10 diffusion steps": {"num_sampling_steps": 10},
    "25 to 5 diffusion steps": {"num_sampling_steps": (25, 5)},
    "ddim, 10 steps": {"solver": "ddim", "num_sampling_steps": 10},
    "dpm_solver, 10 steps": {"solver": dpm_solver, "num_sampling_steps": 10},
    "dpm_solver, 6 steps": {"solver": dpm_solver, "num_sampling_steps": 6},
    "guidance from 1/4 known": {"guidance_interval": (0.25, 1.0)},
    "guidance to 3/4 known": {"guidance_interval": (0.0, 0.75)},
    "features each 2nd iteration": {"conditions": Reuse(refresh_features=2)},
    "features each 4th iteration": {"conditions": Reuse(refresh_features=4)},
    "guidance each 2nd iteration": {"conditions": Reuse(refresh_guidance=2)},
    "guidance each 4th iteration": {"conditions": Reuse(refresh_guidance=4)},
    "fast": FAST,
}


class Judge(nn.Module):
    """A small convolutional network; its features are what it sees before it decides."""

    def __init__(self):
        super().__init__()
        self.see = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(1024, 64),
            nn.ReLU(),
        )
        self.decide = nn.Linear(64, 10)

    def forward(self, images):
        return self.decide(self.see(images))


def train_judge(images, labels, epochs: int = 12) -> Judge:
    torch.manual_seed(0)
    judge = Judge()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in tqdm(range(epochs), desc="training the judge"):
        for rows in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(judge(images[rows]), labels[rows]).backward()
            optimiser.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def judged(judge: Judge, images, asked, reference) -> dict[str, float]:
    features = judge.see(images)
    found = (judge.decide(features).argmax(1) == asked).float().mean()
    return {"recognised": float(found), "distance": frechet_distance(features, reference)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    samples = parser.parse_args().samples
    pipeline = load_pretrained("digits")
    real = {}
    for split in ("train", "test"):
        images, labels = data.to_tensors(data.load_images("digits", split))
        real[split] = data.denormalise(data.normalise(images)), labels
    judge = train_judge(*real["train"])
    with torch.no_grad():
        reference = judge.see(real["train"][0])
    rows = {"real test digits": judged(judge, *real["test"], reference)}
    asked = torch.arange(samples) % 10
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        start = time.perf_counter()
        drawn = [
            pipeline.generate(
                part, generator=torch.Generator().manual_seed(1000 * seed + i), **settings
            )
            for i, part in enumerate(asked.split(500))
        ]
        seconds = time.perf_counter() - start
        rows[name] = {**judged(judge, torch.cat(drawn), asked, reference), "seconds": seconds}
    floor, exact = rows["real test digits"]["distance"], rows["exact"]["distance"]
    for name, row in rows.items():
        if "seconds" in row:
            row["cost"] = (row["distance"] - exact) / (exact - floor)
            row["times as fast"] = rows["exact"]["seconds"] / row["seconds"]
        print(f"{name:28}", *(f"{key} {value:8.3f} " for key, value in row.items()))
    RESULT.parent.mkdir(exist_ok=True)
    result = {"date": str(date.today()), "samples": samples, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    write_table(rows)


def write_table(rows: dict) -> None:
    """The table in README.md; the text around it stays."""
    lines = ["| setting | recognised | distance | cost | times as fast |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        paid = f"{row['cost']:.0%} | {row['times as fast']:.1f}" if "cost" in row else "floor | "
        lines.append(f"| {name} | {row['recognised']:.1%} | {row['distance']:.1f} | {paid} |")
    path = Path(__file__).parent / "README.md"
    before, _, rest = path.read_text().partition("<!-- quality -->\n")
    after = rest.partition("<!-- end of quality -->")[2]
    table = "\n".join(lines)
    path.write_text(f"{before}<!-- quality -->\n{table}\n<!-- end of quality -->{after}")


if __name__ == "__main__":
    main()
