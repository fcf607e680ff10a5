"""Many images, each from its own seed, whoever makes it: sets to be judged."""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mar_mini.checkpoints import Pipeline
from mar_mini.files import write_atomically
from mar_mini.parts import pieces
from mar_mini.runs import checksum, differing
from mar_mini.training import step_generator

IDENTITY = "generated.json"


def write_images(
    pipeline: Pipeline,
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
    batch_size: int = 64,
    shard_size: int = 1000,
    png: bool = False,
    **settings,
) -> Iterator[int]:
    """Generate `count` images into a folder; yields how many of them are done, after each batch.

    Image i is of class i modulo the number of classes, and all that is random in it follows from
    (seed, i). So the set is the same for any number of parts and any batch size, but for rounding.
    What is there already is not made again: give the same again after a kill.

    part        (I, N): only pieces I, I + N, I + 2N, ... of `shard_size` images each
    png         a file for each image instead of parquet files with `image` and `label`
    **settings  arguments of `sample`, the pipeline's defaults else

    Raises ValueError if the folder holds other images, or for settings that mean nothing.
    """
    folder, ranges = Path(folder), pieces(count, shard_size)
    claim(folder, {
        "model": model_checksum(pipeline), "count": count, "seed": seed, "png": png,
        "shard_size": shard_size, "clip": pipeline.clip,
        "settings": {**asdict(pipeline.defaults), **settings},
    })  # fmt: skip
    for number in range(part[0], len(ranges), part[1]):
        indices = ranges[number]
        if png:
            files = [folder / f"{i:06d}.png" for i in indices]
        else:
            files = [folder / f"train-{number:05d}-of-{len(ranges):05d}.parquet"]
        if all(file.is_file() for file in files):
            yield len(indices)
            continue
        stored: list[bytes] = []
        for first in range(indices.start, indices.stop, batch_size):
            batch = range(first, min(first + batch_size, indices.stop))
            images = generate_images(pipeline, batch, seed, settings)
            stored += [encode_png(image) for image in images]
            yield len(batch)
        write = [lambda path, data=data: path.write_bytes(data) for data in stored] if png else [
            partial(write_parquet, stored, indices, pipeline.classes)
        ]  # fmt: skip
        for file, how in zip(files, write, strict=True):
            write_atomically(file, how)


def generate_images(
    pipeline: Pipeline, indices: range, seed: int, settings: dict
) -> Float[Tensor, "B C H W"]:
    """The images of these numbers, (B, 3 or 1, H, W) float32 in [0, 1]."""
    labels = [i % len(pipeline.classes) for i in indices]
    generators = [step_generator(seed, i) for i in indices]
    return pipeline.generate(labels, generator=generators, **settings)


def encode_png(image: Float[Tensor, "C H W"]) -> bytes:
    pixels = (image * 255).round().byte().cpu().permute(1, 2, 0).squeeze(-1)     # (H, W[, 3])
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png")
    return file.getvalue()


def write_parquet(stored: list[bytes], indices: range, classes: list[str], path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features({
        "image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))
    })  # fmt: skip
    rows = {
        "image": [{"bytes": data, "path": f"{i:06d}.png"}
                  for data, i in zip(stored, indices, strict=True)],
        "label": [i % len(classes) for i in indices],
    }  # fmt: skip
    table = pa.Table.from_pydict(rows, schema=features.arrow_schema)
    pq.write_table(table, path, write_page_checksum=True, row_group_size=100)


def claim(folder: Path, identity: dict) -> None:
    """Say whose images a folder holds. Raises ValueError if it holds others."""
    folder.mkdir(parents=True, exist_ok=True)
    path, identity = folder / IDENTITY, json.loads(json.dumps(identity))
    if path.is_file():
        differences = differing(json.loads(path.read_text()), identity)
        if differences:
            raise ValueError(
                f"{folder} holds other images ({differences}); choose another folder, or the "
                "settings of those"
            )
        return
    text = json.dumps(identity, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def check_complete(folder: Path, number: int) -> None:
    """Raises ValueError if fewer images are there than were asked for; other folders are fine."""
    path = folder / IDENTITY
    if path.is_file() and number != (count := json.loads(path.read_text())["count"]):
        raise ValueError(
            f"{number:,} of {count:,} images are in {folder}; give the command that generates them "
            "again, or that of the missing part"
        )


def model_checksum(pipeline: Pipeline) -> int:
    """Of the weights of both models."""
    models = {"mar": pipeline.mar, "vae": pipeline.vae}
    return checksum({
        f"{name}.{key}": x.cpu()
        for name, model in models.items() if model is not None
        for key, x in model.state_dict().items()
    })  # fmt: skip
