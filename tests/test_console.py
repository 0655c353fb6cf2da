"""What others have written does not reach the terminal as a command."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from small_records import made_records

from fastft import console
from fastft.cli import main
from fastft.console import SafeConsole, printable

CLEARS = "a\x1b[2J\x1b]0;title\x07b"
SHOWN = r"a\x1b[2J\x1b]0;title\x07b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (CLEARS, SHOWN),
        ("\x9b31m", r"\x9b31m"),  # the 8-bit CSI
        ("right\rover\b\x7f", r"right\rover\x08\x7f"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("a\u200bb\ufeff\u2028", r"a\u200bb\ufeff\u2028"),
        ("half \ud800", r"half \ud800"),
        ("tab\tand\nnewline", "tab\tand\nnewline"),
        ("\u0627\u0644\u0639 \u05e9 na\u00efve \U0001f469\u200d\U0001f680 \u4e2d", None),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)
    assert printable(printable(text)) == printable(text)


def in_a_table(out: SafeConsole) -> None:
    table = Table("name", title=CLEARS)
    table.add_row(CLEARS)
    out.print(table)


def in_a_bar(out: SafeConsole) -> None:
    with Progress(console=out) as bar:
        bar.add_task(CLEARS)
        bar.console.print(CLEARS)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "show",
    [
        lambda out: out.print(CLEARS),
        lambda out: out.print(CLEARS, markup=False, style="red"),
        lambda out: out.print(Text(CLEARS, style="bold")),
        lambda out: out.print("before", Text(CLEARS)),
        in_a_table,
        in_a_bar,
    ],
)
def test_on_any_way_to_the_terminal(show: Callable[[SafeConsole], None], terminal: bool) -> None:
    file = io.StringIO()
    show(SafeConsole(file=file, force_terminal=terminal, width=120, highlight=False))
    assert r"\x1b[2J" in file.getvalue()
    own = re.sub(r"\x1b\[[\d;?]*[mhlKA]|\r", "", file.getvalue())  # rich's own: colours, the cursor
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", own)


def test_say_and_warn(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(CLEARS)
    console.warn(CLEARS)
    assert capsys.readouterr().err == f"{SHOWN}\nwarning: {SHOWN}\n"


def test_data_in_inspect_and_in_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.json"
    bad = [{"instruction": CLEARS, "output": "b", "category": CLEARS, CLEARS: 1}, {CLEARS: 1}]
    path.write_text(json.dumps([*bad, *made_records(28)]))
    assert main(["inspect", "--data", str(path)]) == 0
    assert main(["train", "--data", str(path), "--model", "pico", "--out", str(tmp_path / "out")]) == 2
    said = "".join(capsys.readouterr())
    assert "\x1b" not in said
    assert said.count(r"\x1b[2J") >= 4
