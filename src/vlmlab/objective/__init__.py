"""Objectives: losses ``(outputs, batch) -> {name: (sum, count)}``; several are summed with their weights."""
