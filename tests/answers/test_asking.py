"""Questions of one's own, to runs, checkpoints and other models; and a model that nobody has trained as a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastft
from fastft.answers.asking import ask, write_answers
from fastft.answers.generation import generate
from fastft.answers.options import GenerateOptions
from fastft.cli import main
from fastft.common.errors import UserError
from fastft.data.chat_template import as_jinja
from fastft.data.prompts import ALPACA, CHATML
from fastft.decoding.decode import greedy
from fastft.model.weights import load, save_hf
from fastft.run.config import TrainOptions, to_yaml
from fastft.run.folder import Run
from fastft.run.given import template_for
from fastft.training.train import train

ROWS = [{"instruction": f"Say {n}.", "input": "", "output": f"{n} it is"} for n in range(40)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps under a template with tokens of its own."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "data.json").write_text(json.dumps(ROWS))
    train(
        TrainOptions(
            data=str(folder / "data.json"), model="pico", out=folder / "run", steps=4, template="chatml", lr=1e-3,
            samples=0, eval_every=2, dtype="fp32", device="cpu",
        )
    )  # fmt: skip
    return folder / "run"


def asked(**options: Any) -> list[dict[str, Any]]:
    return list(ask(GenerateOptions(max_new_tokens=5, device="cpu", **options)))


def expected(run: Path, question: str, source: str | None = None) -> str:
    """Without this module: the prompt by hand."""
    model = load(source or run / "model")
    tokenizer = model.config.tokenizer
    start, end = (tokenizer.special(token) for token in ("<|im_start|>", "<|im_end|>"))
    ids = [start, *tokenizer.encode(f"user\n{question}"), end, *tokenizer.encode("\n"), start]
    (answer,) = greedy(model, [[*ids, *tokenizer.encode("assistant\n")]], max_new_tokens=5)
    return tokenizer.decode(answer).strip()


def test_a_question_to_whatever_holds_the_model(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = asked(run=trained, prompt="Say 3.")
    assert entry == {"instruction": "Say 3.", "input": "", "model_response": expected(trained, "Say 3.")}
    for source in (trained, trained / "model", trained / "checkpoints" / "step-4"):
        assert asked(model=str(source), prompt="Say 3.") == [entry]
    monkeypatch.chdir(trained.parent)
    assert asked(model="run", prompt="Say 3.") == [entry]
    best = next(trained.glob("checkpoints/best-*"))
    (other,) = asked(model=str(best), prompt="Say 3.")
    assert other["model_response"] == expected(trained, "Say 3.", str(best))


def test_a_folder_that_is_no_runs_is_asked_by_its_chat_template(trained: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(trained / "model", alone)
    assert asked(model=str(alone), prompt="Say 3.") == asked(run=trained, prompt="Say 3.")
    (alone / "chat_template.jinja").write_text(as_jinja(ALPACA))  # which says not where an input goes
    row = {"instruction": "Say 3.", "input": "Four."}
    assert fastft.answer(alone, [row], max_new_tokens=5) == fastft.answer(
        alone, [row], max_new_tokens=5, template="alpaca"
    )
    assert template_for(str(alone), None) is ALPACA
    (alone / "chat_template.jinja").unlink()
    config = json.loads((alone / "tokenizer_config.json").read_text())
    (alone / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": as_jinja(CHATML)}))
    assert asked(model=str(alone), prompt="Say 3.") == asked(run=trained, prompt="Say 3.")
    (alone / "tokenizer_config.json").write_text(json.dumps(config))
    (entry,) = asked(model=str(alone), prompt="Say 3.")
    assert entry == asked(model=str(alone), prompt="Say 3.", template="alpaca")[0]


def test_questions_of_a_file_in_their_order(trained: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions = ["Say 1.", "Say 2, and more of it.", "Say 3."]
    file.write_text("".join(json.dumps({"instruction": one}) + "\n" for one in questions))
    entries = asked(run=trained, prompts=str(file), batch_size=2)
    assert [entry["instruction"] for entry in entries] == questions
    assert [entry["model_response"] for entry in entries] == [expected(trained, one) for one in questions]
    assert write_answers(out, iter(entries)) == 3
    assert [json.loads(line) for line in out.read_text().splitlines()] == entries
    assert asked(run=trained, prompts=str(file), limit=1) == entries[:1]
    assert fastft.answer(trained, questions, max_new_tokens=5) == [entry["model_response"] for entry in entries]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Say 3."},
        {"prompt": [{"role": "user", "content": "Say 3."}]},
        {"messages": [{"role": "user", "content": "Say 3."}]},
        {"conversations": [{"from": "human", "value": "Say 3."}]},
        {"instruction": "Say 3.", "output": "what it should say"},
        {"instruction": "Say 3.", "response": "what it should say"},
        {"messages": '[{"role": "user", "content": "Say 3."}]'},
        {"conversations": [{"role": "user", "content": "Say 3."}]},
    ],
    ids=["prompt", "prompt of messages", "messages", "conversations", "instruction", "dolly", "text", "roles"],
)
def test_every_format_without_its_answer(trained: Path, row: dict[str, Any]) -> None:
    assert fastft.answer(trained, [row], max_new_tokens=5) == [expected(trained, "Say 3.")]


def test_the_command_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    import io
    import sys

    given = ["--max_new_tokens", "5", "--device", "cpu"]
    assert main(["generate", "--run", str(trained), "--prompt", "Say 3.", *given]) == 0
    assert capsys.readouterr().out == expected(trained, "Say 3.") + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say 3.\n\nSay 4.\n"))
    assert main(["generate", "--run", str(trained), "--prompts", "-", *given]) == 0
    said = [json.loads(line)["model_response"] for line in capsys.readouterr().out.splitlines()]
    assert said == [expected(trained, f"Say {n}.") for n in (3, 4)]
    for held in (b'\xef\xbb\xbf[{"instruction": "Say 3."}]', b'\xef\xbb\xbf{"instruction": "Say 3."}\r\n'):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(held), encoding="latin-1"))
        assert main(["generate", "--run", str(trained), "--prompts", "-", *given]) == 0
        assert json.loads(capsys.readouterr().out)["model_response"] == said[0]
    for wrong in (b"caf\xe9", b'[{"instruction": "Say 3."},'):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(wrong)))
        assert main(["generate", "--run", str(trained), "--prompts", "-", *given]) == 2
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", "--run", str(trained), "--prompts", "-", *given]) == 2
    assert "standard input is closed" in capsys.readouterr().err
    out = tmp_path / "some" / "answers.jsonl"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say 3.\n"))
    assert main(["generate", "--run", str(trained), "--prompts", "-", "--out", str(out), *given]) == 0
    assert len(out.read_text().splitlines()) == 1


def test_a_model_that_nobody_has_trained_is_a_run_like_any_other(trained: Path, tmp_path: Path) -> None:
    data, out = str(trained.parent / "data.json"), tmp_path / "base"
    best = str(next(trained.glob("checkpoints/best-*")))
    options = GenerateOptions(model=best, data=data, out=out, max_new_tokens=3, device="cpu")
    entries = generate(options)
    assert [entry["instruction"] for entry in entries] == [row["instruction"] for row in ROWS[34:38]]
    mine, theirs = load(Run(out).model), load(best)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert Run(out).template().name == "chatml"
    assert generate(options) == entries
    with pytest.raises(UserError, match=r"holds another run \(weights: "):
        generate(GenerateOptions(model=str(trained), data=data, out=out, max_new_tokens=3, device="cpu"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "got neither of --run and --model"),
        ({"run": "a", "model": "b"}, "got both"),
        ({"run": "a", "prompt": "b", "prompts": "c"}, "expected one of them"),
        ({"model": "a"}, "data whose test split is answered"),
        ({"model": "a", "data": "b"}, "a folder for the answers"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        GenerateOptions(**options)
    assert says in str(error.value)


def test_a_file_of_questions_that_is_not_there(trained: Path, tmp_path: Path) -> None:
    options = GenerateOptions(run=trained, prompts=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"none\.json; --prompts takes a file, or - for standard input"):
        list(ask(options))


def test_what_cannot_be_asked(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    for rows, says in (
        ([{"text": "a document"}], "row 1: it asks nothing"),
        ([{"question": "a"}], "row 1: "),
        ([], "holds no question"),
        ([{"instruction": "word " * 400}], "fill the model's context of 256 tokens"),
    ):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError) as error:
            asked(run=trained, prompts=str(file))
        assert says in str(error.value)
    with pytest.raises(UserError, match="empty --prompt"):
        asked(run=trained, prompt=" ")
    with pytest.raises(UserError, match="no weights at"):
        asked(model="./nowhere", prompt="a")
    (half := tmp_path / "half" / "checkpoints").mkdir(parents=True)
    shutil.copy(trained / "config.yaml", half.parent)
    with pytest.raises(UserError, match="a run without a model; give one of its checkpoints"):
        asked(model=str(half.parent), prompt="a", template="alpaca")
    with pytest.raises(UserError, match="whose tokens it has not"):
        asked(model=str(trained), prompt="a", template="llama3")


def test_a_link_to_a_checkpoint_is_asked_by_its_runs_template(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(trained / "checkpoints" / "step-4")
    assert asked(model=str(tmp_path / "link"), prompt="Say 3.") == asked(run=trained, prompt="Say 3.")


def test_a_checkpoint_out_of_its_run_says_whose_tokenizer_it_takes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copytree(trained / "checkpoints" / "step-4", tmp_path / "a" / "b" / "alone")
    load(alone)
    assert "alone holds no tokenizer" in capsys.readouterr().err
    shutil.copytree(trained / "tokenizer", alone, dirs_exist_ok=True)
    assert asked(model=str(alone), prompt="Say 3.", template="chatml") == asked(run=trained, prompt="Say 3.")


def test_answers_never_replace_their_questions(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"instruction": "Say 3."}\n')
    for out, says in (
        (tmp_path / "." / "questions.jsonl", "the file of the questions"), (tmp_path, "a folder"),
        (trained / "model" / "config.json", "a file of"), (trained.parent / "data.json", "a file of"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            asked(run=trained, prompts=str(file), out=out)
    with pytest.raises(UserError, match="a file of"):
        asked(model=str(trained / "model"), prompts=str(file), out=trained / "model" / "config.json")


def test_a_question_too_long_is_left_out_of_others_and_named(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"instruction": one}) + "\n" for one in ("word " * 400, "Say 3.")))
    left_out, answered = asked(run=trained, prompts=str(file))
    assert (left_out["model_response"], answered["model_response"]) == ("", expected(trained, "Say 3."))
    assert left_out["left_out"] == "its prompt fills the context of 256 tokens"
    with pytest.raises(UserError, match="rows 1; shorten"):
        asked(run=trained, prompts=str(file), too_long="raise")


def test_options_of_a_question_need_no_answer(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"instruction": "Which?", "choices": ["owl", "tool"]}))
    (entry,) = asked(run=trained, prompts=str(file))
    assert "output" not in entry
    assert entry["model_response"] == expected(trained, "Which?\nA. owl\nB. tool")


def test_questions_have_the_names_that_the_runs_data_have(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "config.yaml").write_text(to_yaml(replace(Run(run).options(), fields="q=instruction,a=output")))
    assert fastft.answer(run, [{"q": "Say 3."}], max_new_tokens=5) == [expected(trained, "Say 3.")]


def test_prompts_in_python_are_a_list(trained: Path) -> None:
    for wrong in ("Say 3.", {"instruction": "Say 3."}):
        with pytest.raises(UserError, match="expected a list of them"):
            fastft.answer(trained, wrong)  # type: ignore[arg-type] # a text is a sequence of letters
    with pytest.raises(UserError, match="got out"):
        fastft.answer(trained, ["Say 3."], out="a")
    with pytest.raises(UserError, match="leave no room"):
        fastft.answer(trained, ["Say 3.", "word " * 400])
    assert len(fastft.answer(trained, ["Say 3.", "Say 4."], limit=1, max_new_tokens=1)) == 1


def test_a_baseline_of_a_model_that_has_changed_in_its_place_is_not_taken_up(trained: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = load(trained, tie_head=False)  # as the book's recipe trains it
    save_hf(model, base)
    given = GenerateOptions(
        model=str(base), template="chatml", data=str(trained.parent / "data.json"), out=tmp_path / "out",
        max_new_tokens=2, device="cpu",
    )  # fmt: skip
    assert generate(given) == generate(given)
    with torch.no_grad():
        model.wte.weight[5] += 1
    save_hf(model, base)
    with pytest.raises(UserError, match=r"the weights of .* are not those"):
        generate(given)
    Run(tmp_path / "out").weights.unlink()
    with pytest.raises(UserError, match="a run without a model"):
        generate(given)
