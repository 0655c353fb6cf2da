"""The mark of tests that call C for CPUs."""

from __future__ import annotations

import pytest
from fastft_kernels.cpu import library

# Switched off where there is nothing to test: without a compiler, on Windows, or with FASTFT_COMPILED=0. C that does
# not compile is no such reason: tests/kernels/test_support.py fails where a compiler is and no compiled code.
needs_compiled = pytest.mark.skipif(
    library.why_not() is not None,
    reason=f"no compiled code: {library.why_not()}",
)
