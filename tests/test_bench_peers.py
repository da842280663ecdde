"""``specguard bench peers``: replay is exact, random pairs load, the table has its rows."""

import json
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

import specguard.bench.peers as peers
from specguard.bench.peers import Contender, Race, Sources, Written, lines_table, replay_config
from specguard.bench.random_pair import Shape, write_random_model
from specguard.bench.replay import Replayed, Schedule, plain_words
from specguard.cli.main import main
from specguard.core import GREEDY, Engine, LanguageModel, Sampling, Solution, UsageError
from specguard.loading import load

SMALL = Shape(3, 64), Shape(3, 128)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", "peers", *map(str, arguments)])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("random")
    draft, target = (
        write_random_model(folder / str(seed), shape, seed) for seed, shape in enumerate(SMALL)
    )
    return Sources(str(draft), str(target))


@pytest.fixture(scope="module")
def pair(sources: Sources) -> tuple[LanguageModel[Any], LanguageModel[Any]]:
    return peers.load_pair(sources, "cpu")


def replayed(
    pair: tuple[LanguageModel[Any], LanguageModel[Any]], schedule: Schedule, **changes: Any
) -> Solution:
    words = plain_words(pair[1])
    models = (
        Replayed(pair[0], "draft", schedule, words),
        Replayed(pair[1], "target", schedule, words),
    )
    config = replay_config(schedule.num_tokens)
    return Engine(*models, config).solve("What is 1 + 1?", **changes)


@settings(deadline=None)  # a machine may be busy
@given(st.integers(1, 30), st.integers(1, 40), st.floats(0, 1), st.integers(0, 9))
def test_a_schedule_has_the_wanted_acceptance_and_mean_length(
    num_steps: int, length: int, acceptance: float, seed: int
) -> None:
    schedule = Schedule.of(num_steps, length, acceptance, seed)
    assert len(schedule.lengths) == len(schedule.accepted) == num_steps
    assert sum(schedule.accepted) == round(num_steps * acceptance)
    assert schedule.num_tokens == num_steps * length
    assert min(schedule.lengths) >= 1
    position = 0
    for index, found in enumerate(schedule.lengths):
        assert schedule.step_at(position) == schedule.step_at(position + found - 1) == index
        position += found


def test_impossible_schedules_are_refused() -> None:
    for arguments in (0, 5, 0.5), (3, 0, 0.5), (3, 5, 1.5):
        with pytest.raises(UsageError, match="no schedule"):
            Schedule.of(*arguments)


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_replay_takes_exactly_the_scheduled_steps(
    pair: tuple[LanguageModel[Any], LanguageModel[Any]], num_candidates: int
) -> None:
    schedule = Schedule.of(8, 6, 0.5, seed=3)
    solution = replayed(pair, schedule, num_candidates=num_candidates)
    assert tuple(step.num_tokens for step in solution.steps) == schedule.lengths
    assert tuple(step.is_accepted for step in solution.steps) == schedule.accepted
    assert solution.stats.step_acceptance_rate == 0.5
    assert solution.finish_reason == "length"
    drafted = [step.num_drafted for step in solution.steps]
    assert drafted == [num_candidates * length for length in schedule.lengths]


def test_plain_decoding_is_replayed_to_the_same_length(
    pair: tuple[LanguageModel[Any], LanguageModel[Any]],
) -> None:
    schedule = Schedule.of(8, 6, 0.5)
    solution = replayed(pair, schedule, method="target", sampling=GREEDY)
    assert solution.stats.num_tokens == 48
    assert solution.finish_reason == "length"


def test_token_level_speculation_keeps_the_scheduled_tokens(
    pair: tuple[LanguageModel[Any], LanguageModel[Any]],
) -> None:
    sampling = Sampling(1.0, 1.0)
    everything = replayed(pair, Schedule.of(4, 10, 1.0), method="sd", sampling=sampling)
    assert everything.stats.num_kept_tokens == everything.stats.num_guessed_tokens
    nothing = replayed(pair, Schedule.of(4, 10, 0.0), method="sd", sampling=sampling)
    assert nothing.stats.num_kept_tokens == 0
    assert nothing.stats.num_target_tokens == 40
    schedule = Schedule.of(4, 10, 0.6)
    some = replayed(pair, schedule, method="sd", sampling=sampling)
    assert some.stats.num_tokens == 40
    # A guess is kept where it and all before it in its block are accepted.
    position = kept = 0
    while position < 40:
        block = min(4, 40 - position)
        run_length = next(
            (i for i in range(block) if not schedule.is_token_accepted(position + i)), block
        )
        kept += run_length
        position += run_length + 1
    assert abs(some.stats.num_kept_tokens - kept) <= 1  # a bonus token may lie beyond the end


def test_words_neither_end_nor_delimit(pair: tuple[LanguageModel[Any], LanguageModel[Any]]) -> None:
    tokenizer = pair[1].tokenizer
    words = plain_words(pair[1])
    assert len(words) > 100
    assert not set(words) & tokenizer.eos_ids
    text = tokenizer.decode(words)
    assert "\n" not in text
    assert "boxed" not in text.replace(" ", "") or "{" not in text


def test_random_weights_are_the_same_for_every_library(sources: Sources) -> None:
    pytest.importorskip("mlx_lm")
    found = []
    for backend in "cpu", "mlx":
        model = load(draft=sources.draft, target=sources.target, backend=backend).target
        assert model is not None
        prompt = model.tokenizer.encode_prompt("What is 1 + 1?", None, False)
        sequence = model.start(prompt)
        [observation] = model.extend([sequence], [plain_words(model)[:20]])
        found.append(observation.token_logprobs)
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


def test_impossible_shapes_are_refused() -> None:
    for shape in (0, 64), (2, 100), (2, 0):
        with pytest.raises(UsageError):
            Shape(*shape)


def contender(library: str, text: str, **more: Any) -> Contender:
    return Contender(library, "generate", library, lambda problem: Written(text, 4), **more)


def test_a_race_compares_with_the_own_peer() -> None:
    race = Race(
        [
            contender("transformers", "a", is_baseline=True, is_lossless=True),
            contender("mlx-lm", "b", is_lossless=True),
            contender("specguard", "a"),
        ]
    )
    race.add("x", is_warm_up=True)
    race.add("y")
    first, second, third = race.lines()
    assert (first.ratio, first.num_equal, first.num_problems) == (1.0, 1, 1)
    assert (second.ratio, second.num_equal) == (None, 0)
    assert (third.ratio, third.num_equal) == (None, None)
    table = lines_table([first, second, third], ["mlx-lm"])
    assert "| mlx-lm | not installed |" in table
    assert table.count("\n") == 6


def test_a_missing_peer_is_named_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    options = ("--backends", "cpu", "--weights", "built-in", "--count", 1)
    result = run(*options)
    assert result.exit_code == 0, result.output
    for row in "| transformers | not installed |", "| specguard (cpu) | sd |", "| mlx-lm |":
        assert row in result.stdout


def test_peers_and_methods_stand_side_by_side() -> None:
    shape = ("--layers", 3, "--hidden", 128, "--draft-hidden", 64, "--tokens", 20)
    replay = ("--rounds", 1, "--k", 2, "--acceptance", 0.5)
    result = run("--backends", "cpu", "--weights", "random", *shape, *replay, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    lines = data["tables"]["random"]
    assert [line["method"] for line in lines] == ["generate", "target", "sd", "specguard, k = 2"]
    assert lines[0]["ratio"] == 1.0
    assert [line["acceptance"] for line in lines] == [None, None, 0.5, 0.5]
    assert {line["num_tokens"] for line in lines} == {32}
    assert "torch" in data["machine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backends", "vulkan"], "backend 'vulkan'"),
        (["--backends", ","], "no backend"),
        (["--k", "0"], "at least 1"),
        (["--tokens", "0"], "at least 1"),
        (["--acceptance", "1.5"], "--acceptance lies in"),
        (["--hidden", "100"], "multiple of 64"),
        (["--layers", "0"], "a layer at least"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert message in result.stderr
