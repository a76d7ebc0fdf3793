"""What all readers of captioned images share: one image with its captions, and samples made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.fingerprint import Facts, files_fingerprint
from vlmlab.data.images import ImageFolder
from vlmlab.data.overlap import Stored
from vlmlab.data.readers.split import subset


@dataclass(frozen=True, slots=True)
class Captioned:
    """One image and its captions, each with its id, in the file's order.

    Attributes:
        id: of the image.
        image: its file name.
        captions: (id, text) of each.
        split: the file's word for its split; "" where it has none.
    """

    id: str
    image: str
    captions: tuple[tuple[str, str], ...]
    split: str = ""


class CaptionSamples:
    """Captioned images as samples; pixels are read when a sample is asked for.

    Args:
        found: the images.
        files: where they are listed.
        folder: where their files are.
        prompt: the caption instruction.
        all_references: one sample per image with all its captions as references instead of one per caption.
        size: only so many samples, chosen by seed; None for all.
        seed: of that choice.
    """

    turns_in_memory = True

    def __init__(
        self,
        found: Sequence[Captioned],
        files: Sequence[Path],
        folder: ImageFolder,
        prompt: str,
        all_references: bool,
        size: int | None,
        seed: int,
    ) -> None:
        self._files, self._folder, self._prompt = list(files), folder, prompt
        items = [(c.id, c.image, tuple(text for _, text in c.captions)) for c in found]
        if not all_references:
            items = [(id_, c.image, (text,)) for c in found for id_, text in c.captions]
        self._items = [items[i] for i in subset([name for name, _, _ in items], size, seed)]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        name, image, _ = self._items[index]
        return Sample(name, (self._folder.load(image),), self.turns(index), image_ids=(image,))

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a sample, without its image."""
        texts = self._items[index][2]
        return (Turn(self._prompt, texts[0], "caption", texts if len(texts) > 1 else ()),)

    def stored(self, most: int) -> Iterator[Stored]:
        """Its images as they are kept."""
        return self._folder.stored((image for _, image, _ in self._items), most)

    def fingerprint(self) -> Facts:
        """Facts that change with the content of its files."""
        return files_fingerprint(self._files) | self._folder.fingerprint(image for _, image, _ in self._items)

    def label(self, index: int) -> str:
        """The id of a sample, without loading it."""
        return self._items[index][0]
