"""``disk``: features of a frozen encoder, computed once for all runs and sweep cells that use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmlab.cache.address import address, describe, image_key, precision, probe, tensors
from vlmlab.cache.form import Form
from vlmlab.cache.none import NoCache
from vlmlab.cache.shelf import ROW, SUFFIX, Shelf, make_room
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Encoder, FeatureCache
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.terminal import tell
from vlmlab.contracts.values import Positive, Text


@dataclass
class Counts:
    """What this process's cache did: images that needed no computing and those that did, bytes, damaged records."""

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    damaged: int = 0


@dataclass(frozen=True)
class View:
    """Where the features of one encoder under one precision lie, and their form."""

    shelf: Shelf
    form: Form


class DiskCache(FeatureCache):
    """Looks an image up by its pixels before the encoder sees it.

    An image that is not there is shown to the encoder alone, never in a batch, since kernels may round by the size of a
    batch. So what comes out is the same to the last bit whether it was kept or not, in whatever order and company the
    images come, and a run that is killed and goes on ends with the same weights. Without a cache the encoder sees whole
    batches: that is equal up to this rounding.

    It is used only in front of an encoder of which nothing trains. ``vlmlab.cache.address`` says what features are kept
    under, ``vlmlab.cache.shelf`` how. An encoder that answers twice differently is left alone. Trouble with the disk is
    said once and changes no value: what cannot be read or kept is computed.

    When `max_gb` is reached, features of other encoders go that no process is using, those used longest ago first.
    After that nothing new is kept: epochs come in circles, and replacing the oldest images would find none of them.

    Args:
        folder: where features lie; made if missing.
        max_gb: most that lies there, in 10^9 bytes; None: no limit.
        dtype: "bfloat16" rounds features to that, whether they were kept or not; None keeps them as computed.

    Raises:
        UserError: another dtype.
    """

    def __init__(self, folder: Text, max_gb: Positive | None = 50.0, dtype: Literal["bfloat16"] | None = None) -> None:
        if dtype not in (None, "bfloat16"):
            raise UserError(f"cache.dtype={dtype} is unknown; choose bfloat16, or null for features as computed.")
        self.folder = Path(folder).expanduser()
        self.limit = None if max_gb is None else int(max_gb * 1e9)
        self.rounded = None if dtype is None else torch.bfloat16
        self._begin(tell)

    def _begin(self, say: Callable[[str], None]) -> None:
        self.counts = Counts()
        self._say, self._said = say, set[str]()
        self._views: dict[tuple[Any, ...], View | None] = {}

    @contextmanager
    def serving(self, model: nn.Module, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """Serve the model's encoder, as the encoder is now; report and count what that saves."""
        self._begin(say)
        used: dict[str, Any] = {}
        if reason := _unfit(getattr(model, "encoder", None)):
            self._once(f"not used, {reason}")
            yield used
            return
        holder: Any = model
        holder.cache = self
        try:
            yield used
        finally:
            holder.cache = NoCache()
            for view in filter(None, self._views.values()):
                self.counts.damaged += view.shelf.damaged
                view.shelf.close()
            used["cache"] = asdict(self.counts)
            if self._views:
                self._once(_summary(self.counts, self.folder))

    def __call__(self, encoder: Encoder, pixels: Tensor) -> Visual:
        """What the encoder sees; images that are kept come from the disk."""
        which = (pixels.device, pixels.shape[1:], precision(pixels.device))
        if which not in self._views:
            self._views[which] = self._open(encoder, pixels)
        view = self._views[which]
        if view is None:
            return encoder(pixels)
        keys = [image_key(image) for image in pixels.cpu()]
        records = torch.empty(len(keys), view.form.length, dtype=torch.uint8)  # (I, L)
        missing = self._read(view, keys, records)
        for places in missing.values():  # of the same image there may be several
            records[places] = view.form.pack(_alone(encoder, pixels[places[0], None]))
        self._keep(view, {key: records[places[0]] for key, places in missing.items()})
        self.counts.hits += len(keys) - len(missing)
        self.counts.misses += len(missing)
        return view.form.unpack(records, pixels.device)

    def _open(self, encoder: Encoder, pixels: Tensor) -> View | None:
        """Where features of this encoder under this precision lie; None if its answer is not always the same."""
        noise = probe(pixels)
        with torch.random.fork_rng([pixels.device] if pixels.is_cuda else []):
            answer, again = _alone(encoder, noise), _alone(encoder, noise)
        if not all(torch.equal(a, b) for a, b in zip(tensors(answer), tensors(again), strict=True)):
            self._once("not used, the encoder answers twice differently")
            return None
        form = Form.of(answer, self.rounded)
        described = describe(encoder, pixels, answer, form.described())
        folder = self.folder / f"{address(described)}{SUFFIX}"
        return View(Shelf(folder, form.length, json.dumps(described, indent=2)), form)

    def _read(self, view: View, keys: Sequence[bytes], records: Tensor) -> dict[bytes, list[int]]:
        """Fill the records (I, L) that are kept; the keys of the others with their places."""
        missing: dict[bytes, list[int]] = {}
        for place in self._fill(view, keys, records, range(len(keys))):
            missing.setdefault(keys[place], []).append(place)
        return missing

    def _fill(self, view: View, keys: Sequence[bytes], records: Tensor, wanted: Sequence[int]) -> list[int]:
        """The places that are still empty, after a second look at what others have written meanwhile."""
        for again in (False, True):
            if again and wanted:
                view.shelf.refresh()
            wanted = [i for i in wanted if not view.shelf.read(keys[i], records[i].numpy().data)]
        found = len(keys) - len(wanted)
        self.counts.read_bytes += found * view.form.length
        if view.shelf.damaged:
            self._once(f"damaged features in {view.shelf.folder} were taken out and are computed anew")
        return list(wanted)

    def _keep(self, view: View, new: dict[bytes, Tensor]) -> None:
        """Write down what was computed, as far as there is room."""
        shelf = view.shelf
        size = len(new) * (view.form.length + ROW.size)
        if new and not shelf.trouble and self.limit is not None and not make_room(self.folder, size, self.limit):
            shelf.trouble = f"cache.max_gb={self.limit / 1e9:g} is reached"
        for key, record in new.items():
            if shelf.write(key, record.numpy().data):
                self.counts.written_bytes += view.form.length
        if new and shelf.trouble:
            self._once(f"{self.folder}: {shelf.trouble}; nothing new is kept")

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(f"feature cache: {text}")


def _unfit(encoder: nn.Module | None) -> str:
    """Why features must not be kept, or nothing."""
    if encoder is None:
        return "there is no encoder"
    return "the encoder trains" if any(p.requires_grad for p in encoder.parameters()) else ""


@torch.no_grad()
def _alone(encoder: Encoder, image: Tensor) -> Visual:
    """What the encoder sees in one image (1, 3, H, W)."""
    return encoder(image)


def _summary(counts: Counts, folder: Path) -> str:
    size = f"{counts.read_bytes / 1e6:,.1f} MB read, {counts.written_bytes / 1e6:,.1f} MB written"
    damaged = f", {counts.damaged} damaged" if counts.damaged else ""
    return f"{counts.hits:,} images were known, {counts.misses:,} computed{damaged}; {size} ({folder})"
