"""Every key of every file has a type, and what nothing reads or no key can be is refused by one sentence."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from asking import ask_words
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError
from vlmlab.cli.rules import admitted, choices_of
from vlmlab.cli.rules.constructors import constructor
from vlmlab.cli.rules.values import GIVEN, HYDRA, wrong_values
from vlmlab.cli.rules.words import MEANT
from vlmlab.cli.train import train_command
from vlmlab.contracts.values import refusal
from vlmlab.runs import places as places  # registers the resolvers
from vlmlab.runs.config import plain

ROOT = Path(__file__).resolve().parents[2]
LINES = ROOT.parent / "shared" / "cases" / "wrong_commands.tsv"
NAN, INF = float("nan"), float("inf")
ANYTHING: list[Any] = [-1, 0, 1.5, NAN, INF, -INF, "x", "", [], {}, {"a": NAN}, None, True, "y" * 500, 10**40]
FILES = [path for path in sorted(conf_folder().glob("*/*.yaml")) if path.parent.name != "hydra"]


def parts(node: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, dict) and "_target_" in node:
        yield where, node
    for key, value in inner:
        yield from parts(value, f"{where}.{key}")


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_key_of_a_file_has_a_type_that_refuses_by_its_name(file: Path) -> None:
    for where, node in parts(OmegaConf.to_container(OmegaConf.load(file)), file.parent.name):
        takes = constructor(str(node["_target_"]))
        assert not takes.open, f"{where} takes anything"
        for key in set(node) - {"_target_", "defaults"}:
            name, kind = f"{where}.{key}", {**takes.types, **HYDRA}[key]
            said = [refusal(kind, value, name) for value in ANYTHING]
            refused = [sentence for sentence in said if sentence is not None]
            assert len(refused) >= 5, f"{name} may be nearly anything; give its argument a type"
            assert all(sentence.startswith(name) and len(sentence) <= 300 for sentence in refused)
            assert all(refusal(kind, value, name) is not None for value in (NAN, INF)), name


def composed(*words: str) -> tuple[DictConfig, dict[str, Any]]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", list(words), return_hydra_config=True)
    job = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    OmegaConf.set_struct(job, False)
    return job, choices_of(cfg.hydra)


@pytest.fixture(scope="module")
def base() -> tuple[DictConfig, dict[str, Any]]:
    choices = ("recipe=joint", "connector=bliva", "adapter=lora", "fusion=gated_xattn", "logger=wandb", "cache=disk")
    return composed(*choices, "lm=llama3_2_1b", "encoder=clip_vit_b32")


def first(base: tuple[DictConfig, dict[str, Any]], changes: Mapping[str, Any], overrides: Any = ()) -> str | None:
    cfg = copy.deepcopy(base[0])
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    found = wrong_values(cfg, plain(cfg), base[1] | {"_overrides": list(overrides)})
    return next(found, None)


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (("data=llava", "data.path=."), ("data.max_bad_fraction", "data.train", "data.screen", "data.tags")),
        (
            ("data=slake", "data.path=.", "data.images=."),
            ("data.languages", "data.val.instruct", "data.benchmarks.slake_test"),
        ),
        ((), ("trainer", "data", "recipe", "objective._target_", "data.val.short", "data.benchmarks", "lm")),
    ],
)
def test_null_in_place_of_what_is_needed_is_refused_by_its_key(words: tuple[str, ...], keys: tuple[str, ...]) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", list(words), return_hydra_config=True)
    for key in keys:
        job = OmegaConf.masked_copy(cfg, [name for name in cfg if name != "hydra"])
        OmegaConf.set_struct(job, False)
        OmegaConf.update(job, key, None, merge=False)
        with pytest.raises(ConfigError) as caught:
            admitted(job, cfg.hydra)
        told = str(caught.value)
        assert told.startswith(f"{key}=null is no") and len(told) <= 300, told


def test_what_is_shipped_passes(base: tuple[DictConfig, dict[str, Any]]) -> None:
    assert first(base, {}) is None


STAGE = "recipe.stages.joint"
WRONG: list[tuple[str, Any]] = [
    *(("seed", value) for value in (-1, 1.5, 2**32, True, None, "x", [], {}, NAN, INF)),
    *(("fresh", value) for value in (1, "yes", None, [])),
    *(("name", value) for value in (True, 1.5, [], {}, "", 0)),
    *(("collate.max_length", value) for value in (0, -1, 2.5, None, "long", True, 10**40)),
    ("collate.pack_length", 0),
    ("collate.questions", "forest"),
    *(("evaluation.baselines", value) for value in ("shuffled", ["blind"], [3], None, {})),
    *(("evaluation.held_out", value) for value in ("x", [1], None)),
    *(("evaluation.held_out_samples", value) for value in (0, -1, None)),
    ("evaluation.probe", "often"),
    *(("evaluation.patience", value) for value in (0, 1.5, "3")),
    ("evaluation.mode", "lowest"),
    ("evaluation.max_share", 1.5),
    ("evaluation.min_delta", -0.1),
    ("callbacks.mine", {"a": 1}),
    ("logger.x_axis", "epoch"),
    ("logger.mode", "shared"),
    *((f"trainer.{key}", value) for key in ("threads", "log_every") for value in (0, 1.5, 10**10, [3], None, NAN)),
    *(("trainer.devices", value) for value in (0, -2, "all", 1.5, [1], None)),
    *(("trainer.accelerator", value) for value in ("tpu", 3, None, [])),
    *(("trainer.strategy", value) for value in ("dpp", None, True)),
    *(("trainer.gradient_clip", value) for value in (0, -1, True, NAN, "x")),
    *(("trainer.save_every_s", value) for value in (-1, NAN, INF, "x", None)),
    *(("trainer.progress", value) for value in (3, "yes", None)),
    *(("trainer.workers", value) for value in (-1, 1.5, "x", None)),
    *(("budget.steps_scale", value) for value in (0, -1, NAN, INF, None, "x", True)),
    *(("budget.max_steps", value) for value in (0, 1.5, "ten", True)),
    *(("debug.steps", value) for value in (0, "x", 1.5)),
    *(("debug.overfit", value) for value in (-1, "x", None)),
    ("debug.profile", 1),
    *(("precision.name", value) for value in ("fp8", 16, None)),
    *(("logger.name", value) for value in ("neptune", None)),
    ("logger.tags", "one"),
    ("logger.project", 3),
    *(("cache.max_gb", value) for value in (0, "much", INF)),
    ("cache.dtype", "float16"),
    *(("cache.folder", value) for value in (None, "", 3)),
    *(("connector.queries", value) for value in (0, -5, "x", 1.5, None)),
    *(("connector.layers", value) for value in (0, 10**6, [1])),
    *(("connector.dropout", value) for value in (-0.1, 1, NAN, "x")),
    ("connector.in_width", 3),
    ("connector.instruction", 1),
    *(("encoder.layers", value) for value in (3, "x", [], ["a"], [1.5])),
    *(("encoder.image_size", value) for value in (0, "x", [1], [1, 2, 3], True)),
    ("encoder.dtype", "int8"),
    ("encoder.path", 3),
    ("encoder.architecture.vision_config.hidden_size", "x"),
    ("lm.architecture.rms_norm_eps", NAN),
    ("lm.architecture", []),
    ("lm.chat_template", 3),
    *(("adapter.r", value) for value in (0, -1, "x", 2.5)),
    *(("adapter.lr", value) for value in (-1, INF, "x")),
    ("adapter.parts", ["pair"]),
    ("adapter.targets", 3),
    ("adapter.targets", []),
    ("adapter.parts", []),
    *(("fusion.every", value) for value in (0, "two")),
    ("fusion.norm", "batch"),
    ("fusion.sees", "latest"),
    ("objective.weight", -1),
    *(("data.train.instruct.size", value) for value in (0, -1, "x", 1.5, None)),
    ("data.train.instruct.split", "dev"),
    ("data.train.instruct", 3),
    ("data.benchmarks.world_test.max_new_tokens", 0),
    ("data.benchmarks.world_test.metrics", []),
    ("data.benchmarks.world_test.source.kinds", ["colour"]),
    *(("recipe.stages", value) for value in (3, [], {}, None, "x")),
    (STAGE, 3),
    *((f"{STAGE}.objective", value) for value in ({"text": "lm"}, 3)),
    (f"{STAGE}.module", "vlmlab.model.vlm.VLM"),
    ("encoder", {}),
    ("encoder", {"_target_": "vlmlab.encoder.multi.MultiEncoder", "encoders": []}),
    ("data.train.instruct", None),
    ("mask", {"_target_": "vlmlab.connector.mlp.MlpConnector"}),
    ("connector", {"_target_": "math.pi"}),
    ("lm._target_", "no.such.Class"),
    ("connector._partial_", True),
    ("connector._recursive_", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{key}={str(value)[:20]}" for key, value in WRONG])
def test_a_wrong_value_is_refused(base: tuple[DictConfig, dict[str, Any]], key: str, value: Any) -> None:
    said = first(base, {key: value})
    assert said is not None and key in said and len(said) <= 300


@pytest.mark.parametrize("key", ["seed", "trainer.threads", "data.train", "recipe", "lm.path", "collate", "budget"])
def test_a_key_that_is_needed_cannot_be_taken_out(base: tuple[DictConfig, dict[str, Any]], key: str) -> None:
    cfg = copy.deepcopy(base[0])
    above, _, last = key.rpartition(".")
    (OmegaConf.select(cfg, above) if above else cfg).pop(last)
    assert key in str(next(wrong_values(cfg, plain(cfg), base[1])))


UNREAD = {
    "lr": "recipe.stages.<stage>.train.<part>",
    "learning_rate": "recipe.stages.<stage>.train.<part>",
    "epochs": "budget.max_steps",
    "num_train_epochs": "budget.max_steps",
    "batch_size": "recipe.stages.<stage>.batch_size",
    "per_device_train_batch_size": "recipe.stages.<stage>.batch_size",
    "max_steps": "budget.max_steps",
    "num_nodes": "trainer.nodes",
    "gpus": "trainer.devices",
    "bf16": "precision=bf16",
    "gradient_accumulation_steps": "recipe.stages.<stage>.accumulate",
    "wandb": "logger=wandb",
    "output_dir": "name=",
    "trainer.max_epochs": "budget.max_steps",
    "trainer.num_nodes": "trainer.nodes",
    "trainer.load_best_model_at_end": "evaluation.load_best",
    "logger._target_": "logger",
    "trainer.thread": "trainer.threads",
    "conector.depth": "connector",
    "connector.foo": "connector",
    "data.pth": "data",
    "recipe.stagse": "recipe.stages",
    f"{STAGE}.lr": "recipe.stages.<stage>.train.<part>",
    f"{STAGE}.stepz": f"{STAGE}.steps",
    "evaluation.batchsize": "evaluation.batch_size",
    "data.benchmarks.world_test.max_tokens": "max_new_tokens",
}


@pytest.mark.parametrize("key", UNREAD)
def test_a_key_that_nothing_reads_is_refused_with_ours(base: tuple[DictConfig, dict[str, Any]], key: str) -> None:
    said = str(first(base, {key: 3}, [f"+{key}=3"]))
    assert key in said and UNREAD[key] in said and len(said) <= 300


def test_a_key_that_a_reference_reads_may_stand_anywhere(base: tuple[DictConfig, dict[str, Any]]) -> None:
    assert first(base, {"wide": 64, "connector.hidden": "${wide}"}) is None
    assert str(first(base, {"wide": "x", "connector.hidden": "${wide}"})).startswith("wide=x is not possible")


def test_words_without_effect(base: tuple[DictConfig, dict[str, Any]]) -> None:
    assert str(first(base, {}, ["seed=0", "seed=1"])).startswith("seed is given twice, as 0 and as 1")
    assert "changes nothing" in str(first(base, {}, ["mask={}"]))
    assert first(base, {}, ["seed=0", "seed=0", "~seed"]) is None


MINE = """
from collections.abc import Sequence
from typing import Annotated, Literal
from annotated_types import Ge

class Strict:
    def __init__(self, in_width, out_width, depth: Annotated[int, Ge(1)] = 2, kind: Literal["a", "b"] = "a"): ...

class Open:
    def __init__(self, in_width: int, out_width: int, depth: int = 2, **more): ...

def made(in_width, out_width, names: Sequence[str] = ()): ...

constant = 3
"""


def test_a_plug_in_of_ones_own_says_its_keys(
    base: tuple[DictConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_parts_of_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)

    def said(name: str, **keys: Any) -> str | None:
        words = [f"+connector.{key}={value}" for key, value in keys.items()]
        return first(base, {"connector": {"_target_": f"own_parts_of_mine.{name}", **keys}}, words)

    assert (
        said("Strict", depth=3, kind="b") is said("Open", depth=3, what_ever=[1]) is said("made", names=["a"]) is None
    )
    for wrong, words in (
        (said("Strict", depth=0), "connector.depth=0 is not possible; give a whole number of at least 1"),
        (said("Strict", kind="c"), "connector.kind=c is unknown; choose one of a, b"),
        (said("Strict", dept=3), "no key 'connector.dept' in the configuration (did you mean connector.depth?)"),
        (said("Open", depth="x"), "connector.depth=x is not possible; give a whole number"),
        (said("made", names="a"), "connector.names=a is not possible; give a list"),
        (said("constant"), "connector._target_=own_parts_of_mine.constant cannot be imported (it is a "),
        (said("Absent"), "connector._target_=own_parts_of_mine.Absent cannot be imported"),
    ):
        assert str(wrong).startswith(words)


def test_a_preset_made_for_another_choice_is_named() -> None:
    said = next(
        wrong_values(*(lambda cfg, choices: (cfg, plain(cfg), choices))(*composed("preset=blip2", "connector=mlp")))
    )
    assert "connector.text is not a key of connector=mlp and preset=blip2 sets it; add ~connector.text" in said


def test_what_other_tools_say_is_no_key_of_ours() -> None:
    cfg, _ = composed()
    assert not set(MEANT) & set(cfg) - {"wandb"} and all(len(ours) < 100 for ours in MEANT.values())
    assert all(key in constructor("vlmlab.connector.mlp.MlpConnector").types for key in GIVEN["connector"])


FILES_OF_LINES = {
    "afile": "",
    "empty.yaml": "",
    "tabs.yaml": "a:\n\tb: 1\n",
    "cd/connector/broken.yaml": "_target_: [\n",
    "cd/connector/dup.yaml": "_target_: vlmlab.connector.mlp.MlpConnector\ndepth: 1\ndepth: 2\n",
    "cd/connector/py.yaml": "_target_: !!python/name:os.getcwd\n",
    "cd/connector/notclass.yaml": "_target_: math.pi\n",
    "cd/connector/string.yaml": "just words\n",
    "cd/connector/empty.yaml": "",
    "cd/mask/lies.yaml": "# @package nowhere\n_target_: vlmlab.mask.bidir.Bidir\n",
}
"""Files that the lines name, below ``scratch/wrong_files``."""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "scratch" / "wrong_files"
    for name, text in FILES_OF_LINES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    (place / "dir").mkdir()
    (place / "img").mkdir()
    row = {"question_id": 1, "image": "a.png", "question": "q?", "answer": "a"}
    (place / "good.json").write_text(json.dumps([row]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(not LINES.is_file(), reason="the collected command lines are not beside this checkout")
def test_collected_command_lines_end_in_one_sentence(scratch: Path) -> None:
    """As a user types them; in this process, since starting one costs seconds and is the same for all."""
    rows = [row.split("\t", 1)[1] for row in LINES.read_text().splitlines() if row and not row.startswith("#")]
    before = sorted(scratch.rglob("*"))
    for row in rows:
        words = [*shlex.split(row), "budget=test", "budget.max_steps=1"]
        code, _, err, _ = ask_words("train", words, train_command)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (row, err)
        assert len(err) <= 308 and sorted(scratch.rglob("*")) == before, (row, err)
