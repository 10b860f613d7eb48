"""Codecs: what is exact is exact, what is rounded stays within its bound, for each token and layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from specforge.features import codec as codecs
from specforge.features.codec import CODECS, codec_for, compress, decode, decompress, encode, state_bytes

TOKENS, TEACHERS, HIDDEN = 7, 4, 16
ROWS = 3 * TOKENS + TEACHERS
FP8 = CODECS["fp8"]


def stored(codec, aux_TA, last_SH):
    """As a shard holds them: the pieces as bytes, one after the other."""
    pieces = [piece.reshape(-1).view(torch.uint8) for piece in encode(codec, aux_TA, last_SH)]
    return torch.cat(pieces)


def round_trip(codec, aux_TA, last_SH):
    content = stored(codec, aux_TA, last_SH)
    assert len(content) == state_bytes(codec, len(aux_TA), len(last_SH), last_SH.shape[1])
    return decode(codec, content, len(aux_TA), len(last_SH), last_SH.shape[1])


def states(seed=0, dtype=torch.bfloat16):
    """Rows of very different size side by side, as the layers of a target give them."""
    torch.manual_seed(seed)
    size_R = torch.logspace(-20, 20, ROWS)[torch.randperm(ROWS)]
    rows_RH = torch.randn(ROWS, HIDDEN) * size_R[:, None]
    rows_RH[:, 3] *= 300  # one channel far above the others, as in trained models
    rows_RH[torch.rand(ROWS, HIDDEN) < 0.1] = 0
    return split(rows_RH.to(dtype))


def split(rows_RH):
    return rows_RH[: 3 * TOKENS].reshape(TOKENS, 3 * HIDDEN), rows_RH[3 * TOKENS :]


def joined(aux_TA, last_SH):
    return torch.cat([aux_TA.reshape(-1, last_SH.shape[1]), last_SH])


def bound(rows_RH):
    """What fp8 may move a value by: half a step of e4m3 (2^-4 of the value; under 2^-6, half of 2^-9, times the scale),
    then half a step of bf16 (2^-9 of the result, itself at most 1.07 of the value) and the last bits of the fp32
    product and quotient (2^-22)."""
    x = rows_RH.double().abs()
    step = torch.maximum(x * 2.0**-4, x.amax(-1, keepdim=True) / 448 * 2.0**-10)
    return step * (1 + 2.0**-22) + (x + step) * 2.0**-9


def too_far(found_RH, want_RH):
    """Rows in which some value came back outside the bound."""
    return ((found_RH.double() - want_RH.double()).abs() > bound(want_RH)).any(-1)


# Exact codecs


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_bf16_and_fp32_are_exact(name, dtype):
    aux_TA, last_SH = states(dtype=dtype)
    found = round_trip(CODECS[name], aux_TA, last_SH)
    for mine, want in zip(found, (aux_TA, last_SH), strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, want)


@pytest.mark.parametrize("name", ["bf16+zstd", "fp8+zstd"])
@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_zstd_gives_the_same_bytes_back(name, tokens):
    torch.manual_seed(0)
    aux_TA, last_SH = torch.randn(tokens, 3 * HIDDEN).bfloat16(), torch.randn(tokens // 2, HIDDEN).bfloat16()
    content = stored(CODECS[name], aux_TA, last_SH).numpy()
    small = compress(CODECS[name], content)
    np.testing.assert_array_equal(decompress(CODECS[name], small, len(content)), content)


def test_zstd_takes_less():
    """Exponents of neighbouring values are alike; apart from the mantissas they are compressed well."""
    content = stored(CODECS["bf16"], torch.randn(500, 3 * HIDDEN).bfloat16(), torch.randn(100, HIDDEN).bfloat16())
    assert len(compress(CODECS["bf16+zstd"], content.numpy())) < 0.85 * len(content)


def test_what_is_no_zstd_frame_is_refused():
    good = compress(CODECS["bf16+zstd"], np.zeros(64, np.uint8))
    for bad in (np.zeros(0, np.uint8), np.arange(40, dtype=np.uint8), good[:-1]):
        with pytest.raises(ValueError):  # noqa: PT011  the text is zstd's own
            decompress(CODECS["bf16+zstd"], bad, 64)
    with pytest.raises(ValueError):  # noqa: PT011
        decompress(CODECS["bf16+zstd"], good, 48)


@pytest.mark.parametrize(
    ("wanted", "dtype", "name"),
    [
        ("auto", torch.bfloat16, "bf16"),
        ("auto", torch.float16, "bf16"),
        ("auto", torch.float32, "fp32"),
        ("fp8", torch.float32, "fp8"),
        ("bf16", torch.float32, "bf16"),
    ],
)
def test_the_codec_of_a_target(wanted, dtype, name):
    assert codec_for(wanted, dtype) == name


# fp8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_stays_within_its_bound_for_each_token_and_layer(dtype):
    aux_TA, last_SH = states(dtype=dtype) if dtype != torch.float16 else split(torch.randn(ROWS, HIDDEN).half())
    found = round_trip(FP8, aux_TA, last_SH)
    assert {part.dtype for part in found} == {torch.bfloat16}
    assert not too_far(joined(*found), joined(aux_TA, last_SH)).any()


def test_the_bound_is_nearly_reached():
    """A bound that is never reached would let faults through: just above a power of two half a step is 2^-4 of it."""
    rows_RH = torch.full((ROWS, HIDDEN), 448.0)
    rows_RH[:, 1] = 17.0  # between 16 and 18
    found = joined(*round_trip(FP8, *split(rows_RH)))
    assert (found[:, 1] - 17).abs().min() == 1 > 0.9 * 17 * 2**-4


@pytest.mark.parametrize("at", [0, 3 * TOKENS - 1, ROWS - 1])
def test_a_wrong_scale_is_noticed(at):
    """Of one token and layer, or of one teacher row: 3 % too large, which no mean over the store would show."""
    aux_TA, last_SH = states()
    content = stored(FP8, aux_TA, last_SH)
    scales = content[ROWS * HIDDEN :].clone().view(torch.float32)
    scales[at] *= 1.03
    content[ROWS * HIDDEN :] = scales.view(torch.uint8)
    found = joined(*decode(FP8, content, TOKENS, TEACHERS, HIDDEN))
    assert too_far(found, joined(aux_TA, last_SH)).nonzero().flatten().tolist() == [at]


@pytest.mark.parametrize("rows", ["tokens", "layers"])
def test_a_shared_scale_is_noticed(monkeypatch, rows):
    """One scale for all rows, or one for the three layers of a token: small layers would drown in large ones."""
    own = codecs._scale

    def shared(rows_RH):
        scale_R = own(rows_RH)
        if rows == "tokens":
            return scale_R.max().expand_as(scale_R).contiguous()
        if len(scale_R) % 3:
            return scale_R
        return scale_R.view(-1, 3).amax(-1, keepdim=True).expand(-1, 3).reshape(-1)

    monkeypatch.setattr(codecs, "_scale", shared)
    aux_TA, last_SH = states()
    found = joined(*round_trip(FP8, aux_TA, last_SH))
    assert too_far(found, joined(aux_TA, last_SH)).sum() > 5


finite = st_numpy.arrays(
    np.float32, (ROWS, HIDDEN), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)


@given(finite, st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=200, deadline=None)
def test_fp8_of_finite_states_is_finite_and_keeps_zero_and_sign(rows, dtype):
    rows_RH = torch.from_numpy(rows).to(dtype)
    rows_RH = rows_RH.where(rows_RH.isfinite(), torch.finfo(dtype).max)  # the largest fp32 is no finite bf16
    found = joined(*round_trip(FP8, *split(rows_RH)))
    assert found.isfinite().all()
    assert (found[rows_RH == 0] == 0).all()
    assert (found.float() * rows_RH.float().sign() >= 0).all()


def test_fp8_saturates():
    """A value beyond the largest bf16 comes back as that."""
    largest = torch.finfo(torch.bfloat16).max
    rows_RH = torch.full((ROWS, HIDDEN), torch.finfo(torch.float32).max)
    rows_RH[:, 1::2] *= -1
    found = joined(*round_trip(FP8, *split(rows_RH)))
    assert (found[:, ::2] == largest).all()
    assert (found[:, 1::2] == -largest).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_a_value_that_is_not_finite_never_looks_sound(value):
    rows_RH = torch.ones(ROWS, HIDDEN)
    rows_RH[5, 2] = value
    found = joined(*round_trip(FP8, *split(rows_RH)))
    assert found[5].isnan().all()
    assert (found[torch.arange(ROWS) != 5] == 1).all()


def test_every_value_of_e4m3_comes_back_as_itself():
    """Rows that e4m3 holds exactly: a row's largest is 448, so its scale is 1."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()]
    rows_RH = torch.cat([values, torch.zeros(-len(values) % (HIDDEN - 1))]).view(-1, HIDDEN - 1)
    rows_RH = torch.cat([rows_RH, torch.full((len(rows_RH), 1), 448.0)], dim=1)
    aux_TA = rows_RH[: len(rows_RH) // 3 * 3].reshape(-1, 3 * HIDDEN)
    found = round_trip(FP8, aux_TA, rows_RH[len(rows_RH) // 3 * 3 :])
    assert torch.equal(joined(*found).float(), rows_RH)
