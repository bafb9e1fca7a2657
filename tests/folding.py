"""What the tests of fold share: two modules in a row, as trained, and how near a folded model must be."""

import copy

import torch
from torch import nn

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """Two modules, one after the other."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x))


def trained(model):
    """Statistics and parameters as after a training: a wrong fold shows."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0.0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def error(y, truth):
    return ((y.double() - truth).abs().max() / truth.abs().max()).item()


def check(model, plain, *inputs):
    """Within twice the model's own error against float64, and a rounding step; the largest of all inputs.

    Of a model in float64 its own error is taken to be as many rounding steps as in float32.
    """
    errors, budgets = [], []
    for x in inputs:
        with torch.no_grad():
            truth = copy.deepcopy(plain).double()(x.double())
            got, own = model(x), plain(x)
            narrow = copy.deepcopy(plain).float()(x.float()) if own.dtype == torch.float64 else own
        assert got.dtype == own.dtype
        steps = error(narrow, truth) / torch.finfo(narrow.dtype).eps
        errors.append(error(got, truth))
        budgets.append(2 * (steps + 1) * torch.finfo(own.dtype).eps)
    assert max(errors) <= max(budgets)
