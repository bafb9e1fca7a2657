"""``nn.CrossEntropyLoss``, ``nn.BCEWithLogitsLoss``, ``nn.Softmax``, and the next-token loss of a language model.

All but the last are recognised by their forward, which must be torch's own. The last is what a model's
``loss_function`` property answers (as in Hugging Face models), recognised by what it computes.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.binary_cross_entropy import binary_cross_entropy_with_logits
from ..ops.cross_entropy import cross_entropy
from ..ops.softmax import softmax
from .joint import Joint, takes
from .sample import Draw, Refused, Sample
from .savings import ELEMENT, Counted, Measure


class _Stateless(Joint):
    """A module whose forward is torch's own: only the forward changes."""

    base: ClassVar[type[nn.Module]]

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """A module of the torch class, with the forward of the torch class."""
        return isinstance(module, cls.base) and type(module).forward is cls.base.forward

    @classmethod
    def recognise(cls, sample: Sample) -> Joint | None:
        """Nothing is left to find."""
        return cls()


class _Loss(_Stateless):
    """A loss of (input, target)."""

    tables: ClassVar[int] = 1

    def trial(self, sample: Sample) -> tuple[nn.Module, nn.Module]:
        """Both with fixed targets: where a target has a gradient, the fused forward is torch's own."""
        original, fused = super().trial(sample)
        return _OfFixed(original), _OfFixed(fused)


class _OfFixed(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: Tensor, target: Tensor) -> Any:
        return self.loss(input, target.detach())


@dataclass(frozen=True)
class CrossEntropy(_Loss):
    """``nn.CrossEntropyLoss``."""

    hint: ClassVar[str] = "crossentropy"
    operator: ClassVar[str] = "cross_entropy"  # type: ignore[misc]
    base: ClassVar[type[nn.Module]] = nn.CrossEntropyLoss

    def members(self, original: type) -> dict[str, Any]:
        """A forward that runs the fused operator."""
        own = original.forward  # type: ignore[attr-defined]

        def forward(self: nn.CrossEntropyLoss, input: Any, target: Any) -> Any:
            soft = target.is_floating_point()
            if not takes(input) or (soft and (target.requires_grad or self.ignore_index >= 0)):
                return own(self, input, target)  # the operator has neither
            return cross_entropy(
                input,
                target,
                self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )

        return {"forward": forward}

    def draws(self, sample: Sample) -> list[Draw]:
        """Logits of a few scales; one ignored target."""
        module = sample.module
        assert isinstance(module, nn.CrossEntropyLoss)
        classes = 11 if module.weight is None else len(module.weight)
        generator = sample.generator
        logits, target = (
            sample.randn(7, classes),
            torch.randint(0, classes, (7,), generator=generator).to(sample.device),
        )
        target[3] = module.ignore_index
        image = torch.randint(0, classes, (3, 5), generator=generator).to(sample.device)
        soft = [] if module.ignore_index >= 0 else [Draw("a soft", (logits, sample.randn(7, classes).softmax(1)))]
        return [
            Draw("an ordinary", (logits, target)),
            Draw("a large", (30.0 * sample.randn(7, classes), target)),
            Draw("a three-dimensional", (sample.randn(3, classes, 5), image)),
            *soft,
        ]


@dataclass(frozen=True)
class BinaryCrossEntropy(_Loss):
    """``nn.BCEWithLogitsLoss``."""

    hint: ClassVar[str] = "bcewithlogits"
    operator: ClassVar[str] = "binary_cross_entropy_with_logits"  # type: ignore[misc]
    base: ClassVar[type[nn.Module]] = nn.BCEWithLogitsLoss

    @classmethod
    def recognise(cls, sample: Sample) -> Joint | None:
        """Weights of classes, and not of the elements of one batch, whose size could not be varied."""
        loss: Any = sample.source
        weights: tuple[Tensor | None, ...] = (loss.weight, loss.pos_weight)
        if any(w is not None and w.dim() > 1 and w.shape[0] > 1 for w in weights):
            raise Refused("its weights are for one size of batch only")
        return cls()

    def members(self, original: type) -> dict[str, Any]:
        """A forward that runs the fused operator."""
        own = original.forward  # type: ignore[attr-defined]

        def forward(self: nn.BCEWithLogitsLoss, input: Any, target: Any) -> Any:
            fixed = not any(t is not None and t.requires_grad for t in (target, self.weight, self.pos_weight))
            if not (takes(input) and takes(target) and target.shape == input.shape and fixed):
                return own(self, input, target)
            return binary_cross_entropy_with_logits(
                input, target, self.weight, self.pos_weight, reduction=self.reduction
            )

        return {"forward": forward}

    def draws(self, sample: Sample) -> list[Draw]:
        """Logits of a few scales, in a shape that the weights fit."""
        module = sample.module
        assert isinstance(module, nn.BCEWithLogitsLoss)
        shape = torch.broadcast_shapes(*(t.shape for t in (module.weight, module.pos_weight) if t is not None), (7, 1))
        logits, target = sample.randn(*shape), sample.randn(*shape).sigmoid()
        return [
            Draw("an ordinary", (logits, target)),
            Draw("a large", (30.0 * logits, target)),
            Draw("a decided", (logits, target.round())),
        ]


@dataclass(frozen=True)
class SoftmaxModule(_Stateless):
    """``nn.Softmax`` with a dim."""

    hint: ClassVar[str] = "softmax"
    operator: ClassVar[str] = "softmax"  # type: ignore[misc]
    base: ClassVar[type[nn.Module]] = nn.Softmax

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """The deprecated ``dim=None`` is left alone."""
        return super().suits(module) and module.dim is not None

    def members(self, original: type) -> dict[str, Any]:
        """A forward that runs the fused operator."""
        own = original.forward  # type: ignore[attr-defined]

        def forward(self: nn.Softmax, input: Any) -> Any:
            return softmax(input, dim=self.dim) if takes(input) and self.dim is not None else own(self, input)

        return {"forward": forward}

    def draws(self, sample: Sample) -> list[Draw]:
        """Two scales, four dims: enough for any usual ``dim``."""
        return [
            Draw("an ordinary", (sample.randn(3, 4, 5, 6),)),
            Draw("a large", (30.0 * sample.randn(3, 4, 5, 6),)),
        ]


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Cross-entropy of the logits at each position with the label at the next, in float32.

    Args:
        logits: [..., S, vocab_size].
        labels: [..., S]; the first has no position that predicts it, and the last position predicts none.
        vocab_size: number of classes.
        num_items_in_batch: what the sum is divided by; None is the number of labels that count.
        ignore_index: label that does not count.
        shift_labels: labels that are shifted already, in the place of ``labels``.

    Returns:
        A float32 scalar.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    target = shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = cross_entropy(logits.float().view(-1, vocab_size), target, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


@dataclass(frozen=True)
class CausalLoss(Joint):
    """A model whose ``loss_function`` answers a next-token loss; the fused class answers :func:`causal_lm_loss`."""

    hint: ClassVar[str] = "causal"
    operator: ClassVar[str] = "cross_entropy"  # type: ignore[misc]
    copied: ClassVar[bool] = False
    function: Callable[..., Tensor]

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """A ``loss_function`` property, and a loss that was chosen for this model."""
        chosen = getattr(module, "loss_type", None) is not None or "_loss_function" in vars(module)
        return chosen and isinstance(getattr(type(module), "loss_function", None), property)

    @classmethod
    def key(cls, module: nn.Module) -> Hashable:
        """The function that it answers."""
        return id(type(module)), id(module.loss_function)

    @classmethod
    def sizes(cls, module: nn.Module) -> Sequence[dict[int, int] | None]:
        """Only the loss is run."""
        return (None,)

    @classmethod
    def recognise(cls, sample: Sample) -> CausalLoss | None:
        """A named function of (logits, labels, vocab_size, …); the numbers decide the rest."""
        function: Any = sample.source.loss_function
        names = {"logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels"}
        if not isinstance(function, types.FunctionType) or "<" in function.__qualname__:
            return None
        return cls(function) if names <= set(inspect.signature(function).parameters) else None

    def members(self, original: type) -> dict[str, Any]:
        """The property; a loss that is set later is answered as it is."""
        own: property = original.loss_function  # type: ignore[attr-defined]
        function = self.function

        def loss_function(self: nn.Module) -> Any:
            found = own.__get__(self)
            return causal_lm_loss if found is function else found

        return {"loss_function": property(loss_function, own.fset)}

    def trial(self, sample: Sample) -> tuple[nn.Module, nn.Module]:
        """Both losses, called in each way that they can be."""
        return _CalledEachWay(self.function), _CalledEachWay(causal_lm_loss)

    def operands(self, args: tuple[Any, ...]) -> None:
        """The model calls the loss by itself."""

    def counted(self, sample: Sample) -> Counted:
        """The loss as a training step calls it, of as many classes as there are."""
        head = output_embeddings(sample.source)
        logits = sample.randn(2, 3, 13 if head is None else head.out_features)
        draw = Draw("an ordinary", (logits, torch.zeros_like(logits[..., 0], dtype=torch.int64)))
        return Counted(_Called(self.function), _Called(causal_lm_loss), draw, logits.numel())

    def measure(self, module: nn.Module) -> Measure:
        """The logits of a token, where there is a head to count them."""
        head = output_embeddings(module)
        return ELEMENT if head is None else Measure("token", head.out_features)

    def draws(self, sample: Sample) -> list[Draw]:
        """Logits of two scales; some labels ignored."""
        labels = torch.randint(0, 13, (2, 6), generator=sample.generator).to(sample.device)
        labels[0, :3] = -100
        logits = sample.randn(2, 6, 13)
        return [Draw("an ordinary", (logits, labels)), Draw("a large", (30.0 * logits, labels))]


def output_embeddings(module: nn.Module) -> Any:
    """The head that a Hugging Face model answers; most modules have no such method, and some models' raises."""
    try:
        head = module.get_output_embeddings()  # type: ignore[operator]
    except Exception:
        return None
    return head if isinstance(head, nn.Module) and hasattr(head, "out_features") else None


class _Called(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.function(logits=logits, labels=labels, vocab_size=logits.shape[-1])


class _CalledEachWay(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (
            self.function(logits=logits, labels=labels, vocab_size=13),
            self.function(logits, labels, 13, num_items_in_batch=5),
            self.function(logits, labels, 13, num_items_in_batch=torch.tensor(5)),
            self.function(logits, labels.clamp(min=0), 13, ignore_index=0),
            self.function(logits, None, 13, shift_labels=labels),
        )
