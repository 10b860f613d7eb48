"""What SGLang is told when it loads a target, in which order, and when the engine's self-check fails. No model."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest
import torch

from specforge.config import EngineSettings
from specforge.errors import EngineError
from specforge.records import MAX_EXAMPLES, Prompt, Ranks, Sampling
from specforge.target import engine as engines
from specforge.target.sglang import engine as sglang
from specforge.target.sglang import names as sgl
from specforge.target.sglang.engine import SglangEngine


@pytest.fixture
def load(monkeypatch):
    """(the keyword arguments of ServerArgs, the calls in order) of a load on this device in this dtype."""

    def make(device: str, dtype: torch.dtype, longest: int | None = None, whole_pool: bool = False):
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
        info = SimpleNamespace(path="t", config={"max_position_embeddings": longest})
        sglang._load_runner(info, Ranks(device=torch.device(device)), dtype, 512, 0.5, False, whole_pool)
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


@pytest.mark.parametrize(("longest", "given"), [(10_000_000, 512), (512, None), (256, None), (None, None)])
def test_the_table_of_places_is_as_long_as_a_batch(load, longest, given):
    """SGLang refuses a context that is longer than the target's own."""
    assert load("cuda", torch.bfloat16, longest)[0]["context_length"] == given


def test_answers_take_the_memory_that_is_there(load):
    assert load("cuda", torch.bfloat16)[0]["max_total_tokens"] == 512 + MAX_EXAMPLES
    assert load("cuda", torch.bfloat16, whole_pool=True)[0]["max_total_tokens"] is None


def prompts(*lengths: int) -> deque[Prompt]:
    return deque(Prompt(key=at, token_ids=(5,) * n, seed=at) for at, n in enumerate(lengths))


@pytest.mark.parametrize(
    ("pool", "lengths", "joining"),
    [
        (10_000, (300, 200, 12, 1), 3),  # one pass takes 512 tokens
        (10_000, (300, 213), 1),
        (699, (300, 200), 1),  # with 100 of an answer each
        (10_000, (1,) * 9, 8),  # at once
    ],
)
def test_prompts_join_where_a_pass_and_the_pool_have_room(pool, lengths, joining):
    engine = SimpleNamespace(_pool=pool, tokens_per_batch=512, device=torch.device("cpu"))
    waiting = prompts(*lengths)
    found = SglangEngine._admit(engine, waiting, [], Sampling(max_new_tokens=100, stop_ids=(1,)), at_once=8)
    assert len(found) == joining
    assert len(waiting) == len(lengths) - joining


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("Not enough memory. Please try to increase --mem-fraction-static.", "raise --mem-frac"),
        ("CUDA out of memory. Tried to allocate 2 GiB", "lower --mem-frac"),
        ("no such file", "see specforge.log"),
    ],
)
def test_a_failed_load_is_told_what_helps(monkeypatch, message, advice):
    def fail(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(sglang, "_load_runner", fail)
    info = SimpleNamespace(path="t", config={}, num_layers=8, dtype=torch.float32)
    with pytest.raises(EngineError) as failed:
        engines.load(EngineSettings(engine="sglang"), info, Ranks())
    assert failed.value.fix.startswith(advice)


def test_a_cache_in_pages_is_refused_where_paths_are_kept(monkeypatch):
    monkeypatch.setattr(sgl, "get_schedule", lambda: SimpleNamespace(page_size=64))
    with pytest.raises(EngineError, match="pages of 64"):
        SglangEngine.session(SimpleNamespace(info=SimpleNamespace(path="t")))


@pytest.mark.parametrize(
    ("device", "room", "lengths"), [("cpu", 8192, [16]), ("cuda", 8192, [16, 2049]), ("cuda", 1024, [16, 1024])]
)
def test_a_gpu_is_checked_with_a_long_pass_too(device, room, lengths):
    """SGLang reduces up to 2,048 tokens in another way than more."""
    checked = []
    engine = SimpleNamespace(
        device=torch.device(device),
        tokens_per_batch=room,
        _check_pass=checked.append,
        _check_head=lambda: checked.append("head"),
    )
    SglangEngine.self_check(engine)
    assert checked == [*lengths, "head"]


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
        _on_device=lambda rows: rows,
    )
    if sound:
        SglangEngine._check_pass(engine, 16)
    else:
        with pytest.raises(EngineError, match="not the token"):
            SglangEngine._check_pass(engine, 16)
