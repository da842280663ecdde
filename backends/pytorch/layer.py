"""A transformers model as a tensor layer: its passes over rows, with masks and capture.

A pass is one sequence of tokens to the model, whoever they are of; attention sees to it that every
row looks at its own buffer. A model that brings its own attention runs row by row. Knows nothing of
steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from specguard.backends.local.layer import Outputs, Row, RowCapture
from specguard.backends.pytorch.attention import (
    ATTENTION_NAME,
    AttentionPass,
    DeviceCapture,
    PlacedRow,
)
from specguard.backends.pytorch.fused import FusedLayers, why_not_fused
from specguard.backends.pytorch.kv import KVBuffer, PassCache
from specguard.backends.pytorch.sampling import describe, first_choices, sample, warp
from specguard.core.engine import FloatArray, Sampling
from specguard.core.errors import SpecguardError

# Of logits of fused layers, relative to the largest: a wrong layer is off by a multiple of that.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.05}
_LATE = 4096  # a position that is checked
_MOST_WAITING_LOGITS = 2**16  # numbers; where passes are larger, describing them alone costs little


class TorchLayer:
    """Runs the passes of one model.

    Logits are cut to ``num_tokens``: rows of a padded vocabulary stand for no token, and the other
    model of a pair may not have them. ``is_packed`` rounds the weights to 4 bits. ``number_type``
    is what is computed in, None: what the model holds. ``why_not_fused`` says why transformers' own
    layers run.

    Raises:
        SpecguardError: the model keeps a state that cannot be cut back, or has attention that
            these passes cannot express, or is to be packed and cannot be fused.
    """

    most_waiting_logits = _MOST_WAITING_LOGITS

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        num_tokens: int,
        is_packed: bool = False,
        number_type: torch.dtype | None = None,
    ) -> None:
        self.model = model.eval()
        self._num_tokens = num_tokens
        self.device = model.device
        self.reads_late = self.device.type != "cpu"
        config = model.config.get_text_config()
        self.num_layers = int(config.num_hidden_layers)
        self._layer_types = set(getattr(config, "layer_types", None) or [])
        self._window = getattr(config, "sliding_window", None)
        self._has_our_attention = config._attn_implementation == ATTENTION_NAME
        self._placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self._compute_in(model.dtype)
        self._head_input: Tensor | None = None
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise SpecguardError(f"{name} has no output head: it is not a causal language model")
        head.register_forward_pre_hook(self._keep_head_input)
        self._fused: FusedLayers | None = None
        self.why_not_fused = why_not_fused(model)
        if self.why_not_fused is None and not self._has_our_attention:
            self.why_not_fused = "it brings its own attention"
        with torch.inference_mode():
            self._probe(name)
            if self.why_not_fused is None:
                self._fuse(is_packed, number_type or model.dtype)
            elif is_packed:
                raise SpecguardError(
                    f"{name} cannot be rounded to 4 bits: {self.why_not_fused}", "try --dtype auto"
                )
            if self._fused is None and number_type is not None:
                model.to(number_type)
                self._compute_in(number_type)
            if number_type is not None:
                self._probe(name)

    def new_buffer(self) -> KVBuffer:
        """An empty buffer."""
        return KVBuffer(self.num_layers)

    def forward(
        self,
        rows: Sequence[Row],
        token_ids: Sequence[int] | Tensor,
        positions: Sequence[int],
        wanted: Sequence[int] | None,
    ) -> Outputs | None:
        """Forward tokens [N]; hidden states and logits of the wanted queries."""
        tokens = token_ids if isinstance(token_ids, Tensor) else self._tensor(list(token_ids))
        places = self._tensor(list(positions))
        if not self._has_our_attention:
            return self._forward_one_by_one(rows, tokens, places, wanted)
        placed = self._place(rows)
        if self._fused is not None:
            hidden = self._fused(tokens, places, max(positions) + 1, placed)
            if wanted is not None:
                hidden = self._rows_of(hidden, wanted)
                logits = self._fused.logits(hidden)
        else:
            attention = AttentionPass(placed)
            cache = PassCache()
            output = self._call(
                wanted, tokens, places, self._placeholder, cache, attention_pass=attention
            )
            self._check_cache(cache.num_updates, attention.num_layers_seen)
            if wanted is not None:
                hidden, logits = self._taken(output, wanted)
        for row in placed:
            for capture in row.captures:
                capture.finish()
        return None if wanted is None else Outputs(hidden, logits[:, : self._num_tokens])

    def sample(
        self, logits: Tensor, owners: Sequence[int], sampling: Sampling, uniforms: FloatArray
    ) -> Tensor:
        """Token ids [N]."""
        return sample(logits, sampling, uniforms, self._owners(owners, len(logits)))

    def read(self, token_ids: Tensor) -> list[int]:
        """Token ids as numbers."""
        found: list[int] = token_ids.tolist()
        return found

    def describe(
        self, parts: Sequence[tuple[Tensor, Sequence[int], Tensor | Sequence[int]]]
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [N]."""
        logits = parts[0][0] if len(parts) == 1 else torch.cat([part for part, _, _ in parts])
        rows: list[int] = []
        first = 0
        for part, owners, _ in parts:
            rows += [first + owner for owner in owners]
            first += len(part)
        token_ids = [
            ids if isinstance(ids, Tensor) else self._tensor(list(ids)) for _, _, ids in parts
        ]
        wanted = token_ids[0] if len(parts) == 1 else torch.cat(token_ids)
        return describe(logits, wanted, self._owners(rows, len(logits)))

    def first_choices(self, logits: Tensor) -> FloatArray:
        """The most probable token id of each row."""
        found: FloatArray = first_choices(logits).cpu().numpy()
        return found

    def warp(self, logits: Tensor, sampling: Sampling) -> FloatArray:
        """Warped probabilities."""
        return self.numpy(warp(logits, sampling))

    def sums(
        self, hidden: Sequence[Tensor], rows: Sequence[int], owners: Sequence[int], count: int
    ) -> FloatArray:
        """Sums of hidden states by owner."""
        whole = torch.cat(list(hidden))
        found = whole.new_zeros(count, whole.shape[1], dtype=torch.float32)
        found.index_add_(0, self._tensor(list(owners)), whole[self._tensor(list(rows))].float())
        return self.numpy(found)

    def take(self, outputs: Outputs, rows: Sequence[int]) -> Outputs:
        """Some rows of outputs."""
        if len(rows) == len(outputs.logits) and _is_range(rows):
            return outputs
        wanted = self._tensor(list(rows))
        return Outputs(outputs.hidden[wanted], outputs.logits[wanted])

    def joined(self, parts: Sequence[Outputs]) -> Outputs:
        """Outputs one after the other."""
        if len(parts) == 1:
            return parts[0]
        return Outputs(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def numpy(self, array: Tensor) -> FloatArray:
        """Numbers in float32."""
        found: FloatArray = array.float().cpu().numpy()
        return found

    def synchronize(self) -> None:
        """Wait for a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Without gradients; and say in one line that memory ran out."""
        try:
            with torch.inference_mode():
                yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise SpecguardError(
                f"memory ran out while {name} was running",
                "fewer candidates (--k), fewer problems at a time, a shorter context or a smaller "
                "pair need less; or close other programs",
            ) from error

    def _forward_one_by_one(
        self,
        rows: Sequence[Row],
        tokens: Tensor,
        positions: Tensor,
        wanted: Sequence[int] | None,
    ) -> Outputs | None:
        """A pass for each row, by a model's own attention."""
        found = []
        stop = 0
        for row in rows:
            first, stop = stop, stop + row.num_queries
            own = None if wanted is None else [q - first for q in wanted if first <= q < stop]
            buffer = _buffer_of(row)
            places = positions[first:stop]
            mask = self._mask(row)
            if mask is None:
                mask = self._open_entry.expand(1, 1, row.num_queries, row.stop)
            cache = PassCache(row.start, buffer)
            output = self._call(
                own, tokens[first:stop], places, self._masks_by_layer(row, places, mask), cache
            )
            self._check_cache(cache.num_updates, cache.num_updates)
            if own:
                found.append(self._taken(output, own))
        if wanted is None:
            return None
        hidden, logits = (torch.cat(part) for part in zip(*found, strict=True))
        return Outputs(hidden, logits[:, : self._num_tokens])

    def _call(
        self,
        wanted: Sequence[int] | None,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | dict[str, Tensor],
        cache: PassCache,
        **extra: Any,
    ) -> Any:
        module = self.model.base_model if not wanted else self.model
        if wanted and self._keeps_some_logits:
            extra["logits_to_keep"] = self._tensor(list(wanted))
        return module(
            input_ids=tokens.unsqueeze(0),
            attention_mask=mask,
            position_ids=positions.unsqueeze(0),
            use_cache=True,
            **{self._cache_argument: cache},
            **extra,
        )

    @cached_property
    def _cache_argument(self) -> str:
        """Transformers calls it ``cache`` from 5.24 on, and warns of the name before that."""
        return "cache" if "cache" in self._arguments else "past_key_values"

    @cached_property
    def _keeps_some_logits(self) -> bool:
        return "logits_to_keep" in self._arguments

    @property
    def _arguments(self) -> Mapping[str, Any]:
        return signature(type(self.model).forward).parameters

    def _taken(self, output: Any, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states and logits [wanted, ...] of a call."""
        assert self._head_input is not None
        hidden, self._head_input = self._head_input.squeeze(0), None
        logits = output.logits[0]
        if not self._keeps_some_logits:
            hidden, logits = self._rows_of(hidden, wanted), self._rows_of(logits, wanted)
        return hidden, logits

    def _check_cache(self, num_updates: int, num_layers_seen: int) -> None:
        if num_updates != self.num_layers or num_layers_seen == 0:
            raise SpecguardError(
                f"{type(self.model).__name__} keeps its keys and values in a way of its own: "
                f"{num_updates} of {self.num_layers} layers use the cache they are given",
                "choose a model with plain attention in every layer",
            )

    def _place(self, rows: Sequence[Row]) -> list[PlacedRow]:
        placed = []
        stop = 0
        for row in rows:
            first, stop = stop, stop + row.num_queries
            captures = [self._device_capture(capture) for capture in row.captures]
            queries = slice(first, stop)
            one = PlacedRow(row, _buffer_of(row), queries, None, captures)
            if not one.is_causal:
                one.mask = self._mask(row)
            placed.append(one)
        return placed

    def _mask(self, row: Row) -> Tensor | None:
        """What is added to scores, [1, 1, queries, columns]; None where all is seen."""
        if row.visible is None and row.num_queries == 1:
            return None
        seen = np.ones((row.num_queries, row.stop), dtype=np.bool_)
        if row.visible is None:
            seen[:, row.start :] = np.tri(row.num_queries, dtype=np.bool_)
        else:
            seen[:, row.base :] = row.visible
        return torch.where(self._tensor(seen), self._open_entry, self._closed_entry)[None, None]

    def _masks_by_layer(
        self, row: Row, positions: Tensor, mask: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """Masks for a model's own attention, by layer type where it has several."""
        masks = {"full_attention": mask}
        if self._window is not None:
            columns = self._column_positions(row, positions)
            distance = positions.unsqueeze(1) - columns.unsqueeze(0)
            lowest = torch.finfo(self.number_type).min
            masks["sliding_attention"] = mask.masked_fill(distance >= self._window, lowest)
        if self._layer_types:
            return {kind: masks[kind] for kind in self._layer_types}
        return masks.get("sliding_attention", mask)

    def _column_positions(self, row: Row, positions: Tensor) -> Tensor:
        """The position of each column: those behind the base are as far as their path is long."""
        columns = torch.arange(row.stop, device=self.device)
        columns[row.start :] = positions
        if row.start > row.base and row.visible is not None:
            # Earlier columns of other branches: what a query sees of them, it sees in order.
            seen = self._tensor(row.visible[:, : row.start - row.base])
            depths = seen.cumsum(1) - 1 + row.base
            columns[row.base : row.start] = torch.where(seen, depths, 0).amax(0)
        return columns

    def _device_capture(self, capture: RowCapture) -> DeviceCapture:
        wanted = capture.capture
        source = torch.from_numpy(wanted.is_source).to(self.device).float()
        return DeviceCapture(
            capture,
            self._slice_or_tensor(capture.queries),
            self._slice_or_tensor(capture.columns),
            source,
            1 - source,
            self.num_layers - wanted.num_layers,
        )

    def _slice_or_tensor(self, places: list[int]) -> Tensor | slice:
        first, stop = places[0], places[-1] + 1
        if stop - first == len(places):  # ascending, as they are
            return slice(first, stop)
        return self._tensor(places)

    def _rows_of(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        if len(rows) == 1:
            return tensor[rows[0]].unsqueeze(0)
        return (
            tensor
            if len(rows) == len(tensor) and _is_range(rows)
            else tensor[self._tensor(list(rows))]
        )

    def _owners(self, owners: Sequence[int], count: int) -> Tensor | None:
        """None where each row is one's own."""
        if len(owners) == count and _is_range(owners):
            return None
        return self._tensor(list(owners))

    def _tensor(self, values: Sequence[int] | NDArray[np.generic]) -> Tensor:
        """Numbers as a tensor beside the model."""
        # Without waiting for the device, which is to compute meanwhile.
        return torch.from_numpy(np.asarray(values)).to(self.device, non_blocking=True)

    def _keep_head_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._head_input = inputs[0]

    def _compute_in(self, number_type: torch.dtype) -> None:
        """What masks are made of."""
        self.number_type = number_type
        # transformers' own attention is used to the lowest number instead of infinity.
        lowest = float("-inf") if self._has_our_attention else torch.finfo(number_type).min
        self._open_entry = torch.zeros((), dtype=number_type, device=self.device)
        self._closed_entry = torch.full_like(self._open_entry, lowest)

    def _fuse(self, is_packed: bool, number_type: torch.dtype) -> None:
        """Fused layers, if they do what the model's own layers do."""
        fused = FusedLayers(self.model, is_packed)  # what it rounds, the own layers see rounded
        expected = self._sample_passes()
        self._fused = fused
        if not self._passes_agree(expected):
            self._fused = None
            self.why_not_fused = "fused layers come to other logits"
            return
        self._compute_in(number_type)
        if fused.take_over(number_type) and not self._passes_agree(expected):
            raise SpecguardError(
                "this build of torch multiplies wrongly by weights that are laid out for it",
                "set SPECGUARD_REFERENCE=1 to do without",
            )

    def _passes_agree(self, expected: list[Tensor]) -> bool:
        """Whether sample passes come to these logits."""
        tolerance = _TOLERANCES[self.model.dtype]
        for own, found in zip(expected, self._sample_passes(), strict=True):
            scale = max(1.0, float(own.abs().max()))
            if not bool((found - own).abs().max() <= tolerance * scale):
                return False
        return True

    def _sample_passes(self) -> list[Tensor]:
        """Logits of a prompt, a tree behind it, a batch, and a late position."""
        first, second = self.new_buffer(), self.new_buffer()
        tree = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=np.bool_)
        late = self._latest_position()
        passes: list[tuple[list[Row], list[int]]] = [
            ([Row(first, 0, 8, 0)], list(range(8))),
            ([Row(first, 8, 3, 8, tree)], [8, 9, 9]),
            ([Row(first, 8, 2, 8), Row(second, 0, 3, 0)], [8, 9, 0, 1, 2]),
            ([Row(second, 3, 1, 3)], [late]),
        ]
        found = []
        for rows, positions in passes:
            outputs = self.forward(rows, range(len(positions)), positions, range(len(positions)))
            assert outputs is not None
            found.append(outputs.logits.float())
        return found

    def _latest_position(self) -> int:
        limit = self.model.config.get_text_config().max_position_embeddings
        return min(int(limit), _LATE) - 1

    def _probe(self, name: str) -> None:
        buffer = self.new_buffer()
        try:
            self.forward([Row(buffer, 0, 3, 0)], [0, 1, 2], [0, 1, 2], [0, 1, 2])
            self.num_bytes_per_token = buffer.num_bytes_per_token
        except SpecguardError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise SpecguardError(
                f"{name} ({type(self.model).__name__}) cannot be run step by step: {error}",
                "choose a decoder-only model with plain attention in every layer",
            ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on any device, could not have the memory that it wanted."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = "not enough memory", "out of memory"
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _buffer_of(row: Row) -> KVBuffer:
    assert isinstance(row.buffer, KVBuffer)
    return row.buffer


def _is_range(numbers: Sequence[int]) -> bool:
    return all(number == place for place, number in enumerate(numbers))
