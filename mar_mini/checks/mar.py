"""Checks of chapter 7: the training loss, the average of the weights, one training step."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from mar_mini import MAR, masking, training
from mar_mini.checks import Failed, close, exercise, refuse_mistakes, same_shape
from mar_mini.mar import NO_CLASS, StepDraws

# The training loss --------------------------------------------------------------------------------


def _model() -> MAR:
    """A tiny model in float64 in which everything matters: no layer starts at zero."""
    model = MAR(
        img_size=8,
        vae_stride=1,
        patch_size=2,
        vae_embed_dim=2,
        class_num=4,
        encoder_embed_dim=16,
        encoder_depth=1,
        encoder_num_heads=2,
        decoder_embed_dim=24,
        decoder_depth=1,
        decoder_num_heads=2,
        buffer_size=3,
        diffloss_d=1,
        diffloss_w=12,
        attn_dropout=0.0,
        proj_dropout=0.0,
        diffusion_batch_mul=2,
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (*model.diffloss.parameters(), model.class_emb.weight, model.fake_latent):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def _batch(model: MAR, hidden: int, dropped: list[bool]) -> tuple[Tensor, Tensor, StepDraws]:
    generator = torch.Generator().manual_seed(hidden)
    latents = torch.randn(len(dropped), 2, 8, 8, generator=generator).double()
    labels = torch.randint(4, (len(dropped),), generator=generator)
    order = masking.random(4, 4, len(dropped), generator)
    drawn = model.draw(len(dropped), generator, mask=masking.mask_by_order(order, hidden))
    drawn = replace(drawn, dropped=torch.tensor(dropped), noise=drawn.noise.double())
    return latents, labels, drawn


@exercise(reference=MAR.forward)
@torch.enable_grad()
def training_loss(candidate):
    model = _model()
    # 8 of 16 hidden: as many as are known, so that taking one for the other shows by its value
    for hidden, dropped, model.diffusion_batch_mul in (
        (8, [False, True, False], 2),
        (13, [False] * 5, 3),
        (1, [True, False], 2),
        (16, [False, True], 2),
    ):
        latents, labels, drawn = _batch(model, hidden, dropped)
        what = f"training_loss with {hidden} of 16 tokens hidden"
        got, again = (_loss(candidate, model, latents, labels, drawn, what) for _ in range(2))
        if isinstance(got, dict):
            raise Failed(f"{what} returns a dictionary; expected the loss alone")
        same_shape(got, (), what)
        if not torch.equal(got, again):
            raise Failed(
                f"{what} gives another number each time: take mask, dropped, t and noise "
                "from `drawn`, and draw nothing"
            )
        want = model(latents, labels, drawn=drawn)
        for idea, value in _loss_mistakes(model, latents, labels, drawn):
            refuse_mistakes(got, want, {idea: value}, what)
        close(got, want, what)
        parts = {
            "the classes": model.class_emb.weight,
            "the mask token": model.mask_token,
            "the encoder": model.encoder_norm.bias,
            "the decoder": model.decoder_norm.weight,
            "the head": model.diffloss.net.input_proj.weight,
        }
        _gradients_of(got, want, parts, what)


def _loss(candidate, model: MAR, latents: Tensor, labels: Tensor, drawn: StepDraws, what: str):
    given = {"latents": latents.clone(), "labels": labels.clone()}
    masks = drawn.mask.clone(), drawn.dropped.clone()
    hidden = []  # what the encoder was told to hide

    def forward_encoder(x, mask, labels, *count):
        hidden.append(mask)
        return MAR.forward_encoder(model, x, mask, labels, *count)

    def forward(*given, **more):
        raise Failed(
            f"{what} calls the model, whose forward is what you write here: put it "
            "together from its patchify, forward_encoder, forward_decoder and diffloss"
        )

    model.forward_encoder, model.forward = forward_encoder, forward
    try:
        got = candidate(model, given["latents"], given["labels"], drawn=drawn)
    except Exception as error:
        if any(isinstance(x, Tensor) and not (x.bool() & drawn.mask).any() for x in hidden):
            raise Failed(
                f"{what} shows the encoder what it should hide: its mask is drawn.mask, "
                f"True where a token is hidden ({error})"
            ) from error
        rows = len(drawn.t) // model.diffusion_batch_mul
        if any(word in str(error) for word in ("size", "shape", "dimension", "expand")):
            raise Failed(
                f"{what} stops at sizes that do not fit. The head wants one row for each hidden "
                f"token, {rows} here, in target and z, and {len(drawn.t)} in t and noise, which is "
                f"repeat = model.diffusion_batch_mul times as many ({error})"
            ) from error
        raise
    finally:
        del model.forward_encoder, model.forward
    if not torch.equal(given["labels"], labels):
        raise Failed(
            f"{what} changed the labels it was given: masked_fill, without an underscore, "
            "makes new ones"
        )
    if not (
        torch.equal(given["latents"], latents)
        and torch.equal(masks[0], drawn.mask)
        and torch.equal(masks[1], drawn.dropped)
    ):
        raise Failed(f"{what} changed what it was given; compute new tensors")
    return got


def _loss_mistakes(model: MAR, latents, labels, drawn: StepDraws) -> Iterator[tuple[str, Tensor]]:
    """What the wrong ideas give, each only where it can be computed."""
    tokens, mask, repeat = model.patchify(latents), drawn.mask, model.diffusion_batch_mul
    told = labels.masked_fill(drawn.dropped, NO_CLASS)

    def z_of(labels=told, hide=mask, wanted=mask, x=tokens):
        return model.forward_decoder(model.forward_encoder(x, hide, labels), hide, wanted)

    def loss(z, target, name="loss", **given):
        given = {"repeat": repeat, "t": drawn.t, "noise": drawn.noise} | given
        return model.diffloss.terms(target.flatten(0, 1), z.flatten(0, 1), **given)[name]

    hidden, z = masking.keep(tokens, mask), z_of()  # (B, M, C), (B, M, E)
    count, mean, everything = hidden.shape[0] * hidden.shape[1], loss(z, hidden), mask | True
    first_row = mask[:1].expand_as(mask)
    doubled = [x.flatten(0, 1).repeat_interleave(repeat, 0)[None] for x in (z, hidden)]
    yield from {
        "ignores `dropped`: those labels become -1, no class": loss(z_of(labels), hidden),
        "hides the labels that are not dropped: True means hide": loss(
            z_of(labels.masked_fill(~drawn.dropped, NO_CLASS)), hidden
        ),
        "hides every label; only where `dropped` is True": loss(
            z_of(torch.full_like(labels, NO_CLASS)), hidden
        ),
        "makes class 0 of a dropped label; no class is -1": loss(
            z_of(labels.masked_fill(drawn.dropped, 0)), hidden
        ),
        "shows the encoder nothing at all: it reads the known tokens": loss(
            z_of(hide=everything), hidden
        ),
        "shows the encoder and the decoder what they should hide, so that nothing is left to "
        "predict: True means hidden": loss(z_of(hide=mask & False), hidden),
        "uses the first row's mask for all images; each has its own": loss(
            z_of(hide=first_row, wanted=first_row), masking.keep(tokens, first_row)
        ),
        "takes the noise levels in the wrong order: all tokens at their first level, then all at "
        "their second, as `repeat=` does": loss(*doubled, repeat=1),
        "uses only the first noise level of each token: hand over all of t and noise, and repeat = "
        "model.diffusion_batch_mul": loss(
            z, hidden, repeat=1, t=drawn.t[:count], noise=drawn.noise[:count]
        ),
        "compares with the tokens of other images": loss(z, hidden.flip(0)),
        "mixes up the rows: z and target must stand in the same order": loss(
            z, hidden.transpose(0, 1)
        ),
        "takes the error of the noise alone (`mse`); call the head itself": loss(z, hidden, "mse"),
        "takes the variance's part alone (`vb`); call the head itself": loss(z, hidden, "vb"),
        "sums over the tokens; the head gives their mean, leave it as it is": mean * len(drawn.t),
        "multiplies the loss by `repeat`; it is a mean already": mean * repeat,
        "divides the loss by `repeat`; it is a mean already": mean / repeat,
        "divides the loss by the number of images; it is a mean already": mean / len(labels),
    }.items()
    if 2 * hidden.shape[1] != mask.shape[1]:
        return
    known = masking.keep(tokens, ~mask)  # (B, M, C)
    yield from {
        "hides the known tokens and shows the hidden ones: True means hidden": loss(
            z_of(hide=~mask), hidden
        ),
        "shows the encoder what it should hide, and hides what is known: its mask is drawn.mask": (
            loss(
                model.forward_decoder(model.forward_encoder(tokens, ~mask, told), mask, mask),
                hidden,
            )
        ),
        "trains on the known tokens: those that the model is given need no prediction": loss(
            z_of(wanted=~mask), known
        ),
        "turns the whole mask round: True means hidden": loss(
            z_of(hide=~mask, wanted=~mask), known
        ),
        "compares with the known tokens; the target are the hidden ones": loss(z, known),
        "has z of all places, and the head mixes them up; it is wanted where tokens are hidden": (
            model.diffloss.token_terms(
                hidden.flatten(0, 1),
                z_of(wanted=everything).flatten(0, 1),
                repeat=repeat,
                t=drawn.t,
                noise=drawn.noise,
            )["loss"].mean()
        ),
        "asks for z at the known places; it is wanted where tokens are hidden": loss(
            z_of(wanted=~mask), hidden
        ),
    }.items()


def _gradients_of(got: Tensor, want: Tensor, parts: dict[str, Tensor], what: str) -> None:
    if not got.requires_grad:
        raise Failed(
            f"{what} has no gradient: nothing could be learned from it; return the tensor "
            "itself, without detach, item or no_grad"
        )
    pairs = [torch.autograd.grad(x, list(parts.values()), allow_unused=True) for x in (got, want)]
    for name, mine, theirs in zip(parts, *pairs, strict=True):
        if theirs is not None and theirs.any() and (mine is None or not mine.any()):
            raise Failed(f"{what} passes no gradient to {name}: it would not learn; detach nothing")
        if theirs is not None:
            close(mine, theirs, f"{what}: the gradient for {name}")


# The average of the weights -----------------------------------------------------------------------


@exercise(reference=training.ema_step)
def ema_step(candidate):
    generator = torch.Generator().manual_seed(7)
    before, current = (
        [torch.randn(s, generator=generator).double() for s in ((4, 3), (5,), ())] for _ in range(2)
    )
    cases = ((0, 0.9999, 0.1), (1, 0.9999, 0.1), (3, 0.9999, 0.5), (40, 0.9, 1.0), (900, 0.99, 0.1))
    got, want, mistakes = [], [], []
    for n, decay, window in cases:
        what = f"ema_step at n = {n} with decay={decay}, window={window}"
        got.append(_averaged(candidate, before, current, what, n, decay=decay, window=window))
        want.append(_average(before, current, min(decay, 1 - 1 / (1 + window * n))))
        mistakes.append(_average_mistakes(before, current, n, decay, window))
    # two ideas may agree in one case: together the cases tell them apart
    together = {idea: torch.cat([m[idea] for m in mistakes]) for idea in mistakes[0]}
    refuse_mistakes(torch.cat(got), torch.cat(want), together, "ema_step")
    for one, wanted, (n, decay, window) in zip(got, want, cases, strict=True):
        close(one, wanted, f"ema_step at n = {n} with decay={decay}, window={window}: the average")


def _averaged(candidate, before, current, what: str, n: int, **settings) -> Tensor:
    """What becomes of the averaged weights; they and nothing else may change."""
    averaged, given = [x.clone() for x in before], [x.clone() for x in current]
    handed = list(averaged)
    try:
        candidate(handed, given, n, **settings)
    except ZeroDivisionError as error:
        raise Failed(f"{what} divides by zero: k divides by 1 + window * n") from error
    if not all(torch.equal(a, b) for a, b in zip(given, current, strict=True)):
        raise Failed(
            f"{what} changed the current weights: they are being trained, write into the "
            "averaged ones"
        )
    if any(a.data_ptr() == c.data_ptr() for a, c in zip(handed, given, strict=False)):
        raise Failed(
            f"{what} makes the averaged weights the very memory of the current ones, "
            "which the next step changes: copy the numbers (copy_, lerp_)"
        )
    if len(handed) != len(averaged) or any(
        a is not b for a, b in zip(handed, averaged, strict=True)
    ):
        raise Failed(
            f"{what} puts new tensors into the list; the model keeps its old ones: change "
            "those in place (mul_, add_, copy_, lerp_)"
        )
    return _flat(averaged)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def _average(before: list[Tensor], current: list[Tensor], k: float) -> Tensor:
    return k * _flat(before) + (1 - k) * _flat(current)


def _average_mistakes(before, current, n, decay, window) -> dict[str, Tensor]:
    reach = 1 - 1 / (1 + window * n)
    k = min(decay, reach)
    old, new = _flat(before), _flat(current)
    first_only = torch.cat([_average(before[:1], current[:1], k), _flat(before[1:])])
    by = {
        "takes k for 1 - k: the old average keeps the share k": 1 - k,
        "knows no window: without it a short run is averaged with its beginning": decay,
        "takes the larger of the two; k is the smaller, so that `decay` is its limit": (
            max(decay, reach)
        ),
        "has no limit: k is at most `decay`": reach,
        "counts this step as averaged already; n counts the steps before it": (
            min(decay, 1 - 1 / (1 + window * (n + 1)))
        ),
        "counts one step too few: n is the number of steps before this one, not n - 1": (
            min(decay, 1 - 1 / (1 + window * (n - 1)))
        ),
        "counts one step too few: n is the number of steps before this one, not max(n - 1, 0)": (
            min(decay, 1 - 1 / (1 + window * max(n - 1, 0)))
        ),
        "leaves out the 1 that is added to window * n: k is 1 - 1 / (1 + window * n)": (
            min(decay, 1 - 1 / (window * n)) if n else 0
        ),
        "takes 1 / (window * n) for k; it is 1 - 1 / (1 + window * n)": (
            min(decay, 1 / (window * n)) if n else decay
        ),
        "forgets the window: n is multiplied by it": min(decay, 1 - 1 / (1 + n)),
        "divides by the window; n is multiplied by it": min(decay, 1 - 1 / (1 + n / window)),
        "takes the share 1 / (1 + window * n) for k; it is one minus that": (
            min(decay, 1 / (1 + window * n))
        ),
        "takes 1 - decay for decay": min(1 - decay, reach),
        "multiplies decay and the window's share; take the smaller": decay * reach,
        "adds 1 outside: k is 1 - 1 / (1 + window * n)": (
            min(decay, 1 - 1 / (window * n)) if n else decay
        ),
    }
    return {
        "changed nothing: `x = ...` gives a new tensor a name, write into the old one": old,
        "changed the first tensor alone; all of them are weights": first_only,
        **{idea: _average(before, current, share) for idea, share in by.items()},
        "copies the current weights: that is no average": new,
        "adds the current weights on top: the old average must shrink to its share k": (
            old + (1 - k) * new
        ),
        "shrinks the old average and adds the current weights whole: their share is 1 - k": (
            k * old + new
        ),
    }


# One training step --------------------------------------------------------------------------------


class _Problem:
    """A tiny model to train, on batches so different in size that clipping matters."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.averaged = copy.deepcopy(self.model).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(training.parameter_groups(self.model, 0.3), lr=0.5)
        self.x = torch.randn(9, 4, generator=generator).double()
        self.calls = self.averages = 0

    def loss(self) -> Tensor:
        self.calls += 1
        return (self.model(self.x * (1, 5, 0.2, 2, 8)[self.step]).square() * (1 + self.step)).mean()

    def average(self, model: nn.Module) -> None:
        self.averages += 1
        training.ema_step(
            list(self.averaged.parameters()),
            list(model.parameters()),
            self.step,
            decay=0.9,
            window=1.0,
        )

    def run(self, step_function: Callable, grad_clip: float = 8) -> list:
        returned = []
        for self.step in range(5):
            rate = (0.02, 0.1, 0.05, 0.2, 0.01)[self.step]
            returned.append(
                step_function(
                    self.model,
                    self.optimiser,
                    self.loss,
                    self.average,
                    rate=rate,
                    grad_clip=grad_clip,
                )
            )
        return returned

    def weights(self) -> Tensor:
        return _flat(list(self.model.parameters()))


def step_by_hand(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    average: Callable[[nn.Module], None],
    *,
    rate: float,
    grad_clip: float,
) -> Tensor:
    """Take one step as `Training` does, for a loss that is computed in one go; returns the loss."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad()
    value = loss()
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimiser.step()
    average(model)
    return value.detach()


@exercise(reference=step_by_hand)
@torch.enable_grad()
def training_step(candidate):
    what = "after five steps of training_step the model"
    mine, theirs = _Problem(), _Problem()
    returned = mine.run(candidate)
    want = theirs.run(step_by_hand)
    if mine.calls > theirs.calls:
        raise Failed(
            "training_step computes the loss more than once in a step: that costs twice, "
            "and after the step it is another; keep the first, for backward and to return "
            "it"
        )
    if mine.averages != theirs.averages:
        raise Failed(
            f"training_step calls `average` {mine.averages} times in five steps, expected "
            "once in each"
        )
    other_limit = _Problem()
    other_limit.run(candidate, grad_clip=TINY)
    ignores = torch.equal(mine.weights(), other_limit.weights())
    for idea, wrong in STEP_MISTAKES.items():
        other, other_tiny = _Problem(), _Problem()
        other.run(wrong)
        other_tiny.run(wrong, grad_clip=TINY)
        # what knows no limit is only taken for a mistake that knows none either
        if ignores == torch.equal(other.weights(), other_tiny.weights()):
            refuse_mistakes(mine.weights(), theirs.weights(), {idea: other.weights()}, what)
    if ignores:
        raise Failed("training_step ignores grad_clip: with another limit the weights are the same")
    close(mine.weights(), theirs.weights(), f"{what}'s weights, one after the other,")
    averages = [_flat(list(p.averaged.parameters())) for p in (mine, theirs)]
    early = _Problem()
    early.run(_average_first)
    wrong = {
        "takes the weights before the step; call it when they are new": (
            _flat(list(early.averaged.parameters()))
        )
    }
    refuse_mistakes(*averages, wrong, "the average")
    close(*averages, "the average")
    for value, expected in zip(returned, want, strict=True):
        if value is None:
            raise Failed("training_step returns None, expected the loss")
        if callable(value) and not isinstance(value, Tensor):
            raise Failed("training_step returns the function `loss`, expected what it gave")
        if not isinstance(value, Tensor):
            raise Failed(
                f"training_step returns a value of type {type(value).__name__}, expected "
                "the tensor, detached: whoever calls it wants value.item()"
            )
        if value.requires_grad:
            raise Failed(
                "training_step returns a loss that holds on to the whole graph of its "
                "step: detach it"
            )
        close(value, float(expected), "the loss that training_step returns")


def _step(
    model, optimiser, loss, average, *, rate, grad_clip, clear=True, clip=None, groups=slice(None)
) -> None:
    for group in optimiser.param_groups[groups]:
        group["lr"] = rate
    if clear:
        optimiser.zero_grad()
    loss().backward()
    (clip or nn.utils.clip_grad_norm_)(list(model.parameters()), grad_clip)
    optimiser.step()
    average(model)


def _no_clip(parameters, limit) -> None:
    """Gradients stay as they are."""


def _average_first(model, optimiser, loss, average, **settings) -> None:
    average(model)
    _step(model, optimiser, loss, lambda model: None, **settings)


def _own_rate(model, optimiser, loss, average, *, rate, grad_clip) -> None:
    _step(model, optimiser, loss, average, rate=0.5, grad_clip=grad_clip)


def _rate_too_late(model, optimiser, loss, average, *, rate, grad_clip) -> None:
    old = optimiser.param_groups[0]["lr"]
    _step(model, optimiser, loss, average, rate=old, grad_clip=grad_clip)
    for group in optimiser.param_groups:
        group["lr"] = rate


def _scaled_rate(model, optimiser, loss, average, *, rate, grad_clip) -> None:
    old = optimiser.param_groups[0]["lr"]
    _step(model, optimiser, loss, average, rate=old * rate, grad_clip=grad_clip)


def _step_too_early(model, optimiser, loss, average, *, rate, grad_clip) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    optimiser.zero_grad()
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    average(model)


def _by_hand(model, optimiser, loss, average, *, rate, grad_clip) -> None:
    optimiser.zero_grad()
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad
    average(model)


def _step_twice(model, optimiser, loss, average, **settings) -> None:
    _step(model, optimiser, loss, lambda model: optimiser.step(), **settings)
    average(model)


def _other_norm(parameters, limit) -> None:
    nn.utils.clip_grad_norm_(parameters, limit, norm_type=1)


def _clip_each(parameters, limit) -> None:
    for parameter in parameters:
        nn.utils.clip_grad_norm_([parameter], limit)


def _to_length(parameters, limit) -> None:
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    for parameter in parameters:
        parameter.grad.mul_(limit / norm)


def _with(**settings) -> Callable:
    return lambda *args, **given: _step(*args, **given, **settings)


TINY = 1e-9  # a limit for gradients at which even AdamW, which divides by their size, hardly moves
STEP_MISTAKES = {
    "has the weights it began with, nothing was trained: clear the gradients, then backward, then "
    "optimiser.step()": lambda *args, **given: None,
    "has summed the gradients of all steps: `backward` adds, so clear them first (zero_grad)": (
        _with(clear=False)
    ),
    "was trained without clipping: call clip_grad_norm_ after backward and before the step": (
        _with(clip=_no_clip)
    ),
    "was trained with single values clipped; limit the norm of the whole gradient": (
        _with(clip=nn.utils.clip_grad_value_)
    ),
    "was trained with each tensor clipped for itself; the norm is that of all gradients together": (
        _with(clip=_clip_each)
    ),
    "was trained with every gradient brought to the length of grad_clip; shorter ones stay": (
        _with(clip=_to_length)
    ),
    "was trained at the learning rate that the optimiser came with; write `rate` into its groups": (
        _own_rate
    ),
    "was trained at the rate of the step before: set it before optimiser.step()": _rate_too_late,
    "was trained at the old rate times `rate`; `rate` is the rate itself": _scaled_rate,
    "was trained at the new rate in the first group only; set it in each of param_groups": (
        _with(groups=slice(1))
    ),
    "was trained at the new rate in the last group only; set it in each of param_groups": (
        _with(groups=slice(-1, None))
    ),
    "takes each step with the gradients of the step before: backward comes first": _step_too_early,
    "has taken two steps with each gradient; call optimiser.step() once": _step_twice,
    "was trained with the sum of all absolute values limited (norm_type=1); the usual norm is that "
    "of clip_grad_norm_ without it": _with(clip=_other_norm),
    "was trained by subtracting the gradient; leave the change to optimiser.step()": _by_hand,
}
