"""Loggers beside the run folder, each a class of Lightning's with the keys that a run has for it."""
