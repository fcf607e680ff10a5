# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 6 Masks and orders
#
# Which tokens are hidden, in what order they come back, and how many at a time.
#
# **You will build**
# - the mask that an order leaves behind at any moment,
# - the number of tokens that each step predicts,
# - an order of your own, and let a trained model generate in it.
#
# **Reading** 20 min, **exercises** 25 min, **CPU** 20 s. **Needs** chapters 1 (tokens) and 5
# (encoder and decoder).

# %%
import math
from itertools import pairwise

import torch

from mar_mini import load_pretrained, masking
from mar_mini.checks import masking as check
from mar_mini.viz import MaskOrderExplorer
from mar_mini.viz import figures as fig

generator = torch.Generator().manual_seed(6)

# %% [markdown]
# ## The picture first
#
# A language model writes left to right, because text has a direction. An image has none. MAR
# (*masked autoregressive*) generates the tokens of an image in **any order**, and several at once.
#
# The places of an 8x8 grid of tokens are numbered row by row, from 0 to 63. An **order** is a
# row of places, first to last: `order[:, 0]` holds the places that are generated first. Below
# are seven orders. The tensor says which *place* comes at each turn; the picture shows the
# inverse, at which *turn* each place comes. (`halton` visits the grid by a sequence that spreads
# its points.)

# %%
orders = {name: masking.make_order(name, 8, 8, 2, generator) for name in masking.ORDERS}
fig.show(fig.order_maps(orders, 8, 8))

# %% [markdown]
# *Predict first:* each order was made for two images. In which of `random`, `checkerboard` and
# `spiral` are the two rows the same?

# %%
for name in ("random", "checkerboard", "spiral"):
    print(f"{name:12}", orders[name][:, :8].tolist())

# %% [markdown]
# <details><summary>Answer</summary>
#
# A random order is drawn for each image anew, and so are the fields within each colour of the
# checkerboard; a spiral is the same for all. In training MAR uses
# random orders only, so that the model learns to predict any token from any others. That is why
# you may choose another order afterwards, without training again.
#
# </details>
#
# Play with them: press the triangle below the grid, or take the grid's keyboard focus and use the
# arrow keys. The bars say how many tokens each step predicts; more on that below.

# %%
MaskOrderExplorer("spiral")

# %% [markdown]
# ## How much is hidden in training
#
# A training step hides a share of the tokens, the **mask ratio**, and asks the model to predict
# each of them from the rest. The ratio is drawn for each batch from a normal distribution of mean 1
# and standard deviation 0.25, cut off below 0.7 and above 1. So the model practises mostly the
# hard beginning, where little is known.

# %%
ratios = [masking.sample_mask_ratio(0.7, generator) for _ in range(5000)]
print(f"smallest {min(ratios):.3f}, largest {max(ratios):.3f}, mean {sum(ratios) / 5000:.3f}")
fig.show(fig.histogram(ratios, xlabel="mask ratio"))

# %% [markdown]
# On average seven tokens of eight are hidden. Notice what that saves: the **encoder** looks at the
# known tokens only, an eighth of the sequence.
#
# ## Build it: the mask that an order leaves
#
# > **Exercise 1** · difficulty 1 of 3 · importance 3 of 3 · 8 minutes
# >
# > An order and a number of tokens still to be predicted make a mask: `True` = masked. Since the
# > order runs first to last, it is the tokens whose turn comes **last** that are masked.

# %%
def mask_by_order(order: torch.Tensor, num_masked: int) -> torch.Tensor:
    """Mask the tokens whose turn comes last.

    order       int64 (B, L), each row the places 0 .. L - 1, first to last
    num_masked  how many tokens of each row are still to be predicted
    returns     bool (B, L), True = masked; column j stands for place j of the picture
    """
    # BEGIN SOLUTION about 3 lines
    mask = torch.zeros_like(order, dtype=torch.bool)
    last = order[:, order.shape[1] - num_masked :]
    return mask.scatter(1, last, True)
    # END SOLUTION


mask_by_order = check.mask_by_order(mask_by_order)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Which columns of `order` name the places that are still masked? The entries are *places*, their
# column is the *turn*.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `order[:, -num_masked:]` is a trap: for `num_masked = 0` it is everything. Count from the front.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `tensor.scatter(1, index, True)` writes `True` at the columns that `index` names, row by row.
#
# </details>

# %% [markdown]
# {{solution mask_by_order}}

# %% [markdown]
# Your mask at work: the same order, with less and less hidden. Blue is known, grey is masked, and
# orange is what has become known since the panel before.

# %%
spiral = orders["spiral"][:1]
left = [48, 32, 16, 4]
fig.show(
    fig.token_states(
        [mask_by_order(spiral, n)[0] for n in left], 8, 8, titles=[f"{n} masked" for n in left]
    )
)

# %% [markdown]
# ## How many at a time
#
# One token a step would be slow: 64 steps for 64 tokens, each of them a pass through the whole
# transformer. So MAR predicts several tokens in a step. There is a price: tokens of one step do not
# know of each other. Where two of them depend on each other, that goes wrong, and most of all at
# the beginning, when little else is known. So the first steps take few tokens and the last ones
# many. With $L$ tokens and $N \le L$ steps, after step $i$ there are still masked
#
# $$m_i = \min\left(m_{i-1} - 1, \lfloor L \cos(\tfrac{\pi}{2} \tfrac{i}{N}) \rfloor\right),
# \qquad m_0 = L, \quad m_N = 0.$$
#
# The minimum sees to it that each step predicts at least one token.
#
# *Predict first:* with $L = 256$ tokens and $N = 64$ steps, how many tokens does the first step
# predict, and how many the last?

# %% [markdown]
# > **Exercise 2** · difficulty 2 of 3 · importance 3 of 3 · 12 minutes
# >
# > How many tokens does each step predict? The rule above, as a list.

# %%
def tokens_per_step(length: int, num_iter: int) -> list[int]:
    """How many of `length` tokens each of `num_iter` steps predicts, on the cosine schedule.

    returns  num_iter numbers, each at least 1, that sum to `length`
    """
    # BEGIN SOLUTION about 6 lines
    masked = [length]
    for i in range(1, num_iter):
        left = math.floor(length * math.cos(math.pi / 2 * i / num_iter))
        masked.append(min(masked[-1] - 1, left))
    masked.append(0)
    return [before - after for before, after in pairwise(masked)]
    # END SOLUTION


tokens_per_step = check.tokens_per_step(tokens_per_step)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# First make the list of how many are still masked: $m_0 = L$, then $m_1 ... m_{N-1}$, then 0.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The next entry is `min(masked[-1] - 1, math.floor(...))`.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# A step predicts the difference of two neighbours in that list.
#
# </details>

# %% [markdown]
# {{solution tokens_per_step}}

# %%
print("first and last steps of 64:", tokens_per_step(256, 64)[:3], tokens_per_step(256, 64)[-3:])
fig.show(
    fig.bars(
        {f"64 tokens in {n} steps": tokens_per_step(64, n) for n in (8, 16, 32)},
        xlabel="step", ylabel="tokens predicted",
    )
)

# %% [markdown]
# ## What the encoder sees at each moment
#
# Put the two together and you have the time line of a generation. Here it is for 16 tokens in six
# steps and the Halton order: the beginning, then the state after each step.

# %%
halton = masking.make_order("halton", 4, 4, 1)
left = [16]
for count in tokens_per_step(16, 6):
    left.append(left[-1] - count)
masks = [mask_by_order(halton, n)[0] for n in left]
fig.show(fig.token_states(masks, 4, 4, titles=[f"{n} masked" for n in left]))

# %% [markdown]
# In each step the encoder sees the blue and orange fields of the panel before it; in the first step
# none, only the class. So its work grows from step to step. The decoder always runs over all 16
# places, to ask at every masked one: what belongs here?
#
# ## An order of your own
#
# > **Exercise 3** · difficulty 2 of 3 · importance 1 of 3 · 5 minutes
# >
# > Write any order you like, on a grid of any size: columns from the middle, diagonals, a knight's
# > tour. Each place must come exactly once, and reading order, forwards or backwards, is taken.

# %%
def my_order(
    height: int, width: int, batch_size: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """An order of one's own.

    returns  int64 (batch_size, height * width), each row a permutation, first to last
    """
    # BEGIN SOLUTION about 3 lines
    place = torch.arange(height * width)
    diagonal = place // width + place % width  # row + column: the same along a diagonal
    return diagonal.argsort(stable=True).expand(batch_size, -1)
    # END SOLUTION


my_order = check.my_order(my_order)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Give each place a number that says how late it comes, then `argsort`: the place with the smallest
# number stands first.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `place // width` is the row of a place and `place % width` its column. For diagonals the number is
# row + column.
#
# </details>

# %% [markdown]
# {{solution my_order}}

# %% [markdown]
# Is it the order that you meant? Play it. Then choose *drawn by hand* and draw another one over the
# grid with the mouse: what you draw is `explorer.order`, an order like any other.

# %%
explorer = MaskOrderExplorer(my_order, rows=4, columns=4)
explorer

# %% [markdown]
# ## Let a model generate in it
#
# A small MAR is bundled with the course, trained for 75 seconds on digits of 4x4 tokens. It
# has seen random orders only. *Predict first:* will it write a 3 in the order of the explorer as
# well: in yours, or in what you drew there?

# %%
pipeline = load_pretrained("digits")
drawn = explorer.order
frames = list(pipeline.sample([3], order=drawn, generator=torch.Generator().manual_seed(1)))
fig.show(fig.filmstrip(frames, row=0))

# %% [markdown]
# <details><summary>Answer</summary>
#
# Yes. To the model any order is one of the 16! that it might have met.
#
# </details>
#
# Does the order matter, then? Below 500 digits in each order, and the share of them that a simple
# classifier (the nearest mean image of a class) takes for the digit that was asked for. `cfg=1.0`
# switches guidance off, which would push each digit towards its class (chapter 8).

# %%
from mar_mini import data, evaluation

images, labels = data.to_tensors(data.load_images("digits"))
means = evaluation.class_means(data.denormalise(data.normalise(images)), labels)
asked = torch.arange(500) % 10
for order in ["random", "raster", "spiral", "checkerboard", my_order]:
    seeded = torch.Generator().manual_seed(0)
    digits = pipeline.generate(asked, order=order, cfg=1.0, generator=seeded)
    share = evaluation.recognised(digits, asked, means)
    error = math.sqrt(share * (1 - share) / 500)
    name = order if isinstance(order, str) else "my_order"
    print(f"{name:13} {share:.1%} recognised, standard error {error:.1%}")

# %% [markdown]
# Compare the differences with chance: two shares that differ by less than three standard errors may
# well be equal. And mind the judge: it recognises 81% of *real* digits (it was measured by
# `benchmarks/digits.py`), so it rewards typical digits, not good ones.
#
# ## Going further
#
# 1. Add `num_iter=2` to the call above, then look at such digits with `fig.image_grid`. Does the
#    judge see what you see?
# 2. Draw `masking.tokens_per_step(64, 16, "linear")` beside yours. How many tokens does each of the
#    two draw while fewer than eight are known?
# 3. Open: which order would *you* choose for a picture of which you know the left half?
#
# ## Recap
#
# An order is a permutation, first to last; a mask is what the order has not reached yet. In
# training 70 to 100% of the tokens are hidden in random order, so at sampling time any order works
# (and fewer than 70% hidden too, though never practised: the digits came out). A cosine decides how
# many tokens a step predicts: few while little is known, many at the end.
#
# | symbol | in code | module |
# |---|---|---|
# | $L$, $N$ | `length`, `num_iter` of `tokens_per_step` | `masking` |
# | $m_i$ | `masked_after` | `masking` |
# | order | `make_order`, `ORDERS` | `masking` |
# | mask | `mask_by_order` | `masking` |
# | mask ratio | `sample_mask_ratio` | `masking` |
#
# The next chapter needs the mask: it becomes the training target of the whole model.
