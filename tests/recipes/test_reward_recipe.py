"""The reward model's recipe: what the draft writes and how it is labelled, training, export."""

import asyncio
from collections.abc import Hashable, Sequence
from itertools import islice
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402

from recipes.evidence.signals import Sample  # noqa: E402
from recipes.reward.data import batches, make_row, replaced_batches, write_rows  # noqa: E402
from recipes.reward.evaluate import THRESHOLD, Quality, add_rewards, areas  # noqa: E402
from recipes.reward.export import export  # noqa: E402
from recipes.reward.network import DRAFT, TARGET, RewardNetwork, from_model  # noqa: E402
from recipes.reward.training import Recipe, Run, load_network  # noqa: E402
from recipes.tiny.data import Coder, make_coder  # noqa: E402
from recipes.tiny.decoding import decode  # noqa: E402
from specguard.backends.reward import StepRewardModel, load_reward_model  # noqa: E402
from specguard.models.tiny import problems  # noqa: E402
from tests.conftest import TINY  # noqa: E402

SHIPPED = TINY / "reward"
SMALL = Recipe(
    tokens=6000, intermediate_size=None, batch_tokens=2048, pool=8, warmup_steps=1, bf16=False
)


def rewards(judge: StepRewardModel, problem: str, steps: Sequence[str]) -> list[float]:
    return asyncio.run(judge.rewards(problem, problem, steps))


@pytest.fixture(scope="module")
def coder() -> Coder:
    return make_coder()


@pytest.fixture(scope="module")
def draft(coder: Coder) -> RewardNetwork:
    return from_model(coder, DRAFT).eval()


def test_the_network_begins_with_a_model_of_the_pair(coder: Coder, draft: RewardNetwork) -> None:
    network = from_model(coder, DRAFT, num_new_layers=2)
    assert len(network.blocks) == len(draft.blocks) + 2
    for own, drafts in zip(network.blocks, draft.blocks, strict=False):
        for mine, other in zip(own.parameters(), drafts.parameters(), strict=True):
            assert torch.equal(mine, other)
    prompts = [coder.prompt(problems.generate(problems.CALIBRATION, 3))]
    [ids] = decode(draft, prompts, coder.end)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "draft")
    llama = transformers.AutoModelForCausalLM.from_pretrained(TINY / "draft", dtype=torch.float32)
    written = llama.generate(torch.tensor(prompts), max_new_tokens=len(ids), do_sample=False)
    assert tokenizer.decode(written[0, len(prompts[0]) :]) == coder.tokenizer.decode(ids)


def test_pruned_layers_do_most_of_what_they_did(
    coder: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.reward.pruning._NUM_PROBLEMS", 40)
    rows = [coder.row(problems.generate(problems.CALIBRATION, index)) for index in range(8)]
    whole = from_model(coder, TARGET)
    size = whole.shape.intermediate_size

    def share_right(network: RewardNetwork) -> float:
        right = []
        for row in rows:
            ids = torch.tensor([row.ids])
            found = (network(ids) @ network.vectors("out").T).argmax(-1)[0, :-1]
            right += (found == ids[0, 1:])[torch.tensor(row.learned[1:])].tolist()
        return float(np.mean(right))

    with torch.inference_mode():
        expected = share_right(whole)
        same = from_model(coder, TARGET, intermediate_size=size)
        assert share_right(same) == pytest.approx(expected, abs=0.005)
        small = from_model(coder, TARGET, intermediate_size=size // 4)
        assert small.blocks[0].up_proj.out_features == size // 4
        assert share_right(small) > 0.9 * expected


def test_exchanged_tokens_are_known(coder: Coder) -> None:
    token_ids, labels, _, written = (
        part.tolist() for part in next(replaced_batches(coder, 40, 2048))
    )
    num_exchanged = num_kept = 0
    for index, (ids, own) in enumerate(zip(token_ids, labels, strict=True)):
        problem = problems.generate(problems.TRAINING, 40 + index)
        row = make_row(coder, problem, list(problem.steps), [True] * len(problem.steps))
        assert [token for token in written[index] if token != -100] == [
            token for token, label in zip(row.ids, row.labels, strict=True) if label != -100
        ]
        for token, label, before in zip(ids, own, row.ids, strict=False):
            assert (token == before) == (label != 0)
            assert coder.lexicon.class_of[token] == coder.lexicon.class_of[before]
            num_exchanged += label == 0
            num_kept += label == 1
    assert 0.05 < num_exchanged / (num_exchanged + num_kept) < 0.15


def test_the_draft_s_steps_are_labelled(coder: Coder, draft: RewardNetwork) -> None:
    rows = write_rows(coder, draft, 0, 12)
    assert [row.ids for row in write_rows(coder, draft, 0, 12)] == [row.ids for row in rows]
    labels = {
        label for row in rows for label, ends in zip(row.labels, row.is_end, strict=True) if ends
    }
    assert labels == {0, 1}
    assert len(rows) > 12  # some are taken up again behind a wrong step
    for row in rows:
        ends = [place for place, is_end in enumerate(row.is_end) if is_end]
        assert all(row.ids[place] == coder.pad for place in ends)
        assert len(row.ids) == len(row.labels) == len(row.is_end)


def test_a_wrong_step_is_wrong_from_where_it_leaves_the_reference(coder: Coder) -> None:
    problem = problems.generate(problems.TRAINING, 4)
    place = next(i for i, sentence in enumerate(problem.sentences) if sentence.updates)
    steps = list(problem.steps[: place + 1])
    last = max(i for i, character in enumerate(steps[place]) if character.isdigit())
    steps[place] = steps[place][:last] + "7391"[int(steps[place][last]) % 4] + steps[place][last:]
    row = make_row(coder, problem, steps, [True] * place + [False])
    prompt = coder.prompt(problem)
    assert row.labels[: len(prompt)] == [-100] * len(prompt)
    inside = row.labels[len(prompt) :]
    first_wrong = inside.index(0)
    assert set(inside[:first_wrong]) == {1}
    assert set(inside[first_wrong:]) == {0}
    assert first_wrong > sum(len(coder.ids(step)) + 1 for step in steps[:place]) + 5
    # After steps that are not the reference's, only a step's end is known to be wrong.
    other = make_row(coder, problem, [steps[place], "Nothing."], [False, False])
    assert other.labels[-1] == 0
    assert other.labels[-2] == -100


def test_a_run_goes_on_and_is_exported(coder: Coder, tmp_path: Path) -> None:
    run = Run(SMALL, coder, tmp_path)
    run.train(3000)
    again = Run(SMALL, coder, tmp_path)
    assert (again.tokens, again.steps) == (run.tokens, run.steps)
    again.train(6000)
    assert again.next_problem > run.next_problem - SMALL.pool
    assert not torch.equal(again.network.norm, run.network.norm)
    # Names and things are what they were: one held out from training is like the others.
    fixed = [
        token for token, word in enumerate(coder.lexicon.word_of) if coder.lexicon.is_fixed[word]
    ]
    before = SMALL.network(coder).vectors("in")
    shift = (again.network.vectors("in") - before)[fixed]
    assert torch.allclose(shift, shift[:1].expand_as(shift), atol=1e-6)

    network = load_network(SMALL, coder, tmp_path)
    with torch.no_grad():
        for parameter in (*network.parameters(), network.code_in):
            parameter.copy_(parameter.to(torch.bfloat16))
    export(network, coder, tmp_path / "model")
    problem = problems.generate(problems.CALIBRATION, 1)
    row = make_row(coder, problem, list(problem.steps), [True] * len(problem.steps))
    with torch.inference_mode():
        logits = network.score(network(torch.tensor([row.ids])))[0]
    expected = logits.softmax(-1)[torch.tensor(row.is_end), 1]
    judge = load_reward_model(str(tmp_path / "model"), "cpu", "float32")
    np.testing.assert_allclose(rewards(judge, problem.text, problem.steps), expected, atol=0.02)


def test_batches_come_twice_and_end_at_steps(coder: Coder, draft: RewardNetwork) -> None:
    source = batches(coder, draft, 0, 2048, pool=4)
    seen = []
    for token_ids, labels, is_end, following in source:
        if following != 4:
            break
        assert token_ids.shape == labels.shape == is_end.shape
        assert bool((token_ids[is_end] == coder.pad).all())
        assert bool((labels[is_end] != -100).all())
        seen.append(token_ids.tolist())
    assert len(seen) == 2 * len({str(ids) for ids in seen})


def test_quality_is_of_rewards_as_probabilities() -> None:
    values = {"reward": np.array([0.9, 0.6, 0.8, 0.1])}
    found = Sample(values, [None, None, "a slip", "a slip"], [0, 0, 1, 1], [0, 1, 0, 1])
    quality = Quality.of(found)
    assert quality.accuracy == quality.right_accepted == quality.wrong_accepted == 0.5
    assert quality.brier == pytest.approx((0.01 + 0.16 + 0.64 + 0.01) / 4)
    assert quality.base_brier == 0.25
    assert areas(found, ["reward"]) == {"reward": (0.75, {"a slip": 0.75})}


def test_collected_steps_are_judged_after_the_right_ones() -> None:
    problem = problems.generate(problems.CALIBRATION, 2)
    asked: list[list[str]] = []

    class Counting:
        name = "counts steps"

        async def rewards(self, key: Hashable, text: str, steps: Sequence[str]) -> list[float]:
            assert text == problem.text
            asked.append(list(steps))
            return [len(step) / 1000 for step in steps]

        def release(self, key: Hashable) -> None:
            asked.append([])

    row = {"problem": 2, "step": 1, "candidates": [{"text": "No.\n\n", "signals": {}}]}
    add_rewards(Counting(), problems.CALIBRATION, [row])
    assert row["candidates"] == [{"text": "No.\n\n", "signals": {"reward": 0.005}}]
    assert asked == [[problem.steps[0], "No.\n\n"], []]


@pytest.fixture(scope="module")
def judges() -> list[StepRewardModel]:
    """The shipped reward model on every backend that is here."""
    found = [load_reward_model(str(SHIPPED), "cpu", "float32")]
    try:
        import mlx_lm  # noqa: F401
    except ImportError:
        return found
    return [*found, load_reward_model(str(SHIPPED), "mlx", "float32")]


def test_the_shipped_model_is_small_and_the_same_on_every_backend(
    judges: list[StepRewardModel],
) -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 3_000_000
    for index in range(5):
        problem = problems.generate(problems.CALIBRATION, index)
        found = [rewards(judge, problem.text, problem.steps) for judge in judges]
        for other in found[1:]:
            np.testing.assert_allclose(other, found[0], atol=1e-3)


def test_the_shipped_model_sees_a_wrong_digit() -> None:
    judge = load_reward_model(str(SHIPPED), "cpu", "float32")
    pairs = []
    for problem in islice(problems.stream(problems.HELD_OUT), 12):
        for index, step in enumerate(problem.steps):
            last = max(place for place, sign in enumerate(step) if sign.isdigit())
            changed = step[:last] + str((int(step[last]) + 3) % 10) + step[last + 1 :]
            before = problem.steps[:index]
            pairs.append(
                [rewards(judge, problem.text, [*before, text])[-1] for text in (step, changed)]
            )
    right, wrong = np.array(pairs).T
    assert (right > wrong).mean() > 0.9
    assert (right >= THRESHOLD).mean() > 0.8
    assert (wrong >= THRESHOLD).mean() < 0.2
