"""Whether two forms of a model differ by more than rounding.

Sums in another order round differently, and by how much no bound known beforehand says for a deep model. So it is
measured, for each output and gradient r, in the Euclidean norm:

    ‖after − exact‖ ≤ 2 · (‖before − exact‖ + max_k ‖before_k − before‖ + κ ‖exact‖)

``exact`` is the model in float64; ``before_k`` is the model with each weight and input moved by one rounding step, up
or down at random. The first term is the rounding error that the model had, the second what one more rounding of its
data can do; the second keeps a result whose own error happens to be small from being held to that luck.

κ is 0 for outputs. For gradients it is √(L ρ), with L the number of modules that have parameters and ρ the largest
relative rounding error of an output, by the same two terms: in each layer a rounding of relative size ρ carries a share
ρ of the units across the kink of a ReLU or to another maximum of a pool, and the gradient changes by all of what these
carry. (One unit that flips changes gradients of ResNet-18 by 0.0007 of their norm, of RepVGG-A0 by 0.007.) A gradient
that is wrong by less than that is not seen.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

SLACK = 2.0
#: Perturbed runs; the largest of their effects counts.
RUNS = 3


@dataclasses.dataclass(frozen=True)
class Check:
    """The result that came nearest to its budget, or went over it: norms of the error and of the budget."""

    error: float
    budget: float
    where: str
    results: int
    mode: str  #: "train" or "eval"

    @property
    def failed(self) -> bool:
        """Whether the forms differ by more than rounding; NaN where there was none does."""
        return not self.error <= self.budget

    def __str__(self) -> str:
        nearest = f"{self.error:.1e} of {self.budget:.1e}, {self.where}"
        return f"{self.results} results in {self.mode}; nearest to its budget: {nearest}"


def compare(before: nn.Module, after: nn.Module, inputs: Sequence[Any]) -> Check:
    """Compare outputs, and gradients of parameters, of two modules of one model; both are used up.

    Where the model draws random numbers in training, it is compared in evaluation, since a mask is drawn in the order
    of memory.
    """
    if before.training and _is_random(before, inputs):
        before.eval()
        after.eval()
    own, got = _run(copy.deepcopy(before), inputs), _run(after, inputs)
    truth = _exact(before, inputs) or own
    moved = [_run(_moved(copy.deepcopy(before), k), _moved_inputs(inputs, k)) for k in range(RUNS)]
    rounding = {
        name: _norm(value - truth[name]) + max(_norm(run[name] - value) for run in moved) for name, value in own.items()
    }
    outputs = [name for name in own if name.startswith("output")]
    relative = max((rounding[name] / (_norm(truth[name]) or 1.0) for name in outputs), default=0.0)
    layers = sum(any(True for _ in module.parameters(recurse=False)) for module in before.modules())
    worst = Check(0.0, 0.0, "all are exact", len(own), "train" if before.training else "eval")
    for name in own:
        kinks = 0.0 if name in outputs else (layers * relative) ** 0.5 * _norm(truth[name])
        budget = SLACK * (rounding[name] + kinks)
        check = dataclasses.replace(worst, error=_norm(got[name] - truth[name]), budget=budget, where=name)
        if check.failed:
            return check
        if budget and check.error / budget > worst.error / (worst.budget or 1.0):
            worst = check
    return worst


def _is_random(model: nn.Module, inputs: Sequence[Any]) -> bool:
    first, second = (_run(copy.deepcopy(model), inputs, seed) for seed in (0, 1))
    return any(not torch.equal(first[name], second[name]) for name in first if name.startswith("output"))


def _exact(model: nn.Module, inputs: Sequence[Any]) -> dict[str, Tensor] | None:
    """None where the model does not run in float64."""
    exact = tree_map(lambda leaf: leaf.double() if _is_floating(leaf) else leaf, list(inputs))
    try:
        return _run(copy.deepcopy(model).double(), exact)
    except RuntimeError:
        return None


def _run(model: nn.Module, inputs: Sequence[Any], seed: int = 0) -> dict[str, Tensor]:
    """Outputs, and gradients of the parameters against one drawn cotangent for each output, in float64."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        outputs = [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
        results = {f"output {i}": output.detach().double() for i, output in enumerate(outputs)}
        torch.manual_seed(2)
        pairs = [(y, _cotangent(y)) for y in outputs if y.requires_grad]
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if pairs and named:
            ys, cotangents = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(ys, [p for _, p in named], cotangents, allow_unused=True)
            for (name, _), gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    results[f"gradient of {name}"] = gradient.double()
        return results


def _cotangent(y: Tensor) -> Tensor:
    """Multiples of 1/64 below 2: the same values in every dtype and layout."""
    return (torch.randint(-127, 128, y.shape, device="cpu") / 64).to(y)


def _moved(model: nn.Module, seed: int) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(_move(p, 1000 * seed + i))
    return model


def _moved_inputs(inputs: Sequence[Any], seed: int) -> list[Any]:
    return tree_map(lambda leaf: _move(leaf, 1000 * seed + 999) if _is_floating(leaf) else leaf, list(inputs))


def _move(x: Tensor, seed: int) -> Tensor:
    """x · (1 ± ε), the sign drawn for each element."""
    if not x.is_floating_point():
        return x
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x * (1 + signs.to(x) * torch.finfo(x.dtype).eps)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x).item()
