"""``InstructionTuningModule``: conversations in the language model's chat template, supervised on the answers only."""

from __future__ import annotations

from vlmlab.engine.stage import StageModule


class InstructionTuningModule(StageModule):
    """Conversations; adapters or full weights, as the stage says."""

    prompt = "chat"
