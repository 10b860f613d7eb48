"""The plan's figures against what a real capture, a real model and a real draft take."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from specforge import cli, config
from specforge.data import prepared
from specforge.data.tokenize import ChatTokenizer
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.errors import ConfigError
from specforge.features.index import Manifest
from specforge.features.writer import StoreWriter
from specforge.pipeline import planning
from specforge.records import Ranks
from specforge.target import weights
from specforge.target.hf_engine import HfEngine
from specforge.train.plain import PlainOptimizer
from tests import tiny


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    tiny.make_target(folder / "target", dtype=torch.bfloat16)
    rows = tiny.write_jsonl(folder / "rows.jsonl", tiny.conversations(60))
    given = {"dataset": str(rows), "model_path": str(folder / "target"), "output": folder / "data"}
    assert cli.execute("prepare-data", config.PrepareDataSettings, given) == 0
    return folder


def settings(work, **given) -> config.PlanSettings:
    return config.PlanSettings(model_path=str(work / "target"), data=work / "data", **given)


@pytest.fixture(scope="module")
def loaded(work):
    info = weights.describe(str(work / "target"))
    tokenizer = ChatTokenizer(str(work / "target"), None, False)
    splits = prepared.load_splits(work / "data", tokenizer, config.DataSettings())
    return info, splits, [example for found in splits.values() for example in found]


def figure(lines, what: str) -> float:
    (found,) = [line.value for line in lines if line.what == what]
    return found


LAYERS = weights.default_aux_layers(8)


@pytest.fixture(scope="module")
def records(loaded):
    info, _, examples = loaded
    engine = HfEngine(info, LAYERS, Ranks(), dtype=torch.bfloat16, tokens_per_batch=8192)
    return [replace(record, sample_id=number) for number, record in enumerate(engine.capture(examples))]


@pytest.mark.parametrize("codec", ["bf16", "fp8"])
def test_bytes_are_those_of_a_real_capture(tmp_path, loaded, records, codec):
    info, _, examples = loaded
    planned = figure(planning.disk_figures(examples, info, codec), f"disk, {codec}")
    manifest = Manifest(
        target=info.path,
        target_fingerprint=info.fingerprint,
        tokenizer_hash="",
        template_hash="",
        aux_layers=LAYERS,
        data_hash="",
        max_length=2048,
        codec=codec,
        dtype="bfloat16",
        hidden_size=info.hidden_size,
        num_records=len(examples),
        tokens_per_batch=8192,
        engine="hf",
    )
    with StoreWriter(tmp_path / "store", manifest) as writer:
        for record in records:
            writer.add(record)
    files = [path for path in (tmp_path / "store").iterdir() if "shard" in path.name]
    written = sum(path.stat().st_size for path in files)
    assert written / planned == pytest.approx(1, abs=0.02)


def test_a_rate_is_taken_from_a_capture_of_this_target_only(work, loaded, tmp_path):
    info, _, examples = loaded
    tokens = sum(len(example.token_ids) for example in examples)
    planning.write_rate(tmp_path, info, 250.0, 1, torch.device("cpu"))
    lines = planning.hour_figures(settings(work, rate_from=tmp_path, dp_size=4), info, tokens)
    assert figure(lines, "hours") == pytest.approx(tokens / 1000 / 3600)
    path = tmp_path / planning.RATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_fingerprint": "another"}))
    with pytest.raises(ConfigError, match="another target"):
        planning.read_rate(tmp_path, info)
    with pytest.raises(ConfigError, match="no measured rate"):
        planning.read_rate(work / "data", info)


def test_weights_are_those_of_the_loaded_model(work, loaded):
    info, *_ = loaded
    model = AutoModelForCausalLM.from_pretrained(info.path, dtype=torch.bfloat16)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert weights.loaded_bytes(info, torch.bfloat16) == held
    assert weights.loaded_bytes(info, torch.float32) == 2 * held


def test_quantised_weights_keep_their_width(work, tmp_path):
    from safetensors.torch import save_file

    target = tiny.make_target(tmp_path / "quantised", dtype=torch.bfloat16)
    with safe_open(target / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    before = weights.loaded_bytes(weights.describe(str(target)), torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, target / "model.safetensors")
    after = weights.loaded_bytes(weights.describe(str(target)), torch.bfloat16)
    assert before - after == tensors[name].numel()


def test_cache_is_that_of_keys_and_values_of_one_pass(work, loaded):
    """8 layers, 2 key/value heads of 32, keys and values, 2 bytes; four ranks still hold one head each."""
    info, *_ = loaded
    assert planning.cache_bytes_a_token(info, 1, 2) == 8 * 2 * 2 * 32 * 2
    assert planning.cache_bytes_a_token(info, 2, 2) == 8 * 2 * 1 * 32 * 2
    assert planning.cache_bytes_a_token(info, 4, 2) == 8 * 2 * 1 * 32 * 2


def optimizer_bytes(info) -> int:
    """Of the state that training keeps in fp32, its fp32 weights included."""
    draft = Eagle3Draft(DraftConfig.for_target(info, (1, 3, 4), 32000))
    muon = {"optimizer": {"type": "Muon", "params": {"lr": 1, "adam_lr": 1}}, "gradient_clipping": 1.0}
    state = PlainOptimizer(SimpleNamespace(draft=draft), muon, Ranks()).state()
    return sum(4 * tensor.numel() for tensor in state.values())


def test_the_drafts_memory_is_shared_as_zero2_shares_it(work, loaded):
    info, *_ = loaded
    one = planning.memory_figures(settings(work, online=True), info, torch.bfloat16)
    four = planning.memory_figures(settings(work, online=True, tp_size=2, dp_size=2), info, torch.bfloat16)
    assert figure(four, "memory, draft") == figure(one, "memory, draft")
    assert figure(four, "memory, optimizer") == figure(one, "memory, optimizer") / 4
    assert figure(one, "memory, optimizer") == optimizer_bytes(info)
    assert figure(four, "memory, weights") == figure(one, "memory, weights") / 2
    offline = planning.memory_figures(settings(work), info, torch.bfloat16)
    assert figure(offline, "memory of a rank") < figure(one, "memory of a rank")
    assert figure(offline, "memory of a rank") == sum(line.value for line in offline[:-1])


def test_the_command_prints_every_figure_and_why(work, capsys):
    given = {"model_path": str(work / "target"), "data": work / "data", "online": True}
    assert cli.execute("plan", config.PlanSettings, given) == 0
    said = " ".join(capsys.readouterr().out.split())
    for word in ("samples", "supervised", "disk, bf16", "disk, fp8", "memory, optimizer", "--tokens-per-second"):
        assert word in said
