"""`torch.compile` for the parts of a model that repeat; an option, never needed for a result."""

import shutil

from torch import nn

from mar_mini.mar import MAR
from mar_mini.vae import AutoencoderKL

COMPILERS = ("c++", "g++", "clang++")


def compile_model(model: MAR | AutoencoderKL) -> None:
    """Compile a model in place: same parameters, same results up to rounding.

    The first step that uses it takes up to a minute (`benchmarks/README.md`), and the first one
    after a change of mode (training, sampling) again. Of a MAR the transformer blocks and the
    head's blocks are compiled, each kind once for any length; of an autoencoder the decoder, which
    has two thirds of the work.

    Raises ValueError if there is no C++ compiler, which a CPU needs for this.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not any(map(shutil.which, COMPILERS)):
        raise ValueError(
            f"compiling needs a C++ compiler ({', '.join(COMPILERS)}), and none was found; install "
            "one (Debian: apt-get install g++), or leave compile out: results are the same"
        )
    for module in repeated_parts(model):
        module.compile(dynamic=isinstance(model, MAR))


def repeated_parts(model: MAR | AutoencoderKL) -> list[nn.Module]:
    if isinstance(model, AutoencoderKL):
        return [model.decoder]
    head = getattr(model.diffloss, "net", None)
    return [*model.encoder_blocks, *model.decoder_blocks, *getattr(head, "res_blocks", ())]
