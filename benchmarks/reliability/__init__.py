"""What a careful user asks for before running it for days: see docs/reliability.md.

Each module drives the commands of an installed checkout with the built-in pair, counts what went
wrong, and ends with exit code 1 where anything did.
"""
