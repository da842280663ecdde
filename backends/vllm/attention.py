"""Attention of the last layers, read beside vLLM's paged cache.

vLLM's kernels hand out no weights, and each lays its cache out in a way of its own. So the keys of
the last layers are kept a second time, by slot, as they are written; for a request that asks, the
queries of its step's rows are kept as well, and its block table says which keys came before them.

Uses what is private to one version of vLLM: `make_tap` says where it cannot be done.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specguard.backends.checkpoint import Checkpoint
from specguard.backends.local.layer import RowCapture
from specguard.backends.pytorch.attention import DeviceCapture, attention_block
from specguard.core.engine import AttentionBlock, Capture
from specguard.core.errors import UsageError

NUM_LAYERS = 4  # the last ones, whose keys are kept; those of others are gone when a step is read
# Implementations that write keys apart from attending, and whose metadata has a block table. Only
# the first has been run.
KNOWN_IMPLEMENTATIONS = ("CPUAttentionBackendImpl", "FlashAttentionImpl", "TritonAttentionImpl")


@dataclass(slots=True, eq=False)
class Tapped:
    """A step whose rows are awaited: positions c-1 .. c+n-2 of the request ``name``.

    ``queries`` are by layer, those of the rows seen so far; ``layers`` the finished blocks.
    """

    name: str
    capture: Capture
    num_tokens: int
    queries: dict[int, list[Tensor]] = field(default_factory=dict)
    layers: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """The first row's position."""
        return len(self.capture.is_source) - 1

    @property
    def stop(self) -> int:
        """The position behind the last row."""
        return self.first + self.num_tokens

    def blocks(self) -> tuple[AttentionBlock, ...]:
        """From the lowest layer to the top one."""
        return tuple(
            AttentionBlock(*(part.cpu().numpy() for part in self.layers[layer]))
            for layer in sorted(self.layers)
        )


class _Layer:
    """A layer's keys by slot, written as vLLM writes its own."""

    def __init__(self, tap: "AttentionTap", number: int, layer: Any, num_slots: int) -> None:
        self._tap, self._number, self._scale = tap, number, float(layer.impl.scale)
        self._update, self._forward = layer.impl.do_kv_cache_update, layer.impl.forward
        # One more: the slot -1 stands for padding, and is the last one.
        shape = num_slots + 1, layer.num_kv_heads, layer.head_size
        self._keys = torch.zeros(shape, dtype=tap.dtype, device=layer.kv_cache.device)
        layer.impl.do_kv_cache_update, layer.impl.forward = self.update, self.forward

    def update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        self._keys[slot_mapping] = key[: len(slot_mapping)].to(self._keys.dtype)
        self._update(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self, layer: Any, query: Tensor, key: Any, value: Any, kv_cache: Any, metadata: Any,
        *rest: Any, **more: Any,
    ) -> Any:  # fmt: skip
        output = self._forward(layer, query, key, value, kv_cache, metadata, *rest, **more)
        if metadata is not None:
            for tapped in self._tap.under_way:
                if self._number >= self._tap.num_layers - tapped.capture.num_layers:
                    self._read(tapped, query, metadata)
        return output

    def _read(self, tapped: Tapped, query: Tensor, metadata: Any) -> None:
        row = self._tap.row_of(tapped.name)
        if row is None:
            return
        begin, end = (int(place) for place in metadata.query_start_loc[row : row + 2])
        length = int(metadata.seq_lens[row])
        start = length - (end - begin)  # the position of the request's first query in this pass
        low, high = max(start, tapped.first), min(length, tapped.stop)
        if low >= high:
            return
        if low == tapped.first:
            tapped.queries[self._number] = []  # anew, where a pass is repeated
        parts = tapped.queries.get(self._number)
        if parts is None:  # the first rows lie in the cache: the request is asked again
            return
        parts.append(query[begin + low - start : begin + high - start].clone())
        if high == tapped.stop:
            tapped.layers[self._number] = self._block(tapped, torch.cat(parts), row, metadata)

    def _block(
        self, tapped: Tapped, queries: Tensor, row: int, metadata: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The step's block, from its queries [n, heads, dim] and all keys before its end."""
        size = self._tap.block_size
        blocks = metadata.block_table[row, : -(-tapped.stop // size)].long()
        within = torch.arange(size, device=blocks.device)
        slots = (blocks[:, None] * size + within).flatten()[: tapped.stop]
        source = torch.from_numpy(tapped.capture.is_source).to(queries.device)
        wanted = DeviceCapture(
            RowCapture(tapped.capture, [], []), slice(None), slice(None),
            source.float(), (~source).float(), 0,
        )  # fmt: skip
        keys = self._keys[slots].transpose(0, 1)
        return attention_block(queries.transpose(0, 1), keys, self._scale, wanted)


class AttentionTap:
    """The last layers of one engine. All but `check` happens in the driver's thread."""

    def __init__(self, runner: Any, layers: list[Any], config: Any) -> None:
        self._runner = runner
        self.num_layers = len(layers)
        self.dtype = config.model_config.dtype
        self.block_size = int(runner.input_batch.block_table[0].block_size)
        self.under_way: list[Tapped] = []
        num_slots = config.cache_config.num_gpu_blocks * config.cache_config.block_size
        self._first = max(0, self.num_layers - NUM_LAYERS)
        for number in range(self._first, self.num_layers):
            _Layer(self, number, layers[number], num_slots)

    def check(self, num_layers: int, model: str) -> None:
        """Refuse more layers than there are, or than keys are kept of.

        Raises:
            UsageError: the number is too large.
        """
        if num_layers > self.num_layers:
            raise UsageError(
                f"attention of {num_layers} layers is asked for and {model} has {self.num_layers}"
            )
        if num_layers > NUM_LAYERS:
            raise UsageError(
                f"attention of {num_layers} layers is asked for and vLLM keeps that of {NUM_LAYERS}"
            )

    def begin(self, name: str, capture: Capture, num_tokens: int) -> Tapped:
        """Read a request's step, once it comes."""
        tapped = Tapped(name, capture, num_tokens)
        self.under_way.append(tapped)
        return tapped

    def end(self, tapped: Tapped) -> None:
        """The request is over; more than once does no harm."""
        if tapped in self.under_way:
            self.under_way.remove(tapped)

    def row_of(self, name: str) -> int | None:
        """The request's row of the pass, if it takes part."""
        row: int | None = self._runner.input_batch.req_id_to_index.get(name)
        return row


def make_tap(llm: Any, checkpoint: Checkpoint) -> AttentionTap | str:
    """Tap an engine that has not computed yet; else the reason why it cannot be done."""
    if checkpoint.capture_refusal is not None:
        return checkpoint.capture_refusal
    config = llm.vllm_config
    if config.parallel_config.world_size > 1:
        return "the model is split over several workers"
    if config.use_v2_model_runner:
        return "vLLM's second model runner has not been tried: VLLM_USE_V2_MODEL_RUNNER=0 avoids it"
    graphs = config.compilation_config.cudagraph_mode
    if graphs is not None and graphs.has_full_cudagraphs():
        return "CUDA graphs hide it: --engine-arg enforce_eager=true"
    runner = getattr(llm.model_executor.driver_worker.worker, "model_runner", None)
    found = config.compilation_config.static_forward_context
    layers = [layer for layer in found.values() if hasattr(layer, "impl")]
    names = {type(layer.impl).__name__ for layer in layers}
    if runner is None or len(layers) != len(found) or len(names) != 1:
        return "the model has other layers than plain attention"
    [name] = names
    if name not in KNOWN_IMPLEMENTATIONS:
        return f"vLLM attends by {name}, which lays its work out otherwise"
    if len(runner.input_batch.block_table.block_tables) != 1:
        return "the layers have caches of several kinds"
    return AttentionTap(runner, layers, config)
