"""A transformers model as a tensor layer: its passes over rows, by fused layers or its own.

Knows nothing of steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from specguard.backends.local.layer import Outputs, Row
from specguard.backends.pytorch.fixed import FixedPasses
from specguard.backends.pytorch.fused import FusedLayers, why_not_fused
from specguard.backends.pytorch.kv import KVBuffer
from specguard.backends.pytorch.own_layers import OwnLayers
from specguard.backends.pytorch.placing import is_range, tensor_on
from specguard.backends.pytorch.reads import LateReads
from specguard.backends.pytorch.sampling import describe, first_choices, sample, warp
from specguard.backends.pytorch.slots import KVShape, SlotPool
from specguard.core.engine import FloatArray, Sampling
from specguard.core.errors import SpecguardError

# Deviation of fused layers' logits, as a share of how far these spread: rounding comes to a third.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
_OTHER_TYPE = 0.3  # of single precision from bfloat16, where no more than a product can be wrong
# cuDNN's makes a plan for each length, and lengths are many here.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_LATE = 4096  # a position that is checked
# Numbers; where passes are larger, describing them alone costs little. A GPU waits for launches.
_MOST_WAITING_LOGITS = {"cpu": 2**16, "cuda": 2**22, "mps": 2**22}


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
        self.most_waiting_logits = _MOST_WAITING_LOGITS.get(self.device.type, 2**16)
        self._late_reads = LateReads(self.device)
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        self._own = OwnLayers(self.model, name)
        self._compute_in(model.dtype)
        self._fused: FusedLayers | None = None
        self._pool: SlotPool | None = None
        self.fixed: FixedPasses | None = None
        self._why_not_fixed: str | None = None
        self.why_not_fused = why_not_fused(model)
        if self.why_not_fused is None and self._own.brings_attention:
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
            if number_type is not None or self.fixed is not None:
                self._probe(name)

    def fix_shapes(self, expected: Sequence[Tensor] = (), tolerance: float = 0.0) -> None:
        """Run small passes in fixed shapes from now on, as CUDA needs it; buffers are slots then.

        Fused layers must be in use, and no buffer. Where sample passes come to other logits than
        the ``expected`` ones, all stays as it was.
        """
        assert self._fused is not None
        heads = self._fused.num_kv_heads, self._fused.head_dim
        shape = KVShape(self.num_layers, *heads, self.number_type, self.device)
        self._pool = SlotPool(shape)
        self.fixed = FixedPasses(self._fused, self._pool)
        if expected and not self._passes_agree(expected, tolerance):
            self._pool = self.fixed = None
            self._why_not_fixed = "passes of fixed shapes come to other logits"

    @property
    def why_not_recorded(self) -> str | None:
        """Why small passes are not launched as CUDA graphs, None where they are."""
        if self.fixed is not None:
            return self.fixed.why_not_recorded
        return self._why_not_fixed or self.why_not_fused or "only CUDA records passes"

    def new_buffer(self) -> KVBuffer:
        """An empty buffer."""
        return KVBuffer(self.num_layers) if self._pool is None else self._pool.new_slot()

    def forward(
        self,
        rows: Sequence[Row],
        token_ids: Sequence[int] | Tensor,
        positions: Sequence[int],
        wanted: Sequence[int] | None,
    ) -> Outputs | None:
        """Forward tokens [N]; hidden states and logits of the wanted queries."""
        shape = None if self.fixed is None else self.fixed.shape_of(rows)
        if shape is not None:
            assert self.fixed is not None
            return self._outputs_of(self.fixed(shape, rows, token_ids, positions), wanted)
        tokens = token_ids
        if not isinstance(tokens, Tensor):
            tokens = tensor_on(self.device, list(tokens))
        places = tensor_on(self.device, list(positions))
        placed = self._placing.place(rows)
        if self._fused is not None:
            hidden = self._fused(tokens, places, max(positions) + 1, placed)
            found = self._outputs_of(hidden, wanted)
        else:
            own = self._own(tokens, places, placed, self._placing, wanted)
            found = None if own is None else Outputs(own[0], own[1][:, : self._num_tokens])
        for row in placed:
            for capture in row.captures:
                capture.finish()
        return found

    def sample(
        self, logits: Tensor, owners: Sequence[int], sampling: Sampling, uniforms: FloatArray
    ) -> Tensor:
        """Token ids [N]."""
        drawn = sample(logits, sampling, uniforms, self._owners(owners, len(logits)))
        self._late_reads.begin(drawn)
        return drawn

    def read(self, token_ids: Tensor) -> list[int]:
        """Token ids as numbers."""
        found: list[int] = self._late_reads.end(token_ids).tolist()
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
            ids if isinstance(ids, Tensor) else tensor_on(self.device, list(ids))
            for _, _, ids in parts
        ]
        wanted = token_ids[0] if len(parts) == 1 else torch.cat(token_ids)
        logprobs, entropies = describe(logits, wanted, self._owners(rows, len(logits)))
        self._late_reads.begin(logprobs)
        return logprobs, entropies

    def first_choices(self, logits: Tensor) -> FloatArray:
        """The most probable token id of each row."""
        found: FloatArray = first_choices(logits).cpu().numpy()
        return found

    def warp(self, logits: Tensor, sampling: Sampling) -> Tensor:
        """Warped probabilities."""
        return warp(logits, sampling)

    def sums(
        self, hidden: Sequence[Tensor], rows: Sequence[int], owners: Sequence[int], count: int
    ) -> FloatArray:
        """Sums of hidden states by owner."""
        whole = torch.cat(list(hidden))
        found = whole.new_zeros(count, whole.shape[1], dtype=torch.float32)
        found.index_add_(
            0,
            tensor_on(self.device, list(owners)),
            whole[tensor_on(self.device, list(rows))].float(),
        )
        return self.numpy(found)

    def take(self, outputs: Outputs, rows: Sequence[int]) -> Outputs:
        """Some rows of outputs."""
        if len(rows) == len(outputs.logits) and is_range(rows):
            return outputs
        wanted = tensor_on(self.device, list(rows))
        return Outputs(outputs.hidden[wanted], outputs.logits[wanted])

    def joined(self, parts: Sequence[Outputs]) -> Outputs:
        """Outputs one after the other."""
        if len(parts) == 1:
            return parts[0]
        return Outputs(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def numpy(self, array: Tensor) -> FloatArray:
        """Numbers in float32."""
        found: FloatArray = self._late_reads.end(array).float().numpy()
        return found

    def synchronize(self) -> None:
        """Wait for a GPU."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Without gradients; and say in one line that memory ran out."""
        kernels = sdpa_kernel(_KERNELS) if self.device.type == "cuda" else nullcontext()
        try:
            with torch.inference_mode(), kernels:
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

    def _outputs_of(self, hidden: Tensor, wanted: Sequence[int] | None) -> Outputs | None:
        """What fused layers came to, of the wanted queries."""
        if wanted is None:
            return None
        assert self._fused is not None
        hidden = self._own.rows_of(hidden, wanted)
        return Outputs(hidden, self._fused.logits(hidden)[:, : self._num_tokens])

    def _owners(self, owners: Sequence[int], count: int) -> Tensor | None:
        """None where each row is one's own."""
        if len(owners) == count and is_range(owners):
            return None
        return tensor_on(self.device, list(owners))

    def _compute_in(self, number_type: torch.dtype) -> None:
        self.number_type = number_type
        self._placing = self._own.placing(number_type)

    def _fuse(self, is_packed: bool, number_type: torch.dtype) -> None:
        """Fused layers, if they do what the model's own layers do."""
        fused = FusedLayers(self.model, is_packed)  # what it rounds, the own layers see rounded
        expected = self._sample_passes()
        self._fused = fused
        held = self.number_type
        if not self._passes_agree(expected, _TOLERANCES[held]):
            self._fused = None
            self.why_not_fused = "fused layers come to other logits"
            return
        self._compute_in(number_type)
        tolerance = _TOLERANCES[held] if held == number_type else _OTHER_TYPE
        if fused.take_over(number_type) and not self._passes_agree(expected, tolerance):
            raise SpecguardError(
                "this build of torch multiplies wrongly by weights that are laid out for it",
                "set SPECGUARD_REFERENCE=1 to do without",
            )
        if self.device.type == "cuda":
            self.fix_shapes(expected, tolerance)

    def _passes_agree(self, expected: Sequence[Tensor], tolerance: float) -> bool:
        """Whether sample passes come to these logits [N, V], each row but for a constant."""
        for own, found in zip(expected, self._sample_passes(), strict=True):
            deviation = (found - own).std(-1)
            if not bool((deviation <= tolerance * own.std(-1)).all()):
                return False
        return True

    def _sample_passes(self) -> list[Tensor]:
        """Logits of a prompt, a tree behind it, a batch, and a late position.

        On CUDA three times, of other tokens: what runs once is recorded the second time.
        """
        num_rounds = 3 if self.device.type == "cuda" else 1
        return [logits for number in range(num_rounds) for logits in self._sample_round(number)]

    def _sample_round(self, number: int) -> list[Tensor]:
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
            token_ids = range(number, number + len(positions))
            outputs = self.forward(rows, token_ids, positions, range(len(positions)))
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
