"""The paper's preset on towers of its widths and real data in its sets' forms: killed twice a stage, resumed, loaded.

What is smaller than the paper's: depth (two layers a tower), images (112 pixels, 64 visual tokens), a vocabulary of
2,000 tokens made from the texts themselves, four steps of four samples a stage. The weights are random.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

import vlmlab
from tests.data.readers.test_parquet import NEXT, RECAP, talk, write
from tests.slow.runs import ROOT
from tests.tiny import HALF
from vlmlab.lm.tokenizer import train_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STAGES = ("coarse_align", "deep_align", "caption_pretrain", "instruction_tune")
STEPS, BATCH, SIDE = 4, 4, 112
LONGEST = 600
"""Characters of a row that is used, so that a step takes about a second."""


# -- three sets in their public forms ----------------------------------------------------------------------------------


def captioned(root: Path) -> Iterator[tuple[str, bytes, list[str]]]:
    """File name, bytes and captions of every photograph."""
    given = json.loads((root / "captions.json").read_text(encoding="utf-8"))
    said: dict[int, list[str]] = {}
    for row in given["annotations"]:
        said.setdefault(row["image_id"], []).append(row["caption"].strip())
    for image in given["images"]:
        yield image["file_name"], (root / "images" / image["file_name"]).read_bytes(), said[image["id"]]


def recap(photographs: list[tuple[str, bytes, list[str]]], captions: int) -> list[dict[str, Any]]:
    """Rows of LLaVA-ReCap: one image, one question, one description, here the first `captions` human ones."""
    return [
        {
            "id": Path(name).stem,
            "image": {"bytes": data, "path": name},
            "conversations": talk("<image>\nDescribe the image.", " ".join(texts[:captions])),
        }
        for name, data, texts in photographs
    ]


def conversations(root: Path) -> list[dict[str, Any]]:
    """Rows of LLaVA-NeXT-Data: talks of several turns about an image, and texts without one."""
    talks = json.loads((root / "llava_instruct_coco.json").read_text(encoding="utf-8"))
    rows = [
        {**row, "data_source": "coco", "image": {"bytes": (root / row["image"]).read_bytes(), "path": row["image"]}}
        for row in talks
        if (root / row["image"]).is_file()
    ]
    texts = json.loads((root / "scienceqa_mixed_text_and_missing_image.json").read_text(encoding="utf-8"))
    rows += [{**row, "data_source": "text", "image": None} for row in texts if "image" not in row]
    return [row for row in rows if sum(len(turn["value"]) for turn in row["conversations"]) < LONGEST]


@pytest.fixture(scope="module")
def sets(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The rows of each key of ``conf/data/llava_next.yaml``."""
    photographs = list(captioned(shared_data / "coco_captions_mini"))
    half = len(photographs) // 2
    return {
        "path_558k": recap(photographs[:half], 1),
        "path_118k": recap(photographs[half:], 3),
        "path": conversations(shared_data / "llava_records"),
    }


# -- two towers of the paper's widths ----------------------------------------------------------------------------------


def so400m(folder: Path) -> str:
    """SigLIP So400m with two layers and small images."""
    config = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_attention_heads=16, patch_size=14, num_hidden_layers=2,
        image_size=SIDE,
    )  # fmt: skip
    SiglipVisionModel(config).save_pretrained(folder)
    settings = {"size": {"height": SIDE, "width": SIDE}, "resample": 3, **HALF}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def qwen2(folder: Path, texts: list[str]) -> str:
    """Qwen2-0.5B with two layers and a vocabulary of these texts."""
    tokenizer = train_tokenizer(texts, 2000)
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=len(tokenizer), tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def command(sets: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``train.py`` with the preset, the towers and the sets; the run folder and how often it saves are still open."""
    place = tmp_path_factory.mktemp("paper")
    words = ["preset=improved_alignment_900m", "data=llava_next", "data.val_fraction=0.1"]
    for key, rows in sets.items():
        (place / key).mkdir()
        schema = NEXT if key == "path" else RECAP
        for shard in range(2):
            write(place / key / f"train-{shard:05d}-of-00002.parquet", rows[shard::2], schema, group=16)
        words.append(f"data.{key}={place / key}")
    texts = [turn["value"] for rows in sets.values() for row in rows for turn in row["conversations"]]
    torch.manual_seed(0)
    words += [f"encoder.path={so400m(place / 'so400m')}", f"lm.path={qwen2(place / 'qwen2', texts)}"]
    for stage in STAGES:
        words += [f"recipe.stages.{stage}.batch_size={BATCH}", f"recipe.stages.{stage}.accumulate=2"]
    words += [f"budget.max_steps={STEPS}", "evaluation.held_out_samples=4", "trainer.accelerator=cpu"]
    words += ["trainer.log_every=1", "trainer.progress=false"]
    return [sys.executable, str(ROOT / "train.py"), *words]


# -- running and killing -----------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def finish(command: list[str], run: Path) -> str:
    """Run the command to its end."""
    words = [*command, f"hydra.run.dir={run}", "trainer.save_every_s=3600"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def steps_of(run: Path, stage: str) -> int:
    """Steps of a stage that are written down."""
    path = run / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return sum(f'"stage": "{stage}"' in row and '"loss"' in row for row in rows)


def kill(command: list[str], run: Path, stage: str, after: int, save_every_s: int) -> None:
    """Run the command and kill it as soon as `after` steps of a stage are done."""
    words = [*command, f"hydra.run.dir={run}", f"trainer.save_every_s={save_every_s}"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(words, env=environment(), stdout=quiet, stderr=quiet)
    while steps_of(run, stage) < after and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def home(run: Path, stage: str) -> Path:
    return run / "stages" / f"{STAGES.index(stage)}_{stage}"


@dataclass(frozen=True)
class Runs:
    """One run that was left alone, one that was killed, and what the two printed when they went to their end."""

    whole: Path
    killed: Path
    whole_said: str
    killed_said: str


def left_alone_and_killed(command: list[str], place: Path) -> Runs:
    """Killed in every stage before its first checkpoint, and after one."""
    whole, killed = place / "whole", place / "killed"
    said = finish(command, whole)
    for stage in STAGES:
        kill(command, killed, stage, after=2, save_every_s=3600)
        assert not list(home(killed, stage).iterdir())  # these two steps are lost
        kill(command, killed, stage, after=3, save_every_s=0)
        assert (home(killed, stage) / "last.ckpt").exists()
        assert not (home(killed, stage) / "model.safetensors").exists()
    return Runs(whole, killed, said, finish(command, killed))


def same_bits(runs: Runs) -> None:
    assert runs.killed_said.count("is finished already") == 3 and "going on after step" in runs.killed_said
    for index, name in enumerate(STAGES):
        expected, found = (load_file(home(run, name) / "model.safetensors") for run in (runs.whole, runs.killed))
        assert expected.keys() == found.keys()
        # the weights and biases of two linear layers, and from the third stage on the LM's too
        assert len(expected) == 4 if index < 2 else len(expected) > 4
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), f"{name}: {key}"
    results = [json.loads((run / "result.json").read_text())["metrics"] for run in (runs.whole, runs.killed)]
    assert results[0] == results[1] and {"val/captions/loss", "val/instruct/loss"} <= results[0].keys()


def own_set_in_every_stage(runs: Runs) -> None:
    """The data and prompts of the paper's stages; the third has both caption sets, and no row was skipped."""
    seen = re.findall(r"data (\w+) \(([\d,]+) samples\)", runs.whole_said)
    assert [name for name, _ in seen] == ["short", "dense", "captions", "instruct"]
    size = {name: int(count) for name, count in seen}
    assert size["captions"] == size["short"] + size["dense"] and min(size.values()) > 50
    assert re.findall(r"prompt (\w+)", runs.whole_said) == ["plain", "chat", "chat", "chat"]
    assert not (runs.whole / "skipped.jsonl").exists()


def loaded_in_three_lines(runs: Runs, shared_data: Path) -> None:
    image = sorted((shared_data / "coco_captions_mini" / "images").glob("*.jpg"))[0]
    answers = []
    for run in (runs.whole, runs.killed):
        model = vlmlab.load(run, device="cpu")
        answers.append(model.generate(image, "What is in the picture?", max_new_tokens=12))
    assert answers[0] == answers[1] != ""
    state = dict(model.model.named_parameters())
    for name, tensor in load_file(home(runs.killed, STAGES[-1]) / "model.safetensors").items():
        assert torch.equal(state[name].detach(), tensor), name
    assert (model.model.encoder.width, model.model.lm.width, model.model.tokens_per_image) == (1152, 896, 64)


def test_killed_twice_in_every_stage_it_ends_with_the_same_bits(
    command: list[str], shared_data: Path, tmp_path: Path
) -> None:
    """One test, since two workers would each make the runs for theirs."""
    runs = left_alone_and_killed(command, tmp_path)
    same_bits(runs)
    own_set_in_every_stage(runs)
    loaded_in_three_lines(runs, shared_data)
