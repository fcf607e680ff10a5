# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 0 A tour: an image, token by token
#
# You watch a MAR paint, follow one image through every part of it, and train a small one yourself.
#
# **You will see**
# - images of the classes you ask for, painted a few tokens at a time, in no fixed order,
# - every part that the course builds, at work once,
# - in one number, what makes this *autoregressive*.
#
# **Reading** 15 min, **exercises** none, **CPU** 40 s. **Needs** nothing but Python.

# %%
import os
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from mar_mini import MAR, get_config, load_pretrained, train_mar
from mar_mini.checkpoints import Pipeline
from mar_mini.data import class_names, load_images, normalise, to_tensors
from mar_mini.viz import GenerationTheatre
from mar_mini.viz import figures as fig

seed = int(os.environ.get("MAR_MINI_SEED", 0))
_ = torch.manual_seed(seed)

# %% [markdown]
# ## Where this goes
#
# MAR is a *masked autoregressive* model (Li et al. 2024, arXiv 2406.11838). The one below came
# with the course: it learnt from the 50,000 small photographs of CIFAR-10, on one CPU core. Run the
# cell, and it paints.

# %%
cifar = load_pretrained("cifar10")
asked = [label for label in (0, 1, 4, 5, 7, 8, 9, 2) for _ in range(2)]
pictures = cifar.generate(asked, generator=torch.Generator().manual_seed(seed))
titles = [cifar.classes[label] for label in asked]
fig.show(fig.image_grid(pictures, columns=8, titles=titles))

# %% [markdown]
# They are small and rough, and you can tell what some of them are. The squares that you see are its
# **tokens**: 16 for an image. Watch one image come about:

# %%
frames = list(cifar.sample([7], generator=torch.Generator().manual_seed(seed + 1)))
fig.show(fig.filmstrip(frames, alt="A horse growing token by token, in random order"))

# %% [markdown]
# Grey tokens are unknown, orange ones were predicted in that step, blue ones in an earlier step.
# Notice that the order is no reading order: the tokens come where chance puts them. Here each step
# predicts one; fewer steps would predict several at once.
#
# Now you: choose a class and another seed, press *Generate*, and go back in time with the slider
# below the picture. The line of code under the controls makes the same image again.

# %%
theatre = GenerationTheatre(cifar, label=7, seed=seed + 1)
theatre.run()

# %% [markdown]
# *Predict first:* what would you see if all 16 tokens were predicted in a single step?
#
# ## What is autoregressive about it?
#
# *Autoregressive* says that each piece is predicted from the pieces before it. Take that away: the
# same weights, the same classes, but a single step (`num_iter=1`), in which no token knows what any
# other has become.

# %%
asked = torch.arange(120) % 10
pictures = {
    steps: cifar.generate(
        asked, num_iter=steps, num_sampling_steps=25, generator=torch.Generator().manual_seed(seed)
    )
    for steps in (1, 16)
}
both = torch.cat([pictures[1][:10], pictures[16][:10]])
fig.show(fig.image_grid(both, titles=cifar.classes, alt="Above: patchwork. Below: whole images"))

# %% [markdown]
# Above: one step. Below: sixteen. Each square above is a good square for its class, but the squares
# do not know of each other, and the images are patchwork.
#
# That can be counted. Let $s_i$ be the brightness of token $i$. If tokens are independent, given
# the class, the variance of their sum is the sum of their variances, and this ratio is 1:
#
# $$\mathrm{Var}\left(\textstyle\sum_i s_i\right) \Big/ \textstyle\sum_i \mathrm{Var}(s_i)$$
#
# If they agree, bright with bright and dark with dark, it is larger.


# %%
def agreement(images, labels):
    squares = images.mean(1).unfold(1, 8, 8).unfold(2, 8, 8)      # (N, 4, 4, 8, 8)
    brightness = squares.mean((-1, -2)).flatten(1)                # (N, 16)
    for label in labels.unique():
        brightness[labels == label] -= brightness[labels == label].mean(0)
    return float(brightness.sum(1).var() / brightness.var(0).sum())


# %% tags=["claim"]
# tokens predicted at once are independent; predicted one after the other they agree
photographs, classes = to_tensors(load_images("cifar10_mini", "train"))
real = agreement(photographs / 255, classes)
ratio = {steps: agreement(images, asked) for steps, images in pictures.items()}
print(f"one step {ratio[1]:.2f}, sixteen steps {ratio[16]:.2f}, photographs {real:.2f}")
assert ratio[1] < 2, "tokens of one step should be independent"
assert ratio[16] > 2 * ratio[1], "tokens of sixteen steps should agree"

# %% [markdown]
# So this is what is autoregressive: not the order, but that each step is predicted *given* all
# steps before it. In symbols, with $X_k$ the set of tokens of step $k$, in whatever order:
#
# $$p(x) = \prod_k p(X_k \mid X_1, \dots, X_{k-1})$$
#
# ## The map
#
# One photograph on its way through the model. Each station is a chapter.
#
# | station | what happens | chapter |
# |---|---|---|
# | pixels | an image as numbers | 1 |
# | latent | an autoencoder makes it smaller: 8x8 places instead of 32x32 | 2 |
# | tokens | the latent cut into 16 squares, 64 numbers each; most are hidden | 1, 6 |
# | z | a transformer looks at the known tokens and says what belongs in a hidden one | 5 |
# | token | a small *diffusion head* turns z and noise into the token | 3, 4 |
# | image | the autoencoder turns the latent back into pixels | 2 |

# %%
photograph, label = photographs[classes == 8][4:5] / 255, torch.tensor([8])
tokens = cifar.encode(photograph)                      # (1, 16, 64)
latent = cifar.mar.unpatchify(tokens)                     # (1, 16, 8, 8)
mask = torch.arange(16)[None] >= 8                        # True: hidden
with torch.no_grad():
    known = cifar.mar.forward_encoder(tokens, mask, label)
    z = cifar.mar.forward_decoder(known, mask, wanted=mask)   # (1, 8, 128)
    token = cifar.mar.diffloss.sample(z[:, 0], clip=cifar.clip)  # (1, 64)
for name, x in {"latent": latent, "tokens": tokens, "z": z, "token": token}.items():
    print(f"{name:7} {tuple(x.shape)}")


# %%
def hide(image, mask):
    hidden = mask.reshape(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    return torch.where(hidden, 0.85, image)


def blocks(x, height, width):                             # numbers as colours, to be looked at
    x = (x / x.std() / 4 + 0.5).clamp(0, 1)
    return x.reshape(-1, height, width).repeat_interleave(32 // height, 1).repeat_interleave(
        32 // width, 2).expand(3, 32, 32)


one_more, still = tokens.clone(), mask.clone()
one_more[:, 8], still[:, 8] = token, False
whole = cifar.generate(label, tokens=tokens, known=~mask, num_iter=8, cfg=1.0,
                       generator=torch.Generator().manual_seed(seed))
stations = {
    "pixels": photograph[0], "latent (3 of 16)": blocks(latent[0, :3], 8, 8),
    "half its tokens": hide(photograph[0], mask), "z of the next": blocks(z[0, 0], 8, 16),
    "next token": hide(cifar.decode(one_more)[0], still), "all tokens": whole[0],
}
fig.show(fig.image_grid(
    torch.stack(list(stations.values())), columns=6, titles=list(stations),
    alt="A ship as pixels, latent, known tokens, z, with its next token, and finished",
))

# %% [markdown]
# The lower half is *invented*: the model has seen the upper half and the word "ship". Ask again
# with another seed and it invents another.
#
# ## Train one yourself
#
# The same model, smaller, learns handwritten digits while you wait. It has no autoencoder: a token
# is a patch of 4x4 pixels. A training run is a Python *generator*: it yields its state after each
# step. *Predict first:* the loss begins near 1. Will it go to 0?

# %%
dataset, config = load_images("digits", "train"), get_config("digits")
images, labels = to_tensors(dataset)
model = MAR(**asdict(config.mar))
budget = replace(config.training, max_seconds=20)
losses, bar = [], tqdm(total=100, unit="%")
for step in train_mar(model, normalise(images), labels, budget):
    losses.append(step.loss)
    bar.update(round(100 * step.progress) - bar.n)
bar.close()
print(f"{step.step} steps, {step.images_seen:,} images, {step.seconds:.0f} s")

# %%
width = min(20, len(losses))
smooth = torch.tensor(losses).unfold(0, width, 5).mean(1)
fig.show(
    fig.curves(
        {f"loss, mean of {width} steps": (torch.arange(len(smooth)) * 5 + width / 2, smooth)},
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
# They are rough: the model has seen less in its life than you have read on this page. In chapter 7
# you train it for longer, built from your own parts.
#
# ## Five predictions
#
# Write down what you think now, in a cell of your own. The chapters answer them.
#
# 1. Why not one token per pixel? (chapter 1)
# 2. The latents are multiplied by a number before the model sees them. What if it is wrong by a
#    factor of 2? (chapter 2)
# 3. Which of the head's many denoising steps decides whether a young model paints noise: the first
#    or the last? (chapter 3)
# 4. Why diffusion: why not let a network predict the token outright? (chapter 4)
# 5. Does it matter in which order the tokens come? (chapter 6)
#
# ## What you should know
#
# Five questions. If three or more of them are hard, learn some PyTorch first; the official
# [tutorials](https://pytorch.org/tutorials/beginner/basics/intro.html) are enough.
#
# <details><summary>1. What is the shape of <code>x[:, None] * w</code>, with <code>x</code> of
# shape (8, 5) and <code>w</code> of shape (3, 5)?</summary>
#
# (8, 3, 5). `x[:, None]` is (8, 1, 5), and broadcasting repeats axes of length 1.
#
# </details>
#
# <details><summary>2. After <code>loss.backward()</code>: what has changed, and why does a training
# loop call <code>zero_grad()</code>?</summary>
#
# Each parameter's `.grad` has grown by the gradient of the loss; the parameters are as before,
# until the optimiser's step. `zero_grad()`, because `backward` adds to what is there.
#
# </details>
#
# <details><summary>3. <code>a</code> and <code>b</code> are independent, with variances 1 and 4.
# What is the variance of <code>3 * a + b</code>?</summary>
#
# 9 * 1 + 4 = 13. Noise in this course is mixed in that way on every page.
#
# </details>
#
# <details><summary>4. What does <code>softmax</code> make of <code>[0., 0., 0.]</code>, and what of
# <code>[100., 0., 0.]</code>?</summary>
#
# A third each; and nearly [1, 0, 0]. Its results are positive and sum to 1.
#
# </details>
#
# <details><summary>5. A function contains <code>yield</code>. What happens when you call
# it?</summary>
#
# Nothing yet: you get a generator. Each turn of a `for` loop over it runs it up to its next
# `yield`. Training and sampling work that way here.
#
# </details>
#
# ## Recap
#
# MAR predicts hidden tokens from known ones, a few at a time, in any order. A transformer reads
# what is known and says what is missing, a diffusion head paints it, an autoencoder keeps images
# small. All of it is a few hundred lines, and you will write them.
#
# | part | in code | module |
# |---|---|---|
# | tokens | `patchify`, `unpatchify` | `tokens` |
# | autoencoder | `AutoencoderKL` | `vae` |
# | encoder, decoder | `MAR.forward_encoder`, `MAR.forward_decoder` | `mar` |
# | diffusion head | `DiffLoss` | `diffloss` |
# | generation | `sample`, `Frame` | `sampling` |
# | training | `train_mar`, `Step` | `training` |
#
# The next chapter needs nothing but this picture of the whole.
