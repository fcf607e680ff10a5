"""How the golden values are read and compared: see golden/README.md."""

import json
import math
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = np.load(GOLDEN / "reference.npz", allow_pickle=False)
SHAPES = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
EMBEDDINGS = ("pos_embed_learned", "mask_token", "fake_latent", "class_emb.weight")


def golden(key: str) -> torch.Tensor:
    return torch.from_numpy(REFERENCE[key])


def rnd(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def fill(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The golden weights, in eval mode."""
    rs = np.random.RandomState(seed)
    state = module.state_dict()
    for key in sorted(state):
        shape = state[key].shape
        a = rs.standard_normal(shape).astype(np.float32)
        if len(shape) >= 2:
            a *= 0.2 if key.endswith(EMBEDDINGS) else np.float32(1 / math.sqrt(np.prod(shape[1:])))
        else:
            a = 1 + 0.1 * a if key.endswith("weight") else 0.1 * a
        state[key] = torch.from_numpy(np.asarray(a, dtype=np.float32))
    module.load_state_dict(state)
    return module.eval()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """norm(a - b) / norm(b) in float64."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    return float((got - want).norm() / want.norm().clamp(min=1e-300))
