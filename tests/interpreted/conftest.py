"""The kernels in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`, in a process of its own.

Kernels become interpreted ones when they are decorated, so the variable is set before anything is imported; without
it nothing here is collected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

if INTERPRETING:
    import interpreted_bf16
    import numpy_scalars
    import sanitizer
    import triton

    triton.knobs.compilation.front_end_debugging = True  # else a violation arrives as a text within another error
    interpreted_bf16.install()
    numpy_scalars.install()
    sanitizer.install()
    sanitizer.poison()

    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        for item in items:
            item.add_marker(pytest.mark.filterwarnings("error::RuntimeWarning"))

    @pytest.fixture(autouse=True)
    def no_float_atomics(request: pytest.FixtureRequest) -> Iterator[None]:
        before = sanitizer.statistics.float_atomics
        yield
        if request.node.get_closest_marker("adds_atomically") is None:
            assert sanitizer.statistics.float_atomics == before, "a float was added atomically: the order would count"
