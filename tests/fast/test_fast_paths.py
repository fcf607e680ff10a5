"""Each fast path computes what the plain one does, and the published path computes the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_values import fill, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from published import (
    PublishedBlock,
    PublishedHead,
    PublishedMAR,
    PublishedTraining,
    generate,
    published_vae,
)

import mar_mini
from mar_mini import MAR, AutoencoderKL, masking
from mar_mini.diffloss import NUM_TIMESTEPS, DiffLoss, TimestepEmbedder
from mar_mini.fast import speed_up
from mar_mini.fast.compiling import COMPILERS, compile_model
from mar_mini.fast.dropout import FastDropout, drop
from mar_mini.fast.upsample import FoldedUpsample
from mar_mini.tokens import take
from mar_mini.transformer import Block
from mar_mini.vae import Upsample

SIZES = {
    "img_size": 32,
    "vae_stride": 4,
    "vae_embed_dim": 4,
    "class_num": 10,
    "encoder_embed_dim": 32,
    "encoder_depth": 2,
    "encoder_num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "buffer_size": 3,
    "diffloss_d": 2,
    "diffloss_w": 48,
    "num_sampling_steps": 4,
    "attn_dropout": 0.0,
    "proj_dropout": 0.0,
}
PARTS = {"block": PublishedBlock, "head": PublishedHead}


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# Dropout -----------------------------------------------------------------------------------------


@given(p=st.floats(0.01, 0.99), n=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_dropped_or_scaled_up(p, n):
    got = drop(torch.ones(n, 3), p)
    kept = got[got != 0]
    assert got.shape == (n, 3)
    if len(kept):
        assert (kept == kept[0]).all() and abs(float(kept[0]) * (1 - p) - 1) < 1e-3


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(p):
    n = 1_000_000
    got = drop(torch.ones(n), p)
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(float((got == 0).float().mean()) - p) < 5 * sigma
    # neighbours come from the same random number: they must not go together
    pairs = (got.view(-1, 2) == 0).all(1).float().mean()
    assert abs(float(pairs) - p * p) < 5 * (p * p * (1 - p * p) / (n / 2)) ** 0.5


@pytest.mark.parametrize(("p", "want"), [(0.0, 1.0), (1e-9, 1.0), (1.0, 0.0)])
def test_nothing_and_everything(p, want):
    assert (drop(torch.ones(1000), p) == want).all()


def test_the_gradient_passes_where_the_value_did():
    x = torch.randn(200, requires_grad=True)
    y = drop(x, 0.3)
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0) and (x.grad[y != 0] > 1).all()


def test_dropout_follows_the_seed_and_stops_after_training():
    block = Block(32, 2, attn_dropout=0.2, proj_dropout=0.2)
    speed_up(block)
    x = torch.randn(2, 5, 32)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(block(x))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    block.eval()
    assert torch.equal(block(x), block(x))


# Rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_some_rows_of_a_block(grad):
    block = fill(Block(32, 4), 3)
    x, rows = torch.randn(3, 9, 32), torch.tensor([[0, 4], [8, 1], [3, 2]])
    with torch.set_grad_enabled(grad):
        assert relative_error(block(x, rows), take(block(x), rows).detach()) < 1e-6


def test_gradients_of_some_rows():
    rows = torch.tensor([[0, 4, 5], [8, 1, 2]])
    results = []
    for forward in (lambda b, x: b(x, rows), lambda b, x: take(b(x), rows)):
        block = fill(Block(32, 4), 3)
        torch.manual_seed(1)
        x = torch.randn(2, 9, 32, requires_grad=True)
        forward(block, x).square().sum().backward()
        results.append({"x": x.grad, **gradients(block)})
    for name, want in results[1].items():
        assert relative_error(results[0][name], want) < 1e-5, name


@torch.no_grad()
def test_wanted_places_of_the_decoder():
    model = fill(MAR(**SIZES), 7)
    tokens, labels = torch.randn(2, 64, 4), torch.tensor([1, -1])
    order = masking.random(8, 8, 2)
    mask, wanted = masking.mask_by_order(order, 40), masking.mask_by_order(order, 5)
    encoded = model.forward_encoder(tokens, mask, labels)
    everywhere = model.forward_decoder(encoded, mask)
    got = model.forward_decoder(encoded, mask, wanted)
    assert relative_error(got, everywhere[wanted].unflatten(0, (2, -1))) < 1e-6
    wanted[0] = True
    with pytest.raises(ValueError, match="row 0 of the mask has 64 chosen tokens, row 1 has 5"):
        model.forward_decoder(encoded, mask, wanted)


class Doubles(Block):
    """A block of one's own that knows nothing of rows."""

    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
def test_a_block_that_knows_nothing_of_rows_is_still_asked():
    model = fill(MAR(**SIZES, block=Doubles), 7)
    x, rows = torch.randn(2, 9, 32), torch.tensor([[0, 4], [8, 1]])
    first, last = model.decoder_blocks
    got = model.run(model.decoder_blocks, x, rows)
    assert torch.equal(got, take(last(first(x)), rows))


# The head ----------------------------------------------------------------------------------------


def test_each_timestep_is_embedded_once():
    embed = fill(TimestepEmbedder(32), 5)
    t = torch.randint(NUM_TIMESTEPS, (3000,))
    assert relative_error(embed(t), torch.cat([embed(part) for part in t.split(500)])) < 1e-6


@pytest.mark.parametrize("masked", [False, True])
def test_repetitions_are_rows(masked):
    head = fill(DiffLoss(4, 16, 2, 24), 3)
    target, z = torch.randn(6, 4), torch.randn(6, 16)
    t, noise = torch.randint(NUM_TIMESTEPS, (18,)), torch.randn(18, 4)
    mask = torch.tensor([True, False, True, True, False, True]) if masked else None
    got = head.terms(target, z, mask, repeat=3, t=t, noise=noise)
    rows = [head.terms(target, z, mask, t=t[i : i + 6], noise=noise[i : i + 6]) for i in (0, 6, 12)]
    for name, value in got.items():
        want = torch.stack([row[name] for row in rows]).mean()
        assert relative_error(value, want) < 1e-5, name


# The autoencoder ---------------------------------------------------------------------------------


def test_upsampling_in_one_convolution():
    up, fast = fill(Upsample(6), 2), fill(Upsample(6), 2)
    speed_up(fast)
    x = torch.randn(2, 6, 5, 7)
    assert type(fast) is FoldedUpsample and list(fast.state_dict()) == list(up.state_dict())
    assert relative_error(fast(x), up.conv(F.interpolate(x, scale_factor=2.0))) < 1e-6
    assert relative_error(fast(x), up(x)) < 1e-6


def test_speeding_up_changes_classes_and_no_weights():
    model, plain = fill(MAR(**{**SIZES, "proj_dropout": 0.3}), 7), fill(MAR(**SIZES), 7)
    speed_up(model)
    kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert kinds == {FastDropout} and list(model.state_dict()) == list(plain.state_dict())
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    drawn = plain.eval().draw(2, torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(latents, labels, drawn), plain(latents, labels, drawn))
    assert not torch.equal(model.train()(latents, labels, drawn), plain(latents, labels, drawn))


# The published path ------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [{}, {"block": PublishedBlock}, {"head": PublishedHead}, PARTS])
@pytest.mark.parametrize("kind", [MAR, PublishedMAR])
def test_the_published_loss_and_its_gradients(kind, parts):
    latents, labels = torch.randn(3, 4, 8, 8), torch.tensor([1, -1, 4])
    mask = masking.mask_by_order(masking.random(8, 8, 3), 50)
    given = {
        "mask": mask,
        "t": torch.randint(NUM_TIMESTEPS, (4 * 3 * 64,)),
        "noise": torch.randn(4 * 3 * 64, 4),
    }
    losses, grads = [], []
    for model in (kind(**SIZES, **parts), MAR(**SIZES)):
        fill(model, 7)
        own = isinstance(model, PublishedMAR)  # draws for all tokens
        drawn = {} if own else {"drawn": model.draw(len(labels), **given)}
        losses.append(model(latents, labels, **(given if own else drawn)))
        losses[-1].backward()
        grads.append(gradients(model))
    assert relative_error(losses[0], losses[1]) < 1e-5
    assert grads[0].keys() == grads[1].keys()
    for name, want in grads[1].items():
        assert relative_error(grads[0][name], want) < 2e-3, name  # a sum of 800 rows in float32


def test_the_published_samples():
    settings = {"num_iter": 5, "cfg": 2.0, "num_sampling_steps": 6, "temperature": 0.0, "clip": 2.0}
    labels = torch.tensor([1, 2, 3])
    drawn = []
    for model, function in (
        (fill(PublishedMAR(**SIZES, **PARTS), 7), generate),
        (fill(MAR(**SIZES), 7), mar_mini.generate),
    ):
        generator = torch.Generator().manual_seed(1)
        drawn.append(function(model, labels, generator=generator, **settings))
    assert relative_error(*drawn) < 1e-4


def test_the_published_autoencoder():
    sizes = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 16}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    want, got = fill(AutoencoderKL(**sizes), 3), published_vae(fill(AutoencoderKL(**sizes), 3))
    a = want.decode(want.encode(images).mode())
    assert relative_error(got.decode(got.encode(images).mode()), a) < 1e-5
    assert type(got.decoder.up[1].upsample) is not type(want.decoder.up[1].upsample)


def test_the_published_optimiser_step():
    """One step of each from the same gradient: the same weights."""
    results = []
    for kind in ("published", "default"):
        model = fill(MAR(**SIZES), 7)
        if kind == "published":
            PublishedTraining(model, 1e-3).step(0.01 * sum(p.sum() for p in model.parameters()))
        else:
            optimiser = torch.optim.AdamW(
                model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02, fused=True
            )
            (0.01 * sum(p.sum() for p in model.parameters())).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimiser.step()
        results.append(model.state_dict())
    for name, want in results[1].items():
        assert relative_error(results[0][name], want) < 1e-6, name


@pytest.mark.parametrize("parts", [{"block": PublishedBlock}, {"head": PublishedHead}, PARTS])
def test_published_parts_in_the_default_sampler(parts):
    settings = {"num_iter": 5, "cfg": 2.0, "num_sampling_steps": 6, "temperature": 0.0, "clip": 2.0}
    drawn = [
        mar_mini.generate(
            fill(MAR(**SIZES, **given), 7),
            [1, 2],
            generator=torch.Generator().manual_seed(1),
            **settings,
        )
        for given in (parts, {})
    ]
    assert relative_error(*drawn) < 1e-4


# Compiling ---------------------------------------------------------------------------------------


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr("mar_mini.fast.compiling.shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C.. compiler .*apt-get install g"):
        compile_model(MAR(**SIZES))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_compiled_is_the_same_up_to_rounding():
    """In a process of its own: what enforces shapes in tests cannot be compiled."""
    call = "import test_fast_paths; test_fast_paths.compare_compiled()"
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(
        map(str, [tests / "fast", tests, tests.parent, tests.parent / "benchmarks"])
    )
    done = subprocess.run(
        [sys.executable, "-c", call],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def compare_compiled():
    latents, labels = torch.randn(3, 4, 8, 8), torch.tensor([1, -1, 4])
    mask = masking.mask_by_order(masking.random(8, 8, 3), 50)
    given = {
        "mask": mask,
        "t": torch.randint(NUM_TIMESTEPS, (4 * 3 * 64,)),
        "noise": torch.randn(4 * 3 * 64, 4),
    }
    plain, compiled = fill(MAR(**SIZES), 7), fill(MAR(**SIZES), 7)
    names = list(compiled.state_dict())
    compile_model(compiled)
    assert list(compiled.state_dict()) == names
    drawn = plain.draw(len(labels), **given)
    losses = [model(latents, labels, drawn) for model in (plain, compiled)]
    assert relative_error(losses[1], losses[0]) < 1e-5
    for loss in losses:
        loss.backward()
    for name, want in gradients(plain).items():
        assert relative_error(gradients(compiled)[name], want) < 2e-3, name
