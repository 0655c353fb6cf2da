"""A run that trained adapters: asked, and exported merged or by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import made_adapter_run, made_run
from safetensors.torch import load_file

from fastft.answers.generation import generate
from fastft.answers.options import GenerateOptions
from fastft.cli import main
from fastft.common.errors import UserError
from fastft.export.export import ExportOptions, export
from fastft.model.weights import load, save_hf
from fastft.run.folder import Run
from fastft.run.trained import trained_model
from tests.export.test_export import IDS, logits

gguf = pytest.importorskip("gguf", reason="pip install gguf")


def exported(run: Run, to: str, **options: Any) -> Path:
    return Path(export(ExportOptions(run=run.folder, to=to, **options))[0])  # type: ignore[arg-type] # a word that a test parametrises


def test_the_merged_export_is_exact(tmp_path: Path) -> None:
    """In float64, rounded once: computed here from the files alone."""
    run = made_adapter_run(tmp_path / "run", "chatml", rslora=True)
    whole = load_file(exported(run, "hf") / "model.safetensors")
    base, adapter = load_file(tmp_path / "base" / "model.safetensors"), load_file(run.weights)
    before = "base_model.model."
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"):
        A, B = (adapter[f"{before}{name}.lora_{part}.weight"].double() for part in "AB")
        merged = (base[f"{name}.weight"].double() + 4 / 3**0.5 * (B @ A).t()).float()
        torch.testing.assert_close(whole[f"{name}.weight"], merged, rtol=0, atol=0)
        assert not torch.equal(merged, base[f"{name}.weight"])
    rows = adapter[f"{before}transformer.wte.token_adapter.trainable_tokens_delta"]
    known = len(base["transformer.wte.weight"])
    torch.testing.assert_close(whole["transformer.wte.weight"][known:], rows, rtol=0, atol=0)
    card = (run.exported("hf") / "README.md").read_text()
    assert "by adapters (LoRA), which are merged into it" in card
    assert "library_name: transformers" in card
    said = json.loads((run.exported("hf") / "export.json").read_text())
    assert len(said["base_sha256"]) == 64
    for to, file in (("gguf", "model.gguf"), ("book", "model.pth")):
        assert (exported(run, to) / file).is_file()
    torch.testing.assert_close(logits(load(run.exported("book") / "model.pth", config=trained_model(run).config)),
                               logits(trained_model(run)), rtol=0, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(("tied_base", "tie_head"), [(True, True), (False, False), (True, False)])
def test_the_adapter_by_itself_is_pefts_and_its_card_says_how(tmp_path: Path, tied_base: bool, tie_head: bool) -> None:
    run = made_adapter_run(tmp_path / "run", "chatml", tie_head=tie_head, tied_base=tied_base)
    out = exported(run, "peft")
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(("adapter", "chat", "README"))) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"
    ]  # fmt: skip
    card = (out / "README.md").read_text()
    for said in ("library_name: peft", "An adapter (LoRA) of the folder `base`", "SHA-256 over the base's weights"):
        assert said in card
    assert str(tmp_path) not in card
    code = card.partition("```python\n")[2].partition("messages =")[0]
    names = {"FOLDER": str(out), "BASE": str(tmp_path / "base")}
    exec(code, names)  # the card's own lines, as people run them
    with torch.no_grad():
        theirs = names["model"].eval()(IDS).logits  # type: ignore[attr-defined] # what these lines leave
    torch.testing.assert_close(logits(trained_model(run)), theirs, rtol=0, atol=1e-4)
    assert logits(trained_model(run)).abs().max() > 1


def test_the_gguf_of_an_adapter(tmp_path: Path) -> None:
    run = made_adapter_run(tmp_path / "run", rslora=True, targets=("attn.c_proj", "c_fc"), layers=(1,))
    read = gguf.GGUFReader(exported(run, "gguf-adapter") / "adapter.gguf")
    fields = {name: one.contents() for name, one in read.fields.items()}
    assert (fields["general.type"], fields["general.architecture"]) == ("adapter", "gpt2")
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == pytest.approx(4 * 3**0.5)
    held = load_file(run.weights)
    expected = {
        f"blk.1.{theirs}.weight.lora_{part}": held[
            f"base_model.model.transformer.h.1.{ours}.lora_{part.upper()}.weight"
        ]
        for ours, theirs in (("attn.c_proj", "attn_output"), ("mlp.c_fc", "ffn_up"))
        for part in "ab"
    }
    assert {one.name for one in read.tensors} == expected.keys()
    for one in read.tensors:
        torch.testing.assert_close(torch.tensor(one.data.copy()), expected[one.name], rtol=0, atol=0)


def test_what_cannot_be_exported_by_itself_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = made_run(tmp_path / "whole", "alpaca")
    rows, dora = made_adapter_run(tmp_path / "rows", "chatml"), made_adapter_run(tmp_path / "dora", dora=True)
    above = made_adapter_run(tmp_path / "above")
    config = above.model / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(dora.model)}))
    for call, said in [
        ((whole, "peft"), "which has no adapter"),
        ((whole, "gguf-adapter"), "which has no adapter"),
        ((rows, "gguf-adapter"), "rows for tokens of a template"),
        ((dora, "gguf-adapter"), "which is DoRA; llama.cpp has no word for the lengths"),
        ((dora, "peft", "--push", "me/mine"), "whose base is not on the hub"),
        ((dora, "peft", "--quantize", "f32"), "--quantize"),
        ((above, "peft"), "is an adapter itself: PEFT would put the one in the other's place"),
    ]:
        run, to, *more = call
        assert main(["export", "--run", str(run.folder), "--to", str(to), *map(str, more)]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_run_knows_its_adapter(tmp_path: Path) -> None:
    run = made_adapter_run(tmp_path / "run")
    assert run.weights == run.model / "adapter_model.safetensors"
    assert run.holds_something()
    assert run.weights in run.written()
    export(ExportOptions(run=run.folder, to="peft"))
    run.clear()
    assert not run.folder.exists() or not list(run.folder.rglob("*"))


def test_a_base_with_an_adapter_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, base = made_adapter_run(tmp_path / "run", "chatml"), str(tmp_path / "base")
    adapter = str((tmp_path / "run" / "model").rename(tmp_path / "adapter"))
    asked = ["--prompt", "Name it.", "--max_new_tokens", "12"]
    answers = []
    for source in (["--model", base, "--adapter", adapter], ["--model", adapter]):
        assert main(["generate", *source, *asked]) == 0
        answers.append(capsys.readouterr().out)
    Path(adapter).rename(run.model)
    assert main(["generate", "--run", str(run.folder), *asked]) == 0
    answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 1
    assert main(["generate", "--model", base, "--template", "alpaca", *asked]) == 0
    assert capsys.readouterr().out not in answers
    assert main(["generate", "--run", str(run.folder), "--adapter", adapter, *asked]) == 2
    assert "--adapter" in capsys.readouterr().err


def test_answers_to_a_split_become_a_run_of_the_adapter(tmp_path: Path) -> None:
    run, base = made_adapter_run(tmp_path / "run"), str(tmp_path / "base")
    options: dict[str, Any] = {"data": "sample", "limit": 1, "max_new_tokens": 3}
    whole = GenerateOptions(model=base, adapter=str(run.model), out=tmp_path / "whole", **options)
    assert generate(whole) == generate(whole)  # the second time nothing is made again
    merged = trained_model(Run(tmp_path / "whole"))
    for name, weight in trained_model(run).named_parameters():
        torch.testing.assert_close(dict(merged.named_parameters())[name], weight, rtol=0, atol=0)
    save_hf(load(base), tmp_path / "copy")
    with pytest.raises(UserError, match="starts from one source"):
        generate(GenerateOptions(model=str(tmp_path / "copy"), adapter=str(run.model), out=tmp_path / "o", **options))


def test_the_base_counts(tmp_path: Path) -> None:
    run = made_adapter_run(tmp_path / "run")
    other = load(tmp_path / "base")
    with torch.no_grad():
        other.ln_f.bias[0] += 1e-3
    save_hf(other, tmp_path / "base")
    for do in (lambda: trained_model(run), lambda: exported(run, "hf")):
        with pytest.raises(UserError, match="belongs to other weights"):
            do()
