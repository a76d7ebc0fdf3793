"""A model card: how the model is asked without dropping its mask, what it is made of, data, scores, cost, licences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class
from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import DictConfig

from vlmlab.analyse.answers import intervals_over_questions
from vlmlab.analyse.results import MetricKey
from vlmlab.contracts.errors import UserError
from vlmlab.encoder.embedded import EmbeddedEncoder
from vlmlab.encoder.embedded_text import EmbeddedPairText
from vlmlab.lm.embedded import EmbeddedLanguageModel
from vlmlab.published.export import ExportCheck, ExportRoute
from vlmlab.recipe.stage import Stage, parse
from vlmlab.runs.config import plain
from vlmlab.runs.files import write_atomic
from vlmlab.runs.folder import RunFolder
from vlmlab.towers.source import resolve

TEMPLATE = "card.md.jinja"
UNKNOWN = "unknown"
NONE = "no tower of others, its weights began here"
OURS = "apache-2.0"
SHIPPED = (EmbeddedEncoder, EmbeddedLanguageModel, EmbeddedPairText)
"""Towers that come with the package, under its licence."""

PARTS = ("encoder", "connector", "fusion", "lm", "mask", "adapter")
TOWERS = ("encoder", "lm", "text_tower")
HEAD = """\
from transformers import AutoModelForImageTextToText, AutoProcessor{cache}

folder = "."  # this folder, or its id on the hub
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder, backend="pil")


def read(conversation):
    return processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)


"""
PLAIN = """\
def ask(conversation, **options):
    prompt = read(conversation)
    out = model.generate(**prompt, **options)
    return processor.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
"""
ANSWERS = '''\
def answers(conversation, ids):
    """(B, S) bool: the tokens of earlier answers, the end of each included."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for k, message in enumerate(conversation):
        if message["role"] == "assistant":
            words = "".join(part["text"] for part in message["content"])
            start = read(conversation[:k])["input_ids"].shape[1]
            found[:, start : start + len(processor.tokenizer(words, add_special_tokens=False).input_ids) + 1] = True
    return found


'''
MASKED = """\


@torch.no_grad()
def ask(conversation, **options):
    prompt = read(conversation)
    ids, cache = prompt["input_ids"], DynamicCache()
    mask = sees(ids, {answers})[:, None]
    model(**{{**prompt, "attention_mask": mask}}, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.crop(-1)  # generate reads the last token again, which sees all before it
    out = model.generate(input_ids=ids, attention_mask=prompt["attention_mask"], past_key_values=cache, **options)
    return processor.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
"""
TAIL = """

question = [
    {"type": "image", "path": "picture.png"},
    {"type": "text", "text": "What is in the picture?"},
]
print(ask([{"role": "user", "content": question}], max_new_tokens=64))
"""


def write_card(
    folder: Path, run: Path | None, cfg: DictConfig, route: ExportRoute | None, proof: ExportCheck | None, why: str = ""
) -> Path:
    """Write ``README.md``.

    Args:
        folder: where the model is.
        run: the run, for its scores and cost; None: it has none.
        cfg: its configuration.
        route: how it was exported; None: as a run.
        proof: how equal it is.
        why: the reason why it is a run.
    """
    config = plain(cfg)
    result = (None if run is None else RunFolder(run).result()) or {}
    licences = list(_licences(config))
    known = {what for _, what in licences} - {NONE}
    page = Environment(
        loader=PackageLoader("vlmlab", "published"), undefined=StrictUndefined, keep_trailing_newline=True,
        lstrip_blocks=False, trim_blocks=False,
    ).get_template(TEMPLATE)  # fmt: skip
    text = page.render(
        route=route,
        proof=proof,
        turns=proof is None or proof.turns,
        halves=proof is not None and proof.halves,
        dtype=None if proof is None else proof.dtype,
        why=why,
        name=config.get("name") or (folder if run is None else run).resolve().name,
        mask=_choice(_of_last(config)),
        snippet=None if route is None else snippet(route),
        versions=_versions(),
        licence=next(iter(known)) if len(known) == 1 and known != {UNKNOWN} else UNKNOWN,
        parts=list(_parts(config)),
        stages=[_stage(stage, config) for stage in parse(cfg) if stage.train],
        data=list(_data(config, parse(cfg))),
        seed=config["seed"],
        deviates=(config.get("preset") or {}).get("deviates"),
        scores=[] if run is None else list(_scores(run, result.get("metrics") or {}, config)),
        cost=sorted((result.get("cost") or {}).items()),
        licences=licences,
    )
    write_atomic(folder / "README.md", text)
    return folder / "README.md"


def snippet(route: ExportRoute) -> str:
    """The code that asks the model."""
    if route.sees is None:
        return (HEAD.format(cache="") + PLAIN + TAIL).rstrip()
    known = "answers(conversation, ids)" if route.many else "torch.zeros_like(ids, dtype=torch.bool)"
    head = "import torch\n" + HEAD.format(cache=", DynamicCache")
    return (head + (ANSWERS if route.many else "") + route.sees + MASKED.format(answers=known) + TAIL).rstrip()


def _of_last(config: Mapping[str, Any]) -> Any:
    """The mask that the last stage was trained with."""
    stages = (config["recipe"].get("stages") or {}).values()
    return next((stage["mask"] for stage in reversed(list(stages)) if stage.get("mask")), config["mask"])


def _choice(node: Any) -> str:
    """A plug-in by the name of its choice, which is its file's."""
    target = (node or {}).get("_target_")
    return "none" if target is None else str(target).split(".")[-2]


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for part in PARTS:
        node = config.get(part)
        if isinstance(node, Mapping):
            said = {k: _place(v) for k, v in node.items() if not isinstance(v, Mapping | list) and k != "_target_"}
            known = ", ".join(f"{key} {value}" for key, value in said.items() if value is not None)
            yield part, f"`{_choice(node)}`" + (f": {known}" if known else "")


def _place(value: Any) -> Any:
    """A path without the folders of the machine it was on; hub ids stay."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _stage(stage: Stage, config: Mapping[str, Any]) -> list[str]:
    rates = ", ".join(f"{part} {rate:g}" for part, rate in stage.rates.items())
    nodes = [stage.objective] if "_target_" in stage.objective else list(stage.objective.values())
    objective = " + ".join(_choice(node) for node in nodes)
    adapter = stage.adapter if stage.adapter is not None else config.get("adapter")
    mask = stage.mask or config["mask"]
    steps = f"{stage.steps} x {stage.batch_size}"
    return [stage.name, f"`{stage.data}`", steps, rates or "-", objective, _choice(mask), _choice(adapter)]


def _data(config: Mapping[str, Any], stages: list[Stage]) -> Iterator[tuple[str, str]]:
    sources = (config.get("data") or {}).get("train") or {}
    for key in dict.fromkeys(stage.data for stage in stages if stage.train):
        node = sources.get(key)
        if not isinstance(node, Mapping):
            continue
        said = {k: _place(v) for k, v in node.items() if isinstance(v, str | int | float) and k != "_target_"}
        inside = ", ".join(f"{name} {value}" for name, value in said.items())
        yield key, f"{str(node.get('_target_', '')).rpartition('.')[2] or 'a mixture'} ({inside})"


def _scores(run: Path, metrics: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[list[str]]:
    intervals = intervals_over_questions(run, metrics, config)
    for name, value in metrics.items():
        key = MetricKey.parse(name)
        if key.baseline or key.kind or "/" in key.score or key.score in ("chance", "normalised"):
            continue
        beside = [metrics.get(f"{name}/{other}") for other in ("shuffled", "no_image")]
        items = metrics.get(f"{name}/count")
        interval = intervals[name].ends if name in intervals else "-"
        shown = [f"{one:.3f}" if isinstance(one, float) else "-" for one in (value, *beside)]
        count = "-" if items is None else str(int(items))
        yield [key.benchmark, key.score, shown[0], interval, *shown[1:], count]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", "torch")}


def _licences(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every tower's, as its own card says it."""
    for part in TOWERS:
        node = config.get(part)
        if not isinstance(node, Mapping) or not node.get("_target_"):
            continue
        several = node.get("encoders")
        for index, one in enumerate(several if isinstance(several, list) else [node]):
            yield f"{part} {index}" if several else part, _licence(one)


def _licence(node: Mapping[str, Any]) -> str:
    path = node.get("path")
    if path is None:
        return OURS if issubclass(get_class(str(node["_target_"])), SHIPPED) else NONE
    try:
        card = resolve(str(path), "path", weights=False) / "README.md"
    except UserError:
        return UNKNOWN
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---\n"):
        return UNKNOWN
    try:
        facts = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return UNKNOWN
    found = facts.get("license") if isinstance(facts, dict) else None
    return str(found) if found else UNKNOWN
