"""Model pairs by name: the built-in one and presets of hub checkpoints.

A pair says where its models are for each kind of weights, how its prompt reads, and which verifier
settings its calibration supports.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path

from specguard.backends.checkpoint import is_on_disk
from specguard.core.config import VerifierConfig, ensemble_weights
from specguard.core.errors import UsageError
from specguard.core.fallback import DraftCost

ENTRY_POINT_GROUP = "specguard.pairs"
BUILT_IN_PAIR = "tiny"
_HERE = Path(__file__).parent
_STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, slots=True)
class ModelPair:
    """A draft and a target that share a tokenizer.

    ``draft`` and ``target`` map a kind of weights (``torch``, ``mlx``) to a folder or a hub id with
    an optional ``@revision``. ``memory_bytes`` is what both need once loaded, by kind of weights.
    ``context_limit`` is the window they were trained for, prompt included. ``reward`` is a process
    reward model for its problems, for any kind of weights. ``draft_cost`` is None where it is not
    known what drafting costs.
    """

    name: str
    description: str
    draft: Mapping[str, str]
    target: Mapping[str, str]
    memory_bytes: Mapping[str, int]
    context_limit: int
    system_prompt: str | None = None
    reward: str | None = None
    draft_cost: DraftCost | None = None
    num_candidates: int = 16
    selector: str = "draft"
    verifier: VerifierConfig = field(default_factory=VerifierConfig)

    def sources(self, weights: str) -> tuple[str, str]:
        """Draft and target for a kind of weights.

        Raises:
            UsageError: the pair has none of that kind.
        """
        if weights not in self.draft:
            raise UsageError(
                f"pair {self.name!r} has no {weights} weights", "give --draft and --target instead"
            )
        return self.draft[weights], self.target[weights]

    def is_on_disk(self, weights: str) -> bool:
        """Whether both models can be loaded without a download."""
        return weights in self.draft and all(map(is_on_disk, self.sources(weights)))


def _hub_pair(
    name: str,
    description: str,
    *,
    owner: str,
    draft: str,
    target: str,
    mlx_target: str | None = None,
    billions: tuple[float, float],
    context_limit: int,
    reward: str | None = None,
) -> ModelPair:
    return ModelPair(
        name,
        description,
        draft={"torch": f"{owner}/{draft}", "mlx": f"mlx-community/{draft}-4bit"},
        target={"torch": f"{owner}/{target}", "mlx": f"mlx-community/{mlx_target or target}-4bit"},
        # 2 bytes a number in bfloat16; 4 bits and a scale per group of 64 come to 0.57 bytes.
        memory_bytes={
            "torch": round(sum(billions) * 2e9),
            "mlx": round(sum(billions) * 0.57e9),
        },
        context_limit=context_limit,
        system_prompt=_STEP_BY_STEP,
        reward=reward,
        # A decode step takes as long as its weights take to read.
        draft_cost=DraftCost(billions[0] / billions[1]),
    )


def _tiny() -> ModelPair:
    folders = {role: str(_HERE / "tiny" / role) for role in ("draft", "target")}
    return ModelPair(
        BUILT_IN_PAIR,
        "built in: grade-school word problems, for trying things out",
        draft={"torch": folders["draft"], "mlx": folders["draft"]},
        target={"torch": folders["target"], "mlx": folders["target"]},
        memory_bytes={"torch": 10_000_000, "mlx": 10_000_000},
        context_limit=2048,
        reward=str(_HERE / "tiny" / "reward"),
        # Measured with one thread of a CPU, see models/tiny/README.md.
        draft_cost=DraftCost(candidate=0.5, further=0.05, verification=3.0),
        # Chosen on calibration problems, see models/tiny/README.md; more candidates are no more
        # accurate here, and slower on a CPU.
        num_candidates=1,
        selector="target",
        verifier=VerifierConfig(weights=ensemble_weights(1.0), bounds={"log_prob": (-2.0, 0.0)}),
    )


PAIRS: Mapping[str, ModelPair] = {
    pair.name: pair
    for pair in (
        _tiny(),
        _hub_pair(
            "qwen2.5-math",
            "Qwen2.5-Math 1.5B / 7B, the paper's pair for mathematics",
            owner="Qwen",
            draft="Qwen2.5-Math-1.5B-Instruct",
            target="Qwen2.5-Math-7B-Instruct",
            billions=(1.54, 7.62),
            context_limit=4096,
            reward="Qwen/Qwen2.5-Math-PRM-7B",
        ),
        _hub_pair(
            "qwen2.5",
            "Qwen2.5 1.5B / 7B, general purpose",
            owner="Qwen",
            draft="Qwen2.5-1.5B-Instruct",
            target="Qwen2.5-7B-Instruct",
            billions=(1.54, 7.62),
            context_limit=32768,
        ),
        _hub_pair(
            "llama3",
            "Llama 3.2 1B / 3.1 8B, general purpose (the hub asks for consent to its licence)",
            owner="meta-llama",
            draft="Llama-3.2-1B-Instruct",
            target="Llama-3.1-8B-Instruct",
            mlx_target="Meta-Llama-3.1-8B-Instruct",
            billions=(1.24, 8.03),
            context_limit=131072,
        ),
    )
}


def pair_names() -> tuple[str, ...]:
    """Names of all registered pairs, third parties' included."""
    return tuple(PAIRS) + tuple(
        entry.name for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name not in PAIRS
    )


def find_pair(name: str) -> ModelPair:
    """The pair called ``name``.

    Raises:
        UsageError: no pair has this name; the nearest one is suggested.
    """
    if name in PAIRS:
        return PAIRS[name]
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            pair: ModelPair = entry.load()
            return pair
    names = pair_names()
    nearest = get_close_matches(name.lower(), names, 1, 0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UsageError(f"no model pair is called {name!r}", f"{hint}pairs: {', '.join(names)}")
