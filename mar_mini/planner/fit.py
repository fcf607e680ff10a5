"""How a training step is cut so that it fits into memory."""

from dataclasses import replace

import torch

from mar_mini.configs import Config
from mar_mini.planner.memory import parameters, plan_run, training_memory
from mar_mini.training import multiplies_bf16

ROOM = 0.9  # share of a device that a plan fills: allocators leave gaps


def fit_training(
    config: Config,
    memory: float,
    device: torch.device,
    *,
    processes: int = 1,
    sharded: bool = False,
    accumulate: int | None = None,
    checkpointing: bool = False,
) -> Config:
    """The preset with its step cut into the fewest micro batches that fit into each device.

    memory         bytes of each device
    sharded        whether the processes share the model's state (FSDP)
    accumulate     micro batches that are asked for
    checkpointing  compute activations again in any case, not only if nothing else fits

    Raises ValueError, with what would fit, if that does not.
    """
    precision, gpu = config.training.precision, device.type == "cuda"
    size = 2 if precision == "bf16" or precision == "auto" and multiplies_bf16(device) else 4
    count, fitting = parameters(config) // (processes if sharded else 1), []
    for again in (True,) if checkpointing else (False, True):
        mar = replace(config.mar, grad_checkpointing=again)
        image = sum(training_memory(mar, 16, count=0, size=size, gpu=gpu).values()) / 16
        batch = config.training.batch_size
        _, fewest = plan_run(count, image, ROOM * memory / 1e9, batch, processes, size)
        if not fewest:  # not even one image at a time
            continue
        fitting.append(f"--accumulate {fewest}" + " --checkpoint-activations" * again)
        if accumulate is None or accumulate >= fewest:
            training = replace(config.training, accumulate=accumulate or fewest)
            return replace(config, mar=mar, training=training)
    raise ValueError(
        f"a training step of {config.name!r} does not fit into {memory / 1e9:.3g} GB; what "
        "would fit: "
        f"{' or '.join(fitting) or 'a smaller preset, or more processes with --strategy fsdp'}"
    )
