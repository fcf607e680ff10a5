# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 0 A tour: an image, token by token
#
# In half a minute you train a small MAR on handwritten digits and watch it draw.
#
# **You will see**
# - digits of the classes you ask for, generated a few tokens at a time, in no fixed order,
# - every part that the course builds, at work once.
#
# **Reading** 10 min, **exercises** none, **CPU** 40 s. **Needs** nothing but Python.

# %%
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from mar_mini import MAR, get_config, load_pretrained, train_mar
from mar_mini.checkpoints import Pipeline
from mar_mini.data import class_names, denormalise, load_images, normalise, to_tensors
from mar_mini.viz import figures as fig

_ = torch.manual_seed(0)

# %% [markdown]
# ## Where this goes
#
# MAR is a *masked autoregressive* model (Li et al. 2024, arXiv 2406.11838). It cuts an image into
# **tokens**, hides most of them, and learns to predict the hidden ones from the rest. To generate,
# it starts from nothing and fills in a few tokens at a time. The model below is of the same kind
# as the full-size one, with every part in small. First what it does, then how.

# %%
bundled = load_pretrained("digits")
frames = list(bundled.sample([3], generator=torch.Generator().manual_seed(5)))
fig.show(fig.filmstrip(frames, alt="A handwritten 3 growing token by token"))

# %% [markdown]
# Grey tokens are still unknown, the orange ones were predicted in that step. Notice that the order
# is no reading order: the tokens come where chance puts them.
#
# This model was trained for 75 seconds by `mar-mini train --config digits`, and its weights came
# with the course. Now you train one.
#
# ## The data
#
# 4,500 handwritten digits of 16x16 pixels. The model sees pixel values from -1 (black) to 1.

# %%
dataset = load_images("digits", "train")
images, labels = to_tensors(dataset)
images = normalise(images)
print(tuple(images.shape), images.dtype, f"from {images.min():.0f} to {images.max():.0f}")
fig.show(fig.image_grid(denormalise(images[:20]), titles=[str(int(n)) for n in labels[:20]]))

# %% [markdown]
# ## The model
#
# Each image becomes 4x4 tokens, each a patch of 4x4 pixels: 16 tokens of 16 numbers. Three parts
# work together:
#
# - an **encoder**, a transformer that looks at the known tokens only,
# - a **decoder**, a transformer that says for each missing token what it should be like: a vector
#   called `z`,
# - a **diffusion head**, a small network that turns `z` and noise into a token.

# %%
config = get_config("digits")
model = MAR(**asdict(config.mar))
for name in ("encoder_blocks", "decoder_blocks", "diffloss"):
    count = sum(p.numel() for p in getattr(model, name).parameters())
    print(f"{name:15} {count:>9,} parameters")
tokens = model.patchify(images[:1])
print("one image as tokens:", tuple(tokens.shape))

# %% [markdown]
# ## Train it
#
# In each step the model gets a batch of images, most tokens hidden, and learns to predict them. A
# training run here is a Python *generator*: it yields its state after each step, and what you do
# with that is up to you. *Predict first:* the loss begins near 1. Will it go to 0?

# %%
budget = replace(config.training, max_seconds=27)
losses, bar = [], tqdm(total=100, unit="%")
for step in train_mar(model, images, labels, budget):
    losses.append(step.loss)
    bar.update(round(100 * step.progress) - bar.n)
bar.close()
print(f"{step.step} steps, {step.images_seen:,} images, {step.seconds:.0f} s")

# %%
smooth = torch.tensor(losses).unfold(0, 20, 5).mean(1)
fig.show(
    fig.curves(
        {"loss, mean of 20 steps": (torch.arange(len(smooth)) * 5 + 10, smooth)},
        xlabel="step", ylabel="loss", logy=True,
    )
)

# %% [markdown]
# <details><summary>Answer</summary>
#
# No. The loss measures how well the head predicts *noise* that was added to a token, and part of
# that is pure chance. It falls fast, then hardly moves while the pictures still get better. Chapter
# 4 says what its numbers mean.
#
# </details>
#
# ## Ask it for digits
#
# `step.ema` holds the weights averaged over the last steps, which make better pictures than the
# weights of any single step. A `Pipeline` puts the model together with what sampling needs. Each
# column is one class.

# %% tags=["sample-grid"]
pipeline = Pipeline(
    step.ema, clip=config.sampling.clip, classes=class_names(dataset), defaults=config.sampling
)
asked = [i % 10 for i in range(40)]
digits = pipeline.generate(asked, generator=torch.Generator().manual_seed(0))
fig.show(fig.image_grid(digits, titles=[str(n) for n in range(10)]))

# %% [markdown]
# They are rough: the model has seen less in its life than you have read on this page. More training
# makes them better, as the bundled weights show:

# %%
digits = bundled.generate(asked, generator=torch.Generator().manual_seed(0))
fig.show(fig.image_grid(digits, titles=[str(n) for n in range(10)]))

# %% [markdown]
# ## Watch yours grow
#
# Sampling is a generator too. Each `Frame` holds the tokens so far, which of them were predicted in
# this step, and which are still masked.

# %%
frames = list(pipeline.sample([8, 2], generator=torch.Generator().manual_seed(3)))
fig.show(fig.filmstrip(frames, row=0, alt="An 8 by the model trained here, growing"))
print("tokens predicted in each step:", [int(frame.predicted[0].sum()) for frame in frames])

# %% [markdown]
# ## Five predictions
#
# Write down what you think now. You will come back to it.
#
# 1. What is autoregressive about this, if it is not left to right?
# 2. Why not one token per pixel?
# 3. Why does the head need diffusion: why not let it predict the token outright?
# 4. Would the picture change if the same tokens came in another order?
# 5. What breaks first if you train for one second only: the shapes, or the grey values?
#
# ## Recap
#
# MAR predicts hidden tokens from known ones, a few at a time, in any order. An encoder reads what
# is known, a decoder says what is missing, a diffusion head draws it. All of it is a few hundred
# lines, and you will write them.
#
# | part | in code | module |
# |---|---|---|
# | tokens | `patchify`, `unpatchify` | `tokens` |
# | encoder, decoder | `MAR.forward_encoder`, `MAR.forward_decoder` | `mar` |
# | diffusion head | `DiffLoss` | `diffloss` |
# | generation | `sample`, `Frame` | `sampling` |
# | training | `train_mar`, `Step` | `training` |
#
# The next chapter needs nothing but this picture of the whole.
