"""What all tests share."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # its workers, and the processes that tests start, inherit it
    _cache = tempfile.mkdtemp(prefix="specforge-tests-")
    os.environ["XDG_CACHE_HOME"] = _cache  # or each tiny target would stay in the user's cache
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
