"""An engine in plain NumPy: a small Llama that keeps nothing and computes every job anew.

Slow and obviously right: what engines with caches, trees and batches must come to. It has random
weights, or those of a checkpoint, so that a real engine can be compared number by number.
"""

import asyncio
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specguard.core import (
    ALL_FEATURES,
    AttentionBlock,
    Candidate,
    Feature,
    GenerateJob,
    Observation,
    PieceTable,
    Sampling,
    ScoreJob,
    SpecguardError,
    StepScanner,
    Tokenizer,
    UsageError,
)
from specguard.core.engine import FloatArray
from tests.rollout import block_of
from tests.scripted import CharTokenizer


@dataclass(frozen=True)
class Pass:
    """What is said of T tokens: logits [T, V], states [T, H], by layer weights [heads, T, T]."""

    logits: FloatArray
    hidden: FloatArray
    attention: list[FloatArray]


@dataclass(frozen=True)
class Llama:
    """Weights by transformers' names; every pass reads all tokens, each seeing those before it."""

    weights: Mapping[str, FloatArray]
    num_layers: int
    num_heads: int
    theta: float = 10000.0
    epsilon: float = 1e-6

    @classmethod
    def random(cls, seed: int, vocab_size: int = 128, width: int = 16) -> "Llama":
        rng = np.random.default_rng(seed)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab_size, width)}
        for layer in (f"model.layers.{number}" for number in range(3)):
            shapes |= {
                f"{layer}.self_attn.q_proj": (width, width),
                f"{layer}.self_attn.k_proj": (width // 2, width),
                f"{layer}.self_attn.v_proj": (width // 2, width),
                f"{layer}.self_attn.o_proj": (width, width),
                f"{layer}.mlp.gate_proj": (width, width),
                f"{layer}.mlp.up_proj": (width, width),
                f"{layer}.mlp.down_proj": (width, width),
                f"{layer}.input_layernorm": (width,),
                f"{layer}.post_attention_layernorm": (width,),
            }
        shapes |= {"model.norm": (width,), "lm_head": (vocab_size, width)}
        weights = {
            f"{name}.weight": rng.normal(scale=0.5, size=shape)
            if len(shape) > 1
            else np.ones(shape)
            for name, shape in shapes.items()
        }
        return cls(weights, num_layers=3, num_heads=2)

    @classmethod
    def load(cls, folder: Path) -> "Llama":
        from safetensors.numpy import load_file

        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        return cls(
            {name: array.astype(np.float64) for name, array in weights.items()},
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["rope_parameters"]["rope_theta"],
            config["rms_norm_eps"],
        )

    def __call__(self, token_ids: Sequence[int]) -> Pass:
        states = self.weights["model.embed_tokens.weight"][list(token_ids)]
        attention = []
        for layer in (f"model.layers.{number}" for number in range(self.num_layers)):
            inputs = self._normed(states, f"{layer}.input_layernorm")
            query, key, value = (
                self._heads(inputs, f"{layer}.self_attn.{name}_proj") for name in "qkv"
            )
            query, key = self._turned(query), self._turned(key)
            groups = len(query) // len(key)
            key, value = np.repeat(key, groups, 0), np.repeat(value, groups, 0)
            scores = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])
            scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
            attention.append(softmax(scores))
            mixed = (attention[-1] @ value).swapaxes(0, 1).reshape(len(states), -1)
            states = states + self._product(mixed, f"{layer}.self_attn.o_proj")
            inputs = self._normed(states, f"{layer}.post_attention_layernorm")
            gate = self._product(inputs, f"{layer}.mlp.gate_proj")
            up = self._product(inputs, f"{layer}.mlp.up_proj")
            states = states + self._product(
                gate / (1 + np.exp(-gate)) * up, f"{layer}.mlp.down_proj"
            )
        hidden = self._normed(states, "model.norm")
        return Pass(self._product(hidden, "lm_head"), hidden, attention)

    def _product(self, inputs: FloatArray, name: str) -> FloatArray:
        return np.asarray(inputs @ self.weights[f"{name}.weight"].T)

    def _normed(self, states: FloatArray, name: str) -> FloatArray:
        length = np.sqrt((states**2).mean(-1, keepdims=True) + self.epsilon)
        return np.asarray(states / length * self.weights[f"{name}.weight"])

    def _heads(self, inputs: FloatArray, name: str) -> FloatArray:
        dim = len(self.weights["model.layers.0.self_attn.q_proj.weight"]) // self.num_heads
        return self._product(inputs, name).reshape(len(inputs), -1, dim).swapaxes(0, 1)

    def _turned(self, states: FloatArray) -> FloatArray:
        _, length, dim = states.shape
        speeds = self.theta ** (-np.arange(0, dim, 2) / dim)
        angles = np.tile(np.outer(np.arange(length), speeds), 2)
        half = dim // 2
        turned = np.concatenate([-states[..., half:], states[..., :half]], -1)
        return np.asarray(states * np.cos(angles) + turned * np.sin(angles))


def softmax(scores: FloatArray) -> FloatArray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def warp(logits: FloatArray, sampling: Sampling) -> FloatArray:
    """Probabilities [V] after temperature and top-p."""
    if sampling.is_greedy:
        return np.eye(len(logits))[logits.argmax()]
    probs = softmax(logits / sampling.temperature)
    ordered = np.sort(probs)[::-1]
    count = int((np.cumsum(ordered) - ordered < sampling.top_p).sum())
    probs = np.where(probs < ordered[count - 1], 0.0, probs)
    return np.asarray(probs / probs.sum())


def draw(probs: FloatArray, uniform: float) -> int:
    """The inverse CDF, in order of token ids."""
    return int((np.cumsum(probs) <= uniform * (1 - 1e-9)).sum())


class ReferenceEngine:
    """Has all features but those in ``reasons``, which says why it lacks them."""

    num_bytes_per_token = 1

    def __init__(
        self,
        seed: int = 0,
        *,
        model: Llama | None = None,
        tokenizer: Tokenizer | None = None,
        context_limit: int = 512,
        reasons: Mapping[Feature, str] | None = None,
    ) -> None:
        self.name = f"reference-{seed}"
        self.model = model or Llama.random(seed)
        self.tokenizer: Tokenizer = tokenizer or CharTokenizer()
        self.context_limit = context_limit
        self.reasons: Mapping[Feature, str] = reasons or {}
        self.features: frozenset[Feature] = ALL_FEATURES - self.reasons.keys()
        self.num_tokens = max(self.tokenizer.vocabulary.values()) + 1

    @classmethod
    def load(cls, folder: Path) -> "ReferenceEngine":
        """The model and the tokenizer of a Llama checkpoint."""
        from specguard.backends.tokenizer import FolderTokenizer

        return cls(model=Llama.load(folder), tokenizer=FolderTokenizer(folder))

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        self._check(len(job.prefix) + job.boundary.max_tokens)
        assert job.uniforms is not None
        return [await self._candidate(job, row) for row in job.uniforms]

    async def score(self, job: ScoreJob) -> list[Observation]:
        self._check(len(job.prefix) + max(map(len, job.continuations)))
        if job.capture is not None and "attention" not in self.features:
            raise SpecguardError(f"the attention of {self.name} cannot be captured")
        if job.capture is not None and job.capture.num_layers > self.model.num_layers:
            raise UsageError(f"attention of {job.capture.num_layers} layers is asked for")
        await asyncio.sleep(0)
        return [self._observation(job, token_ids) for token_ids in job.continuations]

    def release(self, key: Hashable) -> None:
        """Nothing is kept."""

    def distribution(self, token_ids: Sequence[int], sampling: Sampling) -> FloatArray:
        """What the token behind these is drawn from."""
        return warp(self._pass(token_ids).logits[-1], sampling)

    async def _candidate(self, job: GenerateJob, uniforms: FloatArray) -> Candidate:
        scanner = StepScanner(PieceTable(self.tokenizer), job.boundary)
        token_ids: list[int] = []
        distributions = []
        finish = None
        confidence = 1.0
        while finish is None:
            await asyncio.sleep(0)
            logits = self._pass([*job.prefix, *token_ids]).logits[-1]
            probs = warp(logits, job.sampling)
            distributions.append(probs)
            token_ids.append(draw(probs, float(uniforms[len(token_ids)])))
            finish = scanner.feed(token_ids[-1])
            confidence *= softmax(logits)[token_ids[-1]]
            if finish is None and confidence < job.least_confidence:
                finish = "length"
        seen = self._pass([*job.prefix, *token_ids])
        rows = slice(len(job.prefix) - 1, -1)
        return Candidate(
            token_ids=tuple(token_ids),
            text=self.tokenizer.decode(token_ids),
            finish=finish,
            **_described(seen.logits[rows], token_ids),
            embedding=seen.hidden[rows].mean(0) if job.hidden_states else None,
            distributions=np.array(distributions) if job.distributions else None,
        )

    def _observation(self, job: ScoreJob, token_ids: Sequence[int]) -> Observation:
        seen = self._pass([*job.prefix, *token_ids])
        first = len(job.prefix) - 1
        logits = seen.logits[first:]
        warped = None
        if job.distributions is not None:
            warped = np.array([warp(row, job.distributions) for row in logits])
        return Observation(
            **_described(logits[:-1], token_ids),
            is_first_choice=logits[:-1].argmax(-1) == np.array(token_ids),
            blocks=self._blocks(job, seen, len(token_ids)),
            hidden_state=seen.hidden[-2] if job.hidden_state else None,
            distributions=warped,
            choices=tuple(logits.argmax(-1).tolist()) if job.choices else None,
        )

    def _blocks(self, job: ScoreJob, seen: Pass, n: int) -> tuple[AttentionBlock, ...] | None:
        capture = job.capture
        if capture is None:
            return None
        # The last token predicts none of the step's: its row and column are left out.
        layers = [weights[:, :-1, :-1] for weights in seen.attention[-capture.num_layers :]]
        return tuple(block_of(layer, capture.is_source, n, capture.epsilon) for layer in layers)

    def _pass(self, token_ids: Sequence[int]) -> Pass:
        seen = self.model(token_ids)
        if not np.isfinite(seen.logits).all():
            raise SpecguardError(f"{self.name} gives probabilities that are not finite")
        return Pass(seen.logits[:, : self.num_tokens], seen.hidden, seen.attention)

    def _check(self, wanted: int) -> None:
        if wanted > self.context_limit:
            raise SpecguardError(
                f"{wanted} tokens do not fit the context window of {self.context_limit}"
            )


def _described(logits: FloatArray, token_ids: Sequence[int]) -> dict[str, Any]:
    """Log-probabilities and entropies of tokens that rows of logits predict."""
    logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return {
        "token_logprobs": logs[np.arange(len(token_ids)), list(token_ids)],
        "token_entropies": -(np.exp(logs) * logs).sum(-1),
    }
