"""Faults of the engine and of ranks during a capture: memory, NaN states, ranks that hang or die. Real processes, real
allocations that fail, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from specforge.config import EngineSettings
from specforge.errors import EngineError
from specforge.features import aside
from specforge.features.sources import LiveSource
from specforge.features.store import Store
from specforge.records import Example, Ranks
from specforge.target import engine as engines
from specforge.target import weights
from tests import tiny, warm
from tests.faults.page import fault

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("engine_worker.py")
# One thread: the passes here are tiny, and threads that wait for one another crawl where a test shares the machine.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
POISON = 230  # a token whose embedding is NaN
TIMEOUT_S = 6


def worker(task: str, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess:
    command = [sys.executable, str(WORKER), task, *map(str, arguments)]
    return warm.run(command, ROOT, ENVIRONMENT, timeout=200, ranks=ranks)


def result(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def long_target(tmp_path_factory) -> Path:
    folder = tiny.make_target(tmp_path_factory.mktemp("long") / "target")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    return folder


@fault(
    "a pass of the target does not fit into memory",
    "it is halved; a conversation that does not fit alone is set aside and listed",
)
def test_a_pass_without_memory_is_halved_down_to_one_sample_which_is_set_aside(long_target):
    """Sample 0 is 17 times as long as the others. How far a pass is halved depends on the allocator."""
    found = result(worker("memory_that_runs_out", long_target))
    assert found["set_aside"] == [0]
    assert found["captured"] == list(range(1, 50))
    assert 3 < len(found["passes"]) < 50


@pytest.mark.proof
@fault(
    "the same on one rank of several",
    "all ranks halve together",
)
def test_all_ranks_of_a_replica_halve_where_one_lacks_memory(long_target):
    found = result(worker("one_rank_without_memory", long_target, ranks=2))
    assert found["set_aside"] == [0]  # 8,000 tokens alone
    assert found["captured"] == list(range(1, 50))
    assert max(found["passes"]) == 6  # of 480 tokens: 7 are over 3,000, and 50 halve to 25, 13, 7, 4 ..


# NaN


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> Path:
    """A folder with a target in which one token's embedding is NaN."""
    folder = tmp_path_factory.mktemp("poisoned")
    weights = tiny.make_target(folder / "target") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    return folder


def data(folder: Path, name: str, count: int, bad: set[int], held_out: int | None = None) -> Path:
    """`count` records of 12 tokens in each split; the training records `bad` hold the poisonous token."""
    output = folder / name
    output.mkdir()
    for split in ("train", "test"):
        rows = []
        for number in range(count if split == "train" or held_out is None else held_out):
            ids = [3 + (7 * number + at) % 200 for at in range(12)]
            if split == "train" and number in bad:
                ids[5] = POISON
            rows.append({"id": str(number), "input_ids": ids, "loss_mask": [0] * 4 + [1] * 8})
        tiny.write_jsonl(output / f"{split}.jsonl", rows)
    return output


def capture(folder: Path, data: Path, output: str, *arguments: object) -> list[str]:
    fixed = ["--model-path", "target", "--data", str(data), "--output", output, "--tokens-per-batch", "512"]
    return [sys.executable, "-m", "specforge.cli", "prepare-hidden", *fixed, *map(str, arguments)]


def run(command: list[str], folder: Path, code: int) -> str:
    done = warm.run(command, folder, ENVIRONMENT, timeout=200)
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


@pytest.mark.proof
@fault(
    "the target's states of a conversation are not finite",
    "the conversation is set aside and listed",
)
def test_a_record_with_nan_states_is_set_aside_and_spoils_no_other(poisoned):
    """1 of 1,001 is within 0.1 %. It shares its pass of the target with 41 others."""
    rows = data(poisoned, "one", 1001, {700})
    said = run(capture(poisoned, rows, "one_out"), poisoned, 0)
    assert "train: 1 records set aside (states are not finite)" in said
    assert aside.reasons(poisoned / "one_out" / "train") == {700: "states are not finite"}
    store = Store(poisoned / "one_out" / "train")
    assert len(store) == 1000
    assert all(store.record(at).aux.isfinite().all() for at in range(690, 710))
    before = written(store.folder)
    said = run(capture(poisoned, rows, "one_out", "--engine", "sglang"), poisoned, 0)
    assert "train: going on, 24 of 24 batches are in the store" in said  # it is not missing
    assert written(store.folder) == before


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.proof
@fault(
    "states of more than one conversation in a thousand are not finite",
    "the capture ends with one message, code 2",
)
def test_more_than_one_in_a_thousand_ends_the_capture_and_says_so_once(poisoned):
    """Two replicas: whichever of them meets the second bad record tells of it."""
    rows = data(poisoned, "two", 101, {17, 60})
    command = capture(poisoned, rows, "two_out", "--engine", "hf", "--dp-size", 2)
    said = run(command, poisoned, 2)
    assert re.search(r"not finite for [12] of 101 records", said)
    assert said.count("error") == 1
    assert "set-aside.jsonl" in said
    assert "Traceback" not in said
    run(command, poisoned, 2)  # and a resume does not slip through


def train(data: Path, output: str, *arguments: object) -> list[str]:
    fixed = ["--online", "--engine", "hf", "--model-path", "target", "--data", str(data), "--output", output]
    fixed += ["--deepspeed-config", str(ROOT / "ds_config.json"), "--draft-vocab-size", "100", "--steps", "1"]
    fixed += ["--epochs", "2", "--row-tokens", "512", "--batch-size", "2", "--tracker", "none"]
    return [sys.executable, "-m", "specforge.cli", "train", *fixed, *map(str, arguments)]


@pytest.mark.parametrize("store", [False, True])
@fault(
    "the same while training online",
    "the conversation is set aside, and never trained on",
)
def test_online_training_sets_a_record_with_nan_states_aside(poisoned, store):
    """It is never trained on, and where there is a store it is not captured again."""
    rows = data(poisoned, f"online{store}", 1001, {700}, held_out=8)
    output, kept = poisoned / f"online_out{store}", poisoned / f"kept{store}"
    said = run(train(rows, output.name, *(["--features", kept.name] if store else [])), poisoned, 0)
    folder = (kept if store else output / "set-aside") / "train"
    assert said.count("train: 1 records set aside (states are not finite)") == 1
    assert aside.reasons(folder) == {700: "states are not finite"}
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    assert all(step["applied"] and step["loss"] is not None for step in steps)
    epochs = [[step for step in steps if step["epoch"] == epoch] for epoch in (0, 1)]
    assert [sum(step["tokens"] for step in epoch) for epoch in epochs] == [12_000, 12_000]
    again = [step["time_share"]["target"] > 0 for step in epochs[1]]
    assert not any(again) if store else all(again)
    if store:
        whole = Store(folder)
        assert len(whole) == 1000
        assert all(whole.record(at).aux.isfinite().all() for at in range(690, 710))


@pytest.mark.parametrize("store", [False, True])
@fault(
    "the same, more than one in a thousand",
    "training ends with one message, code 2",
)
def test_more_than_one_in_a_thousand_ends_online_training_and_says_so_once(poisoned, store):
    rows = data(poisoned, f"bad{store}", 101, {17, 60}, held_out=8)
    command = train(rows, f"bad_out{store}", *(["--features", f"bad_kept{store}"] if store else []))
    for _ in range(2):  # and to start again does not slip through
        said = run(command, poisoned, 2)
        assert re.search(r"not finite for [12] of 101 records", said)
        assert said.count("error") == 1
        assert "set-aside.jsonl" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("engine", ["hf", "sglang"])
@fault("a row of the target's output head is NaN", "refused when the target is loaded")
def test_a_head_that_is_not_finite_is_named_by_every_command_that_loads_the_target(poisoned, engine):
    """Its logits have a NaN everywhere: greedy text would be one token, every loss 0, and all of it "checked"."""
    broken = poisoned / "broken"
    if not broken.exists():
        weights_file = tiny.make_target(broken) / "model.safetensors"
        tensors = load_file(weights_file)
        tensors["lm_head.weight"][5] = float("nan")
        save_file(tensors, weights_file, metadata={"format": "pt"})
    tiny.write_jsonl(poisoned / "prompts.jsonl", tiny.conversations(8))
    cli, given = [sys.executable, "-m", "specforge.cli"], ["--model-path", "broken", "--engine", engine]
    for command in (
        [*cli, "regenerate", *given, "--prompts", "prompts.jsonl", "--output", f"{engine}.jsonl"],
        [*train(poisoned / "prompts.jsonl", f"run-{engine}"), *given],
    ):
        said = run(command, poisoned, 2)
        assert "its output head is damaged" in said
        assert "fetch or convert the target again" in said


@fault(
    "the same while measuring",
    "refused: its figures would be of other text",
)
def test_a_benchmark_of_states_that_are_not_finite_is_refused(poisoned):
    """Its figures would be of other text than what was asked for."""
    examples = [
        Example(sample_id=at, token_ids=np.full(12, token, np.int32), loss_mask=np.ones(12, dtype=bool))
        for at, token in enumerate((5, POISON))
    ]
    info = weights.describe(str(poisoned / "target"))
    engine = engines.load(EngineSettings(engine="hf"), info, Ranks())
    with pytest.raises(EngineError, match="not finite") as refused:
        list(LiveSource(engine, examples, tp_rank=0).batches([[[0]], [[1]]]))
    assert "sample 1 " in refused.value.where


# ranks that hang or die


def test_a_rank_that_hangs_is_named_and_stacks_are_written(tmp_path):
    began = time.monotonic()
    done = worker("a_rank_that_hangs", tmp_path, TIMEOUT_S, ranks=2)
    assert done.returncode != 0
    said = done.stdout
    assert re.search(r"rank 1 made no progress for 5 s \(rank 1 at \S+engine_worker.py:\d+ in asleep\)", said)
    assert "in asleep" in (tmp_path / "rank1.log").read_text()
    assert "in barrier" in (tmp_path / "rank0.log").read_text()
    assert time.monotonic() - began < TIMEOUT_S + 30  # with start and end of the processes


@pytest.mark.parametrize(
    ("engine", "name", "ranks"),
    [
        ("sglang", "model.embed_tokens.weight", 1),
        ("sglang", "model.embed_tokens.weight", 2),
        ("sglang", "lm_head.weight", 2),
        ("hf", "model.embed_tokens.weight", 1),
        ("hf", "lm_head.weight", 1),
    ],
)
@fault(
    "the engine runs with another embedding or head than the files hold, if in one row of 64",
    "refused when the target is loaded",
)
def test_an_embedding_or_a_head_that_is_not_the_engines_is_found(tmp_path, engine, name, ranks):
    target = tiny.make_target(tmp_path / "target")
    said = result(worker("another_head", target, engine, name, ranks, ranks=ranks))["said"]
    part = "embedding" if "embed" in name else "output head"
    assert f"the engine's {part} is not the one in the target's files" in said


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def with_signal(command: list[str], folder: Path, log: Path, which: signal.Signals) -> tuple[str, int]:
    """Sends the signal to rank 1 as soon as rank 0 has begun to capture; returns what was said and the exit code."""
    process = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 100
    while not (log / "train" / "manifest.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (victim,) = [pid for pid in children(process.pid) if "\0RANK=1\0" in environment_of(pid)]
    os.kill(victim, which)
    said, _ = process.communicate(timeout=TIMEOUT_S + 10)
    return said, process.returncode


@pytest.mark.parametrize(
    ("which", "message"),
    [
        pytest.param(signal.SIGSTOP, "rank 1 did not answer", marks=pytest.mark.proof),
        (signal.SIGKILL, "rank 1 was ended by SIGKILL (out of memory?)"),
    ],
)
@fault(
    "a rank of `prepare-hidden` is stopped or killed",
    "one message names the rank, code 2; the same command goes on",
)
def test_a_rank_that_stops_or_dies_ends_all_and_is_named(poisoned, which, message):
    rows = data(poisoned, f"rows{int(which)}", 400, set())
    command = capture(poisoned, rows, f"{rows}_out", "--engine", "hf", "--dp-size", 2, "--rank-timeout", TIMEOUT_S)
    said, code = with_signal(command, poisoned, Path(f"{rows}_out"), which)
    assert message in said
    assert said.count("error ") == 1
    assert code == 2
    said = run(capture(poisoned, rows, f"{rows}_out", "--engine", "hf"), poisoned, 0)
    assert len(Store(Path(f"{rows}_out") / "train")) == 400
