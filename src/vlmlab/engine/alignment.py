"""``AlignmentModule``: captions teach the connector or the fusion to speak to the language model."""

from __future__ import annotations

from vlmlab.engine.stage import StageModule


class AlignmentModule(StageModule):
    """Caption data; plain prompt unless the stage says otherwise: the image, then its caption, and nothing else."""

    prompt = "plain"
