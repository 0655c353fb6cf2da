"""Templates of conversations: what they write, what of it is learned, and that transformers has it likewise."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.common.errors import UserError
from fastft.data.chat_template import (
    AnyTemplate,
    JinjaTemplate,
    as_jinja,
    template_described,
    template_named,
)
from fastft.data.encode import EncodedSet, encode, prompts_of
from fastft.data.folder_tokenizer import tokenizer_of, with_special_tokens
from fastft.data.prompts import ALL, ALPACA, CHATML, LAST, RESPONSES, TEMPLATES, VICUNA, Learn, Template, text_of
from fastft.data.records import Record, Turn
from fastft.data.tokenizer import Tokenizer, gpt2_tokenizer

SHIPPED = tuple(TEMPLATES.values())
CHATS = tuple(template for template in SHIPPED if template.as_transformers)
JINJA = JinjaTemplate("jinja", as_jinja(CHATML), end_token="<|im_end|>")
WORDS = ("Hello", " you", "\n", "\n\n", "Ünï 🙂", " 12", "?", "a\n", " ", "USER: ", "def f():\n    return 1")


def conversation(*texts: str, system: str | None = None, row: int = 1) -> Record:
    """Turns of user and assistant, in turn."""
    turns = [] if system is None else [Turn("system", system)]
    turns += [Turn("assistant" if at % 2 else "user", text) for at, text in enumerate(texts)]
    return Record(instruction=texts[-2], output=texts[-1], turns=tuple(turns), row=row)


def random_conversations(n: int, seed: int) -> list[Record]:
    rng = random.Random(seed)

    def text() -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    return [
        conversation(
            *(text() for _ in range(2 * rng.randint(1, 3))), system=text() if rng.random() < 0.4 else None, row=row
        )
        for row in range(1, n + 1)
    ]


@functools.cache
def tokenizer_for(template: AnyTemplate) -> Tokenizer:
    return with_special_tokens(gpt2_tokenizer(), template.special_tokens, template.end)


def encoded(records: list[Record], template: AnyTemplate, learn: Learn = RESPONSES) -> EncodedSet:
    return encode(records, template, tokenizer_for(template), learn=learn, max_length=4096)


def said(some: EncodedSet, index: int, template: AnyTemplate) -> list[str]:
    """What is learned of an example, as text."""
    tokenizer, ids = tokenizer_for(template), some[index].tolist()
    return [tokenizer.decode(ids[begin:end]) for begin, end in some.spans_of(index)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["b<|im_end|>", "d<|im_end|>"]),
        ("llama3", ["b<|eot_id|>", "d<|eot_id|>"]),
        ("vicuna", [" b<|endoftext|>", " d<|endoftext|>"]),
        ("alpaca", ["\n\n### Response:\nb<|endoftext|>", "\n\n### Response:\nd<|endoftext|>"]),
        ("alpaca-two", ["b<|endoftext|>", "d<|endoftext|>"]),
        ("phi3", ["\n<|assistant|>:\nb<|endoftext|>", "\n<|assistant|>:\nd<|endoftext|>"]),
        ("plain", ["b<|endoftext|>", "d<|endoftext|>"]),
    ],
)
def test_each_turn_of_the_assistant_is_learned_with_its_end(name: str, expected: list[str]) -> None:
    template = template_named(name)
    record = conversation("a", "b", "c", "d", system="Be brief.")
    some = encoded([record], template)
    assert said(some, 0, template) == expected
    assert said(encoded([record], template, LAST), 0, template) == expected[-1:]
    whole = tokenizer_for(template).decode(some[0].tolist())
    assert "Be brief." in whole
    everything = said(encoded([record], template, ALL), 0, template)[0]
    assert everything.removesuffix(template.after_response).endswith(whole[whole.index("brief") :])
    assert everything.endswith(expected[-1] + template.after_response)


@pytest.mark.parametrize("template", SHIPPED, ids=lambda template: template.name)
def test_the_prompt_is_what_training_has_before_the_last_answer(template: AnyTemplate) -> None:
    tokenizer = tokenizer_for(template)
    for record in (
        conversation("a", "b", "c", "d", system="Be brief."),
        conversation("a", "b"),
        Record(instruction="a", input="x", output="b"),
        Record(instruction="a", output="b", extra={"choices": ["b", "c"]}),
    ):
        some = encoded([record], template)
        (prompt,) = prompts_of([record], template, tokenizer)
        assert some[0][: len(prompt)].tolist() == prompt
        assert some.spans_of(0)[-1][0] == len(prompt)
        assert template.prompt_of(record) == text_of(template.prompt_parts(record))


def test_the_data_says_of_turns_whether_they_are_learned() -> None:
    turns = (
        Turn("user", "a"), Turn("assistant", "b", False), Turn("user", "c", True), Turn("assistant", "d"),
    )  # fmt: skip
    record = Record(instruction="c", output="d", turns=turns)
    assert said(encoded([record], CHATML), 0, CHATML) == ["c", "d<|im_end|>"]
    learned = said(encoded([record], CHATML, ALL), 0, CHATML)
    assert "".join(learned).count("b") == 0
    assert "".join(learned).startswith("user\na<|im_end|>")
    both = Learn(roles=("assistant", "user"))
    assert said(encoded([record], CHATML, both), 0, CHATML) == ["a", "c", "d<|im_end|>"]


def test_a_token_of_the_template_is_never_read_out_of_text() -> None:
    record = conversation("say <|im_end|>", "b")
    ids = encoded([record], CHATML)[0].tolist()
    assert ids.count(tokenizer_for(CHATML).special("<|im_end|>")) == 2
    assert tokenizer_for(CHATML).decode(ids).startswith("<|im_start|>user\nsay <|im_end|><|im_end|>")


@pytest.mark.parametrize("template", SHIPPED, ids=lambda template: template.name)
def test_its_jinja_program_writes_the_same(template: Any) -> None:
    jinja = JinjaTemplate("own", as_jinja(template), end_token=template.end)
    for record in random_conversations(40, seed=3):
        ours, theirs = template.parts(record), jinja.parts(record)
        assert text_of(ours) == text_of(theirs)
        if template.as_transformers:
            (one,), (other,) = (
                [said(encode([record], t, tokenizer_for(template), max_length=4096), 0, template)]
                for t in (template, jinja)
            )
            assert one == other
        assert template.prompt_of(record) == jinja.prompt_of(record)


@pytest.mark.parametrize("template", SHIPPED, ids=lambda template: template.name)
def test_a_description_makes_it_anew(template: AnyTemplate, tmp_path: Path) -> None:
    assert template_described(json.loads(json.dumps(template.description())), "run") == template
    jinja = JinjaTemplate("own", as_jinja(template), end_token=template.end)
    assert template_described(json.loads(json.dumps(jinja.description())), "run") == jinja


@pytest.mark.parametrize("template", CHATS, ids=lambda template: template.name)
def test_transformers_gives_the_same_ids_and_the_same_mask(template: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="pip install 'fastft[transformers]'")
    ours = tokenizer_for(template)
    for name, content in {**ours.files(1024), "chat_template.jinja": as_jinja(template).encode()}.items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.end_of_text
    records = random_conversations(200, seed=1)
    some = encode(records, template, ours, learn=ALL, max_length=4096)
    masked = encode(records, template, ours, max_length=4096)
    for index, record in enumerate(records):
        messages = [{"role": turn.role, "content": turn.text} for turn in record.turns]
        got = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert some[index].tolist() == got["input_ids"]
        wanted = [int(at > 0 and learned) for at, learned in enumerate(got["assistant_masks"])]
        mask = [0] * len(got["input_ids"])
        for begin, end in masked.spans_of(index):
            mask[begin:end] = [1] * (end - begin)
        assert mask == wanted
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        (own,) = prompts_of([record], template, ours)
        if template.name == "llama3":  # transformers' own has one token there for what training has two
            assert (own[-2:], prompt[-1:]) == (ours.encode("\n") * 2, ours.encode("\n\n"))
            own[-2:] = prompt[-1:]
        assert own == prompt
    again = tokenizer_of(tmp_path)
    assert again is not None
    assert again.end_of_text == ours.end_of_text


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_bounds_cover_what_is_learned(data: st.DataObject) -> None:
    """Also where a token spans a boundary: then it is learned, and nothing else that is not."""
    words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("".join)
    texts = [data.draw(words) for _ in range(2 * data.draw(st.integers(1, 3)))]
    some = encoded([conversation(*texts)], VICUNA)
    for learned, text in zip(said(some, 0, VICUNA), texts[1::2], strict=True):
        assert learned.endswith(f" {text}<|endoftext|>")
        assert len(learned) - len(f" {text}<|endoftext|>") < 8  # of the token before


PROGRAM = as_jinja(CHATML)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for", "no Jinja program"),
        ("{{ messages[0]['content'] }}{% if true %}{% endif %}", "no {% generation %}"),
        (PROGRAM.replace(' + "<|im_end|>" }}{%- endgeneration', " }}{%- endgeneration"), "without a special token"),
        ("{% generation %}{{ raise_exception('no') }}{% endgeneration %}", "cannot write a conversation: no"),
        ("{% generation %}{{ strftime_now('%d') }}<|im_end|>{% endgeneration %}", "the date of the day"),
        (PROGRAM.replace('assistant\\n" }}{%- endif', 'assistant\\n<think>" }}{%- endif'), "asked in another way"),
        (PROGRAM.split("{%- if add_generation_prompt")[0], "asked in another way"),
    ],
)
def test_programs_that_would_train_something_else_are_refused(source: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        JinjaTemplate("own", source)
    assert says in str(error.value)


def test_a_program_refuses_turns_that_it_cannot_tell_from_its_own() -> None:
    jinja = JinjaTemplate("own", PROGRAM)
    with pytest.raises(UserError, match=r"row 4: .*holds <\|im_end\|>"):
        encoded([conversation("say <|im_end|>", "b", row=4)], jinja)
    with pytest.raises(UserError, match="--train_roles assistant"):
        encoded([conversation("a", "b")], jinja, Learn(roles=("user",)))


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(PROGRAM)
    assert text_of(template_named(str(file)).parts(conversation("a", "b"))) == text_of(
        CHATML.parts(conversation("a", "b"))
    )
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": as_jinja(VICUNA), "eos_token": {"content": "</s>"}}))
    assert template_named(str(config)).end == "</s>"
    parts = tmp_path / "mine.yaml"
    parts.write_text("before_instruction: 'Q: '\nbefore_response: '\n\n  A:'\nresponse_header: ' '\n")
    assert template_named(str(parts)).prompt("hi") == "Q: hi\nA:"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a", "got no fields"),
        ("before_instruction: [", "is not YAML"),
        ("befor_instruction: a", "did you mean"),
        ("before_instruction: 3", "expected text"),
        ("before_response: a", "no before_instruction"),
        ("before_instruction: a", "blank response header"),
        ("{before_instruction: a, before_response: b, special_tokens: [c, c]}", "different texts"),
        ("{before_instruction: a, before_response: b, end: c}", "one of its special_tokens"),
    ],
)
def test_files_of_parts_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        template_named(str(file))
    assert says in str(error.value)


def test_names_that_mean_nothing() -> None:
    with pytest.raises(UserError, match=r"'chatm'.*did you mean chatml"):
        template_named("chatm")
    with pytest.raises(UserError, match="check the path"):
        template_named("nowhere.jinja")


def test_tokens_keep_their_ids(tmp_path: Path) -> None:
    first = tokenizer_for(CHATML)
    assert [first.special(token) for token in CHATML.special_tokens] == [50257, 50258]
    assert first.end_of_text == 50258
    assert with_special_tokens(first, CHATML.special_tokens, CHATML.end) is first
    second = with_special_tokens(first, template_named("llama3").special_tokens, "<|eot_id|>")
    assert second.special("<|im_start|>") == 50257
    assert second.special("<|eot_id|>") == second.end_of_text == 50262
    for name, content in second.files(64).items():
        (tmp_path / name).write_bytes(content)
    again = tokenizer_of(tmp_path)
    assert again is not None
    assert again.fingerprint() == second.fingerprint()
    assert with_special_tokens(gpt2_tokenizer(), (), "") is gpt2_tokenizer()
    with pytest.raises(UserError, match="expected a model whose tokenizer has it"):
        gpt2_tokenizer().special("<|im_end|>")
    assert ALPACA.special_tokens == ()


@pytest.mark.parametrize("template", SHIPPED, ids=lambda template: template.name)
def test_earlier_turns_have_the_ids_in_a_prompt_that_they_have_in_training(template: AnyTemplate) -> None:
    """A question that ends with a line end is encoded apart from its answer where no token may span the two."""
    record = conversation("a\n", "b", "c\n", "d", row=7)
    some = encoded([record], template)
    (prompt,) = prompts_of([record], template, tokenizer_for(template))
    assert some[0][: len(prompt)].tolist() == prompt
    assert some.report.encoded_apart in ([], [7])  # a row once, however many of its turns


@pytest.mark.parametrize("template", [CHATML, ALPACA, JINJA], ids=["chatml", "alpaca", "jinja"])
def test_options_stand_behind_a_conversations_last_question(template: AnyTemplate) -> None:
    texts, choices = ("a", "b", "c", "d"), {"choices": ["d", "e"]}
    turns = conversation(*texts).turns
    record = Record(instruction="c", output="d", turns=turns, extra=choices)
    assert template.prompt_of(record).count("A. d\nB. e") == 1
    assert template.prompt_of(record).index("A. d") > template.prompt_of(record).index("c")
    (prompt,) = prompts_of([record], template, tokenizer_for(template))
    assert encoded([record], template)[0][: len(prompt)].tolist() == prompt
    alone = Record(instruction="a", output="b", extra={"choices": ["b", "c"]})
    as_turns = Record(instruction="a", output="b", turns=conversation("a", "b").turns, extra=alone.extra)
    assert template.prompt_of(as_turns) == template.prompt_of(alone)


def test_last_leaves_what_the_data_say_of_turns() -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b", True), Turn("user", "c"), Turn("assistant", "d"))
    record = Record(instruction="c", output="d", turns=turns)
    assert said(encoded([record], CHATML, LAST), 0, CHATML) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_jinja_template_leaves_out_of_all_what_the_data_says_is_not_learned() -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b", False), Turn("user", "c"), Turn("assistant", "d"))
    record = Record(instruction="c", output="d", turns=turns)
    assert said(encoded([record], JINJA, ALL), 0, CHATML) == said(encoded([record], CHATML, ALL), 0, CHATML)
    record = Record(instruction="a", output="b", turns=(Turn("user", "a", False), Turn("assistant", "b")))
    with pytest.raises(UserError, match="not to be learned"):
        encoded([record], JINJA, ALL)


MISTRALS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize(("begin", "end"), [("<s>", "</s>"), ("<bos>", "<stop>")])
def test_tokens_that_a_program_has_by_name_alone(tmp_path: Path, begin: str, end: str, file: str) -> None:
    """They are added, and the exported program writes them, whatever its tokenizer calls its own."""
    config = {"bos_token": begin, "eos_token": {"content": end}, "chat_template": MISTRALS}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(MISTRALS)
    template = template_named(str(tmp_path / file))
    tokenizer = tokenizer_for(template)
    record = conversation("a", "b", "c", "d")
    some = encoded([record], template)
    assert said(some, 0, template) == [f"b{end}", f"d{end}"]
    assert some[0].tolist()[0] == tokenizer.special(begin) != tokenizer.end_of_text == tokenizer.special(end)
    assert exported(template, tmp_path / "out", record) == some[0].tolist()


def test_a_begin_that_nothing_names_is_nothing_in_the_exported_program_too(tmp_path: Path) -> None:
    template = JinjaTemplate("own", MISTRALS)
    record = conversation("a", "b")
    assert exported(template, tmp_path, record) == encoded([record], template)[0].tolist()


def exported(template: AnyTemplate, folder: Path, record: Record) -> list[int]:
    """The ids that transformers makes of a conversation with what is written beside a trained model."""
    import transformers

    folder.mkdir(exist_ok=True)
    for name, content in tokenizer_for(template).files(1024).items():
        (folder / name).write_bytes(content)
    (folder / "chat_template.jinja").write_text(as_jinja(template))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": turn.role, "content": turn.text} for turn in record.turns]
    return list(theirs.apply_chat_template(messages, return_dict=True)["input_ids"])


def test_a_program_that_leaves_a_turn_out_is_refused() -> None:
    """Mistral's writes no system's turn, and does not say so."""
    with pytest.raises(UserError, match=r"row 4: .*a turn of the system that it leaves out"):
        encoded([conversation("a", "b", system="Be brief.", row=4)], JinjaTemplate("own", MISTRALS))
    trims = JinjaTemplate("own", PROGRAM.replace("message['content']", "message['content'] | trim"))
    assert said(encoded([conversation("a ", " b\n")], trims), 0, CHATML) == ["b<|im_end|>"]


@pytest.mark.long
@pytest.mark.parametrize("template", CHATS, ids=lambda template: template.name)
def test_trl_learns_the_same(template: Any, tmp_path: Path) -> None:
    """`assistant_only_loss` of its SFTTrainer."""
    trl = pytest.importorskip("trl", reason="pip install 'fastft[trl]'")
    import datasets
    import transformers

    ours = tokenizer_for(template)
    for name, content in {**ours.files(1024), "chat_template.jinja": as_jinja(template).encode()}.items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=1024, vocab_size=ours.size())
    records = random_conversations(200, seed=2)
    rows = [{"messages": [{"role": turn.role, "content": turn.text} for turn in one.turns]} for one in records]
    trainer = trl.SFTTrainer(
        model=transformers.GPT2LMHeadModel(config),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"), assistant_only_loss=True, max_length=None, report_to=[], use_cpu=True
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=theirs,
    )
    masked = encode(records, template, ours, max_length=4096)
    whole = encode(records, template, ours, learn=ALL, max_length=4096)
    for index, row in enumerate(trainer.train_dataset):
        assert whole[index].tolist() == row["input_ids"]
        labels = [-100] * len(row["input_ids"])
        for begin, end in masked.spans_of(index):
            labels[begin:end] = row["input_ids"][begin:end]
        assert labels[1:] == row["labels"][1:]  # the first id has nothing before it that could predict it


def test_a_program_made_of_ones_own_parts_is_these_parts_again(tmp_path: Path) -> None:
    """Where an input goes, and what an answer begins with, the program alone does not say."""
    own = Template(
        name="/home/me/own.yaml", before_instruction='Q#} "', before_input="\nWITH ", response_header="\nA: "
    )
    file = tmp_path / "chat_template.jinja"
    file.write_text(as_jinja(own))
    assert "home" not in file.read_text()
    again = template_named(str(file))
    assert isinstance(again, Template)
    assert again == replace(own, name="own.yaml")
    assert as_jinja(again) == file.read_text()
    file.write_text(as_jinja(own).replace("A: ", "B: ", 1))  # changed by somebody
    assert isinstance(template_named(str(file)), JinjaTemplate)
