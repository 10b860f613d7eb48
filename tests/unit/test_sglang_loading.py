"""What SGLang is told when it loads a target, in which order, and when the engine's self-check fails. No model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from specforge.errors import EngineError
from specforge.records import Ranks
from specforge.target.sglang import engine as sglang
from specforge.target.sglang import names as sgl
from specforge.target.sglang.engine import SglangEngine


@pytest.fixture
def load(monkeypatch):
    """(the keyword arguments of ServerArgs, the calls in order) of a load on this device in this dtype."""

    def make(device: str, dtype: torch.dtype):
        calls, given = [], {}

        def recorded(name):
            return lambda *args, **kwargs: calls.append(name)

        monkeypatch.setattr(sgl, "ServerArgs", lambda **arguments: given.update(arguments) or SimpleNamespace())
        monkeypatch.setattr(sgl.PortArgs, "init_new", lambda args: None)

        def load_model(*args):
            calls.append("load")
            torch.set_num_threads(1)  # as SGLang's does on a GPU
            return SimpleNamespace(torch_runner=None), None

        monkeypatch.setattr(sgl, "one_batch", SimpleNamespace(load_model=load_model))
        monkeypatch.setattr(sgl, "spawn_world_rank", lambda *args, **kwargs: 0)
        for name in ("publish", *(name for name in sgl.__all__ if name.startswith("initialize_"))):
            monkeypatch.setattr(sgl, name, recorded(name))
        monkeypatch.setattr(torch.compiler, "set_stance", recorded("eager"))
        sglang._load_runner(SimpleNamespace(path="t"), Ranks(device=torch.device(device)), dtype, 512, 0.5, False)
        return given, calls

    threads = torch.get_num_threads()
    yield make
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        ("cpu", torch.float32, "torch_native"),
        ("cuda", torch.bfloat16, None),  # SGLang's own choice
        ("cuda", torch.float32, "triton"),  # fa3, its choice on Hopper, takes 16 and 8 bits only
    ],
)
def test_the_attention_takes_the_dtype_and_nothing_is_fused_or_forgotten(load, device, dtype, backend):
    torch.set_num_threads(3)
    given, calls = load(device, dtype)
    assert torch.get_num_threads() == 3
    assert given["attention_backend"] == backend
    assert given["enforce_disable_flashinfer_allreduce_fusion"]
    assert ("eager" in calls) == (device == "cpu")
    called = [call for call in calls if call != "eager"]
    assert (called[0], called[-1]) == ("publish", "load")
    assert set(called[1:-1]) == {f"initialize_{name}_config" for name in ("moe", "fp8_gemm", "fp4_gemm", "bf16_gemm")}


@pytest.mark.parametrize(
    ("dtype", "gap", "sound"),
    [
        (torch.bfloat16, 0.05, True),  # logits of 10: a step is 0.08
        (torch.bfloat16, 0.2, False),
        (torch.float32, 0.05, False),
        (torch.float32, 0.0, True),
    ],
)
def test_the_self_check_forgives_a_near_tie_and_no_more(dtype, gap, sound):
    logits_1V = torch.zeros(1, 50)
    logits_1V[0, 7], logits_1V[0, 9] = 10.0, 10.0 - gap
    seen = SimpleNamespace(top1=torch.tensor([9]), aux=torch.ones(2), last=torch.ones(2), rows=None)
    engine = SimpleNamespace(
        info=SimpleNamespace(vocab_size=50, path="t"),
        dtype=dtype,
        _hook=seen,
        _ranks=Ranks(),
        _prefill=lambda sequences: logits_1V,
    )
    if sound:
        SglangEngine.self_check(engine)
    else:
        with pytest.raises(EngineError, match="not the token"):
            SglangEngine.self_check(engine)
