"""An OpenAI-compatible server in front of a solver: HTTP, limits, and the words of the protocol.

Knows solvers and steps, and nothing of the engines behind them. Needs the extra ``serve``.
"""
