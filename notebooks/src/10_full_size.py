# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 10 Full size
#
# The models of the paper, opened on your machine, and what it takes to train one.
#
# **You will build**
# - the number of parameters of a transformer block, and with it that of a whole model,
# - a plan that fits a run into the memory of a given GPU,
# - the effective batch of many processes, and the learning rate that goes with it.
#
# **Reading** 25 min, **exercises** 32 min, **CPU** 30 s. **Needs** chapters 2 to 7, and 9.

# %%
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from mar_mini import MAR, configs, data, get_config, load_published
from mar_mini.checkpoints import empty
from mar_mini.checks import full_size as check
from mar_mini.masking import mean_mask_ratio
from mar_mini.planner import memory as planning
from mar_mini.planner import work as costs
from mar_mini.planner.report import measure_rates
from mar_mini.run import hub
from mar_mini.run.images import open_images
from mar_mini.run.train import TrainingRun
from mar_mini.training import train_mar
from mar_mini.viz import figures as fig

seed = int(os.environ.get("MAR_MINI_SEED", 0))
torch.manual_seed(seed)
repo = data.data_dir().parent

# %% [markdown]
# ## The picture first
#
# This course has trained small models; the paper trained three large ones, **MAR-B, MAR-L and
# MAR-H** (here the presets `mar_base`, `mar_large`, `mar_huge`). A way to compare a run on your
# machine with theirs is to count the arithmetic: **FLOPs**, multiplications and additions.
#
# *Predict first:* the model of photographs that comes with the course has 2 million parameters, saw
# 2.4 million images, and took 142 minutes on one CPU core. MAR-H has 943 million and sees 1.28
# million images 400 times. To how many such runs does its training amount?

# %%
FULL, IMAGENET = ("mar_base", "mar_large", "mar_huge"), 1_281_167  # presets, training images
folders = {"digits": "data/weights/digits", "cifar10": "data/weights/cifar10",
           "imagenette64": "benchmarks/results/imagenette64"}
runs = {name: json.loads((repo / folder / "config.json").read_text("utf-8"))["card"]
        for name, folder in folders.items()}  # what each finished run says of itself
seen = {name: run["images_seen"] for name, run in runs.items()}
seen |= dict.fromkeys(FULL, 400 * IMAGENET)  # the paper's 400 epochs

# %%
each = {name: planning.training_flops(get_config(name)) for name in seen}  # of an image
spent = {name: each[name] * seen[name] for name in seen}
fig.show(fig.breakdown({name: {"": flops} for name, flops in spent.items()}, log=True,
                       xlabel="FLOPs of the MAR's whole training: a logarithmic axis"))
run, size = runs["cifar10"], planning.parameters(get_config("cifar10"))
print(f"cifar10: {size:,} parameters, {seen['cifar10']:,} images, "
      f"{run['seconds'] / 60:.0f} minutes on {run['device']}")
image, many = (what["mar_huge"] / what["cifar10"] for what in (each, seen))
print(f"mar_huge: {image:,.0f} times the FLOPs an image, {many:,.0f} times the images, "
      f"{image * many:,.0f} times the training of cifar10")

# %% [markdown]
# <details><summary>Answer</summary>
#
# To more than a million: more images are seen, and of each every parameter works on 15 times as
# many tokens (see *FLOPs*).
#
# </details>
#
# ## Two printed models, part by part
#
# Somebody once printed two full-size models, layer by layer: the autoencoder KL-16 and a MAR-L with
# a larger head (12 blocks of width 1536). The presets `kl16` and `mar_large_12x1536` rebuild them
# (`tests/test_trees.py` compares line by line). A model needs no memory to be looked at: on
# PyTorch's **meta device** a tensor has a shape and no values.
#
# *Predict first:* which part of a MAR has most parameters: encoder, decoder, head or embeddings?

# %%
printed = {"MAR": get_config("mar_large_12x1536").mar, "KL-16": get_config("kl16").vae}
opened = {name: empty(config) for name, config in printed.items()}
for name, model in opened.items():
    print(f"{name}: {costs.count(model):,}, on the device {next(model.parameters()).device}")
    for part, module in model.named_children():
        print(f"    {part:16} {costs.count(module):12,}")
    print(f"    {'in no part':16} {costs.count(model) - costs.count(*model.children()):12,}")

# %% tags=["claim"]
claimed = {"mar_base": 208, "mar_large": 479, "mar_huge": 943}  # million (the paper, Table 4)
parts = {name: planning.parts(get_config(name))["mar"] for name in (*FULL, "mar_large_12x1536")}
shown = {name: {part: n / 1e6 for part, n in row.items()} for name, row in parts.items()}
fig.show(fig.breakdown(shown, xlabel="million parameters"))
for name, said in claimed.items():
    ours = sum(shown[name].values())
    print(f"{name:10} {ours:6.2f} million, the paper says {said}; {said - ours:.2f} more, below 1")
    assert math.ceil(ours) == said  # the paper rounds up

# %% [markdown]
# <details><summary>Answer</summary>
#
# The decoder, by a little: both are stacks of the same blocks, but it has one more linear layer,
# `decoder_embed`, from the encoder's width to its own. Embeddings are below 1%: the classes;
# positions, the mask token and the label "no class" are listed as "in no part".
#
# </details>
#
# ## A block, counted by hand
#
# Open one block: these are all its tensors. (`qkv` makes queries, keys and values in one go.)

# %%
block = opened["MAR"].decoder_blocks[0]
for name, tensor in block.named_parameters():
    print(f"{name:18} {str(tuple(tensor.shape)):14} {tensor.numel():10,}")

# %% [markdown]
# > **Exercise 1** · difficulty 1 of 3 · importance 3 of 3 · 8 minutes
# >
# > Say how many there are for any width, without building the block. `mlp_ratio` is the width of
# > the MLP's hidden layer, as a multiple of D.

# %%
def block_parameters(dim: int, mlp_ratio: float = 4.0) -> int:
    """Parameters of a transformer block of width D = dim.

    Its hidden layer has int(dim * mlp_ratio) values. All four linear layers have biases.
    """
    # BEGIN SOLUTION about 4 lines
    hidden = int(dim * mlp_ratio)
    attention = dim * 3 * dim + 3 * dim + dim * dim + dim
    mlp = dim * hidden + hidden + hidden * dim + dim
    return attention + mlp + 2 * 2 * dim
    # END SOLUTION


block_parameters = check.block_parameters(block_parameters)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A linear layer from a to b has a matrix of a * b and b biases. `qkv` is one from D to 3 D.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Four linear layers: D to 3 D, D to D, D to hidden, hidden to D. Two norms: a scale and a shift of
# D each.
#
# </details>
#
# {{solution block_parameters}}
#
# The number of heads is not in it: heads share out the width. Now **your** count explains the
# models: for each, all blocks by your formula, and the rest.

# %% tags=["claim"]
rows = {}
for name in FULL:
    mar, model = get_config(name).mar, empty(get_config(name).mar)
    yours = (mar.encoder_depth * block_parameters(mar.encoder_embed_dim, mar.mlp_ratio)
             + mar.decoder_depth * block_parameters(mar.decoder_embed_dim, mar.mlp_ratio))
    off = yours - costs.count(model.encoder_blocks, model.decoder_blocks)
    rows[name] = {"your blocks": yours / 1e6, "the rest": (costs.count(model) - yours) / 1e6}
    print(f"{name:10} {yours / costs.count(model):.1%} in blocks; your count is off by {off}")
    assert off == 0
fig.show(fig.breakdown(rows, xlabel="million parameters"))

# %% [markdown]
# ## FLOPs: by rule, and by counting
#
# A linear layer multiplies and adds once for each weight and each row that it is given: 2 FLOPs.
# The backward pass does that twice more (for the gradient of the input, and for that of the
# weights). So training takes
#
# $$6 \times \text{parameters} \times \text{rows}$$
#
# of a part, where rows are what *this part* is given of an image. The encoder gets the buffer and
# the known tokens; the decoder the buffer and all tokens; the head each masked token, at four noise
# levels. *Predict first:* in MAR-B, which of the three costs most?

# %%
def rows_of(mar):
    """Rows that each part is given of an image, on average."""
    length = empty(mar).seq_len
    masked = length * mean_mask_ratio(mar.mask_ratio_min)  # 0.867 of them: drawn from 0.7 up
    return {"encoder": mar.buffer_size + length - masked, "decoder": mar.buffer_size + length,
            "head": mar.diffusion_batch_mul * masked}


print({part: round(rows) for part, rows in rows_of(get_config("mar_base").mar).items()})

# %% tags=["claim"]
rule = {}
for name in FULL:
    mar, rows = get_config(name).mar, rows_of(get_config(name).mar)
    rule[name] = {part: 6 * parts[name][part] * rows[part] / 1e9 for part in rows}
    work = costs.training_work(mar, 2048)  # forward; any batch is as good
    off = {part: 2048e9 * n / (3 * work[part].flops) - 1 for part, n in rule[name].items()}
    # two products of tokens with tokens, 2 FLOPs each, forward and twice backward
    tokens = 12 * (mar.encoder_depth * mar.encoder_embed_dim * rows["encoder"] ** 2
                   + mar.decoder_depth * mar.decoder_embed_dim * rows["decoder"] ** 2)
    print(f"{name:10} the rule is off by", {part: f"{x:+.1%}" for part, x in off.items()},
          f"in all {1e9 * sum(rule[name].values()) / each[name] - 1:+.1%};",
          f"tokens with tokens: {tokens / each[name]:.1%}")
    assert max(map(abs, off.values())) < 0.1  # each part has its own rows
fig.show(fig.breakdown(rule, xlabel="GFLOPs of training on an image"))

# %% tags=["claim"]
# the package runs two and three blocks, without values; PyTorch counts while the model runs
small = get_config("cifar10").mar
model, batch, hidden = MAR(**asdict(small)), 8, 10
latents, labels = torch.randn(batch, 16, 8, 8), torch.zeros(batch, dtype=torch.long)
mask = torch.rand(batch, 16).argsort(1) < hidden  # so many of 16 tokens, in random places
with FlopCounterMode(display=False) as counter:
    model(latents, labels, model.draw(len(labels), mask=mask)).backward()
flops = costs.total_flops(costs.training_work(small, batch, hidden))
off = flops / counter.get_total_flops() - 1
print(f"planned {flops:.4e}, counted {counter.get_total_flops():.4e}, off by {off:.0e}")
assert abs(off) < 1e-6

# %% [markdown]
# <details><summary>Answer</summary>
#
# The head, with a sixth of the parameters: each of its weights works 888 times an image, one of the
# encoder 98 times. (In MAR-L it is the decoder, by a little.) Parameters are memory; FLOPs are
# parameters times rows.
#
# </details>
#
# In all the rule is right within 1%, because errors cancel. It leaves out attention's products of
# tokens with tokens, at these widths 2 to 3%. It counts too much in the head, which embeds z once
# for all four noise levels, and each noise level once for a batch; and in the decoder, whose
# last block computes masked tokens alone.
#
# ## Memory: what stays, and what grows with the batch
#
# *Predict first:* a weight in float32 takes 4 bytes. How many bytes does training need for each
# parameter, whatever the batch? Measure it in a training that has made a step.

# %% tags=["claim"]
tiny = MAR(**asdict(get_config("digits").mar))
budget = configs.TrainingConfig(batch_size=4, max_steps=1, precision="float32")
training = train_mar(tiny, torch.zeros(4, 1, 16, 16), torch.arange(4), budget, seed=seed)
next(training)
moments = [x for state in training.optimizer.state.values() for x in state.values() if x.ndim]
kept = {"weights": list(tiny.parameters()), "gradients": [p.grad for p in tiny.parameters()],
        "moments": moments, "average": list(training.ema.module.parameters())}
state = {name: sum(x.nbytes for x in xs) / costs.count(tiny) for name, xs in kept.items()}
print("bytes a parameter:", state, "together", sum(state.values()))
assert state == planning.STATE

# %% [markdown]
# <details><summary>Answer</summary>
#
# Twenty: weight, gradient, AdamW's two running means of it (*moments*), and the weight average.
# Where products run in **bfloat16** (16 bits: the range of float32, two to three digits), 2 more
# for copies of the weights. This **state** is the same for any batch.
#
# </details>
#
# And each image leaves **activations**: what the forward pass must keep until the backward pass
# needs it. PyTorch tells what it keeps.

# %% tags=["claim"]
def kept_bytes(model, *inputs, **given):
    """Bytes that a forward pass keeps for the backward pass, weights not counted."""
    kept, weights = {}, {p.data_ptr() for p in model.parameters()}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(*inputs, **given)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


for n in (2, 4, 8):
    measured = kept_bytes(model, latents[:n], labels[:n], model.draw(n, mask=mask[:n]))
    predicted = planning.training_memory(small, n, hidden, gpu=False)["activations"]
    off = predicted / measured - 1
    print(f"{n} images: kept {measured / 1e6:.2f} MB, the plan is off by {off:+.1%}")
    assert abs(off) < 0.1

# %% [markdown]
# The plan adds up the tensors that are still referred to after a forward pass without values. On a
# GPU attention keeps less, and bfloat16 halves much of the rest: planned, not measured
# ([docs/scaling.md](../docs/scaling.md)).
# What is kept can also be computed again in the backward pass (**gradient checkpointing**): a third
# more FLOPs, much less memory. Here is a step of 64 images on one GPU. *Predict first:* is the
# state the larger part?

# %%
def needed(config, batch, checkpointing=False):
    """GB that a training step of so many images takes on a GPU, in bfloat16."""
    mar = replace(config.mar, grad_checkpointing=checkpointing)
    need = planning.training_memory(mar, batch, dtype="bfloat16")
    images = need["activations"] + need["at work"]  # the largest gradient, and what it is made of
    return {"state": (sum(need.values()) - images) / 1e9, "64 images": images / 1e9}


fig.show(fig.breakdown({name + ", checkpointing" * less: needed(get_config(name), 64, less)
                        for less in (False, True) for name in FULL}, xlabel="GB"))

# %% [markdown]
# <details><summary>Answer</summary>
#
# No: the activations are, several times. With checkpointing they are the smaller part of MAR-L and
# MAR-H.
#
# </details>
#
# Your GPU is smaller? A step need not be computed in one go. Cut its batch into equal **micro
# batches**, add up their gradients (**accumulate**), each divided by how many there are, then make
# one step. As the loss is a mean, the result is the same up to rounding. (Where micro batches mask
# different numbers of tokens, each counts by its number.)
#
# > **Exercise 2** · difficulty 2 of 3 · importance 3 of 3 · 14 minutes
# >
# > Fit a run into GPUs of a given memory. Several processes share a batch; each has a GPU and a
# > whole model of its own.

# %%
def plan_run(
    count: int, image: float, memory_gb: float, batch: int, processes: int = 1
) -> tuple[int, int]:
    """The largest micro batch that fits, and how many of them a process computes in a step.

    count      parameters: 20 bytes of state and 2 of bfloat16 copies each
    image      bytes that each image of a micro batch needs
    memory_gb  of each GPU, in 10^9 bytes
    batch      images of a step, of all processes together: a multiple of their number
    returns    (micro batch, micro batches a step); the micro batch divides the process's share
               of the batch; (0, 0) if not even one image fits
    """
    # BEGIN SOLUTION about 4 lines
    most = (1e9 * memory_gb - 22 * count) // image
    share = batch // processes
    micro = max((n for n in range(1, share + 1) if share % n == 0 and n <= most), default=0)
    return (micro, share // micro) if micro else (0, 0)
    # END SOLUTION


plan_run = check.plan_run(plan_run)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# First take the state off the memory. How many images fit into the rest?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A process computes `batch // processes` images in a step, its share. Which numbers divide it?
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `max((n for n in range(1, share + 1) if share % n == 0 and n <= most), default=0)`
#
# </details>
#
# {{solution plan_run}}
#
# Your plans for the published batch of 2,048 on one GPU: (micro batch, how many). A tenth of the
# memory is left to what the formula does not know. Put in *your* GPU.

# %%
YOURS = 12  # GB

for name in FULL:
    count = planning.parameters(get_config(name))
    for checkpointing in (False, True):
        image = 1e9 * needed(get_config(name), 64, checkpointing)["64 images"] / 64
        plans = {f"{gb} GB": plan_run(count, image, 0.9 * gb, 2048) for gb in (YOURS, 24, 80)}
        print(f"{name:9} {'checkpointing' if checkpointing else '':13} {plans}")

# %% [markdown]
# (0, 0) does not fit: the state of MAR-H alone takes 21 GB. Several GPUs can also share it (*FSDP*,
# fully sharded data parallel). Fewer GPUs do not change what is learned, only how long you wait.
#
# ## A full-size step, on this machine
#
# One block of each kind at MAR-B's width, with random weights: training steps on one image. Time
# follows from FLOPs, bytes that are moved, and what this machine does in a second.

# %%
wide = replace(get_config("mar_base").mar, encoder_depth=1, decoder_depth=1, diffloss_d=1)
training = train_mar(MAR(**asdict(wide)), torch.randn(2, 16, 16, 16), torch.tensor([207, 291]),
                     replace(budget, batch_size=1, max_steps=3), seed=seed)
took = min(b - a for a, b in pairwise([time.perf_counter() for _ in training]))
here = measure_rates()
predicted = sum(map(here.seconds, costs.training_work(wide, 1).values()))
print(f"a step took {took:.2f} s, by the plan {predicted:.2f} s: {predicted / took:.2f} of it; "
      f"this machine does {here.flops / 1e9:.0f} GFLOP/s in float32")

# %% [markdown]
# ## Published weights
#
# The authors published the weights of all three models. Does your Hugging Face cache hold them?

# %%
at = [try_to_load_from_cache(hub.REPOSITORY, hub.FILES[name].name)
      for name in ("mar_base", "kl16")]
if all(isinstance(path, str) for path in at):
    drawn = load_published(at[0], vae=at[1]).generate([207], num_iter=8, num_sampling_steps=25)
    fig.show(fig.image_grid(drawn, alt="Class 207, drawn by the published MAR-B"))
else:
    print("Not here. This fetches 1.1 GB once, and draws a golden retriever, a lion, a macaw:\n"
          "    mar-mini sample mar_base --labels 207 291 88 --out published.png")

# %% [markdown]
# **No picture of the published weights is stored here.** This course was made without network: the
# command was never run with the real files (with stand-ins of the same names and shapes it was:
# `tests/run/test_hub.py`).
#
# ## The recipe, line by line
#
# The paper and its code, the preset `mar_large`, and why.

# %% tags=["claim"]
mar, recipe = get_config("mar_large").mar, get_config("mar_large").training
epoch = IMAGENET / recipe.batch_size
LINES = [
    ("images a step", 2048, recipe.batch_size, "a mean over many: a steady gradient"),
    ("AdamW's betas", (0.9, 0.95), training.optimizer.defaults["betas"],  # of every preset
     "a short memory of squared gradients, for gradients that change"),
    ("epochs", 400, round(recipe.max_steps / epoch), "each image 400 times (800 for Table 4)"),
    ("learning rate", 8e-4, recipe.learning_rate, "follows from the batch: exercise 3"),
    ("warm-up, epochs", 100, round(recipe.warmup * recipe.max_steps / epoch),
     "large steps on young weights destroy more than they teach"),
    ("after it", "constant", recipe.decay, "the run may go on for as long as you like"),
    ("weight average", 0.9999, recipe.ema_decay, "samples from the mean of about 10,000 steps"),
    ("gradient's norm", 3.0, recipe.grad_clip, "no single batch throws the model off"),
    ("weight decay", 0.02, recipe.weight_decay, "for matrices, not for biases, norms, the head"),
    ("dropout", 0.1, mar.proj_dropout, "against learning the images by heart"),
    ("labels dropped", 0.1, mar.label_drop_prob, "guidance needs a model without class"),
    ("masked at least", 0.7, mar.mask_ratio_min, "generation begins with nothing known"),
    ("buffer tokens", 64, mar.buffer_size, "the class comes in through them (chapter 5)"),
    ("noise levels", 4, mar.diffusion_batch_mul, "each z trains the head four times (chapter 4)"),
]
for what, paper, ours, why in LINES:
    print(f"{what:16} {paper!s:>11} {ours!s:>11}   {why}")
print("lines that differ:", sum(a != b for _, a, b, _ in LINES))
assert all(paper == ours for _, paper, ours, _ in LINES)

# %% [markdown]
# ## The batch and the learning rate
#
# A larger batch's gradient is steadier, so a step may be longer. The recipe takes the
# **learning rate in proportion**: `blr * batch / 256`, where `blr` is the *base* rate of 256
# images. What counts is the **effective batch**: all images whose gradients go into one step. (Some
# take the root of the batch with AdamW. The rule is a habit that works, not a law.)
#
# > **Exercise 3** · difficulty 1 of 3 · importance 3 of 3 · 10 minutes
# >
# > From a plan to the three numbers that a training needs.

# %%
def scaled_recipe(
    micro_batch: int, accumulate: int, processes: int, *, images: int, epochs: float,
    blr: float = 1e-4,
) -> tuple[int, float, int]:
    """Effective batch, learning rate and number of steps.

    micro_batch  images that a process computes at a time
    accumulate   micro batches that a process adds up before each step
    processes    whose gradients are averaged before each step
    images       of the data set; each is seen `epochs` times, batches run on over the end of an
                 epoch, and a last step that would not be whole is left out
    blr          learning rate of an effective batch of 256
    """
    # BEGIN SOLUTION about 2 lines
    batch = micro_batch * accumulate * processes
    return batch, blr * batch / 256, int(epochs * images) // batch
    # END SOLUTION


scaled_recipe = check.scaled_recipe(scaled_recipe)
print("32 GPUs, 64 images each:", scaled_recipe(64, 1, 32, images=IMAGENET, epochs=400))
print("one GPU, 32 images:     ", scaled_recipe(32, 1, 1, images=IMAGENET, epochs=400))

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Micro batches, their number and processes all multiply.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `epochs * images` are seen in all. `int(a) // b` is how many whole times b fits.
#
# </details>
#
# {{solution scaled_recipe}}
#
# The second line takes 64 times as many steps, each 64 times smaller. Your GPU need not decide
# that: accumulate.
#
# ## One process and two
#
# If only the effective batch counts, then one process with 48 images and two with 24 each must
# train *the same* model. Try it: **your** `plan_run` cuts the digits' batch for two pretended GPUs
# of 13 MB, and `mar-mini train`, started by PyTorch's `torchrun`, trains with **your** numbers on
# two processes. This notebook does it alone, in one piece. Images,
# masks and noise are drawn for the whole batch from the seed and the step, whoever computes what.
# (The digits' own rate, 0.003 for 48 images, is a base rate of 0.016: a small, short run takes
# larger steps than the paper's.) *Predict first:* equal to the last digit?

# %%
def on_processes(count, accumulate, batch, rate, steps):
    """Losses of the digits' training on so many processes."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={count}", "-m", "mar_mini", "train", "--config", "digits",
            "--out", out, "--batch-size", batch, "--learning-rate", rate,
            "--accumulate", accumulate, "--max-steps", steps, "--seed", seed,
            "--precision", "float32", "--device", "cpu", "--no-samples"]
        quiet = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([str(word) for word in command], env=quiet, timeout=300,
                              capture_output=True, text=True, cwd=repo)
        if done.returncode:
            raise RuntimeError(f"torchrun failed, its last words: {done.stderr[-2000:]}")
        rows = json.loads((Path(out) / "history_masked.json").read_text("utf-8"))
    return [row["loss"] for row in rows]


def alone(batch, rate, steps):
    """The same on one process: this one."""
    digits = get_config("digits")
    training = replace(digits.training, batch_size=batch, learning_rate=rate, max_steps=steps,
                       max_seconds=None, precision="float32")
    run = TrainingRun(replace(digits, training=training), images, seed=seed)
    return [progress.step.loss for progress in run]


images = open_images("digits", "train")
image = planning.training_memory(get_config("digits").mar, 1)["activations"]
count = costs.count(tiny)
micro, times = plan_run(count, image, 0.013, 48, 2)  # float32 needs 20 bytes: a little room is left
base = get_config("digits").training.learning_rate * 256 / 48
numbers = scaled_recipe(micro, times, 2, images=len(images.labels), epochs=0.2, blr=base)
print(f"2 processes x {times} micro batches of {micro}: batch, learning rate, steps = {numbers}; "
      f"base rate {base:.3f}")
losses = [alone(*numbers), on_processes(2, times, *numbers)]
losses.append(alone(numbers[0], 2 * numbers[1], numbers[2]))  # twice the rate, to compare

# %% tags=["claim"]
one, two, twice = map(torch.tensor, losses)
off, apart = (two - one).abs(), (twice - one).abs()
print(f"{len(one)} steps of {numbers[0]} images, loss {one[0]:.2f} to {one[-1]:.2f}")
print(f"largest difference: two processes {off.max():.1e}, twice the rate {apart.max():.1e}")
assert len(one) == len(two) == numbers[2] and off.max() < 1e-4 and apart.max() > 0.1
steps, shown = range(1, len(one) + 1), {"twice the rate": apart, "two processes": off}
fig.show(fig.curves({name: (steps, x.clamp(min=1e-9)) for name, x in shown.items()}, logy=True,
                    xlabel="step", ylabel="difference of losses"))

# %% [markdown]
# <details><summary>Answer</summary>
#
# Equal up to rounding: float32 sums depend on their order. (Where losses are exactly equal the
# figure shows 1e-9.) Twice the rate on the same images is what a difference looks like. GPUs and
# several machines were not tried.
#
# </details>
#
# ## From CIFAR-10 to an ImageNet subset
#
# **Imagenette** is ten classes of ImageNet, here at 64x64 pixels instead of CIFAR-10's 32x32. What
# has to change? *Predict first:* four times the pixels: how many times the tokens, the FLOPs?

# %%
mars = {name: get_config(name).mar for name in ("cifar10", "imagenette64")}
mars["cifar10, larger"] = replace(mars["cifar10"], img_size=64)
for name, mar in mars.items():
    flops = costs.total_flops(costs.training_work(mar, 32)) / 32e9
    kept = planning.training_memory(mar, 32, gpu=False)["activations"] / 32e6
    rows = {part: round(n) for part, n in rows_of(mar).items()}
    print(f"{name:15} {empty(mar).seq_len} tokens of {empty(mar).token_embed_dim}, {flops:.2f} "
          f"GFLOPs an image, {kept:.1f} MB kept; rows: {rows}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Four times the tokens, of the same width. With nothing but a larger image a step costs 3.3 times
# as much: the head's rows grow fourfold, but the buffer stays at 8 tokens. Two settings give some
# back: at least 70% of 64 tokens are masked (as in the paper; of 16 at least 30%), so the encoder
# sees fewer; and each token trains the head at one noise level instead of two.
#
# </details>
#
# One run was made, a rehearsal of 14 minutes for the MAR on one core (commands:
# [recipes](../recipes/README.md)). Below: its distance to real photographs (chapter 9; lower is
# better; with these images and only 200 samples it does not compare with other chapters'), and its
# **stored pictures**, made by that run and not now. Last come stored pictures of
# CIFAR-10: above when *it* had seen as many images, below at its end. *Predict first:* is the
# 64-pixel model broken, or young?

# %%
results = repo / "benchmarks/results/imagenette64"
history = json.loads((results / "moments.json").read_text("utf-8"))
count = [row["images_seen"] for row in history["moments"]]
lines = {f"{kind} weights": (count, [row[kind] for row in history["moments"]])
         for kind in ("average", "raw")}
lines["as many real images"] = (count, [history["floor"]] * len(count))
fig.show(fig.curves(lines, xlabel="images seen", ylabel="distance"))

# %%
def tiles(path, side, rows, columns):
    """Some pictures (N, 3, side, side) of a stored sheet, row by row."""
    sheet = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255  # (3, H, W)
    places = [(side * row, side * column) for row in rows for column in columns]
    return torch.stack([sheet[:, y : y + side, x : x + side] for y, x in places])


moments = (0, 1, 3, 4, 5, 7, 9, 12)
fig.show(fig.image_grid(tiles(results / "growth.png", 64, (3, 4), moments), columns=8,
                        titles=[f"{count[i]:,} seen" for i in moments],
                        alt="Stored: two samples, from noise to coloured layouts"))

cifar = repo / "data/weights/cifar10"
record = json.loads((cifar / "moments.json").read_text("utf-8"))["moments"]
record = [row["images_seen"] for row in record]
young = min(range(len(record)), key=lambda i: abs(record[i] - count[-1]))
columns = [tiles(cifar / "growth.png", 32, range(8), [i]) for i in (young, len(record) - 1)]
fig.show(fig.image_grid(torch.cat(columns), columns=8, alt="Stored: CIFAR-10, young and old"))
print(f"above after {record[young]:,} images seen, {record[young] / record[-1]:.0%} of its run, "
      f"below after {record[-1]:,}")
last = [round(row["average"]) for row in history["moments"][-3:]]
print(f"64 pixels: {last} at the end of its run, {last[-1] / history['floor']:.1f} times the "
      f"floor; learning rate: {runs['imagenette64']['training']['decay']}, down to 0")

# %% [markdown]
# <details><summary>Answer</summary>
#
# The pictures cannot say. CIFAR-10 shows blotches too after as many images, but at 5% of a long
# run, its rate nearly full; the 64-pixel run was *over*. Its distance is flat at the end, 3.5 times
# the floor: it looks stuck. But with cosine decay the rate was near 0 there, so it would be flat in
# any case. Only a longer run can show it, and none was made.
#
# </details>
#
# ## What would it cost me to train this?
#
# The question that people really ask. FLOPs are known; what a device reaches of the FLOP/s on its
# data sheet is not. But the authors say what 400 epochs of MAR-L with a smaller head took: 2.6 days
# of 128 V100 (paper; 125 TFLOP/s in float16 each), 31 hours of 32 H100 (their README; 989 in
# bfloat16), or 35 hours of 16, with stored latents. *Predict first:* what share of the data sheet
# is that?

# %% tags=["claim"]
encoder, _ = costs.autoencoder_work(get_config("kl16").vae, 1, 256)
encoding = encoder["encoding"].flops  # of an image to latents
theirs = get_config("mar_large")  # of these runs the head had 3 blocks of width 1024
theirs = replace(theirs, mar=replace(theirs.mar, diffloss_d=3, diffloss_w=1024))
SAID = [  # where, GPUs, FLOP/s of each (data sheets), hours, images encoded in each epoch
    ("the paper", 16 * 8, 125e12, 2.6 * 24, True),
    ("their code's README", 32, 989e12, 31, True),
    ("the same, latents cached", 16, 989e12, 35, False)]
shares = []
for where, gpus, peak, hours, encoded in SAID:
    flops = 400 * IMAGENET * (planning.training_flops(theirs) + encoding * encoded)
    shares.append(flops / (gpus * peak * hours * 3600))
    print(f"{where:25} {gpus * hours:5,.0f} GPU hours: {shares[-1]:.0%} of the data sheet")
print("if images are encoded in every epoch:", {n: f"{encoding / each[n]:+.0%}" for n in FULL})
print(f"margin: the largest is {max(shares) / min(shares):.2f} times the smallest, below 2")
assert max(shares) < 2 * min(shares) and min(shares) > 0.1

# %% [markdown]
# <details><summary>Answer</summary>
#
# 11% to 16%, on two kinds of GPU. (Their code does more than counted: it computes the head's loss
# for all tokens, then masks it.)
#
# </details>
#
# So the three models cost as follows on H100s (the price is an assumption). The paper's famous
# numbers (Table 4) are of 800 epochs. Then price a model of **your own**; there stands MAR-B's
# width in 2 + 2 blocks, on a tenth of ImageNet.

# %%
PEAK, PRICE = 989e12, 2.5  # FLOP/s (H100, bfloat16); dollars a GPU hour: yours to put in


def price(flops):
    """GPU hours and money for so many FLOPs, from the best share to the worst."""
    few, many = (flops / (PEAK * share) / 3600 for share in (max(shares), min(shares)))
    return f"{few:,.0f} to {many:,.0f} GPU hours, {PRICE * few:,.0f} to {PRICE * many:,.0f} dollars"


for name in FULL:
    for epochs in (400, 800):
        print(f"{name:10} {epochs} epochs: {price(spent[name] * epochs / 400)}")

# %%
MINE = {"encoder_depth": 2, "decoder_depth": 2, "diffloss_d": 3, "class_num": 100}
IMAGES, EPOCHS = 128_000, 200
mine = replace(get_config("mar_base"), mar=replace(get_config("mar_base").mar, **MINE))
flops, count = planning.training_flops(mine) * IMAGES * EPOCHS, planning.parameters(mine)
image = 1e9 * needed(mine, 64)["64 images"] / 64
print(f"{count:,} parameters, {flops:.1e} FLOPs: {price(flops)}, or "
      f"{flops / here.flops / 3600 / 24:,.0f} days on this machine")
print(f"on a GPU of {YOURS} GB: {plan_run(count, image, 0.9 * YOURS, 2048)}")

# %% [markdown]
# So, honestly: 400 epochs of MAR-B cost 370 to 540 hours of an H100, of MAR-L 810 to 1,190, of
# MAR-H 1,630 to 2,400, the models of the famous numbers twice that, **if the first run is the one
# that works**. Not counted: encoding (little if done once and cached, else 8 to 34% more), failed
# runs, searching for settings, sampling 50,000 pictures to judge each. Nobody here has trained one
# of the three. A CPU can do what this course trained: 142 minutes of one core. In between lies
# *your* model, priced before it starts (small ones reach less of the data sheet).
#
# ## Going further
#
# 1. Put `"diffusion_batch_mul": 2` into `MINE`. What is saved, and what may it cost (chapter 4)?
# 2. Count the head's blocks as you counted the transformer's (`diffloss.ResBlock`).
# 3. Train digits on as many images with batches of 16, 48 and 144 (`alone(batch, rate, steps)`), by
#    the rule and by the root of the batch. Which loses less?
# 4. Open: with the FLOPs of MAR-B's 400 epochs, would you train a larger model for less long? How
#    would you find out for a hundredth of the price?
#
# ## Recap
#
# A block has 12 D² + 13 D parameters, and training takes 6 FLOPs for each of them and each row that
# it is given; memory is a state of 22 bytes a parameter plus activations for each image. Micro
# batches and processes change how long a step takes and where it fits, not what is learned: the
# effective batch does that, and the learning rate follows it. Hours follow from FLOPs and from the
# share of the data sheet that is reached: 11% to 16% for the authors.
#
# | symbol | in code | module |
# |---|---|---|
# | parameters | `parts`, `block_parameters` | `planner.memory` |
# | FLOPs | `training_work`, `autoencoder_work` | `planner.work` |
# | memory | `training_memory`, `plan_run` | `planner.memory` |
# | effective batch, rate | `scaled_recipe` | `configs` |
#
# This is the last chapter. `mar-mini info mar_large` says what a preset takes,
# [recipes](../recipes/README.md) start the runs, [scaling](../docs/scaling.md) has the tables for
# the large ones, and [beyond](../docs/beyond.md) says what came after MAR.
