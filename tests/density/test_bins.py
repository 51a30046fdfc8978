"""The histogram that the log keeps: counts of every finite sample, by numpy's own."""

from __future__ import annotations

import math

import numpy as np
import torch

from eafo_dynamic.density.bins import BINS, bin_counts


def test_counts_are_those_of_numpy() -> None:
    torch.manual_seed(0)
    samples = torch.stack([torch.randn(4096), 3.0 * torch.rand(4096) - 7.0])
    edges, counts = bin_counts(samples)
    assert edges.shape == (2, BINS + 1)
    for row, own_edges, own_counts in zip(samples.double().numpy(), edges.numpy(), counts.numpy(), strict=True):
        expected, _ = np.histogram(np.clip(row, own_edges[0], own_edges[-1]), own_edges)
        assert own_counts.sum() == 4096
        # a sample on an edge may be counted on either side of it
        assert np.abs(own_counts - expected).sum() <= 2


def test_samples_far_out_are_counted_in_the_outermost_bins() -> None:
    torch.manual_seed(0)
    samples = torch.cat([torch.randn(4000), torch.full((40,), 50.0), torch.full((10,), -50.0)]).unsqueeze(0)
    edges, counts = bin_counts(samples)
    values = samples.double()
    mean, std = values.mean(), values.std(correction=0)
    torch.testing.assert_close(edges[0, [0, -1]], torch.stack([mean - 4 * std, mean + 4 * std]))
    assert counts[0, -1] == 40
    assert counts[0, 0] == 10
    assert counts.sum() == 4050


def test_missing_samples_are_left_out() -> None:
    nan, inf = math.nan, math.inf
    samples = torch.tensor([[1.0, 2.0, nan, inf, -inf], [nan, nan, inf, nan, nan], [3.0, 3.0, 3.0, nan, 3.0]])
    edges, counts = bin_counts(samples)
    assert counts.sum(-1).tolist() == [2, 0, 4]
    assert counts[0, 0] == counts[0, -1] == 1
    assert edges[0, 0] == 1.0
    assert edges[0, -1] == 2.0
    assert bin_counts(torch.empty(2, 0)).counts.sum() == 0
    assert edges[1].unique().numel() == edges[2].unique().numel() == 1, "no spread"
