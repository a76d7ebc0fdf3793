"""Hydra launcher ``pool``: one process per sweep cell, a free slot per device. Never imports torch."""
