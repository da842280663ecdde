"""Labelled reasoning steps of a real pair, and the signals on them: see README.md.

``collect`` writes and labels the steps with vLLM, in an environment of its own; ``signals`` scores
them with this project's engines; ``figures`` says what is there.
"""
