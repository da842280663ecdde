"""Process reward models in the format of Qwen/Qwen2.5-Math-PRM-7B, on any backend.

The format: the solution's steps in the assistant's turn of the chat template, a separator token
behind each; at a separator, a head of two linear layers turns the final hidden state into two
logits, and the softmax of the second is the reward (the model card; ``Qwen2ForProcessRewardModel``
in the checkpoint's modeling_qwen2_rm.py, which is not run). The layers below come from the
backend's own loader, the head is applied in NumPy.

Separator and system prompt are Qwen's unless the config says otherwise::

    "specguard_prm": {"separator": "<|endoftext|>", "system_prompt": null}
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specguard.backends.checkpoint import Checkpoint, open_checkpoint
from specguard.backends.local.kept import common_length
from specguard.backends.registry import choose_backend
from specguard.backends.tensors import read_tensors
from specguard.core.engine import Engine, FloatArray, ScoreJob
from specguard.core.errors import SpecguardError

SEPARATOR = "<extra_0>"
SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
SETTINGS_KEY = "specguard_prm"
HEAD = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")


def load_reward_model(
    source: str, backend: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> "StepRewardModel":
    """Load a process reward model from a folder or a downloaded hub id.

    Args:
        source: a folder, or ``owner/name[@revision]``.
        backend: ``auto``, ``mlx``, ``cuda``, ``cuda:N``, ``mps``, ``cpu``, or a third party's.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``; the head is always in float32.
        trust_remote_code: run code that the tokenizer brings. The model's own is never needed.

    Raises:
        UsageError: no backend has this name.
        SpecguardError: the backend or the checkpoint cannot be used, or the checkpoint is no
            process reward model of this format; the message says what it lacks.
    """
    checkpoint = open_checkpoint(source)
    head = read_head(checkpoint)
    separator, system_prompt = _settings(checkpoint)
    _, implementation, device = choose_backend(backend)
    engine = implementation.load(source, dtype, trust_remote_code, device, is_headless=True)
    separator_id = engine.tokenizer.vocabulary.get(separator)
    if separator_id is None:
        raise SpecguardError(
            f"{source} is no process reward model: its tokenizer has no {separator}",
            f"name the token that ends a step in config.json: {SETTINGS_KEY}.separator",
        )
    return StepRewardModel(engine, head, separator_id, system_prompt)


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Linear [h, h], ReLU, linear [2, h], in float32."""

    inner_weight: NDArray[np.float32]
    inner_bias: NDArray[np.float32]
    outer_weight: NDArray[np.float32]
    outer_bias: NDArray[np.float32]

    def __call__(self, hidden: FloatArray) -> float:
        """The softmax of the second logit for a final hidden state [h]."""
        inner = self.inner_weight @ hidden.astype(np.float32) + self.inner_bias
        first, second = self.outer_weight @ np.maximum(inner, 0) + self.outer_bias
        return float(1 / (1 + np.exp(np.clip(first - second, -80, 80))))


def read_head(checkpoint: Checkpoint) -> Head:
    """The head in a checkpoint's weights.

    Raises:
        SpecguardError: parts of it are missing or of another shape.
    """
    found = read_tensors(checkpoint, HEAD)
    absent = [name for name in HEAD if name not in found]
    if absent:
        raise SpecguardError(
            f"{checkpoint.name} is no process reward model: its weights lack {', '.join(absent)}",
            "give a checkpoint in the format of Qwen/Qwen2.5-Math-PRM-7B",
        )
    size = int(checkpoint.text_config.get("hidden_size", 0))
    for name, shape in zip(HEAD, ((size, size), (size,), (2, size), (2,)), strict=True):
        if found[name].shape != shape:
            raise SpecguardError(
                f"{checkpoint.name} is no process reward model: {name} has shape "
                f"{found[name].shape}, not {shape}",
                "a head for two classes behind layers of the config's hidden_size is needed",
            )
    return Head(*(found[name] for name in HEAD))


def _settings(checkpoint: Checkpoint) -> tuple[str, str | None]:
    """Separator and system prompt."""
    given = checkpoint.config.get(SETTINGS_KEY, {})
    settings = {"separator": SEPARATOR, "system_prompt": SYSTEM_PROMPT}
    if not isinstance(given, dict) or given.keys() - settings.keys():
        raise SpecguardError(
            f"{SETTINGS_KEY} in the config of {checkpoint.name} is not understood",
            f"it may hold {' and '.join(settings)}",
        )
    settings |= given
    return str(settings["separator"]), settings["system_prompt"]


@dataclass(slots=True)
class _Read:
    """What was read of one problem: its prompt, and the steps with their rewards."""

    prompt: tuple[int, ...]
    steps: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


class StepRewardModel:
    """A `specguard.core.RewardModel` on any engine that hands hidden states over.

    Make one with `load_reward_model`.
    """

    def __init__(
        self, engine: Engine, head: Head, separator_id: int, system_prompt: str | None = None
    ) -> None:
        self.engine = engine
        self.head = head
        self.separator_id = separator_id
        self.system_prompt = system_prompt
        self._read: dict[Hashable, _Read] = {}

    @property
    def name(self) -> str:
        """Folder or hub id."""
        return self.engine.name

    async def rewards(self, key: Hashable, problem: str, steps: Sequence[str]) -> list[float]:
        """The probability in [0, 1] that each step is right; blank space around it is dropped.

        Raises:
            SpecguardError: the solution does not fit the context window.
        """
        tokenizer = self.engine.tokenizer
        if key not in self._read:
            prompt = tokenizer.encode_prompt(problem, self.system_prompt, False)
            self._read[key] = _Read(prompt.token_ids)
        read = self._read[key]
        wanted = [step.strip() for step in steps]
        num_same = common_length(read.steps, wanted)
        del read.steps[num_same:], read.rewards[num_same:]
        prefix = list(read.prompt)
        for step in wanted[:num_same]:
            prefix += [*tokenizer.encode(step), self.separator_id]
        for step in wanted[num_same:]:
            token_ids = [*tokenizer.encode(step), self.separator_id]
            # The state that is handed over predicted the last token: with one token behind the
            # separator, it is the separator's.
            job = ScoreJob(
                key=(self, key),
                prefix=tuple(prefix),
                continuations=((*token_ids, self.separator_id),),
                hidden_state=True,
            )
            [seen] = await self.engine.score(job)
            assert seen.hidden_state is not None
            prefix += token_ids
            read.steps.append(step)
            read.rewards.append(self.head(seen.hidden_state))
        return list(read.rewards)

    def release(self, key: Hashable) -> None:
        """Forget a problem."""
        self._read.pop(key, None)
        self.engine.release((self, key))
