"""Data sets on the Hugging Face hub: fetched once, checked, and found again without a network.

huggingface_hub does the transfers: its cache and locks, resuming, tokens, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE. Added
here: nothing is used whose size or hash differs from the repository's own listing, no name from the server leaves the
cache, retries are few and said, and without a network a complete copy in the cache is used.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath

import httpx
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.tqdm import disable_progress_bars
from rich.markup import escape as plain

from specforge.console import say
from specforge.errors import ConfigError, DataError, first_line

WAITS = (1.0, 2.0, 4.0)  # seconds before each further try
LISTING_TIMEOUT = 20.0  # seconds
COMMIT = re.compile(r"[0-9a-f]{40}")

Choose = Callable[[Sequence[str]], list[str]]  # of a repository's file names those to read; raises DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Files of one commit of a repository, in the hub's cache."""

    files: tuple[Path, ...]
    commit: str
    cached: bool  # nothing was downloaded


class _GivenUpError(Exception):
    """huggingface_hub tried again by itself, and gave up."""


class _DamagedError(Exception):
    """What came is not what the repository lists. It has been removed from the cache."""


# What huggingface_hub raises where something cannot be had; ValueError: an answer that is no JSON
_FAILURES = (httpx.HTTPError, OSError, ValueError, _GivenUpError, _DamagedError)


def fetch(repo: str, choose: Choose) -> Fetched:
    """The chosen files of the data set repository `repo` ("org/name"), downloaded or out of the cache.

    Where the hub cannot be reached, or no longer has the repository, a complete copy in the cache is used, and that is
    said. Raises DataError where there is none, or where the repository offers nothing to choose; ConfigError where the
    cache cannot be written.
    """
    with _library_warnings_said():
        kept = _in_cache(repo, choose)
        try:
            return _retrying(repo, partial(_online, repo, choose), WAITS if kept is None else ())
        except _FAILURES as error:
            if kept is not None:
                say(plain(f"{repo}: {_reason(error)}"))
                _say_cached(repo, kept)
                return kept
            if isinstance(error, OSError) and error.errno is not None:
                raise ConfigError(
                    f"the hub's cache cannot be used: {_reason(error)}",
                    where=str(constants.HF_HUB_CACHE),
                    fix="make room or give permission there, or set HF_HOME to another folder",
                ) from error
            raise DataError(
                f"{repo} cannot be had from the hub: {_reason(error)}",
                where=_page(repo),
                fix=_fix(error),
            ) from error


def _online(repo: str, choose: Choose) -> Fetched:
    commit, listed = _listing(repo)
    names = choose(list(listed))
    files, missing = [], []
    try:
        for name in names:
            _remove_unless_whole(repo, commit, listed[name])
            if hf_hub_download(repo, name, repo_type="dataset", revision=commit, dry_run=True).will_download:
                missing.append(name)
        if missing:
            size = sum(listed[name].size or 0 for name in missing)
            say(plain(f"downloading {len(missing)} of {len(names)} files, {_megabytes(size)}: {repo}@{commit[:8]}"))
        for name in names:
            files.append(Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit)))
            if name in missing:
                _check(files[-1], listed[name])
        with disable_progress_bars():  # downloads nothing more; notes commit and listing for a time without a network
            snapshot_download(repo, repo_type="dataset", allow_patterns=[escape(name) for name in names])
    except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: of hf_xet, which has no errors of its own
        raise _GivenUpError(f"the connection was lost again and again ({first_line(error)})") from error
    fetched = Fetched(files=tuple(files), commit=commit, cached=not missing)
    if fetched.cached:
        _say_cached(repo, fetched)
    return fetched


def _listing(repo: str) -> tuple[str, dict[str, RepoSibling]]:
    """The commit that the repository is at, and what it holds by name."""
    try:
        info = HfApi().dataset_info(repo, files_metadata=True, timeout=LISTING_TIMEOUT)
    except httpx.HTTPError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # the page of a hotel's network, for instance
        raise ValueError("the answer is no listing of a data set") from error
    listed = {one.rfilename: one for one in info.siblings or []}
    for name in listed:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
            raise DataError(
                f"{repo} lists a file whose name would leave the cache: {name!r}",
                where=_page(repo),
                fix="do not use this repository; tell the hub about it",
            )
    if info.sha is None or not COMMIT.fullmatch(info.sha):
        raise ValueError(f"the commit is said to be {info.sha!r}")
    return info.sha, listed


def _in_cache(repo: str, choose: Choose) -> Fetched | None:
    """The chosen files of the commit that was last seen, if all of them are in the cache; uses no network."""
    try:
        sizes = {one.path: one.size for one in get_cached_repo_tree(repo, repo_type="dataset")}
        names = choose(list(sizes))
        folder = Path(
            snapshot_download(
                repo, repo_type="dataset", local_files_only=True, allow_patterns=[escape(name) for name in names]
            )
        )
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError, DataError):
        return None
    files = tuple(folder / name for name in names)
    whole = all(path.stat().st_size == sizes[name] for path, name in zip(files, names, strict=True))
    return Fetched(files=files, commit=folder.name, cached=True) if whole else None


def _remove_unless_whole(repo: str, commit: str, listed: RepoSibling) -> None:
    """Out of the cache with a file of another size than the repository lists: something cut it off."""
    path = try_to_load_from_cache(repo, listed.rfilename, repo_type="dataset", revision=commit)
    if isinstance(path, str) and listed.size is not None and Path(path).stat().st_size != listed.size:
        say(plain(f"{repo}: {listed.rfilename} in the cache is not whole; it is fetched again"))
        _remove(Path(path))


def _check(path: Path, listed: RepoSibling) -> None:
    """Raises _DamagedError, and removes the file, unless it has the size and the hash that the repository lists."""
    fault = None
    size = path.stat().st_size
    if listed.size is not None and size != listed.size:
        fault = f"came with {size:,} bytes, listed are {listed.size:,}"
    elif listed.lfs is not None:
        fault = None if _digest(path, hashlib.sha256()) == listed.lfs.sha256 else "has not the SHA-256 that is listed"
    elif listed.blob_id is not None:
        git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)  # how git names the content of a file
        fault = None if _digest(path, git) == listed.blob_id else "has not the git hash that is listed"
    if fault:
        _remove(path)
        raise _DamagedError(f"{listed.rfilename} {fault}")


def _digest(path: Path, digest: hashlib._Hash) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def _remove(path: Path) -> None:
    """The file behind a name in the cache, and the name."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _say_cached(repo: str, fetched: Fetched) -> None:
    size = sum(path.stat().st_size for path in fetched.files)
    say(plain(f"in the cache: {repo}@{fetched.commit[:8]}, {_megabytes(size)}"))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _retrying(repo: str, attempt: Callable[[], Fetched], waits: Sequence[float]) -> Fetched:
    for wait in waits:
        try:
            return attempt()
        except _FAILURES as error:
            if not _may_pass(error):
                raise
            say(plain(f"{repo}: {_reason(error)}; trying again in {wait:g} s"))
            time.sleep(wait)
    return attempt()


def _may_pass(error: Exception) -> bool:
    """Whether trying again can help."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    # huggingface_hub says with a bare OSError that it received fewer or more bytes than were announced
    return isinstance(error, httpx.TransportError | _DamagedError) or (type(error) is OSError and error.errno is None)


def _reason(error: BaseException) -> str:
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return _reason(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return "its terms must be accepted first (it is gated)"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such data set, or it is private"
    if isinstance(error, HfHubHTTPError):
        return f"the server answers with HTTP {error.response.status_code}"
    if isinstance(error, httpx.TransportError):
        return f"no connection ({error})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})"
    return first_line(error)


def _page(repo: str) -> str:
    return f"{constants.ENDPOINT}/datasets/{repo}"


def _fix(error: BaseException) -> str:
    if isinstance(error, GatedRepoError):
        return "accept them on that page in a browser, then `hf auth login`"
    return "check the name and the network; or get its files by other means, and give them or their folder as a path"


@contextmanager
def _library_warnings_said() -> Iterator[None]:
    """What huggingface_hub warns of while it tries again by itself goes through `say`, without its long addresses."""

    class Says(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = re.sub(r"https?://\S+", "the hub", " ".join(record.getMessage().split()))
            say(plain(f"huggingface_hub: {text}"))

    logger = logging.getLogger("huggingface_hub")
    before = logger.handlers
    logger.handlers = [Says(logging.WARNING)]
    try:
        yield
    finally:
        logger.handlers = before
