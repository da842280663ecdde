"""Scripted engines that take the time they are told to, by a clock of their own."""

from dataclasses import dataclass, field

from specguard.core import Candidate, GenerateJob, Observation, ScoreJob
from tests.scripted import EOS, Scripted


class Clock:
    """Seconds that pass only where somebody works; the seconds of ``stalls`` come on top.

    They are by the number of the job, and happen once.
    """

    def __init__(self, stalls: dict[int, float] | None = None) -> None:
        self.now = 0.0
        self.stalls = dict(stalls or {})
        self.num_jobs = 0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        """A job is done."""
        self.now += seconds + self.stalls.pop(self.num_jobs, 0.0)
        self.num_jobs += 1


@dataclass
class Timed(Scripted):
    """Takes ``token`` seconds a decode step, and ``row`` more for each further candidate.

    A pass takes ``pass_``, and ``read`` more for each token that it reads, those of the prefix that
    it does not know yet among them. Steps have ``longest`` tokens at most, and those of a text that
    ``ends`` end with EOS.
    """

    clock: Clock = field(default_factory=Clock)
    token: float = 1.0
    row: float = 0.0
    pass_: float = 1.0
    read: float = 0.0
    longest: int = 1000
    ends: bool = False
    known: tuple[int, ...] = ()

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        length = min(job.boundary.max_tokens, self.longest)
        text = "x" * (length - 1) + ("$" if self.ends and EOS in job.boundary.eos_ids else "x")
        self.script = [[text] * job.num_candidates]
        made = await super().generate(job)
        self._catch_up(job)
        self.clock.spend((self.token + self.row * (job.num_candidates - 1)) * length)
        self.known += made[0].token_ids
        return made

    async def score(self, job: ScoreJob) -> list[Observation]:
        seen = await super().score(job)
        self._catch_up(job)
        self.clock.spend(self.pass_ + self.read * sum(map(len, job.continuations)))
        return seen

    def _catch_up(self, job: GenerateJob | ScoreJob) -> None:
        same = 0
        while same < min(len(self.known), len(job.prefix)) and self.known[same] == job.prefix[same]:
            same += 1
        if len(job.prefix) - same > 1:  # the last token is read by whatever follows
            self.clock.now += self.pass_ + self.read * (len(job.prefix) - same)
        self.known = job.prefix
