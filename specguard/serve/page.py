"""The page at ``/``: one file that asks this server and nobody else."""

from importlib.resources import files
from typing import get_args

import jinja2

from specguard.core.config import Method

# Whatever the page is made to show, it reaches nobody else and is part of no other page.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_EXAMPLE = "Mia has 24 shells. Mia finds 9 more shells. How many shells does Mia have?"


def render(name: str, is_checked: bool) -> str:
    """The page for the model of this name; ``is_checked`` says whether it refuses some problems."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    here = files("specguard.serve")
    template = environment.from_string(here.joinpath("page.html.jinja").read_text("utf-8"))
    return template.render(
        name=name,
        is_checked=is_checked,
        methods=get_args(Method),
        example=_EXAMPLE,
        style=files("specguard.trace").joinpath("style.css").read_text("utf-8"),
        script=here.joinpath("page.js").read_text("utf-8"),
    )
