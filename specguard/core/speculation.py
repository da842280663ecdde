"""Token-level speculative sampling, the baseline ``sd`` (Leviathan et al. 2023).

Works on distributions that the two engines hand over, so that these may be of any kind.
"""

import numpy as np

from specguard.core.context import ProblemContext
from specguard.core.engine import (
    Boundary,
    Candidate,
    CandidateFinish,
    FloatArray,
    GenerateJob,
    Observation,
    Sampling,
)
from specguard.core.randomness import Purpose
from specguard.core.step import WrittenStep
from specguard.core.text import StepScanner


async def write_by_guesses(context: ProblemContext, sampling: Sampling) -> WrittenStep:
    """Write the target's next step, the draft guessing a few tokens ahead.

    The step is distributed as if the target had drawn it token by token (Leviathan et al. 2023,
    theorem 3.5); it is part of the text when this returns.
    """
    boundary = context.boundary()
    scanner = StepScanner(context.pieces, boundary)
    size = boundary.max_tokens + 1
    guessing, judging, correcting = (
        context.draws(purpose, 1, size)[0]
        for purpose in (Purpose.GUESS, Purpose.ACCEPT, Purpose.CORRECT)
    )
    token_ids: list[int] = []
    num_guessed = num_kept = num_blocks = 0
    finish: CandidateFinish | None = None
    while finish is None:  # each round writes a token at least
        first = len(token_ids)
        cap = min(context.config.num_speculated, boundary.max_tokens - first)
        [guess] = await context.run(
            "draft",
            GenerateJob(
                key=context.key("draft"),
                prefix=context.token_ids,
                sampling=sampling,
                boundary=Boundary(boundary.delimiter, boundary.eos_ids, cap),
                uniforms=guessing[np.newaxis, first : first + cap],
                distributions=True,
            ),
        )
        [seen] = await context.score("target", [guess.token_ids], distributions=sampling)
        n = len(guess.token_ids)
        draws = np.append(judging[first : first + n], correcting[num_blocks])
        num_accepted, kept_ids = accept_tokens(guess, seen, draws)
        num_blocks += 1
        num_guessed += n
        for token_id in kept_ids:
            token_ids.append(token_id)
            finish = scanner.feed(token_id)
            if finish == "delimiter" and context.is_code_open(token_ids):
                finish = "length" if len(token_ids) == boundary.max_tokens else None
            if finish is not None:
                break
        num_kept += min(num_accepted, len(token_ids) - first)
        context.append(token_ids[first:])
        context.announcer.tokens("target", 0, token_ids[first:])
        context.knows("target")
    return WrittenStep(tuple(token_ids), finish, num_guessed=num_guessed, num_kept=num_kept)


def accept_tokens(
    guess: Candidate, seen: Observation, uniforms: FloatArray
) -> tuple[int, list[int]]:
    """How many guessed tokens are accepted; these and what the target writes behind them.

    Token t is accepted with probability min(1, p/q); after the first that is not, a token is drawn
    from max(0, p - q), normalised (Leviathan et al. 2023, algorithm 1). After n accepted tokens the
    target's next one is drawn only where the guess was cut by its cap: after EOS or a delimiter the
    step is over.

    Args:
        guess: n tokens with their warped distributions q [n, V].
        seen: what the target says of them, with its warped distributions p [n + 1, V].
        uniforms: [n + 1] in [0, 1): entry t judges token t, entry n draws the token that follows.
    """
    assert guess.distributions is not None
    assert seen.distributions is not None
    drafted, judged = guess.distributions, seen.distributions
    n = len(guess.token_ids)
    kept = list(guess.token_ids)
    for position, token_id in enumerate(guess.token_ids):
        if uniforms[position] * drafted[position, token_id] >= judged[position, token_id]:
            remaining = np.maximum(judged[position] - drafted[position], 0)
            if remaining.any():  # nothing remains where p and q differ by rounding alone
                return position, [*kept[:position], _draw(remaining, uniforms[n])]
    if guess.finish == "length":
        kept.append(_draw(judged[n], uniforms[n]))
    return n, kept


def _draw(weights: FloatArray, uniform: float) -> int:
    """The inverse CDF of weights [V], in order of token ids; they need not sum to 1."""
    cdf = np.cumsum(weights, dtype=np.float64)
    # Just below the total, so that rounding never reaches past the last possible token.
    wanted = min(float(uniform), 1 - 2**-22) * cdf[-1]
    return int(np.searchsorted(cdf, wanted, side="right"))
