"""How samples got better: the Fréchet distance at the moments that recipes/train.py kept.

    python recipes/history.py build/cifar10

For each moment 500 samples of averaged and of raw weights, from the same seeds, with 25 diffusion
steps, against the bundled reference. Writes moments.json and moments.png beside the weights.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from mar_mini import load_pretrained
from mar_mini.checkpoints import load_weights
from mar_mini.data import data_dir
from mar_mini.evaluation import Reference
from mar_mini.features import features_of, load_features
from mar_mini.files import write_atomically
from mar_mini.viz.figures import curves, save_figure

SAMPLES, STEPS = 500, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that recipes/train.py wrote")
    out = parser.parse_args().out
    reference = Reference.load(data_dir() / "reference" / "cifar10.safetensors")
    network, pipeline = load_features(), load_pretrained(out)
    asked = torch.arange(SAMPLES) % len(pipeline.classes)
    history = {row["step"]: row for row in json.loads((out / "history_masked.json").read_text())}
    moments = []
    for path in tqdm(sorted((out / "moments").glob("average-*.safetensors")), unit="moment"):
        step = int(path.stem.removeprefix("average-"))
        row = {name: history[step][name] for name in ("step", "seconds", "images_seen", "loss")}
        for kind in ("average", "raw"):
            load_weights(pipeline.mar, path.with_name(f"{kind}-{step:07d}.safetensors"))
            images = pipeline.generate(
                asked, num_sampling_steps=STEPS, generator=torch.Generator().manual_seed(0)
            )
            row[kind] = reference.distance(features_of(network, images))
        moments.append(row)
    floor = reference.distance(reference.test[:SAMPLES])
    result = {
        "measure": f"Frechet distance, {reference.features_name}, {SAMPLES} samples with {STEPS} "
                   f"diffusion steps against {reference.train_count} training images",
        "floor": floor, "moments": moments,
    }  # fmt: skip
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(out / "moments.json", lambda path: path.write_text(text))
    seen = [row["images_seen"] for row in moments]
    lines = {f"{kind} weights": (seen, [row[kind] for row in moments])
             for kind in ("average", "raw")}  # fmt: skip
    lines["real test images"] = (seen, [floor] * len(seen))
    figure = curves(lines, xlabel="images seen", ylabel="Fréchet distance", logy=True)
    save_figure(figure, out / "moments.png")


if __name__ == "__main__":
    main()
