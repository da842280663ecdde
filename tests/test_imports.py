"""What importing costs, and that nothing is imported under two names."""

import re
import subprocess
import sys
from pathlib import Path

import specguard.core

FRAMEWORKS = {"torch", "mlx", "transformers", "sentence_transformers", "safetensors"}
HTTP_CLIENTS = {"http.client", "urllib.request", "urllib3", "requests", "httpx", "aiohttp"}


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_the_core_imports_no_framework_and_no_http_client() -> None:
    loaded = modules_after("import specguard.core")
    assert "specguard.core.many" in loaded
    assert not loaded & (FRAMEWORKS | HTTP_CLIENTS)


def test_the_core_knows_nothing_of_what_is_built_on_it() -> None:
    files = list(Path(specguard.core.__file__).parent.glob("*.py"))
    assert len(files) > 10
    for file in files:
        for module in re.findall(r"^\s*(?:from|import) (specguard\S*)", file.read_text(), re.M):
            assert module.startswith("specguard.core"), file


def test_the_package_and_the_command_line_import_no_framework() -> None:
    loaded = modules_after("import specguard, specguard.cli.main, specguard.backends.registry")
    assert not loaded & FRAMEWORKS
    assert not loaded & {"backends", "cli", "models"}


def test_registered_backends_import_no_framework_before_they_are_asked() -> None:
    find = "from specguard.backends.registry import *; [find_backend(n) for n in backend_names()]"
    assert not modules_after(find) & FRAMEWORKS
