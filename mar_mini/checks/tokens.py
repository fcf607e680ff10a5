"""Checks of chapter 1: pixel values and back, patches as tokens and back."""

import functools
import itertools

import torch
from einops import rearrange

from mar_mini import data, tokens
from mar_mini.checks import Failed, close, equal, exercise, refuse_mistakes, same_dtype, same_shape

CASES = (  # B, C, H, W, patch size, and what none of the cases before had
    (2, 3, 8, 8, 4, ""),
    (3, 3, 8, 8, 4, "there are not always 2 images; take their number from the shape"),
    (
        2,
        1,
        8,
        8,
        4,
        "there are not always 3 channels; images tell how many by their shape, tokens "
        "by their width",
    ),
    (2, 3, 12, 12, 2, "a patch is not always 4 pixels wide; use patch_size"),
    (2, 3, 8, 32, 4, "the grid is not always square; rows and columns are two numbers"),
    (1, 2, 4, 4, 1, "a single pixel is a patch too"),
)
STOPS = {  # words of an error in the first case, and the idea that is missing
    "duplicate dimension": "rows and columns need two names, p and q, though both are patch_size",
    "Could not infer": "a bracket may leave one size open, not two; pass both p and q",
}
STOPS_BACK = STOPS | {
    "Could not infer": "a bracket may leave one size open, not two. 6 tokens: 2x3 or 3x2? Pass h "
    "and w from grid, and both p and q",
    "'tuple'": "grid is two numbers; unpack it: rows, columns = grid",
}


@exercise(reference=data.normalise)
def normalise(candidate):
    generator = torch.Generator().manual_seed(1)
    for low, high in ((0, 256), (30, 200)):
        what = f"normalise(pixels from {low} to {high - 1})"
        images = torch.randint(low, high, (3, 3, 6, 6), generator=generator, dtype=torch.uint8)
        images[0, 0, 0, :2] = torch.tensor([low, high - 1])
        got, x, want = candidate(images), images.float(), data.normalise(images)
        ends, channels = (1, 2, 3), (0, 2, 3)
        own = "another image with the same pixel gets another value; use fixed numbers"
        mistakes = {
            "runs from 0 to 1, expected -1 to 1": x / 255,
            "runs from 0 to 2, expected -1 to 1: the 1 is still to be subtracted": x / 127.5,
            "runs from -0.5 to 0.5, expected -1 to 1": x / 255 - 0.5,
            "divides by 128 or 256, but white is 255: it must become 1": x / 128 - 1,
            "takes 128 for the middle; it lies between 127 and 128": (x - 128) / 127.5,
            "takes 127 for the middle; it lies between 127 and 128": (x - 127) / 127.5,
            "takes 128 for the middle; it lies halfway between 127 and 128": (x - 128) / 127,
            "is upside down: black is -1, white is 1": 1 - x / 127.5,
            "multiplies while the pixels are still uint8, where 200 * 2 is 144; make them float "
            "first": (images * 2).float() / 255 - 1,
            "calculates while the pixels are still uint8, where 200 * 2 is 144; make them float "
            "first": (images * 2 - 255) / 255,
            f"divides by the largest of these pixels: {own}": 2 * x / x.max() - 1,
            f"subtracts the mean and divides by the spread of these images: {own}": (
                (x - x.mean()) / x.std()
            ),
            f"subtracts the mean and divides by the spread of each channel: {own}": (
                (x - x.mean(channels, keepdim=True)) / x.std(channels, keepdim=True)
            ),
            f"stretches the smallest and largest of these pixels to -1 and 1: {own}": (
                2 * (x - x.min()) / (x.max() - x.min()) - 1
            ),
            f"stretches each image to -1 and 1: {own}": (2 * _stretched(x, ends) - 1),
        }
        refuse_mistakes(got, want, mistakes, what)
        for middle, half in itertools.product((127, 128), (127, 127.5, 128)):
            idea = (
                f"subtracts while the pixels are still uint8, where 0 - {middle} is "
                f"{256 - middle}; make them float first"
            )
            refuse_mistakes(got, want, {idea: (images - middle) / half}, what)
        same_shape(got, want.shape, what)
        same_dtype(got, torch.float32, what)
        close(got, want, what)


@exercise(reference=data.denormalise)
def denormalise(candidate):
    generator = torch.Generator().manual_seed(2)
    for bound in (1.0, 1.5):
        what = f"denormalise(values from {-bound} to {bound})"
        x = bound * (2 * torch.rand(3, 3, 6, 6, generator=generator) - 1)
        x[0, 0, 0, :2] = torch.tensor([-bound, bound])
        given, want = x.clone(), data.denormalise(x)
        got = candidate(given)
        if not torch.equal(x, given):
            raise Failed(f"{what} changed the tensor it was given; write into a new one")
        half = (x + 1) / 2
        mistakes = {
            "lets values below 0 and above 1 through; clamp them": half,
            "clamps to -1 and 1, expected 0 and 1": half.clamp(-1, 1),
            "clamps too early: before it is scaled, the range is -1 to 1": (
                (x.clamp(0, 1) + 1) / 2
            ),
            "clamps before it halves: what is above 0 all becomes 0.5": (x + 1).clamp(0, 1) / 2,
            "clamps without scaling: half of the values are lost": x.clamp(0, 1),
            "is not halved: -1 to 1 is 2 wide": (x + 1).clamp(0, 1),
            "is shifted without being halved": (x + 0.5).clamp(0, 1),
            "is halved without being shifted: -1 must become 0": (x / 2).clamp(0, 1),
            "is halved before it is shifted: (x + 1) / 2, not x / 2 + 1": (x / 2 + 1).clamp(0, 1),
            "divides by 256: 1 must become 1, not 255 / 256": (127.5 * (x + 1) / 256).clamp(0, 1),
            "multiplies by 128 and divides by 255: 0 must become 0.5": (
                (128 * (x + 1) / 255).clamp(0, 1)
            ),
            "is upside down: -1 is black, 0; 1 is white, 1": ((1 - x) / 2).clamp(0, 1),
            "bends the scale with a sigmoid; a straight line is wanted": x.sigmoid(),
            "drops the sign": x.abs().clamp(0, 1),
            "stretches these values to 0 and 1: a grey image would turn black and white": (
                _stretched(x, (0, 1, 2, 3))
            ),
            "stretches each image to 0 and 1: a grey image would turn black and white": (
                _stretched(x, (1, 2, 3))
            ),
        }
        refuse_mistakes(got, want, mistakes, what)
        same_shape(got, want.shape, what)
        refuse_mistakes(got.clamp(0, 1), want, mistakes, what)  # the same without the clamp
        if got.max() > 1.5:
            raise Failed(f"{what} runs to {got.max():g}; pictures are shown in 0 to 1")
        same_dtype(got, torch.float32, what)
        close(got, want, what)


def _stretched(x, axes):
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    return (x - low) / (high - low)


@exercise(reference=tokens.patchify)
def patchify(candidate):
    generator = torch.Generator().manual_seed(3)
    for b, c, height, width, p, news in CASES:
        what = f"patchify({b} images of {c}x{height}x{width}, {p})"
        x = torch.randn(b, c, height, width, generator=generator)
        want = tokens.patchify(x, p)
        cut, spread = "b c (h p) (w q) -> ", "b c (p h) (q w) -> "
        mistakes = {
            "cuts the memory into runs of equal length, as reshape does: a patch is a square, its "
            "rows lie apart in memory": x.reshape(want.shape),
            "leaves the channels in front of the grid; move them behind it, into the token, before "
            "you reshape": rearrange(x, cut + "b c h w p q", p=p, q=p).reshape(want.shape),
            "has the channels last inside a token; the order is channel, row, column": (
                rearrange(x, cut + "b (h w) (p q c)", p=p, q=p)
            ),
            "has columns before rows inside a token; the order is channel, row, column": (
                rearrange(x, cut + "b (h w) (c q p)", p=p, q=p)
            ),
            "has the channel between row and column; the order is channel, row, column": (
                rearrange(x, cut + "b (h w) (p c q)", p=p, q=p)
            ),
            "goes down the columns of the grid; the tokens come row by row": (
                rearrange(x, cut + "b (w h) (c p q)", p=p, q=p)
            ),
            "turns the picture: rows and columns are exchanged everywhere": (
                rearrange(x, cut + "b (w h) (c q p)", p=p, q=p)
            ),
            "takes pixels that lie apart: in einops the slower part of an axis comes first, so "
            "(h p) for patches, not (p h)": rearrange(x, spread + "b (h w) (c p q)", p=p, q=p),
            "makes a token of each channel of a patch; a token holds all channels of its patch": (
                rearrange(x, cut + "b (c h w) (p q)", p=p, q=p)
            ),
            "has one token for each pixel of a patch; it should be one for each patch": (
                rearrange(x, cut + "b (p q) (c h w)", p=p, q=p)
            ),
            "takes the patch size for the number of patches: p and q are the pixels in a patch": (
                rearrange(x, cut + "b (h w) (c p q)", h=p, w=p)
            ),
            "has tokens last; expected (batch, token, number)": want.mT,
            "keeps the grid of tokens; flatten it to one sequence": (
                rearrange(x, cut + "b h w (c p q)", p=p, q=p)
            ),
            "keeps the shape of a patch; flatten it to one axis": (
                rearrange(x, cut + "b (h w) c p q", p=p, q=p)
            ),
            "puts the patches of all images into one sequence; keep the batch axis": want.flatten(
                0, 1
            ),
        }
        _compare(functools.partial(candidate, x.clone(), p), want, mistakes, what, news, STOPS)


@exercise(reference=tokens.unpatchify)
def unpatchify(candidate):
    generator = torch.Generator().manual_seed(4)
    for b, c, height, width, p, news in CASES:
        grid = h, w = (height // p, width // p)
        x = torch.randn(b, h * w, c * p * p, generator=generator)
        what = f"unpatchify({h * w} tokens of {x.shape[-1]}, {p}, {grid})"
        want = tokens.unpatchify(x, p, grid)
        sizes, put = {"p": p, "q": p}, " -> b c (h p) (w q)"
        mistakes = {
            "lays the numbers out one after the other, as reshape does: a patch is a square, its "
            "rows lie apart in memory": x.reshape(want.shape),
            "takes the channels from the front, before the grid; they lie inside each token": (
                rearrange(x.view(b, c, h, w, p, p), "b c h w p q" + put)
            ),
            "reads a token as row, column, channel; the order is channel, row, column": (
                rearrange(x, "b (h w) (p q c)" + put, h=h, w=w, **sizes)
            ),
            "reads a token as channel, column, row; the order is channel, row, column": (
                rearrange(x, "b (h w) (c q p)" + put, h=h, w=w, **sizes)
            ),
            "reads a token as row, channel, column; the order is channel, row, column": (
                rearrange(x, "b (h w) (p c q)" + put, h=h, w=w, **sizes)
            ),
            "fills the grid column by column; the tokens come row by row": (
                rearrange(x, "b (w h) (c p q)" + put, h=h, w=w, **sizes)
            ),
            "takes the grid for (columns, rows); it is (rows, columns)": (
                rearrange(x, "b (h w) (c p q)" + put, h=w, w=h, **sizes)
            ),
            "turns the picture: rows and columns are exchanged everywhere": want.mT,
            "strews the pixels of a patch over the picture: in einops the slower part of an axis "
            "comes first, so (h p) for patches, not (p h)": (
                rearrange(x, "b (h w) (c p q) -> b c (p h) (q w)", h=h, w=w, **sizes)
            ),
            "has the channels last; expected (batch, channel, row, column)": (
                want.permute(0, 2, 3, 1)
            ),
        }
        _compare(
            functools.partial(candidate, x.clone(), p, grid), want, mistakes, what, news, STOPS_BACK
        )


def _compare(call, want, mistakes, what, news, stops):
    """Name the idea behind a wrong result; failing it, what the case has that is new."""
    try:
        got = call()
    except NotImplementedError:
        raise
    except Exception as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        idea = news or next((stops[words] for words in stops if words in last), None)
        if idea is None:
            raise
        raise Failed(f"{what} stops ({last}): {idea}") from error
    refuse_mistakes(got, want, mistakes, what)
    try:
        same_shape(got, want.shape, what)
        same_dtype(got, want.dtype, what)
        _only_moved(got, want, what)
        equal(got, want, what)
    except Failed as failed:
        raise Failed(f"{failed}: {news}" if news else str(failed)) from None


def _only_moved(got, want, what):
    if not torch.equal(got.flatten().sort().values, want.flatten().sort().values):
        raise Failed(f"{what} changes the numbers themselves; they should be moved, nothing else")
