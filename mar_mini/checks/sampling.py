"""Checks of chapter 8: one step, the weight of guidance in it, places that are known already."""

from itertools import product
from numbers import Real

import torch
from torch import Tensor

from mar_mini import MAR, masking, sampling
from mar_mini.checks import Failed, close, equal, exercise, refuse_mistakes, same_dtype, same_shape
from mar_mini.diffloss import Head, draw_noise
from mar_mini.mar import NO_CLASS

ONE_ROW = "the head wants one row for each token to predict, (B * K, E): flatten the first two axes"


class TraceHead(Head):
    """A head that answers at once, notes what it was asked, and shows each argument in its answer.

    Its answer is no linear function of z: guidance of z itself is not guidance of the answer.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        seeded = torch.Generator().manual_seed(8)
        self.register_buffer("weight", torch.randn(width, channels, generator=seeded))
        self.asked, self.guided = 0, False

    def sample(
        self,
        z,
        z_uncond=None,
        *,
        cfg=1.0,
        temperature=1.0,
        clip=None,
        num_sampling_steps=None,
        solver="ddpm",
        generator=None,
    ):
        for name, x in (("z", z), ("z_uncond", z_uncond)):
            if x is not None and x.dim() != 2:
                raise Failed(f"{name} has shape {tuple(x.shape)}; {ONE_ROW}")
        if z_uncond is not None and len(z_uncond) != len(z):
            raise Failed(f"z has {len(z)} rows and z_uncond {len(z_uncond)}; expected as many")
        self.asked, self.guided = self.asked + len(z), z_uncond is not None
        drawn = (z @ self.weight).tanh()
        if z_uncond is not None:
            uncond = (z_uncond @ self.weight).tanh()
            drawn = uncond + cfg * (drawn - uncond)
        noise = draw_noise(len(z), drawn.shape[1], generator, drawn)
        return drawn + temperature * noise + (0.0 if clip is None else clip)


class TraceMAR(MAR):
    """A model that says what does not fit together, before torch says it in numbers."""

    def forward_encoder(self, x=None, mask=None, labels=None, num_masked=None, **other):
        if other:
            raise Failed(
                f"forward_encoder has no argument {next(iter(other))!r}; it calls them x, mask, "
                "labels, in this order"
            )
        _fitting("the encoder", tokens=x, mask=mask, labels=labels)
        if labels.is_floating_point():
            raise Failed(
                f"the labels for the encoder are {labels.dtype}, expected int64: "
                "torch.full_like(labels, -1) keeps the type"
            )
        return super().forward_encoder(x, mask, labels, num_masked)

    def forward_decoder(self, x=None, mask=None, wanted=None, num_wanted=None):
        given = {} if wanted is None else {"wanted": wanted}
        _fitting("the decoder", x=x, mask=mask, **given)
        known = x.shape[1] - self.buffer_size
        if ((~mask).sum(1) != known).any():
            raise Failed(
                "the decoder gets another mask than the encoder did; both want the mask from "
                "before this step"
            )
        return super().forward_decoder(x, mask, wanted, num_wanted)


def _fitting(what: str, **given):
    """Expect tensors with equally many rows."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise Failed(f"{what} wants a tensor as {name}, and got {type(x).__name__}")
    rows = {name: len(x) for name, x in given.items()}
    if len(set(rows.values())) > 1:
        most = max(rows.values())
        few = [name for name, n in rows.items() if n < most]
        raise Failed(
            f"{what} gets {most} rows, but of {' and '.join(few)} {rows[few[0]]}: in a doubled "
            "batch all are doubled, in a single one none"
        )


def _model(side: int) -> MAR:
    """A tiny model with weights so large that all that comes in counts; side x side tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        model = TraceMAR(
            img_size=4 * side,
            vae_stride=1,
            patch_size=4,
            vae_embed_dim=1,
            class_num=4,
            encoder_embed_dim=16,
            encoder_depth=1,
            encoder_num_heads=2,
            decoder_embed_dim=16,
            decoder_depth=1,
            decoder_num_heads=2,
            buffer_size=2,
            diffloss_d=1,
            diffloss_w=16,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    model.diffloss = TraceHead(16, 16)
    return model.eval()


def _states(model: MAR) -> list[tuple[Tensor, Tensor, Tensor, int, float, float]]:
    """tokens, mask, order, num_masked, cfg, temperature: some steps, a first and a last one.

    What stands at masked places is anything, since nobody may use it.
    """
    seeded = torch.Generator().manual_seed(3)
    L, C = model.seq_len, model.token_embed_dim
    tokens, states = torch.randn(3, L, C, generator=seeded), []
    cases = (
        (11, 6, 2.0, 0.9),
        (L, 11, 3.0, 0.5),
        (6, 2, 1.5, 1.0),
        (5, 0, 4.0, 0.7),
        (9, 4, 1.0, 0.8),
    )
    for masked, num_masked, cfg, temperature in cases:
        if masked > L or num_masked >= L:
            continue
        order = masking.random(model.seq_h, model.seq_w, 3, seeded)
        mask = masking.mask_by_order(order, masked)
        states.append((tokens, mask, order, num_masked, cfg, temperature))
    return states


@exercise(reference=sampling.one_step)
def one_step(candidate):
    labels = torch.tensor([2, 0, 3])
    with torch.no_grad():
        for side in (4, 3):
            model = _model(side)
            for state in _states(model):
                _try_step(candidate, model, labels, *state)


def _try_step(candidate, model, labels, tokens, mask, order, num_masked, cfg, temperature):
    before = int(mask[0].sum())
    what = f"one_step ({before} tokens masked before, {num_masked} after, cfg {cfg:g})"
    given = {"labels": labels, "tokens": tokens, "mask": mask, "order": order}
    copies = {name: x.clone() for name, x in given.items()}
    seeded, model.diffloss.asked = torch.Generator().manual_seed(1), 0
    settings = {"temperature": temperature, "clip": 0.3, "generator": seeded}
    global_state = torch.random.get_rng_state()
    got = candidate(model, *copies.values(), num_masked, cfg, **settings)
    for name, x in given.items():
        if not torch.equal(copies[name], x):
            raise Failed(f"{what} changed the {name} it was given; write into a new tensor")
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Failed(f"{what} must return two things, the new tokens and the new mask")
    new, after = got
    if isinstance(new, Tensor) and new.dtype == torch.bool:
        raise Failed(f"{what} returns the mask first; expected the tokens, then the mask")
    still = masking.mask_by_order(order, num_masked)
    now, none = mask & ~still, torch.full_like(labels, NO_CLASS)
    first_turns = masking.mask_by_order(order.flip(1), num_masked)
    _try_mask(after, still, mask, now, first_turns, f"the mask of {what}")
    if model.diffloss.asked == 0:
        raise Failed(f"{what} does not ask the head: model.diffloss.sample draws the tokens")
    if model.diffloss.asked != now.sum():
        twice = model.diffloss.asked == 2 * now.sum()
        raise Failed(
            f"{what} lets the head draw {model.diffloss.asked} tokens, expected {int(now.sum())}: "
            + ("each once, in one call with both z" if twice else "those alone whose turn it is")
        )

    def z(labels=labels, tokens=tokens, mask=mask, wanted=now):
        x = model.forward_encoder(tokens, mask, labels)
        return model.forward_decoder(x, mask, wanted).flatten(0, 1)

    guided = model.diffloss.guided

    def head(z, z_uncond, scale=temperature, weight=cfg, clip=0.3):
        given = {"cfg": weight, "temperature": scale, "clip": clip}
        seeded = torch.Generator().manual_seed(1)
        return model.diffloss.sample(z, z_uncond, **given, generator=seeded)

    def filled(z, z_uncond, **changed):
        new = tokens.masked_scatter(now[..., None], head(z, z_uncond, **changed))
        return new.masked_fill(still[..., None], 0.0)  # nobody uses what is masked

    def doubled(classes, double):
        rows = [double(x) for x in (tokens, mask, now)]
        return filled(*z(classes, *rows).chunk(2))

    cond, uncond = z(), z(none)
    want = filled(cond, uncond)
    width = cond.shape[-1]
    rows = (len(labels), -1, width)
    turns = order[:, tokens.shape[1] - before :][:, : before - num_masked]
    index = turns[..., None].expand(-1, -1, tokens.shape[-1])
    by_turn = want.scatter(1, index, want[now].reshape(len(labels), -1, tokens.shape[-1]))
    one_way = cond.reshape(rows).transpose(0, 1).flatten(0, 1)
    first = now[:1].expand_as(now)
    head_of = torch.zeros_like(now)
    head_of[:, : before - num_masked] = True
    unguided = (
        "hands the head both z, but not cfg as it came"
        if guided
        else "has no guidance: run the model a second time with the label -1 for all images, and "
        "hand the head both z, and cfg"
    )
    mistakes = {
        unguided: filled(cond, None),
        "swaps z with class and z without: then guidance leads away from the class": (
            filled(uncond, cond)
        ),
        "has no class at all: z comes from the label -1": filled(uncond, uncond),
        "takes class 0 for `no class`; that is the label -1": filled(cond, z(0 * labels)),
        "guides z itself; hand the head both, it guides each prediction of the noise": (
            filled(uncond + cfg * (cond - uncond), None)
        ),
        "leaves out the settings: hand all of them on to the head": (
            filled(cond, uncond, scale=1.0, clip=None)
        ),
        "leaves out the temperature: hand all settings on to the head": (
            filled(cond, uncond, scale=1.0)
        ),
        "leaves out `clip`: hand all settings on to the head": filled(cond, uncond, clip=None),
        "tells the encoder that the tokens to predict are known; it must see the mask from before "
        "this step": _or_none(lambda: filled(z(mask=still), z(none, mask=still))),
        "forgets what is known: encode the tokens so far, not empty ones": (
            filled(z(tokens=0 * tokens), z(none, tokens=0 * tokens))
        ),
        "forgets what is known when it leaves out the class: the tokens are the same in both": (
            filled(cond, z(none, tokens=0 * tokens))
        ),
        "doubles each image at once (repeat_interleave), but the labels one after the other: "
        "classes belong to other images; torch.cat([x, x]) for all": doubled(
            torch.cat([labels, none]), lambda x: x.repeat_interleave(2, 0)
        ),
        "has the rows with class and without in turn, and cuts them in the middle; put all with "
        "class first": doubled(
            torch.stack([labels, none], 1).flatten(), lambda x: x.repeat_interleave(2, 0)
        ),
        "adds what was drawn to what stood there; what stands at a masked place means nothing": (
            want + tokens * now[..., None]
        ),
        "takes z of the first places of the picture, expected of those whose turn it is": (
            filled(z(wanted=head_of), z(none, wanted=head_of))
        ),
        "takes z of the places that the first image predicts, in all images": (
            filled(z(wanted=first), z(none, wanted=first))
        ),
        "writes the tokens in the order of their turns; z comes in ascending order of places": (
            by_turn
        ),
        "mixes up the images: the rows of z are image by image": filled(
            one_way, uncond.reshape(rows).transpose(0, 1).flatten(0, 1)
        ),
        "writes nothing: put what was drawn into its places": (
            tokens.masked_fill(still[..., None], 0.0)
        ),
    }
    same_shape(new, want.shape, f"the tokens of {what}")
    new = new.masked_fill(still[..., None], 0.0)
    refuse_mistakes(new, want, mistakes, what)
    if not torch.equal(new[~mask], tokens[~mask]):
        raise Failed(f"{what} changed tokens that were known; they stay to the bit")
    if seeded.get_state().equal(torch.Generator().manual_seed(1).get_state()):
        raise Failed(
            f"{what} draws nothing from the generator in `settings`; hand these on to the head"
        )
    if not torch.equal(global_state, torch.random.get_rng_state()):
        raise Failed(f"{what} draws from torch's global state; hand the generator to the head")
    plain, full = (filled(cond, uncond, weight=w)[now] for w in (0.0, 1.0))
    weight = float(((new[now] - plain) * (full - plain)).sum() / (full - plain).square().sum())
    if abs(weight - cfg) > 1e-3 and torch.allclose(
        new[now], plain + weight * (full - plain), rtol=1e-3, atol=1e-4
    ):
        raise Failed(f"{what} guides by {weight:.3g}; hand cfg on to the head as it came")
    _same_tokens(new, want, what)
    same_dtype(new, want.dtype, f"the tokens of {what}")


def _same_tokens(got: Tensor, want: Tensor, what: str):
    """Expect these tokens, close; the message says image, place and channel."""
    wrong = (~torch.isclose(got.double(), want.double(), rtol=1e-4, atol=1e-5)).nonzero()
    if len(wrong):
        image, place, channel = at = tuple(wrong[0].tolist())
        raise Failed(
            f"{what} gives the token of image {image} at place {place} the value {got[at]:.5g} in "
            f"channel {channel}, expected {want[at]:.5g} ({len(wrong)} of {want.numel()} are off)"
        )


def _or_none(make):
    """What comes of it, or None where such a mistake cannot even be made."""
    try:
        return make()
    except (ValueError, RuntimeError):
        return None


def _try_mask(got, still: Tensor, mask: Tensor, now: Tensor, first_turns: Tensor, what: str):
    same_shape(got, still.shape, what)
    same_dtype(got, torch.bool, what)
    mistakes = {
        "is the one from before: what was predicted is no longer masked": mask,
        "marks the tokens that this step predicts; expected those still masked after it": now,
        "masks everything: a slice that begins at -0 is the whole row": (
            still if still.any() else ~still
        ),
        "is upside down: True means masked": ~still if still.any() else still,
        "masks the places whose turn comes first; what is still masked is at the order's end": (
            first_turns
        ),
    }
    refuse_mistakes(got, still, mistakes, what)
    equal(got, still, what)


@exercise(reference=sampling.linear_cfg)
def linear_cfg(candidate):
    cases = [
        (w, n, L)
        for w, (n, L) in product(
            (3.0, 4.5, 1.0), ((1, 16), (16, 16), (5, 16), (48, 64), (0, 64), (100, 256))
        )
    ]
    got = []
    for w, n, L in cases:
        what = f"linear_cfg({w}, {n}, {L})"
        try:
            weight = candidate(w, n, L)
        except ZeroDivisionError as error:
            raise Failed(f"{what} divides by the number masked, expected by all") from error
        if isinstance(weight, Tensor) and weight.dim():
            raise Failed(f"{what} is a tensor of shape {tuple(weight.shape)}, expected a number")
        if isinstance(weight, bool) or not isinstance(weight, (Real, Tensor)):
            raise Failed(f"{what} is of type {type(weight).__name__}, expected a number")
        got.append(float(weight))
    got = torch.tensor(got, dtype=torch.float64)
    w, n, L = torch.tensor(cases, dtype=torch.float64).unbind(1)
    known, want = (L - n) / L, torch.tensor([sampling.linear_cfg(*case) for case in cases]).double()
    what = "linear_cfg(cfg, num_masked, length)"
    mistakes = {
        "falls with time: it follows the share that is masked, expected the share that is known": (
            1 + (w - 1) * n / L
        ),
        "starts at 0, which is the model without class; 1 means no guidance: add 1": (
            (w - 1) * known
        ),
        "goes from 0 to cfg; at weight 0 the class is left out, so begin at 1": w * known,
        "ends at 1 + cfg: only cfg - 1 is to be added to the 1": 1 + w * known,
        "is constant": w,
        "never guides": torch.ones_like(w),
        "counts the known tokens, expected their share of all": 1 + (w - 1) * (L - n),
        "divides by length - 1, as if the steps were counted; the share is of all tokens": (
            1 + (w - 1) * (L - n) / (L - 1)
        ),
        "divides without remainder (//), and so is 1 until nothing is masked": (
            1 + (w - 1) * ((L - n) // L)
        ),
        "goes from cfg down to 1; at the beginning little is known and the weight is low": (
            w - (w - 1) * known
        ),
        "multiplies up (cfg to the power of the share), expected a straight line": w**known,
        "is not a straight line: the share comes in squared": 1 + (w - 1) * known**2,
        "takes one token too many as known": 1 + (w - 1) * (L - n + 1) / L,
        "is one step late: it takes one token too few as known": 1 + (w - 1) * (L - n - 1) / L,
    }
    refuse_mistakes(got, want, mistakes, what)
    for case, value, wanted in zip(cases, got.tolist(), want.tolist(), strict=True):
        close(value, wanted, "linear_cfg({}, {}, {})".format(*case))


# height, width, images, known places; a sort that is not stable shows in long rows only
CASES = ((4, 4, 3, 6), (2, 3, 5, 1), (3, 5, 2, 14), (4, 4, 2, 0), (16, 16, 2, 100))


@exercise(reference=masking.known_first)
def known_first(candidate):
    seeded = torch.Generator().manual_seed(4)
    for height, width, rows, count in CASES:
        order = masking.random(height, width, rows, seeded)
        known = ~masking.mask_by_order(
            masking.random(height, width, rows, seeded), height * width - count
        )
        what = f"known_first(order, known) with {count} known of {height * width} places"
        given = order.clone(), known.clone()
        got = candidate(*given)
        for name, x, y in zip(("order", "known"), given, (order, known), strict=True):
            if not torch.equal(x, y):
                raise Failed(f"{what} changed the {name} it was given; write into a new tensor")
        want = masking.known_first(order, known)
        if isinstance(got, Tensor) and tuple(got.shape) == (rows, height * width - count) != (
            tuple(want.shape)
        ):
            raise Failed(f"{what} has the unknown places alone; the known ones stand before them")
        same_shape(got, want.shape, what)
        same_dtype(got, torch.int64, what)
        by_turn = known.gather(1, order)
        raster = (~known).int().argsort(dim=1, stable=True)
        mistakes = {
            "has the unknown places first: then the first step would draw what is given": (
                masking.known_first(order, ~known)
            ),
            "leaves the order as it was: a known place may stand behind unknown ones": order,
            "reads `known` by turn, but its entries belong to places: gather it in the order": (
                order.gather(1, raster)
            ),
            "forgets the order: unknown places come row by row, expected in their turn": raster,
            "turns the order round: unknown places keep their turn": (
                masking.known_first(order.flip(1), known)
            ),
            "has turns in place of places: take the order's entries at these turns": (
                (~by_turn).int().argsort(dim=1, stable=True)
            ),
            "says for each place when its turn comes, expected at each turn the place": (
                want.argsort(dim=1)
            ),
            "moves the places of the first image to the front in all images": (
                masking.known_first(order, known[:1].expand_as(known))
            ),
            "uses the first image's order for all": (
                masking.known_first(order[:1].expand_as(order), known)
            ),
        }
        mistakes = {idea: _front_sorted(x, count) for idea, x in mistakes.items()}
        # known places are never drawn: among themselves they may stand in any order
        got, want = _front_sorted(got, count), _front_sorted(want, count)
        refuse_mistakes(got, want, mistakes, what)
        if len(order[0]) > 100 and torch.equal(got.sort(1).values, want.sort(1).values):
            front = known.gather(1, got)[:, :count].all()
            if front and not torch.equal(got, want):
                raise Failed(
                    f"{what} loses the turns of the unknown places; a sort keeps them if it is "
                    "stable"
                )
        if not torch.equal(got.sort(dim=1).values, order.sort(dim=1).values):
            raise Failed(f"{what} is not an order: each row must have each place once")
        equal(got, want, what)


def _front_sorted(order: Tensor, count: int) -> Tensor:
    return torch.cat([order[:, :count].sort(dim=1).values, order[:, count:]], dim=1)
