"""What step-level speculation has to cost at least: the model work of a step, and the speed-up.

Arithmetic alone; `specguard.bench.speed` measures the terms.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of the model work in a step, and the tokens that they are spread over.

    ``draft_token`` t_d(k): one decode step of the draft for all k candidates. ``target_token`` t_t:
    one decode step of the target. ``verify`` v: the verifying pass of a step (with the target as
    selector one pass over all candidates). ``catch_up`` s: reading a rewritten step by the model
    that did not write it. ``num_tokens`` n: of the mean step; ``num_longest`` n_max: of its
    longest candidate; ``num_rewritten`` n_r: what the target decodes of the mean rewritten step.
    """

    draft_token: float
    target_token: float
    verify: float
    catch_up: float
    num_tokens: float
    num_longest: float
    num_rewritten: float


@dataclass(frozen=True, slots=True)
class Prefill:
    """Seconds that the draft and the target take to read the prompt, once a problem."""

    draft: float
    target: float


def ideal_seconds(costs: Costs, rejected: float) -> float:
    """Model work for a token of the solution, in seconds, reading the prompt apart.

    A step of n tokens takes n_max decode steps of the draft and a verifying pass; of the
    ``rejected`` share r the target decodes n_r tokens, which the draft then reads:

        t_d(k) n_max / n + v / n + r (t_t n_r / n + s / n)

    Where the target writes all of a step and rejected steps are as long as others, n_r = n, that is
    r (t_t + s / n).

    Raises:
        ValueError: a share outside [0, 1].
    """
    if not 0 <= rejected <= 1:
        raise ValueError(f"a share lies in [0, 1], not {rejected}")
    n = costs.num_tokens
    drafted = costs.draft_token * costs.num_longest / n
    rewriting = costs.target_token * costs.num_rewritten + costs.catch_up
    return drafted + costs.verify / n + rejected * rewriting / n


def speed_up(costs: Costs, rejected: float) -> float:
    """How many times as fast as the target alone a token is written, prompts apart."""
    return costs.target_token / ideal_seconds(costs, rejected)


def speed_up_with_prefill(
    costs: Costs, rejected: float, prefill: Prefill, num_tokens: float
) -> float:
    """The same for a whole solution of ``num_tokens``, whose prompt both models read.

    The target alone reads the prompt once; speculation pays for the draft's reading, too.
    """
    alone = prefill.target + num_tokens * costs.target_token
    both = prefill.draft + prefill.target + num_tokens * ideal_seconds(costs, rejected)
    return alone / both
