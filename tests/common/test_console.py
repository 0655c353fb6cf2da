"""What others have written does not reach the terminal as a command."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from ollama_stub import OllamaStub, pull_lines, says, status
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from small_records import made_records

from fastft.cli import main
from fastft.common import console
from fastft.common.console import SafeConsole, printable
from fastft.common.errors import EXIT_DONE

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


HOSTILE = CLEARS + "\r\nwarning: forged\x9b31m\u202e"


def wrong_version(stub: OllamaStub) -> None:
    stub.get_override = lambda handler: handler.json(200, {"version": "0.9", "models": HOSTILE})


def refuses(stub: OllamaStub) -> None:
    stub.get_override = status(401, HOSTILE)


def cannot_chat(stub: OllamaStub) -> None:
    stub.shown = {"capabilities": [HOSTILE]}


def is_old(stub: OllamaStub) -> None:
    stub.version = "0.1.0" + HOSTILE


def has_another_model(stub: OllamaStub) -> None:
    stub.models = {HOSTILE: "x"}


def pulls(stub: OllamaStub) -> None:
    stub.models = {}
    stub.pull = pull_lines({"status": HOSTILE}, {"error": HOSTILE})


OPENAI = ("--judge", "openai")


@pytest.mark.parametrize(
    ("prepare", "options", "reply"),
    [
        (lambda _: None, (), says(HOSTILE)),
        (lambda _: None, (), says("85" + HOSTILE)),
        (lambda _: None, (), status(500, HOSTILE)),
        (lambda _: None, OPENAI, status(400, "no temperature " + HOSTILE)),
        (wrong_version, (), says("1")),
        (refuses, (), says("1")),
        (refuses, OPENAI, says("1")),
        (cannot_chat, (), says("1")),
        (is_old, ("--judge_style", "reason"), says("1")),
        (has_another_model, OPENAI, says("1")),
        (pulls, ("--pull",), says("1")),
    ],
)
def test_what_a_judge_and_a_run_say_is_no_command_and_no_line_of_ours(
    prepare: Callable[[OllamaStub], object],
    options: tuple[str, ...],
    reply: Callable[[object], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        run.mkdir()
        entry = {"instruction": HOSTILE, "input": "", "output": HOSTILE, "category": HOSTILE}
        (run / "responses.json").write_text(json.dumps([{**entry, "model_response": run.name + HOSTILE}]))
    with OllamaStub(reply) as stub:
        prepare(stub)
        judge = ("--judge_url", stub.url, "--judge_retries", "0", *options)
        for run in runs:
            assert main(["score", "--run", str(run), *judge]) == EXIT_DONE
        assert main(["compare", *map(str, runs), "--pairwise", *judge[: 4 + 2 * (options == OPENAI)]]) == EXIT_DONE
    said = "".join(capsys.readouterr())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said)
    assert not re.search(r"^(warning: )?forged", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("done", "at", "left"), [(1, 10.0, "0:00:30 left"), (3, 10.0, "0:00:03 left"), (1, 7200.0, "6:00:00 left")]
)
def test_a_line_says_the_time_that_is_left(
    done: int, at: float, left: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, *[at] * 9])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.meter("training", 9, done=5) as shown:
        shown.advance("loss 2", by=done)
    assert capsys.readouterr().err == f"training {5 + done}/9 loss 2, {left}\n"


def test_at_its_end_nothing_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with console.meter("training", 2) as shown:
        shown.advance("loss 2", by=2)
    assert capsys.readouterr().err == "training 2/2 loss 2\n"


def test_a_bars_note_is_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    narrow = SafeConsole(file=file, force_terminal=True, width=80, highlight=False, color_system=None)
    monkeypatch.setattr(console, "console", narrow)
    note = "loss 2.345, lr 5e-05, epoch 1, 12,345 tokens/s, 45.2 examples/s, 12.3 GiB"
    with console.meter("training", 234) as shown:
        shown.advance(note)
    assert set(note.split()) <= set(file.getvalue().split())
