"""The cost command: ``vlmlab cost preset=... images=... tokens=...`` says what an answer costs. Nothing is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from vlmlab.analyse.text import plain_table, short_number
from vlmlab.cli.rules import admitted
from vlmlab.cli.rules.schema import Cost
from vlmlab.cli.verb import own_keys, run_cells, run_verb
from vlmlab.contracts.terminal import tell
from vlmlab.runs.files import check_place, write_json

if TYPE_CHECKING:
    from vlmlab.plan.inference import InferenceCost

Counted = tuple[Mapping[str, str], DictConfig, "InferenceCost"]
"""What tells a composition from the others of the table, itself, and its cost."""
PROMPT = ("images", "tokens", "answer")
Column = tuple[str, Callable[[Counted], str]]


def cost_command(cfg: DictConfig) -> None:
    """Print the cost of one composition, and write it where ``out`` says.

    Raises:
        ConfigError: the composition breaks a rule, or a key has a value it cannot have.
        UserError: the composition cannot be counted.
    """
    admitted(cfg, HydraConfig.get(), Cost)
    place = checked_place(cfg)
    found = counted([({}, cfg)])
    tell("\n".join(lines(found)))
    if place is not None:
        write_costs(place, found)


def checked_place(cfg: DictConfig) -> Path | None:
    """The file that ``out`` names.

    Raises:
        ConfigError: it cannot be written.
    """
    if cfg.out is None:
        return None
    check_place(Path(str(cfg.out)), "out")
    return Path(str(cfg.out))


def counted(cells: Sequence[tuple[Mapping[str, str], DictConfig]]) -> list[Counted]:
    """The costs of compositions; those that differ in the prompt alone are built once.

    Raises:
        UserError: one of them cannot be counted.
    """
    from vlmlab.plan.inference import inference_costs  # from here on torch

    own = own_keys("cost")
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for number, (_, cfg) in enumerate(cells):
        built = {str(key): value for key, value in cfg.items() if key not in own and key != "hydra"}
        same = next((numbers for other, numbers in groups if other == built), None)
        if same is None:
            groups.append((built, [number]))
        else:
            same.append(number)
    found: dict[int, Counted] = {}
    for _, numbers in groups:
        cfg = cells[numbers[0]][1]
        costs = inference_costs(cfg, [(int(cells[n][1].images), int(cells[n][1].tokens)) for n in numbers])
        found |= {n: (*cells[n], cost) for n, cost in zip(numbers, costs, strict=True)}
    return [found[number] for number in range(len(cells))]


def write_costs(place: Path, found: Sequence[Counted]) -> None:
    """All numbers as JSON: of one composition an object, of several a list."""
    from vlmlab.plan.inference import as_json

    own = [key for key in own_keys("cost") if key != "out"]
    written = [
        {"overrides": dict(swept), **{key: int(cfg[key]) for key in own}, **as_json(cost, int(cfg.answer))}
        for swept, cfg, cost in found
    ]
    write_json(place, written if any(swept for swept, _, _ in found) else written[0])
    tell(f"\n{place}")


def lines(found: Sequence[Counted]) -> list[str]:
    """The table; the last columns set every row against the first one of its prompt."""
    keys = list(dict.fromkeys(key for swept, _, _ in found for key in swept))
    columns = [*_sizes(keys), *_costs(), *(_shares(found) if len(found) > 1 else [])]
    rows = [[*(one[0].get(key, "") for key in keys), *(cell(one) for _, cell in columns)] for one in found]
    return plain_table([*keys, *(title for title, _ in columns)], rows, max(1, len(keys))) + _notes(found)


def _sizes(keys: Sequence[str]) -> list[Column]:
    """The prompt's, where they do not name the rows."""
    sizes = [
        ("images", lambda one: str(one[1].images)),
        ("tokens", lambda one: str(one[1].tokens)),
    ]
    return [column for column in sizes if column[0] not in keys]


def _costs() -> list[Column]:
    return [
        ("added\nparams", lambda one: short_number(one[2].added)),
        ("visual\ntokens", lambda one: str(one[2].visual_tokens)),
        ("prompt", lambda one: f"{one[2].reading.prompt:,}"),
        ("encoder\nGFLOP", lambda one: _giga(one[2].reading.vision)),
        ("fusing\nGFLOP", lambda one: _giga(one[2].reading.fusing)),
        ("LM, prompt\nGFLOP", lambda one: _giga(one[2].reading.prefill)),
        ("a token\nGFLOP", lambda one: _giga(one[2].reading.token)),
        ("answer\nGFLOP", lambda one: _giga(_answer(one))),
        ("cache\nMB", lambda one: _mega(one[2].reading.kept)),
        ("peak\nMB", lambda one: _mega(one[2].peak)),
    ]


def _shares(found: Sequence[Counted]) -> list[Column]:
    """Every row as a share of the first one that reads the same prompt."""

    def base(one: Counted) -> Counted:
        return next(other for other in found if _prompt(other) == _prompt(one))

    name = ",".join(value for key, value in found[0][0].items() if key not in PROMPT) or "row 1"
    return [
        (f"first token\nof {name}", lambda one: _share(one[2].reading.first, base(one)[2].reading.first)),
        (f"answer\nof {name}", lambda one: _share(_answer(one), _answer(base(one)))),
        (f"cache\nof {name}", lambda one: _share(one[2].reading.kept, base(one)[2].reading.kept)),
    ]


def _prompt(one: Counted) -> list[int]:
    return [int(one[1][key]) for key in PROMPT]


def _answer(one: Counted) -> int:
    return one[2].reading.answering(int(one[1].answer))


def _notes(found: Sequence[Counted]) -> list[str]:
    answers = sorted({int(cfg.answer) for _, cfg, _ in found})
    texts = " or ".join(str(n) for n in answers)
    return [
        "",
        f"answer: of {texts} tokens, with encoder and prompt; cache: keys and values of the prompt and what the fusion",
        "keeps of the images; peak: what is there at once beside the weights while the prompt is read",
    ]


def _giga(number: float) -> str:
    return f"{number / 1e9:,.4g}" if number < 1e12 else f"{number / 1e9:,.0f}"


def _mega(number: float) -> str:
    return f"{number / 1e6:,.3g}" if number < 1e8 else f"{number / 1e6:,.0f}"


def _share(number: float, base: float) -> str:
    return f"{number / base:.3f}" if base else "-"


if __name__ == "__main__":
    many = any(word in ("-m", "--multirun") for word in sys.argv[1:])
    sys.exit(run_cells("cost", sys.argv[1:]) if many else run_verb("cost", cost_command))
