"""Problems with known answers: the usual mathematical test sets, or a JSONL file of one's own."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from specguard.bench.grading import clean
from specguard.core.errors import SpecguardError, UsageError
from specguard.jsonl import read_rows, text_from

BUILT_IN = "tiny"


@dataclass(frozen=True, slots=True)
class Item:
    """A problem and its known answer, LaTeX or plain; ``id`` is unique in its data set."""

    id: str
    problem: str
    answer: str


@dataclass(frozen=True, slots=True)
class Fields:
    """Where a row of a file keeps what is wanted; without an ``id``, rows are numbered from 1."""

    problem: str
    answer: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class DataSet:
    """``left_out`` names the rows that have no answer to compare with."""

    name: str
    items: tuple[Item, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """A data set as its publisher keeps it: hub id, configuration, split, fields."""

    hub_id: str
    configuration: str | None
    split: str
    fields: Fields
    answer_of: Callable[[Any], str]


def _after_marks(value: Any) -> str:
    """GSM8K's answers end with #### and a number."""
    text = text_from(value)
    if "####" not in text:
        raise TypeError("no final answer after ####")
    return text.rsplit("####", 1)[1].strip()


def _joined(value: Any) -> str:
    """OlympiadBench lists its answers; several are to be given together."""
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise TypeError(f"{value!r:.60} is no list of texts")
    return ", ".join(text_from(part).strip().removesuffix(".") for part in value)


SOURCES: Mapping[str, Source] = {
    "gsm8k": Source("openai/gsm8k", "main", "test", Fields("question", "answer"), _after_marks),
    "math500": Source(
        "HuggingFaceH4/MATH-500", None, "test", Fields("problem", "answer", "unique_id"), text_from
    ),
    "gaokao2023en": Source(
        "MARIO-Math-Lab/Gaokao2023-Math-En", None, "train", Fields("question", "answer"), text_from
    ),
    "olympiadbench": Source(
        "Hothan/OlympiadBench",
        "OE_TO_maths_en_COMP",
        "train",
        Fields("question", "final_answer", "id"),
        _joined,
    ),
}


def load_dataset(
    name: str | None = None,
    file: Path | None = None,
    fields: Fields | None = None,
    limit: int | None = None,
) -> DataSet:
    """A data set by name from the hub, or from a JSONL file.

    Args:
        name: ``tiny`` (the built-in pair's held-out problems), or one of `SOURCES`.
        file: rows in place of the hub's; ``name`` then says which fields they have, unless
            ``fields`` does.
        fields: of a file that is none of `SOURCES`.
        limit: so many items at most.

    Raises:
        UsageError: an unknown name, or a file whose fields nothing says.
        SpecguardError: a line that is no JSON, lacks a field, has one of a wrong type or repeats an
            id: file and line are named.
    """
    if name is not None and name not in (BUILT_IN, *SOURCES):
        known = ", ".join((BUILT_IN, *SOURCES))
        raise UsageError(f"no data set is called {name!r}", f"data sets: {known}")
    source = SOURCES.get(name or "")
    if file is not None:
        if fields is None and source is None:
            raise UsageError(
                f"nothing says which fields of {file} hold the problem and the answer",
                "give --fields problem=...,answer=... or the name of a known data set",
            )
        wanted = fields or (source.fields if source else None)
        assert wanted is not None
        answer_of = source.answer_of if source is not None and fields is None else _any_answer
        rows = read_rows(file)
        return _assemble(name or file.stem, rows, wanted, answer_of, limit)
    if source is not None:
        rows = ((f"row {number}", row) for number, row in enumerate(_from_hub(source), 1))
        return _assemble(name or "", rows, source.fields, source.answer_of, limit)
    return _built_in(500 if limit is None else limit)


def _any_answer(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"{value!r:.60} is no text or number")
    return text_from(str(value))


def _assemble(
    name: str,
    rows: Iterator[tuple[str, Any]],
    fields: Fields,
    answer_of: Callable[[Any], str],
    limit: int | None,
) -> DataSet:
    items: list[Item] = []
    left_out: list[str] = []
    places: dict[str, str] = {}
    for number, (place, row) in enumerate(rows, 1):
        if limit is not None and len(items) >= limit:
            break
        if not isinstance(row, dict):
            raise SpecguardError(f"{place} is no JSON object")
        for field in filter(None, (fields.problem, fields.answer, fields.id)):
            if field not in row:
                known = ", ".join(row)
                raise SpecguardError(f"{place} has no field {field!r}", f"its fields: {known}")
        try:
            problem, answer = text_from(row[fields.problem]), answer_of(row[fields.answer])
            item = Item(
                text_from(str(row[fields.id])) if fields.id else str(number), problem, answer
            )
        except TypeError as error:
            raise SpecguardError(f"{place}: {error}") from error
        if item.id in places:
            raise SpecguardError(f"{place} has the id {item.id!r} of {places[item.id]}")
        places[item.id] = place
        if not clean(answer) or not problem.strip():
            left_out.append(f"{place}: no answer" if problem.strip() else f"{place}: no problem")
            continue
        items.append(item)
    if not items:
        raise SpecguardError(f"data set {name} has no problem")
    return DataSet(name, tuple(items), tuple(left_out))


def _from_hub(source: Source) -> Iterator[Any]:
    try:
        import datasets
    except ImportError as error:
        raise SpecguardError(
            "the package datasets is not installed",
            "pip install 'specguard[datasets]', or give a local file: --data FILE",
        ) from error
    try:
        rows = datasets.load_dataset(source.hub_id, source.configuration, split=source.split)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SpecguardError(
            f"{source.hub_id} cannot be loaded: {reason}", "or give a local file: --data FILE"
        ) from error
    yield from rows


def _built_in(limit: int) -> DataSet:
    from specguard.models.tiny import problems

    found = islice(problems.stream(problems.HELD_OUT), limit)
    items = (
        Item(str(number), problem.text, str(problem.answer)) for number, problem in enumerate(found)
    )
    return DataSet(BUILT_IN, tuple(items))
