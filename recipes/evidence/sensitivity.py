"""What the paper's ensemble is sensitive to: weight and threshold; layers and epsilon."""

from dataclasses import replace
from itertools import product

from specguard.bench.methods import Method, known_methods
from specguard.core.config import PRESETS, SolveConfig, ensemble_weights

BETAS = (0.0, 0.3, 0.7, 1.0)
THRESHOLDS = (0.5, 0.7, 0.9)
EPSILONS = (0.0, 0.01)
NUM_CANDIDATES = 8


def weight_and_threshold(base: SolveConfig) -> list[Method]:
    """The target alone, then every weight of the log-probability with every threshold."""
    paper = replace(base.verifier, **PRESETS["paper"])
    found = [known_methods(base)["target"]]
    for beta, threshold in product(BETAS, THRESHOLDS):
        verifier = replace(paper, weights=ensemble_weights(beta), threshold=threshold)
        changes = {"num_candidates": NUM_CANDIDATES, "verifier": verifier, "selector": "draft"}
        found.append(Method(f"beta {beta}, threshold {threshold}", changes))
    return found


def layers_and_epsilon(base: SolveConfig, num_layers: int) -> list[Method]:
    """The target alone, then the ensemble over the last layers, small weights kept or not."""
    paper = replace(base.verifier, **PRESETS["paper"])
    found = [known_methods(base)["target"]]
    for count, epsilon in product(range(1, num_layers + 1), EPSILONS):
        verifier = replace(paper, num_layers=count, epsilon=epsilon)
        changes = {"num_candidates": NUM_CANDIDATES, "verifier": verifier, "selector": "draft"}
        found.append(Method(f"last {count} layers, epsilon {epsilon}", changes))
    return found
