"""Engines of other processes and machines, over HTTP."""
