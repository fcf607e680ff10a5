"""The checks of chapter 1 refuse plausible mistakes, each by the name of its idea."""

import pytest
import torch.nn.functional as F
from einops import rearrange

from mar_mini import data, tokens
from mar_mini.checks import Failed
from mar_mini.checks import tokens as check


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("MAR_MINI_STRICT", "1")


def standardised(images):
    x = images.float()
    return (x - x.mean()) / x.std()


def stretched(images):
    x = images.float()
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return 2 * (x - low) / (high - low) - 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda images: images / 128 - 1, "divides by 128 or 256"),  # off by less than 1%
        (lambda images: images / 256 * 2 - 1, "divides by 128 or 256"),
        (lambda images: (images.float() - 128) / 127.5, "takes 128 for the middle"),
        (lambda images: images / 255, "runs from 0 to 1"),
        (lambda images: images / 127.5, "still to be subtracted"),
        (lambda images: images / 255 - 0.5, "runs from -0.5 to 0.5"),
        (lambda images: images * 2 / 255 - 1, "still uint8"),
        (lambda images: (images * 2 - 255) / 255, "still uint8"),
        (lambda images: (images - 128) / 127.5, "subtracts while .* 0 - 128 is 128"),
        (lambda images: (images - 127).float() / 128, "subtracts while .* 0 - 127 is 129"),
        (lambda images: 2 * images.float() / images.max() - 1, "largest of these pixels"),
        (standardised, "spread of these images"),
        (stretched, "stretches each image"),
        (lambda images: 1 - images / 127.5, "upside down"),
        (lambda images: images.double() / 127.5 - 1, "dtype torch.float64"),
        (lambda images: (images / 127.5 - 1).flatten(1), "has shape"),
    ],
)
def test_normalise(wrong, message):
    with pytest.raises(Failed, match=message):
        check.normalise(wrong)


def in_place(x):
    return x.add_(1).div_(2).clamp_(0, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: (127.5 * (x + 1) / 256).clamp(0, 1), "divides by 256"),  # off by less than 1%
        (lambda x: (128 * (x + 1) / 255).clamp(0, 1), "multiplies by 128"),
        (lambda x: (x + 1) / 2, r"1.5 to 1.5\) lets values below 0"),
        (lambda x: ((x + 1) / 2).clamp(-1, 1), "clamps to -1 and 1"),
        (lambda x: (x.clamp(0, 1) + 1) / 2, "clamps too early"),
        (lambda x: (x + 1).clamp(0, 1) / 2, "clamps before it halves"),
        (lambda x: x.clamp(0, 1), "clamps without scaling"),
        (lambda x: (x + 1).clamp(0, 1), "not halved"),
        (lambda x: (x + 0.5).clamp(0, 1), "shifted without being halved"),
        (lambda x: (x / 2 + 1).clamp(0, 1), "halved before it is shifted"),
        (lambda x: x / 2 + 1, "halved before it is shifted"),  # nor clamped
        (lambda x: x.sigmoid(), "sigmoid"),
        (lambda x: (x - x.min()) / (x.max() - x.min()), "stretches"),
        (lambda x: ((x + 1) * 127.5).clamp(0, 255), "runs to 255"),
        (in_place, "changed the tensor"),
    ],
)
def test_denormalise(wrong, message):
    with pytest.raises(Failed, match=message):
        check.denormalise(wrong)


ONTO = "b c (h p) (w q) -> b (h w) (c p q)"
BACK = "b (h w) (c p q) -> b c (h p) (w q)"


def cut(pattern, names="pq", **sizes):
    def patchify(latents, patch_size):
        return rearrange(latents, pattern, **(dict.fromkeys(names, patch_size) | sizes))

    return patchify


def square_only(latents, patch_size):
    side = latents.shape[-1] // patch_size
    return rearrange(latents, ONTO, h=side, w=side)


def two_images_only(latents, patch_size):
    return tokens.patchify(latents[:2], patch_size)


def unfold_twice(latents, patch_size):
    p = patch_size
    windows = latents.unfold(2, p, p).unfold(3, p, p)  # (B, C, h, w, p, p)
    return windows.reshape(len(latents), -1, latents.shape[1] * p * p)


def reshaped(latents, patch_size):
    return latents.reshape(len(latents), -1, latents.shape[1] * patch_size**2)


def rounded(latents, patch_size):
    return tokens.patchify(latents.bfloat16().float(), patch_size)


def unfold_without_transposing(latents, patch_size):
    return F.unfold(latents, patch_size, stride=patch_size)


def last_patch_missed(latents, patch_size):
    out = tokens.patchify(latents, patch_size)
    out[:, -1] = out[:, 0]
    return out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (rounded, "changes the numbers"),  # off by less than 1%
        (last_patch_missed, "changes the numbers"),
        (reshaped, "as reshape does"),
        (cut("b c (h p) (w q) -> b (h w) (p q c)"), "channels last inside a token"),
        (cut("b c (h p) (w q) -> b (h w) (c q p)"), "columns before rows inside a token"),
        (cut("b c (h p) (w q) -> b (h w) (p c q)"), "channel between row and column"),
        (cut("b c (h p) (w q) -> b (w h) (c p q)"), "down the columns of the grid"),
        (cut("b c (h p) (w q) -> b (w h) (c q p)"), "turns the picture"),
        (cut("b c (p h) (q w) -> b (h w) (c p q)"), "pixels that lie apart"),
        (cut("b c (h p) (w q) -> b (c h w) (p q)"), "each channel of a patch"),
        (cut("b c (h p) (w q) -> b h w (c p q)"), "keeps the grid"),
        (cut("b c (h p) (w q) -> (b h w) (c p q)"), "batch axis"),
        (unfold_without_transposing, "has tokens last"),
        (unfold_twice, "leaves the channels in front of the grid"),
        (cut(ONTO, "p"), "pass both p and q"),
        (cut("b c (h p) (w p) -> b (h w) (c p p)", "p"), "need two names"),
        (cut(ONTO, c=3), "1 != 3.*not always 3 channels"),
        (cut(ONTO, p=4, q=4), "not always 4 pixels"),
        (square_only, "not always square"),
        (two_images_only, "not always 2 images"),
    ],
)
def test_patchify(wrong, message):
    with pytest.raises(Failed, match=message):
        check.patchify(wrong)


def put(pattern, turned=False, without="", **sizes):
    def unpatchify(tokens, patch_size, grid):
        h, w = grid[::-1] if turned else grid
        known = {"h": h, "w": w, "p": patch_size, "q": patch_size} | sizes
        return rearrange(tokens, pattern, **{k: v for k, v in known.items() if k not in without})

    return unpatchify


def rounded_back(x, patch_size, grid):
    return tokens.unpatchify(x.half().float(), patch_size, grid)


def reshaped_back(x, patch_size, grid):
    (h, w), p = grid, patch_size
    return x.reshape(len(x), -1, h * p, w * p)


def channels_in_front(x, patch_size, grid):
    (h, w), p = grid, patch_size
    return rearrange(x.reshape(len(x), -1, h, w, p, p), "b c h w p q -> b c (h p) (w q)")


def grid_for_rows(x, patch_size, grid):
    return rearrange(x, BACK, h=grid, p=patch_size, q=patch_size)


def always_square(x, patch_size, grid):
    return tokens.unpatchify(x, patch_size)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (rounded_back, "changes the numbers"),  # off by less than 1%
        (reshaped_back, "as reshape does"),
        (put("b (h w) (p q c) -> b c (h p) (w q)"), "row, column, channel; the order"),
        (put("b (h w) (c q p) -> b c (h p) (w q)"), "channel, column, row; the order"),
        (put("b (w h) (c p q) -> b c (h p) (w q)"), "column by column"),
        (put("b (h w) (c p q) -> b c (p h) (q w)"), "strews the pixels"),
        (put(BACK, turned=True), "takes the grid for"),
        (put("b (h w) (c p q) -> b c (w q) (h p)"), "turns the picture"),
        (put("b (h w) (c p q) -> b (h p) (w q) c"), "channels last"),
        (channels_in_front, "channels from the front"),
        (always_square, "expected .2, 3, 8, 32.: the grid is not always square"),
        (put(BACK, without="hw"), "2x3 or 3x2"),
        (put(BACK, without="q"), "both p and q"),
        (put(BACK, c=3), "tokens by their width"),
        (put(BACK, p=4, q=4), "not always 4 pixels"),
        (grid_for_rows, "unpack it"),
    ],
)
def test_unpatchify(wrong, message):
    with pytest.raises(Failed, match=message):
        check.unpatchify(wrong)


def test_right_solutions_pass():
    def mine(latents, patch_size):
        return F.unfold(latents, patch_size, stride=patch_size).mT

    def back(x, patch_size, grid):
        size = [n * patch_size for n in grid]
        return F.fold(x.mT, size, patch_size, stride=patch_size)

    assert check.patchify(mine) is mine
    assert check.unpatchify(back) is back
    for function in (data.normalise, data.denormalise, tokens.patchify, tokens.unpatchify):
        assert getattr(check, function.__name__)(function) is function
