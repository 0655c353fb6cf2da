"""The servers' protocols and the wire, each question by itself; `test_score.py` has the whole stage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from ollama_stub import (
    DIGEST,
    FAULTS,
    Action,
    Handler,
    OllamaStub,
    body,
    completes,
    lines,
    oddities,
    piece,
    pull_lines,
    refuses,
    says,
    status,
    thinks,
    unused_url,
    wire,
)

from fastft.common.errors import EXIT_NO_JUDGE, JudgeUnavailable, UserError
from fastft.judging.journal import Reply
from fastft.judging.ollama import OllamaServer
from fastft.judging.openai import OpenAIServer, key_from_environment
from fastft.judging.questions import first_question, num_ctx_for, second_question, token_bound, wider
from fastft.judging.wire import NoAnswerError, Patience

ENTRY = {
    "instruction": "Name the plural.",
    "input": "goose",
    "output": "The plural is geese.",
    "model_response": "The plural is gooses.",
}
CONTENT = (
    "Given the input `Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nName the plural.\n\n### Input:\ngoose` and correct output `The plural is "
    "geese.`, score the model response `The plural is gooses.` on a scale from 0 to 100, where 100 is the best "
    "score. "
)
BOOK = CONTENT + "Respond with the integer number only."
QUESTION = first_question(ENTRY)
KEY = "sk-very-secret"


def patience(**changes: Any) -> Patience:
    return Patience(**{"silence": 0.2, "loading": 0.2, "whole": 0.5, "retries": 2, "pause": 0.001, **changes})


def ollama(stub: OllamaStub | str, model: str = "llama3", **changes: Any) -> OllamaServer:
    return OllamaServer(stub if isinstance(stub, str) else stub.url, model, patience(**changes))


def openai(
    stub: OllamaStub | str, model: str = "llama3:latest", key: str | None = None, **changes: Any
) -> OpenAIServer:
    return OpenAIServer(stub if isinstance(stub, str) else stub.url, model, key, patience(**changes))


def asked(*actions: Action, **changes: Any) -> tuple[Reply | NoAnswerError, int]:
    """What came of a question under a script, and how many requests it took."""
    with OllamaStub(*actions) as stub:
        try:
            return ollama(stub, **changes).ask(QUESTION), len(stub.asked)
        except NoAnswerError as failure:
            return failure, len(stub.asked)


def failure_of(*actions: Action, **changes: Any) -> NoAnswerError:
    failure, _ = asked(*actions, **changes)
    assert isinstance(failure, NoAnswerError)
    return failure


def test_the_payload_is_the_books_with_a_bound_and_without_thoughts() -> None:
    with OllamaStub(says("85")) as stub:
        ollama(stub).ask(QUESTION)
    assert stub.asked == [
        {
            "model": "llama3",
            "messages": [{"role": "user", "content": BOOK}],
            "options": {"seed": 123, "temperature": 0, "num_ctx": 2048, "num_predict": 128},
            "think": False,
        }
    ]


def test_the_styles_differ_in_their_ending_and_their_schema() -> None:
    reason, again = first_question(ENTRY, "reason"), second_question(ENTRY)
    assert reason.prompt.startswith(CONTENT + "Respond with a JSON object: first `reason`")
    assert again.prompt == CONTENT + "Respond with a JSON object whose only member, `score`, is the integer number."
    assert reason.schema is not None
    assert list(reason.schema["properties"]) == ["reason", "score"]
    assert again.schema is not None
    assert list(again.schema["properties"]) == ["score"]
    assert first_question(ENTRY, rubric="Spelling counts.").prompt == (
        CONTENT + "Spelling counts. Respond with the integer number only."
    )


def test_a_schema_goes_into_format() -> None:
    question = second_question(ENTRY)
    with OllamaStub(says('{"score": 85}')) as stub:
        ollama(stub).ask(question)
    assert stub.asked[0]["format"] == question.schema


def test_an_entry_without_input_has_no_input_section() -> None:
    assert "### Input" not in first_question({**ENTRY, "input": ""}).prompt


def test_an_answer_comes_with_its_counts() -> None:
    reply, requests = asked(says(" 8", "5", "\n", done_reason="length"))
    assert reply == Reply(" 85\n", "length", 90, 2)
    assert requests == 1


@pytest.mark.parametrize("name", oddities("85"))
def test_a_strange_answer_that_is_whole_is_an_answer(name: str) -> None:
    reply, requests = asked(oddities("85")[name], whole=5.0)
    assert isinstance(reply, Reply)
    assert reply.content == "85"
    assert requests == 1


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_is_tried_again_and_then_explained_in_a_line(name: str) -> None:
    failure, requests = asked(FAULTS[name], retries=1)
    assert isinstance(failure, NoAnswerError)
    assert str(failure)
    assert "\n" not in str(failure)
    assert " object at 0x" not in str(failure)
    assert len(str(failure)) <= 200
    assert failure.partial.strip("8") in ("", "5")
    assert requests == 2


REASONS = {
    "hangs without a word": "timed out: nothing came for 0.2 s",
    "drips the answer for ever": "no whole answer within 0.5 s",
    "drips headers for ever": "no whole answer within 0.5 s",
    "HTTP 503, queue full": "HTTP 503: server busy, please try again. maximum pending requests exceeded",
    "HTTP 502 with a page": "HTTP 502: Bad Gateway",
    "an error in mid-stream": "the server reported an error: model runner has unexpectedly stopped",
    "the stream ends without done": "the stream ended without done:true",
    "done:false, not streamed": "the stream ended without done:true",
    "a huge line": "the answer is larger than 1024 KiB",
    "a huge answer": "the answer is larger than 1024 KiB",
    "a page under status 200": "a line of the stream is not a JSON object: b'<html>'",
    "a number for the text": "a line of the stream has no text in message.content: {'message': {'content': 8}, "
    "'done': True}",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_the_servers_or_the_networks(name: str) -> None:
    whole = 30.0 if "huge" in name else 0.5
    assert str(failure_of(FAULTS[name], retries=0, whole=whole)) == REASONS[name]


@pytest.mark.parametrize(("code", "requests"), [(400, 1), (401, 1), (403, 1), (404, 1), (302, 1), (429, 3), (408, 3)])
def test_only_what_may_pass_is_tried_again(code: int, requests: int) -> None:
    failure, seen = asked(status(code, "model 'llama3' not found"))
    assert str(failure) == f"HTTP {code}: model 'llama3' not found"
    assert seen == requests


def test_a_schema_that_is_refused_is_not_tried_again() -> None:
    with OllamaStub(status(500, "invalid format")) as stub:
        server = ollama(stub)
        with pytest.raises(NoAnswerError) as caught:
            server.ask(second_question(ENTRY))
        assert server.refuses_schema(caught.value)
        assert len(stub.asked) == 1
        with pytest.raises(NoAnswerError):  # without a schema it is a failure as any other
            server.ask(QUESTION)
        assert len(stub.asked) == 1 + 3


def test_pauses_grow_with_a_jitter_and_heed_the_server() -> None:
    waits = Patience(pause=1.0)
    for attempt, middle in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)):
        drawn = [waits.before_retry(attempt) for _ in range(50)]
        assert 0.5 * middle <= min(drawn) < max(drawn) <= 1.5 * middle
    assert waits.before_retry(0, asked_for=20.0) == 20.0
    assert waits.before_retry(0, asked_for=1e9) == 30.0


def test_retry_after_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert isinstance(asked(status(503, "busy", Retry_After="7"), status(503, "busy"), says("85"))[0], Reply)
    assert pauses[0] == 7
    assert pauses[1] < 1


def test_nothing_listening_is_a_failed_request() -> None:
    with pytest.raises(NoAnswerError, match=r"^Connection refused$"):
        ollama(unused_url()).ask(QUESTION)


def test_half_a_surrogate_pair_in_an_answer_can_be_written() -> None:
    reply, _ = asked(lines(b'{"message": {"content": "\\ud83d"}, "done": true}\n'))
    assert isinstance(reply, Reply)
    reply.content.encode("utf-8")


def test_a_proxy_from_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, unused_url())
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(asked(says("85"))[0], Reply)
    with OllamaStub(completes("85")) as stub:
        assert openai(stub).ask(QUESTION).content == "85"


def test_a_server_beyond_this_machine_is_reached_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in plays the proxy: it is asked for a host that does not exist."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with OllamaStub() as stub:
        monkeypatch.setenv("http_proxy", stub.url)
        stub.get_override = status(403, "no way out")
        with pytest.raises(JudgeUnavailable, match="API key"):
            openai("http://judge.invalid/v1").check()
        assert stub.gets == ["http://judge.invalid/v1/models"]


# The check: server, version, model


@pytest.mark.parametrize("model", ["llama3", "llama3:latest", "Llama3", "team/judge:8b", "host:5000/judge"])
def test_check_finds_the_model_and_what_is_known_of_it(model: str) -> None:
    with OllamaStub(models=["llama3:latest", "team/judge:8b", "host:5000/judge:latest"]) as stub:
        known = ollama(stub, model).check()
    assert (known.digest, known.version, known.takes_schema) == (DIGEST, "0.9.0", True)
    assert known.identity == f"ollama {DIGEST}"
    assert known.context_length == (None if model == "Llama3" else 8192)


@pytest.mark.parametrize("model", ["llama3:8b", "llama", "judge"])
def test_check_names_the_pull_that_is_missing(model: str) -> None:
    with OllamaStub(models=["llama3:latest", "team/judge:8b"]) as stub, pytest.raises(JudgeUnavailable) as caught:
        ollama(stub, model).check()
    assert str(caught.value) == (
        f"the Ollama server at {stub.url} has no model {model}: get it with `ollama pull {model}`, or give --pull"
    )
    assert caught.value.exit_status == EXIT_NO_JUDGE


def test_check_refuses_a_model_that_cannot_chat() -> None:
    with OllamaStub() as stub:
        stub.shown = {"capabilities": ["embedding"]}
        with pytest.raises(JudgeUnavailable, match=r"llama3 .* cannot chat \(it can: embedding\): .*--judge_model$"):
            ollama(stub).check()


@pytest.mark.parametrize(
    ("version", "takes"), [("0.4.9", False), ("0.5.0", True), ("0.5.0-rc1", True), ("1.0", True), ("0.0.0", True)]
)
def test_check_knows_since_when_ollama_takes_schemas(version: str, takes: bool) -> None:
    with OllamaStub() as stub:
        stub.version = version
        assert ollama(stub).check().takes_schema is takes


@pytest.mark.parametrize("shown", [{}, {"model_info": 3}, {"model_info": {"llama.context_length": "x"}}])
def test_a_server_that_does_not_say_how_long_its_context_is(shown: dict[str, Any]) -> None:
    with OllamaStub() as stub:
        stub.shown = shown
        assert ollama(stub).check().context_length is None


def test_a_name_without_a_digest_means_this_server_alone() -> None:
    with OllamaStub(models={"llama3:latest": ""}) as stub:
        assert ollama(stub).check().identity == f"ollama {stub.url} llama3:latest"


def test_check_says_how_to_start_a_server() -> None:
    url = unused_url()
    with pytest.raises(JudgeUnavailable, match="`ollama serve`") as caught:
        ollama(url).check()
    assert f"{url} (Connection refused)" in str(caught.value)


def test_no_password_is_shown() -> None:
    address = unused_url().replace("://", "://me:secret@")
    for server in (ollama(address), openai(address)):
        with pytest.raises(JudgeUnavailable) as caught:
            server.check()
        assert "secret" not in f"{caught.value} {server.where}"
    with pytest.raises(UserError) as mistake:
        ollama(address + "?x=1")
    assert "secret" not in str(mistake.value)


NO_OLLAMA = [status(500, "x"), status(404, "x"), body(b"It works!"), body(b"{}"), body(b"[]"), status(301, "x")]


@pytest.mark.parametrize("action", NO_OLLAMA)
def test_another_server_is_not_taken_for_ollama(action: Action) -> None:
    with OllamaStub() as stub:
        stub.get_override = action
        with pytest.raises(JudgeUnavailable, match=r"does not answer as an Ollama server .*--judge openai$"):
            ollama(stub).check()


def test_a_check_is_never_kept_waiting() -> None:
    with OllamaStub() as stub:
        stub.get_override = FAULTS["hangs without a word"]
        with pytest.raises(JudgeUnavailable, match="timed out"):
            ollama(stub, checking=0.1).check()


BAD_ADDRESSES = [
    "", "localhost:11434", "ftp://host", "http://", "http://:11434", "http://host:0", "http://host:99999",
    "http://host:port", "http://ho st", "http://host\n", "http://[::1", "http://a..b", "http://host?x=1",
]  # fmt: skip


@pytest.mark.parametrize("url", BAD_ADDRESSES)
@pytest.mark.parametrize("server", [ollama, openai])
def test_an_address_of_another_form_is_the_users_mistake(server: Callable[[str], object], url: str) -> None:
    with pytest.raises(UserError, match="expected http://HOST:PORT"):
        server(url)


@pytest.mark.parametrize(
    "url", ["http://host:1", "http://host:1/", "http://host:1/api/chat", "http://host:1/api/chat/"]
)
def test_the_books_address_means_the_server(url: str) -> None:
    assert ollama(url).where == "http://host:1"


# Warm-up and pull


def test_the_warm_up_loads_the_model_with_the_questions_context_and_waits_longer() -> None:
    with OllamaStub() as stub:
        loaded = stub.warm_up

        def slow(handler: Any) -> None:
            stub.closing.wait(0.15)
            loaded(handler)

        stub.warm_up = slow
        ollama(stub, silence=0.02, loading=5.0, whole=0.05).warm_up(4096)
    assert stub.warm_ups == [{"model": "llama3", "messages": [], "options": {"num_ctx": 4096}, "stream": False}]
    assert stub.asked == []


@pytest.mark.parametrize(
    ("action", "requests"), [(status(500, "out of memory"), 3), (body(b'{"error": "no"}'), 3), (status(404, "x"), 1)]
)
def test_a_model_that_cannot_be_loaded_is_a_failure(action: Action, requests: int) -> None:
    with OllamaStub() as stub:
        stub.warm_up = action
        with pytest.raises(NoAnswerError):
            ollama(stub).warm_up(2048)
        assert len(stub.warm_ups) == requests


LAYER = {"status": "pulling 6a0746a1ec1a", "digest": "sha256:6a0746a1ec1a", "total": 4_000_000_000}
GOOD_PULL = [
    {"status": "pulling manifest"},
    LAYER,
    *({**LAYER, "completed": done} for done in (1, 100_000_000, 1_000_000_000, 4_000_000_000)),
    {"status": "verifying sha256 digest"},
    {"status": "success"},
]


def has_it_now(stub: OllamaStub) -> None:
    stub.models["llama3:latest"] = DIGEST


def test_a_pull_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with OllamaStub(models=[]) as stub:
        stub.pull = pull_lines(*GOOD_PULL, then=has_it_now)
        ollama(stub).pull()
        ollama(stub).check()
        ollama(stub).pull()  # it is there
    assert stub.pulls == [{"model": "llama3"}]
    assert capsys.readouterr().err.splitlines()[1:] == [
        "pulling llama3: pulling manifest",
        "pulling llama3: pulling 6a0746a1ec1a 0% of 4.00 GB",
        "pulling llama3: pulling 6a0746a1ec1a 20% of 4.00 GB",
        "pulling llama3: pulling 6a0746a1ec1a 100% of 4.00 GB",
        "pulling llama3: verifying sha256 digest",
        "pulling llama3: success",
    ]


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (pull_lines({"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"}),
         "pull model manifest: file does not exist"),
        (pull_lines({"status": "pulling manifest"}), "the stream ended without done:true"),
        (status(500, "no space left on device"), "HTTP 500: no space left on device"),
    ],
)  # fmt: skip
def test_a_pull_that_fails_says_why(action: Action, reason: str) -> None:
    with OllamaStub(models=[]) as stub:
        stub.pull = action
        with pytest.raises(JudgeUnavailable) as caught:
            ollama(stub).pull()
    assert f"could not pull llama3 ({reason}): check the name" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pull_goes_on_after_a_connection_that_broke() -> None:
    with OllamaStub(models=[]) as stub:
        actions = [FAULTS["reset in mid-stream"], pull_lines(*GOOD_PULL, then=has_it_now)]
        stub.pull = lambda handler: actions.pop(0)(handler)
        ollama(stub).pull()
        assert len(stub.pulls) == 2


# OpenAI-compatible servers


def test_the_openai_payload() -> None:
    with OllamaStub(completes("85")) as stub:
        reply = openai(stub).ask(QUESTION)
    assert reply == Reply("85", "stop", 90, 2)
    assert stub.asked == [
        {
            "model": "llama3:latest",
            "messages": [{"role": "user", "content": BOOK}],
            "seed": 123,
            "temperature": 0,
            "max_tokens": 128,
        }
    ]
    assert "Authorization" not in stub.headers[0]


def test_an_openai_schema_is_a_response_format() -> None:
    question = second_question(ENTRY)
    with OllamaStub(completes('{"score": 85}')) as stub:
        openai(stub).ask(question)
    assert stub.asked[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "judgement", "schema": question.schema},
    }


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_each_form_of_an_openai_address_means_the_same(path: str) -> None:
    with OllamaStub(completes("85")) as stub:
        server = openai(stub.url + path)
        server.check()
        assert server.ask(QUESTION).content == "85"
        assert server.where == f"{stub.url}/v1"


def test_the_key_goes_into_a_header_and_into_no_message() -> None:
    with OllamaStub(status(401, {"message": f"Incorrect API key provided: {KEY}."}), completes(f"echo {KEY}")) as stub:
        server = openai(stub, key=KEY)
        with pytest.raises(NoAnswerError) as caught:
            server.ask(QUESTION)
        assert str(caught.value) == "HTTP 401: Incorrect API key provided: ***."
        assert server.ask(QUESTION).content == "echo ***"
        assert [headers["Authorization"] for headers in stub.headers] == [f"Bearer {KEY}"] * 2
        stub.get_override = status(401, f"bad key {KEY}")
        with pytest.raises(JudgeUnavailable, match=r"refuses the API key .*OPENAI_API_KEY.*--judge_key_env") as refused:
            server.check()
        assert KEY not in str(refused.value)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "ключ"])
def test_a_key_that_no_header_takes_is_the_users_mistake(key: str) -> None:
    with pytest.raises(UserError, match="OPENAI_API_KEY holds no API key") as caught:
        openai(unused_url(), key=key)
    assert key not in str(caught.value)


def test_the_key_comes_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert key_from_environment(None) is None
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OTHER", f"{KEY}2\n")
    assert key_from_environment(None) == KEY
    assert key_from_environment("OTHER") == f"{KEY}2"
    with pytest.raises(UserError, match=r"--judge_key_env: the environment variable MISSING is not set"):
        key_from_environment("MISSING")


def test_openai_names_the_models_that_it_has() -> None:
    with OllamaStub(models=["a", "b"]) as stub, pytest.raises(JudgeUnavailable) as caught:
        openai(stub, "c").check()
    assert "has no model c: give one of its own (a, b) with --judge_model" in str(caught.value)


def test_an_openai_server_without_a_list_of_models_is_taken_at_its_word() -> None:
    with OllamaStub() as stub:
        stub.get_override = status(404, "not found")
        assert openai(stub).check().identity == f"openai {stub.url}/v1 llama3:latest"


@pytest.mark.parametrize("url", [unused_url(), None], ids=["nobody there", "another server"])
def test_no_openai_server_says_so(url: str | None) -> None:
    with OllamaStub() as stub:
        stub.get_override = FAULTS["garbage"]
        with pytest.raises(JudgeUnavailable, match=r"no OpenAI-compatible server answers at http.*--judge_url$"):
            openai(url or stub.url).check()


OPENAI_FAULTS: dict[str, Action] = {
    "broken off": completes("8", finish_reason="abort"),
    "an error under 200": body(b'{"error": {"message": "overloaded"}}'),
    "no choice": body(b'{"choices": []}'),
    "an error under 200 in other words": body(b'{"object": "error", "message": "overloaded"}'),
    "no message": body(b'{"choices": [{"finish_reason": "stop"}]}'),
    "a list for the text": completes(["8"]),
    **{name: FAULTS[name] for name in ("garbage", "HTTP 503, queue full", "hangs after the headers", "a huge line")},
    **{name: FAULTS[name] for name in ("reset without a word", "less than its length", "an empty body")},
}


@pytest.mark.parametrize("name", OPENAI_FAULTS)
def test_an_openai_answer_that_is_not_whole_is_tried_again(name: str) -> None:
    with OllamaStub(OPENAI_FAULTS[name], completes("85")) as stub:
        assert openai(stub).ask(QUESTION).content == "85"
        assert len(stub.asked) == 2


def test_an_openai_refusal_without_text_is_an_answer() -> None:
    with OllamaStub(completes(None)) as stub:
        assert openai(stub).ask(QUESTION).content == ""


def test_newer_openai_models_know_the_room_by_another_name() -> None:
    words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    with OllamaStub(status(400, {"message": words}), completes("85")) as stub:
        server = openai(stub)
        server.ask(QUESTION)
        server.ask(QUESTION)
    assert [[name for name in payload if "tokens" in name] for payload in stub.asked] == [
        ["max_tokens"],
        ["max_completion_tokens"],
        ["max_completion_tokens"],
    ]


def test_a_parameter_that_another_thread_leaves_out_meanwhile_is_left_out_here_too() -> None:
    with OllamaStub() as stub:
        server = openai(stub)

        def refused_meanwhile(handler: Handler) -> None:
            server.leave_out(["seed"])
            status(400, "no seed")(handler)

        stub.actions = [refused_meanwhile, refuses("seed", then=completes("85"))]
        assert server.ask(QUESTION).content == "85"


# Parameters that a server does not take


@pytest.mark.parametrize(
    "words",
    [
        "Unsupported parameter: '{name}' is not supported.",
        "Unsupported value: '{name}' does not support 0 with this model. Only the default (1) value is supported.",
        "body.{name}: Extra inputs are not permitted",
        'json: unknown field "{name}"',
    ],
)
def test_a_parameter_that_is_refused_is_left_out_remembered_and_said(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("temperature", "seed", "max_tokens")
    with OllamaStub(refuses(*names, then=completes("85"), words=words)) as stub:
        server = openai(stub)
        assert [server.ask(QUESTION).content for _ in range(2)] == ["85", "85"]
        assert [sum(name in payload for name in names) for payload in stub.asked] == [3, 2, 1, 0, 0]
        assert server.options(QUESTION) == {}
        assert set(server.refused) == set(names)
        assert set(server.payload(QUESTION)) >= set(names)  # by which an answer is found again
    said = " ".join(capsys.readouterr().err.split())
    for name in names:
        assert said.count(f"takes no {name} (HTTP 400: ") == 1


def test_a_parameter_under_status_422_in_fastapis_form_is_left_out() -> None:
    detail = [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]

    def refusal(handler: Any) -> None:
        handler.json(422, {"detail": detail})

    with OllamaStub(refusal, completes("85")) as stub:
        openai(stub).ask(QUESTION)
        assert ["seed" in payload for payload in stub.asked] == [True, False]


def test_a_parameter_that_a_long_error_names_at_its_end_is_left_out() -> None:
    with OllamaStub(status(400, {"message": "x " * 200, "param": "seed"}), completes("85")) as stub:
        openai(stub).ask(QUESTION)
        assert ["seed" in payload for payload in stub.asked] == [True, False]


def test_a_room_that_is_refused_by_both_of_its_names_is_left_out() -> None:
    words = "'max_tokens' or 'max_completion_tokens' is too large: 128."
    both = ("max_tokens", "max_completion_tokens")
    with OllamaStub(refuses(*both, then=completes("85"), words=words)) as stub:
        assert openai(stub).ask(QUESTION).content == "85"
        assert [[name for name in both if name in payload] for payload in stub.asked] == [[both[0]], [both[1]], []]


@pytest.mark.parametrize("code", [401, 429, 500])
def test_an_error_of_another_kind_that_names_a_parameter_is_a_failure(code: int) -> None:
    with OllamaStub(status(code, "the temperature of the GPU is too high")) as stub:
        server = openai(stub, retries=0)
        with pytest.raises(NoAnswerError, match="temperature of the GPU"):
            server.ask(QUESTION)
        assert server.refused == ()
        assert len(stub.asked) == 1


def test_what_was_left_out_in_vain_is_not_remembered() -> None:
    with OllamaStub(status(400, "model not found (temperature 0)")) as stub:
        server = openai(stub)
        with pytest.raises(NoAnswerError, match="model not found"):
            server.ask(QUESTION)
        assert server.refused == ()
        assert server.options(QUESTION)["temperature"] == 0


def test_ollama_is_asked_without_think_where_it_refuses_that() -> None:
    with OllamaStub(status(400, "llama3 does not support thinking"), says("85")) as stub:
        server = ollama(stub)
        assert server.ask(QUESTION).content == "85"
        assert server.ask(QUESTION).content == "85"
        assert ["think" in payload for payload in stub.asked] == [True, False, False]


# Reasoning models


def test_ollamas_thinking_is_read_apart() -> None:
    with OllamaStub(thinks("20, no, ", "85")) as stub:
        assert ollama(stub).ask(QUESTION) == Reply("85", "stop", 90, 2, thinking="20, no, ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("85", {"reasoning_content": "maybe 20"}),
        ("85", {"reasoning": "maybe 20"}),
        ("85", {"reasoning_content": None, "reasoning": "maybe 20"}),
        ([{"type": "thinking", "thinking": "maybe 20"}, {"type": "text", "text": "85"}], {}),
    ],
)
def test_openais_trace_is_read_apart(content: Any, message: dict[str, Any]) -> None:
    with OllamaStub(completes(content, message)) as stub:
        assert openai(stub).ask(QUESTION) == Reply("85", "stop", 90, 2, thinking="maybe 20")


@pytest.mark.parametrize("content", [["8"], [{"type": "text"}], [{"text": "8"}], {"type": "text", "text": "8"}])
def test_parts_without_a_text_are_no_answer(content: Any) -> None:
    with OllamaStub(completes(content)) as stub, pytest.raises(NoAnswerError, match="content is no text"):
        openai(stub, retries=0).ask(QUESTION)


def test_the_first_openai_question_may_load_the_model_for_longer_than_an_answer_takes() -> None:
    def slow(handler: Handler) -> None:
        handler.stub.closing.wait(0.4)
        completes("85")(handler)

    with OllamaStub(slow) as stub:
        server = openai(stub, silence=0.1, whole=0.1, loading=20.0, retries=0)
        assert server.ask(QUESTION).content == "85"
        with pytest.raises(NoAnswerError):  # now it is loaded
            server.ask(QUESTION)


def test_an_answer_that_thinks_longer_than_a_silence_is_waited_for() -> None:
    def slow(handler: Handler) -> None:
        handler.stub.closing.wait(0.4)
        completes("85")(handler)

    with OllamaStub(completes("85"), slow) as stub:
        server = openai(stub, silence=0.1, whole=20.0)
        server.ask(QUESTION)
        wide = wider(QUESTION, 4096, 100, None)
        assert wide is not None
        assert server.ask(wide).content == "85"


def test_more_room_is_what_the_context_leaves() -> None:
    wide = wider(QUESTION, 4096, 500, 8192)
    assert wide is not None
    assert (wide.room, wide.num_ctx, wide.prompt) == (4096, 8192, QUESTION.prompt)
    less = wider(QUESTION, 4096, 500, 2048)
    assert less is not None
    assert (less.room, less.num_ctx) == (1548, 2048)
    assert wider(QUESTION, 4096, 2000, 2048) is None


# Whole or not


@pytest.mark.parametrize(
    ("text", "tokens", "finish"),
    [("85", 2, None), ("85", None, None), ("8" * 127, None, None), ("85", 128, "length"), ("8" * 128, None, "length")],
)
def test_an_openai_answer_without_finish_reason_is_whole_and_its_length_says_whether_it_is_cut(
    text: str, tokens: int | None, finish: str | None
) -> None:
    """As KoboldCpp gives it: the body came to its end."""
    with OllamaStub(completes(text, tokens=tokens, finish_reason=None)) as stub:
        reply = openai(stub).ask(QUESTION)
        assert (reply.content, reply.finish) == (text, finish)
        assert len(stub.asked) == 1


def test_an_openai_body_that_ends_early_is_not_whole_with_or_without_finish_reason() -> None:
    for reason in ("stop", None):
        value = {"choices": [{"message": {"content": "85"}, "finish_reason": reason}]}
        content = json.dumps(value).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(content) + 10)
        with OllamaStub(wire(head + content), completes("70")) as stub:
            assert openai(stub).ask(QUESTION).content == "70"


def test_an_openai_body_without_a_length_is_not_whole_wherever_it_is_cut() -> None:
    """The end of the connection is all that ends it: a part of an object is none."""
    value = {"choices": [{"message": {"content": "85"}, "finish_reason": None}]}
    content = json.dumps(value).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    with OllamaStub(*(wire(head + content[:cut]) for cut in range(len(content))), wire(head + content)) as stub:
        server = openai(stub, retries=0)
        for _ in range(len(content)):
            with pytest.raises(NoAnswerError):
                server.ask(QUESTION)
        assert server.ask(QUESTION).content == "85"


def test_an_openai_answer_in_pieces_ends_with_its_last_piece() -> None:
    """Of a body in chunks the one without a byte says that it is whole, also where its JSON is."""
    content = json.dumps({"choices": [{"message": {"content": "85"}}]}).encode()
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n" % (len(content), content)
    with OllamaStub(wire(head), wire(head + b"0\r\n\r\n")) as stub:
        assert openai(stub).ask(QUESTION).content == "85"
        assert len(stub.asked) == 2


@pytest.mark.parametrize("end", [b"", b"data: [DONE]\n\n"])
def test_a_stream_that_nobody_asked_for_is_no_answer(end: bytes) -> None:
    """One object is asked for (`stream` is nowhere in the request), and what else comes is never taken for it."""
    pieces = b"".join(b'data: {"choices": [{"delta": {"content": "%d"}}]}\n\n' % digit for digit in (8, 5))
    with OllamaStub(body(pieces + end, "text/event-stream")) as stub:
        with pytest.raises(NoAnswerError, match="/chat/completions is not a JSON object"):
            openai(stub).ask(QUESTION)
        assert "stream" not in stub.asked[0]


@pytest.mark.parametrize("word", ["length", "max_tokens", "MAX_TOKENS", "model_length"])
def test_each_word_for_a_full_room_is_length(word: str) -> None:
    with OllamaStub(completes("8", finish_reason=word)) as stub:
        assert openai(stub).ask(QUESTION).finish == "length"


@pytest.mark.parametrize(("reason", "requests"), [("content_filter", 1), ("error", 3), ("abort", 3)])
def test_an_openai_answer_that_was_broken_off_is_none(reason: str, requests: int) -> None:
    with OllamaStub(completes("8", finish_reason=reason)) as stub:
        with pytest.raises(NoAnswerError, match=f"broken off: finish_reason {reason}") as caught:
            openai(stub).ask(QUESTION)
        assert (caught.value.partial, len(stub.asked)) == ("8", requests)


@pytest.mark.parametrize("count", [127, 128])
def test_an_ollama_answer_without_done_reason_is_cut_where_its_room_is_full(count: int) -> None:
    reply, _ = asked(lines(piece("8"), piece("", done=True, done_reason=None, eval_count=count)))
    assert isinstance(reply, Reply)
    assert reply.finish == ("length" if count == 128 else None)


@pytest.mark.parametrize("reason", ["load", "unload"])
def test_a_model_that_was_only_loaded_has_not_answered(reason: str) -> None:
    assert f"done_reason {reason}" in str(failure_of(says("", done_reason=reason), retries=0))


ERRORS = [
    ({"error": "no room"}, "no room"),
    ({"error": {"message": "no room", "type": "x", "code": 3}}, "no room"),
    ({"error": {"message": "no", "param": "room"}}, "no (room)"),
    ({"message": "no room"}, "no room"),
    ({"detail": "no room"}, "no room"),
    ({"object": "error", "message": "no room"}, "no room"),
    ({"error": "Bad Request", "message": "no room", "statusCode": 400}, "Bad Request: no room"),
    ({"error": True, "message": "no room"}, "no room"),
    ({"detail": [{"loc": ["body", "room"], "msg": "no"}, {"msg": "why"}]}, "body.room: no; why"),
    ({"message": {"detail": [{"loc": ["body", "room"], "msg": "no"}]}}, "body.room: no"),
    ({"errors": [{"message": "no room"}]}, "no room"),
    ([{"error": {"message": "no room"}}], "no room"),
    ("no room", "no room"),
    ({"title": "Bad", "detail": "no room"}, "Bad: no room"),
]


@pytest.mark.parametrize(("value", "words"), ERRORS)
@pytest.mark.parametrize("server", [ollama, openai])
def test_errors_are_read_wherever_a_server_puts_its_words(
    server: Callable[..., OllamaServer | OpenAIServer], value: Any, words: str
) -> None:
    with OllamaStub(lambda handler: handler.json(400, value)) as stub:
        with pytest.raises(NoAnswerError) as caught:
            server(stub).ask(QUESTION)
        assert str(caught.value) == f"HTTP 400: {words}"


@pytest.mark.parametrize(
    ("content", "words"), [(b"no\nroom", "no room"), (b"<html>no room</html>", "Bad Request"), (b"", "Bad Request")]
)
def test_an_error_in_plain_words_is_read_and_a_page_is_not(content: bytes, words: str) -> None:
    assert str(failure_of(lambda handler: handler.plain(400, content))) == f"HTTP 400: {words}"


def test_what_a_server_says_does_not_act_on_a_terminal() -> None:
    said = str(failure_of(status(400, "\x1b[31mred\x07\u009b2J\u202e")))
    assert said == "HTTP 400: \\x1b[31mred\\x07\\x9b2J\\u202e"
    with OllamaStub(models=["\x1b[2Jx"]) as stub, pytest.raises(JudgeUnavailable, match=r"\\x1b\[2Jx"):
        openai(stub).check()


# The name under which a server has a model


@pytest.mark.parametrize(
    ("model", "listed", "served"),
    [
        ("llama3", ["llama3:latest", "phi3:latest"], "llama3:latest"),
        ("llama3:latest", ["llama3"], "llama3"),
        ("llama3", ["llama3", "llama3:latest"], "llama3"),
        ("Llama3", ["llama3:latest"], "llama3:latest"),
        ("team/judge", ["team/judge:latest"], "team/judge:latest"),
        ("llama3", ["llama3:8b"], None),
        ("llama", ["llama3:latest"], None),
        ("Llama3", ["llama3", "LLAMA3"], None),
    ],
)
def test_a_model_is_found_under_its_full_name_behind_an_openai_wire(
    model: str, listed: list[str], served: str | None
) -> None:
    with OllamaStub(completes("85"), models=listed) as stub:
        server = openai(stub, model)
        if served is None:
            with pytest.raises(JudgeUnavailable, match=f"has no model {model}"):
                server.check()
            return
        assert server.check().identity == f"openai {stub.url}/v1 {served}"
        server.ask(QUESTION)
        assert stub.asked[0]["model"] == served


def test_an_openai_schema_that_is_refused_is_not_tried_again() -> None:
    with OllamaStub(status(500, {"message": "response_format is not supported"})) as stub:
        server = openai(stub)
        with pytest.raises(NoAnswerError) as caught:
            server.ask(second_question(ENTRY))
        assert server.refuses_schema(caught.value)
        assert len(stub.asked) == 1


# One context for the whole run


def test_the_context_is_the_books_until_a_prompt_needs_more() -> None:
    assert num_ctx_for(2048, None) == num_ctx_for(1, 8192) == 2048
    assert num_ctx_for(2049, None) == 4096
    assert num_ctx_for(100_000, 8192) == 8192
    assert num_ctx_for(100_000, 1024) == 2048  # Ollama itself takes no more than the model has


@pytest.mark.parametrize("text", ["word " * 300, "1234567890" * 30, "é" * 200, "你好" * 200, "x = [1, 2];\n" * 50])
def test_the_bound_is_more_than_other_tokenizers_make(text: str) -> None:
    """Vocabularies that split numbers into digits, and a token for every four bytes, as is usual."""
    least = max(len(text.encode()) / 4, sum(map(str.isdigit, text)))
    assert token_bound([text, "short"]) >= least + 64


def test_an_empty_line_of_a_stream_is_no_answer() -> None:
    assert str(failure_of(lines(b"\n"), retries=0)) == "the stream ended without done:true"
    assert failure_of(lines(piece("8")), retries=0).partial == "8"
