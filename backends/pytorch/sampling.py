"""From logits to tokens: log-probabilities, warping by temperature and top-p, inverse CDF."""

import torch
from torch import Tensor

from specguard.core.engine import FloatArray, Sampling
from specguard.core.reference import is_reference

_CHUNK = 128
_FEW = 64  # tokens that nearly always hold the mass that top-p keeps
_ROUNDING = 1e-4  # of sums of probabilities, at most
_CACHED = 2**18  # numbers of which some copies stay in a processor's cache
_LOWEST = -1e4  # a log-probability whose probability is 0


def describe(
    logits: Tensor, token_ids: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (nats) of tokens [N], at temperature 1, in float32.

    ``logits`` [N, V]; or [A, V], of which token i is drawn from row ``rows[i]``.
    """
    # A long row of float32 copies would not fit beside a large model, or into a CPU's cache.
    most = max(1, _CACHED // logits.shape[-1]) if logits.device.type == "cpu" else _CHUNK
    parts = [_describe_rows(part) for part in logits.split(most)]
    highest, sizes, entropies = (
        parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    )
    if rows is None:
        wanted = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    else:
        wanted = logits[rows, token_ids]
        highest, sizes, entropies = highest[rows], sizes[rows], entropies[rows]
    return wanted.float() - highest - sizes, entropies


def _describe_rows(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The highest logits [A], the log of the sum of all behind it, and the entropies."""
    wide = logits.float()
    highest = wide.amax(-1, keepdim=True)
    # Nothing times minus infinity is not a number.
    wide = (wide - highest).clamp_(min=_LOWEST)
    weights = wide.exp()
    total = weights.sum(-1)
    sizes = total.log()
    return highest.squeeze(-1), sizes, sizes - weights.mul_(wide).sum(-1) / total


def first_choices(logits: Tensor) -> Tensor:
    """The most probable token id [N] of each row, the first of those that tie."""
    return logits.max(-1).indices  # on a CPU, a quarter of the time of argmax


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [N, V] after temperature and top-p; one-hot where sampling is greedy.

    Top-p keeps the fewest most probable tokens whose mass reaches it, and any that tie with the
    last of them.
    """
    if sampling.is_greedy:
        best = first_choices(logits).unsqueeze(-1)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
    return _nucleus(_tempered(logits, sampling), sampling.top_p)


def sample(
    logits: Tensor,
    sampling: Sampling,
    uniforms: FloatArray,
    rows: Tensor | None = None,
) -> Tensor:
    """Token ids [N]: what `draw` takes from `warp`, without either where they are not needed.

    ``logits`` [N, V]; or [A, V], of which token i is drawn from row ``rows[i]``.
    """
    if sampling.is_greedy:
        best: Tensor | None = first_choices(logits)
    else:
        probs = _tempered(logits, sampling)
        best = _only_choice(probs, sampling.top_p)
    if best is not None:
        return best if rows is None else best[rows]
    wanted = torch.from_numpy(uniforms).to(probs.device, non_blocking=True)
    few = _few(probs, sampling.top_p)
    if few is None:
        probs = _nucleus(probs, sampling.top_p)
        return draw(probs if rows is None else probs[rows], wanted)
    weights, token_ids = few if rows is None else (part[rows] for part in few)
    return token_ids.gather(-1, draw(weights, wanted).unsqueeze(-1)).squeeze(-1)


def _tempered(logits: Tensor, sampling: Sampling) -> Tensor:
    return (logits.float() / sampling.temperature).softmax(-1)


def _only_choice(probs: Tensor, top_p: float) -> Tensor | None:
    """The token [N] that top-p leaves of each row where it leaves one in all of them, else None."""
    # On a GPU, looking whether it does would wait for the device.
    if probs.device.type != "cpu" or top_p >= 1 or is_reference():
        return None
    highest, best = probs.max(-1)
    # Above a half nothing ties with it.
    return best if bool((highest > max(top_p, 0.5) + _ROUNDING).all()) else None


def _few(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor] | None:
    """What top-p leaves of each row, as weights and token ids [N, few] in order of ids.

    None where it may leave more.
    """
    # On a GPU, looking whether it does would wait for the device.
    if probs.device.type != "cpu" or top_p >= 1 or probs.shape[-1] <= _FEW or is_reference():
        return None
    highest, token_ids = probs.topk(_FEW)
    smallest = _smallest(highest, top_p)
    if bool((highest[:, -1:] >= smallest).any()):
        return None
    token_ids, order = token_ids.sort(-1)
    return torch.where(highest < smallest, 0.0, highest).gather(-1, order), token_ids


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    if top_p < 1:
        probs = torch.where(probs < _smallest(_ordered(probs, top_p), top_p), 0.0, probs)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def _smallest(ordered: Tensor, top_p: float) -> Tensor:
    """The lowest probability [N, 1] that top-p leaves of each row, descending."""
    is_kept = ordered.cumsum(-1) - ordered < top_p
    return torch.where(is_kept, ordered, 1.0).amin(-1, keepdim=True)


def _ordered(probs: Tensor, top_p: float) -> Tensor:
    """The highest probabilities of each row, descending, so many that they reach ``top_p``."""
    # On a GPU, looking whether they do would wait for the device.
    if probs.device.type == "cpu" and probs.shape[-1] > _FEW:
        ordered = probs.topk(_FEW).values
        if bool((ordered.sum(-1) > top_p + _ROUNDING).all()):
            return ordered
    return probs.sort(-1, descending=True).values


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The inverse CDF [N] of weights [N, V], in order of token ids; rows need not sum to 1."""
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # Just below the total, so that rounding never reaches past the last possible token.
    wanted = torch.minimum(uniforms.unsqueeze(-1) * total, total * (1 - 2**-22))
    # Only what is not a number comes out past the end; the caller refuses its log-probability.
    return torch.searchsorted(cdf, wanted, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)
