"""What is at every place of a grid over a scene, in words: what the probe of a vision tower is fitted to."""

from __future__ import annotations

from collections.abc import Sequence

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample
from vlmlab.contracts.values import Count, Seed
from vlmlab.data.world.captions import cell_words, full_phrase, placed_names
from vlmlab.data.world.render import render
from vlmlab.data.world.scene import STANDARD, Grid, Object, Objects, Scene, Split, check_split, sample_scene, scale_of

FORMS = ("sentence", "compound")


class WorldCells:
    """Scenes, and words for every patch of a grid of any size over them.

    ``sentence`` says ``row one column two large red striped ring``; ``compound`` writes the same as two words, as the
    embedded LM has read them (``onetwo largeredstripedring``). A patch in which no object covers a quarter is empty.

    Args:
        split: train, val, test or compositional.
        size: number of scenes.
        seed: another seed gives other scenes.
        grid, objects: the scenes' scale.

    Raises:
        UserError: for an unknown split, a size below 1 or a scale that cannot be.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        seed: Seed = 0,
        grid: Grid = STANDARD.grid,
        objects: Objects = (STANDARD.fewest, STANDARD.most),
    ) -> None:
        check_split(split)
        self._scale = scale_of(grid, objects)
        self.grid, self.objects = grid, tuple(objects)
        if size < 1:
            raise UserError(f"The world cannot have {size} samples; set size to 1 or more.")
        self.split, self.size, self.seed = split, size, seed
        self.forms: Sequence[str] = FORMS

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        scene = self._scene(index)
        return Sample(scene.id, (render(scene),), (), image_ids=(scene.id,))

    def words(self, index: int, rows: int, columns: int, form: str) -> list[str]:
        """The words of each patch in raster order, each word after a blank."""
        scene = self._scene(index)
        patches = [divmod(place, columns) for place in range(rows * columns)]
        return [_described(scene, form, row, col, rows, columns) for row, col in patches]

    def _scene(self, index: int) -> Scene:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        return sample_scene(self.split, index, self.seed, scale=self._scale)


def _described(scene: Scene, form: str, row: int, col: int, rows: int, columns: int) -> str:
    """What covers most of a patch, with the name of its own cell; an empty patch has that of the cell it is in."""
    grid, side = scene.scale.grid, scene.scale.side
    box = (col * side / columns, row * side / rows, (col + 1) * side / columns, (row + 1) * side / rows)
    area = (box[2] - box[0]) * (box[3] - box[1])
    thing = max(scene.objects, key=lambda other: _overlap(other, box))
    if _overlap(thing, box) < area / 4:
        middle = (int((row + 0.5) * grid / rows), int((col + 0.5) * grid / columns))
        name = placed_names(grid)[middle[0] * grid + middle[1]]
        return f" {name} empty" if form == "compound" else " empty"
    if form == "compound":
        return f" {placed_names(grid)[thing.row * grid + thing.col]} {full_phrase(scene, thing).replace(' ', '')}"
    return f" {cell_words(thing)} {full_phrase(scene, thing)}"


def _overlap(thing: Object, box: tuple[float, float, float, float]) -> float:
    """Square pixels that an object's box and a patch share."""
    across = min(thing.box[2], box[2]) - max(thing.box[0], box[0])
    down = min(thing.box[3], box[3]) - max(thing.box[1], box[1])
    return max(0.0, across) * max(0.0, down)
