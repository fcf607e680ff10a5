"""How samples got better: the Fréchet distance at the moments that `mar-mini train` kept.

    python recipes/history.py build/cifar10
    python recipes/history.py build/imagenette64 --reference build/imagenette64.safetensors

For each moment samples of averaged and of raw weights, from the same seeds, with 25 diffusion
steps, against a reference (that of CIFAR-10 is bundled, `tools/make_reference.py` makes others).
Writes moments.json, moments.png and growth.png (a column of samples for each moment, from the same
seed) beside the weights, and the last distance into their card. What is in moments.json already is
not measured again, so that a run that was continued costs only its new moments.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from mar_mini import load_pretrained
from mar_mini.checkpoints import load_weights
from mar_mini.data import data_dir
from mar_mini.files import write_atomically
from mar_mini.judge.features import features_of, load_features
from mar_mini.judge.statistics import Reference
from mar_mini.viz.figures import curves, save_figure

STEPS = 25  # of diffusion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that `mar-mini train` wrote")
    parser.add_argument(
        "--reference", type=Path, default=data_dir() / "reference" / "cifar10.safetensors"
    )
    parser.add_argument("--samples", type=int, default=500, help="of each moment, of each kind")
    arguments = parser.parse_args()
    count = arguments.samples
    out, reference = arguments.out, Reference.load(arguments.reference)
    network, pipeline = load_features(), load_pretrained(out)

    def samples(step: int, kind: str, count: int) -> torch.Tensor:
        load_weights(pipeline.mar, out / "moments" / f"{kind}-{step:07d}.safetensors")
        return pipeline.generate(
            torch.arange(count) % len(pipeline.classes),
            num_sampling_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
        )

    history = {row["step"]: row for row in json.loads((out / "history_masked.json").read_text())}
    measure = (
        f"Frechet distance, {reference.features_name}, {count} samples with {STEPS} diffusion "
        f"steps against {reference.train_count} training images"
    )
    floor = reference.distance(reference.test[:count])
    before = {"measure": None, "floor": None, "moments": []}
    if (out / "moments.json").exists():
        before = json.loads((out / "moments.json").read_text())
    same_measure = before["measure"] == measure and before["floor"] == floor
    known = before["moments"] if same_measure else []
    moments, growth = [], []
    for path in tqdm(sorted((out / "moments").glob("average-*.safetensors")), unit="moment"):
        step = int(path.stem.removeprefix("average-"))
        row = {name: history[step][name] for name in ("step", "seconds", "images_seen", "loss")}
        growth.append(samples(step, "average", 8))
        same = [old for old in known if row.items() <= old.items()]
        if same:
            moments += same
            continue
        for kind in ("average", "raw"):
            row[kind] = reference.distance(features_of(network, samples(step, kind, count)))
        moments.append(row)
    result = {"measure": measure, "floor": floor, "moments": moments}
    write(out / "moments.json", result)
    config = json.loads((out / "config.json").read_text())
    config["card"]["metrics"] = {
        "measure": measure,
        "distance": moments[-1]["average"],
        "floor": floor,
    }
    write(out / "config.json", config)
    seen = [row["images_seen"] for row in moments]
    lines = {
        f"{kind} weights": (seen, [row[kind] for row in moments]) for kind in ("average", "raw")
    }
    lines["real test images"] = (seen, [floor] * len(seen))
    figure = curves(lines, xlabel="images seen", ylabel="Fréchet distance", logy=True)
    save_figure(figure, out / "moments.png")
    columns = [torch.cat(list(images), 1) for images in growth]  # (3, 8 H, W) each
    sheet = (torch.cat(columns, 2) * 255).round().byte().permute(1, 2, 0).numpy()
    write_atomically(
        out / "growth.png", lambda path: Image.fromarray(sheet).save(path, format="png")
    )


def write(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    main()
