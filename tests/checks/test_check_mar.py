"""The checks of chapter 7 refuse plausible mistakes, each by the name of its idea."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mar_mini import MAR, masking, training
from mar_mini.checks import Failed
from mar_mini.checks import mar as check


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("MAR_MINI_STRICT", "1")


def parts(model, latents, labels, drawn, *, fill=-1, hide=None, wanted=None):
    """tokens, z and target as rows; the mask of the encoder and the wanted places may be others."""
    hide = drawn.mask if hide is None else hide
    tokens, labels = model.patchify(latents), labels.masked_fill(drawn.dropped, fill)
    x = model.forward_encoder(tokens, hide, labels)
    z = model.forward_decoder(x, hide, drawn.mask if wanted is None else wanted)
    return tokens, z.flatten(0, 1), masking.keep(tokens, drawn.mask).flatten(0, 1)


def head(model, target, z, drawn, **changes):
    given = {"repeat": model.diffusion_batch_mul, "t": drawn.t, "noise": drawn.noise} | changes
    return model.diffloss(target, z, **given)


def loss(model, latents, labels, drawn, **changes):
    _, z, target = parts(model, latents, labels, drawn, **changes)
    return head(model, target, z, drawn)


def with_drawn(**change):
    """The loss with one thing of `drawn` computed otherwise."""
    ((name, new),) = change.items()
    return lambda m, x, y, *, drawn: loss(m, x, y, replace(drawn, **{name: new(drawn)}))


def with_parts(use):
    """The loss of some rows: use(model, tokens, z, target, drawn)."""

    def wrong(model, latents, labels, *, drawn):
        return use(model, *parts(model, latents, labels, drawn), drawn)

    return wrong


def with_masks(**masks):
    """The loss where `hide` or `wanted` is another function of the mask."""

    def wrong(m, x, y, *, drawn):
        return loss(m, x, y, drawn, **{name: f(drawn.mask) for name, f in masks.items()})

    return wrong


def known_as_target(model, tokens, z, target, drawn):
    return head(model, masking.keep(tokens, ~drawn.mask).flatten(0, 1), z, drawn)


def known_only(model, latents, labels, *, drawn):
    tokens, z, _ = parts(model, latents, labels, drawn, wanted=~drawn.mask)
    return head(model, masking.keep(tokens, ~drawn.mask).flatten(0, 1), z, drawn)


def interleaved(model, tokens, z, target, drawn):
    rows = (x.repeat_interleave(2, 0) for x in (target, z))
    return head(model, *rows, drawn, repeat=1)


def first_level(model, tokens, z, target, drawn):
    n = len(z)
    return head(model, target, z, drawn, repeat=1, t=drawn.t[:n], noise=drawn.noise[:n])


def other_rows(model, tokens, z, target, drawn):
    images = len(tokens)
    return head(model, target.unflatten(0, (images, -1)).transpose(0, 1).flatten(0, 1), z, drawn)


def own_draws(model, latents, labels, *, drawn):
    return MAR.forward(model, latents, labels)


def in_place(model, latents, labels, *, drawn):
    labels[drawn.dropped] = -1
    return loss(model, latents, labels, drawn)


def rounds(model, latents, labels, *, drawn):
    latents.round_()
    return loss(model, latents, labels, drawn)


def all_places(model, latents, labels, *, drawn):
    return loss(model, latents, labels, drawn, wanted=torch.ones_like(drawn.mask))


def no_repeat(model, tokens, z, target, drawn):
    return head(model, target, z, drawn, repeat=1)


def blind(model, latents, labels, *, drawn):
    _, z, target = parts(model, latents, labels, drawn)
    return head(model, target, z.detach(), drawn)


def frozen(model, latents, labels, *, drawn):
    with torch.no_grad():
        return loss(model, latents, labels, drawn)


def encoder_told(hide):
    """The encoder alone hides other places."""

    def wrong(model, latents, labels, *, drawn):
        tokens, labels = model.patchify(latents), labels.masked_fill(drawn.dropped, -1)
        z = model.forward_decoder(
            model.forward_encoder(tokens, hide(drawn.mask), labels), drawn.mask, drawn.mask
        )
        return head(model, masking.keep(tokens, drawn.mask).flatten(0, 1), z.flatten(0, 1), drawn)

    return wrong


def terms(pick):
    return lambda m, x, y, *, drawn: pick(MAR.forward(m, x, y, drawn, return_terms=True))


def scaled(factor):
    return lambda m, x, y, *, drawn: loss(m, x, y, drawn) * factor(drawn)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (with_drawn(dropped=lambda d: d.dropped & False), "ignores `dropped`"),
        (with_drawn(dropped=lambda d: ~d.dropped), "labels that are not dropped"),
        (with_drawn(dropped=lambda d: d.dropped | True), "hides every label"),
        (lambda m, x, y, *, drawn: loss(m, x, y, drawn, fill=0), "class 0 of a dropped label"),
        (with_drawn(mask=lambda d: ~d.mask), "turns the whole mask round"),
        (with_drawn(mask=lambda d: d.mask[:1].expand_as(d.mask)), "first row's mask"),
        (with_masks(hide=torch.logical_not), "shows the hidden ones"),
        (with_masks(hide=torch.ones_like), "shows the encoder nothing"),
        (encoder_told(torch.zeros_like), "shows the encoder what it should hide: its mask"),
        (encoder_told(torch.logical_not), "shows the encoder what it should hide, and hides"),
        (with_masks(hide=torch.zeros_like), "encoder and the decoder what they should"),
        (with_parts(lambda m, tokens, z, t, d: head(m, t, z, d, repeat=2)), "not fit|Type-check"),
        (with_masks(wanted=torch.logical_not), "asks for z at the known places"),
        (known_only, "trains on the known tokens"),
        (with_parts(known_as_target), "the target are the hidden ones"),
        (with_parts(interleaved), "noise levels in the wrong order"),
        (with_parts(first_level), "only the first noise level"),
        (with_parts(other_rows), "mixes up the rows"),
        (with_parts(lambda m, tokens, z, t, d: head(m, t.flip(0), z, d)), "is .*, expected"),
        (with_parts(no_repeat), "sizes that do not fit|Type-check"),
        (all_places, "has z of all places|Type-check"),  # the second while types are checked
        (scaled(lambda d: len(d.t)), "sums over the tokens"),
        (scaled(lambda d: 2), "multiplies the loss by `repeat`"),
        (scaled(lambda d: 0.5), "divides the loss by `repeat`"),
        (scaled(lambda d: 1 / len(d.mask)), "by the number of images"),
        (own_draws, "another number each time"),
        (in_place, "changed the labels"),
        (rounds, "changed what it was given"),
        (blind, "passes no gradient to the classes"),
        (frozen, "has no gradient"),
        (lambda m, x, y, *, drawn: m(x, y, drawn=drawn), "calls the model"),
        (terms(lambda found: found), "a dictionary"),
        (terms(lambda found: found["mse"]), "noise alone"),
        (terms(lambda found: found["vb"]), "part alone"),
        (terms(lambda found: found["loss"].item()), "of type float"),
    ],
)
def test_training_loss(wrong, message):
    with pytest.raises(Failed, match=message):
        check.training_loss(wrong)


def shares(k):
    """An average that keeps the share k(n, decay, window)."""

    def wrong(averaged, current, num_averaged, *, decay, window):
        keep = k(num_averaged, decay, window)
        for a, p in zip(averaged, current, strict=True):
            a.mul_(keep).add_(p, alpha=1 - keep)

    return wrong


def right_share(n, decay, window):
    return min(decay, 1 - 1 / (1 + window * n))


def renamed(averaged, current, num_averaged, *, decay, window):
    k = right_share(num_averaged, decay, window)
    for a, p in zip(averaged, current, strict=True):
        a = k * a + (1 - k) * p


def shared(averaged, current, num_averaged, *, decay, window):
    for average, weight in zip(averaged, current, strict=True):
        k = right_share(num_averaged, decay, window)
        average.data = k * average + (1 - k) * weight if k else weight


def relisted(averaged, current, num_averaged, *, decay, window):
    k = right_share(num_averaged, decay, window)
    averaged[:] = [k * a + (1 - k) * p for a, p in zip(averaged, current, strict=True)]


def first_only(averaged, current, num_averaged, **settings):
    shares(right_share)(averaged[:1], current[:1], num_averaged, **settings)


def the_other_way(averaged, current, num_averaged, **settings):
    shares(right_share)(current, averaged, num_averaged, **settings)


def on_top(averaged, current, num_averaged, *, decay, window):
    for a, p in zip(averaged, current, strict=True):
        a.add_(p, alpha=1 - right_share(num_averaged, decay, window))


def whole(averaged, current, num_averaged, *, decay, window):
    for a, p in zip(averaged, current, strict=True):
        a.mul_(right_share(num_averaged, decay, window)).add_(p)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (shares(lambda n, d, w: 1 - right_share(n, d, w)), "takes k for 1 - k"),
        (shares(lambda n, d, w: d), "knows no window"),
        (shares(lambda n, d, w: max(d, 1 - 1 / (1 + w * n))), "takes the larger"),
        (shares(lambda n, d, w: 1 - 1 / (1 + w * n)), "has no limit"),
        (shares(lambda n, d, w: right_share(n + 1, d, w)), "averaged already"),
        (shares(lambda n, d, w: right_share(n, d, 1)), "forgets the window"),
        (shares(lambda n, d, w: right_share(n, d, 1 / w)), "divides by the window"),
        (shares(lambda n, d, w: min(d, 1 / (1 + w * n))), "one minus that"),
        (shares(lambda n, d, w: min(1 - d, 1 - 1 / (1 + w * n))), "takes 1 - decay for decay"),
        (shares(lambda n, d, w: d * (1 - 1 / (1 + w * n))), "take the smaller"),
        (shares(lambda n, d, w: min(d, 1 - 1 / (w * n))), "divides by zero"),
        (shares(lambda n, d, w: right_share(n - 1, d, w)), "not n - 1"),
        (shares(lambda n, d, w: right_share(max(n - 1, 0), d, w)), "not max"),
        (shares(lambda n, d, w: min(d, 1 - 1 / (w * n)) if n else 0), "leaves out the 1"),
        (shares(lambda n, d, w: min(d, 1 / (w * n)) if n else d), "takes 1 / .window"),
        (shares(lambda n, d, w: 0), "copies the current weights"),
        (renamed, "changed nothing"),
        (relisted, "new tensors into the list"),
        (shared, "the very memory of the current ones"),
        (first_only, "first tensor alone"),
        (the_other_way, "changed the current weights"),
        (on_top, "on top"),
        (whole, "their share is 1 - k"),
    ],
)
def test_ema_step(wrong, message):
    with pytest.raises(Failed, match=message):
        check.ema_step(wrong)


def right_step(model, optimiser, loss, average, *, rate, grad_clip):
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad()
    value = loss()
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimiser.step()
    average(model)
    return value.detach()


def twice(model, optimiser, loss, average, **settings):
    right_step(model, optimiser, loss, average, **settings)
    return loss().detach()


def no_average(model, optimiser, loss, average, **settings):
    return right_step(model, optimiser, loss, lambda model: None, **settings)


def silent(*args, **settings):
    right_step(*args, **settings)


def holds_on(model, optimiser, loss, average, **settings):
    kept = []

    def remembered():
        kept.append(loss())
        return kept[0]

    right_step(model, optimiser, remembered, average, **settings)
    return kept[0]


def other_loss(*args, **settings):
    return 2 * right_step(*args, **settings)


def clips_higher(model, optimiser, loss, average, *, rate, grad_clip):
    return right_step(model, optimiser, loss, average, rate=rate, grad_clip=1.2 * grad_clip)


def clips_too_early(model, optimiser, loss, average, *, rate, grad_clip):
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    return right_step(model, optimiser, loss, average, rate=rate, grad_clip=1e9)


def clips_at(limit):
    def wrong(model, optimiser, loss, average, *, rate, grad_clip):
        return right_step(model, optimiser, loss, average, rate=rate, grad_clip=limit)

    return wrong


def returns(what):
    """A right step that returns something else."""

    def wrong(model, optimiser, loss, average, **settings):
        return what(right_step(model, optimiser, loss, average, **settings), loss)

    return wrong


NEVER = [idea for idea in check.STEP_MISTAKES if "nothing was trained" in idea]


@pytest.mark.parametrize("idea", list(check.STEP_MISTAKES))
def test_training_step_names_what_it_knows(idea):
    with pytest.raises(Failed) as error:
        check.training_step(check.STEP_MISTAKES[idea])
    assert idea in str(error.value) or (idea in NEVER and "`average` 0 times" in str(error.value))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (twice, "computes the loss more than once"),
        (no_average, "calls `average` 0 times"),
        (check._average_first, "takes the weights before the step"),
        (silent, "returns None"),
        (holds_on, "holds on to the whole graph"),
        (other_loss, "the loss that training_step returns is"),
        (clips_higher, "'s weights, one after the other"),
        (clips_too_early, "without clipping"),
        (clips_at(1.0), "ignores grad_clip"),
        (clips_at(3.0), "ignores grad_clip"),
        (clips_at(8), "ignores grad_clip"),
        (clips_at(1e9), "without clipping"),
        (returns(lambda value, loss: value.item()), "of type float, expected the tensor"),
        (returns(lambda value, loss: loss), "returns the function `loss`"),
    ],
)
def test_training_step(wrong, message):
    with pytest.raises(Failed, match=message):
        check.training_step(wrong)


def test_right_solutions_pass():
    def by_hand(model, latents, labels, *, drawn):
        return loss(model, latents, labels, drawn)

    def by_where(model, latents, labels, *, drawn):
        tokens, mask = model.patchify(latents), drawn.mask
        labels = torch.where(drawn.dropped, -1, labels)
        z = model.forward_decoder(model.forward_encoder(tokens, mask, labels), mask)
        return head(model, tokens[mask], z[mask], drawn)  # all places, then the hidden ones

    def by_lerp(averaged, current, num_averaged, *, decay, window):
        for a, p in zip(averaged, current, strict=True):
            a.lerp_(p, 1 - right_share(num_averaged, decay, window))

    def by_copy(averaged, current, num_averaged, *, decay, window):
        k = right_share(num_averaged, decay, window)
        for a, p in zip(averaged, current, strict=True):
            a.copy_(k * a + (1 - k) * p)

    def clears_after(model, optimiser, loss, average, **settings):
        value = right_step(model, optimiser, loss, average, **settings)
        optimiser.zero_grad()
        return value

    for name, solutions in {
        "training_loss": (by_hand, by_where, MAR.forward),
        "ema_step": (shares(right_share), by_lerp, by_copy, training.ema_step),
        "training_step": (right_step, clears_after, check.step_by_hand),
    }.items():
        for solution in solutions:
            assert getattr(check, name)(solution) is solution


@torch.no_grad()
def test_the_loss_is_checked_where_gradients_are_off():
    assert check.training_loss(MAR.forward) is MAR.forward
    with pytest.raises(Failed, match="has no gradient"):
        check.training_loss(frozen)


def test_mistakes_that_hardly_show():
    """A wrong window changes the average by less than 1% late in a run, and is refused."""
    assert abs(right_share(2000, 0.99, 0.1) - 0.99) < 0.01
    with pytest.raises(Failed, match="knows no window"):
        check.ema_step(shares(lambda n, d, w: d))
