"""Whole problems solved by method, appended to a journal problem by problem."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from specguard import Engine
from specguard.core import GREEDY, Sampling, VerifierConfig
from specguard.core.config import PRESETS, ensemble_weights
from specguard.models.tiny import problems
from specguard.models.tiny.evidence.journal import Journal
from specguard.models.tiny.evidence.statistics import mcnemar, wilson

Settings = Mapping[str, Any]
BASELINE = "target, greedy"
SAMPLED = Sampling()
BETAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)


def plain() -> dict[str, Settings]:
    """Decoding by one model."""
    return {
        f"{method}, {name}": {"method": method, "sampling": sampling}
        for method in ("target", "draft")
        for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED))
    }


def main_table(own: VerifierConfig) -> dict[str, Settings]:
    """The paper's variants and this project's, at the pair's own k."""

    def preset(name: str, **more: Any) -> VerifierConfig:
        return replace(own, **{**PRESETS[name], **more})

    return {
        **plain(),
        "self-consistency only": {"verifier": preset("consistency-only")},
        "self-consistency + log-prob": {"verifier": preset("log-prob")},
        "self-consistency + grounding": {"verifier": preset("grounding")},
        "paper's ensemble, target verifies": {"verifier": preset("paper")},
        "paper's ensemble, draft verifies": {"verifier": preset("paper", model="draft")},
        "specguard (the pair's settings)": {},
        "specguard, draft verifies": {
            "verifier": replace(own, model="draft"),
            "selector": "draft",
        },
        "specguard, medoid selects": {"verifier": own, "selector": "draft"},
        "specguard, target selects": {"verifier": own, "selector": "target"},
    }


def over_k(own: VerifierConfig) -> dict[str, Settings]:
    """The same three at k = 1 (a greedy draft too), 4 and 16."""
    rows: dict[str, Settings] = {
        BASELINE: plain()[BASELINE],
        "k = 1, greedy draft": {"num_candidates": 1, "sampling": GREEDY},
    }
    for k in 1, 4, 16:
        more = {"num_candidates": k, "verifier": own}
        rows[f"k = {k}, medoid selects"] = {**more, "selector": "draft"}
        if k > 1:
            rows[f"k = {k}, target selects"] = {**more, "selector": "target"}
        draft = replace(own, model="draft")
        rows[f"k = {k}, draft verifies"] = {**more, "verifier": draft, "selector": "draft"}
    return rows


def grid(own: VerifierConfig) -> dict[str, Settings]:
    """Beta and threshold of the paper's ensemble, then its layers and epsilon."""
    paper = replace(own, **PRESETS["paper"])
    rows: dict[str, Settings] = {BASELINE: plain()[BASELINE]}
    for beta in BETAS:
        for threshold in THRESHOLDS:
            verifier = replace(paper, weights=ensemble_weights(beta), threshold=threshold)
            rows[f"beta {beta}, threshold {threshold}"] = {"verifier": verifier}
    return rows


def layers(own: VerifierConfig, num_layers: int) -> dict[str, Settings]:
    """The paper's ensemble over the last layers, with and without dropping small weights."""
    paper = replace(own, **PRESETS["paper"])
    rows: dict[str, Settings] = {BASELINE: plain()[BASELINE]}
    for count in range(1, num_layers + 1):
        for epsilon in 0.0, 0.01:
            verifier = replace(paper, num_layers=count, epsilon=epsilon)
            rows[f"last {count} layers, epsilon {epsilon}"] = {"verifier": verifier}
    return rows


def run(
    engine: Engine, methods: Mapping[str, Settings], stream: int, count: int, path: Path
) -> Iterator[int]:
    """Solve ``count`` problems by every method; yields how many solutions are still to come.

    Problem by problem, so that a run cut short compares all methods on the same problems.
    """
    assert engine.draft is not None
    assert engine.target is not None
    settings = {"draft": engine.draft.name, "target": engine.target.name, "stream": stream}
    journal = Journal(path, settings)
    done = {(row["problem"], row["method"]): row for row in journal.rows}
    for key, row in done.items():
        if key[1] in methods and row["settings"] != repr(methods[key[1]]):
            raise ValueError(f"{path} has {key[1]!r} with other settings: {row['settings']}")
    wanted = [(index, name) for index in range(count) for name in methods]
    missing = [key for key in wanted if key not in done]
    for left, (index, name) in zip(range(len(missing) - 1, -1, -1), missing, strict=True):
        problem = problems.generate(stream, index)
        solution = engine.solve(problem.text, **methods[name])
        stats = solution.stats
        journal.append(
            {
                "problem": index,
                "method": name,
                "settings": repr(methods[name]),
                "is_right": solution.answer == str(problem.answer),
                "finish": solution.finish_reason,
                "seconds": stats.seconds,
                "steps": stats.num_steps,
                "accepted": stats.num_accepted_steps,
                "tokens": stats.num_tokens,
                "target_tokens": stats.num_target_tokens,
                "verified_tokens": stats.num_verified_tokens,
                "is_plain": stats.step_acceptance_rate is None,
            }
        )
        yield left


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown lines: accuracy with 95% Wilson interval, McNemar's p against the baseline, cost."""
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["problem"]] = row
    yield (
        "| method | problems | right | 95% interval | p against target greedy | s / problem "
        "| steps accepted | target wrote / read, tokens a problem |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    baseline = by_method.get(BASELINE, {})
    for name, found in by_method.items():
        count, right = len(found), sum(row["is_right"] for row in found.values())
        low, high = wilson(right, count)
        both = sorted(found.keys() & baseline.keys())
        p = ""
        if both and name != BASELINE:
            ours, theirs = ([rows[i]["is_right"] for i in both] for rows in (found, baseline))
            p = f"{mcnemar(ours, theirs):.3f}"

        is_plain = all(row["is_plain"] for row in found.values())
        accepted = "" if is_plain else f"{_mean(found, 'accepted') / _mean(found, 'steps'):.1%}"
        yield (
            f"| {name} | {count} | {right / count:.1%} | {low:.1%} - {high:.1%} | {p} "
            f"| {_mean(found, 'seconds'):.3f} | {accepted} "
            f"| {_mean(found, 'target_tokens'):.1f} / {_mean(found, 'verified_tokens'):.1f} |"
        )


def _mean(rows: Mapping[int, dict[str, Any]], field: str) -> float:
    return sum(float(row[field]) for row in rows.values()) / len(rows)
