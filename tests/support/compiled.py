"""The mark of tests that call C for CPUs."""

from __future__ import annotations

import pytest
from fastft_kernels.cpu import library

needs_compiled = pytest.mark.skipif(
    # Without a compiler, on Windows, or switched off there is none to test. That C which does not compile skips nothing
    # in silence is test_support's affair.
    library.why_not() is not None,
    reason=f"no compiled code: {library.why_not()}",
)
