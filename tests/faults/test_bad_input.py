"""Everything that a user can get wrong ends the same way: exit code 2, one message that says where and how to mend it,
no traceback, and nothing written or changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from specforge import cli, console, launch
from specforge.alignment import teacher_rows
from specforge.config import DataSettings
from specforge.data import prepared
from specforge.data.tokenize import ChatTokenizer
from specforge.draft import folder as draft_folder
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.features.index import Manifest
from specforge.features.writer import StoreWriter
from specforge.records import FeatureRecord
from specforge.target import weights
from tests import tiny, warm
from tests.faults.page import fault

ROOT = Path(__file__).parents[2]
LAYERS = (1, 3, 4)
SILENT = (  # a template that never shows what the assistant says
    "{% for message in messages if message['role'] != 'assistant' %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
)

# What all cases share, made once


def make_store(folder, target, *, layers=LAYERS, holes=0):
    """A store as prepare-hidden writes it, with states of the right shapes but no meaning. `holes` records are
    missing."""
    info, tokenizer = weights.describe(str(target)), ChatTokenizer(str(target))
    for name, examples in prepared.load_splits(folder.parent / "data", tokenizer, DataSettings(max_length=256)).items():
        manifest = Manifest(
            target=str(target),
            target_fingerprint=info.fingerprint,
            tokenizer_hash=tokenizer.fingerprint,
            template_hash=tokenizer.template_fingerprint,
            aux_layers=layers,
            data_hash=prepared.data_hash(examples),
            max_length=256,
            codec="fp32",
            dtype="float32",
            hidden_size=info.hidden_size,
            num_records=len(examples),
            tokens_per_batch=8192,
            engine="hf",
        )
        writer = StoreWriter(folder / name, manifest)
        for example in examples[holes:]:
            rows = len(teacher_rows(example.loss_mask))
            writer.add(
                FeatureRecord(
                    sample_id=example.sample_id,
                    token_ids=torch.from_numpy(example.token_ids),
                    loss_mask=torch.from_numpy(example.loss_mask),
                    aux=torch.zeros(len(example.token_ids), 3 * info.hidden_size),
                    last=torch.zeros(rows, info.hidden_size),
                    teacher_top1=torch.zeros(rows, dtype=torch.int32),
                    teacher_lse=torch.zeros(rows),
                )
            )
        writer.close()
    return folder


def make_draft(folder, target):
    draft = Eagle3Draft(DraftConfig.for_target(weights.describe(str(target)), LAYERS, 100))
    draft_folder.save(folder, draft, torch.arange(100), draft.state_dict(), torch.float32)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tiny.make_target(folder / "target", seed=0)
    tiny.make_target(folder / "other", seed=1)
    tiny.write_jsonl(folder / "rows.jsonl", tiny.conversations(60))
    tokenizer = ["--model-path", folder / "target", "--test-share", "0.2"]
    accepted(run("prepare-data", "--dataset", folder / "rows.jsonl", *tokenizer, "--output", folder / "data"))
    make_store(folder / "features", folder / "target")
    make_store(folder / "of_other", folder / "other")
    make_store(folder / "unfinished", folder / "target", holes=1)
    make_draft(folder / "draft", folder / "target")
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """And whatever a command that was wrongly let through did to this process is undone."""
    monkeypatch.chdir(tmp_path)
    environment, descriptors = dict(os.environ), {number: os.dup(number) for number in (1, 2)}
    yield
    console.console.file = None
    for number, kept in descriptors.items():
        os.dup2(kept, number)
        os.close(kept)
    os.environ.clear()
    os.environ.update(environment)
    if dist.is_initialized():
        dist.destroy_process_group()


def run(*arguments):
    """The command in this process: for what is refused before any engine starts."""
    found = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return found.exit_code, found.output


def run_process(*arguments):
    """The same as a user starts it: for what is refused by a rank."""
    command = [sys.executable, "-m", "specforge.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = warm.run(command, Path.cwd(), environment, timeout=120)
    return found.returncode, found.stdout


def listing(*folders):
    """Every file with what tells whether it was written, and every folder (in which something may have been for a
    while)."""
    return {
        path: path.is_dir() or (path.stat().st_mtime_ns, path.stat().st_size)
        for folder in folders
        for path in [folder, *sorted(folder.rglob("*"))]
    }


def accepted(found):
    code, output = found
    assert code == 0, output
    return output


def refused(runner, work, *arguments, log=False):
    """Runs the command in the current folder; returns what it said."""
    before = listing(work, Path.cwd())
    code, output = runner(*arguments)
    assert "Traceback" not in output, output
    assert code == 2, output
    assert output.count("where:") == 1
    assert output.count("fix:") == 1
    where = output.split("where:")[1].splitlines()[0].strip()
    assert where
    assert output.split("fix:")[1].strip()
    after = listing(work, Path.cwd())
    if log:  # where an engine was started, its log and the folder of it may be there
        logs = {path for path in after if path.name == "specforge.log"}
        allowed = logs | {parent for path in logs for parent in path.parents}
        before, after = ({p: s for p, s in found.items() if p not in allowed} for found in (before, after))
    assert after == before, f"written: {[str(path) for path in after if after[path] != before.get(path)]}"
    return output


def target_copy(work, *without):
    """The target in the current folder, less some files."""
    shutil.copytree(work / "target", "target", ignore=shutil.ignore_patterns(*without))
    return Path("target").resolve()


def jsonl(rows):
    """A file in the current folder; bytes are lines as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    Path("given.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return Path("given.jsonl").resolve()


def written(text, name="given"):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Path(name).resolve()


def foreign(name="out"):
    Path(name).mkdir(parents=True)
    (Path(name) / "thesis.tex").write_text("years of work")
    return Path(name)


# prepare-data


def prepare_data(work, dataset=None, *arguments):
    dataset = dataset or work / "rows.jsonl"
    return ["prepare-data", "--dataset", dataset, "--model-path", work / "target", "--output", "out", *arguments]


UNASKED = [{"conversations": [{"role": "user", "content": "anybody?"}]}] * 20
OTHER_KEYS = [{"dialogue": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 20


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "given.jsonl"),
        ([b""] * 3, "given.jsonl"),
        ([bytes(range(256)) * 40], "given.jsonl:1"),
        ([os.urandom(1).hex().encode() * 100], "given.jsonl:1"),
        (UNASKED, "no assistant turn"),
        (OTHER_KEYS, "columns dialogue"),
        ([b"[1, 2]"] * 4, "holds a JSON array"),
    ],
    ids=["empty", "empty lines", "binary", "one long word", "nobody answers", "other keys", "lists"],
)
def test_a_data_file_from_which_nothing_can_be_learned(work, content, said):
    assert said in refused(run, work, *prepare_data(work, jsonl(content)))


def test_a_data_file_that_is_not_there(work):
    assert "none.jsonl" in refused(run, work, *prepare_data(work, "none.jsonl"))
    assert str(work) in refused(run, work, *prepare_data(work, work))


BROKEN = {"json": b"{broken", "utf-8": b'{"conversations": "\xff\xfe"}', "zeros": b"\x00" * 30}


@pytest.mark.parametrize("bad", BROKEN.values(), ids=BROKEN)
@fault(
    "more than 1 % of the rows are broken",
    "refused; the first are named",
)
def test_broken_lines_over_one_percent_are_named(work, bad):
    rows = tiny.conversations(200)
    rows[10], rows[50], rows[150] = bad, bad, bad
    output = refused(run, work, *prepare_data(work, jsonl(rows)))
    assert "given.jsonl:11, given.jsonl:51, given.jsonl:151" in output
    assert "3 of 200" in output


@pytest.mark.parametrize("bad", BROKEN.values(), ids=BROKEN)
@fault(
    "fewer rows are broken",
    "they are left out and counted",
)
def test_broken_lines_under_one_percent_are_counted(work, bad):
    rows = tiny.conversations(200)
    rows[10] = bad
    output = accepted(run(*prepare_data(work, jsonl(rows))))
    assert "1 broken line" in output
    report = json.loads(Path("out/report.json").read_text())
    assert list(report["dropped_at"].values()) == [["given.jsonl:11"]]
    assert report["rows"] == 200
    kept = sum(len(Path(f"out/{name}.jsonl").read_text().splitlines()) for name in ("train", "test"))
    assert kept == 200 - sum(report["dropped"].values())
    assert sum(report["dropped"].values()) == 1


@pytest.mark.parametrize("content", ["half a pair \ud83d", "zero \x00 byte", "line\u2028separator"])
@fault(
    "rows hold lone surrogates, NUL, or no UTF-8",
    "at most that row is left out",
)
def test_odd_characters_cost_at_most_their_own_row(work, content):
    row = {"conversations": [{"role": "user", "content": "odd"}, {"role": "assistant", "content": content}]}
    accepted(run(*prepare_data(work, jsonl([*tiny.conversations(150), row]))))
    for name in ("train", "test"):
        assert all(map(json.loads, Path(f"out/{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]))
    report = json.loads(Path("out/report.json").read_text(encoding="utf-8"))
    assert report["train"]["conversations"] + report["test"]["conversations"] + sum(report["dropped"].values()) == 151
    assert sum(report["dropped"].values()) <= 1


def test_one_conversation_cannot_be_split(work):
    """The reason must be the true one: nothing is wrong with the template's mask."""
    output = refused(run, work, *prepare_data(work, jsonl(tiny.conversations(1))))
    assert "loss mask" not in output


def test_one_conversation_cannot_be_split_without_a_target_either(work):
    refused(run, work, "prepare-data", "--dataset", jsonl(tiny.conversations(1)), "--output", "out")


@pytest.mark.parametrize(
    "template",
    [SILENT, "", "always the same", "{% for %}", "{{ raise_exception('never') }}", b"\xff\xfe\x00\x80", None],
    ids=["silent", "empty", "constant", "syntax", "raises", "binary", "missing"],
)
def test_a_chat_template_that_yields_no_mask(work, template):
    if template is not None:
        written(template, "chat.jinja")
    assert "template" in refused(run, work, *prepare_data(work, None, "--chat-template", "chat.jinja"))


def test_all_answers_behind_the_maximum_length(work):
    refused(run, work, *prepare_data(work, None, "--max-length", 8))


@pytest.mark.parametrize(
    "without", [("*",), ("tokenizer*",), ("chat_template*",)], ids=["empty", "tokenizer", "template"]
)
def test_a_target_without_tokenizer_or_template(work, without):
    target = target_copy(work, *without)
    output = refused(run, work, *prepare_data(work), "--model-path", target)
    assert "--model-path" in output


def test_a_target_that_is_not_there(work):
    refused(run, work, *prepare_data(work), "--model-path", "no/such/folder")


# The output folder, of every command that makes one

OUTPUTS = {
    "prepare-data": lambda work: ["--dataset", work / "rows.jsonl", "--model-path", work / "target"],
    "prepare-hidden": lambda work: ["--data", work / "data", "--model-path", work / "target", "--engine", "hf"],
    "train": lambda work: ["--features", work / "features", "--model-path", work / "target"],
}


@pytest.mark.parametrize("command", OUTPUTS)
@fault(
    "the output folder holds something else",
    "refused; it stays as it is",
)
def test_an_output_folder_of_something_else(work, command):
    output = refused(run, work, command, *OUTPUTS[command](work), "--output", foreign())
    assert "out" in output.split("where:")[1].splitlines()[0]


@pytest.mark.parametrize("inside", ["train", "test"])
def test_something_else_inside_an_output_folder_of_features(work, inside):
    foreign(f"out/{inside}")
    refused(run, work, "prepare-hidden", *OUTPUTS["prepare-hidden"](work), "--output", "out")


@pytest.mark.parametrize("command", OUTPUTS)
@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_an_output_folder_that_is_a_file(work, command, below):
    written("a file", "out")
    runner = run_process if command == "train" else run
    refused(runner, work, command, *OUTPUTS[command](work), "--output", f"out{below}")


def killed_before_rename(number, *arguments):
    """The command in a child that SIGKILLs itself before its n-th rename; False where it ended before."""
    child = os.fork()
    if not child:
        renames, rename = iter(range(1, number)), os.rename

        def deadly(*paths, **more):
            if next(renames, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*paths, **more)

        os.rename = deadly
        os._exit(run(*arguments)[0])
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def test_prepare_data_goes_on_after_a_kill(work):
    """At each of its renames: what it left is its own, not something else."""
    accepted(run(*prepare_data(work), "--output", "whole"))
    number = 1
    while killed_before_rename(number, *prepare_data(work), "--output", f"out{number}"):
        accepted(run(*prepare_data(work), "--output", f"out{number}"))
        for name in ("train.jsonl", "test.jsonl"):
            assert (Path(f"out{number}") / name).read_bytes() == (Path("whole") / name).read_bytes()
        number += 1
    assert number > 3


def test_a_data_file_in_the_output_folder_is_not_written_over(work):
    """Prepared without a target, then again with one: the held-out rows of the first time would be lost."""
    accepted(run("prepare-data", "--dataset", work / "rows.jsonl", "--test-share", "0.2", "--output", "out"))
    assert "train.jsonl" in refused(run, work, *prepare_data(work, "out/train.jsonl"))


# prepare-hidden


def prepare_hidden(work, *arguments):
    fixed = ["--model-path", work / "target", "--data", work / "data", "--engine", "hf", "--output", "out"]
    return ["prepare-hidden", *fixed, *arguments]


def test_a_target_without_config(work):
    target = target_copy(work, "config.json")
    for command in (
        prepare_hidden(work, "--model-path", target),
        ["train", "--features", work / "features", "--model-path", target, "--output", "out"],
        ["train", "--online", "--data", work / "data", "--model-path", target, "--output", "out"],
        ["regenerate", "--prompts", work / "rows.jsonl", "--model-path", target, "--output", "out.jsonl"],
        ["benchmark", "--draft", work / "draft", "--data", work / "data", "--model-path", target],
    ):
        assert "config.json" in refused(run, work, *command)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"model_type": "unheard_of"}', b"\xff\xfe"])
@fault(
    "the target's config.json is no JSON, or absurd",
    "refused",
)
def test_a_target_whose_config_is_none(work, content):
    target = target_copy(work)
    (target / "config.json").write_bytes(content)
    assert "config" in refused(run, work, *prepare_hidden(work, "--model-path", target))


@pytest.mark.parametrize("harm", ["missing", "empty", "cut header", "binary"])
def test_a_target_without_weights(work, harm):
    target = target_copy(work, "*.safetensors")
    if harm != "missing":
        content = (work / "target" / "model.safetensors").read_bytes()
        (target / "model.safetensors").write_bytes(
            {"empty": b"", "cut header": content[:500], "binary": b"\xff" * 999}[harm]
        )
    assert "target" in refused(run, work, *prepare_hidden(work, "--model-path", target))


@fault(
    "the target's weights are cut off",
    "refused",
)
def test_a_target_whose_weights_are_cut_off(work):
    """Only the engine sees it; there is a log, but no store."""
    target = target_copy(work)
    content = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(run_process, work, *prepare_hidden(work, "--model-path", target), log=True)


@pytest.mark.parametrize("size", [3, 5, 8])
def test_a_tp_size_that_does_not_divide_the_heads(work, size):
    output = refused(run, work, *prepare_hidden(work, "--tp-size", size))
    assert f"--tp-size {size}" in output
    assert "1, 2, 4" in output.split("fix:")[1]  # 4 query heads, 2 key/value heads


def test_a_tp_size_larger_than_the_machine(work, monkeypatch):
    """On one core and with the GPUs hidden, so that it means the same on every machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert launch.device_count() == 1
        for command in (
            prepare_hidden(work),
            ["train", "--online", "--data", work / "data", "--model-path", work / "target", "--output", "out"],
        ):
            assert "--tp-size 4" in refused(run, work, *command, "--tp-size", 4)
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("layers", ["1 3", "1 3 3", "4 3 1", "1 3 7", "-1 3 4", "1 3 4 5", "a b c"])
def test_aux_layers_that_no_server_captures(work, layers):
    assert "--aux-layers" in refused(run, work, *prepare_hidden(work, f"--aux-layers={layers}"))


def test_data_that_is_not_there_or_is_none(work):
    assert "none" in refused(run, work, *prepare_hidden(work, "--data", "none"))
    Path("empty").mkdir()
    assert "train.jsonl" in refused(run, work, *prepare_hidden(work, "--data", "empty"))
    assert "given.jsonl" in refused(run, work, *prepare_hidden(work, "--data", jsonl(UNASKED)))
    assert "given.jsonl" in refused(run, work, *prepare_hidden(work, "--data", jsonl(tiny.conversations(1))))
    outside = [{"input_ids": [1, 2, 9999], "loss_mask": [0, 1, 1]}] * 4
    assert "vocabulary" in refused(run, work, *prepare_hidden(work, "--data", jsonl(outside)))
    dumb = [{"input_ids": [1, 2, 3], "loss_mask": [0, 0, 0]}] * 40
    assert "mask" in refused(run, work, *prepare_hidden(work, "--data", jsonl(dumb)))


def test_conversations_longer_than_one_pass(work):
    assert "--tokens-per-batch 20" in refused(run, work, *prepare_hidden(work, "--tokens-per-batch", 20))


def test_a_store_of_another_target_in_the_output_folder(work):
    output = refused(run, work, *prepare_hidden(work, "--max-length", 256), "--output", work / "of_other")
    assert "'target_fingerprint'" in output


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--max-length", "200"], "max_length"),
        (["--aux-layers", "1 2 3"], "aux_layers"),
        (["--num-samples", "5"], "data_hash"),
        (["--dtype", "bfloat16"], "codec"),
    ],
)
def test_a_store_of_other_settings_in_the_output_folder(work, arguments, field):
    command = prepare_hidden(work, "--max-length", 256, *arguments, "--output", work / "features")
    assert f"'{field}'" in refused(run, work, *command)


# train


def train(work, *arguments):
    return [
        "train",
        "--model-path",
        work / "target",
        "--output",
        "out",
        "--deepspeed-config",
        ROOT / "ds_config.json",
        *arguments,
    ]


def test_training_takes_a_store_or_the_live_target(work):
    where = refused(run, work, *train(work)).split("where:")[1].splitlines()[0]
    assert "--features" in where
    assert "--online" in where


def test_keeping_captured_states_where_something_else_is(work):
    both = ["--online", "--data", work / "data", "--features"]
    foreign("kept/train")
    assert "holds no feature store" in refused(run, work, *train(work, *both, "kept"))
    assert "'max_length'" in refused(run, work, *train(work, *both, work / "features"))


def test_limits_of_a_store_that_is_not_kept(work):
    for limit in (["--max-disk", "1GB"], ["--codec", "fp8"]):
        assert "--max-disk" in refused(run, work, *train(work, "--online", "--data", work / "data", *limit))


def test_a_tracker_that_is_not_installed(work):
    assert "pip install wandb" in refused(
        run, work, *train(work, "--features", work / "features", "--tracker", "wandb")
    )


def test_a_draft_to_start_from_that_is_none_or_of_other_sizes(work):
    start = train(work, "--features", work / "features", "--deepspeed-config", ROOT / "ds_config.json", "--init-from")
    assert "none" in refused(run_process, work, *start, "none", log=True)


def test_a_store_that_is_not_there_or_is_unfinished(work):
    assert "none" in refused(run, work, *train(work, "--features", "none"))
    assert "unfinished" in refused(run, work, *train(work, "--features", work / "unfinished"))
    assert "manifest.json" in refused(run, work, *train(work, "--features", work / "features" / "train"))


@fault(
    "a store was made from another target",
    "refused",
)
def test_training_on_a_store_of_another_target(work):
    output = refused(run, work, *train(work, "--features", work / "of_other"))
    assert "'target_fingerprint'" in output
    assert str(work / "other") in output


def test_holding_out_on_a_store_of_another_target(work):
    """Both splits must be of the target that is trained for, or the held-out figures mean nothing."""
    shutil.copytree(work / "features" / "train", "mixed/train")
    shutil.copytree(work / "of_other" / "test", "mixed/test")
    assert "'target_fingerprint'" in refused(run_process, work, *train(work, "--features", "mixed", "--epochs", 1))


def test_training_on_a_store_of_other_layers(work):
    output = refused(run, work, *train(work, "--features", work / "features", "--aux-layers", "1 2 3"))
    assert "aux" in output
    assert "1 2 3" in output


@fault(
    "a store was made with another tokenizer",
    "refused",
)
def test_training_on_a_store_of_another_tokenizer(work):
    target = target_copy(work, "tokenizer*")
    other = tiny.tokenizer()
    other.add_tokens(["one_more"])
    other.save_pretrained(target)
    assert "'tokenizer_hash'" in refused(
        run, work, *train(work, "--features", work / "features"), "--model-path", target
    )


def test_training_on_a_damaged_shard(work):
    shutil.copytree(work / "features", "features")
    [shard] = Path("features/train").glob("shard-*")
    content = bytearray(shard.read_bytes())
    content[-50] ^= 4
    shard.write_bytes(content)
    assert shard.name in refused(run, work, *train(work, "--features", "features"))


def test_training_without_a_named_target(work):
    output = refused(run, work, "train", "--online", "--data", work / "data", "--output", "out")
    assert "--model-path" in output


def test_training_online_without_data(work):
    assert "none" in refused(run, work, *train(work, "--online", "--data", "none"))
    given = jsonl(tiny.conversations(20))
    assert "none.jsonl" in refused(run, work, *train(work, "--online", "--data", given, "--test-data", "none.jsonl"))


@pytest.mark.parametrize("content", [None, "{", '{"gradient_clipping": 3.0}'], ids=["missing", "broken", "clash"])
def test_deepspeed_settings_that_cannot_be_used(work, content):
    if content is not None:
        written(content, "ds.json")
    command = train(work, "--features", work / "features", "--deepspeed-config", "ds.json")
    assert "ds.json" in refused(run_process, work, *command, log=True)


# benchmark, regenerate, settings files


def benchmark(work, *arguments):
    return ["benchmark", "--model-path", work / "target", "--draft", work / "draft", "--output", "out.json", *arguments]


def test_a_draft_that_is_none(work):
    assert "none" in refused(run, work, *benchmark(work, "--data", work / "data", "--draft", "none"))
    assert "target" in refused(run, work, *benchmark(work, "--data", work / "data", "--draft", work / "target"))


@fault(
    "a draft belongs to another target",
    "refused",
)
def test_a_draft_of_another_target(work):
    output = refused(run, work, *benchmark(work, "--data", work / "data"), "--model-path", work / "other")
    assert "target_fingerprint" in output


def test_a_draft_of_which_a_tensor_is_missing(work):
    shutil.copytree(work / "draft", "draft")
    content = load_file("draft/model.safetensors")
    del content["norm.weight"]
    save_file(content, "draft/model.safetensors")
    assert "norm.weight" in refused(run, work, *benchmark(work, "--data", work / "data", "--draft", "draft"))


@pytest.mark.parametrize(
    "flags",
    [
        "--steps 0",
        "--top-k 0",
        "--top-k 101",  # the draft knows 100 tokens
        "--draft-tokens 1",
        "--draft-tokens 9 --steps 7",  # a chain of 7 and the newest token
        "--draft-tokens 8 --steps 2 --top-k 2",  # 2 + 4 and the newest token
        "--batch-size 0",
        "--batch-size 257",
        "--batch-size 20 --top-k 4",  # 15 paths each
        "--batch-size 10 --sweep",
        "--sweep --temperature 1",
        "--sweep --num-prompts 0",
    ],
)
def test_trees_that_cannot_be(work, flags):
    output = refused(run, work, *benchmark(work, "--data", work / "data", *flags.split()))
    assert flags.split()[0] in output


def test_nothing_to_benchmark_on(work):
    assert "--data" in refused(run, work, *benchmark(work))


def test_benchmark_on_a_store_of_another_target(work):
    command = benchmark(work, "--features", work / "of_other", "--num-prompts", 0)
    assert "'target_fingerprint'" in refused(run_process, work, *command)


@pytest.mark.parametrize("content", [None, [], [{"conversations": [{"role": "assistant", "content": "a"}]}]])
def test_prompts_that_are_none(work, content):
    prompts = "none.jsonl" if content is None else jsonl(content)
    refused(run, work, "regenerate", "--prompts", prompts, "--model-path", work / "target", "--output", "out.jsonl")


@fault(
    "input and output are one file",
    "refused",
)
def test_prompts_are_not_written_over_by_the_answers(work):
    given = jsonl(tiny.conversations(2))
    few = ["--model-path", work / "target", "--engine", "hf", "--max-new-tokens", 1]
    assert "given.jsonl" in refused(run, work, "regenerate", "--prompts", given, "--output", "given.jsonl", *few)


@pytest.mark.parametrize("command", ["prepare-data", "prepare-hidden", "train", "benchmark", "regenerate"])
def test_a_settings_file_with_an_unknown_key(work, command):
    path = written("tp_sice: 2\n", "settings.yaml")
    required = {
        "prepare-data": prepare_data(work),
        "prepare-hidden": prepare_hidden(work),
        "train": train(work, "--features", work / "features"),
        "benchmark": benchmark(work, "--data", work / "data"),
        "regenerate": ["regenerate", "--prompts", "p", "--model-path", "t", "--output", "o"],
    }
    output = refused(run, work, *required[command], "--config", path)
    assert "'tp_sice'" in output
    assert str(path) in output


def test_a_settings_file_that_cannot_be_read(work):
    for content in (None, b"\xff\xfe\x00", b"[1, 2", b"- 1\n"):
        if content is not None:
            written(content, "settings.yaml")
        refused(run, work, *prepare_data(work), "--config", "settings.yaml")


def test_only_debug_shows_a_traceback(work):
    code, output = run(*prepare_data(work, "none.jsonl"), "--debug")
    assert code == 2
    assert "Traceback" in output
