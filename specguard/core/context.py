"""One problem's text so far, and the jobs that its two engines are given.

Knows how a job is put together from the settings; what becomes of its result is the loop's
business.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from specguard.core.config import Author, SolveConfig, VerifierConfig
from specguard.core.engine import (
    Boundary,
    Candidate,
    CandidateFinish,
    Capture,
    Engine,
    FloatArray,
    GenerateJob,
    Observation,
    Prompt,
    Sampling,
    ScoreJob,
    Tokenizer,
)
from specguard.core.engine_checks import check_candidates, check_observations
from specguard.core.grounding import source_mask
from specguard.core.progress import Announcer, Observer
from specguard.core.randomness import Purpose, job_seed, uniforms
from specguard.core.text import (
    END_THINK,
    THINK,
    PieceTable,
    StepScanner,
    after_thinking,
    opens_code_block,
)

_NUM_OPENING = 16  # tokens that show whether a text begins with thinking


class ProblemContext:
    """The prompt, the tokens that were written behind it, and the engines.

    ``step`` numbers the step in hand: it is part of what its randomness is keyed by.
    ``num_verified_tokens`` counts what the target read in parallel; ``is_in_code`` says whether the
    text before the step ends in an open block of code.
    """

    def __init__(
        self,
        engines: Mapping[Author, Engine],
        prompt: Prompt,
        problem: int,
        config: SolveConfig,
        observer: Observer | None = None,
        observed: Collection[Author] = ("draft", "target"),
    ) -> None:
        self.engines = engines
        self.prompt = prompt
        self.config = config
        self.token_ids = prompt.token_ids
        self.step = 0
        self.num_verified_tokens = 0
        self.is_in_code = False
        self._problem = problem
        self._keys = {author: (object(), author) for author in engines}
        self._num_known = len(prompt.token_ids)  # of the text, by the target
        lead = engines.get("target") or engines["draft"]
        self.tokenizer = lead.tokenizer
        self.pieces = PieceTable(lead.tokenizer)
        self.announcer = Announcer(observer, lead.tokenizer.decode, observed)
        self.context_limit = min(engine.context_limit for engine in engines.values())
        self._is_opened = opens_thinking(self.tokenizer, prompt)

    @property
    def room(self) -> int:
        """Tokens that may still be written."""
        num_prompt = len(self.prompt.token_ids)
        num_written = len(self.token_ids) - num_prompt
        return self.config.most_tokens(self.context_limit - num_prompt, self.thinks) - num_written

    @property
    def thinks(self) -> bool:
        """Whether the model thinks before it answers: as it was asked to, or by itself."""
        if self.config.thinking or self._is_opened:
            return True
        start = len(self.prompt.token_ids)
        opening = self.tokenizer.decode(self.token_ids[start : start + _NUM_OPENING])
        return after_thinking(opening) != opening

    def said(self, text: str) -> str | None:
        """What the model says once it has thought, of all that it wrote; None while it thinks."""
        return after_thinking(THINK + text if self._is_opened else text)

    def pieces_of(self, candidate: Candidate) -> list[str]:
        """The texts of a candidate's tokens."""
        return [self.pieces(token_id) for token_id in candidate.token_ids]

    def append(self, token_ids: Sequence[int]) -> None:
        """Make tokens part of the text."""
        self.token_ids += tuple(token_ids)

    def boundary(self, begun: tuple[int, ...] = (), num_tentative: int = 0) -> Boundary:
        """Where the step in hand ends; it may have ``begun`` with the last tokens of the text.

        ``num_tentative`` of these are no part of the text yet.
        """
        cap = min(self.config.max_step_tokens - len(begun), self.room - num_tentative)
        return Boundary(self.config.delimiter, self.tokenizer.eos_ids, cap, begun)

    def draws(self, purpose: Purpose, num_candidates: int, count: int) -> FloatArray:
        """Uniforms [num_candidates, count] of the step in hand."""
        seed = self.config.seed
        return uniforms(seed, self._problem, purpose, self.step, num_candidates, count)

    def reader(self, begun: tuple[int, ...] = ()) -> "StepReader":
        """Reads the step in hand, or the rest of one that is begun, to its end."""
        return StepReader(self, begun)

    async def generate(
        self,
        author: Author,
        sampling: Sampling,
        num_candidates: int = 1,
        *,
        begun: tuple[int, ...] = (),
        first_candidate: int = 0,
        embeddings: bool = False,
    ) -> list[Candidate]:
        """Candidates by one model for the step in hand, or for the rest of one that is begun."""
        boundary = self.boundary(begun)
        purpose = Purpose.DRAFT if author == "draft" else Purpose.REWRITE
        num_drawn = first_candidate + num_candidates
        draws = self.draws(purpose, num_drawn, boundary.max_tokens)[first_candidate:]
        job = GenerateJob(
            key=self._keys[author],
            prefix=self.token_ids,
            sampling=sampling,
            boundary=boundary,
            num_candidates=num_candidates,
            seed=job_seed(self.config.seed, self._problem, purpose, self.step, first_candidate),
            uniforms=draws,
            first_candidate=first_candidate,
            hidden_states=embeddings,
        )
        return await self._generate(author, job)

    async def draft_on(
        self, sampling: Sampling, drafted: tuple[int, ...], most: int, least_confidence: float
    ) -> tuple[Candidate, bool]:
        """``most`` further tokens of a draft's step of which ``drafted`` is there; is that all?

        Fewer where the draft's confidence in them falls below ``least_confidence``. Drawn in parts,
        a step is what it would be in one.
        """
        boundary = self.boundary(drafted, len(drafted))
        num_drawn, num_tokens = len(drafted), min(most, boundary.max_tokens)
        draws = self.draws(Purpose.DRAFT, 1, num_drawn + num_tokens)[:, num_drawn:]
        seed = job_seed(self.config.seed, self._problem, Purpose.DRAFT, self.step, 0)
        job = GenerateJob(
            key=self._keys["draft"],
            prefix=self.token_ids + drafted,
            sampling=sampling,
            boundary=replace(boundary, max_tokens=num_tokens),
            seed=(seed + num_drawn) % 2**63,
            uniforms=draws,
            least_confidence=least_confidence,
        )
        [part] = await self._generate("draft", job)
        is_whole = part.finish == "eos" or len(part.token_ids) == boundary.max_tokens
        if part.finish == "delimiter":
            is_whole = is_whole or not self.is_code_open(drafted + part.token_ids)
        return part, is_whole

    async def _generate(self, author: Author, job: GenerateJob) -> list[Candidate]:
        """The candidates of a job, blocks of code kept whole; the observer is told of them."""
        listener = self.announcer.listener(author, job.first_candidate)
        job = replace(job, on_tokens=listener)
        candidates = await self.run(author, job)
        if listener is not None:
            listener.finish(candidates)
        return [
            await self._with_whole_code(author, job, index, candidate)
            for index, candidate in enumerate(candidates)
        ]

    def is_code_open(self, token_ids: Sequence[int]) -> bool:
        """Whether a step of these tokens, so far, ends in an open block of code."""
        return opens_code_block(self.tokenizer.decode(token_ids), self.is_in_code)

    async def _with_whole_code(
        self, author: Author, job: GenerateJob, index: int, candidate: Candidate
    ) -> Candidate:
        """A candidate of a job, gone on with where it ends at a blank line in a block of code.

        Engines know delimiters and nothing of code: what a block holds is one step.
        """
        while candidate.finish == "delimiter":
            token_ids = candidate.token_ids
            begun, num_drawn = job.boundary.begun + token_ids, len(token_ids)
            room = job.boundary.max_tokens - num_drawn
            if room < 1 or not self.is_code_open(begun):
                break
            uniforms = None if job.uniforms is None else job.uniforms[[index], num_drawn:]
            listener = self.announcer.listener(author, job.first_candidate + index)
            rest_job = replace(
                job,
                prefix=job.prefix + token_ids,
                num_candidates=1,
                boundary=replace(job.boundary, max_tokens=room, begun=begun),
                seed=(job.seed + num_drawn) % 2**63,
                uniforms=uniforms,
                first_candidate=0,
                on_tokens=listener if job.on_tokens is not None else None,
            )
            [rest] = await self.run(author, rest_job)
            if listener is not None and job.on_tokens is not None:
                listener.finish([rest])
            candidate = joined(candidate, rest, self.tokenizer.decode(token_ids + rest.token_ids))
        return candidate

    async def run(self, author: Author, job: GenerateJob) -> list[Candidate]:
        """Hand a job on; the target reads what it does not know of the text on the way."""
        if author == "target":
            self._saw(len(job.prefix))
        engine = self.engines[author]
        candidates = await engine.generate(job)
        check_candidates(engine.name, job, candidates)
        return candidates

    async def score(
        self,
        author: Author,
        continuations: Sequence[tuple[int, ...]],
        capture: Capture | None = None,
        distributions: Sampling | None = None,
        choices: bool = False,
        drafted: tuple[int, ...] = (),
    ) -> list[Observation]:
        """What one model says of continuations of the text, and of a draft's step so far."""
        if author == "target":
            self._saw(len(self.token_ids))
            self.num_verified_tokens += sum(map(len, continuations))
        job = ScoreJob(
            key=self._keys[author],
            prefix=self.token_ids + drafted,
            continuations=tuple(continuations),
            capture=capture,
            distributions=distributions,
            choices=choices,
        )
        engine = self.engines[author]
        observations = await engine.score(job)
        check_observations(engine.name, job, observations)
        return observations

    def knows(self, author: Author) -> None:
        """A model has read or written all of the text."""
        if author == "target":
            self._num_known = len(self.token_ids)

    def key(self, author: Author) -> tuple[object, Author]:
        """What an engine's jobs of this problem and role have in common."""
        return self._keys[author]

    def capture(self, verifier: VerifierConfig) -> Capture | None:
        """What the verifying model is to read of its attention, None where it cannot or need not.

        Attention that weighs nothing is read for the sake of a detailed record only.
        """
        if not verifier.needs_attention and not self.config.detail:
            return None
        if "attention" not in self.engines[verifier.model].features:
            return None
        is_source = source_mask(self.prompt, len(self.token_ids), verifier.sources)
        return Capture(is_source, verifier.num_layers, verifier.epsilon)

    def release(self) -> None:
        """The problem is over."""
        for author, engine in self.engines.items():
            engine.release(self._keys[author])

    def _saw(self, length: int) -> None:
        self.num_verified_tokens += max(0, length - self._num_known)
        self._num_known = max(self._num_known, length)


class StepReader:
    """Says where a step ends that comes token by token; a block of code is kept whole."""

    __slots__ = ("_context", "_num_left", "_scanner", "_token_ids", "boundary")

    def __init__(self, context: ProblemContext, begun: tuple[int, ...]) -> None:
        self.boundary = context.boundary(begun)
        self._context, self._token_ids = context, list(begun)
        self._num_left = self.boundary.max_tokens
        self._scanner = StepScanner(context.pieces, self.boundary)

    def feed(self, token_id: int) -> CandidateFinish | None:
        """How the step ends with this token, or None where it goes on."""
        self._token_ids.append(token_id)
        self._num_left -= 1
        finish = self._scanner.feed(token_id)
        if finish == "delimiter" and self._context.is_code_open(self._token_ids):
            return None if self._num_left else "length"
        return finish


def joined(first: Candidate, rest: Candidate, text: str) -> Candidate:
    """One candidate of two that follow each other; ``text`` is that of all tokens."""
    n, m = len(first.token_ids), len(rest.token_ids)
    embedding = None
    if first.embedding is not None and rest.embedding is not None:
        embedding = (n * first.embedding + m * rest.embedding) / (n + m)
    return Candidate(
        first.token_ids + rest.token_ids,
        text,
        np.concatenate([first.token_logprobs, rest.token_logprobs]),
        rest.finish,
        concatenated(first.token_entropies, rest.token_entropies),
        embedding,
        concatenated(first.distributions, rest.distributions),
    )


def both_seen(first: Observation, rest: Observation) -> Observation:
    """One observation of a continuation that was scored in two parts, without its attention."""
    choices = None
    if first.choices is not None and rest.choices is not None:
        choices = first.choices[:-1] + rest.choices
    return Observation(
        np.concatenate([first.token_logprobs, rest.token_logprobs]),
        np.concatenate([first.is_first_choice, rest.is_first_choice]),
        concatenated(first.token_entropies, rest.token_entropies),
        choices=choices,
    )


def concatenated(first: FloatArray | None, rest: FloatArray | None) -> FloatArray | None:
    """Rows of two parts that follow each other, where both are known."""
    return None if first is None or rest is None else np.concatenate([first, rest])


def opens_thinking(tokenizer: Tokenizer, prompt: Prompt) -> bool:
    """Whether the prompt itself, behind the problem, opens the thinking."""
    tail = tokenizer.decode(prompt.token_ids[prompt.problem_span[1] :])
    return tail.rfind(THINK) > tail.rfind(END_THINK)
