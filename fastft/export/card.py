"""The model card: what the files of a run say of it, for people who are given the model. What is not known is said.

Paths are cut to their last part: where a file lay on somebody's disk is nobody else's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from fastft.common import files
from fastft.common.keywords import is_keyword
from fastft.data.chat_template import AnyTemplate
from fastft.export.base import Base, base_of
from fastft.model.peft_reading import Adapter
from fastft.reports.figures import RunFigures, read_run
from fastft.run.config import TrainOptions
from fastft.run.decodings import decoding_of, made_from
from fastft.run.folder import Run
from fastft.scores.conversations import talks_in_words

_MOST_ROWS = 20
_ALWAYS_TOLD = ("model", "template", "batch_size", "epochs", "steps", "lr", "schedule", "seed", "dtype")
_OF_A_CALL = {"out", "resume", "overwrite", "dry_run", "token_cache", "threads", "device", "track", "ledger"}
_SCORES = (
    ("exact match, %", "exact_match"),
    ("BLEU, %", "bleu"),
    ("chrF, %", "chrf"),
    ("ROUGE-L F1, %", "rouge_l"),
    ("judge's mean, 0 to 100", "judge_mean"),
    ("perplexity of the references", "perplexity"),
)


def model_card(
    run: Run, template: AnyTemplate, weights_sha256: str, n_ctx: int, adapter: Adapter | None = None, *,
    merged: bool = True,
) -> str:  # fmt: skip
    """The text of a model card, with its head of YAML.

    Args:
        run: that is exported.
        template: of its prompts.
        weights_sha256: of the run's own `model.safetensors` or adapter, which its scores are held against.
        n_ctx: the model's context.
        adapter: that the run trained; None where it trained the weights themselves.
        merged: whether the weights are the model's with the adapter in them.
    """
    options, figures = run.options(), read_run(run.folder)
    base = base_of(options, files.object_or_empty(run.data).get("began_with"))
    parts = [
        _head(base, options, is_adapter=not merged),
        f"# {figures.name}\n\n{_first_words(base, options, adapter, merged=merged)} Its context is {n_ctx} tokens.",
        "## Asking it\n\n" + _asking(template, None if merged else adapter),
        "## Base\n\n" + _base(base, adapter),
        "## Data\n\n" + _data(run, options),
        "## Training\n\n" + _training(figures, options),
        "\n\n".join(["## Scores", _scores(run, figures, weights_sha256), *_named(run, weights_sha256)]),
        "## Limits\n\nNothing was measured but what stands above: not its truthfulness, not its safety, not what it "
        "does in other languages or on other tasks than its data's.",
    ]
    return "\n\n".join(parts) + "\n"


def _first_words(base: Base, options: TrainOptions, adapter: Adapter | None, *, merged: bool) -> str:
    if adapter is not None and not merged:
        made = "not tuned: no step was trained" if options.steps == 0 else "instruction-tuned with fastft"
        return f"An adapter (LoRA) of {base.what}, {made}; it is no model without that base."
    by = "" if adapter is None else " by adapters (LoRA), which are merged into it"
    return f"A GPT-2, {_made(options)} {base.what}{by}."


def _made(options: TrainOptions) -> str:
    if options.steps == 0:
        return "not tuned: no step was trained, and its weights are those that it began with,"
    return "instruction-tuned with fastft from"


def _head(base: Base, options: TrainOptions, *, is_adapter: bool) -> str:
    tags = ["gpt2", *([] if options.steps == 0 else ["instruction-tuning"]), "fastft"]
    said: dict[str, Any] = {
        **({"license": base.licence} if base.licence else {}),
        **({"base_model": base.hub_id} if base.hub_id else {}),
        "library_name": "peft" if is_adapter else "transformers", "pipeline_tag": "text-generation",
        "tags": [*tags, *(["lora"] if is_adapter else [])],
    }  # fmt: skip
    return f"---\n{yaml.safe_dump(said, sort_keys=False)}---"


def _asking(template: AnyTemplate, adapter: Adapter | None) -> str:
    prompt = template.prompt("Name the plural of goose.")
    code = (
        f"{_loading(adapter)}"
        'messages = [{"role": "user", "content": "Name the plural of goose."}]\n'
        "ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt')\n"
        "answer = model.generate(**ids, max_new_tokens=256, do_sample=False)\n"
        "print(tokenizer.decode(answer[0, ids['input_ids'].shape[1]:], skip_special_tokens=True))"
    )
    header = template.response_header.strip()
    begins = f" The model begins its answer with `{header}`, which is to be left out." if header else ""
    return (
        f"Prompts are written by the template `{Path(template.name).name}`, which is in `chat_template.jinja`.{begins}"
        f"\n\n```python\n{code}\n```\n\nThe prompt of this question:\n\n````text\n{prompt}\n````"
    )


def _loading(adapter: Adapter | None) -> str:
    if adapter is None:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
            "model = AutoModelForCausalLM.from_pretrained(FOLDER)\n"
        )
    rows = max((max(rows) + 1 for rows, _ in adapter.rows.values()), default=0)
    # While they are one, PEFT gives the head the embedding's rows.
    untied = (
        "model.config.tie_word_embeddings = False\n"
        "model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())\n"
    )
    return (
        ("import torch\n" if adapter.unties else "") + "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
        "model = AutoModelForCausalLM.from_pretrained(BASE)\n"
        + (untied if adapter.unties else "")
        + (f"model.resize_token_embeddings({rows})\n" if rows else "")
        + "model = PeftModel.from_pretrained(model, FOLDER)\n"
    )


def _base(base: Base, adapter: Adapter | None) -> str:
    lines = [f"It began with {base.what}."]
    if base.what.startswith("random"):
        return lines[0] + " There is no base model, and no licence of one."
    lines += [f"- `{name}`: SHA-256 `{digest}`" for name, digest in base.hashes.items()]
    if base.recorded:
        lines.append("\nThe run wrote the hashes down when it began.")
    elif base.hashes:
        lines.append("\nThe hashes are of the files as they were at the export; the run has not written down its own.")
    else:
        lines.append("Which revision it was, and the hash of its files, are not known.")
    if adapter is not None and adapter.base_sha256 is not None:
        lines.append(f"\nSHA-256 over the base's weights in float32, as fastft holds against: `{adapter.base_sha256}`.")
    known = f"The licence of the base is `{base.licence}`." if base.licence else "The licence of the base is not known."
    return "\n".join([*lines, known])


def _data(run: Run, options: TrainOptions) -> str:
    said = files.object_or_empty(run.data)
    held = said.get("files")
    rows = [
        [_source(str(one.get("source"))), *(one.get(name) for name in ("records", "train", "val", "test"))]
        for one in (held if isinstance(held, list) else [])
        if isinstance(one, dict)
    ]
    parts = [_table(("file", "records", "training", "validation", "test"), rows)] if rows else []
    hashes = dict(_hashes_of(options))
    parts.append("\n".join(f"- `{name}`: {digest}" for name, digest in hashes.items()))
    split = said.get("split_sha256")
    parts.append(
        f"SHA-256 of all records and their split, as they were trained on: `{split}`." if split
        else "The run has not written down a hash of its records."
    )  # fmt: skip
    if left_out := said.get("left_out"):
        parts.append(f"{len(left_out)} malformed records were left out.")
    parts.append("The licence of the data is not known to fastft.")
    return "\n\n".join(parts)


def _source(given: str) -> str:
    return given if given.startswith("hf:") else Path(given).name


def _hashes_of(options: TrainOptions) -> Iterator[tuple[str, str]]:
    for flag, source in options.inputs():
        path = Path(source)
        if is_keyword(flag, source) or source.startswith("hf:"):
            yield source, "a word of fastft's own for data that it brings or fetches"
        elif path.is_file():
            yield path.name, f"SHA-256 `{files.identity(path)['sha256']}`, as it was at the export"
        else:
            yield path.name, "a folder" if path.is_dir() else "not there any more at the export; its hash is not known"


def _training(figures: RunFigures, options: TrainOptions) -> str:
    usual = asdict(TrainOptions())
    chosen = {
        name: _public(value)
        for name, value in asdict(options).items()
        if name not in _OF_A_CALL and (name in _ALWAYS_TOLD or value != usual[name])
    }
    made_with = ", ".join(figures.made_with.split(", ")[:3]) or "versions that are not known"
    recipe = f"the recipe `{options.recipe}`" if options.recipe else "no recipe"
    parts = [
        f"Made with {made_with}, by {recipe}. Options that are not at their defaults, and the most important ones:",
        f"```yaml\n{yaml.safe_dump(chosen, sort_keys=False)}```",
    ]
    rows = list(_curve(figures.curves))
    parts.append(_table(("step", "training loss", "validation loss"), rows) if rows else "No losses were written down.")
    if rows:
        parts.append("The training loss is the mean over the steps since the row above.")
    return "\n\n".join(parts)


def _public(value: Any) -> Any:
    if isinstance(value, list):
        return [_public(one) for one in value]
    if isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute()):
        return Path(value).name
    return value


def _curve(curves: Mapping[str, tuple[list[float], list[float]]]) -> Iterator[list[Any]]:
    """Steps, with the mean training loss since the last one told, and the validation loss."""
    steps, losses = curves.get("loss", ([], []))
    measured = dict(zip(*curves.get("val_loss", ([], [])), strict=True))
    told = sorted(measured) or steps
    if len(told) > _MOST_ROWS:
        told = [told[round(n * (len(told) - 1) / (_MOST_ROWS - 1))] for n in range(_MOST_ROWS)]
    before = float("-inf")
    for step in told:
        since = [loss for at, loss in zip(steps, losses, strict=True) if before < at <= step]
        yield [int(step), f"{fmean(since):.4f}" if since else "", f"{measured[step]:.4f}" if step in measured else ""]
        before = step


def _scores(run: Run, figures: RunFigures, weights_sha256: str) -> str:
    summary = figures.summary
    if summary is None:
        return "None were measured."
    if figures.scores_problem is not None:
        return "There are none of the model's present answers: they have changed since they were scored."
    parts = [*_of_responses(run, figures, weights_sha256), *_of_talks(run, figures, weights_sha256)]
    return "\n\n".join(parts)


def _of_talks(run: Run, figures: RunFigures, weights_sha256: str) -> Iterator[str]:
    """What is said of the conversations that these weights have had."""
    talks = run.conversations(figures.responses_name)
    had_by = files.object_or_empty(made_from(talks)).get("weights_sha256")
    if figures.conversations is not None and had_by == weights_sha256:
        judge = figures.conversations.get("judge") or {}
        judged = f" The judge was `{judge.get('name')}`." if figures.conversations["judge_mean"] is not None else ""
        yield f"Of conversations, turn by turn: {talks_in_words(figures.conversations)}.{judged}"


def _of_responses(run: Run, figures: RunFigures, weights_sha256: str) -> Iterator[str]:
    summary = figures.summary or {}
    if not summary.get("n"):
        return
    answers = run.responses_of("test", figures.responses_name)
    answered_by = files.object_or_empty(made_from(answers)).get("weights_sha256")
    if answered_by != weights_sha256:
        yield "There are none that are known to be these weights': the answers that were scored are of others."
        return
    rows = [
        [title, f"{value:.2f}", _interval(figures.intervals.get(name))]
        for title, name in _SCORES
        if isinstance(value := summary.get(name), int | float)
    ]
    judge = summary.get("judge") or {}
    judged = f" The judge was `{judge.get('name')}`." if summary.get("judge_mean") is not None else ""
    yield f"Over {summary.get('n')} test records.{judged}\n\n" + _table(("score", "value", "95% interval"), rows)


def _named(run: Run, weights_sha256: str) -> Iterator[str]:
    """The scores of responses that have a name, each with how they were decoded."""
    for path in sorted(run.folder.glob("scores.*.json")):
        name = path.name.removeprefix("scores.").removesuffix(".json")
        if run.responses_of("test", name).is_file():
            decoding = decoding_of(run.responses_of("test", name)) or {}
            how = ", ".join(f"{key} {value}" for key, value in decoding.items()) or "nothing says how they were decoded"
            said = _scores(run, read_run(run.folder, name), weights_sha256)
            yield f"### Responses {name}\n\n{how[:1].upper()}{how[1:]}.\n\n{said}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
