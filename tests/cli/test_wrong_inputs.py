"""Wrong inputs: each is answered by one sentence (what, where, what to do), exit code 1 or 2, and no traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from asking import Answer, ask
from PIL import Image

from vlmlab.runs.files import write_json
from vlmlab.runs.lock import FolderLock

ROOT = Path(__file__).resolve().parents[2]
VQA = "train name=v recipe=joint data=vqa data.path={f}/"
JOINT = "train budget=test recipe=joint "
STAGE = "recipe.stages.joint"

# Answered before torch is imported: line -> exit code, words.
COMPOSITION: dict[str, tuple[int, str]] = {
    # unknown choices and misspelt keys
    "train fusion=konkat": (2, r"fusion has no choice 'konkat' \(did you mean concat\?\): choose one of .*none"),
    "train connector=qformer encoder=none": (2, r"encoder has no choice 'none'.*; without vision: fusion=none"),
    "train adapter=lorra": (2, r"adapter has no choice 'lorra' \(did you mean lora\?\)"),
    "train preset=lava": (2, r"preset has no choice 'lava' \(did you mean llava\?\)"),
    "train recipe=two-stage": (2, r"recipe has no choice 'two-stage' \(did you mean two_stage\?\)"),
    "train adapter=lora adapter.rank=4": (2, r"no key 'adapter.rank'"),
    "train connector.dept=3": (2, r"no key 'connector.dept' .*\(did you mean connector.depth\?\)"),
    "train budget.max_step=3": (2, r"no key 'budget.max_step' .*\(did you mean budget.max_steps\?\)"),
    "train objectiv=lm": (2, r"no key 'objectiv' .*\(did you mean objective\?\)"),
    "train recipe.stages.align.steps=5": (2, r"no key 'recipe.stages.align.steps'"),
    "train seed={1": (2, r"the override 'seed=\{1' cannot be read"),
    "train connector": (2, "'connector' has no value; write key=value"),
    "train ~connectr": (2, r"connectr"),
    "train resume=true": (2, "no key 'resume' .* write the same command again"),
    "evaluate run=x mask=causal": (2, "mask is chosen when a run is trained and is not a key of evaluate"),
    "evaluate run=x budget.eval_limit=4": (2, r"no key 'budget.eval_limit' .*\(did you mean limit\?\)"),
    "train encoder=hf": (2, r"encoder.path is needed; write encoder.path="),
    "train lm=hf": (2, r"lm.path is needed; write lm.path="),
    # impossible pairs
    f"{JOINT}connector=bliva {STAGE}.prompt=text": (
        2, r"joint.prompt=text learns the words of the prompt, which the connector reads",
    ),
    f"{JOINT}mask=prefix_lm {STAGE}.prompt=text": (2, r"joint.prompt=text .* mask=prefix_lm shows"),
    f"{JOINT}objective=siglip": (2, r"joint trains the LM's words and objective=siglip wants pairs .*objective=lm"),
    f"{JOINT}objective=clip": (2, r"joint trains the LM's words and objective=clip wants pairs .*objective=lm"),
    f"{JOINT}objective=itc": (2, r"objective=itc, which compares queries with texts.*use connector=qformer"),
    f"{JOINT}objective=blip2 connector=qformer": (2, r"connector=qformer has no text side; set connector.text=true"),
    f"{JOINT}objective=itm fusion=none": (2, r"objective=itm, which reads images, and fusion=none leaves them out"),
    f"{JOINT}objective=asvr": (2, r"objective=asvr, which has weights of its own.*add \+recipe"),
    f"{JOINT}objective=itg connector=instruct_qformer +{STAGE}.train.objective=1e-3": (
        2, r"joint.train.lm=0.001 trains the LM, whose layers get no gradient from objective=itg; put",
    ),
    f"{JOINT}objective=patch_text_contrast": (2, r"no gradient from objective=patch_text_contrast"),
    f"{JOINT}encoder=patch {STAGE}.module=vlmlab.engine.contrastive.ContrastiveModule": (2, r"wants one tower"),
    f"{JOINT}+connector.dept=3": (2, r"no key 'connector.dept' .*did you mean connector.depth.*nothing would read it"),
    f"{JOINT}{STAGE}.module=vlmlab.recipe.alignment.AlignmentModule": (
        2, r"joint.module=.*AlignmentModule is now vlmlab.engine.alignment.AlignmentModule; write",
    ),
    f"{JOINT}adapter=soft_prompt adapter.parts=[encoder]": (2, r"soft_prompt is read by the LM alone"),
    f"{JOINT}adapter=lora adapter.parts=[brain]": (2, r"adapter.parts=.*give a list, .* lm or encoder or connector"),
    f"{JOINT}adapter=mma adapter.parts=[connector]": (2, r"adapter=mma wraps lm and encoder alone; take out connector"),
    f"{JOINT}adapter=lora adapter.parts=[lm,fusion]": (2, r"fusion=concat has no weights; take out fusion"),
    f"{JOINT}adapter=lora adapter.parts=lm": (2, r"adapter.parts=lm is not possible; give a list"),
    f"{JOINT}adapter=lora fusion=none adapter.parts=[encoder]": (2, r"fusion=none leaves no encoder"),
    f"{JOINT}adapter=lora encoder=patch adapter.parts=[encoder]": (2, r"encoder=patch has no layer to adapt"),
    f"{JOINT}adapter=mma encoder=multi adapter.parts=[encoder]": (2, r"adapter=mma wants a single tower"),
    "train preset=paligemma connector=mlp": (
        2, r"connector.zero is not a key of connector=mlp and preset=paligemma sets it; add ~connector.zero",
    ),
    "train mask=visual_rows_open": (2, r"visual_rows_open leaks later answers"),
    "train trainer.strategy=fsdp2": (2, r"fsdp2 shares the weights among devices and trainer.devices=1; set"),
    "train trainer.strategy=fsdp2 trainer.devices=2 precision=fp16": (2, r"fsdp2 has no loss scaling, .*=bf16"),
    "train precision=fp16 trainer.accelerator=cpu": (2, r"precision=fp16 needs a GPU"),
    "train recipe=frozen fusion=none": (2, r"fusion=none leaves only the LM and no stage of the recipe trains lm"),
    "train recipe=frozen encoder=patch recipe.stages.encoder_only.train.connector=null": (
        2, r"encoder=patch has no weights and the recipe trains nothing but the encoder",
    ),
    # fusions
    "train fusion=lavi fusion.every=0": (2, r"fusion.every=0 is not possible; give a whole number from 1"),
    "train fusion=gated_xattn fusion.every=two": (2, r"fusion.every=two is not possible"),
    "train fusion=lavi fusion.sees=latest": (2, r"fusion.sees=latest is not a memory mask; write memory_mask@fusion."),
    "train fusion=lavi fusion.conditioner=foo": (2, r"conditioner=foo is unknown; choose one of attention, mlp, conv"),
    "train fusion=gated_xattn fusion.norm=batch": (2, r"fusion.norm=batch is unknown; choose one of layer, rms"),
    "train fusion=emma encoder=dinov2_base": (2, r"text tower and encoder=dinov2_base has none; choose a CLIP"),
    "train fusion=emma encoder=patch": (2, r"text tower and encoder=patch has none"),
    "train memory_mask=latest": (2, r"latest has no place in this composition; choose fusion=flamingo or"),
    "train memory_mask@fusion.sees=latest": (2, r"no place in this composition.* write memory_mask@fusion.sees=latest"),
    "train fusion=lavi memory_mask=latest": (2, r"not said where it belongs; write memory_mask@fusion.sees=latest"),
    "train fusion=lavi memory_mask@fusion.sees=lates": (2, r"memory_mask has no choice 'lates' .did you mean latest"),
    # numbers
    "train seed=x": (2, r"seed=x is not possible; give a whole number from 0"),
    "train budget.max_steps=ten": (2, r"max_steps=ten is not possible; give a whole number of at least 1, or null"),
    "train budget.steps_scale=0": (2, r"budget.steps_scale=0 is not possible; give a number above 0"),
    "train trainer.threads=0": (2, r"trainer.threads=0 is not possible"),
    "train trainer.devices=0": (2, r"trainer.devices=0 is not possible"),
    "train trainer.accelerator=tpuu": (2, r"trainer.accelerator=tpuu is unknown; choose one of auto, cpu"),
    "train trainer.strategy=dpp": (2, r"trainer.strategy=dpp is unknown; choose one of auto, ddp"),
    "train trainer.gradient_clip=-1": (2, r"gradient_clip=-1 is not possible"),
    "train trainer.compile=maybe": (2, r"trainer.compile=maybe is not possible; give true or false"),
    "train trainer.devices=3": (2, r"batch_size=32 does not divide by accumulate=1 times trainer.devices=3"),
    "train evaluation.batch_size=0": (2, r"evaluation.batch_size=0 is not possible"),
    "train evaluation.lookup_samples=0": (2, r"evaluation.lookup_samples=0 is not possible; .* 1, or null"),
    "train evaluation.baselines=[blind]": (2, r"evaluation.baselines=.*blind.* is .*shuffled or no_image"),
    "train collate.pack_length=-1": (2, r"collate.pack_length=-1 is not possible"),
    "train collate.questions=forest": (2, r"questions=forest is unknown; choose .* conversation, rows, tree, whole"),
    "train evaluation.share_images=often": (2, r"evaluation.share_images=often is not possible; give true or false"),
    f"{JOINT}collate.questions=tree objective=asvr +{STAGE}.train.objective=1e-3": (
        2, r"joint has objective=asvr, which counts images, and collate.questions=tree .* set collate.questions=rows",
    ),
    "train name=../../elsewhere": (2, r"name=../../elsewhere is not a folder below outputs"),
    f"{JOINT}{STAGE}.data=shrot": (2, r"joint.data=shrot is not in data.train; choose from short"),
    f"{JOINT}{STAGE}.prompt=chatt": (2, r"joint.prompt=chatt is unknown; choose one of .*plain, chat, text"),
    f"{JOINT}+{STAGE}.schedule=cosin": (2, r"joint.schedule=cosin is unknown"),
    f"{JOINT}+{STAGE}.optimizer=sgd": (2, r"joint.optimizer=sgd is unknown"),
    f"{JOINT}+{STAGE}.train.brain=1": (2, r"joint.train.brain is not a part of the model"),
    f"{JOINT}+{STAGE}.stepz=1": (2, r"no key 'recipe.stages.joint.stepz' .*did you mean recipe.stages.joint.steps"),
    # data, found before training
    "train data=vqa": (2, r"data.path is needed"),
    "train data=vqa data.path=/no/such.json": (2, r"/no/such.json does not exist; give the path of your data"),
    f"{VQA}good.json data.images={{f}}/nowhere": (2, r"nowhere does not exist"),
    f"{VQA}broken.json data.images={{f}}": (1, r"broken.json.* is not valid JSON"),
    f"{VQA}empty.json data.images={{f}}": (1, r"empty.json is empty"),
    f"{VQA}binary.json data.images={{f}}": (1, r"binary.json is not UTF-8"),
    f"{VQA}keys.json data.images={{f}}": (1, r"keys.json, .* \d: .*question"),
    f"{VQA}fake.json data.images={{f}}": (1, r"fake.png is not a "),
    f"{VQA}lost.json data.images={{f}}": (1, r"lost.png"),
    "train name=v recipe=joint data=llava data.path={f}/keys.json data.images={f}": (1, r"keys.json.* cannot be used"),
    "train name=v recipe=joint data=coco_captions data.path={f}/good.json data.images={f}": (
        1, r"good.json is not in COCO captions format",
    ),
    # folders
    "train name=locked": (75, r"outputs/locked is in use by process \d+"),
    "train name=damaged": (1, r"outputs/damaged has config.yaml and cannot be told to be a run's folder"),
    "train name=finished seed=2": (1, r"outputs/finished holds a run of another configuration \(.*another name="),
    "train hydra.run.dir={f}/afile/run": (1, r"afile/run: not a directory; check the path"),
    # evaluation
    "evaluate": (2, r"which run\? write run=<folder>"),
    "evaluate run=nowhere": (2, r"run=nowhere is not a run folder"),
    "evaluate run=outputs/unfinished": (1, r"outputs/unfinished is not finished \(no result.json\)"),
    "evaluate run=outputs/damaged": (1, r"damaged/config.yaml is damaged \(line 1: expected .*\); put it back, or"),
    "evaluate run=outputs/finished limit=0": (2, r"limit=0 is not possible"),
    "evaluate run=outputs/finished batch_size=-4": (2, r"batch_size=-4 is not possible"),
    "evaluate run=outputs/foreign": (1, r"foreign/config.yaml: lm._target_=os.system is code from outside vlmlab and"),
    "evaluate run=outputs/finished trust=2": (2, r"trust=2 is not possible; give true or false"),
    "export run=outputs/foreign to=out": (1, r"lm._target_=os.system is code from outside .* trust=true runs it"),
    "evaluate run=outputs/finished device=gpu0": (2, r"device=gpu0 is unknown; choose one of auto, cpu, cuda"),
    # curate
    "curate": (2, r"which run\? write run=<folder>, as in: vlmlab curate run=outputs/default out=scores.jsonl"),
    "curate run=outputs/finished": (2, r"where to\? write out=<file>"),
    "curate run=outputs/finished out=nowhere/x": (1, r"out=nowhere/x: there is no folder nowhere"),
    "curate run=outputs/finished out=x n=0": (2, r"n=0 is not possible; give a whole number of at least 1"),
    "curate run=outputs/foreign out=x": (1, r"lm._target_=os.system is code from outside .* trust=true runs it"),
    # export
    "export": (2, r"which run\? write run=<folder>, as in: vlmlab export run=outputs/default to=exported"),
    "export run=nowhere to=out": (2, r"run=nowhere is not a run folder"),
    "export run=outputs/unfinished to=out": (1, r"outputs/unfinished is not finished \(no result.json\)"),
    "export run=outputs/damaged to=out": (1, r"damaged/config.yaml is damaged \(line 1: expected .*\)"),
    "export run=outputs/finished": (2, r"where to\? write to=<folder>"),
    "export run=outputs/finished to=.": (2, r"to=. has files in it; give a new or empty folder"),
    "export run=outputs/finished to={f}/afile": (2, r"afile has files in it; give a new or empty folder"),
    "export run=outputs/finished too=out": (2, r"no key 'too' .*\(did you mean to\?\)"),
}  # fmt: skip

# Answered by the parts themselves, before the first step.
BUILDING: dict[str, tuple[int, str]] = {
    f"{JOINT}connector=pool connector.side=3": (2, r"connector.side=3 does not divide the 4x4 feature grid"),
    f"{JOINT}connector=token_concat connector.group=5": (2, r"connector.group=5 does not divide the 16 features"),
    f"{JOINT}connector=pixel_shuffle connector.factor=3": (2, r"connector.factor=3 does not divide the 4x4"),
    f"{JOINT}connector=perceiver connector.latents=0": (2, r"connector.latents=0 is not possible"),
    f"{JOINT}connector=qformer connector.heads=5": (2, r"connector.heads=5 does not divide"),
    f"{JOINT}connector=ovis connector.tokenize=hard": (2, r"connector.tokenize=hard is unknown; choose one of softmax"),
    f"{JOINT}connector._target_=no.such.Class": (2, r"connector._target_=no.such.Class cannot be imported"),
    f"{JOINT}{STAGE}.module=no.such.Module": (2, r"joint.module=no.such.Module cannot be imported"),
    f"{JOINT}encoder.layers=[9]": (2, r"encoder.layers has 9, but the tower has 4 layers"),
    f"{JOINT}encoder=patch encoder.patch_size=15": (2, r"is not a multiple of encoder.patch_size=15"),
    f"{JOINT}encoder=scratch encoder.hidden_size=64 connector=none": (
        2,
        r"tokens are 64 wide and the LM is 128 wide",
    ),
    f"{JOINT}fusion=gated_xattn fusion.layers=[9]": (
        2,
        r"fusion.layers=\[9\] names a layer that is not there",
    ),
    f"{JOINT}fusion=lavi fusion.every=6": (2, r"fusion.every=6 leaves no layer of 5; give a number from 1 to 5"),
    f"{JOINT}fusion=lavi lm=hf lm.path={{f}}/neox": (2, r"nothing can act inside .* the family gpt_neox; known are"),
    f"{JOINT}encoder=hf encoder.path={{f}}/nowhere": (
        2,
        r"encoder.path=.*nowhere is neither a local folder",
    ),
    f"{JOINT}lm=hf lm.path={{f}}": (2, r"lm.path=.* has no config.json; give the folder that save_pretrained wrote"),
    f"{JOINT}adapter=lora adapter.r=0": (2, r"adapter.r=0 is not possible"),
    f"{JOINT}adapter=lora adapter.targets=[nothing]": (2, r"adapter.targets=nothing fits no layer of"),
    f"{JOINT}{STAGE}.objective={{text:lm}}": (2, r"joint.objective.text=lm is not an objective; write objective@"),
    "evaluate run=outputs/finished benchmarks=world_tset": (
        1,
        r"benchmarks=world_tset is not in this run",
    ),
    "evaluate run=outputs/other_weights": (
        1,
        r"model.safetensors lacks .*; load it with",
    ),
    "evaluate run=outputs/broken_weights": (1, r"model.safetensors cannot be read"),
    "export run=outputs/broken_weights to=out": (1, r"model.safetensors cannot be read"),
    "export run=outputs/other_weights to={f}/afile/out": (1, r"model.safetensors lacks .*; load it with"),
}


def lay_down(folder: Path) -> None:
    """Files and run folders with something wrong; lines name the folder of the files {f}."""
    row: dict[str, Any] = {"question_id": 1, "image": "a.png", "question": "what?", "answer": "red"}
    rows = [row | {"question_id": i, "image": f"{'abc'[i % 3]}.png"} for i in range(30)]
    for name in "abc":
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "fake.png").write_text("no image")
    for file, content in {
        "good": rows,
        "keys": [{"question_id": 1, "image": "a.png"}],
        "fake": [r | {"image": "fake.png", "split": "train"} for r in rows],
        "lost": [r | {"image": "lost.png", "split": "train"} for r in rows],
    }.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    (folder / "broken.json").write_text('[{"question_id": 1,')
    (folder / "empty.json").write_text("")
    (folder / "binary.json").write_bytes(b'["\xff\xfe"]')
    (folder / "afile").write_text("")
    runs = folder / "outputs"
    for name in ("finished", "other_weights", "broken_weights", "foreign", "unfinished", "damaged", "locked"):
        (runs / name).mkdir(parents=True)
    (runs / "damaged" / "config.yaml").write_text("a: [1")
    (runs / "unfinished" / "config.yaml").write_text("seed: 0\n")
    _code, config, _err, _ = ask("train --cfg job --resolve recipe=joint trainer.accelerator=cpu")
    for name in ("finished", "other_weights", "broken_weights", "foreign"):
        (runs / name / "config.yaml").write_text(config)
        write_json(runs / name / "result.json", {"format": 1, "metrics": {}, "cost": {}})
        (runs / name / "stages" / "0_joint").mkdir(parents=True)
    foreign = runs / "foreign" / "config.yaml"
    foreign.write_text(yaml.safe_dump(yaml.safe_load(config) | {"lm": {"_target_": "os.system", "command": "true"}}))
    (runs / "broken_weights" / "stages" / "0_joint" / "model.safetensors").write_bytes(b"no weights")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place, before = tmp_path_factory.mktemp("wrong"), Path.cwd()
    os.chdir(place)
    lay_down(place)
    lock = FolderLock(place / "outputs" / "locked")
    lock.acquire()
    yield place
    lock.release()
    os.chdir(before)


@pytest.fixture(scope="module")
def asked(folder: Path) -> dict[str, Any]:
    lines = [line.replace("{f}", str(folder)) for line in COMPOSITION]
    command = [sys.executable, str(Path(__file__).with_name("asking.py")), json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=True)
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def is_one_sentence(answer: Answer, code: int, words: str) -> None:
    found, out, err, _ = answer
    assert re.fullmatch(r"error: .*" + words + r".*\n", err), err
    assert found == code and "Traceback" not in out + err


def test_there_are_sixty() -> None:
    assert len(COMPOSITION) + len(BUILDING) >= 60


@pytest.mark.parametrize("line", COMPOSITION)
def test_a_wrong_composition_is_refused_at_once(asked: dict[str, Any], folder: Path, line: str) -> None:
    answer = asked["answers"][line.replace("{f}", str(folder))]
    is_one_sentence(answer, *COMPOSITION[line])
    assert answer[1] == "" and answer[3] < 2.0


def test_nothing_heavy_was_imported_and_no_folder_is_left(asked: dict[str, Any], folder: Path) -> None:
    assert asked["heavy"] == []
    made = {path.name for path in (folder / "outputs").iterdir()}
    assert made == {"finished", "other_weights", "broken_weights", "foreign", "unfinished", "damaged", "locked"}


@pytest.fixture(scope="module")
def other_weights(folder: Path) -> None:
    """A finished run whose weights are those of a composition with another connector; and an LM of another family."""
    import shutil

    import torch
    from omegaconf import OmegaConf
    from safetensors.torch import save_file
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from vlmlab.model.build import build_model
    from vlmlab.towers.source import embedded

    shutil.copytree(embedded("lm"), folder / "neox", ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=2048, **sizes)).save_pretrained(folder / "neox")
    run = folder / "outputs" / "other_weights"
    model = build_model(OmegaConf.load(run / "config.yaml"))
    facts = {"format": 1, "stage": "joint", "sources": model.sourced(), "composition": {}}
    tensors = {"connector.proj.weight": torch.zeros(2, 2)}
    save_file(tensors, run / "stages" / "0_joint" / "model.safetensors", metadata={"vlmlab": json.dumps(facts)})


@pytest.mark.parametrize("line", BUILDING)
def test_a_part_that_cannot_be_built_says_why(line: str, folder: Path, other_weights: None) -> None:
    run = (
        ""
        if line.startswith(("evaluate", "export"))
        else f" hydra.run.dir={folder}/runs/{len(list(folder.glob('runs/*')))}"
    )
    is_one_sentence(ask(line.replace("{f}", str(folder)) + run), *BUILDING[line])


def test_a_part_that_cannot_be_built_leaves_no_folder_but_what_others_put_there(folder: Path) -> None:
    line, run = f"{JOINT}connector=pool connector.side=3 hydra.run.dir=", folder / "runs" / "kept"
    code, _, err, _ = ask(line + str(run))
    assert code == 2 and not run.exists()
    run.mkdir(parents=True)
    (run / "log.txt").write_text("a sweep's")
    assert ask(line + str(run))[2] == err
    state = json.loads((run / "state.json").read_text())
    assert state["state"] == "failed" and err == f"error: {state['error']}\n"


@pytest.mark.parametrize(
    ("script", "words", "code", "sentence"),
    [
        ("train.py", ["preset=paligemma", "connector=mlp"], 2, "connector.zero is not a key of connector=mlp"),
        ("train.py", ["-m", "seed=0,x"], 2, "error: seed=x is not possible"),
        ("evaluate.py", ["run=outputs/unfinished"], 1, "is not finished"),
    ],
)
def test_the_real_commands(script: str, words: list[str], code: int, sentence: str, folder: Path) -> None:
    command = [sys.executable, str(ROOT / script), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert sentence in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr
    assert done.returncode == code
