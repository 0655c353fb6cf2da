"""What tests share that start runs as commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import Launcher


@pytest.fixture(scope="module")
def launcher(folder: Path) -> Iterator[Launcher]:
    """What starts them, in the test file's own `folder`."""
    launcher = Launcher(folder)
    yield launcher
    launcher.close()
