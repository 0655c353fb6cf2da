"""A template of fixed parts as a program of Go's text/template, as Ollama renders prompts with.

Ollama gives it `.Messages`, each with `.Role` and `.Content`, both for a conversation and for a single prompt, where
neighbours of one role have become one message already (`collate` in its template/template.go). All fixed text stands
in quoted constants: so no brace, quote or line end of a template means anything to Go, or to the Modelfile around it.
"""

from __future__ import annotations

from fastft.data.prompts import Template


def as_go(template: Template, end_of_text: str) -> str:
    """The program that writes what `template` writes, in one line.

    An answer in a conversation gets the response header in front, unless it has it already, with or without white space
    before it: the model writes the header itself, and clients send back what it wrote. A conversation that ends with an
    answer is left open there, for the model to go on with it.

    Args:
        template: of fixed parts.
        end_of_text: the tokenizer's, which ends an answer where the template has no token of its own for it.
    """
    t = template
    turns = {
        "system": _say(t.before_system) + "{{ .Content }}" + _say(t.after_system),
        "user": _between(t) + _say(t.before_instruction) + "{{ .Content }}" + _say(t.after_instruction),
        "assistant": _say(t.before_response) + _answer(t),
    }
    written = "{{ else }}".join(f'{{{{ if eq .Role "{role}" }}}}{text}' for role, text in turns.items())
    # An answer is closed when something follows it, as only then it is known to be whole.
    after_answer = f'{{{{ if eq $before "assistant" }}}}{_say((t.end or end_of_text) + t.after_response)}{{{{ end }}}}'
    return (
        _say(t.begin)
        + _own_system(t)
        + '{{ $before := "" }}{{ range .Messages }}'
        + after_answer
        + written
        + "{{ end }}" * len(turns)
        + "{{ $before = .Role }}{{ end }}"
        + (f'{{{{ if ne $before "assistant" }}}}{_say(t.before_response)}{{{{ end }}}}' if t.before_response else "")
    )


def _own_system(t: Template) -> str:
    if not t.system:
        return ""
    said = _say(t.before_system + t.system + t.after_system)
    return f'{{{{ if ne (index .Messages 0).Role "system" }}}}{said}{{{{ end }}}}'


def _between(t: Template) -> str:
    return f'{{{{ if eq $before "assistant" }}}}{_say(t.between)}{{{{ end }}}}' if t.between else ""


def _answer(t: Template) -> str:
    if not (header := t.response_header):
        return "{{ .Content }}"
    bare = header.lstrip()
    said = _say(header)
    if bare not in ("", header):
        said = _unless_it_begins(bare, said, _say(header.removesuffix(bare)))
    return _unless_it_begins(header, said, "") + "{{ .Content }}"


def _unless_it_begins(begin: str, otherwise: str, then: str) -> str:
    n = len(begin.encode())  # Go counts and cuts bytes
    found = f"{{{{ if ne (slice .Content 0 {n}) {_quoted(begin)} }}}}{otherwise}{{{{ else }}}}{then}{{{{ end }}}}"
    return f"{{{{ if lt (len .Content) {n} }}}}{otherwise}{{{{ else }}}}{found}{{{{ end }}}}"


def _say(text: str) -> str:
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _quoted(text: str) -> str:
    """A constant of Go's in printable ASCII: a Modelfile loses characters that Go takes for unprintable."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    known = {"\n": r"\n", "\t": r"\t", "\r": r"\r", '"': r"\"", "\\": r"\\"}
    if character in known:
        return known[character]
    code = ord(character)
    if 0x20 <= code < 0x7F:
        return character
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
