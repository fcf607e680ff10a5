"""From images to a trained pipeline: the autoencoder where there is one, latents, then the MAR."""

import json
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mar_mini.checkpoints import Pipeline, save_weights
from mar_mini.configs import Config, MARConfig
from mar_mini.data import Images, InMemory
from mar_mini.files import write_atomically
from mar_mini.mar import MAR
from mar_mini.run.distributed import Alone
from mar_mini.run.state import Checkpoints, History, resumable
from mar_mini.sampling import evaluating
from mar_mini.training import ALONE, Step, Training, train_on, train_vae
from mar_mini.vae import AutoencoderKL, latent_scale


def train_pipeline(
    config: Config,
    images: Float[Tensor, "N C H W"],
    labels: Int[Tensor, " N"],
    classes: list[str],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    processes: Alone = ALONE,
    save_every: float = 120.0,
) -> Iterator["Progress"]:
    """Train a preset; yields `Progress` and returns a `Pipeline` with the averaged weights.

    images  (N, C, H, W) float in [-1, 1], of the size that the preset was made for
    labels  (N,) int64, indices into `classes`
    folder  where checkpoints are kept; what is there already is continued (see `runs`)

    processes   that train the MAR together; they need a trained autoencoder in the folder
    save_every  seconds between two checkpoints

    Raises ValueError if the images or classes do not fit the preset, or the checkpoints not the
    run, or the autoencoder is missing; `runs.Interrupted` after Ctrl-C, with everything saved.
    """
    mar_config = trainable(config)
    check_classes(config, classes)
    if images.shape[-1] != mar_config.img_size or images.shape[-2] != mar_config.img_size:
        raise ValueError(
            f"images are {tuple(images.shape)}; preset {config.name!r} is made for "
            f"{mar_config.img_size}x{mar_config.img_size} pixels, so resize or crop them"
        )
    return stages(config, images, labels, classes, seed, device, folder, processes, save_every)


def train_latents(
    config: Config,
    latents: Images,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    processes: Alone = ALONE,
    save_every: float = 120.0,
) -> Iterator["Progress"]:
    """Train the MAR of a preset on latents that were encoded before; else as `train_pipeline`.

    latents  a `latents.LatentShards`, or what knows the same of itself

    Raises ValueError, at once, if the latents or their classes do not fit the preset.
    """
    if config.mar is None:
        raise ValueError(f"preset {config.name!r} has no MAR to train; choose one that has")
    side = config.mar.img_size // config.mar.vae_stride
    expected = (config.mar.vae_embed_dim, side, side)
    if latents.shape != expected:
        raise ValueError(
            f"latents are {latents.shape}; preset {config.name!r} is made for {expected}; encode "
            f"pictures of {config.mar.img_size} pixels by its autoencoder"
        )
    check_classes(config, latents.classes)
    vae, vae_config = latents.autoencoder()
    config = replace(config, vae=vae_config, vae_training=None)
    torch.manual_seed(seed)
    pipeline = partial(
        Pipeline,
        vae=vae and vae.to(device),
        latent_scale=latents.latent_scale,
        clip=latents.clip,
        classes=list(latents.classes),
        defaults=config.sampling,
    )
    run = Run(config, latents.checksum, seed, device, folder, processes, save_every)
    return masked(run, latents, pipeline)


def check_classes(config: Config, classes: list[str]) -> None:
    if len(classes) != config.mar.class_num:
        raise ValueError(
            f"{len(classes)} classes, but preset {config.name!r} is made for {config.mar.class_num}"
        )


def trainable(config: Config) -> MARConfig:
    """The preset's MAR. Raises ValueError if it has none, or no recipe for its autoencoder."""
    if config.mar is None:
        raise ValueError(f"preset {config.name!r} has no MAR to train; choose one that has")
    if config.vae is not None and config.vae_training is None:
        raise ValueError(f"preset {config.name!r} does not say how to train its autoencoder")
    return config.mar


class Progress(NamedTuple):
    """Where a training is: which stage, its last step, and what a model of that stage would make.

    pipeline  a MAR -> the `Pipeline` with it, to look at its samples; None while there is none
    """

    stage: str
    step: Step
    pipeline: Callable[[MAR], Pipeline] | None = None


AUTOENCODER, MASKED = "autoencoder", "masked autoregressive model"


@dataclass(frozen=True)
class Run:
    """What the stages of a training have in common; `data` tells one data set from another."""

    config: Config
    data: object
    seed: int
    device: torch.device | str
    folder: Path | None
    processes: Alone
    save_every: float

    def identity(self, training: Training, stage: str) -> dict:
        """What a checkpoint must have in common with the run to be continued."""
        config = self.config
        models = {"vae": config.vae and asdict(config.vae)}
        if stage == MASKED:
            models["mar"] = asdict(config.mar)
        return {
            "stage": stage,
            "data": self.data,
            "seed": self.seed,
            **models,
            **settings(training),
        }

    def steps(self, training: Training, stage: str) -> Iterator[Step]:
        """Those of a training; with a folder from its last checkpoint on."""
        from mar_mini.run.sharded import open_checkpoints

        together = stage == MASKED or self.processes.count == 1
        if self.folder is None and together:
            return training
        place, identity = (self.folder or Path()) / stage.split()[0], self.identity(training, stage)
        if together:
            checkpoints = open_checkpoints(place, identity, self.processes)
            return resumable(training, checkpoints, self.save_every)
        if place.is_dir():
            Checkpoints(place, identity).restore(training)
        if training.used < 1:
            raise ValueError(
                f"there is no trained autoencoder in {place}: one process trains it, so give the "
                "command without torchrun, until it says that it trains the MAR"
            )
        return training


def stages(config, images, labels, classes, seed, device, folder, processes, save_every):
    """The stages of `train_pipeline`, one after the other: yields `Progress`."""
    torch.manual_seed(seed)
    vae, mirrored, scale, clip = None, None, 1.0, config.sampling.clip
    latents, data = images, zlib.crc32(images.contiguous().numpy())
    run = Run(config, data, seed, device, folder, processes, save_every)
    if config.vae is not None:
        vae = AutoencoderKL(**asdict(config.vae)).to(device)
        if vae.linear_path:
            vae.start_linear(images[:2000].to(device))
        training = train_vae(vae, images, config.vae_training, seed=seed)
        for step in run.steps(training, AUTOENCODER):
            yield Progress(AUTOENCODER, step)
        vae = training.ema.module.eval()
        latents, mirrored = encode(vae, images), encode(vae, images.flip(-1))
        scale = latent_scale(latents)
        latents, mirrored = latents * scale, mirrored * scale
        clip = float(latents.abs().max())
    pipeline = partial(
        Pipeline,
        vae=vae,
        latent_scale=scale,
        clip=clip,
        classes=list(classes),
        defaults=config.sampling,
    )
    return (yield from masked(run, InMemory(latents.to(device), labels, mirrored), pipeline))


def masked(run: Run, images: Images, pipeline: Callable[..., Pipeline]) -> Iterator[Progress]:
    """The stage that trains the MAR: yields `Progress`, returns the pipeline."""
    config = run.config
    mar = MAR(**asdict(config.mar)).to(run.device)
    training = train_on(mar, images, config.training, seed=run.seed, processes=run.processes)
    for step in run.steps(training, MASKED):
        yield Progress(MASKED, step, pipeline)
    card = {
        "steps": training.step,
        "seconds": round(training.seconds, 1),
        "seed": run.seed,
        "images_seen": training.step * config.training.batch_size,
        "device": hardware(run.device),
        "torch": torch.__version__,
        "commit": commit(),
        "training": asdict(config.training),
    }
    if run.processes.count > 1:
        card["processes"] = run.processes.count
    if config.vae_training is not None:
        card["vae_training"] = asdict(config.vae_training)
    return pipeline(averaged(training, config), card=card)


def averaged(training: Training, config: Config) -> MAR:
    """The MAR with averaged weights, whole; all processes have to ask for it together."""
    if type(training.processes) is Alone:
        return training.ema.module.eval()
    mar = MAR(**asdict(config.mar)).eval()
    state = training.ema.module.state_dict()
    mar.load_state_dict({name: training.processes.whole(x).cpu() for name, x in state.items()})
    return mar


# shares of a run at which samples are looked at, closer together where more happens
MOMENTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def recorded(
    run: Iterator[Progress], folder: Path, moments: tuple[float, ...] = MOMENTS
) -> Iterator[Progress]:
    """A `train_pipeline` that leaves its course in a folder; yields and returns what that does.

    history_STAGE.json  means of all terms, about 200 rows a stage, see `runs.History`
    moments/, grids/    at some shares of the MAR's budget: averaged and raw weights (bfloat16), and
                        samples of both, from the same seeds
    vae.safetensors     the autoencoder, as soon as it is trained

    The card of the pipeline gets the losses of the last row.
    """
    history, stage = None, None
    while True:
        try:
            progress = next(run)
        except StopIteration as end:
            if history is not None:
                last, terms = history.rows[-1], ("loss", "mse", "vb")
                end.value.card["losses"] = {name: round(last[name], 4) for name in terms}
            return end.value
        if progress.stage != stage:
            stage = progress.stage
            history = History(folder / f"history_{stage.split()[0]}.json")
        step, before = progress.step, history.rows[-1]["progress"] if history.rows else 0.0
        if history.add(step):
            history.save()
            if stage == MASKED and any(before < m <= step.progress for m in moments):
                keep_moment(progress, folder)
        if stage == AUTOENCODER and step.progress == 1.0:
            save_weights(step.ema, folder / "vae.safetensors", torch.bfloat16)
        yield progress


def keep_moment(progress: Progress, folder: Path) -> None:
    """Averaged and raw weights of one step, and 64 samples of both from the same seeds."""
    step = progress.step
    for name, model in (("average", step.ema), ("raw", step.model)):
        pipeline = progress.pipeline(model)
        labels = torch.arange(64) % len(pipeline.classes)
        images = pipeline.generate(labels, generator=torch.Generator().manual_seed(0))
        save_sheet(images, folder / "grids" / f"{name}-{step.step:07d}.png")
        weights = folder / "moments" / f"{name}-{step.step:07d}.safetensors"
        weights.parent.mkdir(exist_ok=True)
        save_weights(model, weights, torch.bfloat16)


def save_sheet(images: Float[Tensor, "N C H W"], path: Path, columns: int = 8) -> None:
    """Images in [0, 1] as one PNG, pixel for pixel, row after row."""
    rows = images.expand(-1, 3, -1, -1).unflatten(0, (-1, columns))  # (R, K, 3, H, W)
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (R * H, K * W, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((sheet * 255).round().byte().cpu().numpy().astype(np.uint8))
    write_atomically(path, lambda temporary: picture.save(temporary, format="png"))


def hardware(device: torch.device | str) -> str:
    """What a training ran on, for its card."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit of the code, where it is a git repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def settings(training: Training) -> dict:
    """What a run must have in common with its checkpoints: what its losses depend on.

    Not the budget, which may grow.
    """
    free = ("max_steps", "max_seconds", "accumulate")
    return {k: v for k, v in asdict(training.config).items() if k not in free}


@torch.no_grad()
def encode(
    vae: AutoencoderKL, images: Float[Tensor, "N C H W"], batch_size: int = 250
) -> Float[Tensor, "N D H2 W2"]:
    """The means of the latents of many images, unscaled, a batch at a time."""
    device = next(vae.parameters()).device
    with evaluating(vae):
        return torch.cat([vae.encode(x.to(device)).mode() for x in images.split(batch_size)])


# The command -------------------------------------------------------------------------------------


def train(
    what: Literal["mar", "vae"] = "mar",
    *,
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
    from mar_mini.run.images import open_images
    from mar_mini.run.latents import LatentShards
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
    folder = out or Path("build") / preset.name
    common = {"seed": seed, "device": device, "folder": folder / "state"}
    if latents is not None:
        encoded = LatentShards(latents)
        steps = train_latents(preset, encoded, **common)
        preset = replace(preset, vae=encoded.autoencoder()[1])
        origin = {"data": str(latents), "data_crc32": encoded.checksum}
    else:
        images = open_images(data or preset.data, "train", side)
        steps = train_pipeline(
            preset, normalise(images.images), images.labels, images.classes, **common
        )
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
