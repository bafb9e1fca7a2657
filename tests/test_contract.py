"""The contract is worth what it catches: kernels broken on purpose must fail it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import braze.kernels.triton
from braze.kernels import OPS
from braze.kernels.compiled import compiled_call

from .audit_meter import copy
from .contract import Case, check_against_reference


class Mutant(NamedTuple):
    """A kernel file with one thing broken, and the operator that should notice."""

    op: str
    kernels: str
    before: str
    after: str
    variant: str = "default"


MUTANTS = {
    "wrong derivative": Mutant("rms_norm", "norm", "out = g - normed * mean_gn[:, None]", "out = g + 0.0"),
    "wrong derivative of the weight": Mutant("layer_norm", "norm", "dw += g * normed", "dw += g"),
    "missing mask on the load": Mutant(
        "layer_norm",
        "norm",
        "row = tl.where(mask, row - mu[:, None], 0.0)",
        "row = row - mu[:, None]",
    ),
    "missing contiguous() on the cotangent": Mutant("rms_norm", "norm", "dy = grads[0].contiguous()", "dy = grads[0]"),
    "missing contiguous() on the input": Mutant("rms_norm", "norm", "x_rows = rows(x)", "x_rows = x.flatten(0, -2)"),
    "under-launched grid": Mutant("rms_norm", "norm", "(long_norm.forward, (N,),", "(long_norm.forward, (N // 2,),"),
    "under-launched columns": Mutant(
        "rms_norm",
        "norm",
        "long_norm.backward, (P * G, column_blocks)",
        "long_norm.backward, (P * G, column_blocks - 1)",
    ),
    "a persistent loop that never goes round": Mutant(
        "rms_norm",
        "norm",
        "for tile in range(tl.program_id(0) % P, tl.cdiv(T, BLOCK_N), P):",
        "for tile in range(tl.program_id(0) % P, tl.program_id(0) % P + 1):",
    ),
    "wrong eps": Mutant(
        "rms_norm",
        "norm",
        "r = 1.0 / tl.sqrt(tl.sum(row * row, 1) / D + eps)",
        "r = 1.0 / tl.sqrt(tl.sum(row * row, 1) / D + 2 * eps)",
    ),
    "eps outside the root": Mutant(
        "rms_norm",
        "norm",
        "r = 1.0 / tl.sqrt(tl.sum(row * row, 1) / D + eps)",
        "r = 1.0 / (tl.sqrt(tl.sum(row * row, 1) / D) + eps)",
    ),
    "the gradient of the new residual forgotten": Mutant(
        "add_rms_norm", "norm", "dh_out = grads[1].contiguous() if len(grads) == 2 else None", "dh_out = None"
    ),
    "a running sum that is not rescaled": Mutant(
        "log_softmax", "log_softmax", "total = total * tl.exp(m - base) + ", "total = total + "
    ),
    "a cotangent that is not summed": Mutant(
        "log_softmax", "log_softmax", "out = g - p * tl.sum(g, 1)[:, None]", "out = g - p"
    ),
    "the gradient of a chunk's losses not scaled": Mutant(
        "linear_cross_entropy",
        "cross_entropy",
        "_launch_backward(scale,",
        "_launch_backward(torch.ones_like(scale),",
        "every option",
    ),
    "a divergence that is not moved with the maxima": Mutant(
        "linear_distillation", "distillation", "(gap + before * moved) * shrink", "gap * shrink"
    ),
    "a gradient that does not sum to zero": Mutant(
        "linear_distillation", "distillation", " - p * pull[:, None]", "", "Jensen-Shannon, chunks"
    ),
    "the sink left out of the sum": Mutant(
        "softmax", "softmax", "total += tl.exp(k - m)", "total += 0.0 * tl.exp(k - m)", "sink"
    ),
    "the slope of the cap forgotten": Mutant("softmax", "softmax", "ds * slope * scale", "ds * scale", "softcap"),
    "pixels not reversed within their group": Mutant(
        "image_normalize",
        "image_normalize",
        "p = mirrored * 15 + (1 - 2 * mirrored) * p",
        "p = p + mirrored * 0",
        "packed to planar, flipped",
    ),
    "groups across the edge of a box not read": Mutant(
        "image_normalize", "image_normalize", "(last > x1)", "(last > x1 + 16)", "planar, cutmix"
    ),
    "a cotangent turned on, not back": Mutant(
        "qk_norm_rope", "qk_norm_rope", "g1 = y1 * c1 + y2 * s2", "g1 = y1 * c1 - y2 * s2"
    ),
    "heads after the first tile forgotten": Mutant(
        "qk_norm_rope", "qk_norm_rope", "for head_tile in range(head_tiles):", "for head_tile in range(1):"
    ),
    "values not passed through": Mutant(
        "rope_qkv", "rope", "_turn(v, v_copied, cos[..., :0], sin[..., :0], interleaved)", "None"
    ),
    "the gradient of a pixel's mean forgotten": Mutant(
        "layer_norm_2d", "layer_norm_2d", " - (tl.sum(g, 1) / C)[:, None]", ""
    ),
    "missing mask on the deviations of a group": Mutant(
        "group_norm", "group_norm", "block = tl.where(mask, block - mu, 0.0)", "block = block - mu"
    ),
    "the statistics of the batch taken for constants": Mutant(
        "batch_norm_act",
        "batch_norm",
        "means = channel_norm.group_means(found, weight, view, view.R * view.S)",
        "means = None",
    ),
    "a bias that the derivative forgets": Mutant(
        "bias_act",
        "bias_act",
        "_, pulled = act(h, dout, ACTIVATION)",
        "_, pulled = act(h - (0.0 if bias is None else b[None, :]), dout, ACTIVATION)",
    ),
    "another mask in the backward pass": Mutant(
        "dropout_add",
        "dropout_add",
        "g = tl.where(kept(seed, n, d, threshold), g * scale, 0.0)",
        "g = tl.where(kept(seed, n + 1, d, threshold), g * scale, 0.0)",
    ),
    "a scale that its own gradient has": Mutant(
        "scale_add",
        "scale_add",
        "            if scale is not None:\n                g *= gamma[None, :]\n            tl.store(dx",
        "            tl.store(dx",
    ),
    "columns of one program only in the gradient of alpha": Mutant(
        "dyt",
        "dyt",
        "program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)",
        "program = tl.program_id(1)",
    ),
    "every sample modulated as the first": Mutant(
        "add_modulated_layer_norm",
        "norm",
        "w = tl.load(weight + group * weight_stride + d,",
        "w = tl.load(weight + d,",
    ),
    "the gradients of all samples in one place": Mutant(
        "add_modulated_layer_norm",
        "norm",
        "at_partial = (p * (tl.num_programs(0) // P) + group) * D + d",
        "at_partial = p * (tl.num_programs(0) // P) * D + d",
    ),
    "another group's weight": Mutant(
        "gated_rms_norm", "gated_norm", "w = tl.load(weight + d,", "w = tl.load(weight + d % D,"
    ),
    "a gradient along the vector where its length is clamped": Mutant(
        "l2_normalize",
        "l2_normalize",
        "tl.where(tl.sqrt(squares) <= eps, 0.0, dot)",
        "dot",
        "some below eps",
    ),
    "the derivative of the focus forgotten": Mutant(
        "sigmoid_focal_loss",
        "binary_losses",
        "slope = power * (slope + gamma * loss * (against - along) * rho * inverse)",
        "slope = power * slope",
    ),
    "every row weighted as the first": Mutant(
        "binary_cross_entropy_with_logits",
        "binary_losses",
        "at = (n % rows)[:, None] * columns",
        "at = n[:, None] * 0",
        "weighted, smoothed",
    ),
    "the first tile of each program only": Mutant(
        "binary_cross_entropy_with_logits",
        "binary_losses",
        "tl.cdiv(N, BLOCK_N) * tl.cdiv(D, BLOCK_D), tl.num_programs(0)",
        "tl.num_programs(0), tl.num_programs(0)",
    ),
    "a running gap that is not moved to the new maximum": Mutant(
        "soft_target_cross_entropy", "soft_target_cross_entropy", "gap += (base - before) * mass + ", "gap += "
    ),
    "probabilities taken for a distribution": Mutant(
        "soft_target_cross_entropy",
        "soft_target_cross_entropy",
        "* mass[:, None] - pull",
        "- pull",
        "weighted, smoothed, sum",
    ),
    "the first program of a mask only": Mutant(
        "dice_bce_loss", "dice_bce_loss", "(p < P)[:, None] & (r < R)[None, :]", "(p < 1)[:, None] & (r < R)[None, :]"
    ),
    "the size of the masks taken for a constant": Mutant(
        "dice_bce_loss", "dice_bce_loss", "out = (c[:, None] * t + e[:, None]) * slope", "out = c[:, None] * t * slope"
    ),
}

#: A ragged block, more rows than one round of the persistent loop holds, and a row longer than one program does; more
#: heads than a tile holds; rows, images and masks with a ragged end. Each for the operators that have these dims.
DIMS = (
    {"N": 5, "D": 33},
    {"N": 129, "D": 129},
    {"N": 2, "D": 16_385},
    {"B": 2, "H": 33, "S": 3, "D": 66},
    {"B": 2, "Q": 5, "K": 33},
    {"B": 1, "Q": 2, "K": 16_385},
    {"N": 3, "C": 3, "H": 9, "W": 80},
    {"N": 3, "C": 5, "H": 2, "W": 17},
    {"N": 3, "C": 33, "H": 3, "W": 33},
    {"N": 1, "C": 1025, "H": 1, "W": 7},
    {"N": 3, "G": 3, "K": 5, "S": 33},
    {"N": 1, "G": 1, "K": 5, "S": 2500},
    {"N": 5, "C": 3, "S": 33},
    {"N": 1, "C": 1, "S": 4097},
    {"B": 5, "T": 1, "D": 33},
    {"B": 129, "T": 1, "D": 129},
    {"B": 2, "S": 5, "D": 33},
    {"B": 2, "S": 129, "D": 129},
    {"B": 2, "S": 2, "D": 16_385},
    {"N": 5, "D": 8, "C": 33},
    {"N": 3, "D": 8, "C": 4097},
    {"N": 3, "D": 8, "C": 9001},
    {"N": 5, "K": 2, "D": 33},
    {"N": 129, "K": 2, "D": 129},
    {"N": 5, "C": 33},
    {"N": 2, "C": 16_385},
    {"N": 2, "K": 3, "S": 33},
    {"N": 1, "K": 2, "S": 10_001},
)


def _cases(op: str, variant: str) -> list[Case]:
    (found,) = [o for o in OPS if o.name == op]
    return [
        Case(found, dims, torch.float32, variant=variant, layout=layout, cotangent_layout=layout, regime=regime)
        for dims in DIMS
        if dims.keys() == found.dims.keys()
        for layout in ("contiguous", "strided", "expanded")
        for regime in ("ordinary", "tiny")
    ]


def _survives(op: str, variant: str) -> bool:
    for case in _cases(op, variant):
        try:
            check_against_reference(case, "triton")
        except Exception as failure:  # a wrong answer, or a crash: either way it was noticed
            print(case, failure)
            return False
    return True


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_broken_kernel_fails_the_contract(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(braze.kernels.triton, mutant.kernels, _broken(mutant, tmp_path))
    assert not _survives(mutant.op, mutant.variant), f"{mutant.after!r} went unnoticed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_an_element_that_compiled_code_leaves_out_shows(dtype: torch.dtype) -> None:
    (left_out,) = compiled_call(lambda x: (torch.empty_like(x, dtype=dtype),), (torch.zeros(40, 1000),), {})
    largest = True if dtype == torch.bool else torch.iinfo(dtype).max if not dtype.is_floating_point else None
    assert (left_out.isnan() if largest is None else left_out == largest).all()


@pytest.mark.parametrize(("op", "variant"), sorted({(m.op, m.variant) for m in MUTANTS.values()}))
def test_the_kernels_as_they_are_pass(op: str, variant: str) -> None:
    assert _survives(op, variant)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no guard")
@pytest.mark.parametrize(("readable", "writable"), [(99, 100), (100, 99)], ids=["read", "written"])
def test_an_element_behind_a_tensor_is_not_touched_unnoticed(readable: int, writable: int) -> None:
    memory = torch.zeros(2, 100)
    copy[(1,)](memory[0], memory[1], 100, BLOCK=128, TWICE=False)
    with pytest.raises(Exception, match="outside its tensors"):
        copy[(1,)](memory[0, :readable], memory[1, :writable], 100, BLOCK=128, TWICE=False)


def _broken(mutant: Mutant, folder: Path) -> ModuleType:
    original: Any = importlib.import_module(f"braze.kernels.triton.{mutant.kernels}")
    source = Path(original.__file__).read_text()
    assert mutant.before in source, "the kernel was rewritten: rewrite this mutant too"
    file = folder / "broken.py"
    file.write_text(source.replace(mutant.before, mutant.after))
    name = "braze.kernels.triton.broken"  # in the package, for its relative imports
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module
