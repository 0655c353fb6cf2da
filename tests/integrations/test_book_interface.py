"""The book's names over fastft: what they give is what the book's own package gives, held against it side by side."""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ollama_stub import OllamaStub, says, status
from small_records import made_records
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastft.common.errors import JudgeUnavailable, UserError
from fastft.data.tokenizer import gpt2_tokenizer
from fastft.integrations import book
from fastft.integrations.book import generation, training
from fastft.model import ops
from fastft.model.gpt2 import GPT2Config
from fastft.model.weights import load

pytest.importorskip("llms_from_scratch", reason="the book's own package is what is held against")
from llms_from_scratch import appendix_e, ch04, ch05, ch07

THEIRS: Any = SimpleNamespace(
    **{name: value for chapter in (ch04, ch05, ch07) for name, value in vars(chapter).items()}
)
OURS: Any = book
CONFIG = {
    "vocab_size": 50257, "context_length": 128, "emb_dim": 24, "n_heads": 3, "n_layers": 2,
    "drop_rate": 0.0, "qkv_bias": True,
}  # fmt: skip
TOKENIZER = gpt2_tokenizer().encoding
ENTRIES = made_records()
FLOAT32, FLOAT64 = 1e-5, 1e-10


@pytest.fixture(autouse=True)
def exact_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The book rounds GELU's constant to float32, which float64 would show."""

    def gelu(_: nn.Module, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))

    monkeypatch.setattr(ch04.GELU, "forward", gelu)


def model_of(which: Any, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    torch.manual_seed(123)
    return which.GPTModel({**CONFIG, **changes}).to(dtype)


def loader(which: Any, entries: list[dict[str, str]], *, shuffle: bool) -> DataLoader[Any]:
    return DataLoader(
        which.InstructionDataset(entries, TOKENIZER),
        batch_size=8,
        shuffle=shuffle,
        drop_last=shuffle,
        collate_fn=partial(which.custom_collate_fn, allowed_max_length=100),
    )


def batch_of(entries: list[dict[str, str]], *, masked: bool = False) -> tuple[Tensor, Tensor]:
    """A padded batch of the book's; with `masked` prompts are not asked, as in its exercises."""
    inputs, targets = ch07.custom_collate_fn(ch07.InstructionDataset(entries, TOKENIZER).encoded_texts)
    for row, entry in enumerate(entries if masked else []):
        targets[row, : len(TOKENIZER.encode(ch07.format_input(entry))) - 1] = -100
    return inputs, targets


def loss_and_gradients(which: Any, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(7)  # of the dropout
    model.zero_grad()
    loss = which.calc_loss_batch(inputs, targets, model, "cpu")
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def same(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]], tolerance: float) -> bool:
    """Loss and gradients; a tensor's error is relative to its largest entry, but for keys' biases, whose gradient is
    nothing but rounding."""
    largest = max(y.abs().max() for y in b[1])
    pairs = zip([a[0], *a[1]], [b[0], *b[1]], strict=True)
    return all((x - y).abs().max() <= tolerance * max(y.abs().max(), 1e-6 * largest) for x, y in pairs)


class TestModel:
    @pytest.mark.parametrize("qkv_bias", [True, False])
    def test_a_seed_gives_the_same_weights_by_the_same_names(self, qkv_bias: bool) -> None:
        ours, theirs = (model_of(which, qkv_bias=qkv_bias).state_dict() for which in (OURS, THEIRS))
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_the_same_logits(self) -> None:
        ours, theirs = (model_of(which).eval() for which in (OURS, THEIRS))
        ids = torch.randint(0, 50257, (3, 20))
        expected = theirs(ids)
        assert (ours(ids) - expected).abs().max() < FLOAT64
        ids[0, 3] += 1 if ids[0, 3] < 50256 else -1
        assert (ours(ids) - expected).abs().max() > FLOAT64

    def test_its_file_is_the_books_and_fastfts(self, tmp_path: Path) -> None:
        ours, theirs = model_of(OURS, dtype=torch.float32), model_of(THEIRS, dtype=torch.float32)
        with torch.no_grad():
            for parameter in ours.parameters():
                nn.init.normal_(parameter, std=0.1)
        torch.save(ours.state_dict(), tmp_path / "gpt2-sft.pth")
        theirs.load_state_dict(torch.load(tmp_path / "gpt2-sft.pth"))
        ours.load_state_dict(theirs.state_dict())
        own = load(tmp_path / "gpt2-sft.pth", config=GPT2Config(n_layer=2, n_head=3, n_embd=24, n_ctx=128))
        inputs, targets = batch_of(ENTRIES[:3])
        expected = theirs.eval()(inputs)
        assert torch.allclose(ours.eval()(inputs), expected, atol=1e-4)
        from fastft.batches.batch import from_padded

        assert torch.allclose(own.logits(from_padded(inputs, targets)).view(expected.shape), expected, atol=1e-4)

    def test_rows_longer_than_the_context_are_refused(self) -> None:
        too_long = torch.zeros(1, 129, dtype=torch.int64)
        for asked in (model_of(OURS), partial(OURS.calc_loss_batch, too_long, model=model_of(OURS), device="cpu")):
            with pytest.raises(UserError, match="got 129 tokens, expected at most context_length = 128"):
                asked(too_long)


class TestLoss:
    @pytest.mark.parametrize("masked", [False, True], ids=["all asked", "prompts masked"])
    @pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"drop_rate": 0.1}], ids=str)
    def test_loss_and_every_gradient(self, masked: bool, changes: dict[str, Any]) -> None:
        inputs, targets = batch_of(ENTRIES[:8], masked=masked)
        ours, theirs = (loss_and_gradients(w, model_of(w, **changes), inputs, targets) for w in (OURS, THEIRS))
        assert same(ours, theirs, FLOAT64)
        targets[3, (targets[3] >= 0).nonzero()[-1]] = -100
        assert not same(loss_and_gradients(OURS, model_of(OURS, **changes), inputs, targets), theirs, FLOAT64)

    def test_targets_that_are_not_the_next_tokens(self) -> None:
        inputs, targets = torch.randint(0, 50257, (2, 4, 9), generator=torch.Generator().manual_seed(1))
        targets[torch.rand(targets.shape) < 0.5] = -100
        targets[2] = -100
        ours, theirs = (loss_and_gradients(which, model_of(which), inputs, targets) for which in (OURS, THEIRS))
        assert same(ours, theirs, FLOAT64)

    def test_padding_and_equal_beginnings_are_not_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And each accelerated operation runs as often as it should, over a pack."""
        seen: list[tuple[str, int]] = []

        def counted(name: str) -> Callable[..., Tensor]:
            real = getattr(ops, name)

            def call(q: Tensor, *rest: Any) -> Tensor:
                seen.append((name, len(q)))
                return real(q, *rest)

            return call

        for name in ("attention", "attention_of_rows"):
            monkeypatch.setattr(ops, name, counted(name))
        head = nn.Linear.forward
        monkeypatch.setattr(
            nn.Linear,
            "forward",
            lambda self, x: seen.append(("logits", 0)) if len(self.weight) > 1e4 else head(self, x),
        )
        inputs, targets = batch_of(ENTRIES[:8], masked=True)
        OURS.calc_loss_batch(inputs, targets, model_of(OURS), "cpu")
        assert [name for name, _ in seen] == ["attention", "attention_of_rows"]
        assert seen[0][1] < 0.7 * inputs.numel()
        assert seen[1][1] <= int((targets >= 0).sum())

    def test_nothing_asked_is_nan_as_in_the_book(self) -> None:
        ids = torch.zeros(2, 3, dtype=torch.int64)
        for which in (OURS, THEIRS):
            assert torch.isnan(which.calc_loss_batch(ids, torch.full_like(ids, -100), model_of(which), "cpu"))

    @pytest.mark.parametrize("drop_rate", [0.0, 0.1])
    @pytest.mark.parametrize("target", [50257, -1])
    def test_targets_beyond_the_vocabulary_are_refused(self, drop_rate: float, target: int) -> None:
        ids = torch.zeros(2, 3, dtype=torch.int64)
        with pytest.raises(UserError, match=rf"{target}.* expected 0 to 50256"):
            OURS.calc_loss_batch(ids, torch.full_like(ids, target), model_of(OURS, drop_rate=drop_rate), "cpu")

    def test_lora_from_appendix_e(self) -> None:
        found = []
        for which in (OURS, THEIRS):
            model = model_of(which, dtype=torch.float32)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            torch.manual_seed(1)
            appendix_e.replace_linear_with_lora(model, rank=4, alpha=4)
            model.double()
            for name, parameter in model.named_parameters():
                if name.endswith("lora.B"):
                    nn.init.normal_(parameter, std=0.1)
            loss = which.calc_loss_batch(*batch_of(ENTRIES[:4]), model, "cpu")
            learned = [p for p in model.parameters() if p.requires_grad]
            found.append((loss.detach(), list(torch.autograd.grad(loss, learned))))
        assert len(found[0][1]) == 2 * (6 * 2 + 1)
        assert same(found[0], found[1], FLOAT64)

    @pytest.mark.parametrize(
        "how",
        [
            "hooked",
            "a part hooked",
            "subclass",
            "block",
            "a patched forward",
            "another feed-forward",
            "the book's own",
        ],
    )
    def test_a_model_that_is_more_than_ours_is_called_as_a_whole(self, how: str) -> None:
        inputs, targets = batch_of(ENTRIES[:2])
        model, calls = model_of(OURS), []
        if how == "hooked":
            model.register_forward_hook(lambda *_: calls.append(1))
        elif how == "a part hooked":
            model.trf_blocks[1].ff.register_forward_hook(lambda _, given, __: calls.append(given[0].shape[:2]))
        elif how == "subclass":

            class Other(book.GPTModel):
                def forward(self, in_idx: Tensor) -> Tensor:
                    calls.append(1)
                    return super().forward(in_idx)

            model.__class__ = Other
        elif how == "block":

            class Block(nn.Module):
                def forward(self, x: Tensor) -> Tensor:
                    calls.append(1)
                    return real(x)

            real = model.trf_blocks[0]
            model.trf_blocks[0] = Block()
        elif how == "a patched forward":
            own = model.forward
            model.forward = lambda in_idx: (calls.append(1), own(in_idx))[1]
        elif how == "another feed-forward":  # it may look at a token's neighbours, which a pack's are not

            class Other(book.FeedForward):
                def forward(self, x: Tensor) -> Tensor:
                    calls.append(x.shape[:2])
                    return super().forward(x)

            model.trf_blocks[1].ff.__class__ = Other
        else:
            model = model_of(THEIRS)
            calls.append(1)
        loss = OURS.calc_loss_batch(inputs, targets, model, "cpu")
        assert calls == [inputs.shape if how in ("a part hooked", "another feed-forward") else 1]
        assert abs(loss - THEIRS.calc_loss_batch(inputs, targets, model_of(THEIRS), "cpu")) < FLOAT64


class TestTraining:
    @pytest.mark.parametrize("changes", [{}, {"qkv_bias": False, "drop_rate": 0.1}], ids=str)
    def test_the_loop(self, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        """The same losses, tokens and printed text; the order of the second epoch depends on the evaluations."""
        training._say_that_it_drops.cache_clear()
        results, printed = [], []
        for which in (OURS, THEIRS):
            model = model_of(which, dtype=torch.float32, **changes)
            optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1)
            torch.manual_seed(123)
            results.append(
                which.train_model_simple(
                    model, loader(which, ENTRIES[:20], shuffle=True), loader(which, ENTRIES[20:], shuffle=False),
                    optimizer, "cpu", num_epochs=2, eval_freq=2, eval_iter=1,
                    start_context=which.format_input(ENTRIES[0]), tokenizer=TOKENIZER,
                )
            )  # fmt: skip
            printed.append(capsys.readouterr())
        ours, theirs = results
        assert np.allclose(ours[:2], theirs[:2], rtol=FLOAT32, atol=0)
        assert not np.allclose(np.array(ours[0]) * (1 + 2 * FLOAT32), theirs[0], rtol=FLOAT32, atol=0)
        assert ours[2] == theirs[2]
        assert printed[0].out == printed[1].out
        assert printed[0].err.count("dropout draws") == ("drop_rate" in changes)

    def test_evaluations(self) -> None:
        data = loader(OURS, ENTRIES, shuffle=False)
        ours, theirs = model_of(OURS), model_of(THEIRS)
        for n in (None, 2, 99):
            expected = THEIRS.calc_loss_loader(data, theirs, "cpu", n)
            assert OURS.calc_loss_loader(data, ours, "cpu", n) == pytest.approx(expected, rel=1e-12)
        assert np.isnan(OURS.calc_loss_loader([], ours, "cpu"))
        found = OURS.evaluate_model(ours, data, data, "cpu", 1)
        assert found == pytest.approx(THEIRS.evaluate_model(theirs, data, data, "cpu", 1), rel=1e-12)
        assert ours.training

    def test_a_plain_adamw_steps_fused_and_a_chosen_one_as_it_is(self) -> None:
        for chosen, fused in (({}, True), ({"foreach": False}, None), ({"fused": False}, False)):
            optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), **chosen)
            before = [{**group} for group in optimizer.param_groups]
            with training._fused(optimizer):
                assert optimizer.param_groups[0]["fused"] is fused
            assert [{**group} for group in optimizer.param_groups] == before
        with training._fused(sgd := torch.optim.SGD(nn.Linear(2, 2).parameters())):
            assert sgd.param_groups[0]["fused"] is None


class TestGeneration:
    @pytest.fixture
    def models(self) -> tuple[Any, Any]:
        """Whose tokens do not repeat, as those of a model at its start would."""
        ours, theirs = model_of(OURS, context_length=32), model_of(THEIRS, context_length=32)
        torch.manual_seed(0)
        for parameter in ours.parameters():
            nn.init.normal_(parameter, std=0.5)
        theirs.load_state_dict(ours.state_dict())
        return ours.eval(), theirs.eval()

    @pytest.mark.parametrize("context_size", [32, 20, 5])
    @pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 7}, {"top_k": 1}], ids=str)
    def test_the_same_text(self, models: tuple[Any, Any], how: dict[str, Any], context_size: int) -> None:
        """Also where the text outgrows the context, after which every position moves."""
        B = 1 if "top_k" in how else 2  # the book's top_k fits one sequence
        idx = torch.randint(0, 50257, (B, 4), generator=torch.Generator().manual_seed(3))
        texts = []
        for which, model in zip((OURS, THEIRS), models, strict=True):
            torch.manual_seed(1)
            texts.append(which.generate(model, idx, 40, context_size, **how))
        assert torch.equal(*texts)
        assert len(set(texts[0][0, 4:].tolist())) > 2
        torch.manual_seed(2)
        other = OURS.generate(models[0], idx, 40, context_size, **how)
        assert torch.equal(other, texts[0]) == ("temperature" not in how)

    def test_it_ends_before_the_end_mark(self, models: tuple[Any, Any]) -> None:
        idx = torch.tensor([[5, 6]])
        text = OURS.generate_text_simple(models[0], idx, 12, 32)
        assert torch.equal(text, THEIRS.generate_text_simple(models[1], idx, 12, 32))
        end = int(text[0, 8])
        ended = OURS.generate(models[0], idx, 12, 32, eos_id=end)
        assert torch.equal(ended, THEIRS.generate(models[1], idx, 12, 32, eos_id=end))
        assert ended.tolist() == text[:, : text[0].tolist().index(end)].tolist()
        with pytest.raises(UserError, match="eos_id with 2 sequences"):
            OURS.generate(models[0], idx.repeat(2, 1), 3, 32, eos_id=1)

    def test_each_token_is_computed_once(self, models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = []
        real = nn.Embedding.forward
        monkeypatch.setattr(nn.Embedding, "forward", lambda self, x: sizes.append(x.numel()) or real(self, x))
        OURS.generate(models[0], torch.tensor([[5, 6, 7]]), 10, 32)
        assert sizes == [3, 3] + [1, 1] * 9

    def test_a_model_that_drops_is_called_as_the_book_calls_it(self) -> None:
        texts = []
        for which in (OURS, THEIRS):
            model = model_of(which, drop_rate=0.5, dtype=torch.float32)
            torch.manual_seed(1)
            texts.append(which.generate(model, torch.tensor([[5, 6, 7]]), 5, 32))
        assert torch.equal(*texts)

    def test_text_and_ids(self) -> None:
        text = "Hello, I am<|endoftext|> Ä"
        ids = OURS.text_to_token_ids(text, TOKENIZER)
        assert torch.equal(ids, THEIRS.text_to_token_ids(text, TOKENIZER))
        assert OURS.token_ids_to_text(ids, TOKENIZER) == text
        assert generation.token_ids_to_text(ids[0, :2], TOKENIZER) == "Hello,"


class TestData:
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.lists(st.sampled_from([1, 2, 3, 50256]), max_size=6), min_size=1, max_size=4),
        st.sampled_from([None, 0, 1, 3, 6, 99]),
        st.sampled_from([{}, {"pad_token_id": 2, "ignore_index": -7}]),
    )
    def test_collate(self, rows: list[list[int]], longest: int | None, more: dict[str, int]) -> None:
        before = copy.deepcopy(rows)
        ours = OURS.custom_collate_fn(rows, allowed_max_length=longest, **more)
        theirs = THEIRS.custom_collate_fn(rows, allowed_max_length=longest, **more)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert rows == before

    def test_texts(self) -> None:
        assert [OURS.format_input(entry) for entry in ENTRIES] == [THEIRS.format_input(entry) for entry in ENTRIES]
        ours, theirs = (which.InstructionDataset(ENTRIES, TOKENIZER) for which in (OURS, THEIRS))
        assert len(ours) == len(ENTRIES)
        assert [ours[i] for i in range(len(ours))] == theirs.encoded_texts
        assert ours.data is ENTRIES

    def test_a_file_is_downloaded_once(self, tmp_path: Path) -> None:
        (tmp_path / "there.json").write_text('[{"instruction": "Ä"}]', encoding="utf-8")
        url = (tmp_path / "there.json").as_uri()
        assert OURS.download_and_load_file(tmp_path / "here.json", url) == [{"instruction": "Ä"}]
        (tmp_path / "there.json").unlink()
        assert OURS.download_and_load_file(str(tmp_path / "here.json"), url) == [{"instruction": "Ä"}]


class TestWeights:
    @staticmethod
    def params(C: int = 24, n_layer: int = 2) -> dict[str, Any]:
        random = np.random.default_rng(0)

        def linear(n_in: int, n_out: int) -> dict[str, Any]:
            return {
                name: random.normal(size=size).astype(np.float32) for name, size in (("w", (n_in, n_out)), ("b", n_out))
            }

        def norm() -> dict[str, Any]:
            return {name: random.normal(size=C).astype(np.float32) for name in "gb"}

        blocks = [
            {
                "attn": {"c_attn": linear(C, 3 * C), "c_proj": linear(C, C)},
                "mlp": {"c_fc": linear(C, 4 * C), "c_proj": linear(4 * C, C)},
                "ln_1": norm(),
                "ln_2": norm(),
            }
            for _ in range(n_layer)
        ]
        wte, wpe = (random.normal(size=(n, C)).astype(np.float32) for n in (50257, 128))
        return {"wte": wte, "wpe": wpe, "blocks": blocks, **norm()}

    def test_the_same_weights(self) -> None:
        ours, theirs = (model_of(which, dtype=torch.float32) for which in (OURS, THEIRS))
        kept = list(ours.parameters())
        for which, model in ((OURS, ours), (THEIRS, theirs)):
            which.load_weights_into_gpt(model, self.params())
        loaded, expected = ours.state_dict(), theirs.state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
        assert all(a is b for a, b in zip(kept, ours.parameters(), strict=True))  # an optimizer may hold them already

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"emb_dim": 12}, r"pos_emb.weight: got weights \[128, 24\], expected \[128, 12\]"),
            ({"n_layers": 3}, "got 2 blocks of weights, expected the model's 3"),
            ({"qkv_bias": False}, "no trf_blocks.0.att.W_query.bias, expected qkv_bias True"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            OURS.load_weights_into_gpt(model_of(OURS, **changes), self.params())


class TestJudge:
    @pytest.fixture
    def stub(self) -> Iterator[OllamaStub]:
        with OllamaStub(*(says(text) for text in ("85", "about 7", "60"))) as stub:
            yield stub

    def test_scores(
        self, stub: OllamaStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The same questions with the same options, and what is no integer is said and left out."""
        address = f"{stub.url}/api/chat"
        entries = [{**entry, "model_response": f"answer {i}"} for i, entry in enumerate(ENTRIES[:3])]
        monkeypatch.setattr(book.judge, "query_model", partial(OURS.query_model, url=address))
        assert OURS.generate_model_scores(entries, "model_response") == [85, 60]
        assert capsys.readouterr().out == "Could not convert score: about 7\n"
        asked, stub.asked = stub.asked, []
        monkeypatch.setattr(ch07, "query_model", partial(THEIRS.query_model, url=address))
        ch07.generate_model_scores(entries, "model_response")
        for ours, theirs in zip(asked, stub.asked, strict=True):
            assert ours["messages"] == theirs["messages"]
            assert ours["options"] == {**theirs["options"], "num_predict": -1}  # -1 is what Ollama takes without it

    def test_no_answer(self) -> None:
        said = pytest.raises(JudgeUnavailable, match=r"llama9 at http://.* gave no answer .*not found")
        with OllamaStub(status(404, "model 'llama9' not found")) as stub, said:
            OURS.query_model("Hello", "llama9", stub.url)

    def test_running(self) -> None:
        assert OURS.check_if_running("python") == THEIRS.check_if_running("python")
        assert not OURS.check_if_running("a process that is not there")


class TestTheBooksOwnTests:
    """Unchanged but for what they name: see tests/support/pointed_book.py."""

    @staticmethod
    def run(folder: Path, downloads: Path, **environment: str) -> str:
        """All tests of a folder, in one process."""
        (folder / "pytest.ini").touch()  # so that no other configuration is found
        support = Path(__file__).parents[1] / "support"
        root = support.parents[1]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-s", "-p", "pointed_book", "-p", "no:cacheprovider"],
            cwd=folder, capture_output=True, text=True, timeout=600,
            env={
                **os.environ, "BOOK_DOWNLOADS": str(downloads), **environment,
                "PYTHONPATH": os.pathsep.join(map(str, (root, root / "kernels", support))),
            },
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        pointed = re.search(r"pointed at fastft: (.*)", done.stdout)[1].split()
        assert ("ch04.GPTModel" in pointed) != bool(environment)
        return done.stdout

    @staticmethod
    def source(chapter: str) -> str:
        return (Path(ch04.__file__).parent / "tests" / f"test_{chapter}.py").read_text(encoding="utf-8")

    @pytest.mark.parametrize("width", [48, pytest.param(768, marks=pytest.mark.long)])
    def test_chapters_4_5_and_7(self, tmp_path: Path, width: int) -> None:
        """Chapter 5 on a made text; for its two literals, what the book's own package gives on it. Chapter 7 where the
        book's data is given."""
        downloads, tests = tmp_path / "downloads", tmp_path / "tests"
        downloads.mkdir()
        tests.mkdir()
        text = " ".join(f"{entry['instruction']} {entry['output']}" for entry in ENTRIES * 20)
        (downloads / "the-verdict.txt").write_text(text, encoding="utf-8")
        source = self.source("ch05").replace('"emb_dim": 768', f'"emb_dim": {width}')
        if width < 768:
            source = source.replace('"n_layers": 12', '"n_layers": 2')
        literal = re.compile(r"assert round\((\w+)_losses\[0\], 1\) == [\d.]+")
        test = tests / "test_ch05.py"
        test.write_text(literal.sub(r'print("\\nfirst", "\1", \1_losses[0])', source), encoding="utf-8")
        first = re.findall(r"^first (\w+) ([\d.]+)$", self.run(tests, downloads, BOOK_AS_IT_IS="1"), re.MULTILINE)
        assert [name for name, _ in first] == ["train", "val"] * 2
        expected = dict(first[:2])  # of GPTModel; GPTModelFast, which stays the book's, has the same

        def held(found: re.Match[str]) -> str:
            """The second epoch's loss is a wrong one, which the tolerance rejects."""
            losses, value = f"{found[1]}_losses", expected[found[1]]
            return f"assert abs({losses}[0] - {value}) < 1e-4 < abs({losses}[1] - {value})"

        test.write_text(literal.sub(held, source), encoding="utf-8")
        (tests / "test_ch04.py").write_text(self.source("ch04"), encoding="utf-8")
        if data := os.environ.get("FASTFT_BOOK_DATA"):
            (downloads / "instruction-data.json").symlink_to(Path(data).resolve())
            (tests / "test_ch07.py").write_text(self.source("ch07"), encoding="utf-8")
        assert f"{9 if data else 8} passed" in self.run(tests, downloads)
