"""What `fastft generate` leaves behind: responses as they end, taken up again by the next call."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastft.answers import generation
from fastft.answers.generation import generate
from fastft.answers.options import GenerateOptions
from fastft.batches.batch import from_padded
from fastft.common import files
from fastft.common.errors import UserError
from fastft.data.tokenizer import END_OF_TEXT, gpt2_tokenizer
from fastft.decoding.decode import Answer, NearTie, decode, greedy_reference
from fastft.decoding.inference import prepared
from fastft.model.gpt2 import GPT2, SIZES
from fastft.model.weights import load, save_hf
from fastft.run.config import TrainOptions, to_yaml
from fastft.run.data import load_data
from fastft.run.folder import Run
from fastft.scores.score import answer_notes
from fastft.training.models import initial_model
from fastft.training.train import train

Decode = Callable[..., Iterator[Answer]]


class Asked:
    """Stands in for `decode`: counts the prompts, and is killed before its `die_at`th answer."""

    def __init__(self, answer: Decode = decode, *, die_at: int | None = None) -> None:
        self.answer = answer
        self.die_at = die_at
        self.prompts = 0
        self.answers = 0

    def __call__(self, model: GPT2, prompts: Sequence[Sequence[int]], **options: Any) -> Iterator[Answer]:
        self.prompts += len(prompts)
        for answer in self.answer(model, prompts, **options):
            self.answers += 1
            if self.answers == self.die_at:
                raise KeyboardInterrupt
            yield answer


class TestStage:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Run:
        """A run of 100 records, 10 of them in the test split, with a random model."""
        records = [
            {
                "instruction": f"Double {i}.",
                "input": f"as a number, {i}" if i % 2 else "",
                "output": f"{2 * i}",
                "id": i,
            }
            for i in range(100)
        ]
        (tmp_path / "records.json").write_text(json.dumps(records))
        run = Run(tmp_path / "run")
        options = TrainOptions(data=str(tmp_path / "records.json"), model="pico", out=run.folder)
        run.folder.mkdir()
        run.config.write_text(to_yaml(options))
        run.data.write_text(json.dumps({"split_sha256": load_data(options).fingerprint()}))
        save_hf(initial_model(options), run.model)
        return run

    @pytest.fixture
    def ask(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
        def ask(asked: Asked, **options: Any) -> list[dict[str, Any]]:
            monkeypatch.setattr(generation, "decode", asked)
            values = {"max_new_tokens": 5, "batch_size": 4, "device": "cpu", **options}
            return generate(GenerateOptions(run=run.folder, **values))

        return ask

    def test_responses_are_the_books(self, run: Run, ask: Callable[..., list[dict[str, Any]]]) -> None:
        responses = ask(Asked())
        assert json.loads(run.responses.read_text()) == responses
        records = json.loads((run.folder.parent / "records.json").read_text())[85:95]
        tokenizer, gpt2 = gpt2_tokenizer(), load(run.model)
        for response, record in zip(responses, records, strict=True):
            prompt = (
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                f"request.\n\n### Instruction:\n{record['instruction']}"
            ) + (f"\n\n### Input:\n{record['input']}" if record["input"] else "")
            ids = tokenizer.encode(prompt)
            ids += greedy_reference(gpt2, ids, max_new_tokens=5)
            book = tokenizer.decode(ids)[len(prompt) :].replace("### Response:", "").strip()
            assert book
            assert response == {**record, "model_response": book}
            assert list(response) == ["instruction", "input", "output", "id", "model_response"]

    def test_every_response_header_is_taken_out(self, ask: Callable[..., list[dict[str, Any]]]) -> None:
        ids = gpt2_tokenizer().encode("\n\n### Response:\nTwo ### Response: words \n")
        said = Asked(lambda _model, prompts, **_options: (Answer(index, ids) for index in range(len(prompts))))
        assert {response["model_response"] for response in ask(said)} == {"Two  words"}

    @pytest.mark.parametrize("die_at", [1, 2, 7])
    def test_a_killed_call_is_taken_up_where_it_stopped(
        self, run: Run, ask: Callable[..., list[dict[str, Any]]], die_at: int
    ) -> None:
        whole = ask(Asked())
        for path in run.folder.glob("responses*"):
            path.unlink()
        with pytest.raises(KeyboardInterrupt):
            ask(Asked(die_at=die_at))
        rest = Asked()
        assert ask(rest, batch_size=3) == whole
        assert rest.prompts == 10 - (die_at - 1)
        assert json.loads(run.responses.read_text()) == whole
        assert ask(Asked(die_at=1)) == whole  # nothing is asked

    def test_a_line_that_a_kill_tore_is_asked_again(self, run: Run, ask: Callable[..., list[dict[str, Any]]]) -> None:
        whole = ask(Asked())
        journal = run.folder / "responses.journal.jsonl"
        content = journal.read_bytes()
        for cut in (3, len(content.splitlines()[-1]) + 4):
            journal.write_bytes(content[:-cut])
            rest = Asked()
            assert ask(rest) == whole
            assert rest.prompts == (1 if cut == 3 else 2)

    def test_answers_are_there_as_they_end(
        self, run: Run, ask: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For those who look: the file is whole JSON at any time, in the records' order."""
        monkeypatch.setattr("fastft.answers.responses._SECONDS_BETWEEN_WRITES", 0.0)
        seen = []

        def watched(*args: Any, **options: Any) -> Iterator[Answer]:
            for answer in decode(*args, **options):
                if run.responses.is_file():
                    seen.append([entry["id"] for entry in json.loads(run.responses.read_text())])
                yield answer

        ask(Asked(watched), batch_size=2)
        assert [len(ids) for ids in seen] == list(range(1, 10))
        assert all(ids == sorted(ids) for ids in seen)
        assert seen[1] != [85, 86]  # the longest prompts come first

    def test_what_the_responses_are_made_from(self, run: Run, ask: Callable[..., list[dict[str, Any]]]) -> None:
        tie = NearTie(position=1, chosen=3, other=4, gap=0.5e-4)

        def tied(model: GPT2, prompts: Sequence[Sequence[int]], **_options: Any) -> Iterator[Answer]:
            yield from (Answer(index, [3, 3], [tie] if index == 2 else []) for index in range(len(prompts)))

        ask(Asked(tied))
        made_from = json.loads((run.folder / "responses.made-from.json").read_text())
        assert made_from["tokens"] == 20
        assert 0 < made_from["seconds"] < 60
        (listed,) = made_from["near_ties"]
        assert listed["row"] in range(86, 96)
        assert listed == {"row": listed["row"], "position": 1, "chosen": 3, "other": 4, "gap": 0.5e-4}
        assert (made_from["dtype"], made_from["temperature"]) == ("fp32", 0)

    def test_another_model_answers_everything_afresh(self, run: Run, ask: Callable[..., list[dict[str, Any]]]) -> None:
        old = ask(Asked())
        torch.manual_seed(7)
        save_hf(GPT2(SIZES["pico"]), run.model)
        with pytest.raises(KeyboardInterrupt):  # before its first answers: the old model's are not taken for its own
            ask(Asked(die_at=1))
        asked = Asked()
        new = ask(asked)
        assert asked.prompts == 10
        assert all(a["model_response"] != b["model_response"] for a, b in zip(old, new, strict=True))

    @pytest.mark.parametrize(
        ("options", "afresh"),
        [
            ({"max_new_tokens": 4}, 10), ({"split": "val"}, 5), ({"temperature": 1.0}, 10), ({"dtype": "bf16"}, 10),
            ({"repetition_penalty": 1.1}, 10), ({"batch_size": 2}, 0), ({"limit": 10}, 0),
        ],
        ids=str,
    )  # fmt: skip
    def test_options_that_change_answers_have_them_made_afresh(
        self, ask: Callable[..., list[dict[str, Any]]], options: dict[str, Any], afresh: int
    ) -> None:
        ask(Asked())
        again = Asked()
        ask(again, **options, overwrite=True)
        assert again.prompts == afresh

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"temperature": 1.0, "top_k": 7}, r"temperature 0.0 there and 1.0 now, top_k 0 there and 7 now"),
            pytest.param({"max_new_tokens": 4}, "max_new_tokens 5 there and 4 now", marks=pytest.mark.long),
            pytest.param({"dtype": "bf16"}, "dtype fp32 there and bf16 now", marks=pytest.mark.long),
            pytest.param(
                {"repetition_penalty": 1.1}, "repetition_penalty 1.0 there and 1.1 now", marks=pytest.mark.long
            ),
        ],
    )
    def test_answers_that_were_decoded_otherwise_are_not_replaced_unasked(
        self, run: Run, ask: Callable[..., list[dict[str, Any]]], options: dict[str, Any], said: str
    ) -> None:
        greedy = ask(Asked())
        before = {path: path.read_bytes() for path in run.folder.glob("responses*")}
        unasked = Asked()
        with pytest.raises(UserError, match=rf"other settings \({said}\): a --name .* --overwrite"):
            ask(unasked, **options)
        assert unasked.prompts == 0
        assert {path: path.read_bytes() for path in run.folder.glob("responses*")} == before
        assert ask(Asked(die_at=1)) == greedy  # all are there
        other = ask(Asked(), **options, name="other")
        assert {path: path.read_bytes() for path in before} == before
        assert json.loads((run.folder / "responses.other.json").read_text()) == other
        assert ask(Asked(), **options, overwrite=True) == other
        assert json.loads(run.responses.read_text()) == other

    @pytest.mark.long
    def test_a_journal_alone_says_what_is_there(self, run: Run, ask: Callable[..., list[dict[str, Any]]]) -> None:
        """A kill before the first answers are in responses.json."""
        with pytest.raises(KeyboardInterrupt):
            ask(Asked(die_at=3))
        assert not run.responses.exists()
        with pytest.raises(UserError, match="temperature"):
            ask(Asked(), temperature=1.0)
        rest = Asked()
        ask(rest)
        assert rest.prompts == 8

    @pytest.mark.long
    def test_a_killed_call_without_an_answer_has_nothing_to_lose(
        self, ask: Callable[..., list[dict[str, Any]]]
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            ask(Asked(die_at=1))
        assert len(ask(Asked(), temperature=1.0)) == 10

    def test_a_killed_overwriting_leaves_the_old_answers_and_goes_on(
        self, run: Run, ask: Callable[..., list[dict[str, Any]]]
    ) -> None:
        greedy = ask(Asked())
        with pytest.raises(KeyboardInterrupt):
            ask(Asked(die_at=4), max_new_tokens=4, overwrite=True)
        assert json.loads(run.responses.read_text()) == greedy
        made_from = run.folder / "responses.made-from.json"
        assert json.loads(made_from.read_text())["max_new_tokens"] == 5  # it stays as long as they do
        rest = Asked()
        shorter = ask(rest, max_new_tokens=4)  # what was asked for is under way already
        assert rest.prompts == 7
        assert json.loads(run.responses.read_text()) == shorter != greedy
        assert json.loads(made_from.read_text())["max_new_tokens"] == 4

    def test_a_kill_between_answers_and_what_they_were_made_from_leaves_no_others(
        self, run: Run, ask: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ask(Asked())
        write = files.write_json

        def killed(path: Path, value: Any) -> None:
            if path.name.endswith("made-from.json"):
                raise KeyboardInterrupt
            write(path, value)

        monkeypatch.setattr("fastft.answers.responses.files.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(Asked(), max_new_tokens=4, overwrite=True)
        assert len(json.loads(run.responses.read_text())) == 10
        assert not (run.folder / "responses.made-from.json").exists()

    @pytest.mark.parametrize("split", ["test", pytest.param("val", marks=pytest.mark.long)])
    def test_a_killed_call_of_a_name_is_taken_up_where_it_stopped(
        self, run: Run, ask: Callable[..., list[dict[str, Any]]], split: str
    ) -> None:
        drawn = {"temperature": 1.0, "name": "t1.0", "split": split}
        whole = ask(Asked(), **drawn)
        stem = "responses.t1.0" if split == "test" else "responses.val.t1.0"
        names = {f"{stem}.json", f"{stem}.made-from.json", f"{stem}.journal.jsonl"}
        assert {path.name for path in run.folder.glob("responses*")} == names
        for name in names:
            (run.folder / name).unlink()
        with pytest.raises(KeyboardInterrupt):
            ask(Asked(die_at=3), **drawn)
        ask(Asked(), split=split)  # greedy, beside it
        rest = Asked()
        assert ask(rest, **drawn) == whole
        assert rest.prompts == len(whole) - 2
        with pytest.raises(UserError, match=r"t1\.0\.json was made with other settings \(seed 123 there and 4 now\)"):
            ask(Asked(), **drawn, seed=4)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("test", "reserved for a split"), ("val", "reserved for a split"), ("Train.1", "reserved for a split"),
            ("made-from", "reserved for what responses are made from"), ("x.made-from", "reserved"),
            ("", "expected at most 64 letters"), ("a/b", "expected"), ("..", "expected"), ("*", "expected"),
            ("x" * 65, "expected"), ("é", "expected"),
        ],
    )  # fmt: skip
    def test_a_name_is_a_part_of_a_files(self, run: Run, name: str, words: str) -> None:
        with pytest.raises(UserError, match=f"got --name .*{words}"):
            GenerateOptions(run=run.folder, name=name)

    def test_an_overwritten_run_takes_its_named_answers_along_and_nobodys_copies(
        self, run: Run, ask: Callable[..., list[dict[str, Any]]]
    ) -> None:
        ask(Asked(), name="t1.0", temperature=1.0)
        mine = [run.folder / name for name in ("responses.old.json", "scores.old.json", "scores.val.json")]
        for path in (*mine, run.scores("t1.0")):
            path.write_text("[]")
        written = {path.name for path in run.written()}
        assert written >= {f"responses.t1.0.{end}" for end in ("json", "made-from.json", "journal.jsonl")}
        assert "scores.t1.0.json" in written
        assert not written & {path.name for path in mine}
        assert run.has_place_for(run.folder / "scores.t9.json")

    def test_a_call_that_comes_to_nothing_loses_no_answer(
        self, run: Run, ask: Callable[..., list[dict[str, Any]]]
    ) -> None:
        ask(Asked())
        with pytest.raises(UserError, match="cuda"):
            ask(Asked(), max_new_tokens=6, device="cuda", overwrite=True)
        again = Asked()
        ask(again)
        assert again.prompts == 0
        with (run.folder / "responses.journal.jsonl").open("a") as file:
            file.write('{"index": 0}\n')
        ask(again)
        assert again.prompts == 0

    def test_a_seed_is_a_text(self, ask: Callable[..., list[dict[str, Any]]]) -> None:
        """Also where the call is killed, and where fewer are answered at a time."""
        drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
        whole = ask(Asked(), **drawn)
        assert whole != ask(Asked(), **{**drawn, "seed": 4}, overwrite=True)
        with pytest.raises(KeyboardInterrupt):
            ask(Asked(die_at=5), **drawn, overwrite=True)
        assert ask(Asked(), **drawn, batch_size=1) == whole

    def test_a_limit_answers_the_first_and_no_limit_the_rest(
        self, run: Run, ask: Callable[..., list[dict[str, Any]]]
    ) -> None:
        first, rest = Asked(), Asked()
        three = ask(first, limit=3)
        assert first.prompts == 3
        assert json.loads(run.responses.read_text()) == three
        assert answer_notes(run.folder) == [
            "the responses are not whole: 3 of 10 answers are there; `fastft generate` gives the others"
        ]
        ten = ask(rest)
        assert rest.prompts == 7
        assert ten[:3] == three
        assert [response["id"] for response in ten] == list(range(85, 95))
        assert ask(Asked(die_at=1), limit=2) == ten[:2]
        assert answer_notes(run.folder) == []

    @pytest.mark.long
    def test_killed_at_ten_random_moments(self, run: Run) -> None:
        """By SIGKILL, in processes of their own: each answer is made once, but for those under way."""
        command = [sys.executable, "-m", "fastft", "generate", "--run", str(run.folder), "--max_new_tokens", "200",
                   "--batch_size", "2", "--device", "cpu"]  # fmt: skip
        whole = generate(GenerateOptions(run=run.folder, max_new_tokens=200, batch_size=2, device="cpu"))
        for path in run.folder.glob("responses*"):
            path.unlink()
        journal = run.folder / "responses.journal.jsonl"
        random = np.random.default_rng(0)
        for _ in range(10):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            kept = journal.read_bytes() if journal.is_file() else b""
            while process.poll() is None and (journal.read_bytes() if journal.is_file() else b"") == kept:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.3))
            process.kill()
            process.wait()
            assert journal.read_bytes().startswith(kept)
        assert subprocess.run(command, check=False).returncode == 0
        assert json.loads(run.responses.read_text()) == whole
        indices = [json.loads(line)["index"] for line in journal.read_text().splitlines()[1:]]
        assert sorted(indices) == list(range(10))


BOOK = os.environ.get("FASTFT_BOOK_DATA")


@pytest.mark.long
@pytest.mark.skipif(not BOOK, reason="FASTFT_BOOK_DATA does not name the book's instruction-data.json")
@pytest.mark.parametrize("weights", ["random", "trained"])
def test_at_gpt2_size_the_books_110_prompts_are_answered_as_by_the_uncached_loop(weights: str, tmp_path: Path) -> None:
    """Each answer's every token is the best one after a whole uncached forward over all before it, near ties apart;
    by induction over the tokens that is the loop. The loop itself is run for three of the prompts."""
    steps = 40 if weights == "trained" else 0
    options = TrainOptions(
        data=str(BOOK), model="gpt2", weights="none", out=tmp_path / "run", device="cpu", dtype="fp32", batch_size=8,
        lr=5e-4, steps=max(1, steps), eval_every=0, samples=0, keep_best=False,
    )  # fmt: skip
    if steps:
        train(options)
        model = load(options.out / "model")
    else:
        model = initial_model(options)
    data = load_data(options)
    records = data.part("test")
    assert len(records) == 110
    tokenizer = gpt2_tokenizer()
    prompts = [tokenizer.encode(data.template.prompt(record.instruction, record.input)) for record in records]
    ready = prepared(copy.deepcopy(model), torch.float32, rows=64)
    answers = sorted(decode(ready, prompts, max_new_tokens=64), key=lambda answer: answer.index)
    assert len({tuple(answer.ids) for answer in answers}) > 10
    n_ties = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = prompt + answer.ids + ([END_OF_TEXT] if len(answer.ids) < 64 else [])
        tokens = torch.tensor([whole[:-1]])
        with torch.no_grad():
            best = model.logits(from_padded(tokens, torch.full_like(tokens, -100))).argmax(-1).tolist()
        ties = {tie.position for tie in answer.near_ties}
        n_ties += len(ties)
        for position, token in enumerate(whole[len(prompt) :]):
            assert best[len(prompt) - 1 + position] == token or position in ties
    assert n_ties < 20
    for index in (0, 55, 109):
        loop = greedy_reference(model, prompts[index], max_new_tokens=64)
        assert loop == answers[index].ids or answers[index].near_ties
