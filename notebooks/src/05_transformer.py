# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 5 Encoder and decoder
#
# How tokens look at each other, and how the known ones say what the missing ones should be like.
#
# **You will build**
# - attention, and with it a whole transformer block,
# - the way tokens leave the sequence and come back to their places,
# - the buffer tokens, through which the model learns the class.
#
# **Reading** 25 min, **exercises** 37 min, **CPU** 20 s. **Needs** chapter 1 (tokens).

# %%
import json
import os
import time

import torch
import torch.nn.functional as F
from torch import nn

from mar_mini import MAR, data, evaluation, load_pretrained, masking, transformer
from mar_mini.checks import transformer as check
from mar_mini.tokens import patchify, unpatchify
from mar_mini.viz import figures as fig

seed = int(os.environ.get("MAR_MINI_SEED", 0))
generator = torch.Generator().manual_seed(seed)
_ = torch.set_grad_enabled(False)  # nothing is trained here

# %% [markdown]
# ## The picture first
#
# The larger MAR that comes with the course was trained on small photographs (CIFAR-10). An
# autoencoder makes 4x4 tokens of each (chapter 2). Take 200 test images and hide a random half of
# each one's tokens: these are **masked**. The model has two **transformers** (stacks of **blocks**;
# you build a block below), an **encoder** and a **decoder**; the decoder has four blocks.

# %%
pipeline = load_pretrained("cifar10")
model, L = pipeline.mar, pipeline.mar.seq_len
images, labels = data.to_tensors(data.load_images("cifar10_mini", "test"))
images, labels = data.denormalise(data.normalise(images[:200])), labels[:200]
tokens = pipeline.encode(images)  # (B, L, 64)
mask = masking.mask_by_order(masking.random(4, 4, len(tokens), generator), L // 2)

# %% [markdown]
# In each block every token gathers from all tokens, with **weights** that sum to 1. The next cell
# takes these weights out of the decoder. It is handed two functions, `attend` and `restore`, that
# you will write in this chapter: do not stop at its details now.

# %%
def decoder_maps(attend, restore):
    """Weights (B, N, N) of each decoder block: which of N = 8 + L tokens asks, which answers."""
    x = model.decoder_embed(model.forward_encoder(tokens, mask, labels))
    full = restore(x[:, model.buffer_size :], mask, model.mask_token)
    x = torch.cat([x[:, : model.buffer_size], full], 1) + model.decoder_pos_embed_learned
    for block in model.decoder_blocks:
        q, k, _ = block.attn.project(block.norm1(x), None)  # (B, H, N, d) each
        everyone = torch.eye(x.shape[1]).expand(*q.shape[:2], -1, -1)
        yield attend(q, k, everyone).mean(1)  # each answers with its name; mean over heads
        x = block(x)


# %%
def show_maps(image, maps):
    asks = int(mask[image].nonzero()[3])  # the fourth masked token
    row = model.buffer_size + asks
    rows = {f"block {i + 1} looks at": w[image, row] for i, w in enumerate(maps)}
    fig.show(fig.attention(images[image], mask[image], asks, rows, 4, 4))


show_maps(4, decoder_maps(transformer.attend, masking.restore))

# %% [markdown]
# Left: what is known of the picture, and framed in orange the masked token that asks. Beside it, in
# percent, where it looks in each block. Green frames are known tokens. The rows labelled "buffer"
# are the eight **buffer tokens**, which belong to no place of the picture.
#
# *Predict first:* does a token that must be predicted look most at known tokens, at masked ones, or
# at the buffer? At near ones or at far ones? At the end you will count over all 200 images.
#
# ## Tokens ask, tokens answer
#
# **Attention** lets each token gather from others. A linear layer makes three vectors of each
# token: a **query** (what it asks), a **key** (what it can be asked for) and a **value** (what it
# answers). The product of a query and a key says how well they fit; a softmax makes weights of
# these scores, and the result is the weighted mean of the values:
#
# $$\operatorname{attend}(q, k, v) = \operatorname{softmax}\left(\frac{q k^T}{\sqrt{d}}\right) v.$$
#
# Why divide by $\sqrt d$, the root of the width of a key? *Predict first:* how does the spread
# of $q k^T$ grow with $d$, if all entries have standard deviation 1?

# %%
for d in (4, 64, 1024):
    q, k = torch.randn(2, 1000, d, generator=generator)
    scores = q[:50] @ k.mT
    raw, scaled = ((s.softmax(-1).amax(-1)).mean() for s in (scores, scores / d**0.5))
    print(f"d {d:4}: std {scores.std():5.1f}, largest weight {raw:.2f}, scaled {scaled:.2f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Like the root of $d$. Undivided, wide keys give nearly all the weight to one of 1,000 tokens:
# hardly anything is mixed.
#
# </details>
#
# A model runs several attentions side by side, its **heads**, each on its own slice of the width.
# For a tensor they are one more axis.
#
# > **Exercise 1** · difficulty 2 of 3 · importance 3 of 3 · 10 minutes
# >
# > The formula, for all images and heads at once. (Inside a block all tokens ask: K = N.)

# %%
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, for each image and head.

    q        (B, H, K, d) float: K tokens ask
    k        (B, H, N, d) float: N tokens can be asked
    v        (B, H, N, c) float: what they answer
    returns  (B, H, K, c)
    """
    # BEGIN SOLUTION about 2 lines
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ v
    # END SOLUTION


attend = check.attend(attend)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `a @ b` multiplies the last two axes and leaves the others alone; `k.mT` swaps the last two
# of `k`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The scores are (B, H, K, N). The weights of one who asks must sum to 1: along which axis?
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `(q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)`, then `@ v`.
#
# </details>
#
# {{solution attend}}
#
# ## A block from nothing
#
# A block is attention, then a small network (**MLP**) for each token alone: two linear layers and
# between them a GELU, a smooth ReLU (which sets negative numbers to 0). Both work on a normalised
# copy: `norm` brings each token's vector to mean 0 and spread 1, then scales and shifts it by
# learned numbers. Their result is *added* to what was there: a block adds to the notes on a token,
# it does not replace them (a *residual connection*).
#
# Below, `Block` of `mar_mini` written out, on **your** attention and the trained layers of a block.
# The heads' results are laid side by side (`transpose`, `flatten`), and a linear layer, `proj`,
# mixes them.

# %%
def run_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    parts = block.attn.qkv(block.norm1(x))  # (B, N, 3 * D)
    parts = parts.unflatten(-1, (3, block.attn.num_heads, -1))  # (B, N, 3, H, d)
    q, k, v = parts.permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, d)
    x = x + block.attn.proj(attend(q, k, v).transpose(1, 2).flatten(2))
    h = F.gelu(block.mlp.fc1(block.norm2(x)))  # (B, N, 4 * D)
    return x + block.mlp.fc2(h)


# %% [markdown]
# PyTorch has a function that does attention in one go, a fused *kernel*. The model runs it (or,
# while training on a CPU, the two lines that you wrote: there they are faster). Are you equal?

# %% tags=["claim"]
block = model.decoder_blocks[0]
x = torch.randn(8, model.buffer_size + L, 128, generator=generator)
q, k, v = block.attn.project(block.norm1(x), None)
theirs = [F.scaled_dot_product_attention(q, k, v), block(x)]
ours = [attend(q, k, v), run_block(block, x)]
kernel, whole = ((a - b).abs().max() / b.std() for a, b in zip(ours, theirs, strict=True))
print(f"largest difference to the kernel {kernel:.1e}, to the model's block {whole:.1e}")
assert kernel < 1e-3 and whole < 1e-3  # standard deviations: the rounding of float32

# %% [markdown]
# *Predict first:* shuffle the tokens before the block. What happens to the result?

# %% tags=["claim"]
shuffled = torch.randperm(x.shape[1], generator=generator)
after = run_block(block, x)[:, shuffled]
moved = (run_block(block, x[:, shuffled]) - after).abs().max() / after.std()
print(f"shuffled before or after the block: largest difference {moved:.1e} standard deviations")
assert moved < 1e-3

# %% [markdown]
# <details><summary>Answer</summary>
#
# It is shuffled in the same way, otherwise nothing changes. To attention a sequence is a *set*. So
# a **position embedding**, a learned vector for each place, is added to each token; else nobody
# would know where it stands. And for the same reason you may leave tokens out.
#
# </details>
#
# ## Encode what is known, decode everything
#
# The encoder understands what is known, so it gets the known tokens only: the masked ones *leave*
# the sequence. The decoder says something about every place, so it gets the encoded tokens back in
# their places, and one learned vector, the **mask token**, at all the others. This is the design of
# masked autoencoders (MAE, He et al. 2021).
#
# > **Exercise 2** · difficulty 1 of 3 · importance 3 of 3 · 7 minutes
# >
# > Keep the chosen tokens and drop the rest: as many in each row (K counts these now), but in each
# > at other places.

# %%
def keep(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The chosen tokens of each row, in the order of their places.

    x        (B, L, D) float
    chosen   bool (B, L), True = keep, the same number K in each row
    returns  (B, K, D)
    """
    # BEGIN SOLUTION about 1 line
    return x[chosen].reshape(len(x), int(chosen[0].sum()), x.shape[-1])
    # END SOLUTION


keep = check.keep(keep)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `x[chosen]` runs through the rows one after the other and collects the chosen tokens: (B * K, D).
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Row by row is the order you need: `reshape` it to (B, K, D), with `int(chosen[0].sum())` for K.
# (-1 in its place works too.)
#
# </details>
#
# {{solution keep}}
#
# > **Exercise 3** · difficulty 2 of 3 · importance 3 of 3 · 10 minutes
# >
# > The way back: the known tokens to their places, the mask token to all others.

# %%
def restore(x: torch.Tensor, mask: torch.Tensor, mask_token: torch.Tensor) -> torch.Tensor:
    """Known tokens back in their places, the mask token at all others.

    x           (B, K, D) float, the known tokens, ascending places
    mask        bool (B, L), True = masked; K False ones in each row
    mask_token  (1, 1, D)
    returns     (B, L, D)
    """
    # BEGIN SOLUTION about 3 lines
    full = mask_token.repeat(*mask.shape, 1)
    full[~mask] = x.flatten(0, 1)
    return full
    # END SOLUTION


restore = check.restore(restore)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Begin with a sequence of nothing but mask tokens, then write the known ones over them.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `mask_token.repeat(B, L, 1)` is that sequence. (`expand` would share one piece of memory among all
# places: nothing to write into.)
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `full[~mask] = ...` takes (B * K, D) values, row by row, as `x.flatten(0, 1)` has them.
#
# </details>
#
# {{solution restore}}
#
# Both at work on patches of pixels, with a grey patch as mask token: above the images, below what
# your `restore` makes of what your `keep` left.

# %%
patches = patchify(images[:10], 8)  # (10, L, 192)
grey = torch.full((1, 1, patches.shape[-1]), 0.85)
back = restore(keep(patches, ~mask[:10]), mask[:10], grey)
both = torch.cat([images[:10], unpatchify(back, 8, (4, 4))])
fig.show(fig.image_grid(both, alt="Ten images, below them the same, half of each grey"))

# %% [markdown]
# ## What it saves
#
# In training seven tokens of eight are hidden on average (chapter 6). *Predict first:* so the
# encoder costs an eighth? Below is one block as wide as that of MAR-B (Li et al. 2024: 256 tokens,
# 64 buffer tokens), timed for all tokens and for an eighth of them.

# %%
wide = transformer.Block(768, 12).eval()


def seconds(length):
    x = torch.randn(2, length, 768)
    begin = time.perf_counter()
    wide(x)
    return time.perf_counter() - begin


lengths = {"all": 256, "an eighth": 32, "64 + all": 64 + 256, "64 + an eighth": 64 + 32}
threads = torch.get_num_threads()
torch.set_num_threads(1)  # several would wait for each other where something else runs
rounds = torch.tensor([[seconds(n) for n in lengths.values()] for _ in range(8)])
torch.set_num_threads(threads)

# %% tags=["claim"]
whole, eighth, buffered, buffered_eighth = rounds.amin(0).tolist()  # the fastest of 8
print(f"tokens alone:      an eighth costs {eighth / whole:.2f} of all")
print(f"with 64 buffers:   an eighth costs {buffered_eighth / buffered:.2f} of all")
print(f"half of the blocks in the encoder: {(1 + buffered_eighth / buffered) / 2:.2f} of all")
assert buffered_eighth / buffered < 0.6 and eighth / whole < 0.4

# %% [markdown]
# <details><summary>Answer</summary>
#
# Tokens alone: nearly, as the first line shows. But the buffer tokens are always there: 96 tokens
# instead of 320, which is 0.30. The decoder saves nothing, it runs over all places; so a model with
# half of its blocks in the encoder costs 0.65 of one with all of them in the decoder.
#
# </details>
#
# ## The class comes in through the buffer
#
# At the first step of a generation nothing is known, and the encoder would have nothing to read. So
# **buffer tokens** stand in front of the sequence: 64 in the paper, 8 in the model of photographs.
# Each is the learned vector of the class plus a position embedding of its own. Without a class
# (label -1, needed for guidance, chapter 4) another learned vector stands in, the *fake latent*.
#
# > **Exercise 4** · difficulty 2 of 3 · importance 3 of 3 · 10 minutes
# >
# > Make the buffer tokens of some labels. Their positions come first in
# > `encoder_pos_embed_learned`, which has one for each buffer token and each place of the picture.

# %%
def embed_buffer(model: MAR, labels: torch.Tensor) -> torch.Tensor:
    """The buffer tokens: the class in each, with their positions.

    model    has .class_emb.weight (classes, D), .fake_latent (1, D), .buffer_size and
             .encoder_pos_embed_learned (1, buffer_size + L, D)
    labels   int64 (B,), -1 = no class
    returns  (B, buffer_size, D)
    """
    # BEGIN SOLUTION about 4 lines
    vectors = model.class_emb.weight[labels.clamp(min=0)]  # (B, D)
    vectors = torch.where((labels < 0)[:, None], model.fake_latent, vectors)
    places = model.encoder_pos_embed_learned[:, : model.buffer_size]  # (1, buffer_size, D)
    return vectors[:, None] + places
    # END SOLUTION


embed_buffer = check.embed_buffer(embed_buffer)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `weight[labels]` looks up one vector for each label, but -1 would be the last class.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `labels.clamp(min=0)` makes every label safe to look up; `torch.where(condition, a, b)` then
# replaces the rows of -1.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# (B, 1, D) + (1, buffer_size, D) is (B, buffer_size, D).
#
# </details>
#
# {{solution embed_buffer}}
#
# ## All of it, from your parts
#
# Now you have everything between tokens and **`z`**, the vector that tells the diffusion head
# (chapter 4) what belongs at a place. `z_proj` (despite its name it acts on tokens, not on `z`) is
# a linear layer from the width of a token to that of the encoder, `decoder_embed` one from encoder
# to decoder. Names with `norm` or `_ln` are layers that normalise each vector, as in a block.
# Encoder, decoder and `z` each have position embeddings of their own; those of `z` are
# `diffusion_pos_embed_learned`.

# %%
def encode(model, tokens, mask, labels):
    places = model.encoder_pos_embed_learned[:, model.buffer_size :].expand(len(tokens), -1, -1)
    x = model.z_proj(keep(tokens, ~mask)) + keep(places, ~mask)  # (B, K, D)
    x = model.z_proj_ln(torch.cat([embed_buffer(model, labels), x], 1))
    for block in model.encoder_blocks:
        x = run_block(block, x)
    return model.encoder_norm(x)  # (B, buffer_size + K, D)


# %%
def decode(model, x, mask):
    x = model.decoder_embed(x)
    buffer, known = x[:, : model.buffer_size], x[:, model.buffer_size :]
    x = torch.cat([buffer, restore(known, mask, model.mask_token)], 1)
    x = x + model.decoder_pos_embed_learned
    for block in model.decoder_blocks:
        x = run_block(block, x)
    z = model.decoder_norm(x[:, model.buffer_size :])
    return z + model.diffusion_pos_embed_learned  # (B, L, D)


# %% tags=["claim"]
z = decode(model, encode(model, tokens, mask, labels), mask)
want = model.forward_decoder(model.forward_encoder(tokens, mask, labels), mask)
print(f"largest difference {(z - want).abs().max():.1e}, standard deviation of z {z.std():.2f}")
assert (z - want).abs().max() < 1e-3 * z.std()

# %% [markdown]
# ## Is the buffer really the only way in?
#
# The smallest model of the course writes digits and has two buffer tokens. Ask it for digits, but
# put something else into its buffer: the class 9 - n when n was asked for, or bare positions. (Not
# the label -1: it would put the fake latent there, a learned vector too. Here nothing is to come in
# but places.) A classifier (the nearest mean image of a class) says what came out. *Predict first:*
# how many are the digit that was asked for, in each case?

# %%
digits = load_pretrained("digits")
train_images, train_labels = data.to_tensors(data.load_images("digits"))
means = evaluation.class_means(data.denormalise(data.normalise(train_images)), train_labels)
asked = torch.arange(100) % 10
places = digits.mar.encoder_pos_embed_learned[:, : digits.mar.buffer_size]


def shares(buffer):
    """Ask for digits with other buffer tokens; shares taken for n, and for 9 - n."""
    digits.mar.embed_buffer = buffer  # hides the method of that name until it is deleted
    seeded = torch.Generator().manual_seed(seed)
    drawn = digits.generate(asked, cfg=1.0, num_sampling_steps=15, generator=seeded)
    del digits.mar.embed_buffer
    return [evaluation.recognised(drawn, n, means) for n in (asked, 9 - asked)]


# %% tags=["claim"]
rows = {
    "class n": shares(lambda n: embed_buffer(digits.mar, n)),
    "class 9 - n": shares(lambda n: embed_buffer(digits.mar, 9 - n)),
    "no class": shares(lambda n: places.expand(len(n), -1, -1)),
}
for name, (same, swapped) in rows.items():
    print(f"{name:12} in the buffer: {same:4.0%} are taken for n, {swapped:4.0%} for 9 - n")
assert rows["class n"][0] > 0.6 and rows["class 9 - n"][1] > 0.6
assert max(rows["class n"][1], rows["class 9 - n"][0], *rows["no class"]) < 0.3

# %% [markdown]
# <details><summary>Answer</summary>
#
# With a class in the buffer most are that class, whatever was asked for. Without one, what comes
# has nothing to do with it: about one in ten is right, by chance. Only the buffer decides.
#
# </details>
#
# ## What else is in the buffer
#
# Inside the encoder buffer tokens also look at the known tokens, so they may carry the *picture* as
# well. Test it: keep class, places and known rows of an image, and give the decoder the buffer rows
# that were encoded beside *another* image. How far does `z` move, compared with exchanging buffer
# rows and known rows both? 0 is not at all, 1 as far as with both. *Predict first:* is the buffer
# nearer to 0 or to 1?

# %%
def exchanged(model, tokens, labels):
    """How far z moves with another image's buffer rows, known rows: shares of both together."""
    n = model.buffer_size
    mine, other = (encode(model, x, mask, labels) for x in (tokens, tokens.flip(0)))
    z = decode(model, mine, mask)
    mixed = [torch.cat([other[:, :n], mine[:, n:]], 1), torch.cat([mine[:, :n], other[:, n:]], 1)]
    moved = [(decode(model, x, mask) - z)[mask].norm() for x in (*mixed, other)]
    return (moved[0] / moved[2]).item(), (moved[1] / moved[2]).item()


# %% tags=["claim"]
test_images, test_labels = data.to_tensors(data.load_images("digits", "test"))
test_tokens = digits.encode(data.denormalise(data.normalise(test_images[:200])))
moved = exchanged(digits.mar, test_tokens, test_labels[:200])
print("digits:      other buffer rows {:.2f}, other known rows {:.2f}".format(*moved))
assert 0.3 < moved[0] < 0.95
moved = exchanged(model, tokens, labels)
print("photographs: other buffer rows {:.2f}, other known rows {:.2f}".format(*moved))
assert moved[1] > moved[0]

# %% [markdown]
# <details><summary>Answer</summary>
#
# That depends on the model. With the digits the buffer is more than a label: other buffer rows move
# `z` about as far as other known rows, so it carries the picture as well, as a kind of summary.
# With the photographs the known tokens themselves say more. Both ways are open to a model; training
# decides.
#
# </details>
#
# ## Where does a token look?
#
# Back to the picture from the beginning, now with your own `attend` and `restore`: if they are
# right, it must be the same picture. (A trick makes weights visible: let token i answer with the
# i-th unit vector, then the weighted mean of the answers *is* the row of weights.)

# %%
maps = list(decoder_maps(attend, restore))
show_maps(4, maps)

# %% [markdown]
# One picture is an anecdote. Here is the mean over all masked tokens of the 200: the weight of one
# token of each kind, as a multiple of what it would be if all were alike.

# %%
y, x = torch.arange(L) // 4, torch.arange(L) % 4
squared = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2  # (L, L) squared distances of places
known = mask[:, :, None] & ~mask[:, None]  # (B, L, L) a masked token asks a known one
kinds = {
    "masked": mask[:, :, None] & mask[:, None],
    "known": known,
    "known beside it": known & (squared == 1),
    "known far away": known & (squared >= 4),
}

# %% tags=["claim"]
for i, w in enumerate(maps):
    w = w[:, model.buffer_size :] * w.shape[-1]  # (B, L, N)
    weight = {name: w[..., model.buffer_size :][kind].mean() for name, kind in kinds.items()}
    weight["buffer"] = w[mask][:, : model.buffer_size].mean()
    print(f"block {i + 1}: ", ", ".join(f"{name} {share:.2f}" for name, share in weight.items()))
assert weight["known"] > 1.3 * weight["masked"]  # in the last block
assert weight["known beside it"] > 1.1 * weight["known far away"]

# %% [markdown]
# <details><summary>Answer to the question at the top</summary>
#
# In block 1 least at known tokens (0.59): masked ones (1.17) and the buffer (1.24) get more. From
# block 2 on: at known tokens, at near ones most. Block 1 looks at the buffer more than the later
# blocks do. Perhaps it fetches the class there, but this count does not show it. Nobody told the
# model any of this.
#
# </details>
#
# ## Why 64 buffer tokens?
#
# The paper uses 64; people asked why, and heard that the decoder needs only one (LTH14/mar, issues
# 21 and 77). Here is a small experiment: models of digits that differ in nothing but the number of
# buffer tokens, each trained for the same 14 seconds of processor time, from three seeds
# (`make ablations`). The measure is a distance of their samples to real digits, chapter 9 explains
# it; lower is better.

# %%
def comparison(key):
    """Trainings of one experiment; each row gets the mean over its seeds and its standard error."""
    path = data.data_dir().parent / "benchmarks/results/ablations.json"
    rows = json.loads(path.read_text("utf-8"))[key]["rows"]
    for row in rows:
        values, free = torch.tensor(row["seeds"]), torch.tensor(len(row["seeds"]) - 1)
        row["mean"], row["error"] = values.mean(), values.std(correction=0) / free.sqrt()
        row["steps"] = sum(row["steps"]) / len(row["steps"])
    return rows


# %%
def gain(a, b):
    """By how many standard errors of the difference row b is better than row a."""
    return (a["mean"] - b["mean"]) / (a["error"] ** 2 + b["error"] ** 2).sqrt()


def report(rows, xlabel):
    """Draw the rows and print them."""
    best = min(rows, key=lambda row: row["mean"])
    for row in rows:
        print(f"{row['label']:>6}: {row['mean']:4.0f}, standard error {row['error']:4.1f}, "
              f"the best is {gain(row, best):4.1f} errors better; {row['steps']:4.0f} steps")
    fig.show(fig.error_bars(rows, xlabel=xlabel, ylabel="distance to real digits"))


# %% tags=["claim"]
rows = comparison("buffers")
report(rows, "buffer tokens")
share, better = rows[-1]["steps"] / rows[0]["steps"], gain(rows[0], rows[-1])
print(f"most buffer tokens against fewest: {share:.2f} of the steps")
print(f"fewest against most: {-better:.1f} errors better (below three: may be chance)")
assert share < 0.93 and not better > 3

# %% [markdown]
# Small orange dots are seeds, blue dots their mean, bars one standard deviation of the seeds; the
# printed standard error, that of the mean, is smaller. The axis does not begin at zero. A gap below
# three errors may well be chance, and by that measure many buffer tokens bring these models
# nothing. They do have a price: each step takes longer, so in equal time a model learns from fewer
# images. But these models are small and young, with 16 tokens and ten classes. With 256 tokens and
# 1,000 classes, and a summary to write, 64 may pay: this experiment cannot tell.
#
# ## Is a split into encoder and decoder needed?
#
# A decoder alone could do it all: mask tokens in from the first block on. The authors found that
# almost as good (LTH14/mar, issue 42). Below, `1 + 2` means one encoder block and two decoder
# blocks, all else as before.

# %% tags=["claim"]
rows = comparison("encoder_decoder")
report(rows, "encoder + decoder blocks")
share = rows[-1]["seconds_per_step"] / rows[0]["seconds_per_step"]
better = gain(rows[-1], rows[0])
print(f"most encoder blocks against none: {share:.2f} of the time for a step")
print(f"most against none: {-better:.1f} errors better in equal time (below three: may be chance)")
assert share < 1 and not better > 3

# %% [markdown]
# The more blocks are in the encoder, the cheaper a step; and in equal time the decoder alone is not
# better by three errors. So a split is not needed, but it saves, and here it costs nothing that
# could be measured. In the big model with its 256 tokens the saving is larger (you timed it).
#
# ## Going further
#
# 1. Leave out the mean over heads in `decoder_maps` and draw the four heads of a block. Do they
#    look at different things?
# 2. In the model of digits, let one buffer token carry class n and the other 9 - n. Who wins?
# 3. Hide 14 tokens of 16, then 2, and count the weights again. Does the buffer lose weight as more
#    is known? And do tokens of `load_pretrained("digits")` look where these look?
# 4. Open: mask tokens look at each other. What could they have to say?
#
# ## Recap
#
# Attention is a weighted mean whose weights come from the tokens themselves; a sequence is a set to
# it, so tokens can be left out. The encoder reads the known ones and the buffer, the decoder puts
# them back among mask tokens and makes `z` for each place. The class enters through the buffer
# alone, and the buffer may carry a summary of the picture as well.
#
# | symbol | in code | module |
# |---|---|---|
# | $\operatorname{attend}(q, k, v)$ | `attend`, `Attention`, `Block` | `transformer` |
# | known tokens | `keep`, `positions` | `masking` |
# | sequence with mask tokens | `restore` | `masking` |
# | buffer tokens | `MAR.embed_buffer` | `mar` |
# | encoder, decoder, $z$ | `MAR.forward_encoder`, `MAR.forward_decoder` | `mar` |
#
# The next chapter needs the mask: which tokens are hidden, and in which order they come back.
