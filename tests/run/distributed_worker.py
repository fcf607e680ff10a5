"""Runs jobs of `test_distributed` in groups of processes that torch's variables bring together.

One start and one import for all of them: the processes of a group are forked.
"""

import json
import os
import socket
import sys
import traceback
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from golden_values import fill
from torch.distributed.tensor import DTensor

from mar_mini import MAR
from mar_mini.configs import TrainingConfig
from mar_mini.data import Images
from mar_mini.run.distributed import join
from mar_mini.run.state import Checkpoints
from mar_mini.training import Training, mar_terms

SIZES = {
    "img_size": 16,
    "vae_stride": 1,
    "patch_size": 4,
    "vae_embed_dim": 1,
    "class_num": 10,
    "encoder_embed_dim": 32,
    "encoder_depth": 1,
    "encoder_num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "buffer_size": 2,
    "diffloss_d": 1,
    "diffloss_w": 32,
    "num_sampling_steps": 4,
    "attn_dropout": 0.0,
    "proj_dropout": 0.0,
    "grad_checkpointing": True,
}
TWENTY = TrainingConfig(
    batch_size=40, learning_rate=1e-3, max_steps=20, precision="float32", flip=True, grad_clip=0.5
)
IDENTITY = {"config": "tiny"}


class Posteriors:
    """Latents of 60 images as distributions, of straight and mirrored ones."""

    classes, latent_scale, clip = [str(i) for i in range(10)], 0.5, 1.0
    shape = (1, 16, 16)

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.means = torch.randn(2, 60, 1, 16, 16, generator=generator).clamp(-1, 1)
        self.labels = torch.arange(60) % 10
        assert isinstance(self, Images)

    def __len__(self):
        return 60

    @property
    def checksum(self):
        return zlib.crc32(self.labels.numpy())

    def autoencoder(self):
        return None, None

    def batch(self, indices, flip, generator):
        means = self.means[flip.long(), indices]
        return means + 0.3 * torch.randn(means.shape, generator=generator)


def start(kind: type[Training] = Training, accumulate: int = 1) -> Training:
    """A tiny training, the same each time; its processes begin with different weights."""
    model = fill(MAR(**SIZES), 7 + (dist.get_rank() if dist.is_initialized() else 0))
    return kind(model, Posteriors(), mar_terms, replace(TWENTY, accumulate=accumulate), seed=3)


def losses(training: Training, steps: int = 20) -> list[list[float]]:
    rows = []
    for step in training:
        rows.append([step.loss, step.terms["mse"], step.grad_norm])
        if step.step == steps:
            break
    return rows


def job(kind: type[Training], spec: dict) -> dict:
    """Go on from a folder's last state, train up to a step, save; what came of it."""
    training = start(kind, spec.get("accumulate", 1))
    if "folder" in spec:
        checkpoints = Checkpoints(Path(spec["folder"]), spec.get("identity", IDENTITY))
        try:
            restored = checkpoints.restore(training)
        except ValueError as error:
            return {"error": str(error)}
    result = {"from": training.step, "losses": losses(training, spec.get("until", 20))}
    if "folder" in spec:
        result["refused"] = list(restored.refused)
        result["errors"] = [failing(checkpoints, training, rank) for rank in spec.get("full", ())]
        checkpoints.save(training)
    average = training.ema.module.state_dict()
    whole = {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in average.items()}
    result["average"] = {k: x.flatten().tolist() for k, x in whole.items()}
    return result


def failing(checkpoints: Checkpoints, training: Training, rank: int) -> list[str]:
    """What each process says if the disk is full for that one."""

    def full(*_):
        raise OSError(28, "No space left on device")

    place = "torch.distributed.checkpoint.filesystem.os.fsync"
    with mock.patch(place, full) if dist.get_rank() == rank else nullcontext():
        try:
            checkpoints.save(training)
            said = "saved"
        except OSError as error:
            said = str(error)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, said)
    return errors


def member(rank: int, count: int, strategy: str, specs: list[dict], port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.set_num_threads(1)
    with join(strategy) as kind:
        for spec in specs:
            result = job(kind, spec)
            if rank == 0:
                Path(spec["result"]).write_text(json.dumps(result))


def together(count: int, strategy: str, specs: list[dict]) -> None:
    """Fork a group of processes, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            try:
                member(rank, count, strategy, specs, port)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    failed = [os.waitpid(child, 0)[1] for child in children]
    if any(failed):
        sys.exit(f"{count} processes with {strategy}: {failed}")


if __name__ == "__main__":
    for count, strategy, specs in json.loads(Path(sys.argv[1]).read_text()):
        together(count, strategy, specs)
