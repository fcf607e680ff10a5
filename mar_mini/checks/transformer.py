"""Checks of chapter 5: attention, tokens that leave and come back, the class in the buffers."""

import re
import warnings

import torch
from torch import Tensor

from mar_mini import MAR, masking, transformer
from mar_mini.checks import Failed, close, exercise, refuse_mistakes, same_dtype, same_shape

SHARED = "all places share one piece of memory (expand); use repeat"


def _call(candidate, what: str, hint: str, *fixed: object, **given: Tensor) -> Tensor:
    """What comes of copies of the tensors, which must stay as they are; a hint where it breaks."""
    copies = {name: x.clone() for name, x in given.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*expanded tensors")  # see SHARED
            got = candidate(*fixed, *copies.values())
    except (RuntimeError, IndexError) as error:
        if "single memory location" in str(error):
            raise Failed(f"{what}: {SHARED}") from error
        if re.search("size|shape|dimension", str(error)):
            error.args = (f"{what}: the shapes do not fit; {hint} ({error})",)
        raise
    for name, x in given.items():
        if not torch.equal(copies[name], x):
            if isinstance(got, Tensor) and 0 in got.stride():
                raise Failed(f"{what}: {SHARED}")
            raise Failed(f"{what} changed the {name} it was given; write into a new tensor")
    return got


@torch.enable_grad()  # the notebook has switched gradients off
def _same_gradients(candidate, reference, what: str, **tensors: Tensor) -> None:
    """Expect that both pass the same gradients on to these tensors (parameters are not copied)."""
    leaves = [x if x.requires_grad else x.clone().requires_grad_() for x in tensors.values()]
    outs = [function(*leaves) for function in (candidate, reference)]
    leave_out = "leave out detach, no_grad and .data"
    if not outs[0].requires_grad:
        raise Failed(f"{what} has no gradient: nothing could be learned through it; {leave_out}")
    gradients = [torch.autograd.grad(x.square().sum(), leaves, allow_unused=True) for x in outs]
    for name, got, want in zip(tensors, *gradients, strict=True):
        if got is None or (want.any() and not got.any()):
            raise Failed(f"{what} passes no gradient to {name}: it would not learn; {leave_out}")
        close(got, want, f"the gradient for {name}")


@exercise(reference=transformer.attend)
def attend(candidate):
    seeded = torch.Generator().manual_seed(5)
    # values wider than the keys, and three askers among five tokens: no two sizes are the same
    for scale in (1.0, 0.2):
        q, k, v = (
            scale * torch.randn(2, 3, n, d, generator=seeded) for n, d in ((4, 16), (5, 16), (5, 9))
        )
        what = "attend(q, k, v)"
        want = transformer.attend(q, k, v)
        hint = "`q @ k.mT` gives the scores, `k.mT` swaps the last two axes"
        got = _call(candidate, what, hint, q=q, k=k, v=v)
        scores = q @ k.mT
        mistakes = {
            "gives the weights; with them take the mean of the values": (scores / 4).softmax(-1),
            "does not scale: divide q k^T by the square root of d, the width of a key": (
                scores.softmax(-1) @ v
            ),
            "divides by d; divide by its square root": (scores / 16).softmax(-1) @ v,
            "scales by the width of the values; it is the width of queries and keys that makes "
            "their products large": (scores / 3).softmax(-1) @ v,
            "scales by the number of tokens, expected the width of a key": (
                (scores / 5**0.5).softmax(-1) @ v
            ),
            "scales by the width of all heads together; each head divides by the square root of "
            "its own width": (scores / 48**0.5).softmax(-1) @ v,
            "scales after the softmax: then the weights no longer sum to 1": (
                scores.softmax(-1) / 4 @ v
            ),
            "takes the softmax over those who ask; each row of weights, over the tokens that "
            "answer, must sum to 1": (scores / 4).softmax(-2) @ v,
            "takes the softmax over heads; take it over the tokens that answer, the last axis": (
                (scores / 4).softmax(1) @ v
            ),
            "has no softmax: the weights must be positive and sum to 1": scores / 4 @ v,
            "hides later tokens from earlier ones; MAR's attention looks both ways": (
                (scores / 4 - torch.ones(4, 5).triu(1) * 1e9).softmax(-1) @ v
            ),
        }
        refuse_mistakes(got, want, mistakes, what)
        close(got, want, what)
        same_dtype(got, want.dtype, what)
    _same_gradients(candidate, transformer.attend, what, q=q, k=k, v=v)
    big = candidate(100 * q, 100 * k, v)
    if not big.isfinite().all():
        raise Failed(
            "attend(100 q, 100 k, v) is not finite: exp of a large number overflows; use softmax, "
            "which takes the largest one off first"
        )


def _masks() -> list[Tensor]:
    """Masks of (3, 8): rows that differ in two places, then everywhere, then nothing known."""
    order = masking.random(2, 4, 3, torch.Generator().manual_seed(2))
    near = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1]).bool().repeat(3, 1)
    near[1, :2] = near[1, :2].flip(0)
    return [near, masking.mask_by_order(order, 5), masking.mask_by_order(order, 8)]


@exercise(reference=masking.keep)
def keep(candidate):
    x = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(3))
    for mask in _masks():
        chosen, what = ~mask, f"keep(x, chosen) with {int((~mask)[0].sum())} chosen of 8 tokens"
        hint = "K is the number chosen in one row, not in all"
        got, given = _call(candidate, what, hint, x=x, chosen=chosen), masking.positions(chosen)
        want = masking.keep(x, chosen)
        if isinstance(got, Tensor) and got.shape != want.shape:
            why = ": reshape to (B, K, D)" if got.numel() == want.numel() else ""
            if got.shape == x.shape:
                why = ": tokens that are not chosen must leave; setting them to zero saves no work"
            raise Failed(f"{what} has shape {tuple(got.shape)}, expected {tuple(want.shape)}{why}")
        mistakes = {
            "keeps the tokens that are not chosen: True means keep": masking.keep(x, mask),
            "keeps the places that the first row chooses, in all rows; each row has its own": (
                x[:, given[0]]
            ),
            "keeps the chosen tokens in descending order of their places, expected ascending": (
                want.flip(1)
            ),
            "keeps the first tokens of each row; keep those where `chosen` is True": (
                x[:, : given.shape[1]]
            ),
            "keeps the tokens from 0 and 1, the values of `chosen`, not its places": (
                masking.take(x, chosen.long()[:, : given.shape[1]])
            ),
            "mixes up the rows: the chosen tokens of one image belong together": (
                x[chosen].reshape(given.shape[1], 3, 6).transpose(0, 1)
            ),
        }
        refuse_mistakes(got, want, mistakes, what)
        close(got, want, what)


@exercise(reference=masking.restore)
def restore(candidate):
    seeded = torch.Generator().manual_seed(4)
    x, mask_token = torch.randn(3, 8, 6, generator=seeded), torch.full((1, 1, 6), 0.05)
    for mask in _masks():
        known = masking.keep(x, ~mask)
        what = f"restore(x, mask, mask_token) with {known.shape[1]} known of 8 tokens"
        hint = "`full[~mask] = ...` takes (B * K, D) values, row by row"
        got = _call(candidate, what, hint, x=known, mask=mask, mask_token=mask_token)
        want = masking.restore(known, mask, mask_token)
        same_shape(got, want.shape, what)
        count = known.shape[1]
        tail = mask_token.expand(3, 8 - count, -1)
        zeros = masking.restore(known, mask, 0 * mask_token)
        mistakes = {
            "leaves zeros at the masked places; there belongs the mask token": zeros,
            "adds the mask token at known places too; there the known tokens stand alone": (
                zeros + mask_token
            ),
            "puts the mask tokens behind the known ones; each known token goes back to its place": (
                torch.cat([known, tail], 1)
            ),
            "puts the mask tokens in front of the known ones; each known token goes back to its "
            "place": torch.cat([tail, known], 1),
            "uses the first row's places for all rows": (
                masking.restore(known, mask[:1].expand_as(mask), mask_token)
            ),
            "puts the known tokens back in reverse: they come in ascending order of their places": (
                masking.restore(known.flip(1), mask, mask_token)
            ),
            "mixes up the rows: the known tokens of an image must go back to that image": (
                masking.restore(known.transpose(0, 1).reshape_as(known), mask, mask_token)
            ),
        }
        if 2 * count == 8:
            mistakes["is upside down: mask is True where the mask token belongs"] = masking.restore(
                known, ~mask, mask_token
            )
        refuse_mistakes(got, want, mistakes, what)
        close(got, want, what)
    mask = _masks()[0]
    both = [lambda x, token, f=f: f(x, mask, token) for f in (candidate, masking.restore)]
    known = masking.keep(x, ~mask)
    _same_gradients(*both, "restore(x, mask, mask_token)", x=known, mask_token=mask_token)


@exercise(reference=MAR.embed_buffer)
def embed_buffer(candidate):
    model = _model()
    labels = torch.tensor([2, 0, -1, 3])
    what = "embed_buffer(model, labels)"
    with torch.no_grad():
        want = model.embed_buffer(labels)
        hint = "(B, 1) beside (B, D), (B, 1, D) beside (1, buffer_size, D)"
        got = _call(candidate, what, hint, model, labels=labels)
        table, none = model.class_emb.weight, model.fake_latent
        places, size = model.encoder_pos_embed_learned, model.buffer_size
        own, one = places[:, :size], model.class_embedding(labels)[:, None]
        if isinstance(got, Tensor) and got.shape == (4, want.shape[-1]):
            raise Failed(f"{what} gives one token an image, expected {size}: the class in each")
        same_shape(got, want.shape, what)
        given, lone = labels >= 0, (none + own).expand(3, -1, -1)
        wrong = {"gives the fake latent to labels with a class; it stands in for -1 alone": lone}
        refuse_mistakes(got[given], want[given], wrong, what)
        first_only = own.repeat(4, 1, 1)
        first_only[:, :1] += one
        mistakes = {
            "takes -1 for the last class (Python counts from the end); -1 means no class, the fake "
            "latent": table[labels][:, None] + own,
            "takes -1 for class 0; -1 means no class, the fake latent": (
                table[labels.clamp(min=0)][:, None] + own
            ),
            "treats class 0 as no class; only -1 means no class": (
                torch.where((labels <= 0)[:, None], none, table[labels])[:, None] + own
            ),
            "adds nothing for the label -1; no class has a vector too, the fake latent": (
                torch.where((labels < 0)[:, None], 0 * none, table[labels])[:, None] + own
            ),
            "adds the fake latent to every class; it stands in for a class that is missing": (
                one + none + own
            ),
            "has the class in the first buffer token only, expected in each": first_only,
            "forgets the positions: without them all buffer tokens of an image are equal": (
                one.expand_as(want)
            ),
            "has positions alone: the class is missing": own.expand_as(want),
            "gives all buffer tokens the first position, expected a position for each": (
                one + own[:, :1].expand_as(own)
            ),
            "takes the positions from the end; buffer tokens stand in front of the sequence": (
                one + places[:, -size:]
            ),
            "takes the positions of the image's tokens; the buffer's are the first ones": (
                one + places[:, size : 2 * size]
            ),
            "takes the decoder's positions, expected the encoder's": (
                one + model.decoder_pos_embed_learned[:, :size]
            ),
            "multiplies class and position; add them": one * own,
        }
        refuse_mistakes(got, want, mistakes, what)
        close(got, want, what)
    both = [lambda *_, f=f: f(model, labels) for f in (candidate, MAR.embed_buffer)]
    learned = {"the class vectors": table, "the fake latent": none, "the positions": places}
    _same_gradients(*both, what, **learned)


def _model() -> MAR:
    """A tiny model whose classes are large beside its positions, so that neither hides."""
    model = MAR(
        img_size=16,
        vae_stride=1,
        patch_size=4,
        vae_embed_dim=1,
        class_num=4,
        encoder_embed_dim=16,
        encoder_depth=1,
        encoder_num_heads=2,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
        buffer_size=3,
        diffloss_d=1,
        diffloss_w=16,
    )
    torch.nn.init.normal_(model.class_emb.weight)
    torch.nn.init.normal_(model.fake_latent)
    return model.eval()
