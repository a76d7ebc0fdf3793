"""Files of a half-done run that are damaged: one sentence each, or training goes on and ends with the same weights."""

import shutil

import pytest
import torch
from fake_lab import config, run
from safetensors.torch import load_file, save_file

from vlmlab.contracts.errors import CheckpointError
from vlmlab.runs.folder import RunFolder
from vlmlab.train.resume import KINDS
from vlmlab.train.signals import Interrupted

DAMAGES = {"empty": b"", "binary": bytes(range(256)), "list": b"[1, 2]", "words": b"hello"}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Stopped in its second stage."""
    from vlmlab.engine.stage import StageModule
    from vlmlab.train.checkpoint import StageCheckpoint

    folder, real = tmp_path_factory.mktemp("half") / "run", StageCheckpoint.on_train_batch_end
    with pytest.MonkeyPatch.context() as patch:

        def stopping(self, trainer, module, *args):
            assert isinstance(module, StageModule)
            if (module.stage.name, module.done) == ("tune", 2):
                self.signals.caught = 15
            real(self, trainer, module, *args)

        patch.setattr(StageCheckpoint, "on_train_batch_end", stopping)
        with pytest.raises(Interrupted):
            run(config(), folder)
    assert (folder / "stages" / "1_tune" / "last.ckpt").is_file()
    return folder


@pytest.fixture(scope="module")
def whole(half, tmp_path_factory):
    folder = shutil.copytree(half, tmp_path_factory.mktemp("whole") / "run")
    return run(config(), folder), weights(folder)


def weights(folder):
    return [path.read_bytes() for path in sorted(folder.glob("stages/*/model.safetensors"))]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "state.json", "lock", "stages/0_align/stage.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_can_be_done_without_costs_nothing(name, damage, half, whole, tmp_path):
    folder = shutil.copytree(half, tmp_path / "run")
    (folder / name).write_bytes(DAMAGES[damage])
    assert run(config(), folder)["metrics"] == whole[0]["metrics"] and weights(folder) == whole[1]
    assert RunFolder(folder).finished()["seed"] == 3 and not list(folder.rglob("*.new"))


def test_a_configuration_cut_short_is_written_anew(half, whole, tmp_path):
    folder = shutil.copytree(half, tmp_path / "run")
    lines = (folder / "config.yaml").read_text().splitlines(keepends=True)
    (folder / "config.yaml").write_text("".join(lines[: len(lines) // 2]))
    assert RunFolder(folder).refuses(config()) is None
    assert run(config(), folder)["metrics"] == whole[0]["metrics"] and weights(folder) == whole[1]


@pytest.mark.parametrize("name", ["env.json", "stages/0_align/model.safetensors", "stages/1_tune/last.ckpt"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_is_named_with_what_to_delete(name, damage, half, whole, tmp_path):
    folder = shutil.copytree(half, tmp_path / "run")
    (folder / name).write_bytes(DAMAGES[damage])
    with pytest.raises(CheckpointError, match=f"{name}.* delete it") as caught:
        run(config(), folder)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)
    (folder / name).unlink()
    assert run(config(), folder)["metrics"] == whole[0]["metrics"] and weights(folder) == whole[1]


@pytest.mark.parametrize("key", [*KINDS, "step", "stage", "format"])
def test_a_crafted_checkpoint_is_refused(key, half, tmp_path):
    folder = shutil.copytree(half, tmp_path / "run")
    file = folder / "stages" / "1_tune" / "last.ckpt"
    saved = torch.load(file, weights_only=True)
    for wrong in (None, "x", [1], {"a": 1}, {0: {"b": [1]}}):
        others = {name: value for name, value in saved.items() if name != key}
        torch.save(others | ({} if wrong is None else {key: wrong}), file)
        if (key, wrong) in (("names", [1]), ("scaler", {"a": 1}), ("scaler", {0: {"b": [1]}})):
            continue  # of the right kind, and looked at in no other way
        with pytest.raises(CheckpointError, match=r"last\.ckpt") as caught:
            run(config(), folder)
        assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize("said", ["[]", "null", "{", '{"format": 1, "sources": []}', '{"format": 1, "begun": 3}'])
def test_weights_that_say_nothing_readable_are_refused(said, half, tmp_path):
    folder = shutil.copytree(half, tmp_path / "run")
    file = folder / "stages" / "0_align" / "model.safetensors"
    save_file(load_file(file), file, metadata={"vlmlab": said})
    with pytest.raises(CheckpointError, match=r"0_align/model\.safetensors.*train"):
        run(config(), folder)


def test_what_a_finished_stage_left_is_cleared(half, whole, tmp_path):
    folder = shutil.copytree(half, tmp_path / "run")
    left = [folder / "stages" / "0_align" / "last.ckpt", folder / "stages" / "initial.safetensors"]
    for file in left:  # killed between the stage's own file and what it makes superfluous
        file.write_bytes(b"superfluous")
    run(config(), folder)
    assert not any(file.exists() for file in left) and weights(folder) == whole[1]


def test_planted_links_are_not_written_through(half, tmp_path):
    victim, folder = tmp_path / "victim", shutil.copytree(half, tmp_path / "run")
    victim.mkdir()
    (victim / "file").write_text("kept")
    for name in ("cost.json", "result.json", "state.json", "report.html", "stages/1_tune/model.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "nowhere" if "safetensors" in name else victim / "file")
    run(config(), folder)
    assert (victim / "file").read_text() == "kept" and not (tmp_path / "nowhere").exists()
    linked = shutil.copytree(half, tmp_path / "linked")
    (linked / "metrics.jsonl").unlink()
    (linked / "metrics.jsonl").symlink_to(victim / "new")
    run(config(), linked)  # it is cut back, and so replaced, before anything is added to it
    shutil.rmtree(linked / "stages" / "1_tune")
    (linked / "stages" / "1_tune").symlink_to(victim, target_is_directory=True)
    with pytest.raises(Exception, match="1_tune is a link, and nothing is written through it"):
        run(config(), linked)
    assert [path.name for path in victim.iterdir()] == ["file"]
