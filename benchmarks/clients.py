"""Other people's clients against the server, unchanged: ``python -m benchmarks.clients --help``.

Each is a command line of its own, from this environment or from ``--bin``, where they are installed
without us. Of a real pair, with problems of its own::

    python -m benchmarks.clients lm_eval --draft DRAFT --target TARGET --data gsm8k/test.jsonl
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.served import Server, fitting, started
from specguard.bench.datasets import load_dataset
from specguard.bench.tables import as_table

_TASK = """\
task: word_problems
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<|im_end|>"], do_sample: false, temperature: 0, max_gen_toks: 512}}
filter_list:
  - name: boxed
    filter:
      - {{function: regex, regex_pattern: "boxed\\\\{{([^}}]*)\\\\}}", group_select: -1}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
_OPENAI = """\
import json, os, sys, openai
client = openai.OpenAI(base_url=os.environ["URL"], api_key="none")
stream = client.chat.completions.create(
    model="tiny", messages=[{"role": "user", "content": sys.argv[1]}], stream=True)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream))
"""
Run = Callable[[list[str], Mapping[str, str]], str]


def by_curl(server: Server, _: Path, run: Run) -> str:
    """One request, whole."""
    problem = next(fitting())
    asked = {"model": "tiny", "messages": [{"role": "user", "content": problem.text}]}
    command = ["curl", "--silent", "--fail", f"{server.url}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(asked)]
    return str(json.loads(run(command, {}))["choices"][0]["message"]["content"])


def by_openai(server: Server, _: Path, run: Run) -> str:
    """One request of OpenAI's own client, as a stream."""
    command = ["python", "-c", _OPENAI, next(fitting()).text]
    return run(command, {"URL": f"{server.url}/v1"})


def by_llm(server: Server, folder: Path, run: Run) -> str:
    """One request of the command line tool llm, as a stream."""
    settings = {"model_id": "ours", "model_name": "tiny", "api_base": f"{server.url}/v1"}
    (folder / "extra-openai-models.yaml").write_text(json.dumps([settings]))  # JSON is YAML
    command = ["llm", "-m", "ours", "--key", "none", next(fitting()).text]
    return run(command, {"LLM_USER_PATH": str(folder)})


def by_lm_eval(server: Server, folder: Path, run: Run) -> str:
    """The evaluation harness on the problems in ``data.jsonl``, four at a time."""
    data, task = folder / "data.jsonl", folder / "word_problems.yaml"
    task.write_text(_TASK.format(data=data))
    url = f"{server.url}/v1/chat/completions"
    command = ["lm_eval", "run", "--model", "local-chat-completions", "--apply_chat_template"]
    command += ["--model_args", f"model=tiny,base_url={url},num_concurrent=4"]
    command += ["--tasks", "word_problems", "--include_path", str(folder)]
    own = {"HF_HOME": str(folder), "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    match = re.search(r"exact_match\D*([\d.]+)", run(command, own))
    count = len(data.read_text().splitlines())
    return f"{count} problems, {match.group(1)} of them right" if match else "no figure"


def problems_of(data: Path | None) -> Iterator[dict[str, str]]:
    """Questions and answers: GSM8K's, or of the built-in pair's language."""
    if data is not None:
        for item in load_dataset("gsm8k", data).items:
            yield {"question": item.problem, "answer": item.answer}
        return
    for each in fitting():
        yield {"question": each.text, "answer": str(each.answer)}


CLIENTS = {"curl": by_curl, "openai": by_openai, "llm": by_llm, "lm_eval": by_lm_eval}


def _runner(folders: list[str]) -> Run:
    path = os.pathsep.join([*folders, os.environ["PATH"]])

    def run(command: list[str], own: Mapping[str, str]) -> str:
        if shutil.which(command[0], path=path) is None:
            raise FileNotFoundError(command[0])
        done = subprocess.run(
            command,
            env={**os.environ, "PATH": path, **own},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise subprocess.SubprocessError(done.stderr.strip().splitlines()[-1])
        return done.stdout

    return run


@click.command(context_settings={"show_default": True})
@click.option("--backend", default="cpu")
@click.option("--bin", "folders", multiple=True, help="Folder of clients' command lines.")
@click.option("--draft", help="In place of the built-in pair's.")
@click.option("--target", help="In place of the built-in pair's.")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="GSM8K as JSONL, in place of problems of the built-in pair.",
)
@click.option("--limit", default=50, help="Problems for lm_eval.")
@click.argument("names", nargs=-1, type=click.Choice(list(CLIENTS)))
def main(
    backend: str,
    folders: tuple[str, ...],
    draft: str | None,
    target: str | None,
    data: Path | None,
    limit: int,
    names: tuple[str, ...],
) -> None:
    """Try clients, all of them or those of these NAMES; exit 1 where one fails."""
    rows, has_failed = [], False
    if (draft is None) != (target is None):
        raise click.UsageError("--draft and --target go together")
    models, options = ["--models", "tiny"], ["--backend", backend, "--no-fallback"]
    if draft is not None and target is not None:  # as a user would serve them
        models = ["--draft", draft, "--target", target, "--served-name", "tiny"]
        options.pop()
    problems = [json.dumps(each) for each in islice(problems_of(data), limit)]
    with started(options, models) as server:
        for name in names or CLIENTS:
            with TemporaryDirectory() as folder:
                (Path(folder) / "data.jsonl").write_text("\n".join(problems))
                try:
                    said = CLIENTS[name](server, Path(folder), _runner(list(folders)))
                    outcome = " ".join(said.split())[-60:]
                except FileNotFoundError:
                    outcome = "not installed"
                except (subprocess.SubprocessError, ValueError, KeyError) as error:
                    outcome, has_failed = f"failed: {error}"[:200], True
            rows.append([name, outcome])
    click.echo(as_table(("client", "outcome"), rows), nl=False)
    if has_failed:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
