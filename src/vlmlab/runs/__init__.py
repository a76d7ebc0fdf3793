"""The run folder: its name, its lock, what is in it and when it may be reused. Never imports torch."""
