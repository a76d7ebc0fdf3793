"""Runs and sweep cells that share features on disk end with the same bits, wherever the features came from."""

import json
from pathlib import Path

import pytest
from fake_lab import run
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from processes import run_and_die, run_ranks
from tests.tiny import CONF

from vlmlab.runs import places as places  # registers the resolvers
from vlmlab.runs.config import config_hash, plain
from vlmlab.runs.folder import RunFolder

STAGES = ("align", "instruct")
STEPS = 3
IMAGES = STEPS * 2  # of each stage; the two have different ones
SMALL = (
    "recipe=two_stage", "trainer.accelerator=cpu", "trainer.progress=false", "trainer.log_every=1",
    "trainer.save_every_s=0", f"budget.max_steps={STEPS}", *(f"recipe.stages.{name}.batch_size=2" for name in STAGES),
)  # fmt: skip


def config(folder, *overrides):
    """The embedded default, three steps of two samples a stage, with features in a folder."""
    GlobalHydra.instance().clear()
    cache = () if folder is None else ("cache=disk", f"cache.folder={folder}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*SMALL, *cache, *overrides])


def weights(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("stages/*/model.safetensors"))}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in RunFolder(folder).metrics() if "loss" in row]


def counts(folder: Path) -> dict[str, tuple[int, int]]:
    """Hits and misses of every stage that used the cache."""
    facts = {p.parent.name: json.loads(p.read_text()).get("cache") for p in sorted(folder.glob("stages/*/stage.json"))}
    return {name: (found["hits"], found["misses"]) for name, found in facts.items() if found}


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """A finished run, and the features it left."""
    folder = tmp_path_factory.mktemp("cold")
    run(config(folder / "features"), folder / "run")
    assert counts(folder / "run") == {"0_align": (0, IMAGES), "1_instruct": (0, IMAGES)}
    return folder


def test_a_warm_run_ends_with_the_same_bits_and_computes_nothing(tmp_path, cold):
    run(config(cold / "features"), tmp_path)
    assert weights(tmp_path) == weights(cold / "run") and len(weights(tmp_path)) == 2
    assert counts(tmp_path) == {"0_align": (IMAGES, 0), "1_instruct": (IMAGES, 0)}
    total = json.loads((tmp_path / "cost.json").read_text())["cache"]
    assert (total["hits"], total["misses"]) == (2 * IMAGES, 0)


def test_without_a_cache_the_losses_are_the_same_but_for_rounding(tmp_path, cold):
    run(config(None), tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(cold / "run"), rel=1e-4)
    assert counts(tmp_path) == {} and "cache" not in json.loads((tmp_path / "cost.json").read_text())


def test_another_cell_of_a_sweep_finds_the_features(tmp_path, cold):
    run(config(cold / "features", "connector=linear", "mask=causal"), tmp_path)
    assert counts(tmp_path) == {"0_align": (IMAGES, 0), "1_instruct": (IMAGES, 0)}
    assert weights(tmp_path) != weights(cold / "run")


@pytest.mark.parametrize("step", [1, 2, 4])
def test_killed_and_resumed_over_kept_features_ends_with_the_same_bits(tmp_path, cold, step):
    cfg = config(tmp_path / "features")
    run_and_die(cfg, tmp_path / "run", step)
    run(cfg, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(cold / "run")
    assert losses(tmp_path / "run") == losses(cold / "run")
    hits, misses = counts(tmp_path / "run")[f"{int(step > 2)}_{STAGES[step > 2]}"]
    assert hits and hits + misses < IMAGES + 1  # the step that was cut is replayed from what it had kept


def test_a_stage_that_trains_the_encoder_does_without(tmp_path, cold, capsys):
    """What it leaves is another encoder: later stages neither find the features of the first, nor those of its kin."""
    trained = "+recipe.stages.align.train.encoder=1e-3"
    for number in range(2):
        capsys.readouterr()
        run(config(cold / "features", trained), tmp_path / str(number))
        assert "feature cache: not used, the encoder trains" in capsys.readouterr().out
        hits = number * IMAGES
        assert counts(tmp_path / str(number)) == {"1_instruct": (hits, IMAGES - hits)}
    assert weights(tmp_path / "0") == weights(tmp_path / "1")
    run(config(None, trained), tmp_path / "none")
    assert losses(tmp_path / "0") == pytest.approx(losses(tmp_path / "none"), rel=1e-3)


def test_two_ranks_share_what_they_compute(tmp_path):
    for number in range(2):
        assert run_ranks(config(tmp_path / "features"), tmp_path / str(number)) == [0, 0]
        own = IMAGES // 2
        assert counts(tmp_path / str(number))["0_align"] == ((own, 0) if number else (0, own))
    assert weights(tmp_path / "0") == weights(tmp_path / "1") and len(weights(tmp_path / "0")) == 2


def test_where_features_lie_is_no_part_of_a_run_but_how_they_are_rounded_is():
    same = [config("a"), config("b", "cache.max_gb=1")]
    other = [config(None), config("a", "cache.dtype=bfloat16")]
    assert len({config_hash(plain(cfg)) for cfg in same}) == 1
    assert len({config_hash(plain(cfg)) for cfg in [*same, *other]}) == 3
