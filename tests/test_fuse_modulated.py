"""fuse in diffusion transformers: norms with a scale and a shift from a condition, whatever the spelling."""

import copy
import pickle

import pytest
import torch
from torch import nn

from braze.benchmarks.zoo.diffusion import DiT
from braze.kernels import fuse, unfuse, use_backend

WIDTH = 8


@pytest.fixture(autouse=True)
def eager():
    with use_backend("eager"):
        yield


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulate_rows(x, scale, shift):
    return torch.addcmul(shift, x, scale + 1.0)


def modulate_half(x, shift, scale):
    return x * (1 + 0.5 * scale.unsqueeze(1)) + shift.unsqueeze(1)


class Rms(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.g, self.tiny = nn.Parameter(torch.randn(width)), 1e-4

    def forward(self, x):
        return self.g * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.tiny)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6), Rms(WIDTH)
        self.affine, self.condition = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)
        for parameter in self.parameters():
            nn.init.normal_(parameter)


class Helped(Base):
    def forward(self, x, c):
        shift, scale = self.condition(c).chunk(2, dim=1)
        return self.mlp(modulate(self.norm(x), shift, scale))


class HelpedRows(Base):
    def forward(self, x, c):
        scale, shift = self.condition(c).unsqueeze(1).chunk(2, dim=-1)
        return modulate_rows(self.rms(x), scale, shift)


class Inline(Base):
    def forward(self, x, c):
        shift, scale = self.condition(c).chunk(2, dim=1)
        x = self.affine(x) * (1 + scale[:, None]) + shift[:, None]
        return x


class Outside(Base):
    def forward(self, x, c):
        scale, shift = self.condition(c).chunk(2, dim=1)
        return shift[:, None, :] + (scale + 1)[:, None, :] * self.rms(x)


class Statements(Base):
    def forward(self, x, c):
        shift, scale = self.condition(c).chunk(2, dim=1)
        h = self.norm(x)
        h = h * (1 + scale[:, None]) + shift[:, None]
        return x + self.mlp(h)


class OtherName(Base):
    def forward(self, x, c):
        shift, scale = self.condition(c).chunk(2, dim=1)
        normed = self.norm(x)
        h = normed * (1 + scale[:, None]) + shift[:, None]
        return self.mlp(h)


class NoShift(Base):
    def forward(self, x, c):
        (scale, _) = self.condition(c).chunk(2, dim=1)
        return self.rms(x) * (1 + scale[:, None])


class Tokens(Base):
    """A row for each token."""

    def forward(self, x, c):
        shift, scale = self.condition(x + c[:, None]).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


LAYER, RMS = "modulated_layer_norm", "modulated_rms_norm"
OPERATORS = {
    Helped: LAYER,
    HelpedRows: RMS,
    Inline: LAYER,
    Outside: RMS,
    Statements: LAYER,
    OtherName: LAYER,
    NoShift: RMS,
    Tokens: LAYER,
}
each = pytest.mark.parametrize("kind", OPERATORS, ids=lambda kind: kind.__name__)
_GENERATOR = torch.Generator().manual_seed(0)
X, C = (torch.randn(*shape, generator=_GENERATOR, dtype=torch.float64) for shape in ((3, 5, WIDTH), (3, WIDTH)))


def made(kind):
    torch.manual_seed(0)
    return kind().double()


def step(model, x, c):
    x, c = (t.clone().requires_grad_() for t in (x, c))
    y = model(x, c)
    gradients = torch.autograd.grad(y.sin().sum(), [x, c, *model.parameters()], allow_unused=True)
    return [y.detach(), *(g for g in gradients if g is not None)]


def assert_same(model, plain, x=X, c=C):
    for got, expected in zip(step(model, x, c), step(plain, x, c), strict=True):
        torch.testing.assert_close(got, expected)


def modulated(report):
    return [r.now for r in report if r.now.startswith("modulated")]


@each
def test_norm_and_modulation_are_one_operator_and_compute_the_same(kind):
    model = made(kind)
    plain = copy.deepcopy(model)
    assert modulated(fuse(model)) == [OPERATORS[kind]]
    for one in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_same(one, plain)
    unfuse(model)
    assert torch.equal(model(X, C), plain(X, C))


@each
def test_the_operator_runs(kind, monkeypatch):
    model = made(kind)
    assert modulated(fuse(model)) == [OPERATORS[kind]]

    def never(*_):
        raise AssertionError("it ran")

    for norm in (model.norm, model.rms, model.affine):
        for cls in type(norm).__mro__[:2]:
            if "forward" in vars(cls):
                monkeypatch.setattr(cls, "forward", never)
    model(X, C)


class Used(Base):
    def forward(self, x, c):
        shift, scale = self.condition(c).chunk(2, dim=1)
        h = self.norm(x)
        y = h * (1 + scale[:, None]) + shift[:, None]
        return y + h


class Halved(Base):
    def forward(self, x, c):
        shift, scale = self.condition(c).chunk(2, dim=1)
        return modulate_half(self.norm(x), shift, scale)


class Twice(Base):
    def forward(self, x, c):
        shift, scale = self.condition(c).chunk(2, dim=1)
        return self.norm(x) * (2 + scale[:, None]) + shift[:, None]


class NoNorm(Base):
    def forward(self, x, c):
        shift, scale = self.condition(c).chunk(2, dim=1)
        return modulate(self.mlp(x), shift, scale)


@pytest.mark.parametrize("kind", [Used, Halved, Twice, NoNorm], ids=lambda kind: kind.__name__)
def test_lookalikes_are_left(kind):
    model = made(kind)
    plain = copy.deepcopy(model)
    assert modulated(fuse(model)) == []
    assert_same(model, plain)


@each
def test_hooks_fire_and_what_is_put_in_later_runs(kind):
    model = made(kind)
    plain = copy.deepcopy(model)
    fuse(model)
    for one in (model, plain):
        one.seen = []
        for name in ("norm", "rms"):
            getattr(one, name).register_forward_hook(lambda *_, one=one, name=name: one.seen.append(name))
        one.affine = nn.Tanh()
    assert_same(model, plain)
    assert model.seen == plain.seen


@pytest.mark.parametrize("kind", [Inline, Tokens, Helped], ids=lambda kind: kind.__name__)
def test_what_broadcasts_otherwise_is_computed_as_ever(kind):
    """A condition of one sample for all; and a dtype that the original widens."""
    model = made(kind)
    plain = copy.deepcopy(model)
    fuse(model)
    assert_same(model, plain, c=C[:1])
    if kind is Helped:
        assert model(X.float(), C).dtype == plain(X.float(), C).dtype == torch.float64


@each
def test_it_compiles_without_a_break(kind):
    model = made(kind)
    plain = copy.deepcopy(model)
    fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, C), plain(X, C))


def test_norms_of_both_kinds_keep_their_own_saving():
    """Of a norm that is modulated only what that adds is told there."""
    report = {r.path: r for r in fuse(made(Outside)).fused}
    assert report[""].saving.unit == "token"
    assert report[""].saving.traffic > 0
    assert report["rms"].saving.traffic > 0


def test_an_example_is_verified_against_the_original():
    (record,) = (r for r in fuse(made(Inline), example=(X, C)) if r.path == "")
    assert (record.now, record.status, record.saving.unit) == (LAYER, "fused", "batch")


def test_a_diffusion_transformer_is_fused_between_its_layers():
    torch.manual_seed(0)
    model = DiT(width=16, heads=2).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    plain, x, t = copy.deepcopy(model), torch.randn(2, 4, 4, 4).double(), torch.rand(2, 1).double()
    report = fuse(model)
    names = [r.now for r in report]
    assert [names.count(name) for name in ("add_modulated_layer_norm", LAYER, "gated_add")] == [2, 2, 2]
    torch.testing.assert_close(model(x, t), plain(x, t))


CLASSES = {
    "AdaLayerNormZero": ((16,), "modulated_layer_norm"),
    "AdaLayerNormZeroSingle": ((16,), "modulated_layer_norm"),
    "AdaLayerNormContinuous": ((16, 16), "modulated_layer_norm"),
    "LuminaRMSNormZero": ((16, 1e-5, False), "modulated_rms_norm"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_norms_of_diffusers(name):
    normalization = pytest.importorskip("diffusers.models.normalization")
    arguments, operator = CLASSES[name]
    torch.manual_seed(0)
    model = getattr(normalization, name)(*arguments).double()
    plain, x, c = copy.deepcopy(model), torch.randn(2, 5, 16).double(), torch.randn(2, 16).double()
    assert modulated(fuse(model)) == [operator]
    call = {"emb": c} if "Zero" in name else {"conditioning_embedding": c}
    torch.testing.assert_close(model(x, **call), plain(x, **call))


def test_a_transformer_of_stable_diffusion():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    heads = {"attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    model = diffusers.SD3Transformer2DModel(**sizes, **heads, joint_attention_dim=32, pooled_projection_dim=64).double()
    plain = copy.deepcopy(model)
    names = [r.now for r in fuse(model)]
    assert [names.count(name) for name in ("add_modulated_layer_norm", LAYER, "gated_add")] == [3, 5, 3]
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8).double(),
        "encoder_hidden_states": torch.randn(2, 5, 32).double(),
        "pooled_projections": torch.randn(2, 64).double(),
        "timestep": torch.tensor([0.5, 0.6]).double(),
    }
    torch.testing.assert_close(model(**call).sample, plain(**call).sample)
