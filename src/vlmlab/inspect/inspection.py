"""What a stage's model will see of its data, token by token, and what is wrong with the data.

The model is built without its weights: its tokenizer, its tower's geometry, the number of its visual tokens and its
adapter's soft prompts are all that is asked of it, by the collator that trains.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vlmlab.analyse.report import SHOWN_SIDE, png_base64
from vlmlab.contracts.errors import DataError, UserError, brief, user_error_in
from vlmlab.contracts.sample import IMAGE_TAG, Sample, SampleSource
from vlmlab.contracts.tensors import Batch, Kind, Role
from vlmlab.contracts.terminal import visible
from vlmlab.data.asking import check_prompt, parts, sent
from vlmlab.data.chat import PICTURE, Encoded
from vlmlab.data.collate import Collator, resized
from vlmlab.data.overlap import reads, same_bytes, sentence, spread, stored_images
from vlmlab.data.sampler import block_of
from vlmlab.data.skipped import Replaced, Skipped, grouped
from vlmlab.engine.restore import module_class
from vlmlab.engine.weights import StagedModel
from vlmlab.model.build import build_collator
from vlmlab.model.questions import questions_line
from vlmlab.model.vlm import VLM
from vlmlab.recipe.stage import Stage
from vlmlab.runs.files import check_place, write_atomic

TEMPLATE = "inspection.html.jinja"
MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>")
FLAT = 3.0
"""An image this many times as long as it is wide loses most of its detail in a square."""

DARK = 0.1
"""An image whose values span less than this share of 0..255 shows a tower next to nothing."""

MOST_NAMED = 8


@dataclass(frozen=True)
class Piece:
    """One token as it is shown, a run of visual tokens, soft prompts or padding, or the place of an image without any.

    Attributes:
        role: system, user, answer, image or pad.
        text: what is there.
        supervised: whether it is learnt.
        title: its id, or what the run is.
    """

    role: str
    text: str
    supervised: bool = False
    title: str = ""


@dataclass(frozen=True)
class Shown:
    """One sample inside its row.

    Attributes:
        name: its id, with its place in the data.
        images: PNGs in base64 of what the tower takes, and their sizes before.
        large: whether they are shown smoothly.
        pieces: its tokens.
        counts: tokens, supervised tokens, images, visual tokens.
    """

    name: str
    images: list[tuple[str, str]]
    large: bool
    pieces: list[Piece]
    counts: dict[str, int]


@dataclass(frozen=True)
class Row:
    """One row of a micro-batch: its samples, and how much padding follows them."""

    samples: list[Shown]
    padding: int


@dataclass
class Inspection:
    """Everything the page says.

    Attributes:
        title: the stage.
        facts: of the stage, in (name, value) pairs.
        rows: of its first micro-batches.
        problems: what is wrong -> the samples it is wrong with.
        broken: the samples that training cannot use -> why.
        checked: samples that were looked through.
        refused: why training would not begin with these data; None where it would.
    """

    title: str
    facts: list[tuple[str, str]]
    rows: list[Row] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    checked: int = 0
    refused: UserError | None = None


def inspect_stage(cfg: DictConfig, stage: Stage, n: int = 16, check: int = 200) -> Inspection:
    """Look at the first `n` samples of a stage, and through `check` of them for what is wrong.

    Args:
        cfg: the composed configuration.
        stage: one of its stages.
        n: samples that are shown.
        check: samples that are looked through, spread over the whole data.

    Raises:
        UserError: the composition cannot be built; what is wrong with the data is in the page.
    """
    source, refused = _opened(cfg, stage)
    title, key = f"{stage.name}: {stage.data}", f"data.train.{stage.data}"
    if source is None or not len(source):
        refused = refused or DataError(f"{stage.key('data')}={stage.data} has no samples; check {key}.")
        return Inspection(title, [("data", key)], broken={key: str(refused)}, refused=refused)
    collate, notes, model = _collator(cfg, stage)
    size = len(source)
    found = Inspection(title, _facts(cfg, stage, collate, size), refused=refused)
    found.problems = {note: [] for note in notes}
    found.broken = {one.id: one.reason for one in getattr(source, "skipped", ())}  # rows the reader has left out
    try:
        if (line := questions_line(cfg, model, collate.encoder.prompt, source)) is not None:
            found.facts.append(("questions", line))
    except DataError as error:
        found.problems[str(error)] = []
    spread = _spread(size, check, block_of(source))
    first = range(min(n, size))
    good = _looked_through(found, source, collate, sorted({*first, *spread}))
    shown = [(index, good[index]) for index in first if index in good]
    if shown and isinstance(model, VLM):
        _asking(found, build_collator(cfg, model, "chat"), model, shown)
    micro = max(1, stage.batch_size // (stage.accumulate * _devices(cfg)))
    for start in range(0, len(shown), micro):
        try:
            found.rows += _rows(shown[start : start + micro], collate)
        except UserError as error:
            found.problems[str(error)] = [f"#{index}" for index, _ in shown[start : start + micro]]
    found.problems |= {note: [] for note in _shared(cfg, stage, source, list(good.values()), check)}
    return found


def _spread(size: int, check: int, block: int | None) -> set[int]:
    """Which of a source's samples are looked through: evenly out of all, or the first of one that is read in order."""
    if check >= size or block is not None:
        return set(range(min(size, check)))
    return {round(k * (size - 1) / max(1, check - 1)) for k in range(check)}


def _opened(cfg: DictConfig, stage: Stage) -> tuple[SampleSource | None, UserError | None]:
    """The stage's data; where training would refuse them, with all their bad rows left out, and why."""
    node: Any = OmegaConf.to_container(cfg.data.train[stage.data], resolve=True)
    refused: UserError | None = None
    for described in (node, _lenient(node)):
        try:
            return instantiate(described), refused
        except (UserError, InstantiationException) as error:
            mistake = error if isinstance(error, UserError) else user_error_in(error)
            if mistake is None:
                raise
            refused = refused or mistake
    return None, refused


def _lenient(node: Any) -> Any:
    """A source's arguments that let any share of bad rows through, and decode no image at once."""
    if isinstance(node, dict):
        lenient = {"max_bad_fraction": 1.0, "verify": False}
        return {key: lenient.get(key, _lenient(value)) for key, value in node.items()}
    return [_lenient(value) for value in node] if isinstance(node, list) else node


def _shared(
    cfg: DictConfig, stage: Stage, source: SampleSource, samples: Sequence[Sample], check: int
) -> Iterator[str]:
    """Images that the stage trains on and is scored on, by their bytes, and by the pixels of some."""
    others = {f"data.val.{stage.data}": OmegaConf.select(cfg, f"data.val.{stage.data}")}
    for name, benchmark in (OmegaConf.select(cfg, "data.benchmarks") or {}).items():
        others[f"data.benchmarks.{name}"] = benchmark.get("source")
    train, kept, pixels = f"data.train.{stage.data}", stored_images(source), _by_pixels(samples)
    for key, node in others.items():
        if not isinstance(node, DictConfig) or not reads(node):
            continue
        try:
            other: SampleSource = instantiate(_lenient(OmegaConf.to_container(node, resolve=True)))
            bytes_ = same_bytes(kept, stored_images(other))
            few = (Replaced(other)[k] for k in spread(range(len(other)), check))
            seen = [(pixels[key_], name) for key_, name in _by_pixels(few).items() if key_ in pixels]
        except (UserError, InstantiationException) as error:
            mistake = error if isinstance(error, UserError) else user_error_in(error) or error
            yield brief(f"{key} cannot be read: {mistake}")
            continue
        if bytes_:
            yield sentence(bytes_, train, key)
        if new := [pair for pair in seen if pair not in bytes_]:
            yield sentence(new, train, key, "pixel for pixel")


def _by_pixels(samples: Iterable[Sample]) -> dict[bytes, str]:
    """A hash of the pixels of every image -> its name."""
    found: dict[bytes, str] = {}
    for sample in samples:
        for k, image in enumerate(sample.images):
            key = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
            found.setdefault(key, sample.image_ids[k] if sample.image_ids else f"{sample.id}#{k}")
    return found


def _collator(cfg: DictConfig, stage: Stage) -> tuple[Collator, list[str], Any]:
    """The collator of the stage's model, in what it may differ from the one that will train, and that model."""
    kind = module_class(stage)
    with torch.device("meta"):
        model: Any = kind.build(cfg)
        StagedModel(model).enter(stage)  # its adapter may put soft prompts before every sample
    notes = []
    if not getattr(model.lm, "own_tokenizer", True):
        notes.append(f"lm.path={cfg.lm.path} has no tokenizer here: the tokens shown are those of the embedded one")
    path = OmegaConf.select(cfg, "encoder.path")
    if isinstance(path, str) and model.encoder is not None and not Path(path).expanduser().is_dir():
        notes.append(f"encoder.path={path} is not a folder here: images are squeezed to the size of its architecture")
    collate = kind.collator(cfg, model, stage.prompt or kind.prompt)
    if not isinstance(collate, Collator):
        raise UserError(f"{stage.key('module')}={stage.module} reads no prompts: there are none to show.")
    return collate, notes, model


def _devices(cfg: DictConfig) -> int:
    devices = OmegaConf.select(cfg, "trainer.devices")
    each = devices if isinstance(devices, int) and devices > 0 else 1
    return each * int(OmegaConf.select(cfg, "trainer.nodes") or 1)


def _facts(cfg: DictConfig, stage: Stage, collate: Collator, size: int) -> list[tuple[str, str]]:
    micro = stage.batch_size // (stage.accumulate * _devices(cfg))
    visual = collate.encoder.tokens_of(PICTURE)
    none = "no images are read" if collate.resize is None else "0 an image: vision acts inside the LM"
    packed = "" if collate.pack_length is None else f", packed into rows of at most {collate.pack_length} tokens"
    return [
        ("data", f"data.train.{stage.data}, {size:,} samples"),
        ("prompt", str(collate.encoder.prompt)),
        ("micro-batch", f"{micro} samples{packed}"),
        ("visual tokens", f"{visual} an image" if visual else none),
        *([("instruction", "read by the encoder's text tower as well")] if collate.text is not None else []),
        ("longest sample", f"{collate.encoder.max_length} tokens"),
        ("tokenizer", Path(str(collate.encoder.tokenizer.name_or_path)).name),
    ]


def _asking(found: Inspection, collate: Collator, model: VLM, samples: Sequence[tuple[int, Sample]]) -> None:
    """What generation is sent and where it stops, and whether that is what is learnt of these samples."""
    for index, sample in samples:
        name = f"#{index} {sample.id}"
        try:
            if index == samples[0][0]:
                found.facts.append(("generation stops at", model.lm.stops_line()))
                found.facts.append(("generation is sent", sent(collate.encoder, parts(collate, sample)[0])))
            notes = check_prompt(collate, sample)
        except DataError as error:
            notes = [f"as a question: {error}"]
        except UserError as error:
            found.problems.setdefault(str(error), [])
            return
        for note in dict.fromkeys(notes):
            found.problems.setdefault(note, []).append(name)


# -- what is wrong ---------------------------------------------------------------------------------------------------


def _looked_through(
    found: Inspection, source: SampleSource, collate: Collator, indices: Sequence[int]
) -> dict[int, Sample]:
    """The samples that can be used; what is wrong with all others, and the lengths, are noted."""
    good: dict[int, Sample] = {}
    encoded: list[Encoded] = []
    seen: dict[Any, str] = {}
    for index in indices:
        name = f"#{index}"
        try:
            sample = source[index]
            name = f"#{index} {sample.id}"
            parts = collate.encode(sample)
            encoded += parts
            if collate.resize is not None:
                for image in sample.images:
                    resized(collate.resize, image, sample.id)
        except UserError as error:
            found.broken[name] = str(error)
            continue
        good[index] = sample
        for problem in _problems(sample, parts, collate, seen, name):
            found.problems.setdefault(problem, []).append(name)
    found.checked = len(indices)
    if encoded:
        found.facts += _lengths(encoded)
    return good


def _lengths(encoded: Sequence[Encoded]) -> list[tuple[str, str]]:
    tokens = [len(e.ids) for e in encoded]
    learnt = [sum(label >= 0 for label in e.labels) for e in encoded]
    return [
        ("tokens", f"{min(tokens)} to {max(tokens)}, median {median(tokens):g}"),
        ("supervised", f"{min(learnt)} to {max(learnt)}, median {median(learnt):g}"),
    ]


def _problems(
    sample: Sample, parts: Sequence[Encoded], collate: Collator, seen: dict[Any, str], name: str
) -> Iterator[str]:
    """What training accepts and its user may not have meant."""
    for check in (_of_turns, _of_text, _of_images):
        yield from check(sample, collate)
    unknown = collate.encoder.tokenizer.unk_token_id
    if unknown is not None and any(unknown in part.ids for part in parts):
        yield "words that the tokenizer does not know"
    content = (sample.turns, tuple(image.tobytes() for image in sample.images))
    for what, key in (("the id of another sample", sample.id), ("the same as another sample", hash(content))):
        if seen.setdefault((what, key), name) != name:
            yield what


def _of_turns(sample: Sample, collate: Collator) -> Iterator[str]:
    if any(not turn.answer.strip() for turn in sample.turns):
        yield "a turn without an answer: nothing is learnt from it"
    if collate.encoder.prompt == "plain":
        if len(sample.turns) > 1:
            yield "more than one turn: the plain prompt is the first answer alone"
        if not sample.images:
            yield "no image: with the plain prompt nothing is before the answer"
    elif len(sample.turns) != len({turn.prompt for turn in sample.turns}):
        yield "the same question twice in one conversation"


def _of_text(sample: Sample, collate: Collator) -> Iterator[str]:
    texts = [sample.system, *(text for turn in sample.turns for text in (turn.prompt, turn.answer))]
    if any("\N{REPLACEMENT CHARACTER}" in text for text in texts):
        yield "replacement characters: the text was read in a wrong encoding once"
    if any(unicodedata.category(c) == "Cc" and c not in "\n\t" for text in texts for c in text):
        yield "control characters in the text"
    if any(MARKUP.search(text.replace(IMAGE_TAG, "")) for text in texts):
        yield "markup in the text (<...>)"
    if any(IMAGE_TAG in turn.answer for turn in sample.turns):
        yield f"{IMAGE_TAG} in an answer: it is learnt as text"


def _of_images(sample: Sample, collate: Collator) -> Iterator[str]:
    for image in sample.images:
        height, width = image.shape[:2]
        if max(height, width) > FLAT * min(height, width):
            yield f"an image more than {FLAT:g} times as long as wide: it is squeezed, or most of it is cut off"
        between = int(image.max()) - int(image.min())
        if not between:
            yield "an image of one colour"
        elif between < DARK * 255:
            yield (
                f"an image that uses under {DARK:.0%} of its value range; where its file has 12 bits in 16, "
                "data.image_range=[0,4095] shows it"
            )
    if sample.images and collate.resize is None:
        yield "images, and this composition reads none"


# -- what the model sees ---------------------------------------------------------------------------------------------


def _rows(samples: Sequence[tuple[int, Sample]], collate: Collator) -> list[Row]:
    """One micro-batch as the collator builds it, row by row."""
    batch = collate([replace(sample, id=str(k)) for k, (_, sample) in enumerate(samples)])
    piece = _piece_maker(collate)
    pictures = iter(batch.pixels)
    rows = []
    for r, names in enumerate(batch.sample_ids):
        shown = []
        for segment, number in enumerate(names):
            index, sample = samples[int(number)]
            count = len(sample.images) if collate.resize is not None else 0
            pngs = [_picture(next(pictures), image.shape) for image in sample.images[:count]]
            shown.append(_shown(batch, r, segment, f"#{index} {sample.id}", pngs, piece))
        rows.append(Row(shown, int((~batch.layout.valid[r]).sum())))
    return rows


def _picture(pixels: torch.Tensor, before: Sequence[int]) -> tuple[str, str]:
    """(3, H, W) uint8 as a PNG in base64, and its sizes."""
    height, width = pixels.shape[1:]
    return png_base64(pixels.permute(1, 2, 0).numpy()), f"{before[1]} x {before[0]}, here {width} x {height}"


def _shown(
    batch: Batch, r: int, segment: int, name: str, images: list[tuple[str, str]], piece: Callable[..., Piece]
) -> Shown:
    layout = batch.layout
    here = (layout.segment[r] == segment).nonzero()[:, 0]
    visual = layout.kind[r, here] == Kind.VISUAL
    labels = batch.labels[r, here] != -100
    pieces = list(_pieces(batch, r, here.tolist(), piece))
    counts = {
        "tokens": len(here),
        "supervised": int(labels.sum()),
        "images": len(images),
        "visual tokens": int(visual.sum()),
    }
    return Shown(name, images, min(batch.pixels.shape[2:]) >= SHOWN_SIDE, pieces, counts)


def _pieces(batch: Batch, r: int, places: Sequence[int], piece: Callable[..., Piece]) -> Iterator[Piece]:
    """Every token; an image's visual tokens and the soft prompts as one piece each, and where a tree's questions begin.

    An image that takes no position is shown before the token that it is before, or after the last.
    """
    layout = batch.layout
    standing = _standing(batch, r, int(layout.segment[r, places[0]])) if places else []
    first = min((int(layout.image[r, p]) for p in places if layout.image[r, p] >= 0), default=0)
    k, before = 0, -1
    while k < len(places):
        while standing and standing[0][0] <= places[k]:
            yield standing.pop(0)[1]
        if (branch := int(layout.branch[r, places[k]])) != before:
            before = branch
            yield Piece("pad", f"question {branch + 1}", False, "it sees nothing of the other questions")
        p, image, token = places[k], int(layout.image[r, places[k]]), int(batch.input_ids[r, places[k]])
        length = 1
        if image >= 0 or token < 0:
            same = layout.image[r] == image if image >= 0 else batch.input_ids[r] < 0
            while k + length < len(places) and bool(same[places[k + length]]):
                length += 1
            name = f"image {image - first + 1}" if image >= 0 else "soft prompt"
            yield Piece("image" if image >= 0 else "system", f"{name} \N{MULTIPLICATION SIGN} {length}", False, name)
        else:
            yield piece(token, Role(int(layout.role[r, p])).name.lower(), bool(batch.labels[r, p] != -100))
        k += length
    yield from (marker for _, marker in standing)


def _standing(batch: Batch, r: int, segment: int) -> list[tuple[int, Piece]]:
    """Place and marker of the images of a sample that take no position in the sequence."""
    table = batch.images
    own = ((table.row == r) & (table.segment == segment)).nonzero()[:, 0].tolist()
    found = [(int(table.place[i]), k) for k, i in enumerate(own) if not int(table.tokens[i])]
    return [
        (place, Piece("image", f"image {k + 1} is here", False, f"image {k + 1}: no position in the sequence"))
        for place, k in sorted(found)
    ]


def _piece_maker(collate: Collator) -> Callable[[int, str, bool], Piece]:
    tokenizer: Any = collate.encoder.tokenizer

    def make(token: int, role: str, supervised: bool) -> Piece:
        text = str(tokenizer.decode([token]))
        written = str(tokenizer.convert_ids_to_tokens(token))
        if "\N{REPLACEMENT CHARACTER}" in text:  # a part of a character
            text = written
        elif written.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" "):
            text = " " + text  # SentencePiece drops the blank of a single token
        return Piece(role, visible(text), supervised, f"{token}")

    return make


# -- showing it ------------------------------------------------------------------------------------------------------


def write_page(found: Inspection, path: Path) -> Path:
    """Write one self-contained HTML page: no script, no outside resource, every text escaped by the template engine."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlmlab.inspect", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(
        title=visible(found.title), found=found, problems=list(_named(found)), broken=_broken(found)
    )
    check_place(path, "out")
    write_atomic(path, page)
    return path


def _broken(found: Inspection) -> list[tuple[str, str]]:
    """What training cannot use: one line a reason, with how many samples it is true of and the first of them."""
    groups = grouped([Skipped(name, why) for name, why in found.broken.items()])
    return [(g.first if g.count == 1 else f"{g.count} samples, the first {g.first}", g.reason) for g in groups]


def _named(found: Inspection) -> Iterator[tuple[str, str]]:
    """What is wrong, and with which samples."""
    for problem, names in found.problems.items():
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        yield problem, f"{len(names)} of {found.checked}: {', '.join(names[:MOST_NAMED])}{more}" if names else ""


STYLES = {"system": "dim", "user": "blue", "answer": "green", "image": "magenta", "pad": "dim"}


def print_report(found: Inspection) -> None:
    """The same for a terminal: colours where it has them, and the roles in words."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
    console.print(Text(visible(found.title), style="bold"))
    width = max(len(name) for name, _ in found.facts)
    for name, value in found.facts:
        console.print(Text(f"  {name:<{width}}  {visible(value)}"))
    for r, row in enumerate(found.rows):
        for shown in row.samples:
            counts = ", ".join(f"{number} {what}" for what, number in shown.counts.items())
            console.print(Text(f"\nrow {r + 1}  {visible(shown.name)}  ({counts})", style="bold"))
            console.print(_line(shown.pieces, Text()))
        if row.padding:
            console.print(Text(f"[pad] {row.padding} positions", style=STYLES["pad"]))
    console.print(Text(f"\nlooked through {found.checked} samples", style="bold"))
    for name, why in _broken(found):
        console.print(Text(f"  broken  {visible(name)}: {visible(why)}", style="red"))
    for problem, where in _named(found):
        console.print(Text(f"  note    {visible(problem)}{f' ({visible(where)})' if where else ''}", style="yellow"))
    if not found.broken and not found.problems:
        console.print(Text("  nothing is wrong with them", style="green"))


def _line(pieces: Sequence[Piece], line: Any) -> Any:
    """The tokens one after the other; where the role changes, its name is written, starred where it is supervised."""
    before: tuple[str, bool] | None = None
    for piece in pieces:
        if (piece.role, piece.supervised) != before:
            before = (piece.role, piece.supervised)
            line.append(f"[{piece.role}{'*' if piece.supervised else ''}] ", style="reverse " + STYLES[piece.role])
        line.append(piece.text, style=STYLES[piece.role] + (" underline" if piece.supervised else ""))
    return line
