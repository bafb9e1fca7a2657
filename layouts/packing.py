"""``pack`` copies sequences of different lengths side by side into a :class:`PackedBatch`; ``unpack`` finds them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bin_packing import first_fit_decreasing
from .packed_batch import FILLER, IGNORED, PackedBatch


def pack(
    sequences: Sequence[Any],
    labels: Sequence[Any] | None = None,
    *,
    capacity: int | None = None,
    rows: int = 1,
    max_sequences: int | None = None,
    max_seqlen: int | None = None,
    fill: int = 0,
    mask_boundaries: bool = True,
    out: PackedBatch | None = None,
) -> PackedBatch:
    """Copy sequences side by side into one buffer, in the memory of the host.

    With a capacity, the rest of a row is filler, in segments of its own: attention computes it and no loss counts it.
    One row keeps the order of the sequences; several are filled by :func:`first_fit_decreasing`.

    Args:
        sequences: of token ids (tensors [L], arrays or lists), or of features (tensors or arrays [L, ...]).
        labels: of token ids like these; None for the token ids themselves.
        capacity: tokens of a row; None for exactly what is there, in one row.
        rows: the number of rows.
        max_sequences: the most sequences of a batch, which sizes ``cu_seqlens``; None for as many as these.
        max_seqlen: a bound on the length of segments; None for the capacity, or, without one, the longest of these.
            Attention may launch work in proportion to it, and what is compiled for it is compiled again for another.
        fill: the token of filler.
        mask_boundaries: ignore the first label of each sequence, which the token before it must not predict: right for
            models that predict the next token, wrong for those that label each token in its own place.
        out: a batch of the same shapes, to be overwritten: its tensors are those of the result.

    Raises:
        TypeError: for sequences that are not all of one kind.
        ValueError: for sequences that do not fit, or labels or ``out`` of another shape.
    """
    _check(sequences, labels, capacity, rows)
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths)
    bound = max_seqlen or capacity or max(longest, 1)
    most = len(lengths) if max_sequences is None else max_sequences
    if longest > bound or len(lengths) > most:
        raise ValueError(
            f"pack: got {len(lengths)} sequences, the longest of {longest} tokens, and at most {most} of {bound} are "
            "allowed; raise max_sequences, max_seqlen or capacity, or truncate"
        )
    placed = _place(lengths, capacity, rows, bound)
    pieces = [length for length, _ in placed]
    total = sum(pieces)
    if total >= 2**31:
        raise ValueError(f"pack: cu_seqlens is int32, so a batch holds less than 2³¹ tokens, got {total}")
    segments = most + (0 if capacity is None else rows * -(-capacity // bound))
    labelled = labels is not None or _features(sequences[0]) is None
    batch = _buffers(sequences, labelled, total, segments)
    if out is not None:
        _check_out(out, batch)
        batch = out
    _copy(sequences, placed, fill, batch.tokens)
    ramp = np.arange(max(pieces))
    np.concatenate([ramp[:length] for length in pieces], out=batch.position_ids.numpy())
    ends = batch.cu_seqlens.numpy()
    ends[0] = 0
    np.cumsum(pieces, out=ends[1 : len(pieces) + 1])
    ends[len(pieces) + 1 :] = total
    if batch.labels is not None:
        if labels is None:
            batch.labels.copy_(batch.tokens)
        else:
            _copy(labels, placed, IGNORED, batch.labels)
        _ignore(batch.labels.numpy(), placed, mask_boundaries)
    numbers = tuple(number for _, number in placed)
    return replace(batch, max_seqlen=bound, rows=rows, lengths=tuple(pieces), sequences=numbers)


def unpack(batch: PackedBatch, values: Tensor | None = None) -> list[Tensor]:
    """The sequences, in the order in which they were packed, as views; no filler.

    Args:
        batch: says where they are.
        values: [T, ...] or [rows, capacity, ...], e.g. what a model made of the tokens; None for the tokens.

    Raises:
        ValueError: if there is not one value for each token.
    """
    flat = batch.flat(batch.tokens if values is None else values)
    found = zip(batch.sequences, flat.split(batch.lengths), strict=True)
    ordered = dict(sorted((number, piece) for number, piece in found if number != FILLER))
    return list(ordered.values())


@dataclass
class PackCollate:
    """``collate_fn`` of a DataLoader: samples of token ids in, a :class:`PackedBatch` out; see :func:`pack`.

    A sample is a sequence of token ids, or a mapping with ``input_ids`` and perhaps ``labels``; nothing else is read.
    """

    capacity: int | None = None
    rows: int = 1
    max_sequences: int | None = None
    max_seqlen: int | None = None
    fill: int = 0
    mask_boundaries: bool = True

    def __call__(self, samples: Sequence[Any], out: PackedBatch | None = None) -> PackedBatch:
        """Pack the samples, into the tensors of ``out`` if there is one."""
        labels = None
        if isinstance(samples[0], Mapping):
            if "labels" in samples[0]:
                labels = [sample["labels"] for sample in samples]
            samples = [sample["input_ids"] for sample in samples]
        return pack(samples, labels, **vars(self), out=out)


def _check(sequences: Sequence[Any], labels: Sequence[Any] | None, capacity: int | None, rows: int) -> None:
    if not len(sequences):
        raise ValueError("pack: there must be at least one sequence, got none")
    if rows < 1 or (capacity is None and rows != 1) or (capacity is not None and capacity < 1):
        raise ValueError(
            f"pack: rows and capacity must be at least 1, and several rows need a capacity, got rows={rows}, "
            f"capacity={capacity}; e.g. capacity=4096"
        )
    _check_kind("sequences", sequences)
    if labels is None:
        return
    _check_kind("labels", labels)
    if len(labels) != len(sequences):
        raise ValueError(
            f"pack: there must be labels for each sequence, got {len(sequences)} sequences and {len(labels)} of labels"
        )
    for number, (sequence, own) in enumerate(zip(sequences, labels, strict=True)):
        if len(sequence) != len(own):
            raise ValueError(
                f"pack: there must be a label for each token, got {len(sequence)} tokens and {len(own)} labels in "
                f"sequence {number}; give -100 to tokens without one"
            )


def _check_kind(name: str, sequences: Sequence[Any]) -> None:
    kinds = {type(sequence) for sequence in sequences}
    for kind in (Tensor, np.ndarray, (list, tuple)):
        if all(issubclass(found, kind) for found in kinds):
            break
    else:
        raise TypeError(
            f"pack: {name} must be all tensors, all NumPy arrays or all lists, got "
            f"{' and '.join(sorted(found.__name__ for found in kinds))}; convert some"
        )
    if kind is Tensor and any(not sequence.is_cpu for sequence in sequences):
        raise ValueError(f"pack: {name} must be on the CPU; pack there, then move the batch with .to")
    if not isinstance(sequences[0], (list, tuple)) and sequences[0].ndim == 1 and _is_floating(sequences[0]):
        raise TypeError(f"pack: {name} must be integers, got {sequences[0].dtype}; features have two dims or more")


def _is_floating(sequence: Any) -> bool:
    return sequence.is_floating_point() if isinstance(sequence, Tensor) else sequence.dtype.kind == "f"


def _place(lengths: list[int], capacity: int | None, rows: int, bound: int) -> list[tuple[int, int]]:
    """(tokens, number of the sequence or FILLER) of each segment, in the order of memory."""
    if capacity is None:
        return [(length, number) for number, length in enumerate(lengths)]
    bins = [list(range(len(lengths)))] if rows == 1 else first_fit_decreasing(lengths, capacity)
    if len(bins) > rows or (rows == 1 and sum(lengths) > capacity):
        raise ValueError(
            f"pack: sequences must fit into rows={rows} of capacity={capacity}, got {sum(lengths)} tokens in "
            f"{len(lengths)} sequences; choose what is packed together with first_fit_decreasing(lengths, {capacity})"
        )
    placed = []
    for row in [*bins, *[[]] * (rows - len(bins))]:
        placed += [(lengths[number], number) for number in row]
        rest = capacity - sum(lengths[number] for number in row)
        placed += [(min(bound, rest - start), FILLER) for start in range(0, rest, bound)]
    return placed


def _buffers(sequences: Sequence[Any], labelled: bool, total: int, segments: int) -> PackedBatch:
    """Uninitialized tensors, all int64 ones in one allocation: a loader's worker passes on one segment of memory."""
    features = _features(sequences[0])
    if features is None:
        tokens, *labels, positions = _empty((2 + labelled, total), torch.int64)
    else:
        tokens = _empty((total, *features.shape[1:]), features.dtype)
        *labels, positions = _empty((1 + labelled, total), torch.int64)
    ends = _empty((segments + 1,), torch.int32)
    return PackedBatch(tokens, labels[0] if labelled else None, positions, ends, 0, 0, (), ())


def _features(sequence: Any) -> Tensor | None:
    """A sequence of features as a tensor; None for one of token ids."""
    if getattr(sequence, "ndim", 1) == 1:
        return None
    return sequence if isinstance(sequence, Tensor) else torch.from_numpy(sequence[:0].copy())


def _check_out(out: PackedBatch, needed: PackedBatch) -> None:
    for name in ("tokens", "labels", "position_ids", "cu_seqlens"):
        have, want = getattr(out, name), getattr(needed, name)
        if (have is None) != (want is None) or (
            have is not None and (have.shape, have.dtype) != (want.shape, want.dtype)
        ):
            described = "None" if want is None else f"{list(want.shape)} of {want.dtype}"
            raise ValueError(
                f"pack: out.{name} must be {described}, got "
                f"{'None' if have is None else f'{list(have.shape)} of {have.dtype}'}; make it by a call with the same "
                "capacity, rows, max_sequences and max_seqlen"
            )


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialized memory; in a worker of a DataLoader shared, so that passing it on does not copy it."""
    t = torch.empty(shape, dtype=dtype)
    if torch.utils.data.get_worker_info() is None:
        return t
    return t.new(t.untyped_storage()._new_shared(t.nbytes)).view(shape)


def _copy(sequences: Sequence[Any], placed: list[tuple[int, int]], fill: int, out: Tensor) -> None:
    """Write sequences and filler into ``out``, each in its place."""
    most = max((length for length, number in placed if number == FILLER), default=0)
    filler = out.new_full((most, *out.shape[1:]), fill)
    if isinstance(sequences[0], Tensor):
        torch.cat([filler[:length] if n == FILLER else sequences[n] for length, n in placed], out=out)
        return
    arrays = sequences if isinstance(sequences[0], np.ndarray) else [array("q", sequence) for sequence in sequences]
    pieces = [filler.numpy()[:length] if n == FILLER else arrays[n] for length, n in placed]
    np.concatenate(pieces, out=out.numpy(), casting="same_kind")


def _ignore(labels: Any, placed: list[tuple[int, int]], mask_boundaries: bool) -> None:
    """Ignore the labels of filler, and the first of each sequence."""
    start = 0
    for length, number in placed:
        if number == FILLER:
            labels[start : start + length] = IGNORED
        elif length and mask_boundaries:
            labels[start] = IGNORED
        start += length
