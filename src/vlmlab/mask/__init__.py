"""Attention masks: pure functions ``(Layout, q (Q,)) -> allowed (B, Q, S)`` of what each token is, never of labels."""
