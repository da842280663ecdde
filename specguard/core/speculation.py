"""Token-level speculative sampling (Leviathan et al. 2023), where the target writes.

Works on distributions that the two engines hand over, or, where the target writes greedily, on its
first choices, so that engines may be of any kind.
"""

from dataclasses import replace

import numpy as np

from specguard.core.config import SolveConfig
from specguard.core.context import ProblemContext
from specguard.core.engine import (
    Candidate,
    CandidateFinish,
    FloatArray,
    GenerateJob,
    Observation,
    Sampling,
)
from specguard.core.randomness import Purpose
from specguard.core.step import WrittenStep

_USUAL_GUESSES = 4  # tokens, of method "sd" where the cost is not known
_MOST_GUESSES = 16
MOST_CONFIDENT_GUESSES = 32  # where the draft says when to stop
HIGHEST_CONFIDENCE = 0.95
_LONGEST_PAUSE = 32  # steps
# As if so many guesses had been judged before the first one.
_KEPT, _REJECTED = 17, 3
_JUDGED = _KEPT + _REJECTED


class Lookahead:
    """How many tokens the draft guesses ahead of the target, in one problem.

    As many as ``num_speculated`` of the settings; where that is None, as many as make the target's
    tokens cheapest, by what drafting costs and by how many guesses were kept so far: none where
    rewrites are sampled, or a problem ``shares_passes`` with others. Without a cost, that is none,
    too, and in method "sd" the usual number.

    Where the draft's ``is_confident`` (it has the feature "confidence"), a guess goes on for as
    long as one more token is worth what it costs: the chance that all up to it is kept, for which
    the draft's own probability stands, times what a token of the target costs otherwise.

    Where guessing has cost more than it saved, the target writes the rest of the step and another
    one alone, then it is tried anew; pauses double until it is as good again as it was expected to
    be.
    """

    def __init__(
        self,
        config: SolveConfig,
        is_possible: bool = True,
        shares_passes: bool = False,
        is_confident: bool = False,
    ) -> None:
        self._cost = config.draft_cost
        self._is_confident = is_confident
        self._num_paused, self._pause = 0, 1  # steps
        self._num_fixed = config.num_speculated if is_possible else 0
        if self._num_fixed is None and self._cost is None:
            self._num_fixed = _USUAL_GUESSES if config.method == "sd" else 0
        if config.num_speculated is None and config.method != "sd":
            # Sampled otherwise, a solution would not be the one that it is without guesses; and
            # a pass for a few tokens of one problem costs others more than it saves.
            is_free = config.rewrite_sampling.is_greedy and not shares_passes
            self._num_fixed = self._num_fixed if is_free else 0
        self._least = 1 if config.method == "sd" else 0
        self._begin()
        self._expected = self.pace

    @property
    def num_ahead(self) -> int:
        """Tokens that the next guess has at most; 0: the target writes alone."""
        if self._num_fixed is not None:
            return self._num_fixed
        if self._num_paused:
            return 0
        if not self._is_confident:
            return self._best_number
        return MOST_CONFIDENT_GUESSES if self._spent < self._num_written else self._least

    @property
    def least_confidence(self) -> float:
        """By which the next guess ends, see `GenerateJob`; 0: it has all of its tokens."""
        if self._num_fixed is not None or self._cost is None or not self._is_confident:
            return 0.0
        share = (self._cost.candidate + self._cost.reading) / self.pace
        return min(HIGHEST_CONFIDENCE, share)

    @property
    def pace(self) -> float:
        """What a token that the target writes so costs, in its decode steps."""
        if self._num_fixed is None and self._is_confident and self.num_ahead:
            return self._spent / self._num_written
        return self._token_cost(self.num_ahead)

    def saw(self, num_judged: int, num_kept: int, num_written: int) -> None:
        """Of a guess of ``num_judged`` tokens the target kept the first ``num_kept``.

        ``num_written`` tokens came of it, the target's own among them.
        """
        self._num_kept += num_kept
        self._num_rejected += num_kept < num_judged
        if self._cost is not None:
            self._spent += self._cost.of_step(1, num_judged, num_judged)
            self._num_written += num_written
        if self.num_ahead == 0:
            self._begin()
            self._num_paused, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        elif self.pace <= self._expected and self._num_written >= 2 * _JUDGED:
            self._pause = 1

    def rest(self) -> None:
        """The target has written a step alone."""
        self._num_paused = max(0, self._num_paused - 1)

    def _begin(self) -> None:
        """Nothing is known of this problem yet."""
        self._num_kept, self._num_rejected = _KEPT, _REJECTED
        self._num_written = float(_JUDGED)
        self._spent = self._num_written * self._token_cost(self._best_number)

    @property
    def _best_number(self) -> int:
        """Tokens of a guess by which a token costs least."""
        return min(range(self._least, _MOST_GUESSES + 1), key=self._token_cost)

    def _token_cost(self, num_ahead: int) -> float:
        """By the tokens that a round is expected to write (Leviathan et al. 2023, equation 1)."""
        cost = self._cost
        if cost is None or num_ahead == 0:
            return 1.0
        kept = self._num_kept / (self._num_kept + self._num_rejected)
        num_written = (1 - kept ** (num_ahead + 1)) / (1 - kept)
        return cost.of_step(1, num_ahead, num_ahead) / num_written


async def write_by_guesses(
    context: ProblemContext,
    sampling: Sampling,
    lookahead: Lookahead,
    begun: tuple[int, ...] = (),
) -> WrittenStep:
    """Write the target's next step, or the rest of one that is begun, the draft guessing ahead.

    It is distributed as if the target had drawn it token by token (Leviathan et al. 2023, theorem
    3.5), and is part of the text when this returns. Where guesses cease to pay, the target writes
    the rest alone.
    """
    reader = context.reader(begun)
    boundary = reader.boundary
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
        num_ahead = lookahead.num_ahead
        if num_ahead == 0:
            [rest] = await context.generate("target", sampling, begun=begun + tuple(token_ids))
            context.append(rest.token_ids)
            context.knows("target")
            token_ids += rest.token_ids
            finish = rest.finish
            break
        cap = min(num_ahead, boundary.max_tokens - first)
        [guess] = await context.run(
            "draft",
            GenerateJob(
                key=context.key("draft"),
                prefix=context.token_ids,
                sampling=sampling,
                boundary=replace(boundary, max_tokens=cap, begun=begun + tuple(token_ids)),
                uniforms=guessing[np.newaxis, first : first + cap],
                distributions=not sampling.is_greedy,
                least_confidence=lookahead.least_confidence,
            ),
        )
        n = len(guess.token_ids)
        if sampling.is_greedy:
            [seen] = await context.score("target", [guess.token_ids], choices=True)
            num_accepted, kept_ids = accept_choices(guess, seen)
        else:
            [seen] = await context.score("target", [guess.token_ids], distributions=sampling)
            draws = np.append(judging[first : first + n], correcting[num_blocks])
            num_accepted, kept_ids = accept_tokens(guess, seen, draws)
        num_blocks += 1
        num_guessed += n
        for token_id in kept_ids:
            token_ids.append(token_id)
            finish = reader.feed(token_id)
            if finish is not None:
                break
        num_new = len(token_ids) - first
        lookahead.saw(n, num_accepted, num_new)
        num_kept += min(num_accepted, num_new)
        context.append(token_ids[first:])
        context.announcer.tokens("target", 0, token_ids[first:])
        context.knows("target")
    return WrittenStep(tuple(token_ids), finish, num_guessed=num_guessed, num_kept=num_kept)


def accept_choices(guess: Candidate, seen: Observation) -> tuple[int, list[int]]:
    """How many guessed tokens are the target's own choices; these and its choice behind them.

    What `accept_tokens` comes to where all is greedy.
    """
    assert seen.choices is not None
    kept: list[int] = []
    for token_id, choice in zip(guess.token_ids, seen.choices, strict=False):
        kept.append(choice)
        if choice != token_id:
            return len(kept) - 1, kept
    if guess.finish == "length":
        kept.append(seen.choices[-1])
    return len(guess.token_ids), kept


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
