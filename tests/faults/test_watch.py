"""A rank that stops, hangs or fails while the others wait for it, in each command that starts several: the run ends in
time, the rank is named once. Real processes on two ranks, real SGLang; gloo."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from specforge.features.store import Store
from tests import tiny
from tests.faults.page import fault
from tests.faults.test_engine_faults import children, environment_of

ROOT = Path(__file__).parents[2]
FAULTY = ROOT / "tests" / "faults" / "faulty_cli.py"
TIMEOUT_S = 5
START_S = 200  # for three processes to import SGLang on two cores that others use too
ENDING_S = 10  # to end the processes, and for a machine that others use too
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A target, data with 60 conversations to train on, and their features."""
    folder = tmp_path_factory.mktemp("work")
    tiny.make_target(folder / "target")
    tiny.write_token_rows(folder / "data", train=60, test=8)
    tiny.write_jsonl(folder / "prompts.jsonl", tiny.conversations(8))
    given = ["prepare-hidden", "--model-path", "target", "--data", "data", "--output", "feat", "--engine", "hf"]
    with started(["-m", "specforge.cli", *given], folder) as process:
        said, _ = process.communicate(timeout=START_S)
    assert process.returncode == 0, said
    return folder


def train(output: str, *arguments: object) -> list[object]:
    """Epochs without end: what is under test ends the run."""
    given = ["train", "--model-path", "target", "--output", output, "--rank-timeout", TIMEOUT_S, "--epochs", 10_000]
    given += ["--deepspeed-config", ROOT / "ds_config.json", "--draft-vocab-size", 200, "--max-length", 64]
    return [*given, "--row-tokens", 64, "--batch-size", 4, "--steps", 2, "--tracker", "none", *arguments]


def regenerate(output: str, *arguments: object) -> list[object]:
    """A random target ends no turn: no conversation is finished for a long time."""
    given = ["regenerate", "--model-path", "target", "--prompts", "prompts.jsonl", "--output", output, "--tp-size", 2]
    return [*given, "--rank-timeout", TIMEOUT_S, "--max-new-tokens", 950, "--tokens-per-batch", 1024, *arguments]


@contextmanager
def started(command: list[object], folder: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A broken watch leaves no process behind."""
    own = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, env=own, **pipes)
    try:
        yield process
    finally:
        for pid in [*children(process.pid), process.pid] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def stopped(process: subprocess.Popen, rank: int, ending_s: int = ENDING_S) -> tuple[str, int]:
    """What is said, and the exit code, after the rank was stopped; in time."""
    (victim,) = [pid for pid in children(process.pid) if f"\0RANK={rank}\0" in environment_of(pid)]
    began = time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    said, _ = process.communicate(timeout=TIMEOUT_S + ending_s)
    assert time.monotonic() - began < TIMEOUT_S + ending_s
    return said, process.returncode


def named_once(said: str, rank: int) -> None:
    assert said.count("error ") == 1, said
    assert f"error rank {rank} did not answer for 4 s: stopped, or dead" in said
    assert "--rank-timeout 5" in said


@pytest.mark.parametrize(
    ("source", "rank"),
    [
        ("--online --data data --tp-size 2", 1),
        pytest.param("--online --data data --tp-size 2", 0, marks=pytest.mark.proof),
        pytest.param("--online --data data --tp-size 2 --features kept", 1, marks=pytest.mark.proof),
    ],
)
@fault(
    "a rank of online training stops answering",
    "one message names the rank after `--rank-timeout`; all ranks end, code 2; the run can go on",
)
def test_a_stopped_rank_of_online_training_is_named(work, source, rank):
    output = f"stopped{rank}{len(source)}"
    with started(["-m", "specforge.cli", *train(output, *source.split())], work) as process:
        wait_for(process, lambda: lines(work / output / "metrics.jsonl") > 20)
        said, code = stopped(process, rank)
    named_once(said, rank)
    assert code == 2
    if "kept" in source:  # what was committed can be read
        assert len(Store(work / "kept" / "train", partial=True)) > 0


@pytest.mark.proof
@pytest.mark.parametrize("rank", [0, 1])
@fault(
    "the same under torchrun",
    "the same",
)
def test_a_stopped_rank_of_training_from_a_store_is_named(work, rank):
    """Under torchrun, whose exit code and report are its own; it kills a stopped rank after 30 seconds."""
    output = f"offline{rank}"
    given = [*TORCHRUN, "-m", "specforge.cli", *train(output, "--features", "feat")]
    with started(given, work) as process:
        wait_for(process, lambda: lines(work / output / "metrics.jsonl") > 20)
        said, _ = stopped(process, rank, ENDING_S + 30)
    ours = said[: said.index("torch.distributed.elastic")] if "torch.distributed.elastic" in said else said
    assert f"error rank {rank} did not answer for 4 s: stopped, or dead" in ours
    assert re.search(r"exitcode *: 2\b", said)


@fault(
    "a rank of `regenerate` stops answering",
    "the same; answers that take long are not taken for it",
)
def test_a_stopped_rank_of_regenerate_is_named_and_long_answers_are_no_hang(work):
    with started(["-m", "specforge.cli", *regenerate("stopped.jsonl")], work) as process:
        wait_for(process, (work / "stopped.jsonl.progress.jsonl").exists)
        time.sleep(1.5 * TIMEOUT_S)
        assert process.poll() is None, process.communicate()[0]
        assert lines(work / "stopped.jsonl.progress.jsonl") <= 1  # no answer yet, but its header
        said, code = stopped(process, 1)
    named_once(said, 1)
    assert code == 2


@pytest.mark.proof
@pytest.mark.parametrize(
    ("command", "fault", "message"),
    [
        (
            train("memory", "--online", "--data", "data", "--tp-size", 2),
            "no_memory in_the_step",
            r"error the draft's step does not fit into memory: CUDA out of memory",
        ),
        (
            train("asleep", "--online", "--data", "data", "--tp-size", 2),
            "asleep in_the_step",
            r"error rank 1 made no progress for 4 s \(rank 1 at \S+faulty_cli.py:\d+ in asleep\)",
        ),
        (
            regenerate("memory.jsonl"),
            "no_memory in_the_target",
            r"error \d answers at once do not fit into memory: CUDA out of memory",
        ),
    ],
)
@fault(
    "a rank fails, or hangs in one place, alone",
    "one message names the rank and the place",
)
def test_a_rank_that_fails_or_hangs_alone_is_named(work, command, fault, message):
    with started([FAULTY, *command], work, FAULT=fault) as process:
        said, _ = process.communicate(timeout=START_S)
    assert process.returncode == 2, said
    assert said.count("error ") == 1, said
    assert re.search(message, said), said
    assert "made no progress" in said or "  rank:  1 of 2" in said
    assert "Traceback" not in said


@pytest.mark.proof
@pytest.mark.parametrize(
    "command",
    [
        ["check", "draft", "--model-path", "target", "--data", "data", "--tp-size", 2],
        ["benchmark", "--draft", "draft", "--model-path", "target", "--data", "data", "--tp-size", 2],
    ],
)
@fault(
    "a rank of `check` or `benchmark` hangs",
    "the same",
)
def test_the_commands_that_measure_a_draft_are_watched_too(work, command):
    if not (work / "draft").exists():
        with started(["-m", "specforge.cli", *train("made", "--features", "feat", "--epochs", 1)], work) as process:
            assert process.wait(60) == 0
        (work / "made" / "best").rename(work / "draft")
    with started([FAULTY, *command, "--rank-timeout", TIMEOUT_S], work, FAULT="asleep in_the_target") as process:
        said, _ = process.communicate(timeout=START_S)
    assert process.returncode == 2, said
    assert re.search(r"error rank 1 made no progress for 4 s \(rank 1 at \S+ in asleep\)", said), said
