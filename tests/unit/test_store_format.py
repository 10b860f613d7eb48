"""The store's format, as docs/capture.md tells it: another reader, written from that text alone, reads the same.

Nothing of the package is used by `read_store`."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from safetensors import safe_open

from specforge.features.shard import HEAD, _header
from specforge.features.store import Store
from specforge.features.writer import StoreWriter
from tests.stores import HIDDEN, TENSORS, filled, manifest, record

# From here to the next line of this kind: json, struct, numpy, and zstandard for codecs that name it ------------------


def e4m3(bytes_):
    """Sign, 4 bits of exponent (bias 7), 3 of mantissa; all ones is NaN, there is no infinity."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    table = np.where(code & 127 == 127, np.nan, np.where(code < 128, value, -value)).astype(np.float32)
    return table[bytes_]


def bf16(bytes_):
    return (np.frombuffer(bytes_, "<u2").astype(np.uint32) << 16).view(np.float32)


def states_of(codec, content, rows, hidden):
    """[rows, hidden] float32 of a record's encoded states."""
    kind, _, zstd = codec.partition("+")
    if zstd:
        planes = np.frombuffer(zstandard.ZstdDecompressor().decompress(content), np.uint8)
        content = planes.reshape(1 if kind == "fp8" else 2, -1).T.tobytes()
    if kind == "bf16":
        return bf16(content).reshape(rows, hidden)
    if kind == "fp32":
        return np.frombuffer(content, "<f4").reshape(rows, hidden)
    values = e4m3(np.frombuffer(content[: rows * hidden], np.uint8)).reshape(rows, hidden)
    return values * np.frombuffer(content[rows * hidden :], "<f4")[:, None]


def read_store(folder):
    """{sample id: tensors} of a finished store."""
    about = json.loads((folder / "manifest.json").read_text())
    assert about["format_version"] == 2
    hidden, found = about["hidden_size"], {}
    for line in (folder / "shards.jsonl").read_text().split("\n")[:-1]:
        shard = json.loads(line)
        file = (folder / shard["file"]).read_bytes()
        (length,) = struct.unpack("<Q", file[:8])
        header, start = json.loads(file[8 : 8 + length]), 8 + length
        tensor = {name: file[start + h["data_offsets"][0] : start + h["data_offsets"][1]] for name, h in header.items()}
        at = token = teacher = 0
        for one in shard["records"]:
            tokens, teachers = one["tokens"], one["teachers"]
            content = tensor["states"][at : at + one["bytes"]]
            states = states_of(about["codec"], content, 3 * tokens + teachers, hidden)
            found[one["sample_id"]] = {
                "token_ids": np.frombuffer(tensor["input_ids"], "<i4")[token : token + tokens],
                "loss_mask": np.frombuffer(tensor["loss_mask"], np.uint8)[token : token + tokens],
                "aux": states[: 3 * tokens].reshape(tokens, 3 * hidden),
                "last": states[3 * tokens :],
                "teacher_top1": np.frombuffer(tensor["teacher_top1"], "<i4")[teacher : teacher + teachers],
                "teacher_lse": np.frombuffer(tensor["teacher_lse"], "<f4")[teacher : teacher + teachers],
            }
            at, token, teacher = at + one["bytes"], token + tokens, teacher + teachers
    assert len(found) == about["num_records"]
    return found


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["bf16", "fp8", "bf16+zstd", "fp8+zstd", "fp32"])
def test_a_reader_of_its_own_reads_the_same(tmp_path, codec):
    store, found = Store(filled(tmp_path, 20, codec)), read_store(tmp_path)
    assert sorted(found) == list(range(20))
    for sample_id in range(20):
        want = store.record(sample_id)
        for name in TENSORS:
            mine = torch.from_numpy(found[sample_id][name].copy())
            if name in ("aux", "last") and codec != "fp32":
                mine = mine.bfloat16()  # the last step of fp8's decoding; of bf16 it changes nothing
            assert torch.equal(mine.to(getattr(want, name).dtype), getattr(want, name)), (sample_id, name)


@pytest.mark.parametrize("codec", ["bf16", "fp8+zstd"])
def test_a_shard_is_a_safetensors_file_without_padding(tmp_path, codec):
    filled(tmp_path, 20, codec)
    for path in tmp_path.glob("shard-*"):
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items()}
        assert dtypes == {
            "states": "uint8",
            "input_ids": "int32",
            "teacher_top1": "int32",
            "teacher_lse": "float32",
            "loss_mask": "uint8",
        }
        assert path.stat().st_size == 4096 + sum(tensor.nbytes for tensor in tensors.values())
        lines = [json.loads(line) for line in (tmp_path / "shards.jsonl").read_text().splitlines()]
        [line] = [line for line in lines if line["file"] == path.name]
        assert 0 <= len(tensors["states"]) - sum(record["bytes"] for record in line["records"]) < 8
        assert len(tensors["loss_mask"]) == sum(record["tokens"] for record in line["records"])


def test_the_header_fits_for_the_largest_shard(tmp_path):
    """safetensors' offsets are decimal: 2^62 bytes of states are beyond any disk."""
    assert (
        len(_header(1 << 62, dict.fromkeys(("input_ids", "teacher_top1", "teacher_lse", "loss_mask"), 1 << 62))) == HEAD
    )


def test_the_checksums_are_what_the_text_says(tmp_path):
    filled(tmp_path, 20)
    texts = [*(tmp_path / "shards.jsonl").read_bytes().splitlines(), (tmp_path / "manifest.json").read_bytes()[:-1]]
    for text in texts:
        body, check = text.rsplit(b', "check": ', 1)
        assert check.decode() == f'"{xxhash.xxh3_64_hexdigest(body)}"}}'
    for line in map(json.loads, (tmp_path / "shards.jsonl").read_text().splitlines()):
        file = (tmp_path / line["file"]).read_bytes()
        states = sum(record["bytes"] for record in line["records"])
        assert xxhash.xxh3_64_hexdigest(file[:4096] + file[4096 + states :]) == line["xxh3"]
        assert len(file) == line["bytes"]
        tensors = read_store(tmp_path)
        at = 4096
        for one in line["records"]:
            mine = tensors[one["sample_id"]]
            content = file[at : at + one["bytes"]] + b"".join(
                mine[name].tobytes() for name in ("token_ids", "teacher_top1", "teacher_lse", "loss_mask")
            )
            assert xxhash.xxh3_64_hexdigest(content) == one["xxh3"]
            at += one["bytes"]


def test_only_the_documented_files(tmp_path):
    filled(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    shards = {name for name in names if name.startswith("shard-0-") and name.endswith(".safetensors")}
    assert names - shards == {"manifest.json", "shards.jsonl", ".lock"}


def test_files_are_as_readable_as_the_user_wants_them(tmp_path):
    """No private mode from a temporary file: others may train on the store."""
    filled(tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in tmp_path.glob("shard*")} == {plain.stat().st_mode}


def test_one_token_is_the_shortest_record(tmp_path):
    with StoreWriter(tmp_path, manifest(1)) as writer:
        writer.add(record(0, length=1))
    [found] = read_store(tmp_path).values()
    assert found["aux"].shape == (1, 3 * HIDDEN)
    assert found["last"].shape == (0, HIDDEN)
