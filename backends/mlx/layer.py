"""An mlx-lm model as a tensor layer: its passes over rows, with capture.

Knows nothing of steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from specguard.backends.local.layer import Outputs, Row
from specguard.backends.mlx.attention import AttentionPass, LayerCache, PlacedRow, install
from specguard.backends.mlx.kv import KVBuffer
from specguard.backends.mlx.sampling import describe, draw, warp
from specguard.backends.mlx.threads import clear_at_thread_end
from specguard.core.engine import FloatArray, Sampling
from specguard.core.errors import SpecguardError


class MlxLayer:
    """Runs the passes of one model.

    Logits are cut to ``num_tokens``: rows of a padded vocabulary stand for no token, and the other
    model of a pair may not have them.

    Raises:
        SpecguardError: the model keeps a state that cannot be cut back, or has attention that
            these passes cannot express.
    """

    reads_late = True
    most_waiting_logits = 0  # described beside the pass that follows, so that nothing waits for it

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

    def forward(
        self,
        rows: Sequence[Row],
        token_ids: Sequence[int] | mx.array,
        positions: Sequence[int],
        wanted: Sequence[int] | None,
    ) -> Outputs | None:
        """Forward tokens [N]; hidden states and logits of the wanted queries, not evaluated yet."""
        tokens = token_ids if isinstance(token_ids, mx.array) else mx.array(list(token_ids))
        placed, first = [], 0
        for row in rows:
            placed.append(PlacedRow.of(row, first, self.num_layers))
            first += row.num_queries
        # One slot where the tokens follow one another, else a slot for each.
        is_line = list(positions) == list(range(positions[0], positions[0] + len(positions)))
        offset = positions[0] if is_line else mx.array(list(positions))
        attention = AttentionPass(placed, offset)
        caches = [LayerCache(attention, layer) for layer in range(self.num_layers)]
        hidden = self._model.model(tokens[None] if is_line else tokens[:, None], caches)
        if attention.num_layers_seen != self.num_layers:
            raise SpecguardError(
                f"{self._name} computes {attention.num_layers_seen} of {self.num_layers} layers "
                "with the attention that mlx-lm shares among models",
                "choose a model with plain attention in every layer",
            )
        if wanted is None:
            mx.async_eval([one.buffer.arrays() for one in placed])
            return None
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if list(wanted) != list(range(len(positions))):
            hidden = hidden[mx.array(list(wanted))]
        outputs = Outputs(hidden, self._logits(hidden))
        mx.async_eval(outputs)
        for one in placed:
            for capture in one.captures:
                capture.finish()
        return outputs

    def sample(
        self, logits: mx.array, owners: Sequence[int], sampling: Sampling, uniforms: FloatArray
    ) -> mx.array:
        """Token ids [N], not evaluated yet."""
        if sampling.is_greedy:
            return _rows_of(mx.argmax(logits, axis=-1), owners)
        return draw(_rows_of(warp(logits, sampling), owners), mx.array(uniforms))

    def read(self, token_ids: mx.array) -> list[int]:
        """Token ids as numbers."""
        found: list[int] = token_ids.tolist()
        return found

    def describe(
        self, parts: Sequence[tuple[mx.array, Sequence[int], mx.array | Sequence[int]]]
    ) -> tuple[mx.array, mx.array]:
        """Log-probabilities and entropies [N]."""
        found = []
        for logits, owners, token_ids in parts:
            wanted = token_ids if isinstance(token_ids, mx.array) else mx.array(list(token_ids))
            found.append(describe(_rows_of(logits, owners), wanted))
        described = (
            found[0] if len(found) == 1 else tuple(map(mx.concatenate, zip(*found, strict=True)))
        )
        mx.async_eval(described)
        return described[0], described[1]

    def first_choices(self, logits: mx.array) -> FloatArray:
        """The most probable token id of each row."""
        return np.array(mx.argmax(logits, axis=-1))

    def warp(self, logits: mx.array, sampling: Sampling) -> mx.array:
        """Warped probabilities."""
        probs = warp(logits, sampling)
        mx.async_eval(probs)
        return probs

    def sums(
        self, hidden: Sequence[mx.array], rows: Sequence[int], owners: Sequence[int], count: int
    ) -> FloatArray:
        """Sums of hidden states by owner."""
        states = np.concatenate([self.numpy(part) for part in hidden])
        found = np.zeros((count, states.shape[1]), dtype=np.float32)
        np.add.at(found, list(owners), states[list(rows)])
        return found

    def take(self, outputs: Outputs, rows: Sequence[int]) -> Outputs:
        """Some rows of outputs; a lazy array belongs to the thread that made it."""
        taken = Outputs(_rows_of(outputs.hidden, rows), _rows_of(outputs.logits, rows))
        mx.async_eval(taken)
        return taken

    def joined(self, parts: Sequence[Outputs]) -> Outputs:
        """Outputs one after the other."""
        if len(parts) == 1:
            return parts[0]
        joined = Outputs(*(mx.concatenate(part) for part in zip(*parts, strict=True)))
        mx.async_eval(joined)
        return joined

    def numpy(self, array: mx.array) -> FloatArray:
        """Numbers in float32, once they are computed."""
        found: FloatArray = np.array(array.astype(mx.float32))
        return found

    def synchronize(self) -> None:
        """Nothing: one pass over the last token may be under way, and is of use to the next job."""

    @contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Say in one line that memory ran out."""
        clear_at_thread_end()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            signs = "allocate", "Insufficient Memory"
            if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
                raise
            raise SpecguardError(
                f"memory ran out while {name} was running",
                "fewer candidates (--k), fewer problems at a time, a shorter context or a smaller "
                "pair need less; or close other programs",
            ) from error

    def _logits(self, hidden: mx.array) -> mx.array:
        """Logits [N, V] of final hidden states [N, H]: the model's own head."""
        states = hidden[None]
        tokens = mx.zeros(states.shape[:2], mx.int32)
        logits = type(self._model).__call__(_HeadOnly(self._model, states), tokens)
        return logits[0, :, : self._num_tokens]

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
        first, second = self.new_buffer(), self.new_buffer()
        tree = np.array([[1, 0], [0, 1]], dtype=np.bool_)
        try:
            self.forward([Row(first, 0, 1, 0)], [0], [0], None)
            outputs = self.forward([Row(first, 1, 2, 1, tree)], [1, 2], [1, 1], [0, 1])
            assert outputs is not None
            both = [Row(first, 1, 2, 1), Row(second, 0, 1, 0)]
            mx.eval(outputs, self.forward(both, [1, 2, 1], [1, 2, 0], [0]))
            self.num_bytes_per_token = first.num_bytes_per_token
        except SpecguardError as error:
            raise SpecguardError(f"{self._name}: {error.message}", error.hint) from error
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SpecguardError(
                f"{self._name} ({type(self._model).__module__}) cannot be run step by step: "
                f"{reason}",
                "choose a decoder-only model with plain attention in every layer",
            ) from error
        if outputs.logits.shape[-1] < self._num_tokens:
            raise SpecguardError(
                f"{self._name} has {outputs.logits.shape[-1]} token ids and its tokenizer "
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


def _rows_of(array: mx.array, rows: Sequence[int]) -> mx.array:
    if list(rows) == list(range(len(array))):
        return array
    return array[mx.array(list(rows))]
