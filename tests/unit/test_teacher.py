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


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_shard_tells_its_own_part_of_the_vocabulary(softcap):
    logits_nV = torch.randn(9, 100, generator=torch.Generator().manual_seed(0)) * 8
    for start, size in ((0, 40), (40, 60)):
        wide_nW = torch.cat([logits_nV[:, start : start + size], torch.full((9, 4), 99.0)], dim=1)  # filled up
        best_n, most_n, lse_n = teacher.shard_columns(wide_nW, teacher.Shard(start, size), softcap).unbind(1)
        own_nW = teacher.capped(logits_nV[:, start : start + size], softcap)
        assert torch.equal(best_n, (own_nW.argmax(1) + start).double())
        torch.testing.assert_close(most_n, own_nW.amax(1).double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(lse_n, own_nW.double().logsumexp(1), rtol=1e-6, atol=1e-6)
    assert torch.isinf(teacher.shard_columns(wide_nW, teacher.Shard(100, 0), softcap)).all()
