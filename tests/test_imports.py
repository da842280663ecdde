"""What importing costs, and that nothing is imported under two names."""

import subprocess
import sys

FRAMEWORKS = {"torch", "mlx", "transformers", "sentence_transformers", "safetensors"}


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_the_core_imports_no_framework() -> None:
    assert not modules_after("import specguard.core") & FRAMEWORKS


def test_the_package_and_the_command_line_import_no_framework() -> None:
    loaded = modules_after("import specguard, specguard.cli.main, specguard.backends.registry")
    assert not loaded & FRAMEWORKS
    assert not loaded & {"backends", "cli", "models"}


def test_registered_backends_import_no_framework_before_they_are_asked() -> None:
    find = "from specguard.backends.registry import *; [find_backend(n) for n in backend_names()]"
    assert not modules_after(find) & FRAMEWORKS
