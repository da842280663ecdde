"""Forward passes of an mlx-lm model over rows of sequences, with capture.

Knows nothing of steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from specguard.backends.mlx.attention import (
    AttentionPass,
    LayerCache,
    Row,
    RowCapture,
    install,
)
from specguard.backends.mlx.kv import KVBuffer
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.model import AttentionBlock, Capture

_PREFILL_CHUNK = 2048  # tokens, as mlx-lm reads prompts


class Forward:
    """Runs the passes of one model.

    Logits are cut to ``num_tokens``: rows of a padded vocabulary stand for no token, and the other
    model of a pair may not have them.

    Raises:
        SpecguardError: the model keeps a state that cannot be cut back, or has attention that
            these passes cannot express.
    """

    def __init__(self, model: nn.Module, name: str, num_tokens: int) -> None:
        self._model = model
        self._name = name
        self._num_tokens = num_tokens
        self._check_cache()
        self.num_layers = len(model.layers)
        install(model)
        self._probe()

    def new_buffer(self) -> KVBuffer:
        """An empty buffer."""
        return KVBuffer(self.num_layers)

    def prefill(self, buffer: KVBuffer, token_ids: Sequence[int], num_cached: int = 0) -> None:
        """Fill a buffer with a prompt's columns from one on; no logits are computed."""
        for first in range(0, len(token_ids), _PREFILL_CHUNK):
            chunk = token_ids[first : first + _PREFILL_CHUNK]
            start = num_cached + first
            row = Row(buffer, start, length=len(chunk))
            self.run([row], mx.array([chunk]), start)
            mx.eval(buffer.arrays())
            mx.clear_cache()

    def row_capture(self, capture: Capture, num_rows: int) -> RowCapture:
        """A capture as a pass over a step of ``num_rows`` tokens wants it."""
        first_layer = self.num_layers - capture.num_layers
        if first_layer < 0:
            raise UsageError(
                f"attention of {capture.num_layers} layers is asked for and {self._name} has "
                f"{self.num_layers}"
            )
        return RowCapture.of(capture, num_rows, first_layer)

    def run(self, rows: list[Row], tokens: mx.array, offset: int | mx.array) -> mx.array:
        """Final hidden states [slots, length, H] of tokens [slots, length], not evaluated yet.

        Writes the columns of every row; padding behind a row's length leaves no trace. Attention
        blocks are added to the captures of the rows.
        """
        attention = AttentionPass(rows, offset)
        caches = [LayerCache(attention, layer) for layer in range(self.num_layers)]
        hidden: mx.array = self._model.model(tokens, caches)
        if attention.num_layers_seen != self.num_layers:
            raise SpecguardError(
                f"{self._name} computes {attention.num_layers_seen} of {self.num_layers} layers "
                "with the attention that mlx-lm shares among models",
                "choose a model with plain attention in every layer",
            )
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [N, V] of final hidden states [N, H]: the model's own head."""
        states = hidden[None]
        tokens = mx.zeros(states.shape[:2], mx.int32)
        logits = type(self._model).__call__(_HeadOnly(self._model, states), tokens)
        return logits[0, :, : self._num_tokens]

    @contextmanager
    def memory_errors(self) -> Iterator[None]:
        """Say in one line that memory ran out while something is computed."""
        try:
            yield
        except RuntimeError as error:
            if not any(sign in str(error) for sign in ("allocate", "Insufficient Memory")):
                raise
            raise SpecguardError(
                f"memory ran out while {self._name} was running",
                "fewer candidates (--k), a shorter context or a smaller pair need less; or close "
                "other programs",
            ) from error

    def _check_cache(self) -> None:
        for cache in make_prompt_cache(self._model):
            if type(cache) is not KVCache:
                raise SpecguardError(
                    f"{self._name} keeps its context in a {type(cache).__name__}, which cannot be "
                    "cut back and captured",
                    "choose a model with full attention in every layer",
                )
        if not hasattr(self._model, "model"):
            raise SpecguardError(
                f"{self._name} ({type(self._model).__module__}) keeps its layers in a way of its "
                "own",
                "choose a plain decoder-only model",
            )

    def _probe(self) -> None:
        """Two candidates after a token, then two sequences of different lengths."""
        try:
            buffer = self.new_buffer()
            self.run([Row(buffer, 0)], mx.array([[0]]), 0)
            row = Row(buffer, 1, num_slots=2, mask=mx.array([[1, 1, 0], [1, 0, 1]]) == 1)
            logits = self.logits(self.run([row], mx.array([[1], [2]]), 1)[:, 0])
            rows = [Row(buffer, 1, length=2), Row(self.new_buffer(), 0)]
            mx.eval(logits, self.run(rows, mx.array([[1, 2], [1, 0]]), mx.array([1, 0])))
            self.num_bytes_per_token = buffer.num_bytes_per_token
        except SpecguardError as error:
            raise SpecguardError(f"{self._name}: {error.message}", error.hint) from error
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SpecguardError(
                f"{self._name} ({type(self._model).__module__}) cannot be run step by step: "
                f"{reason}",
                "choose a decoder-only model with plain attention in every layer",
            ) from error
        if logits.shape[-1] < self._num_tokens:
            raise SpecguardError(
                f"{self._name} has {logits.shape[-1]} token ids and its tokenizer "
                f"{self._num_tokens}",
                "the folder's tokenizer belongs to another model",
            )


class _HeadOnly:
    """A model whose layers have done their work: calling it computes logits from hidden states.

    Relies on what mlx-lm's models have in common: they call ``self.model`` once, and the head and
    any scaling follow.
    """

    def __init__(self, model: nn.Module, hidden: mx.array) -> None:
        self._full = model
        self.model = _Done(model.model, hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._full, name)


class _Done:
    """The layers of a model, whose output is known."""

    def __init__(self, layers: nn.Module, hidden: mx.array) -> None:
        self._full = layers
        self._hidden = hidden

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._full, name)


def attention_blocks(capture: RowCapture) -> tuple[AttentionBlock, ...]:
    """What was captured of a step, from the lowest layer to the top one."""
    return tuple(AttentionBlock(*map(np.array, layer)) for layer in capture.blocks)
