"""Fit a verifier to a pair of models: labelled steps, then bounds, weights and a threshold."""
