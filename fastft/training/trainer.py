"""Training: the loop, and what happens around it.

`Trainer.run_all` is a run from its first to its last step. Everything that a step does to the model is in `engine.py`
and `zero.py`; which examples it takes, in `plan.py`; here they are put together with evaluation, samples, checkpoints
and the metrics file. Several ranks run the same loop: what depends on one of them, they tell each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastft import scaling
from fastft.batches.batch import Batch
from fastft.batches.plan import Cost, Indices, Packing, Plan, Step, make_plan
from fastft.common import files
from fastft.common.console import meter, say, show, silenced, warn
from fastft.common.effects import check_effects
from fastft.common.errors import FastftError, TrainingError, UserError
from fastft.common.keywords import hidden_path, is_keyword
from fastft.common.lock import refuse_if_held, writing
from fastft.common.memory import peak_memory
from fastft.common.options import Facts
from fastft.data.encode import name_rows
from fastft.data.records import Record
from fastft.data.tokenizer import Tokenizer, gpt2_tokenizer
from fastft.decoding.decode import NO_STOP, greedy
from fastft.engines.engine import AnyEngine, Engine, Update
from fastft.engines.gpu_engine import GpuEngine
from fastft.engines.optim import learning_rate
from fastft.engines.zero import ZeroEngine
from fastft.engines.zero_config import read_zero_config
from fastft.model import ops
from fastft.model.gpt2 import GPT2, SIZES, config_for, number_of_parameters
from fastft.model.precision import choose_device, choose_dtype
from fastft.model.weights import config_of, load, save_hf, write_tokenizer
from fastft.ranks.stopping import StopRequest, save_is_asked, stop_requests
from fastft.ranks.watch import Stragglers, Watchdog
from fastft.ranks.world import World, joined, world_of
from fastft.run.config import TrainOptions, changed_settings, defaults_of, to_yaml
from fastft.run.data import Data, load_data, warn_of_data
from fastft.run.folder import Run
from fastft.run.log import Log, summary_writer, writers
from fastft.run.metrics_file import MetricsFile
from fastft.run.trained import check_same_data, check_same_tokenizer
from fastft.training.ahead import ahead
from fastft.training.book import SAMPLE_TOKENS, BookMeans, BookOrder
from fastft.training.checkpoint import (
    Progress,
    Shards,
    load_best,
    load_checkpoint,
    prune,
    resumable,
    save_best,
    save_checkpoint,
    shape_of,
)
from fastft.training.evaluate import TokenMean

_GIB = 1 << 30
_DRY_RUN_STEPS = 200
_MEETING_MARGIN_S = 60.0
_FOR_EVER_S = 30 * 86400.0
_STEPS_AHEAD = 2
"""Steps whose batches are made ahead of a GPU."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `train` ended."""

    run: Run
    progress: Progress
    interrupted_by: signal.Signals | None = None
    """The signal that asked it to stop before its end; the run can be resumed."""


def train(options: TrainOptions, *, stop_after: int | None = None) -> Outcome:
    """Trains as the options say and leaves the run's folder (see `fastft.run.folder.Run`).

    Started by torchrun, deepspeed or srun, every rank calls it: together they train what one process would.

    Args:
        options: of the run.
        stop_after: stop when so many steps are done, as SIGTERM would; the run can be resumed.

    Raises:
        UserError: an option, the data, the weights or the folder is wrong; nothing in the folder has been changed.
        TrainingError: too many steps had a non-finite loss or gradient; a checkpoint has been saved.
        LostRank: another rank has gone away.
    """
    device = choose_device(options.device, world_of(os.environ).local_rank)
    timeout_s = options.hang_timeout + _MEETING_MARGIN_S if options.hang_timeout else _FOR_EVER_S
    with joined(device, timeout_s=timeout_s) as world, silenced(not world.is_first):
        _set_threads(options.threads, world, device)
        run = Run(options.out)
        with world.together():
            options = _settled(options, run)
            if world.is_first and not options.dry_run:
                refuse_if_held(run.folder)  # before anything is loaded beside a run that trains; it is taken later
            data = load_data(options, _tokenizer_to_be(options, run))
            model = _model_to_go_on(options, run) or initial_model(options)
            if options.resume:
                check_same_tokenizer(run, model.config.tokenizer)
        if data.bad:
            warn(f"left out, and listed in {run.data}: {data.describe_bad()}")
        warn_of_data(options, data)
        with Watchdog(world, run.hangs, options.hang_timeout).watching() as watchdog:
            trainer = Trainer(run, options, data, make_engine(model, options, world), watchdog=watchdog)
            if options.dry_run:
                trainer.dry_run()
                return Outcome(run, trainer.progress)
            return trainer.run_all(stop_after)


def make_engine(model: GPT2, options: TrainOptions, world: World) -> AnyEngine:
    """The engine that the options ask for; all ranks call it.

    Raises:
        UserError: the options and DeepSpeed's file disagree, or DeepSpeed refuses the file.
    """
    with world.together():
        device = choose_device(options.device, world.local_rank)
        path = options.deepspeed_config
        config = None if path is None else read_zero_config(path, options, world.size)
        dtype = (config and config.dtype) or choose_dtype(options.dtype, device)
        if config is not None:
            config.check_dtype(dtype)
        if options.compile and ops.resolve(options.impl, device) == "cpu":
            raise UserError(
                "got --compile true with the torch path (--impl cpu, or auto without a GPU for the kernels), which "
                "cannot be compiled: each batch has tiles of its own; leave --compile out"
            )
    with world.together():
        odd = world.differing(dtype)  # what `auto` takes depends on the machine
        if odd is not None:
            raise UserError(f"got --dtype {options.dtype}, which is not the same on {odd} as on rank 0; say which one")
    with world.together():
        if config is not None and config.stage > 0:
            return ZeroEngine(model, options, world, config, dtype)
        if config is not None and config.unused:
            warn(f"{config.path}: stage 0 trains without DeepSpeed, and does not read {', '.join(config.unused)}")
        engine = GpuEngine if device.type == "cuda" else Engine
        return engine(model, replace(options, dtype=dtype), world)


@dataclass(frozen=True, slots=True)
class _Built:
    """A step, and its batches of this rank."""

    step: Step
    batches: list[Batch]
    seconds: float
    """That building them took."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step that the device has been asked for.

    Attributes:
        built: the step.
        row_losses: of each batch the loss of each row, which is there when `update` has given its result.
        lr: its learning rate.
        update: gives the result, and waits for it.
        at: when it was begun, on the clock of `time.perf_counter`.
    """

    built: _Built
    row_losses: list[Tensor]
    lr: float
    update: Callable[[], Update]
    at: float

    def example_losses(self) -> list[Tensor]:
        """Of each batch the sum of each example's losses, `[examples]`."""
        return [
            batch.example_losses(losses.cpu())
            for batch, losses in zip(self.built.batches, self.row_losses, strict=True)
        ]


class Trainer:
    """A run: its plan, its engine, its progress."""

    def __init__(
        self, run: Run, options: TrainOptions, data: Data, engine: AnyEngine, *, watchdog: Watchdog | None = None
    ) -> None:
        self.run = run
        self.options = options
        self.data = data
        self.engine = engine
        self.world = engine.world
        self._watchdog = watchdog or Watchdog(self.world, run.hangs, 0)
        self._stragglers = Stragglers(self.world, engine.device)
        self._shards = Shards(run.checkpoints, engine, keep=options.keep) if isinstance(engine, ZeroEngine) else None
        began = time.perf_counter()
        with self.world.together():
            config = engine.model.config
            n_ctx = config.n_ctx
            self.train_set = data.encode("train", options, config)
            self.val_set = data.encode("val", options, config)
            self._test_too_long = data.longer_than(config, options)
            if self._test_too_long:
                rows = name_rows(self._test_too_long)
                warn(f"test: {len(self._test_too_long)} examples do not fit the context of {n_ctx} tokens: {rows}")
            for name, encoded in (("training", self.train_set), ("validation", self.val_set)):
                for line in encoded.report.lines(options.max_length or n_ctx):
                    warn(f"{name}: {line}")
            self.batcher = ops.batcher(
                engine.impl,
                engine.device,
                packed=options.batching == "packed",
                share_prefix=options.share_prefix,
            )
            self.plan, self.evaluation = self._plan()
            facts = Facts(self.plan.total_steps, len(self.val_set), self.world.size, engine.device.type)
            check_effects(options, facts, defaults=defaults_of(options))
        self._data_seconds = data.seconds + time.perf_counter() - began
        self._ledger: MetricsFile | None = None
        self._trouble: FastftError | None = None
        self._save_is_asked = False
        self._last_straw: dict[str, Any] | None = None
        """The line of the step with which too many were skipped."""
        self._ended_at = 0.0
        """When the last step ended, or what was done behind it."""
        self._ahead = _STEPS_AHEAD if engine.device.type == "cuda" else 0
        with self.world.together():
            self.progress = Progress(data_fingerprint=self._fingerprint())
        with self.world.together():
            odd = self.world.differing(self.engine.model.config.tokenizer.fingerprint())
            if odd is not None:
                raise UserError(
                    f"got another tokenizer on {odd} than on rank 0: what lies beside --weights {options.weights} is "
                    "not the same on all machines; copy it, or put it on a file system that they share"
                )
        with self.world.together():
            odd = self.world.differing(self.progress.data_fingerprint)
            if odd is not None:
                raise UserError(
                    f"got other examples on {odd} than on rank 0: --data {options.data} is not the same file on all "
                    "machines; copy it, or put it on a file system that they share"
                )

    def run_all(self, stop_after: int | None = None) -> Outcome:
        """Resumes or begins, trains, and exports the result; stops early when `stop_after` steps are done."""
        with contextlib.ExitStack() as stack:
            with self.world.together():
                if self.world.is_first:
                    stack.enter_context(writing(files.make_folder(self.run.folder)))
                    self._prepare()
            self._resume()
            stop = self._train(stop_after)
            if stop is not None:
                return Outcome(self.run, self.progress, stop)
            self._finish()
        return Outcome(self.run, self.progress)

    def _prepare(self) -> None:
        """Makes the folder ready for this run's files."""
        _check_folder(self.run, self.options)  # again: another process may have been here in the meantime
        if self.options.overwrite:
            self.run.clear()
        self.run.remove_leftovers()
        files.make_folder(self.run.checkpoints)

    def _train(self, stop_after: int | None) -> signal.Signals | None:
        """Trains to the end, or to a signal that asks to stop, which is given back when all is saved."""
        with contextlib.ExitStack() as stack:
            with self.world.together():
                log = stack.enter_context(self._opened()) if self.world.is_first else None
            self._say_hello()
            stop = stack.enter_context(stop_requests(self.world))
            self._loop(log, stop, stop_after)
            if stop.signal is None or not self._leaves(stop):
                return None
            self._save_to_stop()  # here, where a launcher's second SIGTERM does nothing
            say(f"stopped by {stop.signal.name} at step {self.progress.step}, saved; go on with --resume")
            return stop.signal

    @contextmanager
    def _opened(self) -> Iterator[Log]:
        """The files that the first rank writes while training."""
        files.write_text(self.run.config, to_yaml(replace(self.options, dtype=self.engine.dtype)))
        files.write_json(self.run.data, self._data_seen())
        if self.engine.model.config.tokenizer is not gpt2_tokenizer():
            write_tokenizer(self.engine.model.config, self.run.tokenizer)
        keeps = self._is_evaluated() or not self._evaluates(self.progress.step)  # else it is done, and written, again
        metrics = MetricsFile(self.run.metrics, resume_at=self.progress.step, evaluated=keeps)
        if self.options.ledger:
            self._ledger = MetricsFile(self.run.ledger, resume_at=self.progress.step)
        with writers(self.run, metrics, tensorboard=self.options.tensorboard) as log:
            yield log

    def _loop(self, log: Log | None, stop: StopRequest, stop_after: int | None) -> None:
        """For each step: its batches, forward and backward, update, its line; then what is due when it is done.

        On a GPU the line of a step is read when the next one is under way, so that the GPU never waits for the host.
        """
        progress, total = self.progress, self.plan.total_steps
        self._evaluate(log)
        begun: deque[_Begun] = deque()
        steps = ahead(self._build, range(progress.step, total), depth=self._ahead)
        with meter("training", total, done=progress.step) as shown, steps as built:
            while not self._finished() and stop.signal is None:
                begun.append(self._begin(next(built)))
                in_flight = 0 if self._something_is_due(begun[-1].built.step, stop_after) else self.engine.in_flight
                while len(begun) > in_flight:
                    line = self._end(begun.popleft())
                    self._append(log, line)
                    shown.advance(f"loss {line['loss']:.3f}, {line['tokens_real'] / line['seconds']:,.0f} tokens/s")
                    for slow in self._stragglers.look(progress.step, line["seconds"]):
                        warn(f"step {progress.step}: {slow}")
                    if progress.step == stop_after:
                        stop.asked = signal.SIGTERM
                    too_far = self._went_too_far(line)
                    if self._meet(stop) or too_far:
                        in_flight = 0  # what is under way is ended first: weights and progress are then of one step
                if not begun:
                    self._check_skipped()
                    if not self._leaves(stop):  # else it is saved at once, and evaluated on resuming
                        self._save_where_due()  # first: neither an evaluation nor a sample can cost it
                        self._evaluate(log)
                        if self._is_out_of_patience():
                            self._save(whole=True)
                    self._ended_at = time.perf_counter()

    def _build(self, index: int) -> _Built:
        """The step of that index, with this rank's batches; in a thread beside a GPU's steps."""
        began = time.perf_counter()
        step = self.plan.step(index)
        batches = [self.batcher(self.train_set, examples) for examples in self._mine(step)]
        return _Built(step, batches, time.perf_counter() - began)

    def _begin(self, built: _Built) -> _Begun:
        """Asks the device for an optimizer step."""
        at = time.perf_counter() - (0.0 if self._ahead else built.seconds)
        self._stragglers.built(built.seconds)
        results = [self._accumulate(built, number) for number in range(len(built.batches))]
        lr = learning_rate(
            built.step.index,
            peak=self.options.lr,
            schedule=self.options.schedule,
            warmup=self.options.warmup,
            total_steps=self.plan.total_steps,
        )
        loss = sum((part.double() for part, _ in results[1:]), start=results[0][0].double())
        return _Begun(built, [losses for _, losses in results], lr, self.engine.update(lr, loss), at)

    def _end(self, begun: _Begun) -> dict[str, Any]:
        """Waits for a step; returns its line for the metrics, the same on all ranks but for seconds and memory."""
        update, step, batches = begun.update(), begun.built.step, begun.built.batches
        now = time.perf_counter()
        began, self._ended_at = max(begun.at, self._ended_at), now
        padded, real, computed = self.world.sum(
            [
                sum(batch.tokens_padded for batch in batches),
                sum(batch.tokens_real for batch in batches),
                sum(batch.tokens.numel() for batch in batches),
            ]
        )
        self.progress.step += 1
        self.progress.tokens_seen += int(computed)
        if self.options.ledger:
            self._note_losses(step, begun.example_losses())
        line: dict[str, Any] = {
            "step": step.index + 1,
            "epoch": step.epoch + 1,
            "loss": update.loss,
            "lr": begun.lr,
            "grad_norm": update.grad_norm,
            "tokens_padded": int(padded),
            "tokens_real": int(real),
            "tokens_computed": int(computed),
            "tokens_supervised": step.count,
            "memory_bytes": peak_memory(self.engine.device),
            "seconds": now - began,
        }
        if not update.applied:
            line |= {"skipped": True, "rescaled": update.rescaled}
            if not update.rescaled:  # that is fp16's way of finding its loss scale
                self.progress.skipped += 1
                line["rows"] = self._suspects(step, begun.example_losses())
                warn(_why_skipped(line))
        return line

    def _something_is_due(self, step: Step, stop_after: int | None) -> bool:
        """Whether something is to be done with the weights as they are behind this step."""
        done, total = step.index + 1, self.plan.total_steps
        return done in (stop_after, total) or self._evaluates(done) or self._save_is_due(done) is not None

    def _went_too_far(self, line: dict[str, Any]) -> bool:
        """Whether too many steps were skipped; the first such line is kept."""
        if self._last_straw is None and line.get("skipped") and not line["rescaled"]:
            self._last_straw = line if self.progress.skipped > self.options.max_skipped else None
        return self._last_straw is not None

    def _accumulate(self, built: _Built, number: int) -> tuple[Tensor, Tensor]:
        batches = len(built.batches)
        self._watchdog.beat(f"step {built.step.index + 1}, batch {number + 1} of {batches}")
        return self.engine.accumulate(built.batches[number], built.step.count, last=number + 1 == batches)

    def _mine(self, step: Step) -> list[Indices]:
        """The packs of a step that are this rank's."""
        return step.packs[self.world.rank :: self.world.size]

    def _note_losses(self, step: Step, sums: list[Tensor]) -> None:
        """Writes the ledger's line of a step: the mean loss of each of its examples before the update."""
        of_ranks = self.world.gather([one.numpy() for one in sums])
        if self._ledger is None:
            return
        size = self.world.size
        in_order = [of_ranks[pack % size][pack // size] for pack in range(len(step.packs))]
        means = np.concatenate(in_order) / self.plan.supervised[step.examples]
        rows = self.train_set.rows[step.examples].tolist()
        entry = {"step": step.index + 1, "epoch": step.epoch + 1, "rows": rows, "losses": means.round(6).tolist()}
        self._append(self._ledger, entry)

    def _append(self, file: Log | MetricsFile | None, line: dict[str, Any]) -> None:
        """Writes a line of the metrics or of the ledger. An error waits until all ranks hear of it."""
        try:
            if file is not None:
                file.append(line)
        except UserError as error:
            self._trouble = self._trouble or error

    def _suspects(self, step: Step, sums: list[Tensor]) -> list[int]:
        """The rows whose own losses are not finite; where all are, all rows of the step: a gradient does not say whose
        it is."""
        mine = [
            self.train_set.rows[examples[~torch.isfinite(losses).numpy()]].tolist()
            for examples, losses in zip(self._mine(step), sums, strict=True)
        ]
        found = sorted(row for rows in self.world.gather(mine) for pack in rows for row in pack)
        return found or sorted(self.train_set.rows[step.examples].tolist())

    def _check_skipped(self) -> None:
        """Stops the run, saved with all that belongs to its last step, where too many steps were skipped."""
        if self._last_straw is None:
            return
        self._save_to_stop()
        error = TrainingError(
            f"{_why_skipped(self._last_straw)}; that was skipped step {self.progress.skipped}, --max_skipped allows "
            f"{self.options.max_skipped}; look at these rows, lower --lr or use --dtype fp32. A checkpoint is saved"
        )
        error.common = True
        raise error

    def _evaluates(self, step: int) -> bool:
        """Whether an evaluation or samples are due when `step` steps are done."""
        total = self.plan.total_steps
        return self.evaluation.due(step, total) or self.evaluation.sample_due(step, total)

    def _is_evaluated(self) -> bool:
        """Whether the evaluation of the step at which the run stands is behind it."""
        return self.progress.evaluated == self.progress.step

    def _evaluate(self, log: Log | None) -> None:
        """Validation loss, samples and the best weights, where they are due and not yet behind the run."""
        step, total = self.progress.step, self.plan.total_steps
        if self._is_evaluated():
            return
        if len(self.val_set) and self.evaluation.due(step, total):
            began = time.perf_counter()
            losses = self.evaluation.losses(self._evaluate_batch, step)
            self._append(log, {"step": step, **losses, "eval_seconds": time.perf_counter() - began})
            say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
            self._note_best(losses["val_loss"])
        self.progress.evaluated = step
        if len(self.val_set) and self.evaluation.sample_due(step, total):
            self._watchdog.beat("answering samples")
            try:
                samples = self._samples()
            except dist.DistError:
                raise  # the ranks' connection is the training's too
            except (RuntimeError, ValueError, LookupError) as error:  # training does not read these texts
                reason = " ".join(str(error).split())[:200]
                warn(f"no samples at step {step} ({type(error).__name__}: {reason}); training goes on")
                samples = []
            for record, response in samples:
                self._append(log, {"step": step, "sample": {**record.as_entry(), "model_response": response}})
                say(f"  {' '.join(f'{record.instruction} {record.input}'.split())} -> {' '.join(response.split())}")

    def _evaluate_batch(self, batch: Batch) -> Tensor:
        self._watchdog.beat(f"evaluation when {self.progress.step} steps are done")
        return self.engine.evaluate(batch)

    def _note_best(self, val_loss: float) -> None:
        progress = self.progress
        best = math.inf if progress.best_val_loss is None else progress.best_val_loss
        if not val_loss < best:  # a loss that is not a number is no better than any
            progress.evaluations_since_best += progress.step > 0
            return
        progress.best_val_loss, progress.best_step, progress.evaluations_since_best = val_loss, progress.step, 0
        if self.options.keep_best:
            self._watchdog.beat("saving the best weights")
            save_best(self.run.checkpoints, self.engine, progress)

    def _samples(self) -> list[tuple[Record, str]]:
        """The answers to a few validation prompts; the book answers one at each epoch's end, past any end-of-text.

        With several ranks the answers go on past their end, and are cut: so all run the same number of forwards.
        """
        book = self.options.recipe == "book"
        records = self.data.part("val", min(self.options.samples, 1) if book else self.options.samples)
        prompts = [self.data.template.prompt_of(record) for record in records]
        if not prompts:
            return []
        tokenizer = self.engine.model.config.tokenizer
        room = self.engine.model.config.n_ctx
        stop = NO_STOP if book or self.world.size > 1 else tokenizer.end_of_text
        with self.engine.answering():
            answers = greedy(
                self.engine.model,
                [ids[-(room - 1) :] for ids in tokenizer.encode_many(prompts)],
                max_new_tokens=SAMPLE_TOKENS,
                stop=stop,
            )
        if not book:
            answers = [list(itertools.takewhile(lambda id_: id_ != tokenizer.end_of_text, ids)) for ids in answers]
        return [
            (record, self.data.template.extract(tokenizer.decode(ids)))
            for record, ids in zip(records, answers, strict=True)
        ]

    def _plan(self) -> tuple[Plan, TokenMean | BookMeans]:
        options = self.options
        order = None
        if options.recipe == "book":
            per_epoch = len(self.train_set) // options.batch_size
            epochs = options.epochs if options.steps is None else -(-options.steps // max(1, per_epoch))
            order = BookOrder(
                len(self.train_set),
                batch_size=options.batch_size,
                epochs=max(1, epochs),
                seed=options.seed,
                eval_every=options.eval_every,
            )
        plan = make_plan(
            self.train_set,
            batch_size=options.batch_size,
            epochs=options.epochs,
            steps=options.steps,
            accumulate=options.accumulate,
            seed=options.seed,
            drop_last=options.drop_last,
            bucketed=options.batching == "bucketed",
            packing=self._packing(),
            epoch_order=order.epoch_order if order else None,
        )
        if order is not None:
            return plan, BookMeans(self.train_set, self.val_set, self.batcher, options.batch_size, order)
        packs = options.batching == "packed"
        return plan, TokenMean(
            self.val_set,
            self.batcher,
            options.batch_size,
            options.eval_every,
            options.eval_examples,
            self.world,
            pack_tokens=options.pack_tokens if packs else None,
            shares_prefix=packs and options.share_prefix,
        )

    def _packing(self) -> Packing:
        config = self.engine.model.config
        cost = Cost.of_gpt2(config.n_layer, config.n_embd, config.vocab_size)
        if self.options.batching != "packed":
            return Packing(ranks=self.world.size, cost=cost)
        shared = self.train_set.common_prefix() if self.options.share_prefix else 0
        return Packing(pack_tokens=self.options.pack_tokens, shared=shared, ranks=self.world.size, cost=cost)

    def _is_out_of_patience(self) -> bool:
        return 0 < self.options.patience <= self.progress.evaluations_since_best

    def _finished(self) -> bool:
        return self._is_out_of_patience() or self.progress.step >= self.plan.total_steps

    def _leaves(self, stop: StopRequest) -> bool:
        """Whether a signal ends the run before its end."""
        return stop.signal is not None and not self._finished()

    def _meet(self, stop: StopRequest) -> bool:
        """Where the ranks agree: whether to stop, or to save though it is not due, and whether one is in trouble.

        Returns:
            Whether they are to stop or to save.
        """
        mine = [
            *stop.votes(),
            float(self.world.is_first and save_is_asked(self.run.folder)),
            float(self._trouble is not None),
            float(self._shards is not None and self._shards.is_written),
        ]
        *stop_votes, asked, trouble, written = self.world.sum(mine)
        stop.settle(stop_votes)
        if trouble:
            with self.world.together():
                if self._trouble is not None:
                    raise self._trouble
        if self._shards is not None and written == self.world.size:
            self._shards.finish()
        self._save_is_asked |= bool(asked)
        return self._save_is_asked or stop.signal is not None

    def _save_is_due(self, step: int) -> str | None:
        """What kind of checkpoint is due when `step` steps are done, if any: `whole`, or `shards` under ZeRO."""
        whole_every, every = self.options.whole_every, self.options.save_every or self.plan.steps_per_epoch
        if step >= self.plan.total_steps or (whole_every and step % whole_every == 0):
            return "whole"
        return "shards" if step % every == 0 else None

    def _save_where_due(self) -> None:
        due = self._save_is_due(self.progress.step)
        if self._save_is_asked or self._finished() or due == "whole":
            self._save(whole=True)
        elif due is not None:
            self._save(whole=False)
        self._save_is_asked = False

    def _save(self, *, whole: bool) -> None:
        """Saves; under ZeRO in shards where it need not be `whole`."""
        self._watchdog.beat(f"saving when {self.progress.step} steps are done")
        if self._shards is not None and not whole:
            self._shards.begin(self.progress)
            return
        if self._shards is not None:
            self._shards.finish()
        save_checkpoint(self.run.checkpoints, self.engine, self.progress, keep=self.options.keep)

    def _save_to_stop(self) -> None:
        """Saves before leaving: first what is quick, then what any number of ranks can go on from."""
        if self._shards is not None:
            self._save(whole=False)
        self._save(whole=True)

    def _resume(self) -> None:
        if not self.options.resume:
            return
        with self.world.together():
            if self.world.is_first:
                check_same_data(self.run, self.data)
        path = resumable(self.run.checkpoints, self.engine)
        if path is None:
            self._check_unfinished()
            say(f"no checkpoint in {self.run.checkpoints} yet: starting at step 0")
            return
        with self.world.together():
            progress = load_checkpoint(path, self.engine)
            if progress.data_fingerprint != self.progress.data_fingerprint:
                raise UserError(
                    f"the examples are not those of {path}: the records of the data file, or their order, have changed "
                    "in one of its splits, or the tokenizer has; put them back, or start again with --overwrite"
                )
            if progress.step > self.plan.total_steps:
                raise UserError(
                    f"{path} has {progress.step} steps behind it, and the run is to have {self.plan.total_steps}: it "
                    "cannot go back; give more --steps or --epochs, or start again with --overwrite"
                )
            self.progress = progress
            if self.world.is_first:
                prune(self.run.checkpoints, progress, keep=self.options.keep)
        say(f"resuming at step {progress.step} of {self.plan.total_steps} ({path})")

    def _check_unfinished(self) -> None:
        """Refuses to begin again where a run has come to its end, and has left no checkpoint to go on from."""
        with self.world.together():
            if self.world.is_first and (model := self.run.model / "model.safetensors").exists():
                raise UserError(
                    f"{self.run.folder} holds a finished run, {model}, and no checkpoint to go on from; --overwrite "
                    "trains it again, and another run takes its model by --weights"
                )

    def _finish(self) -> None:
        """Exports the result: the last weights, or the best ones where early stopping was asked for."""
        self._watchdog.beat("writing the model")
        if self.options.patience:
            found, best = load_best(self.run.checkpoints, self.engine, self.progress), self.progress.best_step
            if found and best == 0:
                warn("no evaluation was better than the one before training: exporting the weights it started from")
            else:
                say(f"exporting the weights of step {best}, the best" if found else "exporting the last weights")
        model = self.engine.whole_model()
        with self.world.together():
            if model is not None:
                save_hf(model, files.make_folder(self.run.model))
        say(f"trained {self.progress.step} steps; the model is in {self.run.model}")

    def _fingerprint(self) -> str:
        """SHA-256 over what the run's data is: the records of all its splits, the examples made of them, and the
        tokenizer, which alone says what their ids mean."""
        tokenizer = self.engine.model.config.tokenizer.fingerprint()
        parts = (self.data.fingerprint(), self.train_set.fingerprint(), self.val_set.fingerprint(), tokenizer)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def _data_seen(self) -> dict[str, Any]:
        """What the run's data is, and all rows that something happened to, for `data.json`."""
        return {
            "source": self.data.source,
            "records": len(self.data.records),
            "split_sha256": self.data.fingerprint(),
            "tokenizer_sha256": self.engine.model.config.tokenizer.fingerprint(),
            "taken_for": self.data.taken_for,
            "left_out": [asdict(bad) for bad in self.data.bad],
            "audit": self.data.audit().as_json(),
            "train": asdict(self.train_set.report),
            "val": asdict(self.val_set.report),
            "test": {"longer_than_context": self._test_too_long},
            "seconds": self._data_seconds,  # reading, splitting, encoding and planning, at the last start
        }

    def _say_hello(self) -> None:
        engine, plan = self.engine, self.plan
        parameters = number_of_parameters(engine.model.config)
        ranks = "" if self.world.size == 1 else f" on each of {self.world.size} ranks"
        zero = f", ZeRO stage {engine.stage}" if isinstance(engine, ZeroEngine) else ""
        say(
            f"{parameters:,} parameters on {engine.device}{ranks} in {engine.dtype}{zero}; {len(self.train_set)} "
            f"examples, {plan.total_steps} steps of {plan.batch_size}"
        )

    def dry_run(self) -> None:
        """Runs the largest batch once and prints the plan and the memory that training will take."""
        plan, engine = self.plan, self.engine
        self._say_hello()
        steps = [plan.step(index) for index in range(min(plan.total_steps, _DRY_RUN_STEPS))]
        batches = [self.batcher(self.train_set, pack) for step in steps for pack in step.packs]
        tokens = {
            "padded": sum(batch.tokens_padded for batch in batches),
            "real": sum(batch.tokens_real for batch in batches),
            "computed": sum(batch.tokens.numel() for batch in batches),
            "supervised": sum(step.count for step in steps),
        }
        counts = ", ".join(f"{count:,} {name}" for name, count in tokens.items())
        say(f"tokens in {len(steps)} of {plan.total_steps} steps: {counts}")
        largest = plan.largest_step()
        began = time.perf_counter()
        batches = [self.batcher(self.train_set, examples) for examples in self._mine(largest)]
        losses = [self._accumulate(_Built(largest, batches, 0.0), number)[0] for number in range(len(batches))]
        float(losses[-1])  # waits for a GPU
        seconds = time.perf_counter() - began
        if isinstance(self.evaluation, TokenMean) and len(self.val_set):
            validated = self.evaluation.largest_batch()
            float(engine.evaluate(validated))
            say(f"largest evaluation batch: {validated.tokens.numel():,} tokens computed")
        peak = peak_memory(engine.device)
        rows = name_rows(self.train_set.rows[largest.examples].tolist())
        say(f"largest step: {len(largest.examples)} examples ({rows}), {seconds:.2f} s forward and backward")
        if engine.holds_moments:
            say(f"memory: {peak / _GIB:.2f} GiB at that batch (measured on the first rank)")
        else:
            moments = 8 * number_of_parameters(engine.model.config)
            say(
                f"memory: {peak / _GIB:.2f} GiB at that batch (measured) and {moments / _GIB:.2f} GiB for AdamW's "
                f"moments (computed): training will take about {(peak + moments) / _GIB:.2f} GiB"
            )
        self._say_costs(max(batches, key=lambda batch: batch.tokens.numel()), packs=len(batches))
        say("dry run: nothing is trained, nothing is written")

    def _say_costs(self, largest: Batch, *, packs: int) -> None:
        """What each ZeRO stage would take of each rank, and send, for this run's largest pack."""
        engine, config = self.engine, self.engine.model.config
        zero = engine.config if isinstance(engine, ZeroEngine) else None
        setup = scaling.Setup(
            stage=0 if zero is None else zero.stage,
            offload=zero is not None and zero.offloads,
            ranks=self.world.size,
            packs=packs,
            dtype=engine.dtype,
            impl=engine.impl,
            cuda=engine.device.type == "cuda",
            activation_checkpointing=self.options.activation_checkpointing,
            decay_all=self.options.decay_all,
            buckets=scaling.Buckets() if zero is None else scaling.Buckets.of(zero.settings["zero_optimization"]),
        )
        device_bytes = torch.cuda.get_device_properties(engine.device).total_memory if setup.cuda else None
        sizes, local_ranks = scaling.Sizes.of(largest), self.world.local_size
        show(scaling.table(config, sizes, setup, device_bytes, local_ranks=local_ranks))


def _why_skipped(line: dict[str, Any]) -> str:
    found = f"loss {line['loss']} and gradient norm {line['grad_norm']}"
    rows = name_rows(line["rows"], most=len(line["rows"]))
    return f"step {line['step']} has {found}: its update is skipped ({rows})"


def _set_threads(threads: int | None, world: World, device: torch.device) -> None:
    """CPU threads: those asked for, else, where several ranks compute on one machine's CPU, its share."""
    if threads is not None:
        torch.set_num_threads(threads)
    elif device.type == "cpu" and world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world.local_size))


def _settled(options: TrainOptions, run: Run) -> TrainOptions:
    """The options with what a resumed run's own say; refuses what cannot be done before anything is changed."""
    if options.resume and options.dtype == "auto" and run.config.is_file():
        options = replace(options, dtype=run.options().dtype)  # another machine may find another one fast
    check_effects(options, defaults=defaults_of(options))
    _check_folder(run, options)
    if options.tensorboard:
        summary_writer()  # that it is missing is said before anything is changed
    return options


def _check_folder(run: Run, options: TrainOptions) -> None:
    """Refuses to run over another run, or to resume with settings that compute something else."""
    if options.resume:
        if run.config.is_file() and (changed := changed_settings(run.options(), options)):
            raise UserError(
                f"--resume would compute something else than {run.folder} did: {'; '.join(changed)}; "
                "take these settings back, or start another run in another --out"
            )
    elif run.holds_something() and not (options.overwrite or options.dry_run):
        raise UserError(f"{run.folder} already holds a run; go on with --resume, replace it with --overwrite")


def _model_to_go_on(options: TrainOptions, run: Run) -> GPT2 | None:
    """A model to put a checkpoint's weights into: what the run started from is not read again. None where it begins
    anew."""
    shape = shape_of(run.checkpoints) if options.resume else None
    if shape is None:
        return None
    model = GPT2(replace(shape, tokenizer=run.own_tokenizer()))
    model.checkpoint_activations = options.activation_checkpointing
    return model


def _tokenizer_to_be(options: TrainOptions, run: Run) -> Tokenizer:
    """The tokenizer of the model that will be trained, before any weight is read: data are read by its end-of-text."""
    if options.resume and shape_of(run.checkpoints) is not None:
        return run.own_tokenizer()
    source = options.weights
    if source is None or is_keyword("weights", source):
        return gpt2_tokenizer()
    with silenced(True):  # what is odd about the weights is said where they are loaded
        return config_of(source).tokenizer


def initial_model(options: TrainOptions) -> GPT2:
    """The model that a run starts from: loaded, or random from the run's seed."""
    torch.manual_seed(options.seed)
    named = config_for(options.model, tie_head=options.tie_head)
    published = options.model.startswith("gpt2")
    source = options.weights or (options.model if published else "none")
    if both := hidden_path("weights", source):
        say(both)
    if source == "none":
        model = GPT2(named)
    else:
        model = load(source, tie_head=options.tie_head)
        model.config.tokenizer.check_fits(model.config.vocab_size, source)
        if replace(model.config, tie_head=True) != SIZES[options.model]:
            config = model.config
            say(
                f"the weights give the model's shape, not --model {options.model}: "
                f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {config.n_ctx}"
            )
    model.checkpoint_activations = options.activation_checkpointing
    return model
