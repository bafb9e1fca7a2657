"""Sequences of different lengths side by side in one buffer, with no padding between them.

    tokens        a a a b b | c c c c .      two rows of five tokens; . is filler
    position_ids  0 1 2 0 1 | 0 1 2 3 0
    cu_seqlens    0     3   5         9 10   where each segment begins, and where the last one ends
    labels        - a a - b | - c c c -      - is ignored: nothing predicts the first token of a sequence

A segment is a sequence or filler. None crosses from one row into the next, so that the same memory is a batch of rows
for models that take ``[rows, capacity]`` and one long row for attention that takes ``cu_seqlens``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

#: The label that ``torch.nn.functional.cross_entropy`` and transformers ignore.
IGNORED = -100
#: Stands for filler where the number of a sequence is expected.
FILLER = -1


@dataclass(eq=False)
class PackedBatch:
    """Packed sequences and where each of them is.

    A pytree: its tensors are the leaves. Lightning and ``DataLoader`` move and pin it by its methods. What is not a
    tensor is known on the host, so that nothing here waits for a device.

    Attributes:
        tokens: [T] int64 token ids, or [T, ...] features, T = rows × capacity.
        labels: [T] int64, ``-100`` where ignored; None for features that came without.
        position_ids: [T] int64, from 0 in each segment.
        cu_seqlens: [segments + 1] int32, the first token of each segment, and then T, more than once where a batch of
            fixed capacity has fewer segments than there might be.
        max_seqlen: no segment is longer.
        rows: the number of rows.
        lengths: tokens of each segment.
        sequences: which of the sequences each segment is, by its place in what was packed; -1 for filler.
    """

    tokens: Tensor
    labels: Tensor | None
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows: int
    lengths: tuple[int, ...]
    sequences: tuple[int, ...]

    @property
    def num_sequences(self) -> int:
        """Sequences, filler not counted."""
        return max(self.sequences, default=FILLER) + 1

    @property
    def num_tokens(self) -> int:
        """Tokens of sequences, filler not counted."""
        return sum(n for n, sequence in zip(self.lengths, self.sequences, strict=True) if sequence != FILLER)

    @property
    def sequence_ids(self) -> Tensor:
        """[T] int32: the number of the segment that each token is in; transformers calls it ``seq_idx``."""
        places = torch.arange(len(self.tokens), dtype=torch.int32, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:], places, right=True, out_int32=True)

    @property
    def shifted_labels(self) -> Tensor:
        """[T] int64: what each token is to predict, the label of the next one in its sequence.

        For models and losses that do not shift labels themselves.
        """
        if self.labels is None:
            raise ValueError("PackedBatch.shifted_labels: there are no labels; pass labels= to pack")
        return torch.cat((self.labels[1:], self.labels.new_full((1,), IGNORED)))

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> PackedBatch:
        """Itself on a device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Itself in page-locked memory."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        mapped: PackedBatch = pytree.tree_map(function, self)
        return mapped

    def mean_over_sequences(self, losses: Tensor) -> Tensor:
        """The mean over the sequences of each one's mean loss: what a loop over single sequences averages.

        Without it, the mean over all labelled tokens is that of a padded batch.

        Args:
            losses: T of them, one for each token, 0 where its label is ignored.
        """
        if self.labels is None:
            raise ValueError("PackedBatch.mean_over_sequences: there are no labels; pass labels= to pack")
        segments, ids = len(self.cu_seqlens) - 1, self.sequence_ids.long()
        counts = losses.new_zeros(segments).index_add(0, ids, (self.labels != IGNORED).to(losses.dtype))
        sums = losses.new_zeros(segments).index_add(0, ids, self.flat(losses))
        return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum()

    # ------------------------------------------------------------------ what attention takes

    def sdpa_mask(self, *, causal: bool = True) -> Tensor:
        """[rows, 1, capacity, capacity] bool for ``scaled_dot_product_attention(attn_mask=…)``: True may attend.

        It is as large as the scores of one head. No row of it is all False.
        """
        ids = self.sequence_ids.view(self.rows, 1, -1)
        mask = ids[..., :, None] == ids[..., None, :]
        return mask.tril() if causal else mask

    def block_mask(self, *, causal: bool = True, block_size: int = 128) -> BlockMask:
        """A mask for ``flex_attention`` on [rows, heads, capacity, …], made from boundaries, block by block.

        The same as ``create_block_mask`` makes, which evaluates every pair of tokens for it.
        """
        from torch.nn.attention.flex_attention import BlockMask

        ids = self.sequence_ids.view(self.rows, -1)
        capacity = ids.shape[1]
        start = torch.arange(0, capacity, block_size, device=ids.device)
        end = (start + block_size - 1).clamp(max=capacity - 1)
        first, last = ids[:, start], ids[:, end]
        shared = (first[:, :, None] <= last[:, None, :]) & (first[:, None, :] <= last[:, :, None])
        alone = (first == last) & (end - start + 1 == block_size)
        full = shared & alone[:, :, None] & alone[:, None, :]
        if causal:
            shared &= start[:, None] >= start
            full &= start[:, None] >= end

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            same = ids[b, q] == ids[b, kv]
            return same & (q >= kv) if causal else same

        return BlockMask.from_kv_blocks(
            *_blocks(shared & ~full),
            *_blocks(full),
            BLOCK_SIZE=block_size,
            mask_mod=mask_mod,
            seq_lengths=(capacity, capacity),
        )

    def flash_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of ``flash_attn_varlen_func``, for [T, heads, head_dim]."""
        ends, most = self.cu_seqlens, self.max_seqlen
        return {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": most, "max_seqlen_k": most}

    def varlen_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of ``torch.nn.attention.varlen.varlen_attn``, for [T, heads, head_dim]."""
        ends, most = self.cu_seqlens, self.max_seqlen
        return {"cu_seq_q": ends, "cu_seq_k": ends, "max_q": most, "max_k": most}

    def transformers_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of a transformers model, as for padding-free training: ``model(**kwargs)``.

        Attention from flash-attention takes the boundaries from ``cu_seq_lens_*``; all other kinds find them where
        ``position_ids`` restart, but only where there is no cache, which models make unless told not to.
        """
        kwargs: dict[str, Any] = {
            "input_ids" if self.tokens.dim() == 1 else "inputs_embeds": self._in_rows(self.tokens),
            "position_ids": self._in_rows(self.position_ids),
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
            "use_cache": False,
        }
        return kwargs if self.labels is None else {**kwargs, "labels": self._in_rows(self.labels)}

    def nested(self, values: Tensor | None = None) -> Tensor:
        """A nested tensor in the jagged layout: a view of ``values`` [T, ...] with a component for each segment."""
        values = self.tokens if values is None else values
        return torch.nested.nested_tensor_from_jagged(
            self.flat(values),
            self.cu_seqlens[: len(self.lengths) + 1],
            min_seqlen=min(self.lengths),
            max_seqlen=max(self.lengths),
        )

    def flat(self, values: Tensor) -> Tensor:
        """Values of the tokens as [T, ...], also where they came as [rows, capacity, ...].

        Raises:
            ValueError: if there is not one value for each token.
        """
        total = sum(self.lengths)
        if values.shape[:2] == (self.rows, total // self.rows):
            return values.flatten(0, 1)
        if values.shape[:1] != (total,):
            raise ValueError(
                f"PackedBatch: values must be [{total}, ...] or [{self.rows}, {total // self.rows}, ...], one for each "
                f"token of the batch, got {list(values.shape)}"
            )
        return values

    def _in_rows(self, t: Tensor) -> Tensor:
        return t.view(self.rows, -1, *t.shape[1:])


def _blocks(dense: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and their indices, set ones first: [rows, 1, blocks(, blocks)] int32."""
    order = dense.int().argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


_TENSORS = ("tokens", "labels", "position_ids", "cu_seqlens")
_Context = tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]


def _flatten_with_keys(batch: PackedBatch) -> tuple[list[tuple[Any, Tensor]], _Context]:
    fields = dict(vars(batch))
    tensors = {name: t for name in _TENSORS if (t := fields.pop(name)) is not None}
    return [(pytree.GetAttrKey(name), t) for name, t in tensors.items()], (tuple(tensors), tuple(fields.items()))


def _flatten(batch: PackedBatch) -> tuple[list[Tensor], _Context]:
    leaves, context = _flatten_with_keys(batch)
    return [leaf for _, leaf in leaves], context


def _unflatten(leaves: Iterable[Any], context: _Context) -> PackedBatch:
    names, fields = context
    return PackedBatch(**{"labels": None, **dict(zip(names, leaves, strict=True)), **dict(fields)})


pytree.register_pytree_node(
    PackedBatch,
    _flatten,
    _unflatten,
    serialized_type_name="braze.layouts.PackedBatch",
    flatten_with_keys_fn=_flatten_with_keys,
)
