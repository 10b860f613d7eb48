"""The fingerprint notices any change of any tensor, reads a file once, and headers that lie are refused."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.errors import ConfigError, EngineError
from specforge.target import tensors, weights
from tests import tiny
from tests.faults.page import fault


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny.make_target(tmp_path / "target")


@pytest.mark.parametrize("share", [0.0, 0.013, 0.31, 0.62, 0.999, 1.0])
@fault(
    "one bit of the target's weights changes after a capture",
    "another target: the store is refused",
)
def test_a_flipped_bit_anywhere_in_the_weights_is_another_target(target, share):
    file = target / "model.safetensors"
    before = tensors.fingerprint(target)
    content = bytearray(file.read_bytes())
    first = 8 + struct.unpack("<Q", content[:8])[0]
    content[first + int(share * (len(content) - first - 1))] ^= 1
    file.write_bytes(content)
    assert tensors.fingerprint(target) != before


def test_a_config_of_its_own_is_another_target(target):
    before = tensors.fingerprint(target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert tensors.fingerprint(target) != before


def test_how_tensors_are_shared_out_over_files_does_not_matter(target):
    before = tensors.fingerprint(target)
    named = sorted(load_file(target / "model.safetensors").items())
    (target / "model.safetensors").unlink()
    for number, part in enumerate((named[:20], named[20:])):
        save_file(dict(part), target / f"model-{number}.safetensors")
    assert tensors.fingerprint(target) == before


def test_a_file_is_read_once(target, monkeypatch, tmp_path):
    read = []
    hash_of = tensors.xxhash.xxh3_128
    monkeypatch.setattr(tensors.xxhash, "xxh3_128", lambda: read.append(1) or hash_of())
    before = tensors.fingerprint(target)
    count = len(read)
    assert count == len(load_file(target / "model.safetensors"))
    assert tensors.fingerprint(target) == before
    assert len(read) == count
    for cached in (tmp_path / "cache").rglob("*.json"):  # damaged: read again
        cached.write_text(cached.read_text().replace("0", "1", 1))
    assert tensors.fingerprint(target) == before
    assert len(read) == 2 * count
    assert not [path for path in target.iterdir() if path.suffix not in (".json", ".safetensors", ".jinja")]


def written(path, header, data=b"\0" * 64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"{}x",
        [],
        {"a": []},
        {"a": {"dtype": "F32", "shape": [4]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [56, 72]}},
        {"a": {"dtype": "F32", "shape": "4", "data_offsets": ["x", 8]}},
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        },
    ],
)
@fault(
    "the header of a weights file lies about offsets, shapes or sizes",
    "refused",
)
def test_a_header_that_lies_is_refused(target, header):
    written(target / "model.safetensors", header)
    with pytest.raises(EngineError, match="damaged"):
        weights.describe(str(target))


def test_a_header_length_beyond_the_file_is_refused(target):
    (target / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(EngineError, match="damaged"):
        weights.describe(str(target))


@pytest.mark.parametrize("text", [b"[" * 200_000, b"\xff{}", b"[1]", b"{"])
def test_a_config_that_is_none_is_refused(target, text):
    (target / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match="no JSON object"):
        weights.describe(str(target))


@pytest.mark.parametrize("nested", [False, True])
@fault(
    "a config claims a billion layers",
    "refused at once",
)
def test_a_billion_layers_are_refused_at_once(target, nested):
    config = json.loads((target / "config.json").read_text())
    more = {"num_hidden_layers": 10**9}
    (target / "config.json").write_text(json.dumps(config | ({"text_config": more} if nested else more)))
    with pytest.raises(ConfigError, match="1,000,000,000 layers"):
        weights.describe(str(target))


def test_bytes_of_what_is_loaded_come_from_the_headers(target):
    info = weights.describe(str(target))
    wanted = sum(tensor.numel() * 2 for tensor in load_file(target / "model.safetensors").values())
    assert weights.loaded_bytes(info, torch.bfloat16) == wanted
