"""One model of the zoo: counted, fused, compared with itself before, unfused."""

from __future__ import annotations

import copy
import time
import traceback
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from braze.kernels import FusionReport, fuse, unfuse, use_backend
from braze.kernels.fuse.report import Record as FusionRecord
from braze.kernels.fuse.sample import Exactly

from ..records import Record
from . import models
from .count import expected_joints

#: In float64 a swap that computes the same differs by roundings only; what it computes wrong shows at its full size.
WRONG = 1e-6

#: What the models are asked to leave out, so that two runs are the same: every kind of dropout, by attribute name.
_RANDOM = ("p", "drop_prob", "dropout", "dropout_p", "attention_dropout", "dropout_rate", "hidden_dropout")


def measure(name: str) -> Record:
    """Everything about one model, as one flat record; an exception is a record too."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        with use_backend("eager"):  # on the CPU compilers would take hours, and the contract's tests know them
            return {"model": name, **_measure(name)}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        failed = f"{type(error).__name__}: {error}"[:300]
        return {
            "model": name,
            "exception": failed,
            "at": f"{where.filename.split('site-packages/')[-1]}:{where.lineno}",
        }


def _measure(name: str) -> Record:
    start = time.process_time()
    model, call = models.build(name)
    built = time.process_time() - start
    _spread(model.train())
    plain, expected = copy.deepcopy(model), expected_joints(model)
    before = _facts(model)
    start = time.process_time()
    report = fuse(model)
    seconds = time.process_time() - start
    kept = _facts(model) == before
    for one in (model, plain):  # fused as it is, dropout and all; compared without
        _still(one)
    record: Record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "build_seconds": round(built, 3),
        "fuse_seconds": round(seconds, 3),
        "kept": kept,
        **_joints(expected, report),
        **_errors(model, plain, call),
    }
    unfuse(model)
    same = [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    again, first = (_step(m, call, training=False) for m in (model, plain))
    record["unfuse_equal"] = same and all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    return record


def _spread(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:  # ones and zeros would hide an exchanged weight
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def _still(model: nn.Module) -> None:
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):  # some read their configuration as they run
            for attribute in _RANDOM:
                if isinstance(getattr(owner, attribute, None), float):
                    setattr(owner, attribute, 0.0)


def _facts(model: nn.Module) -> dict[str, Any]:
    return {
        "keys": list(model.state_dict()),
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: id(b) for name, b in model.named_buffers(remove_duplicate=False)},
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
    }


def _joints(expected: list[Any], report: FusionReport) -> Record:
    fused, reasons = Counter[str](), dict[str, str]()
    for one in report:
        if one.status not in ("left", "offered"):
            fused.update((one.path,))
        else:
            reasons.setdefault(one.path, one.reason)
    operators = Counter(one.now for one in report if one.status == "fused")
    found, swapped, missed = Counter[str](), Counter[str](), Counter[str]()
    done = {(one.path, kind) for one in report if one.status != "left" for kind in _kinds(one)}
    for joint in expected:
        found[joint.kind] += 1
        # A rotary embedding may be a module of its own inside the attention that the count names.
        below = joint.kind == "rope" and any(k == "rope" and p.startswith(f"{joint.path}.") for p, k in done)
        if below or (joint.path, joint.kind) in done:
            swapped[joint.kind] += 1
        else:
            missed[f"{joint.kind} {joint.was}: {reasons.get(joint.path, 'not recognised')}"] += 1
    return {
        "found": dict(found),
        "swapped": dict(swapped),
        "missed": dict(missed),
        "refused": sum(one.status == "left" for one in report),
        "fused": len(report.fused),
        "operators": dict(operators),
    }


def _kinds(one: FusionRecord) -> tuple[str, ...]:
    drops = "random numbers" in one.reason and one.now.startswith("add_")
    return ("dropout and sum",) if drops else _KINDS.get(one.now, ())


_NORMS = ("norm",)
_KINDS = {
    "rms_norm": _NORMS,
    "layer_norm": _NORMS,
    "layer_norm_2d": _NORMS,
    "l2_normalize": _NORMS,
    "dyt": _NORMS,
    "glu": ("gated mlp",),
    "packed_glu": ("gated mlp",),
    "mlp": ("plain mlp, offered",),
    "rope": ("rope",),
    "batch_norm_act": ("batch norm and activation",),
    "scale_add": ("residual tail",),
    "gated_add": ("gated sum",),
    "dropout_add": ("dropout and sum",),
    "modulated_layer_norm": ("modulated norm",),
    "modulated_rms_norm": ("modulated norm",),
    "add_modulated_layer_norm": ("modulated norm", "gated sum"),
    "add_modulated_rms_norm": ("modulated norm", "gated sum"),
    "group_norm": ("group norm and activation",),
}


def _errors(model: nn.Module, plain: nn.Module, call: dict[str, Any]) -> Record:
    """Relative differences: in float64, where they say what is computed; in float32, where they say how well."""
    record: Record = {}
    with Exactly():
        doubles = [copy.deepcopy(m).double() for m in (model, plain)]
        wide = {name: _double(value) for name, value in call.items()}
        try:
            truth = _step(doubles[1], wide, training=True)
        except Exception as error:
            truth = []
            record["not in float64"] = f"{type(error).__name__}: {error}"[:200]
        if truth:
            outputs, gradients = _differences(_step(doubles[0], wide, training=True), truth)
            record |= {"output_error": outputs, "gradient_error": gradients}
            record["right"] = max(outputs, gradients) <= WRONG
    got, own = (_step(copy.deepcopy(m), call, training=True) for m in (model, plain))
    outputs, gradients = _differences(got, own)
    record |= {"output_difference_float32": outputs, "gradient_difference_float32": gradients}
    record.setdefault("right", max(outputs, gradients) <= 1e-3)
    return record


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list):
        return [_double(item) for item in value]
    return {k: _double(v) for k, v in value.items()} if isinstance(value, dict) else value


def _step(model: nn.Module, call: dict[str, Any], *, training: bool) -> list[Tensor]:
    """Outputs, then the gradients of all parameters against a fixed cotangent; without gradients in evaluation."""
    model.train(training)
    torch.manual_seed(0)
    with torch.set_grad_enabled(training):
        outputs = [y for y in models.floating(model(**copy.deepcopy(call))) if y.numel()]
    if not training:
        return outputs
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in outputs if y.requires_grad)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)  # type: ignore[arg-type]
    return [torch.stack([y.detach().abs().max() for y in outputs]), *(y.detach() for y in outputs)] + [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)
    ]


def _differences(got: list[Tensor], own: list[Tensor]) -> tuple[float, float]:
    """The largest difference of outputs, each against its scale; and of gradients, against the largest of all."""
    count = 1 + own[0].numel()
    outputs = max(_relative(a, b, b.abs().max().item()) for a, b in zip(got[1:count], own[1:count], strict=True))
    largest = max((g.abs().max().item() for g in own[count:] if g.numel()), default=0.0)
    gradients = max((_relative(a, b, largest) for a, b in zip(got[count:], own[count:], strict=True)), default=0.0)
    return outputs, gradients


def _relative(a: Tensor, b: Tensor, scale: float) -> float:
    if not b.numel() or torch.equal(a, b):
        return 0.0
    worst = (a - b).nan_to_num(nan=0.0 if torch.equal(a.isnan(), b.isnan()) else float("inf")).abs().max().item()
    return worst / scale if scale else worst
