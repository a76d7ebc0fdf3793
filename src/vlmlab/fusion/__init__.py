"""Fusions: how vision acts on the language model; each declares what it reads and what it starts as."""
