"""Feature caches: what stands between pixels and a frozen encoder. Encoders know nothing of them."""
