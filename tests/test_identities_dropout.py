"""Dropout keeps its expectation, and its masks show neither bias nor correlation.

Bounds are in standard deviations of a fair coin. Seeds are fixed, so nothing here is a matter of luck twice.
"""

from __future__ import annotations

import math

import pytest
import torch

from braze.kernels import Dropout, dropout, use_backend
from braze.kernels.ops.dropout import constants, kept, row_keys

N, D = 256, 1024


def centred(seed: int, p: float, shape: tuple[int, int] = (N, D)) -> torch.Tensor:
    """The mask with mean 0 and variance 1, if it is fair."""
    mask = kept(torch.tensor(seed), shape, constants(p)["threshold"]).double()
    return (mask - (1 - p)) / math.sqrt(p * (1 - p))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**62 - 1])
def test_masks_are_fair_everywhere(p: float, seed: int) -> None:
    mask = centred(seed, p)
    assert abs(mask.sum()) / math.sqrt(N * D) < 4
    # The largest of 1,280 sums, each of hundreds of coins; at p = 0.01 these are skewed, hence 6 and not 4.
    assert (mask.sum(1).abs() / math.sqrt(D)).max() < 6
    assert (mask.sum(0).abs() / math.sqrt(N)).max() < 6


@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_neighbours_rows_columns_and_seeds_are_uncorrelated(seed: int) -> None:
    mask = centred(seed, 0.5)
    flat = mask.flatten()
    for lag in (1, 2, 3, 4, 8, 16, D - 1, D, D + 1, 2 * D):
        assert abs((flat[:-lag] * flat[lag:]).sum()) / math.sqrt(N * D - lag) < 4.5
    for other in (seed ^ 1, seed ^ (1 << 32), seed ^ (1 << 61)):
        assert abs((mask * centred(other, 0.5)).sum()) / math.sqrt(N * D) < 4.5
    rows = (mask @ mask.T).fill_diagonal_(0.0).abs() / math.sqrt(D)
    columns = (mask.T @ mask).fill_diagonal_(0.0).abs() / math.sqrt(N)
    assert max(rows.max(), columns.max()) < 6.5  # the largest of half a million


def test_rows_past_32_bits_have_masks_of_their_own() -> None:
    n = torch.tensor([0, 1, 2**32, 2**32 + 1, 2**40])
    for keys in row_keys(torch.tensor(5), n):
        assert len(set(keys.flatten().tolist())) == len(n)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_expectation_stays(backend: str, device: str) -> None:
    x = torch.full((N, D), 2.0, device=device)
    for p in (0.1, 0.5):
        with use_backend(backend):
            y = dropout(x, p=p, seed=torch.tensor(3, device=device))
        # One element is 0 or 2 / (1 − p): its standard deviation is 2·√(p / (1 − p)).
        assert abs(y.mean() - 2.0) < 4 * 2.0 * math.sqrt(p / (1 - p) / (N * D))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_module_repeats_under_a_manual_seed_and_rests_in_eval(backend: str, device: str) -> None:
    x = torch.randn(33, 129, device=device)
    module = Dropout(0.3)
    with use_backend(backend):
        torch.manual_seed(7)
        first, second = module(x), module(x)
        torch.manual_seed(7)
        assert torch.equal(module(x), first)
    assert not torch.equal(first, second)
    assert module.eval()(x) is x
