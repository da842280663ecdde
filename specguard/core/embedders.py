"""Embedders of candidate steps, by name.

``draft``, ``ngram``, ``numbers`` and ``sentence-transformers:NAME``.
"""

import re
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from importlib import import_module
from itertools import pairwise

import numpy as np

from specguard.core.config import SENTENCE_TRANSFORMERS
from specguard.core.engine import Candidate, FloatArray
from specguard.core.errors import SpecguardError
from specguard.core.selector import Embedder

_WORD = re.compile(r"\d+(?:\.\d+)?|\w+|[^\w\s]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_NGRAM_WIDTH = 1024


def load_embedder(name: str) -> Embedder:
    """The embedder called ``name``, a name that `SolveConfig` accepts as a selector.

    Raises:
        SpecguardError: its package or its model is not installed.
    """
    if name == "draft":
        return embed_by_draft
    if name == "ngram":
        return embed_by_ngrams
    if name == "numbers":
        return embed_by_numbers
    return _load_sentence_transformer(name.removeprefix(SENTENCE_TRANSFORMERS))


def embed_by_draft(candidates: Sequence[Candidate]) -> FloatArray:
    """The draft's own mean hidden states [k, hidden]: no extra model, no extra pass."""
    embeddings = [candidate.embedding for candidate in candidates]
    assert all(embedding is not None for embedding in embeddings), "the job did not ask for them"
    return np.stack([embedding for embedding in embeddings if embedding is not None])


def embed_by_ngrams(candidates: Sequence[Candidate]) -> FloatArray:
    """Hashed counts of words, numbers and their pairs [k, 1024]: no model at all."""
    words = [_WORD.findall(candidate.text.lower()) for candidate in candidates]
    return _hashed([[*found, *map(" ".join, pairwise(found))] for found in words])


def embed_by_numbers(candidates: Sequence[Candidate]) -> FloatArray:
    """Hashed counts of a step's numbers [k, 1024], the last one, often the result, as all together.

    A step without numbers stands for its text. Two steps are similar where they calculate the
    same: the wording, which a sentence embedding mostly sees, does not count.
    """
    features = []
    for candidate in candidates:
        numbers = _NUMBER.findall(candidate.text)
        result = [f"result {numbers[-1]}"] * len(numbers) if numbers else [candidate.text.strip()]
        features.append([*numbers, *result])
    return _hashed(features)


def _hashed(features: Sequence[Sequence[str]]) -> FloatArray:
    """Signed counts of each row's features in 1,024 places."""
    rows = np.zeros((len(features), _NGRAM_WIDTH))
    for row, found in zip(rows, features, strict=True):
        for feature in found:
            digest = int.from_bytes(blake2b(feature.encode(), digest_size=4).digest(), "little")
            row[digest % _NGRAM_WIDTH] += 1 if digest >> 31 else -1
    return rows


def _load_sentence_transformer(name: str) -> Embedder:
    try:
        package = import_module("sentence_transformers")
    except ImportError as error:
        raise SpecguardError(
            "the package sentence-transformers is not installed",
            "pip install 'specguard[sentence-transformers]', or choose --selector ngram",
        ) from error
    try:
        model = package.SentenceTransformer(name, local_files_only=True)
    except Exception as error:
        raise SpecguardError(
            f"the sentence embedder {name!r} cannot be loaded: {error}",
            "give a folder, or download the model first: hf download NAME",
        ) from error
    return partial(_embed_by_sentence_transformer, model)


def _embed_by_sentence_transformer(model: object, candidates: Sequence[Candidate]) -> FloatArray:
    texts = [candidate.text for candidate in candidates]
    return np.asarray(model.encode(texts, show_progress_bar=False))  # type: ignore[attr-defined]
