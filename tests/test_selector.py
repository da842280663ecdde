import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specguard.core import Candidate, SolveConfig, SpecguardError, UsageError
from specguard.core.embedders import (
    embed_by_draft,
    embed_by_ngrams,
    embed_by_numbers,
    load_embedder,
)
from specguard.core.selector import mean_similarities, select_medoid


def candidate(
    text: str = "", logprob: float = -1.0, embedding: object = (1.0,), token_id: int = 1
) -> Candidate:
    return Candidate(
        (token_id,), text, np.array([logprob]), "eos", embedding=np.array(embedding, dtype=float)
    )


def test_ties_go_to_the_log_prob_then_to_the_index() -> None:
    logprobs = (-2.0, -1.0, -1.0)
    same = [candidate(logprob=logprob, token_id=i) for i, logprob in enumerate(logprobs)]
    assert select_medoid(same, embed_by_draft).index == 1
    # Equal up to rounding is a tie as well.
    nearly = [
        candidate(logprob=-2.0, embedding=(1.0, 1e-9)),
        candidate(logprob=-1.0, embedding=(1.0, 0.0), token_id=2),
    ]
    assert select_medoid(nearly, embed_by_draft).index == 1


def test_the_same_tokens_are_one_candidate_whatever_their_rounding() -> None:
    same = [candidate(logprob=-1.00001), candidate(logprob=-1.0, embedding=(1.0,))]
    assert select_medoid(same, embed_by_draft).index == 0


def test_one_candidate_is_kept_without_an_embedding() -> None:
    selection = select_medoid([candidate()], lambda _: pytest.fail("embedded"))
    assert (selection.index, selection.similarities) == (0, (1.0,))


@given(st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_similarities_are_mean_cosines_to_the_others(k: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(k, 5))
    expected = [
        np.mean(
            [
                rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
                for j in range(k)
                if j != i
            ]
        )
        for i in range(k)
    ]
    np.testing.assert_allclose(mean_similarities(rows), expected, atol=1e-12)
    np.testing.assert_allclose(mean_similarities(rows * 7), expected, atol=1e-12)


def test_a_zero_row_is_similar_to_nothing() -> None:
    assert mean_similarities(np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])) == (0.0, 0.5, 0.5)


def test_ngrams_see_a_wrong_number() -> None:
    texts = ["Mia had 3, so 3 + 4 = 7.", "Mia had 3, so 3 + 4 = 8.", "Mia had 3, so 3 + 4 = 7."]
    similarities = mean_similarities(embed_by_ngrams([candidate(text) for text in texts]))
    assert similarities[1] < similarities[0] == similarities[2]


def test_unknown_embedders_are_refused() -> None:
    for name in ("", "word2vec", "sentence-transformers:"):
        with pytest.raises(UsageError, match="no selector"):
            SolveConfig(selector=name)


def test_numbers_count_and_wording_does_not() -> None:
    texts = ["So 3 + 4 = 7.", "Adding 3 and 4 makes 7.", "So 3 + 4 = 8.", "no number", "no number "]
    rows = embed_by_numbers([candidate(text) for text in texts])
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[3], rows[4])
    assert mean_similarities(rows[:3])[2] < mean_similarities(rows[:3])[0]


def test_an_embedder_s_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SpecguardError, match="sentence-transformers is not installed") as caught:
        load_embedder("sentence-transformers:any")
    assert "--selector ngram" in caught.value.hint
