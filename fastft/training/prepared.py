"""What a run has before its first step: encoded examples, what makes batches of them, which form which step, and what
its evaluation reads."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastft.batches.batch import Batcher
from fastft.batches.plan import Cost, Mix, Packing, Plan, make_plan
from fastft.common.console import say, warn
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.common.options import Facts
from fastft.data.encode import EncodedSet
from fastft.data.sources import first_of_each
from fastft.engines.engine import AnyEngine
from fastft.model import ops
from fastft.model.gpt2 import GPT2Config
from fastft.model.precision import NARROW
from fastft.ranks.world import World
from fastft.run.config import TrainOptions, defaults_of
from fastft.run.data import Data
from fastft.training.book import BookMeans, BookOrder
from fastft.training.token_mean import TokenMean


@dataclass(frozen=True, slots=True)
class Prepared:
    """The data of a run, in all the forms in which training reads them.

    Attributes:
        data: the records and their splits.
        train_set, val_set: their examples as token ids.
        test_too_long: rows of the test split that do not fit the model's context.
        batcher: makes a batch of some examples.
        plan: which examples form which step.
        evaluation: when to evaluate, and on what.
        tokenizer_sha256: says what the ids mean.
        fingerprint: SHA-256 over the records of all splits, the examples made of them, and the tokenizer.
        seconds: that reading, splitting, encoding and planning took, at this start.
    """

    data: Data
    train_set: EncodedSet
    val_set: EncodedSet
    test_too_long: list[int]
    batcher: Batcher
    plan: Plan
    evaluation: TokenMean | BookMeans
    tokenizer_sha256: str
    fingerprint: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """What the run's data is, and all rows that something happened to, for `data.json`."""
        happened = {
            "train": asdict(self.train_set.report),
            "val": asdict(self.val_set.report),
            "test": {"longer_than_context": self.test_too_long},
        }
        return {
            **self.data.as_json(),
            "tokenizer_sha256": self.tokenizer_sha256,
            "template": self.data.template.description(),
            "audit": self.data.audit().as_json(),
            **self.data.places.called_in(happened),
            "seconds": self.seconds,
        }


def prepare(options: TrainOptions, data: Data, engine: AnyEngine) -> Prepared:
    """Encodes the data for the engine's model, and plans the run. All ranks call it.

    Raises:
        UserError: the data and the options do not fit each other or the model, or other ranks have other data.
    """
    began = time.perf_counter()
    world, config = engine.world, engine.model.config
    with world.together():
        train_set, val_set = data.encode("train", options, config), data.encode("val", options, config)
        too_long = data.longer_than(config, options)
        _warn_of_lengths(data, train_set, val_set, too_long, options.max_length, config.n_ctx)
        batcher = ops.batcher(
            engine.impl,
            engine.device,
            is_narrow=engine.dtype in NARROW,
            packed=options.batching == "packed",
            share_prefix=options.share_prefix,
        )
        order = _book_order(len(train_set), options)
        plan = _plan(train_set, order, _mix(data, train_set), options, _packing(train_set, options, world, config))
        evaluation = (
            _token_mean(data, val_set, batcher, options, world)
            if order is None
            else BookMeans(train_set, val_set, batcher, options.batch_size, order)
        )
        facts = Facts(plan.total_steps, len(val_set), world.size, engine.device.type)
        check_effects(options, facts, defaults=defaults_of(options))
    seconds = data.seconds + time.perf_counter() - began
    with world.together():
        tokenizer = config.tokenizer.fingerprint()
        parts = (data.fingerprint(), train_set.fingerprint(), val_set.fingerprint(), tokenizer)
        fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    _check_same_on_all_ranks(world, tokenizer, fingerprint, options)
    return Prepared(
        data, train_set, val_set, too_long, batcher, plan, evaluation, tokenizer, fingerprint, seconds
    )  # fmt: skip


def _warn_of_lengths(
    data: Data,
    train_set: EncodedSet,
    val_set: EncodedSet,
    test_too_long: list[int],
    max_length: int | None,
    n_ctx: int,
) -> None:
    if test_too_long:
        rows = data.places.said(test_too_long)
        warn(f"test: {len(test_too_long)} examples do not fit the context of {n_ctx} tokens: {rows}")
    for name, encoded in (("training", train_set), ("validation", val_set)):
        for line in data.places.lines(encoded.report, max_length or n_ctx):
            warn(f"{name}: {line}")


def _book_order(n: int, options: TrainOptions) -> BookOrder | None:
    """The book's order of the `n` training examples, where it is asked for."""
    if options.recipe != "book":
        return None
    per_epoch = n // options.batch_size
    epochs = options.epochs if options.steps is None else -(-options.steps // max(1, per_epoch))
    return BookOrder(
        n, batch_size=options.batch_size, epochs=max(1, epochs), seed=options.seed, eval_every=options.eval_every
    )


def _mix(data: Data, train_set: EncodedSet) -> Mix | None:
    """What the data's mix draws of the examples of its files, where it has one.

    Raises:
        UserError: a file has no example, or so little weight that an epoch has none of it.
    """
    if data.mix is None:
        return None
    names, n = data.places.names, len(data.mix)
    sizes = np.bincount(data.places.files(train_set.rows), minlength=n)[:n].tolist()
    mix = Mix(tuple(sizes), data.mix)
    for name, size, count in zip(names, sizes, mix.counts(), strict=False):
        if not size or not count:
            lack = "has no training example" if not size else f"would give none of the {sum(sizes)} of an epoch"
            raise UserError(f"got --mix with {name}, which {lack}; leave the file out, or give it more")
        say(f"mix: an epoch has {count} examples of {name}, which has {size}: {count / size:.2f} times each")
    return mix


def _plan(
    train_set: EncodedSet, order: BookOrder | None, mix: Mix | None, options: TrainOptions, packing: Packing
) -> Plan:
    return make_plan(
        train_set,
        batch_size=options.batch_size,
        epochs=options.epochs,
        steps=options.steps,
        accumulate=options.accumulate,
        seed=options.seed,
        drop_last=options.drop_last,
        bucketed=options.batching == "bucketed",
        packing=packing,
        epoch_order=order.epoch_order if order else None,
        mix=mix,
    )


def _packing(train_set: EncodedSet, options: TrainOptions, world: World, config: GPT2Config) -> Packing:
    cost = Cost.of_gpt2(config.n_layer, config.n_embd, config.vocab_size)
    if options.batching != "packed":
        return Packing(ranks=world.size, cost=cost)
    shared = train_set.common_prefix() if options.share_prefix else 0
    return Packing(pack_tokens=options.pack_tokens, shared=shared, ranks=world.size, cost=cost)


def _token_mean(data: Data, val_set: EncodedSet, batcher: Batcher, options: TrainOptions, world: World) -> TokenMean:
    packs, most = options.batching == "packed", options.eval_examples
    files = data.places.files(val_set.rows)
    sizes = np.bincount(files, minlength=len(data.sources)).tolist()
    begins = np.cumsum([0, *sizes[:-1]]).tolist()
    counts = sizes if most is None else first_of_each(sizes, most)
    examples = [np.arange(begin, begin + count) for begin, count in zip(begins, counts, strict=True)]
    return TokenMean(
        val_set,
        batcher,
        options.batch_size,
        options.eval_every,
        np.concatenate(examples),
        world,
        pack_tokens=options.pack_tokens if packs else None,
        shares_prefix=packs and options.share_prefix,
    )


def _check_same_on_all_ranks(world: World, tokenizer: str, fingerprint: str, options: TrainOptions) -> None:
    with world.together():
        odd = world.differing(tokenizer)
        if odd is not None:
            raise UserError(
                f"got another tokenizer on {odd} than on rank 0: what lies beside --weights {options.weights} is "
                "not the same on all machines; copy it, or put it on a file system that they share"
            )
    with world.together():
        odd = world.differing(fingerprint)
        if odd is not None:
            raise UserError(
                f"got other examples on {odd} than on rank 0: --data {' '.join(options.files)} is not the same file on "
                "all machines; copy it, or put it on a file system that they share"
            )
