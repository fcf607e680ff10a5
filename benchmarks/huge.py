"""Sample one image of `mar_huge` in bfloat16 on the CPU with random weights: time and peak memory.

    python benchmarks/huge.py

943 million parameters, 2 iterations, 4 diffusion steps, guidance 3. It stays under 6 GB because the
model is built in bfloat16 from the start.
"""

import resource
import time

import torch

from mar_mini import MAR, generate, get_config


def main() -> None:
    torch.set_default_dtype(torch.bfloat16)
    model = MAR(**vars(get_config("mar_huge").mar)).eval()
    torch.set_default_dtype(torch.float32)
    start = time.perf_counter()
    tokens = generate(model, [0], num_iter=2, num_sampling_steps=4, cfg=3.0)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{count:,} parameters, tokens {tuple(tokens.shape)} {tokens.dtype}: {seconds:.1f} s, "
        f"peak {peak:.1f} GB"
    )


if __name__ == "__main__":
    main()
