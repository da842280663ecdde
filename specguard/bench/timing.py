"""Timings of the seam's verbs with one problem's real prompt, prefixes and candidates.

Knows no backend and nothing of the step loop: the walk goes along the target's greedy steps.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from statistics import fmean, median
from typing import Any

import numpy as np

from specguard.bench.delegate import Clock, R
from specguard.core import GREEDY, Boundary, Candidate, Capture, LanguageModel, Prompt, SolveConfig
from specguard.core.config import TARGET_SELECTOR
from specguard.core.grounding import source_mask
from specguard.core.model import FloatArray, Sampling
from specguard.core.selector import distinct

NUM_ROUNDS = 3  # of a timing that can be taken again; the median counts
_FEW = 8  # tokens of a turn that only comes between
Key = tuple[str, str, int]  # model, what, number of candidates


class Timings:
    """Seconds, and the tokens that they were spent on, by model, what was done, and candidates."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._found: dict[Key, list[tuple[float, int]]] = {}

    def timed(self, work: Callable[[], R]) -> tuple[float, R]:
        """The seconds that something takes, not kept yet, and what comes of it."""
        started = self._clock()
        result = work()
        return self._clock() - started, result

    def add(self, key: Key, seconds: float, num_tokens: int) -> None:
        """One more timing."""
        self._found.setdefault(key, []).append((seconds, num_tokens))

    def __iter__(self) -> Iterator[Key]:
        return iter(self._found)

    def seconds(self, key: Key) -> float:
        """The mean of them; 0 for what was never done."""
        return fmean(seconds for seconds, _ in self._found[key]) if key in self._found else 0.0

    def tokens(self, key: Key) -> float:
        """The mean number of tokens."""
        return fmean(num_tokens for _, num_tokens in self._found[key])


def walk(
    draft: LanguageModel[Any],
    target: LanguageModel[Any],
    problem: str,
    configs: Mapping[int, SolveConfig],
    num_steps: int,
    clock: Clock = time.perf_counter,
) -> Timings:
    """Time the verbs of both models along the first ``num_steps`` greedy steps of the target.

    At every step the draft proposes k candidates for each of ``configs``; then both models go on
    with the target's step. They take turns as in a solution: what is timed comes after work of the
    other model, which pushes this one's weights out of a processor's cache. Decode steps of the
    target do not: there they follow its own reading of the step. Timed in seconds, as the median of
    a few rounds where that can be:

    - ``prefill``: `start`, which reads the prompt but for its last token;
    - ``decode``, at three of the steps: a decode step of each model for k candidates, none of which
      ends. It is what `propose` takes to m tokens less what it takes to one, over m - 1, with m the
      longest candidate of the draft. What a proposal takes once, whatever its length, is not in it;
      a cold cache is;
    - ``extend`` and ``extend captured``: reading the target's step without and with attention;
    - ``score``: one pass over the k candidates, without attention;
    - ``verify`` k: the pass that verifies in the target: `score` over the candidates that differ
      where the target selects and they are several, else `extend` over one; with attention where
      the verifier weighs a signal of it, and only there;
    - ``commit`` k: `commit` of the first candidate by the draft, and by the target where it was
      scored.
    """
    config = next(iter(configs.values()))
    prompt = target.tokenizer.encode_prompt(problem, config.system_prompt, config.thinking)
    found = Timings(clock)
    pair = []
    for role, model in ("draft", draft), ("target", target):
        seconds, sequence = found.timed(partial(model.start, prompt))
        found.add((role, "prefill", 1), seconds, len(prompt.token_ids) - 1)
        pair.append(_Side(role, model, sequence, prompt, found))
    drafting, judging = pair
    drafting.before_timing, judging.before_timing = judging.read, drafting.draw
    with closing(drafting.sequence), closing(judging.sequence):
        # A few steps over the whole length: the time grows with the context.
        decoding = {num_steps * part // 4 for part in (1, 2, 3)}
        for index in range(num_steps):
            cap = min(config.max_step_tokens, *(side.room for side in pair))
            boundary = Boundary(config.delimiter, target.tokenizer.eos_ids, cap)
            for count, settings in configs.items():
                sampling = settings.step_sampling
                candidates = drafting.propose(count, sampling, boundary)
                for side in pair:
                    side.time_score(candidates)
                judging.time_verify(candidates, settings)
                if index in decoding and cap > 1:
                    num_tokens = min(cap, max(2, *(len(one.token_ids) for one in candidates)))
                    drafting.time_decode(count, sampling, num_tokens)
                    rewriting = sampling if count > 1 else GREEDY
                    judging.time_decode(count, rewriting, num_tokens, takes_turns=False)
                [kept, *_] = drafting.propose(count, sampling, boundary)
                drafting.time_commit(kept, count)
            [own] = judging.propose(1, GREEDY, boundary)
            for side in pair:
                side.time_extend(own.token_ids, config)
        for side in pair:
            side.add_decode_steps()
    return found


class _Side:
    """One model and its sequence; every timing but ``time_extend`` leaves the sequence as it is."""

    def __init__(
        self,
        role: str,
        model: LanguageModel[Any],
        sequence: Any,
        prompt: Prompt,
        found: Timings,
    ) -> None:
        self.role, self.model, self.sequence = role, model, sequence
        self.prompt, self.found = prompt, found
        self.before_timing: Callable[[], None] = lambda: None  # the other model's turn
        self._decode_steps: dict[int, list[float]] = {}

    @property
    def room(self) -> int:
        """Tokens that the sequence has room for."""
        return self.model.context_limit - len(self.sequence.token_ids)

    def propose(self, count: int, sampling: Sampling, boundary: Boundary) -> list[Candidate]:
        draws = _uniforms(len(self.sequence.token_ids), count, boundary.max_tokens)
        [candidates] = self.model.propose([self.sequence], count, sampling, [boundary], draws)
        return candidates

    def draw(self) -> None:
        """Work of a draft's kind: a few decode steps."""
        if self.room:
            self.propose(1, GREEDY, Boundary("", frozenset(), min(_FEW, self.room)))

    def read(self) -> None:
        """Work of a verifier's kind: a pass over a few tokens, which are forgotten again."""
        length = len(self.sequence.token_ids)
        if self.room:
            again = self.sequence.token_ids[-min(_FEW, self.room) :]
            self.model.extend([self.sequence], [again])
            self.model.rewind(self.sequence, length)

    def _timed(self, work: Callable[[], R]) -> tuple[float, R]:
        self.before_timing()
        return self.found.timed(work)

    def time_decode(
        self, count: int, sampling: Sampling, num_tokens: int, takes_turns: bool = True
    ) -> None:
        timed = self._timed if takes_turns else self.found.timed
        none: frozenset[int] = frozenset()
        short, long = Boundary("", none, 1), Boundary("", none, num_tokens)
        for _ in range(NUM_ROUNDS):
            whole, _ = timed(partial(self.propose, count, sampling, long))
            first, _ = self.found.timed(partial(self.propose, count, sampling, short))
            self._decode_steps.setdefault(count, []).append((whole - first) / (num_tokens - 1))

    def add_decode_steps(self) -> None:
        """The median of all decode steps counts: they are of one kind, but for the context."""
        for count, steps in self._decode_steps.items():
            self.found.add((self.role, "decode", count), median(steps), count)

    def time_score(self, candidates: list[Candidate]) -> None:
        ids = [one.token_ids for one in candidates]
        seconds = median(
            self._timed(lambda: self.model.score([self.sequence], [ids]))[0]
            for _ in range(NUM_ROUNDS)
        )
        self.found.add((self.role, "score", len(ids)), seconds, sum(map(len, ids)))

    def time_verify(self, candidates: list[Candidate], settings: SolveConfig) -> None:
        verifier, count = settings.verifier, len(candidates)
        capture = self.capture(settings) if verifier.needs_attention else None
        ids = [candidates[index].token_ids for index in distinct(candidates)]
        if settings.selector != TARGET_SELECTOR or len(ids) == 1:
            if verifier.needs_model:
                seconds = self._time_reading(ids[0], capture)
                self.found.add((self.role, "verify", count), seconds, len(ids[0]))
            return
        rounds = []
        for _ in range(NUM_ROUNDS):
            seconds, [observations] = self._timed(
                lambda: self.model.score([self.sequence], [ids], [capture])
            )
            rounds.append(seconds)
        self.found.add((self.role, "verify", count), median(rounds), sum(map(len, ids)))
        # Candidates that differ come in order, so the first scored one is the first of all.
        self.time_commit(replace(candidates[0], handle=observations[0].handle), count)

    def time_commit(self, candidate: Candidate, count: int) -> None:
        length = len(self.sequence.token_ids)
        seconds, _ = self.found.timed(lambda: self.model.commit([self.sequence], [candidate]))
        self.found.add((self.role, "commit", count), seconds, len(candidate.token_ids))
        self.model.rewind(self.sequence, length)

    def time_extend(self, token_ids: tuple[int, ...], config: SolveConfig) -> None:
        """Read the tokens with attention, then without; the sequence holds them from then on."""
        if self.model.capture_refusal is None:
            seconds = self._time_reading(token_ids, self.capture(config))
            self.found.add((self.role, "extend captured", 1), seconds, len(token_ids))
        seconds = self._time_reading(token_ids, None)
        self.found.add((self.role, "extend", 1), seconds, len(token_ids))
        self.model.extend([self.sequence], [token_ids])

    def capture(self, config: SolveConfig) -> Capture:
        verifier = config.verifier
        is_source = source_mask(self.prompt, len(self.sequence.token_ids), verifier.sources)
        return Capture(is_source, verifier.num_layers, verifier.epsilon)

    def _time_reading(self, token_ids: tuple[int, ...], capture: Capture | None) -> float:
        length = len(self.sequence.token_ids)
        rounds = []
        for _ in range(NUM_ROUNDS):
            seconds, _ = self._timed(
                lambda: self.model.extend([self.sequence], [token_ids], [capture])
            )
            rounds.append(seconds)
            self.model.rewind(self.sequence, length)
        return median(rounds)


def _uniforms(seed: int, count: int, num_tokens: int) -> FloatArray:
    draws = np.random.default_rng(seed).random((1, count, num_tokens), dtype=np.float32)
    return np.asarray(draws)
