"""A residual sum, gated or not, and the modulated norm of it: one operator between the branches of a block."""

import copy
import pickle

import pytest
import torch
from torch import nn

from braze.kernels import fuse, unfuse, use_backend

from .test_fuse_modulated import WIDTH, C, Rms, X, assert_same, made, modulate

LAYER, RMS = "add_modulated_layer_norm", "add_modulated_rms_norm"


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6), Rms(WIDTH)
        self.affine, self.condition = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.attn, self.mlp, self.again = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dual = False
        for parameter in self.parameters():
            nn.init.normal_(parameter)


class Helped(Base):
    """As in DiT."""

    def forward(self, x, c):
        shift, scale, gate, gate2 = self.condition(c).chunk(4, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(x)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm(x), shift, scale))


class Statements(Base):
    """As in FLUX, and in Stable Diffusion 3."""

    def forward(self, x, c):
        shift, scale, gate, gate2 = self.condition(c).chunk(4, dim=1)
        y = self.attn(x)
        y = gate.unsqueeze(1) * y
        x = x + y
        if self.dual:
            x = x + self.again(x)
        h = self.affine(x)
        h = h * (1 + scale[:, None]) + shift[:, None]
        return x + gate2.unsqueeze(1) * self.mlp(h)


class Ungated(Base):
    def forward(self, x, c):
        shift, scale, _, _ = self.condition(c).chunk(4, dim=1)
        h = self.attn(x) + x
        y = self.rms(h) * (1 + scale[:, None]) + shift[:, None]
        return h + self.mlp(y)


class Unshifted(Base):
    """The sum is not used again."""

    def forward(self, x, c):
        scale, gate, _, _ = self.condition(c).chunk(4, dim=1)
        x = self.attn(x) * gate[:, None] + x
        x = self.rms(x) * (1 + scale[:, None])
        return self.mlp(x)


OPERATORS = {Helped: LAYER, Statements: LAYER, Ungated: RMS, Unshifted: RMS}
each = pytest.mark.parametrize("kind", OPERATORS, ids=lambda kind: kind.__name__)


def joined(report):
    return [r.now for r in report.fused if r.now.startswith("add_modulated")]


@each
def test_sum_and_modulated_norm_are_one_operator_and_compute_the_same(kind, runs):
    model = made(kind)
    plain = copy.deepcopy(model)
    assert joined(fuse(model)) == [OPERATORS[kind]]
    for one in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        runs.clear()
        assert_same(one, plain)
        assert runs.count(OPERATORS[kind]) == 1
        assert not {"modulated_layer_norm", "modulated_rms_norm", "layer_norm", "rms_norm"} & set(runs)
    unfuse(model)
    assert torch.equal(model(X, C), plain(X, C))


def test_what_a_flag_turns_on_later_runs_between_them(runs):
    model = made(Statements)
    plain = copy.deepcopy(model)
    fuse(model)
    for dual in (True, False):
        model.dual = plain.dual = dual
        runs.clear()
        assert_same(model, plain)
        assert (LAYER in runs) is not dual


class Between(Base):
    """The norm would run before what changes its input."""

    def forward(self, x, c):
        shift, scale, gate, _ = self.condition(c).chunk(4, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(x)
        x.mul_(2.0)
        return self.mlp(modulate(self.norm(x), shift, scale))


class Ahead(Base):
    """A module that runs before the norm."""

    def forward(self, x, c):
        shift, scale, gate, _ = self.condition(c).chunk(4, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(x)
        return self.again(x) + self.mlp(modulate(self.norm(x), shift, scale))


class Computed(Base):
    """Rows that are computed behind the sum."""

    def forward(self, x, c):
        x = x + self.attn(x)
        return modulate(self.norm(x), self.mlp(c), self.again(c))


class OfTheSum(Base):
    """Rows that are the sum's."""

    def forward(self, x, c):
        x = x + self.attn(x)
        return self.norm(x) * (1 + x[:, :1]) + x[:, 1:2]


class Maybe(Base):
    """A norm that may not run."""

    def forward(self, x, c):
        shift, scale, gate, _ = self.condition(c).chunk(4, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(x)
        return modulate(self.norm(x), shift, scale) if self.dual else x


class Branches(Base):
    def forward(self, x, c):
        shift, scale, gate, _ = self.condition(c).chunk(4, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(x)
        if self.dual:
            x = x + 1
        else:
            x = x * 2
            x = x + 2
        return modulate(self.norm(x), shift, scale)


LOOKALIKES = [Between, Ahead, Computed, OfTheSum, Maybe, Branches]


@pytest.mark.parametrize("kind", LOOKALIKES, ids=lambda kind: kind.__name__)
def test_lookalikes_are_left(kind):
    model = made(kind)
    plain = copy.deepcopy(model)
    assert joined(fuse(model)) == []
    assert_same(model, plain)


@each
def test_hooks_fire_in_order_and_what_is_put_in_later_runs(kind):
    model = made(kind)
    plain = copy.deepcopy(model)
    fuse(model)
    for one in (model, plain):
        one.seen = []
        for name in ("norm", "rms", "attn", "mlp"):
            getattr(one, name).register_forward_hook(lambda *_, one=one, name=name: one.seen.append(name))
        one.affine = nn.Tanh()
    assert_same(model, plain)
    assert model.seen == plain.seen


@each
def test_what_broadcasts_otherwise_is_computed_as_ever(kind):
    """A condition of one sample for all; and a dtype that the original widens."""
    model = made(kind)
    plain = copy.deepcopy(model)
    fuse(model)
    assert_same(model, plain, c=C[:1])
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(X.float(), C.float()).dtype == plain.float()(X.float(), C.float()).dtype


@each
def test_it_compiles_without_a_break(kind):
    model = made(kind)
    plain = copy.deepcopy(model)
    fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, C), plain(X, C))


def test_on_an_example_it_is_verified_and_tells_what_the_batch_saves():
    report = fuse(made(Statements), example=(X, C))
    (record,) = (r for r in report.fused if r.now == LAYER)
    assert record.saving.unit == "batch"
    # In the place of gate, sum, norm and modulation, each of which reads and writes all elements.
    assert record.saving.traffic > 8 * X.numel() * X.itemsize
    assert record.check.results > 0
