"""The autoregressive loop: a few tokens at a time, in any order (MAR section 3.4)."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mar_mini.configs import choose
from mar_mini.diffloss import Generators
from mar_mini.diffusion import Diffusion
from mar_mini.fast.reuse import Reuse
from mar_mini.mar import MAR, NO_CLASS, check_labels
from mar_mini.masking import (
    Order,
    check_order,
    known_first,
    make_order,
    mask_by_order,
    masked_after,
)
from mar_mini.solvers import FIRST_TIMESTEP, SOLVERS

CfgSchedule = Callable[[float, int, int], float]


@dataclass(frozen=True)
class Frame:
    """The state after one autoregressive step.

    step       0 for the first
    tokens     (B, L, C) float32; zero where still masked
    predicted  (B, L) bool, True = predicted in this step
    mask       (B, L) bool, True = still masked
    """

    step: int
    tokens: Tensor
    predicted: Tensor
    mask: Tensor


def constant_cfg(cfg: float, num_masked: int, length: int) -> float:
    """The same guidance weight in each step."""
    return cfg


def linear_cfg(cfg: float, num_masked: int, length: int) -> float:
    """From 1 to almost cfg, in step with the share of tokens that are known (MAR appendix B)."""
    return 1.0 + (cfg - 1.0) * (length - num_masked) / length


CFG_SCHEDULES: dict[str, CfgSchedule] = {"linear": linear_cfg, "constant": constant_cfg}

# arguments of `sample` that make it fast and approximate; what they cost: benchmarks/README.md
FAST = {
    "solver": "ddim",
    "num_sampling_steps": (10, 4),
    "guidance_interval": (0.25, 1.0),
    "refresh_features": 8,
    "refresh_guidance": 8,
}


def sample(
    model: MAR,
    labels: Tensor | list[int] | None = None,
    *,
    batch_size: int | None = None,
    num_iter: int,
    cfg: float = 1.0,
    cfg_schedule: str | CfgSchedule = "linear",
    temperature: float = 1.0,
    num_sampling_steps: int | tuple[int, int] | None = None,
    clip: float | None = None,
    solver: str = "ddpm",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    refresh_features: int = 1,
    refresh_guidance: int = 1,
    order: str | Order | Tensor = "random",
    generator: Generators = None,
    tokens: Tensor | None = None,
    known: Tensor | None = None,
) -> Iterator[Frame]:
    """Generate tokens step by step; each step yields a `Frame`.

    labels              (B,) classes, -1 = none; None for `batch_size` images without class
    num_iter            autoregressive steps, 1 to L (to the number of unknown tokens)
    cfg                 guidance weight; 1 = none. Without labels it has nothing to guide
    cfg_schedule        "linear", "constant", or (cfg, num_masked, length) -> weight of a step
    temperature         scale of the noise that DDPM injects; of the initial noise for the others
    num_sampling_steps  diffusion steps, 2 to 1000; the model's default if None. Two numbers: so
                        many for the first tokens, falling to so many for the last, which have
                        less to decide (DiSA, Zhao et al. 2025)
    clip                bound on |x0|; see `mar_mini.diffusion` on the terminal step
    solver              "ddpm", "ddim" or "dpm_solver"; see `mar_mini.solvers`
    guidance_interval   share of known tokens between which there is guidance, the others' steps
                        cost half as much (Kynkäänniemi et al. 2024, there for noise levels)
    refresh_features    compute all features in each so-many-th iteration; 1 = always
    refresh_guidance    compute the guidance in each so-many-th iteration; see `mar_mini.reuse`
    order               name, function (see `masking`) or int64 (B, L), first to last
    generator           one torch.Generator, or a list of B: each image then depends on its own
                        generator alone, not on the batch. Contract: at each step the tokens to
                        predict are taken batch-major, positions ascending; see `DiffLoss.sample`
    tokens, known       (B, L, C) and bool (B, L), True = given: these stay as they are to the bit
                        and the rest is painted in; the same number in each row

    Raises ValueError for anything that does not fit, before the first step.
    """
    device = next(model.parameters()).device
    labels = resolve_labels(labels, batch_size, model, tokens).to(device)
    if isinstance(generator, (list, tuple)) and len(generator) != len(labels):
        raise ValueError(f"{len(generator)} generators for {len(labels)} images; pass one for each")
    tokens, mask = start(model, len(labels), tokens, known)
    order = resolve_order(order, model, len(labels), generator).to(device)
    turn = known_first(order, ~mask)
    schedule = masked_after(int(mask[0].sum()), num_iter)
    if isinstance(cfg_schedule, str):
        cfg_schedule = choose("cfg_schedule", cfg_schedule, CFG_SCHEDULES)
    check_settings(solver, guidance_interval, refresh_features, refresh_guidance, clip, temperature)
    known_shares = [1 - n / model.seq_len for n in (int(mask[0].sum()), *schedule[:-1])]
    annealed = anneal(num_sampling_steps, known_shares)
    for num_steps in annealed:
        if num_steps is not None:
            Diffusion(num_steps, FIRST_TIMESTEP[solver])  # refuses an impossible number
    fixed = {"temperature": temperature, "clip": clip, "solver": solver, "generator": generator}
    head_arguments = [{**fixed, "num_sampling_steps": num_steps} for num_steps in annealed]
    # the published loop counts one token as masked in the last step as well
    weights = [cfg_schedule(cfg, max(1, num_masked), model.seq_len) for num_masked in schedule]
    lowest, highest = guidance_interval
    weights = [
        weight if lowest <= share < highest and (labels != NO_CLASS).any() else 1.0
        for weight, share in zip(weights, known_shares, strict=True)
    ]
    exact = refresh_features == refresh_guidance == 1
    reuse = None if exact else Reuse(model, labels, refresh_features, refresh_guidance)
    return steps(model, labels, reuse, tokens, mask, turn, schedule, weights, head_arguments)


def check_settings(
    solver, guidance_interval, refresh_features, refresh_guidance, clip, temperature
) -> None:
    """Raises ValueError for settings of `sample` that mean nothing."""
    choose("solver", solver, SOLVERS)
    lowest, highest = guidance_interval
    if not 0 <= lowest < highest <= 1:
        raise ValueError(
            f"guidance_interval is {guidance_interval}; expected two shares of known tokens, "
            "0 <= first < second <= 1"
        )
    for name, every in (("features", refresh_features), ("guidance", refresh_guidance)):
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"refresh_{name} is {every}; expected 1 (always) or a larger integer")
    if clip is not None and clip <= 0:
        raise ValueError(f"clip is {clip}; expected more than 0, the largest |x0|, or None")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; expected 0 or more")


def anneal(num_steps: int | tuple[int, int] | None, known_shares: list[float]) -> list[int | None]:
    """How many diffusion steps each iteration takes, in a straight line from first to last."""
    if not isinstance(num_steps, tuple):
        return [num_steps] * len(known_shares)
    first, last = num_steps
    begin, end = known_shares[0], known_shares[-1]
    return [
        round(first + (last - first) * (share - begin) / ((end - begin) or 1.0))
        for share in known_shares
    ]


def steps(
    model: MAR,
    labels: Tensor,
    reuse: Reuse | None,
    tokens: Tensor,
    mask: Tensor,
    turn: Tensor,
    schedule: list[int],
    weights: list[float],
    head_arguments: list[dict],
) -> Iterator[Frame]:
    """The loop itself: `one_step` until nothing is masked.

    reuse           where z comes from; None: all of it is computed at each step
    turn            int64 (B, L), the order with the known places first
    schedule        how many tokens are still masked after each step
    weights         guidance weight of each step
    head_arguments  of each step
    """
    for step, num_masked in enumerate(schedule):
        before = mask
        tokens, mask = one_step(
            model,
            labels,
            tokens,
            before,
            turn,
            num_masked,
            weights[step],
            conditions=None if reuse is None else partial(reuse, step),
            **head_arguments[step],
        )
        yield Frame(step, tokens, before & ~mask, mask)


def one_step(
    model: MAR,
    labels: Int[Tensor, " B"],
    tokens: Float[Tensor, "B L C"],
    mask: Bool[Tensor, "B L"],
    order: Int[Tensor, "B L"],
    num_masked: int,
    cfg: float,
    *,
    conditions: Callable | None = None,
    **head_arguments,
) -> tuple[Float[Tensor, "B L C"], Bool[Tensor, "B L"]]:
    """One autoregressive step: which tokens come next, draw them, put them in their places.

    labels          (B,) int64, -1 = no class
    tokens          (B, L, C) as they are so far
    mask            (B, L) bool, True = masked before this step
    order           (B, L) int64, first to last; places that are known come first
    num_masked      how many tokens of each image are still masked after this step
    cfg             guidance weight of this step; 1 = none
    conditions      (tokens, mask, predicted, guided) -> z, z_uncond; `exact_conditions` if None
    head_arguments  of the head's `sample`: temperature, generator, ...
    returns         new tokens and mask; what was given is not changed
    """
    conditions = conditions or partial(exact_conditions, model, labels)
    still = mask_by_order(order, num_masked)  # (B, L)
    predicted = mask & ~still  # (B, L)
    with torch.no_grad(), evaluating(model):
        z, z_uncond = conditions(tokens, mask, predicted, cfg != 1.0)
        drawn = model.diffloss.sample(z, z_uncond, cfg=cfg, **head_arguments)  # (N, C)
    return tokens.masked_scatter(predicted[..., None], drawn), still


def generate(model: MAR, labels=None, **arguments) -> Float[Tensor, "B L C"]:
    """All steps of `sample`, with the same arguments; returns the last frame's tokens."""
    return deque(sample(model, labels, **arguments), maxlen=1)[0].tokens


def exact_conditions(
    model: MAR, labels: Tensor, tokens: Tensor, mask: Tensor, predicted: Tensor, guided: bool
) -> tuple[Float[Tensor, "N E"], Float[Tensor, "N E"] | None]:
    """z of the `predicted` places, batch-major, from all tokens that are known.

    With guidance the batch runs twice, the second half without its labels: z and z_uncond.
    """
    if not guided:
        x = model.forward_encoder(tokens, mask, labels)  # (B, S, D)
        return model.forward_decoder(x, mask, predicted).flatten(0, 1), None  # (N, E)
    labels = torch.cat([labels, torch.full_like(labels, NO_CLASS)])  # (2B,)
    tokens, mask, predicted = (torch.cat([x, x]) for x in (tokens, mask, predicted))
    x = model.forward_encoder(tokens, mask, labels)  # (2B, S, D)
    z = model.forward_decoder(x, mask, predicted)  # (2B, K, E)
    z, z_uncond = z.flatten(0, 1).chunk(2)  # 2 x (N, E)
    return z, z_uncond


@contextmanager
def evaluating(model: torch.nn.Module):
    """Dropout off for the moment, so that a model may be sampled in the middle of its training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def resolve_labels(labels, batch_size: int | None, model: MAR, tokens: Tensor | None) -> Tensor:
    if labels is None:
        if batch_size is None:
            batch_size = None if tokens is None else len(tokens)
        if batch_size is None or batch_size < 1:
            raise ValueError(
                f"batch_size is {batch_size}; pass labels, or how many images to make without class"
            )
        return torch.full((batch_size,), NO_CLASS)
    return check_labels(labels, model.class_num, batch_size)


def resolve_order(order, model: MAR, batch_size: int, generator: Generators) -> Tensor:
    """The order as int64 (B, L); with a list of generators each image's row comes from its own."""
    if isinstance(order, Tensor):
        return check_order(order, model.seq_h, model.seq_w, batch_size)
    if isinstance(generator, (list, tuple)):
        rows = [make_order(order, model.seq_h, model.seq_w, 1, g) for g in generator]
        return torch.cat(rows)
    return make_order(order, model.seq_h, model.seq_w, batch_size, generator)


def start(
    model: MAR, batch_size: int, tokens: Tensor | None, known: Tensor | None
) -> tuple[Float[Tensor, "B L C"], Bool[Tensor, "B L"]]:
    """The tokens and the mask that generation begins from: nothing known, or what was given."""
    shape, device = (batch_size, model.seq_len, model.token_embed_dim), model.fake_latent.device
    if (tokens is None) != (known is None):
        raise ValueError("expected both `tokens` and `known`, or neither; got one of the two")
    if tokens is None or known is None:
        return torch.zeros(shape, device=device), torch.ones(
            shape[:2], dtype=torch.bool, device=device
        )
    if tuple(tokens.shape) != shape:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected {shape}")
    if known.dtype != torch.bool or tuple(known.shape) != shape[:2]:
        raise ValueError(
            f"known is {known.dtype} {tuple(known.shape)}; expected bool {shape[:2]}, True = given"
        )
    counts = known.sum(1)
    if (counts != counts[0]).any():
        row = int((counts != counts[0]).nonzero()[0])
        raise ValueError(
            f"row 0 of known has {int(counts[0])} given tokens, row {row} has {int(counts[row])}; "
            "expected the same number in each row, so paint such images one by one"
        )
    if known.all():
        raise ValueError("every token is known: there is nothing to generate")
    known = known.to(device)
    return tokens.to(device).float().masked_fill(~known[..., None], 0.0), ~known
