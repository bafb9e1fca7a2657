"""Two models of diffusion, as such models are usually written: a transformer (Peebles and Xie 2023) and a U-Net."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x·(1 + scale) + shift``, one scale and shift for each image."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """Attention and MLP, each with a modulated norm before it and a gate behind it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, S, D], condition [B, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1.unsqueeze(1) * self.attention(h, h, h, need_weights=False)[0]
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """Patches, blocks, patches."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(4, width, 2, stride=2)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.head = nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, 4, H, W], t [B, 1]."""
        condition, h = self.time(t), self.embed(x)
        height, width = h.shape[2:]
        h = h.flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = block(h, condition)
        return F.pixel_shuffle(self.head(self.norm(h)).transpose(1, 2).unflatten(2, (height, width)), 2)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU and a convolution, twice, and the time between."""

    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.norm2, self.conv2 = nn.GroupNorm(8, out), nn.Conv2d(out, out, 3, padding=1)
        self.act = nn.SiLU()
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, C, H, W], t [B, time]."""
        h = self.conv1(self.act(self.norm1(x)))
        h = h + self.time(self.act(t))[:, :, None, None]
        h = self.conv2(self.act(self.norm2(h)))
        return self.skip(x) + h


class UNet(nn.Module):
    """Down, middle, up."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.down = ResidualBlock(channels, 2 * channels, channels)
        self.pool = nn.Conv2d(2 * channels, 2 * channels, 3, stride=2, padding=1)
        self.middle = ResidualBlock(2 * channels, 2 * channels, channels)
        self.up = ResidualBlock(4 * channels, channels, channels)
        self.last = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, 3, H, W], t [B, 1]."""
        time = self.time(t)
        down = self.down(self.first(x), time)
        h = self.middle(self.pool(down), time)
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        out: Tensor = self.last(self.up(torch.cat([h, down], 1), time))
        return out
