"""Data sets of the hub, by the real huggingface_hub against a server on the loopback interface with the real layouts.

Each client is a process of its own. Those that need nothing of each other are started together, four at a time: some
wait through retries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import hub_server
from tests.hub_server import SHAREGPT, SHAREGPT_52K, ULTRACHAT, Hub

ROOT = Path(__file__).parents[2]
SHARDS = [f"train_sft-{n:05}-of-00003-a3ecf92756993583.parquet" for n in range(3)]
CUT = 2000  # bytes: less than a shard


@dataclass(frozen=True)
class Result:
    code: int
    said: str  # all that was printed, but the result
    sources: list[dict]
    cache: list[str]  # names in the cache under which a reader finds something


def resolve(hub: Hub, home: Path, *dataset: str, **environment: str) -> Result:
    """What a command would get, in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.resolve_worker", *dataset],
        cwd=ROOT,
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    said, sources = done.stdout, []
    if done.returncode == 0:
        *before, last = done.stdout.splitlines()
        said, sources = "\n".join(before), json.loads(last)
    kept = [
        path.name for place in ("blobs", "snapshots") for path in home.glob(f"hub/*/{place}/**/*") if path.is_file()
    ]
    return Result(done.returncode, said + done.stderr, sources, kept)


def with_repository(files: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    return {"org/rows": files}


PARQUET = hub_server.ultrachat_parquet([hub_server.ultrachat_row(0)])
JSONL = b'{"id": 1}\n{"id": 2}\n'
SCENARIOS: dict[str, tuple[Hub, tuple[str, ...]]] = {
    "mix": (Hub(), ("mix=0.25",)),
    "primary gone": (Hub(gone={SHAREGPT}), ("sharegpt",)),
    "both gone": (Hub(gone={SHAREGPT, SHAREGPT_52K}), ("sharegpt",)),
    "gated": (Hub(gated={ULTRACHAT}), ("ultrachat",)),
    "busy": (Hub(busy=2), ("sharegpt",)),
    "busy storage": (Hub(busy_storage=1), ("ultrachat",)),
    "always busy": (Hub(busy=10**9), ("ultrachat",)),
    "cut once": (Hub(cut_after=CUT, cuts=1), ("ultrachat",)),
    "always cut": (Hub(cut_after=CUT), ("ultrachat",)),
    "wrong length": (Hub(announced_too_much=7), ("ultrachat",)),
    "altered once": (Hub(altered=1), ("ultrachat",)),
    "always altered": (Hub(altered=10**9), ("ultrachat",)),
    "lying etag": (Hub(etag="e" * 64), ("HuggingFaceH4/ultrachat_200k:train_gen",)),
    "one etag for all": (Hub(etag="e" * 64), ("ultrachat",)),
    "outside": (Hub(with_repository({"data/train.parquet": PARQUET, "../../../evil.jsonl": JSONL})), ("org/rows",)),
    "absolute": (Hub(with_repository({"/tmp/evil.jsonl": JSONL})), ("org/rows",)),
    "odd names": (Hub(with_repository({"[train] a*b.jsonl": JSONL, "[train] acb.csv": b"x"})), ("org/rows",)),
    "no data": (Hub(with_repository({"README.md": b"x", "data/test.jsonl": JSONL})), ("org/rows",)),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(4))
        yield {
            name: pool.submit(
                resolve, stack.enter_context(hub_server.serving(hub)), tmp_path_factory.mktemp("hf"), *given
            )
            for name, (hub, given) in SCENARIOS.items()
        }


@pytest.fixture
def result(results, request):
    return results[request.param].result()


def scenario(*names: str):
    return pytest.mark.parametrize("result", names, indirect=True)


# What is taken


@scenario("mix")
def test_the_mix_is_both_with_the_train_split_of_each(result):
    ultrachat, sharegpt = result.sources
    hub, _ = SCENARIOS["mix"]
    assert [Path(file).name for file in ultrachat["files"]] == SHARDS
    assert ultrachat["rows"] == [hub_server.ultrachat_row(n) for n in range(30)]
    assert sharegpt["rows"] == [hub_server.sharegpt_row(n) for n in range(40)]
    assert [ultrachat["weight"], sharegpt["weight"]] == [0.25, 0.25]
    assert ultrachat["origin"] == f"{ULTRACHAT}@{hub.commit(ULTRACHAT)}"
    assert sorted(hub.downloads()) == sorted([*SHARDS, "ShareGPT_V3_unfiltered_cleaned_split.json"])
    assert not ultrachat["cached"]


@scenario("lying etag")
def test_a_split_by_name_and_an_etag_that_is_no_hash(result):
    assert result.sources[0]["rows"] == [hub_server.ultrachat_row(900)]
    assert result.sources[0]["name"] == "HuggingFaceH4/ultrachat_200k:train_gen"


@scenario("odd names")
def test_names_are_no_patterns(result):
    assert result.sources[0]["rows"] == [{"id": 1}, {"id": 2}]
    assert SCENARIOS["odd names"][0].downloads() == ["[train] a*b.jsonl"]


# What cannot be had


@scenario("primary gone")
def test_the_second_home_is_taken_and_that_is_said(result):
    assert result.code == 0
    assert f"{SHAREGPT} cannot be had" in result.said
    assert f"taking {SHAREGPT_52K} instead" in result.said
    assert result.sources[0]["name"] == "sharegpt"
    assert result.sources[0]["origin"].startswith(f"{SHAREGPT_52K}@")
    assert result.sources[0]["rows"] == [hub_server.sharegpt_52k_row(n) for n in range(12)]


@scenario("both gone")
def test_both_homes_gone_is_one_message(result):
    assert result.code == 2
    assert result.said.count("error ") == 1
    error = result.said[result.said.index("error ") :]
    assert SHAREGPT in error
    assert SHAREGPT_52K in error
    assert "give their file as a path" in error


@scenario("gated")
def test_a_gated_repository_says_what_to_do(result):
    assert result.code == 2
    assert "it is gated" in result.said
    assert "hf auth login" in result.said
    assert result.cache == []


@scenario("no data")
def test_without_a_train_split_nothing_is_guessed(result):
    assert result.code == 2
    assert "no file of a train split" in result.said
    assert SCENARIOS["no data"][0].downloads() == []


@scenario("outside", "absolute")
def test_names_that_leave_the_cache_are_refused(result):
    assert result.code == 2
    assert "would leave the cache" in result.said
    assert "evil.jsonl" in result.said
    assert result.cache == []
    assert SCENARIOS["outside"][0].downloads() == []


# What goes wrong on the way


@scenario("busy")
def test_a_busy_server_is_asked_again_and_that_is_said(result):
    assert result.code == 0
    assert "HTTP 503; trying again in 1 s" in result.said
    assert "HTTP 503; trying again in 2 s" in result.said
    assert len(result.sources[0]["rows"]) == 40


@scenario("busy storage")
def test_a_busy_storage_too(result):
    assert result.code == 0
    assert "HTTP 503; trying again in 1 s" in result.said
    assert SCENARIOS["busy storage"][0].downloads() == [SHARDS[0], *SHARDS]


@scenario("always busy")
def test_tries_are_bounded(result):
    assert result.code == 2
    assert result.said.count("trying again") == 3
    assert len(SCENARIOS["always busy"][0].asked) == 4
    assert "HTTP 503" in result.said


@scenario("cut once")
def test_a_cut_download_goes_on_where_it_was(result):
    hub, _ = SCENARIOS["cut once"]
    assert result.code == 0
    assert result.sources[0]["rows"] == [hub_server.ultrachat_row(n) for n in range(30)]
    assert hub.downloads() == [SHARDS[0], *SHARDS]
    assert "Trying to resume" in result.said
    assert "http://" not in result.said


@scenario("always cut")
def test_a_download_that_is_always_cut_leaves_nothing(result):
    assert result.code == 2
    assert "the connection was lost again and again" in result.said
    assert result.cache == []


@scenario("wrong length")
def test_fewer_bytes_than_announced_leave_nothing(result):
    assert result.code == 2
    assert "Consistency check failed" in result.said
    assert result.said.count("trying again") == 3
    assert result.cache == []


@scenario("altered once")
def test_wrong_bytes_are_noticed_by_their_hash_and_fetched_again(result):
    assert result.code == 0
    assert f"{SHARDS[0]} has not the SHA-256 that is listed; trying again" in result.said
    assert result.sources[0]["rows"] == [hub_server.ultrachat_row(n) for n in range(30)]


@scenario("always altered")
def test_wrong_bytes_are_never_kept(result):
    assert result.code == 2
    assert "has not the SHA-256 that is listed" in result.said
    assert result.cache == []


@scenario("one etag for all")
def test_a_file_under_the_etag_of_another_is_not_taken_for_it(result):
    assert result.code == 2
    assert f"{SHARDS[1]} came with" in result.said
    assert result.cache == []


# The cache


def test_second_run_offline_and_damaged_cache(tmp_path):
    """One cache through its life: filled, used, used without a network, damaged, mended, left behind by the hub."""
    hub = Hub()
    with hub_server.serving(hub):
        first = resolve(hub, tmp_path, "ultrachat")
        assert not first.sources[0]["cached"]
        assert "downloading 3 of 3 files" in first.said

        hub.asked.clear()
        second = resolve(hub, tmp_path, "ultrachat")
        assert hub.downloads() == []
        assert second.sources == [first.sources[0] | {"cached": True}]
        assert f"in the cache: {ULTRACHAT}@" in second.said
        assert "downloading" not in second.said

        hub.asked.clear()
        offline = resolve(hub, tmp_path, "ultrachat", HF_HUB_OFFLINE="1")
        assert hub.asked == []
        assert offline.sources == second.sources
        assert "HF_HUB_OFFLINE is set" in offline.said
        assert "in the cache" in offline.said

        shard = Path(first.sources[0]["files"][1])
        shard.resolve().write_bytes(shard.read_bytes()[:-10])
        refused = resolve(hub, tmp_path, "ultrachat", HF_HUB_OFFLINE="1")
        assert refused.code == 2
        assert "HF_HUB_OFFLINE is set" in refused.said
        mended = resolve(hub, tmp_path, "ultrachat")
        assert hub.downloads() == [SHARDS[1]]
        assert "is not whole; it is fetched again" in mended.said
        assert mended.sources == first.sources

        hub.gone = {ULTRACHAT}
        gone = resolve(hub, tmp_path, "ultrachat")
        assert gone.sources == second.sources
        assert "there is no such data set" in gone.said

        (tmp_path / "file").touch()
        unwritable = resolve(Hub(url=hub.url), tmp_path / "file", "sharegpt")
        assert unwritable.code == 2
        assert "Not a directory" in unwritable.said
        assert "HF_HOME" in unwritable.said

    unreachable = resolve(hub, tmp_path, "ultrachat")
    assert unreachable.sources == second.sources
    assert "no connection" in unreachable.said
    shard.unlink()
    incomplete = resolve(hub, tmp_path, "ultrachat", HF_HUB_OFFLINE="1")
    assert incomplete.code == 2
    assert "HF_HUB_OFFLINE is set" in incomplete.said
