"""Fixtures: small checkpoints of random weights, and an environment without network or settings."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specguard.core import DraftCost

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("SPECGUARD_REFERENCE", None)

PROBLEM = "Mia has 24 shells. Mia sells half of the shells. How many shells does Mia have?"
ROOT = Path(__file__).parent.parent
TINY = ROOT / "models" / "tiny"
# Of the built-in pair, on a thread of a CPU.
TYPICAL_COST = DraftCost(candidate=0.5, further=0.05, verification=3.0, source="measured")
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's settings out of the tests, and the clock out of their decisions."""
    monkeypatch.setenv("SPECGUARD_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("SPECGUARD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("specguard.costs.figure.read_cost", lambda conditions: TYPICAL_COST)


def make_checkpoint(folder: Path, family: str = "Llama", **changes: Any) -> Path:
    """A checkpoint of random weights with the built-in pair's tokenizer."""
    import torch
    import transformers

    torch.manual_seed(changes.pop("seed", 0))
    number_type = changes.pop("number_type", torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "target")
    settings = {**SHAPE, "vocab_size": len(tokenizer), **changes}
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.to(number_type).save_pretrained(folder)
    # Saved under a llama config, so that every family keeps the tokenizer as it is.
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((TINY / "target" / name).read_bytes())
    return folder


def eager(folder: Path) -> Any:
    """The checkpoint in transformers, whose attention hands its weights over."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped-query attention and heads as wide as real ones."""
    return make_checkpoint(tmp_path_factory.mktemp("llama"), head_dim=64)


@pytest.fixture(scope="session")
def draft_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, smaller, with padded embeddings."""
    return make_checkpoint(
        tmp_path_factory.mktemp("draft"), num_hidden_layers=2, vocab_size=1088, seed=1
    )


def benchmark_file(name: str) -> Path:
    """A benchmark's test file, from $SPECGUARD_DATA or the folder shared/data beside the checkout.

    Skips where there is none: the files are not part of the project.
    """
    folder = Path(os.environ.get("SPECGUARD_DATA") or ROOT.parent / "shared" / "data")
    file = folder / name / "test.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not there: set SPECGUARD_DATA to the folder with the test sets")
    return file


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A real one; skips where it is not installed."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync"):
        options.add_argument(f"--{argument}")
    options.add_argument("--disable-background-networking")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    chrome = webdriver.Chrome(options=options, service=service)
    yield chrome
    chrome.quit()
