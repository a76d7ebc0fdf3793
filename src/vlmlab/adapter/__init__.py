"""Adapters: small trainable parts around frozen towers, wrapped per tower with peft."""
