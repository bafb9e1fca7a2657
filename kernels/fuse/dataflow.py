"""Which module's result goes into which: by tracing every forward with its submodules as single steps."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import fx, nn


class Step(NamedTuple):
    """One call of a module: where it is in the trace, whose forward was traced."""

    node: fx.Node
    inside: nn.Module


class Dataflow:
    """The calls of modules in the forwards of a model, and the forwards that could not be traced."""

    def __init__(self, model: nn.Module, wanted: set[int]) -> None:
        self.calls: dict[int, list[Step]] = {}
        self.failures: dict[int, str] = {}
        for module in model.modules():
            if type(module) in (nn.ModuleList, nn.ModuleDict) or not any(id(m) in wanted for m in _below(module)):
                continue
            try:
                graph = _Tracer().trace(module, _defaults(module))
            except Exception as error:
                self.failures |= {id(m): f"{type(module).__name__} cannot be traced: {error}" for m in _below(module)}
                continue
            for node in graph.nodes:
                if node.op == "call_module":
                    self.calls.setdefault(id(module.get_submodule(node.target)), []).append(Step(node, module))

    def before(self, step: Step) -> nn.Module | None:
        """The module whose only use is as the single operand of this call."""
        operands = step.node.all_input_nodes
        if len(operands) != 1 or step.node.args != (operands[0],) or step.node.kwargs or len(operands[0].users) != 1:
            return None
        return _module(step, operands[0])

    def behind(self, step: Step) -> nn.Module | None:
        """The module that is the only one to take the result of this call, as its single operand."""
        users = list(step.node.users)
        if len(users) != 1 or users[0].args != (step.node,) or users[0].kwargs:
            return None
        return _module(step, users[0])


def _module(step: Step, node: fx.Node) -> nn.Module | None:
    return step.inside.get_submodule(str(node.target)) if node.op == "call_module" else None


def _below(module: nn.Module) -> list[nn.Module]:
    """The modules that this one's forward may call: its children, and those in its lists."""
    found = []
    for child in module.children():
        found += _below(child) if type(child) in (nn.ModuleList, nn.ModuleDict) else [child]
    return found


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Arguments that a call may leave out have their defaults."""
    parameters = inspect.signature(module.forward).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every submodule is one step."""
        return True
