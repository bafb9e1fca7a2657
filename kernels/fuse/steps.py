"""What is done to the branch of a residual block before its sum: a factor, stochastic depth, dropout.

Modules are told by what they do to drawn inputs. A factor is a parameter of the module itself (LayerScale), or rows
that come from a condition (the gates of diffusion transformers).
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .joint import takes
from .sample import Exactly, Refused, Sample, kind
from .sites import Known, Unit, called, child, hooked, resolved

#: Samples of a trial of stochastic depth, and by how many standard deviations the count of those kept may be off.
TRIALS, DEVIATIONS = 4096, 6.0


class Step(NamedTuple):
    """One of them.

    ``how`` is "scale" (a factor of each channel), "gate" (a row of factors for each sample or token), "path"
    (stochastic depth), "dropout", or "idle". ``source`` is the expression that the fused function is given for it.
    """

    how: str
    source: str
    #: The class of the module that does it; None for an expression.
    owner: type | None = None
    #: The module's attribute: its factor, or its probability.
    name: str = ""
    by_keep: bool = True
    #: Whether the channels are the second dim, as of images, and not the last.
    channels: bool = False


class Wrapped(NamedTuple):
    """A step, what it is applied to, and where in its node that is."""

    step: Step
    inner: ast.expr
    where: str


#: From a node of a step, by ``where``, to what it is applied to.
INNER = {
    "argument": lambda node: node.args[0],
    "left": lambda node: node.left,
    "right": lambda node: node.right,
    "value": lambda node: node.func.value,
}


def wrapped(node: ast.expr, module: nn.Module, unit: Unit, known: Known) -> Wrapped | None:
    """The step that the expression ends with, if it is one."""
    call = called(node)
    if call is not None and child(call[0]) is not None:
        part = resolved(call[0], module, unit.function)
        step = _of_module(part, ast.unparse(call[0]), known) if isinstance(part, nn.Module) else None
        return None if step is None else Wrapped(step, call[1], "argument")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for factor, inner, where in ((node.left, node.right, "right"), (node.right, node.left, "left")):
            step = _factor(factor, module, unit)
            if step is not None:
                return Wrapped(step, inner, where)
    if call is not None and isinstance(call[0], ast.Attribute) and call[0].attr == "mul":
        step = _factor(call[1], module, unit)
        return None if step is None else Wrapped(step, call[0].value, "value")
    return _dropout_function(node, module, unit)


def _dropout_function(node: ast.expr, module: nn.Module, unit: Unit) -> Wrapped | None:
    """``F.dropout(y, p=p, training=training)``."""
    if not isinstance(node, ast.Call) or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
        return None
    options = {one.arg: one.value for one in node.keywords}
    if set(options) != {"p", "training"} or resolved(node.func, module, unit.function) is not F.dropout:
        return None
    source = f"({ast.unparse(options['p'])}, {ast.unparse(options['training'])})"
    return Wrapped(Step("dropout", source), node.args[0], "argument")


def _of_module(part: nn.Module, source: str, known: Known) -> Step | None:
    if hooked(part):
        return None
    if type(part) is nn.Identity:
        return Step("idle", source, nn.Identity)
    if type(part).forward is nn.Dropout.forward and isinstance(part, nn.Dropout):
        return None if part.inplace else Step("dropout", source, type(part), "p")
    if any(True for _ in part.children()) or any(True for _ in part.buffers()) or isinstance(part, _DropoutNd):
        return None
    parameters = [name for name, _ in part.named_parameters()]
    if len(parameters) > 1:
        return None
    look = _scaling if parameters else _dropping
    found = known.once((look, kind(part)), lambda: look(part))
    return None if found is None else found._replace(source=source, owner=type(part))


def _scaling(part: nn.Module) -> Step | None:
    """A LayerScale: ``x · p`` over the last dim, or over the channels of images."""
    ((name, live),) = part.named_parameters()
    if live.dim() != 1 or live.numel() < 2:
        return None
    try:
        sample = Sample(part, part, {})
        factor = getattr(sample.module, name).detach()
        for channels in (False, True):
            x = sample.randn(2, len(factor), 2, 3) if channels else sample.randn(2, 3, len(factor))
            expected = x * (factor.view(-1, 1, 1) if channels else factor)
            if _gives(sample.module, x, expected):
                return Step("scale", "", name=name, channels=channels)
    except Refused:
        pass
    return None


def _gives(module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Whether the module answers that, and leaves its input as it was."""
    given = x.clone()
    try:
        with torch.no_grad(), Exactly():
            y = module.forward(given)
    except Exception:
        return False
    same = isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-9)
    return same and torch.equal(given, x)


def _dropping(part: nn.Module) -> Step | None:
    """Stochastic depth: in training whole samples are 0, as often as one attribute says, and the others a multiple."""
    for name, value in vars(part).items():
        if name[:1] == "_" or isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            continue
        found = {by_keep for p in (0.5, 0.25) for by_keep in _drops(part, name, p)}
        if len(found) == 1 and None not in found and _idles(part, name):
            return Step("path", "", name=name, by_keep=bool(found.pop()))
    return None


def _drops(part: nn.Module, name: str, p: float) -> Iterator[bool | None]:
    """Whether what it keeps with this probability is divided by ``1 − p``; None if it does something else."""
    x = torch.rand(TRIALS, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 1.0
    try:
        ratio = _run(part, name, p, x, training=True) / x
    except Exception:
        yield None
        return
    ratio, first = ratio.flatten(1), ratio.flatten(1)[:, :1]
    kept = first.squeeze(1) != 0.0
    off = abs(kept.sum().item() - TRIALS * (1 - p)) / (TRIALS * p * (1 - p)) ** 0.5
    if off > DEVIATIONS or not torch.allclose(ratio, first.expand_as(ratio)):
        yield None
        return
    for by_keep, factor in ((True, 1 / (1 - p)), (False, 1.0)):
        if torch.allclose(first[kept], torch.tensor(factor, dtype=torch.float64)):
            yield by_keep
            return
    yield None


def _idles(part: nn.Module, name: str) -> bool:
    """Whether it does nothing in evaluation, and with a probability of 0."""
    x = torch.ones(2, 3, 4, dtype=torch.float64)
    return all(torch.equal(_run(part, name, p, x, training=t), x) for p, t in ((0.5, False), (0.0, True)))


def _run(part: nn.Module, name: str, p: float, x: Tensor, *, training: bool) -> Tensor:
    module = copy.deepcopy(part).train(training)
    setattr(module, name, p)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)  # torch.manual_seed would seed GPUs too, which are not forked
        y: Tensor = module.forward(x.clone())
    return y


# ---- Factors.


def _factor(node: ast.expr, module: nn.Module, unit: Unit) -> Step | None:
    """A vector that is a parameter of the module, or rows of a condition."""
    source = ast.unparse(node)
    if _is_rows(node) or (isinstance(node, ast.Name) and node.id in _rows_by_name(unit.tree)):
        return Step("gate", source)
    parameter = resolved(_root(node), module, unit.function)
    if not isinstance(parameter, nn.Parameter) or parameter.numel() < 2:
        return None
    try:
        value = view(source, module)
    except Exception:
        return None
    shape = _trailing(value.shape)
    if shape.numel() != max(shape) or value.numel() != parameter.numel():
        return None
    return Step("scale", source, channels=len(shape) > 1) if shape[0] == shape.numel() else None


def view(source: str, module: nn.Module) -> Tensor:
    """A view of a parameter of the module, by its methods, as the source has it."""
    value: Tensor = eval(source, {"__builtins__": {}}, {"self": module})
    return value


_VIEWS = ("reshape", "view", "unsqueeze", "flatten", "to")


def _root(node: ast.expr) -> ast.expr:
    """``self.gamma`` of ``self.gamma.reshape(1, -1, 1, 1)``."""
    if isinstance(node, ast.Subscript):
        return _root(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS:
        return _root(node.func.value)
    return node


def _trailing(shape: torch.Size) -> torch.Size:
    """Without leading ones, which broadcasting would put there."""
    ones = next((i for i, n in enumerate(shape) if n != 1), len(shape) - 1)
    return shape[ones:]


def _is_rows(node: ast.expr) -> bool:
    """``gate.unsqueeze(1)``, ``gate[:, None]`` and ``gate[:, None, :]``."""
    if isinstance(node, ast.Call):
        call = called(node)
        one = call is not None and isinstance(call[1], ast.Constant) and call[1].value == 1
        return one and isinstance(node.func, ast.Attribute) and node.func.attr == "unsqueeze"
    return isinstance(node, ast.Subscript) and ast.unparse(node.slice) in (":, None", "(:, None)", ":, None, :")


@functools.lru_cache(maxsize=4096)
def _rows_by_name(tree: ast.FunctionDef) -> frozenset[str]:
    """The names of the parts of one tensor, as a linear map of a condition gives them."""
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            function, names = node.value.func, node.targets[0]
            if not isinstance(function, ast.Attribute) or function.attr not in ("chunk", "unbind"):
                continue
            # Parts of a parameter are no rows. Of two parts the one is not the other's gate but its half: of a rotary
            # embedding, or of a gated MLP.
            if child(function.value) is None and isinstance(names, ast.Tuple) and len(names.elts) > 2:
                found |= {name.id for name in names.elts if isinstance(name, ast.Name)}
    return frozenset(found)


# ---- When the model runs.


def applied(step: Step, operand: Any, y: Any) -> Any:
    """What the source does."""
    if step.owner is not None:
        return operand(y)
    if operand is None:
        return y
    return F.dropout(y, p=operand[0], training=operand[1]) if step.how == "dropout" else y * operand


def intact(step: Step, operand: Any) -> bool:
    """Whether the module is still what it was, and nothing listens."""
    return step.owner is None or (type(operand) is step.owner and not hooked(operand))


def factor(step: Step, operand: Any) -> Tensor | None:
    """The factor, with the dims that it is broadcast over."""
    if step.owner is None or operand is None:
        return operand
    value: Tensor = getattr(operand, step.name)
    return value.view(-1, 1, 1) if step.channels else value


def probability(step: Step, operand: Any) -> float:
    """Of dropping something now."""
    p, training = operand if step.owner is None else (getattr(operand, step.name), operand.training)
    return float(p) if training else 0.0


def live(step: Step, module: nn.Module, unit: Unit) -> bool:
    """Whether the step does anything in training; a probability that is an argument may be anything."""
    if step.how in ("scale", "gate"):
        return True
    if step.how == "idle":
        return False
    node = ast.parse(step.source, mode="eval").body
    if step.owner is None:
        assert isinstance(node, ast.Tuple)
        return resolved(node.elts[0], module, unit.function) != 0.0
    return bool(getattr(resolved(node, module, unit.function), step.name) > 0.0)


def per_channel(value: Any, y: Tensor) -> tuple[Tensor, bool] | None:
    """(factor [D], whether D is y's second dim and not its last), or None if it is something else."""
    if not takes(value) or value.dim() > y.dim():
        return None
    shape = _trailing(value.shape)
    if len(shape) == 1 and shape[0] == y.shape[-1]:
        return value.reshape(-1), False
    if len(shape) == y.dim() - 1 > 1 and shape[0] == shape.numel() == y.shape[1]:
        return value.reshape(-1), True
    return None
