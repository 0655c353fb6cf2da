from __future__ import annotations

from typing import Any

import pytest
from ollama_stub import (
    Action,
    OllamaStub,
    body,
    hang_after,
    lines,
    piece,
    reset_after,
    says,
    status,
    unused_url,
)

from fastft.errors import EXIT_NO_JUDGE, JudgeUnavailable, UserError
from fastft.judge import Judgement, OllamaJudge, checked_url, judge_prompt, judgement_key

ENTRY = {
    "instruction": "Name the plural.",
    "input": "goose",
    "output": "The plural is geese.",
    "model_response": "The plural is gooses.",
}


def judge_of(stub: OllamaStub, **options: Any) -> OllamaJudge:
    return OllamaJudge(stub.url, **{"pause": 0.001, "timeout": 5.0, **options})


def judged(*actions: Action, **options: Any) -> tuple[Judgement, int]:
    """The judgement under a script, and how many requests it took."""
    with OllamaStub(*actions) as stub:
        return judge_of(stub, **options).score(ENTRY), len(stub.asked)


def test_the_payload_is_the_books() -> None:
    with OllamaStub(says("85")) as stub:
        judge_of(stub).score(ENTRY)
    content = (
        "Given the input `Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nName the plural.\n\n### Input:\ngoose` and correct output `The plural is "
        "geese.`, score the model response `The plural is gooses.` on a scale from 0 to 100, where 100 is the best "
        "score. Respond with the integer number only."
    )
    assert stub.asked == [
        {
            "model": "llama3",
            "messages": [{"role": "user", "content": content}],
            "options": {"seed": 123, "temperature": 0, "num_ctx": 2048},
        }
    ]


def test_an_entry_without_input_has_no_input_section() -> None:
    assert "### Input" not in judge_prompt({**ENTRY, "input": ""})


def test_a_streamed_answer_is_put_together() -> None:
    judgement, requests = judged(says(" 8", "5", "\n"))
    assert (judgement.score, judgement.raw, judgement.reason, judgement.answered) == (85, " 85\n", None, True)
    assert requests == 1
    assert "reason" not in judgement.as_json()


def test_an_answer_in_one_last_line_counts() -> None:
    assert judged(lines(piece("42", done=True)))[0].score == 42


def test_lines_split_anywhere_are_joined() -> None:
    whole = piece("7") + b"\n" + piece("5", done=True)
    assert judged(lines(whole[:9], whole[9:40], whole[40:]))[0].score == 75


@pytest.mark.parametrize("text", ["0", "100", "+7", "-0"])
def test_the_edges_of_the_range_are_scores(text: str) -> None:
    assert judged(says(text))[0].score == int(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Score: 85", "not an integer: 'Score: 85'"),
        ("85.0", "not an integer: '85.0'"),
        ("", "not an integer: ''"),
        ("85\nbecause", r"not an integer: '85\nbecause'"),
        ("101", "not in 0..100: 101"),
        ("-1", "not in 0..100: -1"),
    ],
)
def test_a_read_answer_that_is_no_score_is_kept_and_not_asked_again(text: str, reason: str) -> None:
    judgement, requests = judged(says(text), says("50"))
    assert (judgement.score, judgement.raw, judgement.reason, judgement.answered) == (None, text, reason, True)
    assert requests == 1


FAILURES = [
    (lines(piece("8"), b'{"error": "model runner\\nstopped"}\n'), "the server reported an error: model runner", "8"),
    (lines(piece("8")), "ended without done:true", "8"),
    (lines(), "ended without done:true", ""),
    (lines(piece("8"), b"<html>\n"), "not a JSON object", "8"),
    (lines(b"[1]\n"), "not a JSON object", ""),
    (lines(b'{"message": {"content": 8}, "done": true}\n'), "no text in message.content", ""),
    (lines(b'{"message": "8", "done": true}\n'), "no text in message.content", ""),
    (body(b"\xff\xfe\x00garbage"), "not a JSON object", ""),
    (status(503, "server busy"), "HTTP 503: server busy", ""),
    (status(500, "unexpected"), "HTTP 500: unexpected", ""),
    (reset_after(piece("8")), "", "8"),
    (hang_after(piece("8")), "timed out", "8"),
]


@pytest.mark.parametrize(("action", "reason", "raw"), FAILURES)
def test_a_failed_request_is_retried_twice_and_then_explained(action: Action, reason: str, raw: str) -> None:
    judgement, requests = judged(action, timeout=0.15)
    assert (judgement.score, judgement.raw, judgement.answered) == (None, raw, False)
    assert judgement.reason
    assert reason in judgement.reason
    assert "\n" not in judgement.reason
    assert " object at 0x" not in judgement.reason
    assert requests == 3


@pytest.mark.parametrize(("action", "reason", "raw"), FAILURES)
def test_a_failure_that_passes_leaves_no_trace(action: Action, reason: str, raw: str) -> None:
    judgement, requests = judged(action, says("90"), timeout=0.15)
    assert (judgement.score, judgement.raw, judgement.reason) == (90, "90", None)
    assert requests == 2


@pytest.mark.parametrize(("code", "asked"), [(400, 1), (403, 1), (404, 1), (302, 1), (429, 3), (408, 3)])
def test_only_what_may_pass_is_retried(code: int, asked: int) -> None:
    judgement, requests = judged(status(code, "model 'llama3' not found"))
    assert judgement.reason == f"HTTP {code}: model 'llama3' not found"
    assert requests == asked


def test_an_endless_answer_ends_at_the_total_timeout() -> None:
    judgement, _ = judged(lines(*[piece("1")] * 2000), total_timeout=0.0)
    assert judgement.reason == "no whole answer within 0 s"


def test_nothing_listening_is_a_failed_request() -> None:
    judgement = OllamaJudge(unused_url(), pause=0.001).score(ENTRY)
    assert judgement.reason == "Connection refused"
    assert not judgement.answered


@pytest.mark.parametrize("response", ["", " \n\t"])
def test_an_empty_response_scores_zero_without_a_call(response: str) -> None:
    judgement = OllamaJudge(unused_url()).score({**ENTRY, "model_response": response})
    assert (judgement.score, judgement.reason, judgement.answered) == (0, "empty response", True)


def test_half_a_surrogate_pair_in_an_answer_can_be_written() -> None:
    judgement, _ = judged(lines(b'{"message": {"content": "\\ud83d"}, "done": true}\n'))
    judgement.raw.encode("utf-8")
    assert judgement.score is None


def test_a_proxy_from_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, unused_url())
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert judged(says("85"))[0].score == 85


@pytest.mark.parametrize("model", ["llama3", "llama3:latest", "Llama3", "team/judge:8b", "host:5000/judge"])
def test_check_finds_the_model(model: str) -> None:
    with OllamaStub(models=["llama3:latest", "team/judge:8b", "host:5000/judge:latest"]) as stub:
        OllamaJudge(stub.url, model).check()


@pytest.mark.parametrize("model", ["llama3:8b", "llama", "judge"])
def test_check_names_the_pull_that_is_missing(model: str) -> None:
    with OllamaStub(models=["llama3:latest", "team/judge:8b"]) as stub:
        judge = OllamaJudge(stub.url, model)
        with pytest.raises(JudgeUnavailable, match=f"`ollama pull {model}`$") as caught:
            judge.check()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == EXIT_NO_JUDGE


def test_check_says_how_to_start_a_server() -> None:
    url = unused_url()
    with pytest.raises(JudgeUnavailable, match="`ollama serve`") as caught:
        OllamaJudge(url).check()
    assert f"{url} (Connection refused)" in str(caught.value)


def test_no_password_is_shown() -> None:
    with pytest.raises(JudgeUnavailable) as caught:
        OllamaJudge(unused_url().replace("://", "://me:secret@")).check()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("action", [status(500, "x"), body(b"It works!"), body(b"{}"), body(b"[]"), status(301, "x")])
def test_another_server_is_not_taken_for_ollama(action: Action) -> None:
    with OllamaStub() as stub:
        stub.get_override = action
        with pytest.raises(JudgeUnavailable, match="does not answer as an Ollama server"):
            OllamaJudge(stub.url).check()


@pytest.mark.parametrize(
    "url",
    ["", "localhost:11434", "ftp://host", "http://", "http://:11434", "http://host:0", "http://host:99999",
     "http://host:port", "http://ho st", "http://host\n", "http://[::1", "http://a..b", "http://host?x=1"],
)  # fmt: skip
def test_an_address_of_another_form_is_the_users_mistake(url: str) -> None:
    with pytest.raises(UserError, match="expected http://HOST:PORT"):
        OllamaJudge(url)


@pytest.mark.parametrize("url", ["http://host:1/", "http://host:1/api/chat", "http://host:1/api/chat/"])
def test_the_books_address_means_the_server(url: str) -> None:
    assert checked_url(url) == "http://host:1"


def test_the_key_follows_model_and_prompt_and_not_the_address() -> None:
    key = judgement_key("llama3", judge_prompt(ENTRY))
    assert key == judgement_key("llama3:latest", judge_prompt(ENTRY))
    with OllamaStub(says("85")) as stub:
        assert judge_of(stub).score(ENTRY).key == judge_of(stub, model="llama3:latest").score(ENTRY).key == key
    others = {judgement_key("phi3", judge_prompt(ENTRY))}
    others |= {judgement_key("llama3", judge_prompt({**ENTRY, name: "x"})) for name in ENTRY}
    assert len(others | {key}) == 2 + len(ENTRY)
