"""The text of a reply -> its answer, without the trace that a reasoning model thinks aloud before it.

A trace stands between marks of many makes: `<think>` (DeepSeek, Qwen), `<thinking>`, `<thought>`, `[THINK]` (Mistral),
`<seed:think>`, `◁think▷` (Kimi), `<|START_THINKING|>` (Cohere), `<|begin_of_thought|>`, `<|channel>thought` (Gemma),
and the channels of OpenAI's harmony format. Chat templates often put the first mark into the prompt: an end without a
beginning makes all before it the trace. A trace without an end is no answer, whatever numbers it holds.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_NAMES = r"seed:think|think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad"
_MARK = re.compile(
    rf"<(?P<angle>/?)\s{{0,3}}(?P<angle_name>{_NAMES})(?:\s[^<>]{{0,80}})?>"
    rf"|\[(?P<square>/?)(?P<square_name>{_NAMES})\]"
    rf"|◁(?P<triangle>/?)(?P<triangle_name>{_NAMES})▷"
    rf"|<\|(?P<pipe>/?)(?P<pipe_name>{_NAMES})\|>"
    r"|<\|(?P<word>begin_of|end_of|START|END)_(?P<word_name>thought|thinking)\|>"
    r"|<(?P<channel>\|channel>\s{0,9}thought\b|channel\|>)",
    re.IGNORECASE,
)
_ENDS = {"/", "end_of", "end", "channel|>"}

_HARMONY = re.compile(r"<\|(?:channel|message)\|>")
_HARMONY_MESSAGE = re.compile(
    r"<\|channel\|>\s{0,9}(?P<channel>\w{1,20})(?:(?!<\|message\|>).){0,200}<\|message\|>"
    r"(?P<body>.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.DOTALL,
)
# The same after a server has taken the special tokens out: "analysisWe need to ...assistantfinal85".
_BARE_HARMONY = re.compile(r"\A\s{0,9}(?:assistant)?(?:analysis|commentary)(?=[A-Z\"'(])")
_BARE_FINAL = re.compile(r"assistant\s{0,3}final")

_WRAPPED = re.compile(
    r"\A(?:<(?P<tag>answer|final_answer|final|response|output|solution)>(?P<inside>.*)</(?P=tag)>"
    r"|<\|(?:begin_of_solution|START_RESPONSE)\|>(?P<marked>.*?)(?:<\|(?:end_of_solution|END_RESPONSE)\|>)?)\Z",
    re.DOTALL | re.IGNORECASE,
)
_LEFT_OVER = re.compile(r"(?:\s{0,9}(?:<\|[a-z_]{1,30}\|>|</s>|<end_of_turn>|<eos>))+\s*\Z", re.IGNORECASE)


class Spoken(NamedTuple):
    """What of a reply is said to whoever asked."""

    text: str
    """The answer, without white space around it; empty where there is none."""
    thought: bool
    """Whether there was a trace."""
    ended: bool
    """False where the trace has no end: what looks like an answer is a part of it."""


def spoken(text: str) -> Spoken:
    """A reply without its trace, and without the tags and special tokens around its answer."""
    answer, thought, ended = _of_harmony(text) or _of_marks(text)
    answer = _LEFT_OVER.sub("", answer).strip()
    if wrapped := _WRAPPED.match(answer):
        answer = (wrapped["inside"] or wrapped["marked"] or "").strip()
    return Spoken(answer if ended else "", thought, ended)


def _of_marks(text: str) -> tuple[str, bool, bool]:
    """A trace ends with the first end of its own name: that it names other marks, or its own, says nothing."""
    kept: list[str] = []
    place, within, thought = 0, None, False
    for mark in _MARK.finditer(text):
        kind, name, ends = _named(mark)
        if within is None and not ends:
            kept.append(text[place : mark.start()])
            within = kind, name
        elif within is None:
            kept.clear()  # an end without a beginning: all that came before was thought
        elif ends and within == (kind, name):
            within = None
        else:
            continue
        place, thought = mark.end(), True
    if within is not None:
        return "", True, False
    return "".join([*kept, text[place:]]), thought, True


def _named(mark: re.Match[str]) -> tuple[str, str, bool]:
    """The make and the name of a mark, and whether it ends a trace."""
    if (channel := mark["channel"]) is not None:
        return "channel", "thought", channel in _ENDS
    kind = next(one for one in ("angle", "square", "triangle", "pipe", "word") if mark[f"{one}_name"] is not None)
    return kind, mark[f"{kind}_name"].casefold(), mark[kind].casefold() in _ENDS


def _of_harmony(text: str) -> tuple[str, bool, bool] | None:
    """The channel `final`; None where the text is in no such format."""
    if _HARMONY.search(text):
        messages = [(found["channel"].casefold(), found["body"]) for found in _HARMONY_MESSAGE.finditer(text)]
        answer = "".join(body for channel, body in messages if channel == "final")
        others = any(channel != "final" for channel, _ in messages)
        return answer, others, bool(messages) and messages[-1][0] == "final"
    if _BARE_HARMONY.match(text):
        *thoughts, answer = _BARE_FINAL.split(text)
        return answer, True, bool(thoughts)
    return None
