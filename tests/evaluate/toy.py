"""A configuration that is only evaluated: one benchmark and one held-out source."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

VQA = "vlmlab.evaluate.metrics.vqa.VqaAccuracy"


def toy_config(source: dict[str, Any], held_out: dict[str, Any], metric: str = VQA) -> DictConfig:
    """Benchmark ``toy`` of `source`, captions held out; ``instruct`` is named and has no held-out samples."""
    return OmegaConf.create(
        {
            "data": {
                "benchmarks": {"toy": {"source": source, "metrics": [{"_target_": metric}], "max_new_tokens": 3}},
                "val": {"captions": held_out},
            },
            "evaluation": {
                "batch_size": 3,
                "baselines": ["shuffled", "no_image"],
                "held_out": ["captions", "instruct"],
                "held_out_samples": 10,
            },
            "budget": {"eval_limit": None},
            "collate": {"max_length": 512, "pack_length": None},
        }
    )
