"""The demo measures the machine and chooses how much it trains."""

from __future__ import annotations

import pytest
import torch

from specforge import demo, hardware
from specforge.config import DemoSettings

FAST, NO_BF16, SLOW = 375e9, 45e9, 5e9


@pytest.fixture
def said(monkeypatch):
    found: list[str] = []
    monkeypatch.setattr(demo, "say", found.append)
    return found


def size(monkeypatch, rate: float, **given) -> demo.Size:
    monkeypatch.setattr(demo, "matrix_rate", lambda dtype: rate)
    return demo._size(DemoSettings(**given))


def test_a_slow_machine_trains_less(monkeypatch, said):
    assert size(monkeypatch, FAST) == demo.SIZES[0]
    assert size(monkeypatch, NO_BF16) == size(monkeypatch, SLOW) == demo.SIZES[-1]
    assert "375 GFLOP/s" in said[0]
    assert "5 epochs, draft vocabulary 8,192: about 11 minutes" in said[0]
    assert "2 epochs, draft vocabulary 4,096: about 15 minutes" in said[1]


def test_sizes_fall_and_each_takes_less_than_the_one_before(monkeypatch, said):
    for rate in (FAST, NO_BF16, SLOW):
        seconds = [one.seconds(rate, online=False) for one in demo.SIZES]
        assert seconds == sorted(seconds, reverse=True)
        assert all(one.seconds(rate, online=True) > alone for one, alone in zip(demo.SIZES, seconds, strict=True))
    for one in demo.SIZES:
        assert one.seconds(FAST, online=False) < one.seconds(NO_BF16, online=False)


def test_the_same_draft_online(monkeypatch, said):
    assert size(monkeypatch, FAST, online=True) == size(monkeypatch, FAST)


def test_what_the_user_gives_stays(monkeypatch, said):
    assert size(monkeypatch, SLOW, epochs=7, draft_vocab_size=500).epochs == 7
    assert size(monkeypatch, SLOW, epochs=7, draft_vocab_size=500).draft_vocab == 500
    assert size(monkeypatch, FAST, epochs=1).draft_vocab == 8192


def test_the_rate_is_that_of_this_machine():
    rate = demo.matrix_rate(hardware.compute_dtype(torch.bfloat16), seconds=0.2)
    assert 1e9 < rate < 1e14
