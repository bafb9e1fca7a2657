"""What a compiler is given of a function: its graphs, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd


def compiled_whole(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[torch.fx.GraphModule]]:
    """The function, compiled without a graph break, and a list that fills with graphs when it runs."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)), graphs


def shapes(graphs: list[torch.fx.GraphModule]) -> set[tuple[int, ...]]:
    """Of all tensors in the graphs."""
    values = [node.meta.get("val") for graph in graphs for node in graph.graph.nodes]
    return {tuple(value.shape) for value in values if hasattr(value, "shape")}
