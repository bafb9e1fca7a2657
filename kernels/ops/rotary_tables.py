"""The cos and sin that rotary embeddings turn by. Plain PyTorch: a table is made once and read by every layer.

    θ_i = base^(−2i / R)     by which pair i of a head's R turning elements turns from one position to the next
    cos, sin [..., R]        of position · θ_i, for both elements of pair i

Sources: Su et al., RoFormer (2021). Scaled to longer contexts: linearly, Chen et al., Extending Context Window of Large
Language Models via Positional Interpolation (2023); by parts, Peng et al., YaRN (2023); Llama 3.1's ``apply_scaling``
(2024). Positions of several axes: Wang et al., Qwen2-VL (2024); Fang et al., EVA-02 (2023).

A frequency's relative error is multiplied by the position, so θ is computed in float64 and rounded to float32 once.
Angles are float32 products of position and θ, as in the models' own code: off by up to p·θ_i·2⁻²³ at position p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def rotary_frequencies(
    dim: int, *, base: float = 10_000.0, factor: float = 1.0, device: torch.device | str | None = None
) -> Tensor:
    """Inverse frequencies ``base^(−2i / dim) / factor`` of the pairs of ``dim`` turning elements.

    Args:
        dim: R, the elements of a head that turn; even.
        base: the longest wavelength is nearly 2π·base.
        factor: by how much positions are compressed (linear scaling); 1.0 is RoFormer's.
        device: where the result lies.

    Returns:
        [dim / 2], float32.

    Raises:
        ValueError: if dim is not positive and even, or base or factor is not positive.
    """
    return _scaled("rotary_frequencies", dim, base, factor, lambda i, theta: 0.0, device)


def llama3_frequencies(
    dim: int,
    *,
    factor: float,
    original_max_position_embeddings: int,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    base: float = 500_000.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Llama 3.1's inverse frequencies: slow pairs are slowed down by ``factor``, fast ones kept, a ramp between.

    With n = θ·original_max_position_embeddings / 2π, the turns of a pair within the original context::

        kept = clamp((n − low_freq_factor) / (high_freq_factor − low_freq_factor), 0, 1)
        θ'   = θ·(kept + (1 − kept) / factor)

    Args:
        dim: R, the elements of a head that turn; even.
        factor: by how much the context grew.
        original_max_position_embeddings: the context before it grew.
        low_freq_factor: pairs with fewer turns are slowed down by all of factor.
        high_freq_factor: pairs with more turns are kept.
        base: as in :func:`rotary_frequencies`.
        device: where the result lies.

    Returns:
        [dim / 2], float32.

    Raises:
        ValueError: if dim is not positive and even, base or factor is not positive, or the two frequency factors are
            not in order.
    """
    if not low_freq_factor < high_freq_factor:
        raise ValueError(
            f"llama3_frequencies: low_freq_factor must be less than high_freq_factor, got {low_freq_factor} and "
            f"{high_freq_factor}; Llama 3.1 has 1 and 4"
        )

    def kept(i: int, theta: float) -> float:
        turns = theta * original_max_position_embeddings / (2 * math.pi)
        return (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)

    return _scaled("llama3_frequencies", dim, base, factor, kept, device)


def yarn_frequencies(
    dim: int,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    base: float = 10_000.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """YaRN's inverse frequencies: a ramp over the index of the pair, from the fast ones kept to the slow ones slowed.

    Pair i(β) = dim·ln(original_max_position_embeddings / 2πβ) / (2 ln base) turns β times within the original context::

        kept = 1 − clamp((i − i(beta_fast)) / (i(beta_slow) − i(beta_fast)), 0, 1)
        θ'   = θ·(kept + (1 − kept) / factor)

    YaRN also scales the tables: pass :func:`yarn_attention_factor` to :func:`rotary_tables`.

    Args:
        dim: R, the elements of a head that turn; even.
        factor: by how much the context grew.
        original_max_position_embeddings: the context before it grew.
        beta_fast: pairs with more turns are kept.
        beta_slow: pairs with fewer turns are slowed down by all of factor.
        truncate: whether the ends of the ramp are rounded outwards to whole pairs, as in the paper's code; GPT-OSS
            does not.
        base: as in :func:`rotary_frequencies`.
        device: where the result lies.

    Returns:
        [dim / 2], float32.

    Raises:
        ValueError: if dim is not positive and even, base or factor is not positive, or the betas are not in order.
    """
    if not beta_slow < beta_fast:
        raise ValueError(
            f"yarn_frequencies: beta_slow must be less than beta_fast, got {beta_slow} and {beta_fast}; "
            "YaRN has 1 and 32"
        )

    def pair(turns: float) -> float:
        return dim * math.log(original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(base))

    first, last = pair(beta_fast), pair(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 1e-3  # one pair wide: a step
    return _scaled("yarn_frequencies", dim, base, factor, lambda i, theta: 1 - (i - first) / width, device)


def yarn_attention_factor(factor: float, *, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """What YaRN multiplies cos and sin by: ``(0.1·mscale·ln factor + 1) / (0.1·mscale_all_dim·ln factor + 1)``.

    A query and a key both get it, which sharpens the softmax of their product. It is 1 where the context did not grow.

    Args:
        factor: by how much the context grew.
        mscale: the paper's is 1.
        mscale_all_dim: what the model scales its scores by itself (DeepSeek).
    """
    growth = 0.1 * math.log(max(factor, 1.0))
    return (mscale * growth + 1.0) / (mscale_all_dim * growth + 1.0)


def rotary_tables(
    positions: Tensor, frequencies: Tensor, *, attention_factor: float = 1.0, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin of ``positions · frequencies``, as :func:`rope` takes them.

    Args:
        positions: [...]; [S] for x [B, H, S, D], or [B, 1, S] where every sequence has its own.
        frequencies: [R / 2], float32, e.g. from :func:`rotary_frequencies`.
        attention_factor: multiplies both tables, e.g. :func:`yarn_attention_factor`.
        interleaved: whether the pairs are (2i, 2i + 1), not (i, i + R/2); as in :func:`rope`.

    Returns:
        (cos, sin), each [..., R], float32.

    Raises:
        ValueError: if frequencies is not one row.
    """
    _check_frequencies("rotary_tables", frequencies)
    return _tables(positions[..., None] * frequencies, attention_factor, interleaved)


def mrope_tables(
    positions: Tensor,
    frequencies: Tensor,
    *,
    sections: Sequence[int],
    alternating: bool = False,
    attention_factor: float = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """cos and sin of M-RoPE: each pair turns by the position along one of several axes (time, height, width).

    Of the R/2 pairs, ``sections[a]`` belong to axis a. In Qwen2-VL they lie side by side: ``sections[0]`` pairs of
    time, then those of height, then those of width. In Qwen3-VL they alternate: pair i belongs to axis i mod 3 as long
    as that axis has pairs left, then to time.

    Args:
        positions: [A, ...], one row of positions for each axis; [3, B, S] as Qwen2-VL's ``position_ids``.
        frequencies: [R / 2], float32, e.g. from :func:`rotary_frequencies`.
        sections: A numbers of pairs that sum to R / 2, e.g. (16, 24, 24).
        alternating: Qwen3-VL's order of the pairs (``mrope_interleaved``), not Qwen2-VL's.
        attention_factor: multiplies both tables.
        interleaved: how elements pair up, as in :func:`rope`; Qwen's do not.

    Returns:
        (cos, sin), each [..., R], float32; [B, S, R], to be unsqueezed at dim 1 for x [B, H, S, D].

    Raises:
        ValueError: if frequencies is not one row, or the sections do not fit them and the positions.
    """
    _check_frequencies("mrope_tables", frequencies)
    if positions.dim() == 0 or len(sections) != positions.shape[0] or sum(sections) != frequencies.shape[0]:
        raise ValueError(
            f"mrope_tables: sections must hold a number of pairs for each row of positions, {tuple(positions.shape)}, "
            f"and sum to the {frequencies.shape[0]} frequencies, got {tuple(sections)}; see the model's mrope_section"
        )
    axes = _alternating_axes(sections) if alternating else _consecutive_axes(sections)
    angles = positions[axes].movedim(0, -1) * frequencies
    return _tables(angles, attention_factor, interleaved)


def axial_tables(
    positions: Tensor,
    frequencies: Tensor,
    column_frequencies: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """cos and sin of a grid of patches: the first half of the pairs turns by the row, the other half by the column.

    ============================  ============================================================================
    timm's ``RotaryEmbedding``    ``frequencies = rotary_frequencies(R // 2)``, ``interleaved=True`` (EVA-02;
    (``in_pixels=False``)         not interleaved with ``rotate_half``)
    Qwen2-VL's vision tower       ``frequencies = rotary_frequencies(R // 2)``
    Pixtral's                     of ``θ = rotary_frequencies(R)`` the rows get ``θ[0::2]``, the columns ``θ[1::2]``
    ============================  ============================================================================

    Args:
        positions: [2, ...]: rows, then columns; e.g. from :func:`grid_positions`, scaled where the grid was resized.
        frequencies: [R / 4], float32, of the rows.
        column_frequencies: likewise of the columns; None for those of the rows.
        interleaved: how elements pair up, as in :func:`rope`.

    Returns:
        (cos, sin), each [..., R], float32.

    Raises:
        ValueError: if the frequencies are not one row each, of one length, or positions has not two rows.
    """
    if column_frequencies is None:
        column_frequencies = frequencies
    _check_frequencies("axial_tables", frequencies)
    if column_frequencies.shape != frequencies.shape:
        raise ValueError(
            f"axial_tables: column_frequencies must have the shape of frequencies, {tuple(frequencies.shape)}, "
            f"got {tuple(column_frequencies.shape)}; half of the pairs belong to each"
        )
    if positions.dim() == 0 or positions.shape[0] != 2:
        raise ValueError(
            f"axial_tables: positions must be [2, ...], rows and columns, got {tuple(positions.shape)}; "
            "e.g. grid_positions(height, width)"
        )
    angles = torch.cat((positions[0, ..., None] * frequencies, positions[1, ..., None] * column_frequencies), -1)
    return _tables(angles, 1.0, interleaved)


def grid_positions(height: int, width: int, *, device: torch.device | str | None = None) -> Tensor:
    """The rows and columns of a grid of patches, row by row: int64 [2, height · width]."""
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.stack((row.repeat_interleave(width), column.repeat(height)))


def _scaled(
    name: str,
    dim: int,
    base: float,
    factor: float,
    kept: Callable[[int, float], float],
    device: torch.device | str | None,
) -> Tensor:
    """θ_i·(k + (1 − k) / factor) with k = kept(i, θ_i) clamped to [0, 1]."""
    if dim <= 0 or dim % 2:
        raise ValueError(f"{name}: dim must be positive and even, as elements turn in pairs, got {dim}")
    if not (base > 0 and factor > 0):
        raise ValueError(f"{name}: base and factor must be positive, got {base} and {factor}")
    scaled = []
    for i in range(dim // 2):
        theta = base ** (-2 * i / dim)
        k = min(max(kept(i, theta), 0.0), 1.0)
        scaled.append(theta * (k + (1 - k) / factor))
    return torch.tensor(scaled, dtype=torch.float32, device=device)


def _tables(angles: Tensor, attention_factor: float, interleaved: bool) -> tuple[Tensor, Tensor]:
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def _consecutive_axes(sections: Sequence[int]) -> list[int]:
    return [axis for axis, pairs in enumerate(sections) for _ in range(pairs)]


def _alternating_axes(sections: Sequence[int]) -> list[int]:
    count = len(sections)
    return [i % count if i < count * sections[i % count] else 0 for i in range(sum(sections))]


def _check_frequencies(name: str, frequencies: Tensor) -> None:
    if frequencies.dim() != 1 or not frequencies.is_floating_point():
        raise ValueError(
            f"{name}: frequencies must be one row of floating-point numbers, one for each pair, "
            f"got {tuple(frequencies.shape)} of {frequencies.dtype}; e.g. rotary_frequencies(head_dim)"
        )
