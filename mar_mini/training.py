"""Training as an iterator of steps: learning rate, gradients, weight average, budget.

Everything random in a step (which images, masks, timesteps, noise, dropped labels) follows from
(seed, step) alone, so that a run can be repeated, and continued, without stored random states.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mar_mini.configs import TrainingConfig, choose
from mar_mini.data import Images, InMemory, batch_indices, coins, fetch, step_generator, step_seed
from mar_mini.mar import MAR, StepDraws
from mar_mini.vae import AutoencoderKL


@dataclass(frozen=True)
class Step:
    """The state after one optimizer step."""

    step: int  # steps done so far
    loss: float  # of this step's batch
    terms: dict[str, float]  # what the loss is made of, and the loss, by name
    learning_rate: float  # used in this step
    grad_norm: float  # before clipping
    images_seen: int  # since the start
    seconds: float  # in training since the start, not in what the caller did meanwhile
    progress: float  # share of the budget that is used up, 0 to 1
    model: nn.Module  # the same object each time
    ema: nn.Module  # the model with averaged weights, the same object each time


class Batch(NamedTuple):
    """A micro batch and what is random about it; nothing is drawn for an autoencoder."""

    images: Tensor  # (n, C, H, W) float: latents, or pixels in [-1, 1]
    labels: Tensor  # (n,) int64
    drawn: StepDraws | None
    generator: torch.Generator  # for what is drawn in the forward pass


# (what forward is called on, batch, configuration) -> scalars by name, `loss` among them
Terms = Callable[[nn.Module, Batch, TrainingConfig], dict[str, Tensor]]


def mar_terms(network: nn.Module, batch: Batch, config: TrainingConfig) -> dict[str, Tensor]:
    """Compute the diffusion loss of the hidden tokens and its parts (MAR section 3.4)."""
    images, labels, drawn, generator = batch
    return network(images, labels, drawn, generator=generator, return_terms=True)


def vae_terms(network: nn.Module, batch: Batch, config: TrainingConfig) -> dict[str, Tensor]:
    """Compute squared error and KL per latent value in nats (Kingma & Welling 2014, eq. 10)."""
    reconstruction, posterior = network(batch.images, batch.generator)
    mse = (reconstruction.float() - batch.images).square().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return {"loss": mse + config.kl_weight * kl, "mse": mse, "kl": kl}


class Training(Iterator[Step]):
    """A training under way; iterating over it trains the model in place.

    terms  `mar_terms` or `vae_terms`

    Raises ValueError at once for settings that cannot work.
    """

    rank, world_size = 0, 1

    def __init__(
        self, model: nn.Module, images: Images, terms: Terms, config: TrainingConfig, seed: int = 0
    ):
        check_training(config, len(images), seed)
        self.model, self.images, self.terms = model, images, terms
        self.config, self.seed, self.device = config, seed, next(model.parameters()).device
        self.slices = self.micro_batches()
        average = averaging(config.ema_decay, config.ema_window)
        self.ema = AveragedModel(model, multi_avg_fn=average).eval()
        self.network = self.distribute()
        groups = parameter_groups(model, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.resume(0, 0.0)

    def __next__(self) -> Step:
        """Take one step (MAR section 4), unless its loss or gradient is not finite.

        Raises FloatingPointError then; the weights are those before this step.
        """
        if self.used >= 1.0:
            raise StopIteration
        start, config = time.perf_counter(), self.config
        rate = learning_rate(config, self.used)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad()

        # gradients, micro batch by micro batch
        rows = []
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for batch, last in self.batches():
                with self.sync(last):
                    with autocast(config.precision, self.device):
                        terms = self.terms(self.network, batch, config)
                    (terms["loss"] / len(self.slices)).backward()
                rows.append(torch.stack([value.detach() for value in terms.values()]))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        norm = getattr(norm, "full_tensor", lambda: norm)()  # FSDP's is in shards

        # is it finite? one wait for the device
        *means, norm = self.mean(torch.stack([*torch.stack(rows).mean(0), norm])).tolist()
        terms = dict(zip(terms, means, strict=True))
        if not (math.isfinite(terms["loss"]) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {self.step + 1}: loss is {terms['loss']}, its gradient's norm {norm}, at "
                f"learning rate {rate:.2e}; lower the learning rate, or train in "
                "precision='float32'"
            )
        self.optimizer.step()
        self.ema.update_parameters(self.model)

        self.resume(self.step + 1, self.seconds + time.perf_counter() - start)
        seen = self.step * config.batch_size
        done = {"images_seen": seen, "seconds": self.seconds, "progress": self.used}
        found = {"loss": terms["loss"], "terms": terms, "learning_rate": rate, "grad_norm": norm}
        return Step(self.step, **found, **done, model=self.model, ema=self.ema.module)

    def batches(self) -> Iterator[tuple[Batch, bool]]:
        """Give the next step's micro batches of this process, and whether each is the last one.

        All that is random is drawn for the whole batch, whoever computes which part of it. Order:
        flips, mask, dropped labels, timesteps, noise.
        """
        size, seed = self.config.batch_size, step_seed(self.seed, self.step)
        generator = step_generator(self.seed, self.step, self.device)
        picked = batch_indices(self.seed, self.step, len(self.images), size)
        flip = coins(size, generator).cpu() if self.config.flip else torch.zeros(size).bool()
        drawn = self.model.draw(size, generator) if isinstance(self.model, MAR) else None
        # dropout takes no generator, and differs between processes
        torch.manual_seed(step_seed(seed, self.rank) if self.rank else seed)
        for rows in self.slices:
            labels = self.images.labels[picked[rows].to(self.images.labels.device)]
            images = fetch(self.images, picked, flip, rows, seed).to(self.device)
            batch = Batch(images, labels.to(self.device), drawn and drawn.rows(rows), generator)
            yield batch, rows is self.slices[-1]

    def resume(self, step: int, seconds: float) -> None:
        """Set how far the training is: steps done, and seconds spent in them."""
        if self.world_size > 1 and step:  # the processes end in the same step
            seconds = float(
                self.mean(torch.tensor(seconds, dtype=torch.float64, device=self.device))
            )
        self.step, self.seconds = step, seconds
        self.used = progress(self.config, step, seconds) if step else 0.0

    def micro_batches(self) -> list[slice]:
        """Give the rows of a batch that this process computes, or raise ValueError if unequal."""
        batch_size, accumulate = self.config.batch_size, self.config.accumulate
        parts = self.world_size * accumulate
        if batch_size % parts:
            near = max(1, round(batch_size / parts)) * parts
            raise ValueError(
                f"batch_size is {batch_size}; expected a multiple of {parts} ({self.world_size} "
                f"processes with {accumulate} micro batches each), such as {near}"
            )
        size = batch_size // parts
        first = self.rank * accumulate
        return [slice(i * size, (i + 1) * size) for i in range(first, first + accumulate)]

    # What several processes do otherwise, see `run.distributed`

    def distribute(self) -> nn.Module:
        """Prepare model and average for the optimizer; return what to call in a step."""
        return self.model

    def sync(self, last: bool) -> AbstractContextManager:
        """Give the context of a forward and backward pass; gradients travel in the last one."""
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """Average numbers over the processes."""
        return values


def train_mar(
    model: MAR, latents, labels, config: TrainingConfig, *, mirrored=None, seed: int = 0
) -> Training:
    """Train a MAR in place on images in memory; each step yields a `Step`.

    latents, labels, mirrored  see `data.InMemory`; `mirrored` matters for `config.flip`

    Raises ValueError for a budget or data that do not fit.
    """
    device = next(model.parameters()).device
    mirrored = None if mirrored is None else mirrored.to(device)
    images = InMemory(latents.to(device), labels, mirrored)
    return Training(model, images, mar_terms, config, seed)


def train_vae(model: AutoencoderKL, images, config: TrainingConfig, *, seed: int = 0) -> Training:
    """Train an autoencoder in place on images in [-1, 1]; each step yields a `Step`."""
    images = images.to(next(model.parameters()).device)
    unlabelled = InMemory(images, torch.zeros(len(images), dtype=torch.int64))
    return Training(model, unlabelled, vae_terms, config, seed)


def check_training(config: TrainingConfig, num_images: int, seed: int = 0) -> None:
    """Raise ValueError, before anything is trained, for settings that cannot work."""
    if config.max_steps is None and config.max_seconds is None:
        raise ValueError("no budget: set max_steps or max_seconds in the training configuration")
    for name, value in (("max_steps", config.max_steps), ("max_seconds", config.max_seconds)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; expected more than 0")
    if not 1 <= config.batch_size <= num_images:
        raise ValueError(
            f"batch_size is {config.batch_size}; expected 1 to {num_images}, the number of images"
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected 0 or more")
    if config.accumulate < 1:
        raise ValueError(f"accumulate is {config.accumulate}; expected 1 or more micro batches")
    choose("decay", config.decay, {"cosine": ..., "constant": ...})
    choose("precision", config.precision, {"auto": ..., "float32": ..., "bf16": ...})


def progress(config: TrainingConfig, step: int, seconds: float) -> float:
    """Share of the budget that is used up, by steps or by seconds, whichever is more."""
    by_steps, by_seconds = (config.max_steps or math.inf), (config.max_seconds or math.inf)
    return min(1.0, max(step / by_steps, seconds / by_seconds))


def learning_rate(config: TrainingConfig, used: float) -> float:
    """Rise from 0 in the warm-up, then half a cosine down to 0, or constant."""
    if used < config.warmup:
        return config.learning_rate * (used / config.warmup + 1e-3)
    if config.decay == "constant":
        return config.learning_rate
    share = (used - config.warmup) / (1 - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices and tables, none for biases, norms and the head (MAR section 4)."""
    decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decayed[parameter.ndim > 1 and not name.startswith("diffloss.")].append(parameter)
    rates = {True: weight_decay, False: 0.0}
    return [{"params": decayed[kind], "weight_decay": rate} for kind, rate in rates.items()]


def averaging(decay: float, window: float) -> Callable:
    """Average exponentially with a reach that grows: at most `window` of the steps so far.

    With the published decay of 0.9999 the average reaches back 10,000 steps; in a run of 500 it
    would be little but the untrained weights (after the power function averages of Karras et al.
    2024, section 3.1).
    """
    return partial(ema_step, decay=decay, window=window)


@torch.no_grad()
def ema_step(averaged, current, num_averaged, *, decay: float, window: float) -> None:
    """Move averaged weights in place, where `num_averaged` steps are in them; see `averaging`."""
    keep = min(decay, 1 - 1 / (1 + window * float(num_averaged)))
    torch._foreach_lerp_(averaged, current, 1 - keep)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """bfloat16 matrix products where asked for, or where the hardware makes them faster."""
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(device) else "float32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def multiplies_bf16(device: torch.device) -> bool:
    """True where bfloat16 products run on units of their own: recent GPUs, CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())
