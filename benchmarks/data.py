"""Real data that every machine already has: Python's own source text, and scikit-learn's handwritten digits."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

#: Every tenth file or image is held out for validation.
HELD_OUT = 10


class ByteWindows(Dataset[Tensor]):
    """Windows of ``length`` bytes, end to end, as int64 token ids below 256."""

    def __init__(self, text: bytes, length: int) -> None:
        self.bytes = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
        self.length = length

    def __len__(self) -> int:
        return len(self.bytes) // self.length

    def __getitem__(self, index: int) -> Tensor:
        return self.bytes[index * self.length : (index + 1) * self.length].long()


def source_text(length: int) -> tuple[ByteWindows, ByteWindows]:
    """(train, validation): the modules of the Python standard library, split by file.

    The files are taken in one fixed shuffled order, so that a short run sees many of them.
    """
    rest, held_out = _modules()
    return ByteWindows(b"\n".join(rest), length), ByteWindows(b"\n".join(held_out), length)


def source_documents(longest: int) -> list[Tensor]:
    """What stands between blank lines in the modules for training: methods, short functions, paragraphs of long ones.

    Each is its first ``longest`` bytes, as int64 token ids below 256.
    """
    pieces = [piece.strip()[:longest] for module in _modules()[0] for piece in module.split(b"\n\n")]
    return [torch.frombuffer(bytearray(piece), dtype=torch.uint8).long() for piece in pieces if len(piece) > 1]


def _modules() -> tuple[list[bytes], list[bytes]]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    rest = [path.read_bytes() for i, path in enumerate(files) if i % HELD_OUT]
    return rest, [path.read_bytes() for path in files[::HELD_OUT]]


def digits(size: int) -> tuple[TensorDataset, TensorDataset]:
    """(train, validation): 1,797 handwritten digits, 8 by 8, enlarged to [3, size, size], and their labels."""
    from sklearn.datasets import load_digits

    drawn = load_digits()
    images = torch.from_numpy(drawn.images).float()[:, None] / 8 - 1  # grey values 0 … 16
    images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.from_numpy(drawn.target).long()
    held_out = torch.arange(len(labels)) % HELD_OUT == 0
    return (
        TensorDataset(images[~held_out], labels[~held_out]),
        TensorDataset(images[held_out], labels[held_out]),
    )
