"""The run from top to bottom: stages through Lightning, checkpoints, resuming, records. Imports no torch by itself."""
