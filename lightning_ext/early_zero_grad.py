"""Gradients of the step before, released before the forward pass: Lightning keeps them until after it.

In Lightning's automatic optimization the order is forward, zero_grad, backward, so that old gradients are alive at the
peak of the activations. Released earlier, they are as gone for the backward pass, and losses stay the same.
"""

from __future__ import annotations

from .packages import LightningModule, is_overridden


def release_old_gradients(model: LightningModule) -> None:
    """Do the optimizer's zero_grad now, if Lightning is about to do it after the forward pass that comes.

    Lightning's own zero_grad still follows, with its hooks; it finds nothing left. Where one of these hooks is the
    user's, it may want to see the gradients: then nothing happens here.
    """
    trainer = model.trainer
    loop = trainer.fit_loop.epoch_loop
    if not model.automatic_optimization or loop.automatic_optimization._skip_backward or _somebody_looks(model):
        return
    # A training_step that takes the iterator itself counts batches in the fetcher.
    batch = getattr(trainer.fit_loop._data_fetcher, "_batch_idx", loop.batch_idx)
    if batch % trainer.accumulate_grad_batches == 0:
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()


def _somebody_looks(model: LightningModule) -> bool:
    return (
        is_overridden("on_before_zero_grad", model)
        or is_overridden("optimizer_zero_grad", model)
        or any(is_overridden("on_before_zero_grad", callback) for callback in model.trainer.callbacks)  # type: ignore[attr-defined]
    )
