"""mar_mini: masked autoregressive image generation with a diffusion head, to read and to run."""

from mar_mini.checkpoints import Pipeline
from mar_mini.configs import get_config
from mar_mini.diffloss import DiffLoss
from mar_mini.diffusion import Diffusion
from mar_mini.mar import MAR
from mar_mini.run.hub import load_autoencoder, load_pretrained, load_published
from mar_mini.sampling import Frame, generate, sample
from mar_mini.training import train_mar, train_vae
from mar_mini.vae import AutoencoderKL, DiagonalGaussian

__version__ = "0.1.0"
__all__ = [
    "MAR",
    "AutoencoderKL",
    "DiagonalGaussian",
    "DiffLoss",
    "Diffusion",
    "Frame",
    "Pipeline",
    "generate",
    "get_config",
    "load_autoencoder",
    "load_pretrained",
    "load_published",
    "sample",
    "train_mar",
    "train_vae",
]
