"""A scripted engine for the core: it answers as its script says and keeps the jobs it was given.

It refuses what a real engine could not do: a job that asks for a feature it lacks, and a job of a
problem that is over.
"""

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from specguard.core import (
    ALL_FEATURES,
    AttentionBlock,
    Boundary,
    Candidate,
    Feature,
    GenerateJob,
    Observation,
    Prompt,
    ScoreJob,
)
from specguard.core.engine import CandidateFinish

EOS = 0
Script = list[list[str] | str] | Callable[[GenerateJob], list[str]]


class CharTokenizer:
    """One id a character; id 0 is EOS and has no text."""

    eos_ids = frozenset({EOS})

    def __init__(self, shift: int = 0) -> None:
        self.vocabulary = {chr(i): i + shift for i in range(1, 256)}

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token_id) for token_id in token_ids if token_id != EOS)

    def encode_prompt(self, problem: str, system_prompt: str | None, thinking: bool) -> Prompt:
        head = [1, *self.encode(system_prompt or "")]
        ids = [*head, *self.encode(problem), 2]
        return Prompt(tuple(ids), (len(head), len(ids) - 1))


@dataclass
class Scripted:
    """Writes ``script`` step by step, for every problem from its beginning.

    An entry is a list of texts (the candidates of a job) or one text for all; "$" at a text's end
    is EOS; the last entry repeats. A function makes the texts of a job instead. Text by text there
    is a log-prob (or one a token), a source mass, and how many tokens at its beginning the model
    would have written itself. A ``fail_at`` job, "generate" or "score", raises ``error`` where its
    prefix holds ``fail_on``. Every job waits ``num_turns`` turns of the event loop. Who listens to
    a job hears of ``lump`` tokens at a time, a turn each; 0: of none.
    """

    name: str
    script: Script
    logprobs: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    source_mass: dict[str, float] = field(default_factory=dict)
    first_choices: dict[str, int] = field(default_factory=dict)
    features: frozenset[Feature] = ALL_FEATURES - {"distributions", "choices"}
    reasons: dict[Feature, str] = field(default_factory=dict)
    context_limit: int = 4096
    num_bytes_per_token: int = 8
    tokenizer: CharTokenizer = field(default_factory=CharTokenizer)
    default_logprob: float = -0.1
    fail_at: str | None = None
    fail_on: str = ""
    error: BaseException = field(default_factory=lambda: RuntimeError("it failed"))
    num_turns: int = 1
    lump: int = 0
    jobs: list[GenerateJob | ScoreJob] = field(default_factory=list)
    released: list[Hashable] = field(default_factory=list)
    num_steps: dict[Hashable, int] = field(default_factory=dict)

    @property
    def verbs(self) -> list[str]:
        return ["generate" if isinstance(job, GenerateJob) else "score" for job in self.jobs]

    @property
    def generated(self) -> list[GenerateJob]:
        return [job for job in self.jobs if isinstance(job, GenerateJob)]

    @property
    def scored(self) -> list[ScoreJob]:
        return [job for job in self.jobs if isinstance(job, ScoreJob)]

    @property
    def scored_texts(self) -> list[list[str]]:
        return [list(map(self.tokenizer.decode, job.continuations)) for job in self.scored]

    @property
    def held(self) -> set[Hashable]:
        """Keys of jobs whose problem has not been released."""
        return {job.key for job in self.jobs} - set(self.released)

    def prefix_of(self, job: GenerateJob | ScoreJob) -> str:
        return self.tokenizer.decode(job.prefix)

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        assert not job.hidden_states or "hidden states" in self.features
        assert not job.distributions or "distributions" in self.features
        assert job.uniforms is not None
        await self._begin("generate", job)
        if callable(self.script):
            texts = self.script(job)
        else:
            number = self.num_steps.get(job.key, 0)
            self.num_steps[job.key] = number + 1
            entry = self.script[min(number, len(self.script) - 1)]
            texts = entry if isinstance(entry, list) else [entry] * job.num_candidates
        assert len(texts) == job.num_candidates
        made = [self._candidate(text, job.boundary, job.hidden_states) for text in texts]
        if job.on_tokens is not None and self.lump:
            for start in range(0, max(len(each.token_ids) for each in made), self.lump):
                for index, candidate in enumerate(made):
                    job.on_tokens(index, candidate.token_ids[start : start + self.lump])
                await asyncio.sleep(0)
        return made

    async def score(self, job: ScoreJob) -> list[Observation]:
        assert job.capture is None or "attention" in self.features
        assert not job.hidden_state or "hidden states" in self.features
        assert job.distributions is None or "distributions" in self.features
        await self._begin("score", job)
        return [self._observe(job, token_ids) for token_ids in job.continuations]

    def release(self, key: Hashable) -> None:
        self.released.append(key)

    async def _begin(self, verb: str, job: GenerateJob | ScoreJob) -> None:
        assert job.key not in self.released, "the problem of this job is over"
        self.jobs.append(job)
        for _ in range(self.num_turns):
            await asyncio.sleep(0)
        if verb == self.fail_at and self.fail_on in self.prefix_of(job):
            raise self.error

    def _entropies(self, count: int) -> np.ndarray | None:
        return np.full(count, 0.5) if "entropy" in self.features else None

    def _candidate(self, text: str, boundary: Boundary, is_embedded: bool) -> Candidate:
        finish: CandidateFinish = "delimiter"
        ids = self.tokenizer.encode(text.rstrip("$"))
        if text.endswith("$"):
            finish, ids = "eos", [*ids, EOS]
        elif not text.endswith(boundary.delimiter):
            finish = "length"
        if len(ids) > boundary.max_tokens:
            finish, ids = "length", ids[: boundary.max_tokens]
        counts = np.bincount(np.array(ids) % 16, minlength=16).astype(float)
        return Candidate(
            token_ids=tuple(ids),
            text=self.tokenizer.decode(ids),
            token_logprobs=np.full(len(ids), self.logprobs.get(text, self.default_logprob)),
            finish=finish,
            token_entropies=self._entropies(len(ids)),
            embedding=counts if is_embedded else None,
        )

    def _observe(self, job: ScoreJob, token_ids: tuple[int, ...]) -> Observation:
        text, n = self.tokenizer.decode(token_ids), len(token_ids)
        mass = self.source_mass.get(text, 1.0)
        block = AttentionBlock(np.full(n, mass), np.zeros(n), (1 - mass) * np.eye(n))
        return Observation(
            token_logprobs=np.full(n, self.logprobs.get(text, self.default_logprob)),
            is_first_choice=np.arange(n) < self.first_choices.get(text, 0),
            token_entropies=self._entropies(n),
            blocks=(block,) * job.capture.num_layers if job.capture is not None else None,
        )
