"""What the user names becomes files, and files of every kind become the same values."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specforge.data import lines as reading
from specforge.data.lines import MAX_VALUE, dumped, lines, parsed
from specforge.data.sources import choose_train, dataset_name, resolve
from specforge.errors import ConfigError, DataError
from tests import hub_server

ROOT = Path(__file__).parents[2]
ROWS = [hub_server.ultrachat_row(n) for n in range(300)]  # more than a Parquet batch
JSONL = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
ARRAY = hub_server.json_array(ROWS)
FILES = {
    "rows.jsonl": JSONL,
    "ROWS.JSONL": JSONL.replace(b"\n", b"\r\n"),
    "last.jsonl": JSONL.rstrip(b"\n"),
    "utf8.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + JSONL,
    "jsonl.json": JSONL,
    "array.json": ARRAY,
    "line.json": json.dumps(ROWS).encode(),
    "bom.json": b"\xef\xbb\xbf\n " + ARRAY + b"\n",
    "rows.parquet": hub_server.ultrachat_parquet(ROWS, row_group_size=70),
    "rows.jsonl.gz": gzip.compress(JSONL[:5000]) + gzip.compress(JSONL[5000:]),
    "array.json.gz": gzip.compress(ARRAY),
    "rows.jsonl.zst": pa.compress(JSONL, codec="zstd", asbytes=True),
}


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def values(path: Path) -> list[object]:
    return [json.loads(value) for _, value in lines(path)]


# Files to values


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    found = list(lines(write(tmp_path, name, FILES[name])))
    assert [json.loads(value) for _, value in found] == ROWS
    assert [number for number, _ in found] == list(range(1, 301))
    assert not any(b"\n" in value or b"\r" in value for _, value in found)


def test_lines_are_passed_on_as_they_are_and_numbered_as_an_editor_does(tmp_path):
    path = write(tmp_path, "rows.jsonl", b'\n{"a": 1}\n \t\r\nno json \xff\n\n[1]\n{"b": ')
    assert list(lines(path)) == [(2, b'{"a": 1}'), (4, b"no json \xff"), (6, b"[1]"), (7, b'{"b": ')]


def test_an_empty_file_has_no_rows(tmp_path):
    assert [list(lines(write(tmp_path, name, b""))) for name in ("rows.jsonl", "rows.json")] == [[], []]
    assert list(lines(write(tmp_path, "array.json", b" [ ]\n"))) == []


def test_a_parquet_file_may_hold_what_json_does_not(tmp_path):
    table = pa.table({"id": [1], "when": pa.array([0], pa.timestamp("s")), "raw": [b"\xff"], "share": [float("nan")]})
    pq.write_table(table, tmp_path / "rows.parquet")
    [row] = values(tmp_path / "rows.parquet")
    assert row["id"] == 1
    assert row["share"] is None


def test_keys_that_only_other_rows_have_are_absent(tmp_path):
    """Arrow gives all structs of a column the same keys."""
    calls = [{"arguments": {"x": 0, "city": None}}, {"arguments": {"x": None, "city": "Linz"}}]
    rows = [{"messages": [{"content": "", "calls": [one, one]}]} for one in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = [json.loads(line) for _, line in lines(tmp_path / "rows.parquet")]
    assert [row["messages"][0]["calls"][1]["arguments"] for row in found] == [{"x": 0}, {"city": "Linz"}]


def test_long_integers_keep_their_digits(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 12345678901234567890123}\n')
    [(_, line)] = lines(tmp_path / "rows.jsonl")
    assert parsed(line) == {"a": 12345678901234567890123}
    assert parsed(dumped(parsed(line))) == {"a": 12345678901234567890123}


def test_the_longest_line_is_read_and_a_longer_one_is_marked(tmp_path):
    def line(length):
        return b'"' + b"x" * (length - 2) + b'"'

    def lengths(*rows):
        found = lines(write(tmp_path, "rows.jsonl", b"\n".join(rows)))
        return [(number, value and len(value)) for number, value in found]

    longest, longer = line(MAX_VALUE), line(MAX_VALUE + 1)
    assert lengths(longest, longer, b"1", line(3 * MAX_VALUE), b"2", longer) == [
        (1, MAX_VALUE), (2, None), (3, 1), (4, None), (5, 1), (6, None)
    ]  # fmt: skip
    assert lengths(longest) == [(1, MAX_VALUE)]  # without a newline


READ_AND_MEASURE = """
import sys
from pathlib import Path
from specforge.data.lines import lines
from specforge.errors import DataError
def peak():  # MiB; not ru_maxrss, which counts the process that started this one
    return next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith("VmHWM")) / 1024
list(lines(Path(sys.argv[1])))
before, values = peak(), 0
try:
    for _, value in lines(Path(sys.argv[2])): values += value is not None
except DataError as error:
    values = error.what
print(values, peak() - before, sep="|")
"""


def big_files(folder: Path) -> dict[str, tuple[Path, Path, str]]:
    """Small files and files of over 100 MB of the same kind, and what reading the latter comes to."""
    text = "long text " * 1000
    row = json.dumps({"text": text}).encode()
    for name, count in (("small", 100), ("big", 11_000)):
        write(folder, f"{name}.json", b"[" + b",".join([row] * count) + b"]")
        write(folder, f"{name}.jsonl", b'{"a": 1}\n"' + b"x" * (count * len(text)) + b'"\n{"b": 2}\n')
        write(folder, f"{name}-element.json", b'[{"a": 1}, "' + b"x" * (count * len(text)) + b'"]')
        table = pa.table({"text": [f"{n} {text}" for n in range(count)]})
        pq.write_table(table, folder / f"{name}.parquet", compression="none", use_dictionary=False)
    return {
        "a line": (folder / "small.jsonl", folder / "big.jsonl", "2"),
        "an array": (folder / "small.json", folder / "big.json", "11000"),
        "an element": (folder / "small-element.json", folder / "big-element.json", "an element of the array is longer"),
        "a row group": (folder / "small.parquet", folder / "big.parquet", "11000"),
    }


def test_memory_does_not_grow_with_the_file(tmp_path):
    for name, (small, big, expected) in big_files(tmp_path).items():
        assert big.stat().st_size > 100e6
        command = [sys.executable, "-c", READ_AND_MEASURE, str(small), str(big)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        found, grown = done.stdout.split("|")
        assert found.startswith(expected), name
        assert float(grown) < 60, name  # MiB; the longest value is 16, and is copied once or twice


# Files that are not what they should be


BROKEN = {
    "torn.json": (ARRAY[:5000], "breaks off", "after number"),
    "comma.json": (b'[{"a": 1} {"a": 2}]', "breaks off", "after number"),
    "trailing.json": (b'[{"a": 1}] {"a": 2}', "breaks off", "after number"),
    "bytes.json": (b'[{"a": "\xff"}]', "breaks off", "after number 0"),
    "deep.json": (b"[" * 5000 + b"]" * 5000, "breaks off", "after number 0"),
    "spread.json": (b'{\n  "a": 1\n}\n', "neither a JSON array nor", "spread.json"),
    "text.json": (b"Hello", "neither a JSON array nor", "text.json"),
    "array.jsonl": (ARRAY, "holds a JSON array", "array.jsonl"),
    "parquet.jsonl": (FILES["rows.parquet"], "holds Parquet", "parquet.jsonl"),
    "gzip.json": (gzip.compress(ARRAY), "holds gzip", "gzip.json"),
    "torn.parquet": (FILES["rows.parquet"][:-3000], "breaks off", "after number 0"),
    "empty.parquet": (b"", "breaks off", "after number 0"),
    "text.parquet": (JSONL, "breaks off", "after number 0"),
    "torn.jsonl.gz": (gzip.compress(JSONL)[:-2000], "breaks off", "after number"),
    "plain.jsonl.gz": (JSONL, "breaks off", "after number 0"),
    "torn.jsonl.zst": (FILES["rows.jsonl.zst"][:-500], "breaks off", "after number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_says_what_and_where(tmp_path, name):
    content, what, where = BROKEN[name]
    with pytest.raises(DataError) as refused:
        list(lines(write(tmp_path, name, content)))
    assert what in refused.value.what
    assert where in refused.value.where
    assert "\n" not in refused.value.what


def test_a_parquet_page_with_wrong_bytes_is_noticed(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=70, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[pq.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset + 200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="breaks off or is damaged") as refused:
        list(lines(path))
    assert "after number 208" in refused.value.where  # 13 batches; the next begins before row group 3, at row 211


def append(path: Path) -> None:
    path.open("ab").write(b'{"c": 3}\n')


def replace(path: Path) -> None:
    write(path.parent, "new", path.read_bytes()).replace(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [append, replace, cut, Path.touch, Path.unlink])
@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "rows.parquet"])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, name, change):
    monkeypatch.setattr(reading, "CHUNK", 1000)  # so that more than the beginning is still to be read
    path = write(tmp_path, name, FILES[name])

    def read():
        for number, _ in lines(path):
            if number == 1:
                change(path)

    with pytest.raises(DataError, match="changed while it was read"):
        read()


def test_stopping_early_is_no_fault(tmp_path):
    path = write(tmp_path, "rows.jsonl", JSONL)
    found = lines(path)
    next(found)
    append(path)
    found.close()


# Names to files


def test_paths_with_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b=0.5.json", "c.parquet", "ultrachat"):
        write(tmp_path, name, JSONL)
    sources = resolve(["a.jsonl=0.25", "b=0.5.json", str(tmp_path / "c.parquet")])
    assert [source.name for source in sources] == ["a.jsonl", "b=0.5.json", str(tmp_path / "c.parquet")]
    assert [source.weight for source in sources] == [0.25, 1.0, 1.0]
    assert [source.files for source in sources] == [
        (Path(n),) for n in ("a.jsonl", "b=0.5.json", tmp_path / "c.parquet")
    ]
    assert [source.origin for source in sources] == ["a.jsonl", "b=0.5.json", str(tmp_path / "c.parquet")]
    assert all(source.cached for source in sources)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="no regular file"):
        resolve([str(tmp_path / "rows.jsonl")])


def test_a_folder_is_read_as_a_repository_is(tmp_path):
    for name in ("README.md", "data/train-1.parquet", "data/train-0.parquet", "data/test-0.parquet", ".git/train.json"):
        write(tmp_path, name, b"")
    [source] = resolve([str(tmp_path)])
    assert source.files == (tmp_path / "data/train-0.parquet", tmp_path / "data/train-1.parquet")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["train.jsonl", "train.parquet", "train.json"], ["train.parquet"]),
        (["a.json", "b.jsonl", "README.md", "x.csv"], ["b.jsonl"]),
        (["other.parquet", "train.jsonl"], ["train.jsonl"]),
        (["train/1.parquet", "test/1.parquet", "train/0.parquet"], ["train/0.parquet", "train/1.parquet"]),
        (["en/Validation.json", "eval_set.json", "dev.json", "rows.json", "dataset_infos.json"], ["rows.json"]),
        (["latest.jsonl", "retrieval.jsonl", "test.jsonl"], ["latest.jsonl", "retrieval.jsonl"]),
    ],
)
def test_the_train_split_of_a_repository(names, chosen):
    assert choose_train("org/name", names) == chosen


@pytest.mark.parametrize(
    ("entries", "kind", "says"),
    [
        ([], ConfigError, "no data set is named"),
        (["ultrachat=2"], ConfigError, "'2' is no weight"),
        (["ultrachat=0"], ConfigError, "'0' is no weight"),
        (["sharegpt=nan"], ConfigError, "'nan' is no weight"),
        (["mix="], ConfigError, "'' is no weight"),
        (["rows.jsonl=much"], ConfigError, "'much' is no weight"),
        (["=1"], ConfigError, "'' is no data set"),
        (["ultrachta"], ConfigError, "did you mean ultrachat?"),
        (["ShareGPT"], ConfigError, "did you mean sharegpt?"),
        (["quite-something-else"], ConfigError, "give ultrachat, sharegpt, mix"),
        (["a/b/c"], ConfigError, "is no data set"),
        (["org/.."], ConfigError, "is no data set"),
        (["mix", "sharegpt"], ConfigError, "sharegpt is named twice"),
        (["{folder}/rows.jsonl", "{folder}/rows.jsonl=0.5"], ConfigError, "named twice"),
        (["{folder}/rwos.jsonl"], DataError, "rows.jsonl?"),
        (["{folder}/none/rows.jsonl"], DataError, "No such file"),
        (["{folder}/rows.jsonl/x.jsonl"], DataError, "Not a directory"),
        (["{folder}/rows.csv"], DataError, "files of this kind ('.csv')"),
        (["{folder}/empty"], DataError, "no file of a train split"),
        (["ultrachat", "{folder}/none.jsonl"], DataError, "No such file"),  # and nothing is downloaded before
        (["{folder}/" + 300 * "x" + ".jsonl"], DataError, "File name too long"),
        (["~nobody/rows.jsonl"], DataError, "No such file"),
        (["/dev/null"], DataError, "no regular file"),
    ],
)
def test_what_cannot_be_meant_or_read(tmp_path, entries, kind, says):
    write(tmp_path, "rows.jsonl", JSONL)
    write(tmp_path, "rows.csv", b"a,b\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(kind) as refused:
        resolve([entry.format(folder=tmp_path) for entry in entries])
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        (["ultrachat"], "ultrachat"),
        (["mix=0.5"], "mix"),
        (["some/where/rows.jsonl"], "rows"),
        (["/data/rows.json.gz=0.5"], "rows"),
        (["ROWS.v2.JSONL"], "ROWS.v2"),
        (["./some/folder/"], "folder"),
        (["org/name"], "org--name"),
        (["org/name:train_sft=0.1"], "org--name-train_sft"),
        (["ultrachat", "b.parquet"], "ultrachat+b"),
        (["/"], "data"),
        ([".."], "data"),
        (["../.jsonl"], "data"),
        (["./a b\n/../c[1]*.jsonl"], "c-1"),
        (["données.json"], "données"),
    ],
)
def test_dataset_name(entries, name):
    assert dataset_name(entries) == name


@pytest.mark.parametrize("entries", [["é" * 120 + ".jsonl"], [f"rows{n}.jsonl" for n in range(50)]])
def test_a_long_dataset_name_is_cut_and_stays_distinct(entries):
    name = dataset_name(entries)
    assert len(name.encode()) <= 100
    assert name != dataset_name([*entries, "x.jsonl"])
