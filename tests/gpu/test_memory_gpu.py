"""What a draft step takes on a GPU against the formulas that `plan` prints: torch's own figures, for the shape of an 8B
target. Imports torch and specforge.draft only."""

from __future__ import annotations

import pytest
import torch

from specforge.draft.memory import kept_bytes, loss_bytes
from specforge.draft.model import DraftConfig
from tests.draft_memory import draft_step, supervised_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
GPU = torch.device("cuda")
CONFIG = DraftConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    vocab_size=128256,
    draft_vocab_size=32000,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    aux_layers=(1, 15, 28),
)


@pytest.mark.parametrize("tokens", [2048, 4096])
def test_a_draft_step_takes_what_is_planned(tokens):
    step = draft_step(CONFIG, torch.bfloat16, GPU)
    batch = supervised_row(CONFIG, (tokens // 4, tokens - tokens // 4), torch.bfloat16, GPU)
    normaliser = step.loss_rows(batch)
    step(batch, normaliser).loss.backward()  # libraries take their workspaces
    step.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step(batch, normaliser)
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    kept_planned, loss_planned = (of(CONFIG, tokens, step.steps, 2) for of in (kept_bytes, loss_bytes))
    assert kept == pytest.approx(kept_planned, rel=0.05)
    assert peak == pytest.approx(kept_planned + loss_planned, rel=0.05)
    result.loss.backward()
