"""The autoregressive loop: a few tokens at a time, in any order (MAR section 3.4)."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mar_mini import masking
from mar_mini.configs import choose
from mar_mini.diffloss import Generators, reverse_walk
from mar_mini.diffusion import Solver
from mar_mini.mar import MAR, NO_CLASS, check_labels

CfgSchedule = Callable[[float, int, int], float]  # (cfg, num_masked, length) -> weight of a step
# (tokens, mask, places to predict, guided or not) -> z, z_uncond of these places, batch-major
Conditions = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Frame:
    """The state after one autoregressive step."""

    step: int  # 0 for the first
    tokens: Tensor  # (B, L, C) float32; zero where still masked
    predicted: Tensor  # (B, L) bool, True = predicted in this step
    mask: Tensor  # (B, L) bool, True = still masked


def linear_cfg(cfg: float, num_masked: int, length: int) -> float:
    """From 1 to almost cfg, in step with the share of tokens that are known (MAR appendix B)."""
    return 1.0 + (cfg - 1.0) * (length - num_masked) / length


CFG_SCHEDULES: dict[str, CfgSchedule] = {
    "linear": linear_cfg,
    "constant": lambda cfg, num_masked, length: cfg,
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
    solver: str | Solver = "ddpm",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    conditions: Callable[[MAR, Tensor], Conditions] | None = None,
    order: str | masking.Order | Tensor = "random",
    generator: Generators = None,
    tokens: Tensor | None = None,
    known: Tensor | None = None,
) -> Iterator[Frame]:
    """Generate tokens step by step; each step yields a `Frame`.

    labels              (B,) classes, -1 = none; None for `batch_size` images without class
    num_iter            autoregressive steps, 1 to L (to the number of unknown tokens)
    cfg                 guidance weight; 1 = none. Without labels it has nothing to guide
    cfg_schedule        "linear", "constant" or a function
    temperature         scale of the noise that DDPM injects; of the initial noise for the others
    num_sampling_steps  diffusion steps, 2 to 1000; the model's default if None. Two numbers: of the
                        first tokens and of the last, which decide less (DiSA, Zhao et al. 2025)
    clip                bound on |x0|; see `mar_mini.diffusion` on the terminal step
    solver              "ddpm", "ddim", or a function like them, such as `fast.dpm_solver`
    guidance_interval   shares of known tokens between which there is guidance; other steps cost
                        half as much (Kynkäänniemi et al. 2024, there for noise levels)
    conditions          (model, labels) -> `Conditions`, such as `fast.Reuse`; exact if None
    order               name, function (see `masking`) or int64 (B, L), first to last
    generator           one, or a list of B: each image then depends on its own alone. Contract: at
                        each step the head draws batch-major, positions ascending
    tokens, known       (B, L, C) and bool (B, L), True = given: these stay as they are to the bit
                        and the rest is painted in; the same number in each row

    Raises ValueError for anything that does not fit, before the first step.
    """
    # which images, and what is known of them
    labels = resolve_labels(labels, batch_size, model, tokens).to(model.fake_latent.device)
    if isinstance(generator, (list, tuple)) and len(generator) != len(labels):
        raise ValueError(f"{len(generator)} generators for {len(labels)} images; pass one for each")
    tokens, mask = start(model, len(labels), tokens, known)

    # which tokens when
    order = resolve_order(order, model, len(labels), generator).to(mask.device)
    turn, unknown = masking.known_first(order, ~mask), masking.same_count(mask)
    schedule = masking.masked_after(unknown, num_iter)
    shares = [1 - masked / model.seq_len for masked in (unknown, *schedule[:-1])]

    # how each of them is drawn
    check_settings(clip, temperature, guidance_interval)
    cfg_schedule = choose("cfg_schedule", cfg_schedule, CFG_SCHEDULES)
    annealed = anneal(num_sampling_steps, shares)
    for num_steps in annealed:  # refuses an impossible number
        reverse_walk(solver, 2 if num_steps is None else num_steps)
    conditions = conditions and conditions(model, labels)
    fixed = {"temperature": temperature, "clip": clip, "solver": solver, "generator": generator}

    def loop(tokens: Tensor, mask: Tensor) -> Iterator[Frame]:
        steps = zip(schedule, shares, annealed, strict=True)
        for step, (left, share, num_steps) in enumerate(steps):
            guided = guidance_interval[0] <= share < guidance_interval[1]
            # the published loop counts one token as masked in the last step as well
            weight = cfg_schedule(cfg, max(1, left), model.seq_len)
            weight = weight if guided and (labels != NO_CLASS).any() else 1.0
            settings = {**fixed, "num_sampling_steps": num_steps, "conditions": conditions}
            before = mask
            tokens, mask = one_step(model, labels, tokens, mask, turn, left, weight, **settings)
            yield Frame(step, tokens, before & ~mask, mask)

    return loop(tokens, mask)


def one_step(
    model: MAR, labels, tokens, mask, order, num_masked: int, cfg: float, *, conditions=None, **head
) -> tuple[Float[Tensor, "B L C"], Bool[Tensor, "B L"]]:
    """Take one autoregressive step: which tokens come next, draw them, put them in their places.

    tokens, mask  as they are before this step; the new ones are returned
    order         (B, L) int64, first to last; places that are known come first
    num_masked    how many tokens of each image are still masked after this step
    head          further arguments of the head's `sample`
    """
    conditions = conditions or partial(exact_conditions, model, labels)
    still = masking.mask_by_order(order, num_masked)  # (B, L)
    predicted = mask & ~still  # (B, L)
    with torch.no_grad(), evaluating(model):
        z, z_uncond = conditions(tokens, mask, predicted, cfg != 1.0)  # (N, E)
        drawn = model.diffloss.sample(z, z_uncond, cfg=cfg, **head)  # (N, C)
    return tokens.masked_scatter(predicted[..., None], drawn), still


def generate(model: MAR, labels=None, **arguments) -> Float[Tensor, "B L C"]:
    """Take all steps of `sample`, with its arguments; return the last frame's tokens."""
    return deque(sample(model, labels, **arguments), maxlen=1)[0].tokens


def exact_conditions(
    model: MAR, labels, tokens, mask, predicted, guided: bool
) -> tuple[Float[Tensor, "N E"], Float[Tensor, "N E"] | None]:
    """Compute z and, if guided, z_uncond of the `predicted` places from all known tokens."""
    if guided:  # the batch runs twice, the second time without its labels
        labels = torch.cat([labels, torch.full_like(labels, NO_CLASS)])  # (2B,)
        tokens, mask, predicted = (torch.cat([x, x]) for x in (tokens, mask, predicted))
    x = model.forward_encoder(tokens, mask, labels)  # (B or 2B, S, D)
    z = model.forward_decoder(x, mask, predicted).flatten(0, 1)  # (N or 2N, E)
    return z.chunk(2) if guided else (z, None)


@contextmanager
def evaluating(model: torch.nn.Module):
    """Turn dropout off for the moment, so that a model may be sampled while it is trained."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def anneal(num_steps: int | tuple[int, int] | None, shares: list[float]) -> list[int | None]:
    """Spread diffusion steps over the iterations, in a straight line from first to last."""
    if not isinstance(num_steps, tuple):
        return [num_steps] * len(shares)
    (first, last), length = num_steps, (shares[-1] - shares[0]) or 1.0
    return [round(first + (last - first) * (share - shares[0]) / length) for share in shares]


# At the door --------------------------------------------------------------------------------------


def check_settings(clip: float | None, temperature: float, guidance_interval) -> None:
    """Raise ValueError for settings of `sample` that mean nothing."""
    lowest, highest = guidance_interval
    if not 0 <= lowest < highest <= 1:
        want = "shares of known tokens, 0 <= first < second <= 1"
        raise ValueError(f"guidance_interval is {guidance_interval}; expected {want}")
    if clip is not None and clip <= 0:
        raise ValueError(f"clip is {clip}; expected more than 0, the largest |x0|, or None")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; expected 0 or more")


def resolve_labels(labels, batch_size: int | None, model: MAR, tokens: Tensor | None) -> Tensor:
    if labels is not None:
        return check_labels(labels, model.class_num, batch_size)
    if batch_size is None and tokens is not None:
        batch_size = len(tokens)
    if batch_size is None or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; pass labels, or how many images to make")
    return torch.full((batch_size,), NO_CLASS)


def resolve_order(order, model: MAR, batch_size: int, generator: Generators) -> Tensor:
    """Give the order as int64 (B, L); of a list of generators each makes its own image's row."""
    grid = (model.seq_h, model.seq_w)
    if isinstance(order, Tensor):
        return masking.check_order(order, *grid, batch_size)
    if isinstance(generator, (list, tuple)):
        return torch.cat([masking.make_order(order, *grid, 1, g) for g in generator])
    return masking.make_order(order, *grid, batch_size, generator)


def start(model: MAR, batch_size: int, tokens, known) -> tuple[Tensor, Tensor]:
    """Give the tokens and the mask to begin from: nothing known, or what was given."""
    shape, device = (batch_size, model.seq_len, model.token_embed_dim), model.fake_latent.device
    if (tokens is None) != (known is None):
        raise ValueError("expected both `tokens` and `known`, or neither; got one of the two")
    if tokens is None:
        return torch.zeros(shape, device=device), torch.ones(shape[:2], device=device).bool()
    if tuple(tokens.shape) != shape:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected {shape}")
    if known.dtype != torch.bool or tuple(known.shape) != shape[:2]:
        raise ValueError(
            f"known is {known.dtype} {tuple(known.shape)}; expected bool {shape[:2]}, True = given"
        )
    if masking.same_count(known, "known") == model.seq_len:
        raise ValueError("every token is known: there is nothing to generate")
    known = known.to(device)
    return tokens.to(device).float().masked_fill(~known[..., None], 0.0), ~known
