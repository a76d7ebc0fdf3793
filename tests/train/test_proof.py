import re

import pytest
import torch
from fake_lab import FakeVLM, config, run
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmlab.contracts.errors import UserError
from vlmlab.engine import proof
from vlmlab.runs.folder import RunFolder


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 300), place=st.integers(0, 4799), bit=st.integers(0, 7),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]),
)  # fmt: skip
def test_every_flipped_bit_is_seen(size, place, bit, dtype):
    values = torch.arange(size).to(dtype)
    other = values.clone()
    octets = other.view(torch.uint8)
    octets[place % len(octets)] ^= 1 << bit
    assert proof.fingerprint(values) == proof.fingerprint(values.clone())
    assert proof.fingerprint(values) != proof.fingerprint(other)


def test_shapes_a_digest_could_stumble_over():
    values = torch.randn(20, 50)
    assert proof.fingerprint(values.T) == proof.fingerprint(values.T.contiguous())
    assert proof.fingerprint(torch.tensor(1.0)) != proof.fingerprint(torch.tensor(2.0))
    assert proof.fingerprint(torch.zeros(0)) == proof.fingerprint(torch.zeros(0))


def test_a_frozen_tensor_that_changes_fails_the_run(tmp_path):
    with pytest.raises(UserError, match=r"stage tune: frozen weights changed \(encoder\.0\.weight\)"):
        run(config(fake__drift=True, recipe__stages__align__steps=0), tmp_path)
    assert not (tmp_path / "stages" / "1_tune" / "model.safetensors").exists()


def test_a_tensor_that_never_has_a_gradient_fails_the_run(tmp_path):
    with pytest.raises(UserError, match=r"lm\.spare\.bias, lm\.spare\.weight should train and never had a gradient"):
        run(config(fake__unused=True), tmp_path)


def test_one_that_does_not_move_is_reported(tmp_path, capsys):
    run(config(recipe__stages__align__train={"connector": 0.0}), tmp_path)
    ends = [row for row in RunFolder(tmp_path).metrics() if row.get("finished")]
    assert ends[0]["unmoved"] == ["connector.weight", "connector.bias"]
    assert ends[1]["unmoved"] == []
    assert "connector.weight, connector.bias had gradients and did not move" in capsys.readouterr().out


def test_running_statistics_move_only_where_the_module_trains(tmp_path):
    from safetensors.torch import load_file

    run(config(recipe__stages__tune__train={"encoder": 1e-3, "lm": 1e-3}), tmp_path)
    first = load_file(tmp_path / "stages" / "0_align" / "model.safetensors")
    second = load_file(tmp_path / "stages" / "1_tune" / "model.safetensors")
    assert sorted(first) == ["connector.bias", "connector.weight"]
    assert second["encoder.1.num_batches_tracked"] == 5
    assert {name.split(".")[0] for name in second} == {"encoder", "connector", "lm"}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    import json

    with pytest.raises(UserError, match=r"stage align, step \d+: the loss is not finite \(samples .*s7"):
        run(config(fake__explode="s7"), tmp_path)
    facts = json.loads((tmp_path / "nonfinite.json").read_text())
    assert "s7" in facts["samples"]
    assert len(facts["samples"]) == 4  # its own micro-batch, not the whole step
    rows = RunFolder(tmp_path).metrics()
    assert facts["step"] == (rows[-1]["step"] if rows else 0) + 1


def strict(path):
    import json

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 1e20])
@pytest.mark.parametrize("stage", ["align", "tune"])
def test_a_last_step_that_leaves_no_number_fails_with_its_samples(tmp_path, monkeypatch, stage, rate):
    """No step follows that would notice, and answers can be read off weights that are not numbers."""
    from vlmlab.recipe.stage import Stage

    factor = Stage.factor

    def last(self, step):
        if self.name == stage and step == self.steps - 1:
            return rate / 1e-3
        return factor(self, step)

    monkeypatch.setattr(Stage, "factor", last)
    with pytest.raises(UserError, match=rf"stage {stage}, step \d: .* is not finite \(samples s\d+.*nonfinite.json"):
        run(config(), tmp_path)
    facts = strict(tmp_path / "nonfinite.json")
    assert facts["step"] == (6 if stage == "align" else 5) and len(facts["samples"]) == 8
    assert not list(tmp_path.glob(f"stages/*_{stage}/model.safetensors"))
    assert not (tmp_path / "result.json").exists()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line and "Infinity" not in line


def test_weights_that_are_numbers_and_give_none_fail_too(tmp_path):
    """Each weight is finite and so is its norm; what they make of the samples is not."""
    with pytest.raises(UserError, match=r"stage align, step 1: the loss after it is not finite"):
        cfg = config(fake__fragile=True, recipe__stages__align__steps=1, recipe__stages__align__train__connector=1e3)
        run(cfg, tmp_path)


def test_the_look_behind_the_last_step_changes_nothing(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from vlmlab.engine.stage import StageModule

    def trained(name):
        run(config(), tmp_path / name)
        return [load_file(file) for file in sorted((tmp_path / name).glob("stages/*/model.safetensors"))]

    with_look = trained("with")
    monkeypatch.setattr(StageModule, "_check_last", lambda self, window: None)
    for one, other in zip(with_look, trained("without"), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_broken_data_stops_with_its_own_sentence(tmp_path):
    from vlmlab.contracts.errors import DataError

    cfg = config(data__train__short__broken=7, trainer__workers=2, recipe__stages__align__steps=50)
    with pytest.raises(DataError, match=r"^row 7 is broken; mend it\.$"):
        run(cfg, tmp_path)


PATHS = {"lm": 1e-3, "lm.mix": None, "lm.head": 1e-2, "connector.bias": 1e-3}


def test_only_the_paths_that_train_move_and_the_rest_is_proved(tmp_path, capsys):
    from safetensors.torch import load_file

    align, tune = "recipe__stages__align__train", "recipe__stages__tune__train"
    run(config(**{align: {"connector": {"weight": 1e-2}}, tune: PATHS}), tmp_path)
    first, second = (load_file(tmp_path / "stages" / n / "model.safetensors") for n in ("0_align", "1_tune"))
    new = FakeVLM(**config().fake)
    assert torch.equal(first["connector.weight"], second["connector.weight"])
    assert not torch.equal(first["connector.bias"], second["connector.bias"])
    before = {name: p for name, p in new.named_parameters() if name.startswith("lm.")}
    assert {name for name in second if name.startswith("lm.")} == {"lm.embed.weight", "lm.head.weight", "lm.head.bias"}
    assert all(not torch.equal(second[n], before[n]) for n in ("lm.embed.weight", "lm.head.weight", "lm.head.bias"))
    rows = [row for row in RunFolder(tmp_path).metrics() if row["stage"] == "tune" and "loss" in row]
    assert rows[0]["lr/lm.head"] == pytest.approx(10 * rows[0]["lr/lm"]) and "lr/lm.mix" not in rows[0]
    said = capsys.readouterr().out
    rows = ("connector.weight 64 64 0.01", "connector, the rest 8 - frozen", "lm, the rest 184 184 0.001")
    for row in (*rows, "lm.mix 432 - frozen", "lm.head 207 207 0.01"):
        line = re.escape(row).replace(r"\ ", " +")
        assert re.search(rf"^{line}$", said, re.MULTILINE), row


def test_a_frozen_rest_of_a_part_that_changes_fails_the_run(tmp_path):
    changes = {"fake__drift": True, "recipe__stages__align__steps": 0}
    with pytest.raises(UserError, match=r"stage tune: frozen weights changed \(encoder\.0\.weight\)"):
        run(config(recipe__stages__tune__train={"encoder": {"1": 1e-3}, "lm": 1e-3}, **changes), tmp_path)


def test_a_path_that_leads_nowhere_says_what_there_is(tmp_path):
    for train, sentence in (
        ({"lm": {"had": 1e-3}}, r"tune.train.lm.had leads to no weight; in lm there is embed, mix, head\."),
        ({"lm.head.wait": 1e-3}, r"tune.train.lm.head.wait leads to no weight; in lm.head there is weight, bias\."),
        ({"lm.**.wait": 1e-3}, r"tune.train.lm.\*\*.wait leads to no weight; in lm there is embed, mix, head\."),
    ):
        with pytest.raises(UserError, match=rf"^recipe.stages.{sentence}$"):
            run(config(recipe__stages__tune__train=train), tmp_path / str(len(sentence)))
