"""What a draft step takes on a GPU against the formulas that `plan` prints: torch's own figures, for the shape of an 8B
target. Imports torch and specforge.draft only."""

from __future__ import annotations

import pytest
import torch

from specforge.draft.memory import kept_bytes, loss_bytes
from tests.draft_memory import LLAMA_8B, draft_step, supervised_row

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("tokens", [2048, 4096])
def test_a_draft_step_takes_what_is_planned(tokens):
    step = draft_step(LLAMA_8B, torch.bfloat16, GPU)
    batch = supervised_row(LLAMA_8B, (tokens // 4, tokens - tokens // 4), torch.bfloat16, GPU)
    normaliser = step.loss_rows(batch)
    step(batch, normaliser).loss.backward()  # libraries take their workspaces
    step.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step(batch, normaliser)
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    kept_planned, loss_planned = (of(LLAMA_8B, tokens, step.steps, 2) for of in (kept_bytes, loss_bytes))
    assert kept == pytest.approx(kept_planned, rel=0.05)
    assert peak == pytest.approx(kept_planned + loss_planned, rel=0.05)
    result.loss.backward()
