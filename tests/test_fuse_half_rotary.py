"""Rotary helpers whose tables have a column for each pair of elements, and not for each element."""

import copy

import pytest
import torch
from torch import nn

from braze.kernels import dispatch, fuse, use_backend


def turned(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rotate_halves(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return turned(q, cos, sin), turned(k, cos, sin)


def rotate_neighbours(x, cos, sin):
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)


def rotate_back(q, k, cos, sin, unsqueeze_dim=1):
    return rotate_halves(q, k, cos, -sin, unsqueeze_dim)


class Halves(nn.Module):
    def forward(self, x, cos, sin):
        q, k = rotate_halves(x, 2 * x, cos, sin)
        return q + k


class Neighbours(nn.Module):
    def forward(self, x, cos, sin):
        return rotate_neighbours(x, cos.unsqueeze(1), sin.unsqueeze(1))


class Back(nn.Module):
    """The other way round."""

    def forward(self, x, cos, sin):
        q, k = rotate_back(x, x, cos, sin)
        return q + k


def drawn(dtype):
    generator = torch.Generator().manual_seed(0)
    x, angles = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 5, 8), (2, 5, 4)))
    return x.to(dtype).requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("kind", [Halves, Neighbours], ids=lambda kind: kind.__name__)
def test_a_helper_of_half_tables_is_replaced_and_computes_the_same(kind, monkeypatch):
    model, ran, run = kind(), [], dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda op, *args, **options: ran.append(op.name) or run(op, *args, **options))
    with use_backend("eager"):
        assert [record.now for record in fuse(model)] == ["rope"]
        for dtype in (torch.float32, torch.float64):
            x, cos, sin = drawn(dtype)
            ran.clear()
            y, expected = model(x, cos, sin), kind()(x, cos, sin)
            assert set(ran) == {"rope"}
            torch.testing.assert_close(y, expected)
            gradients = (torch.autograd.grad(one.square().sum(), x)[0] for one in (y, expected))
            torch.testing.assert_close(*gradients)
        x, cos, sin = drawn(torch.float32)
        # Tables of another width, which only broadcast: what the helper makes of them is its own affair.
        torch.testing.assert_close(model(x, cos[..., :1], sin[..., :1]), kind()(x, cos[..., :1], sin[..., :1]))


def test_one_that_turns_the_other_way_is_left():
    model = Back()
    with use_backend("eager"):
        (record,) = fuse(model)
        assert record.status == "left"
        assert type(copy.deepcopy(model)) is Back


def test_the_attention_of_gpt_oss_is_fused():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 50, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **heads, pad_token_id=0))
    plain, tokens = copy.deepcopy(model), torch.arange(12).view(2, 6)
    with use_backend("eager"):
        assert "rope" in {record.now for record in fuse(model).fused}
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)
