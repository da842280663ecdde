"""Process reward models in the format of Qwen/Qwen2.5-Math-PRM-7B, on any backend.

The format: the solution's steps in the assistant's turn of the chat template, a separator token
behind each; at a separator, a head of two linear layers turns the final hidden state into two
logits, and the softmax of the second is the reward (the model card; ``Qwen2ForProcessRewardModel``
in the checkpoint's modeling_qwen2_rm.py, which is not run). The layers below come from the
backend's own loader, the head is applied in NumPy.

Separator and system prompt are Qwen's unless the config says otherwise::

    "specguard_prm": {"separator": "<|endoftext|>", "system_prompt": null}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specguard.backends.checkpoint import Checkpoint, open_checkpoint
from specguard.backends.registry import choose_backend
from specguard.backends.tensors import read_tensors
from specguard.core.errors import SpecguardError
from specguard.core.model import FloatArray, LanguageModel, TokenSequence

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
    model = implementation.load(source, dtype, trust_remote_code, device, is_headless=True)
    separator_id = model.tokenizer.vocabulary.get(separator)
    if separator_id is None:
        raise SpecguardError(
            f"{source} is no process reward model: its tokenizer has no {separator}",
            f"name the token that ends a step in config.json: {SETTINGS_KEY}.separator",
        )
    return StepRewardModel(model, head, separator_id, system_prompt)


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


class StepRewardModel:
    """A `specguard.core.RewardModel` on a backend's model. Make one with `load_reward_model`."""

    def __init__(
        self,
        model: LanguageModel[Any],
        head: Head,
        separator_id: int,
        system_prompt: str | None = None,
    ) -> None:
        self.model = model
        self.head = head
        self.separator_id = separator_id
        self.system_prompt = system_prompt

    @property
    def name(self) -> str:
        """Folder or hub id."""
        return self.model.name

    def start(self, problem: str) -> "StepRewardSequence":
        """Read a problem; its tokens are forwarded once.

        Raises:
            SpecguardError: it does not fit the context window.
        """
        prompt = self.model.tokenizer.encode_prompt(problem, self.system_prompt, False)
        return StepRewardSequence(self, self.model.start(prompt))


class StepRewardSequence:
    """A `specguard.core.RewardSequence`: one pass over each new step."""

    def __init__(self, owner: StepRewardModel, sequence: TokenSequence) -> None:
        self._owner = owner
        self._sequence = sequence
        self._steps: list[str] = []
        self._rewards: list[float] = []
        self._lengths = [len(sequence.token_ids)]  # in tokens: the prompt, then after each step

    def rewards(self, steps: Sequence[str]) -> list[float]:
        """The probability in [0, 1] that each step is right; blank space around a step is dropped.

        Raises:
            SpecguardError: the solution does not fit the context window.
            ValueError: the sequence is closed.
        """
        if self._sequence.is_closed:
            raise ValueError("the sequence is closed")
        stripped = [step.strip() for step in steps]
        same = 0
        while same < min(len(stripped), len(self._steps)) and stripped[same] == self._steps[same]:
            same += 1
        self._cut(same)
        for step in stripped[same:]:
            self._read(step)
        return list(self._rewards)

    def close(self) -> None:
        """Give the KV back."""
        self._sequence.close()

    def _cut(self, num_steps: int) -> None:
        del self._steps[num_steps:], self._rewards[num_steps:], self._lengths[num_steps + 1 :]
        if len(self._sequence.token_ids) > self._lengths[-1]:
            self._owner.model.rewind(self._sequence, self._lengths[-1])

    def _read(self, step: str) -> None:
        model, separator = self._owner.model, self._owner.separator_id
        # A pass hands over the hidden state that predicted its last token: with one token behind
        # the separator, that is the separator's. The token is taken back, nothing has read it.
        token_ids = [*model.tokenizer.encode(step), separator, separator]
        [seen] = model.extend([self._sequence], [token_ids], hidden_state=True)
        assert seen.last_hidden_state is not None
        length = len(self._sequence.token_ids) - 1
        model.rewind(self._sequence, length)
        self._steps.append(step)
        self._rewards.append(self._owner.head(seen.last_hidden_state))
        self._lengths.append(length)
