"""Many images, each from its own seed, whoever makes it: sets to be judged."""

import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mar_mini.checkpoints import Pipeline
from mar_mini.files import write_atomically
from mar_mini.run.parts import pieces
from mar_mini.run.state import checksum, differing
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
    claim(
        folder,
        {
            "model": model_checksum(pipeline),
            "count": count,
            "seed": seed,
            "png": png,
            "shard_size": shard_size,
            "clip": pipeline.clip,
            "settings": {**asdict(pipeline.defaults), **settings},
        },
    )
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
        write = (
            [lambda path, data=data: path.write_bytes(data) for data in stored]
            if png
            else [partial(write_parquet, stored, indices, pipeline.classes)]
        )
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
    pixels = (image * 255).round().byte().cpu().permute(1, 2, 0).squeeze(-1)  # (H, W[, 3])
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png")
    return file.getvalue()


def write_parquet(stored: list[bytes], indices: range, classes: list[str], path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))}
    )
    rows = {
        "image": [
            {"bytes": data, "path": f"{i:06d}.png"} for data, i in zip(stored, indices, strict=True)
        ],
        "label": [i % len(classes) for i in indices],
    }
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
    return checksum(
        {
            f"{name}.{key}": x.cpu()
            for name, model in models.items()
            if model is not None
            for key, x in model.state_dict().items()
        }
    )


# The command -------------------------------------------------------------------------------------


def generate(
    model: str,
    *,
    count: int = 50_000,
    out: Path = Path("build") / "generated",
    part: str | None = None,
    seed: int = 0,
    png: bool = False,
    batch_size: int = 64,
    shard_size: int = 1000,
    num_iter: int | None = None,
    num_sampling_steps: int | None = None,
    cfg: float | None = None,
    temperature: float | None = None,
    fast: bool = False,
) -> int:
    """Generate many images to be judged, all classes in turn, each image from its own seed.

    A run that was stopped or killed goes on when the same command is given again.

    Args:
        model: bundled model, or a folder that `train` wrote.
        count: how many images.
        out: folder for them.
        part: I/N, for N processes: 0/N to N-1/N. By default what torchrun says, or all.
        seed: decides everything that is random.
        png: a PNG for each image, as other evaluators want them, instead of parquet files.
        batch_size: images made at once; it changes none of them but for rounding.
        shard_size: images in a file, and lost at most by a kill.
        num_iter: autoregressive steps; this and the next three are the model's defaults if left
            out.
        num_sampling_steps: diffusion steps.
        cfg: guidance weight, 1 for none.
        temperature: scale of the injected noise.
        fast: approximate, several times faster; benchmarks/README.md says what it costs.
    """
    from tqdm import tqdm

    from mar_mini.checkpoints import load_pretrained
    from mar_mini.run.parts import parse_part, place
    from mar_mini.sampling import FAST

    pipeline = load_pretrained(model)
    for network in (pipeline.mar, pipeline.vae):
        if network is not None:
            network.to(place())
    given = {
        "num_iter": num_iter,
        "num_sampling_steps": num_sampling_steps,
        "cfg": cfg,
        "temperature": temperature,
    }
    given = {k: v for k, v in given.items() if v is not None}
    mine = parse_part(part)
    steps = write_images(
        pipeline,
        out,
        count,
        seed=seed,
        part=mine,
        batch_size=batch_size,
        shard_size=shard_size,
        png=png,
        **{**(FAST if fast else {}), **given},
    )
    with tqdm(total=count // mine[1], desc="generating", unit="image") as bar:
        for number in steps:
            bar.update(number)
    print(f"part {mine[0]}/{mine[1]} of {count:,} images is in {out}")
    return 0


def sample(
    model: str | None = None,
    *,
    labels: tuple[int, ...] = (),
    out: Path = Path("samples.png"),
    filmstrip: Path | None = None,
    num_iter: int | None = None,
    num_sampling_steps: int | None = None,
    cfg: float | None = None,
    temperature: float | None = None,
    order: str = "random",
    seed: int = 0,
    fast: bool = False,
    config: str | None = None,
    random_weights: bool = False,
    bf16: bool = False,
) -> int:
    """Sample images of the classes asked for and write them as one PNG.

    Args:
        model: bundled model, mar_base, mar_large or mar_huge (fetched once), or a folder that
            `train` or `convert` wrote; or none, but --config and --random-weights.
        labels: one class an image; the first ten classes by default, with random weights the first.
        out: the PNG.
        filmstrip: another PNG: the first of them, growing token by token.
        num_iter: autoregressive steps; this and the next three are the model's defaults if left
            out.
        num_sampling_steps: diffusion steps.
        cfg: guidance weight, 1 for none.
        temperature: scale of the injected noise.
        order: order of the tokens, by name.
        seed: decides everything that is random.
        fast: approximate, several times faster; benchmarks/README.md says what it costs.
        config: instead of a model, a preset, whose weights are random.
        random_weights: yes, they are, and what comes out is noise: it shows what sampling takes.
        bf16: weights and products in bfloat16, in half of the memory.
    """
    import torch
    from tqdm import tqdm

    from mar_mini.checkpoints import load_pretrained
    from mar_mini.sampling import FAST
    from mar_mini.viz import figures

    given = {
        "num_iter": num_iter,
        "num_sampling_steps": num_sampling_steps,
        "cfg": cfg,
        "temperature": temperature,
    }
    given = {k: v for k, v in given.items() if v is not None}
    settings = {**(FAST if fast else {}), **given}
    if config is not None or random_weights or model is None:
        if config is None or not random_weights or model is not None or fast:
            raise ValueError(
                "expected a trained model (mar-mini sample digits), or, without one and without "
                "--fast, a preset and the word that its weights are random (mar-mini sample "
                "--config mar_base --random-weights)"
            )
        labels = labels or (0,)
        pipeline = random_pipeline(config, len(labels), given, seed, bf16)
    else:
        pipeline = load_pretrained(model)
    if bf16:
        pipeline.mar.bfloat16()
    chosen = list(labels) or list(range(min(10, len(pipeline.classes))))
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(len(chosen))]
    steps = pipeline.sample(chosen, order=order, generator=generators, **settings)
    total = num_iter or pipeline.defaults.num_iter
    start = time.perf_counter()
    frames = list(tqdm(steps, total=total, desc="sampling", unit="step"))
    images = frames[-1].images()
    if random_weights:
        print(f"sampled in {time.perf_counter() - start:.1f} s; the picture is noise")
    titles = [pipeline.classes[label] for label in chosen]
    columns = min(8, len(images))
    figures.save_figure(figures.image_grid(images, columns=columns, titles=titles), out)
    print(f"wrote {out}: {', '.join(titles)}")
    if filmstrip is not None:
        figures.save_figure(figures.filmstrip(frames), filmstrip)
        print(f"wrote {filmstrip}: {titles[0]}, step by step")
    return 0


def random_pipeline(config: str, batch_size: int, given: dict, seed: int, bf16: bool):
    """A preset with random weights, once it is said what sampling it takes, and if that is there.

    given  settings of `sample`; what is missing is the preset's
    """
    import torch

    from mar_mini.checkpoints import untrained
    from mar_mini.configs import get_config
    from mar_mini.planner.memory import available_memory, plan_sampling
    from mar_mini.planner.report import measure_rates, si

    preset, dtype = get_config(config), "bfloat16" if bf16 else "float32"
    steps = {k: v for k, v in given.items() if k != "temperature"}
    memory, work = plan_sampling(preset, batch_size, dtype, available_memory(), **steps)
    seconds = sum(map(measure_rates(dtype).seconds, work.values()))
    print(
        f"{config} with random weights, a batch of {batch_size} in {dtype}: predicted "
        f"{seconds:.1f} s and {si(memory)}B"
    )
    start = time.perf_counter()
    pipeline = untrained(preset, seed, getattr(torch, dtype))
    print(f"built in {time.perf_counter() - start:.1f} s", flush=True)
    return pipeline
