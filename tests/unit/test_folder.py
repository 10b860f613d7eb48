"""The draft on disk: exactly what the contract says, for both servers, and back again bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.draft import folder as draft_folder
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.errors import CheckpointError

H, F, N, K, E, V, D = 32, 48, 4, 2, 8, 60, 40
CONFIG = DraftConfig(
    hidden_size=H,
    intermediate_size=F,
    num_attention_heads=N,
    num_key_value_heads=K,
    head_dim=E,
    rms_norm_eps=1e-5,
    vocab_size=V,
    draft_vocab_size=D,
    max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    aux_layers=(1, 4, 9),
    target_fingerprint="abc",
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
)
SHAPES = {  # eagle3.md, "The draft on disk"
    "fc.weight": [H, 3 * H],
    "midlayer.input_layernorm.weight": [H],
    "midlayer.hidden_norm.weight": [H],
    "midlayer.post_attention_layernorm.weight": [H],
    "midlayer.self_attn.q_proj.weight": [N * E, 2 * H],
    "midlayer.self_attn.k_proj.weight": [K * E, 2 * H],
    "midlayer.self_attn.v_proj.weight": [K * E, 2 * H],
    "midlayer.self_attn.o_proj.weight": [H, N * E],
    "midlayer.mlp.gate_proj.weight": [F, H],
    "midlayer.mlp.up_proj.weight": [F, H],
    "midlayer.mlp.down_proj.weight": [H, F],
    "norm.weight": [H],
    "lm_head.weight": [D, H],
    "d2t": [D],
    "t2d": [V],
}


def made(seed=0, config=CONFIG):
    """(draft, kept_D, fp32 weights by name)"""
    generator = torch.Generator().manual_seed(seed)
    draft = Eagle3Draft(config)
    weights = {n: torch.randn(p.shape, generator=generator) for n, p in draft.state_dict().items()}
    kept = torch.sort(torch.randperm(config.vocab_size, generator=generator)[: config.draft_vocab_size]).values
    return draft, kept, weights


def saved(folder, seed=0, dtype=torch.bfloat16, config=CONFIG):
    draft, kept, weights = made(seed, config)
    draft_folder.save(folder, draft, kept, weights, dtype)
    return kept, weights


@pytest.fixture
def folder(tmp_path):
    saved(tmp_path / "draft")
    return tmp_path / "draft"


# Tensors


@pytest.mark.parametrize(("dtype", "code"), [(torch.bfloat16, "BF16"), (torch.float32, "F32")])
def test_names_shapes_and_dtypes_are_those_of_the_contract(tmp_path, dtype, code):
    saved(tmp_path / "draft", dtype=dtype)
    content = (tmp_path / "draft" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {name: entry["shape"] for name, entry in header.items()} == SHAPES
    dtypes = {name: entry["dtype"] for name, entry in header.items()}
    assert dtypes.pop("d2t") == "I64"
    assert dtypes.pop("t2d") == "BOOL"
    assert set(dtypes.values()) == {code}
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_d2t_and_t2d_as_the_servers_read_them(tmp_path):
    kept, _ = saved(tmp_path / "draft")
    content = load_file(tmp_path / "draft" / "model.safetensors")
    assert [draft_id + int(content["d2t"][draft_id]) for draft_id in range(D)] == kept.tolist()
    assert [token for token in range(V) if content["t2d"][token]] == kept.tolist()


def test_weights_are_the_ones_given_not_the_modules_own(tmp_path):
    """Training passes the fp32 weights of the optimizer; the module holds them rounded."""
    _, weights = saved(tmp_path / "draft", dtype=torch.float32)
    content = load_file(tmp_path / "draft" / "model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(content[name], weight), name


def test_a_tensor_too_few_or_too_many_is_never_written(tmp_path):
    draft, kept, weights = made()
    for wrong in ({k: v for k, v in weights.items() if k != "norm.weight"}, weights | {"embed_tokens.weight": kept}):
        with pytest.raises(AssertionError):
            draft_folder.save(tmp_path / "draft", draft, kept, wrong, torch.bfloat16)
        assert not (tmp_path / "draft").exists()


# config.json


def test_config_says_what_both_servers_read(folder):
    raw = json.loads((folder / "config.json").read_text())
    want = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": H,
        "intermediate_size": F,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": E,
        "rms_norm_eps": 1e-5,
        "vocab_size": V,
        "draft_vocab_size": D,
        "target_hidden_size": H,
        "tie_word_embeddings": False,
        "max_position_embeddings": 128,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {name: raw[name] for name in want} == want


def test_layer_ids_once_for_each_server(folder):
    raw = json.loads((folder / "config.json").read_text())
    assert raw["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 4, 9]  # SGLang: output of layer k
    assert raw["eagle_config"]["use_aux_hidden_state"] is True
    assert raw["eagle_aux_hidden_state_layer_ids"] == [2, 5, 10]  # vLLM: input of layer k


def test_a_scaled_rope_stands_in_both_forms(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    saved(tmp_path / "draft", config=replace(CONFIG, rope_parameters=rope))
    raw = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert raw["rope_theta"] == 1e6
    assert raw["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert raw["rope_parameters"] == rope


def test_transformers_reads_the_config(folder):
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(folder)
    assert (read.model_type, read.hidden_size, read.head_dim, read.num_hidden_layers) == ("llama", H, E, 1)
    assert read.draft_vocab_size == D
    assert read.rope_parameters["rope_theta"] == 50000.0


# Back again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    kept, weights = saved(tmp_path / "draft", dtype=dtype)
    draft, found = draft_folder.load(tmp_path / "draft", dtype)
    assert torch.equal(found, kept)
    assert found.dtype == torch.int64
    assert draft.config == CONFIG
    assert set(draft.state_dict()) == set(weights)
    for name, tensor in draft.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, weights[name].to(dtype)), name
    again = tmp_path / "again"
    draft_folder.save(again, draft, found, draft.state_dict(), dtype)
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "draft" / name).read_bytes()


def test_only_the_two_files_and_nothing_beside(tmp_path):
    saved(tmp_path / "draft")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["draft"]
    assert sorted(p.name for p in (tmp_path / "draft").iterdir()) == ["config.json", "model.safetensors"]


def test_a_draft_takes_the_place_of_an_older_one_whole(tmp_path):
    saved(tmp_path / "draft", seed=1)
    (tmp_path / "draft" / "leftover.txt").write_text("of the older one")
    (tmp_path / ".draft.tmp").mkdir()  # as a kill leaves it
    (tmp_path / ".draft.tmp" / "half").write_text("")
    (tmp_path / ".draft.old").mkdir()
    kept, weights = saved(tmp_path / "draft", seed=2, dtype=torch.float32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["draft"]
    assert sorted(p.name for p in (tmp_path / "draft").iterdir()) == ["config.json", "model.safetensors"]
    draft, found = draft_folder.load(tmp_path / "draft", torch.float32)
    assert torch.equal(found, kept)
    assert torch.equal(draft.fc.weight, weights["fc.weight"])


def test_a_failed_save_leaves_the_older_draft(tmp_path):
    kept, _ = saved(tmp_path / "draft", seed=1)
    draft, _, weights = made(2)
    with pytest.raises(IndexError):  # a token beyond the target's vocabulary
        draft_folder.save(tmp_path / "draft", draft, kept + V, weights, torch.bfloat16)
    assert torch.equal(draft_folder.load(tmp_path / "draft", torch.bfloat16)[1], kept)


# Refusals


def edited(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        if value is None:
            del raw[name]
        else:
            raw[name] = value
    (folder / "config.json").write_text(json.dumps(raw))


def refused(folder):
    with pytest.raises(CheckpointError) as error:
        draft_folder.load(folder, torch.float32)
    assert str(folder) in error.value.where
    assert error.value.fix
    return error.value


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("harm", ["missing", "empty", "cut", "binary"])
def test_a_missing_or_damaged_file(folder, name, harm):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "binary": b"\xff\xfe" * 50}[harm])
    refused(folder)


def test_no_folder_at_all(tmp_path):
    refused(tmp_path / "none")


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}"])
def test_a_config_that_is_none(folder, content):
    (folder / "config.json").write_text(content)
    refused(folder)


@pytest.mark.parametrize(
    "name", ["hidden_size", "draft_vocab_size", "rope_parameters", "eagle_config", "head_dim", "num_attention_heads"]
)
def test_a_missing_key_is_named(folder, name):
    edited(folder, **{name: None})
    assert name in refused(folder).what


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "t2d"])  # servers make that one from d2t
def test_a_missing_tensor_is_named(folder, name):
    """SGLang leaves what is missing at its random start without a word."""
    content = load_file(folder / "model.safetensors")
    del content[name]
    save_file(content, folder / "model.safetensors")
    assert name in refused(folder).what


def test_a_tensor_too_many_is_named(folder):
    """SGLang drops what it does not know without a word."""
    content = load_file(folder / "model.safetensors") | {"midlayer.self_attn.q_norm.weight": torch.ones(E)}
    save_file(content, folder / "model.safetensors")
    assert "q_norm" in refused(folder).what


@pytest.mark.parametrize("name", ["fc.weight", "lm_head.weight", "d2t"])
def test_a_tensor_of_another_shape(folder, name):
    content = load_file(folder / "model.safetensors")
    content[name] = content[name][:-1].clone()
    save_file(content, folder / "model.safetensors")
    refused(folder)


def test_layer_ids_that_contradict_each_other(folder):
    """A shifted id makes acceptance fall to about 1 with no message: "write both, and check"."""
    edited(folder, eagle_aux_hidden_state_layer_ids=[1, 4, 9])
    assert "eagle_aux_hidden_state_layer_ids" in refused(folder).what


def test_a_vocabulary_whose_two_forms_contradict_each_other(folder):
    content = load_file(folder / "model.safetensors")
    content["t2d"] = ~content["t2d"]
    save_file(content, folder / "model.safetensors")
    refused(folder)


@pytest.mark.parametrize("shift", [-1000, 1000])
def test_a_vocabulary_outside_the_targets(folder, shift):
    content = load_file(folder / "model.safetensors")
    content["d2t"] += shift
    save_file(content, folder / "model.safetensors")
    refused(folder)
