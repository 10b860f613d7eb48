"""The draft's rope against SGLang's own, as its draft class asks for it, for the ropes that targets have."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from specforge.draft.folder import config_json
from specforge.draft.model import DraftConfig, Rotary
from specforge.records import TargetInfo

HEAD, LONGEST = 32, 1024
YARN = {"factor": 64.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
LONG = {"factor": 4.0, "original_max_position_embeddings": 256}
ROPES = {
    "default": {},
    "default, half of the head": {"partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 128, "partial_rotary_factor": 0.75},
    },
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn, half of the head": {"rope_type": "yarn", "partial_rotary_factor": 0.5, **YARN},
    "yarn with a factor of its own": {"rope_type": "yarn", "attention_factor": 1.0, **YARN},
    "yarn with two scales": {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.707, **YARN},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, **LONG},
    "longrope of part of the head": {
        **{
            "rope_type": "longrope",
            "short_factor": [1.0] * 12,
            "long_factor": [2.0] * 12,
            "partial_rotary_factor": 0.75,
        },
        **LONG,
    },
    "of another kind": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
}


@pytest.fixture(scope="module", autouse=True)
def server_args():
    set_global_server_args_for_scheduler(ServerArgs(model_path="none", device="cpu"))


def draft_config(rope) -> DraftConfig:
    config = {
        **{"num_attention_heads": 2, "head_dim": HEAD, "max_position_embeddings": LONGEST, "intermediate_size": 64},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},
    }
    info = TargetInfo(
        path="t", fingerprint="", config=config, hidden_size=64, num_layers=8, vocab_size=100, dtype=torch.float32
    )
    return DraftConfig.for_target(info, (1, 3, 4), 100)


@pytest.mark.parametrize("name", ROPES)
def test_the_draft_turns_as_sglangs_class_does(name):
    """What the draft computes, and what SGLang computes from the draft's folder."""
    config = draft_config(ROPES[name])
    written = config_json(config, torch.float32)
    # as transformers hands the folder's config to SGLang's class
    rope = dict(written["rope_parameters"])
    theirs = get_rope(HEAD, HEAD, LONGEST, rope["rope_theta"], True, rope, torch.float32)
    assert written.get("partial_rotary_factor", 1.0) == 1.0
    reach = 200  # longrope changes behind its original length
    cache = theirs.short_cos_sin_cache if rope["rope_type"] == "longrope" else theirs.cos_sin_cache
    ours = Rotary(config)
    x = torch.zeros(reach, 1, HEAD)
    x[..., : HEAD // 2] = 1.0
    turned = ours(x, torch.arange(reach))[:, 0]
    torch.testing.assert_close(turned, cache[:reach], rtol=0, atol=2e-5)


def test_a_factor_of_the_target_is_written_for_both(monkeypatch):
    """SGLang reads attn_factor, transformers attention_factor."""
    rope = draft_config(ROPES["yarn with a factor of its own"]).rope_parameters
    assert rope["attention_factor"] == 1.0
    assert rope["attn_factor"] == pytest.approx(1 / 1.4158883083359672)
    assert Rotary(draft_config(ROPES["yarn with a factor of its own"])).factor == pytest.approx(1.0)
