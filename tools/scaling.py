"""Write docs/scaling.md: what training the published models takes, counted by mar_mini.planner.

python tools/scaling.py
"""

from dataclasses import replace
from pathlib import Path

from mar_mini.configs import Config, get_config
from mar_mini.files import write_atomically
from mar_mini.planner import memory as planning
from mar_mini.planner import work as costs
from mar_mini.planner.report import si

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
NAMES = ("mar_base", "mar_large", "mar_large_12x1536", "mar_huge")
IMAGES, EPOCHS, BATCH = 1_281_167, 400, 2048
H100, V100 = 989e12, 125e12  # FLOP/s, from the makers' data sheets: dense bfloat16, dense float16
UTILISATIONS = (0.4, 0.2)
BATCH_PER_GPU, SHARDS, MEMORY = 64, 8, 72e9

# of MAR-L with the head of the published script, 3 blocks of width 1024, 400 epochs:
# where it was said, GPUs, their FLOP/s, hours, latents there already or not
CLAIMS = (
    ("paper", 128, "V100", V100, 2.6 * 24, False),
    ("published code, README", 32, "H100", H100, 31, False),
    ("the same, cached latents", 16, "H100", H100, 35, True),
)

HEAD = """\
# What the full-size models take

**Nothing on this page was measured on a GPU.** It is computed by `python tools/scaling.py`: the
models run on PyTorch's meta device, without values, while `mar_mini/planner` counts, as `mar-mini
info PRESET` does for any batch and device. What is tested of it, on a CPU
(`tests/planner/test_planning.py`): FLOPs equal those of PyTorch's counter; what the backward pass
needs is within 3% of what autograd keeps in float32; time and memory of sampling and the time of a
training step are within a factor of 1.5 of runs. Fused attention and bfloat16 autocast on GPUs are
imitated, and were not tried.

A multiply-add is two FLOPs; GB are 10^9 bytes. The recipe is the paper's: {epochs} epochs of
{images:,} images, batch {batch}, in bfloat16 autocast, on latents that are there already.
"""


def table(*rows: list[str]) -> str:
    head, *rest = rows
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest)]
    return "\n".join(lines) + "\n"


def encoding_flops(config: Config) -> float:
    """Of turning one image into its latents."""
    return costs.autoencoder_work(config.vae, 1, config.vae.resolution)[0]["encoding"].flops


def compute() -> str:
    shares = [f"GPU hours at {share:.0%}" for share in UTILISATIONS]
    rows = [["preset", "parameters", "FLOPs an image", "FLOPs of 400 epochs", *shares]]
    for name in NAMES:
        config = get_config(name)
        one = planning.training_flops(config)
        whole = one * IMAGES * EPOCHS
        hours = [f"{whole / (H100 * share) / 3600:,.0f}" for share in UTILISATIONS]
        rows.append([f"`{name}`", f"{planning.parameters(config):,}", si(one), si(whole), *hours])
    encoding = encoding_flops(get_config("mar_large"))
    return f"""
## Compute

Hours of an H100 at {H100 / 1e12:.0f} TFLOP/s (data sheet, dense bfloat16), of which the stated
share is reached. The shares are assumptions; the claims below say what others reached. With
checkpointing it is a third more. Encoding an image instead of reading its latents adds
{si(encoding)}FLOP each time.

{table(*rows)}"""


def claims() -> str:
    config = get_config("mar_large")
    config = replace(config, mar=replace(config.mar, diffloss_d=3, diffloss_w=1024))
    rows = [["claim", "GPUs", "hours", "GPU hours", "implied TFLOP/s a GPU", "share of its peak"]]
    for source, gpus, kind, peak, hours, cached in CLAIMS:
        one = planning.training_flops(config) + (0 if cached else encoding_flops(config))
        rate = one * IMAGES * EPOCHS / (gpus * hours * 3600)
        rows.append(
            [
                source,
                f"{gpus} {kind}",
                f"{hours:.0f}",
                f"{gpus * hours:,.0f}",
                f"{rate / 1e12:.0f}",
                f"{rate / peak:.0%}",
            ]
        )
    return f"""
## What the authors say

For MAR-L with a head of 3 blocks of width 1024, 400 epochs; the authors' claims, not ours (of the
paper's it is an assumption that its head was that one). The last two columns divide our FLOPs by
their time. Where the latents were not cached, encoding each image is counted. The published code
does more than we count: it computes the head's loss for all tokens and then masks it.

{table(*rows)}"""


def memory() -> str:
    rows = [["preset", "strategy", "state", "activations, work", "in all", "batch in 72 GB"]]
    for name in NAMES:
        config = get_config(name)
        for strategy, shards in (("DDP", 1), (f"FSDP2 over {SHARDS}", SHARDS)):
            for checkpointing in (False, True):
                way = replace(config.mar, grad_checkpointing=checkpointing)
                now = planning.training_memory(way, BATCH_PER_GPU, dtype="bfloat16", shards=shards)
                work = now["activations"] + now["at work"]
                most = planning.largest_batch(now, BATCH_PER_GPU, MEMORY)
                label = strategy + (", checkpointing" if checkpointing else "")
                whole = sum(now.values())
                sizes = [f"{size / 1e9:.1f} GB" for size in (whole - work, work, whole)]
                rows.append([f"`{name}`", label, *sizes, str(most)])
    return f"""
## Memory of a GPU in training

At {BATCH_PER_GPU} images a GPU ({BATCH // BATCH_PER_GPU} GPUs for the batch of {BATCH}; with fewer,
accumulate gradients or take a larger batch with checkpointing). State is 20 bytes a parameter in
float32 (weights, gradients, two moments, weight average) and, in DDP, 2 more for autocast's copies.
DDP's buckets are taken to be views of the gradients; if they are not, 4 more. FSDP2 shares the
state, weight average included, and gathers two blocks at a time. The last column is the largest
batch: {MEMORY / 1e9:.0f} GB leave a tenth of 80 to the allocator, the communication and what was
forgotten here.

{table(*rows)}"""


def disk() -> str:
    mar, vae = get_config("mar_large").mar, get_config("mar_large").vae
    values = vae.z_channels * (mar.img_size // mar.vae_stride) ** 2
    rows = [["latents, both flips", "bytes an image", "ImageNet", "read at 1,000 images/s"]]
    for what, size in (
        ("means, bfloat16", 2 * values),
        ("means, float32", 4 * values),
        ("means and variances, float32", 8 * values),
    ):
        rows.append(
            [
                what,
                f"{2 * size:,}",
                f"{2 * size * IMAGES / 1e9:.0f} GB",
                f"{size * 1000 / 1e6:.0f} MB/s",
            ]
        )
    states = [["preset", "weights, float32", "checkpoint", "gradients a GPU sends in a step"]]
    for name in NAMES:
        count = planning.parameters(get_config(name))
        states.append(
            [
                f"`{name}`",
                f"{4 * count / 1e9:.1f} GB",
                f"{16 * count / 1e9:.1f} GB",
                f"{2 * 4 * count * (SHARDS - 1) / SHARDS / 1e9:.1f} GB",
            ]
        )
    return f"""
## Disk and network

An image's latents are {values:,} numbers, and of each step one flip is read.

{table(*rows)}
A checkpoint holds weights, weight average and two moments in float32. Gradients: a ring of
{SHARDS} GPUs sends each number {2 * (SHARDS - 1) / SHARDS:g} times, in float32.

{table(*states)}"""


def page() -> str:
    """The text of docs/scaling.md."""
    head = HEAD.format(epochs=EPOCHS, images=IMAGES, batch=BATCH)
    return head + compute() + claims() + memory() + disk()


if __name__ == "__main__":
    write_atomically(PAGE, lambda path: path.write_text(page()))
