"""Kernels with a planted fault: a test that they do not fail proves nothing."""

from __future__ import annotations

import ast
import contextlib
import inspect
import linecache
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def mutant(kernel: Any, old: str, new: str) -> Iterator[Any]:
    """Within it, a kernel (or a jit function that kernels call) has `new` in place of each `old`, in its module and in
    those that import it.

    Raises:
        AssertionError: the kernel's source does not hold `old`.
    """
    function = kernel.fn
    module = sys.modules[function.__module__]
    source = _source(module, function.__name__)
    assert old in source, f"{function.__name__} has no {old!r}"
    name = f"<mutant of {function.__name__}: {new}>"
    text = source.replace(old, new)
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace = vars(module)
    before = namespace[function.__name__]
    users = [
        (other, key)
        for name_of_other, other in list(sys.modules.items())
        if name_of_other.startswith("fastft_kernels") or other is module
        for key, value in vars(other).items()
        if value is before
    ]
    try:
        exec(compile(text, name, "exec"), namespace)
        planted = namespace[function.__name__]
        for user, key in users:
            setattr(user, key, planted)
        yield planted
    finally:
        for user, key in users:
            setattr(user, key, before)
        linecache.cache.pop(name, None)


def _source(module: ModuleType, name: str) -> str:
    """The source of a decorated function of a module, its decorator included."""
    text = inspect.getsource(module)
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno]) + "\n"
    raise AssertionError(f"{module.__name__} has no function {name}")
