"""Feature caches: what is between pixels and a frozen encoder. Encoders know nothing of them."""
