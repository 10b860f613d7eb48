"""The host waits for the device once in an optimizer step. The device here is torch's `meta`, whose tensors hold no
values: whatever asks for one raises; the one reading that is meant is counted, and so is every copy to the device that
does not say that it need not be waited for."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from specforge.config import TrainSettings
from specforge.draft.step import DraftStep
from specforge.records import FeatureBatch, Ranks, TargetHead
from specforge.target.sglang import names as sgl
from specforge.target.sglang.engine import SglangEngine, _LogitsHook
from specforge.train import loop
from specforge.train.checkpoint import RunState
from specforge.train.optimizer import NAMES, read
from specforge.train.plain import PlainOptimizer
from specforge.train.recipe import choose
from tests.unit.test_draft_step import DECAY, STEPS, make, pack

META = torch.device("meta")


def on_device(loss: str = "kl") -> tuple[DraftStep, FeatureBatch]:
    draft, head, kept, _, records = make(0.5, torch.float32)
    step = DraftStep(draft, head, kept, STEPS, DECAY, loss)
    shown = TargetHead(embedding_VH=head.embedding_VH.to(META), head_VH=head.head_VH.to(META))
    step.draft.to(META)
    _, teacher_head_DH, kept_D, known_V = step.frozen
    teacher_head_DH = teacher_head_DH.to(META)
    step.frozen = dataclasses.replace(shown, head_VH=teacher_head_DH), teacher_head_DH, kept_D.to(META), known_V
    batch = pack(records, torch.float32)
    moved = ("token_ids", "positions", "aux", "last", "teacher_lse")
    return step, dataclasses.replace(batch, **{name: getattr(batch, name).to(META) for name in moved})


@pytest.mark.parametrize("loss", ["kl", "lk"])
def test_forward_and_backward_ask_the_device_for_nothing(loss):
    step, batch = on_device(loss)
    step(batch, step.loss_rows(batch)).loss.backward()
    assert all(parameter.grad is not None for parameter in step.draft.parameters())


def test_rows_planned_on_the_device_are_noticed():
    step, batch = on_device()
    normaliser = step.loss_rows(batch)
    with pytest.raises(RuntimeError, match="meta"):
        step(dataclasses.replace(batch, depth=batch.depth.to(META)), normaliser)


class Reads(TorchFunctionMode):
    """Counts what is read from the device, and says zero for it; and copies to the device that are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.copies = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reading = ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy")
        if getattr(function, "__name__", "") in reading and args[0].device == META:
            self.count += 1
            args = (torch.zeros(args[0].shape, dtype=args[0].dtype), *args[1:])
        given = (*args[1:], *kwargs.values())
        if getattr(function, "__name__", "") == "to" and args[0].device != META and META in given:
            self.copies += not kwargs.get("non_blocking")
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_an_optimizer_step_reads_the_device_once(monkeypatch, name):
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    step, batch = on_device()
    config = {
        "gradient_clipping": 0.5,
        "optimizer": {
            "type": NAMES[name],
            "params": {"lr": 1e-3, "adam_lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0},
        },
    }
    ranks = Ranks(device=META)
    settings = TrainSettings(model_path="target", steps=STEPS)
    optimizer = PlainOptimizer(step, config, ranks)
    recipe, _ = choose(settings, tokens=1000, hidden_size=16, world=1)
    run = SimpleNamespace(
        settings=settings, ranks=ranks, step=step, optimizer=optimizer, recipe=recipe, state=RunState()
    )
    step(batch, step.loss_rows(batch))  # the rotary embedding's frequencies move once
    with Reads() as reads:
        row, following = loop._update(run, [batch, None], 10, stop=False, fetch=lambda: [batch])
    assert (reads.count, reads.copies) == (1, 0)
    assert following == [batch]
    assert row["applied"]


def test_another_reading_or_copy_would_be_counted():
    with Reads() as reads:
        read(torch.zeros(3, device=META), torch.zeros((), device=META), 1.0)
        float(torch.zeros((), device=META))
        torch.zeros(3).to(META)
    assert (reads.count, reads.copies) == (2, 1)


def test_a_pass_of_the_target_reads_the_device_for_nothing(monkeypatch):
    """From the batch's token ids to the hook's columns: the results are the first that is waited for."""
    ids = torch.arange(6)
    batch = SimpleNamespace(prepare_for_extend=lambda: None, input_ids=None, prefill_input_ids_cpu=ids, device=META)
    schedule = SimpleNamespace(init_new=lambda **_: batch)
    monkeypatch.setattr(sgl, "ScheduleBatch", schedule)
    monkeypatch.setattr(sgl, "get_schedule", lambda: SimpleNamespace(page_size=1))
    head_VH, hook = torch.empty(300, 16, device=META), _LogitsHook(None)
    processor = Mock(  # hashable
        config=SimpleNamespace(vocab_size=300),
        do_tensor_parallel_all_gather=False,
        final_logit_softcapping=None,
        logit_scale=0.5,
        _compute_lm_head=lambda hidden_nH, head_VH: hidden_nH @ head_VH.T,
    )
    hidden_TH = torch.empty(6, 16, device=META)
    inputs = {"hidden_states": hidden_TH, "lm_head": head_VH, "aux_hidden_states": [hidden_TH] * 3}
    engine = SimpleNamespace(
        _runner=SimpleNamespace(
            req_to_token_pool=None, token_to_kv_pool_allocator=None, device=META, model_config=None
        ),
        _forward=lambda _: hook(processor, (), inputs),
        device=META,
    )
    with Reads() as reads:
        hook.rows = SglangEngine._on_device(engine, torch.tensor([1, 2, 4]))
        SglangEngine._extend(engine, [[1, 2, 3], [4, 5, 6]])
    assert (reads.count, reads.copies) == (0, 0)
    assert hook.top1.shape == hook.lse.shape == (3,)
    assert hook.aux.shape == (6, 48)
