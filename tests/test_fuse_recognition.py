"""fuse on plain modules: what is recognised, by structure and numbers, and what is refused, and why."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from braze.kernels import fuse, unfuse


def operators(report):
    return sorted(record.now for record in report if record.status == "fused")


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


class Scale(nn.Module):
    """RMSNorm under other names."""

    def __init__(self, d=32, offset=0.0):
        super().__init__()
        self.g = nn.Parameter(torch.randn(d) - offset)
        self.tiny, self.offset = 1e-6, offset

    def normalize(self, x):
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.tiny).to(x.dtype)

    def forward(self, x):
        return self.normalize(x) * (self.g + self.offset)


class HiddenEps(Scale):
    def normalize(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 3.5e-5)


class Centred(nn.Module):
    """LayerNorm written out, its bias before its weight."""

    def __init__(self, d=32):
        super().__init__()
        self.shift, self.gain = nn.Parameter(torch.randn(d)), nn.Parameter(torch.randn(d))
        self.epsilon = 1e-6

    def forward(self, x):
        h = x - x.mean(-1, keepdim=True)
        return h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.gain + self.shift


class Unweighted(nn.Module):
    def __init__(self, eps=1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class ClampedNorm(Scale):
    def forward(self, x):
        return super().forward(x).clamp(-20, 20)


class ClampedInputNorm(Scale):
    def forward(self, x):
        return super().forward(x.clamp(-1e3, 1e3))


class OutsideEpsNorm(Scale):
    def normalize(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.tiny)


class StdNorm(Centred):
    def forward(self, x):
        return self.gain * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.epsilon) + self.shift


class NoNorm(Scale):
    def forward(self, x):
        return x


class TrainingNorm(Scale):
    def forward(self, x):
        return super().forward(x) if self.training else x


class DetachedNorm(Scale):
    """The right output, another gradient."""

    def normalize(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.tiny).detach()


class Gated(nn.Module):
    def __init__(self, d=32, inner=40, activation=F.silu, bias=True):
        super().__init__()
        self.a, self.b = nn.Linear(d, inner, bias), nn.Linear(inner, d, bias)
        self.c = nn.Linear(d, inner, bias)
        self.activation = activation

    def forward(self, x):
        return self.b(self.a(x) * self.activation(self.c(x)))


class Dropping(Gated):
    def forward(self, x):
        return self.b(F.dropout(self.a(x) * self.activation(self.c(x)), 0.1, self.training))


class Residual(Gated):
    def forward(self, x):
        return x + super().forward(x)


class Bilinear(Gated):
    def forward(self, x):
        return self.b(self.a(x) * self.c(x))


class Branching(Gated):
    """As Gated in float32 only."""

    def forward(self, x):
        return super().forward(x) if x.dtype != torch.bfloat16 else super().forward(x) * 1.5


GATES = {
    "silu": F.silu,
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "relu": nn.ReLU(),
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize(
    ("module", "operator"),
    [
        (Scale(), "rms_norm"),
        (Scale(offset=1.0), "rms_norm"),
        (HiddenEps(), "rms_norm"),
        (Unweighted(), "rms_norm"),
        (Centred(), "layer_norm"),
        (nn.RMSNorm(32), "rms_norm"),
        (nn.RMSNorm(32, eps=1e-4, elementwise_affine=False), "rms_norm"),
        (nn.LayerNorm(32), "layer_norm"),
        (nn.LayerNorm(32, bias=False), "layer_norm"),
        (nn.LayerNorm(32, elementwise_affine=False), "layer_norm"),
        (nn.Softmax(-1), "softmax"),
        (Gated(32, 32), "glu"),
        *((Gated(32, 40, activation), "glu") for activation in GATES.values()),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value).replace("\n", "")[:60],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_modules_are_recognised_and_stay_within_rounding(module, operator, dtype):
    module = copy.deepcopy(module).to(dtype)
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = module(x)
    assert operators(fuse(module)) == [operator]
    after = module(x)
    assert after.dtype == before.dtype
    assert relative(after, before) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("weight", [None, torch.rand(5)], ids=["", "weight"])
def test_the_cross_entropy_module_is_fused_and_takes_class_probabilities_too(weight):
    loss = nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    assert operators(fuse(loss)) == ["cross_entropy"]
    plain = nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    x = torch.randn(6, 5)
    for target in (torch.tensor([1, 2, -100, 0, 4, 3]), torch.rand(6, 5).softmax(-1)):
        torch.testing.assert_close(loss(x, target), plain(x, target))


def test_class_probabilities_beside_a_class_to_ignore_stay_torchs():
    loss, plain = (nn.CrossEntropyLoss(ignore_index=0) for _ in range(2))
    assert operators(fuse(loss)) == ["cross_entropy"]
    x, soft = torch.randn(6, 5), torch.rand(6, 5).softmax(-1)
    for one in (loss, plain):
        with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target"):
            one(x, soft)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pos_weight": torch.rand(5) + 0.5, "reduction": "sum"},
        {"weight": torch.rand(5), "pos_weight": torch.rand(5), "reduction": "none"},
    ],
    ids=["", "pos_weight", "both"],
)
def test_the_binary_cross_entropy_module_is_fused(options):
    loss, plain = (nn.BCEWithLogitsLoss(**options) for _ in range(2))
    assert operators(fuse(loss)) == ["binary_cross_entropy_with_logits"]
    target = torch.rand(4, 5)
    x = torch.randn(4, 5, requires_grad=True)
    torch.testing.assert_close(loss(x, target), plain(x, target))
    torch.testing.assert_close(*(torch.autograd.grad(own(x, target).sum(), x)[0] for own in (loss, plain)))
    learned = target.clone().requires_grad_()
    loss(x, learned).sum().backward()
    assert learned.grad is not None, "torch's own loss has a gradient for its targets"
    with pytest.raises(ValueError, match="Target size"):
        loss(x, target[:, :4])
    unfuse(loss)
    assert type(loss) is nn.BCEWithLogitsLoss


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ClampedNorm(), "something else"),
        (ClampedInputNorm(), "something else"),
        (OutsideEpsNorm(), "error .* budget"),
        (StdNorm(), "something else"),
        (NoNorm(), "something else"),
        (TrainingNorm(), "eval"),
        (DetachedNorm(), "gradient of input"),
        (nn.LayerNorm((7, 32)), "more than the last dim"),
        (Residual(), "something else"),
        (Bilinear(), "something else"),
        (Branching(), "bfloat16"),
        (nn.BCEWithLogitsLoss(torch.rand(4, 5)), "one size of batch"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_lookalikes_are_left_with_the_reason(module, reason):
    (record,) = fuse(module)
    assert record.status == "left"
    assert re.search(reason, record.reason), record.reason


def test_a_gate_with_dropout_around_it_is_fused_without_it():
    module, x = Dropping(), torch.randn(3, 32)
    plain = copy.deepcopy(module)
    assert operators(fuse(module)) == ["glu"]
    for model in (module, plain):
        torch.manual_seed(0)
        model.result = model(x)
    torch.testing.assert_close(module.result, plain.result)


def test_a_module_that_is_no_joint_is_not_reported():
    model = nn.Sequential(nn.Linear(32, 32), nn.PReLU(), nn.PReLU(32), nn.LeakyReLU(0.01), nn.Dropout(0.01), nn.GELU())
    assert len(fuse(model)) == 0


class Permuting(nn.LayerNorm):
    """The norm of images of timm, torchvision and transformers: what it returns is in channels_last."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Keeping(Centred):
    def forward(self, x):
        h = x - x.mean(1, keepdim=True)
        y = h / torch.sqrt(h.pow(2).mean(1, keepdim=True) + self.epsilon)
        return (y * self.gain[:, None, None] + self.shift[:, None, None]).to(x.dtype)


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("norm", [Permuting, Keeping])
def test_a_norm_of_images_returns_the_memory_format_that_it_did(norm, given):
    module, x = norm(32), torch.randn(2, 32, 5, 7).contiguous(memory_format=given)
    plain = copy.deepcopy(module)
    assert operators(fuse(module)) == ["layer_norm_2d"]
    assert module(x).stride() == plain(x).stride()
    torch.testing.assert_close(module(x), plain(x))
