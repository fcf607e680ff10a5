"""How fast the default path is, against the computation as published; the ladder; the roofline.

    python benchmarks/speed.py                      all of it: about 40 minutes on two cores
    python benchmarks/speed.py --only mini_sample --pairs 5
    python benchmarks/speed.py --draw               table and plot again from results/speed.json

Each rung of a ladder runs in a process of its own that keeps its model and waits for its turn. The
published path and the rung alternate, published first, and what counts is the median of the ratios
of such pairs. Nothing else may run on the machine. Where there is a GPU, `--device cuda`.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "speed.json"

# workload -> {rung: what it adds}; the first is the published path, "default" what mar_mini runs
LADDERS = {
    "mini_train": {
        "published": "everything as published",
        "attention": "attention written out, four dropout decisions from one random number",
        "masked": "only masked tokens, only their rows of the last block",
        "head": "condition and timesteps embedded once, not for each repetition",
        "default": "fused AdamW, average and clipping for all parameters together",
        "compiled": "torch.compile",
        "no_dropout": "default with dropout 0 (counts for nothing)",
    },
    "mini_sample": {
        "published": "everything as published",
        "rows": "last block for the tokens to predict only; no copies by boolean masks",
        "default": "condition and timesteps embedded once, no doubled state",
        "compiled": "torch.compile",
        "fast": "approximate: the preset `fast`",
    },
    "base_sample": {
        "published": "everything as published",
        "default": "all of the above",
        "compiled": "torch.compile",
        "fast": "approximate: the preset `fast`",
    },
    "vae_train": {
        "published": "everything as published",
        "default": "upsampling in one convolution; fused SiLU, optimiser and average",
        "compiled": "torch.compile",
    },
}
GOALS = {  # medians of ratios on a CPU that are aimed at
    "mini_train": {"default": 1.8, "compiled": 2.5},
    "mini_sample": {"default": 2.0, "compiled": 3.0, "fast": 10.0},
    "base_sample": {"default": 1.8, "compiled": 2.0, "fast": 10.0},
    "vae_train": {"default": 1.5, "compiled": 2.0},
}
MINI = {
    "img_size": 32,
    "vae_stride": 4,
    "vae_embed_dim": 8,
    "class_num": 10,
    "encoder_embed_dim": 256,
    "encoder_depth": 6,
    "encoder_num_heads": 8,
    "decoder_embed_dim": 256,
    "decoder_depth": 6,
    "decoder_num_heads": 8,
    "buffer_size": 16,
    "diffloss_d": 3,
    "diffloss_w": 256,
    "num_sampling_steps": 50,
}
SAMPLING = {
    "mini_sample": {"batch": 64, "num_iter": 16, "num_sampling_steps": 50, "cfg": 3.0},
    "base_sample": {"batch": 4, "num_iter": 8, "num_sampling_steps": 25, "cfg": 3.0},
}
PARTS = {
    "published": {"attention": False, "head": False},
    "attention": {"head": False},
    "masked": {"head": False},
    "rows": {"head": False},
}


# The worker: one rung -----------------------------------------------------------------------------


def build_step(workload: str, rung: str, precision: str, device: str):
    """A function that does the work once."""
    import published
    import torch

    import mar_mini
    from mar_mini import MAR, AutoencoderKL
    from mar_mini.configs import TrainingConfig, get_config
    from mar_mini.fast import FAST, speed_up
    from mar_mini.training import autocast, train_mar, train_vae

    torch.manual_seed(0)
    config = TrainingConfig(max_steps=10**6, precision=precision)
    if workload == "vae_train":
        model = AutoencoderKL(
            ch=32,
            ch_mult=(1, 2, 4),
            num_res_blocks=1,
            attn_resolutions=(),
            resolution=32,
            z_channels=16,
        ).to(device)
        images = torch.rand(64, 3, 32, 32, device=device) * 2 - 1
        if rung != "published":
            speed_up(model, compiled=rung == "compiled")
            steps = train_vae(model, images, replace(config, batch_size=64))
            return lambda: next(steps)
        training = published.PublishedTraining(published.published_vae(model))

        def step():
            with autocast(precision, torch.device(device)):
                reconstruction, posterior = model(images)
                mse = (reconstruction.float() - images).square().mean()
                loss = mse + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
            return training.step(loss)

        return step

    sizes = MINI if workload.startswith("mini") else vars(get_config("mar_base").mar)
    if rung == "no_dropout":
        sizes = {**sizes, "attn_dropout": 0.0, "proj_dropout": 0.0}
    parts = PARTS.get(rung, {})
    kind = published.PublishedMAR if rung in ("published", "attention") else MAR
    replaced = {}
    if not parts.get("attention", True):
        replaced["block"] = published.PublishedBlock
    if not parts.get("head", True):
        replaced["head"] = published.PublishedHead
    model = kind(**sizes, **replaced).to(device)
    if rung != "published":
        speed_up(model, compiled=rung == "compiled")
    if workload in SAMPLING:
        wanted = dict(SAMPLING[workload])
        labels = torch.arange(wanted.pop("batch"), device=device) % 10
        if rung == "fast":
            wanted = {**wanted, **FAST}
        function = published.generate if rung == "published" else mar_mini.generate

        def step():
            generator = torch.Generator(device).manual_seed(0)
            with autocast(precision, torch.device(device)):
                return function(model, labels, generator=generator, **wanted)

        return step

    latents = torch.randn(128, 8, 8, 8, device=device)
    labels = torch.arange(128, device=device) % 10
    # all rungs get the same masks, step by step: their number decides how long a step takes
    generator = torch.Generator().manual_seed(0)
    draw = model.draw_mask
    model.draw_mask = lambda batch_size, _: draw(batch_size, generator)
    if rung in ("default", "compiled", "no_dropout"):
        steps = train_mar(model, latents, labels, replace(config, batch_size=128))
        return lambda: next(steps)
    training = published.PublishedTraining(model)

    def step():
        model.train()
        with autocast(precision, torch.device(device)):
            loss = model(latents, labels)
        return training.step(loss)

    return step


def roofline(precision: str, device: str) -> dict:
    """What a large matrix product and a large copy reach here: the best of ten."""
    import torch

    from mar_mini.training import autocast

    with autocast(precision, torch.device(device)):
        dtype = torch.nn.functional.linear(*torch.ones(2, 1, 1, device=device)).dtype
    x = torch.randn(8192, 1024, device=device).to(dtype)
    w = torch.randn(1024, 1024, device=device).to(dtype)
    big = torch.randn(32_000_000, device=device)
    target = torch.empty_like(big)
    works = {
        "tflops": (lambda: x @ w, 2 * x.numel() * 1024 / 1e12),
        "copy_gb_s": (lambda: target.copy_(big), 8 * big.numel() / 1e9),
    }
    rates = {
        name: amount / min(timed(work, device) for _ in range(10))
        for name, (work, amount) in works.items()
    }
    return {"dtype": str(dtype).removeprefix("torch."), **rates}


def timed(work, device: str) -> float:
    import torch

    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    finish()
    start = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - start


def count(work) -> dict:
    """Floating point operations of matrix products and convolutions, and bytes of all operators.

    Bytes are what eager operators read and write, as if nothing stayed in a cache.
    """
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    class Traffic(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            returns = function._schema.returns
            if not any(r.alias_info and not r.alias_info.is_write for r in returns):  # not a view
                tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
                self.bytes += sum(x.numel() * x.element_size() for x in tensors)
            return out

    flops = FlopCounterMode(display=False)
    with flops, Traffic() as traffic:
        work()
    return {"flops": flops.get_total_flops(), "bytes": traffic.bytes}


def worker(workload: str, rung: str, precision: str, device: str) -> None:
    """Answer each line on standard input by a line of JSON."""
    import torch

    def answer(value: dict) -> None:
        print(json.dumps(value), flush=True)

    if workload == "roofline":
        return answer(roofline(precision, device))
    work = build_step(workload, rung, precision, device)
    for line in sys.stdin:
        if line.strip() == "count":
            answer(count(work))
            continue
        seconds = timed(work, device)
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer({"seconds": seconds, "peak_gb": peak / 1e9})


# The conductor ------------------------------------------------------------------------------------


class Worker:
    def __init__(self, workload: str, rung: str, arguments):
        cache = tempfile.mkdtemp()  # what was compiled in another run does not count
        self.process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--worker",
                workload,
                rung,
                "--precision",
                arguments.precision,
                "--device",
                arguments.device,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        )

    def ask(self, what: str = "run") -> dict:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.listen()

    def listen(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended early: {' '.join(self.process.args)}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def climb(workload: str, arguments, warm: int = 4) -> dict:
    """Every rung of a ladder against the published path, pair after pair.

    warm  steps of a rung before it counts
    """
    warm = 1 if workload in SAMPLING else warm  # a batch of samples has hundreds of steps
    published, rungs = Worker(workload, "published", arguments), {}
    for rung in LADDERS[workload]:
        one = published if rung == "published" else Worker(workload, rung, arguments)
        warm_up = [one.ask()["seconds"] for _ in range(warm)]
        pairs = []
        for _ in range(arguments.pairs):
            before = published.ask()
            pairs.append((before["seconds"], one.ask()))
        counted = one.ask("count") if rung in ("published", "default", "fast") else {}
        ratios = [before / after["seconds"] for before, after in pairs]
        rungs[rung] = {
            "adds": LADDERS[workload][rung],
            "seconds": statistics.median(after["seconds"] for _, after in pairs),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "warm_up": warm_up[0],
            "peak_gb": pairs[-1][1]["peak_gb"],
            **counted,
        }
        if one is not published:
            one.close()
        print(line(workload, rung, rungs[rung]), flush=True)
    published.close()
    return rungs


def line(workload: str, rung: str, row: dict) -> str:
    spread = f"{min(row['ratios']):.2f}-{max(row['ratios']):.2f}"
    goal = GOALS[workload].get(rung)
    met = "met" if goal and row["ratio"] >= goal else "missed"
    return (
        f"{workload:12} {rung:11} {row['seconds']:7.2f} s  {row['ratio']:5.2f} times as fast "
        f"({spread})  first {row['warm_up']:.1f} s  {row['peak_gb']:.1f} GB"
        + (f"  goal {goal}: {met}" if goal else "")
    )


def machine(device: str) -> dict:
    import torch

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    facts = {
        "processor": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "amx": bool(torch.cpu._is_amx_tile_supported()),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(LADDERS), choices=list(LADDERS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--draw", action="store_true", help="table and plot from the stored result")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(*arguments.worker, arguments.precision, arguments.device)
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if not arguments.draw:
        rates = Worker("roofline", "default", arguments).listen()
        print(
            f"a large matrix product: {rates['tflops']:.2f} TFLOP/s ({rates['dtype']}); "
            f"a large copy: {rates['copy_gb_s']:.0f} GB/s"
        )
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, text=True, capture_output=True
        ).stdout.strip()
        for workload in arguments.only:
            key = f"{workload} {rates['dtype']} {arguments.device}"
            results[key] = {
                "workload": workload,
                "date": str(date.today()),
                "commit": commit,
                "machine": machine(arguments.device),
                "roofline": rates,
                "rungs": climb(workload, arguments),
            }
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)


def draw(results: dict) -> None:
    """The table and the plot of README.md; the text around the table stays."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [
        "| workload | rung | seconds | times as fast (spread) | arithmetic | memory | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    figure, axes = plt.subplots(
        len(results), 1, figsize=(8, 2.2 * len(results)), squeeze=False, layout="constrained"
    )
    for axis, (key, result) in zip(axes.flat, results.items(), strict=True):
        rates = result["roofline"]
        for rung, row in result["rungs"].items():
            bounds = ("", "")
            if "flops" in row:
                arithmetic = row["flops"] / rates["tflops"] / 1e12
                memory = row["bytes"] / rates["copy_gb_s"] / 1e9
                bounds = tuple(f"{x:.2f} s" for x in (arithmetic, memory))
                axis.plot([arithmetic] * 2, [rung, rung], "|", color="black", markersize=18)
            rows.append(
                f"| {key} | {rung}: {row['adds']} | {row['seconds']:.2f} | {row['ratio']:.2f} "
                f"({min(row['ratios']):.2f}-{max(row['ratios']):.2f}) | {' | '.join(bounds)} | "
                f"{row['peak_gb']:.1f} GB |"
            )
            axis.barh(rung, row["seconds"], color="#0072b2")
            axis.text(row["seconds"], rung, f"  {row['ratio']:.2f}x", va="center")
        axis.invert_yaxis()
        longest = max(row["seconds"] for row in result["rungs"].values())
        axis.set(
            title=f"{key}: seconds; black: what its matrix products alone would take",
            xlim=(0, 1.12 * longest),
        )
    figure.savefig(HERE / "speed.png", dpi=90)
    path = HERE / "README.md"
    if path.exists():
        before, _, rest = path.read_text().partition("<!-- table -->\n")
        after = rest.partition("<!-- end of table -->")[2]
        table = "\n".join(rows)
        path.write_text(f"{before}<!-- table -->\n{table}\n<!-- end of table -->{after}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
