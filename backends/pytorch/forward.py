"""Forward passes of a transformers model over rows of sequences, with masks and capture.

A pass lays B sequences side by side as rows of one buffer. The candidates of a sequence are further
queries of its row, kept apart by the mask: the prefix is held once, however many there are. Knows
nothing of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from specguard.backends.pytorch.attention import ATTENTION_NAME, AttentionPass, RowCapture
from specguard.backends.pytorch.kv import KVBuffer, Part, PassCache, stack
from specguard.backends.pytorch.lean import LeanLayers, lean_layers
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.model import AttentionBlock, BoolArray, Capture, FloatArray

_LEAN_TOLERANCE = 1e-5  # of logits, relative to the largest


@dataclass(slots=True)
class Layout:
    """The columns of one or more passes in a buffer.

    ``is_held`` [B, columns at the beginning] are those that every query sees: the sequences'
    columns and no padding; ``positions`` [B, columns]. Every pass appends its columns.
    """

    buffer: KVBuffer
    is_held: Tensor
    positions: Tensor

    @property
    def num_columns(self) -> int:
        """Columns so far."""
        return self.positions.shape[1]

    def visible(self, inside: Tensor) -> Tensor:
        """The mask [B, 1, q, columns] of queries that see all held columns and ``inside``."""
        if not self.is_held.shape[1]:
            return inside.unsqueeze(1)
        held = self.is_held.unsqueeze(1).expand(-1, inside.shape[1], -1)
        return torch.cat([held, inside], 2).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class PassOutput:
    """Final hidden states [B, q, H], logits [B, q, V], and what each reading has found."""

    hidden: Tensor
    logits: Tensor
    blocks: list[tuple[AttentionBlock, ...]]


@dataclass(frozen=True, slots=True)
class Reading:
    """A capture of the step whose rows are the given places among a row's queries."""

    capture: Capture
    row: int
    queries: list[int]


class Forward:
    """Runs the passes of one model.

    Logits are cut to ``num_tokens``: rows of a padded vocabulary stand for no token, and the other
    model of a pair may not have them.

    Raises:
        SpecguardError: the model keeps a state that cannot be cut back, or has attention that
            these passes cannot express.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        num_tokens: int,
        capture_refusal: str | None = None,
    ) -> None:
        self.model = model.eval()
        self._name = name
        self._num_tokens = num_tokens
        self.device = model.device
        self.capture_refusal = capture_refusal
        config = model.config.get_text_config()
        self._num_layers = int(config.num_hidden_layers)
        self._layer_types = set(getattr(config, "layer_types", None) or [])
        self._window = getattr(config, "sliding_window", None)
        self._has_own_attention = config._attn_implementation == ATTENTION_NAME
        self._placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        # transformers' own attention is used to the lowest number instead of infinity.
        lowest = float("-inf") if self._has_own_attention else torch.finfo(model.dtype).min
        self._open_entry = torch.zeros((), dtype=model.dtype, device=self.device)
        self._closed_entry = torch.full_like(self._open_entry, lowest)
        self._head_input: Tensor | None = None
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise SpecguardError(f"{name} has no output head: it is not a causal language model")
        head.register_forward_pre_hook(self._keep_head_input)
        self._lean: LeanLayers | None = None
        self._probe(name)
        if self._has_own_attention:
            self._lean = self._checked_lean()

    def new_buffer(self) -> KVBuffer:
        """An empty buffer."""
        return KVBuffer(self._num_layers)

    def tensor(self, values: Sequence[object] | NDArray[np.generic]) -> Tensor:
        """Numbers as a tensor beside the model."""
        return torch.from_numpy(np.asarray(values)).to(self.device)

    def layout(self, buffers: list[KVBuffer], lengths: list[int]) -> Layout:
        """Rows for a pass: a single buffer as it is, several stacked."""
        buffer = buffers[0]
        if len(buffers) > 1:
            buffer = stack(
                [Part(one, 0, length) for one, length in zip(buffers, lengths, strict=True)]
            )
        columns = torch.arange(max(lengths), device=self.device).repeat(len(lengths), 1)
        return Layout(buffer, columns < self.tensor(lengths).unsqueeze(1), columns)

    def rows(self, parts: Sequence[Part], positions: Sequence[Tensor] = ()) -> Layout:
        """Rows for passes whose queries are told of every column what they see.

        A single part must be the beginning of its buffer, which is taken as it is.

        Args:
            parts: what the rows hold.
            positions: of the first parts' columns; those of the others are their own.
        """
        width = max(part.num_columns for part in parts)
        is_held = torch.empty(len(parts), 0, dtype=torch.bool, device=self.device)
        columns = torch.arange(width, device=self.device).repeat(len(parts), 1)
        for row, own in zip(columns, positions, strict=False):
            row[: len(own)] = own
        return Layout(
            parts[0].buffer if len(parts) == 1 and not positions else stack(parts), is_held, columns
        )

    def prefill(self, buffer: KVBuffer, token_ids: Sequence[int], num_cached: int = 0) -> None:
        """Fill a buffer with a prompt's columns from one on; no logits are computed."""
        layout = self.layout([buffer], [num_cached])
        positions = torch.arange(len(token_ids), device=self.device).unsqueeze(0) + num_cached
        attention = AttentionPass(is_causal=num_cached == 0)
        # Fused attention knows what causal is; a mask over a long prompt would be large.
        if num_cached or not self._has_own_attention:
            attention.mask = self._mask(layout, self._causal(1, len(token_ids)))
        tokens = self.tensor([token_ids])
        layout.positions = torch.cat([layout.positions, positions], 1)
        if self._lean is not None:
            self._lean(tokens, positions, buffer, num_cached, attention)
        else:
            self._call(self.model.base_model, layout, tokens, positions, attention)

    def run(
        self,
        layout: Layout,
        tokens: list[list[int]],
        positions: list[list[int]],
        inside: BoolArray | None = None,
        readings: Sequence[Reading] = (),
    ) -> PassOutput:
        """Forward up to q tokens a row and append their columns.

        Args:
            layout: what the rows hold so far.
            tokens: token ids, [B][<= q]; shorter rows are padded.
            positions: their positions in the sequence.
            inside: which of the columns behind ``layout.is_held`` each query may look at, [B, q,
                columns of earlier passes and of this one]; None: those of this pass, causally.
            readings: what to read of the attention, nothing by default.
        """
        first_column = layout.num_columns
        token_grid, position_grid = self._grid(tokens), self._grid(positions)
        layout.positions = torch.cat([layout.positions, position_grid], 1)
        attention = AttentionPass()
        sees_all = token_grid.numel() == 1 and (inside is None or bool(inside.all()))
        if not sees_all or not self._has_own_attention:
            seen = self._causal(*token_grid.shape) if inside is None else self.tensor(inside)
            attention.mask = self._mask(layout, seen)
        attention.captures = [self._row_capture(reading, first_column) for reading in readings]
        if self._lean is not None:
            hidden = self._lean(token_grid, position_grid, layout.buffer, first_column, attention)
            logits: Tensor = self._lean.logits(hidden)
        else:
            output = self._call(self.model, layout, token_grid, position_grid, attention)
            logits = output.logits
            assert self._head_input is not None
            hidden, self._head_input = self._head_input, None
        blocks = [_attention_blocks(capture.blocks) for capture in attention.captures]
        return PassOutput(hidden, logits[..., : self._num_tokens], blocks)

    def _call(
        self,
        module: nn.Module,
        layout: Layout,
        tokens: Tensor,
        positions: Tensor,
        attention: AttentionPass,
    ) -> Any:
        cache = PassCache(layout.buffer, layout.num_columns - tokens.shape[1])
        if self._has_own_attention:
            # The pass carries the real mask; a 4D mask is handed through by transformers as it is.
            mask: Tensor | dict[str, Tensor] = self._placeholder
            extra: dict[str, Any] = {"attention_pass": attention}
        else:
            assert attention.mask is not None
            mask, extra = self._masks_by_layer(layout, positions, attention.mask), {}
        output = module(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        if cache.num_updates != self._num_layers or (extra and attention.num_layers_seen == 0):
            raise SpecguardError(
                f"{type(self.model).__name__} keeps its keys and values in a way of its own: "
                f"{cache.num_updates} of {self._num_layers} layers use the cache they are given",
                "choose a model with plain attention in every layer",
            )
        return output

    def _mask(self, layout: Layout, seen: Tensor) -> Tensor:
        """What is added to scores, [B, 1, q, columns]: once for a pass and not in every layer."""
        return torch.where(layout.visible(seen), self._open_entry, self._closed_entry)

    def _masks_by_layer(
        self, layout: Layout, positions: Tensor, mask: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """Masks for a model's own attention, by layer type where it has several."""
        masks = {"full_attention": mask}
        if self._window is not None:
            distance = positions.unsqueeze(2) - layout.positions.unsqueeze(1)
            is_far = (distance >= self._window).unsqueeze(1)
            lowest = torch.finfo(self.model.dtype).min
            masks["sliding_attention"] = mask.masked_fill(is_far, lowest)
        if self._layer_types:
            return {kind: masks[kind] for kind in self._layer_types}
        return masks.get("sliding_attention", mask)

    def _row_capture(self, reading: Reading, first_column: int) -> RowCapture:
        capture = reading.capture
        first_layer = self._num_layers - capture.num_layers
        if first_layer < 0:
            raise UsageError(
                f"attention of {capture.num_layers} layers is asked for and {self._name} has "
                f"{self._num_layers}"
            )
        before, n = len(capture.is_source) - 1, len(reading.queries)
        queries: Tensor | slice = slice(0, n)
        columns: Tensor | slice = slice(0, before + n)
        if first_column != before or reading.queries != list(range(n)):
            # Padding or other steps lie between the context and the step.
            queries = self.tensor(reading.queries)
            columns = torch.cat([torch.arange(before, device=self.device), first_column + queries])
        is_source = self.tensor(capture.is_source)
        return RowCapture(reading.row, queries, columns, is_source, capture.epsilon, first_layer)

    def _grid(self, rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows))
        return self.tensor([row + [0] * (width - len(row)) for row in rows])

    def _causal(self, num_rows: int, length: int) -> Tensor:
        """What queries see of one another when they follow one another, [B, q, q]."""
        ones = torch.ones(length, length, dtype=torch.bool, device=self.device)
        return ones.tril().expand(num_rows, -1, -1)

    def _keep_head_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._head_input = inputs[0]

    @torch.inference_mode()
    def _checked_lean(self) -> LeanLayers | None:
        """Lean layers where the model can have them and they do what its own layers do."""
        lean = lean_layers(self.model)
        if lean is None:
            return None
        tokens, positions = [list(range(8))], [list(range(8))]
        wanted = self.run(self.layout([self.new_buffer()], [0]), tokens, positions).logits
        self._lean = lean
        found = self.run(self.layout([self.new_buffer()], [0]), tokens, positions).logits
        self._lean = None
        scale = max(1.0, float(wanted.abs().max()))
        is_same = bool((found - wanted).abs().max() <= _LEAN_TOLERANCE * scale)
        return lean if is_same else None

    @torch.inference_mode()
    def _probe(self, name: str) -> None:
        buffer = self.new_buffer()
        try:
            self.run(self.layout([buffer], [0]), [[0, 1, 2]], [[0, 1, 2]])
            self.num_bytes_per_token = buffer.num_bytes_per_token
        except SpecguardError:
            raise
        except Exception as error:
            raise SpecguardError(
                f"{name} ({type(self.model).__name__}) cannot be run step by step: {error}",
                "choose a decoder-only model with plain attention in every layer",
            ) from error


def _attention_blocks(
    layers: list[tuple[Tensor, Tensor, Tensor]],
) -> tuple[AttentionBlock, ...]:
    def numpy(tensor: Tensor) -> FloatArray:
        array: FloatArray = tensor.cpu().numpy()
        return array

    return tuple(AttentionBlock(*map(numpy, layer)) for layer in layers)
