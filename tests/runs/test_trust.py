"""A run folder of somebody else's: nothing in it is executed, and nothing is written outside it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from tests.test_conf import composed

import vlmlab
from vlmlab.analyse.results import read_run
from vlmlab.cli.curate import curate_command
from vlmlab.cli.entry import ConfigError
from vlmlab.cli.evaluate import evaluate_command
from vlmlab.cli.export import export_command
from vlmlab.cli.finished import trusted
from vlmlab.contracts.errors import CheckpointError, UserError
from vlmlab.runs.config import plain
from vlmlab.runs.files import append, refuse_links, replacing, write_json
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.origin import find_origin
from vlmlab.runs.trust import NOT_BUILT, is_ours, named, saved_config, source_of
from vlmlab.runs.withheld import marks, stored

CALLABLES: dict[str, dict[str, Any]] = {
    "torch.load": {"f": "{evil}", "weights_only": False},
    "pathlib.Path.touch": {"_args_": [{"_target_": "pathlib.Path", "_args_": ["{mark}"]}]},
    "shutil.copy": {"src": "{evil}", "dst": "{mark}"},
    "os.system": {"command": "touch {mark}"},
    "subprocess.run": {"args": ["touch", "{mark}"]},
    "builtins.eval": {"_args_": ["open('{mark}', 'w')"]},
    "builtins.exec": {"_args_": ["open('{mark}', 'w')"]},
    "builtins.open": {"file": "{mark}", "mode": "w"},
    "importlib.import_module": {"name": "antigravity"},
    "pickle.loads": {"_args_": ["cos\nsystem\n(S'touch {mark}'\ntR."]},
    "shutil.rmtree": {"path": "{victim}"},
    "numpy.load": {"file": "{evil}", "allow_pickle": True},
    "hydra.utils.instantiate": {"config": {"_target_": "os.system", "command": "touch {mark}"}},
    "runpy.run_path": {"path_name": "{script}"},
}
ROUNDABOUT = (
    "vlmlab.runs.environment.subprocess.run",
    "vlmlab.data.readers.parquet.importlib.import_module",
    "vlmlab.runs.files.os.replace",
    "vlmlab.runs.files.write_atomic",
    "vlmlab.cli.main.main",
    "vlmlab.loading.load",
    "vlmlab.export.export",
    "vlmlab.engine.stage.StageModule.load_from_checkpoint",
    "vlmlab.engine.weights.replace_durably",
    "vlmlab.lm.hf.HfLanguageModel.__init__",
    "vlmlab.encoder.tower.instantiate",
    "vlmlab.data.skipped.note",
    "hydra.utils.get_method",
    "hydra.utils.get_class",
    "vlmlab",
    "vlmlab.lm",
    "vlmlab./tmp/evil.Class",
    "vlmlab..lm.hf.HfLanguageModel",
    "vlmlab.lm.hf.HfLanguageModel ",
    "",
)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return plain(composed("recipe=joint", "trainer.accelerator=cpu"))


@pytest.fixture
def place(tmp_path: Path, config: dict[str, Any]) -> Path:
    """A finished run, and beside it what must stay as it is."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "kept").write_text("kept")
    (tmp_path / "evil").write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/mark'\ntR.".encode())
    (tmp_path / "script.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    lay_down(tmp_path / "run", config)
    return tmp_path


def lay_down(run: Path, config: dict[str, Any]) -> Path:
    (run / "stages" / "0_joint").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_json(run / "result.json", {"format": 1, "metrics": {"world_test/vqa_accuracy": 0.5}, "cost": {}})
    return run


def outside(place: Path) -> list[tuple[str, bytes]]:
    files = (path for path in place.rglob("*") if path.is_file() and not path.is_relative_to(place / "run"))
    return sorted((str(path), path.read_bytes()) for path in files)


def filled(value: Any, place: Path) -> Any:
    text = json.dumps(value)
    for name, path in {"mark": "mark", "evil": "evil", "victim": "victim", "script": "script.py"}.items():
        text = text.replace("{" + name + "}", str(place / path))
    return json.loads(text)


def planted(config: dict[str, Any], call: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configuration with a call in every place that something is made from."""
    places = {
        "lm": lambda c: c.__setitem__("lm", call),
        "connector": lambda c: c.__setitem__("connector", {**call, "_partial_": True}),
        "fusion.inner": lambda c: c["fusion"].__setitem__("inner", {"deep": [0, {"x": call}]}),
        "encoder.encoders.1": lambda c: c["encoder"].__setitem__("encoders", [dict(c["encoder"]), call]),
        "recipe.stages.joint.module": lambda c: c["recipe"]["stages"]["joint"].__setitem__("module", call["_target_"]),
        "recipe.stages.joint.adapter": lambda c: c["recipe"]["stages"]["joint"].__setitem__("adapter", call),
        "recipe.finish": lambda c: c["recipe"].__setitem__("finish", call),
        "data.benchmarks.world_test.source": lambda c: c["data"]["benchmarks"]["world_test"].__setitem__(
            "source", call
        ),
        "data.benchmarks.world_test.metrics.0": lambda c: c["data"]["benchmarks"]["world_test"].__setitem__(
            "metrics", [call]
        ),
    }
    for key, put in places.items():
        changed = copy.deepcopy(config)
        put(changed)
        yield key, changed


def asked(run: Path) -> Iterator[tuple[str, Any]]:
    """Whatever reads a run that is there."""
    evaluation = OmegaConf.create(
        {"run": str(run), "benchmarks": None, "limit": 1, "batch_size": None, "share_images": None, "device": "cpu"}
    )
    yield "load", lambda: vlmlab.load(run)
    yield "evaluate", lambda: evaluate_command(OmegaConf.merge(evaluation, {"trust": False}))
    to = {"run": str(run), "to": str(run / "exported"), "trust": False, "form": "auto", "hub": None}
    yield "export", lambda: export_command(OmegaConf.create(to))
    scored = {"source": "short", "n": 1, "against": 1, "write": False, "least": 0.0, "device": "cpu"}
    looked = {"run": str(run), "out": str(run / "scores.jsonl"), "trust": False, **scored}
    yield "curate", lambda: curate_command(OmegaConf.create(looked))


@pytest.mark.parametrize("target", CALLABLES)
def test_nothing_of_a_foreign_folder_is_executed(target: str, place: Path, config: dict[str, Any]) -> None:
    call, before = {"_target_": target, **filled(CALLABLES[target], place)}, outside(place)
    for key, changed in planted(config, call):
        foreign = [where for where, named_ in named(changed) if not is_ours(named_)]
        assert foreign and all(where.startswith(key) for where in foreign)
    run = lay_down(place / "run", changed)
    with pytest.raises(UserError, match="is not run; trust=true runs it") as caught:
        saved_config(run)
    assert key in str(caught.value) and target in str(caught.value) and len(str(caught.value)) <= 300
    for name, ask in asked(run):
        with pytest.raises(UserError, match="code from outside vlmlab"):
            ask()
        assert not (run / "exported").exists(), name
    assert read_run(run).done and outside(place) == before
    with pytest.raises(UserError, match=r"the stage joint of .*run is not finished"):
        find_origin(str(run))


def test_the_package_is_no_way_round(config: dict[str, Any], tmp_path: Path) -> None:
    assert not [target for target in (*ROUNDABOUT, None, 3, {"_target_": "x"}) if is_ours(target)]
    run = lay_down(tmp_path / "run", config | {"lm": {"_target_": ROUNDABOUT[0], "args": ["true"]}})
    with pytest.raises(UserError, match=r"lm\._target_=vlmlab\.runs\.environment\.subprocess\.run is code from"):
        vlmlab.load(run)


def test_all_that_the_conf_names_is_ours() -> None:
    conf = Path(__file__).parents[2] / "conf"
    files = [file for file in conf.rglob("*.yaml") if file.parent.name not in NOT_BUILT]
    targets = {target for file in files for _, target in named(OmegaConf.to_container(OmegaConf.load(file)))}
    assert len(targets) > 60 and not [target for target in targets if not is_ours(target)]
    assert source_of("vlmlab.lm.hf.HfLanguageModel") is not None


def test_trust_is_said_and_printed(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = lay_down(tmp_path / "run", config | {"lm": {"_target_": "my.module.Mine\x1b[2J"}})
    cfg = saved_config(run, trust=True)
    said = capsys.readouterr().err
    assert cfg.lm._target_.startswith("my.module.Mine") and "\x1b" not in said
    assert "trust=true" in said and "lm._target_=my.module.Mine" in said and str(run) in said
    with pytest.raises(ConfigError, match="trust=yes is not possible"):
        trusted(OmegaConf.create({"trust": "yes"}))


def test_a_saved_text_refers_to_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    ran: list[str] = []
    OmegaConf.register_new_resolver("evil", lambda word: ran.append(word) or word, replace=True)
    texts = ["${evil:x}", "a${oc.env:HOME}b", r"\${evil:y}", "${lm}", "${oc.decode:'${evil:z}'}", "${", "a\\", "$x"]
    (tmp_path / "run").mkdir()
    cfg = saved_config(lay_down(tmp_path / "run", config | {"logger": {"name": "none", "tags": texts}}))
    try:
        assert plain(cfg)["logger"]["tags"] == texts and not ran
    finally:
        OmegaConf.clear_resolver("evil")


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".hidden", "a\0b", "a\x1b[2J", "x" * 300, "a\\b"])
@pytest.mark.parametrize("key", ["data.benchmarks", "recipe.stages"])
def test_a_name_stays_in_the_folder(name: str, key: str, place: Path, config: dict[str, Any]) -> None:
    changed, before = copy.deepcopy(config), outside(place)
    node = changed[key.split(".")[0]][key.split(".")[1]]
    node[name] = node.pop(next(iter(node)))
    run = place / "run"
    (run / "config.yaml").write_text(json.dumps(changed))
    for _, ask in asked(run):
        with pytest.raises(CheckpointError, match=r"config\.yaml is damaged \(.* cannot name a") as caught:
            ask()
        assert len(str(caught.value)) <= 300 and str(caught.value).isprintable()
    assert outside(place) == before


def test_links_are_not_written_through(tmp_path: Path) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    run.mkdir()
    victim.write_text("kept")
    for name in ("result.json", "config.yaml", "state.json", "env.json", "metrics.jsonl", "log.txt", "lock"):
        (run / name).symlink_to(victim)
    write_json(run / "result.json", {})
    with replacing(run / "config.yaml") as file:
        file.write(b"{seed: 0, recipe: {stages: {}}}")
    with pytest.raises(OSError, match="symbolic link"):
        append(run / "metrics.jsonl", "row")
    with pytest.raises(OSError, match="symbolic link"), RunFolder(run) as opened:
        opened.open({"seed": 0, "recipe": {"stages": {}}})
    assert victim.read_text() == "kept" and not (run / "result.json").is_symlink()
    (run / f".env.json.{os.getpid()}.new").symlink_to(victim)
    write_json(run / "env.json", {})
    (run / "predictions").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(UserError, match="predictions is a link, and nothing is written through it"):
        refuse_links(run)
    assert victim.read_text() == "kept"


def test_values_of_the_environment_are_not_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECRET_PLACE", "/secret/place")
    monkeypatch.setenv("SOME_SEED", "7")
    cfg = OmegaConf.create(
        config
        | {
            "seed": "${oc.decode:${oc.env:SOME_SEED}}",
            "logger": {"name": "none", "entity": "${oc.env:SECRET_PLACE}", "project": "${.entity}/x"},
        }
    )
    known, written = plain(cfg), stored(cfg)
    assert known["logger"]["entity"] == "/secret/place" and known["seed"] == written["seed"] == 7
    assert written["logger"]["entity"] == "${oc.env:SECRET_PLACE}" and "/secret" not in json.dumps(written)
    with RunFolder(tmp_path) as run:
        run.open(known, written=written)
        run.finish({"a/b": 1.0}, {})
    assert not [path for path in tmp_path.iterdir() if b"/secret" in path.read_bytes()]
    assert RunFolder(tmp_path).holds(known) and RunFolder(tmp_path).differs(known).training == ()
    assert saved_config(tmp_path).logger.entity == "/secret/place" and capsys.readouterr().err == ""
    monkeypatch.setenv("SECRET_PLACE", "/elsewhere")
    assert saved_config(tmp_path).logger.entity == "${oc.env:SECRET_PLACE}"
    assert "logger.entity is ${oc.env:SECRET_PLACE}, and that is not set here" in capsys.readouterr().err
    assert saved_config(tmp_path, trust=True).logger.entity == "/elsewhere"
    assert len(marks(written, known)) == 2


def test_a_run_with_a_value_of_the_environment_is_the_same_and_with_another_is_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cfg = OmegaConf.create({"seed": 0, "lm": {"path": "${oc.env:TOWER}/lm"}, "recipe": {"stages": {"a": {}}}})
    monkeypatch.setenv("TOWER", "/one")
    for _ in range(2):
        with RunFolder(tmp_path) as run:
            assert run.open(plain(cfg), written=stored(cfg)) is None
            run.log({"stage": "a", "step": 1})
            (tmp_path / "stages" / "0_a").mkdir(parents=True, exist_ok=True)
            (tmp_path / "stages" / "0_a" / "last.ckpt").touch()
    monkeypatch.setenv("TOWER", "/two")
    with pytest.raises(UserError, match=r"lm\.path: \$\{oc\.env:TOWER\}/lm -> /two/lm"):
        RunFolder(tmp_path).open(plain(cfg), written=stored(cfg))
