"""Heads of language models: linear layers whose logits a cross-entropy may never need.

Such a head returns :class:`DeferredLogits`. To defer is always right, and useless where something looks at the logits.
So only what looks like a head is taken: the output embeddings of a model, a layer that shares the weight of an
embedding, and one with many times more features out than in, if the model has no second one like it.
"""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import dispatch
from ..ops.autocast import autocasting
from ..ops.cross_entropy import cross_entropy
from .deferred import defer
from .joint import Joint, fused_class, takes
from .losses import output_embeddings
from .sample import Draw, Refused, Sample
from .savings import Counted, Measure

#: Classes per feature, from which on a linear layer is taken for a head. MLPs widen by 4, seldom by 8, and in pairs.
WIDENS = 8

#: Bytes of logits below which they are computed as ever. On one CPU core (64 to 2,048 tokens, 128 to 32,000 classes,
#: float32 and bfloat16) loss and gradients took 1.1 to 5.6 times as long without logits of up to 8 MiB, by 1 to 30 ms,
#: and 0.76 to 0.93 times as long without 16 MiB or more.
SMALLEST = 16 * 2**20


@dataclass(frozen=True)
class OutputHead(Joint):
    """A ``torch.nn.Linear`` that returns deferred logits if they would take ``smallest`` bytes or more."""

    hint: ClassVar[str] = "head"
    operator: ClassVar[str] = "linear_cross_entropy"  # type: ignore[misc]
    note: ClassVar[str] = (
        "logits of 16 MiB or more deferred, but not under torch.compile, torch.export, no_grad and inference_mode"
    )
    smallest: int

    @classmethod
    def candidates(cls, root: nn.Module) -> set[int]:
        """The output embeddings, whatever their class, and linear layers that are like them."""
        modules = list(root.modules())
        found = {id(head) for module in modules if (head := output_embeddings(module)) is not None}
        embeddings = {id(getattr(module, "weight", None)) for module in modules if isinstance(module, nn.Embedding)}
        # Parts of what is a linear layer as a whole: an adapter, and what it adapts.
        inside = {id(part) for module in modules if _linear(module) for part in module.modules() if part is not module}
        layers = [module for module in modules if type(module) is nn.Linear and id(module) not in inside]
        alike = collections.Counter((layer.in_features, layer.out_features) for layer in layers)
        for layer in layers:
            wide = layer.out_features >= WIDENS * layer.in_features
            if id(layer.weight) in embeddings or (wide and alike[layer.in_features, layer.out_features] == 1):
                found.add(id(layer))
        return found

    @classmethod
    def sizes(cls, module: nn.Module) -> Sequence[dict[int, int] | None]:
        """48 features and 80 classes."""
        return ({module.in_features: 48, module.out_features: 80} if type(module) is nn.Linear else None,)

    @classmethod
    def recognise(cls, sample: Sample) -> OutputHead | None:
        """A subclass, or an adapter around the layer, computes more than one product."""
        if type(sample.source) is not nn.Linear:
            raise Refused("its logits are not those of a torch.nn.Linear alone")
        return cls(SMALLEST)

    def members(self, original: type) -> dict[str, Any]:
        """A forward that defers, and the original's own where the logits are wanted for sure."""
        own, smallest = original.forward, self.smallest  # type: ignore[attr-defined]

        @functools.wraps(own)
        def forward(self: nn.Linear, input: Any) -> Any:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _defers(self, input, smallest):
                return own(self, input)
            return defer(input, self.weight, self.bias)

        return {"forward": forward}

    def trial(self, sample: Sample) -> tuple[nn.Module, nn.Module]:
        """The losses of both; however small, the logits are deferred."""
        original, fused = Joint.trial(OutputHead(0), sample)
        return _Losses(original), _Losses(fused)

    def counted(self, sample: Sample) -> Counted:
        """Against the fused loss of logits in memory, at as many classes per feature as there are."""
        source, features = sample.source, 48
        assert type(source) is nn.Linear
        head = nn.Linear(features, round(features * source.out_features / source.in_features), source.bias is not None)
        fused = copy.deepcopy(head)
        fused.__class__ = fused_class(nn.Linear, OutputHead(0))
        hidden = sample.randn(8, features).cpu()
        draw = Draw("an ordinary", (hidden, torch.arange(len(hidden)) % head.out_features))
        return Counted(_Loss(head), _Loss(fused), draw, hidden.numel())

    def given(self, sample: Sample, inputs: tuple[Tensor, ...]) -> Counted:
        """Against the fused loss of logits in memory."""
        hidden = inputs[0]
        fused = copy.deepcopy(sample.module)
        fused.__class__ = fused_class(type(fused), self)
        target = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
        draw = Draw("the example's", (hidden, target), tables=1)
        return Counted(_Loss(sample.module), _Loss(fused), draw, hidden.numel())

    def measure(self, module: nn.Module) -> Measure:
        """The features of a token."""
        assert isinstance(module, nn.Linear)
        return Measure("token", module.in_features)

    def draws(self, sample: Sample) -> list[Draw]:
        """Logits of two scales; some targets ignored."""
        assert isinstance(sample.module, nn.Linear)
        features, classes = sample.module.in_features, sample.module.out_features
        target = torch.randint(0, classes, (2, 6), generator=sample.generator).to(sample.device)
        target[0, 1:3] = -100
        hidden = sample.randn(2, 6, features)
        return [Draw("an ordinary", (hidden, target)), Draw("a large", (8.0 * hidden, target))]


def _linear(module: nn.Module) -> bool:
    return hasattr(module, "out_features")


def _defers(module: nn.Linear, input: Any, smallest: int) -> bool:
    """Whether the call is an ordinary one that autograd records and nobody sees into, and large enough."""
    tensors = [t for t in (input, module.weight, module.bias) if t is not None]
    # A class that was changed again is that of FSDP, which frees the weight as soon as the head has run.
    if not all(map(takes, tensors)) or "_braze_fusion" not in vars(type(module)) or dispatch.seen_into(tensors):
        return False
    dtypes = {t.dtype for t in tensors}
    # Autocast leaves float64 as it is; without it, a mixture is the original's to refuse.
    one = torch.float64 not in dtypes if autocasting(input.device.type) else len(dtypes) == 1
    features = module.weight.shape[-1]
    if not one or input.dim() == 0 or input.shape[-1] != features or not any(t.requires_grad for t in tensors):
        return False
    return input.numel() * len(module.weight) * input.element_size() >= smallest * features


class _Loss(nn.Module):
    """The loss of a training step."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        logits = self.head(hidden).float()
        return cross_entropy(logits.view(-1, logits.shape[-1]), target.view(-1))


class _Losses(nn.Module):
    """Cross-entropy as models call it, and one use of the logits that no loss without them serves."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        logits = self.head(hidden)
        flat = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), target.view(-1))
        shifted = F.cross_entropy(logits[:, :-1].transpose(1, 2), target[:, 1:], reduction="none", label_smoothing=0.1)
        return flat, shifted, logits.square().mean()
