from __future__ import annotations

import hashlib
import json
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ollama_stub import (
    DIGEST,
    FAULTS,
    Action,
    Handler,
    OllamaStub,
    completes,
    lines,
    piece,
    pull_lines,
    refuses,
    says,
    status,
    thinks,
    unused_url,
)

from fastft.common.console import Meter
from fastft.common.errors import JudgeUnavailable, UserError
from fastft.metrics import text_metrics as metrics
from fastft.reports.figures import read_run
from fastft.reports.report import ReportOptions, report
from fastft.scores.compare import CompareOptions, compare
from fastft.scores.score import ScoreOptions, score, summary_line

ENTRIES: list[dict[str, Any]] = [
    {"instruction": f"Say {word}.", "input": "", "output": f"This is the word {word}.", "category": category}
    for word, category in [("one", "a"), ("two", "a"), ("three", "b"), ("four", "b")]
]


def with_responses(*responses: str) -> list[dict[str, Any]]:
    return [{**entry, "model_response": text} for entry, text in zip(ENTRIES, responses, strict=False)]


RESPONSES = with_responses("This is the word one.", "This is a word.", "", "five")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write(tmp_path, RESPONSES)
    return tmp_path


def write(run: Path, entries: Any) -> None:
    (run / "responses.json").write_text(json.dumps(entries), encoding="utf-8")


def saved(run: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    return scores


def scored(run: Path, stub: OllamaStub | str, **options: Any) -> dict[str, Any]:
    url = stub if isinstance(stub, str) else stub.url
    scores = score(ScoreOptions(run=run, judge_url=url, **{"judge_pause": 0.001, "judge_retries": 2, **options}))
    assert scores == saved(run)
    return scores


def word_in(prompt: str) -> str:
    return prompt.partition("Say ")[2].partition(".")[0]


def given(scores: dict[str, Any]) -> list[int | None]:
    return [judgement["score"] for judgement in scores["judgements"]]


def test_every_response_has_a_judgement_in_its_order(run: Path) -> None:
    with OllamaStub(says("100"), says("maybe"), says("no idea"), says("7")) as stub:
        scores = scored(run, stub)
    assert given(scores) == [100, None, 0, 7]
    assert [judgement.get("reason") for judgement in scores["judgements"]] == [
        None,
        "no score in it: 'maybe'; asked again: no score in it: 'no idea'",
        "empty response",
        None,
    ]
    assert [judgement["raw"] for judgement in scores["judgements"]] == ["100", "maybe", "", "7"]
    assert scores["judgements"][1]["raw_again"] == "no idea"
    summary = scores["summary"]
    assert summary["judge"] == {
        "name": "ollama",
        "model": "llama3",
        "digest": DIGEST,
        "version": "0.9.0",
        "url": stub.url,
        "style": "book",
        "rubric": None,
        "parallel": 1,
        "wide_room": 4096,
        "options": {"seed": 123, "temperature": 0, "num_ctx": 2048, "num_predict": 128},
    }
    assert (summary["n_scored"], summary["n_unscored"], summary["no_judge"]) == (3, 1, None)
    assert summary["judge_mean"] == pytest.approx(107 / 3)
    assert summary["judge_interval"] == metrics.mean_interval([100, 0, 7])
    assert summary["by_category"]["b"]["judge_interval"] == metrics.mean_interval([0, 7])
    assert set(summary["intervals"]) >= {"exact_match", "bleu", "chrf", "rouge_l"}
    assert (summary["n"], summary["exact_match"], summary["empty_responses"]) == (4, 25, 1)
    assert 0 < summary["bleu"] < 100
    assert 0 < summary["rouge_l"] < 100
    assert summary["by_category"]["a"]["exact_match"] == 50
    assert summary["by_category"]["a"]["judge_mean"] == 100
    assert summary["by_category"]["b"]["judge_mean"] == 3.5


def test_the_summary_says_how_the_scores_came_about(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with OllamaStub(says("150"), says('{"score": 90}'), says("Score: 50"), says("?"), says("!")) as stub:
        summary = scored(run, stub)["summary"]
    assert summary["judge_rungs"] == {"asked again: json": 1, "labelled": 1}
    assert (summary["n_asked_again"], summary["n_empty_scored_0"]) == (2, 1)
    assert (summary["unparsed_rows"], summary["unanswered_rows"], summary["cut_rows"]) == ([4], [], [])
    assert summary["judge_mean"] == pytest.approx(140 / 3)
    assert (summary["judge_book_mean"], summary["n_book"]) == (75, 2)  # int() takes 150, and the empty one is 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("judge: ")] == [
        "judge: 1 empty responses score 0, as in the book, without a question",
        "judge: 2 replies without a score were asked about again with a JSON schema",
        "judge: 1 replies hold no score: row 4",
        "judge: scores were read from JSON when asked again 1, a labelled number 1",
        "judge: the book's mean, over bare integers alone: 75.00 over 2 of 4",
    ]


def test_questions_come_one_at_a_time_in_the_files_order_after_the_last_answer_is_kept(run: Path) -> None:
    kept: list[int] = []

    def route(prompt: str) -> Action:
        journal = run / "judge-replies.jsonl"
        kept.append(journal.read_text().count('"content"') if journal.is_file() else 0)
        return says("80")

    with OllamaStub() as stub:
        stub.route = route
        scored(run, stub)
        assert [word_in(prompt) for prompt in stub.prompts()] == ["one", "two", "four"]
        assert stub.warm_ups == [{"model": "llama3", "messages": [], "options": {"num_ctx": 2048}, "stream": False}]
    assert kept == [0, 1, 2]


def test_parallel_questions_are_under_way_together_and_end_in_their_places(run: Path) -> None:
    together = threading.Barrier(3)

    def route(prompt: str) -> Action:
        together.wait(5)
        return says({"one": "1", "two": "2", "four": "4"}[word_in(prompt)])

    with OllamaStub() as stub:
        stub.route = route
        scores = scored(run, stub, judge_parallel=3)
    assert given(scores) == [1, 2, 0, 4]
    assert scores["summary"]["judge"]["parallel"] == 3


def test_a_second_call_asks_nothing_and_needs_no_server(run: Path) -> None:
    with OllamaStub(says("80"), says("nothing")) as stub:
        first = scored(run, stub)
        assert len(stub.asked) == 1 + 2 * 2
        assert scored(run, stub) == first
        assert len(stub.asked) == 5
        assert len(stub.warm_ups) == 1
    second = scored(run, unused_url(), require_judge=True)
    assert second["judgements"] == first["judgements"]


def test_a_model_that_was_pulled_anew_is_asked_anew(run: Path) -> None:
    with OllamaStub(says("10"), models={"llama3:latest": "old"}) as stub:
        assert given(scored(run, stub)) == [10, 10, 0, 10]
        stub.actions, stub.models = [says("20")], {"llama3:latest": "new"}
        assert given(scored(run, stub)) == [20, 20, 0, 20]
        stub.models = {"llama3:latest": "old", "copy:latest": "new"}
        assert given(scored(run, stub)) == [10, 10, 0, 10]
        assert given(scored(run, stub, judge_model="copy")) == [20, 20, 0, 20]  # the same model by another name
        assert len(stub.asked) == 6


def test_an_interrupted_run_goes_on_where_it_stopped(run: Path) -> None:
    with OllamaStub(says("80"), says("no number"), says("none"), FAULTS["hangs without a word"]) as stub:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Meter, "advance", interrupt_at(2))
            with pytest.raises(KeyboardInterrupt):
                scored(run, stub)
        assert given(saved(run)) == [80, None, 0, None]
        assert saved(run)["judgements"][1]["raw"] == "no number"
        assert saved(run)["judgements"][3]["reason"] == "not judged yet"
        answered = stub.prompts()[:3]
        stub.route = lambda _: says("60")
        assert given(scored(run, stub)) == [80, None, 0, 60]
        assert not set(answered) & set(stub.prompts()[3:])


def interrupt_at(number: int) -> Callable[..., None]:
    calls: list[int] = []

    def advance(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt

    return advance


def test_a_failed_request_is_asked_again_by_the_next_call(run: Path) -> None:
    with OllamaStub(status(400, "bad"), says("50")) as stub:
        scores = scored(run, stub)
        assert given(scores) == [None, 50, 0, 50]
        assert scores["summary"]["unanswered_rows"] == [1]
        assert given(scored(run, stub)) == [50, 50, 0, 50]
        assert len(stub.asked) == 4


def test_a_failed_second_question_alone_is_asked_again_by_the_next_call(tmp_path: Path) -> None:
    write(tmp_path, RESPONSES[:1])
    with OllamaStub(says("hm"), status(400, "bad"), says('{"score": 50}')) as stub:
        first = scored(tmp_path, stub)["judgements"][0]
        assert (first["score"], first["raw"], first["answered"]) == (None, "hm", False)
        assert first["reason"] == "no score in it: 'hm'; asked again: HTTP 400: bad"
        second = scored(tmp_path, stub)["judgements"][0]
        assert (second["score"], second["rung"], second["raw"]) == (50, "asked again: json", "hm")
        assert ["format" in payload for payload in stub.asked] == [False, True, True]


def test_a_server_that_takes_no_schema_is_not_asked_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with OllamaStub(says("hm"), status(500, "invalid format"), says("hm")) as stub:
        scores = scored(run, stub)
        assert len(stub.asked) == 4
    assert given(scores) == [None, None, 0, None]
    assert scores["judgements"][0]["reason"] == "no score in it: 'hm'; asked again: HTTP 500: invalid format"
    assert scores["summary"]["unparsed_rows"] == [1, 2, 4]
    assert capsys.readouterr().err.count("takes no JSON schema") == 1


def test_an_old_ollama_is_not_asked_again_either(run: Path) -> None:
    with OllamaStub(says("hm")) as stub:
        stub.version = "0.4.7"
        assert scored(run, stub)["summary"]["unparsed_rows"] == [1, 2, 4]
        assert len(stub.asked) == 3


def test_the_reason_style_asks_for_a_reason_first(run: Path) -> None:
    with OllamaStub(says('{"reason": "4 of 5 right", "score": 80}')) as stub:
        scores = scored(run, stub, judge_style="reason")
        assert list(stub.asked[0]["format"]["properties"]) == ["reason", "score"]
        assert stub.asked[0]["options"]["num_predict"] == 512
    assert given(scores) == [80, 80, 0, 80]
    assert scores["summary"]["judge"]["style"] == "reason"
    assert (scores["summary"]["judge_book_mean"], scores["summary"]["n_book"]) == (None, 0)


@pytest.mark.parametrize("version", ["0.4.7", "0.9.0"])
def test_the_reason_style_needs_a_schema(run: Path, version: str) -> None:
    with OllamaStub(status(500, "invalid format")) as stub:
        stub.version = version
        with pytest.raises(JudgeUnavailable, match=r"takes no JSON schema .*use --judge_style book$") as caught:
            scored(run, stub, judge_style="reason", require_judge=True)
        assert len(stub.asked) == (version == "0.9.0")
    assert "\n" not in str(caught.value)
    assert given(saved(run)) == [None, None, 0, None]


def test_styles_and_rubrics_do_not_share_answers(run: Path, tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Spelling counts\nas much as facts.\n")
    with OllamaStub(says("10"), says("10"), says("10"), says('{"score": 20}')) as stub:
        assert given(scored(run, stub)) == [10, 10, 0, 10]
        scores = scored(run, stub, judge_rubric=rubric)
        assert given(scores) == [20, 20, 0, 20]
        assert given(scored(run, stub, judge_style="reason")) == [20, 20, 0, 20]
        assert len(stub.asked) == 9
        assert "score. Spelling counts as much as facts. Respond" in stub.prompts()[3]
    assert scores["summary"]["judge"]["rubric"] == "Spelling counts as much as facts."
    assert scores["summary"]["judge_book_mean"] is None


def test_an_openai_compatible_judge(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with OllamaStub(completes("80"), completes("hm"), completes('{"score": 70}'), completes("60")) as stub:
        options = {"judge": "openai", "judge_model": "llama3:latest", "judge_key_env": "MY_KEY"}
        scores = scored(run, stub, **options)
        assert given(scores) == [80, 70, 0, 60]
        assert scored(run, stub, **options) == scores
        assert len(stub.asked) == 4
        assert {headers["Authorization"] for headers in stub.headers} == {"Bearer sk-very-secret"}
    judge = scores["summary"]["judge"]
    assert (judge["name"], judge["url"], judge["digest"]) == ("openai", f"{stub.url}/v1", None)
    assert judge["options"] == {"seed": 123, "temperature": 0, "max_tokens": 128}
    assert given(scored(run, stub.url, **options)) == [80, 70, 0, 60]  # it is gone, its answers hold
    for path in run.iterdir():
        assert b"very-secret" not in path.read_bytes(), path


def test_a_pull_gets_the_model_and_then_it_is_asked(run: Path) -> None:
    with OllamaStub(says("80"), models=[]) as stub:
        stub.pull = pull_lines({"status": "success"}, then=lambda stub: stub.models.update({"llama3:latest": DIGEST}))
        assert given(scored(run, stub, pull=True)) == [80, 80, 0, 80]
        assert len(stub.pulls) == 1


def test_a_pull_that_fails_is_no_judge(run: Path) -> None:
    with OllamaStub(models=[]) as stub:
        stub.pull = pull_lines({"status": "pulling manifest"}, {"error": "file does not exist"})
        with pytest.raises(JudgeUnavailable, match="could not pull llama3"):
            scored(run, stub, pull=True, require_judge=True)
        assert stub.asked == []


def test_a_model_that_cannot_be_loaded_is_no_judge(run: Path) -> None:
    with OllamaStub(says("80")) as stub:
        stub.warm_up = status(500, "model requires more system memory")
        with pytest.raises(JudgeUnavailable, match="cannot be loaded: HTTP 500: model requires more system memory"):
            scored(run, stub, require_judge=True)
        assert stub.asked == []


def test_one_context_for_all_holds_the_longest_prompt(run: Path) -> None:
    write(run, [*RESPONSES, {**RESPONSES[0], "model_response": "word " * 2000}])
    with OllamaStub(says("80")) as stub:
        scored(run, stub)
        assert {payload["options"]["num_ctx"] for payload in [*stub.asked, *stub.warm_ups]} == {4096}


def test_prompts_that_the_server_cut_are_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = [says("80", prompt_eval_count=count) for count in (2048 - 128, 2048 - 129)]
    with OllamaStub(*full, lines(piece("80"), b'{"done": true}\n')) as stub:
        scores = scored(run, stub)
    assert scores["summary"]["cut_rows"] == [1]
    assert [judgement.get("cut") for judgement in scores["judgements"]] == [True, None, None, None]
    assert [judgement.get("prompt_tokens") for judgement in scores["judgements"]] == [1920, 1919, None, None]
    assert "1 prompts were longer than the judge's context and lost their front: row 1" in capsys.readouterr().err


def test_only_changed_responses_are_asked_about_and_old_answers_stay(run: Path) -> None:
    with OllamaStub(says("10"), says("20"), says("40"), says("99")) as stub:
        scored(run, stub)
        write(run, with_responses("This is the word one.", "Changed.", "", "five"))
        assert given(scored(run, stub)) == [10, 99, 0, 40]
        write(run, RESPONSES)
        assert given(scored(run, stub)) == [10, 20, 0, 40]
        assert len(stub.asked) == 4


def test_another_model_is_asked_anew_and_the_first_ones_answers_stay(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"llama3:latest": "a", "phi3:latest": "b"}
    with OllamaStub(says("10"), says("20"), says("40"), says("99"), models=models) as stub:
        scored(run, stub)
        scores = scored(run, stub, judge_model="phi3")
        assert given(scores) == [99, 99, 0, 99]
        assert scores["summary"]["judge"]["model"] == "phi3"
        assert "no longer" not in capsys.readouterr().err
        assert given(scored(run, stub, judge_model="mistyped")) == [None] * 4
        said = " ".join(capsys.readouterr().err.split())
        assert f"{run / 'scores.json'} has no longer the scores that phi3 gave; its answers are kept" in said
        assert given(scored(run, unused_url())) == [10, 20, 0, 40]


def test_equal_questions_share_an_answer(tmp_path: Path) -> None:
    write(tmp_path, [RESPONSES[0], RESPONSES[1], RESPONSES[0]])
    with OllamaStub(says("10"), says("20"), says("30")) as stub:
        assert given(scored(tmp_path, stub)) == [10, 20, 10]


def test_without_a_judge_the_text_metrics_stay_and_one_line_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = scored(run, unused_url())
    assert given(scores) == [None] * 4
    assert all("ollama serve" in judgement["reason"] for judgement in scores["judgements"])
    assert scores["summary"]["judge"] is None
    assert scores["summary"]["judge_mean"] is None
    assert "ollama serve" in scores["summary"]["no_judge"]
    assert scores["summary"]["exact_match"] == 25
    said = [line for line in capsys.readouterr().err.splitlines() if "judge" in line and "perplexity" not in line]
    assert len(said) == 1
    assert "`ollama serve`" in said[0]


def test_a_missing_model_names_its_pull(run: Path) -> None:
    with OllamaStub(models=[]) as stub:
        assert "`ollama pull llama3`" in scored(run, stub)["summary"]["no_judge"]
        assert stub.asked == []


def test_a_required_judge_that_is_not_there_is_an_error_after_the_metrics(run: Path) -> None:
    with pytest.raises(JudgeUnavailable, match="ollama serve"):
        scored(run, unused_url(), require_judge=True)
    assert saved(run)["summary"]["exact_match"] == 25
    assert "ollama serve" in saved(run)["summary"]["no_judge"]


@pytest.mark.parametrize("action", [status(500, "out of memory"), status(400, "out of memory")])
def test_a_judge_that_answers_no_question_is_no_usable_judge(run: Path, action: Action) -> None:
    with OllamaStub(action) as stub, pytest.raises(JudgeUnavailable, match=r"none of 3 questions.*out of memory"):
        scored(run, stub, require_judge=True)
    assert given(saved(run)) == [None, None, 0, None]


def test_a_server_that_only_fails_ends_the_asking(tmp_path: Path) -> None:
    write(tmp_path, [{**ENTRIES[0], "model_response": str(number)} for number in range(10)])
    with OllamaStub(says("80"), status(400, "broken")) as stub:
        scores = scored(tmp_path, stub)
        assert len(stub.asked) == 1 + 5
        assert "failed 5 questions in a row, the last one with: HTTP 400: broken" in scores["summary"]["no_judge"]
        assert scores["judgements"][1]["reason"] == "HTTP 400: broken"
        assert scores["judgements"][9]["reason"].startswith("no judge: ")
        stub.actions = [says("70")]
        assert given(scored(tmp_path, stub)) == [80] + [70] * 9


def test_a_server_that_goes_away_ends_the_asking_and_loses_nothing(run: Path) -> None:
    with OllamaStub(says("80")) as stub:

        def go_away(handler: Handler) -> None:
            stub.get_override = status(500, "shutting down")
            status(500, "shutting down")(handler)

        stub.actions.append(go_away)
        scores = scored(run, stub, judge_retries=1)
        assert len(stub.asked) == 1 + 2
    assert given(scores) == [80, None, 0, None]
    assert scores["judgements"][1]["reason"] == "HTTP 500: shutting down"
    assert scores["judgements"][3]["reason"].startswith("no judge: ")
    assert scores["summary"]["judge_mean"] == 40


def test_judge_none_asks_nobody_and_keeps_answers(run: Path) -> None:
    with OllamaStub(says("80")) as stub:
        scores = unasked(run)
        assert given(scores) == [None] * 4
        assert (scores["summary"]["judge"], scores["summary"]["no_judge"]) == (None, "--judge none")
        assert stub.gets == stub.asked == []
        assert scores["summary"].keys() == scored(run, stub)["summary"].keys()
    assert given(unasked(run)) == [80, 80, 0, 80]


def unasked(run: Path) -> dict[str, Any]:
    """The scores by `--judge none`, which takes no other option of a judge."""
    scores = score(ScoreOptions(run=run, judge="none"))
    assert scores == saved(run)
    return scores


@pytest.mark.parametrize("scores_json", [True, False])
@pytest.mark.parametrize("style", ["book", "reason"])
def test_judge_none_keeps_the_answers_of_any_judge(run: Path, style: Any, scores_json: bool) -> None:
    """Of whom scores.json names, else of whom the journal knows."""
    options = {"judge": "openai", "judge_model": "llama3:latest", "judge_style": style, "judge_parallel": 2}
    with OllamaStub(completes('{"score": 80}')) as stub:
        before = scored(run, stub, **options)
        assert given(before) == [80, 80, 0, 80]
        asked = len(stub.asked)
        if not scores_json:
            (run / "scores.json").unlink()
        after = unasked(run)
        assert len(stub.asked) == asked
    assert after["judgements"] == before["judgements"]
    who = {**before["summary"]["judge"], **({} if scores_json else {"parallel": 1})}
    assert after["summary"]["judge"] == who
    assert unasked(run) == after


def test_judge_none_keeps_answers_to_a_rubric(run: Path, tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Spelling counts.")
    with OllamaStub(says("70")) as stub:
        before = scored(run, stub, judge_rubric=rubric, judge_model="llama3")
    assert unasked(run)["judgements"] == before["judgements"]
    assert saved(run)["summary"]["judge"] == before["summary"]["judge"]


def test_judge_none_takes_the_judge_that_was_heard_of_these_responses(run: Path) -> None:
    with OllamaStub(says("10"), models={"llama3:latest": "a", "phi3:latest": "b"}) as stub:
        scored(run, stub)
        stub.actions = [says("20")]
        scored(run, stub, judge_model="phi3")
        assert given(unasked(run)) == [20, 20, 0, 20]
        scored(run, stub, judge_model="llama3")
        assert given(unasked(run)) == [10, 10, 0, 10]


# Reasoning models

THOUGHT = "Maybe 20, no, the score: 30. "


@pytest.mark.parametrize("wire", ["ollama", "openai"])
@pytest.mark.parametrize("apart", [True, False])
def test_a_reply_that_is_all_thinking_is_asked_for_again_with_more_room(
    run: Path, capsys: pytest.CaptureFixture[str], wire: str, apart: bool
) -> None:
    """Each response thinks past the first room, and answers in the second."""
    trace, marked = (THOUGHT, "") if apart else ("", f"<think>{THOUGHT}")

    def act(handler: Handler) -> None:
        payload = handler.stub.asked[-1]
        room = payload.get("max_tokens") or payload["options"]["num_predict"]
        text = marked if room < 1000 else f"{marked}</think>85" if marked else "85"
        finish = "length" if room < 1000 else "stop"
        if wire == "openai":
            completes(text, {"reasoning_content": trace}, finish_reason=finish)(handler)
        else:
            thinks(trace, text, done_reason=finish)(handler)

    options = {} if wire == "ollama" else {"judge": "openai", "judge_model": "llama3:latest"}
    with OllamaStub(act) as stub:
        scores = scored(run, stub, **options)
        rooms = [payload.get("max_tokens") or payload["options"]["num_predict"] for payload in stub.asked]
        assert rooms == [128] * 3 + [4096] * 3  # the larger context is loaded once
        if wire == "ollama":
            assert [one["options"]["num_ctx"] for one in stub.warm_ups] == [2048, 8192]
        assert scored(run, stub, **options) == scores
        assert len(stub.asked) == 6
    assert given(scores) == [85, 85, 0, 85]
    assert scores["summary"]["n_more_room"] == 3
    assert scores["summary"]["judge_rungs"] == {"integer": 3}
    assert "3 replies were all thinking and were asked for again with more room" in capsys.readouterr().err
    assert given(unasked(run)) == given(scores)


@pytest.mark.parametrize("reply", [thinks(THOUGHT), says(f"<think>{THOUGHT}", done_reason="length"), says("")])
def test_a_judge_without_an_answer_is_no_usable_judge(run: Path, reply: Action) -> None:
    with OllamaStub(reply) as stub:
        with pytest.raises(JudgeUnavailable, match=r"gave no score for any of 3 responses") as caught:
            scored(run, stub, require_judge=True)
        asked = len(stub.asked)
        with pytest.raises(JudgeUnavailable):  # also where every reply is there already
            scored(run, stub, require_judge=True)
        assert len(stub.asked) == asked
    assert caught.value.exit_status == 3
    assert "--judge_model" in str(caught.value)
    assert given(saved(run)) == [None, None, 0, None]
    assert "gave no score" in saved(run)["summary"]["no_judge"]


def test_what_thinking_took_is_said_with_its_tokens(run: Path) -> None:
    with OllamaStub(thinks(THOUGHT)) as stub:
        stub.shown["model_info"] = {"llama.context_length": 131072}
        scores = scored(run, stub, judge_tokens=6000)
        reason = "its thinking took all 6000 tokens; asked again: its thinking took all 6000 tokens"
        assert scores["judgements"][0]["reason"] == reason
        assert {payload["options"]["num_predict"] for payload in stub.asked} == {128, 6000}
        assert "give it more room with --judge_tokens" in scores["summary"]["no_judge"]
        assert given(scored(run, stub, judge_tokens=7000)) == [None, None, 0, None]
        assert {payload["options"]["num_predict"] for payload in stub.asked} == {128, 6000, 7000}


def test_a_model_whose_context_leaves_no_more_room_is_asked_once(run: Path) -> None:
    with OllamaStub(thinks(THOUGHT)) as stub:
        stub.shown["model_info"] = {"llama.context_length": 256}
        scores = scored(run, stub)
        assert len(stub.asked) == 3 * 2
    assert scores["judgements"][0]["reason"].startswith("its thinking took all 128 tokens")


def test_a_hidden_trace_is_asked_for_again_too(run: Path) -> None:
    """As of hosted models that show nothing of it but the tokens."""
    with OllamaStub(completes("", finish_reason="length", tokens=128), completes("85")) as stub:
        write(run, RESPONSES[:1])
        assert given(scored(run, stub, judge="openai", judge_model="llama3:latest")) == [85]
        assert [payload["max_tokens"] for payload in stub.asked] == [128, 4096]


def test_a_second_question_that_is_all_thinking_has_more_room_too(run: Path) -> None:
    write(run, RESPONSES[:1])
    with OllamaStub(says("good"), thinks(THOUGHT), thinks(THOUGHT, '{"score": 70}')) as stub:
        judgement = scored(run, stub)["judgements"][0]
        rooms = [(payload["options"]["num_predict"], "format" in payload) for payload in stub.asked]
    assert rooms == [(128, False), (128, True), (4096, True)]
    assert (judgement["score"], judgement["rung"], judgement["more_room"]) == (70, "asked again: json", True)


def test_a_failure_with_more_room_is_listed_and_asked_again(run: Path) -> None:
    write(run, RESPONSES[:1])
    with OllamaStub(thinks(THOUGHT), status(400, "bad"), says("80")) as stub:
        first = scored(run, stub)["judgements"][0]
        assert (first["score"], first["answered"]) == (None, False)
        assert first["reason"] == "its thinking took all 128 tokens; asked again: HTTP 400: bad"
        assert given(scored(run, stub)) == [80]
        assert len(stub.asked) == 3


def test_a_run_that_is_broken_off_before_more_room_goes_on_there(run: Path) -> None:
    with OllamaStub(thinks(THOUGHT), thinks(THOUGHT), thinks(THOUGHT), says("60")) as stub:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Meter, "advance", interrupt_at(1))
            with pytest.raises(KeyboardInterrupt):
                scored(run, stub, judge_parallel=1)
        asked = len(stub.asked)
        assert given(scored(run, stub)) == [60, 60, 0, 60]
        assert [payload["options"]["num_predict"] for payload in stub.asked[asked:]].count(128) == 0


def test_ambiguous_replies_are_asked_about_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        "85 out of 100. Else it would be 0 out of 100!",
        "Accuracy score: 40\nFluency score: 45",
        "1. Right 2. Short",
    ]
    again = says('{"score": 70}')
    script = [action for text in texts for action in (says(text), again)]
    with OllamaStub(*script) as stub:
        scores = scored(run, stub)
    assert given(scores) == [70, 70, 0, 70]
    assert scores["summary"]["judge_rungs"] == {"asked again: json": 3}
    assert "scores were read from JSON when asked again 3" in capsys.readouterr().err


@pytest.mark.parametrize(("texts", "said"), [(["80"], False), (["80", "Score: 80", "80"], True)])
def test_where_scores_were_read_is_said_where_one_is_no_bare_integer(
    run: Path, capsys: pytest.CaptureFixture[str], texts: list[str], said: bool
) -> None:
    with OllamaStub(*map(says, texts)) as stub:
        scored(run, stub)
    words = "judge: scores were read from a bare integer 2, a labelled number 1\n"
    assert (words in capsys.readouterr().err) is said


# Parameters that a server takes not


def test_what_a_server_refuses_is_remembered_recorded_and_asks_nothing_anew(run: Path) -> None:
    options = {"judge": "openai", "judge_model": "llama3:latest"}
    with OllamaStub(refuses("temperature", "seed", then=completes("80"))) as stub:
        scores = scored(run, stub, **options)
        assert len(stub.asked) == 3 + 2
        assert scores["summary"]["judge"]["options"] == {"max_tokens": 128}
        assert scored(run, stub, **options) == scores
        assert len(stub.asked) == 5
        write(run, with_responses("This is the word one.", "Changed.", "", "five"))
        scored(run, stub, **options)
        assert len(stub.asked) == 6  # without what was refused in another call
    assert unasked(run)["summary"]["judge"]["options"] == {"max_tokens": 128}


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"judge_tokens": 512}, "got --judge_tokens 512, expected more than the 512 of a first reply"),
    ({"judge": "openai"}, "--judge openai: expected --judge_url with it"),
    ({"judge_parallel": 0}, "got --judge_parallel 0, expected at least 1"),
    ({"judge_retries": -1}, "got --judge_retries -1, expected at least 0"),
    ({"judge_timeout": 0.0}, "got --judge_timeout 0.0, expected seconds above 0"),
    ({"judge_pause": float("nan")}, "got --judge_pause nan"),
    (
        {"judge_total_timeout": 1e10},
        "got --judge_total_timeout 10000000000.0, expected seconds above 0, at most 1,000,000",
    ),
]


def test_a_run_of_empty_responses_has_a_judge_and_the_worst_mean(tmp_path: Path) -> None:
    """So that a model that says nothing can be compared with one that does."""
    write(tmp_path, with_responses("", " ", "", "\n"))
    with OllamaStub(says("80")) as stub:
        summary = scored(tmp_path, stub)["summary"]
        assert stub.asked == []
    assert (summary["judge"]["model"], summary["judge_mean"], summary["n_scored"]) == ("llama3", 0, 4)


def test_an_origin_of_something_else_does_not_stop_the_scoring(run: Path) -> None:
    (run / "responses.made-from.json").write_text("[]")
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").write_bytes(b"")
    assert scored(run, unused_url())["summary"]["n"] == 4


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_options_that_do_not_fit_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        ScoreOptions(run=Path("out"), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff"])
def test_a_rubric_that_cannot_be_read(run: Path, tmp_path: Path, content: bytes | None) -> None:
    rubric = tmp_path / "rubric.txt"
    if content is not None:
        rubric.write_bytes(content)
    with pytest.raises(UserError, match=r"--judge_rubric: .*rubric\.txt"):
        scored(run, unused_url(), judge_rubric=rubric)


def test_a_bad_address_is_found_before_any_work(run: Path) -> None:
    with pytest.raises(UserError, match="--judge_url"):
        scored(run, "localhost:11434")
    assert not (run / "scores.json").exists()


BAD = [
    ("{}", "got an object, expected a list"),
    ("[]", "got an empty array, expected a list of one or more"),
    ("[", "is not JSON"),
    ("[3]", "row 1: got a number, expected an object"),
    (json.dumps([RESPONSES[0], {**RESPONSES[1], "model_response": None}]), "row 2: model_response is null"),
    (json.dumps([RESPONSES[0], ENTRIES[1]]), "row 2: model_response is missing; make it with `fastft generate"),
    (json.dumps([{**RESPONSES[0], "input": ["x"]}]), "row 1: input is an array, expected text"),
    (json.dumps([{**RESPONSES[0], "output": 3}]), "row 1: output is a number, expected text"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_malformed_responses_are_named_by_row(run: Path, text: str, message: str) -> None:
    (run / "responses.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"responses\.json") as caught:
        scored(run, unused_url())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_responses_name_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"`fastft generate --run {tmp_path}`"):
        scored(tmp_path, unused_url())


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"judgements": [{"score": 1}]}', '{"summary": 3}', "null"])
def test_foreign_scores_are_not_overwritten(run: Path, text: str) -> None:
    (run / "scores.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"scores\.json"):
        scored(run, unused_url())
    assert (run / "scores.json").read_text(encoding="utf-8") == text


def perplexity_stub(monkeypatch: pytest.MonkeyPatch, run: Path, answer: Any) -> None:
    def response_perplexities(run: Path, entries: list[dict[str, Any]]) -> dict[str | None, float]:
        assert [entry["model_response"] for entry in entries] == [entry["model_response"] for entry in RESPONSES]
        if isinstance(answer, Exception):
            raise answer
        return {None: float(answer), "a": 2.0}

    (run / "model").mkdir()
    module = types.ModuleType("fastft.metrics.perplexity")
    module.response_perplexities = response_perplexities
    monkeypatch.setitem(sys.modules, "fastft.metrics.perplexity", module)


def test_perplexity_is_in_the_summary(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perplexity_stub(monkeypatch, run, 3.5)
    summary = scored(run, unused_url())["summary"]
    assert (summary["perplexity"], summary["perplexity_by_category"]) == (3.5, {"a": 2.0})


@pytest.mark.parametrize("answer", [UserError("wte is missing"), RuntimeError("out of\nmemory"), float("nan")])
def test_perplexity_that_cannot_be_computed_is_left_out_with_a_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: Any
) -> None:
    perplexity_stub(monkeypatch, run, answer)
    assert scored(run, unused_url())["summary"]["perplexity"] is None
    said = [line for line in capsys.readouterr().err.splitlines() if "perplexity" in line]
    assert len(said) == 1
    assert " ".join(str(answer).split()) in said[0]


def test_multiple_choice_by_likelihood_is_in_the_summary_or_left_out_with_a_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    perplexity_stub(monkeypatch, run, 3.5)
    assert scored(run, unused_url())["summary"]["choices_by_likelihood"] is None
    write(run, [{**RESPONSES[0], "output": "B", "choices": ["x", "y"]}, *RESPONSES[1:]])
    assert scored(run, unused_url())["summary"]["choices_by_likelihood"] is None
    assert "multiple choice by likelihood is left out" in capsys.readouterr().err
    sys.modules["fastft.metrics.perplexity"].choice_accuracy = lambda *_: {"total": 1}
    summary = scored(run, unused_url())["summary"]
    assert (summary["choices_by_likelihood"], summary["multiple_choice"]["n"]) == ({"total": 1}, 1)
    assert "multiple choice 0.00%" in summary_line(summary)


def test_without_a_model_perplexity_is_left_out_with_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scored(run, unused_url())["summary"]["perplexity"] is None
    assert "perplexity is left out: there is no" in capsys.readouterr().err


def test_progress_away_from_a_terminal_is_plain_lines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with OllamaStub(says("80")) as stub:
        scored(run, stub)
    assert "judge 4/4 mean 60.00\n" in capsys.readouterr().err


def test_half_a_surrogate_pair_in_a_response_is_scored(tmp_path: Path) -> None:
    write(tmp_path, with_responses("\ud83d is the word one."))
    with OllamaStub(says("80")) as stub:
        assert given(scored(tmp_path, stub)) == [80]


def test_summary_line_has_a_dash_for_what_is_undefined_and_leaves_out_what_is_not_known() -> None:
    summary = {"n": 4, "exact_match": 50.0, "bleu": None, "rouge_l": 75.0, "perplexity": None, "judge_mean": 82.5}
    summary |= {"n_scored": 3, "left_out_rows": []}
    assert summary_line(summary) == (
        "4 responses: exact match 50.00%, BLEU –, ROUGE-L 75.00%, judge's mean 82.50 over 3 of 4 responses"
    )
    said = summary_line(summary | {"left_out_rows": [2, 5]})
    assert said.startswith("4 responses (2 more entries were left out by generate): exact match")


LEFT_OUT = "its prompt fills the context of 256 tokens"


def without(entries: list[dict[str, Any]], *rows: int) -> list[dict[str, Any]]:
    """As `generate` writes them where the prompts of these rows, from 1, leave no room for a response."""
    return [
        {**entry, "model_response": "", "left_out": LEFT_OUT} if row in rows else entry
        for row, entry in enumerate(entries, start=1)
    ]


def test_entries_that_generate_left_out_are_in_no_figure_and_are_said(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 3 was answered with nothing, which scores 0; row 2 was not answered, which is no score at all."""
    write(run, without(RESPONSES, 2))
    with OllamaStub(says("100"), says("50")) as stub:
        scores = scored(run, stub)
        assert [word_in(prompt) for prompt in stub.prompts()] == ["one", "four"]
    assert given(scores) == [100, None, 0, 50]
    assert scores["judgements"][1] == {
        "score": None, "raw": "", "key": None, "answered": True, "left_out": True,
        "reason": f"left out by generate: {LEFT_OUT}",
    }  # fmt: skip
    summary = scores["summary"]
    assert (summary["n"], summary["left_out_rows"], summary["judge_mean"]) == (3, [2], 50)
    assert (summary["n_scored"], summary["n_unscored"], summary["unparsed_rows"]) == (3, 0, [])
    assert (summary["exact_match"], summary["empty_responses"]) == (pytest.approx(100 / 3), 1)
    assert (summary["judge_book_mean"], summary["n_book"]) == (50, 3)
    assert (summary["by_category"]["a"]["n"], summary["by_category"]["a"]["exact_match"]) == (1, 100)
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: 1 of 4 entries were left out by generate and are in no figure: row 2" in said
    expected = {key: value for key, value in metrics.summary([RESPONSES[0], *RESPONSES[2:]]).items() if key != "n"}
    assert {key: summary[key] for key in expected if key != "by_category"} == {
        key: value for key, value in expected.items() if key != "by_category"
    }


def test_a_prompt_that_was_left_out_does_not_make_the_judges_context_longer(run: Path) -> None:
    long = [{**RESPONSES[0], "input": "word " * 3000}, *RESPONSES[1:]]
    for entries, num_ctx in ((long, 8192), (without(long, 1), 2048)):
        write(run, entries)
        with OllamaStub(says("80")) as stub:
            scored(run, stub)
            assert {asked["options"]["num_ctx"] for asked in stub.asked} == {num_ctx}


def test_an_entry_that_was_left_out_has_no_judgement_without_a_judge_either(run: Path) -> None:
    write(run, without(RESPONSES, 2, 3))
    for options in ({"judge_url": unused_url()}, {"judge": "none"}):
        scores = score(ScoreOptions(run=run, **options))
        assert scores["judgements"][1]["reason"] == f"left out by generate: {LEFT_OUT}"
        assert (scores["summary"]["left_out_rows"], scores["summary"]["n"]) == ([2, 3], 2)


def test_where_all_entries_were_left_out_there_is_nothing_to_score(run: Path) -> None:
    write(run, without(RESPONSES, 1, 2, 3, 4))
    with pytest.raises(UserError, match=f"left out all 4 entries of .*responses.json, the first one since {LEFT_OUT}"):
        scored(run, unused_url())


@pytest.mark.parametrize(
    "more",
    [
        {"left_out": False, "model_response": ""},
        {"left_out": None, "model_response": ""},
        {"left_out": "", "model_response": ""},
        {"left_out": "by whom?", "model_response": "five"},
    ],
)
def test_a_key_of_the_datas_own_leaves_nothing_out(run: Path, more: dict[str, Any]) -> None:
    write(run, [{**RESPONSES[0], **more}])
    with OllamaStub(says("80")) as stub:
        assert scored(run, stub)["summary"]["left_out_rows"] == []


def test_responses_of_other_weights_are_scored_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [{"instruction": "a", "input": "", "output": "b", "model_response": "b"}]
    (tmp_path / "responses.json").write_text(json.dumps(entries))
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"now")
    origin = tmp_path / "responses.made-from.json"
    for made_from, stale in ((b"now", False), (b"then", True)):
        origin.write_text(json.dumps({"weights_sha256": hashlib.sha256(made_from).hexdigest()}))
        score(ScoreOptions(run=tmp_path, judge="none"))
        assert ("`fastft generate` answers again" in " ".join(capsys.readouterr().err.split())) is stale
    said = "the responses are not those of the run's model as it is now; `fastft generate` answers again"
    assert read_run(tmp_path).answer_notes == [said]
    assert said.replace("'", "&#39;") in report(ReportOptions(run=tmp_path)).read_text(encoding="utf-8")
    compare(CompareOptions(tmp_path, tmp_path))
    assert " ".join(capsys.readouterr().err.split()).count(f"{tmp_path}: {said}") == 1


def test_answers_that_are_not_whole_are_scored_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a killed call leaves them, which gives the longest questions' first."""
    entries = [{"instruction": "a", "input": "", "output": "b", "model_response": "b"}]
    (tmp_path / "responses.json").write_text(json.dumps(entries))
    (tmp_path / "conversations.json").write_text('[{"id": 1, "turns": [{"question": "a", "answer": "b"}]}]')
    for called, n, of in (("responses", 1, 3), ("conversations", 2, 2)):
        (tmp_path / f"{called}.made-from.json").write_text(json.dumps({"n_answered": n, "n_asked": of}))
    score(ScoreOptions(run=tmp_path, judge="none"))
    said = " ".join(capsys.readouterr().err.split())
    assert "the responses are not whole: 1 of 3 answers are there; `fastft generate` gives the others" in said
    assert said.count("are not whole") == 1


def test_responses_of_a_name_have_scores_of_their_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside those without one, whose replies of the judge are not asked for again where they are the same."""
    with OllamaStub(says("80")) as stub:
        first = scored(run, stub)
        asked = len(stub.asked)
        (run / "responses.t1.0.json").write_text(json.dumps([*RESPONSES[:3], {**RESPONSES[3], "model_response": "4"}]))
        decoding = {"max_new_tokens": 9, "dtype": "fp32", "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 3}
        (run / "responses.t1.0.made-from.json").write_text(json.dumps({**decoding, "tokens": 7}))
        named = score(ScoreOptions(run=run, name="t1.0", judge_url=stub.url))
        assert len(stub.asked) == asked + 1
    assert saved(run) == first
    assert json.loads((run / "scores.t1.0.json").read_text()) == named
    assert (first["summary"]["name"], first["summary"]["decoding"]) == (None, None)
    assert (named["summary"]["name"], named["summary"]["decoding"]) == ("t1.0", decoding)
    assert summary_line(named["summary"]).startswith("t1.0, 4 responses: ")
    assert summary_line(first["summary"]).startswith("4 responses: ")
    with pytest.raises(UserError, match=r"responses\.t2\.json does not exist; make it with .* --name t2`"):
        score(ScoreOptions(run=run, name="t2", judge="none"))
    with pytest.raises(UserError, match="got --name val, which is reserved for a split"):
        score(ScoreOptions(run=run, name="val", judge="none"))
    kept = score(ScoreOptions(run=run, name="t1.0", judge="none"))["summary"]
    assert kept["judge_mean"] == named["summary"]["judge_mean"] == 60
