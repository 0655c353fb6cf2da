"""What options of a run need to have an effect (see `fastft.common.options.Condition`)."""

from __future__ import annotations

from typing import Any

from fastft.common.options import Condition, Facts


def _has_validation(_: Any, facts: Facts) -> bool:
    return facts.val_examples != 0


def _evaluates(options: Any, facts: Facts) -> bool:
    return bool(options.eval_every > 0 and facts.val_examples != 0)


_VALIDATION = "a validation split that is not empty"


def _has_a_file(options: Any, _: Facts) -> bool:
    named = [*(options.data if isinstance(options.data, list) else [options.data]), options.val_data, options.test_data]
    return any(one not in (None, "sample") for one in named)


def _lacks_a_part(options: Any, _: Facts) -> bool:
    return options.val_data is None or options.test_data is None


def _splits_off(options: Any, facts: Facts) -> bool:
    return _lacks_a_part(options, facts) and (options.split is None or options.split[0] < 1)


A_FILE = Condition(_has_a_file, "a data file: the embedded records have no cache")
SEVERAL_FILES = Condition(lambda o, _: isinstance(o.data, list), "several files in --data")
A_PART_WITHOUT_A_FILE = Condition(
    _lacks_a_part, "a part to split off --data: --val_data and --test_data give both of them"
)
A_PART_SPLIT_OFF = Condition(_splits_off, "a part that is split off --data")
NOT_ALL = Condition(lambda o, _: o.learn().what != "all", "--train_on responses or last")
PACKED = Condition(lambda o, _: o.batching == "packed", "--batching packed")
AN_EXAMPLE_A_PASS = Condition(
    lambda o, _: o.accumulate <= o.batch_size, "as many examples in a step (--batch_size), at least one a pass"
)
NO_STEPS = Condition(lambda o, _: o.steps is None, "a run without --steps, which overrides it")
MORE_STEPS = Condition(
    lambda o, facts: facts.steps is None or o.warmup < facts.steps,
    "more steps than it has: the rate would never reach --lr",
)
LORA = Condition(lambda o, _: o.lora_r is not None, "adapters (--lora_r)")
DECAY = Condition(lambda o, _: o.weight_decay > 0, "a --weight_decay above 0")
CUDA = Condition(lambda _, facts: facts.device in (None, "cuda"), "a CUDA GPU", refused=False)
RANKS = Condition(lambda _, facts: facts.ranks != 1, "several ranks", refused=False)
VALIDATION = Condition(_has_validation, _VALIDATION, refused=False)
VALIDATION_TO_EVALUATE = Condition(
    lambda o, facts: o.eval_every == 0 or _has_validation(o, facts), _VALIDATION, refused=False
)
VALIDATION_TO_SAMPLE = Condition(
    lambda o, facts: o.samples == 0 or _has_validation(o, facts), _VALIDATION, refused=False
)
NOT_THE_BOOKS_ORDER = Condition(lambda o, _: o.recipe != "book", "another run than the book's, which has an order")
NOT_THE_BOOKS_BATCHES = Condition(
    lambda o, _: o.recipe != "book", "another run than the book's, which reads its first 5 batches"
)
NOT_THE_BOOKS_SAMPLE = Condition(
    lambda o, _: o.recipe != "book" or o.samples < 1, "another run than the book's, which answers one"
)
KEEPING_BEST = Condition(lambda o, _: o.keep_best, "--keep_best true: early stopping exports the best")
EVALUATIONS = Condition(_evaluates, "evaluations: --eval_every of at least 1, and a validation split that is not empty")
