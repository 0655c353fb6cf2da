"""Makes the interpreter of Triton 3.6 right for numpy 2.4.

A kernel's scalar is an array of one element there, which `range` asks for as an integer. From 2.4 on numpy makes an
integer of arrays without axes alone; Triton 3.7 does what is done here.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def install() -> None:
    """Patches the interpreter, for the rest of the process."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
