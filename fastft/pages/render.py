"""HTML pages that need nothing but themselves: a template, its styles, its scripts and its data become one file.

A page says in its own policy that it asks for nothing and runs no script but those that it was made with, whose hashes
stand there: text of a run that should ever become markup could not act. All text is escaped by jinja2 as well.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fastft.common.files import write_text
from fastft.common.shell import command

_THEME = "theme.js"  # runs before the page is drawn, so that it does not change its colours before one's eyes


def write_page(path: Path, template: str, *, styles: Sequence[str], scripts: Sequence[str], **context: Any) -> None:
    """Writes a template of `fastft/pages/templates` as one HTML file.

    Args:
        styles: files of the templates' folder, in the order in which they go into the page.
        scripts: the same; they run when the page is there.
        context: what the template's names stand for.
    """
    script = "\n".join(map(_source, scripts))
    page = _environment().get_template(template)
    text = page.render(
        style=Markup("\n".join(map(_source, styles))),
        theme=Markup(_source(_THEME)),
        script=Markup(script),
        policy=_policy(_source(_THEME), script),
        **context,
    )
    # Half of a surrogate pair can stand in the JSON of a response, but not in a UTF-8 page.
    write_text(path, text.encode(errors="replace").decode())


def embedded(value: Any) -> Markup:
    """A value as JSON that can stand in a `<script type="application/json">`, whatever its texts hold."""
    text = json.dumps(value)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def number(value: Any, digits: int = 2) -> str:
    """A figure for people, a dash where there is none."""
    if value is None:
        return "–"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
    return text.replace("-", "−")


def signed(value: float) -> str:
    """A difference for people."""
    return f"{value:+.2f}".replace("-", "−")


def chance(p: float) -> str:
    """A p-value for people."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float | None) -> str:
    """Seconds for people: `0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds is None:
        return "not recorded"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(command=command)
    environment.filters.update(number=number, duration=duration, signed=signed, embedded=embedded, chance=chance)
    return environment


@cache
def _source(name: str) -> str:
    return files("fastft.pages").joinpath("templates", name).read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"
