"""The command line: `mar-mini ...` or `python -m mar_mini ...`."""

import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

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


def test(fast: bool = False) -> int:
    """Run style checks, notebooks and tests; --fast leaves out what takes long."""
    python = [sys.executable, "-m"]
    quick = ["-m", "not slow"] if fast else []
    steps = [
        [*python, "ruff", "check", "."],
        [*python, "codespell_lib", "."],
        [*python, "pytest", "-q", "--durations=8", *quick],
    ]
    if not fast:
        # the learners' notebooks as they are handed out: unsolved, from first cell to last
        nbval = ["--nbval-lax", "--nbval-cell-timeout=900", "-o", "filterwarnings=", "notebooks"]
        steps.insert(2, [*python, "pytest", "-q", *nbval, "--ignore=notebooks/solutions"])
    for command in steps:
        print("+", " ".join(command[1:]), flush=True)
        status = subprocess.call(command, cwd=REPO)
        if status:
            return status
    return 0


def train(
    config: str = "digits",
    out: Path | None = None,
    max_seconds: float | None = None,
    max_steps: int | None = None,
    data: str | None = None,
    seed: int = 0,
    compile: bool = False,
) -> int:
    """Train a preset and save the model, its card and a grid of samples in a folder.

    Args:
        config: name of the preset.
        out: folder for the model; build/NAME by default.
        max_seconds: budget of the MAR in seconds; the preset's by default.
        max_steps: budget of the MAR in steps instead.
        data: bundled images or a folder with train.parquet; the preset's by default.
        seed: decides everything that is random.
        compile: compile the model first, which takes up to a minute.
    """
    from mar_mini.configs import get_config
    from mar_mini.data import class_names, load_images, normalise, to_tensors
    from mar_mini.recipes import train_pipeline, trainable
    from mar_mini.viz.figures import image_grid, save_figure

    preset = get_config(config)
    trainable(preset)
    if max_seconds is not None or max_steps is not None:
        budget = replace(preset.training, max_seconds=max_seconds, max_steps=max_steps)
        preset = replace(preset, training=budget)
    if compile:
        preset = compiled(preset)
    dataset = load_images(data or preset.data, "train")
    images, labels = to_tensors(dataset)
    folder = out or REPO / "build" / preset.name
    steps = train_pipeline(preset, normalise(images), labels, class_names(dataset), seed=seed)
    pipeline = with_progress(steps)
    pipeline.save(folder, preset)
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


def with_progress(steps):
    """Run a training generator to its end behind a progress bar; return what it returns."""
    from tqdm import tqdm

    bar = stage = None
    while True:
        try:
            stage_now, step = next(steps)
        except StopIteration as end:
            bar.close()
            return end.value
        if stage_now != stage:
            if bar is not None:
                bar.close()
            stage = stage_now
            bar = tqdm(total=100, bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}")
            bar.set_description_str(f"training the {stage}")
        bar.n = round(100 * step.progress)
        rate, left = step.images_seen / step.seconds, step.seconds * (1 / step.progress - 1)
        bar.set_postfix_str(f"loss {step.loss:.3f}, {rate:.0f} images/s, {left:.0f} s left")


def sample(
    model: Annotated[str, tyro.conf.Positional],
    labels: tuple[int, ...] = (),
    out: Path = Path("samples.png"),
    num_iter: int | None = None,
    num_sampling_steps: int | None = None,
    cfg: float | None = None,
    temperature: float | None = None,
    order: str = "random",
    seed: int = 0,
    fast: bool = False,
) -> int:
    """Sample images of the classes asked for and write them as one PNG.

    Args:
        model: bundled model, or a folder that `train` wrote.
        labels: one class an image; all classes once by default.
        out: the PNG.
        num_iter: autoregressive steps; this and the next three are the model's defaults if left
            out.
        num_sampling_steps: diffusion steps.
        cfg: guidance weight, 1 for none.
        temperature: scale of the injected noise.
        order: order of the tokens, by name.
        seed: decides everything that is random.
        fast: approximate, several times faster; benchmarks/README.md says what it costs.
    """
    import torch
    from tqdm import tqdm

    from mar_mini.checkpoints import load_pretrained
    from mar_mini.sampling import FAST
    from mar_mini.viz.figures import image_grid, save_figure

    pipeline = load_pretrained(model)
    given = {
        "num_iter": num_iter, "num_sampling_steps": num_sampling_steps, "cfg": cfg,
        "temperature": temperature,
    }  # fmt: skip
    given = {k: v for k, v in given.items() if v is not None}
    settings = {**asdict(pipeline.defaults), **(FAST if fast else {}), **given}
    chosen = list(labels) or list(range(len(pipeline.classes)))
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(len(chosen))]
    frames = pipeline.sample(chosen, order=order, generator=generators, **settings)
    for frame in tqdm(frames, total=settings["num_iter"], desc="sampling", unit="step"):
        images = frame.images() if not frame.mask.any() else None
    titles = [pipeline.classes[label] for label in chosen]
    save_figure(image_grid(images, columns=min(10, len(images)), titles=titles), out)
    print(f"wrote {out}: {', '.join(titles)}")
    return 0


def main() -> None:
    """Run one command; a message instead of a traceback for input that cannot be right."""
    commands = {
        "course": course, "lab": lab, "lab-reset": lab_reset, "test": test, "train": train,
        "sample": sample,
    }  # fmt: skip
    try:
        status = tyro.extras.subcommand_cli_from_dict(commands, prog="mar-mini")
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"mar-mini: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status)
