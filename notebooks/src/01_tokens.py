# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 1 Images as tokens
#
# A transformer reads sequences; this chapter turns an image into one, and back.
#
# **You will build**
# - the step from pixel values to the range that the model works in, and back,
# - `patchify`, which cuts images into tokens,
# - `unpatchify`, which puts tokens back into their places.
#
# **Reading** 20 min, **exercises** 35 min, **CPU** 15 s. **Needs** chapter 0 (the tour).

# %%
import json
import os
import time

import torch
from einops import rearrange

from mar_mini import data, load_pretrained
from mar_mini.checks import tokens as check
from mar_mini.transformer import Block
from mar_mini.viz import figures as fig

seed = int(os.environ.get("MAR_MINI_SEED", 0))
generator = torch.Generator().manual_seed(seed)

# %% [markdown]
# ## The picture first
#
# One image, cut in four ways. A square is a **patch**, and each patch will become one **token**: a
# row of numbers, the unit in which the model thinks. A language model reads words, MAR reads
# patches.

# %%
dataset = data.load_images("cifar10_mini", "train")
images, labels = data.to_tensors(dataset)
large = images[1].repeat_interleave(4, 1).repeat_interleave(4, 2) / 255    # (3, 128, 128)
cuts = {p: large.clone() for p in (16, 8, 4, 2)}
for p, picture in cuts.items():
    picture[:, :: 4 * p] = picture[:, :, :: 4 * p] = 1
names = [f"{(32 // p) ** 2} tokens of {3 * p * p}" for p in cuts]
fig.show(fig.image_grid(torch.stack(list(cuts.values())), columns=4, titles=names))

# %% [markdown]
# Above each picture: how many tokens it gives, and how many numbers each of them has. Whichever
# way you cut, there are 3,072 numbers in all. Which cut is good? By the end of the chapter you will
# have seen what goes wrong on either side, and how the course's own model gets away with 16 tokens
# of 64 numbers.
#
# ## An image is a tensor
#
# `cifar10_mini` is bundled with the course: 2,000 photographs of 32x32 pixels in ten classes.

# %%
print(tuple(images.shape), images.dtype, f"from {images.min()} to {images.max()}")
titles = [data.class_names(dataset)[n] for n in labels[:20]]
fig.show(fig.image_grid(images[:20] / 255, titles=titles))

# %% [markdown]
# The axes are batch, channel, row, column: (B, C, H, W). Every pixel has three whole numbers from 0
# to 255, for red, green and blue; `uint8` is the type of a byte.
#
# The model does not work on bytes. Its last part, the diffusion head (chapter 4), mixes each token
# with noise of mean 0 and standard deviation 1. So the numbers of a token should lie around 0 as
# well and not be much larger or smaller: from -1 to 1 will do.
#
# ## Build it: normalise and back
#
# > **Exercise 1** · difficulty 1 of 3 · importance 2 of 3 · 10 minutes
# >
# > Two functions, in a line each. The second undoes the first, except that it gives 0 to 1 instead
# > of 0 to 255. Fixed numbers only: a pixel's new value must not depend on the other pixels, or
# > nobody could undo it.

# %%
def normalise(images: torch.Tensor) -> torch.Tensor:
    """Map pixel values to the range that the model works in.

    images   uint8 (...)    0 to 255
    returns  float32 (...)  -1 to 1
    """
    # BEGIN SOLUTION about 1 line
    return images.float() / 127.5 - 1
    # END SOLUTION


def denormalise(x: torch.Tensor) -> torch.Tensor:
    """Map model values to the range that pictures are shown in.

    x        float32 (...)  -1 to 1, in generated images a little beyond: that is clamped
    returns  float32 (...)  0 to 1
    """
    # BEGIN SOLUTION about 1 line
    return ((x + 1) / 2).clamp(0, 1)
    # END SOLUTION


normalise = check.normalise(normalise)
denormalise = check.denormalise(denormalise)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The range of `normalise` is 255 wide and is to be 2 wide. Where does its middle go?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Bytes overflow: in `uint8`, 200 * 2 is 144 and 0 - 128 is 128. Divide first, or say `.float()`.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# 255 / 127.5 is 2. And `tensor.clamp(0, 1)` comes last, when the range is 0 to 1 already.
#
# </details>

# %% [markdown]
# {{solution normalise}}
#
# {{solution denormalise}}

# %% [markdown]
# *Predict first:* floats are rounded. Does every byte survive the way there and back?

# %%
x = normalise(images)
back = (denormalise(x) * 255).round().to(torch.uint8)
print("bytes changed:", int((back != images).sum()), "of", f"{images.numel():,}")
print(f"mean {x.mean():.2f}, standard deviation {x.std():.2f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Yes, every one, because `round` follows. `float32` keeps about seven digits, so each byte comes
# back almost whole; cut off instead of rounded, many would be 1 too small.
#
# </details>
#
# The mean is close to 0. The standard deviation is half that of the noise: near enough here; for
# latents, chapter 2 makes it 1.
#
# ## Build it: patches become tokens
#
# A patch of $p \times p$ pixels with $C$ channels has $D = C p^2$ numbers. An image of $H \times W$
# pixels gives $L = \frac{H}{p} \frac{W}{p}$ of them: the **sequence length**. Two conventions are
# fixed once and for all, since trained weights depend on them: tokens come row by row, and inside a
# token the order is channel, row, column.
#
# `einops.rearrange` says such things in a pattern. Names left of the arrow split the axes, names on
# the right put them together again; in a bracket the part that counts slower comes first. Here a
# row of six becomes two pieces of three, and then every second number is taken instead.

# %%
row = torch.arange(6)
print(rearrange(row, "(piece p) -> piece p", p=3).tolist())
print(rearrange(row, "(p piece) -> piece p", p=3).tolist())

# %% [markdown]
# > **Exercise 2** · difficulty 2 of 3 · importance 3 of 3 · 15 minutes
# >
# > Cut images into tokens, for any patch size and any number of channels.

# %%
def patchify(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut each image into square patches and lay each patch out as one token.

    latents  float (B, C, H, W); images for now, chapter 2 explains the name
    returns  float (B, L, D), L = H/p * W/p row by row, D = C * p * p as channel, row, column
    """
    # BEGIN SOLUTION about 1 line
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)
    # END SOLUTION


patchify = check.patchify(patchify)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The rows of a picture are $h$ rows of patches times $p$ rows in a patch: one axis, two names.
# The columns need two names of their own.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Left of the arrow: `b c (h p) (w q)`, with `p` and `q` both set to the patch size.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# On the right three axes: `b`, then what counts the patches, then what counts inside a patch.
#
# </details>

# %% [markdown]
# {{solution patchify}}

# %% [markdown]
# Your tokens, in the order in which the transformer meets them: the 16 patches of 8x8 pixels of the
# picture at the top.

# %%
tokens = patchify(x[1:2], 8)                                              # (1, 16, 192)
patches = tokens.view(16, 3, 8, 8)
fig.show(fig.image_grid(denormalise(patches), columns=16, alt="An image as a row of 16 patches"))

# %% [markdown]
# The sequence itself has no rows and columns any more. That token 4 lies *below* token 0 is
# something that the model has to be told (chapter 5).
#
# ## Build it: and back
#
# > **Exercise 3** · difficulty 2 of 3 · importance 3 of 3 · 10 minutes
# >
# > Put the tokens back. The number of channels follows from their width.

# %%
def unpatchify(tokens: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """Put tokens back into their places: the inverse of `patchify`.

    tokens   float (B, L, D)
    grid     (rows, columns) of tokens, rows * columns = L
    returns  float (B, D / p^2, rows * p, columns * p)
    """
    # BEGIN SOLUTION about 2 lines
    (h, w), p = grid, patch_size
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)
    # END SOLUTION


unpatchify = check.unpatchify(unpatchify)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# It is the pattern of exercise 2 with its two sides exchanged.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `(h w)` alone does not say how to split 6 tokens: 2x3 or 3x2? That is what `grid` is for.
#
# </details>

# %% [markdown]
# {{solution unpatchify}}

# %% [markdown]
# With both functions you can work on tokens and look at pictures. From left to right: there and
# back, the tokens in reverse order, about three tokens of four hidden.

# %%
tokens = patchify(x[1:2], 4)                                              # (1, 64, 48)
hidden = torch.rand(1, 64, 1, generator=generator) < 0.75
edits = [tokens, tokens.flip(1), tokens.where(~hidden, 0.7)]
pictures = torch.cat([unpatchify(edit, 4, (8, 8)) for edit in edits])
titles = ["there and back", "reversed", "most hidden"]
fig.show(fig.image_grid(denormalise(pictures), columns=3, titles=titles))
assert torch.equal(pictures[0], x[1])

# %% [markdown]
# Look at the middle one: the order of patches is turned round, each patch itself is not. And the
# right one is what MAR gets to see in training: from it, it has to predict the hidden tokens.
#
# ## Why not one token per pixel?
#
# A transformer is a stack of **blocks** (chapter 5). Most of a block treats tokens one by one, as
# vectors of $w$ numbers: work that grows with $L$. One part, **attention**, also compares each with
# every other, so that they learn of each other: work that grows with $L^2$.
#
# The block's weight matrices have $12 w^2$ numbers (4 of the 12 inside attention), each used once
# per token: $12 L w^2$ multiplications. Each of the $L^2$ pairs adds $2 w$: $w$ to compare the two
# and $w$ to pass something on.
#
# *Predict first:* a sequence of 1,024 tokens (one per pixel of a 32x32 image) is 16 times as long
# as one of 64 (patches of 4x4). How many times as much work is it for a block with $w = 128$: about
# 16, about 256, or between?

# %%
block = Block(128, num_heads=4).eval()
assert sum(p.numel() for p in block.parameters() if p.ndim == 2) == 12 * 128**2
print("patch  tokens  numbers  pairs of tokens  multiplications   of these for pairs")
for p in (1, 2, 4, 8, 16):
    length, dim = patchify(x[:1], p).shape[1:]
    pairs, weights = 2 * length**2 * 128, 12 * length * 128**2
    print(f"{p:5}  {length:6}  {dim:7}  {length**2:15,}  {pairs + weights:15,}"
          f"  {pairs / (pairs + weights):19.0%}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Between: divide two rows of the table, and you get about 34. In the short sequence the pairs are a
# small part of the work, in the long one more than half.
#
# </details>
#
# And by the clock, on one thread?

# %%
@torch.inference_mode()
def seconds(length: int) -> float:
    """Processor time of one pass of the block over eight sequences, the mean of many."""
    sequences, passes = torch.randn(8, length, 128, generator=generator), 5_000 // length
    start = time.process_time()
    for _ in range(passes):
        block(sequences)
    return (time.process_time() - start) / passes


# %% tags=["claim"]
threads = torch.get_num_threads()
torch.set_num_threads(1)  # several would wait for each other where something else runs
short, long = (min(seconds(n) for _ in range(3)) for n in (64, 1024))
torch.set_num_threads(threads)
print(f"{short * 1000:.2f} ms and {long * 1000:.1f} ms")
print(f"{long / short:.0f} times as much (claimed: more than 16 times)")
assert long / short > 16

# %% [markdown]
# The clock says something else than 34, since it counts more than multiplications. To start an
# operation takes as long for 64 tokens as for 1,024, and large results fit into no cache. But more
# than 16 it is.
#
# So one token per pixel is possible, but dear: in the same time the model gets through far fewer
# images. And it grows worse with size: an image of 256x256 pixels has 65,536 of them, so more than
# four billion pairs.
#
# ## Why not a few large tokens?
#
# Then go to the other end: one token, the whole image, so nothing to compare. But attention is what
# relates one part of the image to another, and it works *between* tokens. What happens *inside* a
# token is left to the diffusion head, a small network without attention.
#
# And large patches are rarer and more varied. Here is what 4,500 digits of 16x16 pixels give, and
# how many tokens there are to learn from for each number in a token:

# %%
digits, test = (data.to_tensors(data.load_images("digits", s))[0] for s in ("train", "test"))
digits, test = normalise(digits), normalise(test)
for p in (1, 2, 4, 8, 16):
    _, length, dim = patchify(digits[:1], p).shape
    count = len(digits) * length
    print(f"patch {p:2}: {count:9,} tokens of {dim:3} numbers, {count / dim:9,.0f} for each")

# %% [markdown]
# Do the known tokens cover what is to come? Take digits that no one has seen, and build each from
# the tokens of 1,000 training digits: for each token the nearest, put into its place. *Wrong* is
# the squared difference that remains, as a share of what you get if you always show the mean digit.
# *Predict first:* which patch size gives a good copy, and what will a single patch of 16x16 give?

# %% tags=["claim"]
known = digits[torch.randperm(len(digits), generator=generator)[:1000]]
unseen = test[torch.randperm(len(test), generator=generator)[:100]]
versions, wrong = [unseen], {}
for p in (4, 8, 16):
    book, wanted = patchify(known, p).flatten(0, 1), patchify(unseen, p)   # (N, D), (100, L, D)
    nearest = torch.cdist(wanted.flatten(0, 1), book).argmin(1)
    versions.append(unpatchify(book[nearest].view_as(wanted), p, (16 // p, 16 // p)))
    off = (versions[-1] - unseen).square().mean() / (unseen - known.mean(0)).square().mean()
    wrong[p * p] = off.item()
print("wrong:", ", ".join(f"{off:.0%} with {dim} numbers" for dim, off in wrong.items()))
margin = wrong[256] / wrong[16]
print(f"256 numbers a token: {margin:.1f} times as wrong as 16 (claimed: more than 3 times)")
assert margin > 3

# %%
titles = ["unseen", "patch 4", "patch 8", "patch 16"] * 2
rows = denormalise(torch.stack(versions, dim=1)[:8].flatten(0, 1))
alt = "Unseen digits and their copies from tokens of 16, 64 and 256 numbers, less and less alike"
fig.show(fig.image_grid(rows, columns=8, titles=titles, alt=alt))

# %% [markdown]
# <details><summary>Answer</summary>
#
# Small patches repeat: for nearly every one the training set holds something close, so the tokens
# of 16 numbers (patch 4) make a good copy. A whole digit does not repeat: patch 16 gives digits,
# but by another hand, and sometimes another digit. (Still smaller patches would copy still better:
# the copy asks only what tokens can hold, not how to put them together.)
#
# </details>
#
# So with small tokens the parts are known, and the work is to put them together: that is what
# attention is for. With one large token nothing can be put together; the head has to know the
# whole.
#
# ### Sequence length against token width
#
# Does a trained model care? The course's own experiment (`make ablations`): MARs that differ in the
# patch size alone, each trained on the same digits for the same seconds of processor time. Below, a
# small dot for each training, a large one for their mean and a bar of one standard deviation to
# either side; lower is better. The measure is the **Fréchet distance** of 1,000 samples to the
# training digits, in what a small network sees in the pictures (chapter 9); the floor is what real
# digits get. *Predict first:* where is the best patch, and where are the ends?

# %%
path = data.data_dir().parent / "benchmarks/results"
result = json.loads((path / "ablations.json").read_text("utf-8"))["token_width"]
alt = "The distance is least for 16 tokens of 16, and about twice that at both ends"
ylabel = "distance, lower is better"
fig.show(
    fig.error_bars(result["rows"], xlabel="how a digit is cut", ylabel=ylabel,
                   floor=result["floor"], alt=alt)
)

# %% tags=["claim"]
for row in result["rows"]:
    print(f"{row['label']:24} {min(row['steps']):4} steps in {result['seconds']:.0f} seconds")
runs = {row["width"]: row["seeds"] for row in result["rows"]}
margin = min(runs[1] + runs[256]) / max(runs[16])
print(f"real digits: {result['floor']:.1f}")
print(f"both ends: at least {margin:.1f} times as far as tokens of 16 (claimed: more than 1.3)")
assert margin > 1.3

# %% [markdown]
# <details><summary>Answer</summary>
#
# The middle is best (patches of 2 and of 4 are hardly apart), and both ends fail alike, for
# opposite reasons. One token per pixel is so slow that the model made some 20 steps. The single
# token of 256 numbers made more steps than any other cut and still is as far off: now the head
# alone has to know how all pixels of a digit go together. (In so short a training all are far from
# the floor. What it shows is which cut learns sooner.)
#
# </details>
#
# People who train MAR on data of their own meet this too. In a thread of the published code
# (LTH14/mar, issue 35) a model of speech still gave noise after 300,000 steps; the explanation
# offered there is that the small head has difficulty with tokens as wide as 256 numbers. The
# full-size model's tokens have 16.
#
# ## Pixel tokens and latent tokens
#
# A photograph of 256x256 pixels leaves no good cut: 256 tokens would be 768 numbers wide each. The
# way out is to make the image smaller first. A **latent** is what a network, the **autoencoder**,
# has squeezed an image into: a small grid with several numbers, its **channels**, at each place. A
# second network turns it back into an image that looks nearly the same. Chapter 2 builds both.

# %%
pixels, latent = (3, 256, 256), (16, 16, 16)   # the autoencoder of the paper: stride 16
for name, shape, p in (("pixels", pixels, 16), ("latent", latent, 1)):
    length, dim = patchify(torch.zeros(1, *shape), p).shape[1:]
    print(f"{name}: {length} tokens of {dim:3} numbers, {length * dim:7,} numbers an image")

# %% [markdown]
# 48 times fewer numbers can be enough because neighbouring pixels are alike. The model of small
# photographs that is bundled with the course makes do with 3 times fewer: 16 channels of 8x8 are
# 1,024, the pixels 3,072. Put its latents into your `patchify`: 2x2 of them become one token.

# %% tags=["claim"]
bundled = load_pretrained("cifar10")
photos = normalise(data.to_tensors(data.load_images("cifar10_mini", "test"))[0])
photos = photos[torch.randperm(len(photos), generator=generator)[:100]]
with torch.inference_mode():
    latents = bundled.vae.encode(photos).mode()                            # (100, 16, 8, 8)
    copies = bundled.vae.decode(latents)                                   # (100, 3, 32, 32)
tokens = patchify(latents, 2)                                              # (100, 16, 64)
off = ((copies - photos).square().mean() / (photos - x.mean(0)).square().mean()).item()
print(f"{tokens.shape[1]} tokens of {tokens.shape[2]}: {off:.1%} wrong (claimed: less than 2%)")
assert off < 0.02 and tokens.shape[1:] == (bundled.mar.seq_len, bundled.mar.token_embed_dim)

# %%
most = latents.std((0, 2, 3)).argmax()                                     # varies most
grey = latents[:, most, None].expand(-1, 3, -1, -1)
channel = denormalise(grey / grey.std() / 2)                               # spread 0.5, as pixels
channel = channel.repeat_interleave(4, 2).repeat_interleave(4, 3)          # (100, 3, 32, 32)
rows = torch.stack([denormalise(photos), channel, denormalise(copies)], dim=1)[:6].flatten(0, 1)
alt = "Photographs, one channel of their latents as grey values, and copies that look the same"
fig.show(fig.image_grid(rows, columns=9, titles=["photograph", "latent", "copy"] * 3, alt=alt))

# %% [markdown]
# Between photograph and copy stands one of the 16 channels of the latent, the one that varies most:
# more or less the brightness (dark and bright may be exchanged). Each of its places stands for 4x4
# pixels, side by side as in the photograph. That is why a latent can be cut into patches as before.
#
# In pixels 64 tokens take 48 numbers each, in latents 16; and the latents can also be cut into 16
# tokens of 64. Which helps a MAR? One training each, of the same model for the same 4 minutes on
# CIFAR-10 (`recipes/compare.py`), judged by the Fréchet distance of 1,000 samples to photographs,
# in what a larger network sees. One training each: only large gaps say anything. (For the latents,
# the autoencoder had five minutes of its own before; pixels need none.)

# %% tags=["claim"]
rows = json.loads((path / "tokens.json").read_text("utf-8"))["rows"]
far = {}
for row in rows:
    cut = f"{row['tokens']} tokens of {row['width']}"
    kind = "pixels" if row["preset"] == "cifar10_pixels" else "latents"
    far[cut] = row["distance"]
    print(f"{cut}, {kind}: {row['images_seen']:6,} images seen, distance {row['distance']:.0f}")
margin = far["64 tokens of 16"] / far["16 tokens of 64"]
print(f"in latents, 64 tokens are {margin:.2f} times as far as 16 (claimed: more than 1.1)")
assert margin > 1.1

# %% [markdown]
# At 64 tokens, latents and pixels are hardly apart: narrower tokens alone gained nothing here.
# Compare the two cuts of the latents: with 16 tokens the model sees more than twice as many images
# in its minutes, and comes closer. So the course's model for CIFAR-10 has 16 tokens of 64 numbers.
# It is the trade of this chapter again, at a small budget. The full-size models, with a wider head
# and hundreds of passes over the images, take one latent a token: 256 tokens of 16.
#
# ## Going further
#
# 1. Cut 32x32 images with a patch size of 5. What does your `patchify` say, what the package's
#    (`mar_mini.tokens.patchify`), and which message would you rather read?
# 2. Build the unseen digits again from 100 known digits, and from 4,000. For which width of token
#    does the error fall most in percentage points, and for which to the smallest share of itself?
# 3. After `torch.set_num_threads(1)`, give `seconds` the lengths 64 to 4096 and draw them:
#    `fig.show(fig.curves({"ms": (lengths, values)}, xlabel=..., ylabel=..., logy=True))`. Does
#    doubling the length ever cost four times the time?
# 4. Open: all tokens here are squares of equal size. What would you gain, and what would you lose,
#    with small patches where much happens and large ones in the sky?
#
# ## Recap
#
# An image becomes a sequence of tokens: patches, laid out as rows of numbers, in a fixed order.
# Many narrow tokens make attention dear; few wide ones leave the work to a small head, which has
# few examples to learn it from. Latents ease the trade, since neighbouring pixels are alike: an
# image takes fewer numbers, so that fewer tokens hold it without being much wider.
#
# | symbol | in code | module |
# |---|---|---|
# | $L$, $D$ | `tokens.shape[1:]` | `tokens` |
# | $p$ | `patch_size` | `tokens` |
# | image to tokens | `patchify` | `tokens` |
# | tokens to image | `unpatchify` | `tokens` |
# | -1 to 1 and back | `normalise`, `denormalise` | `data` |
# | images | `load_images`, `to_tensors` | `data` |
#
# The next chapter needs the idea of a latent: it trains the two networks that make one.
