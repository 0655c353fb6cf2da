"""Training: the loop, and what happens around it.

`Trainer.run` is the loop. Everything that a step does to the model is in `engine.py`; which examples it takes, in
`plan.py`; here they are put together with evaluation, samples, checkpoints and the metrics file.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any

import psutil
import torch
from torch import Tensor

from fastft import files, ops
from fastft.batch import Batcher
from fastft.book import SAMPLE_TOKENS, BookMeans, BookOrder
from fastft.checkpoint import (
    Progress,
    load_best,
    load_checkpoint,
    newest_whole,
    prune,
    save_best,
    save_checkpoint,
)
from fastft.config import TrainOptions, changed_settings, to_yaml
from fastft.console import meter, say, warn
from fastft.encode import name_rows
from fastft.engine import Engine
from fastft.errors import TrainingError, UserError
from fastft.evaluate import TokenMean
from fastft.generation import NO_STOP, greedy
from fastft.model import GPT2, SIZES, config_for
from fastft.optim import learning_rate
from fastft.plan import Cost, Packing, Plan, Step, make_plan
from fastft.run import Data, MetricsFile, Run, load_data
from fastft.tokenizer import END_OF_TEXT, VOCAB_SIZE, gpt2_tokenizer
from fastft.weights import load, save_hf

_GIB = 1 << 30
_DRY_RUN_STEPS = 200


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `train` ended."""

    run: Run
    progress: Progress
    interrupted_by: signal.Signals | None = None
    """The signal that asked it to stop before its end; the run can be resumed."""


def train(options: TrainOptions) -> Outcome:
    """Trains as the options say and leaves the run's folder (see `fastft.run.Run`).

    Raises:
        UserError: an option, the data, the weights or the folder is wrong; nothing in the folder has been changed.
        TrainingError: too many steps had a non-finite loss or gradient; a checkpoint has been saved.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    run = Run(options.out)
    if options.resume and options.dtype == "auto" and run.config.is_file():
        options = replace(options, dtype=run.options().dtype)  # another machine may find another one fast
    _check_folder(run, options)
    if options.tensorboard:
        _summary_writer()  # that it is missing is said before anything is changed
    data = load_data(options)
    if data.bad:
        warn(f"left out, and listed in {run.data}: {data.describe_bad()}")
    model = initial_model(options)
    trainer = Trainer(run, options, data, Engine(model, options))
    if options.dry_run:
        trainer.dry_run()
        return Outcome(run, trainer.progress)
    return trainer.run_all()


class Trainer:
    """A run: its plan, its engine, its progress."""

    def __init__(self, run: Run, options: TrainOptions, data: Data, engine: Engine) -> None:
        self.run = run
        self.options = options
        self.data = data
        self.engine = engine
        n_ctx = engine.model.config.n_ctx
        self.train_set = data.encode("train", options, n_ctx)
        self.val_set = data.encode("val", options, n_ctx)
        for name, encoded in (("training", self.train_set), ("validation", self.val_set)):
            for line in encoded.report.lines(options.max_length or n_ctx):
                warn(f"{name}: {line}")
        round_sizes = engine.device.type == "cuda"
        self.batcher = Batcher(
            packed=options.batching == "packed",
            share_prefix=options.share_prefix,
            round_sizes=round_sizes,
            planner=ops.planner(engine.impl, round_sizes=round_sizes),
        )
        self._ledger: MetricsFile | None = None
        self.plan, self.evaluation = self._plan()
        self.progress = Progress(data_fingerprint=self.train_set.fingerprint())

    def run_all(self) -> Outcome:
        """Resumes or begins, trains, and exports the result."""
        files.make_folder(self.run.checkpoints)
        if self.options.overwrite:
            _clear(self.run)
        self.run.remove_leftovers()
        self._resume()
        files.write_text(self.run.config, to_yaml(replace(self.options, dtype=self.engine.dtype)))
        files.write_json(self.run.data, self._data_seen())
        self._say_hello()
        metrics = MetricsFile(self.run.metrics, resume_at=self.progress.step)
        with _stop_requests() as stop, _writers(self.run, metrics, tensorboard=self.options.tensorboard) as log:
            if self.options.ledger:
                self._ledger = MetricsFile(self.run.ledger, resume_at=self.progress.step)
            self._loop(log, stop)
        if stop.signal is not None and not self._finished():
            self._save()
            say(f"stopped by {stop.signal.name} at step {self.progress.step}, saved; go on with --resume")
            return Outcome(self.run, self.progress, stop.signal)
        self._finish()
        return Outcome(self.run, self.progress)

    def _loop(self, log: _Log, stop: _StopRequest) -> None:
        progress, total = self.progress, self.plan.total_steps
        if progress.step == 0:
            self._evaluate(log)
        with meter("training", total, done=progress.step) as shown:
            while not self._finished() and stop.signal is None:
                began = time.perf_counter()
                step = self.plan.step(progress.step)
                line = self._step(step)
                progress.step += 1
                line["seconds"] = time.perf_counter() - began
                log.write(line)
                shown.advance(f"loss {line['loss']:.3f}, {line['tokens_real'] / line['seconds']:,.0f} tokens/s")
                self._evaluate(log)
                if self._save_is_due():
                    self._save()
                self._check_skipped(step, line)

    def _step(self, step: Step) -> dict[str, Any]:
        """One optimizer step; returns its line for the metrics."""
        batches = [self.batcher(self.train_set, examples) for examples in step.packs]
        results = [self.engine.accumulate(batch, step.count) for batch in batches]
        loss = sum(part.item() for part, _ in results)
        if self._ledger is not None:
            self._ledger.append(self._entry(step, [sums for _, sums in results]))
        rate = learning_rate(
            step.index,
            peak=self.options.lr,
            schedule=self.options.schedule,
            warmup=self.options.warmup,
            total_steps=self.plan.total_steps,
        )
        update = self.engine.update(rate, loss_is_finite=math.isfinite(loss))
        computed = sum(batch.tokens.numel() for batch in batches)
        self.progress.tokens_seen += computed
        line = {
            "step": step.index + 1,
            "epoch": step.epoch + 1,
            "loss": loss,
            "lr": rate,
            "grad_norm": update.grad_norm,
            "tokens_padded": sum(batch.tokens_padded for batch in batches),
            "tokens_real": sum(batch.tokens_real for batch in batches),
            "tokens_computed": computed,
            "tokens_supervised": step.count,
            "memory_bytes": peak_memory(self.engine.device),
        }
        if not update.applied:
            line |= {"skipped": True, "rescaled": update.rescaled}
            if not update.rescaled:  # that is fp16's way of finding its loss scale
                self.progress.skipped += 1
                warn(self._why_skipped(step, line))
        return line

    def _entry(self, step: Step, sums: list[Tensor]) -> dict[str, Any]:
        """The ledger's line of a step: the mean loss of each of its examples before the update."""
        means = torch.cat(sums).cpu().numpy() / self.plan.supervised[step.examples]
        rows = self.train_set.rows[step.examples].tolist()
        return {"step": step.index + 1, "epoch": step.epoch + 1, "rows": rows, "losses": means.round(6).tolist()}

    def _check_skipped(self, step: Step, line: dict[str, Any]) -> None:
        """Stops the run, saved with all that belongs to this step, where too many steps were skipped."""
        if not line.get("skipped") or line["rescaled"] or self.progress.skipped <= self.options.max_skipped:
            return
        self._save()
        raise TrainingError(
            f"{self._why_skipped(step, line)}; that was skipped step {self.progress.skipped}, --max_skipped allows "
            f"{self.options.max_skipped}; look at these rows, lower --lr or use --dtype fp32. A checkpoint is saved"
        )

    def _why_skipped(self, step: Step, line: dict[str, Any]) -> str:
        rows = name_rows(self.train_set.rows[step.examples].tolist(), most=len(step.examples))
        found = f"loss {line['loss']} and gradient norm {line['grad_norm']}"
        return f"step {line['step']} has {found}: its update is skipped ({rows})"

    def _evaluate(self, log: _Log) -> None:
        """Validation loss, samples and the best weights, where they are due."""
        step, total = self.progress.step, self.plan.total_steps
        if len(self.val_set) and self.evaluation.due(step, total):
            began = time.perf_counter()
            losses = self.evaluation.losses(self.engine.evaluate, step)
            log.write({"step": step, **losses, "eval_seconds": time.perf_counter() - began})
            say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
            if step:
                self._note_best(losses["val_loss"])
        if len(self.val_set) and self.evaluation.sample_due(step, total):
            self._sample(log)

    def _note_best(self, val_loss: float) -> None:
        progress = self.progress
        best = math.inf if progress.best_val_loss is None else progress.best_val_loss
        if not val_loss < best:  # a loss that is not a number is no better than any
            progress.evaluations_since_best += 1
            return
        progress.best_val_loss, progress.best_step, progress.evaluations_since_best = val_loss, progress.step, 0
        if self.options.keep_best:
            save_best(self.run.checkpoints, self.engine, progress)

    def _sample(self, log: _Log) -> None:
        """Answers a few validation prompts; the book answers one at each epoch's end, past any end-of-text."""
        book = self.options.recipe == "book"
        records = self.data.part("val", 1 if book else self.options.samples)
        prompts = [self.data.template.prompt(record.instruction, record.input) for record in records]
        if not prompts:
            return
        tokenizer = gpt2_tokenizer()
        room = self.engine.model.config.n_ctx
        answers = greedy(
            self.engine.model,
            [ids[-(room - 1) :] for ids in tokenizer.encode_many(prompts)],
            max_new_tokens=SAMPLE_TOKENS,
            stop=NO_STOP if book else END_OF_TEXT,
        )
        for record, ids in zip(records, answers, strict=True):
            response = self.data.template.extract(tokenizer.decode(ids))
            log.write({"step": self.progress.step, "sample": {**record.as_entry(), "model_response": response}})
            say(f"  {' '.join(f'{record.instruction} {record.input}'.split())} -> {' '.join(response.split())}")

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
        return plan, TokenMean(
            self.val_set, self.batcher, options.batch_size, options.eval_every, options.eval_examples
        )

    def _packing(self) -> Packing:
        config = self.engine.model.config
        cost = Cost.of_gpt2(config.n_layer, config.n_embd, config.vocab_size)
        if self.options.batching != "packed":
            return Packing(cost=cost)
        shared = self.train_set.common_prefix() if self.options.share_prefix else 0
        return Packing(pack_tokens=self.options.pack_tokens, shared=shared, cost=cost)

    def _finished(self) -> bool:
        patience = self.options.patience
        out_of_patience = patience > 0 and self.progress.evaluations_since_best >= patience
        return out_of_patience or self.progress.step >= self.plan.total_steps

    def _save_is_due(self) -> bool:
        every = self.options.save_every or self.plan.steps_per_epoch
        return self.progress.step % every == 0 or self._finished()

    def _save(self) -> None:
        save_checkpoint(self.run.checkpoints, self.engine, self.progress, keep=self.options.keep)

    def _resume(self) -> None:
        path = newest_whole(self.run.checkpoints) if self.options.resume else None
        if path is None:
            if self.options.resume:
                say(f"no checkpoint in {self.run.checkpoints} yet: starting at step 0")
            return
        progress = load_checkpoint(path, self.engine)
        if progress.data_fingerprint != self.progress.data_fingerprint:
            raise UserError(
                f"the training examples are not those of {path}: the data file, the template or the mask has changed; "
                "start again with --overwrite, or put the data back"
            )
        self.progress = progress
        prune(self.run.checkpoints, progress.step, keep=self.options.keep)
        say(f"resuming at step {progress.step} of {self.plan.total_steps} ({path})")

    def _finish(self) -> None:
        """Exports the result: the last weights, or the best ones where early stopping was asked for."""
        if self.options.patience:
            best = load_best(self.run.checkpoints, self.engine)
            say("exporting the last weights" if best is None else f"exporting the weights of step {best}, the best")
        save_hf(self.engine.model, files.make_folder(self.run.model))
        say(f"trained {self.progress.step} steps; the model is in {self.run.model}")

    def _data_seen(self) -> dict[str, Any]:
        """What the run's data is, and all rows that something happened to, for `data.json`."""
        return {
            "source": self.data.source,
            "records": len(self.data.records),
            "split_sha256": self.data.fingerprint(),
            "left_out": [asdict(bad) for bad in self.data.bad],
            "train": asdict(self.train_set.report),
            "val": asdict(self.val_set.report),
        }

    def _say_hello(self) -> None:
        engine, plan = self.engine, self.plan
        parameters = sum(p.numel() for p in engine.model.parameters())
        say(
            f"{parameters:,} parameters on {engine.device} in {engine.dtype}; {len(self.train_set)} examples, "
            f"{plan.total_steps} steps of {plan.batch_size}"
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
        for examples in largest.packs:
            engine.accumulate(self.batcher(self.train_set, examples), largest.count)
        seconds = time.perf_counter() - began
        peak = peak_memory(engine.device)
        moments = 8 * sum(p.numel() for p in engine.model.parameters())
        rows = name_rows(self.train_set.rows[largest.examples].tolist())
        say(f"largest step: {len(largest.examples)} examples ({rows}), {seconds:.2f} s forward and backward")
        say(
            f"memory: {peak / _GIB:.2f} GiB at that batch (measured) and {moments / _GIB:.2f} GiB for AdamW's moments "
            f"(computed): training will take about {(peak + moments) / _GIB:.2f} GiB"
        )
        say("dry run: nothing is trained, nothing is written")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(slots=True)
class _StopRequest:
    signal: signal.Signals | None = None


@contextmanager
def _stop_requests() -> Iterator[_StopRequest]:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop looks at; a second one ends the process."""
    request = _StopRequest()
    caught = (signal.SIGINT, signal.SIGTERM)

    def ask(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        for one in caught:
            signal.signal(one, signal.SIG_DFL)
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of printing
            say(f"{request.signal.name}: saving after this step")

    try:
        before = {one: signal.signal(one, ask) for one in caught}
    except ValueError:  # not the main thread: signals are the host program's affair
        yield request
        return
    try:
        yield request
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


class _Log:
    """Where a run's metrics go: `metrics.jsonl`, and TensorBoard where asked for."""

    def __init__(self, metrics: MetricsFile, board: Any | None) -> None:
        self._metrics = metrics
        self._board = board

    def write(self, line: dict[str, Any]) -> None:
        self._metrics.append(line)
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, line["step"])


@contextmanager
def _writers(run: Run, metrics: MetricsFile, *, tensorboard: bool) -> Iterator[_Log]:
    board = _summary_writer()(str(run.folder / "tensorboard")) if tensorboard else None
    try:
        yield _Log(metrics, board)
    finally:
        metrics.close()
        if board is not None:
            board.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package: pip install tensorboard") from error
    return SummaryWriter


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


def _clear(run: Run) -> None:
    """Removes what fastft wrote to a run's folder, and nothing else; what tells that it holds a run goes last."""
    for path in reversed(run.files()):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    files.make_folder(run.checkpoints)


def initial_model(options: TrainOptions) -> GPT2:
    """The model that a run starts from: loaded, or random from the run's seed."""
    torch.manual_seed(options.seed)
    named = config_for(options.model, tie_head=options.tie_head)
    published = options.model.startswith("gpt2")
    source = options.weights or (options.model if published else "none")
    if source == "none":
        model = GPT2(named)
    else:
        model = load(source, tie_head=options.tie_head)
        if model.config.vocab_size < VOCAB_SIZE:
            raise UserError(
                f"{source}: got a vocabulary of {model.config.vocab_size}, expected at least the {VOCAB_SIZE} ids of "
                "GPT-2's tokenizer; use weights that were made with it"
            )
        if replace(model.config, tie_head=True) != SIZES[options.model]:
            config = model.config
            say(
                f"the weights give the model's shape, not --model {options.model}: "
                f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {config.n_ctx}"
            )
    model.checkpoint_activations = options.activation_checkpointing
    return model
