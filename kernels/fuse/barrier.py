"""Modules whose class must not change."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from .joint import fusion


def barrier(module: nn.Module, own: bool = False) -> str:
    """Why this module must not be touched, or nothing. Its ``own`` parameters alone may count."""
    if "forward" in vars(module):
        return "the instance has a forward of its own"
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    made = fusion(module)
    cls = type(module) if made is None else made.original
    if cls.__reduce__ is not object.__reduce__ or cls.__reduce_ex__ is not object.__reduce_ex__:
        return "its class pickles itself in a way of its own"
    for name, parameter in module.named_parameters(recurse=not own):
        if type(parameter) is not nn.Parameter and type(parameter).__name__ != "DTensor":
            return f"{name} is a {type(parameter).__name__}"
        if not parameter.is_floating_point():
            return f"{name} is {parameter.dtype}"
    return ""
