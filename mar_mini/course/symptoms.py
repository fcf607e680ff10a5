"""Why are my images black, or noise? A small training with one thing wrong, and what it shows.

`symptoms` trains a tiny MAR in seconds; each of its arguments makes one well-known mistake.
`measure` takes the evidence, of that training or of one of your own, without knowing what is
wrong. `diagnose` names the cause.
"""

import json
import math
from collections import deque
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from mar_mini import data, evaluation
from mar_mini.configs import TrainingConfig, get_config
from mar_mini.diffloss import DiffLoss
from mar_mini.diffusion import Diffusion
from mar_mini.mar import MAR
from mar_mini.sampling import evaluating, generate
from mar_mini.training import train_mar

# what is wrong -> the one argument of `symptoms` that makes it so, for images of 8x8 pixels
STATES: dict[str, dict] = {
    "healthy": {},
    "unbounded x0": {"clip": None},
    "ema lag": {"ema_window": math.inf},
    "latent scale": {"latent_scale": 0.1},
    "leaking mask": {"leak": True},
    "no positions": {"positions": False},
    "wide tokens": {"patch_size": 8},
}
CFG = 3.0  # guidance weight of the samples
SIZE = replace(  # an even smaller model than `digits`
    get_config("digits").mar, decoder_depth=1, mlp_ratio=2.0, diffloss_d=2, num_sampling_steps=20
)
TRAINING = TrainingConfig(batch_size=128, learning_rate=4e-3, precision="float32")


@dataclass(frozen=True)
class Evidence:
    """What can be measured on any training, whatever may be wrong with it."""

    tokens: int  # of an image
    token_width: int  # values of a token
    latent_std: float  # of what the model is fed
    loss: float  # of the trained weights on training images, as training computes it
    loss_hidden: float  # same masks and noise, z as in sampling: hidden tokens are blanked
    loss_average: float  # as `loss`, of the averaged weights
    average_distance: float  # of the averaged weights from the trained, as a share of their norm
    z_by_place: float  # how z differs between places while nothing is known, as a share of its size
    largest_x0: float  # |x0| in the sampler's first step / the largest training value
    outside: float  # share of sampled values not finite or above 1.05 times that value
    sample_std: float  # of the samples / of the training set
    recognised: float  # share of samples (averaged weights) taken for the class asked for
    recognised_trained: float  # the same of the trained weights' samples


@dataclass(frozen=True)
class Symptoms:
    """What a training shows.

    samples   (N, C, H, W) of the averaged weights, in the units of the latents; sample i was asked
              to be of class i modulo their number; what is not finite is 0
    """

    samples: Tensor
    evidence: Evidence


def diagnose(evidence: Evidence) -> str:
    """Name what is wrong with a training: one of `STATES`.

    First the tests that compare two numbers which should be equal, or a number with a bound: a
    healthy training passes them at any age. Only then how good the samples are. "healthy" says
    that none of the six was found: samples may still be bad because the training was short.

    The limits suit latents of standard deviation 1, and pixels in [-1, 1].
    """
    e = evidence
    if not e.largest_x0 < 2:  # true for what is not a number as well
        return "unbounded x0"
    if e.loss_hidden > 1.5 * e.loss:  # worse without what it should not have seen
        return "leaking mask"
    if e.loss_average > 1.5 * e.loss:
        return "ema lag"
    if not 0.2 < e.latent_std < 4:
        return "latent scale"
    if e.tokens > 1 and e.z_by_place < 0.01:
        return "no positions"
    if e.token_width > 32 and e.recognised < 0.6:  # width is no fault where it was learned
        return "wide tokens"
    return "healthy"


def stored_evidence() -> list[tuple[str, int, Evidence]]:
    """(state, seed, evidence) of the trainings in data/symptoms, made by tools/make_symptoms.py.

    Raises ValueError if the file is missing or damaged.
    """
    path = data.data_dir() / "symptoms" / "evidence.json"
    try:
        rows = json.loads(path.read_text("utf-8"))
        return [(row["state"], row["seed"], Evidence(**row["evidence"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}); restore it with `git checkout -- {path}` or "
            "`python tools/make_symptoms.py --fresh`"
        ) from error


def small_digits() -> tuple[Float[Tensor, "N 1 8 8"], Int[Tensor, " N"]]:
    """The bundled digits 0 to 3 shrunk to 8x8 pixels in [-1, 1], and their labels."""
    images, labels = data.to_tensors(data.load_images("digits"))
    pixels = data.normalise(images)[labels < 4][:, :, 2:-2, 2:-2]  # the border has hardly any ink
    return F.interpolate(pixels, size=8, mode="area"), labels[labels < 4]


def symptoms(
    latents: Shaped[Tensor, "N C H W"],
    labels: Int[Tensor, " M"],
    *,
    clip: float | None = 1.0,
    ema_window: float = 0.1,
    latent_scale: float = 1.0,
    leak: bool = False,
    positions: bool = True,
    patch_size: int = 4,
    steps: int = 200,
    seed: int = 0,
) -> Symptoms:
    """Train a tiny MAR, sample from it, and take the evidence. All random numbers follow from seed.

    latents       (N, C, H, W) float, 128 at least; square, such as pixels of 8x8 in [-1, 1]
    labels        (N,) int64
    clip          bound on |x0| while sampling, as a multiple of the largest training value; None:
                  unbounded x0
    ema_window    share of the steps that the average reaches back over; infinite: 0.9999 from the
                  first step on, the published decay, so that it lags behind
    latent_scale  factor on the latents; 1 suits pixels in [-1, 1]
    leak          True: the encoder is shown the tokens that the model must predict
    positions     False: all position embeddings are zero and stay so
    patch_size    latents of a token's side; as large as the image: one wide token
    steps         of 128 images

    Raises ValueError for values that mean nothing, or latents and labels that do not fit.
    """
    if latents.ndim != 4 or latents.shape[-1] != latents.shape[-2]:
        raise ValueError(f"latents are {tuple(latents.shape)}; expected square ones (N, C, H, H)")
    if not latents.is_floating_point():
        raise ValueError(f"latents are {latents.dtype}; expected float, for pixels data.normalise")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip is {clip}; expected a number above 0, or None for no bound")
    if not 0 < latent_scale < math.inf:
        raise ValueError(f"latent_scale is {latent_scale}; expected a finite number above 0")
    if not ema_window > 0:
        raise ValueError(f"ema_window is {ema_window}; expected above 0, or math.inf")
    scaled = latents * latent_scale
    settings = asdict(SIZE) | {"img_size": latents.shape[-1], "vae_embed_dim": latents.shape[1]}
    settings |= {"patch_size": patch_size, "class_num": int(labels.max()) + 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for the initial weights
        model = (Leaking if leak else MAR)(**settings)
    if not positions:
        for name, parameter in model.named_parameters():
            if "pos_embed" in name:
                nn.init.zeros_(parameter).requires_grad_(False)
    config = replace(TRAINING, max_steps=steps, ema_window=ema_window)
    last = deque(train_mar(model, scaled, labels, config, seed=seed), maxlen=1)[0]
    bound = clip and clip * float(scaled.abs().max())
    found = measure(last.model, last.ema, scaled, labels, clip=bound, seed=seed)
    return Symptoms(found.samples / latent_scale, found.evidence)


class Leaking(MAR):
    """A MAR whose mask reaches the loss, but not the encoder: it is shown what it must predict.

    Only in training. In sampling there is nothing to leak: hidden tokens do not exist yet.
    """

    leaking = False

    def forward(self, *args, **kwargs):
        self.leaking = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.leaking = False

    def forward_encoder(self, x, mask, labels, num_masked=None):
        return super().forward_encoder(x, mask & (not self.leaking), labels)

    def forward_decoder(self, x, mask, wanted=None, num_wanted=None):
        return super().forward_decoder(x, mask & (not self.leaking), wanted)


def measure(
    model: MAR,
    ema: MAR,
    latents: Float[Tensor, "N C H W"],
    labels: Int[Tensor, " N"],
    *,
    clip: float | None,
    count: int = 100,
    seed: int = 0,
) -> Symptoms:
    """Take the evidence of a training: its weights, their average, and what they were fed.

    model, ema  on the device of the latents
    latents     (N, C, H, W) scaled as in training; labels (N,) int64
    clip        bound on |x0| while sampling, in the latents' units; None for none
    count       samples to draw from each of the two
    """
    asked = torch.arange(count, device=latents.device) % model.class_num
    largest, means = float(latents.abs().max()), evaluation.class_means(latents, labels)
    drawn, recognised = [], []
    for weights in (ema, model):
        given = {"num_iter": model.seq_len, "cfg": CFG, "clip": clip, "generator": seeded(seed)}
        drawn.append(weights.unpatchify(generate(weights, asked, **given)))
        within = drawn[-1].nan_to_num(0.0).clamp(-largest, largest)
        recognised.append(evaluation.recognised(within, asked, means))
    samples = drawn[0].nan_to_num(0.0)
    ours, theirs = (torch.cat([p.detach().flatten() for p in x.parameters()]) for x in (model, ema))
    with torch.no_grad(), evaluating(model), evaluating(ema):
        loss, loss_hidden = losses(model, latents[:512], labels[:512], seed)
        z = first_z(ema, asked)
        evidence = Evidence(
            tokens=model.seq_len,
            token_width=model.token_embed_dim,
            latent_std=float(latents.std()),
            loss=loss,
            loss_hidden=loss_hidden,
            loss_average=losses(ema, latents[:512], labels[:512], seed)[0],
            average_distance=float((theirs - ours).norm() / ours.norm()),
            z_by_place=float((z - z.mean(1, keepdim=True)).norm() / z.norm()),
            largest_x0=largest_x0(ema.diffloss, z.flatten(0, 1), clip, seed) / largest,
            outside=1 - float((drawn[0].abs() <= 1.05 * largest).double().mean()),
            sample_std=float(samples.std() / latents.std()),
            recognised=recognised[0],
            recognised_trained=recognised[1],
        )
    return Symptoms(samples, evidence)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def losses(model: MAR, latents: Tensor, labels: Tensor, seed: int) -> tuple[float, float]:
    """The loss as training computes it, and with hidden tokens blanked before the encoder."""
    drawn = model.draw(len(latents), seeded(seed))
    target, mask = model.patchify(latents), drawn.mask.to(latents.device)
    blanked = target.masked_fill(mask[..., None], 0.0)
    z = model.forward_decoder(model.forward_encoder(blanked, mask, labels), mask, mask)
    given = {"repeat": model.diffusion_batch_mul, "t": drawn.t, "noise": drawn.noise}
    hidden = model.diffloss(target[mask], z.flatten(0, 1), **given)
    return float(model(latents, labels, drawn)), float(hidden)


def first_z(model: MAR, labels: Tensor) -> Float[Tensor, "B L D"]:
    """z of all places while nothing is known."""
    mask = torch.ones(len(labels), model.seq_len, dtype=torch.bool, device=labels.device)
    nothing = torch.zeros(*mask.shape, model.token_embed_dim, device=labels.device)
    return model.forward_decoder(model.forward_encoder(nothing, mask, labels), mask)


def largest_x0(head: DiffLoss, z: Tensor, clip: float | None, seed: int) -> float:
    """Of the sampler's first step, at t = 999, for all places at once and without guidance."""
    diffusion = Diffusion(head.num_sampling_steps)
    last = diffusion.num_steps - 1
    x = torch.randn(len(z), head.target_channels, generator=seeded(seed)).to(z)
    t = diffusion.timestep_map[last].to(z.device).expand(len(x))
    output = head.net(x, t, z)
    return float(diffusion.p_mean_variance(output, x, last, clip).x0.abs().max())
