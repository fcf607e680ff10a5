"""The training loop: repeatable, within its budget, averaged as said, and it learns."""

import math
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from golden_values import fill
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mar_mini import MAR, AutoencoderKL, train_mar, train_vae, training
from mar_mini.checks.mar import step_by_hand
from mar_mini.configs import TrainingConfig
from mar_mini.data import InMemory, coins
from mar_mini.diffloss import Head
from mar_mini.training import (
    averaging,
    batch_indices,
    learning_rate,
    parameter_groups,
    progress,
    step_generator,
)

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
}
CPU = torch.device("cpu")
LATENTS = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
LABELS = torch.arange(8)
FIVE = TrainingConfig(batch_size=4, learning_rate=1e-3, max_steps=5, precision="float32")


def changed(config: TrainingConfig = FIVE, **changes) -> TrainingConfig:
    return TrainingConfig(**{**vars(config), **changes})


def build(**changes) -> MAR:
    """A tiny model, the same each time; its weights are nowhere zero."""
    return fill(MAR(**{**SIZES, **changes}), 7)


def train(model: MAR, config: TrainingConfig = FIVE, **arguments) -> list[training.Step]:
    return list(train_mar(model, LATENTS, LABELS, config, **arguments))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Repeatable --------------------------------------------------------------------------------------


def test_a_seed_is_a_run():
    """To the bit, whatever else draws random numbers meanwhile."""
    model = build()
    losses = [step.loss for step in train(model, seed=3)]
    torch.manual_seed(99)
    again = build()
    repeated = []
    for step in train_mar(again, LATENTS, LABELS, FIVE, seed=3):
        repeated.append(step.loss)
        torch.rand(1)
        again.eval()  # a caller may look at it in between
    assert repeated == losses
    assert same(weights(again), weights(model))
    others = [step.loss for step in train(build(), seed=4)]
    assert all(a != b for a, b in zip(others, losses, strict=True))
    assert len(set(losses)) == 5


def test_a_seed_is_a_run_with_dropout_too():
    losses = []
    for state in (1, 2):
        torch.manual_seed(state)
        losses.append([step.loss for step in train(build(proj_dropout=0.1), seed=3)])
    assert losses[0] == losses[1]


def test_training_leaves_the_global_random_state_alone():
    model, before = build(), torch.get_rng_state()
    train(model, changed(flip=True))
    assert torch.equal(torch.get_rng_state(), before)


@given(num_images=st.integers(1, 40), batch_size=st.integers(1, 60), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_each_image_comes_once_in_an_epoch(num_images, batch_size, seed):
    steps = math.ceil(3 * num_images / batch_size)
    seen = [batch_indices(seed, step, num_images, batch_size) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in seen)
    flat = torch.cat(seen).tolist()
    for epoch in range(3):
        of_epoch = flat[epoch * num_images : (epoch + 1) * num_images]
        assert sorted(of_epoch) == list(range(num_images))


def test_each_epoch_and_each_seed_has_its_own_order():
    orders = [batch_indices(seed, step, 50, 50).tolist() for seed in (0, 1) for step in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    assert batch_indices(0, 1, 50, 50).tolist() == orders[1]


def test_each_step_has_its_own_random_numbers():
    """Of 400 pairs of seed and step no two begin alike; seed and step do not swap roles."""
    first = {
        (seed, step): float(torch.rand((), generator=step_generator(seed, step)))
        for seed in range(20)
        for step in range(20)
    }
    assert len(set(first.values())) == 400
    assert first[3, 5] == float(torch.rand((), generator=step_generator(3, 5)))


# Learning rate and budget ------------------------------------------------------------------------


def test_learning_rate():
    cosine = changed(learning_rate=2.0, warmup=0.1)
    rates = [learning_rate(cosine, used) for used in (0.0, 0.05, 0.1, 0.325, 0.55, 0.775, 1.0)]
    half = math.sqrt(0.5)
    want = [0.002, 1.002, 2.0, 1 + half, 1.0, 1 - half, 0.0]
    assert rates == pytest.approx(want, abs=1e-12)
    constant = changed(learning_rate=2.0, warmup=0.1, decay="constant")
    rates = [learning_rate(constant, used) for used in (0.0, 0.05, 0.1, 0.5, 1.0)]
    assert rates == pytest.approx([0.002, 1.002, 2.0, 2.0, 2.0])
    assert learning_rate(changed(learning_rate=2.0, warmup=0.0), 0.0) == 2.0


def test_the_rate_that_is_used():
    config = changed(max_steps=10, warmup=0.2)
    steps = train(build(), config)
    assert [s.learning_rate for s in steps] == [learning_rate(config, i / 10) for i in range(10)]
    # with betas (0.9, 0.95) the first step of Adam moves each weight by the rate, or not at all
    model = build()
    before = weights(model)
    next(train_mar(model, LATENTS, LABELS, changed(config, weight_decay=0.0)))
    moved = torch.cat([(p - before[name]).abs().flatten() for name, p in weights(model).items()])
    # (moves of 1e-6 on weights near 1 are rounded to multiples of 6e-8)
    assert moved.max() == pytest.approx(1e-6, rel=0.15)
    assert moved.median() == pytest.approx(1e-6, rel=0.15)


def test_a_budget_of_steps():
    steps = train(build(), changed(max_steps=7))
    assert [s.step for s in steps] == list(range(1, 8))
    assert [s.progress for s in steps] == pytest.approx([i / 7 for i in range(1, 8)])
    assert [s.images_seen for s in steps] == [4 * i for i in range(1, 8)]
    assert all(a.seconds < b.seconds for a, b in zip(steps, steps[1:], strict=False))


def test_a_budget_of_seconds(monkeypatch):
    """A clock that advances 1/8 s in each step: what the caller does meanwhile is not counted."""
    now = [100.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(Noted):
        def forward(self, target, z, mask=None, **given):
            now[0] += 0.125
            return super().forward(target, z, mask, **given)

    steps = []
    config = changed(max_steps=None, max_seconds=0.5)
    for step in train_mar(build(head=Slow), LATENTS, LABELS, config):
        steps.append(step)
        now[0] += 10.0
    assert [s.seconds for s in steps] == [0.125, 0.25, 0.375, 0.5]
    assert [s.progress for s in steps] == [0.25, 0.5, 0.75, 1.0]
    # the rate follows the budget
    assert [s.learning_rate for s in steps] == [learning_rate(config, i / 4) for i in range(4)]


def test_a_budget_of_real_seconds():
    start = time.perf_counter()
    seconds = [
        s.seconds
        for s in train_mar(build(), LATENTS, LABELS, changed(max_steps=None, max_seconds=0.3))
    ]
    assert all(s < 0.3 for s in seconds[:-1])
    assert 0.3 <= seconds[-1] <= time.perf_counter() - start


def test_whichever_budget_ends_first():
    both = changed(max_steps=10, max_seconds=2.0)
    assert progress(both, 5, 0.2) == 0.5
    assert progress(both, 1, 1.5) == 0.75
    assert progress(both, 11, 0.0) == progress(both, 0, 2.5) == 1.0
    assert len(train(build(), changed(max_steps=2, max_seconds=1000.0))) == 2


# Optimiser ---------------------------------------------------------------------------------------


def test_what_is_decayed():
    model = build()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, other = (
        (group["weight_decay"], {names[id(p)] for p in group["params"]})
        for group in parameter_groups(model, 0.3)
    )
    linear = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert decayed == (
        0.3,
        {
            "fake_latent",
            "mask_token",
            "encoder_pos_embed_learned",
            "decoder_pos_embed_learned",
            "diffusion_pos_embed_learned",
            "class_emb.weight",
            "z_proj.weight",
            "decoder_embed.weight",
            *(
                f"{half}_blocks.0.{name}.weight"
                for half in ("encoder", "decoder")
                for name in linear
            ),
        },
    )
    assert other == (0.0, set(names.values()) - decayed[1])
    assert {"diffloss.net.input_proj.weight", "encoder_norm.weight", "z_proj.bias"} <= other[1]


def test_decay_shrinks():
    """What has no gradient is multiplied by 1 - rate * decay: here the unused classes."""
    model = build(label_drop_prob=0.0)
    before = weights(model)["class_emb.weight"]
    (step,) = train(model, changed(max_steps=1, weight_decay=0.5, learning_rate=1.0, warmup=0.0))
    after = weights(model)["class_emb.weight"]
    torch.testing.assert_close(after[8:], before[8:] * 0.5)
    assert step.learning_rate == 1.0


def test_against_a_plain_loop():
    """Four steps of PyTorch's own AdamW on the same batches: the same weights."""
    config = changed(max_steps=4, warmup=0.3, weight_decay=0.1, grad_clip=0.5, learning_rate=1e-2)
    ours, plain = build(), build().train()
    steps = train(ours, config, seed=3)
    matrices = [p for n, p in plain.named_parameters() if p.ndim > 1 and "diffloss" not in n]
    others = [p for n, p in plain.named_parameters() if not (p.ndim > 1 and "diffloss" not in n)]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    for i in range(4):
        picked = batch_indices(3, i, 8, 4)
        loss = plain(LATENTS[picked], LABELS[picked], generator=step_generator(3, i))
        for p in plain.parameters():
            p.grad = None
        loss.backward()
        assert float(nn.utils.clip_grad_norm_(plain.parameters(), 0.5)) > 0.5  # clips indeed
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, i / 4)
        optimiser.step()
        assert steps[i].loss == pytest.approx(float(loss.detach()), rel=1e-4)
    for (name, got), want in zip(weights(ours).items(), weights(plain).values(), strict=True):
        if name.endswith("qkv.bias"):  # the keys' has no gradient but rounding errors
            got, want = torch.cat([got[:32], got[64:]]), torch.cat([want[:32], want[64:]])
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_gradients_are_clipped():
    model = build()
    norms = []
    for step in train_mar(model, LATENTS, LABELS, changed(grad_clip=0.01)):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append((step.grad_norm, float(nn.utils.get_total_norm(grads))))
    assert all(before > 0.01 for before, _ in norms)
    assert [after for _, after in norms] == pytest.approx([0.01] * 5, rel=1e-3)


# Weight average ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "window"), [(0.9999, 0.1), (0.5, 1.0), (0.99, 0.5)])
def test_averaging_against_a_loop_over_numbers(decay, window):
    values = [[1.0, -2.0], [4.0, 0.5], [2.0, 8.0], [-3.0, 1.0], [0.0, 5.0], [6.0, 6.0]]
    want = values[0]
    averaged = [torch.tensor(want[:1]), torch.tensor(want[1:])]
    update = averaging(decay, window)
    for n, value in enumerate(values[1:], start=1):
        keep = min(decay, window * n / (1 + window * n))
        want = [keep * w + (1 - keep) * v for w, v in zip(want, value, strict=True)]
        update(averaged, [torch.tensor(value[:1]), torch.tensor(value[1:])], torch.tensor(n))
        assert torch.cat(averaged).tolist() == pytest.approx(want)


def test_a_training_step_is_that_of_a_training():
    """Loss by loss the same weights and average as a whole training, from the function alone."""
    config = changed(max_steps=4)
    whole, model = build(), build().train()
    states = list(train_mar(whole, LATENTS, LABELS, config, seed=3))
    ema = AveragedModel(model, multi_avg_fn=averaging(config.ema_decay, config.ema_window))
    groups = parameter_groups(model, config.weight_decay)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for step, state in enumerate(states):
        picked = batch_indices(3, step, len(LATENTS), config.batch_size)
        drawn = model.draw(len(picked), step_generator(3, step))
        got = step_by_hand(
            model,
            optimiser,
            partial(model, LATENTS[picked], LABELS[picked], drawn),
            ema.update_parameters,
            rate=learning_rate(config, step / 4),
            grad_clip=config.grad_clip,
        )
        assert float(got) == pytest.approx(state.loss, rel=1e-5) and not got.requires_grad
    for mine, theirs in ((model, whole), (ema.module, states[-1].ema)):
        for name, x in weights(theirs).items():
            torch.testing.assert_close(weights(mine)[name], x, rtol=1e-4, atol=1e-6)


def test_the_averaged_model():
    """After three steps: by hand from the weights after each."""
    model, history = build(), []
    config = changed(max_steps=3, ema_decay=0.6, ema_window=1.0)
    for step in train_mar(model, LATENTS, LABELS, config):
        history.append(weights(model))
        ema = step.ema
    averaged = weights(ema)
    assert ema is not model and averaged.keys() == history[0].keys()
    for name, got in averaged.items():
        first, second, third = (state[name] for state in history)
        half = (first + second) / 2  # keep 1 - 1 / 2, then 1 - 1 / 3 but at most 0.6
        torch.testing.assert_close(got, 0.6 * half + 0.4 * third, rtol=1e-6, atol=1e-7)
    assert not same(averaged, history[-1])


def test_the_averaged_model_is_one_object():
    steps = train(build())
    assert all(step.ema is steps[0].ema for step in steps)


# Losses that are not numbers ---------------------------------------------------------------------


def until_it_stops(model, latents=LATENTS, config=FIVE):
    """The error of a run, and its step and weights before it."""
    state, steps = weights(model), []
    run = train_mar(model, latents, LABELS, config)
    with pytest.raises(FloatingPointError) as error:
        for step in run:
            steps.append(step)
            state, averaged = weights(model), weights(step.ema)
    assert same(weights(model), state)
    assert not steps or same(weights(steps[-1].ema), averaged)
    return str(error.value), len(steps)


def test_a_broken_image_stops_the_run():
    """The message names the step, and the weights are still good."""
    latents = LATENTS.clone()
    in_step_3 = int(batch_indices(0, 2, 8, 2)[0])
    latents[in_step_3] = float("nan")
    message, done = until_it_stops(build(), latents, changed(batch_size=2))
    assert done == 2
    assert message.startswith("step 3: loss is nan")
    assert "lower the learning rate" in message


class Breaks(Head):
    """A head whose loss goes wrong in the third step."""

    def __init__(self, channels, z_channels, depth, width, num_sampling_steps, checkpointing):
        super().__init__()
        self.out = nn.Linear(z_channels, channels)
        self.calls = 0

    def forward(self, target, z, mask=None, *, repeat=1, t=None, noise=None, generator=None):
        self.calls += 1
        loss = (self.out(z) - target).square().mean()
        return self.wrong(loss) if self.calls == 3 else loss


class Infinite(Breaks):
    def wrong(self, loss):
        return loss * math.inf


class FiniteButSteep(Breaks):
    def wrong(self, loss):
        return (loss - loss).sqrt()  # 0, with a slope that is not a number


@pytest.mark.parametrize(
    ("head", "message"), [(Infinite, "loss is inf"), (FiniteButSteep, "gradient's norm nan")]
)
def test_a_head_that_breaks_stops_the_run(head, message):
    got, done = until_it_stops(build(head=head))
    assert done == 2
    assert got.startswith("step 3: ") and message in got


# What is refused ---------------------------------------------------------------------------------

REFUSED = {
    "no budget": ({"max_steps": None}, "no budget: set max_steps or max_seconds"),
    "no steps": ({"max_steps": 0}, "max_steps is 0; expected more than 0"),
    "negative steps": ({"max_steps": -1}, "max_steps is -1; expected more than 0"),
    "negative seconds": ({"max_seconds": -0.5}, "max_seconds is -0.5; expected more than 0"),
    "batch too large": ({"batch_size": 9}, "batch_size is 9; expected 1 to 8, the number of"),
    "empty batch": ({"batch_size": 0}, "batch_size is 0; expected 1 to 8"),
    "unknown decay": ({"decay": "linear"}, "unknown decay 'linear'; expected one of: cosine"),
    "unknown precision": (
        {"precision": "fp16"},
        "unknown precision 'fp16'; expected one of: auto, float32, bf16",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_are_refused(what):
    changes, message = REFUSED[what]
    model = build()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        next(train_mar(model, LATENTS, LABELS, changed(**changes)))
    with pytest.raises(ValueError, match=message):
        next(train_vae(tiny_vae(), LATENTS, changed(**changes)))
    assert same(weights(model), before)


def test_settings_are_refused_at_once():
    with pytest.raises(ValueError, match="no budget"):
        train_mar(build(), LATENTS, LABELS, changed(max_steps=None))


def test_a_label_for_each_image():
    with pytest.raises(ValueError, match="8 images but 7 labels; expected one for each"):
        train_mar(build(), LATENTS, LABELS[:7], FIVE)


def test_labels_out_of_range():
    with pytest.raises(ValueError, match="label 12 is out of range; expected 0 to 9"):
        next(train_mar(build(), LATENTS, LABELS + 5, changed(batch_size=8)))


# Mirrored images ---------------------------------------------------------------------------------


def test_about_half_are_mirrored():
    images = torch.arange(40.0).reshape(20, 1, 1, 2)
    picked = torch.randint(20, (2000,))
    flip = coins(2000, torch.Generator().manual_seed(0))
    got = InMemory(images, torch.zeros(20).long()).batch(picked, flip)
    straight = (got == images[picked]).flatten(1).all(1)
    mirrored = (got == images.flip(-1)[picked]).flatten(1).all(1)
    assert (straight ^ mirrored).all()
    assert abs(int(mirrored.sum()) - 1000) < 5 * math.sqrt(2000 / 4)


class Noted(Head):
    """A head that remembers its targets."""

    def __init__(self, channels, z_channels, depth, width, num_sampling_steps, checkpointing):
        super().__init__()
        self.out = nn.Linear(z_channels, channels)
        self.targets = []

    def forward(self, target, z, mask=None, *, repeat=1, t=None, noise=None, generator=None):
        self.targets.append(target.clone())
        return self.out(z).square().mean()


def targets_of(latents, config, **arguments) -> torch.Tensor:
    """Everything that the head was taught in a run, (steps, images, tokens, C)."""
    model = build(head=Noted, mask_ratio_min=1.0, diffusion_batch_mul=1)
    list(train_mar(model, latents, LABELS, config, **arguments))
    return torch.stack(model.diffloss.targets).unflatten(1, (-1, model.seq_len))


@pytest.mark.parametrize(
    ("flip", "lowest", "highest"), [(False, 0, 0), (True, 80 - 5 * 6.3, 80 + 5 * 6.3)]
)
def test_mirrored_latents_are_used_if_asked_for(flip, lowest, highest):
    """160 images, so 80 mirrored ones with a standard deviation of sqrt(160 / 4) = 6.3."""
    config = changed(batch_size=8, max_steps=20, flip=flip)
    targets = targets_of(torch.zeros(8, 1, 16, 16), config, mirrored=torch.ones(8, 1, 16, 16))
    marks = targets.flatten(2)
    assert (marks == marks[..., :1]).all()  # an image is mirrored as a whole
    assert lowest <= int(marks[..., 0].sum()) <= highest


def test_pixels_are_mirrored_left_to_right():
    config = changed(batch_size=8, max_steps=1, flip=True)
    targets = targets_of(LATENTS, config)[0]
    picked = batch_indices(0, 0, 8, 8)
    model = build()
    straight, mirrored = (model.patchify(x[picked]) for x in (LATENTS, LATENTS.flip(-1)))
    kinds = [
        (torch.equal(got, s), torch.equal(got, m))
        for got, s, m in zip(targets, straight, mirrored, strict=True)
    ]
    assert set(kinds) == {(True, False), (False, True)}


# Precision ---------------------------------------------------------------------------------------


def test_bfloat16_trains_too():
    """Close to float32 but not the same, with weights that stay float32."""
    full, model = train(build()), build()
    steps = train(model, changed(precision="bf16"))
    assert steps[0].loss != full[0].loss
    assert steps[0].loss == pytest.approx(full[0].loss, rel=0.02)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not same(weights(model), weights(build()))


@pytest.mark.parametrize("hardware", [True, False])
def test_the_automatic_precision_follows_the_hardware(monkeypatch, hardware):
    monkeypatch.setattr(training, "multiplies_bf16", lambda device: hardware)
    product = {}
    for precision in ("auto", "float32", "bf16"):
        with training.autocast(precision, CPU):
            product[precision] = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    assert product["float32"] == torch.float32 and product["bf16"] == torch.bfloat16
    assert product["auto"] == (torch.bfloat16 if hardware else torch.float32)


# Learning ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tiny_model_learns_eight_images_by_heart():
    torch.manual_seed(0)
    model = MAR(**{**SIZES, "encoder_embed_dim": 64, "decoder_embed_dim": 64, "diffloss_w": 64})
    config = changed(batch_size=8, max_steps=150, learning_rate=3e-3, ema_window=0.1)
    steps = train(model, config)
    first = sum(step.loss for step in steps[:10]) / 10
    last = sum(step.loss for step in steps[-10:]) / 10
    assert last < first / 2
    assert all(step.terms.keys() == {"loss", "mse", "vb"} for step in steps)
    assert all(
        step.loss == pytest.approx(step.terms["mse"] + step.terms["vb"], rel=1e-5) for step in steps
    )


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        ch=16,
        ch_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(),
        resolution=16,
        z_channels=4,
        in_channels=1,
        num_groups=8,
    )


def smooth_images(n: int) -> torch.Tensor:
    """Waves of random direction, in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 6, 16), torch.linspace(0, 6, 16), indexing="ij")
    a, b, c = torch.rand(3, n, 1, 1, 1, generator=torch.Generator().manual_seed(5))
    return torch.sin((2 * a - 1) * y + (2 * b - 1) * x + 6 * c)


@pytest.mark.slow
def test_an_autoencoder_learns_to_reconstruct():
    images, vae = smooth_images(64), tiny_vae()

    def error(model) -> float:
        with torch.no_grad():
            return float((model.decode(model.encode(images).mode()) - images).square().mean())

    before = error(vae)
    config = changed(batch_size=16, max_steps=80, learning_rate=2e-3, flip=True)
    steps = list(train_vae(vae, images, config))
    assert before > 0.4  # about the variance of the images
    assert error(vae) < before / 5
    assert error(steps[-1].ema) < before / 5
    for step in steps:
        terms = step.terms
        assert terms["loss"] == pytest.approx(terms["mse"] + 1e-4 * terms["kl"], rel=1e-5)
        assert step.loss == terms["loss"]


def test_the_terms_of_an_autoencoder():
    """The KL divergence is in nats for each latent value."""
    images, vae = smooth_images(8), tiny_vae()
    with torch.no_grad():
        posterior = vae.encode(images[batch_indices(0, 0, 8, 4)])
    variance, mean = posterior.logvar.exp(), posterior.mean
    assert mean.shape == (4, 4, 8, 8)
    want = float((0.5 * (mean**2 + variance - 1 - posterior.logvar)).mean())
    step = next(train_vae(vae, images, changed(kl_weight=0.25)))
    assert step.terms["kl"] == pytest.approx(want, rel=1e-4)
    assert step.loss == pytest.approx(step.terms["mse"] + 0.25 * want, rel=1e-4)


def test_the_weight_of_the_kl_term():
    """A heavy one presses the latents to the standard normal."""

    def kl(weight: float) -> float:
        config = changed(max_steps=30, learning_rate=3e-3, kl_weight=weight)
        *_, last = train_vae(tiny_vae(), smooth_images(8), config)
        return last.terms["kl"]

    assert kl(10.0) < 0.2 * kl(0.0)
