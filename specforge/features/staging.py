"""From the engine's device to host memory, while the engine goes on: a side stream into a ring of pinned memory."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specforge.features.codec import Codec, encode
from specforge.records import FeatureRecord


class Ring:
    """Host memory, lent out and given back in the same order. It bounds what waits to be written.

    Two threads: one takes, the other gives back."""

    def __init__(self, capacity: int, pinned: bool) -> None:
        self._memory = torch.empty(capacity, dtype=torch.uint8, pin_memory=pinned)
        self._lent: deque[tuple[int, int]] = deque()  # (start, stop), oldest first
        self._changed = threading.Condition()

    def take(self, size: int) -> Tensor:
        """`size` bytes, as soon as they are free. More than the ring holds: memory of its own, once the ring is
        empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._place(size) is not None)
            start = self._place(size) or 0
            fits = size <= len(self._memory)
            self._lent.append((start, start + size) if fits else (0, len(self._memory)))
        return self._memory[start : start + size] if fits else torch.empty(size, dtype=torch.uint8)

    def give_back(self) -> None:
        """The oldest piece."""
        with self._changed:
            self._lent.popleft()
            self._changed.notify()

    def _place(self, size: int) -> int | None:
        """Where the next piece can begin, None as long as there is no room for it."""
        if not self._lent:
            return 0
        oldest, (newest, end) = self._lent[0][0], self._lent[-1]
        if newest < oldest:  # the newest pieces lie before the oldest
            return end if end + size <= oldest else None
        if end + size <= len(self._memory):
            return end
        return 0 if size <= oldest else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A record on its way to the disk: its tensors that are on the host anyway, and memory for the others."""

    sample_id: int
    token_ids: Tensor
    loss_mask: Tensor
    teacher_top1: Tensor
    memory: Tensor  # bytes of the encoded states, then of teacher_lse
    ready: torch.cuda.Event | None  # None: they are there already

    def parts(self) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.uint8]]]:
        """The states and the small tensors as bytes. Waits until they are there."""
        if self.ready is not None:
            self.ready.synchronize()
        memory = self.memory.numpy()
        states = len(memory) - 4 * len(self.teacher_top1)
        return memory[:states], {
            "input_ids": _bytes(self.token_ids, np.int32),
            "teacher_top1": _bytes(self.teacher_top1, np.int32),
            "teacher_lse": memory[states:],
            "loss_mask": _bytes(self.loss_mask, np.uint8),
        }


class Staging:
    """Encodes records on the device where they are and copies them to the host, in the order given. On CUDA both run
    on a side stream; the caller goes on at once, unless the ring is full."""

    def __init__(self, codec: Codec, device: torch.device, capacity: int) -> None:
        self._codec, self._device = codec, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ring = Ring(capacity, pinned=self._stream is not None)

    def put(self, record: FeatureRecord) -> Staged:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            for tensor in (record.aux, record.last, record.teacher_lse):
                tensor.record_stream(self._stream)  # the caller may let go of it before it is copied
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            lse_S = record.teacher_lse.to(torch.float32).clone(memory_format=torch.contiguous_format)
            parts = [*encode(self._codec, record.aux, record.last), lse_S]
            memory, at = self.ring.take(sum(part.nbytes for part in parts)), 0
            for part in parts:
                memory[at : at + part.nbytes].copy_(part.reshape(-1).view(torch.uint8), non_blocking=True)
                at += part.nbytes
            ready = self._stream.record_event() if self._stream is not None else None
        return Staged(
            sample_id=record.sample_id,
            token_ids=record.token_ids,
            loss_mask=record.loss_mask,
            teacher_top1=record.teacher_top1,
            memory=memory,
            ready=ready,
        )


def _bytes(tensor: Tensor, dtype: type[np.generic]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(tensor.numpy(), dtype).view(np.uint8)
