"""The checks of chapter 4 refuse plausible mistakes, each by the name of its idea."""

import pytest
import torch
from torch import nn

from mar_mini import diffloss
from mar_mini.checks import Failed
from mar_mini.checks import diffloss as check


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("MAR_MINI_STRICT", "1")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, shift, scale: x * scale + shift, "expected 1 \\+ scale: at scale = 0"),
        (lambda x, shift, scale: (x + shift) * (1 + scale), "scales the shift as well"),  # < 10%
        (lambda x, shift, scale: x * (1 + shift) + scale, "for each other"),
        (lambda x, shift, scale: x * scale.exp() + shift, "exp\\(scale\\)"),  # < 10% where small
        (lambda x, shift, scale: x * (1 + scale), "leaves the shift out"),
        (lambda x, shift, scale: x * (1 + scale + shift), "shift into the brackets"),
        (lambda x, shift, scale: x * (1 + scale) - shift, "subtracts the shift"),
        (lambda x, shift, scale: x.sum() + shift, r"scale, modulate\(x, shift, scale\)\[0, 0\] is"),
        (lambda x, shift, scale: x.mul_(1 + scale).add_(shift), "changed the x"),
        (lambda x, shift, scale: x * (1 + scale[0]) + shift[0], "first row's"),
    ],
)
def test_modulate(wrong, message):
    with pytest.raises(Failed, match=message):
        check.modulate(wrong)


class Base(diffloss.ResBlock):
    """Parameters as they should be; each wrong idea writes its own forward."""

    def parts(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return gate, self.mlp(diffloss.modulate(self.in_ln(x), shift, scale))


class NoGate(Base):
    def forward(self, x, y):
        return x + self.parts(x, y)[1]


class NoResidual(Base):
    def forward(self, x, y):
        gate, h = self.parts(x, y)
        return gate * h


class OnePlusGate(Base):
    def forward(self, x, y):
        gate, h = self.parts(x, y)
        return x + (1 + gate) * h


class NormalisedResidual(Base):
    def forward(self, x, y):
        gate, h = self.parts(x, y)
        return self.in_ln(x) + gate * h


class NoNorm(Base):
    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(diffloss.modulate(x, shift, scale))


class NoNormPlain(Base):
    """The same, written as a learner does: it rounds differently."""

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(x * (1 + scale) + shift)


class GatesInput(Base):
    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + self.mlp(gate * (self.in_ln(x) * (1 + scale) + shift))


class ModulatesOutput(Base):
    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * (self.mlp(self.in_ln(x)) * (1 + scale) + shift)


class CutsRows(Base):
    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class ScaleFirst(Base):
    def forward(self, x, y):
        scale, shift, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(diffloss.modulate(self.in_ln(x), shift, scale))


class GateFirst(Base):
    def forward(self, x, y):
        gate, shift, scale = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(diffloss.modulate(self.in_ln(x), shift, scale))


class OtherEpsilon(Base):
    """The default epsilon of torch: off by less than 10%, and where x is small only."""

    def __init__(self, width):
        super().__init__(width)
        self.in_ln = nn.LayerNorm(width)


class Detached(Base):
    def forward(self, x, y):
        return super().forward(x, y).detach()


class OtherNames(diffloss.ResBlock):
    def __init__(self, width):
        super().__init__(width)
        self.norm = self.in_ln
        del self.in_ln


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (NoGate, "leaves the gate out"),
        (NoResidual, "leaves the residual connection out"),
        (OnePlusGate, "multiplies by 1 \\+ gate"),
        (NormalisedResidual, "adds to the normalised x"),
        (NoNorm, "does not normalise x"),
        (NoNormPlain, "does not normalise x.*in_ln is left out"),
        (GatesInput, "gates what goes into the MLP"),
        (ModulatesOutput, "modulates what comes out of the MLP"),
        (CutsRows, r"cut the columns into shift, scale and gate.*chunk\(3, dim=-1\)"),
        (ScaleFirst, "the first third is the shift"),
        (GateFirst, "the order is shift, scale, gate"),
        (OtherEpsilon, "expected"),
        (Detached, "passes no gradient"),
        (OtherNames, "other parameters"),
        (Base.forward, "expected a class"),
    ],
)
def test_res_block(wrong, message):
    with pytest.raises(Failed, match=message):
        check.ResBlock(wrong)


def of_rows(name, choose):
    def wrong(head, target, z, mask, *, t, noise):
        return choose(head.token_terms(target, z, t=t, noise=noise)[name], mask)

    return wrong


def clean_input(head, target, z, mask, *, t, noise):
    x_t = head.diffusion.q_sample(target, t, noise)
    return head.diffusion.loss(head.net(target, t, z), target, x_t, t, noise)["loss"][mask].mean()


def noise_left_behind(head, target, z, mask, *, t, noise):
    target, z, t = target[mask], z[mask], t[mask]
    return head(target, z, t=t, noise=noise[: len(t)])


def only_two_chosen(head, target, z, mask, *, t, noise):
    x_t = target[mask] + noise  # what q_sample says without the types that tests enforce
    return head.diffusion.loss(head.net(x_t, t, z[mask]), target[mask], x_t, t, noise)["loss"]


def three_chosen(head, target, z, mask, *, t, noise):
    target, t, noise = target[mask], t[mask], noise[mask]
    x_t = head.diffusion.q_sample(target, t, noise)
    return head.diffusion.loss(head.net(x_t, t, z), target, x_t, t, noise)["loss"].mean()


def loss_turned_round(head, target, z, mask, *, t, noise):
    target, z, t, noise = (rows[mask] for rows in (target, z, t, noise))
    x_t = head.diffusion.q_sample(target, t, noise)
    return head.diffusion.loss(head.net(x_t, t, z), x_t, target, t, noise)["loss"].mean()


def dictionary(head, target, z, mask, *, t, noise):
    return head.token_terms(target[mask], z[mask], t=t[mask], noise=noise[mask])


def own_noise(head, target, z, mask, *, t, noise):
    return head(target, z, mask)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (of_rows("loss", lambda rows, mask: rows.mean()), "averages over all tokens"),
        (of_rows("loss", lambda rows, mask: (rows * mask).mean()), "divides by the number of all"),
        (of_rows("loss", lambda rows, mask: rows[mask].sum()), "sums over the masked"),
        (of_rows("loss", lambda rows, mask: rows[~mask].mean()), "over the known tokens"),
        (of_rows("mse", lambda rows, mask: rows[mask].mean()), "leaves out the variance's part"),
        (of_rows("loss", lambda rows, mask: rows[mask].mean().detach()), "carries no gradient"),
        (clean_input, "clean target"),
        (noise_left_behind, "choose their rows by the mask"),
        (own_noise, "another number each time"),
        (only_two_chosen, "choose the rows of all four"),
        (three_chosen, "choose the rows of all four"),
        (loss_turned_round, "x_t and target to the loss in the wrong order"),  # < 0.1%
        (dictionary, "returns the whole dictionary; take its `loss`"),
        (of_rows("loss", lambda rows, mask: rows[mask]), "a value for each token; expected their"),
        (of_rows("loss", lambda rows, mask: rows[mask].mean().item()), "of type float"),
    ],
)
def test_masked_loss(wrong, message):
    with pytest.raises(Failed, match=message):
        check.masked_loss(wrong)


def guided(noise, v=lambda cond, uncond: cond):
    def wrong(output, cfg):
        cond, uncond = output.chunk(2)
        (noise_c, v_c), (noise_u, v_u) = cond.chunk(2, dim=1), uncond.chunk(2, dim=1)
        return torch.cat([noise(noise_c, noise_u, cfg), v(v_c, v_u)], dim=1)

    return wrong


def all_of_it(output, cfg):
    cond, uncond = output.chunk(2)
    return uncond + cfg * (cond - uncond)


def every_variance(output, cfg):
    return torch.cat([all_of_it(output, cfg)[:, :3], output[:, 3:]], dim=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (guided(lambda c, u, w: c + w * (c - u)), "starts from the conditional noise"),  # < 10%
        (guided(lambda c, u, w: u + w * (u - c)), "pushes away from the condition"),
        (guided(lambda c, u, w: c + w * (u - c)), "other way round"),
        (all_of_it, "guides the variance too"),  # off by less than 10%
        (guided(lambda c, u, w: u + w * (c - u), lambda c, u: u), "unconditional rows' variance"),
        (guided(lambda c, u, w: c), "leaves the noise unguided"),
        (guided(lambda c, u, w: w * c), "multiplies the conditional noise"),
        (guided(lambda c, u, w: u + w * c), "adds cfg times the whole conditional noise"),
        (lambda output, cfg: diffloss.guide(output, cfg)[:, :3], "the variance is missing"),
        (lambda output, cfg: diffloss.guide(output, cfg).roll(3, 1), "puts the variance first"),
        (lambda output, cfg: all_of_it(output, cfg).repeat(2, 1), "as many rows as came in"),
        (every_variance, "join N rows of noise"),
        (lambda output, cfg: diffloss.guide(output.flip(0), cfg).flip(0), "for each other"),
    ],
)
def test_guide(wrong, message):
    with pytest.raises(Failed, match=message):
        check.guide(wrong)


class Mine(diffloss.ResBlock):
    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


def test_right_solutions_pass():
    def modulate(x, shift, scale):
        return x * (1 + scale) + shift

    def masked_loss(head, target, z, mask, *, t, noise):
        rows = head.token_terms(target, z, t=t, noise=noise)["loss"]
        return (rows * mask).sum() / mask.sum()

    right_guide = guided(lambda c, u, w: w * c + (1 - w) * u)
    for test, mine in (
        (check.modulate, modulate),
        (check.ResBlock, Mine),
        (check.masked_loss, masked_loss),
        (check.guide, right_guide),
    ):
        assert test(mine) is mine
        assert test(test.reference) is test.reference
