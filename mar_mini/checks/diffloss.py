"""Checks of chapter 4: adaLN, the block of the denoising MLP, the masked loss, guidance.

All of them calculate in float64, so that a mistake is known by its values even if it was written in
another way than here, which rounds differently.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mar_mini import diffloss
from mar_mini.checks import Failed, close, exercise, refuse_mistakes, same_shape
from mar_mini.diffloss import DiffLoss


def _normal(*shape: int, seed: int = 4, std: float = 1.0) -> Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@contextmanager
def _fitting_sizes(what: str, idea: str) -> Iterator[None]:
    """Add an idea to what torch says about sizes that do not fit; other errors pass as they are."""
    try:
        yield
    except NotImplementedError:
        raise
    except Exception as error:
        if not any(word in str(error) for word in ("size", "shape", "dimension", "unpack")):
            raise
        raise Failed(f"{what} stops at sizes that do not fit; {idea} ({error})") from error


@exercise(reference=diffloss.modulate)
def modulate(candidate):
    for name, std in (("large", 1.0), ("small", 0.05)):
        x, shift, scale = _normal(5, 8), _normal(5, 8, seed=5, std=std), _normal(5, 8, std=std)
        what = f"with a {name} shift and scale, modulate(x, shift, scale)"
        given = x.clone()
        got = candidate(given, shift, scale)
        same_shape(got, x.shape, what)
        if not torch.equal(given, x):
            raise Failed(f"{what} changed the x it was given; compute a new tensor")
        want = diffloss.modulate(x, shift, scale)
        mistakes = {
            "multiplies by scale, expected 1 + scale: at scale = 0 nothing of x would be left": (
                x * scale + shift
            ),
            "scales the shift as well: scale x first, then add the shift": (
                (x + shift) * (1 + scale)
            ),
            "takes shift and scale for each other": x * (1 + shift) + scale,
            "puts the shift into the brackets; it is added after x is scaled": (
                x * (1 + scale + shift)
            ),
            "subtracts the shift, expected + shift": x * (1 + scale) - shift,
            "leaves the shift out": x * (1 + scale),
            "leaves the scale out": x + shift,
            "multiplies by 1 - scale, expected 1 + scale": x * (1 - scale) + shift,
            "multiplies by exp(scale), which is 1 + scale only where scale is small": (
                x * scale.exp() + shift
            ),
            "uses the first row's shift and scale for all rows": (
                diffloss.modulate(x, shift[:1], scale[:1])
            ),
        }
        refuse_mistakes(got, want, mistakes, what)
        close(got, want, what)


def _random_parameters(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(40)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def _block_mistakes(block: diffloss.ResBlock, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    shift, scale, gate = block.adaLN_modulation(y).chunk(3, dim=-1)
    normed = block.in_ln(x)
    h = block.mlp(diffloss.modulate(normed, shift, scale))
    first_gate, first_shift, first_scale = shift, scale, gate
    return {
        "leaves the gate out: the MLP's output is multiplied by it": x + h,
        "leaves the residual connection out: x itself is added": gate * h,
        "gates what goes into the MLP; the gate multiplies what comes out of it": (
            x + block.mlp(gate * diffloss.modulate(normed, shift, scale))
        ),
        "modulates what comes out of the MLP; modulate what goes in": (
            x + gate * diffloss.modulate(block.mlp(normed), shift, scale)
        ),
        "gates x as well; the gate belongs to the MLP's output alone": gate * (x + h),
        "multiplies by 1 + gate, expected gate: with a gate of 0 the block must do nothing": (
            x + (1 + gate) * h
        ),
        "adds to the normalised x; the residual connection carries x as it came": normed + gate * h,
        "does not normalise x before it is modulated: in_ln is left out": (
            x + gate * block.mlp(diffloss.modulate(x, shift, scale))
        ),
        "takes scale and shift for each other: the first third is the shift": (
            x + gate * block.mlp(diffloss.modulate(normed, scale, shift))
        ),
        "takes the first third for the gate; the order is shift, scale, gate": (
            x + first_gate * block.mlp(diffloss.modulate(normed, first_shift, first_scale))
        ),
        "does not modulate the normalised x": x + gate * block.mlp(normed),
        "modulates before it normalises": (
            x + gate * block.mlp(block.in_ln(diffloss.modulate(x, shift, scale)))
        ),
        "modulates by x; shift, scale and gate come from y": block(x, x),
    }


@exercise(reference=diffloss.ResBlock)
def ResBlock(candidate):  # noqa: N802 - the name of the class that it checks
    want_block = diffloss.ResBlock(8).double()
    _random_parameters(want_block)
    block = candidate(8).double()
    try:
        block.load_state_dict(want_block.state_dict())
    except RuntimeError as error:
        text = "has other parameters than the package's; leave __init__ as it is given"
        raise Failed(f"ResBlock(8) {text}: {error}") from error
    for std in (1.0, 0.01):  # the small one sees the epsilon of the LayerNorm
        x, y = _normal(6, 8, seed=1, std=std), _normal(6, 8, seed=2).requires_grad_()
        what = "ResBlock.forward(x, y)"
        columns = "cut the columns into shift, scale and gate, (N, W) each: chunk(3, dim=-1)"
        with _fitting_sizes(what, columns):
            got, want = block(x.clone(), y), want_block(x, y)
        same_shape(got, want.shape, what)
        refuse_mistakes(got, want, _block_mistakes(want_block, x, y), what)
        close(got, want, what)
        if not got.requires_grad:
            raise Failed(f"{what} passes no gradient on; it would never learn")
        gradients = [torch.autograd.grad(out.square().sum(), y)[0] for out in (got, want)]
        close(*gradients, "the gradient that reaches y")


@exercise(reference=DiffLoss.forward)
def masked_loss(candidate):
    head = DiffLoss(3, 4, 1, 8).double()
    _random_parameters(head)
    target, z, noise = _normal(12, 3, seed=1), _normal(12, 4, seed=2), _normal(12, 3, seed=3)
    t = torch.arange(12) * 80 + 40
    for hidden in ([1, 2, 4, 7, 8, 9, 10], [0], list(range(11)), list(range(12))):
        mask = torch.zeros(12, dtype=torch.bool)
        mask[hidden] = True
        what = f"masked_loss with {len(hidden)} of 12 tokens masked"
        with _fitting_sizes(what, "choose the rows of all four: target, z, t and noise"):
            got, again = (candidate(head, target, z, mask, t=t, noise=noise) for _ in range(2))
        if isinstance(got, dict):
            raise Failed(f"{what} returns the whole dictionary; take its `loss`, and the mean")
        if isinstance(got, Tensor) and got.ndim:
            raise Failed(
                f"{what} has shape {tuple(got.shape)}, a value for each token; expected "
                "their mean, one number, shape ()"
            )
        same_shape(got, (), what)
        if not torch.equal(got, again):
            raise Failed(f"{what} gives another number each time: use the t and noise given")
        want = head(target, z, mask, t=t, noise=noise)
        for idea, value in _loss_mistakes(head, target, z, mask, t, noise):
            refuse_mistakes(got, want, {idea: value}, what)
        close(got, want, what)
        if not got.requires_grad:
            raise Failed(f"{what} carries no gradient; return the tensor, do not detach it")


def _loss_mistakes(head, target, z, mask, t, noise) -> Iterator[tuple[str, Tensor]]:
    rows = head.token_terms(target, z, t=t, noise=noise)
    loss, masked, count = rows["loss"], rows["loss"][mask], int(mask.sum())
    x_t = head.diffusion.q_sample(target, t, noise)
    clean = head.diffusion.loss(head.net(target, t, z), target, x_t, t, noise)["loss"]
    swapped = head.diffusion.loss(head.net(x_t, t, z), x_t, target, t, noise)["loss"]
    first = head.token_terms(target[mask], z[mask], t=t[:count], noise=noise[:count])
    own_t = head.token_terms(target[mask], z[mask], t=t[:count], noise=noise[mask])
    own_noise = head.token_terms(target[mask], z[mask], t=t[mask], noise=noise[:count])
    idea = "takes the first rows of t or noise; choose their rows by the mask, as those of target"
    yield from {
        "averages over all tokens; the known ones are given, they must not count": loss.mean(),
        "divides by the number of all tokens; divide by the number of masked ones": (
            masked.sum() / len(mask)
        ),
        "sums over the masked tokens; take their mean, or the loss grows with the mask": (
            masked.sum()
        ),
        "averages over the known tokens: True means masked, to be predicted": loss[~mask].mean(),
        "leaves out the variance's part: take `loss`, not `mse`": rows["mse"][mask].mean(),
        "takes the variance's part alone: take `loss`, not `vb`": rows["vb"][mask].mean(),
        "shows the network the clean target; it must see the noisy one, from q_sample": (
            clean[mask].mean()
        ),
        "hands x_t and target to the loss in the wrong order: loss(output, target, x_t, ...)": (
            swapped[mask].mean()
        ),
    }.items()
    for rows in (first, own_t, own_noise):
        yield idea, rows["loss"].mean()


@exercise(reference=diffloss.guide)
def guide(candidate):
    output = _normal(10, 6)
    output[5:] = output[:5] + _normal(5, 6, seed=5, std=0.05)  # the two predictions are alike
    cond, uncond = output.chunk(2)
    noise_c, v_c, noise_u, v_u = cond[:, :3], cond[:, 3:], uncond[:, :3], uncond[:, 3:]
    for cfg in (3.0, 1.0, 0.0, 1.5):
        what, given = f"guide(output, {cfg})", output.clone()
        with _fitting_sizes(what, "join N rows of noise and the variance of the conditional rows"):
            got = candidate(given, cfg)
        if isinstance(got, Tensor) and got.shape == (5, 3):
            raise Failed(
                f"{what} has shape (5, 3): the variance is missing; expected (5, 6), "
                "noise and variance side by side"
            )
        if isinstance(got, Tensor) and len(got) == 10:
            raise Failed(
                f"{what} has shape {tuple(got.shape)}, as many rows as came in; expected "
                "(5, 6): a row for each pair, noise beside variance"
            )
        same_shape(got, (5, 6), what)
        if not torch.equal(given, output):
            raise Failed(f"{what} changed the output it was given; compute a new tensor")
        want = diffloss.guide(output, cfg)

        def with_noise(noise, v=v_c):
            return torch.cat([noise, v], dim=1)

        guided, pairs = noise_u + cfg * (noise_c - noise_u), (output[0::2], output[1::2])
        mistakes = {
            "starts from the conditional noise; start from the unconditional one, so that "
            "cfg = 1 is no guidance": with_noise(noise_c + cfg * (noise_c - noise_u)),
            "takes the halves for each other: the conditional rows come first": (
                diffloss.guide(torch.cat([uncond, cond]), cfg)
            ),
            "goes from the conditional noise to the unconditional one; it is the other way round": (
                with_noise(noise_c + cfg * (noise_u - noise_c))
            ),
            "pushes away from the condition: the difference is cond - uncond": (
                with_noise(noise_u + cfg * (noise_u - noise_c))
            ),
            "guides the variance too; it is the conditional rows', untouched": (
                uncond + cfg * (cond - uncond)
            ),
            "takes the unconditional rows' variance, expected the conditional rows'": (
                with_noise(guided, v_u)
            ),
            "puts the variance first; the noise comes first": torch.cat([v_c, guided], dim=1),
            "adds cfg times the whole conditional noise; add cfg times the difference": (
                with_noise(noise_u + cfg * noise_c)
            ),
            "leaves the noise unguided": cond,
            "multiplies the conditional noise by cfg": with_noise(cfg * noise_c),
            "takes every other row; the conditional rows are the first half": torch.cat(
                [(pairs[1] + cfg * (pairs[0] - pairs[1]))[:, :3], pairs[0][:, 3:]], dim=1
            ),
        }
        refuse_mistakes(got, want, mistakes, what)
        close(got, want, what)
