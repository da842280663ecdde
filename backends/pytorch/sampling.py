"""From logits to tokens: log-probabilities, warping by temperature and top-p, inverse CDF."""

import torch
from torch import Tensor

from specguard.core.engine import FloatArray, Sampling
from specguard.core.reference import is_reference

_CHUNK = 128
_FEW = 64  # tokens that nearly always hold the mass that top-p keeps
_ROUNDING = 1e-4  # of sums of probabilities, at most


def describe(
    logits: Tensor, token_ids: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (nats) of tokens [N], at temperature 1, in float32.

    ``logits`` [N, V]; or [A, V], of which token i is drawn from row ``rows[i]``.
    """
    if rows is None and len(logits) > _CHUNK:
        # A long row of float32 copies would not fit beside a large model.
        parts = [
            describe(*part)
            for part in zip(logits.split(_CHUNK), token_ids.split(_CHUNK), strict=True)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    logprobs = logits.float().log_softmax(-1)
    entropies = torch.special.entr(logprobs.exp()).sum(-1)
    if rows is None:
        return logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropies
    return logprobs[rows, token_ids], entropies[rows]


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [N, V] after temperature and top-p; one-hot where sampling is greedy.

    Top-p keeps the fewest most probable tokens whose mass reaches it, and any that tie with the
    last of them.
    """
    if sampling.is_greedy:
        best = logits.argmax(-1, keepdim=True)
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
        best: Tensor | None = logits.argmax(-1)
    else:
        probs = _tempered(logits, sampling)
        best = _only_choice(probs, sampling.top_p)
    if best is not None:
        return best if rows is None else best[rows]
    probs = _nucleus(probs, sampling.top_p)
    wanted = torch.from_numpy(uniforms).to(probs.device)
    return draw(probs if rows is None else probs[rows], wanted)


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


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    if top_p < 1:
        ordered = _ordered(probs, top_p)
        is_kept = ordered.cumsum(-1) - ordered < top_p
        smallest = torch.where(is_kept, ordered, 1.0).amin(-1, keepdim=True)
        probs = torch.where(probs < smallest, 0.0, probs)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


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
