"""`specforge doctor --gpu` on a CPU: its checks pass there, each notices what is wrong, and the table says so."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from specforge import cli, doctor, launch
from specforge.draft import unroll
from specforge.pipeline.gpu import attention, command, training, waits
from specforge.pipeline.gpu.made_up import CPU, Size, draft_config
from specforge.pipeline.gpu.results import Result, checked, within
from specforge.records import Ranks

SIZE = Size(config=draft_config(64, 128, 4, 2, 512, 256), lengths=(40, 1, 60, 13), turn=16)
FP32 = torch.float32


@pytest.fixture
def ranks():
    joined = launch.join(1)
    yield joined
    dist.destroy_process_group()


def test_all_that_a_cpu_can_check_passes(ranks, tmp_path):
    """With SGLang in a process of its own."""
    found = command.run_checks(ranks, tmp_path, None, SIZE, SIZE, (FP32,))
    assert [result for result in found if not result.passed] == []
    assert [result.what for result in found] == [
        "attention, fp32",
        "training step, plain, fp32",
        "training step, DeepSpeed, fp32",
        "states of sglang, fp32",
        "lossless decoding in sglang, fp32, chain of 3",
        "lossless decoding in sglang, fp32, 3 steps, top-k 4, 12 tokens",
    ]
    shown = command.as_table(found, ranks)
    assert shown.row_count == len(found)


def test_bf16_passes_too(ranks):
    assert attention.attention(CPU, torch.bfloat16, SIZE).passed
    assert training.training_step("plain", torch.bfloat16, ranks, SIZE).passed


def test_an_attention_that_sees_the_next_token_fails(monkeypatch):
    def with_one_key_more(q, k, v, own_k, own_v, rows, *rest):
        return attend(q, k, v, own_k, own_v, (rows + 1).clamp(max=len(k) - 1), *rest)

    attend = unroll.attend
    monkeypatch.setattr(unroll, "attend", with_one_key_more)
    assert attention.attention(CPU, FP32, SIZE).passed is False


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (1.01, False)])
def test_a_learning_rate_that_is_off_by_one_per_cent_fails(monkeypatch, ranks, factor, passed):
    def other(kind, step, dtype, ranks):
        monkeypatch.setitem(training.RATES, "lr", 1e-2 * factor)
        monkeypatch.setitem(training.RATES, "adam_lr", 1e-3 * factor)
        made = make(kind, step, dtype, ranks)
        monkeypatch.undo()
        return made

    make, reference = training.make_optimizer, training._reference_step(SIZE, *training.made_up(SIZE))
    monkeypatch.setattr(training, "make_optimizer", other)
    monkeypatch.setattr(training, "_reference_step", lambda *_: reference)
    assert training.training_step("plain", FP32, ranks, SIZE).passed is passed


@pytest.mark.parametrize(("share", "passed"), [(0.7, False), (1.0, True), (1.2, False)])
@pytest.mark.parametrize("kind", ["none", "plain"])
def test_memory_is_compared_with_the_plan(ranks, kind, share, passed):
    planned = training.planned_bytes(SIZE, 1)
    left_out = {training.ROWS} | (training.NOT_THERE if kind == "none" else set())
    assert left_out - {"memory, optimizer step"} <= planned.keys()  # that line is there where it is not 0
    wanted = sum(size for name, size in planned.items() if name not in left_out)

    def peak(make):
        make()()
        return share * wanted

    assert training.memory(kind, ranks, SIZE, peak).passed is passed


def waiting(file: str, times: int):
    """A function whose code says that it lies in `file`, and that waits for the device so often."""
    code = "def waiting():\n" + f"    warn({waits.SYNCHRONISING!r})\n" * times
    names: dict = {"warn": warnings.warn}
    exec(compile(code, file, "exec"), names)
    return names["waiting"]


@pytest.mark.parametrize(
    ("file", "times", "passed"),
    [
        ("/x/specforge/train/loop.py", 1, True),
        ("/x/specforge/train/loop.py", 2, False),
        ("/x/specforge/draft/step.py", 1, False),
        ("/x/sglang/srt/managers/batch.py", 3, True),  # counted, not judged
    ],
)
def test_waits_for_the_device_are_counted_by_place(file, times, passed):
    modes = []
    places = waits.host_waits(waiting(file, times), modes.append)
    assert modes == ["warn", "default"]
    assert len(places) == times
    result = waits.waits("a step", places, {"specforge/train/loop.py waiting": 1})
    assert result.passed is passed
    assert passed or f"{times} in {file.removeprefix('/x/')} waiting" in result.found


def test_nan_is_a_failure_and_a_missing_package_is_not(capsys):
    assert not within("a", {"loss": float("nan")}, {"loss": 1.0}).passed

    def missing():
        import no_such_package  # noqa: F401

    def broken():
        raise ValueError

    assert [result.passed for result in checked("b", missing)] == [None]
    (result,) = checked("c", broken)
    assert (result.passed, result.found) == (False, "ValueError: ValueError")
    assert "Traceback" in capsys.readouterr().err


def test_an_engine_that_ends_or_hangs_is_a_failed_check():
    (ended,) = command.in_process("sglang", os._exit, (3,))
    assert (ended.passed, ended.found) == (False, "its process ended with exit code 3")
    (hung,) = command.in_process("sglang", asleep, (), timeout=5)
    assert (hung.passed, hung.found) == (False, "no results in 5 s")


def asleep():
    import time

    time.sleep(60)


def test_the_worst_of_all_ranks_is_shown(monkeypatch):
    good = Result(what="a", found="1", passed=True)
    bad = replace(good, found="9", passed=False)

    def gather(every, mine):
        every[:] = [[good], [bad]]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    (found,) = command.of_all_ranks([good], Ranks(rank=0, world=2))
    assert (found.found, found.passed) == ("rank 1: 9", False)


def test_without_a_gpu_it_says_so():
    found = CliRunner().invoke(cli.app, ["doctor", "--gpu"])
    assert found.exit_code == 2
    assert "torch sees none here" in found.output


@pytest.mark.parametrize("there", [True, False])
def test_nvcc_is_looked_for_where_sglang_does(monkeypatch, tmp_path, there):
    """On a machine with a GPU; without nvcc it is not ready."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    if there:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").touch()
    (found,) = [finding for finding in doctor.findings() if finding.what == "CUDA compiler"]
    assert found.fatal is not there
    assert bool(found.fix) is not there
