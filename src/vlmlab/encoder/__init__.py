"""Encoders: pixels (I, 3, H, W) uint8 -> Visual."""
