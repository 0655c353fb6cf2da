"""The pretended GPU (tools/pretended_gpu): what it counts, what it refuses, and that torch sees a GPU in it.

The functions named `child_*` run in processes on it, in a Python of their own: their source is sent there.
"""

import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretended import without_cudnn

from tools.pretended_gpu.build import LIBRARY, BuildError, build, find_torch
from tools.pretended_gpu.running import environment

PYTHON = os.environ.get("FASTFT_CUDA_PYTHON", "")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON, reason="FASTFT_CUDA_PYTHON names no Python whose torch is built for CUDA"),
    pytest.mark.skipif(shutil.which("cc") is None or shutil.which("nm") is None, reason="no C compiler, or no nm"),
]

UNSUPPORTED, INVALIDATED, MERGE, UNMATCHED, UNJOINED, ISOLATION, IMPLICIT, CAPTURED_EVENT, WRONG_THREAD = range(
    900, 909
)
ILLEGAL_STATE = 401


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pretended_gpu")
    build(made, PYTHON)
    return made


Child = Callable[..., Any]


@pytest.fixture(scope="module")
def on_gpu(folder: Path) -> Child:
    """Runs a function in a process on the pretended GPU, and returns what it returns."""

    def run(function: Callable[[], Any], *needs: object, **more: str) -> Any:
        sources = [textwrap.dedent(inspect.getsource(each)) for each in (*needs, function)]
        script = "\n".join(["import json", *sources, f"print(json.dumps({function.__name__}()))"])
        more.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
        done = started(folder, "-c", script, **more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def started(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, *arguments], env=environment(folder, **more), capture_output=True, text=True, timeout=600
    )


class Cuda:
    """The runtime API; a call returns its error."""

    GLOBAL, THREAD_LOCAL, RELAXED = range(3)
    NON_BLOCKING = 1

    def __init__(self):
        import ctypes

        self.c = ctypes
        self.library = ctypes.CDLL(None)
        self.host = ctypes.create_string_buffer(64)
        self.pinned, self.device = ctypes.c_void_p(), ctypes.c_void_p()
        assert self.library.cudaMalloc(ctypes.byref(self.device), ctypes.c_size_t(64)) == 0
        assert self.library.cudaHostAlloc(ctypes.byref(self.pinned), ctypes.c_size_t(64), 0) == 0

    def stream(self, flags=NON_BLOCKING):
        made = self.c.c_void_p()
        assert self.library.cudaStreamCreateWithFlags(self.c.byref(made), flags) == 0
        return made

    def event(self):
        made = self.c.c_void_p()
        assert self.library.cudaEventCreate(self.c.byref(made)) == 0
        return made

    def recorded(self, stream):
        event = self.event()
        assert self.library.cudaEventRecord(event, stream) == 0
        return event

    def begin(self, stream, mode=GLOBAL):
        return self.library.cudaStreamBeginCapture(stream, mode)

    def end(self, stream):
        graph = self.c.c_void_p()
        error = self.library.cudaStreamEndCapture(stream, self.c.byref(graph))
        assert (error == 0) == bool(graph)
        return error, graph

    def wait(self, stream, event):
        return self.library.cudaStreamWaitEvent(stream, event, 0)

    def join(self, stream, other):
        return self.wait(stream, self.recorded(other))

    def launch(self, stream):
        """By Triton's way."""
        return self.library.cuLaunchKernel(None, 1, 1, 1, 32, 1, 1, 0, stream, None, None)

    def copy(self, to, from_, kind, stream):
        return self.library.cudaMemcpyAsync(to, from_, self.c.c_size_t(64), kind, stream)

    def malloc(self):
        return self.library.cudaMalloc(self.c.byref(self.c.c_void_p()), self.c.c_size_t(64))

    def exchange(self, mode):
        value = self.c.c_int(mode)
        assert self.library.cudaThreadExchangeStreamCaptureMode(self.c.byref(value)) == 0
        return value.value

    def in_thread(self, call):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()


def child_refusals():
    """For each name: the error of the call in question, and of ending the capture."""
    import os

    from tools.pretended_gpu import counts

    cuda = Cuda()
    lib, c = cuda.library, cuda.c
    found = {}

    def case(name, call, mode=Cuda.GLOBAL, flags=Cuda.NON_BLOCKING):
        stream = cuda.stream(flags)
        assert cuda.begin(stream, mode) == 0
        found[name] = [call(stream), cuda.end(stream)[0]]
        assert cuda.launch(stream) == 0  # the stream is as good as before

    def forked(stream):
        side = cuda.stream()
        assert cuda.wait(side, cuda.recorded(stream)) == 0
        return side

    def unjoined(stream):
        return cuda.launch(forked(stream))

    def joined(stream):
        side = forked(stream)
        return cuda.launch(side) or cuda.join(stream, side)

    def joined_by_a_third(stream):
        side = forked(stream)
        third = cuda.stream()
        return cuda.launch(side) or cuda.join(third, side) or cuda.join(stream, third)

    def joined_too_early(stream):
        side = forked(stream)
        return cuda.launch(side) or cuda.join(stream, side) or cuda.launch(side)

    def without_work(stream):
        forked(stream)
        return 0

    def merge(stream):
        other = cuda.stream()
        assert cuda.begin(other) == 0
        error = cuda.join(stream, other)
        cuda.end(other)
        return error

    def relaxed_for_a_while(stream):
        before = cuda.exchange(Cuda.RELAXED)
        error = cuda.malloc()
        assert cuda.exchange(before) == Cuda.RELAXED
        return error

    def strict(stream):
        os.environ["PRETENDED_GPU_STRICT"] = "1"
        error = cuda.launch(cuda.stream())
        del os.environ["PRETENDED_GPU_STRICT"]
        return error

    def after_refusal(stream):
        lib.cudaStreamSynchronize(stream)
        return cuda.launch(stream)

    outside, ended = cuda.recorded(cuda.stream()), cuda.stream()
    assert cuda.begin(ended) == 0
    of_ended = cuda.recorded(ended)
    assert cuda.end(ended)[0] == 0
    size = c.c_size_t(64)

    case("a kernel", cuda.launch)
    case("a stream is waited for", lib.cudaStreamSynchronize)
    case("a stream is asked about", lib.cudaStreamQuery)
    case("by the driver", lib.cuStreamSynchronize)
    case("an event of the capture is waited for", lambda s: lib.cudaEventSynchronize(cuda.recorded(s)))
    case("an event of the capture is asked about", lambda s: lib.cudaEventQuery(cuda.recorded(s)))
    case("even if relaxed", lambda s: lib.cudaEventQuery(cuda.recorded(s)), mode=Cuda.RELAXED)
    case("an event of before is asked about", lambda _: lib.cudaEventQuery(outside))
    case("an event of before, relaxed", lambda _: lib.cudaEventQuery(outside), mode=Cuda.RELAXED)
    case("the device is waited for", lambda _: lib.cudaDeviceSynchronize())
    case("the device, relaxed", lambda _: lib.cudaDeviceSynchronize(), mode=Cuda.RELAXED)
    case("a synchronous copy", lambda _: lib.cudaMemcpy(cuda.device, cuda.pinned, size, 1))
    case("malloc", lambda _: cuda.malloc())
    case("malloc, thread_local", lambda _: cuda.malloc(), mode=Cuda.THREAD_LOCAL)
    case("malloc, relaxed", lambda _: cuda.malloc(), mode=Cuda.RELAXED)
    case("malloc, relaxed for a while", relaxed_for_a_while)
    case("malloc of another thread", lambda _: cuda.in_thread(cuda.malloc))
    case("malloc of another thread, thread_local", lambda _: cuda.in_thread(cuda.malloc), mode=Cuda.THREAD_LOCAL)
    case("free", lambda _: lib.cudaFree(None))
    case("pinning", lambda _: lib.cudaHostAlloc(c.byref(c.c_void_p()), size, 0))
    case("loading code", lambda _: lib.cuModuleLoadData(c.byref(c.c_void_p()), b""))
    case("pageable to the device", lambda s: cuda.copy(cuda.device, cuda.host, 1, s))
    case("pageable from the device", lambda s: cuda.copy(cuda.host, cuda.device, 2, s))
    case("pageable, relaxed", lambda s: cuda.copy(cuda.device, cuda.host, 1, s), mode=Cuda.RELAXED)
    case("pinned to the device", lambda s: cuda.copy(cuda.device, cuda.pinned, 1, s))
    case("pinned from the device", lambda s: cuda.copy(cuda.pinned, cuda.device, 2, s))
    case("the legacy stream, captured blocking", lambda _: cuda.launch(None), flags=0)
    counts()
    case("the legacy stream", lambda _: cuda.launch(None))
    found["beside"] = counts()["work_beside_capture"]
    case("beside the capture, strict", strict)
    case("unjoined", unjoined)
    case("joined", joined)
    case("joined by a third", joined_by_a_third)
    case("joined too early", joined_too_early)
    case("forked without work", without_work)
    case("waits for an event of before", lambda s: cuda.wait(s, outside))
    case("waits for an event of an ended capture", lambda s: cuda.wait(s, of_ended))
    case("the legacy stream waits", lambda s: cuda.wait(None, cuda.recorded(s)))
    case("two captures merge", merge)
    case("begun twice", cuda.begin)
    case("ended on another stream", lambda s: cuda.end(forked(s))[0])
    case("ended by another thread", lambda s: cuda.in_thread(lambda: cuda.end(s)[0]))
    case("after a refusal", after_refusal)
    found["begun on the legacy stream"] = cuda.begin(None)
    found["ended and never begun"] = cuda.end(cuda.stream())[0]
    return found


@pytest.fixture(scope="module")
def refusals(on_gpu: Child) -> dict[str, Any]:
    found: dict[str, Any] = on_gpu(child_refusals, Cuda)
    return found


@pytest.mark.parametrize(
    ("what", "errors"),
    [
        ("a kernel", [0, 0]),
        ("a stream is waited for", [UNSUPPORTED, INVALIDATED]),
        ("a stream is asked about", [UNSUPPORTED, INVALIDATED]),
        ("by the driver", [UNSUPPORTED, INVALIDATED]),
        ("an event of the capture is waited for", [CAPTURED_EVENT, INVALIDATED]),
        ("an event of the capture is asked about", [CAPTURED_EVENT, INVALIDATED]),
        ("even if relaxed", [CAPTURED_EVENT, INVALIDATED]),
        ("an event of before is asked about", [UNSUPPORTED, INVALIDATED]),
        ("an event of before, relaxed", [0, 0]),
        ("the device is waited for", [UNSUPPORTED, INVALIDATED]),
        ("the device, relaxed", [UNSUPPORTED, INVALIDATED]),
        ("a synchronous copy", [UNSUPPORTED, INVALIDATED]),
        ("malloc", [UNSUPPORTED, INVALIDATED]),
        ("malloc, thread_local", [UNSUPPORTED, INVALIDATED]),
        ("malloc, relaxed", [0, 0]),
        ("malloc, relaxed for a while", [0, 0]),
        ("malloc of another thread", [UNSUPPORTED, INVALIDATED]),
        ("malloc of another thread, thread_local", [0, 0]),
        ("free", [UNSUPPORTED, INVALIDATED]),
        ("pinning", [UNSUPPORTED, INVALIDATED]),
        ("loading code", [UNSUPPORTED, INVALIDATED]),
        ("pageable to the device", [UNSUPPORTED, INVALIDATED]),
        ("pageable from the device", [UNSUPPORTED, INVALIDATED]),
        ("pageable, relaxed", [UNSUPPORTED, INVALIDATED]),
        ("pinned to the device", [0, 0]),
        ("pinned from the device", [0, 0]),
        ("the legacy stream, captured blocking", [IMPLICIT, INVALIDATED]),
        ("the legacy stream", [0, 0]),
        ("beside the capture, strict", [IMPLICIT, INVALIDATED]),
        ("unjoined", [0, UNJOINED]),
        ("joined", [0, 0]),
        ("joined by a third", [0, 0]),
        ("joined too early", [0, UNJOINED]),
        ("forked without work", [0, 0]),
        ("waits for an event of before", [ISOLATION, INVALIDATED]),
        ("waits for an event of an ended capture", [CAPTURED_EVENT, INVALIDATED]),
        ("the legacy stream waits", [IMPLICIT, INVALIDATED]),
        ("two captures merge", [MERGE, INVALIDATED]),
        ("begun twice", [ILLEGAL_STATE, 0]),
        ("ended on another stream", [UNMATCHED, INVALIDATED]),
        ("ended by another thread", [WRONG_THREAD, 0]),
        ("after a refusal", [INVALIDATED, INVALIDATED]),
        ("begun on the legacy stream", UNSUPPORTED),
        ("ended and never begun", ILLEGAL_STATE),
    ],
)
def test_captures_refuse_what_cuda_refuses(refusals: dict[str, Any], what: str, errors: Any) -> None:
    assert refusals[what] == errors


def test_work_beside_a_capture_is_counted(refusals: dict[str, Any]) -> None:
    assert refusals["beside"] == 1


def child_graphs():
    from tools.pretended_gpu import counts

    cuda = Cuda()
    lib, c = cuda.library, cuda.c
    stream = cuda.stream()

    def captured(*work):
        assert cuda.begin(stream) == 0
        assert not any(each() for each in work)
        error, graph = cuda.end(stream)
        nodes, executable = c.c_size_t(), c.c_void_p()
        assert error == lib.cudaGraphGetNodes(graph, None, c.byref(nodes)) == 0
        assert lib.cudaGraphInstantiateWithFlags(c.byref(executable), graph, c.c_ulonglong(0)) == 0
        assert lib.cudaGraphDestroy(graph) == 0
        return nodes.value, executable

    c.memmove(cuda.pinned, b"a" * 64, 64)
    counts()
    nodes, inner = captured(
        lambda: cuda.launch(stream),
        lambda: cuda.launch(stream),
        lambda: cuda.copy(cuda.device, cuda.pinned, 1, stream),
        lambda: lib.cudaMemsetAsync(cuda.device, 0, c.c_size_t(8), stream),
    )
    in_capture = counts()
    unchanged = c.string_at(cuda.device, 1) != b"a"
    assert lib.cudaGraphLaunch(inner, stream) == 0
    replayed = counts()
    outer_nodes, _ = captured(lambda: lib.cudaGraphLaunch(inner, stream), lambda: cuda.launch(stream))
    return {
        "nodes": [nodes, outer_nodes],
        "captured": in_capture,
        "replayed": replayed,
        "copied": [unchanged, c.string_at(cuda.device, 64) == b"a" * 64],
    }


def test_a_captured_graph_counts_its_nodes_and_each_replay_what_it_would_run(on_gpu: Child) -> None:
    found = on_gpu(child_graphs, Cuda)
    assert found["nodes"] == [4, 5]
    captured, replayed = found["captured"], found["replayed"]
    assert (captured["graph_captures"], captured["graph_instantiations"], captured["graph_launches"]) == (1, 1, 0)
    assert [captured[f"captured_{kind}"] for kind in ("kernels", "copies", "memsets", "products")] == [2, 1, 1, 0]
    assert captured["driver_launches"] == captured["h2d_pinned"] == captured["memsets"] == 0
    assert (replayed["graph_launches"], replayed["replayed_kernels"], replayed["replayed_copies"]) == (1, 2, 1)
    assert replayed["driver_launches"] == 0
    assert found["copied"] == [True, True]  # not when it was captured, but when it was launched


def child_memory():
    import torch

    from tools.pretended_gpu import counts

    host = torch.arange(1000, dtype=torch.int32)
    pinned, registered = host.pin_memory(), torch.arange(1000, dtype=torch.int32)
    cudart = torch.cuda.cudart()
    assert int(cudart.cudaHostRegister(registered.data_ptr(), registered.nbytes, 0)) == 0
    found = {"is pinned": [host.is_pinned(), pinned.is_pinned(), pinned[500:].is_pinned(), registered.is_pinned()]}
    assert int(cudart.cudaHostUnregister(registered.data_ptr())) == 0
    found["is pinned"].append(registered.is_pinned())
    device = torch.empty(1000, dtype=torch.int32, device="cuda")
    large = torch.empty(2 << 20, dtype=torch.int32)  # 8 MiB, beyond what is copied
    on_device = torch.empty(2 << 20, dtype=torch.int32, device="cuda")

    def counted(name, copy):
        counts()
        copy()
        found[name] = {key: value for key, value in counts().items() if value and key in interesting}

    interesting = {f"{way}_{kind}{bytes_}" for way in ("h2d", "d2h") for kind in ("pinned", "pageable", "synchronous")
                   for bytes_ in ("", "_bytes")} | {"stream_waits", "d2d", "d2d_bytes", "values_left_out"}  # fmt: skip
    counted("pinned, not waited for", lambda: device.copy_(pinned, non_blocking=True))
    counted("pinned", lambda: device.copy_(pinned))
    counted("pageable, not waited for", lambda: device.copy_(host, non_blocking=True))
    counted("pageable", lambda: device.copy_(host))
    counted("back", lambda: host.copy_(device))
    counted("back, pinned, not waited for", lambda: pinned.copy_(device, non_blocking=True))
    counted("item", lambda: device[0].item())
    counted("within", lambda: device.clone())
    counted("large", lambda: on_device.copy_(large))
    found["values"] = device.cpu().tolist() == list(range(1000))
    return found


def test_torch_tells_pinned_from_pageable_memory_and_copies_are_counted_by_it(on_gpu: Child) -> None:
    found = on_gpu(child_memory)
    assert found["is pinned"] == [False, True, True, True, False]
    pinned, pageable = ({f"h2d_{kind}": 1, f"h2d_{kind}_bytes": 4000} for kind in ("pinned", "pageable"))
    assert found["pinned, not waited for"] == pinned
    assert found["pageable, not waited for"] == pageable
    assert found["pageable"] == pageable | {"stream_waits": 1}
    assert found["pinned"] == pinned | {"stream_waits": 1}
    assert found["back"] == {"d2h_pageable": 1, "d2h_pageable_bytes": 4000, "stream_waits": 1}
    assert found["back, pinned, not waited for"] == {"d2h_pinned": 1, "d2h_pinned_bytes": 4000}
    assert found["item"]["stream_waits"] == 1
    assert found["within"] == {"d2d": 1, "d2d_bytes": 4000, "values_left_out": 1}
    assert found["large"]["values_left_out"] == 1
    assert found["values"] is True


def child_allocations():
    import torch

    from tools.pretended_gpu import counts

    counts()
    made = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    before = counts()
    del made
    torch.cuda.empty_cache()
    after = counts()
    try:
        torch.empty(81 << 30, dtype=torch.uint8, device="cuda")
        raised = ""
    except torch.cuda.OutOfMemoryError as error:
        raised = str(error)
    names = ("device_mallocs", "device_frees", "device_bytes", "device_bytes_peak")
    return [[each[name] for name in names] for each in (before, after)], raised


def test_allocations_are_counted_with_their_peak_and_memory_ends(on_gpu: Child) -> None:
    (before, after), raised = on_gpu(child_allocations)
    assert before == [1, 0, 64 << 20, 64 << 20]
    assert after == [0, 1, 0, 64 << 20]
    assert "out of memory" in raised


def child_products():
    import torch
    from torch import nn

    from tools.pretended_gpu import counts

    layers = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64), nn.Linear(64, 32)).cuda()
    x = torch.empty(16, 64, device="cuda")
    layers(x).sum().backward()
    counts()
    loss = layers(x).sum()
    forward = counts()["products"]
    loss.backward()
    backward = counts()["products"]
    torch.bmm(torch.empty(4, 8, 8, device="cuda"), torch.empty(4, 8, 8, device="cuda"))
    return [forward, backward, counts()["products"]]


def test_products_are_counted(on_gpu: Child) -> None:
    assert on_gpu(child_products) == [3, 5, 1]  # backward: two of each layer, but for the gradient of the input


def child_fill():
    import torch

    from tools.pretended_gpu import fill

    ids = torch.tensor([5, 50256, 7])
    device = torch.zeros(3, dtype=torch.int64, device="cuda")
    fill(device.data_ptr(), ids.numpy().tobytes())
    refused = []
    for address, values in ((ids.data_ptr(), b"x"), (device.data_ptr(), bytes(1 << 30))):
        try:
            fill(address, values)
        except ValueError as error:
            refused.append(str(error))
    return device.tolist(), device.argmax().dtype == torch.int64, refused


def test_a_device_buffer_can_be_filled(on_gpu: Child) -> None:
    ids, _, refused = on_gpu(child_fill)
    assert ids == [5, 50256, 7]
    assert len(refused) == 2
    assert all("expected room within one allocation" in each for each in refused)


def child_devices():
    import torch
    import torch.distributed as dist

    from tools.pretended_gpu import counts

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 1))
    x = torch.ones(8, device="cuda:1")
    counts()
    dist.all_reduce(x)
    dist.all_gather_into_tensor(torch.empty(8, device="cuda:1"), x)
    collectives = counts()["collectives"]
    free = [torch.cuda.mem_get_info(device)[0] for device in range(2)]
    dist.destroy_process_group()
    return torch.cuda.device_count(), x.device.index, collectives, free[0] > free[1]


def test_there_can_be_two_devices_and_collectives_are_counted(on_gpu: Child) -> None:
    assert on_gpu(child_devices, PRETENDED_GPU_DEVICES="2") == [2, 1, 2, True]
    wrong = "import torch; torch.cuda.is_available()"
    assert "expected a whole number" in started_with(on_gpu, wrong, PRETENDED_GPU_DEVICES="two")


def started_with(on_gpu: Child, script: str, **more: str) -> str:
    """The standard error of a script that fails."""
    folder = inspect.getclosurevars(on_gpu).nonlocals["folder"]
    return started(folder, "-c", script, **more).stderr


class Step:
    """Forward and backward of a nano GPT-2 on a batch that lies on the device."""

    def __init__(self):
        import numpy as np
        import torch

        from fastft.model import ops
        from fastft.model.gpt2 import GPT2, config_for
        from fastft.scaling.predict import training_set

        self.torch = torch
        batcher = ops.batcher("triton", torch.device("cuda"), is_narrow=True)
        self.batch = batcher(training_set("sample"), np.arange(8)).to("cuda")
        self.model = GPT2(config_for("nano")).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def forward_backward(self, between=lambda: None):
        with self.torch.autocast("cuda", dtype=self.torch.bfloat16):
            loss, _ = self.model(self.batch, impl="triton")
        between()
        loss.backward()
        return loss

    def update(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def warmed_up(self):
        """On a stream of its own, as torch asks of what is to be captured."""
        side = self.torch.cuda.Stream()
        side.wait_stream(self.torch.cuda.current_stream())
        with self.torch.cuda.stream(side):
            for _ in range(3):
                self.forward_backward()
                self.update()
        self.torch.cuda.current_stream().wait_stream(side)
        return self


def child_steady_step():
    from triton import knobs

    from tools.pretended_gpu import counts

    step = Step()
    launched = []
    knobs.runtime.launch_enter_hook.add(lambda _: launched.append(1))

    def steady():
        launched.clear()
        counts()
        loss = step.forward_backward()
        step.update()
        return loss, counts()

    for _ in range(3):
        steady()
    (_, first), (loss, second) = steady(), steady()
    by_triton = len(launched)
    loss.item()
    return {"first": first, "second": second, "by_triton": by_triton, "item": counts()}


def test_a_steady_step_asks_for_the_same_each_time_and_waits_for_nothing(on_gpu: Child) -> None:
    found = on_gpu(child_steady_step, Step)
    first, second = found["first"], found["second"]
    assert first == second
    assert second["driver_launches"] == found["by_triton"] > 0
    assert second["runtime_launches"] > 0
    assert second["products"] > 0
    asked = {name for name, value in second.items() if value}
    assert asked <= {
        "runtime_launches", "driver_launches", "products", "d2d", "d2d_bytes", "memsets", "memset_bytes",
        "values_left_out", "device_bytes", "device_bytes_peak", "host_bytes",
    }  # fmt: skip
    item = found["item"]
    assert (item["stream_waits"], item["d2h_pinned"] + item["d2h_pageable"]) == (1, 1)


def child_captured_step():
    """What each capture came to: the error, or nothing."""
    from tools.pretended_gpu import counts, last_refusal

    step = Step().warmed_up()
    torch = step.torch
    counts()
    step.forward_backward()
    step.update()
    found = {"eager": counts()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step.forward_backward()
    found["captured"] = counts()
    graph.replay()
    found["replayed"] = counts()
    step.update()
    loss.item()

    def capture(name, work):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
            found[name] = ["", ""]
        except RuntimeError as error:
            first = error
            while first.__context__ is not None:
                first = first.__context__
            found[name] = [str(first).partition("\n")[0], last_refusal()]
        step.optimizer.zero_grad()

    def unjoined():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step.batch.weights + 1

    capture("again", step.forward_backward)
    capture("item", lambda: step.forward_backward().item())
    pageable = torch.ones(8)
    capture("pageable", lambda: step.forward_backward(lambda: pageable.to("cuda", non_blocking=True)))
    capture("unjoined", lambda: step.forward_backward(unjoined))
    capture("nonzero", lambda: step.forward_backward(step.batch.weights.nonzero))
    capture("default stream", lambda: torch.cuda.current_stream().wait_stream(torch.cuda.default_stream()))
    capture("at last", step.forward_backward)
    return found


def test_a_captured_step_passes_where_it_is_clean_and_fails_as_on_a_gpu_where_not(on_gpu: Child) -> None:
    found = on_gpu(child_captured_step, Step)
    eager, captured, replayed = found["eager"], found["captured"], found["replayed"]
    kernels = captured["captured_kernels"]
    # Outside of the graph torch only sets its random state; AdamW's and zero_grad's work is not in it.
    assert captured["driver_launches"] == captured["products"] == captured["stream_waits"] == captured["refusals"] == 0
    assert captured["captured_products"] == eager["products"] == replayed["replayed_products"]
    assert eager["driver_launches"] < kernels <= eager["driver_launches"] + eager["runtime_launches"]
    assert replayed["replayed_kernels"] == kernels
    assert (replayed["graph_launches"], replayed["driver_launches"], replayed["runtime_launches"]) == (1, 0, 0)
    assert found["again"] == found["at last"] == ["", ""]
    not_permitted = "CUDA error: operation not permitted when stream is capturing"
    assert found["item"] == [not_permitted, "cudaStreamSynchronize"]
    assert found["nonzero"] == [not_permitted, "cudaStreamSynchronize"]
    assert "unless the CPU tensor is pinned" in found["pageable"][0]  # torch asks is_pinned before CUDA would refuse
    assert found["unjoined"] == ["CUDA error: capturing stream has unjoined work", "cudaStreamEndCapture"]
    assert found["default stream"][0] == "CUDA error: dependency created on uncaptured work in another stream"


def test_a_function_that_torch_wants_and_the_library_lacks_is_named_before_anything_runs(
    folder: Path, tmp_path: Path
) -> None:
    lacking = (folder / LIBRARY).read_bytes().replace(b"\0cudaMemGetInfo\0", b"\0xudaMemGetInfo\0")
    (tmp_path / LIBRARY).write_bytes(lacking)
    done = started(tmp_path, "-c", "import torch")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cudaMemGetInfo" in done.stderr
    assert "build it again" in done.stderr


def child_unwritten():
    import ctypes

    from tools.pretended_gpu import counts

    library = ctypes.CDLL(None)
    codes = [library.cublasSnrm2_v2(), library.cublasSnrm2_v2()]
    function = ctypes.c_void_p()
    assert library.cuGetProcAddress_v2(b"cuGreenCtxCreate", ctypes.byref(function), 13000, 0, None) == 0
    codes.append(ctypes.CFUNCTYPE(ctypes.c_int)(function.value)())
    found = ctypes.c_int()
    library.cudaGetDriverEntryPointByVersion(b"cuOfTheFuture", ctypes.byref(function), 13000, 0, ctypes.byref(found))
    assert found.value == 1
    return codes, counts()["unwritten_calls"]


def test_what_nobody_has_written_is_counted_and_says_so_once(folder: Path, on_gpu: Child) -> None:
    assert "cublasSnrm2_v2" in build(folder, PYTHON).unwritten
    assert on_gpu(child_unwritten) == [[0, 0, 801], 3]
    script = "\n".join(["import json", textwrap.dedent(inspect.getsource(child_unwritten)), "child_unwritten()"])
    lines = started(folder, "-c", script).stderr.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "nobody has written cublasSnrm2_v2",
        "nobody has written cuGreenCtxCreate",
        "torch asked for the driver function cuOfTheFuture, which its CUDA's header does not declare",
    ]


def test_a_python_without_cuda_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="expected a Python that runs"):
        find_torch(str(tmp_path / "python"))
    with pytest.raises(BuildError, match="there is no"):
        environment(tmp_path)


def test_a_library_that_is_up_to_date_is_not_built_again(folder: Path) -> None:
    before = (folder / LIBRARY).stat().st_mtime_ns
    build(folder, PYTHON)
    assert (folder / LIBRARY).stat().st_mtime_ns == before
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "torch": "1.0"}))
    build(folder, PYTHON)
    assert (folder / LIBRARY).stat().st_mtime_ns > before


def measured(folder: Path, script: str, *arguments: str, path: Path) -> Any:
    """What a measuring script writes."""
    command = ["-m", f"tools.pretended_gpu.{script}", "--data", "sample", "--json", str(path), *arguments]
    done = started(folder, *command, TRITON_CACHE_DIR=str(folder / "triton"))
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return json.loads(path.read_text())


def test_a_step_of_fastft_is_measured(folder: Path, tmp_path: Path) -> None:
    arguments = ("--size", "nano", "--examples", "4", "--steps", "2")
    (of_four,) = measured(folder, "measure_step", *arguments, path=tmp_path / "step.json")
    parts = of_four["parts"]
    assert list(parts) == ["batch", "forward and backward", "update", "reading the result"]
    asked = parts["forward and backward"]["counts"]
    assert asked["graph_launches"] == 1
    assert asked["replayed_kernels"] > 0
    assert "stream_waits" not in asked
    assert not parts["batch"]["counts"]


def test_a_step_of_transformers_is_measured(folder: Path, tmp_path: Path) -> None:
    if started(folder, "-c", "import transformers").returncode:
        pytest.skip("the Python of FASTFT_CUDA_PYTHON has no transformers")
    arguments = ("--size", "nano", "--examples", "2", "--steps", "2", "--no-compile")
    (eager,) = measured(folder, "measure_transformers", *arguments, path=tmp_path / "eager.json")
    (unclipped,) = measured(folder, "measure_transformers", *arguments, "--clip", "0", path=tmp_path / "unclipped.json")
    launches = [each["parts"]["update"]["counts"]["runtime_launches"] for each in (eager, unclipped)]
    assert launches[0] > launches[1] > 0
    assert eager["parts"]["forward and backward"]["counts"]["products"] > 0


def test_a_call_of_an_operation_is_measured(folder: Path, tmp_path: Path) -> None:
    found = measured(folder, "measure_operation", "--calls", "5", path=tmp_path / "operation.json")
    assert list(found) == ["the kernel alone", "custom_op", "Library.impl", "triton_op"]
    assert all(each["us"] >= each["least_us"] > 0 for each in found.values())


def test_sizes_of_batches_are_counted(folder: Path, tmp_path: Path) -> None:
    (few,) = measured(folder, "count_shapes", "--examples", "8", "--epochs", "1", path=tmp_path / "sizes.json")
    assert 1 <= few["sizes"] <= few["steps"]
    assert few["tokens"][0] <= few["tokens"][1]


@pytest.mark.parametrize(
    "chosen",
    [
        ("--recipe", "book"),
        ("--decay_all", "true", "--accumulate", "2", "--tie_head", "false"),
        ("--batching", "padded"),
        ("--dtype", "fp16", "--activation_checkpointing", "true"),
        ("--impl", "reference"),
    ],
    ids=" ".join,
)
def test_training_goes_to_its_end(folder: Path, tmp_path: Path, chosen: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    command = ("-m", "fastft", "train", "--device", "cuda", "--model", "pico", "--data", "sample", "--out", str(run))
    # Nothing is computed: a loss may be any number, or none.
    limits = ("--steps", "4", "--eval_every", "2", "--max_skipped", "100")
    done = started(folder, *command, *limits, *chosen, PYTHONPATH=with_first(without_cudnn(tmp_path), folder))
    assert done.returncode == 0, done.stderr
    assert (run / "model" / "model.safetensors").is_file()


def with_first(path: Path, folder: Path) -> str:
    return os.pathsep.join([str(path), environment(folder)["PYTHONPATH"]])


def test_scripts_say_where_they_must_run(tmp_path: Path) -> None:
    script = "from tools.pretended_gpu import counts; counts()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    assert "this process has no pretended GPU" in done.stderr
