"""The teacher's columns against the plain computation."""

from __future__ import annotations

import pytest
import torch

from specforge.target import teacher


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_the_columns_are_argmax_and_logsumexp(rows, dtype, softcap, monkeypatch):
    monkeypatch.setattr(teacher, "CACHED", 16 * 4 * 500)  # several blocks, the last of them smaller
    logits_nV = (torch.randn(rows, 500, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    best_n, lse_n = teacher.columns(logits_nV, softcap)
    wide_nV = logits_nV.double()
    if softcap:
        wide_nV = softcap * (wide_nV / softcap).tanh()
    assert best_n.dtype == torch.int32
    assert torch.equal(best_n.long(), logits_nV.float().argmax(-1)) or softcap  # tanh makes new ties
    assert torch.equal(wide_nV.gather(1, best_n.long()[:, None])[:, 0], wide_nV.amax(-1)) or softcap
    torch.testing.assert_close(lse_n.double(), wide_nV.logsumexp(-1), rtol=1e-6, atol=1e-6)
