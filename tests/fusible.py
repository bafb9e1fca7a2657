"""What several tests of fuse and fold are about: a small language model, rotary helpers, a class that cannot change."""

import copy

import torch
from torch import nn


def tiny_llama(**sizes):
    """The same weights for the same sizes."""
    import transformers

    torch.manual_seed(0)
    defaults = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97}
    config = transformers.LlamaConfig(**{"hidden_size": 32, "pad_token_id": 0, "use_cache": False, **defaults, **sizes})
    return transformers.LlamaForCausalLM(config)


def rotate_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def apply_rotary(q, k, cos, sin):
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def unswappable(base, *args):
    """A ``base(*args)`` whose class cannot change; that of copies, on which a swap is tried, can."""

    class Unswappable(base):
        live = True

        def __deepcopy__(self, memo):
            copied = nn.Module.__new__(type(self))
            copied.__dict__.update(copy.deepcopy(vars(self), memo), live=False)
            return copied

        def __setattr__(self, name, value):
            if name == "__class__" and self.live:
                raise RuntimeError("no other class for me")
            super().__setattr__(name, value)

    return Unswappable(*args)
