"""Arguments of the wrong kind, found where they come in and not where they do harm."""

from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from specguard.core.errors import UsageError

_ABSTRACT = {int: Integral, float: Real}  # NumPy's numbers are numbers too


def check_problem(problem: object) -> None:
    """Refuse what is no problem.

    Raises:
        UsageError: no text, a blank one, or one with characters that no encoding has.
    """
    if not isinstance(problem, str):
        raise UsageError(f"a problem is a text, not {_named(problem)}")
    if not problem.strip():
        raise UsageError("the problem is empty", "give it as an argument, with --file or on -")
    try:
        problem.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the problem is no valid Unicode (character {error.start})") from error


def check_types(settings: Any) -> None:
    """Refuse fields of a dataclass whose values are of another kind than they are annotated with.

    What is inside of containers is not looked at.

    Raises:
        UsageError: the first such field.
    """
    for field in fields(settings):
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        plain = tuple(_ABSTRACT.get(kind, kind) for kind in map(_class_of, kinds) if kind)
        value = getattr(settings, field.name)
        if len(plain) == len(kinds) and not isinstance(value, plain):
            wanted = " or ".join(
                "None" if kind is NoneType else _class_of(kind).__name__ for kind in kinds
            )
            raise UsageError(f"{field.name} must be of type {wanted}, not {_named(value)}")


def _class_of(kind: Any) -> Any:
    """A class to compare with; None for `Any`, and for a literal, whose values are checked."""
    origin = get_origin(kind) or kind
    return origin if isinstance(origin, type) and origin is not Any else None


def _named(value: object) -> str:
    return f"{value!r:.40} ({type(value).__name__})"
