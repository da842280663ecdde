"""The passes of any model by transformers' own layers.

With the attention of this package a pass is one sequence of tokens, whoever they are of; a model
that brings its own attention runs row by row.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specguard.backends.local.layer import Row
from specguard.backends.pytorch.attention import ATTENTION_NAME, AttentionPass, PlacedRow
from specguard.backends.pytorch.kv import PassCache
from specguard.backends.pytorch.placing import Placing, buffer_of, is_range, tensor_on
from specguard.core.errors import SpecguardError


class OwnLayers:
    """A model's own layers as a function.

    Raises:
        SpecguardError: it has no language head; in a pass: it keeps keys and values in a way that
            cannot be cut back.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self._model, self._device = model, model.device
        config = model.config.get_text_config()
        self._num_layers = int(config.num_hidden_layers)
        self._layer_types = set(getattr(config, "layer_types", None) or [])
        self._window = getattr(config, "sliding_window", None)
        self.brings_attention = config._attn_implementation != ATTENTION_NAME
        self._placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._device)
        self._head_input: Tensor | None = None
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise SpecguardError(f"{name} has no output head: it is not a causal language model")
        head.register_forward_pre_hook(self._keep_head_input)

    def placing(self, number_type: torch.dtype) -> Placing:
        """What places the rows of these layers, computing in this type."""
        # transformers' own attention is used to the lowest number instead of infinity.
        lowest = torch.finfo(number_type).min if self.brings_attention else float("-inf")
        return Placing(self._device, self._num_layers, number_type, lowest)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        placed: Sequence[PlacedRow],
        placing: Placing,
        wanted: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Final hidden states and logits [wanted, ...] of tokens [N], or None."""
        if self.brings_attention:
            return self._one_by_one(tokens, positions, placed, placing, wanted)
        attention = AttentionPass(placed)
        cache = PassCache()
        output = self._call(
            wanted, tokens, positions, self._placeholder, cache, attention_pass=attention
        )
        self._check_cache(cache.num_updates, attention.num_layers_seen)
        return None if wanted is None else self._taken(output, wanted)

    def rows_of(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        """Some rows of a tensor, as a view where that will do."""
        if len(rows) == 1:
            return tensor[rows[0]].unsqueeze(0)
        if len(rows) == len(tensor) and is_range(rows):
            return tensor
        return tensor[tensor_on(self._device, list(rows))]

    def _one_by_one(
        self,
        tokens: Tensor,
        positions: Tensor,
        placed: Sequence[PlacedRow],
        placing: Placing,
        wanted: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor] | None:
        """A pass for each row, by a model's own attention."""
        found = []
        for one in placed:
            row, queries = one.row, one.queries
            own = None
            if wanted is not None:
                own = [q - queries.start for q in wanted if queries.start <= q < queries.stop]
            places = positions[queries]
            mask = placing.mask(row) if one.mask is None else one.mask
            masks = self._masks_by_layer(row, places, mask)
            cache = PassCache(row.start, buffer_of(row))
            output = self._call(own, tokens[queries], places, masks, cache)
            self._check_cache(cache.num_updates, cache.num_updates)
            if own:
                found.append(self._taken(output, own))
        if wanted is None:
            return None
        hidden, logits = (torch.cat(part) for part in zip(*found, strict=True))
        return hidden, logits

    def _call(
        self,
        wanted: Sequence[int] | None,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | dict[str, Tensor],
        cache: PassCache,
        **extra: Any,
    ) -> Any:
        module = self._model.base_model if not wanted else self._model
        if wanted and self._keeps_some_logits:
            extra["logits_to_keep"] = tensor_on(self._device, list(wanted))
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
        return signature(type(self._model).forward).parameters

    def _taken(self, output: Any, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states and logits [wanted, ...] of a call."""
        assert self._head_input is not None
        hidden, self._head_input = self._head_input.squeeze(0), None
        logits = output.logits[0]
        if not self._keeps_some_logits:
            hidden, logits = self.rows_of(hidden, wanted), self.rows_of(logits, wanted)
        return hidden, logits

    def _check_cache(self, num_updates: int, num_layers_seen: int) -> None:
        if num_updates != self._num_layers or num_layers_seen == 0:
            raise SpecguardError(
                f"{type(self._model).__name__} keeps its keys and values in a way of its own: "
                f"{num_updates} of {self._num_layers} layers use the cache they are given",
                "choose a model with plain attention in every layer",
            )

    def _masks_by_layer(
        self, row: Row, positions: Tensor, mask: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """Masks for a model's own attention, by layer type where it has several."""
        masks = {"full_attention": mask}
        if self._window is not None:
            columns = self._column_positions(row, positions)
            distance = positions.unsqueeze(1) - columns.unsqueeze(0)
            lowest = torch.finfo(mask.dtype).min
            masks["sliding_attention"] = mask.masked_fill(distance >= self._window, lowest)
        if self._layer_types:
            return {kind: masks[kind] for kind in self._layer_types}
        return masks.get("sliding_attention", mask)

    def _column_positions(self, row: Row, positions: Tensor) -> Tensor:
        """The position of each column: those behind the base are as far as their path is long."""
        columns = torch.arange(row.stop, device=self._device)
        columns[row.start :] = positions
        if row.start > row.base and row.visible is not None:
            # Earlier columns of other branches: what a query sees of them, it sees in order.
            seen = tensor_on(self._device, row.visible[:, : row.start - row.base])
            depths = seen.cumsum(1) - 1 + row.base
            columns[row.base : row.start] = torch.where(seen, depths, 0).amax(0)
        return columns

    def _keep_head_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._head_input = inputs[0]
