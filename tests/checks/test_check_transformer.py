"""The checks of chapter 5 refuse plausible mistakes, each by the name of its idea."""

import pytest
import torch
import torch.nn.functional as F

from mar_mini import MAR, masking, transformer
from mar_mini.checks import Failed
from mar_mini.checks import transformer as check
from mar_mini.tokens import take


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("MAR_MINI_STRICT", "1")


def weighted(q, k, v, divide, axis=-1):
    return (q @ k.mT / divide).softmax(axis) @ v


def scaled_late(q, k, v):
    return (q @ k.mT).softmax(-1) / q.shape[-1] ** 0.5 @ v


def no_softmax(q, k, v):
    return q @ k.mT / q.shape[-1] ** 0.5 @ v


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def overflows(q, k, v):
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def detached(q, k, v):
    return weighted(q, k, v.detach(), q.shape[-1] ** 0.5)


def frozen(q, k, v):
    with torch.no_grad():
        return weighted(q, k, v, q.shape[-1] ** 0.5)


def weights_only(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda q, k, v: weighted(q, k, v, 1), "does not scale"),
        (lambda q, k, v: weighted(q, k, v, q.shape[-1]), "divides by d"),
        (lambda q, k, v: weighted(q, k, v, v.shape[-1] ** 0.5), "width of the values"),
        (lambda q, k, v: weighted(q, k, v, k.shape[-2] ** 0.5), "number of tokens"),
        (lambda q, k, v: weighted(q, k, v, (3 * 16) ** 0.5), "all heads together"),
        (lambda q, k, v: weighted(q, k, v, 4, axis=-2), "softmax over those who ask"),
        (lambda q, k, v: weighted(q, k, v, 4, axis=1), "softmax over heads"),
        (scaled_late, "scales after the softmax"),
        (no_softmax, "no softmax"),
        (causal, "looks both ways"),
        (overflows, "not finite: exp of a large number"),
        (detached, "passes no gradient to v"),
        (frozen, "has no gradient"),
        (weights_only, "gives the weights"),
        (lambda q, k, v: weighted(q, k.mT, v, 4), r"shapes do not fit; `q @ k\.mT`"),
        (lambda q, k, v: weighted(q.div_(4), k, v, 1), "changed the q it was given"),
    ],
)
def test_attend(wrong, message):
    with pytest.raises(Failed, match=message):
        check.attend(wrong)


def test_a_mistake_in_attention_that_hardly_shows():
    """The wrong scale changes small inputs by less than 10%, and is refused all the same."""
    q, k, v = (0.2 * torch.randn(1, 2, 6, 16) + 1 * (i == 2) for i in range(3))
    want = transformer.attend(q, k, v)
    assert (weighted(q, k, v, 16) - want).norm() < 0.1 * want.norm()


def zeroed(x, chosen):
    return x * chosen[..., None]


def first_rows_places(x, chosen):
    return x[:, chosen[0]]  # off by one token in the check's second mask


def by_topk(x, chosen):
    places = chosen.int().topk(int(chosen[0].sum())).indices.sort(descending=True).values
    return take(x, places)


def mixed_rows(x, chosen):
    return x[chosen].reshape(-1, len(x), x.shape[-1]).transpose(0, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (zeroed, "setting them to zero saves no work"),
        (first_rows_places, "first row chooses"),
        (by_topk, "descending order"),
        (mixed_rows, "mixes up the rows"),
        (lambda x, c: x[:, : int(c[0].sum())], "first tokens of each row"),
        (lambda x, c: take(x, c.long()[:, : int(c[0].sum())]), "values of `chosen`"),
        (lambda x, c: x[c], r"\(12, 6\), expected \(3, 4, 6\): reshape to \(B, K, D\)"),
        (lambda x, c: x[c].reshape(len(x), int(c.sum()), 6), "shapes do not fit; K is the number"),
        (lambda x, c: masking.keep(x, ~c), "keeps the tokens that are not chosen"),
    ],
)
def test_keep(wrong, message):
    with pytest.raises(Failed, match=message):
        check.keep(wrong)


def zeros(x, mask, mask_token):
    return masking.restore(x, mask, 0 * mask_token)


def behind(x, mask, mask_token):
    missing = mask.shape[1] - x.shape[1]
    return torch.cat([x, mask_token.expand(len(x), missing, -1)], 1)


def added(x, mask, mask_token):
    return zeros(x, mask, mask_token) + mask_token


def first_row(x, mask, mask_token):
    return masking.restore(x, mask[:1].expand_as(mask), mask_token)


def reversed_places(x, mask, mask_token):
    return masking.restore(x.flip(1), mask, mask_token)


def upside_down(x, mask, mask_token):
    full = mask_token.repeat(*mask.shape, 1)
    full[mask] = x.flatten(0, 1)[: int(mask.sum())]
    return full


def mixed(x, mask, mask_token):
    full = mask_token.repeat(*mask.shape, 1)
    full[~mask] = x.transpose(0, 1).flatten(0, 1)
    return full


def expanded(x, mask, mask_token):
    full = mask_token.expand(*mask.shape, -1)
    full[~mask] = x.flatten(0, 1)
    return full


def scattered(x, mask, mask_token):
    places = masking.positions(~mask)[..., None].expand_as(x)
    return mask_token.expand(*mask.shape, -1).scatter_(1, places, x)


def never_learns(x, mask, mask_token):
    return masking.restore(x, mask, mask_token.detach())


def in_place(x, mask, mask_token):
    full = masking.restore(x, mask, mask_token)
    x.zero_()
    return full


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (zeros, "leaves zeros"),  # off by less than 10%
        (behind, "behind the known ones"),
        (lambda x, m, t: behind(x, m, t).roll(m.shape[1] - x.shape[1], 1), "in front of the known"),
        (added, "at known places too"),  # off by less than 10%
        (first_row, "first row's places"),
        (reversed_places, "in reverse"),
        (mixed, "mixes up the rows"),
        (upside_down, "upside down"),
        (in_place, "changed the x it was given"),
        (expanded, r"one piece of memory \(expand\); use repeat"),
        (scattered, r"one piece of memory \(expand\); use repeat"),
        (never_learns, "passes no gradient to mask_token"),
        (lambda x, m, t: torch.where(m[..., None], t, x), "shapes do not fit; `full"),
    ],
)
def test_restore(wrong, message):
    with pytest.raises(Failed, match=message):
        check.restore(wrong)


def test_a_mistake_in_restoring_that_hardly_shows():
    """Zeros for mask tokens of a young model are off by less than 10%."""
    x, token = torch.randn(3, 4, 6), torch.full((1, 1, 6), 0.05)
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1]).bool().repeat(3, 1)
    want = masking.restore(x, mask, token)
    for wrong in (zeros, added):
        assert 0 < (wrong(x, mask, token) - want).norm() < 0.1 * want.norm()


def embedded(model, labels):
    return model.class_embedding(labels)[:, None]


def own_places(model):
    return model.encoder_pos_embed_learned[:, : model.buffer_size]


def last_class(model, labels):
    return model.class_emb.weight[labels][:, None] + own_places(model)


def class_zero(model, labels):
    return model.class_emb(labels.clamp(min=0))[:, None] + own_places(model)


def where_none(model, labels, none, swapped=False):
    """The fake latent where `none` says so, else the class; or the other way round."""
    known, missing = model.class_emb.weight[labels.clamp(min=0)], model.fake_latent
    pair = (known, missing) if swapped else (missing, known)
    return torch.where(none[:, None], *pair)[:, None] + own_places(model)


def overwrites(model, labels):
    none = labels < 0
    labels[none] = 0
    return where_none(model, labels, none)


def never_learns_none(model, labels):
    given = embedded(model, labels)
    return torch.where((labels < 0)[:, None, None], given.detach(), given) + own_places(model)


def no_fake(model, labels):
    return (embedded(model, labels) * (labels >= 0)[:, None, None]) + own_places(model)


def always_fake(model, labels):
    return embedded(model, labels) + model.fake_latent + own_places(model)


def first_only(model, labels):
    buffer = own_places(model).repeat(len(labels), 1, 1)
    buffer[:, :1] += embedded(model, labels)
    return buffer


def no_places(model, labels):
    return embedded(model, labels).repeat(1, model.buffer_size, 1)


def from_the_end(model, labels):
    return embedded(model, labels) + model.encoder_pos_embed_learned[:, -model.buffer_size :]


def after_the_buffer(model, labels):
    n = model.buffer_size
    return embedded(model, labels) + model.encoder_pos_embed_learned[:, n : 2 * n]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (last_class, "-1 for the last class"),
        (class_zero, "-1 for class 0"),
        (no_fake, "adds nothing for the label -1"),
        (always_fake, "fake latent to every class"),
        (lambda m, y: where_none(m, y, y < 0, swapped=True), "fake latent to labels with a class"),
        (lambda m, y: where_none(m, y, y <= 0), "treats class 0 as no class"),
        (overwrites, "changed the labels it was given"),
        (never_learns_none, "passes no gradient to the fake latent"),
        (lambda m, y: m.class_embedding(y) + own_places(m), "shapes do not fit"),
        (first_only, "first buffer token only"),
        (no_places, "forgets the positions"),  # off by less than 10%
        (lambda m, y: embedded(m, y) + own_places(m)[:, :1].expand(-1, 3, -1), "first position"),
        (from_the_end, "from the end"),
        (after_the_buffer, "positions of the image's tokens"),
        (lambda m, y: own_places(m).expand(len(y), -1, -1), "class is missing"),
        (lambda m, y: embedded(m, y) * own_places(m), "add them"),
        (lambda m, y: embedded(m, y)[:, 0], "one token an image, expected 3"),
        (lambda m, y: embedded(m, y) + m.decoder_pos_embed_learned[:, :3], "decoder's positions"),
    ],
)
def test_embed_buffer(wrong, message):
    with pytest.raises(Failed, match=message):
        check.embed_buffer(wrong)


def test_a_mistake_in_the_buffer_that_hardly_shows():
    """Positions of a young model are small beside classes: without them it is off by < 10%."""
    model, labels = check._model(), torch.arange(4)
    want = model.embed_buffer(labels)
    assert 0 < (no_places(model, labels) - want).norm() < 0.1 * want.norm()


def test_right_solutions_pass():
    def mine(q, k, v):
        return weighted(q, k, v, q.shape[-1] ** 0.5)

    def by_loop(x, chosen):
        return torch.stack([row[c] for row, c in zip(x, chosen, strict=True)])

    def by_rest(x, chosen):
        return x[chosen].reshape(len(x), -1, x.shape[-1])

    def by_mask(x, mask, mask_token):
        full = mask_token.repeat(*mask.shape, 1)
        full[~mask] = x.flatten(0, 1)
        return full

    def in_one(model, labels):
        return embedded(model, labels) + own_places(model)

    def by_where(model, labels):
        return where_none(model, labels, labels < 0)

    assert check.attend(mine) is mine
    assert check.attend(F.scaled_dot_product_attention) is F.scaled_dot_product_attention
    assert check.keep(by_loop) is by_loop
    assert check.keep(by_rest) is by_rest
    assert check.restore(by_mask) is by_mask
    assert check.embed_buffer(in_one) is in_one
    assert check.embed_buffer(by_where) is by_where
    assert check.attend(transformer.attend) is transformer.attend
    assert check.embed_buffer(MAR.embed_buffer) is MAR.embed_buffer


@torch.no_grad()
def test_attend_is_checked_where_gradients_are_off():
    def mine(q, k, v):
        return weighted(q, k, v, q.shape[-1] ** 0.5)

    assert check.attend(mine) is mine
    with pytest.raises(Failed, match="has no gradient"):
        check.attend(frozen)
