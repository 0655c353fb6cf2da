"""What may be installed beside fastft: a package, or one line that says how to get it."""

from __future__ import annotations

import importlib
from types import ModuleType

from fastft.common.errors import UserError


def need(package: str, *, extra: str) -> ModuleType:
    """The package of that name, imported now.

    Args:
        package: its import name.
        extra: of `pip install fastft[...]`, what installs it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise UserError(f"{error.name} is not installed, expected it here: pip install 'fastft[{extra}]'") from None
