"""The dtype that a machine computes fast, and who follows it."""

from __future__ import annotations

import pytest
import torch

from specforge import doctor, hardware
from specforge.config import EngineSettings, PrepareHiddenSettings, TrainSettings
from specforge.files import seal
from specforge.pipeline import shared, training
from specforge.records import Ranks
from specforge.target import engine as engines
from specforge.target import weights
from tests import tiny

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[True, False], ids=["bf16", "no bf16"])
def fast(request, monkeypatch) -> bool:
    """Whether the CPU multiplies bf16 in hardware; fp16 it never does."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: request.param)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    return request.param


@pytest.fixture
def info(tmp_path):
    return weights.describe(str(tiny.make_target(tmp_path / "target", "llama", BF16)))


def test_half_precision_is_left_where_the_cpu_has_no_instructions_for_it(fast):
    assert hardware.compute_dtype(BF16, CPU) is (BF16 if fast else FP32)
    assert hardware.compute_dtype(FP16, CPU) is FP32
    assert hardware.compute_dtype(FP32, CPU) is FP32
    assert hardware.compute_dtype(BF16, GPU) is BF16
    assert ("no bfloat16 instructions" in hardware.described(FP32, BF16, CPU)) is not fast
    assert hardware.described(BF16, BF16, CPU) == "bfloat16"  # asked for
    assert hardware.described(FP32, BF16, GPU) == "float32"


def test_auto_follows_the_cpu_and_an_explicit_dtype_is_obeyed(fast, info):
    assert engines.dtype_of(EngineSettings(), info) is (BF16 if fast else FP32)
    assert engines.dtype_of(EngineSettings(dtype="bfloat16"), info) is BF16
    assert engines.dtype_of(EngineSettings(dtype="float32"), info) is FP32
    assert shared.drafting_dtype(info, None, Ranks()) is (BF16 if fast else FP32)


def test_the_store_names_the_dtype_and_does_not_grow(fast, info, monkeypatch):
    class Tokenizer:
        fingerprint = template_fingerprint = "one"

    def manifest(**given):
        settings = PrepareHiddenSettings(model_path=info.path, **given)
        return shared.manifest_of(settings, info, (1, 3, 4), Tokenizer(), [])

    assert (manifest().dtype, manifest().codec) == ("bfloat16" if fast else "float32", "bf16")
    assert (manifest(dtype="float32").dtype, manifest(dtype="float32").codec) == ("float32", "fp32")


def test_training_follows_the_cpu_and_a_resumed_run_keeps_its_dtype(fast, info, tmp_path):
    settings = TrainSettings(output=tmp_path, lr=1e-3)
    assert training._recipe(settings, 10_000, info, Ranks())[1]["bf16"] == {"enabled": fast}
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    for before in ("float32", "bfloat16"):
        identity = {"dtype": before, "row_tokens": 512, "batch_size": 1, "adam_lr": 1e-3, "warmup_share": 0.1}
        (folder / "state.json").write_text(
            seal({"state": {}, "identity": identity, "files": {"optimizer.safetensors": ""}})
        )
        assert training._recipe(settings, 10_000, info, Ranks())[1]["bf16"] == {"enabled": before == "bfloat16"}


def test_doctor_says_it(fast):
    (found,) = [finding for finding in doctor.findings() if finding.what == "compute dtype"]
    assert found.state == ("bfloat16" if fast else "float32 (this CPU has no bfloat16 instructions)")
    assert not found.fatal
