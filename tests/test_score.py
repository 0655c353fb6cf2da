from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from ollama_stub import Action, Handler, OllamaStub, says, status, unused_url

from fastft import judge as judge_module
from fastft import metrics
from fastft.errors import JudgeUnavailable, UserError
from fastft.score import ScoreOptions, score, summary_line

ENTRIES: list[dict[str, Any]] = [
    {"instruction": f"Say {word}.", "input": "", "output": f"This is the word {word}.", "category": category}
    for word, category in [("one", "a"), ("two", "a"), ("three", "b"), ("four", "b")]
]


def with_responses(*responses: str) -> list[dict[str, Any]]:
    return [{**entry, "model_response": text} for entry, text in zip(ENTRIES, responses, strict=False)]


RESPONSES = with_responses("This is the word one.", "This is a word.", "", "five")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module.time, "sleep", lambda _: None)


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
    scores = score(ScoreOptions(run=run, judge_url=url, **options))
    assert scores == saved(run)
    return scores


def given(scores: dict[str, Any]) -> list[int | None]:
    return [judgement["score"] for judgement in scores["judgements"]]


def test_every_response_has_a_judgement_in_its_order(run: Path) -> None:
    with OllamaStub(says("100"), says("about 40"), says("7")) as stub:
        scores = scored(run, stub)
    assert given(scores) == [100, None, 0, 7]
    assert [judgement.get("reason") for judgement in scores["judgements"]] == [
        None,
        "not an integer: 'about 40'",
        "empty response",
        None,
    ]
    assert [judgement["raw"] for judgement in scores["judgements"]] == ["100", "about 40", "", "7"]
    summary = scores["summary"]
    assert summary["judge"] == {
        "name": "ollama",
        "model": "llama3",
        "options": {"seed": 123, "temperature": 0, "num_ctx": 2048},
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


def test_a_second_call_asks_nothing_and_needs_no_server(run: Path) -> None:
    with OllamaStub(says("80")) as stub:
        first = scored(run, stub)
        assert len(stub.asked) == 3
    assert scored(run, unused_url(), require_judge=True) == first


def test_a_killed_run_goes_on_where_it_stopped(run: Path) -> None:
    with OllamaStub(says("80"), says("no number")) as stub:
        ask = judge_module.OllamaJudge.score

        def killed_at_the_fourth(self: judge_module.OllamaJudge, entry: Any) -> Any:
            if entry["instruction"] == "Say four.":
                raise KeyboardInterrupt
            return ask(self, entry)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(judge_module.OllamaJudge, "score", killed_at_the_fourth)
            with pytest.raises(KeyboardInterrupt):
                scored(run, stub)
        assert given(saved(run)) == [80, None, 0, None]
        assert saved(run)["judgements"][3]["reason"] == "not judged yet"
        stub.actions = [says("60")]
        scores = scored(run, stub)
        assert len(stub.asked) == 3
    assert given(scores) == [80, None, 0, 60]
    assert scores["judgements"][1]["reason"] == "not an integer: 'no number'"


def test_a_failed_request_is_asked_again_by_the_next_call(run: Path) -> None:
    with OllamaStub(status(400, "bad"), says("50")) as stub:
        assert given(scored(run, stub)) == [None, 50, 0, 50]
        assert given(scored(run, stub)) == [50, 50, 0, 50]
        assert len(stub.asked) == 4


def test_only_changed_responses_are_asked_about_and_old_answers_stay(run: Path) -> None:
    with OllamaStub(says("10"), says("20"), says("40"), says("99")) as stub:
        scored(run, stub)
        write(run, with_responses("This is the word one.", "Changed.", "", "five"))
        assert given(scored(run, stub)) == [10, 99, 0, 40]
        write(run, RESPONSES)
        assert given(scored(run, stub)) == [10, 20, 0, 40]
        assert len(stub.asked) == 4


def test_another_model_is_asked_anew_and_the_first_ones_answers_stay(run: Path) -> None:
    with OllamaStub(says("10"), says("20"), says("40"), says("99"), models=["llama3:latest", "phi3:latest"]) as stub:
        scored(run, stub)
        scores = scored(run, stub, judge_model="phi3")
        assert given(scores) == [99, 99, 0, 99]
        assert scores["summary"]["judge"]["model"] == "phi3"
        assert given(scored(run, stub, judge_model="mistyped")) == [None] * 4
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
def test_a_judge_that_answers_no_request_is_no_usable_judge(run: Path, action: Action) -> None:
    with OllamaStub(action) as stub, pytest.raises(JudgeUnavailable, match=r"none of 3 requests.*out of memory"):
        scored(run, stub, require_judge=True)
    assert given(saved(run)) == [None, None, 0, None]


def test_a_server_that_goes_away_ends_the_asking_and_loses_nothing(run: Path) -> None:
    with OllamaStub(says("80")) as stub:

        def go_away(handler: Handler) -> None:
            stub.get_override = status(500, "shutting down")
            status(500, "shutting down")(handler)

        stub.actions.append(go_away)
        scores = scored(run, stub)
        assert len(stub.asked) == 1 + 3
    assert given(scores) == [80, None, None, None]
    assert scores["judgements"][1]["reason"] == "HTTP 500: shutting down"
    assert scores["judgements"][3]["reason"].startswith("no judge: ")
    assert scores["summary"]["judge_mean"] == 80


def test_judge_none_asks_nobody_and_keeps_answers(run: Path) -> None:
    with OllamaStub(says("80")) as stub:
        scores = scored(run, stub, judge="none")
        assert given(scores) == [None] * 4
        assert (scores["summary"]["judge"], scores["summary"]["no_judge"]) == (None, "--judge none")
        assert stub.gets == stub.asked == []
        scored(run, stub)
    assert given(scored(run, "no address", judge="none")) == [80, 80, 0, 80]


def test_a_required_judge_cannot_be_none() -> None:
    with pytest.raises(UserError, match="--require_judge"):
        ScoreOptions(run=Path("out"), judge="none", require_judge=True)


def test_a_bad_address_is_found_before_any_work(run: Path) -> None:
    with pytest.raises(UserError, match="--judge_url"):
        scored(run, "localhost:11434")
    assert not (run / "scores.json").exists()


BAD = [
    ("{}", "got an object, expected a list"),
    ("[]", "got an empty list, expected a list of one or more"),
    ("[", "is not JSON"),
    ("[3]", "row 1: got a number, expected an object"),
    (json.dumps([RESPONSES[0], {**RESPONSES[1], "model_response": None}]), "row 2: model_response is null"),
    (json.dumps([RESPONSES[0], ENTRIES[1]]), "row 2: model_response is missing; make it with `fastft generate"),
    (json.dumps([{**RESPONSES[0], "input": ["x"]}]), "row 1: input is a list, expected text"),
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


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"judgements": [{"score": 1}]}', '{"judgements": 3}'])
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
    module = types.ModuleType("fastft.perplexity")
    module.response_perplexities = response_perplexities  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastft.perplexity", module)


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
    sys.modules["fastft.perplexity"].choice_accuracy = lambda *_: {"total": 1}  # type: ignore[attr-defined]
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


def test_summary_line_leaves_out_what_is_not_known() -> None:
    summary = {"n": 4, "exact_match": 50.0, "bleu": None, "rouge_l": 75.0, "perplexity": None, "judge_mean": 82.5}
    summary |= {"n_scored": 3}
    assert summary_line(summary) == (
        "4 responses: exact match 50.00%, ROUGE-L 75.00%, judge's mean 82.50 over 3 of 4 responses"
    )


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
