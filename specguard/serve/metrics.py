"""What is counted, in Prometheus' form."""

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from specguard.core.records import Solution, StepRecord

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server; any thread may count."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._requests = Counter(
            "specguard_requests", "Requests, by what they ask for", ["path", "status"], registry=own
        )
        self.running = Gauge("specguard_solutions_running", "Solutions at work", registry=own)
        self.waiting = Gauge("specguard_solutions_waiting", "Solutions in the queue", registry=own)
        self.held = Gauge(
            "specguard_reserved_bytes", "Keys and values that may be held", registry=own
        )
        self._memory = Gauge("specguard_resident_bytes", "Memory of the process", registry=own)
        self._memory.set_function(lambda: psutil.Process().memory_info().rss)
        self._steps = Counter(
            "specguard_steps", "Steps, by what was decided", ["decision"], registry=own
        )
        self._tokens = Counter(
            "specguard_tokens", "Tokens of solutions, by author", ["author"], registry=own
        )
        self._drafted = Counter("specguard_drafted_tokens", "Tokens drafted", registry=own)
        self._verified = Counter(
            "specguard_verified_tokens", "Tokens read by the target", registry=own
        )
        self._phases = Counter(
            "specguard_phase_seconds", "Time by phase, of all solutions", ["phase"], registry=own
        )
        self._finished = Counter(
            "specguard_solutions", "Solutions, by how they ended", ["finish_reason"], registry=own
        )
        self.first_step = Histogram(
            "specguard_first_step_seconds",
            "From a request to the first step",
            buckets=_SECONDS,
            registry=own,
        )
        self.seconds = Histogram(
            "specguard_solution_seconds",
            "From a request to the end of its solution",
            buckets=_SECONDS,
            registry=own,
        )

    def request(self, path: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(path, status).inc()

    def step(self, step: StepRecord) -> None:
        """A step was decided."""
        self._steps.labels(step.decision).inc()
        is_draft = step.author == "draft"
        num_draft = step.num_tokens if is_draft else step.num_kept + step.num_reused
        self._tokens.labels("draft").inc(num_draft)
        self._tokens.labels("target").inc(step.num_tokens - num_draft)
        self._drafted.inc(step.num_drafted)
        for phase, seconds in step.seconds.items():
            self._phases.labels(phase).inc(seconds)

    def solution(self, solution: Solution) -> None:
        """A solution has ended."""
        self._finished.labels(solution.finish_reason).inc()
        self._verified.inc(solution.stats.num_verified_tokens)

    def failure(self, reason: str) -> None:
        """A solution has come to nothing."""
        self._finished.labels(reason).inc()

    def text(self) -> bytes:
        """All of it, as it is scraped."""
        return generate_latest(self._registry)
