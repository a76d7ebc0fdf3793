"""Towers: where they come from, their architecture without weights, and how the embedded ones are made again."""
