"""A run of ``bench`` comes back from the repository as it was, but for where the models lie."""

import json
import lzma
from pathlib import Path

from click.testing import CliRunner

from recipes.real_pair import runs

ASKED = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}]
HEAD = {"dataset": "test", "batch_size": 32}


def test_a_run_comes_back_without_the_data_set_in_the_repository() -> None:
    rows = [
        {"method": "target", "id": str(1 + index), "answer": "2", "is_right": not index}
        | {"problem": asked["question"], "gold": asked["answer"]}
        for index, asked in reversed(list(enumerate(ASKED)))
    ]
    places = [{"draft": f"{at}/coder-0.5b", "target": f"{at}/coder-1.5b"} for at in "ab"]
    content = runs.packed([HEAD | places[0], *rows])
    stored = lzma.decompress(content).decode()
    assert "2 + 2" not in stored
    assert "####" not in stored
    assert "a/" not in stored
    asked = [(each["question"], each["answer"]) for each in ASKED]
    back = [json.loads(line) for line in runs.unpacked(content, Path("b"), asked)]
    assert back == [HEAD | places[1], *rows]


def test_a_folder_with_a_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("{}\n")
    arguments = ["restore", "gsm8k_test", "--pair", str(tmp_path), "--data", str(tmp_path)]
    result = CliRunner().invoke(runs.main, [*arguments, "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert (tmp_path / "results.jsonl").read_text() == "{}\n"
