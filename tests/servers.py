"""Real servers of a checkpoint, where the environment names a Python or a program that has one."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

VLLM_PYTHON, LLAMA_SERVER = "VLLM_SERVER_PYTHON", "LLAMA_SERVER"  # names of variables
_SECONDS = 300.0


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@contextmanager
def vllm_server(folder: Path, log: Path) -> Iterator[str]:
    """vLLM's server in float32, with a context window of 512 tokens; its URL."""
    port = free_port()
    options = {
        "model": folder, "port": port, "host": "127.0.0.1", "dtype": "float32",
        "max-model-len": 512, "max-num-seqs": 64, "block-size": 32,
    }  # fmt: skip
    command = [os.environ[VLLM_PYTHON], "-m", "vllm.entrypoints.openai.api_server"]
    command += [f"--{name}={value}" for name, value in options.items()] + ["--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with _running(command, environment, port, log) as url:
        yield url


@contextmanager
def llama_server(file: Path, log: Path) -> Iterator[str]:
    """llama.cpp's server of a GGUF file; its URL."""
    port = free_port()
    command = [os.environ[LLAMA_SERVER], "-m", file, "--port", port, "-c", 4096, "-np", 4, "-t", 1]
    with _running(list(map(str, command)), {}, port, log) as url:
        yield url


@contextmanager
def _running(
    command: Sequence[str], environment: dict[str, str], port: int, log: Path
) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=file, stderr=file
        )
        try:
            _wait(process, url, log)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < _SECONDS and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"no server has come up:\n{log.read_text(errors='replace')[-2000:]}")
