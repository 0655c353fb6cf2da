"""Commands as they can be pasted into a shell, whatever the names of files are."""

from __future__ import annotations

import shlex
from typing import Any


def command(called: str, /, **options: Any) -> str:
    """`fastft score --run 'out/my run' --name t1.0`.

    Options that are None are left out, those that are True stand alone, and a list gives its values behind each other.
    """
    words = ["fastft", called]
    for option, value in options.items():
        if value is None:
            continue
        words.append(f"--{option}")
        if value is not True:
            words += map(str, value if isinstance(value, list | tuple) else [value])
    return shlex.join(words)
