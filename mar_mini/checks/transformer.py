"""Checks of chapter 5: attention, tokens that leave and come back, the class in the buffers."""

import torch
from torch import Tensor

from mar_mini import MAR, masking, transformer
from mar_mini.checks import Failed, close, exercise, refuse_mistakes, same_dtype, same_shape


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
        got = candidate(q.clone(), k.clone(), v.clone())
        same_shape(got, want.shape, what)
        scores = q @ k.mT
        mistakes = {
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
    _same_gradients(candidate, q, k, v)
    big = candidate(100 * q, 100 * k, v)
    if not big.isfinite().all():
        raise Failed(
            "attend(100 q, 100 k, v) is not finite: exp of a large number overflows; use softmax, "
            "which takes the largest one off first"
        )


@torch.enable_grad()  # the notebook has switched gradients off
def _same_gradients(candidate, *tensors: Tensor) -> None:
    gradients = []
    for function in (candidate, transformer.attend):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = function(*leaves)
        if not out.requires_grad:
            raise Failed(
                "attend(q, k, v) has no gradient: nothing could be learned through it; leave out "
                "detach, no_grad and .data"
            )
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        gradients.append(dict(zip("qkv", grads, strict=True)))
    got, want = gradients
    for name in "qkv":
        if got[name] is None:
            raise Failed(f"attend(q, k, v) passes no gradient to {name}")
        close(got[name], want[name], f"the gradient for {name}")


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
        got, given = candidate(x, chosen.clone()), masking.positions(chosen)
        want = masking.keep(x, chosen)
        if isinstance(got, Tensor) and got.shape == x.shape != want.shape:
            raise Failed(
                f"{what} has shape {tuple(x.shape)}, expected {tuple(want.shape)}: tokens that "
                "are not chosen must leave the sequence; setting them to zero saves no work"
            )
        others = masking.positions(mask)[:, : given.shape[1]]
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
            "keeps the others that it should drop": masking.take(x, others),
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
        given = known.clone()
        got = candidate(known, mask.clone(), mask_token)
        want = masking.restore(given, mask, mask_token)
        same_shape(got, want.shape, what)
        if not torch.equal(known, given):
            raise Failed(f"{what} changed the tokens it was given; write into a new tensor")
        count = known.shape[1]
        tail = mask_token.expand(3, 8 - count, -1)
        zeros = masking.restore(given, mask, 0 * mask_token)
        mistakes = {
            "leaves zeros at the masked places; there belongs the mask token": zeros,
            "adds the mask token at known places too; there the known tokens stand alone": (
                zeros + mask_token
            ),
            "puts the mask tokens behind the known ones; each known token goes back to its place": (
                torch.cat([given, tail], 1)
            ),
            "puts the mask tokens in front of the known ones; each known token goes back to its "
            "place": torch.cat([tail, given], 1),
            "uses the first row's places for all rows": (
                masking.restore(given, mask[:1].expand_as(mask), mask_token)
            ),
            "puts the known tokens back in reverse: they come in ascending order of their places": (
                masking.restore(given.flip(1), mask, mask_token)
            ),
            "mixes up the rows: the known tokens of an image must go back to that image": (
                _filled(given.transpose(0, 1), mask, mask_token)
            ),
        }
        if 2 * count == 8:
            mistakes["is upside down: mask is True where the mask token belongs"] = masking.restore(
                given, ~mask, mask_token
            )
        refuse_mistakes(got, want, mistakes, what)
        close(got, want, what)


def _filled(known: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    full = mask_token.repeat(*mask.shape, 1)
    full[~mask] = known.reshape(-1, known.shape[-1])
    return full


@exercise(reference=MAR.embed_buffer)
def embed_buffer(candidate):
    model = _model()
    labels = torch.tensor([2, 0, -1, 3])
    with torch.no_grad():
        want = model.embed_buffer(labels)
        got = candidate(model, labels.clone())
        what = "embed_buffer(model, labels)"
        table, none = model.class_emb.weight, model.fake_latent
        places, size = model.encoder_pos_embed_learned, model.buffer_size
        own, one = places[:, :size], model.class_embedding(labels)[:, None]
        if isinstance(got, Tensor) and got.shape == (4, want.shape[-1]):
            raise Failed(f"{what} gives one token an image, expected {size}: the class in each")
        same_shape(got, want.shape, what)
        first_only = own.repeat(4, 1, 1)
        first_only[:, :1] += one
        mistakes = {
            "takes -1 for the last class (Python counts from the end); -1 means no class, the fake "
            "latent": table[labels][:, None] + own,
            "takes -1 for class 0; -1 means no class, the fake latent": (
                table[labels.clamp(min=0)][:, None] + own
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


def _model() -> MAR:
    """A tiny model whose classes are large beside its positions, so that neither hides."""
    model = MAR(
        img_size=16, vae_stride=1, patch_size=4, vae_embed_dim=1, class_num=4,
        encoder_embed_dim=16, encoder_depth=1, encoder_num_heads=2, decoder_embed_dim=16,
        decoder_depth=1, decoder_num_heads=2, buffer_size=3, diffloss_d=1, diffloss_w=16,
    )  # fmt: skip
    torch.nn.init.normal_(model.class_emb.weight)
    torch.nn.init.normal_(model.fake_latent)
    return model.eval()
