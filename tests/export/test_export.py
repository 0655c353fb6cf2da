"""`fastft export`: every format read back by what it is for."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from exported import CONVERSATION, made_run

from fastft.batches.batch import from_padded
from fastft.cli import main
from fastft.common.errors import UserError
from fastft.data.encode import prompts_of
from fastft.data.folder_tokenizer import with_special_tokens
from fastft.data.prompts import TEMPLATES
from fastft.data.records import Record, Turn
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.decoding.decode import decode
from fastft.export import export as export_module
from fastft.export.export import ExportOptions, export
from fastft.export.prompt_ids import warn_of_other_ids
from fastft.model.gpt2 import GPT2
from fastft.model.weights import load
from fastft.run.folder import Run

IDS = torch.arange(100, 164).view(2, 32)


def logits(model: GPT2) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(from_padded(IDS, torch.full_like(IDS, -100))).view(2, 32, -1)


def exported(run: Run, to: str, **options: Any) -> Path:
    return Path(export(ExportOptions(run=run.folder, to=to, **options))[0])  # type: ignore[arg-type] # a word that a test parametrises


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made_run(tmp_path_factory.mktemp("runs") / "chatml")


@pytest.mark.parametrize(
    ("dtype", "kind", "tie_head"),
    [("fp32", torch.float32, True), ("bf16", torch.bfloat16, False), ("fp16", torch.float16, True)],
)
def test_a_folder_is_exact_in_its_dtype_whole_and_in_shards(
    tmp_path: Path, dtype: str, kind: torch.dtype, tie_head: bool
) -> None:
    run = made_run(tmp_path / "run", tie_head=tie_head)
    own = dict(load(run.model).named_parameters())
    whole, sharded = (
        exported(run, "hf", dtype=dtype, shard_size=size, out=tmp_path / size) for size in ("1GB", "60KB")
    )
    assert (whole / "model.safetensors").is_file()
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert len(shards) > 1
    assert shards[-1] == f"model-{len(shards):05}-of-{len(shards):05}.safetensors"
    total = sum(parameter.numel() for parameter in own.values()) * kind.itemsize
    assert index["metadata"]["total_size"] == total
    assert json.loads((whole / "config.json").read_text())["torch_dtype"] == str(kind).removeprefix("torch.")
    for folder in (whole, sharded):
        read = dict(load(folder).named_parameters())
        assert read.keys() == own.keys()
        for name, parameter in own.items():
            assert torch.equal(read[name], parameter.to(kind).float()), name
    assert kind == torch.float32 or not torch.equal(own["wte.weight"].to(kind).float(), own["wte.weight"])


@pytest.mark.long
def test_transformers_takes_the_folder_and_answers_as_fastft(chatml: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    own = load(chatml.model)
    tokenizer = own.config.tokenizer
    turns = [Turn("system", "Be brief."), *CONVERSATION[1:3]]  # a turn that holds a token's text is read as the token
    records = [Record(instruction="", output="", turns=(*turns[:n], Turn("assistant", "?"))) for n in (1, 3)]
    prompts = prompts_of(records, TEMPLATES["chatml"], tokenizer)
    answers = {answer.index: answer.ids for answer in decode(own, prompts, max_new_tokens=8)}
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        folder = exported(chatml, "hf", dtype=dtype, shard_size="60KB", out=tmp_path / dtype)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        assert {parameter.dtype for parameter in theirs.parameters()} == {kind}
        for name, parameter in theirs.named_parameters():
            stem = name.removeprefix("transformer.")
            mine = dict(own.named_parameters())[stem].detach()
            is_conv = stem.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            assert torch.equal(parameter, (mine.t() if is_conv else mine).to(kind))
        theirs = theirs.float()
        names = transformers.AutoTokenizer.from_pretrained(folder)
        for number, prompt in enumerate(prompts):
            messages = [{"role": turn.role, "content": turn.text} for turn in records[number].turns[:-1]]
            ids = names.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert ids == prompt
            if kind == torch.float32:
                said = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
                assert said[: len(answers[number])] == list(answers[number])
        assert theirs.generation_config.eos_token_id == tokenizer.end_of_text


@pytest.mark.long
@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_gives_the_prompts_of_every_template_our_ids(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for `llama3`, whose prompts end in two line ends; and there it is said."""
    transformers = pytest.importorskip("transformers")
    run = made_run(tmp_path / "run", name, tokenizer=gpt2_tokenizer())
    folder, tokenizer = exported(run, "hf"), load(run.model).config.tokenizer
    names = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [Turn("system", "Be brief."), Turn("user", "Hello  w\u00f6rld 12345"), *CONVERSATION[1:3]]
    differ = []
    for asked in (turns[1:2], turns[:2], turns):
        record = Record(instruction="", output="", turns=(*asked, Turn("assistant", "?")))
        (own,) = prompts_of([record], TEMPLATES[name], tokenizer)
        messages = [{"role": turn.role, "content": turn.text} for turn in asked]
        differ.append(names.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) != own)
    assert differ == [name == "llama3"] * 3
    assert ("encode otherwise than training does" in " ".join(capsys.readouterr().err.split())) == (name == "llama3")


@pytest.mark.parametrize("tie_head", [True, False])
def test_the_books_own_model_takes_the_file(tmp_path: Path, tie_head: bool) -> None:
    run = made_run(tmp_path / "run", tie_head=tie_head)
    own = load(run.model)
    path = exported(run, "book") / "model.pth"
    read = load(path, config=replace(own.config, tie_head=False))
    assert read.config.tokenizer.fingerprint() == own.config.tokenizer.fingerprint()
    assert torch.equal(read.head, own.head)
    assert all(torch.equal(dict(read.named_parameters())[name], one) for name, one in own.named_parameters())
    state = torch.load(path, weights_only=True)
    assert state["out_head.weight"].data_ptr() != state["tok_emb.weight"].data_ptr()
    config = {
        "vocab_size": own.config.vocab_size, "context_length": 256, "emb_dim": 32, "n_heads": 2, "n_layers": 2,
        "drop_rate": 0.0, "qkv_bias": True,
    }  # fmt: skip
    from fastft.integrations.book import GPTModel

    models: list[Any] = [GPTModel(config)]
    if importlib.util.find_spec("llms_from_scratch") is not None:
        from llms_from_scratch.ch04 import GPTModel as TheBooks

        models.append(TheBooks(config))
    for model in models:
        model.load_state_dict(state, strict=True)
        with torch.no_grad():
            assert torch.allclose(model.eval()(IDS), logits(own), atol=2e-4)


def test_ollama_gets_a_modelfile_and_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "my run")
    assert main(["export", "--run", str(run.folder), "--to", "ollama", "--quantize", "q8_0"]) == 0
    folder = run.exported("ollama")
    assert capsys.readouterr().out == f"{folder}\nollama create my-run -f '{folder / 'Modelfile'}'\n"
    lines = (folder / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert lines[1].startswith('TEMPLATE """{{ ')
    assert lines[1].endswith(' }}"""')
    assert lines[2:] == [
        'PARAMETER stop "<|im_end|>"', "PARAMETER num_ctx 256", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1",
    ]  # fmt: skip
    assert (folder / "model.gguf").is_file()
    assert json.loads((folder / "export.json").read_text())["quantize"] == "q8_0"


def test_a_jinja_template_has_its_gguf_and_no_modelfile(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\nA:{% else %}{% generation %}"
        "{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    run = made_run(tmp_path / "run", str(template))
    with pytest.raises(UserError, match=r"got --to ollama and a run with the Jinja template .*--to gguf exports"):
        exported(run, "ollama")
    assert not run.exported("ollama").exists()
    read = gguf.GGUFReader(exported(run, "gguf") / "model.gguf")
    held = read.fields["tokenizer.chat_template"].contents()
    assert "{# #}{{ m.content + eos_token }}{# #}" in held.replace("{#  #}", "{# #}")


def test_a_run_knows_its_exports(chatml: Run) -> None:
    """`train --overwrite` takes them away, and what somebody has put beside them stays."""
    for to in ("hf", "gguf", "ollama", "book"):
        exported(chatml, to, overwrite=True, **({"shard_size": "60KB"} if to == "hf" else {}))
    files = {path for path in (chatml.folder / "export").rglob("*") if path.is_file()}
    assert files - set(chatml.written()) == set()
    assert len(files) > 15
    run = Run(chatml.folder)
    (run.folder / "export" / "hf" / "mine.txt").write_text("mine")
    (run.folder / "export" / ".hf.1.tmp").mkdir()
    (run.folder / "export" / ".hf.1.tmp" / "model.safetensors").write_text("half")
    taken = [path for path in run.written() if "export" in path.relative_to(run.folder).parts]
    assert run.folder / "export" / ".hf.1.tmp" / "model.safetensors" in taken
    assert run.folder / "export" / "hf" / "mine.txt" not in taken


class Hub:
    """What `push` asks of huggingface_hub."""

    asked: list[tuple[str, dict[str, Any]]]
    fails = False

    def create_repo(self, repo_id: str, **given: Any) -> None:
        self.asked.append(("create_repo", {"repo_id": repo_id, **given}))

    def upload_folder(self, **given: Any) -> str:
        if self.fails:
            raise OSError("401: no token\nmore")
        self.asked.append(("upload_folder", given))
        return "https://huggingface.co/me/mine/tree/main"


def test_a_push_sends_the_exports_own_files(
    chatml: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Hub, "asked", [], raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = tmp_path / "out"
    call = ["export", "--run", str(chatml.folder), "--to", "hf", "--out", str(out), "--push", "me/mine"]
    assert main(call) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/me/mine/tree/main"
    (created, first), (sent, second) = Hub.asked
    assert (created, first["repo_id"], first["private"], first["exist_ok"]) == ("create_repo", "me/mine", True, True)
    assert (sent, second["repo_id"], Path(second["folder_path"])) == ("upload_folder", "me/mine", out)
    assert {"model.safetensors", "README.md", "chat_template.jinja"} <= set(second["allow_patterns"])
    assert set(second["allow_patterns"]) == {path.name for path in out.iterdir()} - {"export.json"}
    monkeypatch.setattr(Hub, "fails", True)
    assert main([*call, "--overwrite"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"the export is in {out}, but it could not be pushed to me/mine (OSError: 401: no token)" in said
    assert main([*call[:-1], "mine"]) == 2
    assert "got --push mine, expected OWNER/NAME" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shard_size": "five"}, "got --shard_size five, expected a size such as 500MB, 5GB or 2GiB"),
        ({"shard_size": "0GB"}, "got --shard_size 0GB"),
        ({"out": Path()}, "got an empty --out"),
        ({"to": "onnx"}, "got --to onnx, expected hf, peft, gguf, gguf-adapter, ollama or book"),
    ],
)
def test_values_that_mean_nothing(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ExportOptions(**{"run": Path("run"), "to": "hf", **given})


def test_a_template_whose_ids_others_do_not_make_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("alpaca", "chatml", "llama3"):
        template = TEMPLATES[name]
        tokenizer = with_special_tokens(gpt2_tokenizer(), template.special_tokens, template.end)
        warn_of_other_ids(template, tokenizer)
        assert bool(capsys.readouterr().err) == (name == "llama3"), name


def test_weights_that_are_replaced_meanwhile_are_not_exported_as_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run(tmp_path / "run")

    def replaced(*given: Any) -> Any:
        made = write(*given)
        other = tmp_path / "other"
        other.write_bytes(run.weights.read_bytes())
        other.replace(run.weights)
        return made

    write = export_module._write
    monkeypatch.setattr(export_module, "_write", replaced)
    with pytest.raises(UserError, match="was replaced while it was exported"):
        exported(run, "book")
    assert not run.exported("book").exists()
    monkeypatch.setattr(export_module, "_write", write)
    assert (exported(run, "book") / "model.pth").is_file()


def test_sizes() -> None:
    sizes = {"500MB": 500_000_000, "5GB": 5 * 10**9, "2GiB": 2 << 30, "1.5 kb": 1500}
    for text, expected in sizes.items():
        assert ExportOptions(run=Path("r"), to="hf", shard_size=text).shard_bytes == expected


def test_what_cannot_be_exported_is_one_line(
    chatml: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run", "alpaca")
    calls = {
        ("--run", str(tmp_path / "none"), "--to", "hf"): "run folder not found",
        ("--run", str(run.folder), "--to", "ollama", "--name", "a b"): "got --name a b, expected a name as Ollama",
        ("--run", str(run.folder), "--to", "hf", "--out", str(run.model)): "a place of the run's own",
        ("--run", str(run.folder), "--to", "hf", "--out", str(tmp_path)): "holds files, and no export has written",
        ("--run", str(run.folder)): "--to",
    }
    for call, said in calls.items():
        assert main(["export", *call]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    monkeypatch.setitem(sys.modules, "gguf", None)
    for to in ("gguf", "ollama"):
        assert main(["export", "--run", str(run.folder), "--to", to]) == 2
        assert "pip install 'fastft[gguf]'" in " ".join(capsys.readouterr().err.split())
    run.weights.unlink()
    assert main(["export", "--run", str(run.folder), "--to", "book"]) == 2
    assert "no model in" in " ".join(capsys.readouterr().err.split())
    assert not (run.folder / "export").exists()


@pytest.mark.parametrize("place", ["tokenizer", "model/hf", "responses.json", "export/mine"])
def test_an_export_takes_no_place_of_the_runs(chatml: Run, place: str) -> None:
    """A tokenizer that is exported there would be read as the run's."""
    if place.startswith("export"):
        assert exported(chatml, "book", out=chatml.folder / place).is_dir()
        return
    with pytest.raises(UserError, match="a place of the run's own"):
        exported(chatml, "book", out=chatml.folder / place)
