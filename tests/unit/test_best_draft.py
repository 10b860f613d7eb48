"""Which draft training keeps as the best: the one that serving would accept most of, not the best mean over rows."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np

from specforge.records import Acceptance
from specforge.train import loop
from specforge.train.checkpoint import RunState


def acceptance(accepted: int, passes: int) -> Acceptance:
    """Of one record with 100 predictions, walked through in so many passes."""
    return Acceptance(
        sample_ids_N=np.array([0]),
        rows_NK=np.array([[100]]),
        accepted_NK=np.array([[accepted]]),
        walk_N2=np.array([[100, passes]]),
        known_N=np.array([100]),
    )


def test_the_best_draft_is_the_one_with_the_longest_simulated_decoding(monkeypatch):
    saved = []
    monkeypatch.setattr(loop, "_save", lambda run, best=False: saved.append(best))
    monkeypatch.setattr(loop, "_log", lambda *_: None)
    found = [
        acceptance(50, 70),
        acceptance(60, 75),
        acceptance(55, 65),
    ]  # the second has the best mean, and decodes worst
    optimizer = SimpleNamespace(whole=nullcontext)
    run = SimpleNamespace(state=RunState(), optimizer=optimizer, evaluate=lambda: found[run.state.epoch - 1])
    for epoch in (1, 2, 3):
        run.state.epoch = epoch
        loop._end_of_epoch(run)
    assert saved == [True, False, True]
    assert run.state.best_epoch == 3
    assert run.state.best_length == found[2].walk_length != found[2].length
