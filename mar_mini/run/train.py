"""From images to a trained pipeline: the autoencoder where there is one, latents, then the MAR.

mar-mini train --config digits
torchrun --nproc-per-node=8 -m mar_mini train --config mar_base --latents LATENTS --out OUT
"""

import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mar_mini.checkpoints import Pipeline, save_weights
from mar_mini.configs import Config, for_batch_size, get_config
from mar_mini.data import Images, InMemory, normalise
from mar_mini.fast import speed_up
from mar_mini.files import write_atomically
from mar_mini.mar import MAR
from mar_mini.planner.memory import check_fits, largest_batch, parameters, training_memory
from mar_mini.run.distributed import in_all, join, own_device
from mar_mini.run.images import ImageSet, open_images
from mar_mini.run.latents import LatentShards
from mar_mini.run.state import Checkpoints, History, Interrupted, resumable
from mar_mini.training import Step, Terms, Training, mar_terms, multiplies_bf16, vae_terms
from mar_mini.vae import AutoencoderKL, latent_scale

AUTOENCODER, MASKED = "autoencoder", "masked autoregressive model"
# shares of a run at which weights and samples are kept, closer together where more happens
MOMENTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SMALL = 50_000_000  # parameters up to which they are kept without being asked for
ROOM = 0.9  # share of a device's memory that a plan fills: allocators leave gaps
GO_ON = 75  # exit status "temporary failure": a part has ended, the run has not
# what may change when a run goes on: its budget, and how a step is cut to fit into memory
FREE = {"max_steps", "max_seconds", "accumulate", "grad_checkpointing"}


class Progress(NamedTuple):
    """A stage, its last step, and MAR -> the `Pipeline` that has it; None for an autoencoder."""

    stage: str
    step: Step
    pipeline: Callable[[MAR], Pipeline] | None = None


@dataclass(eq=False)
class TrainingRun(Iterator[Progress]):
    """A preset's training: yields `Progress`; then `pipeline` has the averaged weights.

    images    an `ImageSet`, or latents that were encoded before (`latents.LatentShards`)
    folder    of checkpoints, from the last of which it goes on
    what      "vae" trains the autoencoder alone; then there is no pipeline
    kind      `Training`, or that of several processes, see `distributed.join`
    compiled  compile models first: a minute of warm-up, the same results up to rounding

    `save_every` and `until` are those of `state.resumable`. Raises ValueError if the images do not
    fit the preset, or the checkpoints not the run; `state.Interrupted` after Ctrl-C.
    """

    config: Config
    images: ImageSet | Images
    _: KW_ONLY
    seed: int = 0
    device: torch.device | str = "cpu"
    folder: Path | None = None
    what: str = "mar"
    kind: type[Training] = Training
    compiled: bool = False
    save_every: float = 120.0
    until: float | None = None

    def __post_init__(self):
        self.pipeline, self.vae, encoded = None, None, not isinstance(self.images, ImageSet)
        check_preset(self.config, encoded)
        check_images(self.config, self.images)
        if encoded:
            self.vae, vae_config = self.images.autoencoder()
            self.config = replace(self.config, vae=vae_config, vae_training=None)
        self.stages = self.take_stages()

    def __next__(self) -> Progress:
        return next(self.stages)

    def take_stages(self) -> Iterator[Progress]:
        """Train the autoencoder, encode the images, train the MAR."""
        config, images, device, scale = self.config, self.images, self.device, 1.0
        torch.manual_seed(self.seed)
        if not isinstance(images, ImageSet):
            latents, scale, clip = images, images.latent_scale, images.clip
        else:
            pixels, mirrored, clip = normalise(images.images), None, config.sampling.clip
            if config.vae is not None:
                vae = AutoencoderKL(**asdict(config.vae)).to(device)
                if vae.linear_path:
                    vae.start_linear(pixels[:2000].to(device))
                seen = InMemory(pixels.to(device), images.labels)
                yield from self.train(AUTOENCODER, vae, seen, vae_terms)
                self.vae = self.training.ema.module.eval()
                if self.what == "vae":
                    return
                pixels, mirrored = encode(self.vae, pixels), encode(self.vae, pixels.flip(-1))
                scale = latent_scale(pixels)
                pixels, mirrored = pixels * scale, mirrored * scale
                clip = float(pixels.abs().max())
            latents = InMemory(pixels.to(device), images.labels, mirrored)
        vae, classes = self.vae and self.vae.to(device), list(images.classes)
        pipeline = partial(
            Pipeline,
            vae=vae,
            latent_scale=scale,
            clip=clip,
            classes=classes,
            defaults=config.sampling,
        )
        mar = MAR(**asdict(config.mar)).to(device)
        yield from self.train(MASKED, mar, latents, mar_terms, pipeline)
        average = MAR(**asdict(config.mar)).to(device).eval()
        whole = StateDictOptions(full_state_dict=True)  # of a model in shards too
        average.load_state_dict(get_model_state_dict(self.training.ema.module, options=whole))
        self.pipeline = pipeline(average, card=self.card())

    def train(
        self, stage: str, model: nn.Module, images: Images, terms: Terms, pipeline=None
    ) -> Iterator[Progress]:
        """Train one model, with a folder from its last checkpoint on."""
        config, kind, settings = self.config, self.kind, self.config.training
        models = [config.vae, config.mar]
        if stage == AUTOENCODER:
            kind, settings, models = Training, config.vae_training, [config.vae]
        speed_up(model, self.compiled)
        steps = self.training = kind(model, images, terms, settings, self.seed)
        if self.folder is not None:
            # what the losses depend on, and a checkpoint has in common with the run
            identity = {"stage": stage, "data": self.images.checksum, "seed": self.seed}
            for part in filter(None, (settings, *models)):
                identity |= {k: v for k, v in asdict(part).items() if k not in FREE}
            checkpoints = Checkpoints(self.folder / stage.split()[0], identity)
            steps = resumable(self.training, checkpoints, self.save_every, self.until)
        for step in steps:
            if kind is not self.kind:
                raise ValueError(
                    f"there is no trained autoencoder in {self.folder}: one process trains it, so "
                    "give the command without torchrun, with `train vae`, first"
                )
            yield Progress(stage, step, pipeline)

    def card(self) -> dict:
        """How the MAR was trained, for people."""
        config, training, device = self.config, self.training, torch.device(self.device)
        here = shlex.quote(str(Path(__file__).parent))
        failed, commit = subprocess.getstatusoutput(f"git -C {here} rev-parse --short HEAD")
        return {
            "steps": training.step,
            "seconds": round(training.seconds, 1),
            "seed": self.seed,
            "images_seen": training.step * config.training.batch_size,
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads",
            "processes": training.world_size,
            "torch": torch.__version__,
            "commit": None if failed else commit,
            "training": asdict(config.training),
            "vae_training": config.vae_training and asdict(config.vae_training),
        }


def check_preset(config: Config, encoded: bool) -> None:
    """Raises ValueError if the preset cannot be trained on images, or on encoded latents."""
    if config.mar is None:
        raise ValueError(f"preset {config.name!r} has no MAR to train; choose one that has")
    if config.vae and not config.vae_training and not encoded:
        how = "encode pictures with `mar-mini latents` and give --latents"
        raise ValueError(f"preset {config.name!r} has no recipe for its autoencoder; {how}")


def check_images(config: Config, images: ImageSet | Images) -> None:
    """Raises ValueError if the images or latents do not fit the preset."""
    mar, made_for = config.mar, f"preset {config.name!r} is made for"
    size, side = f"{mar.img_size}x{mar.img_size} pixels", mar.img_size // mar.vae_stride
    if not isinstance(images, ImageSet):
        if images.shape != (latent := (mar.vae_embed_dim, side, side)):
            how = f"encode pictures of {size} by its autoencoder"
            raise ValueError(f"latents are {images.shape}; {made_for} {latent}; {how}")
    elif images.images.shape[2:] != (mar.img_size, mar.img_size):
        got = tuple(images.images.shape)
        raise ValueError(f"images are {got}; {made_for} {size}, so resize or crop them")
    if len(images.classes) != mar.class_num:
        raise ValueError(f"{len(images.classes)} classes, but {made_for} {mar.class_num}")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Means of the latents of many images, unscaled, 250 at a time."""
    device = next(vae.parameters()).device
    return torch.cat([vae.encode(x.to(device)).mode() for x in images.split(250)])


# The command --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainOptions:
    """How `train` trains; what is None is the preset's own."""

    config: str = "digits"  # name of the preset
    # what to train on: a bundled name, cifar10, imagenette64 (fetched with `mar-mini data`),
    # imagefolder:PATH, or a folder with train.parquet
    data: str | None = None
    latents: Path | None = None  # train the MAR on what `mar-mini latents` wrote instead
    out: Path | None = None  # folder for the model; build/NAME if left out
    max_minutes: float | None = None  # budget of the MAR, or with `vae` of the autoencoder
    max_seconds: float | None = None  # the same in seconds
    max_steps: int | None = None  # the same in steps
    vae_minutes: float | None = None  # budget of the autoencoder that comes first
    vae_steps: int | None = None  # the same in steps
    # of all processes together; on latents the learning rate and the number of steps follow it
    batch_size: int | None = None
    learning_rate: float | None = None  # after the warm-up
    precision: Literal["auto", "float32", "bf16"] | None = None  # auto: bf16 where it is faster
    accumulate: int | None = None  # micro batches of a step; on a GPU as few as fit if left out
    checkpoint_activations: bool = False  # less memory; on a GPU done anyway if nothing else fits
    memory_gb: float | None = None  # of each device, to plan with; free memory of a GPU if left out
    strategy: Literal["ddp", "fsdp"] = "ddp"  # each process has the whole model, or a shard of it
    device: str = "auto"  # auto, cpu or cuda
    compile: bool = False  # compile models first, which takes up to a minute
    seed: int = 0  # decides everything that is random
    save_minutes: float = 2.0  # time between two checkpoints
    part_minutes: float | None = None  # stop after so long; exit status 75: give the command again
    samples: bool = True  # sample on the way and at the end, which takes long for large models
    moments: bool = False  # keep weights on the way, as small models (up to 50 million) do anyway
    tensorboard: bool = False  # write the losses for TensorBoard as well (if it is installed)


def train(what: Literal["mar", "vae"] = "mar", *, options: TrainOptions = TrainOptions()) -> int:
    """Train a preset and save the model, its card and a grid of samples in a folder.

    What was begun in that folder is continued, to the same bits on the same kind of CPU. Ctrl-C
    saves and says how to go on. Under torchrun each process computes some rows of every batch.

    Args:
        what: mar, with the autoencoder first where the preset has one; or vae, that alone.
    """
    minutes = options.part_minutes
    until = None if minutes is None else time.monotonic() + 60 * minutes
    config, device = configured(what, options), own_device(options.device)
    if options.tensorboard and not find_spec("tensorboard"):
        raise ValueError("TensorBoard is not installed; run: pip install tensorboard")
    out = Path(options.out or Path("build") / config.name)
    with join(options.strategy, device) as kind:
        rank = dist.get_rank() if dist.is_initialized() else 0
        if what == "mar":
            config = planned(config, options, device)
        if options.latents is not None:
            images, source, checksum = LatentShards(options.latents), options.latents, "data_crc32"
        else:
            source, checksum = options.data or config.data, "data_md5"
            images = open_images(source, "train", config.mar.img_size)
        how = {"seed": options.seed, "compiled": options.compile, "what": what, "kind": kind}
        how |= {"save_every": 60 * options.save_minutes, "until": until, "folder": out / "state"}
        run = TrainingRun(config, images, device=device, **how)
        small = options.samples and parameters(config) <= SMALL
        keep = kind is Training and (small or options.moments)  # else others would wait for it
        try:
            if rank == 0:
                watch(run, out, MOMENTS if keep else (), options.tensorboard)
            deque(run, maxlen=0)
        except Interrupted as stopped:
            if minutes is None:
                raise
            print(stopped)
            return GO_ON
    if rank == 0 and what == "vae":
        print(f"saved in {out}: vae.safetensors; next: mar-mini train mar --config {config.name}")
    elif rank == 0:
        command = shlex.join(["mar-mini", *sys.argv[1:]])
        run.pipeline.card |= {"data": str(source), checksum: images.checksum, "command": command}
        run.pipeline.save(out, run.config)
        if options.samples:
            from mar_mini.viz.figures import image_grid, save_figure

            grid = run.pipeline.generate([i % len(images.classes) for i in range(40)])
            save_figure(image_grid(grid, columns=10), out / "samples.png")
        made = "config.json, mar.safetensors" + ", samples.png" * options.samples
        print(f"saved in {out}: {made}")
    return 0


def configured(what: str, options: TrainOptions) -> Config:
    """The preset with what the options change. Raises ValueError if it cannot be trained so."""
    config, encoded = get_config(options.config), options.latents is not None
    check_preset(config, encoded)
    if what == "vae" and encoded:
        raise ValueError("latents are what an autoencoder made; train it on --data")
    if what == "vae" and not config.vae:
        raise ValueError(f"preset {config.name!r} has no autoencoder; its tokens are pixels")
    if encoded and options.batch_size is not None:
        config = replace(config, training=for_batch_size(config.training, options.batch_size))
    names = ("batch_size", "learning_rate", "precision", "accumulate")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    own, minutes = f"{'vae_' * (what == 'vae')}training", options.max_minutes
    own_seconds = options.max_seconds if minutes is None else 60 * minutes
    vae_seconds = options.vae_minutes and 60 * options.vae_minutes
    for stage, steps, seconds, changes in (
        ("vae_training", options.vae_steps, vae_seconds, {}),
        (own, options.max_steps, own_seconds, given),
    ):
        if steps is not None or seconds is not None:
            changes |= {"max_steps": steps, "max_seconds": seconds}
        if training := getattr(config, stage):
            config = replace(config, **{stage: replace(training, **changes)})
    return config


def planned(config: Config, options: TrainOptions, device: torch.device) -> Config:
    """The preset with its step cut into the fewest micro batches that fit into each device.

    A CPU is not planned for, unless the options say what it has. Raises ValueError, with what would
    fit, before a run that cannot.
    """
    memory, training = options.memory_gb and 1e9 * options.memory_gb, config.training
    if memory is None and device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    known, precision = in_all(lambda rank, size: memory), training.precision
    if None in known:
        mar = replace(config.mar, grad_checkpointing=options.checkpoint_activations)
        return replace(config, mar=mar)
    if precision == "auto" and not multiplies_bf16(device):
        precision = "float32"
    dtype = "float32" if precision == "float32" else "bfloat16"
    processes, memory = len(known), ROOM * min(known)
    sharded = options.strategy == "fsdp"
    share = max(1, training.batch_size // processes)
    cuts = [n for n in range(1, share + 1) if share % n == 0 and n == (options.accumulate or n)]
    for checkpointing in (True,) if options.checkpoint_activations else (False, True):
        mar = replace(config.mar, grad_checkpointing=checkpointing)
        need = training_memory(mar, 16, dtype=dtype, shards=processes if sharded else 1)
        most = largest_batch(need, 16, memory)
        if fitting := [cut for cut in cuts if share // cut <= most]:
            return replace(config, mar=mar, training=replace(training, accumulate=fitting[0]))
    how = {"precision": precision, "world_size": processes, "strategy": options.strategy}
    check_fits(config, share // training.accumulate, memory, **how)
    return config


def watch(
    run: TrainingRun, folder: Path, moments: tuple[float, ...] = MOMENTS, tensorboard: bool = False
) -> None:
    """Take all steps of a run behind a progress bar, and leave its course in a folder.

    history_STAGE.json  means of all terms, about 200 rows a stage, see `state.History`; and a .png
    moments/, grids/    at some shares of the MAR's budget: averaged and raw weights (bfloat16), and
                        64 samples of both, from the same seeds
    vae.safetensors     the autoencoder, as soon as it is trained

    Where nobody sees the bar, each row is printed. The card gets the losses of the last one.
    """
    from tqdm import tqdm

    stage = writer = None
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")
    bar = tqdm(disable=None, bar_format="{percentage:3.0f}%|{bar}| {postfix}, {remaining} left")
    for progress in run:
        step, terms = progress.step, progress.step.terms
        if progress.stage != stage:
            stage = progress.stage
            history = History(folder / f"history_{stage.split()[0]}.json")
            own = run.training.config
            bar.write(
                f"training the {stage} from step {step.step}: batch size {own.batch_size} = "
                f"{run.training.world_size} processes x {own.accumulate} micro batches, "
                f"learning rate {own.learning_rate:.3g}, {own.max_steps or 'any number of'} steps"
            )
        line = ", ".join(f"{name} {value:.4f}" for name, value in terms.items())
        line = f"step {step.step}, {step.images_seen / step.seconds:.0f} images/s, {line}"
        bar.total = round(step.step / step.progress)
        bar.set_postfix_str(line, refresh=False)
        bar.update(step.step - bar.n)
        if writer is not None:
            for name, value in (*terms.items(), ("learning rate", step.learning_rate)):
                writer.add_scalar(f"{stage}/{name}", value, step.step)
        before = history.rows[-1]["progress"] if history.rows else 0.0
        if history.add(step):
            history.save()
            if bar.disable:
                print(f"{step.progress:4.0%}, {line}", flush=True)
            if int(10 * before) < int(10 * step.progress) and find_spec("matplotlib"):
                draw(history, terms)
            if stage == MASKED and any(before < m <= step.progress for m in moments):
                keep_moment(progress, folder)
        if stage == AUTOENCODER and step.progress == 1.0:
            save_weights(step.ema, folder / "vae.safetensors", torch.bfloat16)
    bar.close()
    if writer is not None:
        writer.close()
    rows = History(folder / f"history_{MASKED.split()[0]}.json").rows
    if run.pipeline is not None and rows:
        run.pipeline.card["losses"] = {k: round(rows[-1][k], 4) for k in ("loss", "mse", "vb")}


def draw(history: History, terms) -> None:
    """The terms of a history as a figure beside it."""
    from mar_mini.viz.figures import curves, save_figure

    seen = [row["images_seen"] for row in history.rows]
    lines = {name: (seen, [row[name] for row in history.rows]) for name in terms}
    figure = curves(lines, xlabel="images seen", ylabel="loss", logy=True)
    save_figure(figure, history.path.with_suffix(".png"))


def keep_moment(progress: Progress, folder: Path) -> None:
    """Averaged and raw weights of one step, and 64 samples of both from the same seeds."""
    for kind, model in (("average", progress.step.ema), ("raw", progress.step.model)):
        pipeline, name = progress.pipeline(model), f"{kind}-{progress.step.step:07d}"
        labels = torch.arange(64) % len(pipeline.classes)
        images = pipeline.generate(labels, generator=torch.Generator().manual_seed(0))
        sheet = rearrange(images.expand(-1, 3, -1, -1), "(r k) c h w -> (r h) (k w) c", k=8)
        picture = Image.fromarray((sheet * 255).round().byte().cpu().numpy())
        for part in ("grids", "moments"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "grids" / f"{name}.png", partial(picture.save, format="png"))
        save_weights(model, folder / "moments" / f"{name}.safetensors", torch.bfloat16)
