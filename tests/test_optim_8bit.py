"""Optimizer states in 8 bits: what a code is off by, steps that are those of float32 states, and checkpoints."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from braze.kernels import optim, use_backend
from braze.kernels.optim import quantization

EPS = torch.finfo(torch.float32).eps

#: An optimizer, its arguments, and its states in 8 bits.
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"momentum_buffer"}),
    "Adam AMSGrad": ("Adam", {"amsgrad": True, "weight_decay": 0.1}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "AdamW": ("AdamW", {"max_norm": 1.0, "ema_decay": 0.5}, {"exp_avg", "exp_avg_sq"}),
    "Lion": ("Lion", {"weight_decay": 0.1}, {"exp_avg"}),
}


def parameters(device: str, dtype: torch.dtype = torch.float32, rows: int = 43) -> list[nn.Parameter]:
    """Whole tiles and a part of one, a part of a block, another order in memory; less than 4,096 elements; gaps."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((rows, 100), (8, 16, 8, 4), (7,), (50, 180))
    made = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
    made[1] = made[1].contiguous(memory_format=torch.channels_last)
    made[3] = made[3][:, ::2]
    return [nn.Parameter(t) for t in made]


def differentiate(params: list[nn.Parameter], step: int) -> None:
    """Gradients over many orders of magnitude."""
    draw = torch.Generator().manual_seed(1000 + step)
    for p in params:
        g = torch.randn(p.shape, generator=draw) * torch.rand(p.shape, generator=draw) ** 8
        p.grad = torch.empty_like(p).copy_(g)


def error_bound(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """scale·((c + ½)⁴ − c⁴) / C⁴, and float32's roundings.

    They are a division and two roots, of which a fourth power makes 4·1.5·ε of x at most, and 4·ε of the way back.
    """
    c, last = codes.double().abs(), torch.iinfo(codes.dtype).max
    each = scale.double().repeat_interleave(quantization.BLOCK)[: len(x)]
    return each * ((c + 0.5) ** 4 - c**4) / last**4 + 10 * EPS * x.double().abs()


def drawn(elements: int, spread: float, size: float, signed: bool, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = size * (spread * torch.randn(elements, generator=draw)).exp()
    x[torch.rand(elements, generator=draw) < 0.1] = 0.0
    return x * torch.randn(elements, generator=draw).sign() if signed else x


@given(
    elements=st.sampled_from([0, 1, 255, 256, 257, 1000]),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    size=st.sampled_from([1.0, 1e-20, 1e25]),
    signed=st.booleans(),
    stochastic=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_code_is_off_by_half_a_step_at_most(
    elements: int, spread: float, size: float, signed: bool, stochastic: bool, seed: int
) -> None:
    """Rounded at random, by a whole step: one of the two neighbours."""
    x = drawn(elements, spread, size, signed, seed)
    dtype = torch.int8 if signed else torch.uint8
    draws = torch.randint(0, 2**16, (elements,), generator=torch.Generator().manual_seed(seed)) if stochastic else None
    codes, scale = quantization.quantize(x, dtype, draws)
    assert codes.dtype == dtype
    assert len(scale) == quantization.blocks(elements)
    found = quantization.dequantize(codes, scale)
    if stochastic:
        last = torch.iinfo(dtype).max
        c, each = codes.double().abs(), scale.double().repeat_interleave(quantization.BLOCK)[:elements]
        assert ((found.double() - x).abs() <= each * ((c + 1) ** 4 - c**4) / last**4 + 10 * EPS * x.abs()).all()
    else:
        assert ((found.double() - x).abs() <= error_bound(x, codes, scale)).all()
    assert (x * found >= 0).all()
    if not signed:
        assert ((found > 0) == (x > 0)).all()
    for i, peak in enumerate(scale):
        block = slice(i * quantization.BLOCK, (i + 1) * quantization.BLOCK)
        assert x[block].abs().max() == found[block].abs().max() == peak
    # What is a code already stays one.
    torch.testing.assert_close(quantization.quantize(found, dtype), (codes, scale), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_random_rounding_is_right_on_average_and_lets_a_slow_decay_through(dtype: torch.dtype) -> None:
    """Half the values one step of β₂ = 0.999 below a code, of which rounding to the nearest makes the code again."""
    last = torch.iinfo(dtype).max
    code = torch.full((2**17,), 100, dtype=dtype)
    code[:: quantization.BLOCK] = last
    before = quantization.dequantize(code, torch.ones(2**17 // quantization.BLOCK))
    after = torch.where(code == last, before, 0.999 * before)
    assert torch.equal(quantization.quantize(after, dtype)[0], code)
    draws = torch.randint(0, 2**16, code.shape, generator=torch.Generator().manual_seed(0))
    found = quantization.dequantize(*quantization.quantize(after, dtype, draws))
    own = code != last
    gap = (100**4 - 99**4) / last**4
    part = (0.001 * 100**4 / last**4) / gap
    # Five standard deviations of a mean, and the 2⁻¹⁶ that 16 random bits resolve.
    budget = gap * (5 * (part * (1 - part) / int(own.sum())) ** 0.5 + 2**-16)
    assert abs(found[own].double().mean() - after[own].double().mean()) < budget


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_its_block_nan(value: float) -> None:
    x = torch.ones(3 * quantization.BLOCK)
    x[300] = value
    found = quantization.dequantize(*quantization.quantize(x, torch.int8)).view(3, -1)
    assert found[1].isnan().all()
    assert (found[[0, 2]] == 1.0).all()


# ------------------------------------------------------------------------------ steps


def trained(
    case: str, backend: str, device: str, steps: int, rows: int = 43, **more: Any
) -> tuple[list[nn.Parameter], Any]:
    name, arguments, _ = CASES[case]
    params = parameters(device, more.pop("dtype", torch.float32), rows)
    optimizer = getattr(optim, name)(params, **arguments, **more)
    with use_backend(backend):
        for step in range(steps):
            differentiate(params, step)
            optimizer.step()
    return params, optimizer


def flat(t: Tensor) -> Tensor:
    return quantization.flat(t.detach())


@pytest.mark.parametrize(("case", "backend"), [*((case, "eager") for case in CASES), ("AdamW", "triton")])
def test_a_step_is_that_of_float32_states(case: str, backend: str, device: str) -> None:
    """Of the states behind the codes; the new ones are those of float32, rounded once."""
    params, optimizer = trained(case, backend, device, steps=2, state_dtype="8bit")
    name, arguments, eight_bit = CASES[case]
    plain = copy.deepcopy(params)
    other = getattr(optim, name)(plain, **arguments)
    other.load_state_dict(optim.dequantized(copy.deepcopy(optimizer.state_dict())))
    with use_backend(backend):
        for each, own in ((params, optimizer), (plain, other)):
            differentiate(each, 2)
            own.step()
    # A float32 result of float32 operands, in another kernel.
    torch.testing.assert_close(params, plain)
    for i, (p, q) in enumerate(zip(params, plain, strict=True)):
        state, wide = optimizer.state[p], other.state[q]
        assert set(quantization.states_in(state)) == (eight_bit if i < 2 else set())
        for key in eight_bit:
            if i < 2:
                x = flat(wide[key])
                off = (flat(quantization.read(state[key], state[key + "_scale"])).double() - x).abs()
                assert (off <= error_bound(x, flat(state[key]), state[key + "_scale"])).all()
            else:
                assert state[key].dtype == torch.float32


@pytest.mark.parametrize(
    ("case", "rounding"), list(zip(CASES, ["stochastic", "nearest", "stochastic", "nearest"], strict=True))
)
def test_kernels_make_the_codes_of_the_plain_form(case: str, rounding: str, device: str) -> None:
    """What they round is a rounding error apart, so that few codes are, and those by one."""
    arguments = {"rounding": rounding, "state_dtype": "8bit", "dtype": torch.bfloat16}
    params, plain = trained(case, "eager", device, steps=2, **arguments)
    others, kernels = trained(case, "triton", device, steps=2, **arguments)
    for p, q in zip(params[:2], others[:2], strict=True):
        for key in CASES[case][2]:
            ours, theirs = plain.state[p], kernels.state[q]
            torch.testing.assert_close(theirs[key + "_scale"], ours[key + "_scale"])
            apart = (theirs[key].int() - ours[key].int()).abs()
            assert apart.max() <= 1
            # A code covers 1/127 of its place at least, of which float32's roundings are 8·2⁻²⁴·127 at most.
            assert apart.float().mean() <= 0.001


def test_compiled_code_makes_the_codes_of_the_plain_form(device: str) -> None:
    arguments = {"rounding": "stochastic", "state_dtype": "8bit", "rows": 200}
    params, plain = trained("AdamW", "eager", device, steps=2, **arguments)
    others, compiled = trained("AdamW", "compile", device, steps=2, **arguments)
    torch.testing.assert_close(others, params)
    for key in ("exp_avg", "exp_avg_sq"):
        ours, theirs = plain.state[params[0]], compiled.state[others[0]]
        torch.testing.assert_close(theirs[key + "_scale"], ours[key + "_scale"])
        apart = (theirs[key].int() - ours[key].int()).abs()
        assert apart.max() <= 1
        assert apart.float().mean() <= 0.001


def test_states_are_a_quarter(device: str) -> None:
    params = [nn.Parameter(torch.ones(32, 256, device=device))]
    optimizer = optim.AdamW(params, state_dtype="8bit")
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    held = sum(t.nbytes for name, t in optimizer.state[params[0]].items() if name != "step")
    assert held == 2 * params[0].numel() * (1 + 4 / quantization.BLOCK)
    optimizer.step()
    assert optimizer.gathered is not None


# ------------------------------------------------------------------------------ checkpoints


def saved(optimizer: torch.optim.Optimizer) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def resumed(params: list[nn.Parameter], state: Any, make: Any, step: int) -> tuple[list[nn.Parameter], Any]:
    """Copies of the parameters, gaps and all, after a step of the optimizer that loads the state."""
    own = parameters("cpu", params[0].dtype)
    for q, p in zip(own, params, strict=True):
        q.data.copy_(p.data)
    optimizer = make(own)
    optimizer.load_state_dict(state)
    differentiate(own, step)
    optimizer.step()
    return own, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_resumes_with_the_same_bits(case: str, dtype: torch.dtype) -> None:
    more = {"state_dtype": "8bit", "rounding": "stochastic"}
    params, optimizer = trained(case, "eager", "cpu", steps=2, dtype=dtype, **more)
    name, arguments, _ = CASES[case]
    with use_backend("eager"):
        own, other = resumed(params, saved(optimizer), lambda ps: getattr(optim, name)(ps, **arguments, **more), step=2)
        differentiate(params, 2)
        optimizer.step()
    torch.testing.assert_close(own, params, rtol=0, atol=0)
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_checkpoints_of_torch_and_for_torch() -> None:
    params = parameters("cpu")
    theirs = torch.optim.AdamW(params)
    differentiate(params, 0)
    theirs.step()
    # Into 8 bits: the step is that of the states behind the codes.
    own, ours = resumed(params, saved(theirs), lambda ps: optim.AdamW(ps, state_dtype="8bit"), step=1)
    assert ours.state[own[0]]["exp_avg_sq"].dtype == torch.uint8
    rounded = saved(theirs)
    for i in (0, 1):
        for key, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
            x = flat(rounded["state"][i][key])
            x.copy_(quantization.dequantize(*quantization.quantize(x, dtype)))
    torch.testing.assert_close(own, resumed(params, rounded, torch.optim.AdamW, step=1)[0])
    # Out of 8 bits: for torch by a call, for braze by itself.
    state = optim.dequantized(saved(ours))
    assert state["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    found, of_torch = resumed(own, state, torch.optim.AdamW, step=2)
    wide, of_braze = resumed(own, saved(ours), optim.AdamW, step=2)
    torch.testing.assert_close(wide, found)
    torch.testing.assert_close(of_braze.state_dict()["state"], of_torch.state_dict()["state"])


def test_scales_of_other_shards_are_refused() -> None:
    params = parameters("cpu")
    optimizer = optim.Lion(params, state_dtype="8bit")
    differentiate(params, 0)
    optimizer.step()
    state = saved(optimizer)
    state["state"][0]["exp_avg_scale"] = torch.ones(11)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        ValueError, match=r"exp_avg of a parameter \(43, 100\) must have a scale for each of the 17 blo"
    ):
        optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer_type", [optim.Muon, optim.Adafactor])
def test_optimizers_without_states_in_8_bits_say_so(optimizer_type: Any) -> None:
    with pytest.raises(ValueError, match="'8bit' is for the states of SGD, Adam, AdamW and Lion"):
        optimizer_type([nn.Parameter(torch.ones(2, 2))], state_dtype="8bit")
