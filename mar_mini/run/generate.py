"""Images sampled by a model: a few as one picture, or many, each of its own seed, to be judged."""

import io
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from typing_extensions import Unpack

from mar_mini import load_pretrained
from mar_mini.checkpoints import Pipeline, untrained
from mar_mini.configs import get_config
from mar_mini.data import step_generator
from mar_mini.fast import FAST
from mar_mini.run.distributed import own_device
from mar_mini.run.parts import claim, fill, parse_part, pieces, read_card, weights_checksum

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
    """Generate images into a folder, as `parts.fill` does.

    Image i is of class i modulo the number of classes, and all that is random in it follows from
    (seed, i). So the set is the same for any number of parts and any batch size, but for rounding.

    png         a file for each image instead of parquet files with `image` and `label`
    **settings  arguments of `sample`, the pipeline's defaults else

    Raises ValueError if the folder holds other images, or for settings that mean nothing.
    """
    folder, ranges = Path(folder), pieces(count, shard_size)
    models = {"mar": pipeline.mar, **({"vae": pipeline.vae} if pipeline.vae else {})}
    identity = {
        "model": weights_checksum(nn.ModuleDict(models)),
        "count": count,
        "seed": seed,
        "png": png,
        "shard_size": shard_size,
        "clip": pipeline.clip,
        "settings": {**asdict(pipeline.defaults), **settings},
    }
    claim(folder / IDENTITY, "images", identity)

    def files(number: int) -> list[Path]:
        if png:
            return [folder / f"{i:06d}.png" for i in ranges[number]]
        return [folder / f"train-{number:05d}-of-{len(ranges):05d}.parquet"]

    def make(number: int) -> Iterator[int]:
        stored: list[bytes] = []
        for first in range(0, len(ranges[number]), batch_size):
            batch = ranges[number][first : first + batch_size]
            labels = [i % len(pipeline.classes) for i in batch]
            generators = [step_generator(seed, i) for i in batch]
            images = pipeline.generate(labels, generator=generators, **settings)
            stored += map(encode_png, images)
            yield len(batch)
        if png:
            return [lambda path, data=data: path.write_bytes(data) for data in stored]
        return [partial(write_parquet, stored, ranges[number], pipeline.classes)]

    yield from fill(ranges, part, files, make)


def encode_png(image: Float[Tensor, "C H W"]) -> bytes:
    pixels = (image * 255).round().byte().cpu().permute(1, 2, 0).squeeze(-1)  # (H, W[, 3])
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png")
    return file.getvalue()


def write_parquet(stored: list[bytes], indices: range, classes: list[str], path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    named = zip(stored, indices, strict=True)
    rows = {
        "image": [{"bytes": data, "path": f"{i:06d}.png"} for data, i in named],
        "label": [i % len(classes) for i in indices],
    }
    table = pa.Table.from_pydict(rows, schema=datasets.Features(kinds).arrow_schema)
    pq.write_table(table, path, write_page_checksum=True, row_group_size=100)


def check_complete(folder: Path, number: int) -> None:
    """Raises ValueError if fewer images are there than were asked for; other folders are fine."""
    path = folder / IDENTITY
    if path.is_file() and number != (count := read_card(path)["count"]):
        raise ValueError(
            f"{number:,} of {count:,} images are in {folder}; give the command that generates them "
            "again, or that of the missing part"
        )


class Settings(TypedDict, total=False):
    """Of `sample`; those of the model if left out."""

    num_iter: int  # autoregressive steps
    num_sampling_steps: int  # diffusion steps
    cfg: float  # guidance weight, 1 for none
    temperature: float  # scale of the injected noise


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
    fast: bool = False,
    **settings: Unpack[Settings],
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
        fast: approximate, several times faster; benchmarks/README.md says what it costs.
    """
    from tqdm import tqdm

    settings = {**(FAST if fast else {}), **settings}
    pipeline, mine = load_pretrained(model), parse_part(part)
    for network in filter(None, (pipeline.mar, pipeline.vae)):
        network.to(own_device())
    sizes = {"batch_size": batch_size, "shard_size": shard_size}
    steps = write_images(pipeline, out, count, part=mine, seed=seed, png=png, **sizes, **settings)
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
    order: str = "random",
    seed: int = 0,
    fast: bool = False,
    config: str | None = None,
    random_weights: bool = False,
    bf16: bool = False,
    **settings: Unpack[Settings],
) -> int:
    """Sample images of the classes asked for and write them as one PNG.

    Args:
        model: bundled model, mar_base, mar_large or mar_huge (fetched once), or a folder that
            `train` or `convert` wrote; or none, but --config and --random-weights.
        labels: one class an image; the first ten classes by default, with random weights the first.
        out: the PNG.
        filmstrip: another PNG: the first of them, growing token by token.
        order: order of the tokens, by name.
        seed: decides everything that is random.
        fast: approximate, several times faster; benchmarks/README.md says what it costs.
        config: instead of a model, a preset, whose weights are random.
        random_weights: yes, they are, and what comes out is noise: it shows what sampling takes.
        bf16: weights and products in bfloat16, in half of the memory.
    """
    from tqdm import tqdm

    from mar_mini.viz import figures

    settings = {**(FAST if fast else {}), **settings}
    if config is None and model is not None and not random_weights:
        pipeline = load_pretrained(model)
    elif config is None or not random_weights or model is not None or fast:
        raise ValueError(
            "expected a trained model (mar-mini sample digits), or, without one and without "
            "--fast, a preset and the word that its weights are random (mar-mini sample "
            "--config mar_base --random-weights)"
        )
    else:
        labels = labels or (0,)
        pipeline = random_pipeline(config, len(labels), settings, seed, bf16)
    if bf16:
        pipeline.mar.bfloat16()
    asked = list(labels) or list(range(min(10, len(pipeline.classes))))
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(len(asked))]
    steps = pipeline.sample(asked, order=order, generator=generators, **settings)
    total, start = settings.get("num_iter", pipeline.defaults.num_iter), time.perf_counter()
    frames = list(tqdm(steps, total=total, desc="sampling", unit="step"))
    images = frames[-1].images()
    if random_weights:
        print(f"sampled in {time.perf_counter() - start:.1f} s; the picture is noise")
    titles = [pipeline.classes[label] for label in asked]
    grid = figures.image_grid(images, columns=min(8, len(images)), titles=titles)
    figures.save_figure(grid, out)
    print(f"wrote {out}: {', '.join(titles)}")
    if filmstrip is not None:
        figures.save_figure(figures.filmstrip(frames), filmstrip)
        print(f"wrote {filmstrip}: {titles[0]}, step by step")
    return 0


def random_pipeline(
    config: str, batch_size: int, settings: dict, seed: int, bf16: bool
) -> Pipeline:
    """A preset with random weights, once it is said what sampling takes and if that is there."""
    from mar_mini.planner.memory import available_memory, plan_sampling
    from mar_mini.planner.report import measure_rates, si

    preset, dtype = get_config(config), "bfloat16" if bf16 else "float32"
    steps = {k: v for k, v in settings.items() if k != "temperature"}
    memory, work = plan_sampling(preset, batch_size, dtype, available_memory(), **steps)
    seconds = sum(map(measure_rates(dtype).seconds, work.values()))
    what = f"{config} with random weights, a batch of {batch_size} in {dtype}"
    print(f"{what}: predicted {seconds:.1f} s and {si(memory)}B")
    start = time.perf_counter()
    pipeline = untrained(preset, seed, getattr(torch, dtype))
    print(f"built in {time.perf_counter() - start:.1f} s", flush=True)
    return pipeline
