"""`GpuEngine`: training at the pace of a GPU, which no step waits for.

What a step reads and writes lies in tensors that stay: the batch (`fastft.gpu.staging`), the weights and all that
belongs to them (`fastft.engines.flat`), and what is reported. So forward and backward of batches of equal sizes are one
CUDA graph, and the update is another (`fastft.gpu.cuda_graphs`). Clipping, and leaving out a step whose loss or
gradient is not finite, are decided on the device; its figures are copied to the host and read when the next step is
under way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastft.batches.batch import Batch
from fastft.common.errors import UserError
from fastft.engines.engine import Update, WholeModel, abandoned_on_error
from fastft.engines.flat import Bucket, FlatWeights
from fastft.engines.moments import Moments, laid_out, states_of
from fastft.gpu.cuda_graphs import Graphs
from fastft.gpu.staging import Staged, Staging
from fastft.gpu.transfers import Reading, on_the_way, pinned
from fastft.model import ops
from fastft.model.gpt2 import GPT2
from fastft.model.part import saved
from fastft.model.precision import NARROW, choose_device, choose_dtype
from fastft.model.weights import load_weights
from fastft.ranks.world import ALONE, World
from fastft.run.config import TrainOptions

_FIRST_SCALE, _GROWTH, _BACKOFF, _GROWTH_STEPS = 2.0**16, 2.0, 0.5, 2000
"""Of fp16's loss scale: torch.amp.GradScaler's own."""


class GpuEngine(WholeModel):
    """Training on CUDA: see `fastft.engines.engine.AnyEngine`.

    It runs on a CPU too, where nothing is captured: so its arithmetic can be tested without a GPU.
    """

    in_flight = 1
    holds_moments = True

    def __init__(self, model: GPT2, options: TrainOptions, world: World | None = None) -> None:
        self.world = world or ALONE
        self.device = choose_device(options.device, self.world.local_rank)
        self.dtype = choose_dtype(options.dtype, self.device)
        self.impl = ops.resolve(options.impl, self.device)
        torch.backends.cuda.matmul.allow_tf32 = options.tf32
        self.model = model.to(self.device, torch.float64 if self.dtype == "fp64" else torch.float32)
        self.flat = FlatWeights(
            self.model,
            NARROW.get(self.dtype),
            weight_decay=options.weight_decay,
            decay_all=options.decay_all,
        )
        if options.compile:
            ops.compile_model(self.flat.computes)
        self._captures = captures_graphs(options, self.impl, self.device)
        self.graphs = Graphs(self.device, "training", enabled=self._captures)
        self.evaluation_graphs = Graphs(self.device, "evaluation", enabled=self._captures)
        self._staging = Staging(self.device)
        self._clip = options.clip or math.inf
        self._exchanges: list[Any] = []
        self._missing: list[int] = []
        """Of each bucket: how many gradients are still to come in this backward pass."""
        for index, bucket in enumerate(self.flat.buckets):
            for name in bucket.names:
                self.flat.tensors[name].register_post_accumulate_grad_hook(partial(self._arrived, index))
        self._begin_state()

    def _begin_state(self) -> None:
        """The tensors that steps read and write."""
        wide = torch.float64 if self.dtype == "fp64" else torch.float32
        self._packs = 0  # of the step that goes on
        self._pack_loss = torch.zeros((), dtype=wide, device=self.device)
        self._row_losses: dict[int, Tensor] = {}  # by R, of batches that stay where they are
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)  # of the step
        self._lr = torch.zeros((), device=self.device)
        self._scale = torch.full((), _FIRST_SCALE if self.dtype == "fp16" else 1.0, device=self.device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=self.device)
        self._report = torch.zeros(4, dtype=torch.float64, device=self.device)
        self._adds = self._exchanges_now = False

    def accumulate(self, batch: Batch, count: int, *, last: bool = True) -> tuple[Tensor, Tensor]:
        """See `fastft.engines.engine.AnyEngine`."""
        self._adds = self._packs > 0
        staged = self._staging.put(batch.divided(count), lambda sizes: self.graphs.captures((sizes, self._adds)))
        rows = self._row_losses_of(staged)
        self._exchanges_now = last and self.world.size > 1 and not self._captures
        self._packs += 1
        with abandoned_on_error(self):
            self.graphs.run((staged.sizes, self._adds), lambda: self._forward_backward(staged.batch, rows))
            if last and self.world.size > 1:
                self._exchange()
        return self._pack_loss.clone(), on_the_way(rows)

    def abandon(self) -> None:
        """See `fastft.engines.engine.AnyEngine`: the next batch's gradients are stored, not added."""
        self._packs = 0

    def update(self, lr: float, loss: Tensor) -> Callable[[], Update]:
        """See `fastft.engines.engine.AnyEngine`."""
        self._packs = 0
        self._loss.copy_(loss)
        if self.world.size > 1:
            dist.all_reduce(self._loss)
        self._lr.copy_(pinned(torch.tensor(lr), self.device), non_blocking=True)
        self.graphs.run("update", self._update)
        return partial(self._read, Reading(self._report))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """See `fastft.engines.engine.AnyEngine`."""
        staged = self._staging.put(batch, self.evaluation_graphs.captures)

        def forward() -> None:
            self._pack_loss.copy_(self.flat.computes(staged.batch, impl=self.impl)[0])

        self.evaluation_graphs.run(staged.sizes, forward)
        return self._pack_loss.clone()

    def computing(self) -> GPT2:
        """See `WholeModel`."""
        return self.flat.computes

    def whole_moments(self) -> Moments | None:
        """See `fastft.engines.engine.AnyEngine`."""
        if not self.world.is_first or self.flat.step.item() == 0:
            return {} if self.world.is_first else None
        return laid_out(self.flat.states(), copy=True)

    @torch.no_grad()
    def load(self, weights: Path, moments: Moments) -> None:
        """See `fastft.engines.engine.AnyEngine`."""
        load_weights(saved(self.model), weights)
        self.flat.refresh()
        places = dict(self.flat.states())
        for name, state in states_of(moments):
            for key, value in state.items():
                places[name][key].copy_(value)

    def loss_scale(self) -> dict[str, Any]:
        """See `fastft.engines.engine.AnyEngine`."""
        if self.dtype != "fp16":
            return {}
        return {"scale": self._scale.item(), "good_steps": int(self._good_steps)}

    def load_loss_scale(self, state: dict[str, Any]) -> None:
        """See `fastft.engines.engine.AnyEngine`."""
        if state and self.dtype == "fp16":
            self._scale.fill_(state["scale"])
            self._good_steps.fill_(state["good_steps"])

    def _row_losses_of(self, staged: Staged) -> Tensor:
        """Where the row losses `[R]` of a batch go: as the batch itself, to one place where they are captured."""
        R = staged.batch.rows.numel()
        losses = self._row_losses.get(R)
        if losses is None:
            losses = self._pack_loss.new_zeros(R)
            if self.graphs.captures((staged.sizes, self._adds)):
                self._row_losses[R] = losses
        return losses

    def _forward_backward(self, batch: Batch, row_losses: Tensor) -> None:
        self._exchanges.clear()
        self._missing = [len(bucket.names) for bucket in self.flat.buckets]
        for tensor in self.flat.tensors.values():
            tensor.grad = None  # of a pass that was broken off
        # fp16's scale is in the weights, not at the loss: some gradients of logits are there before the backward pass.
        is_scaled = self.dtype == "fp16"
        weights = batch.weights * self._scale if is_scaled else batch.weights
        loss, losses = self.flat.computes(batch, row_weights=weights, impl=self.impl)
        loss.backward()
        self._pack_loss.copy_(loss.detach() / self._scale if is_scaled else loss.detach())
        row_losses.copy_(losses)

    def _arrived(self, index: int, _: Tensor) -> None:
        """A gradient of a bucket is there: when it is the last one, they go to their places and, uncaptured, to the
        other ranks while the backward pass goes on."""
        self._missing[index] -= 1
        if not self._missing[index]:
            self._take(self.flat.buckets[index])

    @torch.no_grad()
    def _take(self, bucket: Bucket) -> None:
        tensors = [self.flat.tensors[name] for name in bucket.names]
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        self.flat.take(bucket.names, gradients, add=self._adds)
        for tensor in tensors:
            tensor.grad = None
        if self._exchanges_now:
            self._begin_exchange(bucket)

    def _begin_exchange(self, bucket: Bucket) -> None:
        """Each rank's gradients are a part of one sum over one count: nothing is averaged."""
        self._exchanges.append(dist.all_reduce(self.flat.gradients[bucket.begin : bucket.end], async_op=True))

    def _exchange(self) -> None:
        """Adds up the gradients of all ranks.

        Uncaptured, that has begun while the backward pass went on. NCCL wants an operation to be captured by all ranks
        or by none ("Using NCCL with CUDA Graphs"), and which sizes come when differs from rank to rank: so behind a
        graph it begins here.
        """
        if not self._exchanges_now:
            self._exchanges.clear()
            for bucket in self.flat.buckets:
                self._begin_exchange(bucket)
        for exchange in self._exchanges:
            exchange.wait()

    @torch.no_grad()
    def _update(self) -> None:
        norm = self.flat.gradient_norm() / self._scale
        is_finite = norm.isfinite() & self._loss.isfinite()
        factor = (self._clip / (norm + 1e-6)).clamp(max=1.0) / self._scale
        left_out = (~is_finite).float()
        self.flat.adamw(self._lr, grad_scale=factor.float().reciprocal(), found_inf=left_out)
        self.flat.refresh()
        self._report.copy_(torch.stack([self._loss, norm.double(), self._scale.double(), is_finite.double()]))
        if self.dtype == "fp16":
            torch._amp_update_scale_(self._scale, self._good_steps, left_out, _GROWTH, _BACKOFF, _GROWTH_STEPS)
            self._scale.clamp_(min=1.0)  # no scale was the cause; see `Engine`

    def _read(self, report: Reading) -> Update:
        loss, norm, scale, applied = report.get().tolist()
        rescaled = self.dtype == "fp16" and not applied and math.isfinite(loss) and scale > 1
        return Update(loss, norm, bool(applied), rescaled)


def captures_graphs(options: TrainOptions, impl: str, device: torch.device) -> bool:
    """What `--cuda_graphs` means where it is not given.

    Raises:
        UserError: they are asked for where none can be captured.
    """
    can = device.type == "cuda" and impl == "triton"
    if options.cuda_graphs and not can:
        raise UserError(
            f"got --cuda_graphs true on {device} with --impl {impl}, whose steps cannot be captured; expected CUDA and "
            "the Triton kernels; leave it out"
        )
    return can and options.batching == "packed" if options.cuda_graphs is None else options.cuda_graphs
