"""Memory masks: pure functions ``(Layout, Images, q (Q,)) -> (B, Q, I)`` bool: which images a position sees."""
