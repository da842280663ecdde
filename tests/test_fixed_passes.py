"""Passes of fixed shapes: equal to others, without a look at the device, recorded where CUDA is."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from specguard.backends.local.layer import Row
from specguard.backends.pytorch import fixed, fused
from specguard.backends.pytorch.kv import KVBuffer
from specguard.backends.pytorch.layer import TorchLayer
from specguard.backends.pytorch.loading import load_model
from specguard.backends.pytorch.reads import LateReads
from specguard.backends.pytorch.slots import Slot, SlotPool
from specguard.core import SpecguardError
from tests.conftest import make_checkpoint
from tests.contract.calls import PREFIX, capture, generate_job, run, run_together, score_job

FAMILIES = {"Llama": {"head_dim": 64}, "Qwen2": {}, "Qwen3": {"head_dim": 32}}


@pytest.fixture(scope="module", params=[*FAMILIES, "Llama in bfloat16", "Llama in float16"])
def layers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TorchLayer, TorchLayer]:
    """One model twice: its passes as they come, and in fixed shapes."""
    family, _, number_type = request.param.partition(" in ")
    folder = make_checkpoint(tmp_path_factory.mktemp(family), family, **FAMILIES[family])
    found = []
    for _ in range(2):
        layer = load_model(str(folder), dtype=number_type or "float32").layer
        assert isinstance(layer, TorchLayer)
        assert layer.why_not_fused is None
        found.append(layer)
    found[1].fix_shapes()
    return found[0], found[1]


def forward(layer: TorchLayer, rows: list[Row], seed: int = 0, depth: int = 0) -> torch.Tensor:
    """Logits of random tokens; those behind ``start`` have positions as far as they see."""
    rng = np.random.default_rng(seed)
    positions: list[int] = []
    for row in rows:
        if row.visible is None:
            positions += range(row.start, row.stop)
        else:
            positions += (row.base + row.visible.sum(1) - 1).tolist()
    token_ids = rng.integers(5, 900, size=len(positions)).tolist()
    with layer.computing("model"):
        outputs = layer.forward(rows, token_ids, positions, range(len(positions)))
    assert outputs is not None
    return outputs.logits


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    widths=st.lists(st.integers(1, 6), min_size=5, max_size=5),
    is_tree=st.booleans(),
    left=st.sets(st.integers(0, 4)),
    seed=st.integers(0, 2**32 - 1),
)
def test_they_come_to_what_other_passes_come_to(
    layers: tuple[TorchLayer, TorchLayer],
    lengths: list[int],
    widths: list[int],
    is_tree: bool,
    left: set[int],
    seed: int,
) -> None:
    """Sequences of any length, some of which take no part, and further queries, in trees, too."""
    tolerance = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
    found = []
    for layer in layers:
        buffers = [layer.new_buffer() for _ in lengths]
        first = [Row(buffer, 0, n, 0) for buffer, n in zip(buffers, lengths, strict=True)]
        logits = [forward(layer, first, seed)]
        rows = []
        for number, (buffer, n) in enumerate(zip(buffers, lengths, strict=True)):
            if number in left:
                continue
            width = widths[number]
            siblings = np.eye(width, dtype=np.bool_) if is_tree else None
            rows.append(Row(buffer, n, width, n, siblings))
        if rows:
            logits.append(forward(layer, rows, seed + 1))
        found.append(torch.cat(logits).float())
    deviation = (found[0] - found[1]).std(-1) / found[0].std(-1)
    assert float(deviation.max()) < tolerance[layers[0].number_type]


@pytest.mark.parametrize("is_spoiled", [False, True])
def test_they_are_compared_at_load_at_late_positions_too(
    is_spoiled: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = load_model(str(checkpoint)).layer
    assert isinstance(layer, TorchLayer)
    with layer.computing("model"):
        expected = layer._sample_passes()
        if is_spoiled:
            attention = fixed.attention
            monkeypatch.setattr(fixed, "attention", lambda *rest: 1.01 * attention(*rest))
        layer.fix_shapes(expected, 1e-4)
    assert (layer.fixed is None) == is_spoiled
    assert type(layer.new_buffer()) is (KVBuffer if is_spoiled else Slot)
    assert layer.why_not_recorded == (
        "passes of fixed shapes come to other logits" if is_spoiled else "only CUDA records passes"
    )


class Watch(TorchDispatchMode):
    """What operations a run consists of, with their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        shapes = [tuple(each.shape) for each in args if isinstance(each, torch.Tensor)]
        self.operations.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


# They read a number, or how many there are, back from the device; or bring one there.
WAITING = "_local_scalar_dense", "nonzero", "masked_select", "unique", "aten.scalar_tensor", "lift"


def test_nothing_in_them_depends_on_numbers(layers: tuple[TorchLayer, TorchLayer]) -> None:
    layer = layers[1]
    assert layer.fixed is not None
    buffers = [layer.new_buffer() for _ in range(3)]
    forward(layer, [Row(buffer, 0, 9, 0) for buffer in buffers])
    seen, addresses = [], set()
    for rows in (
        [Row(buffers[2], 9, 2, 9)],
        [Row(buffers[0], 9, 2, 9), Row(buffers[2], 4, 1, 4)],
        [Row(buffer, 200, 2, 200) for buffer in buffers],
    ):
        shape = layer.fixed.shape_of(rows)
        assert shape == fixed.FixedShape(4, 2, 256)
        forward(layer, rows)
        recorded = layer.fixed._passes[shape]
        addresses.add((recorded._numbers.data_ptr(), recorded._visible.data_ptr()))
        with torch.inference_mode(), Watch() as watch:
            recorded.run()
        seen.append(watch.operations)
    assert seen[0] == seen[1] == seen[2]
    assert len(addresses) == 1
    assert not [name for name, _ in seen[0] if any(each in name for each in WAITING)]
    # No operation sees more than a head's columns of all slots, whatever the pool holds.
    assert len(seen[0]) < 80 * layer.num_layers


def test_a_pool_grows_with_its_sequences_and_gives_back(
    layers: tuple[TorchLayer, TorchLayer],
) -> None:
    own, layer = layers
    assert layer.fixed is not None
    pool = layer.fixed._pool
    buffers = [layer.new_buffer() for _ in range(2)]
    assert [buffer.number for buffer in buffers if isinstance(buffer, Slot)] == [0, 1]
    others = [own.new_buffer() for _ in range(2)]
    forward(layer, [Row(buffer, 0, 9, 0) for buffer in buffers], seed=3)
    forward(own, [Row(buffer, 0, 9, 0) for buffer in others], seed=3)
    buffers += [layer.new_buffer() for _ in range(9)]  # more slots than there were
    shape = layer.fixed.shape_of([Row(buffers[1], 9, 1, 9)])
    columns, stop = pool.capacity, pool.capacity + 5
    for each, buffer in (layer, buffers[1]), (own, others[1]):
        forward(each, [Row(buffer, 9, stop - 9, 9)], seed=4)  # more columns than there were
    assert pool.capacity > max(columns, stop)
    found = forward(layer, [Row(buffers[1], stop, 1, stop)], seed=5)
    wanted = forward(own, [Row(others[1], stop, 1, stop)], seed=5)
    assert float((found - wanted).float().std() / wanted.float().std()) < 0.1
    assert layer.fixed.shape_of([Row(buffers[1], stop, 1, stop)]) != shape
    del buffers[0]
    assert layer.new_buffer().number == 0  # type: ignore[attr-defined]
    buffers.clear()
    gc.collect()
    assert not pool._slots


def test_a_slot_that_was_spoiled_is_clean_for_the_next(
    layers: tuple[TorchLayer, TorchLayer],
) -> None:
    layer = layers[1]
    buffer = layer.new_buffer()
    forward(layer, [Row(buffer, 0, 9, 0)])
    assert buffer.data is not None
    with layer.computing("model"):
        buffer.data.fill_(float("nan"))
    del buffer
    buffer = layer.new_buffer()
    assert bool(forward(layer, [Row(buffer, 0, 9, 0)]).isfinite().all())


def test_many_queries_and_captures_run_as_they_come(layers: tuple[TorchLayer, TorchLayer]) -> None:
    layer = layers[1]
    assert layer.fixed is not None
    buffers = [layer.new_buffer() for _ in range(2)]
    assert layer.fixed.shape_of([Row(buffers[0], 0, 256, 0)]) == fixed.FixedShape(1, 256, 256)
    assert layer.fixed.shape_of([Row(buffers[0], 0, 257, 0)]) is None
    assert layer.fixed.shape_of([Row(buffers[1], 0, 129, 0)]) is None
    captured = Row(buffers[0], 0, 4, 0)
    captured.captures.append(Any)  # type: ignore[arg-type]
    assert layer.fixed.shape_of([captured]) is None


def test_one_engine_mixes_all_kinds_of_passes(checkpoint: Path) -> None:
    engines = load_model(str(checkpoint)), load_model(str(checkpoint))
    layer = engines[1].layer
    assert isinstance(layer, TorchLayer)
    layer.fix_shapes()
    wanted = capture(PREFIX)
    for engine in engines:
        engine.layer.reads_late = True  # type: ignore[misc]
    found = []
    for engine in engines:
        jobs = [generate_job(engine, PREFIX[number:], 3, 9, key=number) for number in range(3)]
        steps = [[each.token_ids for each in drawn] for drawn in run_together(engine, jobs)]
        [seen] = run(engine, score_job(steps[0][:1], key=0, capture=wanted))
        assert seen.blocks is not None
        found.append((steps, seen.token_logprobs, seen.blocks[-1].source_mass))
    assert found[0][0] == found[1][0]
    for own, other in zip(found[0][1:], found[1][1:], strict=True):
        np.testing.assert_allclose(own, other, atol=1e-4)


class Recorder:
    """Stands for `torch.cuda`: what is recorded runs again, into the same output."""

    def __init__(self, passes: fixed.FixedPasses, error: Exception | None) -> None:
        self._passes, self._error = passes, error
        self.num_recorded = self.num_replayed = 0

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        graph = SimpleNamespace()

        def replay() -> None:
            [wanted] = [each for each in self._passes._passes.values() if each.graph is graph]
            assert wanted.output is not None
            self.num_replayed += 1
            wanted.output.copy_(wanted.run())

        graph.replay = replay
        return graph

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        if self._error is not None:
            raise self._error
        self.num_recorded += 1
        yield

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    stream = device

    def current_stream(self, device: Any = None) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)

    Stream = current_stream

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, 0


@pytest.mark.parametrize(
    "error",
    [
        None,
        RuntimeError("CUDA error: operation not permitted\nmore about it"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_passes_are_recorded_the_second_time_or_run_as_they_are(
    error: Exception | None, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, layer = load_model(str(checkpoint)).layer, load_model(str(checkpoint)).layer
    assert isinstance(own, TorchLayer)
    assert isinstance(layer, TorchLayer)
    layer.fix_shapes()
    assert layer.fixed is not None
    layer.fixed.why_not_recorded = None
    recorder = Recorder(layer.fixed, error)
    for name in "CUDAGraph", "graph", "device", "stream", "current_stream", "Stream":
        monkeypatch.setattr(torch.cuda, name, getattr(recorder, name))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", recorder.graph_pool_handle)
    buffer, other = layer.new_buffer(), own.new_buffer()

    def step(number: int) -> None:
        found = forward(layer, [Row(buffer, number, 1, number)], seed=number)
        wanted = forward(own, [Row(other, number, 1, number)], seed=number)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    for number in range(4):
        step(number)
    if error is not None:  # what is due to memory may be otherwise with another shape
        reason = None if "memory" in str(error) else "CUDA error: operation not permitted"
        assert layer.why_not_recorded == reason
        assert recorder.num_recorded == 0
        return
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 3)
    slots = [layer.new_buffer() for _ in range(4)]  # the pool is another tensor now
    for number in range(4, 7):
        step(number)
    assert (recorder.num_recorded, recorder.num_replayed) == (2, 5)
    assert len(slots) == 4


def test_a_pool_that_finds_no_memory_stays_as_it_was(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = load_model(str(checkpoint)).layer
    assert isinstance(layer, TorchLayer)
    layer.fix_shapes()
    held = [layer.new_buffer() for _ in range(4)]

    def refuse(*arguments: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(SlotPool, "_zeros", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            layer.new_buffer()
        with pytest.raises(SpecguardError, match="memory ran out"):
            forward(layer, [Row(held[0], 0, 1200, 0)])
    assert bool(forward(layer, [Row(held[3], 0, 9, 0)]).isfinite().all())
    assert layer.new_buffer().number == 4  # type: ignore[attr-defined]


def test_both_ways_of_norming_agree() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    modules = [
        SimpleNamespace(weight=SimpleNamespace(data=each), variance_epsilon=1e-6) for each in weight
    ]
    states = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1))
    for norm, own in (fused._norm(*modules), states), (fused._norm(modules[0]), states[:, 0]):
        expected = fused._normed(own, norm)
        torch.testing.assert_close(fused._normed_at_once(own, norm), expected)


def test_what_was_begun_early_is_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []

    class Event:
        number = 0

        def record(self, stream: Any) -> None:
            Event.number += 1
            self.own = Event.number

        def synchronize(self) -> None:
            waited.append(self.own)

    empty_like = torch.empty_like
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **rest: empty_like(tensor))
    reads = LateReads(torch.device("cuda"))
    tensors = [torch.tensor([number]) for number in range(20)]
    for tensor in tensors:
        reads.begin(tensor)
    assert [reads.end(tensor).tolist() for tensor in tensors[::-1]] == [
        [number] for number in range(20)
    ][::-1]
    assert waited == list(range(20, 12, -1))  # the others are copied when they are asked for
    assert LateReads(torch.device("cpu")).end(tensors[3]).tolist() == [3]


def test_a_buffer_of_a_slot_is_like_any_other(layers: tuple[TorchLayer, TorchLayer]) -> None:
    own, layer = layers
    found = []
    for each in own, layer:
        buffer, copy = each.new_buffer(), each.new_buffer()
        assert isinstance(buffer, KVBuffer)
        forward(each, [Row(buffer, 0, 9, 0)])
        with each.computing("model"):
            buffer.copy_columns(4, [6, 8])
            copy.copy_from(buffer, 6)
        found.append(forward(each, [Row(copy, 6, 2, 6)], seed=1))
    assert float((found[0] - found[1]).float().std() / found[0].float().std()) < 0.1
