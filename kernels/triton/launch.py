"""What launches share: rows of a tensor, the size of the machine, and the second stage of a column sum."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_table import measured


def rows(x: Tensor) -> Tensor:
    """x as [N, D] with adjacent elements in a row: a view where the strides allow it, a copy where not."""
    D = x.shape[-1]
    N = x.numel() // D if D else x.shape[:-1].numel()
    if x.stride(-1) == 1 or D == 1:
        try:
            return x.view(N, D)
        except RuntimeError:
            pass
    return x.contiguous().view(N, D)


def memory_order(x: Tensor) -> list[int]:
    """The dims of x, the outermost in memory first."""
    return sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)


def contiguous(x: Tensor | None) -> Tensor | None:
    """x, copied only if it is not contiguous."""
    return x if x is None else x.contiguous()


#: The size of the machine that the interpreter plays: so small that tests send every persistent loop round.
interpreted_multiprocessors = 1


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side, if each fills a multiprocessor."""
    return interpreted_multiprocessors if device.type == "cpu" else _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return torch.cuda.get_device_properties(device).multi_processor_count


#: Whether the assembler can be told how many registers a thread may have. NVIDIA's can.
limits_registers = torch.version.cuda is not None


def launch(kernel, grid: tuple[int, ...], *arguments, side_by_side=None, **meta) -> None:
    """Launch a kernel whose multiplications and additions are fused, which Triton 3.10 does only where it is told.

    ``side_by_side`` programs are to share a multiprocessor, and its 65,536 registers. NVIDIA's assembler, if it is not
    told, guesses how many programs are wanted, and may spill a register or two for the sake of one more.
    """
    if side_by_side is not None and limits_registers:
        meta["maxnreg"] = min(255, 65_536 // (32 * meta["num_warps"] * side_by_side))
    kernel[grid](*arguments, enable_fp_fusion=True, **meta)


#: Elements of a tile of an elementwise kernel. With 4 warps: two 16-byte accesses of bf16 a thread, on either side.
ELEMENTWISE_TILE = 2048


def elementwise_tiles(
    kernel, operands: Sequence[Any], N: int, D: int, **fixed: Any
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants of one program for each tile of N rows of D: of whole rows where those are short."""
    BLOCK_D = min(ELEMENTWISE_TILE, triton.next_power_of_2(D))
    BLOCK_N = min(ELEMENTWISE_TILE // BLOCK_D, triton.next_power_of_2(N))
    meta = measured(kernel, operands, {"BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "num_warps": 4}, **fixed)
    return (triton.cdiv(N, meta["BLOCK_N"]) * triton.cdiv(D, meta["BLOCK_D"]),), meta


#: Elements of a tile of a kernel that walks down columns, and the most columns of it: a row is one 16-byte access of
#: bf16 for each thread of a warp. Twice the tile and the warps spilled on sm_100 (relu_squared, backward).
COLUMN_TILE, COLUMNS = 2048, 256


def column_tiles(
    kernel, operands: Sequence[Any], N: int, D: int, *, read: int, **fixed: Any
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and constants of programs that walk down the columns of N rows of D: (blocks of columns, programs each).

    A program reads the parameters of its columns, and writes its partial sums over the rows, only once. There are as
    many as keep 32 KB of bf16 in flight on a multiprocessor, if each reads so many operands: twice what 3.35 TB/s at
    0.6 µs latency asks for.
    """
    BLOCK_D = min(COLUMNS, triton.next_power_of_2(max(1, D)))
    BLOCK_N = min(COLUMN_TILE // BLOCK_D, triton.next_power_of_2(max(1, N)))
    free = {"BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "num_warps": 4, "programs": 8 // read}
    meta = measured(kernel, operands, free, **fixed)
    blocks = triton.cdiv(D, meta["BLOCK_D"])
    wanted = meta.pop("programs") * multiprocessors(operands[0].device)
    return (blocks, programs(N, meta["BLOCK_N"], wanted, max(1, blocks))), meta


@triton.jit
def _column_sum(partial, out, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        total += tl.load(partial + p[:, None] * D + d[None, :], (p < P)[:, None] & (d < D)[None, :], other=0.0)
    tl.store(out + d, tl.sum(total, 0).to(out.dtype.element_ty), d < D)


def column_sum(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_p partial[p, :] of a float32 [P, D], always in the same order.

    32 columns are one 128-byte line a row; so narrow a block makes D / 32 programs of a sum that is short in P.
    """
    P, D = partial.shape
    out = torch.empty(D, dtype=dtype, device=partial.device)
    if D:
        launch(_column_sum, (triton.cdiv(D, 32),), partial, out, P, D, BLOCK_P=32, BLOCK_D=32, num_warps=4)
    return out


def groups(N: int, D: int, *shared: Tensor | None) -> tuple[int, int]:
    """Of N rows of D: how many groups share a row of the ``shared`` tensors, and how many rows a group has."""
    G = max((t.numel() // D for t in shared if t is not None), default=1) if N and D else 1
    return G, N // G


def programs(T: int, BLOCK_N: int, wanted: int, others: int) -> int:
    """Programs for a group of T rows, so that with ``others`` like it there are as many as ``wanted``."""
    return min(triton.cdiv(T, BLOCK_N), triton.cdiv(wanted, others))


def partial_sums(parameter: Tensor, P: int) -> Tensor:
    """Where P programs for each group write their parts of a parameter's gradient; of a whole, if there is only one."""
    dtype = parameter.dtype if P == 1 else torch.float32
    return torch.empty(P, parameter.numel(), dtype=dtype, device=parameter.device)


def group_sum(partial: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a parameter, from its parts."""
    whole = partial if len(partial) == 1 else column_sum(partial, parameter.dtype)
    return whole.view(parameter.shape)
