"""The checks of chapter 8 refuse plausible mistakes, each by the name of its idea."""

import numpy as np
import pytest
import torch

from mar_mini import masking, sampling
from mar_mini.checks import Failed
from mar_mini.checks import sampling as check


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("MAR_MINI_STRICT", "1")


def z_of(model, labels, tokens, mask, wanted):
    return model.forward_decoder(model.forward_encoder(tokens, mask, labels), mask, wanted)


def stepped(
    model,
    labels,
    tokens,
    mask,
    order,
    num_masked,
    cfg,
    *,
    both=lambda z, zu: (z, zu),
    none=lambda y: torch.full_like(y, -1),
    seen=lambda tokens: tokens,
    under=lambda mask, still: mask,
    wanted=lambda now: now,
    weight=lambda cfg: cfg,
    after=lambda still, mask, now: still,
    put=lambda new, now, drawn, order: None,
    **settings,
):
    """A right step, of which a test may change any one thing."""
    still = masking.mask_by_order(order, num_masked)
    now = mask & ~still
    given = seen(tokens), under(mask, still), wanted(now)
    z, z_uncond = both(*(z_of(model, y, *given).flatten(0, 1) for y in (labels, none(labels))))
    drawn = model.diffloss.sample(z, z_uncond, cfg=weight(cfg), **settings)
    new = put(tokens, now, drawn, order)
    if new is None:
        new = tokens.masked_scatter(now[..., None], drawn)
    return new, after(still, mask, now)


def but(**changes):
    return lambda *given, **settings: stepped(*given, **settings, **changes)


def by_turn(tokens, now, drawn, order):
    places = order[now.gather(1, order)].reshape(len(order), -1)
    index = places[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.scatter(1, index, drawn.reshape(*index.shape))


def without(*names):
    def step(*given, **settings):
        return stepped(*given, **{name: x for name, x in settings.items() if name not in names})

    return step


def generator_of_its_own(*given, generator, **settings):
    return stepped(*given, **settings, generator=torch.Generator().manual_seed(1))


def guided_z(z, z_uncond):
    return z_uncond + 2.0 * (z - z_uncond), None


def in_place(tokens, now, drawn, order):
    tokens[now] = drawn
    return tokens


def all_masked(model, labels, tokens, mask, order, num_masked, cfg, **settings):
    """Draws every masked token, and keeps those whose turn it is."""
    still = masking.mask_by_order(order, num_masked)
    z, z_uncond = (
        z_of(model, y, tokens, mask, mask).flatten(0, 1)
        for y in (labels, torch.full_like(labels, -1))
    )
    drawn = model.diffloss.sample(z, z_uncond, cfg=cfg, **settings)
    new = tokens.masked_scatter(mask[..., None], drawn)
    return new.masked_fill(still[..., None], 0.0), still


def not_flat(model, labels, tokens, mask, order, num_masked, cfg, **settings):
    now = mask & ~masking.mask_by_order(order, num_masked)
    return model.diffloss.sample(z_of(model, labels, tokens, mask, now), cfg=cfg, **settings)


def doubled_alone(model, labels, tokens, mask, order, num_masked, cfg, **settings):
    """Forgets to cut the doubled batch in two."""
    still = masking.mask_by_order(order, num_masked)
    now = mask & ~still
    labels = torch.cat([labels, torch.full_like(labels, -1)])
    z = z_of(model, labels, *(torch.cat([x, x]) for x in (tokens, mask, now)))
    return model.diffloss.sample(z.flatten(0, 1), cfg=cfg, **settings), still


def known_too(tokens, now, drawn, order):
    """What was known is moved a little."""
    new = tokens.masked_scatter(now[..., None], drawn)
    return torch.where(now[..., None], new, new + 1e-3)


def added(tokens, now, drawn, order):
    new = tokens.clone()
    new[now] += drawn
    return new


def doubling(double=lambda x: torch.cat([x, x]), single=(), labels_of=None):
    """A doubled batch, in which a test may change how each part is doubled."""

    def step(model, labels, x, before, order, num_masked, cfg, **settings):
        still = masking.mask_by_order(order, num_masked)
        parts = {"x": x, "mask": before, "now": before & ~still}
        none = torch.full_like(labels, -1)
        y = torch.cat([labels, none]) if labels_of is None else labels_of(labels, none)
        twice = {name: part if name in single else double(part) for name, part in parts.items()}
        z = z_of(model, y, twice["x"], twice["mask"], twice["now"])
        z, z_uncond = z.flatten(0, 1).chunk(2)
        drawn = model.diffloss.sample(z, z_uncond, cfg=cfg, **settings)
        return x.masked_scatter(parts["now"][..., None], drawn), still

    return step


def each_at_once(x):
    return x.repeat_interleave(2, 0)


def of_length_16(model, labels, tokens, mask, order, num_masked, cfg, **settings):
    still = torch.zeros_like(mask).scatter(1, order[:, 16 - num_masked :], True)
    new, _ = sampling.one_step(model, labels, tokens, mask, order, num_masked, cfg, **settings)
    return new, still


def from_the_back(model, labels, tokens, mask, order, num_masked, cfg, **settings):
    """Counts from the back, which for 0 is everything."""
    new, _ = sampling.one_step(model, labels, tokens, mask, order, num_masked, cfg, **settings)
    return new, torch.zeros_like(mask).scatter(1, order[:, -num_masked:], True)


def decoder_later(model, labels, tokens, mask, order, num_masked, cfg, **settings):
    still = masking.mask_by_order(order, num_masked)
    x = model.forward_encoder(tokens, mask, labels)
    return model.forward_decoder(x, still, mask & ~still), still


def by_keyword(model, labels, tokens, mask, order, num_masked, cfg, **settings):
    return model.forward_encoder(tokens=tokens, mask=mask, labels=labels)


def empty_without_class(model, labels, tokens, mask, order, num_masked, cfg, **settings):
    still = masking.mask_by_order(order, num_masked)
    now, none = mask & ~still, torch.full_like(labels, -1)
    z = z_of(model, labels, tokens, mask, now).flatten(0, 1)
    z_uncond = z_of(model, none, 0 * tokens, mask, now).flatten(0, 1)
    drawn = model.diffloss.sample(z, z_uncond, cfg=cfg, **settings)
    return tokens.masked_scatter(now[..., None], drawn), still


def slightly_off(tokens, now, drawn, order):
    new = tokens.masked_scatter(now[..., None], drawn)
    new[1, now[1].nonzero()[0], 3] += 0.5
    return new


def mixed(z, z_uncond):
    return tuple(x.reshape(3, -1, x.shape[-1]).transpose(0, 1).flatten(0, 1) for x in (z, z_uncond))


def places_of_the_first(now):
    return now[:1].expand_as(now)


def first_places(now):
    wanted = torch.zeros_like(now)
    wanted[:, : int(now[0].sum())] = True
    return wanted


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (but(both=lambda z, zu: (z, None)), "has no guidance"),
        (but(both=lambda z, zu: (zu, z)), "leads away from the class"),
        (but(both=lambda z, zu: (zu, zu)), "has no class at all"),
        (but(none=lambda y: 0 * y), "takes class 0 for `no class`"),
        (but(both=guided_z), "guides z itself"),
        (but(weight=lambda cfg: 1.0), "both z, but not cfg as it came"),
        (without("temperature", "clip"), "leaves out the settings"),
        (without("temperature"), "leaves out the temperature"),
        (without("clip"), "leaves out `clip`"),
        (without("generator"), "draws nothing from the generator"),
        (generator_of_its_own, "draws nothing from the generator in `settings`"),
        (but(under=lambda mask, still: still), "tokens to predict are known"),
        (but(seen=lambda tokens: 0 * tokens), "forgets what is known"),
        (but(wanted=first_places), "first places of the picture"),
        (but(wanted=places_of_the_first), "that the first image predicts"),
        (but(put=by_turn), "in the order of their turns"),
        (but(both=mixed), "mixes up the images"),
        (but(put=lambda new, *_: new), "writes nothing"),
        (but(put=in_place), "changed the tokens it was given"),
        (but(put=known_too), "known; they stay to the bit"),
        (but(put=added), "adds what was drawn to what stood there"),
        (but(put=slightly_off), "of image 1 at place .* in channel 3, expected"),
        (but(weight=lambda cfg: cfg + 1), "guides by 3; hand cfg on"),
        (but(weight=lambda cfg: 4.5), "guides by 4.5; hand cfg on"),
        (of_length_16, "mask of one_step .*in 6 of 27 places"),
        (empty_without_class, "the tokens are the same in both"),
        (doubling(each_at_once), "classes belong to other images"),
        (
            doubling(each_at_once, labels_of=lambda y, none: torch.stack([y, none], 1).flatten()),
            "cuts them in the middle",
        ),
        (doubling(labels_of=lambda y, none: y), "encoder gets 6 rows, but of labels 3"),
        (doubling(single=("x",)), "encoder gets 6 rows, but of tokens 3"),
        (doubling(single=("mask",)), "encoder gets 6 rows, but of mask 3"),
        (doubling(single=("x", "mask")), "encoder gets 6 rows, but of tokens and mask 3"),
        (doubling(single=("now",)), "decoder gets 6 rows, but of wanted 3"),
        (doubling(labels_of=lambda y, none: torch.cat([y, -torch.ones(3)])), "keeps the type"),
        (decoder_later, "decoder gets another mask than the encoder"),
        (by_keyword, "it calls them x, mask, labels"),
        (all_masked, "those alone whose turn it is"),
        (not_flat, "flatten the first two axes"),
        (doubled_alone, "lets the head draw 30 tokens, expected 15: each once"),
        (from_the_back, "masks everything: a slice that begins at -0"),
        (but(after=lambda still, mask, now: mask), "is the one from before"),
        (but(after=lambda still, mask, now: now), "marks the tokens that this step predicts"),
        (but(after=lambda still, mask, now: ~still), "is upside down"),
        (lambda *x, **y: stepped(*x, **y)[::-1], "returns the mask first"),
        (lambda *x, **y: stepped(*x, **y)[0], "must return two things"),
        (lambda m, y, x, mask, o, n, c, **s: (x, masking.mask_by_order(o, n)), "does not ask"),
    ],
)
def test_one_step(wrong, message):
    with pytest.raises(Failed, match=message):
        check.one_step(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda w, n, L: 1 + (w - 1) * n / L, "share that is masked"),
        (lambda w, n, L: (w - 1) * (L - n) / L, "starts at 0"),
        (lambda w, n, L: w * (L - n) / L, "from 0 to cfg"),
        (lambda w, n, L: 1 + w * (L - n) / L, r"ends at 1 \+ cfg"),
        (lambda w, n, L: w, "is constant"),
        (lambda w, n, L: 1.0, "never guides"),
        (lambda w, n, L: 1 + (w - 1) * (L - n), "counts the known tokens"),
        (lambda w, n, L: 1 + (w - 1) * (L - n) / n, "divides by the number masked"),
        (lambda w, n, L: 1 + (w - 1) * (L - n) / (L - 1), "length - 1"),
        (lambda w, n, L: 1 + (w - 1) * ((L - n) // L), "without remainder"),
        (lambda w, n, L: w - (w - 1) * (L - n) / L, "share that is masked"),
        (lambda w, n, L: w ** ((L - n) / L), "multiplies up"),
        (lambda w, n, L: 1 + (w - 1) * ((L - n) / L) ** 2, "comes in squared"),
        (lambda w, n, L: 1 + (w - 1) * (L - n + 1) / L, "one token too many"),
        (lambda w, n, L: 1 + (w - 1) * (L - n - 1) / L, "one step late"),
        (lambda w, n, L: round(1 + (w - 1) * (L - n) / L), r"linear_cfg\(3.0, 1, 16\) is 3"),
        (lambda w, n, L: torch.tensor([1 + (w - 1) * (L - n) / L]), r"tensor of shape \(1,\)"),
        (lambda w, n, L: None, "NoneType, expected a number"),
    ],
)
def test_linear_cfg(wrong, message):
    with pytest.raises(Failed, match=message):
        check.linear_cfg(wrong)


def test_a_mistake_in_the_schedule_that_hardly_shows():
    """With 256 tokens one token more or less changes the weight by less than 1%."""
    right = sampling.linear_cfg(3.0, 100, 256)
    assert 0 < abs(sampling.linear_cfg(3.0, 101, 256) - right) < 0.01 * right


def in_front(order, known):
    return masking.known_first(order, known)


def changes_known(order, known):
    new = in_front(order, known)
    known[:] = False
    return new


def unstable(order, known):
    """What a sort may do that is not stable; torch's does it in rows of more than 16."""
    if order.shape[1] <= 16:
        return in_front(order, known)
    new, count = in_front(order, known), int(known[0].sum())
    return torch.cat([new[:, :count], new[:, count:].roll(3, 1)], 1)


def not_a_permutation(order, known):
    new = in_front(order, known).clone()
    new[:, -1] = new[:, -2]
    return new


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda o, k: in_front(o, ~k), "unknown places first"),
        (lambda o, k: o, "leaves the order as it was"),
        (lambda o, k: o.gather(1, (~k).int().argsort(1, stable=True)), "reads `known` by turn"),
        (lambda o, k: (~k).int().argsort(1, stable=True), "row by row"),
        (lambda o, k: in_front(o.flip(1), k), "turns the order round"),
        (lambda o, k: (~k.gather(1, o)).int().argsort(1, stable=True), "turns in place of places"),
        (lambda o, k: in_front(o, k).argsort(1), "says for each place"),
        (lambda o, k: in_front(o, k[:1].expand_as(k)), "moves the places of the first image"),
        (lambda o, k: in_front(o[:1].expand_as(o), k), "uses the first image's order"),
        (lambda o, k: in_front(o, k)[:, int(k[0].sum()) :], "unknown places alone"),
        (lambda o, k: in_front(o, k).float(), "has dtype torch.float32, expected torch.int64"),
        (changes_known, "changed the known it was given"),
        (not_a_permutation, "is not an order"),
        (unstable, "loses the turns of the unknown places"),
    ],
)
def test_known_first(wrong, message):
    with pytest.raises(Failed, match=message):
        check.known_first(wrong)


def test_right_solutions_pass():
    def two_runs(model, labels, tokens, mask, order, num_masked, cfg, **settings):
        still = masking.mask_by_order(order, num_masked)
        now, none = mask ^ still, torch.full_like(labels, -1)
        z, z_uncond = (z_of(model, y, tokens, mask, None)[now] for y in (labels, none))
        new = tokens.clone()
        new[now] = model.diffloss.sample(z, z_uncond, cfg=cfg, **settings)
        return new, still

    def seldom_guided(model, labels, *given, **settings):
        return sampling.one_step(model, labels, *given, **settings)

    def as_mix(cfg, num_masked, length):
        masked = num_masked / length
        return masked + cfg * (1 - masked)

    def by_loop(order, known):
        at = known.gather(1, order)
        return torch.stack([torch.cat([o[k], o[~k]]) for o, k in zip(order, at, strict=True)])

    def known_ones_by_place(order, known):
        """Among themselves the known places may stand in any order."""
        new, count = masking.known_first(order, known), int(known[0].sum())
        return torch.cat([new[:, :count].sort(1).values, new[:, count:]], 1)

    def nothing_where_masked(*given, **settings):
        """What stands at places still masked is the learner's affair."""
        new, still = sampling.one_step(*given, **settings)
        return new.masked_fill(still[..., None], 0.0), still

    def of_numpy(cfg, num_masked, length):
        return np.float32(sampling.linear_cfg(cfg, num_masked, length))

    def flat_split(order, known):
        at = known.gather(1, order)
        return torch.cat([order[at].view(len(order), -1), order[~at].view(len(order), -1)], 1)

    assert check.one_step(nothing_where_masked) is nothing_where_masked
    assert check.linear_cfg(of_numpy) is of_numpy
    assert check.known_first(flat_split) is flat_split
    assert check.one_step(stepped) is stepped
    assert check.one_step(two_runs) is two_runs
    assert check.one_step(seldom_guided) is seldom_guided
    assert check.one_step(sampling.one_step) is sampling.one_step
    assert check.linear_cfg(as_mix) is as_mix
    assert check.linear_cfg(sampling.linear_cfg) is sampling.linear_cfg
    assert check.known_first(by_loop) is by_loop
    assert check.known_first(known_ones_by_place) is known_ones_by_place
    assert check.known_first(masking.known_first) is masking.known_first


def test_a_step_is_checked_without_touching_the_global_generator():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    check.one_step(stepped)
    assert torch.equal(before, torch.random.get_rng_state())
