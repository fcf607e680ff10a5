"""Training loops that yield their state: optimiser, learning rate, weight average, budget.

Everything random in a step (which images, masks, timesteps, noise, dropped labels) follows from
(seed, step) alone, so that a run can be repeated, and continued, without stored random states.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mar_mini.configs import TrainingConfig, choose
from mar_mini.data import (
    Images,
    InMemory,
    batch_indices,
    coins,
    fetch,
    flip_half,
    step_generator,
    step_seed,
)
from mar_mini.fast.compiling import compile_model
from mar_mini.mar import MAR
from mar_mini.run.distributed import Alone
from mar_mini.vae import AutoencoderKL

ALONE = Alone()
T, R = TypeVar("T"), TypeVar("R")
# (network, rows) -> scalars by name, `loss` among them: the means over some rows of a batch.
# `network` is the model, or stands in for it
Share = Callable[[nn.Module, slice], dict[str, Tensor]]


@dataclass(frozen=True)
class Step:
    """The state after one optimiser step.

    step           steps done so far
    loss, terms    of this step's batch; the terms by name
    learning_rate  used in this step
    grad_norm      before clipping
    images_seen    since the start
    seconds        spent in training since the start (not in what the caller did meanwhile)
    progress       share of the budget that is used up, 0 to 1
    model, ema     the model, and the one with averaged weights; the same objects each time
    """

    step: int
    loss: float
    terms: dict[str, float]
    learning_rate: float
    grad_norm: float
    images_seen: int
    seconds: float
    progress: float
    model: nn.Module
    ema: nn.Module


def train_mar(
    model: MAR,
    latents: Float[Tensor, "N C H W"],
    labels: Int[Tensor, " M"],
    config: TrainingConfig,
    *,
    mirrored: Float[Tensor, "M2 C H W"] | None = None,
    seed: int = 0,
    processes: Alone = ALONE,
) -> "Training":
    """Train a MAR in place; each step yields a `Step` (MAR section 4).

    latents   (N, C, H, W) what `model.patchify` takes: scaled latents, or pixels in [-1, 1]
    labels    (N,) int64
    mirrored  latents of the mirrored images, for `config.flip`; without them the last axis is
              reversed, which is right for pixels only

    Raises ValueError for a budget or data that do not fit, FloatingPointError if the loss is not
    finite any more (the weights are then those before that step).
    """
    device = next(model.parameters()).device
    if mirrored is not None:
        mirrored = mirrored.to(device)
    images = InMemory(latents.to(device), labels, mirrored)
    return train_on(model, images, config, seed=seed, processes=processes)


def train_on(
    model: MAR, images: Images, config: TrainingConfig, *, seed: int = 0, processes: Alone = ALONE
) -> "Training":
    """Train a MAR in place on images from anywhere; everything else as `train_mar`.

    images     see `batches.Images`
    processes  that do it together, see `distributed.join`
    """
    device = next(model.parameters()).device

    def draw(picked: Tensor, generator: torch.Generator) -> Share:
        count = len(picked)
        flip = (coins(count, generator) if config.flip else torch.zeros(count)).cpu().bool()
        drawn = model.draw(count, generator)

        def share(network: nn.Module, rows: slice) -> dict[str, Tensor]:
            batch = fetch(images, picked, flip, rows, generator.initial_seed()).to(device)
            labels = images.labels[picked[rows].to(images.labels.device)].to(device)
            return network(
                batch, labels, drawn=drawn.rows(rows), generator=generator, return_terms=True
            )

        return share

    return train(model, draw, len(images), config, seed, processes)


def train_vae(
    model: AutoencoderKL, images: Float[Tensor, "N C H W"], config: TrainingConfig, *, seed: int = 0
) -> "Training":
    """Train an autoencoder in place; each step yields a `Step`.

    images  (N, C, H, W) float in [-1, 1]

    The loss is the mean squared error of the reconstruction plus `config.kl_weight` times the KL
    divergence per latent value in nats (Kingma & Welling 2014, eq. 10). Raises as `train_mar`.
    """
    images = images.to(next(model.parameters()).device)

    def draw(picked: Tensor, generator: torch.Generator) -> Share:
        batch = images[picked.to(images.device)]
        if config.flip:
            batch = flip_half(batch, batch.flip(-1), torch.arange(len(batch)), generator)

        def share(network: nn.Module, rows: slice) -> dict[str, Tensor]:
            reconstruction, posterior = network(batch[rows], generator)
            mse = (reconstruction.float() - batch[rows]).square().mean()
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            return {"loss": mse + config.kl_weight * kl, "mse": mse, "kl": kl}

        return share

    return train(model, draw, len(images), config, seed)


def train(
    model: nn.Module,
    draw: Callable[[Tensor, torch.Generator], Share],
    num_images: int,
    config: TrainingConfig,
    seed: int = 0,
    processes: Alone = ALONE,
) -> "Training":
    """The training that both models share; settings that cannot work are refused at once.

    draw       (indices of a batch, generator) -> `Share`: all that is random in a step is drawn
               for the whole batch, so that it does not matter who computes which rows
    processes  that train together
    """
    check_training(config, num_images, seed)
    return Training(model, draw, num_images, config, seed, processes)


class Training(Iterator[Step]):
    """A training under way: iterate over it for its steps, ask it for its state between two.

    Arguments as for `train`. Attributes that say where it is: step, seconds, used (share of the
    budget).
    """

    def __init__(self, model, draw, num_images, config, seed, processes=ALONE):
        self.micro_batches = processes.micro_batches(config.batch_size, config.accumulate)
        if config.compile:
            compile_model(model)
        self.model, self.draw, self.num_images = model, draw, num_images
        self.config, self.seed, self.processes = config, seed, processes
        self.device = next(model.parameters()).device
        processes.equalise(model)
        self.ema = AveragedModel(
            model, multi_avg_fn=averaging(config.ema_decay, config.ema_window)
        ).eval()
        self.network = processes.distribute(model, self.ema.module)
        self.optimiser = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), betas=(0.9, 0.95), fused=True
        )
        self.step, self.seconds, self.used = 0, 0.0, 0.0

    def __next__(self) -> Step:
        if self.used >= 1.0:
            raise StopIteration
        start, config = time.perf_counter(), self.config
        self.model.train()
        rate = learning_rate(config, self.used)
        terms, grad_norm = optimise(
            self.model,
            self.optimiser,
            self.backward,
            self.ema.update_parameters,
            rate=rate,
            grad_clip=config.grad_clip,
            accept=self.accept,
        )
        self.step += 1
        self.seconds += time.perf_counter() - start
        if config.max_seconds is not None:  # the processes end in the same step
            self.seconds = self.processes.first(self.seconds)
        self.used = progress(config, self.step, self.seconds)
        return Step(
            self.step,
            terms["loss"],
            terms,
            rate,
            grad_norm,
            self.step * config.batch_size,
            self.seconds,
            self.used,
            self.model,
            self.ema.module,
        )

    def accept(self, terms: dict[str, Tensor], grad_norm: Tensor) -> tuple[dict[str, float], float]:
        """What a step reports, means over the processes, if it may change the weights.

        Raises FloatingPointError if the loss or its gradient is not finite.
        """
        names, numbers = list(terms), [*terms.values(), self.processes.whole(grad_norm)]
        # one wait for the device
        *values, norm = self.processes.mean(torch.stack(numbers)).tolist()
        report = dict(zip(names, values, strict=True))
        if not (math.isfinite(report["loss"]) and math.isfinite(norm)):
            rate = self.optimiser.param_groups[0]["lr"]
            raise FloatingPointError(
                f"step {self.step + 1}: loss is {report['loss']}, its gradient's norm {norm}, "
                f"at learning rate {rate:.2e}; lower the learning rate, or train in "
                "precision='float32'"
            )
        return report, norm

    def backward(self) -> dict[str, Tensor]:
        """Gradients of the next step, micro batch by micro batch; the terms of this process."""
        config, device, count = self.config, self.device, len(self.micro_batches)
        picked = batch_indices(self.seed, self.step, self.num_images, config.batch_size)
        sums: dict[str, Tensor] = {}
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # for dropout, which takes no generator
            torch.manual_seed(self.processes.own_seed(step_seed(self.seed, self.step)))
            share = self.draw(picked, step_generator(self.seed, self.step, device))
            for i, rows in enumerate(self.micro_batches):
                with self.processes.micro_step(self.network, last=i == count - 1):
                    with autocast(config.precision, device):
                        values = share(self.network, rows)
                    (values["loss"] / count).backward()
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value.detach() / count
        return sums

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name: weights, average, moments, counters.

        Not copies, and of a model in shards the shards.
        """
        state = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        state |= {f"ema.{name}": x for name, x in self.ema.state_dict().items()}
        moments = self.optimiser.state_dict()["state"]
        state |= {
            f"optimiser.{index}.{name}": x
            for index, values in moments.items()
            for name, x in values.items()
        }
        state["counters"] = torch.tensor([self.step, self.seconds], dtype=torch.float64)
        return {name: x.detach() for name, x in state.items()}

    def state(self) -> dict[str, Tensor]:
        """Copies of `tensors`, whole and on the CPU. All processes have to ask for it together."""
        return {name: self.processes.whole(x).cpu().clone() for name, x in self.tensors().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from such a state. Raises ValueError if it does not fit; nothing is changed then.

        Which of the budget is used up follows from the state's steps and seconds.
        """
        model, ema = with_prefix(state, "model."), with_prefix(state, "ema.")
        for name, ours, theirs in (
            ("model", self.model.state_dict(), model),
            ("ema", self.ema.state_dict(), ema),
        ):
            if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
                raise ValueError(f"the state is of another {name}; build the one it was saved from")
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in with_prefix(state, "optimiser.").items():
            index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        for index, values in moments.items():
            for name, value in values.items():
                values[name] = self.processes.part(value, parameters[index])
        for module, values in ((self.model, model), (self.ema, ema)):
            ours = module.state_dict()
            module.load_state_dict(
                {name: self.processes.part(x, ours[name]) for name, x in values.items()}
            )
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        step, seconds = state["counters"].tolist()
        self.step, self.seconds = int(step), seconds
        self.used = progress(self.config, self.step, self.seconds) if self.step else 0.0


def optimise(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    backward: Callable[[], T],
    average: Callable[[nn.Module], None],
    *,
    rate: float,
    grad_clip: float,
    accept: Callable[[T, Tensor], R],
) -> R:
    """One step: learning rate, gradients, clipping, new weights, their average.

    backward   computes the gradients, and whatever `accept` wants to know of them
    average    takes the new weights into an average
    rate       the learning rate
    grad_clip  largest norm of the gradient
    accept     (what `backward` gave, norm of the gradient before clipping) -> what is returned;
               where it raises, the weights stay as they were
    """
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad()
    given = backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    report = accept(given, grad_norm)
    optimiser.step()
    average(model)
    return report


def training_step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    loss: Callable[[], Float[Tensor, ""]],
    average: Callable[[nn.Module], None],
    *,
    rate: float,
    grad_clip: float,
) -> Float[Tensor, ""]:
    """`optimise` for a loss that is computed in one go; returns the loss before the step.

    loss  () -> scalar of a batch
    """

    def backward() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    return optimise(
        model,
        optimiser,
        backward,
        average,
        rate=rate,
        grad_clip=grad_clip,
        accept=lambda value, _: value,
    )


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def check_training(config: TrainingConfig, num_images: int, seed: int = 0) -> None:
    """Raises ValueError, before anything is trained, for settings that cannot work."""
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
    by_steps = step / config.max_steps if config.max_steps else 0.0
    by_seconds = seconds / config.max_seconds if config.max_seconds else 0.0
    return min(1.0, max(by_steps, by_seconds))


def learning_rate(config: TrainingConfig, used: float) -> float:
    """Linear warm-up from 0, then half a cosine down to 0, or constant.

    used  share of the budget that is used up, 0 to 1
    """
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
    return [
        {"params": decayed[True], "weight_decay": weight_decay},
        {"params": decayed[False], "weight_decay": 0.0},
    ]


def averaging(decay: float, window: float) -> Callable:
    """Exponential average whose reach grows with the run: `window` of the steps so far, at most.

    With the published decay of 0.9999 the average reaches back 10,000 steps; in a run of 500 it
    would be little but the untrained weights. Here it is 1 - 1 / (1 + window * steps) until that
    exceeds `decay` (after the power function averages of Karras et al. 2024, section 3.1).
    """

    return partial(ema_step, decay=decay, window=window)


@torch.no_grad()
def ema_step(
    averaged: list[Tensor],
    current: list[Tensor],
    num_averaged: float | Tensor,
    *,
    decay: float,
    window: float,
) -> None:
    """Move averaged weights towards the current ones, in place; see `averaging`.

    averaged, current  weights of two models, in the same order
    num_averaged       how many steps were averaged before this one
    """
    keep = min(decay, 1 - 1 / (1 + window * float(num_averaged)))
    torch._foreach_lerp_(averaged, current, 1 - keep)


def autocast(precision: str, device: torch.device):
    """bfloat16 matrix products where asked for, or where the hardware makes them faster."""
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(device) else "float32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def multiplies_bf16(device: torch.device) -> bool:
    """True where bfloat16 products run on units of their own: recent GPUs, CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())
