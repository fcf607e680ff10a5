"""What makes it faster: each is passed in, and the model without it is the slow and right one.

`speed_up` computes the same, `FAST` is approximate; what it costs: benchmarks/README.md.
"""

from torch import nn

from mar_mini.fast.compiling import compile_model
from mar_mini.fast.dropout import FastDropout
from mar_mini.fast.reuse import Reuse
from mar_mini.fast.solvers import dpm_solver
from mar_mini.fast.upsample import FoldedUpsample
from mar_mini.vae import Upsample

__all__ = ["FAST", "Reuse", "compile_model", "dpm_solver", "speed_up"]

# arguments of `sample`
FAST = {
    "solver": "ddim",
    "num_sampling_steps": (10, 4),
    "guidance_interval": (0.25, 1.0),
    "conditions": Reuse(refresh_features=8, refresh_guidance=8),
}

FASTER = {nn.Dropout: FastDropout, Upsample: FoldedUpsample}


def speed_up(model: nn.Module | None, compiled: bool = False) -> None:
    """Let a model's parts compute the same in less time, in place; its weights stay as they are.

    compiled  compile it as well; see `compile_model`
    """
    for module in model.modules() if model is not None else ():
        module.__class__ = FASTER.get(type(module), module.__class__)
    if compiled:
        compile_model(model)
