"""A mixture whose parts have names: sets that the package ``datasets`` opens, and sources of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import SampleSource
from vlmlab.contracts.values import Count, Levels, NotNegative, Seed, Share, Text
from vlmlab.data.mixture import Mixture
from vlmlab.data.readers.hub import HubRecords
from vlmlab.data.readers.split import Split

KEYS = (
    "path", "records", "columns", "config", "revision", "splits", "images", "prompt", "suffix", "prepend_images",
    "image_roots", "size", "val_fraction", "test_fraction",
)  # fmt: skip
"""What a part may say beside its weight: keys of `HubRecords`."""


class NamedMixture(Mixture):
    """Sets by name and weight, as one (see `vlmlab.data.mixture.Mixture`).

    Args:
        parts: the name of each and its weight; or its name and a mapping of `weight` (1 where it is not there), `path`
            (the name itself where it is not there) and other keys of `vlmlab.data.readers.hub.HubRecords`.
        sources: names that are not sets of the hub: their sources.
        split: of all parts that are sets.
        weighted: false: every sample comes once, whatever the weights.
        size: samples of the mixture; null: those of all parts together.
        each: most samples of a part, chosen by seed; null: all.
        seed: of the places, and of those choices.
        split_seed, val_fraction, test_fraction, max_bad_fraction, image_range, cache: of all parts that are sets, see
            `vlmlab.data.readers.hub.HubRecords`.

    Raises:
        UserError: no part, a key that a part cannot have, weights that do not fit, or as `HubRecords`.
        DataError: as `HubRecords`.
    """

    def __init__(
        self,
        parts: Mapping[str, NotNegative | Mapping[str, Any]],
        sources: Mapping[str, SampleSource] | None = None,
        split: Split | None = None,
        weighted: bool = True,
        size: Count | None = None,
        each: Count | None = None,
        seed: Seed = 0,
        split_seed: Seed = 0,
        val_fraction: Share = 0.05,
        test_fraction: Share = 0.1,
        max_bad_fraction: Share = 0.0,
        image_range: Levels = "auto",
        cache: Text | None = None,
    ) -> None:
        if not parts:
            raise UserError(
                "A mixture by name needs parts; set data.parts, as in data.parts='{owner/name: 2, folder: 1}'"
            )
        common = {
            "split": split, "size": each, "seed": seed, "split_seed": split_seed, "val_fraction": val_fraction,
            "test_fraction": test_fraction, "max_bad_fraction": max_bad_fraction, "image_range": image_range,
            "cache": cache,
        }  # fmt: skip
        told = {name: part if isinstance(part, Mapping) else {"weight": part} for name, part in parts.items()}
        known = dict(sources or {})
        made = [_source(str(name), part, known, common) for name, part in told.items()]
        weights = [float(part.get("weight", 1.0)) for part in told.values()]
        super().__init__(made, weights if weighted else None, size, seed)


def _source(
    name: str, part: Mapping[str, Any], known: Mapping[str, SampleSource], common: Mapping[str, Any]
) -> SampleSource:
    """One part: a source that is there by this name, or a set."""
    own = {key: value for key, value in part.items() if key != "weight"}
    if name in known and not own:
        return known[name]
    if unknown := [key for key in own if key not in KEYS]:
        raise UserError(f"data.parts.{name}.{unknown[0]} is unknown; the keys are weight, {', '.join(KEYS)}")
    return HubRecords(**{"path": name, **common, **own})
