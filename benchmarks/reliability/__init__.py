"""What a careful user asks for before running it for days: see docs/reliability.md.

Every module but `numerics`, which prints a table, ends with exit code 1 where something went wrong.
"""
