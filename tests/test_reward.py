"""Process reward models: the published format on every backend, beside transformers' own passes."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from specguard.backends.checkpoint import open_checkpoint  # noqa: E402
from specguard.backends.local.engine import LocalEngine  # noqa: E402
from specguard.backends.reward import (  # noqa: E402
    HEAD,
    SEPARATOR,
    SYSTEM_PROMPT,
    StepRewardModel,
    load_reward_model,
)
from specguard.backends.tensors import read_tensors  # noqa: E402
from specguard.core import (  # noqa: E402
    Observation,
    RewardModel,
    ScoreJob,
    SpecguardError,
    UsageError,
)
from tests.conftest import PROBLEM, SHAPE, TINY  # noqa: E402
from tests.test_imports import FRAMEWORKS, modules_after  # noqa: E402

BACKENDS = ("cpu", "mlx")
STEPS = [
    "Mia has 24 shells. Given.",
    "Mia sells half of the shells. Mia had 24 / 2, so Mia has 12 shells.",
    "How many shells does Mia have? Mia has 12, so the answer is \\boxed{12}.",
]


def make_tokenizer(folder: Path) -> Any:
    """The pair's tokenizer with Qwen's separator in it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "target")
    tokenizer.add_special_tokens({"additional_special_tokens": [SEPARATOR]})
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings))
    return tokenizer


def make_reward_checkpoint(folder: Path, has_language_head: bool) -> Path:
    """Random weights as the published checkpoint has them: a Qwen2 below, ``score`` above.

    The remote code that its config names is not there: nothing may ask for it.
    """
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    tokenizer = make_tokenizer(folder)
    config = transformers.Qwen2Config(**SHAPE, vocab_size=len(tokenizer) + 7)
    size = config.hidden_size
    layers = transformers.Qwen2Model(config)
    score = torch.nn.Sequential(
        torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, 2)
    )
    for parameter in score.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    weights = {f"model.{name}": value for name, value in layers.state_dict().items()}
    weights |= {f"score.{name}": value for name, value in score.state_dict().items()}
    if has_language_head:
        weights["lm_head.weight"] = torch.randn(config.vocab_size, size)
    first, second = {}, {}
    for index, (name, value) in enumerate(weights.items()):
        (first if index % 2 else second)[name] = value.contiguous()
    shards = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    for shard, part in shards.items():
        save_file(part, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    settings = config.to_dict() | {
        "architectures": ["Qwen2ForProcessRewardModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
            "AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel",
        },
        "rope_theta": 10000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_checkpoint(tmp_path_factory.mktemp("reward"), has_language_head=True)


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, folder: Path) -> StepRewardModel:
    if request.param == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    return load_reward_model(str(folder), request.param, "float32")


def ask(model: RewardModel, steps: Sequence[str], key: str = "growing") -> list[float]:
    """Rewards of a solution that the model may have read before."""
    return asyncio.run(model.rewards(key, PROBLEM, steps))


def rewards_of(model: RewardModel, steps: Sequence[str], problem: str = PROBLEM) -> list[float]:
    """Rewards of a solution that the model has never seen."""
    key = object()
    try:
        return asyncio.run(model.rewards(key, problem, steps))
    finally:
        model.release(key)


def published_rewards(folder: Path, steps: Sequence[str]) -> list[float]:
    """What the model card's example computes, with transformers alone."""
    from safetensors.torch import load_file

    weights: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    config = transformers.Qwen2Config.from_pretrained(folder)
    layers = transformers.Qwen2Model(config).eval()
    own = {name: value for name, value in weights.items() if name.startswith("model.")}
    layers.load_state_dict({name.removeprefix("model."): value for name, value in own.items()})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": PROBLEM},
        {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    [separator] = tokenizer.encode("<extra_0>", add_special_tokens=False)
    with torch.inference_mode():
        hidden = layers(ids).last_hidden_state
        inner = torch.relu(hidden @ weights["score.0.weight"].T + weights["score.0.bias"])
        logits = inner @ weights["score.2.weight"].T + weights["score.2.bias"]
    rewards: list[float] = logits.softmax(-1)[0, ids[0] == separator, 1].tolist()
    return rewards


def test_rewards_are_those_of_the_published_format(folder: Path, model: StepRewardModel) -> None:
    expected = published_rewards(folder, STEPS)
    assert max(expected) - min(expected) > 0.01
    np.testing.assert_allclose(rewards_of(model, STEPS), expected, atol=1e-4)
    assert model.name == str(folder)


def test_the_language_head_may_be_missing(tmp_path: Path, model: StepRewardModel) -> None:
    """Published folders may hold one that is of no use; a folder without it gives the same."""
    other = make_reward_checkpoint(tmp_path / "bare", has_language_head=False)
    assert isinstance(model.engine, LocalEngine)
    backend = "mlx" if "mlx" in type(model.engine.layer).__module__ else "cpu"
    bare = load_reward_model(str(other), backend, "float32")
    np.testing.assert_allclose(rewards_of(bare, STEPS), rewards_of(model, STEPS), atol=1e-5)


@pytest.fixture
def num_read(model: StepRewardModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that the engine was asked to score, job by job."""
    counts: list[int] = []
    score = model.engine.score

    async def counted(job: ScoreJob) -> list[Observation]:
        counts.append(sum(map(len, job.continuations)))
        return await score(job)

    monkeypatch.setattr(model.engine, "score", counted)
    return counts


def test_a_growing_solution_is_read_step_by_step(
    model: StepRewardModel, num_read: list[int]
) -> None:
    expected = rewards_of(model, STEPS)
    assert ask(model, []) == []
    for count in 1, 2, 3:
        num_read.clear()
        rewards = ask(model, STEPS[:count])
        np.testing.assert_allclose(rewards, expected[:count], atol=1e-5)
        assert num_read == [len(model.engine.tokenizer.encode(STEPS[count - 1])) + 2]
    num_read.clear()
    assert ask(model, STEPS) == rewards
    assert num_read == []
    model.release("growing")
    assert ask(model, STEPS[:1]) == pytest.approx(expected[:1], abs=1e-5)
    assert len(num_read) == 1
    model.release("growing")


def test_a_replaced_step_is_as_if_it_had_always_stood_there(
    model: StepRewardModel, num_read: list[int]
) -> None:
    replaced = [STEPS[0], "Mia sells half of the shells. Mia had 24 / 2, so Mia has 13 shells."]
    before = ask(model, STEPS)
    num_read.clear()
    after = ask(model, replaced)
    assert len(num_read) == 1  # the first step stands
    assert abs(after[1] - before[1]) > 1e-4
    np.testing.assert_allclose(after, rewards_of(model, replaced), atol=1e-5)
    np.testing.assert_allclose(ask(model, STEPS[:1]), before[:1], atol=1e-5)
    np.testing.assert_allclose(ask(model, STEPS), before, atol=1e-5)
    model.release("growing")


def test_blank_space_around_a_step_does_not_count(model: StepRewardModel) -> None:
    rewards = ask(model, STEPS)
    assert ask(model, [step + "\n\n" for step in STEPS]) == rewards
    model.release("growing")
    assert rewards_of(model, ["\n" + step + " \n\n" for step in STEPS]) == rewards


def test_a_reward_depends_on_problem_and_steps_before(model: StepRewardModel) -> None:
    first = rewards_of(model, STEPS)
    other = rewards_of(model, STEPS, PROBLEM.replace("24", "36"))
    assert abs(first[0] - other[0]) > 1e-5
    assert abs(rewards_of(model, STEPS[1:])[0] - first[1]) > 1e-5


def test_problems_side_by_side_are_kept_apart(model: StepRewardModel) -> None:
    problems = [PROBLEM, PROBLEM.replace("24", "36"), PROBLEM.replace("Mia", "Ben")]
    alone = [rewards_of(model, STEPS, problem) for problem in problems]

    async def together() -> list[list[float]]:
        return await asyncio.gather(
            *(model.rewards(problem, problem, STEPS) for problem in problems)
        )

    np.testing.assert_allclose(asyncio.run(together()), alone, atol=1e-5)
    for problem in problems:
        model.release(problem)
    model.release("one that never was")
    assert isinstance(model.engine, LocalEngine)
    assert model.engine.num_kept == 0


def test_a_long_solution_is_refused_and_does_no_harm(model: StepRewardModel) -> None:
    before = ask(model, STEPS)
    with pytest.raises(SpecguardError, match="do not fit the context window of 512"):
        ask(model, [*STEPS, STEPS[1] * 40])
    np.testing.assert_allclose(ask(model, STEPS), before, atol=1e-5)
    model.release("growing")
    with pytest.raises(SpecguardError, match="context window"):
        rewards_of(model, STEPS, PROBLEM * 40)
    assert isinstance(model.engine, LocalEngine)
    assert model.engine.num_kept == 0


def test_separator_and_system_prompt_are_data(folder: Path, tmp_path: Path) -> None:
    published = load_reward_model(str(folder), "cpu", "float32")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    path = other / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(
        json.dumps(settings | {"specguard_prm": {"separator": "<|im_end|>", "system_prompt": None}})
    )
    changed = load_reward_model(str(other), "cpu", "float32")
    assert changed.separator_id == 2
    assert changed.system_prompt is None
    assert abs(rewards_of(changed, STEPS)[0] - rewards_of(published, STEPS)[0]) > 1e-5
    path.write_text(json.dumps(settings | {"specguard_prm": {"seperator": "x"}}))
    with pytest.raises(SpecguardError, match="not understood"):
        load_reward_model(str(other), "cpu")
    path.write_text(json.dumps(settings | {"specguard_prm": {"separator": "<none>"}}))
    with pytest.raises(SpecguardError, match="its tokenizer has no <none>"):
        load_reward_model(str(other), "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reward_model_writes_nothing(folder: Path, backend: str) -> None:
    from specguard.backends.registry import choose_backend

    _, implementation, _ = choose_backend(backend)
    with pytest.raises(SpecguardError, match="judges steps and writes none"):
        implementation.load(str(folder), "auto", False, None)


def test_a_folder_that_is_no_reward_model_is_refused(checkpoint: Path, folder: Path) -> None:
    with pytest.raises(SpecguardError, match=r"lack score\.0\.weight, score\.0\.bias, score\.2"):
        load_reward_model(str(checkpoint), "cpu")
    with pytest.raises(SpecguardError, match="no model folder"):
        load_reward_model(str(checkpoint / "missing"), "cpu")
    with pytest.raises(UsageError, match="no backend"):
        load_reward_model(str(folder), "gpu")


def test_a_head_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    path = other / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 32}))
    with pytest.raises(SpecguardError, match=r"score\.0\.weight has shape \(64, 64\), not"):
        load_reward_model(str(other), "cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_tensors_are_read_without_a_framework(tmp_path: Path, dtype: str) -> None:
    from safetensors.torch import save_file

    tensor = torch.randn(3, 5).to(getattr(torch, dtype))
    others = {"a": torch.ones(7), "whole": torch.ones(2, dtype=torch.int32)}
    save_file({**others, "wanted": tensor}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    tensors = read_tensors(open_checkpoint(str(tmp_path)), ["wanted", "whole", *HEAD])
    assert list(tensors) == ["wanted"]
    np.testing.assert_array_equal(tensors["wanted"], tensor.float().numpy())


def test_asking_for_the_loader_imports_no_framework() -> None:
    assert not modules_after("import specguard.backends.reward") & FRAMEWORKS
