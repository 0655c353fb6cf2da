from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastft.common.errors import UserError
from fastft.metrics.text_metrics import accuracy
from fastft.reports.figures import _OF_PEOPLE
from fastft.reports.report import ReportOptions, report
from fastft.scores.score import ScoreOptions, score

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\""
ENTRIES = [
    {"instruction": "Name the plural.", "input": "goose", "output": "Geese it is.", "model_response": "Geese it is."},
    {"instruction": EVIL, "input": EVIL, "output": EVIL, "model_response": EVIL + "!", "category": EVIL},
    {"instruction": "Say nothing.", "input": "", "output": "Something.", "model_response": ""},
]
STEPS: list[dict[str, Any]] = [
    {"step": step, "loss": 4.0 / step, "lr": 1e-4 * step, "grad_norm": 1.0, "seconds": 0.5,
     "tokens_padded": 1000, "tokens_real": 600, "tokens_computed": 400, "tokens_supervised": 200}
    for step in range(1, 5)
]  # fmt: skip


class Page(HTMLParser):
    """The elements, the text, and the ids of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and self.cdata_elem:
            self.scripts += [data] if self.cdata_elem == "script" else []
        else:
            self.text += data + " "  # cells that touch in the source stand apart on the page

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def answers(self) -> dict[str, Any]:
        """What the page's script shows of the answers, by their names in `fastft.reports.answer_data`."""
        (held,) = [script for script in self.scripts if script.startswith("{")]
        return dict(json.loads(held))

    def responses(self) -> list[list[Any]]:
        """The first run's answers as the script takes them."""
        return [row[5][0] for row in self.answers()["rows"]]

    def squeezed(self) -> str:
        return " ".join(self.text.split())


def write_metrics(run: Path, *lines: Any) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_responses(run: Path, entries: Any = ENTRIES) -> None:
    (run / "responses.json").write_text(json.dumps(entries), encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, whose names are as hostile as its texts."""
    run = tmp_path_factory.mktemp("run") / "<b>a&b"
    run.mkdir()
    (run / "config.yaml").write_text(f"seed: 123\noptim:\n  lr: 5.0e-05\nnote: {json.dumps(EVIL)}\n", encoding="utf-8")
    write_metrics(run, *STEPS, {"step": 2, "val_loss": 3.0}, {"step": 4, "val_loss": 2.5}, {"event": "sample"})
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": 0.1, "tokens_pad')
    write_responses(run)
    score(ScoreOptions(run=run, judge="none"))
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    scores["judgements"][0].update(score=97, raw="97", reason=None)
    scores["judgements"][1].update(raw=EVIL, reason="not an integer: " + EVIL)
    scores["summary"].update(judge_mean=48.25, n_scored=1, n_unscored=2)
    (run / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    (run / "demo.json").write_text('{"exact_match_before": 1.5}', encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    path = report(ReportOptions(run=run))
    assert path == run / "report.html"
    return Page(path)


def test_no_text_of_a_run_becomes_markup(page: Page) -> None:
    assert page.count("img") == 0
    assert len(page.scripts) == page.count("script") == 3
    (held,) = [script for script in page.scripts if script.startswith("{")]
    assert not set(held) & set("<>&")
    assert not any(EVIL[8:20] in script for script in page.scripts if script != held)
    assert "&lt;b&gt;a&amp;b" in page.source
    assert "<b>a" not in page.source
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(EVIL) == 2  # the configuration, and the table of categories
    _, instruction, given, reference, category, ((response, *_, reason, reply),) = page.answers()["rows"][1]
    assert [instruction, given, reference, reply, response] == [EVIL] * 4 + [EVIL + "!"]
    assert page.answers()["categories"][category] == EVIL
    assert page.answers()["reasons"][reason] == "not an integer: " + EVIL


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    source = page.source.replace(EVIL, "")
    body = source.split("</head>")[1].split("<script>")[0]
    assert not re.search(r"https?:|//|@import|url\((?!#)", body)
    assert not re.search(r"https?:|@import|url\((?!#)|fetch|XMLHttp|import\(", source)
    assert page.count("link") == page.count("iframe") == 0
    references = {value for _, attributes in page.tags for name, value in attributes.items() if "href" in name}
    assert all(value is not None and value.startswith("#") for value in references)


def test_ids_are_unique_and_references_resolve(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", page.source)) <= set(ids)


def test_there_is_a_chart_of_each_kind_in_the_pages_own_colour(page: Page) -> None:
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert labels == ["loss against step", "learning rate against step", "gradient norm against step"]
    assert "currentColor" in page.source
    assert "var(--accent)" in page.source
    assert "#01020" not in page.source
    assert "training" in page.text
    assert "validation" in page.text
    assert "color-scheme: light dark" in page.source
    assert "@media print" in page.source


def test_tokens_are_summed_with_shares(page: Page) -> None:
    text = page.squeezed()
    for count, share in [("4,000", "100.0"), ("2,400", "60.0"), ("1,600", "40.0"), ("800", "20.0")]:
        assert re.search(rf" {count} {share} %", text), count
    assert "1,200 real tokens a second over 2.0 s" in text
    assert "skipped" not in text


def test_scores_and_configuration_are_shown(page: Page) -> None:
    text = page.squeezed()
    assert "Exact match, % 33.33 6.15 to 79.23 before training 1.50" in text
    assert "Judge’s mean 48.25" in text
    assert "optim.lr 5e-05" in text


def test_responses_stand_beside_their_judgements(page: Page) -> None:
    held = page.answers()
    assert (held["main"], len(held["rows"])) == ("judge", 3)
    assert [answer[1] for answer in page.responses()] == [97, None, None]
    assert [answer[3] for answer in page.responses()] == [1, 0, 0]
    named = [[held["problems"][place] for place in answer[4]] for answer in page.responses()]
    no_score, different = "no score by the judge", "not the reference’s text"
    assert named == [[], [different, no_score], [different, "empty", no_score]]


def judged_by_nobody(run: Path, why: str, n: int = 8) -> Path:
    run.mkdir()
    write_responses(run, [{**ENTRIES[0], "instruction": f"Question {i}."} for i in range(n)])
    score(ScoreOptions(run=run, judge="none"))
    held = json.loads((run / "scores.json").read_text())
    held["summary"]["no_judge"] = why
    for judgement in held["judgements"]:
        judgement["reason"] = f"no judge: {why}"
    (run / "scores.json").write_text(json.dumps(held))
    return run


@pytest.mark.parametrize("why", ["--judge none", "Ollama is not reachable; start it with `ollama serve`"])
def test_a_judge_that_was_not_asked_is_no_error(tmp_path: Path, why: str) -> None:
    run = judged_by_nobody(tmp_path / "run", why)
    page = Page(report(ReportOptions(run=run)))
    assert page.squeezed().count("No judge was asked") == 1
    assert page.squeezed().count(f"fastft score --run {run}") == 1
    assert page.source.count(why.replace("`", "&#96;")) <= 1
    assert all(answer[4:] == [[], None, None] for answer in page.responses())
    assert 'class="bad"' not in page.source


def test_an_error_that_concerns_all_answers_stands_once(tmp_path: Path) -> None:
    """The judge was there, answered one question, and went away; one reply is a fault of its own."""
    run = judged_by_nobody(tmp_path / "run", "the server went away")
    held = json.loads((run / "scores.json").read_text())
    held["summary"].update(judge={"name": "ollama", "model": "llama3"}, judge_mean=50)
    held["judgements"][0].update(score=50, reason=None)
    held["judgements"][1].update(reason="no number")
    (run / "scores.json").write_text(json.dumps(held))
    page = Page(report(ReportOptions(run=run)))
    assert page.squeezed().count("6 responses have no score: no judge: the server went away.") == 1
    assert page.squeezed().count("The judge has not finished: the server went away.") == 1
    assert page.answers()["reasons"] == ["no number"]
    assert [answer[5] for answer in page.responses()] == [None, 0] + [None] * 6
    no_score = page.answers()["problems"].index("no score by the judge")
    assert [no_score in answer[4] for answer in page.responses()] == [False] + [True] * 7


def test_figures_that_say_nothing_of_one_word_are_no_headlines(tmp_path: Path) -> None:
    for name, words in (("short", 1), ("long", 6)):
        (tmp_path / name).mkdir()
        text = " ".join(["owl"] * words)
        write_responses(tmp_path / name, [{**ENTRIES[0], "output": text, "model_response": text}] * 3)
        score(ScoreOptions(run=tmp_path / name, judge="none"))
    short, long = (Page(report(ReportOptions(run=tmp_path / name))) for name in ("short", "long"))
    headlines = {page: page.source.split('<dl class="figures">')[1].split("</dl>")[0] for page in (short, long)}
    for name in ("BLEU", "chrF", "ROUGE-L"):
        assert name not in headlines[short]
        assert name in headlines[long]
        assert name in short.text  # among all figures
    assert all("Exact match" in one for one in headlines.values())


def test_every_figure_of_every_run_is_on_the_page(tmp_path: Path) -> None:
    for name, temperature, loss in (("one", 0.0, 3.25), ("two", 0.9, 2.125)):
        (tmp_path / name).mkdir()
        write_responses(tmp_path / name, [{**ENTRIES[0], "category": "plurals"}] * 2)
        write_metrics(tmp_path / name, *[{**step, "grad_norm": loss} for step in STEPS], {"step": 4, "val_loss": loss})
        origin = {"temperature": temperature, "max_new_tokens": 9, "seconds": loss, "weights_sha256": name}
        (tmp_path / name / "responses.made-from.json").write_text(json.dumps(origin))
        (tmp_path / name / "config.yaml").write_text(f"seed: {name}\n")
        score(ScoreOptions(run=tmp_path / name, judge="none"))
    page = Page(report(ReportOptions(run=tmp_path / "one", against=[tmp_path / "two"])))
    text = page.squeezed()
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    curves = ("training loss", "validation loss", "learning rate", "gradient norm")
    assert labels == [f"{curve} against step" for curve in curves]
    charts = page.source.split('<div class="charts">')[1].split("</div>")[0]
    assert charts.count(">two</text>") == 4
    assert "Settings of the decoding that differ Setting one two temperature 0.0 0.9 " in text
    assert "max_new_tokens" not in text.split("Settings of the decoding")[1].split("Scores")[0]
    assert "Last validation loss 3.2500 2.1250" in text
    assert re.search(r"Category Responses Exact match, % one two plurals 2 100\.00 100\.00", text)
    for section in ("tokens", "configuration"):
        part = page.source.split(f'<section id="{section}">')[1].split("</section>")[0]
        assert "<h3>one</h3>" in part
        assert "<h3>two</h3>" in part
    assert json.loads((tmp_path / "one" / "report.json").read_text())["differing_decoding"] == {
        "temperature": ["0.0", "0.9"]
    }


def test_steps_on_axes_are_whole_numbers(tmp_path: Path) -> None:
    write_metrics(tmp_path, *STEPS[:3])
    source = report(ReportOptions(run=tmp_path)).read_text()
    below = re.findall(r'text-anchor="middle" fill="var\(--soft\)">([^<]*)<', source)
    assert below == ["0", "1", "2", "3", "step"] * 3


def test_two_reports_of_a_run_are_the_same(run: Path, page: Page) -> None:
    assert report(ReportOptions(run=run)).read_text(encoding="utf-8") == page.source


@pytest.mark.parametrize(
    ("name", "command"),
    [("metrics.jsonl", "fastft train --out"), ("responses.json", "fastft generate --run"),
     ("scores.json", "fastft score --run"), ("config.yaml", "fastft train --out")],
)  # fmt: skip
def test_a_missing_file_is_told_with_the_command_that_makes_it(
    run: Path, page: Page, tmp_path: Path, name: str, command: str
) -> None:
    for path in run.iterdir():
        if path.name not in (name, "report.html"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    text = Page(report(ReportOptions(run=tmp_path))).squeezed()
    assert text.count(f"{command} {tmp_path}") > page.squeezed().count(f"{command} {run}")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "responses.json"])
def test_any_single_file_makes_a_report(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((run / name).read_bytes())
    assert report(ReportOptions(run=tmp_path)).is_file()


def test_scores_of_other_responses_are_not_shown_beside_these(run: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_bytes((run / "scores.json").read_bytes())
    write_responses(tmp_path, ENTRIES[::-1])
    page = Page(report(ReportOptions(run=tmp_path)))
    assert "has changed since it was scored" in page.text
    assert [answer[1] for answer in page.responses()] == [None] * 3
    (tmp_path / "responses.json").unlink()
    assert "which was scored, is gone" in Page(report(ReportOptions(run=tmp_path))).text


def scored_run(folder: Path, model: str, scores: list[int]) -> Path:
    """A run whose responses were scored by a judge."""
    folder.mkdir()
    write_responses(folder)
    score(ScoreOptions(run=folder, judge="none"))
    held = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    held["summary"].update(judge={"name": "ollama", "model": model}, judge_mean=sum(scores) / len(scores))
    for judgement, one in zip(held["judgements"], scores, strict=True):
        judgement["score"] = one
    (folder / "scores.json").write_text(json.dumps(held), encoding="utf-8")
    return folder


def test_scores_of_two_judges_are_not_compared(tmp_path: Path) -> None:
    first, alike, other = (
        scored_run(tmp_path / name, model, [value] * len(ENTRIES))
        for name, model, value in (("a", "llama3", 10), ("b", "llama3", 20), ("c", "tiny", 90))
    )
    page = Page(report(ReportOptions(run=first, against=[alike])))
    assert "other judges" not in page.text
    assert '<td class="n best">20.00</td>' in page.source
    assert json.loads((first / "report.json").read_text())["differences"][0]["judge"]["mean"] == 10
    page = Page(report(ReportOptions(run=first, against=[other])))
    assert "scores are not compared: the two runs were scored by other judges" in page.squeezed()
    assert '<td class="n best">90.00</td>' not in page.source
    assert json.loads((first / "report.json").read_text())["differences"][0]["judge"] is None


def test_scores_of_other_responses_are_left_out_of_the_comparison(tmp_path: Path) -> None:
    first, second = (scored_run(tmp_path / name, "llama3", [70] * len(ENTRIES)) for name in ("a", "b"))
    held = json.loads((second / "scores.json").read_text())
    held["summary"].update(judge_mean=99.25)
    (second / "scores.json").write_text(json.dumps(held))
    assert "99.25" in Page(report(ReportOptions(run=first, against=[second]))).text
    write_responses(second, ENTRIES[::-1])
    page = Page(report(ReportOptions(run=first, against=[second])))
    assert "The scores of b are left out: responses.json has changed since it was scored" in page.squeezed()
    assert "99.25" not in page.text


def test_what_is_undefined_is_a_dash_on_the_page_and_in_no_ranking(tmp_path: Path) -> None:
    """An emoji has no word for ROUGE; beside it two answers that have one."""
    texts = [("👍", "👍"), ("an owl", "an owl"), ("a cat", "an owl")]
    entries = [
        {"instruction": f"Say {n}.", "input": "", "output": b, "model_response": a} for n, (a, b) in enumerate(texts)
    ]
    write_responses(tmp_path, entries)
    score(ScoreOptions(run=tmp_path, judge="none"))
    page = Page(report(ReportOptions(run=tmp_path)))
    assert page.responses()[0][2:4] == [None, 1]
    assert "ROUGE-L F1, % 50.00" in page.squeezed()
    held = json.loads((tmp_path / "report.json").read_text())["runs"][0]
    assert [answer["rouge_l"] for answer in held["answers"]] == [None, 100, 0]
    assert (held["best"], held["worst"]) == ([2], [3])
    assert sum(held["histograms"]["rouge_l"]) == 2


def test_entries_that_generate_left_out_are_in_no_figure_of_the_page(tmp_path: Path) -> None:
    why = "its prompt fills the context of 256 tokens"
    entries = [
        {"instruction": f"Say {word}.", "input": "", "output": word, "model_response": word}
        for word in ("one", "two", "three", "four")
    ]
    left_out = [*entries[:2], *({**entry, "model_response": "", "left_out": why} for entry in entries[2:])]
    for name, answers in (("whole", entries), ("part", left_out)):
        (tmp_path / name).mkdir()
        write_responses(tmp_path / name, answers)
        score(ScoreOptions(run=tmp_path / name, judge="none"))
    page = Page(report(ReportOptions(run=tmp_path / "part", against=[tmp_path / "whole"])))
    said = page.squeezed()
    assert "2 more entries are in no figure, since fastft generate left them without a response: # 3, 4." in said
    assert "2 more questions are left out, to which one of the two has no response" in said
    assert page.answers()["reasons"] == [why]
    assert [answer[5] for answer in page.responses()] == [None, None, 0, 0]
    assert "empty" not in said.replace("Empty responses", "")
    numbers = json.loads((tmp_path / "part" / "report.json").read_text())
    part, whole = numbers["runs"]
    assert (part["scores"]["n"], part["scores"]["exact_match"]) == (2, 100)
    assert (sum(part["histograms"]["rouge_l"]), sum(whole["histograms"]["rouge_l"])) == (2, 4)
    assert part["intervals"]["exact_match"] != whole["intervals"]["exact_match"]
    assert not {3, 4} & {*part["best"], *part["worst"]}
    assert [answer.get("left_out") for answer in part["answers"]] == [None, None, why, why]
    assert (numbers["differences"][0]["n"], numbers["differences"][0]["n_left_out"]) == (2, 2)
    assert numbers["differences"][0]["exact_match"]["mean"] == 0


def test_a_run_of_which_rouge_says_nothing_has_dashes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        entries = [{"instruction": f"{n}", "input": "", "output": "👍", "model_response": "👍"} for n in range(2)]
        write_responses(tmp_path / name, entries)
        score(ScoreOptions(run=tmp_path / name, judge="none"))
    text = Page(report(ReportOptions(run=tmp_path / "a", against=[tmp_path / "b"]))).squeezed()
    assert re.search(r"ROUGE-1 F1, % – – ROUGE-2 F1, % – – ROUGE-L F1, % – –", text)
    assert "How the responses score" not in text
    assert "Answers to look at first" not in text


def test_the_page_says_where_scores_were_read(tmp_path: Path) -> None:
    run = scored_run(tmp_path / "a", "llama3", [70] * len(ENTRIES))
    held = json.loads((run / "scores.json").read_text())
    held["summary"]["judge_rungs"] = {"integer": 2, "asked again: json": 1}
    (run / "scores.json").write_text(json.dumps(held))
    text = Page(report(ReportOptions(run=run))).squeezed()
    assert "Read from: a bare integer 2, JSON when asked again 1." in text


def test_the_likeliest_choices_are_shown(tmp_path: Path) -> None:
    run = scored_run(tmp_path / "a", "llama3", [70] * len(ENTRIES))
    held = json.loads((run / "scores.json").read_text())
    held["summary"]["choices_by_likelihood"] = {
        "total": accuracy([True, False, False]), "per_token": accuracy([True, True, False]), "by_category": {},
    }  # fmt: skip
    (run / "scores.json").write_text(json.dumps(held))
    text = Page(report(ReportOptions(run=run))).squeezed()
    assert re.search(r"by likelihood, % 33\.33 .*by likelihood a token, % 66\.67", text)


def test_a_step_written_twice_counts_once_and_odd_values_do_no_harm(tmp_path: Path) -> None:
    write_metrics(
        tmp_path,
        {**STEPS[0], "tokens_padded": 5},
        STEPS[0],
        {"step": 2, "loss": float("nan"), "lr": None, "grad_norm": "x", "tokens_padded": 500},
        {"step": 3, "loss": None, "grad_norm": 10**400, "skipped": True},
        {"step": 4, "loss": float("inf"), "skipped": True},
        {"step": 4, "event": "sample", "text": "x"},
        ["no", "object"],
        {"val_loss": 3},
    )
    text = Page(report(ReportOptions(run=tmp_path))).squeezed()
    assert re.search(r"computes them 1,500 100\.0 %", text)
    assert "2 steps were skipped" in text


def test_configuration_that_is_no_yaml_is_shown_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [<b>", encoding="utf-8")
    page = Page(report(ReportOptions(run=tmp_path)))
    assert "a: [<b>" in page.text


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path: Path) -> None:
    write_responses(tmp_path, [{**ENTRIES[0], "model_response": "half \ud83d"}])
    assert Page(report(ReportOptions(run=tmp_path))).responses()[0][0] == "half \ud83d"


def test_no_folder_and_an_empty_one_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        report(ReportOptions(run=tmp_path / "missing"))
    with pytest.raises(UserError, match="nothing to report"):
        report(ReportOptions(run=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[]", '{"summary": 3, "judgements": []}', "{"])
def test_scores_of_another_make_are_the_users_mistake(tmp_path: Path, text: str) -> None:
    (tmp_path / "scores.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"scores\.json"):
        report(ReportOptions(run=tmp_path))


def test_a_failed_report_leaves_the_old_one(tmp_path: Path) -> None:
    write_responses(tmp_path)
    before = report(ReportOptions(run=tmp_path)).read_bytes()
    (tmp_path / "responses.json").write_text("[{}]", encoding="utf-8")
    with pytest.raises(UserError, match="row 1"):
        report(ReportOptions(run=tmp_path))
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_name_that_no_run_has_is_refused(tmp_path: Path) -> None:
    """A page without scores would else look like that of a run that has none."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    report(ReportOptions(run=tmp_path))
    with pytest.raises(UserError, match="neither responses nor conversations of the name t2"):
        report(ReportOptions(run=tmp_path, name="t2"))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 2.0, "epoch": "x", "seconds": "z"}', None),
        ("data.json", '{"files": "x", "train": 3}', None),
        ("ab.json", json.dumps(dict.fromkeys(_OF_PEOPLE, 1)), "ab.json is not a file that fastft ab wrote"),
    ],
)
def test_files_of_another_form(tmp_path: Path, file: str, content: str, words: str | None) -> None:
    """What they should say is not there, or a line says which file it is."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "epoch": 1}\n')
    (tmp_path / file).write_text(content)
    if words is None:
        report(ReportOptions(run=tmp_path))
    else:
        with pytest.raises(UserError, match=words):
            report(ReportOptions(run=tmp_path))
