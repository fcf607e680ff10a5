"""Training loops that yield their state: optimiser, learning rate, weight average, budget.

Everything random in a step (which images, masks, timesteps, noise, dropped labels) follows from
(seed, step) alone, so that a run can be repeated, and continued, without stored random states.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mar_mini.choice import choose
from mar_mini.compiling import compile_model
from mar_mini.configs import TrainingConfig
from mar_mini.mar import MAR
from mar_mini.vae import AutoencoderKL


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
) -> "Training":
    """Train a MAR in place; each step yields a `Step` (MAR section 4).

    latents   (N, C, H, W) what `model.patchify` takes: scaled latents, or pixels in [-1, 1]
    labels    (N,) int64
    mirrored  latents of the mirrored images, for `config.flip`; without them the last axis is
              reversed, which is right for pixels only

    Raises ValueError for a budget or data that do not fit, FloatingPointError if the loss is not
    finite any more (the weights are then those before that step).
    """
    if len(latents) != len(labels):
        raise ValueError(f"{len(latents)} images but {len(labels)} labels; expected one for each")
    if mirrored is not None and mirrored.shape != latents.shape:
        raise ValueError(
            f"mirrored is {tuple(mirrored.shape)}; expected {tuple(latents.shape)} as the latents"
        )
    device = next(model.parameters()).device
    latents, labels = latents.to(device), labels.to(device)
    if config.flip:
        mirrored = latents.flip(-1) if mirrored is None else mirrored.to(device)

    def terms(picked: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        batch = flip_half(latents, mirrored, picked, generator) if config.flip else latents[picked]
        return model(batch, labels[picked], generator=generator, return_terms=True)

    return train(model, terms, len(latents), config, seed)


def train_vae(
    model: AutoencoderKL,
    images: Float[Tensor, "N C H W"],
    config: TrainingConfig,
    *,
    seed: int = 0,
) -> "Training":
    """Train an autoencoder in place; each step yields a `Step`.

    images  (N, C, H, W) float in [-1, 1]

    The loss is the mean squared error of the reconstruction plus `config.kl_weight` times the KL
    divergence per latent value in nats (Kingma & Welling 2014, eq. 10). Raises as `train_mar`.
    """
    images = images.to(next(model.parameters()).device)

    def terms(picked: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        batch = images[picked]
        if config.flip:
            batch = flip_half(batch, batch.flip(-1), torch.arange(len(batch)), generator)
        reconstruction, posterior = model(batch, generator)
        mse = (reconstruction.float() - batch).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": mse + config.kl_weight * kl, "mse": mse, "kl": kl}

    return train(model, terms, len(images), config, seed)


def train(
    model: nn.Module,
    terms: Callable[[Tensor, torch.Generator], dict[str, Tensor]],
    num_images: int,
    config: TrainingConfig,
    seed: int = 0,
) -> "Training":
    """The training that both models share; settings that cannot work are refused at once.

    terms  (indices of a batch, generator) -> scalars by name, `loss` among them
    """
    check_training(config, num_images, seed)
    return Training(model, terms, num_images, config, seed)


class Training(Iterator[Step]):
    """A training under way: iterate over it for its steps, ask it for its state between two.

    Arguments as for `train`. Attributes that say where it is: step, seconds, used (share of the
    budget).
    """

    def __init__(self, model, terms, num_images, config, seed):
        if config.compile:
            compile_model(model)
        self.model, self.terms, self.num_images = model, terms, num_images
        self.config, self.seed = config, seed
        self.device = next(model.parameters()).device
        self.optimiser = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), betas=(0.9, 0.95), fused=True
        )
        self.ema = AveragedModel(
            model, multi_avg_fn=averaging(config.ema_decay, config.ema_window)
        ).eval()
        self.step, self.seconds, self.used = 0, 0.0, 0.0

    def __next__(self) -> Step:
        if self.used >= 1.0:
            raise StopIteration
        start, config, device = time.perf_counter(), self.config, self.device
        self.model.train()
        rate = learning_rate(config, self.used)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        picked = batch_indices(self.seed, self.step, self.num_images, config.batch_size)
        devices = [device] if device.type == "cuda" else []
        with autocast(config.precision, device), torch.random.fork_rng(devices):
            torch.manual_seed(step_seed(self.seed, self.step))  # for dropout, without a generator
            generator = step_generator(self.seed, self.step, device)
            values = self.terms(picked.to(device), generator)
        self.optimiser.zero_grad()
        values["loss"].backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        names, numbers = list(values), [value.detach() for value in values.values()]
        *numbers, grad_norm = torch.stack([*numbers, grad_norm]).tolist()  # one wait for the device
        terms = dict(zip(names, numbers, strict=True))
        if not (math.isfinite(terms["loss"]) and math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"step {self.step + 1}: loss is {terms['loss']}, its gradient's norm {grad_norm}, "
                f"at learning rate {rate:.2e}; lower the learning rate, or train in "
                "precision='float32'"
            )
        self.optimiser.step()
        self.ema.update_parameters(self.model)
        self.step += 1
        self.seconds += time.perf_counter() - start
        self.used = progress(config, self.step, self.seconds)
        return Step(
            self.step, terms["loss"], terms, rate, grad_norm, self.step * config.batch_size,
            self.seconds, self.used, self.model, self.ema.module,
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name: weights, average, moments, counters.

        The tensors are copies on the CPU.
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
        return {name: x.detach().cpu().clone() for name, x in state.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from such a state. Raises ValueError if it does not fit; nothing is changed then.

        Which of the budget is used up follows from the state's steps and seconds.
        """
        model, ema = with_prefix(state, "model."), with_prefix(state, "ema.")
        for name, ours, theirs in (("model", self.model.state_dict(), model),
                                   ("ema", self.ema.state_dict(), ema)):  # fmt: skip
            if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
                raise ValueError(f"the state is of another {name}; build the one it was saved from")
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in with_prefix(state, "optimiser.").items():
            index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
        self.model.load_state_dict(model)
        self.ema.load_state_dict(ema)
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        step, seconds = state["counters"].tolist()
        self.step, self.seconds = int(step), seconds
        self.used = progress(self.config, self.step, self.seconds) if self.step else 0.0


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

    @torch.no_grad()
    def update(averaged, current, num_averaged) -> None:
        keep = min(decay, 1 - 1 / (1 + window * float(num_averaged)))
        torch._foreach_lerp_(averaged, current, 1 - keep)

    return update


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


def step_seed(seed: int, step: int) -> int:
    """One number from two, such that neighbours share nothing."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step: a function of (seed, step) and nothing else."""
    return torch.Generator(device).manual_seed(step_seed(seed, step))


@lru_cache(maxsize=2)
def shuffled(seed: int, epoch: int, num_images: int) -> Int[Tensor, " N"]:
    generator = step_generator(seed, 2**32 + epoch)  # apart from those of the steps
    return torch.randperm(num_images, generator=generator)


def batch_indices(seed: int, step: int, num_images: int, batch_size: int) -> Int[Tensor, " B"]:
    """Which images step `step` (from 0) sees: epoch after epoch, each image once in each."""
    first = step * batch_size
    picked = []
    while len(picked) < batch_size:
        epoch, offset = divmod(first + len(picked), num_images)
        rest = batch_size - len(picked)
        picked.extend(shuffled(seed, epoch, num_images)[offset : offset + rest].tolist())
    return torch.tensor(picked)


def flip_half(
    images: Tensor, mirrored: Tensor, picked: Int[Tensor, " B"], generator: torch.Generator
) -> Tensor:
    """Those images, each mirrored with probability 1/2."""
    device = generator.device
    coin = torch.rand(len(picked), generator=generator, device=device).to(images.device) < 0.5
    return torch.where(coin[:, None, None, None], mirrored[picked], images[picked])
