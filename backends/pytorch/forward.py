"""Forward passes of a transformers model over rows of sequences, with masks and capture.

A pass lays B sequences side by side as rows of one buffer. The k candidates of a sequence are
further queries of its row, kept apart by the mask: the prefix is held once, whatever k is. Knows
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
from specguard.backends.pytorch.kv import KVBuffer, PassCache, stack_rows
from specguard.backends.pytorch.lean import LeanLayers, lean_layers
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.model import AttentionBlock, Capture, FloatArray

SHARED = -1  # owner of columns that every query of the row may see
NOBODY = -2  # owner of padding
_LEAN_TOLERANCE = 1e-5  # of logits, relative to the largest


@dataclass(slots=True)
class Layout:
    """The columns of a pass: the buffer and, per row and column, position and owner [B, columns].

    An owner is a candidate's number, SHARED or NOBODY. Every pass appends its columns.
    """

    buffer: KVBuffer
    positions: Tensor
    owners: Tensor

    @property
    def num_columns(self) -> int:
        """Columns so far."""
        return self.positions.shape[1]

    def append(self, positions: Tensor, owners: Tensor) -> None:
        """Take in the columns [B, q] of the next pass."""
        self.positions = torch.cat([self.positions, positions], 1)
        self.owners = torch.cat([self.owners, owners], 1)

    def visible(self, positions: Tensor, owners: Tensor) -> Tensor:
        """Which columns queries [B, q] may look at: [B, 1, q, columns]."""
        is_past = self.positions.unsqueeze(1) <= positions.unsqueeze(2)
        columns = self.owners.unsqueeze(1)
        is_own = (columns == SHARED) | (columns == owners.unsqueeze(2))
        return (is_past & is_own).unsqueeze(1)


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
        self._head_input: Tensor | None = None
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise SpecguardError(f"{name} has no output head: it is not a causal language model")
        self._head = head
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
        if isinstance(values, np.ndarray):
            return torch.from_numpy(values).to(self.device)
        return torch.tensor(values, device=self.device)

    def layout(self, buffers: list[KVBuffer], lengths: list[int]) -> Layout:
        """Rows for a pass: a single buffer as it is, several stacked."""
        buffer = buffers[0] if len(buffers) == 1 else stack_rows(buffers, lengths)
        columns = torch.arange(max(lengths), device=self.device).repeat(len(lengths), 1)
        is_held = columns < self.tensor(lengths).unsqueeze(1)
        return Layout(buffer, columns, torch.where(is_held, SHARED, NOBODY))

    def prefill(self, buffer: KVBuffer, token_ids: Sequence[int], num_cached: int = 0) -> None:
        """Fill a buffer with a prompt's columns from one on; no logits are computed."""
        layout = self.layout([buffer], [num_cached])
        positions = torch.arange(len(token_ids), device=self.device).unsqueeze(0) + num_cached
        owners = torch.full_like(positions, SHARED)
        layout.append(positions, owners)
        attention = AttentionPass(is_causal=num_cached == 0)
        if num_cached:
            attention.mask = layout.visible(positions, owners)
        tokens = self.tensor([token_ids])
        if self._lean is not None:
            self._lean(tokens, positions, buffer, num_cached, attention)
        else:
            self._call(self.model.base_model, layout, tokens, positions, owners, attention)

    def run(
        self,
        layout: Layout,
        tokens: list[list[int]],
        positions: list[list[int]],
        owners: list[list[int]] | None = None,
        readings: Sequence[Reading] = (),
    ) -> PassOutput:
        """Forward up to q tokens a row and append their columns.

        Args:
            layout: what the rows hold so far.
            tokens: token ids, [B][<= q]; shorter rows are padded.
            positions: their positions in the sequence.
            owners: the candidate that each belongs to; None makes all part of their row.
            readings: what to read of the attention, nothing by default.
        """
        first_column = layout.num_columns
        token_grid, position_grid = self._grid(tokens, 0), self._grid(positions, 0)
        owner_grid = self._grid(owners or [[SHARED] * len(row) for row in tokens], NOBODY)
        layout.append(position_grid, owner_grid)
        attention = AttentionPass()
        # One query that sees every column needs no mask.
        if len(tokens) > 1 or len(tokens[0]) > 1 or owners is not None:
            attention.mask = layout.visible(position_grid, owner_grid)
        attention.captures = [self._row_capture(reading, first_column) for reading in readings]
        if self._lean is not None:
            hidden = self._lean(token_grid, position_grid, layout.buffer, first_column, attention)
            logits: Tensor = self._head(hidden)
            self._head_input = None
        else:
            output = self._call(
                self.model, layout, token_grid, position_grid, owner_grid, attention
            )
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
        owners: Tensor,
        attention: AttentionPass,
    ) -> Any:
        cache = PassCache(layout.buffer, layout.num_columns - tokens.shape[1])
        if self._has_own_attention:
            # The pass carries the real mask; a 4D mask is handed through by transformers as it is.
            mask: Tensor | dict[str, Tensor] = self._placeholder
            extra: dict[str, Any] = {"attention_pass": attention}
        else:
            mask, extra = self._additive_masks(layout, positions, owners), {}
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

    def _additive_masks(
        self, layout: Layout, positions: Tensor, owners: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """Masks for a model's own attention, by layer type where it has several."""
        visible = layout.visible(positions, owners)
        masks = {"full_attention": visible}
        if self._window is not None:
            distance = positions.unsqueeze(2) - layout.positions.unsqueeze(1)
            masks["sliding_attention"] = visible & (distance < self._window).unsqueeze(1)
        lowest = torch.finfo(self.model.dtype).min
        additive = {
            kind: torch.zeros_like(mask, dtype=self.model.dtype).masked_fill_(~mask, lowest)
            for kind, mask in masks.items()
        }
        if self._layer_types:
            return {kind: additive[kind] for kind in self._layer_types}
        return additive.get("sliding_attention", additive["full_attention"])

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

    def _grid(self, rows: list[list[int]], filler: int) -> Tensor:
        width = max(map(len, rows))
        return self.tensor([row + [filler] * (width - len(row)) for row in rows])

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
