"""How a model is asked, and what: the options of `generate` and `chat`.

No torch is imported for them: `--help` does not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from fastft.common.errors import UserError
from fastft.common.options import Condition, check_values, names_checked, option
from fastft.common.shell import command
from fastft.data.chat_template import AnyTemplate
from fastft.model.names import Device
from fastft.run.decodings import check_name
from fastft.run.folder import Run
from fastft.run.given import template_for

if TYPE_CHECKING:  # it imports torch
    from fastft.decoding.sampling import Sampling

_SEVERAL = Condition(
    lambda o, _: o.top_k != 1, "more than the one most likely token to draw from: another --top_k than 1"
)
_A_MODEL = Condition(lambda o, _: o.model is not None, "a --model: a run has its own")
_OF_A_SPLIT = Condition(
    lambda o, _: o.of_a_split, "the answers of a split: no --prompt, no --prompts, no --conversation"
)
_OF_DATA = Condition(
    lambda o, _: o.of_a_split or (o.conversation is not None and o.model is not None),
    "the answers of a split, or a --model that becomes a run: no --prompt, no --prompts",
)
_OF_A_RUN = Condition(
    lambda o, _: o.of_a_run,
    "answers that are a run's, which lie in its folder: no --prompt, no --prompts",
)
_MORE_THAN_ONE = Condition(lambda o, _: o.prompt is None, "several questions: no --prompt")
_SOMEWHERE = Condition(
    lambda o, _: o.prompts is not None or (o.model is not None and o.prompt is None),
    "--prompts, or a --model with --data",
)
_DRAWING = Condition(lambda o, _: o.temperature > 0, "a --temperature above 0: else the most likely token is taken")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How a run's model answers."""

    run: Path | None = None
    """The folder of a trained run."""
    model: str | None = None
    """Another model in its place: a run, its `model` or one of its `checkpoints`, a Hugging Face folder or id, or a
    .pth."""
    adapter: str | None = option(None, needs=_A_MODEL)
    """A folder or id of an adapter in PEFT's layout, of which --model is the base. Where it names its base itself,
    --model ADAPTER is enough."""
    template: str | None = option(None, needs=_A_MODEL)
    """The template that a --model is asked by; not given: its run's, or the chat template beside it or its
    --adapter, or alpaca."""
    max_new_tokens: int = option(256, at_least=1)
    """The most tokens of a response."""
    temperature: float = option(0.0, needs=_SEVERAL)
    """The logits' divisor; 0 takes the most likely token."""
    top_k: int = option(0, needs=_DRAWING)
    """Draw from so many most likely tokens; 0: from all."""
    top_p: float = option(1.0, needs=_DRAWING)
    """Draw from the fewest most likely tokens that are so probable together; 1: from all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that are there already; 1 changes nothing."""
    seed: int = option(123, needs=_DRAWING)
    """Of the random numbers, where the temperature is not 0; each answer has its own."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic: fp32 gives the text of the book's loop; bf16 is faster where the processor has it."""
    device: Device = "auto"
    """Where to generate."""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.model is None):
            both = "both" if self.run is not None else "neither"
            raise UserError(f"got {both} of --run and --model, expected one: a run's folder, or another model")
        check_values(self)
        _ = self.sampling  # refuses values that mean nothing

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen."""
        from fastft.decoding.sampling import Sampling  # torch, which the parser and `--help` do not wait for

        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )

    def asked_by(self) -> AnyTemplate:
        """The template of the prompts."""
        return self.of_run().template() if self.tuned is None else template_for(self.tuned, self.template)

    @property
    def tuned(self) -> str | None:
        """What was trained last of a --model, with its template and its run beside it: its adapter, or itself."""
        return self.adapter or self.model

    def of_run(self) -> Run:
        """The run, which is there and has a model.

        Raises:
            UserError: it is not, or has none.
        """
        run = Run(cast(Path, self.run))
        run.options()  # that there is a run is said first
        _check_model(run)
        return run


@names_checked
@dataclass(frozen=True, kw_only=True)
class GenerateOptions(AnswerOptions):
    """What is answered."""

    prompt: str | None = None
    """An instruction of your own: its answer is printed, and nothing is written."""
    prompts: str | None = None
    """A file of questions, in any format that --data reads, answers need not be there; or -, for JSON lines or plain
    lines on standard input. The answers are printed as JSON lines, or written to --out."""
    conversation: str | None = None
    """Conversations to have, each turn with the model's own earlier answers: a file whose rows have `turns`, the user's
    texts, and perhaps `reference` and `category`, or sample, 20 embedded ones of two turns. Writes conversations.json,
    which score judges turn by turn."""
    out: Path | None = option(None, needs=_SOMEWHERE)
    """Of --prompts: the file for the answers. Of a --model with --data: the folder of the run that is made of it, which
    `score`, `compare` and `report` take, as the baseline."""
    split: Literal["test", "val", "train"] = option("test", needs=_OF_A_SPLIT)
    """Which records to answer."""
    name: str | None = option(None, needs=_OF_A_RUN)
    """What the answers are called, so that several ways of decoding stand beside each other: --name t1.0 writes
    responses.t1.0.json, which score, compare and report take by the same name."""
    overwrite: bool = option(False, needs=_OF_A_RUN)
    """Replace answers that were made with other settings. Without it, or a --name of their own, the call stops."""
    limit: int | None = option(None, at_least=1, needs=_MORE_THAN_ONE)
    """Answer only so many records."""
    data: str | list[str] | None = option(None, needs=_OF_DATA)
    """Of a --model: the data whose split is answered. Of a run: where its data file is now, if it has been moved or
    renamed: its records must be the same; of a run with several, the files of its --data in their order, and perhaps
    those of its --val_data and --test_data after them."""
    batch_size: int = option(64, at_least=1)
    """The most prompts answered at a time: one that ends makes room for the next."""
    too_long: Literal["leave_out", "raise"] = "leave_out"
    """What happens where a prompt fills the context: its entry is kept with an empty response and the reason, or the
    call stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name)
        given = [f"--{one}" for one in ("prompt", "prompts", "conversation") if getattr(self, one) is not None]
        if len(given) > 1:
            raise UserError(f"got {' and '.join(given)}, expected one of them")
        if self.model is not None and self.of_a_run and (self.data is None or self.out is None):
            raise UserError(
                "got --model without --prompt, --prompts, or --data and --out; expected a question, or data whose test "
                "split is answered and a folder for the answers"
            )

    @property
    def of_a_split(self) -> bool:
        """Whether a split's records are answered."""
        return self.of_a_run and self.conversation is None

    @property
    def of_a_run(self) -> bool:
        """Whether the answers are a run's, and lie in its folder."""
        return self.prompt is None and self.prompts is None

    def folder(self) -> Run:
        """The run whose split is answered."""
        return Run(cast(Path, self.run if self.model is None else self.out))

    def path(self) -> Path:
        """The file of a split's answers, or of the conversations."""
        if self.conversation is not None:
            return self.folder().conversations(self.name)
        return self.folder().responses_of(self.split, self.name)


@names_checked
@dataclass(frozen=True, kw_only=True)
class ChatOptions(AnswerOptions):
    """The options of `fastft chat`: those of answering."""

    remember: bool | None = None
    """Whether earlier questions and answers go along with each; not given: under templates of conversations (chatml,
    llama3, vicuna, Jinja programs). What the context has no room for is forgotten, the oldest first."""


def _check_model(run: Run) -> None:
    if not (run.weights).is_file():
        raise UserError(
            f"no model in {run.folder}: expected {run.weights}; "
            f"finish the run with `{command('train', resume=True, out=run.folder)}`"
        )
