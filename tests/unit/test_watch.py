"""What the watchdog reads from the others: anyone who reaches the store can write there."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from specforge.watch import LONGEST, State

RIGHT = State(tick=3, idle=1, where="a.py:7 in f", waits=True)


def test_a_state_comes_back():
    assert State.read(json.dumps(asdict(RIGHT)).encode()) == RIGHT


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[" * 900,
        b"[]",
        b"1",
        b'{"tick": "3"}',
        b'{"tick": true}',
        b'{"tick": 3, "pid": 1}',
        b'{"waits": 1}',
        json.dumps(asdict(RIGHT) | {"where": "\x1b[2Jrank 7"}).encode(),
        json.dumps(asdict(RIGHT) | {"where": "x" * LONGEST}).encode(),
    ],
)
def test_what_is_no_state_is_not_read(text):
    assert State.read(text) is None
