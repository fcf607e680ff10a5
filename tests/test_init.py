"""How fresh models start: the distribution of every parameter, against golden/README.md.

All bounds are five standard errors of the statistic, so that they follow from the tensor's size.
"""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from mar_mini import MAR, AutoencoderKL
from mar_mini.diffloss import DiffLoss, Head

ERRORS = 5  # standard errors that a statistic may be off


def is_constant(x: Tensor, value: float) -> None:
    assert (x == value).all(), f"expected {value} everywhere, got {x.min():.3g} to {x.max():.3g}"


def is_normal(x: Tensor, std: float) -> None:
    n = x.numel()
    assert abs(float(x.mean())) < ERRORS * std / math.sqrt(n)
    assert abs(float(x.std()) / std - 1) < ERRORS / math.sqrt(2 * n)
    beyond = float((x.abs() > 2 * std).float().mean())  # 4.55% of a normal, nothing of a uniform
    assert abs(beyond - 0.0455) < ERRORS * math.sqrt(0.0455 * 0.9545 / n)


def is_uniform(x: Tensor, bound: float) -> None:
    n, largest = x.numel(), float(x.abs().max())
    assert bound * (1 - 10 / n) < largest <= bound * (1 + 1e-6)  # short of it with chance e^-10
    assert abs(float(x.mean())) < ERRORS * bound / math.sqrt(3 * n)
    assert abs(float(x.std()) * math.sqrt(3) / bound - 1) < ERRORS * math.sqrt(0.2 / n)


def is_xavier(x: Tensor) -> None:
    """Glorot & Bengio 2010, eq. 16."""
    is_uniform(x, math.sqrt(6 / (x.shape[0] + x.shape[1])))


RULES = {  # the first that matches a parameter's name holds
    "the head's last layer and adaLN zero": (
        r"diffloss\.net\..*adaLN_modulation\.1\.\w+|diffloss\.net\.final_layer\.linear\.\w+",
        lambda x: is_constant(x, 0.0),
    ),
    "time MLP normal": (
        r"diffloss\.net\.time_embed\.mlp\.[02]\.weight",
        lambda x: is_normal(x, 0.02),
    ),
    "tables and tokens normal": (
        r"class_emb\.weight|fake_latent|mask_token|\w+_pos_embed_learned",
        lambda x: is_normal(x, 0.02),
    ),
    "norms one": (r"(.*[._])?(norm\d?|ln)\.weight", lambda x: is_constant(x, 1.0)),
    "biases zero": (r".*\.bias", lambda x: is_constant(x, 0.0)),
    "linear layers xavier": (r".*\.weight", is_xavier),
}
HOW_MANY = {
    "the head's last layer and adaLN zero": 2 * (2 + 2),  # 2 blocks, final adaLN and linear
    "time MLP normal": 2,
    "tables and tokens normal": 6,
    "norms one": 4 * 2 + 3 + 2,  # 4 transformer blocks, 3 beside them, 2 of the head's blocks
    "biases zero": 4 * 6 + 5 + (2 + 2 + 2 * 3),
    "linear layers xavier": 4 * 4 + 2 + (2 + 2 * 2),
}


@pytest.fixture(scope="module")
def mar():
    torch.manual_seed(0)
    return MAR(
        img_size=32,
        vae_stride=1,
        patch_size=4,
        vae_embed_dim=3,
        class_num=100,
        encoder_embed_dim=256,
        encoder_depth=2,
        encoder_num_heads=4,
        decoder_embed_dim=192,
        decoder_depth=2,
        decoder_num_heads=4,
        buffer_size=8,
        diffloss_d=2,
        diffloss_w=128,
    )


def rule_of(name: str) -> str:
    return next(rule for rule, (pattern, _) in RULES.items() if re.fullmatch(pattern, name))


@pytest.mark.parametrize("rule", RULES)
def test_parameters_of_mar(mar, rule):
    named = {name: p.detach() for name, p in mar.named_parameters() if rule_of(name) == rule}
    assert len(named) == HOW_MANY[rule], sorted(named)
    for name, parameter in named.items():
        try:
            RULES[rule][1](parameter)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_parameters_of_vae():
    """PyTorch's own: convolutions uniform up to 1 / sqrt(fan in), weight and bias."""
    vae = AutoencoderKL(ch=32, ch_mult=(1, 2), resolution=32, attn_resolutions=(16,), z_channels=4)
    convolutions = [module for module in vae.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == sum(p.ndim == 4 for p in vae.parameters()) == 28 + 24 + 2
    for conv in convolutions:
        bound = 1 / math.sqrt(conv.in_channels * math.prod(conv.kernel_size))
        is_uniform(conv.weight.detach(), bound)
        assert float(conv.bias.detach().abs().max()) <= bound
    biases = [
        conv.bias.detach() * math.sqrt(conv.in_channels * math.prod(conv.kernel_size))
        for conv in convolutions
    ]  # a few numbers each: all of them together are uniform up to 1
    is_uniform(torch.cat(biases), 1.0)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            is_constant(module.weight.detach(), 1.0)
            is_constant(module.bias.detach(), 0.0)


def test_bounds_are_those_of_a_fresh_convolution():
    """The formula above, against PyTorch."""
    fresh = nn.Conv2d(24, 64, 3)
    is_uniform(fresh.weight.detach(), 1 / math.sqrt(24 * 9))
    with pytest.raises(AssertionError):
        is_uniform(nn.init.xavier_uniform_(fresh.weight).detach(), 1 / math.sqrt(24 * 9))


DRAWN = torch.Generator().manual_seed(0)
NORMAL = torch.randn(10_000, generator=DRAWN)
UNIFORM = torch.rand(10_000, generator=DRAWN) * 2 - 1


@pytest.mark.parametrize(
    ("judge", "x", "right"),
    [
        (lambda x: is_normal(x, 1.0), NORMAL, True),
        (lambda x: is_normal(x, 1.0), 1.1 * NORMAL, False),
        (lambda x: is_normal(x, 1.0), NORMAL + 0.1, False),
        (lambda x: is_normal(x, 1.0), 3**0.5 * UNIFORM, False),  # of the same mean and std
        (lambda x: is_uniform(x, 1.0), UNIFORM, True),
        (lambda x: is_uniform(x, 1.0), 0.99 * UNIFORM, False),
        (lambda x: is_uniform(x, 1.0), 1.01 * UNIFORM, False),
        (lambda x: is_uniform(x, 1.0), UNIFORM**3, False),
    ],
)
def test_the_statistics_can_fail(judge, x, right):
    try:
        judge(x)
    except AssertionError:
        assert not right
    else:
        assert right


def test_a_fresh_head_predicts_nothing():
    head = DiffLoss(16, 48, depth=3, width=64)
    x, z = torch.randn(20, 16), torch.randn(20, 48)
    assert not head.net(x, torch.randint(1000, (20,)), z).any()


def test_mse_of_a_fresh_model_is_one(mar):
    """It predicts no noise where there is standard normal noise."""
    latents, labels = torch.randn(16, 3, 32, 32).clamp(-1, 1), torch.arange(16)
    mask = torch.rand(16, 64).argsort(1) < 50
    terms = mar.train()(latents, labels, mar.draw(len(labels), mask=mask), return_terms=True)
    values = mar.diffusion_batch_mul * int(mask.sum()) * mar.token_embed_dim
    assert abs(float(terms["mse"].detach()) - 1) < ERRORS * math.sqrt(2 / values)
    assert values > 100_000


def test_a_head_of_ones_own_keeps_its_start():
    class Sevens(Head):
        def __init__(self, channels, width, depth, hidden, num_sampling_steps, checkpointing):
            super().__init__()
            self.out = nn.Linear(width, channels)
            nn.init.constant_(self.out.weight, 7.0)
            nn.init.constant_(self.out.bias, 7.0)

    model = MAR(
        img_size=8,
        vae_stride=1,
        patch_size=4,
        vae_embed_dim=1,
        class_num=2,
        encoder_embed_dim=8,
        encoder_depth=1,
        encoder_num_heads=2,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
        buffer_size=1,
        head=Sevens,
    )
    is_constant(model.diffloss.out.weight, 7.0)
    is_constant(model.diffloss.out.bias, 7.0)
