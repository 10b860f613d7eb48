"""The plan's figures against what a real capture, a real model and a real draft take."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from specforge import cli, config
from specforge.data import prepared
from specforge.data.tokenize import ChatTokenizer
from specforge.draft import memory
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.errors import ConfigError
from specforge.features.index import Manifest
from specforge.features.writer import StoreWriter
from specforge.pipeline import planning
from specforge.records import Ranks
from specforge.target import weights
from specforge.target.hf_engine import HfEngine
from specforge.train.muon import Muon, Partition, is_muon, update_bytes
from specforge.train.optimizer import set_rates
from specforge.train.plain import PlainOptimizer
from tests import tiny
from tests.draft_memory import META, Alive, draft_step, kept_bytes, norms_of_a_gpu, supervised_row, tensors_of


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


# --- What plan says of training against what torch's meta device counts, with the operators that a GPU uses

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)
WITHIN = 0.05


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """An 8B target of which only the config and the header of the weights exist; the rest of the file is a hole."""
    folder = tmp_path_factory.mktemp("llama")
    LLAMA_8B.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA_8B, dtype=torch.bfloat16)
    header, at = {}, 0
    for name, tensor in model.state_dict().items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(file.tell() + at)
    return weights.describe(str(folder), fingerprinted=False), at


def counted(config: DraftConfig, tokens: int, steps: int) -> dict[str, float]:
    """Bytes of training on one rank, by the lines of the plan."""
    step, batch = draft_step(config, torch.bfloat16, steps=steps), supervised_row(config, (tokens,), torch.bfloat16)
    parameters = list(step.draft.parameters())
    frozen = [step.embedding_VH, step.frozen[1]]
    with norms_of_a_gpu():
        kept = kept_bytes(lambda: step(batch, step.loss_rows(batch)), [*parameters, *frozen])
        with Alive([*parameters, *frozen, step.kept_D, *tensors_of(batch)]) as alive:
            loss = step(batch, step.loss_rows(batch)).loss
        loss.backward()
    gradients = sum(parameter.grad.nbytes for parameter in parameters)
    params = {"lr": 1e-3, "adam_lr": 1e-3}
    muon = {"bf16": {"enabled": True}, "optimizer": {"type": "Muon", "params": params}, "gradient_clipping": 1.0}
    optimizer = PlainOptimizer(step, muon, Ranks(device=META))
    copies = list(optimizer._weights.values())
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    set_rates(optimizer._optimizer, 1.0)
    optimizer._optimizer.step()
    moments = [x for state in optimizer._optimizer.state.values() for x in state.values() if x.dim()]
    return {
        "memory, draft": sum(parameter.nbytes for parameter in parameters),
        "memory, gradients": gradients,
        "memory, optimizer": sum(x.nbytes for x in [*copies, *moments]),
        "memory, embedding and head rows": sum(x.nbytes for x in frozen),
        "memory, packed rows": sum(x.nbytes for x in tensors_of(batch)) * (16384 // tokens),
        "memory, unrolled draft": kept,
        "memory, loss": alive.peak - kept,
        "memory, gradient bucket": 2 * DeepSpeedZeroConfig().reduce_bucket_size,
    }


@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("online", [False, True])
def test_training_takes_what_is_planned(llama, tokens, online):
    """Every line of the draft's, and their sum. Online the target's come first, with the states of a pass."""
    info, weight_bytes = llama
    given = config.PlanSettings(model_path=info.path, data=info.path, row_tokens=tokens, online=online)
    lines = planning.memory_figures(given, info, torch.bfloat16, longest=1000)
    draft = DraftConfig.for_target(info, weights.default_aux_layers(32), 32000)
    found = counted(draft, tokens, given.steps)
    for what, size in found.items():
        assert figure(lines, what) == pytest.approx(size, rel=WITHIN), what
    kind = "an online training rank" if online else "an offline training rank"
    target = 0.0
    if online:
        assert figure(lines, "memory, weights") == weight_bytes
        pass_ = tensors_of(supervised_row(draft, (given.tokens_per_batch,), torch.bfloat16))
        states = sum(x.nbytes for x in pass_) + pass_[2].nbytes  # of the records, and as the layers handed them over
        assert figure(lines, "memory, captured states") == pytest.approx(states, rel=WITHIN)
        names = ("weights", "KV cache", "captured states", "logits", "activations")
        target = sum(figure(lines, f"memory, {name}") for name in names)
    assert figure(lines, f"memory of {kind}") == pytest.approx(sum(found.values()) + target, rel=WITHIN)
    assert sum(line.what.startswith("memory of") for line in lines) == (1 if online else 2)


SMALL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "draft_vocab_size": 8192,
}


@pytest.mark.parametrize("tokens", [512, 4096])
@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ({}, 1),
        ({}, 3),
        ({"norm_output": True, "fc_norm": True}, 7),
        ({"norm_before_fc": True}, 7),
        (SMALL, 7),
    ],
)
def test_other_drafts_and_steps_take_what_is_planned(llama, tokens, change, steps):
    draft = replace(DraftConfig.for_target(llama[0], (1, 15, 28), 32000), **change)
    found = counted(draft, tokens, steps)
    kept, loss = found["memory, unrolled draft"], found["memory, loss"]
    assert memory.kept_bytes(draft, tokens, steps, 2) == pytest.approx(kept, rel=0.01)
    assert memory.loss_bytes(draft, tokens, steps, 2) == pytest.approx(loss, rel=WITHIN)


def test_longer_samples_than_a_row_are_planned_for(llama):
    info, _ = llama
    given = config.PlanSettings(model_path=info.path, data=info.path)
    lines, longer, alike = (planning.draft_figures(given, info, tokens) for tokens in (1000, 8192, 2048))
    assert figure(longer, "memory, unrolled draft") > 3 * figure(lines, "memory, unrolled draft")
    assert [line.value for line in lines] == [line.value for line in alike]
    assert all(line.what != "memory, optimizer step" for line in lines)
    short = config.PlanSettings(model_path=info.path, data=info.path, row_tokens=256)
    assert figure(planning.draft_figures(short, info, 256), "memory, optimizer step") > 0


@pytest.mark.parametrize("world", [1, 8])
def test_an_optimizer_step_takes_what_is_planned(llama, world, monkeypatch):
    """Muon over this rank's part of one flat tensor of all matrices, as ZeRO hands it over."""
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda *_: None)
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    draft = DraftConfig.for_target(llama[0], (1, 15, 28), 32000)
    with META:
        named = dict(Eagle3Draft(draft).named_parameters())
        shapes = [parameter.shape for name, parameter in named.items() if is_muon(name, parameter.shape)]
        part = -(-sum(shape.numel() for shape in shapes) // world)
        flat = torch.zeros(part)
        flat.grad = torch.zeros(part)
    optimizer = Muon([{"params": [flat], "lr": 1e-3, "muon": True}], torch.bfloat16, META)
    optimizer.partitions[flat] = Partition(runs=(tuple(shapes),), parts=(part,), rank=0, world=world)
    optimizer.step()  # makes its state
    with Alive([flat, optimizer.state[flat]["momentum_buffer"]]) as alive:
        flat.grad = torch.zeros(part, device=META)
        optimizer.step()
    assert update_bytes(part * world, shapes, world) == pytest.approx(alive.peak, rel=WITHIN)


def test_the_drafts_memory_is_shared_as_zero2_shares_it(work, loaded):
    info, *_ = loaded
    one = planning.memory_figures(settings(work, online=True), info, torch.bfloat16, 100)
    four = planning.memory_figures(settings(work, online=True, tp_size=2, dp_size=2), info, torch.bfloat16, 100)
    assert figure(four, "memory, draft") == figure(one, "memory, draft")
    assert figure(four, "memory, gradients") == figure(one, "memory, gradients") / 4
    assert figure(four, "memory, optimizer") == figure(one, "memory, optimizer") / 4
    assert figure(four, "memory, packed rows") == figure(one, "memory, packed rows") / 4
    assert figure(four, "memory, weights") == figure(one, "memory, weights") / 2


def test_the_command_prints_every_figure_and_why(work, capsys, monkeypatch):
    monkeypatch.setattr(planning.console, "width", 200)
    given = {"model_path": str(work / "target"), "data": work / "data", "online": True}
    assert cli.execute("plan", config.PlanSettings, given) == 0
    said = " ".join(capsys.readouterr().out.split())
    for word in ("samples", "supervised", "disk, bf16", "disk, fp8", "memory, optimizer", "--tokens-per-second"):
        assert word in said
    assert "memory of an online training rank" in said
    assert cli.execute("plan", config.PlanSettings, given | {"online": False}) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "memory of a capture rank" in said
    assert "memory of an offline training rank" in said
