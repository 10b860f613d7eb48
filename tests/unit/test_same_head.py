"""The comparison of heads: what rounding makes of the right one passes, and one wrong row of 64 does not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.errors import EngineError
from specforge.target import same_head, weights
from tests import tiny


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    return weights.describe(str(tiny.make_target(tmp_path_factory.mktemp("target") / "target")))


def engine_of(info, dtype):
    """(rows, states, logits) as an engine in `dtype` would have them."""
    head = weights.load_head(info, torch.float32)
    last_kH = torch.randn(same_head.STATES, info.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits_kV = last_kH @ head.head_VH.to(dtype).T
    return head.embedding_VH[same_head.sampled(info.vocab_size)].to(dtype), last_kH, logits_kV


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 11.3])
def test_rounding_and_a_scaled_embedding_pass(info, dtype, factor):
    rows_nH, last_kH, logits_kV = engine_of(info, dtype)
    same_head.check(info, rows_nH * factor, last_kH, logits_kV)
    same_head.check(info, None, last_kH, logits_kV)


@pytest.mark.parametrize("at", [0, 31, 63])
def test_one_wrong_row_of_64_is_seen(info, at):
    rows_nH, last_kH, logits_kV = engine_of(info, torch.bfloat16)
    token = int(same_head.sampled(info.vocab_size)[at])
    wrong_nH = rows_nH.clone()
    wrong_nH[at] = rows_nH[at - 1]
    with pytest.raises(EngineError, match=f"embedding is not .* token {token}"):
        same_head.check(info, wrong_nH, last_kH, logits_kV)
    wrong_kV = logits_kV.clone()
    wrong_kV[:, token] = logits_kV[:, token - 1]
    with pytest.raises(EngineError, match=f"output head is not .* token {token}"):
        same_head.check(info, rows_nH, last_kH, wrong_kV)


def test_sampled_rows_are_those_of_the_whole(info):
    ids_n = same_head.sampled(info.vocab_size)
    whole, some = weights.load_head(info, torch.float32), weights.sample_head(info, ids_n)
    assert torch.equal(whole.embedding_VH[ids_n], some.embedding_VH)
    assert torch.equal(whole.head_VH[ids_n], some.head_VH)
    assert (int(ids_n[0]), int(ids_n[-1])) == (0, info.vocab_size - 1)


def test_a_stale_copy_beside_an_index_is_not_read(tmp_path):
    """transformers' sharded layout, with another model.safetensors left in the folder: the index says what counts."""
    folder = tiny.make_target(tmp_path / "target", shard_size="200KB")
    right = weights.load_head(weights.describe(str(folder)), torch.float32)
    assert (folder / "model.safetensors.index.json").is_file()
    stale = {name: tensor * 0 for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(stale, folder / "model.safetensors")
    found = weights.load_head(weights.describe(str(folder)), torch.float32)
    assert torch.equal(found.embedding_VH, right.embedding_VH)
    assert torch.equal(found.head_VH, right.head_VH)
