"""The tokenizer of a folder is the model's: compared with GPT-2's by content, used for everything, or refused."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tokenizers
import torch
import yaml
from foreign import description, foreign_weights, permuted_gpt2, put, texts, trained, weights, write_old_files
from small_records import made_records
from transformers import AutoTokenizer

from fastft.cli import main
from fastft.common.errors import UserError
from fastft.data import folder_tokenizer
from fastft.data.folder_tokenizer import FolderTokenizer, tokenizer_of
from fastft.data.prompts import ALPACA
from fastft.data.tokenizer import GPT2Tokenizer, gpt2_tokenizer
from fastft.decoding.decode import greedy_reference
from fastft.metrics.perplexity import response_perplexities
from fastft.model.weights import load, save_hf

PAD = {"id": 50257, "content": "[PAD]", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def folder_of(path: Path, files: dict[str, Any]) -> FolderTokenizer:
    found = tokenizer_of(put(path, files))
    assert isinstance(found, FolderTokenizer)
    return found


def refusal_of(path: Path, files: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        tokenizer_of(put(path, files))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


def gpt2_as_json(tmp_path: Path, **pad: Any) -> dict[str, Any]:
    """GPT-2's `tokenizer.json` as transformers writes it."""
    put(tmp_path / "gpt2", gpt2_tokenizer().files(1024))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    theirs.add_special_tokens(pad)
    theirs.save_pretrained(tmp_path / "saved")
    made: dict[str, Any] = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    return made


# GPT-2's own


def test_gpt2s_own_files_are_gpt2s_whatever_they_are_written_as(tmp_path: Path) -> None:
    files = gpt2_tokenizer().files(1024)
    made = gpt2_as_json(tmp_path)
    strings = json.loads(json.dumps(made))
    strings["model"]["merges"] = [" ".join(pair) for pair in made["model"]["merges"]]
    reordered = dict(sorted(json.loads(files["vocab.json"]).items()))
    for number, given in enumerate(
        [
            files,
            {**files, "vocab.json": reordered, "merges.txt": files["merges.txt"].replace(b"\n", b"\r\n")},
            {"tokenizer.json": made},
            {"tokenizer.json": strings, **files},
            {"tokenizer.json": made | {"truncation": {"max_length": 5, "strategy": "LongestFirst", "stride": 0}}},
        ]
    ):
        assert tokenizer_of(put(tmp_path / str(number), given)) is gpt2_tokenizer()


def test_special_tokens_beside_gpt2s_leave_its_ids_as_they_are(tmp_path: Path) -> None:
    made = gpt2_as_json(tmp_path, pad_token="[PAD]")
    found = folder_of(tmp_path / "pad", {"tokenizer.json": made})
    for text in (*texts(), "a [PAD] b"):
        assert found.encode(text) == gpt2_tokenizer().encode(text)
        assert found.decode(found.encode(text)) == text
    mask = found.without_text(50304)
    assert mask is not None
    assert mask.nonzero()[0].tolist() == list(range(50257, 50304))
    assert found.end_of_text == 50256
    assert found.without_text(50257) is None


def test_another_end_beside_gpt2s_ends_its_texts(tmp_path: Path) -> None:
    made = gpt2_as_json(tmp_path)
    made["added_tokens"].append({**PAD, "content": "[EOS]", "special": True})
    found = folder_of(tmp_path / "eos", {"tokenizer.json": made, "tokenizer_config.json": {"eos_token": "[EOS]"}})
    assert found.end_of_text == 50257
    mask = found.without_text(50258)
    assert mask is not None
    assert mask.nonzero()[0].tolist() == [50256]


def test_the_slightest_difference_is_another_tokenizer(tmp_path: Path) -> None:
    made = gpt2_as_json(tmp_path)

    def changed(number: int, change: Any) -> FolderTokenizer:
        other = json.loads(json.dumps(made))
        change(other)
        return folder_of(tmp_path / str(number), {"tokenizer.json": other})

    def swapped(other: dict[str, Any]) -> None:
        vocab = other["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]

    assert changed(0, swapped).encode("A") == gpt2_tokenizer().encode("B")
    merged = changed(2, lambda other: other["model"]["merges"].pop(0))  # " t" is one token no more
    assert merged.encode(" t") != gpt2_tokenizer().encode(" t")
    assert changed(3, lambda other: other["pre_tokenizer"].update(add_prefix_space=True)).encode("a") == [257]
    word = changed(4, lambda other: other["added_tokens"].append({**PAD, "content": "zyzzyva", "special": False}))
    assert word.encode("zyzzyvas") == [50257, 82]
    assert word.without_text(50258) is None


# Another one


@pytest.mark.parametrize("form", ["tokenizer.json", "both", "old"])
def test_another_tokenizers_texts_come_back(form: str, tmp_path: Path) -> None:
    made = description()
    files: dict[str, Any] = {} if form == "old" else {"tokenizer.json": made}
    put(tmp_path, files)
    if form != "tokenizer.json":
        write_old_files(tmp_path, made)
    found = folder_of(tmp_path, {})
    theirs = tokenizers.Tokenizer.from_str(trained())
    theirs.encode_special_tokens = True
    for text in texts():
        assert found.encode(text) == theirs.encode(text).ids
        assert found.decode(found.encode(text)) == text
        assert found.end_of_text not in found.encode(text)
    assert found.encode_many(["a", "über"]) == [found.encode("a"), found.encode("über")]
    assert found.end_of_text == 0
    assert found.decode([0, 1 << 20, -1]) == "<|endoftext|>\ufffd\ufffd"


def test_gpt2_in_another_language_of_the_same_size_is_told_by_content(tmp_path: Path) -> None:
    found = folder_of(tmp_path, permuted_gpt2())
    for text in texts():
        ids, gpt2s = found.encode(text), gpt2_tokenizer().encode(text)
        assert len(ids) == len(gpt2s)
        assert ids != gpt2s or not ids
        assert found.decode(ids) == text


def test_an_end_of_text_that_is_no_special_token_is_not_read_out_of_text(tmp_path: Path) -> None:
    def change(made: dict[str, Any]) -> None:
        made["added_tokens"][0]["special"] = False

    found = folder_of(tmp_path, {"tokenizer.json": description(change)})
    assert 0 not in found.encode("a<|endoftext|>b")


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, 0),
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>", "lstrip": False}}}, 0),
        ({"special_tokens_map.json": {"eos_token": {"content": "</s>"}}}, 0),
        ({"config.json": {"eos_token_id": 0}}, 0),
        ({"config.json": {"eos_token_id": 7}}, 7),
        ({"config.json": {"eos_token_id": 50256}, "tokenizer_config.json": {"eos_token": "</s>"}}, 0),
    ],
)
def test_the_end_of_text_is_found(
    files: dict[str, Any], wanted: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = description(ends="</s>")
    found = folder_of(tmp_path / "one", {"tokenizer.json": made, **files})
    assert found.end_of_text == wanted
    warned = "config.json says that 50256 ends a text, its tokenizer 0 ('</s>'), which is taken"
    assert (warned in capsys.readouterr().err) == (len(files) == 2)
    # Its files carry that on, to a folder whose config.json says nothing of it.
    again = folder_of(tmp_path / "two", found.files(256))
    assert again.end_of_text == wanted
    assert again.identity()["end_of_text"] == wanted


def test_what_would_cut_fill_or_vary_texts_is_off(tmp_path: Path) -> None:
    def change(made: dict[str, Any]) -> None:
        made["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        made["padding"] = {
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<|endoftext|>",
        }  # fmt: skip
        made["model"]["dropout"] = 0.5
        made["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
        }

    odd, plain = (
        folder_of(tmp_path / name, {"tokenizer.json": description(how)})
        for name, how in (("odd", change), ("plain", lambda _: None))
    )
    for text in texts():
        assert odd.encode(text) == plain.encode(text)


def test_a_normalizer_that_keeps_the_text_is_used(tmp_path: Path) -> None:
    found = folder_of(tmp_path, {"tokenizer.json": description(lambda made: made.update(normalizer={"type": "NFC"}))})
    assert found.encode("u\u0308ber") == found.encode("über")


def test_another_process_gets_the_same(tmp_path: Path) -> None:
    found = folder_of(tmp_path, {"tokenizer.json": trained()})
    again = pickle.loads(pickle.dumps(found))
    assert again.identity() == found.identity()
    assert [again.encode(text) for text in texts()] == [found.encode(text) for text in texts()]
    assert pickle.loads(pickle.dumps(gpt2_tokenizer())) is gpt2_tokenizer()


def test_another_content_is_another_identity(tmp_path: Path) -> None:
    one, other = (
        folder_of(tmp_path / str(size), {"tokenizer.json": trained(vocab_size=size)}).identity() for size in (400, 401)
    )
    assert len({json.dumps(each, sort_keys=True) for each in (one, other, gpt2_tokenizer().identity())}) == 3


# What cannot be used


def lowercased(made: dict[str, Any]) -> None:
    made["normalizer"] = {"type": "Lowercase"}


def in_one_line(made: dict[str, Any]) -> None:
    made["normalizer"] = {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}


def without_a_byte(made: dict[str, Any]) -> None:
    vocab = made["model"]["vocab"]
    vocab["unused"] = vocab.pop("ł")  # the byte 0x82, of which é, 日 and others are made; no merge has it


def by_white_space(made: dict[str, Any]) -> None:
    made["pre_tokenizer"] = {"type": "WhitespaceSplit"}


def without_decoder(made: dict[str, Any]) -> None:
    made["decoder"] = None


def word_pieces(made: dict[str, Any]) -> None:
    words = {"[UNK]": 0, "<|endoftext|>": 1, "the": 2, "##s": 3}
    made["model"] = {
        "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100, "vocab": words,
    }  # fmt: skip
    made["added_tokens"][0]["id"] = 1
    made["pre_tokenizer"], made["decoder"] = (
        {"type": "BertPreTokenizer"},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
    )


def unigram(made: dict[str, Any]) -> None:
    made["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁a", -1.0], ["<|endoftext|>", -2.0]]}
    made["added_tokens"] = []
    made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    made["decoder"] = made["pre_tokenizer"]


def with_added(made: dict[str, Any], content: str, **rules: bool) -> None:
    made["added_tokens"].append({**PAD, "id": 400, "content": content, "special": False, **rules})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda made: with_added(made, "<x>", lstrip=True), "does not give texts back: ' <x> b'"),
        (lambda made: with_added(made, "<x>", rstrip=True), "does not give texts back: ' b'"),
        (lambda made: made["model"].update(vocab=[1, 2]), "tokenizer.json has no vocabulary"),
        (lambda made: made["model"].update(vocab={"a": "0"}), "tokenizer.json has no vocabulary"),
        (lambda made: made["model"].pop("vocab"), "tokenizer.json has no vocabulary"),
        (lambda made: made["model"].update(merges=[["a", 1]]), "or no list of merges"),
        (lambda made: made["model"].update(merges=3), "or no list of merges"),
        (lowercased, 'does not give texts back: "Instr'),
        (in_one_line, "does not give texts back: '\\n\\n### Instr"),
        (without_a_byte, "does not give texts back: "),
        (by_white_space, "does not give texts back: "),
        (without_decoder, "does not give texts back: "),
        (word_pieces, "does not give texts back: "),
        (unigram, "does not give texts back: "),
        (lambda made: made["model"].update(merges=[["no", "such"]]), "cannot be used (Token `no` out of vocabulary"),
        (lambda made: made.pop("model"), "tokenizer.json has no model"),
        (lambda made: made.update(added_tokens=[{"id": "0"}]), "no list of added tokens"),
        (lambda made: made["added_tokens"].append({**PAD, "id": 999, "special": True}), "'[PAD]' has the id 999"),
    ],
)
def test_what_does_not_keep_texts_is_refused(change: Any, says: str, tmp_path: Path) -> None:
    assert says in refusal_of(tmp_path, {"tokenizer.json": description(change)})


@pytest.mark.parametrize("content", ["<x>", "[X] y", "日本"])
def test_an_added_token_that_keeps_the_text_is_used(content: str, tmp_path: Path) -> None:
    made = folder_of(tmp_path, {"tokenizer.json": description(lambda made: with_added(made, content))})
    text = f"a {content} b{content}c"
    assert 400 in made.encode(text)
    assert made.decode(made.encode(text)) == text


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    made, other = description(), description(vocab_size=390)
    put(tmp_path / "vocab", {"tokenizer.json": made})
    write_old_files(tmp_path / "vocab", other)
    assert "tokenizer.json and vocab.json contradict each other in " in refusal_of(tmp_path / "vocab", {})
    put(tmp_path / "merges", {"tokenizer.json": made})
    write_old_files(tmp_path / "merges", made)
    lines = (tmp_path / "merges" / "merges.txt").read_text().splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    (tmp_path / "merges" / "merges.txt").write_text("\n".join(lines))
    assert "tokenizer.json and merges.txt contradict each other" in refusal_of(tmp_path / "merges", {})
    ends = {"tokenizer_config.json": {"eos_token": "a"}, "special_tokens_map.json": {"eos_token": "b"}}
    assert "says that 'a' is eos_token, special_tokens_map.json 'b'" in refusal_of(
        tmp_path / "ends", {"tokenizer.json": made, **ends}
    )
    write_old_files(tmp_path / "ends", made)
    (tmp_path / "ends" / "tokenizer.json").unlink()
    (tmp_path / "ends" / "special_tokens_map.json").unlink()
    added = {"added_tokens_decoder": {"9": {"content": "<|endoftext|>", "special": True}}}
    assert "gives '<|endoftext|>' the id 9, another file 0" in refusal_of(
        tmp_path / "ends", {"tokenizer_config.json": added}
    )


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"vocab.json": {"a": 0}}, "got vocab.json as its tokenizer, expected tokenizer.json, or"),
        ({"merges.txt": "a b"}, "got merges.txt as its tokenizer"),
        ({"spiece.model": b"\x0a"}, "got spiece.model as its tokenizer"),
        ({"vocab.txt": "a"}, "got vocab.txt as its tokenizer"),
        ({"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}}, "it is a T5Tokenizer"),
        ({"tokenizer.json": "{"}, "tokenizer.json is not JSON"),
        ({"tokenizer.json": "[]"}, "tokenizer.json is not an object"),
        ({"tokenizer.json": b"\xff\xfe{}"}, "tokenizer.json is not JSON"),
        ({"tokenizer.json": '{"model":' + "[" * 100_000}, "tokenizer.json is not JSON"),
        ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"}, "tokenizer.json is a pointer of Git LFS"),
        (
            {"vocab.json": {"a": 0}, "merges.txt": "", "added_tokens.json": {"b": "1"}},
            "added_tokens.json is not an object from tokens to ids",
        ),
        ({"vocab.json": {"a": 0, "b": 0}, "merges.txt": "a b"}, "vocab.json gives two tokens one id"),
        ({"vocab.json": {"a": "0"}, "merges.txt": "a b"}, "vocab.json is not an object from tokens to ids"),
        ({"vocab.json": {"a": 0}, "merges.txt": "a b c"}, "merges.txt has lines that are not two tokens"),
        ({"vocab.json": {"a": 0}, "merges.txt": b"\xff \xfe"}, "merges.txt is not UTF-8"),
        (
            {"vocab.json": {"a": 0}, "merges.txt": "", "tokenizer_config.json": {"tokenizer_class": "CTRLTokenizer"}},
            "it is a CTRLTokenizer",
        ),
        ({"tokenizer.json": trained(ends="</s>")}, "has no end-of-text, which tells where a response ends"),
        (
            {"tokenizer.json": trained(), "tokenizer_config.json": {"eos_token": "</s>"}},
            "names '</s>' as its end-of-text, and has no such token",
        ),
    ],
)
def test_a_broken_or_unread_tokenizer_is_refused(files: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert says in refusal_of(tmp_path / "odd", files)


def test_a_folder_without_one_is_taken_for_gpt2s_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights(tmp_path, 50257)
    assert isinstance(load(tmp_path).config.tokenizer, GPT2Tokenizer)
    assert capsys.readouterr().err.count("holds no tokenizer: its ids are taken to be those of GPT-2's own") == 1


@pytest.mark.parametrize(("vocab_size", "fits"), [(399, False), (400, True), (500, True)])
def test_a_vocabulary_that_lacks_ids_is_refused_and_more_are_never_said(
    vocab_size: int, fits: bool, tmp_path: Path
) -> None:
    put(weights(tmp_path, vocab_size), {"tokenizer.json": trained()})
    if not fits:
        with pytest.raises(UserError, match=r"its tokenizer has the id 399 .*and its vocabulary 399 ids"):
            load(tmp_path)
        return
    config = load(tmp_path).config
    mask = config.tokenizer.without_text(config.vocab_size)
    assert (None if mask is None else mask.nonzero()[0].tolist()) == (None if vocab_size == 400 else [*range(400, 500)])


def test_a_special_token_that_the_weights_lack_does_no_harm(tmp_path: Path) -> None:
    """A padding token that was added without a row for it."""

    def change(made: dict[str, Any]) -> None:
        made["added_tokens"].append({**PAD, "id": 400, "special": True})

    put(weights(tmp_path, 400), {"tokenizer.json": description(change)})
    assert load(tmp_path).config.tokenizer.without_text(400) is None


def test_a_download_brings_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(weights(tmp_path, 400), {"tokenizer.json": trained()})
    asked: list[str] = []

    def download(_: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert isinstance(load("owner/name").config.tokenizer, FolderTokenizer)
    assert {*folder_tokenizer.NAMES, *folder_tokenizer.UNREAD} <= {*asked}


# It is used for everything


def argv(data: Path, folder: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", "--data", str(data), "--weights", str(folder), "--out", str(out), "--steps", "4",
        "--save_every", "2", "--eval_every", "2", "--samples", "2", "--device", "cpu", "--dtype", "fp32", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["same size", "smaller"])
def test_a_run_has_its_weights_tokenizer_from_beginning_to_end(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder, run = tmp_path / "data.json", foreign_weights(kind, tmp_path / "weights"), tmp_path / "run"
    data.write_text(json.dumps(made_records(40)))
    assert main(argv(data, folder, run)) == 0
    mine = load(folder).config.tokenizer
    assert isinstance(mine, FolderTokenizer)
    # The run's own copies are the folder's files, byte for byte.
    for place in ("model", "tokenizer"):
        for name, content in mine.files(0).items():
            assert (run / place / name).read_bytes() == content == (folder / name).read_bytes()
    assert sorted(path.name for path in (run / "tokenizer").iterdir()) == sorted(mine.files(0))
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["eos_token_id"] == mine.end_of_text
    # transformers reads the same ids out of the exported folder.
    theirs = AutoTokenizer.from_pretrained(run / "model")
    text = "Der braune Zwerg, 42 \n\n### Response:\n"
    assert theirs(text)["input_ids"] == mine.encode(text)
    assert theirs.eos_token_id == mine.end_of_text
    # What was trained on are its ids, ended by its end-of-text.
    model = load(run / "model")
    assert model.config.tokenizer.identity() == mine.identity()
    # Answers: its prompts, its end, its text.
    capsys.readouterr()
    assert main(["generate", "--run", str(run), "--max_new_tokens", "12", "--device", "cpu"]) == 0
    entries = json.loads((run / "responses.json").read_text())
    for entry in entries:
        prompt = mine.encode(ALPACA.prompt(entry["instruction"], entry["input"]))
        ids = greedy_reference(model, prompt, max_new_tokens=12)
        assert entry["model_response"] == ALPACA.extract(mine.decode(ids))
    # Perplexity, of its ids.
    found = response_perplexities(run, entries)[None]
    assert found == pytest.approx(perplexity_of(model, entries), rel=1e-4)


def perplexity_of(model: Any, entries: list[dict[str, Any]]) -> float:
    from fastft.batches.batch import from_padded

    tokenizer, total, count = model.config.tokenizer, 0.0, 0
    for entry in entries:
        prompt = tokenizer.encode(ALPACA.prompt(entry["instruction"], entry["input"]))
        ids = [
            *tokenizer.encode(ALPACA.prompt(entry["instruction"], entry["input"]) + ALPACA.response(entry["output"]))
        ]
        ids.append(tokenizer.end_of_text)
        inputs = torch.tensor([ids[:-1]])
        with torch.no_grad():
            logits = model.logits(from_padded(inputs, torch.full_like(inputs, -100)), impl="reference")
        mask = tokenizer.without_text(model.config.vocab_size)
        if mask is not None:
            logits[:, torch.from_numpy(mask)] = -torch.inf
        likely = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :]
        total, count = total - float(likely.sum()), count + len(likely)
    return float(torch.tensor(total / count).exp())


def test_a_resumed_run_goes_on_with_the_same_ids(tmp_path: Path) -> None:
    data, folder = tmp_path / "data.json", foreign_weights("smaller", tmp_path / "weights")
    data.write_text(json.dumps(made_records(40)))
    from fastft.run.config import TrainOptions
    from fastft.training.train import train

    options = TrainOptions(
        data=str(data), weights=str(folder), out=tmp_path / "parts", steps=4, save_every=2, device="cpu",
        dtype="fp32", samples=0, token_cache=str(tmp_path / "cache"),
    )  # fmt: skip
    train(options, stop_after=2)
    train(replace(options, resume=True))
    train(replace(options, out=tmp_path / "whole", token_cache="none"))
    parts, whole = (load(tmp_path / name / "model") for name in ("parts", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(parts.parameters(), whole.parameters(), strict=True))
    # The starting weights' folder is not needed to know what the ids mean.
    shutil.rmtree(folder)
    kept = tokenizer_of(tmp_path / "parts" / "tokenizer")
    assert kept is not None
    assert kept.identity() == whole.config.tokenizer.identity()


def test_the_fingerprint_is_of_what_the_ids_mean(tmp_path: Path) -> None:
    """Not of the files' other words, nor of a library's version; the files that a run keeps have the same."""

    def without_special_tokens(made: dict[str, Any]) -> None:
        made["added_tokens"] = []

    ends_at_5 = {"config.json": {"eos_token_id": 5}}
    plain = description(without_special_tokens, ends="</s>")
    mine = folder_of(tmp_path / "a", {"tokenizer.json": plain, **ends_at_5})
    kept = folder_of(tmp_path / "b", mine.files(0))
    assert kept.end_of_text == mine.end_of_text == 5
    assert kept.fingerprint() == mine.fingerprint()
    said = {"tokenizer.json": plain, **ends_at_5, "tokenizer_config.json": {"mine": 1}}
    assert folder_of(tmp_path / "c", said).fingerprint() == mine.fingerprint()
    others = [
        folder_of(tmp_path / "d", {"tokenizer.json": plain, "config.json": {"eos_token_id": 6}}),
        folder_of(
            tmp_path / "e",
            {"tokenizer.json": description(without_special_tokens, ends="</s>", vocab_size=399), **ends_at_5},
        ),
        folder_of(tmp_path / "f", permuted_gpt2()),
        folder_of(tmp_path / "g", permuted_gpt2(1)),
        gpt2_tokenizer(),
    ]
    assert len({one.fingerprint() for one in (mine, *others)}) == 1 + len(others)
    assert gpt2_tokenizer().fingerprint() == type(gpt2_tokenizer())().fingerprint()


def test_another_tokenizer_than_the_runs_is_refused_by_whatever_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that gives the data's texts the same ids, which nothing but its identity tells."""
    data, folder, run = tmp_path / "data.json", foreign_weights("smaller", tmp_path / "weights"), tmp_path / "run"
    data.write_text(json.dumps(made_records(40)))
    assert main(argv(data, folder, run)) == 0
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["generate", "--run", str(run), "--max_new_tokens", "4", "--limit", "1", "--device", "cpu"]) == 0
    made_from = json.loads((run / "responses.made-from.json").read_text())
    ours = load(folder).config.tokenizer.fingerprint()
    assert made_from["tokenizer_sha256"] == ours
    assert json.loads((run / "data.json").read_text())["tokenizer_sha256"] == ours
    entries = json.loads((run / "responses.json").read_text())

    def rare(made: dict[str, Any]) -> None:  # two tokens that the data does not have change their ids
        vocab = made["model"]["vocab"]
        one, other = (token for token in vocab if token in ("\u0108", "\u0109"))
        vocab[one], vocab[other] = vocab[other], vocab[one]

    swapped = description(rare, ends="</s>")
    for place in ("model", "tokenizer"):
        put(run / place, {"tokenizer.json": swapped})
    text = ALPACA.prompt("Say the number 3 in words.", "")
    assert tokenizer_of(run / "model").encode(text) == load(folder).config.tokenizer.encode(text)  # type: ignore[union-attr]
    commands = {
        "generate": ["generate", "--run", str(run), "--max_new_tokens", "4", "--device", "cpu"],
        "chat": ["chat", "--run", str(run), "--device", "cpu"],
        "resume": ["train", "--resume", "--out", str(run), "--steps", "6"],
    }
    for name, command in commands.items():
        capsys.readouterr()
        assert main(command) == 2, name
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(said) == 1
        assert "the tokenizer is not the one that" in said[0]
    with pytest.raises(UserError, match="the tokenizer is not the one that"):
        response_perplexities(run, entries)
    shutil.rmtree(run / "tokenizer")  # then GPT-2's would be taken
    assert main(commands["resume"]) == 2
    assert (run / "metrics.jsonl").read_bytes() == before
    put(run / "tokenizer", load(folder).config.tokenizer.files(0))
    assert main(commands["resume"]) == 0


def test_with_gpt2s_tokenizer_a_run_keeps_no_copy(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(made_records(40)))
    torch.manual_seed(0)
    save_hf(load(weights(tmp_path / "weights", 50257)), tmp_path / "weights")
    assert main(argv(data, tmp_path / "weights", tmp_path / "run")) == 0
    assert not (tmp_path / "run" / "tokenizer").exists()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["weights"] == str(tmp_path / "weights")


def test_chat_answers_with_the_runs_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    data, folder, run = tmp_path / "data.json", foreign_weights("same size", tmp_path / "weights"), tmp_path / "run"
    data.write_text(json.dumps(made_records(40)))
    assert main(argv(data, folder, run)) == 0
    model = load(run / "model")
    tokenizer = model.config.tokenizer
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("Say the number 3 in words.\n"))
    assert main(["chat", "--run", str(run), "--max_new_tokens", "9", "--device", "cpu"]) == 0
    prompt = tokenizer.encode(ALPACA.prompt("Say the number 3 in words.", ""))
    ids = greedy_reference(model, prompt, max_new_tokens=9)
    assert capsys.readouterr().out.strip() == ALPACA.extract(tokenizer.decode(ids)).strip()


def test_the_models_own_end_of_text_is_looked_for_in_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behind an output it is the end; elsewhere the record is malformed, for every command that reads the data."""
    from fastft.answers.generation import generate
    from fastft.answers.options import GenerateOptions
    from fastft.inspect import InspectOptions, inspect
    from fastft.run.config import TrainOptions
    from fastft.training.train import train

    data, folder = tmp_path / "data.json", foreign_weights("smaller", tmp_path / "weights")
    records = made_records(40)
    records[0]["output"] += "</s>"
    data.write_text(json.dumps(records))
    options = TrainOptions(
        data=str(data), weights=str(folder), out=tmp_path / "run", steps=2, device="cpu", dtype="fp32",
        samples=0,
    )  # fmt: skip
    train(options)
    assert "or </s> at their end, taken as the end: 1" in " ".join(capsys.readouterr().err.split())
    inspect(InspectOptions(data=str(data), weights=str(folder)))
    assert "or </s> at their end, taken as the end: 1" in " ".join(capsys.readouterr().out.split())
    train(replace(options, steps=3, resume=True))
    assert len(generate(GenerateOptions(run=options.out, max_new_tokens=2, device="cpu"))) == 4
    records[1]["input"] = "a </s> in the middle"
    data.write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"row 2.*</s>"):
        train(replace(options, overwrite=True))
    train(replace(options, overwrite=True, end_of_text_in_data="keep"))
