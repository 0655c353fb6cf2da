"""The options of a training run, their checks, and the recipe of the book.

`TrainOptions` is both the command line of `fastft train` (an option for each field) and `config.yaml`.
"""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from fastft.common.errors import UserError
from fastft.common.keywords import Option, is_keyword
from fastft.common.nearest import did_you_mean
from fastft.common.options import check_values, names_checked, option, options_parser, plain_error, table
from fastft.common.version import __version__
from fastft.data.chat_template import template_named
from fastft.data.encode import TooLong
from fastft.data.formats import parse_fields
from fastft.data.prompts import Learn, TrainOn
from fastft.data.records import ROLES, EndOfTextInData, Format, ReadingRules, Role
from fastft.data.splits import Shares, shares_of
from fastft.model.lora_spec import LoRA, layers_named
from fastft.model.names import Device, DType
from fastft.run import needs

Schedule = Literal["constant", "cosine", "linear"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]

_LARGEST_SEED = (1 << 63) - 1
_MOST_THREADS = 4096
_LONGEST_S = 30 * 86400
_IF_CONSTANT = "where --schedule is constant"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The data."""

    data: str | list[str] = option("book", may_change=True)
    """A file (JSON, JSON lines, CSV, TSV, also as .gz or .zst; Parquet, Arrow), a folder of them, or hf:ID; `book`
    (downloaded once) or `sample` (embedded); or several of these. Of several each is split for itself, and their
    examples are trained on together."""
    val_data: str | None = option(None, may_change=True)
    """A file of validation records, of which --data then gives none."""
    test_data: str | None = option(None, may_change=True)
    """A file of test records, of which --data then gives none."""
    split: list[float] | None = option(None, needs=needs.A_PART_WITHOUT_A_FILE)
    """Shares of training, validation and test in each file of --data, such as 0.9,0.05,0.05. In the file training comes
    first, then test, then validation; counts are rounded down, and the last part has the rest. Not given: the book's
    0.85,0.05,0.10, where the share of a part with a file of its own falls to training."""
    split_seed: int | None = option(None, at_least=0, at_most=_LARGEST_SEED, needs=needs.A_PART_SPLIT_OFF)
    """Shuffle the records of each file before its split; not given: file order, as in the book."""

    @property
    def files(self) -> list[str]:
        """The files, or words, of `data`."""
        return self.data if isinstance(self.data, list) else [self.data]

    def inputs(self) -> list[tuple[Option, str]]:
        """All data that the run reads, by the option that names it."""
        given: list[tuple[Option, str | None]] = [("val_data", self.val_data), ("test_data", self.test_data)]
        return [*(("data", file) for file in self.files), *((flag, file) for flag, file in given if file is not None)]

    def check_data(self) -> None:
        """Refuses what names no files, and no shares of them.

        Raises:
            UserError: which it is.
        """
        for flag, file in self.inputs():
            if not file:
                raise UserError(f"got an empty --{flag}, expected a file or a word of its own; see --help")
        self.shares()

    def shares(self) -> Shares:
        """Of training, validation and test in each file of `data`."""
        return shares_of(self.split, val_file=self.val_data is not None, test_file=self.test_data is not None)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run."""

    model: str = "gpt2-medium"
    """gpt2, gpt2-medium, gpt2-large, gpt2-xl, nano or pico."""
    weights: str | None = None
    """Where to start from: none (random), a Hugging Face id or folder, or a .pth file in the book's layout.
    Not given: the published weights of GPT-2's sizes, random ones for nano and pico."""
    out: Path = option(Path("out/run"), may_change=True)
    """The folder of the run."""
    recipe: Literal["book"] | None = None
    """`book` reproduces chapter 7's run: its defaults, order of examples, evaluation cadence and averages."""


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """What is made of a record, and what of it is learned."""

    template: str = "alpaca"
    """The prompt template: alpaca, alpaca-two, phi3, chatml, llama3, vicuna or plain; a .yaml file of a template's
    fixed parts; or a .jinja file, or a tokenizer_config.json, with a chat template that has generation marks."""
    mask_prompt: bool = True
    """Supervise the response alone (header, output, end-of-text); false is --train_on all."""
    train_on: TrainOn | None = None
    """What is learned. responses: all turns of --train_roles; last: the last of them; all: everything, the prompt and
    the template's own text too. Not given: responses, or all where --mask_prompt is false."""
    train_roles: str = option("assistant", needs=needs.NOT_ALL)
    """Whose turns of a conversation are learned, by commas: assistant, user, system."""

    def learn(self) -> Learn:
        """Which parts of an example are learned."""
        roles = _named("train_roles", self.train_roles, "assistant,user")
        return Learn(self.train_on or ("responses" if self.mask_prompt else "all"), tuple(cast(list[Role], roles)))

    def check_learning(self) -> None:
        """Refuses options that contradict each other.

        Raises:
            UserError: they do.
        """
        if not Path(self.template).suffix:  # a file may have gone since: a run keeps what it was trained with
            template_named(self.template)
        if not self.mask_prompt and self.train_on not in (None, "all"):
            raise UserError(
                f"got --mask_prompt false, which is --train_on all, and --train_on {self.train_on}; expected one of "
                "them"
            )
        roles = self.learn().roles
        if odd := [role for role in roles if role not in ROLES]:
            raise UserError(f"got --train_roles {self.train_roles} ({odd[0]!r}), expected some of {', '.join(ROLES)}")
        if len(set(roles)) < len(roles):
            raise UserError(f"got --train_roles {self.train_roles}, expected each role once")


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """What is read of the data."""

    format: Format = "auto"
    """What a row's keys mean; auto: what they tell."""
    fields: str | None = None
    """Other names of keys, THEIRS=OURS: question=instruction,answer=output."""
    max_length: int | None = option(None, at_least=1)
    """The most input tokens of an example; the model's context where it is not given."""
    too_long: TooLong = "raise"
    """What happens to longer examples: raise, drop, or truncate (their end-of-text is then not learned)."""
    allow_empty_output: bool = False
    """Learn an empty output as a response of nothing; else such a record is malformed."""
    end_of_text_in_data: EndOfTextInData = "refuse"
    """What happens to the text <|endoftext|> in a record. refuse: at the very end of an output it is taken as the end,
    elsewhere the record is malformed; keep: it is learned as text."""
    skip_bad_records: bool = False
    """Leave malformed records out, naming them, rather than stop."""
    token_cache: str = option("auto", needs=needs.A_FILE, may_change=True)
    """Where the token ids of a large data file are kept, memory-mapped, so that memory does not grow with it.
    auto: for files from 32 MiB on, in $FASTFT_CACHE or ~/.cache/fastft; none; or a folder, for files of any size."""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Steps and their batches."""

    batching: Literal["padded", "bucketed", "packed"] = "packed"
    """packed: end to end, no padding, equal beginnings once; padded: rows of equal length; bucketed: padded, and
    examples of similar length form a step (which changes the mix of examples in a step)."""
    share_prefix: bool = option(True, needs=needs.PACKED)
    """Compute equal beginnings of a pack's examples once."""
    pack_tokens: int = option(16384, at_least=1, needs=needs.PACKED)
    """The most tokens of a pack; a step with more is cut into several, which changes nothing but its memory."""
    batch_size: int = option(8, at_least=1)
    """Examples in one optimizer step."""
    accumulate: int = option(1, at_least=1, needs=needs.AN_EXAMPLE_A_PASS)
    """The least number of forward and backward passes that one optimizer step is cut into, on each rank."""
    epochs: int = option(2, at_least=1, needs=needs.NO_STEPS, may_change=_IF_CONSTANT)
    """Passes over the training examples."""
    steps: int | None = option(None, at_least=0, may_change=_IF_CONSTANT)
    """Optimizer steps in all; overrides --epochs."""
    mix: list[float] | None = option(None, needs=(needs.SEVERAL_FILES, needs.NOT_THE_BOOKS_ORDER))
    """How many examples of each file of --data are drawn for those of the others, such as 2,1. An epoch is as long as
    without it, as many examples as all files have; of each file none comes again before all of it have come, over the
    epochs' ends. Not given: every example once an epoch."""
    drop_last: bool = False
    """Leave the last incomplete step of an epoch out."""
    seed: int = option(123, at_least=0, at_most=_LARGEST_SEED)
    """Random weights and the order of examples."""


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """Learning rate and update."""

    lr: float = 5e-5
    """Peak learning rate."""
    schedule: Schedule = "constant"
    """What the rate does after its warm-up; cosine and linear fall to zero."""
    warmup: int = option(0, at_least=0, needs=needs.MORE_STEPS)
    """Steps over which the rate climbs to its peak."""
    weight_decay: float = option(0.1, at_least=0)
    """AdamW's decoupled weight decay."""
    decay_all: bool = option(False, needs=needs.DECAY)
    """Decay biases, layer norms and embeddings too, as the book does; else weight matrices alone."""
    clip: float = option(1.0, at_least=0)
    """Largest global norm of the gradient; 0 clips nothing."""
    max_skipped: int = option(10, at_least=0, may_change=True)
    """Steps with a non-finite loss or gradient that are skipped before the run stops."""


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """Training a part of the weights."""

    lora_r: int | None = option(None, at_least=1)
    """The rank of low-rank adapters (LoRA), which are then trained in place of the weights. Not given: none."""
    lora_alpha: float | None = option(None, needs=needs.LORA)
    """An adapter's product counts alpha / r. Not given: twice --lora_r."""
    lora_targets: str = option("c_attn,c_proj,c_fc", needs=needs.LORA)
    """The matrices that have an adapter, by commas, named as PEFT does: c_attn, c_fc, c_proj (the attention's and the
    MLP's), or attn.c_proj, mlp.c_proj."""
    lora_layers: str = option("all", needs=needs.LORA)
    """The blocks whose matrices have one: all, or numbers and ranges by commas, such as 0,20-23."""
    lora_rslora: bool = option(False, needs=needs.LORA)
    """Count an adapter's product alpha / sqrt(r), so that high ranks do not learn more slowly (rsLoRA)."""
    lora_dora: bool = option(False, needs=needs.LORA)
    """Learn the lengths of a matrix's rows apart from their directions (DoRA)."""
    train_only: str | None = None
    """The weights that are trained, by commas: beginnings of their names, with ranges, such as h.20-23,ln_f; the others
    stay. Not given: all."""

    def lora(self) -> LoRA | None:
        """The adapters; None where there are none.

        Raises:
            UserError: a target, a layer or alpha is none.
        """
        if self.lora_r is None:
            return None
        return LoRA(
            r=self.lora_r,
            alpha=2.0 * self.lora_r if self.lora_alpha is None else self.lora_alpha,
            targets=tuple(_named("lora_targets", self.lora_targets, "c_attn,c_proj")),
            layers=layers_named(self.lora_layers),
            rslora=self.lora_rslora,
            dora=self.lora_dora,
        )

    @property
    def trains_a_part(self) -> bool:
        """Whether some of the weights stay as they are."""
        return self.lora_r is not None or self.train_only is not None

    def check_parts(self) -> None:
        """Refuses what names no adapters, and adapters beside a part of the weights.

        Raises:
            UserError: which it is.
        """
        if self.lora_r is not None and self.train_only is not None:
            raise UserError("got --lora_r and --train_only, which both say what is trained; expected one of them")
        if self.train_only == "":
            raise UserError("got an empty --train_only, expected names of weights, such as h.20-23,ln_f")
        if self.train_only is not None:
            _named("train_only", self.train_only, "h.20-23,ln_f")
        self.lora()


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Arithmetic and machine."""

    tie_head: bool = True
    """Read the head from the token embedding. The book trains it apart."""
    dtype: DType = "auto"
    """Arithmetic; weights and their update are fp32 under bf16 and fp16 too. auto: what the hardware does fast."""
    tf32: bool = option(False, needs=needs.CUDA)
    """Let a CUDA GPU round fp32 matrix products to TF32."""
    device: Device = option("auto", may_change=True)
    """Where to train."""
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto"
    """triton: the Triton kernels, on a GPU; cpu: C on a CPU, or torch; reference: no saving at all."""
    compile: bool = option(False, may_change=True)
    """Compile the model with torch.compile: a minute or more, and little gain over CUDA graphs."""
    cuda_graphs: bool | None = option(None, may_change=True)
    """Replay a step as CUDA graphs, which frees a GPU from waiting for the host; where it is not given: for packed
    batches on CUDA with the Triton kernels."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    threads: int | None = option(None, at_least=1, at_most=_MOST_THREADS, may_change=True)
    """CPU threads of torch; its own default where it is not given, shared by the ranks of a machine."""


@dataclass(frozen=True, kw_only=True)
class RanksOptions:
    """Several GPUs."""

    deepspeed_config: Path | None = option(None, may_change=True)
    """A DeepSpeed file, such as launch/zero2.json: how moments, gradients and weights are parted among the ranks.
    Not given: every rank holds the whole."""
    hang_timeout: float = option(1800.0, at_least=0, at_most=_LONGEST_S, needs=needs.RANKS, may_change=True)
    """Seconds without any progress after which all ranks write where they stand, and stop; 0: wait for ever."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Evaluation and checkpoints."""

    eval_every: int = option(50, at_least=0, needs=needs.VALIDATION_TO_EVALUATE)
    """Steps between evaluations on the validation split; 0 for none but the last."""
    eval_examples: int | None = option(None, at_least=1, needs=(needs.NOT_THE_BOOKS_BATCHES, needs.VALIDATION))
    """The most validation examples that an evaluation reads; all where it is not given."""
    samples: int = option(
        1, at_least=0, needs=(needs.NOT_THE_BOOKS_SAMPLE, needs.VALIDATION_TO_SAMPLE), may_change=True
    )
    """Validation prompts answered at each evaluation."""
    patience: int = option(0, at_least=0, needs=(needs.KEEPING_BEST, needs.EVALUATIONS))
    """Stop after this many evaluations without a better validation loss, and export the best weights, which may be
    those before training; 0: never."""
    save_every: int = option(0, at_least=0, may_change=True)
    """Steps between checkpoints; 0: one at each epoch's end. The last step always has one."""
    keep: int = option(2, at_least=1, may_change=True)
    """Checkpoints kept, the newest ones (of each kind)."""
    whole_every: int = option(0, at_least=0, may_change=True)
    """Under ZeRO a checkpoint is in shards, for the same number of ranks. Steps between whole ones, for any number:
    0 for one at the end, when stopped, and whenever a file named `save` appears in --out."""
    keep_best: bool = True
    """Also keep the weights with the best validation loss."""


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """This call."""

    resume: bool = option(False, may_change=True)
    """Go on from the newest whole checkpoint in --out."""
    overwrite: bool = option(False, may_change=True)
    """Replace the run that is in --out."""
    dry_run: bool = option(False, may_change=True)
    """Build everything, run the largest batch once, print the plan and stop."""
    ledger: bool = option(False, may_change=True)
    """Write each example's loss at each step to `ledger.jsonl`."""
    track: str | None = option(None, may_change=True, was="tensorboard")
    """Where the curves are to be seen too, by commas: tensorboard, wandb, mlflow, trackio, each an extra of fastft. A
    resumed run goes on with the same curves; a tracker that fails ends no training."""

    def trackers(self) -> list[Tracker]:
        """The trackers."""
        return [] if self.track is None else cast(list[Tracker], _named("track", self.track, "tensorboard,wandb"))

    def check_trackers(self) -> None:
        """Refuses names of no tracker.

        Raises:
            UserError: one is none, or stands twice.
        """
        known = get_args(Tracker)
        if odd := [name for name in self.trackers() if name not in known]:
            near = did_you_mean(odd[0], known)
            raise UserError(f"got --track {self.track} ({odd[0]!r}), expected some of {', '.join(known)}{near}")
        if len(set(self.trackers())) < len(self.trackers()):
            raise UserError(f"got --track {self.track}, expected each tracker once")


def _named(option: str, value: str, such_as: str) -> list[str]:
    """The names that an option gives by commas.

    Raises:
        UserError: there is none before, between or behind the commas.
    """
    names = value.replace(" ", "").split(",")
    if not value.strip():
        raise UserError(f"got --{option} {value!r}, expected names, such as {such_as}")
    if not all(names):
        raise UserError(f"got --{option} {value!r}, with a comma and no name beside it; expected such as {such_as}")
    return names


@names_checked
@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    CallOptions,
    EvaluationOptions,
    RanksOptions,
    MachineOptions,
    PartOptions,
    UpdateOptions,
    StepOptions,
    ReadingOptions,
    LearningOptions,
    RunOptions,
    DataOptions,
):
    """Everything that determines a training run."""

    def __post_init__(self) -> None:
        check_values(self)
        object.__setattr__(self, "out", Path(self.out))
        if self.deepspeed_config is not None:
            object.__setattr__(self, "deepspeed_config", Path(self.deepspeed_config))
        if not self.token_cache:
            raise UserError("got an empty --token_cache, expected auto, none or a folder")
        self.check_learning()
        self.check_parts()
        self.check_trackers()
        parse_fields(self.fields, self.format)
        if self.weights == "":
            raise UserError("got an empty --weights, expected a file, a folder or a word of its own; see --help")
        if self.out == Path():
            raise UserError("got an empty --out, expected a folder for the run")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"got --lr {self.lr}, expected a positive number")
        if self.resume and self.overwrite:
            raise UserError("got --resume and --overwrite; expected one of them")
        if self.recipe == "book" and not (self.drop_last and self.eval_every):
            raise UserError(
                f"got --drop_last {str(self.drop_last).lower()} and --eval_every {self.eval_every} with --recipe book, "
                "expected true and at least 1: both determine the book's order of examples"
            )
        self.check_data()
        self._check_mix()

    def _check_mix(self) -> None:
        mix, n = self.mix, len(self.files)
        if mix is None or n == 1:  # with one file it is refused with what can have no effect
            return
        if len(mix) != n or not all(0 < weight < float("inf") for weight in mix):
            written = ",".join(f"{weight:g}" for weight in mix)
            raise UserError(f"got --mix {written}, expected a number above 0 for each of the {n} files of --data")

    def reading_rules(self) -> ReadingRules:
        """What is a record of the data."""
        fields = parse_fields(self.fields, self.format)
        return ReadingRules(self.end_of_text_in_data, self.allow_empty_output, format=self.format, fields=fields)


BOOK_RECIPE: dict[str, Any] = {
    "data": "book",
    "model": "gpt2-medium",
    "template": "alpaca",
    "mask_prompt": False,
    "too_long": "truncate",
    "batching": "padded",
    "batch_size": 8,
    "epochs": 2,
    "drop_last": True,
    "seed": 123,
    "lr": 5e-5,
    "schedule": "constant",
    "weight_decay": 0.1,
    "decay_all": True,
    "clip": 0.0,
    "tie_head": False,
    "dtype": "fp32",
    "eval_every": 5,
    "keep_best": False,
}
"""What `--recipe book` sets where an option does not say otherwise (reference: chapter 7's scripts)."""

RECIPES: dict[str, dict[str, Any]] = {"book": BOOK_RECIPE}


def defaults_of(options: TrainOptions) -> dict[str, Any]:
    """The defaults that the recipe of a run sets in place of the options' own."""
    return RECIPES.get(options.recipe or "", {})


def recipe_options(recipe: Literal["book"], **overrides: Any) -> TrainOptions:
    """The options of a recipe, with `overrides` in place of some."""
    return TrainOptions(**{**RECIPES[recipe], "recipe": recipe, **overrides})


def changed_settings(saved: TrainOptions, now: TrainOptions) -> list[str]:
    """Settings in which a resumed run would compute something else: `lr: 5e-05 then, 0.001 now`.

    What it may change stands in the table of options. Data may lie elsewhere: its content is held against what the run
    was trained on.
    """
    before, after = _located(saved), _located(now)
    may_change = {one.name for one in table(TrainOptions) if one.may_change}
    if saved.schedule != "constant":  # where the rate goes to zero depends on them
        may_change -= {"epochs", "steps"}
    return [
        f"{name}: {before[name]} then, {after[name]} now"
        for name in before
        if name not in may_change and before[name] != after[name]
    ]


def _located(options: TrainOptions) -> dict[str, Any]:
    """The options, with files by their absolute paths: a run can be read from any folder."""
    values = asdict(options)
    if Path(options.template).suffix:
        values["template"] = _absolute(options.template)
    keywords: tuple[Option, ...] = ("data", "val_data", "test_data", "weights")
    for name in keywords:
        given = values[name]
        values[name] = [_absolute(one, name) for one in given] if isinstance(given, list) else _absolute(given, name)
    values["deepspeed_config"] = _absolute(values["deepspeed_config"])
    return values


def _absolute(path: str | Path | None, option: Option | None = None) -> str | Path | None:
    """The absolute path of what is there; anything else, and a keyword of the option, as it is."""
    if path is None or (option is not None and is_keyword(option, path)) or not Path(path).exists():
        return path
    return str(Path(path).resolve())


CONFIG_BEGINS = "# fastft "
"""The first line of what `to_yaml` makes goes on with the version."""


def to_yaml(options: TrainOptions) -> str:
    """The options as YAML that `--config` takes, with the versions that they ran with as comments."""
    versions = (
        f"{CONFIG_BEGINS}{__version__}, torch {importlib.metadata.version('torch')}, Python {platform.python_version()}"
    )
    return f"{versions}, {platform.platform()}\n" + yaml.safe_dump(settings_of(options), sort_keys=False)


def settings_of(options: TrainOptions) -> dict[str, Any]:
    """What the run is, by its options: values that YAML and JSON can say."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in _located(options).items()}
    for name in ("resume", "overwrite", "dry_run"):  # they say what one call does, not what the run is
        del values[name]
    return values


def from_yaml(path: Path) -> TrainOptions:
    """The options in a run's `config.yaml`.

    Raises:
        UserError: the file is missing or not what `to_yaml` writes.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; --run takes the folder that train wrote") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a run's configuration: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or "out" not in values:
        raise UserError(f"{path} is not a run's configuration: expected the options that fastft train writes")
    import jsonargparse

    try:
        given = options_parser(TrainOptions, prog="fastft train").parse_object(values).as_dict()
        return TrainOptions(**{f.name: given[f.name] for f in fields(TrainOptions)})
    except jsonargparse.ArgumentError as error:
        raise UserError(f"{path}: {plain_error(error, TrainOptions)}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
