"""Model pairs by name: the built-in one and pairs of hub checkpoints.

A pair says where its models are for each kind of weights, how its prompt reads, and which verifier
settings its calibration supports.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path

from specguard.backends.checkpoint import is_on_disk
from specguard.backends.memory import ModelSize
from specguard.core.config import (
    TARGET_SELECTOR,
    USUAL_TOKENS,
    VerifierConfig,
    ensemble_weights,
)
from specguard.core.errors import UsageError
from specguard.models.families import FAMILIES, Family

ENTRY_POINT_GROUP = "specguard.pairs"
BUILT_IN_PAIR = "tiny"
# What the cards of Qwen and DeepSeek advise for mathematics; of any pair that has no other.
STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."
PROMPT_TOKENS = 1024  # that memory is wanted for, besides a solution
THINKING_TOKENS = 8192  # likewise, of a solution with thinking that has no limit of its own
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class ModelPair:
    """A draft and a target that share a tokenizer.

    ``draft`` and ``target`` map a kind of weights (``torch``, ``mlx``) to a folder or a hub id with
    an optional ``@revision``. ``sizes`` are those of draft and target, None where they are not
    known before a download. ``context_limit`` is the window they were trained for, prompt included.
    ``thinking`` asks for it by default, as of models that always think. ``reward`` is a process
    reward model for its problems, for any kind of weights. ``check`` refuses a problem that the
    pair was not made for, with a UsageError; None takes any.
    """

    name: str
    description: str
    draft: Mapping[str, str]
    target: Mapping[str, str]
    context_limit: int
    sizes: tuple[ModelSize, ModelSize] | None = None
    system_prompt: str | None = None
    thinking: bool = False
    reward: str | None = None
    num_candidates: int = 1
    selector: str = TARGET_SELECTOR
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    check: Callable[[str], None] | None = None

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


def typical_tokens(thinking: bool = False) -> int:
    """Tokens of a solution that memory is wanted for where it has no limit of its own."""
    return THINKING_TOKENS if thinking else USUAL_TOKENS


def _hub_pair(family: Family, draft: str, target: str) -> ModelPair:
    small, large = family.models[draft], family.models[target]
    is_usual = (draft, target) == family.pairs[0]
    return ModelPair(
        family.name if is_usual else f"{family.name}-{draft}-{target}",
        family.description,
        draft={"torch": small.torch, "mlx": small.mlx},
        target={"torch": large.torch, "mlx": large.mlx},
        context_limit=family.context_limit,
        sizes=(small.size, large.size),
        system_prompt=STEP_BY_STEP,
        thinking=family.thinks,
        reward=family.reward,
    )


def _tiny() -> ModelPair:
    folders = {role: str(_HERE / "tiny" / role) for role in ("draft", "target")}
    return ModelPair(
        BUILT_IN_PAIR,
        "built in: grade-school word problems, for trying things out",
        draft={"torch": folders["draft"], "mlx": folders["draft"]},
        target={"torch": folders["target"], "mlx": folders["target"]},
        context_limit=2048,
        reward=str(_HERE / "tiny" / "reward"),
        # Chosen on calibration problems, see models/tiny/README.md; more candidates are no more
        # accurate here, and slower on a CPU.
        verifier=VerifierConfig(weights=ensemble_weights(1.0), bounds={"log_prob": (-2.0, 0.0)}),
        check=_check_language,
    )


def _check_language(problem: str) -> None:
    from specguard.models.tiny import grammar  # its words take a moment to read

    grammar.check(problem)


PAIRS: Mapping[str, ModelPair] = {
    pair.name: pair
    for pair in (
        _tiny(),
        *(_hub_pair(family, *sizes) for family in FAMILIES for sizes in family.pairs),
    )
}
# A family's usual pair has its name; with its sizes it is the same.
_FULL_NAMES = {"-".join((family.name, *family.pairs[0])): PAIRS[family.name] for family in FAMILIES}


def pair_names() -> tuple[str, ...]:
    """Names of all registered pairs, third parties' included."""
    return tuple(PAIRS) + tuple(
        entry.name for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name not in PAIRS
    )


def find_pair(name: str) -> ModelPair:
    """The pair called ``name``: ``qwen3``, or with its sizes, ``qwen3-0.6b-14b``.

    Raises:
        UsageError: no pair has this name; the nearest one is suggested.
    """
    for known in PAIRS, _FULL_NAMES:
        if name in known:
            return known[name]
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            pair: ModelPair = entry.load()
            return pair
    nearest = get_close_matches(name.lower(), (*pair_names(), *_FULL_NAMES), 1, 0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UsageError(f"no model pair is called {name!r}", f"{hint}all pairs: specguard models")
