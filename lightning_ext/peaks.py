"""What a device can compute at most, from its maker's data sheet."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """Dense matrix products, in 10¹² FLOP/s: of 16-bit operands with float32 sums, of TF32, of float32."""

    half: float
    tf32: float
    float32: float
    source: str


#: Patterns of torch.cuda.get_device_name(). Data sheets that list only figures with 2:4 sparsity are halved.
PEAKS = {
    r"B200$": Peak(2250, 1100, 75, "NVIDIA HGX B200 data sheet, per GPU"),
    r"H200$": Peak(989.4, 494.7, 66.9, "NVIDIA H200 data sheet, SXM"),
    r"H100 80GB HBM3$": Peak(989.4, 494.7, 66.9, "NVIDIA H100 data sheet, SXM"),
    r"H100 PCIe$": Peak(756, 378, 51.2, "NVIDIA H100 data sheet, PCIe"),
    r"A100[- ]": Peak(312, 156, 19.5, "NVIDIA A100 data sheet"),
    r"L40S$": Peak(362.05, 183, 91.6, "NVIDIA L40S data sheet"),
    r"L4$": Peak(121, 60, 30.3, "NVIDIA L4 data sheet"),
    r"A10$": Peak(125, 62.5, 31.2, "NVIDIA A10 data sheet"),
    r"RTX 4090$": Peak(165.2, 82.6, 82.6, "NVIDIA Ada GPU architecture white paper"),
    r"RTX 3090$": Peak(71, 35.6, 35.6, "NVIDIA Ampere GA102 white paper"),
    r"MI300X\b": Peak(1307.4, 653.7, 163.4, "AMD Instinct MI300X data sheet"),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of a device in one of Lightning's precisions; None for a device or precision that is not in the list.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` says it.
        precision: "bf16-mixed", "16-true", "32-true", …; 32-bit products count as TF32 where
            ``torch.set_float32_matmul_precision`` allows it.
    """
    peak = next((peak for pattern, peak in PEAKS.items() if re.search(pattern, device_name)), None)
    if peak is None or not precision.startswith(("bf16", "16", "32")):
        return None
    if precision.startswith("32"):
        return 1e12 * (peak.float32 if torch.get_float32_matmul_precision() == "highest" else peak.tf32)
    return 1e12 * peak.half
