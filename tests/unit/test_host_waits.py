"""The host waits for the device once in an optimizer step. The device here is torch's `meta`, whose tensors hold no
values: whatever asks for one raises; the one reading that is meant is counted, and so is every copy to the device that
does not say that it need not be waited for."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from specforge.config import TrainSettings
from specforge.draft.step import DraftStep
from specforge.records import FeatureBatch, Ranks, TargetHead
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
