"""The historical commands, verbatim but for names and sizes, on a tiny target."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from specforge.features.store import Store
from tests import tiny
from tests.e2e.test_commands import FP32, ROOT, run

SCRIPTS = ROOT / "scripts"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("historical")
    tiny.make_target(folder / "target")
    tiny.write_jsonl(folder / "rows.jsonl", tiny.conversations(40))
    template = tiny.tokenizer()
    text = [
        {"id": row["id"], "text": template.apply_chat_template(row["conversations"], tokenize=False)}
        for row in tiny.conversations(40)
    ]
    tiny.write_jsonl(folder / "text.jsonl", text)
    (folder / "ds_config.json").write_text(json.dumps(FP32))
    return folder


def test_prepare_data(work):
    run([sys.executable, f"{SCRIPTS}/prepare_data.py", "--dataset", "rows.jsonl"], work)
    lines = (work / "cache/dataset/rows/train.jsonl").read_text().splitlines()
    assert "conversations" in json.loads(lines[0])


@pytest.mark.parametrize("name", ["ultrachat", "sharegpt"])
def test_prepare_data_by_hub_name_says_what_to_do(work, name):
    said = run([sys.executable, f"{SCRIPTS}/prepare_data.py", "--dataset", name], work, code=2)
    assert "fix:" in said


@pytest.mark.proof
def test_prepare_hidden_states(work):
    flags = (
        "--model-path target --enable-aux-hidden-states --data-path rows.jsonl --chat-template llama3 "
        "--max-length 256 --tp-size 2 --batch-size 4 --mem-frac=0.75 --num-samples 10 --output-path hidden"
    )
    run([*TORCHRUN, "--standalone", "--nproc_per_node=2", f"{SCRIPTS}/prepare_hidden_states.py", *flags.split()], work)
    assert len(Store(work / "hidden" / "train")) + len(Store(work / "hidden" / "test")) == 10


@pytest.mark.proof
def test_prepare_hidden_states_started_plainly_starts_its_own_ranks(work):
    flags = (
        "--model-path target --data-path rows.jsonl --max-length 256 --tp-size 2 --num-samples 4 --output-path plain"
    )
    run([sys.executable, f"{SCRIPTS}/prepare_hidden_states.py", *flags.split(), "--output-path", "plain"], work)
    assert len(Store(work / "plain" / "train")) == 3


def test_train_eagle3_online(work):
    flags = (
        "--target-model-path target --is-preformatted --chat-template qwen --train-data-path text.jsonl "
        "--output-dir online --num-epochs 1 --max-length 256 --draft-vocab-size 200"
    )
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]
    run([*launcher, f"{SCRIPTS}/train_eagle3_online.py", *flags.split()], work)
    assert (work / "online/best/model.safetensors").is_file()


@pytest.mark.proof
def test_train_eagle3_under_deepspeed(work):
    flags = (
        "--deepspeed_config ds_config.json --basepath target --cache_dir cache_dir --savedir saved "
        "--trainpath rows.jsonl --testpath test.jsonl --epochs 1 --max_length 256 --draft_vocab_size 200"
    )
    tiny.write_jsonl(work / "test.jsonl", tiny.conversations(4, seed=9))
    deepspeed = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    assert deepspeed
    run([sys.executable, deepspeed, f"{SCRIPTS}/train_eagle3.py", *flags.split()], work)
    assert (work / "saved/best/model.safetensors").is_file()


@pytest.mark.proof
def test_example_usage(work):
    assert "engine" in run([sys.executable, f"{SCRIPTS}/example_usage.py", "--example", "check"], work)
    script = [sys.executable, f"{SCRIPTS}/example_usage.py", "--example", "download"]
    assert "target" in run([*script, "--model-path", "target"], work)
