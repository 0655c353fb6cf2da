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
    """Within it, a module's kernel (or the jit function that kernels call) has `new` in place of each `old`.

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
    try:
        exec(compile(text, name, "exec"), namespace)
        yield namespace[function.__name__]
    finally:
        namespace[function.__name__] = before
        linecache.cache.pop(name, None)


def _source(module: ModuleType, name: str) -> str:
    """The source of a decorated function of a module, its decorator included."""
    text = inspect.getsource(module)
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno]) + "\n"
    raise AssertionError(f"{module.__name__} has no function {name}")
