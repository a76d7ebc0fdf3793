"""Evaluation: generation over the benchmarks and the metrics computed from the saved predictions.

Importing this package never imports torch; the modules that generate do.
"""
