"""Metrics over saved predictions. One metric is one class with ``update(row)`` and ``compute()``.

Every score is computed over the whole set from ``predictions/<benchmark>[.shuffled|.no_image|.lookup].jsonl``, never
averaged over batches. Nothing here imports torch, except BLEU when it is computed.
"""
