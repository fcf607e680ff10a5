"""The same model on three kinds of tokens of CIFAR-10, trained for the same minutes.

    python recipes/compare.py --minutes 4 --out build/tokens

Trains `cifar10`, `cifar10_latents` and `cifar10_pixels` one after the other by `mar-mini train`
(one autoencoder for the first two), judges 1,000 samples of each, and writes
benchmarks/results/tokens.json. What is finished is not trained or judged again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from mar_mini import load_pretrained
from mar_mini.data import data_dir
from mar_mini.files import write_atomically
from mar_mini.judge.features import features_of, load_features
from mar_mini.judge.statistics import Reference

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "tokens.json"
SETTINGS = {"cfg": 2.0, "cfg_schedule": "linear", "temperature": 1.0}
PRESETS = ("cifar10", "cifar10_latents", "cifar10_pixels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="of each MAR")
    parser.add_argument("--out", type=Path, default=Path("build/tokens"))
    parser.add_argument("--samples", type=int, default=1000)
    arguments = parser.parse_args()
    reference, network = Reference.load(data_dir() / "reference" / "cifar10.safetensors"), None
    rows = []
    for name in PRESETS:
        out, first = arguments.out / name, arguments.out / PRESETS[0] / "state" / "autoencoder"
        if name == "cifar10_latents" and not (out / "state").exists():
            shutil.copytree(first, out / "state" / "autoencoder")
        if not (out / "config.json").exists():
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "mar_mini",
                    "train",
                    "--config",
                    name,
                    "--data",
                    "cifar10",
                    "--out",
                    str(out),
                    "--max-minutes",
                    str(arguments.minutes),
                ],
                check=True,
            )
        judged = out / f"judged-{arguments.samples}.json"
        if judged.exists():
            rows.append(json.loads(judged.read_text()))
            continue
        pipeline = load_pretrained(out.resolve())
        network = network or load_features()
        features = []
        for i, asked in enumerate((torch.arange(arguments.samples) % 10).split(250)):
            images = pipeline.generate(
                asked, generator=torch.Generator().manual_seed(i), **SETTINGS
            )
            features.append(features_of(network, images))
        rows.append(
            {
                "preset": name,
                "tokens": pipeline.mar.seq_len,
                "width": pipeline.mar.token_embed_dim,
                "parameters": sum(p.numel() for p in pipeline.mar.parameters()),
                "minutes": pipeline.card["seconds"] / 60,
                "images_seen": pipeline.card["images_seen"],
                "distance": reference.distance(torch.cat(features)),
            }
        )
        judged.write_text(json.dumps(rows[-1]))
        print(rows[-1], flush=True)
    result = {
        "samples": arguments.samples,
        "features": reference.features_name,
        "settings": SETTINGS,
        "rows": rows,
    }
    write_atomically(RESULT, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    draw(result)


def draw(result: dict) -> None:
    """The table of benchmarks/README.md."""
    lines = [
        f"{result['samples']:,} samples of the same model on three kinds of tokens, trained for "
        f"{result['rows'][0]['minutes']:.0f} minutes each and sampled with guidance 2:",
        "",
        "| preset | tokens | parameters | images seen | distance |",
        "|---|---|---|---|---|",
        *(
            f"| `{row['preset']}` | {row['tokens']} of {row['width']} | {row['parameters']:,} | "
            f"{row['images_seen']:,} | {row['distance']:.1f} |"
            for row in result["rows"]
        ),
    ]
    path = RESULT.parents[1] / "README.md"
    before, mark, rest = path.read_text().partition("<!-- tokens -->\n")
    after = rest.partition("<!-- end of tokens -->")[2]
    table = "\n".join(lines)
    path.write_text(f"{before}{mark}{table}\n<!-- end of tokens -->{after}")


if __name__ == "__main__":
    main()
