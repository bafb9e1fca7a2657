"""Which implementation runs, who may override it, and who must see the plain operations."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from braze.kernels import RMS_NORM, dispatch, rms_norm, use_backend

BIG = (64, 512)  # over SMALLEST_COMPILED


def plain(x: Tensor) -> Tensor:
    return RMS_NORM.reference(x, None, eps=1e-6, weight_offset=0.0)


def ours(x: Tensor) -> Tensor:
    return rms_norm(x, eps=1e-6)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_forced", None)


@pytest.fixture
def only_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any implementation but the plain reference is an error."""
    true = dispatch.implementation

    def implementation(op: dispatch.Op, backend: str) -> object:
        assert backend == "eager", f"{backend} ran"
        return true(op, backend)

    monkeypatch.setattr(dispatch, "implementation", implementation)


def test_an_unknown_backend_is_refused_by_name() -> None:
    with (
        pytest.raises(ValueError, match=r"backend must be one of eager, compile, triton, got 'cuda'"),
        use_backend("cuda"),
    ):
        pass


@pytest.mark.parametrize("backend", ["compile", "fast"])
def test_the_environment_asks_at_import_and_use_backend_goes_before(backend: str) -> None:
    code = """if True:
        from braze.kernels import dispatch
        with dispatch.use_backend("eager"):
            print(dispatch.asked())
        print(dispatch.asked())
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "BRAZE_BACKEND": backend}, capture_output=True, text=True
    )
    if backend in dispatch.BACKENDS:
        assert done.stdout == f"eager\n{backend}\n", done.stderr
    else:
        assert "BRAZE_BACKEND must be one of eager, compile, triton, got 'fast'" in done.stderr


def test_an_unavailable_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: False)
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="rms_norm cannot run it here: Triton is not installed"),
    ):
        ours(torch.randn(2, 8))
    with use_backend("compile"), pytest.raises(RuntimeError, match="meta tensors have no data"):
        ours(torch.randn(2, 8, device="meta"))


def test_use_backend_nests_and_is_restored_after_an_error() -> None:
    x = torch.randn(2, 8)
    with use_backend("compile"):
        with use_backend("eager"):
            assert dispatch.choose(RMS_NORM, (x,)) == ("eager", "asked for")
        with pytest.raises(KeyError), use_backend("eager"):
            raise KeyError
        assert dispatch.choose(RMS_NORM, (x,)).backend == "compile"
    assert dispatch.choose(RMS_NORM, (x,)).reason != "asked for"


def test_one_float64_operand_keeps_the_kernels_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_interpreting", lambda: True)
    x, weight = torch.randn(2, 8), torch.ones(8, dtype=torch.float64)
    with use_backend("triton"), pytest.raises(RuntimeError, match="compute in float32"):
        rms_norm(x, weight)


@pytest.mark.parametrize(("shape", "asked", "expected"), [((8, 8), None, 1), (BIG, None, 0), ((8, 8), "eager", 0)])
def test_small_tensors_get_the_form_for_them(shape: tuple[int, int], asked: str | None, expected: int) -> None:
    calls = []

    def small(x: Tensor, weight: None, **options: float) -> Tensor:
        calls.append(x)
        return RMS_NORM.reference(x, weight, **options)

    op = dataclasses.replace(RMS_NORM, small=small)
    with use_backend(asked) if asked else nullcontext():
        dispatch.run(op, torch.randn(shape), None, eps=1e-6, weight_offset=0.0)
    assert len(calls) == expected


def test_tensors_on_several_devices_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"rms_norm: all tensors must be on one device, got cpu, meta; move them"):
        rms_norm(torch.randn(2, 8), torch.ones(8, device="meta"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    x = torch.randn(64, 512, device="cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(ours(x), plain(x))


def test_without_a_compiler_there_is_one_warning_at_the_callers_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_cpp_compiler", lambda: None)
    dispatch._warn_once.cache_clear()
    x = torch.randn(BIG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [rms_norm(x, eps=1e-6) for _ in range(3)]
        torch.testing.assert_close(got[0], plain(x))
    (warning,) = caught
    assert warning.filename == __file__
    assert "install g++" in str(warning.message)


def test_the_compiler_is_the_one_that_inductor_would_call() -> None:
    dispatch._cpp_compiler.cache_clear()
    try:
        with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
            assert dispatch._cpp_compiler() is None
    finally:
        dispatch._cpp_compiler.cache_clear()


@pytest.mark.usefixtures("only_plain")
class TestWhoSeesIntoThePlainForm:
    """Each would run the compiled form, or be blind, if dispatch did not notice it."""

    x = torch.randn(BIG, generator=torch.Generator().manual_seed(0))

    def test_fake_tensors(self) -> None:
        with FakeTensorMode() as mode:
            assert ours(mode.from_tensor(self.x)).shape == BIG

    def test_make_fx(self) -> None:
        graph = make_fx(ours)(self.x)
        assert any("rsqrt" in str(node.target) for node in graph.graph.nodes)
        torch.testing.assert_close(graph(self.x), plain(self.x))

    def test_flop_counter(self) -> None:
        with FlopCounterMode(display=False):
            torch.testing.assert_close(ours(self.x), plain(self.x))

    def test_dispatch_mode_sees_operations(self) -> None:
        seen = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        with Recorder():
            ours(self.x)
        assert "aten.rsqrt.default" in seen

    def test_vmap_and_grad(self) -> None:
        torch.testing.assert_close(torch.func.vmap(ours)(self.x), plain(self.x))
        wanted = torch.func.grad(lambda t: plain(t).pow(3).sum())(self.x)
        torch.testing.assert_close(torch.func.grad(lambda t: ours(t).pow(3).sum())(self.x), wanted)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, in its JVP decompositions
    def test_forward_mode(self) -> None:
        tangent = torch.ones(BIG)
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(ours(forward_ad.make_dual(self.x, tangent))).tangent
        torch.testing.assert_close(got, torch.func.jvp(plain, (self.x,), (tangent,))[1])

    def test_tensor_subclass(self) -> None:
        class Logged(torch.Tensor):
            pass

        got = ours(self.x.as_subclass(Logged))
        assert type(got) is Logged
        torch.testing.assert_close(got.as_subclass(torch.Tensor), plain(self.x))

    def test_negated_view(self) -> None:
        negated = torch._neg_view(self.x)
        assert negated.is_neg()
        torch.testing.assert_close(ours(negated), plain(-self.x))

    def test_meta(self) -> None:
        assert ours(self.x.to("meta")).device.type == "meta"


@pytest.mark.skipif(
    dispatch.unavailable(RMS_NORM, "triton", "cpu", torch.float32) is not None, reason="needs TRITON_INTERPRET=1"
)
class TestCotangentsOfTheKernel:
    """The backward kernel reads memory: what a cotangent is besides its memory must be resolved first."""

    def gradient(self, cotangent: Tensor, function: object = ours, **options: bool) -> Tensor:
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with use_backend("triton" if function is ours else "eager"):
            return torch.autograd.grad(function(x), x, cotangent, **options)[0]  # type: ignore[operator]

    def test_negated(self) -> None:
        cotangent = torch._neg_view(torch.randn(4, 32))
        torch.testing.assert_close(self.gradient(cotangent), self.gradient(cotangent, plain))

    def test_batched(self) -> None:
        cotangents = torch.randn(3, 4, 32)
        got = self.gradient(cotangents, is_grads_batched=True)
        torch.testing.assert_close(got, self.gradient(cotangents, plain, is_grads_batched=True))
