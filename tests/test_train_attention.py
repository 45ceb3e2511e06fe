"""Attention over a packed buffer agrees with a slow, obvious reference, and segments do not mix."""

from __future__ import annotations

import math

import on_gpu
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.attention import Segments, attend


def obvious(q, k, v, lengths_q, lengths_k, bias=None):  # type: ignore[no-untyped-def]
    """One query and one head at a time."""
    out, q_start, k_start = torch.zeros_like(q), 0, 0
    for n_q, n_k in zip(lengths_q, lengths_k, strict=True):
        for i in range(q_start, q_start + n_q):
            for h in range(q.shape[1]):
                if n_k:
                    logits = k[k_start : k_start + n_k, h] @ q[i, h] / math.sqrt(q.shape[2])
                    logits = logits if bias is None else logits + bias[k_start : k_start + n_k]
                    out[i, h] = logits.softmax(0) @ v[k_start : k_start + n_k, h]
        q_start, k_start = q_start + n_q, k_start + n_k
    return out


def packed(lengths: list[int], heads: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(sum(lengths), heads, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=6)


@pytest.mark.parametrize("biased", [False, True])
@settings(max_examples=40, deadline=None)
@given(lengths=pairs)
def test_attention_equals_a_slow_reference(biased: bool, lengths: list[tuple[int, int]]) -> None:
    n_q, n_k = [pair[0] for pair in lengths], [pair[1] for pair in lengths]
    q, k, v = packed(n_q, 2, 4, 0), packed(n_k, 2, 4, 1), packed(n_k, 2, 4, 2)
    bias = packed(n_k, 1, 1, 3).flatten() if biased else None
    found = attend(q, k, v, Segments.of(torch.tensor(n_q)), Segments.of(torch.tensor(n_k)), bias)
    torch.testing.assert_close(found, obvious(q, k, v, n_q, n_k, bias), rtol=1e-6, atol=1e-8)


def test_gradients_agree_too() -> None:
    n_q, n_k = [3, 1, 4], [2, 5, 1]
    found = []
    for ours in (True, False):
        inputs = [packed(n_q, 2, 4, 0), packed(n_k, 2, 4, 1), packed(n_k, 2, 4, 2)]
        for x in inputs:
            x.requires_grad_()
        if ours:
            out = attend(*inputs, Segments.of(torch.tensor(n_q)), Segments.of(torch.tensor(n_k)))
            (out**2).sum().backward()
        else:
            (obvious_with_gradient(*inputs, n_q, n_k) ** 2).sum().backward()
        found.append([x.grad for x in inputs])
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference)


def obvious_with_gradient(q, k, v, lengths_q, lengths_k):  # type: ignore[no-untyped-def]
    """One segment at a time, by the formula."""
    pieces = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat(
        [
            torch.einsum("hnk,khd->nhd", (torch.einsum("nhd,khd->hnk", a, b) / math.sqrt(q.shape[2])).softmax(-1), c)
            for a, b, c in pieces
        ]
    )


def test_a_segment_is_the_same_alone_and_in_company() -> None:
    n_q, n_k = [3, 4], [5, 2]
    q, k, v = packed(n_q, 2, 8, 0), packed(n_k, 2, 8, 1), packed(n_k, 2, 8, 2)
    together = attend(q, k, v, Segments.of(torch.tensor(n_q)), Segments.of(torch.tensor(n_k)))
    alone = attend(q[3:], k[5:], v[5:], Segments.of(torch.tensor([4])), Segments.of(torch.tensor([2])))
    torch.testing.assert_close(together[3:], alone)


def test_segments_that_do_not_go_in_pairs_are_refused() -> None:
    q, k = packed([2], 1, 4, 0), packed([1, 1], 1, 4, 1)
    with pytest.raises(ValueError, match="1 segments of queries and 2 of keys"):
        attend(q, k, k, Segments.of(torch.tensor([2])), Segments.of(torch.tensor([1, 1])))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_varlen_on_cuda_agrees_with_the_reference() -> None:
    on_gpu.attention(torch.device("cuda"))
