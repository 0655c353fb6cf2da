"""What the site shows and docs/ does not hold: files from elsewhere in the checkout, and what the code says itself.

mkdocs calls `on_files` before it reads a page, and `on_page_markdown` for each (mkdocs.yml names this file).
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import posixpath
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastft_kernels
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fastft
from fastft import cli

ROOT = Path(__file__).resolve().parent.parent

OUTSIDE = {
    "index.md": "README.md",
    "kernels.md": "kernels/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "profile.md": "benchmarks/results/profile.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages that are files of the checkout, which a code host shows where they lie."""

_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?\)")
_PLACES = {source: page for page, source in OUTSIDE.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside of docs/."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """The page with what the code says in its place, and with links that lead to pages of the site."""
    name = page.file.src_uri
    for mark, made in MADE.items():
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return links_on_site(markdown, posixpath.dirname(OUTSIDE.get(name, f"docs/{name}")))


def links_on_site(markdown: str, folder: str) -> str:
    """Turns links between files of the checkout, seen from `folder` in it, into links between pages of the site."""

    def turned(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        place = _PLACES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else target)
        return f"{match[1]}{place}{match[3] or ''})"

    return _LINK.sub(turned, markdown)


def commands() -> str:
    """Each command with the options that its `--help` lists."""
    os.environ["COLUMNS"] = "80"
    parts = [_block(_said("--help"))]
    for name in cli.COMMANDS:
        parts += [f"## fastft {name}", _block(_said(name, "--help"))]
    return "\n\n".join(parts)


def _said(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        cli.main(arguments)
    return re.sub(r"[\x00-\x08\x0b-\x1f]", "", said.getvalue()).strip()  # control characters of jsonargparse's own


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


def names() -> str:
    """The public names of both packages; mkdocstrings puts their docstrings in."""
    parts = []
    for package in (fastft, fastft_kernels):
        parts += [f"## {package.__name__}", inspect.getdoc(package) or ""]
        for name in package.__all__:
            thing = getattr(package, name)
            heading = f'heading: "{package.__name__}.{name}"'
            options = f'    options:\n      {heading}\n      toc_label: "{name}"\n      heading_level: 3'
            parts.append(f"::: {thing.__module__}.{thing.__qualname__}\n{options}")
    return "\n\n".join(parts)


def rooms() -> str:
    """The packages of fastft from the bottom up, each with its door's docstring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one.get("containers") == ["fastft"])
    parts = []
    for name in [name.strip() for layer in reversed(layers) for name in re.split(r"[|:]", layer)]:
        door = ROOT / "fastft" / name / "__init__.py"
        module = door if door.is_file() else ROOT / "fastft" / f"{name}.py"
        text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
        parts += [f"## `{name if module == door else module.name}`", text]
    return "\n\n".join(parts)


MADE: dict[str, Callable[[], str]] = {
    "<!-- commands -->": commands,
    "<!-- names -->": names,
    "<!-- rooms -->": rooms,
}
"""What stands in a page where the code's own words belong, and what makes them."""
