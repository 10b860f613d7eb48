"""What can go wrong for a user. Each error says what, where and how to mend; the command then exits with code 2."""

from __future__ import annotations

import errno
import os

TOLD, UNTOLD = 2, 3  # exit codes of a rank that ends with an error: it has told the user why; another one will


class SpecforgeError(Exception):
    """A fault that the user can mend.

    what   one sentence: what is wrong
    where  the file, line, key or flag
    fix    what to do next
    """

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  fix:   {self.fix}"


class ConfigError(SpecforgeError):
    """A setting that is wrong, or that contradicts another."""


class DataError(SpecforgeError):
    """Conversations that cannot be read, or from which nothing can be learned."""


class EngineError(SpecforgeError):
    """The target model cannot be loaded or run, or failed its self-check."""


class OutOfMemoryError(EngineError):
    """A pass of the target did not fit into memory. All ranks of the replica raise it together and can go on."""


class StoreError(SpecforgeError):
    """A feature store that is damaged, or that belongs to something else."""


class TrainingError(SpecforgeError):
    """A run that cannot go on."""


class CheckpointError(SpecforgeError):
    """A draft folder or checkpoint that cannot be used."""


def remedy(error: BaseException) -> str:
    """Return what helps if the machine ran out of open files or memory, else ""."""
    files = isinstance(error, OSError) and error.errno in LACKS_FILES
    if files or os.strerror(errno.EMFILE) in str(error):
        return "let a process open more files: ulimit -n 4096"
    return "close what else takes memory, or use a machine with more" if is_out_of_memory(error) else ""


def first_line(error: BaseException) -> str:
    """What a library's error says, short; its type where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0][:300] if said else type(error).__name__


LACKS_FILES = (errno.EMFILE, errno.ENFILE)
LACKS_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",  # torch on a CPU
    "out of memory",  # CUDA's own calls and torch on it; SGLang's pools of KV cache and of requests
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """How a lack of memory shows in the libraries that run the target and train the draft."""
    said = str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in said for s in LACKS_MEMORY))
