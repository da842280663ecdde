"""Comparisons for developers, run from a checkout: see README.md beside this file."""
