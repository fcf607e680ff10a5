# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 2 The autoencoder
#
# An image becomes a small grid of numbers, its **latent**, and a latent becomes an image again.
#
# **You will build**
# - a draw from the distribution of latents that lets gradients through,
# - the price of a latent, its KL divergence; you train a model with both,
# - the scale that MAR expects its latents in, and what a wrong one does.
#
# **Reading** 25 min, **exercises** 20 min, **CPU** 40 s. **Needs** chapter 1 (tokens).

# %%
import copy
import json
import math
import os
from dataclasses import asdict, replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from mar_mini import (
    AutoencoderKL,
    DiagonalGaussian,
    Diffusion,
    data,
    get_config,
    load_pretrained,
    train_vae,
)
from mar_mini.checks import vae as check
from mar_mini.evaluation import psnr
from mar_mini.viz import figures as fig

seed = int(os.environ.get("MAR_MINI_SEED", 0))
generator = torch.Generator().manual_seed(seed)
torch.manual_seed(seed)
config = get_config("cifar10_latents")
small = replace(config.vae, ch=16)  # half as wide as the preset: it trains in seconds
path = data.data_dir().parent / "benchmarks/results/ablations.json"


def show(figure, title):
    figure.suptitle(title, fontsize=10)
    fig.show(figure)

# %% [markdown]
# ## The picture first
#
# MAR does not generate pixels but latents: 16 numbers for each patch of 16x16 pixels in the
# published model, for each patch of 4x4 pixels here (48 numbers). The **encoder** makes them, the
# **decoder** turns them back. The places of a latent form a grid, 8x8 here; the numbers of a place
# are its **channels**. How many channels does it take? Below, each image as 1, 2, 4, 8 and 16
# numbers a patch remember it.

# %%
images, test = (
    data.normalise(data.to_tensors(data.load_images("cifar10_mini", split))[0])
    for split in ("train", "test")
)
versions, quality = [test[:4]], {}
for channels in (1, 2, 4, 8, 16):
    plain = AutoencoderKL(**asdict(replace(small, z_channels=channels))).eval()
    plain.start_linear(images)  # no training: explained below
    with torch.no_grad():
        made = plain.decode(plain.encode(test).mode())  # mode(): the latent without noise
    versions.append(made[:4])
    quality[f"{channels}"] = float(psnr(data.denormalise(made), data.denormalise(test)).mean())

# %%
titles = ["image", *(f"{n}: {value:.1f} dB" for n, value in quality.items())]
rows = data.denormalise(torch.stack(versions, dim=1).flatten(0, 1))
alt = "Four images, and what 1, 2, 4, 8 and 16 numbers a patch leave of them: blocks, then likeness"
figure = fig.image_grid(rows, columns=6, titles=titles, alt=alt)
show(figure, "48 numbers of a patch replaced by 1, 2, 4, 8 or 16: likeness returns")

# %% [markdown]
# The number above a column is the **peak signal-to-noise ratio** (PSNR) over 500 test images, in
# decibels (dB): each 10 dB more means a tenth of the squared error.
#
# These models have not been trained. `start_linear` set them to **principal components**: the
# directions in which patches differ most, found by linear algebra. No linear map can do better.
# This `linear_path` is the course's addition: it stands beside the network, which then learns what
# it lacks. The published model has none; it learns everything, on ImageNet.
#
# Does training change the picture? The course's own experiment trained such models for 8 seconds
# each, from three seeds (`make ablations`). Small dots are seeds, the large one with the bar their
# mean and spread.

# %% tags=["claim"]
runs = json.loads(path.read_text("utf-8"))["latent_channels"]["rows"]
alt = "PSNR of reconstructed test images rises with 2, 4, 8 and 16 latent channels"
figure = fig.error_bars(runs, xlabel="latent channels", ylabel="PSNR, dB", alt=alt)
show(figure, "From 2 channels on each doubling brings the reconstructions closer")
margin = min(min(b["seeds"]) - max(a["seeds"]) for a, b in pairwise(runs))
print(f"twice the channels: at least {margin:.1f} dB more (claimed, from 2 on: more than 1.5)")
print("dB gained:", {r["label"]: round(sum(r["seeds"]) / 3 - quality[r["label"]], 2) for r in runs})
assert margin > 1.5, "expected 1.5 dB for each doubling"

# %% [markdown]
# Hardly, from 4 channels on: 8 seconds are some 30 steps, and the dots stand where linear algebra
# put them. With 2 channels, where most is missing, training gains about 1 dB.
#
# Why not 48 channels, then? Because MAR has to generate them all: the wider a latent, the harder
# that is (chapter 1 compares widths of tokens).
#
# ## Block by block
#
# The encoder halves the picture at each **level** but the last; the decoder doubles it again. Here
# is what each stage of the encoder makes of one image: (images, channels, height, width).

# %%
torch.manual_seed(seed)
net = AutoencoderKL(**asdict(small)).eval()  # not trained, all weights drawn at random
x = net.encoder.conv_in(test[:1])
print(f"{'image':9} {tuple(test[:1].shape)}\n{'conv_in':9} {tuple(x.shape)}")
for i, level in enumerate([*net.encoder.down, net.encoder.mid]):
    x = level(x)
    print(f"{f'down[{i}]' if i < 3 else 'mid':9} {tuple(x.shape)}")
print(f"{'conv_out':9} {tuple(net.encoder.conv_out(x).shape)}: 16 means, 16 log variances")

# %% [markdown]
# A level is made of **residual blocks**: two 3x3 convolutions, each after a normalisation and a
# SiLU (a smooth ReLU), whose result is *added* to what came in. *Predict first:* what does a block
# do whose last convolution is all zeros?

# %%
block = net.encoder.down[0].block[0]
x = torch.randn(2, 16, 8, 8)
with torch.no_grad():
    block.conv2.weight.zero_()
    block.conv2.bias.zero_()
    print("changed by at most", float((block(x) - x).abs().max()))

# %% [markdown]
# <details><summary>Answer</summary>
#
# Nothing. A block can begin as "leave it as it is" and learn what to change. Where the number of
# channels changes, a 1x1 convolution, `nin_shortcut`, fits the input to the sum.
#
# </details>
#
# `Downsample` is a 3x3 convolution with stride 2. *Predict first:* how many places has its result
# along an axis of 32, if nothing is added around the edge?

# %%
down = net.encoder.down[0].downsample
x = torch.randn(1, 16, 32, 32)
with torch.no_grad():
    print("without an edge:", tuple(down.conv(x).shape), " Downsample:", tuple(down(x).shape))

# %% [markdown]
# 15: so one row and one column of zeros go to the right and below. `Upsample` repeats each value
# in a 2x2 square and smooths with a 3x3 convolution. Of the 9 values that the convolution meets
# only 4 differ, so the package adds the weights of equal ones first: 4 products instead of 9 (a
# *transposed convolution*). Is it the same?

# %%
up = net.decoder.up[1].upsample
x = torch.randn(1, 32, 8, 8)
with torch.no_grad():
    two_steps = up.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    print("largest difference:", f"{float((up(x) - two_steps).abs().max()):.1e}")

# %% [markdown]
# At the lowest resolution, `Middle` has **attention** between two residual blocks: each place takes
# a weighted mean over all places (chapter 5).
#
# ## A latent is a distribution
#
# The encoder gives two numbers for each latent value: a mean $\mu$ and the logarithm of a variance,
# $\log \sigma^2$. This distribution of an image's latents is its **posterior**, here a
# `DiagonalGaussian`: independent normals; `.mode()` is its mean. In training the decoder gets a
# draw. The noise is there so that the latents MAR will generate, never exactly right, still decode
# well.
#
# A draw has no derivative with respect to $\mu$ and $\sigma$. The **reparameterisation** gives it
# one: draw $\epsilon$ from the standard normal, then stretch and shift it,
#
# $$z = \mu + \sigma \, \epsilon .$$
#
# > **Exercise 1** · difficulty 1 of 3 · importance 3 of 3 · 8 minutes
# >
# > Draw a latent from a posterior, so that gradients reach `posterior.mean` and
# > `posterior.logvar`.

# %%
def sample(
    posterior: DiagonalGaussian, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw from normal distributions, differentiable in both of their parameters.

    posterior  .mean and .logvar, float (B, C, H, W) each
    generator  the source of the noise, `torch.randn(..., generator=generator)`
    returns    float (B, C, H, W)
    """
    # BEGIN SOLUTION about 3 lines
    std = torch.exp(0.5 * posterior.logvar)
    noise = torch.randn(std.shape, generator=generator)
    return posterior.mean + std * noise
    # END SOLUTION


sample = check.sample(sample)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `logvar` is $\log \sigma^2 = 2 \log \sigma$. What do you do to it to get $\sigma$?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `torch.exp(0.5 * posterior.logvar)` is $\sigma$; the noise has the mean's shape.
#
# </details>
#
# {{solution sample}}
#
# ## What a latent costs
#
# Nothing keeps an encoder from making $\sigma$ tiny and the means huge: the noise would be
# harmless, and the latents anywhere. So the loss has a second term, the **KL divergence** from the
# standard normal distribution. It is 0 if the posterior *is* the standard normal, the same for
# each image: then the latent says nothing. It counts, in **nats** (1 nat = 1.44 bits), what the
# latent says beyond that. For one value,
#
# $$\mathrm{KL} = \tfrac12 \left(\mu^2 + \sigma^2 - 1 - \log \sigma^2\right),$$
#
# and for independent values it is the sum.
#
# > **Exercise 2** · difficulty 1 of 3 · importance 3 of 3 · 7 minutes
# >
# > Write it: one number for each image of a batch.

# %%
def kl(posterior: DiagonalGaussian) -> torch.Tensor:
    """KL divergence of a posterior from the standard normal, in nats.

    posterior  .mean and .logvar, float (B, C, H, W) each
    returns    float (B,), summed over C, H and W
    """
    # BEGIN SOLUTION about 2 lines
    each = posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar
    return 0.5 * each.sum(dim=(1, 2, 3))
    # END SOLUTION


kl = check.kl(kl)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The variance is `posterior.logvar.exp()`; the other three terms are there as they are.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Sum over the axes 1, 2 and 3: one number for each image stays.
#
# </details>
#
# {{solution kl}}
#
# ## Train it with your two functions
#
# The loss is the mean squared error of the pixels plus `kl_weight`, here 0.0001, times the KL
# divergence divided by the number of latent values. This class hands your `sample` and `kl` to the
# training loop.

# %%
class Posterior(DiagonalGaussian):
    sample, kl = sample, kl


class Autoencoder(AutoencoderKL):
    def encode(self, images):
        given = super().encode(images)
        return Posterior(torch.cat([given.mean, given.logvar], dim=1))

# %% [markdown]
# `start_linear` begins with principal components, scaled so that all latents together have standard
# deviation 1 (strong components stay larger), and a variance of $e^{-5}$ for each latent value.
# *Predict first:* will the training lower that variance, or raise it? `ema` is the model with its
# weights averaged over the last steps: it is less noisy than the last one.

# %%
model = Autoencoder(**asdict(small))
model.start_linear(images)
start = copy.deepcopy(model)
budget = replace(config.vae_training, max_steps=120, max_seconds=None, learning_rate=2e-3)
steps = list(train_vae(model, images, budget, seed=seed))
trained = steps[-1].ema.eval()
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(steps)} steps")

# %%
lines = {}
for name, key, factor in (("squared error x 1000", "mse", 1000), ("KL, nats a value", "kl", 1)):
    values = torch.tensor([s.terms[key] for s in steps]) * factor
    smooth = values.unfold(0, 10, 1).mean(1)  # over ten steps
    lines[name] = (range(10, len(steps) + 1), smooth)
alt = "The KL divergence rises from 2.5 to 3.8 nats in 40 steps and settles at 3.6; the error falls"
figure = fig.curves(lines, xlabel="step", ylabel="mean of ten steps", alt=alt)
show(figure, "The model spends nats to lower the error")

# %% [markdown]
# The error wanders, for a batch has only 16 images. What has the model learned? Compare with the
# start on test images: decoding the mean, and decoding a draw as in training.

# %% tags=["claim"]
@torch.no_grad()
def measure(model):
    posterior = model.eval().encode(test[:250])
    made = [model.decode(z) for z in (posterior.mode(), sample(posterior, generator))]
    truth = data.denormalise(test[:250])
    mean, draw = (float(psnr(data.denormalise(x), truth).mean()) for x in made)
    pooled = 10 * math.log10(2**2 / float(F.mse_loss(made[1], test[:250])))
    nats = float(kl(posterior).mean()) / posterior.mean[0].numel()
    logvar = float(posterior.logvar.mean())
    return {"mean": mean, "draw": draw, "pooled": pooled, "nats": nats, "logvar": logvar}


before, after = measure(start), measure(trained)
for name, m in (("start", before), ("trained", after)):
    print(f"{name}: mean {m['mean']:.2f} dB, draw {m['draw']:.2f} dB ({m['pooled']:.2f} dB of the "
          f"mean error), {m['nats']:.2f} nats a value, log variance {m['logvar']:.2f}")
gain = after["draw"] - before["draw"]
print(f"a draw decodes better by {gain:.2f} dB (claimed: more than 1)")
assert gain > 1.0, "expected draws to gain 1 dB"

# %% [markdown]
# <details><summary>Answer</summary>
#
# It lowered it, from $e^{-5}$ to about $e^{-7}$: the pixels' error weighs more than the nats. A
# draw now decodes almost as well as the mean. The mean itself gained nothing in so few steps: it is
# linear algebra still.
#
# </details>

# %%
with torch.no_grad():
    columns = [test[:3]]
    for either in (start, trained):
        posterior = either.encode(test[:3])
        drawn = either.decode(sample(posterior, generator))
        columns += [drawn, 8 * (drawn - either.decode(posterior.mode()))]  # 0 is grey
rows = data.denormalise(torch.stack(columns, dim=1).flatten(0, 1))
titles = ["image", "draw, before", "its noise x 8", "draw, trained", "its noise x 8"]
alt = "Three images; before training draws differ from the mean by strong grain, after it by less"
figure = fig.image_grid(rows, columns=5, titles=titles, alt=alt)
show(figure, "Your draws: after training, less noise reaches the pixels")

# %% [markdown]
# ## When the latent says nothing
#
# What if the KL term weighs more? For the linear path you can compute it. The **energy** $\lambda$
# of a component is the mean square of the patches' coordinate along it. Keeping that coordinate's
# squared error down to $D$ takes at least $\tfrac12 \log(\lambda / D)$ nats (rate-distortion
# theory: Cover & Thomas 2006, section 10.3). An error costs $D / P$ in the loss ($P = 48$ numbers
# a patch), a nat $w / C$ ($w$ the KL weight, $C = 16$ channels). The sum is smallest at
#
# $$D = \frac{w P}{2 C},$$
#
# and a component with $\lambda < D$ is not worth a single nat: it **collapses**. Its channel is
# noise, the same for each image. *Predict first:* from which weight on do all channels collapse?

# %%
patches = F.unfold(images, 4, stride=4).transpose(1, 2).flatten(0, 1)           # (B * 64, 48)
energy = torch.linalg.eigvalsh(patches.T @ patches / len(patches)).flip(0)      # largest first


def best(weight: float) -> tuple[float, int, float]:
    """Nats a latent value, channels alive, PSNR of the mean error (the peak is 2: -1 to 1)."""
    error = weight * 48 / 2 / 16
    nats = (0.5 * torch.log(energy[:16] / error)).clamp(min=0)
    lost = energy[16:].sum() + energy[:16].clamp(max=error).sum()
    return float(nats.mean()), int((nats > 0).sum()), 10 * math.log10(2**2 / float(lost / 48))

# %% tags=["claim"]
for weight in (1e-4, 1e-2, 1e-1, 1, 10):
    nats, alive, decibels = best(weight)
    print(f"KL weight {weight:6g}: {nats:.2f} nats a value, {alive:2} channels, {decibels:.1f} dB")
print(f"none is left from {float(energy[0]) * 2 * 16 / 48:.1f} on")
gap = after["nats"] - best(1e-4)[0]
print(f"measured after training: {after['nats']:.2f} nats, off by {gap:.2f} (claimed: below 0.5)")
assert abs(gap) < 0.5, "expected the nats of the formula"

# %% [markdown]
# <details><summary>Answer</summary>
#
# From $w = 2 C \lambda_1 / P$ on, with $\lambda_1$ the largest energy. Between 0.01 and 1 all
# channels but one go, the weakest first; at 10 the last has gone too: the decoder gets noise alone.
#
# </details>
#
# And your trained model holds about as many nats as the formula says that it should. Compare the
# formula's 33.5 dB with a draw's decibels *of the mean error*, above: the mean of the images' own
# PSNR is higher, for images with a small error lift it.

# %%
weights = [10 ** (k / 4) for k in range(-20, 5)]
curve = [best(w) for w in weights]
powers = [math.log10(w) for w in weights]
lines = {
    "nats a latent value": (powers, [nats for nats, *_ in curve]),
    "channels alive / 4": (powers, [alive / 4 for _, alive, _ in curve]),
    "your training": ([-4.3, -3.7], [after["nats"]] * 2),
}
alt = "With a growing KL weight the nats fall to 0 and the channels collapse, the weakest first"
figure = fig.curves(lines, xlabel="log10 of the KL weight", ylabel="nats, channels / 4", alt=alt)
show(figure, "A growing KL weight silences the channels, the weakest first")

# %% [markdown]
# Theory for the linear path. Does a growing weight silence networks as well? The experiment again:
# whole models *without* linear path, trained for 26 seconds each.

# %% tags=["claim"]
runs = json.loads(path.read_text("utf-8"))["kl_weight"]["rows"]
measures = {"kl": "nats a latent value", "seeds": "PSNR, dB"}
titles = ("A growing KL weight silences the latents", "The pictures suffer later")
for (key, label), title in zip(measures.items(), titles, strict=True):
    alt = f"{label} over the KL weight from {runs[0]['label']} to 1: it falls"
    xlabel = "KL weight (steps of 100, then of 10)"
    show(fig.error_bars(runs, key=key, xlabel=xlabel, ylabel=label, alt=alt), title)
ratio = min(runs[0]["kl"]) / max(runs[-1]["kl"])
print(f"weight 1 leaves at most 1/{ratio:.0f} of the nats (claimed: less than 1/10)")
assert ratio > 10, "expected a weight of 1 to leave less than a tenth of the nats"

# %% [markdown]
# It does. Notice also where the curves begin: 26 seconds are some 100 steps, too few to come near
# the linear path, in nats or in decibels.
#
# ## A walk between two images
#
# From here on a better autoencoder serves: the one bundled with the course, twice as wide and
# trained for 5 minutes (36.6 dB, last figure).
#
# Take the latents of two images and go from one to the other in a straight line. *Predict first:*
# do you meet other plausible images on the way?

# %%
pipeline = load_pretrained("cifar10")
vae = pipeline.vae
with torch.no_grad():
    latents = vae.encode(test[:200]).mode()
    shares = torch.linspace(0, 1, 7)[:, None, None, None]
    walk = vae.decode((1 - shares) * latents[0] + shares * latents[2])
    noise = vae.decode(torch.randn(7, *latents.shape[1:], generator=generator))
pixels = (1 - shares) * walk[0] + shares * walk[-1]
alt = "A walk in latent space, the same as a cross-fade of pixels below it, and decoded noise"
rows = data.denormalise(torch.cat([walk, pixels, noise]))
figure = fig.image_grid(rows, columns=7, alt=alt)
show(figure, "A walk in latent space, a cross-fade of pixels, random latents")
z = latents - latents.mean((0, 2, 3), keepdim=True)
alike = float((z[..., 1:] * z[..., :-1]).mean() / z.square().mean())
print(f"correlation of latent values with their right neighbours: {alike:.2f}")

# %% tags=["claim"]
with torch.no_grad():
    one, other = latents[torch.randperm(200, generator=generator)].chunk(2)
    halfway = data.denormalise(vae.decode((one + other) / 2))
    fade = data.denormalise((vae.decode(one) + vae.decode(other)) / 2)
likeness = float(psnr(halfway, fade).mean())
print(f"100 pairs, halfway: walk and cross-fade agree to {likeness:.1f} dB (claimed: more than 30)")
assert likeness > 30, "expected halfway latents to be cross-fades"

# %% [markdown]
# <details><summary>Answer</summary>
#
# No. The walk (first row) is all but a cross-fade of the pixels (second row): most of the decoding
# is done by the linear path, and a linear map takes a mean to the mean. The latent is a compressed
# picture, not a meaning.
#
# </details>
#
# Latents drawn from the standard normal decode to noise (third row), although the KL term pulls
# towards it. At weight 0.0001 the pull is weak, and the term looks at each value on its own: in
# latents of pictures neighbouring places go together (their correlation stands above), in such
# draws they do not.
#
# That is why the autoencoder alone generates nothing: *which* latents make a picture is what MAR
# learns.
#
# ## The scale of the latents
#
# MAR learns latents by **diffusion** (chapter 3), which mixes them with noise of standard
# deviation 1, more of it at each **timestep** $t$. How much is drowned at which $t$ depends on the
# size of the latents. So they are multiplied by one number first, the **latent scale**: 1 / their
# standard deviation over the training set. The published code multiplies by **0.2325**: so the
# latents of its autoencoder, KL-16, had a standard deviation of 1 / 0.2325 = 4.30. No mean is
# subtracted.
#
# > **Exercise 3** · difficulty 1 of 3 · importance 3 of 3 · 5 minutes
# >
# > Write the factor that gives all latent values together standard deviation 1. Do not assume that
# > their mean is 0.

# %%
def latent_scale(latents: torch.Tensor) -> float:
    """The factor that gives latents a standard deviation of 1, over all of their values at once.

    latents  float (N, C, H, W), not scaled
    """
    # BEGIN SOLUTION about 1 line
    return 1.0 / float(latents.std())
    # END SOLUTION


latent_scale = check.latent_scale(latent_scale)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# One number for all: channels that differ in size shall still differ afterwards.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `latents.std()` without axes is the standard deviation of all values at once.
#
# </details>
#
# {{solution latent_scale}}

# %%
with torch.no_grad():
    posteriors = [vae.encode(x) for x in images.split(250)]
means = torch.cat([p.mode() for p in posteriors])
draws = torch.cat([sample(p, generator) for p in posteriors])
scale = latent_scale(means)
print(f"your scale {scale:.4f}, from draws {latent_scale(draws):.4f}, from 100 images "
      f"{latent_scale(means[:100]):.4f}; stored with the model {pipeline.latent_scale:.4f}")
off = abs(scale / pipeline.latent_scale - 1)
print(f"off by {off:.1%} (claimed: less than 3%)")
assert off < 0.03, "expected the scale that the model was trained with"

# %% [markdown]
# The stored number comes from all 50,000 training images, yours from 2,000. This is also
# how the published 0.2325 came about (LTH14/mar, issues 2, 81 and 100), and whether you take means
# or draws (issue 101) hardly matters here. That it is about 1 for this model is the work of
# `start_linear`: each autoencoder has a scale of its own.
#
# ## What if it is wrong?
#
# Say your latents have standard deviation $s$ where 1 was meant. With the share $\bar\alpha_t$ of
# signal left at timestep $t$, the **signal-to-noise ratio** is $s^2 \bar\alpha_t / (1 -
# \bar\alpha_t)$: at each $t$ it is $s^2$ times what was meant. At which $t$ has the noise as much
# variance as the signal?

# %% tags=["claim"]
alpha_bar = Diffusion().alpha_bars
lines, half = {}, {}
for s in (0.2325, 0.5, 1, 2):
    signal = alpha_bar * s**2
    share = signal / (signal + 1 - alpha_bar)
    lines[f"std {s}"] = (range(1000), share)
    half[s] = int((share < 0.5).nonzero()[0])
alt = "Share of signal over the timestep: small latents drown early, large ones late"
figure = fig.curves(lines, xlabel="timestep t of 1000", ylabel="share of signal", alt=alt)
show(figure, "Latents of half the size drown 200 timesteps earlier, of twice the size later")
shift = min(half[1] - half[0.5], half[2] - half[1])
print(f"half is noise at t = {half}: a factor of 2 moves it by {shift} (claimed: more than 150)")
assert shift > 150, "expected a factor of 2 to move it by 150 timesteps"

# %% [markdown]
# The blue curve shows an easy accident: latents of your own autoencoder, of standard deviation
# 1, multiplied by the 0.2325 of another. Noise outweighs signal from $t = 138$ on.
#
# Does the sampler mind? Take the best denoiser there is: for latents from a normal distribution of
# standard deviation $s$ it is a formula, so nothing needs training. Let it generate in 25 or 100
# steps, and measure the spread that comes out, divided by $s$. `p_sample` takes one step from
# timestep $t$ to the one before (chapter 3 explains it). *Predict first:* which harms more, latents
# 4 times too small or 4 times too large?

# %%
def spread(s: float, num_steps: int, v: float = -1.0) -> float:
    """Standard deviation of samples from an ideal denoiser, divided by what it should be.

    v  how much noise a step adds, from -1 (the least variance of chapter 3) to 1 (the largest)
    """
    diffusion = Diffusion(num_steps)  # so many of the 1000 timesteps
    x = torch.randn(50_000, 1, generator=generator)
    for t in reversed(range(num_steps)):
        signal = float(diffusion.alpha_bars[t])
        noise = math.sqrt(1 - signal) / (signal * s**2 + 1 - signal) * x    # the best guess of it
        output = torch.cat([noise, torch.full_like(noise, v)], dim=1)
        x = diffusion.p_sample(output, x, t, torch.randn(x.shape, generator=generator))
    return float(x.std()) / s

# %% tags=["claim"]
stds = (0.2325, 0.5, 1, 2, 4)
found = {n: [spread(s, n) for s in stds] for n in (25, 100)}
lines = {f"{n} steps": ([math.log2(s) for s in stds], values) for n, values in found.items()}
alt = "Small latents come out too narrow, most of all with 25 steps; large ones nearly right"
figure = fig.curves(lines, xlabel="log2 of the latents' std", ylabel="spread / true", alt=alt)
show(figure, "Latents that are too small lose more than latents that are too large")
for n, values in found.items():
    print(f"{n:3} steps:", "  ".join(f"{v:.3f}" for v in values), f" for std {stds}")
more = ", ".join(f"{spread(s, 1000):.3f}" for s in (0.2325, 1, 4))
print(f"1000 steps: {more} for 0.2325, 1, 4; 25, largest variance: {spread(1, 25, 1.0):.3f} for 1")
by_2 = max(abs(found[100][i] - found[100][2]) for i in (1, 3))
print(f"100 steps: wrong by 2 changes the spread by {by_2:.3f} (claimed: less than 0.035)")
ratio = (1 - found[25][0]) / (1 - found[25][4])
print(f"25 steps: 0.2325 loses {ratio:.1f} times as much as 4 does (claimed: more than 1.3)")
assert by_2 < 0.035 and ratio > 1.3, "expected 2 to be forgiven, and small latents to lose most"

# %% [markdown]
# <details><summary>Answer</summary>
#
# Too small. With 25 steps all come out too narrow, even standard deviation 1: few steps and the
# least variance lose spread. 1000 steps nearly restore it; for 1, so does the largest variance.
# Twice too large does no harm here, and with 100 steps a factor of 2 hardly matters either way. So
# the honest answer: sampling itself forgives a scale wrong by 2, and more steps make up for much.
# (One normal distribution and a perfect denoiser are a simple case. A network that has to learn may
# mind more: not tested here.)
#
# </details>
#
# What is not forgiven is a scale that *changes* between training and sampling: samples are then
# divided by another number than the latents were multiplied by; `x 2` below: by twice the right.

# %% tags=["claim"]
factors = (0.5, 1, 2, 4)
with torch.no_grad():
    scaled = vae.encode(test[:100]).mode() * scale
    wrong = [data.denormalise(vae.decode(scaled / (scale * f))) for f in factors]
truth = data.denormalise(test[:100])
decibels = [float(psnr(x, truth).mean()) for x in wrong]
drop = decibels[1] - max(decibels[0], *decibels[2:])
print(f"a wrong factor costs {drop:.1f} dB or more (claimed: more than 10)")
assert drop > 10, "expected a wrong factor to cost 10 dB"
titles = ["image", *(f"x {f:g}: {d:.1f} dB" for f, d in zip(factors, decibels, strict=True))]
rows = torch.stack([truth[:3], *(x[:3] for x in wrong)], dim=1).flatten(0, 1)
alt = "Images decoded with the right scale, and with one that is off by 1/2, 2 and 4"
figure = fig.image_grid(rows, columns=5, titles=titles, alt=alt)
show(figure, "Divided by another scale than multiplied by: too harsh or too grey")

# %% [markdown]
# ## Going further
#
# 1. Train a model with `replace(small, linear_path=False)`, without `start_linear`, for the same
#    120 steps. How many decibels was the linear algebra worth?
# 2. `start_linear(images, whitening=1)` gives all components the same spread. What happens to
#    the nats before training, and to the scaled channels?
# 3. Open: MAR decodes latents that it has generated, never quite right ones. How would you choose
#    the KL weight for *that*?
#
# ## Recap
#
# The encoder gives a normal distribution for each latent value, the decoder turns a draw from it
# into an image. The KL term prices what a latent says, and a price too high silences it. One
# number, 1 / the standard deviation, brings latents to the size that diffusion expects; it belongs
# to the autoencoder and must be the same in training and sampling.
#
# | symbol | in code | module |
# |---|---|---|
# | $\mu$, $\log \sigma^2$ | `DiagonalGaussian.mean`, `.logvar` | `vae` |
# | $z = \mu + \sigma \epsilon$ | `DiagonalGaussian.sample` | `vae` |
# | KL | `DiagonalGaussian.kl` | `vae` |
# | $w$ | `TrainingConfig.kl_weight` | `configs` |
# | latent scale | `latent_scale` | `vae` |
# | $\bar\alpha_t$ | `Diffusion.alpha_bars` | `diffusion` |
#
# The next chapter needs scaled latents, standard deviation 1: it drowns them in noise, and learns
# to bring them back.
