"""How hidden states become bytes, and back. A codec's name stands in the manifest.

The states of a record are R = 3T + S rows of H values: three aux rows for each token, then one row for each teacher.

    bf16, fp32   the values, row after row
    fp8          the values in e4m3, row after row, then R float32 scales, one for each row
    ...+zstd     the bytes of one of these, split into byte planes (all first bytes of the values, then all second
                 bytes, ...), as one zstd frame for each record

fp8: with m the largest |x| of a row, scale = m / 448, so that the row fills the range of e4m3. A value x comes back
within max(2^-4 |x|, 2^-10 m / 448): e4m3 has three bits of mantissa, and below 2^-6 a fixed step of 2^-9.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_SCALE = float(torch.finfo(torch.float32).tiny)  # a smaller one would lose its own bits, or be zero
LARGEST_SCALE = float(torch.finfo(torch.bfloat16).max) / E4M3_MAX  # the largest state comes back as a finite bf16
ZSTD_LEVEL = 1  # higher levels save nothing on hidden states (benchmarks/LOG.md)


@dataclass(frozen=True, slots=True)
class Codec:
    stored: torch.dtype
    zstd: bool = False

    @property
    def decoded(self) -> torch.dtype:
        """In which states come back."""
        return torch.bfloat16 if self.stored == torch.float8_e4m3fn else self.stored


CODECS = {
    "bf16": Codec(torch.bfloat16),
    "fp8": Codec(torch.float8_e4m3fn),
    "bf16+zstd": Codec(torch.bfloat16, zstd=True),
    "fp8+zstd": Codec(torch.float8_e4m3fn, zstd=True),
    "fp32": Codec(torch.float32),
}


def codec_for(wanted: str, dtype: torch.dtype) -> str:
    """The codec's name. "auto": bf16, but fp32 for a target that runs in fp32 (fp16 states may exceed bf16's
    precision, never its range)."""
    if wanted != "auto":
        return wanted
    return "fp32" if dtype == torch.float32 else "bf16"


def state_bytes(codec: Codec, tokens: int, teachers: int, hidden_size: int) -> int:
    """Of a record's encoded states, before zstd."""
    rows = 3 * tokens + teachers
    return rows * hidden_size * codec.stored.itemsize + (4 * rows if codec.stored == torch.float8_e4m3fn else 0)


def encode(codec: Codec, aux_TA: Tensor, last_SH: Tensor) -> list[Tensor]:
    """The encoded states (before zstd) in pieces, in the order in which they are stored, on the states' device."""
    blocks_RH = [aux_TA.reshape(3 * len(aux_TA), -1), last_SH]
    if codec.stored != torch.float8_e4m3fn:
        return [rows_RH.to(codec.stored) for rows_RH in blocks_RH]
    scales = [_scale(rows_RH) for rows_RH in blocks_RH]
    return [_to_fp8(r, s) for r, s in zip(blocks_RH, scales, strict=True)] + scales


def decode(codec: Codec, stored: Tensor, tokens: int, teachers: int, hidden_size: int) -> tuple[Tensor, Tensor]:
    """(aux [T, A], last [S, H]) of the bytes that `encode` gave, on the device of `stored`; uint8 and of length
    `state_bytes`. What is not fp8 comes back as a view."""
    rows = 3 * tokens + teachers
    if codec.stored == torch.float8_e4m3fn:
        values_RH = stored[: rows * hidden_size].view(torch.float8_e4m3fn).view(rows, hidden_size)
        scale_R = stored[rows * hidden_size :].clone().view(torch.float32)  # a copy: views must be aligned
        states_RH = (values_RH.float() * scale_R[:, None]).to(codec.decoded)
    else:
        states_RH = stored.view(codec.stored).view(rows, hidden_size)
    return states_RH[: 3 * tokens].reshape(tokens, 3 * hidden_size), states_RH[3 * tokens :]


def compress(codec: Codec, encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
    planes = np.ascontiguousarray(encoded.reshape(-1, codec.stored.itemsize).T)
    return np.frombuffer(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(planes.data), np.uint8)


def decompress(codec: Codec, stored: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The `size` bytes that were compressed. Raises ValueError where `stored` is no such frame."""
    try:
        if zstandard.frame_content_size(stored.data) != size:  # a damaged size must not be asked for as memory
            raise ValueError("the frame is of another length")
        planes = zstandard.ZstdDecompressor().decompress(stored.data)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    values = np.empty((size // codec.stored.itemsize, codec.stored.itemsize), dtype=np.uint8)
    values.T[:] = np.frombuffer(planes, np.uint8).reshape(values.T.shape)  # plane by plane: 8 times faster
    return values.reshape(-1)


def _scale(rows_RH: Tensor) -> Tensor:
    """[R] float32. Infinite or NaN where the row holds such a value: the whole row then comes back as NaN, never as
    numbers that look sound."""
    scale_R = rows_RH.abs().amax(-1).float() / E4M3_MAX
    return torch.where(scale_R.isfinite(), scale_R.clamp(SMALLEST_SCALE, LARGEST_SCALE), scale_R)


def _to_fp8(rows_RH: Tensor, scale_R: Tensor) -> Tensor:
    return (rows_RH.float() / scale_R[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
