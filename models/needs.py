"""What a pair takes of this machine's memory, downloaded or not."""

from collections.abc import Sequence
from dataclasses import dataclass

from specguard.backends.checkpoint import is_on_disk, open_checkpoint
from specguard.backends.memory import Demand, ModelSize, Place, check_memory
from specguard.backends.registry import Backend, EstimatedBackend, MeasuredBackend
from specguard.core.errors import SpecguardError
from specguard.models.pairs import PROMPT_TOKENS, ModelPair, typical_tokens


@dataclass(frozen=True, slots=True)
class PairNeeds:
    """A pair on a backend: sizes and demands of its draft and its target, where known.

    ``num_tokens`` is how many tokens' keys and values are counted.
    """

    pair: ModelPair
    is_on_disk: bool
    sizes: tuple[ModelSize, ModelSize] | None
    demands: Sequence[Demand]
    num_tokens: int

    @property
    def num_weight_bytes(self) -> int | None:
        """What both models take, None where that is not known."""
        return sum(each.num_weight_bytes for each in self.demands) if self.demands else None

    @property
    def num_cache_bytes(self) -> int | None:
        """What their keys and values take, None where that is not known."""
        per_token = sum(each.num_bytes_per_token for each in self.demands)
        return per_token * self.num_tokens if self.demands else None

    @property
    def num_bytes(self) -> int | None:
        """All of it together, None where that is not known."""
        weights, cache = self.num_weight_bytes, self.num_cache_bytes
        return None if weights is None or cache is None else weights + cache

    @property
    def place(self) -> Place | None:
        """The memory that they are to lie in."""
        return self.demands[0].place if self.demands else None

    @property
    def fits(self) -> bool | None:
        """Whether that much is free now, None where it is not known."""
        if not self.demands:
            return None
        try:
            check_memory(self.demands, self.num_tokens)
        except SpecguardError:
            return False
        return True


def pair_needs(pair: ModelPair, backend: Backend, device: str | None) -> PairNeeds:
    """What a pair takes on a backend: by its files where they are here, else by its size.

    Raises:
        SpecguardError: there is no such device.
    """
    num_tokens = PROMPT_TOKENS + typical_tokens(pair.thinking)
    if backend.weights not in pair.draft:
        return PairNeeds(pair, False, pair.sizes, (), num_tokens)
    sources = pair.sources(backend.weights)
    sizes, demands = [], []
    for index, source in enumerate(sources):
        known = pair.sizes[index] if pair.sizes is not None else None
        size, demand = _model_needs(source, known, backend, device)
        sizes.append(size)
        demands.append(demand)
    draft, target = sizes
    return PairNeeds(
        pair,
        all(map(is_on_disk, sources)),
        (draft, target) if draft is not None and target is not None else None,
        [each for each in demands if each is not None] if None not in demands else (),
        num_tokens,
    )


def _model_needs(
    source: str, size: ModelSize | None, backend: Backend, device: str | None
) -> tuple[ModelSize | None, Demand | None]:
    if is_on_disk(source):
        try:
            checkpoint = open_checkpoint(source)
            size = size or ModelSize(checkpoint.num_parameters, checkpoint.num_cached_numbers)
            if isinstance(backend, MeasuredBackend):
                return size, backend.demand(source, "auto", device)
        except SpecguardError:  # half a download: what it will take is all that can be said
            pass
    if size is not None and isinstance(backend, EstimatedBackend):
        return size, backend.estimate(size, device)
    return size, None
