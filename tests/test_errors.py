"""Bad input to the command line: one clear line, exit status 2, and nothing that was computed is lost."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import requests
import torch
import yaml
from forks import free_port, in_fork, in_forks
from forks import launched as variables
from ollama_stub import OllamaStub, body, pull_lines, status
from ollama_stub import says as judge_says
from ollama_stub import thinks as judge_thinks
from rating_pages import entries, exported, made_page, rated, says, two_runs, write_run
from safetensors.torch import load_file, save_file
from small_records import made_records

from fastft.cli import main
from fastft.common.errors import EXIT_NO_JUDGE, UserError
from fastft.common.lock import LOCK_FILE
from fastft.data.tokenizer import GPT2Tokenizer
from fastft.engines import choose
from fastft.run.data import load_data
from fastft.run.folder import Run

resource = pytest.importorskip("resource", reason="full disks are played by RLIMIT_FSIZE, which POSIX alone has")

GENERATE = ("--max_new_tokens", "4", "--batch_size", "1")


@dataclass
class Place:
    """Where a case prepares its files."""

    tmp: Path
    trained: Path
    patch: pytest.MonkeyPatch

    @property
    def out(self) -> Path:
        return self.tmp / "out"

    def bytes(self, name: str, content: bytes) -> Path:
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def text(self, name: str, content: str) -> Path:
        return self.bytes(name, content.encode())

    def json(self, value: Any, name: str = "data.json") -> Path:
        return self.text(name, json.dumps(value))

    def with_record(self, record: Any) -> Path:
        """30 records, the third replaced."""
        return self.json([*made_records()[:2], record, *made_records()[3:]])

    def train(self, *options: object, data: object = None) -> list[str]:
        data = self.json(made_records(), "good.json") if data is None else data
        given = ["--data", data, "--model", "pico", "--steps", "2", "--batch_size", "2", "--out", self.out, *options]
        return ["train", *map(str, given)]

    def train_on(self, record: Any) -> list[str]:
        return self.train(data=self.with_record(record))

    def run(self) -> Path:
        """A run of two steps, its data file beside it."""
        if not self.out.is_dir():
            shutil.copytree(self.trained, self.out)
            self.configure(data=str(self.json(made_records(), "run-data.json")))
        return self.out

    def configure(self, **changes: Any) -> None:
        """Changes options in the run's config.yaml."""
        config = self.out / "config.yaml"
        config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **changes}))

    def other_data(self, records: list[Any]) -> None:
        """As if the run had been trained on these records."""
        self.run()
        self.configure(data=str(self.json(records)))
        (self.out / "data.json").unlink()
        with contextlib.suppress(UserError):  # which is what the case is about
            data = load_data(Run(self.out).options())
            (self.out / "data.json").write_text(json.dumps({"split_sha256": data.fingerprint()}))

    def resume(self, *options: object) -> list[str]:
        return ["train", "--resume", "--out", str(self.run()), *map(str, options)]

    def on_run(self, command: str, *options: object) -> list[str]:
        return [command, "--run", str(self.run()), *map(str, options)]

    def weights(self, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        """The run's exported model with edited tensors."""
        folder = self.tmp / "weights"
        shutil.copytree(self.trained / "model", folder)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def weights_config(self, **changes: Any) -> Path:
        folder = self.weights(lambda _: None)
        config = folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
        return folder

    def load(self, source: object) -> list[str]:
        return self.train("--weights", source)

    def damaged(self, name: str, damage: Callable[[Path], object]) -> list[str]:
        """Resumes the run after damage to a file of its one checkpoint."""
        damage(self.run() / "checkpoints" / "step-2" / name)
        return self.resume("--steps", "4")


def changed(record_changes: dict[str, Any]) -> dict[str, Any]:
    return {**made_records()[2], **record_changes}


def choices(given: Any, output: str = "a") -> dict[str, Any]:
    return changed({"choices": given, "output": output})


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in made_records()[2].items() if name != key}


def cut(path: Path) -> None:
    """Leaves the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Changes one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Evil:
    """Pickled code: it would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def no_hub(place: Place, source: str) -> list[str]:
    place.patch.setattr(huggingface_hub, "snapshot_download", raising(OSError("no route to host")))
    return place.load(source)


def no_network_for_the_book(place: Place) -> list[str]:
    place.patch.setenv("FASTFT_CACHE", str(place.tmp / "cache"))
    place.patch.setattr(requests, "get", raising(requests.ConnectionError("no route to host")))
    return place.train(data="book")


def another_book(place: Place) -> list[str]:
    reply = requests.Response()
    reply.status_code, reply._content = 200, b"[]"
    place.patch.setenv("FASTFT_CACHE", str(place.tmp / "cache"))
    place.patch.setattr(requests, "get", lambda *_, **__: reply)
    return place.train(data="book")


def unwritable_cache(place: Place) -> list[str]:
    place.patch.setenv("FASTFT_CACHE", str(place.text("file", "") / "cache"))
    return place.train(data="book")


def no_gpu(place: Place) -> list[str]:
    place.patch.setattr(torch.cuda, "is_available", lambda: False)
    return place.train("--device", "cuda")


def evil_pth(place: Place) -> list[str]:
    mark = place.tmp / "executed"
    place.bytes("evil.pth", pickle.dumps({"tok_emb.weight": Evil(mark)}, protocol=2))
    return place.load(place.tmp / "evil.pth")


def only_bin(place: Place) -> list[str]:
    place.bytes("weights/pytorch_model.bin", b"pickle")
    place.text("weights/config.json", "{}")
    return place.load(place.tmp / "weights")


def cut_weights(place: Place) -> list[str]:
    folder = place.weights(lambda _: None)
    cut(folder / "model.safetensors")
    return place.load(folder)


def small_vocabulary(place: Place) -> list[str]:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:1000].clone()

    folder = place.weights(shrink)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 1000}))
    return place.load(folder)


def other_content(place: Place) -> list[str]:
    place.run()
    place.json(made_records(40)[10:], "run-data.json")
    return place.resume("--steps", "4")


def long_prompts(n_words: int) -> list[dict[str, Any]]:
    """Records whose prompts are about `n_words` tokens."""
    return [{**record, "instruction": record["instruction"] + " word" * n_words} for record in made_records()]


def removed(place: Place, name: str, command: str) -> list[str]:
    path = place.run() / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return place.on_run(command)


def responses(place: Place, content: str, command: str) -> list[str]:
    """The run with other bytes for the responses that it has made."""
    argv = place.on_run("generate", *GENERATE)
    assert main(argv) == 0
    place.text("out/responses.json", content)
    return argv if command == "generate" else place.on_run(command)


def answered(instruction: str, **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "input": "", "output": "b", "model_response": "c", **more}


def comparing(place: Place, *options: object) -> list[str]:
    """Two runs of nothing but the same two answered entries."""
    for name in ("a", "b"):
        place.json([answered("a"), answered("c")], f"{name}/responses.json")
    return ["compare", str(place.tmp / "a"), str(place.tmp / "b"), *map(str, options)]


def folder_for_file(place: Place, name: str, argv: Callable[[], list[str]]) -> list[str]:
    """A folder stands where the command writes a file."""
    place.run()
    (place.out / name).unlink(missing_ok=True)
    place.text(f"out/{name}/inside", "")
    return argv()


def deepspeed(place: Place, content: str) -> list[str]:
    return place.train("--deepspeed_config", place.text("zero.json", content))


def launched(place: Place, **variables: str) -> list[str]:
    """As if a launcher had told the process so."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        place.patch.delenv(name, raising=False)
    for name, value in variables.items():
        place.patch.setenv(name, value)
    return place.train()


def ab(place: Place, *options: object, second: Any = None) -> list[str]:
    """Two runs to rate, the second one with other entries where these are given."""
    ada, bob = two_runs(place.tmp)
    if second is not None:
        write_run(bob, second)
    return ["ab", str(ada), str(bob), *map(str, options)]


def ratings(place: Place, *options: object, **changes: Any) -> list[str]:
    """Ratings of a page, with changes to what was exported."""
    file = {**rated(made_page(place.tmp), "Eve", says("ada")), **changes}
    return ["ab", "--import", str(exported(place.tmp, file)), *map(str, options)]


def rating(place: Place, **changes: Any) -> list[str]:
    """Ratings with changes to the first of them."""
    first, *rest = rated(made_page(place.tmp), "Eve", says("ada"))["ratings"]
    return ratings(place, ratings=[{**first, **changes}, *rest])


def rated_before(place: Place) -> list[str]:
    """One of the runs has answered again since."""
    argv = ratings(place)
    write_run(place.tmp / "bob", entries("tom"))
    return argv


@dataclass(frozen=True)
class Case:
    name: str
    prepare: Callable[[Place], list[str]]
    words: tuple[str, ...]
    """All stand in the line."""
    may_change: tuple[str, ...] = ()
    """Files that are written before the fault shows."""


RECORDS = [
    Case("no such file", lambda p: p.train(data="nowhere.json"), ("nowhere.json", "not found", "--data")),
    Case("unknown suffix", lambda p: p.train(data=p.text("data.txt", "a,b")), ("data.txt", "unknown", ".jsonl")),
    Case("a folder", lambda p: p.train(data=p.text("x.json/inside", "").parent), ("x.json", "no data file")),
    Case("empty file", lambda p: p.train(data=p.text("data.json", "")), ("data.json", "not JSON", "expected")),
    Case("not JSON", lambda p: p.train(data=p.text("data.json", "[{,")), ("data.json", "not JSON", "line 1")),
    Case("nested too deeply", lambda p: p.train(data=p.text("data.json", "[" * 100_000)), ("nested too deeply",)),
    Case("object at the top", lambda p: p.train(data=p.json({"a": []})), ("an object", "expected an array")),
    Case("empty array", lambda p: p.train(data=p.json([])), ("no usable record", "expected objects")),
    Case("text for a record", lambda p: p.train_on("text"), ("row 3", "got text", "expected an object")),
    Case("no instruction", lambda p: p.train_on(without("instruction")), ("row 3", "`instruction` is missing")),
    Case("no output", lambda p: p.train_on(without("output")), ("1 of 30", "row 3", "`output` is missing")),
    Case("number for text", lambda p: p.train_on(changed({"output": 5})), ("row 3", "`output` is a number")),
    Case("null for text", lambda p: p.train_on(changed({"output": None})), ("row 3", "`output` is null")),
    Case("list for input", lambda p: p.train_on(changed({"input": ["a"]})), ("row 3", "`input` is an array")),
    Case("blank instruction", lambda p: p.train_on(changed({"instruction": " \n"})), ("row 3", "blank", "skip_bad")),
    Case("lone surrogate", lambda p: p.train_on(changed({"output": "\ud800"})), ("row 3", "surrogate", "Unicode")),
    Case("category a list", lambda p: p.train_on(changed({"category": ["a"]})), ("row 3", "`category` is an array")),
    Case("choices an object", lambda p: p.train_on(choices({})), ("row 3", "`choices` is an object", "another name")),
    Case("one choice", lambda p: p.train_on(choices(["a"])), ("row 3", "`choices` has 1 entries", "2 to 26")),
    Case("a number for a choice", lambda p: p.train_on(choices(["a", 5])), ("row 3", "number 2 is a number")),
    Case("a blank choice", lambda p: p.train_on(choices(["a", " "])), ("row 3", "number 2 is ' '", "expected text")),
    Case("the same choice twice", lambda p: p.train_on(choices(["a", "a "])), ("row 3", "same text twice")),
    Case("output no choice", lambda p: p.train_on(choices(["x", "y"], "D")), ("row 3", "`output` is none", "A to B")),
    Case("not UTF-8", lambda p: p.train(data=p.bytes("data.json", b'["\xff"]')), ("not UTF-8", "byte 2", "save it")),
    Case("empty under a .gz name", lambda p: p.train(data=p.text("data.json.gz", "[]")), ("data.json.gz", "no usable")),
    Case(
        "truncated gzip",
        lambda p: p.train(data=p.bytes("data.json.gz", gzip.compress(json.dumps(made_records()).encode())[:-20])),
        ("data.json.gz", "gzip", "again"),
    ),
    Case(
        "corrupt gzip",
        lambda p: p.train(data=p.bytes("data.json.gz", gzip.compress(b"[]" * 99)[:10] + b"\xff" * 40)),
        ("data.json.gz", "gzip", "again"),
    ),
    Case(
        "bad JSONL line",
        lambda p: p.train(data=p.text("data.jsonl", json.dumps(made_records()[0]) + "\n\n{oops\n")),
        ("data.jsonl", "1 of 2", "row 3", "not JSON"),
    ),
    Case(
        "JSONL line nested too deeply",
        lambda p: p.train(data=p.text("data.jsonl", "[" * 100_000)),
        ("row 1", "nested too deeply"),
    ),
    Case("object around all", lambda p: p.train(data=p.json({"train": made_records()})), ("keys `train`", "array")),
    Case(
        "one object over several lines",
        lambda p: p.train(data=p.text("data.json", json.dumps(made_records()[0], indent=1))),
        ("data.json", "line 1 does not hold whole", "one object a line"),
    ),
    Case(
        "UTF-16",
        lambda p: p.train(data=p.bytes("data.json", json.dumps(made_records()).encode("utf-16"))),
        ("data.json", "UTF-16", "save it as UTF-8"),
    ),
    Case(
        "a line over 16 MiB",
        lambda p: p.train(data=p.text("data.jsonl", '{"instruction": "' + "a" * (17 << 20))),
        ("1 of 1", "row 1", "longer than 16 MiB"),
    ),
    Case(
        "export: a size of nothing",
        lambda p: ["export", "--run", str(p.trained), "--to", "hf", "--shard_size", "big"],
        ("--shard_size big", "5GB"),
    ),
    Case(
        "export: over other files",
        lambda p: ["export", "--run", str(p.trained), "--to", "book", "--out", str(p.trained / "model"), "--overwrite"],
        ("model", "a place of the run's own", "another --out"),
    ),
    Case(
        "export: over somebody's files",
        lambda p: ["export", "--run", str(p.trained), "--to", "book", "--out", str(p.text("other/a", "mine").parent)],
        ("other", "no export has written them", "another --out"),
    ),
    Case(
        "export: what has no effect",
        lambda p: ["export", "--run", str(p.trained), "--to", "hf", "--quantize", "q8_0"],
        ("--quantize q8_0", "--to gguf or ollama"),
    ),
    Case("unknown format", lambda p: p.train("--format", "chat"), ("--format chat", "auto, alpaca", "tokens")),
    Case("fields that are no pairs", lambda p: p.train("--fields", "question"), ("--fields question", "THEIRS=OURS")),
    Case(
        "a field of nothing",
        lambda p: p.train("--fields", "q=instruction,a=outputs"),
        ("outputs is no key", "did you mean output?"),
    ),
    Case(
        "inspect: a field of another format",
        lambda _: ["inspect", "--format", "messages", "--fields", "a=output"],
        ("output is no key of messages", "THEIRS=OURS"),
    ),
    Case(
        "other names",
        lambda p: p.train(data=p.json([{"question": "q", "answer": "a"}] * 30)),
        ("row 1", "`instruction` is missing", "--fields question=instruction,answer=output"),
    ),
    Case("a row of another format", lambda p: p.train_on({"text": "a"}), ("row 3", "of text", "as row 1 has")),
    Case("a row of two formats", lambda p: p.train_on(changed({"messages": []})), ("row 3", "messages", "--format")),
    Case(
        "a conversation without an answer",
        lambda p: p.train(data=p.json([{"messages": [{"role": "user", "content": "q"}]}] * 30)),
        ("row 1", "ends with the user", "leave that question out"),
    ),
    Case("no header", lambda p: p.train(data=p.text("data.csv", "")), ("data.csv", "no header")),
    Case("no Parquet", lambda p: p.train(data=p.text("data.parquet", "PAR1")), ("data.parquet", "not whole Parquet")),
    Case("a data set's name", lambda p: p.train(data="hf:"), ("got hf:", "expected hf:ID")),
    Case("a system text", lambda p: p.train_on(changed({"system": "Be brief."})), ("row 3", "`system`", "`messages`")),
    Case("a history", lambda p: p.train_on(changed({"history": [["a", "b"]]})), ("row 3", "`history`", "`messages`")),
    Case("an empty output", lambda p: p.train_on(changed({"output": ""})), ("row 3", "--allow_empty_output")),
    Case(
        "an end of text within an output",
        lambda p: p.train_on(changed({"output": "a<|endoftext|>b"})),
        ("row 3", "`output` holds <|endoftext|>", "--end_of_text_in_data keep"),
    ),
    Case(
        "nothing but an end of text",
        lambda p: p.train_on(changed({"output": "<|endoftext|>"})),
        ("row 3", "`output` is empty", "--allow_empty_output"),
    ),
    Case("NaN for an output", lambda p: p.train_on(changed({"output": float("nan")})), ("row 3", "`output` is null")),
    Case(
        "unknown way with an end of text",
        lambda p: p.train("--end_of_text_in_data", "cut"),
        ("--end_of_text_in_data cut", "refuse or keep"),
    ),
    Case(
        "inspect: unknown way with an end of text",
        lambda _: ["inspect", "--end_of_text_in_data", "cut"],
        ("--end_of_text_in_data cut", "refuse or keep"),
    ),
    Case("too few for a split", lambda p: p.train(data=p.json(made_records(1))), ("too few records", "85%")),
    Case("no network for the book's data", no_network_for_the_book, ("cannot download", "--data")),
    Case("another file for the book's data", another_book, ("SHA-256", "expected 7e09", "--data")),
    Case("cache that cannot be made", unwritable_cache, ("cannot create the folder", "FASTFT_CACHE")),
    Case(
        "token cache that cannot be made",
        lambda p: p.train("--token_cache", p.text("file", "") / "cache"),
        ("cannot create the folder", "--token_cache"),
    ),
    Case("token cache without a name", lambda p: p.train("--token_cache", ""), ("empty --token_cache", "auto, none")),
    Case(
        "cached: no such file",
        lambda p: p.train("--token_cache", p.tmp / "cache", data="nowhere.json"),
        ("nowhere.json", "not found", "--data"),
    ),
    Case(
        "prompts longer than the context",
        lambda p: p.train("--too_long", "raise", data=p.json(long_prompts(300))),
        ("longer than 256 tokens", "rows 1, 2", "--too_long drop"),
    ),
    Case(
        "prompts that fill the context, truncated",
        lambda p: p.train("--too_long", "truncate", data=p.json(long_prompts(300))),
        ("no supervised token", "rows 1, 2", "256", "--max_length"),
    ),
    Case(
        "everything dropped",
        lambda p: p.train("--too_long", "drop", data=p.json(long_prompts(300))),
        ("no training example",),
    ),
]

OPTIONS = [
    Case("unknown command", lambda _: ["trian"], ("'trian'", "expected one of", "train")),
    Case("unknown option", lambda p: p.train("--batchsize", "4"), ("--batchsize", "--help")),
    Case("abbreviated option", lambda p: p.train("--batch", "4"), ("--batch", "--help")),
    Case("stray argument", lambda p: p.train("stray"), ("stray", "--help")),
    Case("option without its value", lambda p: p.train("--lr"), ("--lr", "expected one argument")),
    Case("required option missing", lambda _: ["generate"], ("expected one", "--run")),
    Case("text for a number", lambda p: p.train("--batch_size", "many"), ("--batch_size many", "whole number")),
    Case("fraction for a count", lambda p: p.train("--steps", "1.5"), ("--steps 1.5", "whole number")),
    Case("text for a flag", lambda p: p.train("--mask_prompt", "maybe"), ("--mask_prompt maybe", "true or false")),
    Case("batch size 0", lambda p: p.train("--batch_size", "0"), ("--batch_size 0", "at least 1")),
    Case("negative steps", lambda p: p.train("--steps", "-3"), ("--steps -3", "at least 0")),
    Case("rate 0", lambda p: p.train("--lr", "0"), ("--lr 0", "positive")),
    Case("rate not a number", lambda p: p.train("--lr", "nan"), ("--lr nan", "expected a number")),
    Case("infinite rate", lambda p: p.train("--lr", "1e999"), ("--lr inf", "positive")),
    Case("negative clipping", lambda p: p.train("--clip", "-1"), ("--clip -1", "at least 0")),
    Case("seed beyond 64 bits", lambda p: p.train("--seed", "9" * 30), ("--seed 999", "at most")),
    Case("absurd number of threads", lambda p: p.train("--threads", "9" * 15), ("--threads 999", "at most")),
    Case(
        "compile the torch path", lambda p: p.train("--compile", "true", "--device", "cpu"), ("--compile true", "tiles")
    ),
    Case(
        "compile the torch path by name",
        lambda p: p.train("--compile", "--impl", "cpu", "--tie_head", "false"),
        ("--compile true", "--impl cpu"),
    ),
    Case("unknown model", lambda p: p.train("--model", "gpt9"), ("gpt9", "gpt2-medium", "nano")),
    Case("unknown template", lambda p: p.train("--template", "vikuna"), ("'vikuna'", "did you mean vicuna", "alpaca")),
    Case("unknown dtype", lambda p: p.train("--dtype", "int8"), ("--dtype int8", "bf16", "fp32")),
    Case("unknown recipe", lambda p: p.train("--recipe", "cake"), ("--recipe cake", "book")),
    Case("resume and overwrite", lambda p: p.train("--resume", "--overwrite"), ("--resume and --overwrite", "one of")),
    Case("length over the context", lambda p: p.train("--max_length", "300"), ("--max_length 300", "256")),
    Case("device that is not there", no_gpu, ("--device cuda", "cpu")),
    Case("book without evaluations", lambda p: p.train("--recipe", "book", "--eval_every", "0"), ("--eval_every 0",)),
    Case("book without drop_last", lambda p: p.train("--recipe", "book", "--drop_last", "false"), ("--drop_last",)),
    Case("book with too few", lambda p: p.train("--recipe", "book", "--batch_size", "99"), ("25", "--batch_size 99")),
    Case("missing config", lambda p: p.train("--config", "nowhere.yaml"), ("--config", "nowhere.yaml", "not found")),
    Case("config not YAML", lambda p: p.train("--config", p.text("c.yaml", "a: [1\nb: }")), ("config", "line 2")),
    Case("config not UTF-8", lambda p: p.train("--config", p.bytes("c.yaml", b"\xff\xfe")), ("--config", "UTF-8")),
    Case("config is a list", lambda p: p.train("--config", p.text("c.yaml", "- 1")), ("--config", "name: value")),
    Case("unknown key in config", lambda p: p.train("--config", p.text("c.yaml", "batch: 4")), ("got batch,",)),
    Case("bad value in config", lambda p: p.train("--config", p.text("c.yaml", "lr: x")), ("--lr x", "a number")),
    Case("inspect: batch size 0", lambda _: ["inspect", "--data", "sample", "--batch_size", "0"], ("at least 1",)),
    Case("inspect: length 0", lambda _: ["inspect", "--data", "sample", "--max_length", "0"], ("at least 1",)),
    Case("inspect: over the context", lambda _: ["inspect", "--max_length", "9999"], ("--max_length 9999", "1024")),
    Case(
        "inspect: no such example",
        lambda p: ["inspect", "--data", str(p.json(made_records())), "--example", "31"],
        ("--example 31", "expected"),
    ),
    Case(
        "inspect: everything dropped",
        lambda p: ["inspect", "--data", str(p.json(made_records())), "--max_length", "5", "--too_long", "drop"],
        ("dropped", "--max_length"),
    ),
]

SPLITS = [
    Case("shares over 1", lambda p: p.train("--split", "0.9,0.1,0.1"), ("--split 0.9,0.1,0.1", "sum to 1")),
    Case("two shares", lambda p: p.train("--split", "0.9,0.1"), ("--split 0.9,0.1", "training, validation and test")),
    Case("text for shares", lambda p: p.train("--split", "most"), ("--split most", "numbers with commas")),
    Case("counts for shares", lambda p: p.train("--split", "20,5,5"), ("--split 20,5,5", "--val_data", "--test_data")),
    Case("nothing to train on", lambda p: p.train("--split", "0,0.5,0.5"), ("--split 0,0.5,0.5", "for training")),
    Case(
        "a share beside a file",
        lambda p: p.train("--split", "0.8,0.1,0.1", "--test_data", p.json(made_records(3), "t.json")),
        ("--split 0.8,0.1,0.1 with --test_data", "0.9,0.1,0"),
    ),
    Case(
        "no such validation file", lambda p: p.train("--val_data", "no.json"), ("--val_data: ", "no.json", "not found")
    ),
    Case("an empty test file", lambda p: p.train("--test_data", p.json([], "t.json")), ("--test_data: ", "no usable")),
    Case("an empty name", lambda p: p.train("--val_data", ""), ("empty --val_data", "expected a file")),
    Case(
        "test records that are trained on",
        lambda p: p.train("--test_data", p.json(made_records(), "t.json")),
        ("--data", "good.json", "--test_data", "t.json", "same records"),
    ),
    Case(
        "validation data in the run's folder",
        lambda p: p.train("--val_data", p.json(made_records(3), "out/metrics.jsonl")),
        ("--val_data", "metrics.jsonl", "move it"),
    ),
    Case(
        "split beside both files",
        lambda p: p.train("--split", "1,0,0", "--val_data", "v.json", "--test_data", "t.json"),
        ("--split 1,0,0", "no effect", "--val_data and --test_data"),
    ),
    Case(
        "shuffled beside both files",
        lambda p: p.train("--split_seed", "3", "--val_data", "v.json", "--test_data", "t.json"),
        ("--split_seed 3", "no effect", "split off"),
    ),
    Case("mix of one file", lambda p: p.train("--mix", "2,1"), ("--mix 2,1", "no effect", "several files")),
    Case(
        "mix in the book's order",
        lambda _: ["train", "--recipe", "book", "--data", "a.json", "b.json", "--mix", "2,1"],
        ("--mix 2,1", "no effect", "the book's"),
    ),
    Case("no files", lambda _: ["train", "--data"], ("--data", "at least one")),
    Case("--data twice", lambda p: p.train("--data", "b.json"), ("--data twice", "--data A B")),
    Case(
        "a number for files", lambda p: p.train("--config", p.text("c.yaml", "val_data: [a]")), ("--val_data", "text")
    ),
    Case(
        "moved to too few files",
        lambda p: p.on_run("generate", "--data", "a", "b"),
        ("--data with 2 files", "expected 1"),
    ),
]

RANKS = [
    Case("a hang of less than nothing", lambda p: p.train("--hang_timeout", "-1"), ("--hang_timeout -1", "at least 0")),
    Case("a hang without a number", lambda p: p.train("--hang_timeout", "nan"), ("--hang_timeout nan", "a number")),
    Case("a hang of ages", lambda p: p.train("--hang_timeout", "1e300"), ("--hang_timeout 1e+300", "at most")),
    Case("an endless hang", lambda p: p.train("--hang_timeout", "1e999"), ("--hang_timeout inf", "at most")),
    Case("whole every -1", lambda p: p.train("--whole_every", "-1"), ("--whole_every -1", "at least 0")),
    Case("no DeepSpeed file", lambda p: p.train("--deepspeed_config", "no.json"), ("no.json", "not there", "launch/")),
    Case(
        "a folder for the file", lambda p: p.train("--deepspeed_config", p.tmp), ("--deepspeed_config", "cannot read")
    ),
    Case("DeepSpeed file not JSON", lambda p: deepspeed(p, "{"), ("zero.json", "not JSON", "line 1")),
    Case("DeepSpeed file a list", lambda p: deepspeed(p, "[1]"), ("zero.json", "an array", "an object")),
    Case("DeepSpeed file without a stage", lambda p: deepspeed(p, "{}"), ("zero.json", "zero_optimization", "launch/")),
    Case(
        "DeepSpeed file that disagrees",
        lambda p: deepspeed(p, '{"zero_optimization": {"stage": 1}, "train_batch_size": 64}'),
        ("zero.json", "train_batch_size 64 there", "--batch_size 2 here", "auto"),
    ),
    Case(
        "DeepSpeed file with a scheduler",
        lambda p: deepspeed(p, '{"zero_optimization": {"stage": 1}, "scheduler": {"type": "WarmupLR"}}'),
        ("zero.json", "scheduler", "--schedule", "remove"),
    ),
    Case(
        "resume with a DeepSpeed file that disagrees",
        lambda p: p.resume(*deepspeed(p, '{"zero_optimization": {"stage": 0}, "gradient_clipping": 9}')[-2:]),
        ("zero.json", "gradient_clipping 9 there", "--clip 1.0 here"),
    ),
    Case("a rank after the last", lambda p: launched(p, RANK="2", WORLD_SIZE="2"), ("RANK=2", "from 0 to 1")),
    Case("a rank in words", lambda p: launched(p, RANK="one", WORLD_SIZE="2"), ("RANK=one", "whole number", "unset")),
    Case("a rank of no world", lambda p: launched(p, RANK="0"), ("WORLD_SIZE=None", "whole number", "unset")),
    Case("a world in words", lambda p: launched(p, RANK="0", WORLD_SIZE="all"), ("WORLD_SIZE=all", "unset")),
    Case(
        "a port in words",
        lambda p: launched(p, RANK="0", WORLD_SIZE="2", MASTER_PORT="http"),
        ("MASTER_PORT=http", "whole number"),
    ),
]

WEIGHTS = [
    Case("no such path", lambda p: p.load(p.tmp / "nowhere"), ("nowhere", "expected a Hugging Face folder")),
    Case("no such .pth", lambda p: p.load("nowhere/model.pth"), ("model.pth", "expected")),
    Case(
        "weights of another shape",
        lambda p: p.train("--weights", p.trained / "model", "--model", "nano"),
        ("got --model nano", "model, which are of another shape (2 layers", "leave --model out"),
    ),
    Case(
        "published weights of another shape", lambda p: p.load("gpt2"), ("--model pico", "--weights gpt2", "12 layers")
    ),
    Case(
        "no network for an id", lambda p: [*no_hub(p, "gpt2"), "--model", "gpt2"], ("openai-community/gpt2", "network")
    ),
    Case("empty folder", lambda p: p.load(p.text("weights/readme", "").parent), ("model.safetensors", "convert")),
    Case("pytorch_model.bin alone", only_bin, ("pytorch_model.bin", "only safetensors", "save_pretrained")),
    Case("truncated safetensors", cut_weights, ("model.safetensors", "whole safetensors", "again")),
    Case(
        "missing tensor",
        lambda p: p.load(p.weights(lambda t: t.pop("transformer.h.1.ln_2.bias"))),
        ("missing transformer.h.1.ln_2.bias [32]",),
    ),
    Case(
        "unexpected tensor",
        lambda p: p.load(p.weights(lambda t: t.update(adapter=torch.zeros(3)))),
        ("unexpected adapter [3]",),
    ),
    Case(
        "wrong shape",
        lambda p: p.load(p.weights(lambda t: t.update({"transformer.ln_f.bias": torch.zeros(31)}))),
        ("transformer.ln_f.bias", "got shape [31]", "expected [32]"),
    ),
    Case(
        "wrong dtype",
        lambda p: p.load(p.weights(lambda t: t.update({"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}))),
        ("transformer.ln_f.bias", "got dtype I8", "F32"),
    ),
    Case("vocabulary too small", small_vocabulary, ("vocabulary of 1000", "50257")),
    Case("another architecture", lambda p: p.load(p.weights_config(model_type="llama")), ("llama", '"gpt2"')),
    Case("heads that do not divide", lambda p: p.load(p.weights_config(n_head=5)), ("n_head = 5", "multiple")),
    Case("pickled code", evil_pth, ("evil.pth", "never executed", "state_dict")),
    Case("not a checkpoint", lambda p: p.load(p.text("model.pth", "hello")), ("model.pth", "expected tensors")),
    Case("a bare safetensors file", lambda p: p.load(p.text("model.safetensors", "")), ("model.safetensors", "folder")),
]

RUNS = [
    Case("a run is there", lambda p: p.train("--out", p.run()), ("already holds a run", "--resume", "--overwrite")),
    Case(
        "a run without its config is there",
        lambda p: p.train("--out", removed(p, "config.yaml", "train")[-1]),
        ("already holds a run", "--overwrite"),
    ),
    Case("overwrite with bad data", lambda p: p.train("--overwrite", "--out", p.run(), data="no.json"), ("not found",)),
    Case(
        "overwrite with no tracker",
        lambda p: (p.run(), p.train("--track", "tensorbord", "--overwrite"))[1],
        ("--track tensorbord", "did you mean tensorboard"),
    ),
    Case(
        "resume where no run is",
        lambda p: (p.run(), p.train("--resume", "--out", p.tmp / "outt"))[1],
        ("got --resume, and there is no run in", "/out?)"),
    ),
    Case("resume at another rate", lambda p: p.resume("--lr", "0.5"), ("lr: 5e-05 then, 0.5 now", "--out")),
    Case("resume with another file", lambda p: p.resume("--data", "sample"), ("sample is not what", "--overwrite")),
    Case("resume to fewer steps", lambda p: p.resume("--steps", "1"), ("has 2 steps behind it", "--steps")),
    Case("a warm-up that never ends", lambda p: p.train("--warmup", "1000"), ("--warmup 1000", "more steps")),
    Case(
        "patience without the best",
        lambda p: p.train("--patience", "2", "--eval_every", "0"),
        ("--patience 2", "--eval_every"),
    ),
    Case(
        "pack_tokens of no pack", lambda p: p.train("--pack_tokens", "9", "--batching", "padded"), ("--pack_tokens 9",)
    ),
    Case("resume with a changed file", other_content, ("its records or their order have changed", "--overwrite")),
    Case(
        "resume, config of another kind", lambda p: (p.run(), p.configure(lr="fast"))[0] and p.resume(), ("--lr fast",)
    ),
    Case("checkpoint without DONE", lambda p: p.damaged("DONE", Path.unlink), ("no whole checkpoint", "step-2")),
    Case("checkpoint with DONE cut", lambda p: p.damaged("DONE", cut), ("no whole checkpoint", "--overwrite")),
    Case("checkpoint with DONE null", lambda p: p.damaged("DONE", lambda f: f.write_text("null")), ("no whole",)),
    Case("checkpoint with DONE empty", lambda p: p.damaged("DONE", lambda f: f.write_text("{}")), ("no whole",)),
    Case("checkpoint cut", lambda p: p.damaged("model.safetensors", cut), ("no whole checkpoint", "torn")),
    Case("checkpoint with a flipped bit", lambda p: p.damaged("optimizer.safetensors", flip), ("no whole checkpoint",)),
    Case("checkpoint with a file missing", lambda p: p.damaged("rng.safetensors", Path.unlink), ("no whole",)),
    Case("no run folder", lambda _: ["generate", "--run", "nowhere"], ("nowhere", "not found", "--run")),
    Case("no run folder for a report", lambda _: ["report", "--run", "nowhere"], ("nowhere", "fastft train")),
    Case("a run without a model", lambda p: removed(p, "model", "generate"), ("no model", "fastft train --resume")),
    Case(
        "a model without weights", lambda p: removed(p, "model/model.safetensors", "generate"), ("model.safetensors",)
    ),
    Case("a run without a config", lambda p: removed(p, "config.yaml", "generate"), ("config.yaml", "--run")),
    Case(
        "a run whose config is not UTF-8",
        lambda p: (p.run(), p.bytes("out/config.yaml", b"\xff\xfe"))[0] and p.on_run("generate"),
        ("config.yaml", "not a run's configuration"),
    ),
    Case(
        "a run with an unknown template",
        lambda p: (p.run(), p.configure(template="vikuna"))[0] and p.on_run("generate"),
        ("config.yaml", "vikuna", "did you mean vicuna"),
    ),
    Case(
        "a run whose data has gone",
        lambda p: (p.run(), p.configure(data="gone.json"))[0] and p.on_run("generate"),
        ("gone.json", "not found"),
    ),
    Case(
        "test prompts that fill the context",
        lambda p: (p.other_data(long_prompts(300)), p.on_run("generate", "--too_long", "raise"))[1],
        ("3 records", "context of 256", "rows 26", "--too_long leave_out"),
    ),
    Case(
        "no test record",
        lambda p: (p.other_data(made_records(2)), p.on_run("generate"))[1],
        ("test split", "too small"),
    ),
    Case(
        "other data than it was trained on",
        lambda p: (p.run(), p.configure(data=str(p.json(made_records()[::-1]))), p.on_run("generate"))[2],
        ("is not what", "was trained on", "train again"),
    ),
    Case("generate nothing", lambda p: p.on_run("generate", "--limit", "0"), ("--limit 0", "at least 1")),
    Case("responses not JSON: generate", lambda p: responses(p, "[{", "generate"), ("responses.json", "not JSON")),
    Case("responses an object: generate", lambda p: responses(p, "{}", "generate"), ("responses.json", "list")),
    Case("no responses to score", lambda p: p.on_run("score"), ("responses.json", "fastft generate")),
    Case("responses not JSON: score", lambda p: responses(p, "[{", "score"), ("responses.json", "not JSON")),
    Case("responses without the response", lambda p: responses(p, "[{}]", "score"), ("row 1", "fastft generate")),
    Case(
        "responses with choices that are none",
        lambda p: responses(p, json.dumps([answered("a", choices="abc")]), "score"),
        ("responses.json row 1", "`choices` is text"),
    ),
]

COMPARE = [
    Case("no runs", lambda _: ["compare"], ("required", "RUN_A, RUN_B", "--help")),
    Case("one run", lambda p: ["compare", str(p.run())], ("required", "RUN_B")),
    Case("three runs", lambda p: comparing(p, "third"), ("unrecognized", "third")),
    Case("a run that is not there", lambda p: ["compare", str(p.run()), "nowhere"], ("no such run", "nowhere")),
    Case("a run without responses", lambda p: ["compare", str(p.run()), str(p.out)], ("no responses", "generate")),
    Case(
        "responses not JSON",
        lambda p: (comparing(p), p.text("b/responses.json", "[{"))[0],
        ("b/responses.json", "not JSON"),
    ),
    Case(
        "other entries",
        lambda p: (comparing(p), p.json([answered("x"), answered("c")], "b/responses.json"))[0],
        ("other test entries", "1 of 2", "row 1", "--data"),
    ),
    Case(
        "scores that are none",
        lambda p: (comparing(p), p.text("a/scores.json", "[]"))[0],
        ("a/scores.json", "fastft score", "move it away"),
    ),
    Case("scores not JSON", lambda p: (comparing(p), p.text("a/scores.json", "["))[0], ("a/scores.json", "not JSON")),
    Case(
        "an earlier comparison that is none",
        lambda p: (comparing(p), p.text("a/compare-b.json", "{}"))[0],
        ("a/compare-b.json", "fastft compare", "--out"),
    ),
    Case("no value for a flag", lambda p: comparing(p, "--pairwise=maybe"), ("--pairwise maybe", "true or false")),
    Case("a required judge for nothing", lambda p: comparing(p, "--require_judge"), ("--require_judge", "--pairwise")),
    Case(
        "no address of a judge",
        lambda p: comparing(p, "--pairwise", "--judge_url", "here"),
        ("--judge_url", "here", "expected"),
    ),
    Case("room for nothing", lambda p: comparing(p, "--judge_tokens", "9000"), ("--judge_tokens", "--pairwise")),
    Case(
        "openai without an address",
        lambda p: comparing(p, "--pairwise", "--judge", "openai"),
        ("--judge openai", "--judge_url"),
    ),
    Case(
        "no such folder for the figures",
        lambda p: comparing(p, "--out", p.tmp / "nowhere" / "x.json"),
        ("cannot write", "nowhere/x.json"),
    ),
]


def scoring(place: Place, *options: object) -> list[str]:
    """`fastft score` on three responses."""
    place.json(
        [{"instruction": "a", "output": "b", "model_response": f"c{row}"} for row in range(3)], "out/responses.json"
    )
    return scoring_what_is_there(place, *options)


def scoring_what_is_there(place: Place, *options: object) -> list[str]:
    return ["score", "--run", str(place.out), *map(str, options)]


JUDGE = [
    Case("address is none", lambda p: scoring(p, "--judge_url", "here"), ("--judge_url", "here", "expected http://")),
    Case("unknown judge", lambda p: scoring(p, "--judge", "gpt"), ("--judge gpt", "ollama, openai or none")),
    Case("no model's name", lambda p: scoring(p, "--judge_model", " "), ("--judge_model", "expected the name")),
    Case("unknown style", lambda p: scoring(p, "--judge_style", "kind"), ("--judge_style kind", "book or reason")),
    Case("openai without an address", lambda p: scoring(p, "--judge", "openai"), ("--judge openai", "--judge_url")),
    Case(
        "openai's address is none",
        lambda p: scoring(p, "--judge", "openai", "--judge_url", "localhost:8000"),
        ("localhost:8000", "http://localhost:8000/v1"),
    ),
    Case(
        "no such variable",
        lambda p: scoring(p, "--judge", "openai", "--judge_url", "http://localhost:8000", "--judge_key_env", "NO_KEY"),
        ("--judge_key_env", "NO_KEY is not set", "export"),
    ),
    Case("no question at a time", lambda p: scoring(p, "--judge_parallel", 0), ("--judge_parallel 0", "at least 1")),
    Case("fewer than no retries", lambda p: scoring(p, "--judge_retries", -1), ("--judge_retries -1", "at least 0")),
    Case("no time", lambda p: scoring(p, "--judge_timeout", 0), ("--judge_timeout 0", "seconds above 0")),
    Case("no rubric", lambda p: scoring(p, "--judge_rubric", "gone.txt"), ("--judge_rubric", "gone.txt", "No such")),
    Case(
        "pull for another",
        lambda p: scoring(p, "--judge", "openai", "--judge_url", "http://localhost:8000", "--pull"),
        ("--pull", "no effect", "it needs --judge ollama"),
    ),
    Case("none, pull", lambda p: scoring(p, "--judge", "none", "--pull"), ("--pull", "other than none", "leave it")),
    Case(
        "none, with a model",
        lambda p: scoring(p, "--judge", "none", "--judge_model", "phi3"),
        ("--judge_model phi3", "no effect", "a --judge other than none, which asks nobody", "leave it out"),
    ),
    Case(
        "none, with a style",
        lambda p: scoring(p, "--judge", "none", "--judge_style", "reason"),
        ("--judge_style reason", "no effect", "other than none"),
    ),
    Case("a key for Ollama", lambda p: scoring(p, "--judge_key_env", "KEY"), ("--judge_key_env", "--judge openai")),
    Case("too little room", lambda p: scoring(p, "--judge_tokens", 100), ("--judge_tokens 100", "more than the 512")),
    Case(
        "none, required", lambda p: scoring(p, "--judge", "none", "--require_judge"), ("--require_judge", "other than")
    ),
    Case(
        "a pause before no retry",
        lambda p: scoring(p, "--judge_retries", 0, "--judge_pause", 2),
        ("--judge_pause 2", "no effect", "--judge_retries of at least 1"),
    ),
    Case(
        "a silence longer than all",
        lambda p: scoring(p, "--judge_timeout", 900),
        ("--judge_timeout 900", "no effect", "--judge_total_timeout"),
    ),
    Case(
        "responses of no run, with data",
        lambda p: scoring(p, "--data", p.json(made_records())),
        ("cannot read", "config.yaml", "--run takes the folder that train wrote"),
    ),
    Case(
        "data of another run",
        lambda p: (p.run(), scoring(p, "--data", p.json(made_records(31))))[1],
        ("data.json is not what", "was trained on"),
    ),
    Case(
        "responses to other records",
        lambda p: (p.run(), scoring(p, "--data", p.out.parent / "run-data.json"))[1],
        ("responses.json row 1", "no record of the test split", "fastft generate"),
    ),
    Case(
        "nothing was answered",
        lambda p: (
            scoring(p),
            p.json(
                [{"instruction": "a", "output": "b", "model_response": "", "left_out": "why"}], "out/responses.json"
            ),
            scoring_what_is_there(p),
        )[-1],
        ("left out all 1 entries", "since why"),
    ),
    Case(
        "a folder for its answers",
        lambda p: (p.text("out/judge-replies.jsonl/inside", ""), scoring(p))[1],
        ("cannot read the judge's answers", "judge-replies.jsonl"),
    ),
    Case(
        "other scores in the way",
        lambda p: (p.json({"mine": 1}, "out/scores.json"), scoring(p))[1],
        ("scores.json", "move it away"),
    ),
]

UNWRITABLE = [
    Case("a folder below a file", lambda p: p.train("--out", p.text("file", "") / "run"), ("cannot create", "--out")),
    Case("a file for the folder", lambda p: p.train("--out", p.text("file", "")), ("is no folder", "--out")),
    Case("a name that is too long", lambda p: p.train("--out", p.tmp / ("x" * 300)), ("xxx", "too long", "check")),
    Case(
        "a folder for the metrics",
        lambda p: folder_for_file(p, "metrics.jsonl", lambda: p.resume("--steps", "4")),
        ("cannot write", "metrics.jsonl"),
        may_change=("out/config.yaml", "out/data.json"),
    ),
    Case(
        "a folder for the responses",
        lambda p: folder_for_file(p, "responses.json", lambda: p.on_run("generate", *GENERATE)),
        ("cannot write", "responses.json"),
    ),
    Case(
        "a folder for the report",
        lambda p: folder_for_file(p, "report.html", lambda: p.on_run("report")),
        ("cannot write", "report.html"),
    ),
]

PAGES = [
    Case("rate no runs", lambda _: ["ab"], ("no run", "fastft ab RUN_A RUN_B", "--import")),
    Case("rate one run", lambda p: ["ab", str(p.tmp)], ("one run", "RUN_A RUN_B")),
    Case("rate three runs", lambda p: ab(p, "third"), ("third", "--help")),
    Case("rate a run that is not there", lambda p: [*ab(p)[:2], "nowhere"], ("nowhere", "not a folder")),
    Case("rate a run twice", lambda p: ["ab", *ab(p)[1:2] * 2], ("twice", "expected two runs")),
    Case(
        "rate without responses",
        lambda p: [*ab(p)[:2], str(p.run())],
        ("responses.json", "fastft generate"),
    ),
    Case("rate other questions", lambda p: ab(p, second=entries("bob", 30)[20:]), ("other test entries", "10 of 10")),
    Case("rate fewer questions", lambda p: ab(p, second=entries("bob")[:-1]), ("1 of 10", "row 10")),
    Case("rate the same answers", lambda p: ab(p, second=entries("ada")), ("nothing to compare", "same 10 answers")),
    Case("rate nothing", lambda p: ab(p, "--limit", "0"), ("--limit 0", "at least 1")),
    Case("import nothing", lambda _: ["ab", "--import"], ("--import", "at least one")),
    Case("import what is not there", lambda _: ["ab", "--import", "nowhere.json"], ("ratings", "nowhere.json")),
    Case("import broken JSON", lambda p: ["ab", "--import", str(exported(p.tmp, "[{"))], ("not JSON", "ratings.json")),
    Case("import something else", lambda p: ["ab", "--import", str(exported(p.tmp, {}))], ("no file of ratings",)),
    Case("import no rating", lambda p: ratings(p, ratings=[]), ("holds no rating", "Eve")),
    Case("import ratings without runs", lambda p: ratings(p, runs=["a"]), ("another form", "again")),
    Case("import a scale of 6", lambda p: rating(p, scale_a=6), ("scale_a 6", "1 to 5", "export")),
    Case("import another choice", lambda p: rating(p, choice="c"), ("choice 'c'", "both_bad")),
    Case("import a rating without its time", lambda p: rating(p, seconds=None), ("another form", "export")),
    Case("import a seed that is none", lambda p: ratings(p, seed=[1]), ("seed [1]", "export")),
    Case("import a limit of 0", lambda p: ratings(p, limit=0), ("limit 0", "export")),
    Case("import an endless rating", lambda p: rating(p, seconds=float("inf")), ("inf seconds", "export")),
    Case("import an unknown question", lambda p: rating(p, item=1), ("question 1", "not on its page")),
    Case(
        "import a question rated twice",
        lambda p: rating(p, item=rated(made_page(p.tmp), "Eve", says("ada"))["ratings"][1]["item"]),
        ("rated twice", "again"),
    ),
    Case("import of runs that have gone", lambda p: ratings(p, runs=["gone", "away"]), ("gone", "say where they are")),
    Case("import of answers that have changed", rated_before, ("rates other answers", "answered again")),
    Case(
        "import of runs in another order",
        lambda p: ["ab", str(p.tmp / "bob"), str(p.tmp / "ada"), *ratings(p)[1:]],
        ("rates other answers", "another order"),
    ),
    Case(
        "import of two pages",
        lambda p: [*ratings(p), str(exported(p.tmp, rated(made_page(p.tmp, seed=5), "Max", says("ada")), "2.json"))],
        ("two pages", "2.json"),
    ),
    Case("import of one rater twice", lambda p: (argv := ratings(p)) + argv[-1:], ("both by Eve", "leave one out")),
    Case("report against nothing", lambda p: p.on_run("report", "--against"), ("--against", "at least one")),
    Case("report against no run", lambda p: p.on_run("report", "--against", "nowhere"), ("nowhere", "fastft train")),
    Case(
        "report with another ab.json",
        lambda p: (p.run(), p.text("out/ab.json", '{"n_items": 3}'), p.on_run("report"))[2],
        ("ab.json", "not a file that fastft ab wrote", "import"),
    ),
    Case("report against itself", lambda p: p.on_run("report", "--against", p.out), ("twice", "--against")),
]

CASES = {
    f"{group}: {case.name}": case
    for group, cases in {
        "records": RECORDS,
        "splits": SPLITS,
        "options": OPTIONS,
        "ranks": RANKS,
        "weights": WEIGHTS,
        "runs": RUNS,
        "compare": COMPARE,
        "judge": JUDGE,
        "unwritable": UNWRITABLE,
        "pages": PAGES,
    }.items()
    for case in cases
}

IN_A_PROCESS = (
    "records: lone surrogate",
    "weights: truncated safetensors",
    "unwritable: a folder below a file",
)
"""Tried as `python -m fastft` too: what a traceback would look like depends on the interpreter's own exit."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two steps with one checkpoint and a model."""
    tmp = tmp_path_factory.mktemp("trained")
    data = tmp / "data.json"
    data.write_text(json.dumps(made_records()))
    options = ("--model", "pico", "--steps", "2", "--batch_size", "2", "--keep_best", "false", "--dtype", "fp32")
    assert main(["train", "--data", str(data), *options, "--out", str(tmp / "run")]) == 0
    yield tmp / "run"
    shutil.rmtree(tmp)


@pytest.fixture
def place(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A folder for a case, removed afterwards: runs are large."""
    monkeypatch.chdir(tmp_path)
    yield Place(tmp_path, trained, monkeypatch)
    shutil.rmtree(tmp_path)


def snapshot(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK_FILE
    }


def check_line(stderr: str, words: tuple[str, ...]) -> None:
    """One error line, the last one, with all the words."""
    said = [line for line in stderr.splitlines() if line.strip()]
    assert "Traceback" not in stderr
    assert [line for line in said if line.startswith("error:")] == said[-1:]
    assert [word for word in words if word not in said[-1]] == [], said[-1]


@contextlib.contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """No file can grow beyond `largest` bytes: writing fails with an OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_with_status_2_and_changes_nothing(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    argv = case.prepare(place)
    before = snapshot(place.tmp)
    capsys.readouterr()
    assert main(argv) == 2
    check_line(capsys.readouterr().err, case.words)
    after = snapshot(place.tmp)
    assert {**after, **{name: before[name] for name in case.may_change}} == before


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_bad_input_to_a_process_of_its_own(name: str, place: Place) -> None:
    argv = CASES[name].prepare(place)
    done = subprocess.run([sys.executable, "-m", "fastft", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    check_line(done.stderr, CASES[name].words)


@pytest.mark.parametrize("section", [{"elasticity": {"enabled": False}}, {"flops_profiler": True}])
def test_what_deepspeed_refuses_is_one_line(section: dict[str, Any], place: Place) -> None:
    """Of whatever class its error is. In a fork: it leaves a process group of one."""
    argv = deepspeed(place, json.dumps({"zero_optimization": {"stage": 1}, **section}))
    before = snapshot(place.tmp)
    ended = in_fork(lambda: main(argv))
    assert ended.gave == 2
    check_line(ended.said, ("DeepSpeed refuses", "zero.json"))
    assert snapshot(place.tmp) == before


@pytest.mark.parametrize("what", ["data", "dtype", "tokenizer"])
def test_ranks_that_would_not_train_the_same_are_refused(what: str, place: Place) -> None:
    """A file that is not the same on all machines; hardware that `--dtype auto` takes something else on."""
    port = free_port()
    files = [place.json(made_records()[:: 1 - 2 * rank], f"data/{rank}.json") for rank in range(2)]

    def of(rank: int) -> Callable[[], object]:
        def run() -> object:
            os.environ.update(variables(rank, 2, port))
            choose.choose_dtype = lambda *_: "bf16" if what == "dtype" and rank else "fp32"
            if what == "tokenizer" and rank:  # one that gives the same ids to the data's texts
                GPT2Tokenizer.fingerprint = lambda _: "another"
            return main(place.train("--device", "cpu", data=files[rank if what == "data" else 0]))

        return run

    first, second = in_forks(of(0), of(1))
    assert (first.gave, second.gave) == (2, 2), (first, second)
    words = {
        "data": ("other examples on rank 1", "--data"),
        "dtype": ("--dtype auto", "rank 1"),
        "tokenizer": ("another tokenizer on rank 1", "--weights"),
    }
    check_line(first.said, words[what])
    assert "error:" not in second.said  # one says it for all
    assert not place.out.exists()


def metrics_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Loss of each step in the metrics; a torn last line is passed over, as every reader does."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if "loss" in value:
                found[value["step"]] = value["loss"]
    return found


@dataclass(frozen=True)
class FullDisk:
    """A resumed run on a disk that is full for files beyond a size."""

    name: str
    largest: Callable[[Path], int]
    words: tuple[str, ...]


FULL_DISKS = [
    FullDisk("the configuration", lambda _: 100, ("cannot write", "config.yaml", "free space")),
    FullDisk(
        "a line of the metrics",
        lambda run: (run / "metrics.jsonl").stat().st_size + 50,
        ("cannot write", "metrics.jsonl", "--resume"),
    ),
    FullDisk("a checkpoint's weights", lambda _: 1_000_000, ("cannot write", "model.safetensors", "free space")),
    FullDisk("a checkpoint's moments", lambda _: 10_000_000, ("cannot write", "optimizer.safetensors", "free space")),
]


@pytest.mark.parametrize("case", FULL_DISKS, ids=lambda case: case.name)
def test_a_full_disk_while_training_loses_nothing(
    case: FullDisk, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place.run()
    assert main(place.resume("--steps", "12")) == 0  # so many that the metrics are the largest of the small files
    before, lines = snapshot(run), metrics_lines(run)
    with full_disk(case.largest(run)):
        status = main(place.resume("--steps", "14", "--save_every", "1"))
    check_line(capsys.readouterr().err, case.words)
    assert status == 2
    after = snapshot(run)
    untouched = {name for name in before if name.startswith(("checkpoints/", "model/"))}
    assert {name for name in after if name.startswith(("checkpoints/", "model/"))} == untouched
    assert {name: after[name] for name in untouched} == {name: before[name] for name in untouched}
    assert (run / "metrics.jsonl").read_text().startswith("".join(json.dumps(line) + "\n" for line in lines))

    assert main(place.resume("--steps", "14")) == 0
    never_interrupted = place.tmp / "whole"
    data = place.tmp / "run-data.json"
    options = ("--steps", "14", "--keep_best", "false", "--dtype", "fp32", "--out", never_interrupted)
    assert main(place.train(*options, data=data)) == 0
    assert losses(run) == losses(never_interrupted)
    assert (run / "model/model.safetensors").read_bytes() == (
        never_interrupted / "model/model.safetensors"
    ).read_bytes()


def test_a_full_disk_at_the_export_keeps_the_checkpoint(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.run()
    weights = (run / "model/model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    with full_disk(1_000_000):
        assert main(place.resume()) == 2
    check_line(capsys.readouterr().err, ("cannot write", "model.safetensors", "free space"))
    assert main(place.resume()) == 0
    assert (run / "model/model.safetensors").read_bytes() == weights


def test_a_full_disk_while_answering_keeps_the_answers(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    argv = place.on_run("generate", *GENERATE)
    assert main([*argv, "--limit", "1"]) == 0
    made, journal = place.out / "responses.json", place.out / "responses.journal.jsonl"
    first = made.read_bytes()
    with full_disk(journal.stat().st_size + 20):  # larger than responses.json
        assert main(argv) == 2
    check_line(capsys.readouterr().err, ("cannot write", "responses.journal.jsonl", "free space"))
    assert made.read_bytes() == first
    assert main(argv) == 0
    assert "1 of 3 responses are there already" in capsys.readouterr().err
    assert json.loads(made.read_text())[:1] == json.loads(first)


def test_responses_of_other_options_are_never_taken_up(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a call with the other options failed before its first answer could be written."""
    assert main(place.on_run("generate", *GENERATE)) == 0
    made = place.out / "responses.json"
    old = made.read_bytes()
    longer = place.on_run("generate", "--max_new_tokens", "60", "--batch_size", "1", "--overwrite")
    with full_disk((place.out / "responses.made-from.json").stat().st_size + 1):  # that file still fits
        assert main(longer) == 2
    assert made.read_bytes() == old
    capsys.readouterr()
    assert main(longer) == 0
    assert "are there already" not in capsys.readouterr().err
    old_texts = [entry["model_response"] for entry in json.loads(old)]
    new_texts = [entry["model_response"] for entry in json.loads(made.read_text())]
    assert all(len(new) > len(old) for new, old in zip(new_texts, old_texts, strict=True))


def test_a_limit_takes_no_answers_away(place: Place) -> None:
    argv = place.on_run("generate", *GENERATE)
    assert main(argv) == 0
    before = snapshot(place.out)
    assert main([*argv, "--limit", "1"]) == 0
    assert snapshot(place.out) == before


@pytest.mark.parametrize(("command", "name"), [("score", "scores.json"), ("report", "report.html")])
def test_a_full_disk_while_scoring_or_reporting(
    command: str, name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(place.on_run("generate", *GENERATE)) == 0
    before = snapshot(place.out)
    capsys.readouterr()
    with full_disk(100):
        assert main(place.on_run(command, *(["--judge", "none"] if command == "score" else []))) == 2
    check_line(capsys.readouterr().err, ("cannot write", name, "free space"))
    assert snapshot(place.out) == before


def test_a_pairwise_judge_that_is_required_and_not_there(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    argv = comparing(place, "--pairwise", "--require_judge", "--judge_url", "http://127.0.0.1:9")
    place.json([answered("a"), answered("c", model_response="other")], "b/responses.json")
    assert main(argv) == 3
    check_line(capsys.readouterr().err, ("ollama serve", "--judge_url"))
    assert json.loads((place.tmp / "a/compare-b.json").read_text())["metrics"]["exact_match"]["a"] == 0


@dataclass(frozen=True)
class NoJudge:
    """A judge that cannot be used."""

    name: str
    prepare: Callable[[OllamaStub], object]
    options: tuple[str, ...]
    words: tuple[str, ...]


def is_no_ollama(stub: OllamaStub) -> None:
    stub.get_override = body(b"<html>It works!</html>")


def refuses_key(stub: OllamaStub) -> None:
    stub.get_override = status(401, "no")


def is_old(stub: OllamaStub) -> None:
    stub.version = "0.4.7"


def cannot_load(stub: OllamaStub) -> None:
    stub.warm_up = status(500, "model requires more system memory (5.6 GiB) than is available (2.0 GiB)")


def pull_fails(stub: OllamaStub) -> None:
    stub.models = {}
    stub.pull = pull_lines({"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"})


def only_thinks(stub: OllamaStub) -> None:
    stub.route = lambda _: judge_thinks("maybe 20")


def only_rambles(stub: OllamaStub) -> None:
    stub.route = lambda _: judge_says("no idea")


def nothing(_: OllamaStub) -> None:
    pass


OPENAI = ("--judge", "openai")
NO_JUDGE = [
    NoJudge("no server", OllamaStub.close, (), ("no Ollama server", "Connection refused", "`ollama serve`")),
    NoJudge("another server", is_no_ollama, (), ("does not answer as an Ollama server", "--judge_url")),
    NoJudge("no such model", nothing, ("--judge_model", "phi3"), ("no model phi3", "`ollama pull phi3`", "--pull")),
    NoJudge("no pull", pull_fails, ("--pull",), ("could not pull llama3", "file does not exist", "check the name")),
    NoJudge("too large a model", cannot_load, (), ("llama3", "cannot be loaded", "more system memory")),
    NoJudge("no schemas", is_old, ("--judge_style", "reason"), ("no JSON schema", "0.4.7", "--judge_style book")),
    NoJudge("a refused schema", nothing, ("--judge_style", "reason"), ("no JSON schema", "invalid format", "book")),
    NoJudge("only failures", nothing, (), ("answered none of 3", "invalid format")),
    NoJudge("all thinking", only_thinks, (), ("no score for any of 3", "took all 4096 tokens", "--judge_tokens")),
    NoJudge("no score at all", only_rambles, (), ("no score for any of 3", "no idea", "--judge_model")),
    NoJudge("openai: no server", OllamaStub.close, OPENAI, ("no OpenAI-compatible server", "--judge_url")),
    NoJudge("openai: no such model", nothing, (*OPENAI, "--judge_model", "phi3"), ("no model phi3", "llama3:latest")),
    NoJudge("openai: a wrong key", refuses_key, OPENAI, ("refuses the API key", "OPENAI_API_KEY", "--judge_key_env")),
]


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("case", NO_JUDGE, ids=lambda case: case.name)
def test_no_usable_judge_is_one_line_and_status_3_where_one_is_required(
    case: NoJudge, required: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path, tmp_path, pytest.MonkeyPatch())
    with OllamaStub(status(500, "invalid format")) as stub:
        case.prepare(stub)
        argv = scoring(place, "--judge_url", stub.url, "--judge_retries", 0, *case.options)
        exit_status = main([*argv, "--require_judge"] if required else argv)
    stderr = capsys.readouterr().err
    if required:
        check_line(stderr, case.words)
    else:
        said = [line for line in stderr.splitlines() if line.startswith("no judge, everything else is kept: ")]
        assert len(said) == 1
        assert [word for word in case.words if word not in said[0]] == []
    assert exit_status == (EXIT_NO_JUDGE if required else 0)
    scores = json.loads((place.out / "scores.json").read_text())
    assert [judgement["score"] for judgement in scores["judgements"]] == [None] * 3
    assert all(judgement["reason"] for judgement in scores["judgements"])
    assert scores["summary"]["rouge_l"] == 0


def test_a_full_disk_while_judging_keeps_the_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path, tmp_path, pytest.MonkeyPatch())
    with OllamaStub(judge_says("80")) as stub:
        argv = scoring(place, "--judge_url", stub.url)
        assert main(["score", "--run", str(place.out), "--judge", "none"]) == 0  # a scores.json that fits
        largest = (place.out / "scores.json").stat().st_size + 600
        place.text("out/judge-replies.jsonl", "\n" * (largest - 600))  # room for two answers, not for three
        capsys.readouterr()
        with full_disk(largest):
            assert main(argv) == 2
        check_line(capsys.readouterr().err, ("cannot write", "free space"))
        kept = [
            line
            for line in (place.out / "judge-replies.jsonl").read_text().splitlines()
            if '"80"' in line and line.endswith("}")
        ]
        asked = len(stub.asked)
        assert main(argv) == 0
        assert len(kept) > 0
        assert len(stub.asked) == asked + 3 - len(kept)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_behind_standard_output(tmp_path: Path) -> None:
    """It shows only when what was printed leaves the buffer."""
    command = [sys.executable, "-m", "fastft", "--version"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path, env=buffered, text=True, check=False
        )
    assert done.returncode == 2
    check_line(done.stderr, ("No space left", "free space"))


def test_half_of_a_surrogate_pair_in_a_further_key_is_written_back(place: Place) -> None:
    place.other_data([{**record, "id": "\ud800"} for record in made_records()])
    assert main(place.on_run("generate", *GENERATE)) == 0
    assert [entry["id"] for entry in json.loads((place.out / "responses.json").read_text())] == ["\ud800"] * 3


def test_a_second_fault_does_not_hide_the_first(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Every malformed record is named, up to ten, with the count of the rest."""
    assert main(place.train(data=place.json([*made_records(), *[{}] * 12]))) == 2
    check_line(capsys.readouterr().err, ("12 of 42", "row 31", "row 40", "and 2 more", "--skip_bad_records"))


def test_the_table_is_as_long_as_promised() -> None:
    assert len(CASES) + len(FULL_DISKS) >= 40
    assert set(IN_A_PROCESS) <= set(CASES)
