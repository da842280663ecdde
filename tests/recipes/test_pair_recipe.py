"""The recipe of the built-in pair: tokens, initial wiring, batches, decoding, export, resuming."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from recipes.tiny.data import Coder, batches, make_coder  # noqa: E402
from recipes.tiny.decoding import decode  # noqa: E402
from recipes.tiny.drills import drill  # noqa: E402
from recipes.tiny.evaluate import first_place, first_wrong, solve  # noqa: E402
from recipes.tiny.export import export  # noqa: E402
from recipes.tiny.network import Network, Shape  # noqa: E402
from recipes.tiny.recipe import RECIPES, Phase, Recipe  # noqa: E402
from recipes.tiny.train import Run  # noqa: E402
from recipes.tiny.wiring import wire  # noqa: E402
from specguard.models.tiny import problems  # noqa: E402

SMALL = Recipe(
    Shape(72, 3, 3, 64),
    (Phase("short", 3000, problems.Difficulty(max_actors=1, max_events=2), 0.5),),
    rates=((0, 1e-3), (3000, 0.0)),
    batch_tokens=1024,
    bf16=False,
)


@pytest.fixture(scope="module")
def coder() -> Coder:
    return make_coder()


@pytest.fixture(scope="module")
def target(coder: Coder) -> Network:
    network = Network(RECIPES["target"].shape, coder.lexicon)
    wire(network, coder.lexicon, seed=0)
    return network.eval()


def test_a_word_or_a_digit_is_a_token(coder: Coder) -> None:
    text = "Mia has 24 shells.\n\nAlan has 9 plums, so \\boxed{24}."
    tokens = coder.tokenizer.tokenize(text)
    assert tokens[:6] == ["Mia", "Ġhas", "Ġ2", "4", "Ġshells", ".ĊĊ"]
    assert coder.tokenizer.decode(coder.tokenizer(text)["input_ids"]) == text
    unknown = "Xaveria möchte 7½ §"
    assert coder.tokenizer.decode(coder.tokenizer(unknown)["input_ids"]) == unknown


def test_problems_hold_no_bytes(coder: Coder) -> None:
    """Every piece of held-out problems is in the vocabulary."""
    splitter = coder.tokenizer.backend_tokenizer.pre_tokenizer
    for index in range(200):
        problem = problems.generate(problems.HELD_OUT, index)
        for text in (problem.text, problem.solution):
            tokens = coder.tokenizer.tokenize(text)
            assert tokens == [piece for piece, _ in splitter.pre_tokenize_str(text)]


def test_a_word_is_the_same_with_and_without_space(coder: Coder) -> None:
    lexicon = coder.lexicon
    bare, spaced = coder.tokenizer.convert_tokens_to_ids(["Mia", "ĠMia"])
    assert lexicon.word_of[bare] == lexicon.word_of[spaced]
    assert lexicon.class_of[bare] != lexicon.class_of[spaced]
    unseen = coder.tokenizer.convert_tokens_to_ids("ĠAlan")
    assert lexicon.class_of[unseen] == lexicon.class_of[spaced]
    assert lexicon.is_unused[unseen]
    assert not lexicon.is_unused[spaced]
    assert lexicon.is_fixed[lexicon.word_of[unseen]]
    assert not lexicon.is_fixed[lexicon.word("sells")]


def test_the_wiring_restates_from_the_start(coder: Coder, target: Network) -> None:
    """Before any training, most words of a restated sentence are the most probable ones."""
    right = total = 0
    word_of = torch.tensor(coder.lexicon.word_of)
    for index in range(12):
        problem = problems.generate(problems.TRAINING, index)
        row = coder.row(problem)
        ids = torch.tensor([row.ids])
        with torch.inference_mode():
            logits = target(ids) @ target.vectors("out").T
        predicted = word_of[logits[0].argmax(-1)]
        place = row.learned.index(True)
        for step, sentence in zip(problem.steps, problem.sentences, strict=False):
            length = len(coder.tokenizer(sentence.text)["input_ids"])
            inner = range(place + 3, place + length - 1)
            right += sum(int(predicted[i - 1] == word_of[row.ids[i]]) for i in inner)
            total += len(inner)
            place += len(coder.tokenizer(step + problems.DELIMITER)["input_ids"])
    assert right / total > 0.4  # by chance: 0.002


def test_batches_label_what_is_learned(coder: Coder) -> None:
    source = batches(coder, lambda index: coder.pieces(drill(index)), 0, 1024, pool=16)
    token_ids, labels, following = next(source)
    assert following == 16
    assert token_ids.shape == labels.shape
    assert token_ids.numel() <= 1024
    learned = labels != -100
    assert bool((labels[learned] == token_ids[learned]).all())
    assert 0.4 < float(learned.float().mean()) < 0.9


def test_decoding_and_export_agree(coder: Coder, tmp_path: Path) -> None:
    network = Network(SMALL.shape, coder.lexicon)
    wire(network, coder.lexicon, seed=1)
    # What bfloat16 can hold, so that nothing is lost on the way.
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(tensor.to(torch.bfloat16))
    export(network.eval(), coder, tmp_path)
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chosen = [problems.generate(problems.HELD_OUT, index) for index in (0, 7)]
    prompts = [coder.prompt(problem) for problem in chosen]
    for problem, prompt, tokens in zip(
        chosen, prompts, decode(network, prompts, coder.end), strict=True
    ):
        chat = [{"role": "user", "content": problem.text}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert tokenizer(text)["input_ids"] == prompt
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.inference_mode():
            logits = network(ids) @ network.vectors("out").T
            saved = llama(ids).logits
        # The sums of a class and a word are rounded once more.
        assert torch.allclose(saved, logits, atol=0.2)
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def test_a_run_goes_on_where_it_stopped(coder: Coder, tmp_path: Path) -> None:
    run = Run(SMALL, coder, tmp_path, "cpu")
    run.train(SMALL.phases[0], 1500)
    again = Run(SMALL, coder, tmp_path, "cpu")
    assert (again.tokens, again.steps) == (run.tokens, run.steps)
    assert torch.equal(again.network.norm, run.network.norm)
    again.train(SMALL.phases[0], 3000)
    assert again.tokens >= 3000
    assert not torch.equal(again.network.norm, run.network.norm)
    fixed = torch.tensor(coder.lexicon.is_fixed)
    assert torch.equal(again.network.code_in[fixed], run.network.code_in[fixed])


def test_the_rate_rises_holds_and_falls() -> None:
    recipe = RECIPES["target"]
    peak = recipe.rates[0][1]
    assert recipe.rate(0, 0) < recipe.rate(0, 30) < peak
    assert recipe.rate(recipe.tokens // 4, 1000) == peak
    late = recipe.rate(recipe.tokens * 9 // 10, 5000)
    assert 0 < late < peak / 3
    assert recipe.tokens == recipe.rates[-1][0]


def test_the_first_wrong_step_is_found() -> None:
    problem = problems.generate(problems.CALIBRATION, 3)
    assert first_wrong(problem, problem.solution) == (len(problem.steps), None)
    assert first_place(problem, problem.solution) == "ending"
    number = next(i for i, sentence in enumerate(problem.sentences) if sentence.updates)
    steps = list(problem.steps)
    del steps[number]
    missing = problems.DELIMITER.join(steps)
    assert first_wrong(problem, missing) == (number, "a skipped event")
    assert first_place(problem, missing).endswith(": sentence")
    steps = list(problem.steps)
    steps[number] = steps[number].replace(" had ", " had 1", 1)
    changed = problems.DELIMITER.join(steps)
    assert first_wrong(problem, changed)[0] == number
    assert first_place(problem, changed).endswith(": look-up")


def test_solving_counts_what_is_right(coder: Coder, target: Network) -> None:
    """Untrained, nothing is right, and the first step is where it goes wrong."""
    result = solve(target, coder, problems.CALIBRATION, 4)
    assert result.num_right == 0
    assert len(result.wrong) == sum(result.places.values()) == sum(result.kinds.values()) == 4
    assert 0 <= result.right_steps < result.steps
    assert target.training is False
