"""`specforge check` without an engine: a good draft passes, each tampered copy gets its own message; and the layouts,
there and back, bit for bit. Nothing here compares with a hash or a side file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from specforge import cli
from specforge.draft import folder as draft_folder
from specforge.draft import inspection, layouts
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.evaluate.agreement import agreement
from specforge.records import FeatureRecord
from specforge.target import weights
from tests import tiny

IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a tiny target and a draft for it, as training writes it: 200 of 512 tokens, special ones first."""
    folder = tmp_path_factory.mktemp("work")
    tiny.make_target(folder / "target")
    info = weights.describe(str(folder / "target"))
    kept = torch.cat([torch.arange(10), torch.arange(10, 390, 2)])
    draft = Eagle3Draft(DraftConfig.for_target(info, (1, 3, 4), len(kept)))
    draft.initialise(weights.load_head(info, torch.float32), kept, seed=0)
    draft_folder.save(folder / "draft", draft, kept, draft.state_dict(), torch.bfloat16)
    return folder


@pytest.fixture
def copy(work, tmp_path) -> Path:
    return Path(shutil.copytree(work / "draft", tmp_path / "copy"))


def run(command: str, *arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, [command, *map(str, arguments)])
    return done.exit_code, done.output


def check(folder: Path, work: Path, *more: object) -> tuple[int, str]:
    return run("check", folder, "--model-path", work / "target", *more)


def config(folder: Path, change) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def tensors(folder: Path, change) -> None:
    content = load_file(folder / "model.safetensors")
    change(content)
    save_file({n: t.contiguous() for n, t in content.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def setting(**values):
    return lambda folder: config(folder, lambda raw: raw.update(values))


def permuted(content):
    content["d2t"] = content["d2t"].flip(0)


def absolute(content):
    content["d2t"] += torch.arange(len(content["d2t"]))


def renamed(content):
    content["fc.wieght"] = content.pop("fc.weight")


def theta(raw):
    raw["rope_theta"] = raw["rope_parameters"]["rope_theta"] = 500000.0


TAMPERED = {  # what is done to the copy, and words of its own message
    "vLLM's ids shifted": (setting(**{IDS: [3, 5, 6]}), "are not the same layers"),
    "SGLang's ids shifted": (setting(eagle_config={IDS: [2, 4, 5]}), "are not the same layers"),
    "all ids missing": (
        lambda folder: config(folder, lambda raw: (raw.pop(IDS), raw.pop("eagle_config"))),
        "names no layer ids",
    ),
    "vLLM's ids missing": (lambda folder: config(folder, lambda raw: raw.pop(IDS)), "vLLM's layer ids are missing"),
    "SGLang's ids missing": (setting(eagle_config={}), "SGLang's layer ids are missing"),
    "d2t permuted": (lambda folder: tensors(folder, permuted), "d2t is not ascending"),
    "d2t absolute": (lambda folder: tensors(folder, absolute), "d2t holds the target's ids themselves"),
    "t2d inverted": (
        lambda folder: tensors(folder, lambda content: content.update(t2d=~content["t2d"])),
        "t2d is inverted",
    ),
    "a key renamed": (lambda folder: tensors(folder, renamed), "'fc.wieght' stands where 'fc.weight' should"),
    "a key missing": (
        lambda folder: tensors(folder, lambda content: content.pop("midlayer.hidden_norm.weight")),
        "'midlayer.hidden_norm.weight' is missing",
    ),
    "wrong head dimension": (setting(head_dim=16), "4 heads (2 for keys) of dimension 16"),
    "rope theta changed": (lambda folder: config(folder, theta), "rope_theta is 500000.0, the target's 10000.0"),
    "rope theta changed once": (setting(rope_theta=500000.0), "which one is read depends on the server"),
    "maximum position too short": (setting(max_position_embeddings=256), "max_position_embeddings is 256"),
    "vocabulary size wrong": (setting(vocab_size=500), "vocab_size is 500, the target's 512"),
    "tied": (setting(tie_word_embeddings=True), "tie_word_embeddings is true"),
    # and more than the twelve
    "descending ids": (setting(**{IDS: [5, 4, 2], "eagle_config": {IDS: [4, 3, 1]}}), "not three ascending ids"),
    "ids beyond the last layer": (
        setting(**{IDS: [2, 4, 8], "eagle_config": {IDS: [1, 3, 7]}}),
        "not three ascending ids in 0 .. 6",
    ),
    "a key too many": (
        lambda folder: tensors(folder, lambda content: content.update(extra=torch.ones(3))),
        "'extra' is no tensor of an EAGLE-3 draft",
    ),
    "d2t as int32": (
        lambda folder: tensors(folder, lambda content: content.update(d2t=content["d2t"].int())),
        "'d2t' is int32, not int64",
    ),
    "not finite": (
        lambda folder: tensors(folder, lambda content: content["norm.weight"].fill_(float("nan"))),
        "not finite",
    ),
    "norm_before_residual": (setting(norm_before_residual=True), "norm_before_residual"),
    "another target": (setting(specforge={"target_fingerprint": "other"}), "trained for another target"),
    "two layers": (setting(num_hidden_layers=2), "has 2 layers"),
}


def test_a_good_draft_passes(work):
    code, said = check(work / "draft", work)
    assert code == 0, said
    assert "error" not in said
    assert "note" not in said
    assert said.count("ok") >= 9
    assert said.count("not done") == 4  # SGLang's class, acceptance, layers fed, and the last line, which says so


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_copy_is_refused_with_its_own_message(copy, work, name):
    tamper, words = TAMPERED[name]
    tamper(copy)
    code, said = check(copy, work)
    said = " ".join(said.split())
    assert code == 2, said
    assert words in said
    others = {other for _, other in TAMPERED.values() if other != words and other not in words and words not in other}
    assert not [other for other in others if other in said]
    assert said.count("where:") == said.count("fix:") >= 1


def test_every_fault_is_listed(copy, work):
    for name in ("d2t permuted", "a key missing", "tied", "vocabulary size wrong", "vLLM's ids shifted"):
        TAMPERED[name][0](copy)
    code, said = check(copy, work)
    said = " ".join(said.split())
    assert code == 2
    for name in ("d2t permuted", "a key missing", "tied", "vocabulary size wrong", "vLLM's ids shifted"):
        assert TAMPERED[name][1] in said
    assert "6 fault(s)" in said  # t2d's length is the sixth


@pytest.mark.parametrize("command", ["check", "export"])
@pytest.mark.parametrize("kind", ["truncated", "pickle only", "no config", "no weights", "odd ids", "absent"])
def test_what_cannot_be_read_is_one_message(copy, work, tmp_path, command, kind):
    file = copy / "model.safetensors"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "pickle only":
        torch.save(load_file(file), copy / "pytorch_model.bin")
        file.unlink()
    elif kind == "no config":
        (copy / "config.json").unlink()
    elif kind == "no weights":
        file.unlink()
    elif kind == "odd ids":
        config(copy, lambda raw: raw.update({IDS: ["a", "b", "c"]}))
    else:
        shutil.rmtree(copy)
    if command == "check":
        code, said = check(copy, work)
    else:
        code, said = run("export", copy, "--to", "safeailab", "--output", tmp_path / "out")
    words = {"truncated": "cut short", "pickle only": "never loaded", "odd ids": "no list of"}
    assert code == 2, said
    assert words.get(kind, "") in " ".join(said.split())
    assert said.count("where:") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "pytorch_model.bin"])
def test_pickles_beside_safetensors_are_ignored_with_a_note(copy, capsys, name):
    """Every trainer of transformers leaves one."""
    (copy / name).write_bytes(b"never opened")
    assert layouts.read(copy).tensors.keys() == load_file(copy / "model.safetensors").keys()
    assert f"{name} in {copy} are pickles: they are ignored" in " ".join(capsys.readouterr().out.split())


def test_a_draft_with_d2t_alone_gets_its_t2d(copy):
    """Servers read no more than that."""
    whole = layouts.read(copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["t2d"]
    save_file(tensors, copy / "model.safetensors")
    found = layouts.read(copy)
    assert torch.equal(found.tensors["t2d"], whole.tensors["t2d"])
    assert not list(inspection.of_folder(found)["keys"])
    assert torch.equal(draft_folder.load(copy, torch.float32)[1], torch.nonzero(whole.tensors["t2d"]).squeeze(1))


@pytest.mark.parametrize("layout", ["sglang", "speculators"])
@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"type": "linear", "factor": 2.0}])
def test_a_theta_inside_rope_scaling_is_the_drafts(tmp_path, layout, scaling):
    own = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "vocab_size": 100,
        "rope_scaling": scaling | {"rope_theta": 5e5},
    }
    raw = {"architectures": ["LlamaForCausalLMEagle3"], **own}
    if layout == "speculators":
        raw = {"speculators_model_type": "eagle3", "transformer_layer_config": own}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_theta": 10000.0}))
    save_file({"fc.weight": torch.zeros(64, 192)}, tmp_path / "model.safetensors")
    assert layouts.read(tmp_path).config["rope_parameters"]["rope_theta"] == 5e5


# Layouts


def exported(folder: Path, to: str, output: Path, work: Path) -> Path:
    code, said = run("export", folder, "--to", to, "--output", output, "--model-path", work / "target")
    assert code == 0, said
    return output


@pytest.mark.parametrize("to", ["sglang", "vllm", "safeailab"])
def test_there_and_back_gives_the_same_bytes(work, tmp_path, to):
    there = exported(work / "draft", to, tmp_path / "there", work)
    back = exported(there, "sglang", tmp_path / "back", work)
    for name in ("config.json", "model.safetensors"):
        assert (back / name).read_bytes() == (work / "draft" / name).read_bytes()
    code, said = check(there, work)
    assert code == 0, said
    assert ("layout" in said) == (to != "sglang")  # said of what SGLang cannot load as it is


def test_the_speculators_format(work, tmp_path):
    """What vLLM's reader of that format takes from it; it takes norm_before_residual as true where it is not said."""
    folder = exported(work / "draft", "vllm", tmp_path / "vllm", work)
    raw = json.loads((folder / "config.json").read_text())
    assert raw["speculators_model_type"] == "eagle3"
    assert raw["norm_before_residual"] is False
    assert raw[IDS] == [2, 4, 5]
    assert raw["speculators_config"]["verifier"]["name_or_path"] == str(work / "target")
    assert raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert raw["transformer_layer_config"]["head_dim"] == 32
    assert raw["transformer_layer_config"]["vocab_size"] == 512
    names = set(load_file(folder / "model.safetensors"))
    assert "layers.0.hidden_norm.weight" in names
    assert not any(name.startswith("midlayer") for name in names)
    config(folder, lambda raw: raw.pop("norm_before_residual"))
    code, said = check(folder, work)
    assert code == 0  # vLLM serves it
    assert "norm_before_residual" in said
    code, said = run("export", folder, "--to", "sglang", "--output", tmp_path / "lost")
    assert code == 2  # SGLang would not
    assert not (tmp_path / "lost").exists()


def test_a_public_draft_of_the_eagle_repository(copy, work, tmp_path):
    """No layer ids, old rope keys, another architecture, a short reach, and an embedding of its own."""

    def public(raw):
        for name in (IDS, "eagle_config", "specforge", "rope_parameters", "rope_scaling", "target_hidden_size"):
            raw.pop(name)
        raw["architectures"] = ["LlamaForCausalLM"]

    config(copy, public)
    tensors(copy, lambda content: content.update({"embed_tokens.weight": torch.zeros(512, 128)}))
    code, said = check(copy, work)
    said = " ".join(said.split())
    assert code == 0, said
    assert "names no layer ids" in said
    assert "an embedding" in said or "own embedding" in said
    back = exported(copy, "sglang", tmp_path / "back", work)
    assert json.loads((back / "config.json").read_text())[IDS] == [2, 4, 5]  # the target's default layers
    code, said = run("export", copy, "--to", "sglang", "--output", tmp_path / "blind")
    assert code == 2
    assert "--model-path" in said


def test_layers_that_the_eagle_repository_does_not_read(copy, work, tmp_path):
    config(copy, lambda raw: raw.update({IDS: [1, 3, 5], "eagle_config": {IDS: [0, 2, 4]}}))
    given = ["--output", tmp_path / "out", "--model-path", work / "target"]
    code, said = run("export", copy, "--to", "safeailab", *given)
    assert code == 2
    assert "always reads layers [1, 3, 4]" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["d2t permuted", "a key missing", "wrong head dimension", "tied"])
def test_a_broken_draft_is_not_exported(copy, tmp_path, name):
    TAMPERED[name][0](copy)
    code, said = run("export", copy, "--to", "sglang", "--output", tmp_path / "out")
    assert code == 2
    assert TAMPERED[name][1] in " ".join(said.split())
    assert not (tmp_path / "out").exists()


def test_a_draft_is_never_exported_into_itself_or_over_something_else(copy, work, tmp_path):
    assert run("export", copy, "--to", "sglang", "--output", copy)[0] == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert run("export", copy, "--to", "sglang", "--output", tmp_path / "mine")[0] == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    assert run("export", copy, "--to", "vllm", "--output", tmp_path / "new")[0] == 2  # its target is not named
    assert not (tmp_path / "new").exists()


# The comparison, against a judge that is ours and then wrong


class Ours:
    """A judge that computes what the draft itself does, plus an error of its own."""

    def __init__(self, logits_TD: torch.Tensor) -> None:
        self._logits_TD = logits_TD

    def logits(self, record: FeatureRecord) -> torch.Tensor:
        return self._logits_TD


@pytest.fixture
def case(work):
    draft, _ = draft_folder.load(work / "draft", torch.float32)
    embedding = weights.load_head(weights.describe(str(work / "target")), torch.float32).embedding_VH
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(90, dtype=torch.bool)
    record = FeatureRecord(
        sample_id=0,
        token_ids=torch.randint(0, 512, (90,), generator=generator, dtype=torch.int32),
        loss_mask=mask,
        aux=torch.randn(90, 384, generator=generator),
        last=torch.randn(88, 128, generator=generator),
        teacher_top1=torch.zeros(88, dtype=torch.int32),
        teacher_lse=torch.zeros(88),
    )
    return draft, embedding, record


def test_the_comparison_notices_a_small_error_and_a_shift(case):
    from specforge.draft.unroll import unroll
    from specforge.records import FeatureBatch

    draft, embedding, record = case
    with torch.no_grad():
        step = unroll(draft, embedding, FeatureBatch.pack([record], torch.device("cpu"), torch.float32), 1)[0]
        logits = torch.zeros(90, draft.config.draft_vocab_size)
        logits[step.rows_R] = draft.lm_head(draft.norm(step.hidden_RH))

    def seen(theirs):
        return agreement(Ours(theirs), draft, embedding, [record], torch.float32)

    same = seen(logits)
    assert same.equal
    assert same.positions == same.same_top1 == len(step.rows_R) >= 80
    assert same.max_difference == 0
    assert not seen(logits * 1.001).equal
    shifted = seen(logits.roll(1, 0))
    assert not shifted.equal
    assert shifted.apart > 0.1
    assert shifted.wrong_top1 > 10
