"""The autoregressive loop: what each frame holds, what may depend on what, what is refused."""

import pytest
import torch
from golden_values import fill, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mar_mini import MAR, generate, sample
from mar_mini.diffloss import Head
from mar_mini.masking import ORDERS, mask_by_order, masked_after, tokens_per_step
from mar_mini.sampling import one_step
from mar_mini.transformer import Block

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
}
L, C = 16, 16  # tokens of an image, values of a token


def build(**changes) -> MAR:
    """A tiny model with weights that are nowhere zero, in eval mode."""
    return fill(MAR(**{**SIZES, **changes}), 7)


@pytest.fixture
def model():
    return build()


MODEL = build()  # for laws: hypothesis and fixtures do not mix
laws = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(model: MAR, labels=None, seed: int = 0, **arguments) -> torch.Tensor:
    """`generate` with a generator of that seed, four steps and a bound on x0."""
    arguments = {"generator": seeded(seed), "num_iter": 4, "clip": 1.0, **arguments}
    return generate(model, labels, **arguments)


def random_rows(batch_size: int, seed: int) -> torch.Tensor:
    """A permutation of the places for each image."""
    return ORDERS["random"](4, 4, batch_size, seeded(seed))


class Mean(Head):
    """A head of one's own: the best single guess, learned by least squares; notes what it is asked.

    asked  for each call of `sample`: how many tokens, with guidance or not, the arguments
    """

    def __init__(self, channels, z_channels, depth, width, num_sampling_steps, checkpointing):
        super().__init__()
        self.out = nn.Linear(z_channels, channels)
        self.asked = []

    def forward(self, target, z, mask=None, *, repeat=1, t=None, noise=None, generator=None):
        error = (self.out(z) - target).square().mean(1)
        return error.mean() if mask is None else error[mask].mean()

    def sample(self, z, z_uncond=None, **arguments):
        self.asked.append({"n": len(z), "guided": z_uncond is not None, **arguments})
        guess = self.out(z)
        if z_uncond is not None:
            guess = self.out(z_uncond) + arguments["cfg"] * (guess - self.out(z_uncond))
        return guess


# Frames ------------------------------------------------------------------------------------------


@given(
    num_iter=st.integers(1, L),
    batch_size=st.integers(1, 3),
    seed=seeds,
    cfg=st.sampled_from([1.0, 3.0]),
)
@laws
def test_frames_fill_the_image_in_order(num_iter, batch_size, seed, cfg):
    order = random_rows(batch_size, seed)
    frames = list(
        sample(
            MODEL,
            list(range(batch_size)),
            num_iter=num_iter,
            cfg=cfg,
            clip=1.0,
            order=order,
            generator=seeded(seed),
        )
    )
    counts = tokens_per_step(L, num_iter)
    tokens, mask, done = torch.zeros(batch_size, L, C), torch.ones(batch_size, L, dtype=bool), 0
    assert [frame.step for frame in frames] == list(range(num_iter))
    for frame, count in zip(frames, counts, strict=True):
        turn = order[:, done : done + count]
        assert torch.equal(frame.predicted, torch.zeros_like(mask).scatter(1, turn, True))
        assert torch.equal(frame.mask, mask & ~frame.predicted)
        assert torch.equal(frame.tokens[~frame.predicted], tokens[~frame.predicted])
        assert not frame.tokens[frame.mask].any()
        assert frame.tokens[frame.predicted].any(1).all()  # really drawn
        assert frame.tokens.dtype == torch.float32 and frame.tokens.isfinite().all()
        tokens, mask, done = frame.tokens, frame.mask, done + count
    assert not mask.any()


def test_generate_is_the_last_frame(model):
    *_, last = sample(model, [3, 4], num_iter=5, clip=1.0, generator=seeded())
    assert torch.equal(draw(model, [3, 4], num_iter=5), last.tokens)


@pytest.mark.parametrize("name", ORDERS)
def test_every_named_order_fills_the_image(model, name):
    frames = list(sample(model, [1], num_iter=L, clip=1.0, order=name, generator=seeded(2)))
    assert not frames[-1].mask.any()
    visited = torch.cat([frame.predicted[0].nonzero().flatten() for frame in frames])
    assert torch.equal(visited, ORDERS[name](4, 4, 1, seeded(2))[0])


def test_an_order_may_be_a_function(model):
    def columns(height, width, batch_size, generator):
        places = torch.arange(height * width).reshape(height, width)
        return places.T.flatten().expand(batch_size, -1)

    as_rows = columns(4, 4, 2, None)
    assert torch.equal(draw(model, [1, 2], order=columns), draw(model, [1, 2], order=as_rows))
    assert not torch.equal(draw(model, [1, 2], order=columns), draw(model, [1, 2], order="raster"))


# Random numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "raster"])
def test_a_seed_is_a_sample(model, order):
    first = draw(model, [1, 2], seed=5, cfg=2.0, order=order)
    assert torch.equal(draw(model, [1, 2], seed=5, cfg=2.0, order=order), first)
    assert not torch.equal(draw(model, [1, 2], seed=6, cfg=2.0, order=order), first)
    assert not torch.equal(draw(model, [1, 3], seed=5, cfg=2.0, order=order)[1], first[1])


IMAGES = [(3, 11), (7, 12), (-1, 13), (3, 14)]  # label and seed
ALONE = torch.cat(
    [draw(MODEL, [label], generator=[seeded(seed)], cfg=2.0) for label, seed in IMAGES]
)


@given(st.lists(st.integers(0, len(IMAGES) - 1), min_size=1, max_size=5))
@laws
def test_with_its_own_generator_an_image_depends_on_no_other(picked):
    """The random order is its own as well."""
    labels = [IMAGES[i][0] for i in picked]
    tokens = draw(MODEL, labels, generator=[seeded(IMAGES[i][1]) for i in picked], cfg=2.0)
    for got, alone in zip(tokens, ALONE[picked], strict=True):
        assert relative_error(got, alone) < 1e-5


def test_with_one_generator_it_does(model):
    """What the list is for: the second image of a batch is not the first of another."""
    pair = draw(model, [3, 7], seed=12)
    assert (draw(model, [7], seed=12)[0] - pair[1]).abs().max() > 1e-2
    single = draw(model, [7], generator=[seeded(12)])
    assert torch.equal(single, draw(model, [7], generator=seeded(12)))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize(("temperature", "draws"), [(0.0, 1), (0.5, 4), (1.0, 4)])
def test_how_much_is_drawn(model, temperature, draws, cfg):
    """At each step one initial noise; at temperature 0 nothing else, else one a diffusion step.

    The last diffusion step draws nothing, and guidance shares the noise of its halves.
    """
    g, by_hand = seeded(), seeded()
    draw(
        model, [1, 2, 3], num_iter=5, cfg=cfg, temperature=temperature, order="raster", generator=g
    )
    for count in tokens_per_step(L, 5):
        for _ in range(draws):
            torch.randn(3 * count, C, generator=by_hand)
    assert torch.equal(g.get_state(), by_hand.get_state())


def test_temperature_scales_what_is_injected(model):
    """Same noise, one token: the spread about the sample of temperature 0 grows with it."""
    cold, cool, warm = (
        draw(model, [1] * 64, temperature=value, num_iter=1) for value in (0.0, 0.1, 1.0)
    )
    assert 0 < (cool - cold).square().mean() < (warm - cold).square().mean()


# In-painting -------------------------------------------------------------------------------------


@given(data=st.data(), num_known=st.integers(0, L - 1), batch_size=st.integers(1, 3), seed=seeds)
@laws
def test_known_tokens_stay_to_the_bit(data, num_known, batch_size, seed):
    """And what stands at unknown places, NaN included, goes nowhere."""
    num_iter = data.draw(st.integers(1, L - num_known))
    rows = [data.draw(st.permutations(range(L)))[:num_known] for _ in range(batch_size)]
    known = torch.zeros(batch_size, L, dtype=torch.bool)
    for row, places in zip(known, rows, strict=True):
        row[list(places)] = True
    given_tokens = torch.randn(batch_size, L, C, generator=seeded(seed))
    order = random_rows(batch_size, seed)

    def paint(tokens):
        return list(
            sample(
                MODEL,
                [2] * batch_size,
                num_iter=num_iter,
                cfg=2.0,
                clip=1.0,
                tokens=tokens,
                known=known,
                order=order,
                generator=seeded(seed),
            )
        )

    frames = paint(given_tokens.masked_fill(~known[..., None], float("nan")))
    for frame in frames:
        assert torch.equal(frame.tokens[known], given_tokens[known])
        assert not (frame.predicted & known).any() and not (frame.mask & known).any()
        assert frame.tokens.isfinite().all()
    assert [int(f.predicted[0].sum()) for f in frames] == tokens_per_step(L - num_known, num_iter)
    assert not frames[-1].mask.any()
    assert torch.equal(paint(given_tokens)[-1].tokens, frames[-1].tokens)
    # the unknown places come in the turn that the order gives them
    for row in range(batch_size):
        turn = [int(place) for place in order[row] if not known[row, place]]
        done = 0
        for frame in frames:
            places = frame.predicted[row].nonzero().flatten().tolist()
            assert sorted(turn[done : done + len(places)]) == places
            done += len(places)


def test_given_tokens_matter(model):
    """The other half is painted to what is given, and the given tensors are not written to."""
    known = torch.arange(L).expand(2, -1) < 8
    tokens = torch.randn(2, L, C)
    before = tokens.clone()
    first = draw(model, [1, 1], tokens=tokens, known=known)
    second = draw(model, [1, 1], tokens=tokens.flip(0), known=known)
    assert torch.equal(tokens, before)
    assert (first[:, 8:] - second[:, 8:]).abs().max() > 1e-3


def test_nothing_known_is_like_nothing_given(model):
    nothing = torch.zeros(2, L, dtype=torch.bool)
    tokens = torch.full((2, L, C), float("nan"))
    assert torch.equal(draw(model, [1, 2], tokens=tokens, known=nothing), draw(model, [1, 2]))


def test_the_batch_follows_from_the_given_tokens(model):
    known = torch.arange(L).expand(3, -1) < 8
    tokens = torch.randn(3, L, C)
    want = draw(model, [-1, -1, -1], tokens=tokens, known=known)
    assert torch.equal(draw(model, tokens=tokens, known=known), want)


# What the encoder sees ---------------------------------------------------------------------------


@pytest.fixture
def half():
    """Tokens of two images and a mask that hides other places in each."""
    tokens = torch.randn(2, L, C)
    mask = torch.stack([torch.arange(L) % 2 == 0, torch.arange(L) < 8])
    return tokens, mask, torch.tensor([4, -1])


def compute_z(model, tokens, mask, labels):
    return model.forward_decoder(model.forward_encoder(tokens, mask, labels), mask)


@torch.no_grad()
def test_masked_tokens_are_never_seen(model, half):
    tokens, mask, labels = half
    z = compute_z(model, tokens, mask, labels)
    for other in (0.0, 1e6, float("inf"), float("nan")):
        changed = tokens.masked_fill(mask[..., None], other)
        assert torch.equal(compute_z(model, changed, mask, labels), z)


@torch.no_grad()
def test_every_known_token_is_seen_by_all_of_its_image(model, half):
    tokens, mask, labels = half
    z = compute_z(model, tokens, mask, labels)
    for image, place in (~mask).nonzero().tolist():
        changed = tokens.clone()
        changed[image, place, 0] += 1.0
        moved = (compute_z(model, changed, mask, labels) - z).abs().amax(-1)
        assert (moved[image] > 0).all()
        assert not moved[1 - image].any()


@torch.no_grad()
def test_the_class_is_seen(model, half):
    tokens, mask, labels = half
    z = compute_z(model, tokens, mask, labels)
    for other in ([5, -1], [4, 0]):
        moved = (compute_z(model, tokens, mask, torch.tensor(other)) - z).abs().amax(-1)
        assert (moved > 0).all(1).tolist() == [a != b for a, b in zip([4, -1], other, strict=True)]


def test_no_class_has_a_vector_of_its_own(model):
    got = model.class_embedding(torch.tensor([4, -1, 0]))
    assert torch.equal(got[[0, 2]], model.class_emb.weight[[4, 0]])
    assert torch.equal(got[1:2], model.fake_latent)


@torch.no_grad()
def test_z_stands_at_its_place(half):
    """Without blocks a token reaches its own place alone, and only if it is known."""
    tokens, mask, labels = half
    model = build(encoder_depth=0, decoder_depth=0)
    z = compute_z(model, tokens, mask, labels)
    for place in range(L):
        changed = tokens.clone()
        changed[:, place, 0] += 1.0
        moved = (compute_z(model, changed, mask, labels) - z).abs().amax(-1)
        for image in range(2):
            want = [] if mask[image, place] else [place]
            assert moved[image].nonzero().flatten().tolist() == want


@pytest.mark.parametrize("num_masked", [0, 1, 10, 16])
def test_the_encoder_gets_the_buffer_and_the_known_tokens(model, num_masked):
    mask = torch.arange(L).expand(3, -1) < num_masked
    encoded = model.forward_encoder(torch.randn(3, L, C), mask, torch.tensor([1, 2, 3]))
    assert encoded.shape == (3, 2 + L - num_masked, 32)
    assert model.forward_decoder(encoded, mask).shape == (3, L, 32)


# Guidance ----------------------------------------------------------------------------------------


def test_a_step_predicts_whose_turn_it_is_and_changes_nothing_it_was_given(model):
    order, labels = random_rows(2, 3), torch.tensor([3, -1])
    mask = mask_by_order(order, 9)
    tokens = torch.randn(2, L, C, generator=seeded(1)).masked_fill(mask[..., None], 0.0)
    copies = [x.clone() for x in (tokens, mask, order, labels)]
    new, after = one_step(model, labels, tokens, mask, order, 4, 2.0, generator=seeded(), clip=1.0)
    assert torch.equal(after, mask_by_order(order, 4))
    assert torch.equal((new != tokens).any(-1), mask & ~after)
    assert all(map(torch.equal, copies, (tokens, mask, order, labels)))


def test_weight_one_is_no_guidance(model):
    """To the bit where the weight is 1 throughout, closely where both halves are computed."""
    plain = draw(model, [1, 2])
    for cfg, schedule in ((1.0, "constant"), (1.0, "linear"), (5.0, lambda *_: 1.0)):
        assert torch.equal(draw(model, [1, 2], cfg=cfg, cfg_schedule=schedule), plain)
    both = draw(model, [1, 2], cfg_schedule=lambda *_: 1.0 + 1e-9)
    torch.testing.assert_close(both, plain, rtol=0, atol=1e-4)
    assert (draw(model, [1, 2], cfg=3.0) - plain).abs().max() > 1e-2


def test_weight_zero_is_the_image_without_class(model):
    """At temperature 0, where the variance, which stays that with class, plays no part."""
    unguided = draw(model, [-1, -1], temperature=0.0)
    guided = draw(model, [1, 2], temperature=0.0, cfg_schedule=lambda *_: 0.0)
    torch.testing.assert_close(guided, unguided, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_iter", [1, 3, 16])
def test_the_weight_of_each_step(num_iter):
    """A schedule is told how much is still masked after the step (1 in the last one)."""
    model, given_to = build(head=Mean), []
    masked = masked_after(L, num_iter)
    masked[-1] = 1

    def schedule(cfg, num_masked, length):
        given_to.append((cfg, num_masked, length))
        return 0.5 + num_masked

    draw(model, [1, 2], num_iter=num_iter, cfg=4.0, cfg_schedule=schedule)
    assert given_to == [(4.0, m, L) for m in masked]
    for name, want in {
        "constant": [4.0] * num_iter,
        "linear": [1 + 3.0 * (L - m) / L for m in masked],
        schedule: [0.5 + m for m in masked],
    }.items():
        model.diffloss.asked.clear()
        draw(model, [1, 2], num_iter=num_iter, cfg=4.0, cfg_schedule=name)
        assert [call["cfg"] for call in model.diffloss.asked] == pytest.approx(want)
        assert all(call["guided"] for call in model.diffloss.asked)


def test_guidance_while_painting_in_counts_what_is_left():
    model, asked = build(head=Mean), []
    known = torch.arange(L).expand(1, -1) < 12
    draw(
        model,
        [1],
        tokens=torch.zeros(1, L, C),
        known=known,
        num_iter=2,
        cfg=2.0,
        cfg_schedule=lambda *given_to: asked.append(given_to) or 1.5,
    )
    assert asked == [(2.0, masked_after(4, 2)[0], L), (2.0, 1, L)]


def test_no_class_is_the_label_minus_one(model):
    want = draw(model, [-1, -1])
    assert torch.equal(draw(model, batch_size=2), want)
    assert torch.equal(draw(model, batch_size=2, cfg=3.0), want)  # nothing to guide
    assert torch.equal(draw(model, torch.tensor([-1, -1]), cfg=3.0), want)
    assert (draw(model, [0, 0]) - want).abs().max() > 1e-2


# Modes and options -------------------------------------------------------------------------------


def test_dropout_is_off_while_sampling_and_on_again_after():
    model = build(attn_dropout=0.5, proj_dropout=0.5)
    want = draw(model, [1, 2])
    assert not model.training
    model.train()
    frames = []
    for frame in sample(model, [1, 2], num_iter=4, clip=1.0, generator=seeded()):
        assert all(module.training for module in model.modules())
        frames.append(frame)
    assert torch.equal(frames[-1].tokens, want)


def test_the_mode_is_restored_after_an_error():
    class Broken(Mean):
        def sample(self, z, z_uncond=None, **arguments):
            assert not self.training
            raise RuntimeError("out of paint")

    model = build(head=Broken).train()
    with pytest.raises(RuntimeError, match="out of paint"):
        draw(model, [1])
    assert model.training and model.diffloss.training


def test_no_gradient_is_recorded(model):
    assert not draw(model, [1]).requires_grad


def test_options_reach_the_head():
    model = build(head=Mean)
    g = seeded()
    draw(model, [1, 2], num_iter=2, temperature=0.7, clip=3.0, num_sampling_steps=9, generator=g)
    assert model.diffloss.asked == [
        {
            "n": 2 * count,
            "guided": False,
            "cfg": 1.0,
            "temperature": 0.7,
            "clip": 3.0,
            "num_sampling_steps": 9,
            "solver": "ddpm",
            "generator": g,
        }
        for count in tokens_per_step(L, 2)
    ]


def test_the_number_of_diffusion_steps(model):
    assert torch.equal(draw(model, [1], num_sampling_steps=4), draw(model, [1]))
    assert not torch.equal(draw(model, [1], num_sampling_steps=5), draw(model, [1]))


# Parts of one's own ------------------------------------------------------------------------------


def test_a_block_of_ones_own():
    seen = []

    class Noted(Block):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return super().forward(x)

    model = build(block=Noted, encoder_depth=2)
    assert all(type(b) is Noted for b in (*model.encoder_blocks, *model.decoder_blocks))
    mask = torch.arange(L).expand(2, -1) < 12
    model(torch.randn(2, 1, 16, 16), torch.tensor([1, 2]), model.draw(2, mask=mask))
    assert seen == [(2, 2 + 4, 32)] * 2 + [(2, 2 + L, 32)]
    seen.clear()
    draw(model, [1, 2], num_iter=2, order="raster")
    first = tokens_per_step(L, 2)[0]
    assert seen == [
        shape for known in (0, first) for shape in [(2, 2 + known, 32)] * 2 + [(2, 2 + L, 32)]
    ]
    plain = build(encoder_depth=2)
    # the last block of `plain` computes the wanted rows alone, which is rounded differently
    torch.testing.assert_close(draw(plain, [1, 2]), draw(model, [1, 2]), rtol=0, atol=1e-3)


def test_a_head_of_ones_own():
    """Its loss is over the masked tokens, its samples stand where they belong."""
    model = build(head=Mean)
    latents, labels = torch.randn(3, 1, 16, 16), torch.tensor([1, 2, 3])
    mask = random_rows(3, 0) < 11
    tokens = model.patchify(latents)
    guess = model.diffloss.out(compute_z(model, tokens, mask, labels))
    want = (guess - tokens)[mask].square().mean()
    torch.testing.assert_close(model(latents, labels, model.draw(3, mask=mask)), want)
    terms = model(latents, labels, model.draw(3, mask=mask), return_terms=True)
    assert terms.keys() == {"loss"}
    torch.testing.assert_close(terms["loss"], want)
    loss = model(latents, labels)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    order = random_rows(3, 1)
    frames = list(sample(model, labels, num_iter=3, order=order, generator=seeded()))
    mask = torch.ones(3, L, dtype=torch.bool)
    tokens = torch.zeros(3, L, C)
    for frame in frames:
        with torch.no_grad():
            guess = model.diffloss.out(compute_z(model, tokens, mask, labels))
        torch.testing.assert_close(frame.tokens[frame.predicted], guess[frame.predicted])
        tokens, mask = frame.tokens, frame.mask


# What is refused ---------------------------------------------------------------------------------

HALF = torch.arange(L).expand(2, -1) < 8
UNEVEN = torch.stack([torch.arange(L) < 8, torch.arange(L) < 9])
TOKENS = torch.zeros(2, L, C)
REFUSED = {
    "label too large": ({"labels": [1, 10]}, "label 10 is out of range; expected 0 to 9, or -1"),
    "label too small": ({"labels": [-2, 1]}, "label -2 is out of range; expected 0 to 9"),
    "labels of floats": ({"labels": torch.tensor([1.0, 2.0])}, "are torch.float32; expected whole"),
    "labels of bools": ({"labels": torch.tensor([True])}, "labels are torch.bool; expected"),
    "labels in two axes": ({"labels": torch.tensor([[1, 2]])}, r"shape \(1, 2\); expected \(B,\)"),
    "one label": ({"labels": torch.tensor(1)}, r"labels have shape \(\); expected \(B,\)"),
    "labels for another batch": ({"batch_size": 3}, r"labels have shape \(2,\); expected \(3,\)"),
    "nothing about the batch": ({"labels": None}, "batch_size is None; pass labels, or how many"),
    "no image": ({"labels": None, "batch_size": 0}, "batch_size is 0; pass labels, or how many"),
    "tokens of another shape": (
        {"tokens": torch.zeros(2, L, 4), "known": HALF},
        r"tokens have shape \(2, 16, 4\); expected \(2, 16, 16\)",
    ),
    "tokens for another batch": (
        {"tokens": torch.zeros(3, L, C), "known": HALF},
        r"\(3, 16, 16\); expected \(2, 16, 16\)",
    ),
    "tokens without known": ({"tokens": TOKENS}, "both `tokens` and `known`, or neither"),
    "known without tokens": ({"known": HALF}, "both `tokens` and `known`, or neither"),
    "known of ints": (
        {"tokens": TOKENS, "known": HALF.long()},
        r"known is torch.int64 \(2, 16\); expected bool \(2, 16\)",
    ),
    "known of another shape": (
        {"tokens": TOKENS, "known": HALF[:, :8]},
        r"known is torch.bool \(2, 8\); expected bool \(2, 16\), True = given",
    ),
    "known of different numbers": (
        {"tokens": TOKENS, "known": UNEVEN},
        "row 0 of known has 8 chosen tokens, row 1 has 9",
    ),
    "everything known": (
        {"tokens": TOKENS, "known": HALF | ~HALF},
        "every token is known: there is nothing to",
    ),
    "no step": ({"num_iter": 0}, "num_iter is 0; expected 1 to 16"),
    "too many steps": ({"num_iter": 17}, "num_iter is 17; expected 1 to 16, since each step"),
    "more steps than unknown": (
        {"num_iter": 9, "tokens": TOKENS, "known": HALF},
        "num_iter is 9; expected 1 to 8",
    ),
    "unknown order": ({"order": "zigzag"}, "unknown order 'zigzag'; expected one of: random, ras"),
    "order of another shape": (
        {"order": torch.arange(L).expand(3, -1)},
        r"shape \(3, 16\); expected \(2, 16\)",
    ),
    "order of floats": ({"order": torch.rand(2, L)}, "torch.float32; expected .*int64"),
    "order with a repetition": (
        {"order": torch.zeros(2, L, dtype=torch.int64)},
        "not a permutation of 0 to 15",
    ),
    "unknown guidance": (
        {"cfg_schedule": "cosine"},
        "unknown cfg_schedule 'cosine'; expected one of: linear, constant",
    ),
    "too many generators": (
        {"generator": [seeded(), seeded(), seeded()]},
        "3 generators for 2 images; pass one",
    ),
    "one diffusion step": ({"num_sampling_steps": 1}, "sampling_steps is 1; expected 2 to 1000"),
    "no diffusion step": ({"num_sampling_steps": 0}, "sampling_steps is 0; expected 2 to 1000"),
    "1001 diffusion steps": ({"num_sampling_steps": 1001}, "is 1001; expected 2 to 1000"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_sample_refuses(model, what):
    """At once, before the first frame is asked for."""
    changes, message = REFUSED[what]
    arguments = {"labels": [1, 2], "num_iter": 4, "generator": seeded(), **changes}
    with pytest.raises(ValueError, match=message):
        sample(model, **arguments)


def test_the_arguments_that_the_refusals_start_from_are_fine(model):
    assert len(list(sample(model, labels=[1, 2], num_iter=4, generator=seeded()))) == 4


def test_an_image_that_cannot_be_cut():
    with pytest.raises(ValueError, match="image size 30 .* = 4; crop or pad to 32"):
        build(img_size=30)
    with pytest.raises(ValueError, match="image size 2 .* = 4; crop or pad to 4"):
        build(img_size=2)


FORWARD = {
    "other size": (
        {"latents": torch.zeros(2, 1, 8, 8)},
        r"expected latents \(B, 1, 16, 16\), got \(2, 1, 8, 8\); encode, crop or resize",
    ),
    "other channels": (
        {"latents": torch.zeros(2, 3, 16, 16)},
        r"expected latents \(B, 1, 16, 16\), got \(2, 3, 16, 16\)",
    ),
    "label too large": ({"labels": torch.tensor([1, 10])}, "label 10 is out of range; expected 0"),
    "labels of floats": ({"labels": torch.tensor([1.0, 2.0])}, "labels are torch.float32"),
    "too few labels": ({"labels": torch.tensor([1])}, r"shape \(1,\); expected \(2,\), one for"),
}


@pytest.mark.parametrize("what", FORWARD)
def test_training_refuses(model, what):
    changes, message = FORWARD[what]
    arguments = {"latents": torch.zeros(2, 1, 16, 16), "labels": torch.tensor([1, 2]), **changes}
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_rows_of_different_lengths_are_refused(model):
    with pytest.raises(ValueError, match="row 0 of the mask has 8 chosen tokens, row 1 has 9"):
        model.draw(2, mask=UNEVEN)
    message = (
        "row 0 of the mask has [0-9]+ chosen tokens, row 1 has [0-9]+; expected the same number"
    )
    with pytest.raises(ValueError, match=message):
        model.forward_encoder(TOKENS, UNEVEN, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=message):
        model.forward_decoder(torch.zeros(2, 2 + 8, 32), UNEVEN)
