"""A judge's server between two responses: over the wire to the stand-in server."""

from __future__ import annotations

from pathlib import Path

import pytest
from ollama_stub import OllamaStub, says, status, thinks, unused_url

from fastft.judging.journal import Journal
from fastft.judging.ollama import OllamaServer
from fastft.judging.pairwise import NoVerdict, Pair, RefereeGone, Said, judge_pairs
from fastft.judging.referee import ServerReferee
from fastft.judging.wire import Patience

PAIRS = [Pair({"instruction": "Name a bird.", "input": "", "output": "owl"}, "an owl", "a cat")]
SCHEMA = {"type": "object"}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "before_retry", lambda *_: 0.0)


def referee_at(url: str, tmp_path: Path) -> ServerReferee:
    referee = ServerReferee(OllamaServer(url), Journal(tmp_path / "replies.jsonl"))
    assert referee.find(PAIRS, lambda: None)
    return referee


def test_the_model_is_loaded_once_with_the_context_of_the_questions(tmp_path: Path) -> None:
    with OllamaStub(says("A")) as stub:
        referee = referee_at(stub.url, tmp_path)
        assert stub.warm_ups == []
        assert [referee.ask(prompt) for prompt in ("p", "q")] == [Said("A"), Said("A")]
        assert [payload["options"] for payload in stub.warm_ups] == [{"num_ctx": 2048}]
        assert {payload["options"]["num_ctx"] for payload in stub.asked} == {2048}


def test_a_model_that_cannot_be_loaded_is_no_referee(tmp_path: Path) -> None:
    with OllamaStub(says("A")) as stub:
        stub.warm_up = status(500, "model requires more system memory")
        referee = referee_at(stub.url, tmp_path)
        with pytest.raises(RefereeGone, match=r"cannot be loaded: .*more system memory"):
            referee.ask("p")
        assert stub.asked == []


def test_replies_hold_when_the_server_is_away(tmp_path: Path) -> None:
    with OllamaStub(says("A"), says("B")) as stub:
        referee = referee_at(stub.url, tmp_path)
        first = judge_pairs(PAIRS, referee)
        assert (first[0][0]["winner"], first[1]) == ("a", None)
    away = referee_at(unused_url(), tmp_path)
    assert judge_pairs(PAIRS, away) == first
    with pytest.raises(RefereeGone, match="ollama serve"):
        away.ask("another question")


def test_nobody_is_known_of_a_server_that_never_answered(tmp_path: Path) -> None:
    referee = ServerReferee(OllamaServer(unused_url()), Journal(tmp_path / "replies.jsonl"))
    assert not referee.find(PAIRS, lambda: None)
    assert "ollama serve" in (referee.problem or "")


def test_a_server_without_schemas_is_not_asked_with_one(tmp_path: Path) -> None:
    with OllamaStub(says("?"), status(500, "invalid format"), says("?")) as stub:
        referee = referee_at(stub.url, tmp_path)
        assert referee.ask("p") == Said("?")
        assert referee.ask("p", SCHEMA) is None
        assert len(stub.asked) == 2
        assert referee.ask("q", SCHEMA) is None
        assert len(stub.asked) == 2
        stub.version = "0.4.7"
        assert referee_at(stub.url, tmp_path).ask("q", SCHEMA) is None
        assert len(stub.asked) == 2


def test_a_reply_under_a_schema_is_another_reply(tmp_path: Path) -> None:
    with OllamaStub(says("?"), says('{"winner": "A"}')) as stub:
        referee = referee_at(stub.url, tmp_path)
        assert [referee.ask("p"), referee.ask("p", SCHEMA)] == [Said("?"), Said('{"winner": "A"}')]
        assert stub.asked[1]["format"] == SCHEMA
        assert len(Journal(tmp_path / "replies.jsonl")) == 2


def test_a_prompt_that_fills_the_context_is_called_cut(tmp_path: Path) -> None:
    with OllamaStub(says("A", prompt_eval_count=2048 - 128), says("A", prompt_eval_count=2048 - 129)) as stub:
        referee = referee_at(stub.url, tmp_path)
        assert [referee.ask("p"), referee.ask("q")] == [Said("A", cut=True), Said("A")]


def test_a_reply_that_filled_its_room_has_not_ended(tmp_path: Path) -> None:
    with OllamaStub(says("A is better in style, but", done_reason="length")) as stub:
        assert referee_at(stub.url, tmp_path).ask("p") == Said("A is better in style, but", ended=False)


def test_a_reply_that_is_all_thinking_is_asked_for_again_with_more_room(tmp_path: Path) -> None:
    with OllamaStub(
        thinks("A is better"), thinks("A is better", "B"), says("<think>A is better", done_reason="length")
    ) as stub:
        referee = referee_at(stub.url, tmp_path)
        assert referee.ask("p") == Said("B")
        assert [payload["options"]["num_predict"] for payload in stub.asked] == [128, 4096]
        assert [one["options"]["num_ctx"] for one in stub.warm_ups] == [2048, 8192]
        said = referee.ask("q")
        assert said is not None
        assert (said.ended, said.nothing) == (False, "its thinking took all 4096 tokens")
        assert len(stub.asked) == 4
        assert referee.ask("p") == Said("B")
        assert len(stub.asked) == 4


def test_what_a_server_refuses_is_recorded(tmp_path: Path) -> None:
    with OllamaStub(status(400, "unknown parameter: think"), says("A")) as stub:
        referee_at(stub.url, tmp_path).ask("p")
        assert referee_at(stub.url, tmp_path).ask("q") == Said("A")
        assert ["think" in payload for payload in stub.asked] == [True, False, False]


def test_a_server_that_only_fails_ends_the_asking(tmp_path: Path) -> None:
    with OllamaStub(status(400, "bad")) as stub:
        referee = referee_at(stub.url, tmp_path)
        for prompt in "abcd":
            with pytest.raises(NoVerdict, match="bad"):
                referee.ask(prompt)
        with pytest.raises(RefereeGone, match="failed 5 questions in a row"):
            referee.ask("e")
        with pytest.raises(RefereeGone, match="failed 5 questions in a row"):
            referee.ask("f")
        assert len(stub.asked) == 5
