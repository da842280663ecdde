"""A solution as one self-contained page that shows who wrote each step and why it was trusted."""

from specguard.trace.render import render

__all__ = ["render"]
