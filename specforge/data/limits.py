"""What rendering a chat template may take: it is code of whoever made the tokenizer. transformers' sandbox keeps it
from Python, but not from loops in loops, and not from 'x' * 2000000000."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from jinja2 import TemplateError

SECONDS = 10.0  # a conversation takes milliseconds
MEMORY = 2 << 30  # bytes beyond what the process has
CHARACTERS = 64 << 20  # of the text
PAGE = os.sysconf("SC_PAGE_SIZE")


class TemplateLimitError(TemplateError):
    """A template that wants too much."""


@contextmanager
def limited() -> Iterator[None]:
    """Raises TemplateLimitError where the block takes more. Signals reach the main thread only; elsewhere there is no
    limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE + MEMORY
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    before = signal.signal(signal.SIGALRM, _expired)
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *known]), hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except MemoryError as error:
        raise TemplateLimitError(f"it wants more than {MEMORY >> 30} GiB of memory") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def _expired(which: int, frame: FrameType | None) -> NoReturn:
    raise TemplateLimitError(f"it wants more than {SECONDS:.0f} s for one conversation")
