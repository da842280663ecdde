"""Benchmarks: data sets, grading, methods, reports."""
