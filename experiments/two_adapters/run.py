"""Two adapters on two tasks over one frozen base: ``python experiments/two_adapters/run.py [key=value ...]``.

The words behind it are those of ``train.py`` and change the run: ``budget=test`` tries it in a few steps, ``seed=1``
repeats it, ``recipe.stages.count.steps=200`` trains one adapter longer. A finished run is not trained again.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "src"))

from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from vlmlab.runs import names as names  # noqa: E402  # registers the resolvers
from vlmlab.runs.config import plain  # noqa: E402
from vlmlab.runs.folder import RunFolder  # noqa: E402

TASKS = ("count", "attribute")
MEMORY = ("bytes", "adapters", "growth", "peak")
ITEMS = 200
"""Questions of each task; ``budget.eval_limit`` takes fewer."""
WORLD = "vlmlab.data.world.sources.WorldQuestions"


def main() -> int:
    """Train what is not trained, measure both ways of keeping two tasks in memory, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of table.md")
    parser.add_argument("--run", type=Path, help="run folder; outputs/two_adapters[_<overrides>] by default")
    parser.add_argument("--measure", choices=("one", "two"), help=argparse.SUPPRESS)  # in a process of its own
    given = parser.parse_args()
    word = "_".join("".join(c if c.isalnum() else "-" for c in text) for text in given.overrides)
    folder = (given.run or ROOT / "outputs" / f"two_adapters{'_' if word else ''}{word}").resolve()
    cfg = configuration(given.overrides)
    if given.measure:
        print(json.dumps(measured(cfg, folder, given.measure)))
        return 0
    began = time.perf_counter()
    metrics = trained(cfg, folder, given.overrides)
    memory = {kind: _in_its_own_process(kind, folder, given.overrides) for kind in ("one", "two")}
    text = report(metrics, memory, _minutes(folder, began), given.overrides)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


# -- the run -----------------------------------------------------------------------------------------------------------


def configuration(overrides: Sequence[str]) -> DictConfig:
    """The default composition with this experiment's recipe and the questions of one kind as data and as benchmark."""
    recipe = OmegaConf.load(HERE / "recipe.yaml")
    steps = [text for text in overrides if text.startswith("recipe.")]  # those of our recipe
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        fixed = ["precision=fp32", "trainer.accelerator=cpu", "trainer.progress=false"]
        cfg = compose("train", [*fixed, *(text for text in overrides if text not in steps)])
    OmegaConf.set_struct(cfg, False)
    cfg.recipe = recipe
    cfg.merge_with_dotlist(steps)
    for kind in TASKS:
        cfg.data.train[kind] = {  # single questions: not every scene allows several of one kind
            "_target_": WORLD, "split": "train", "size": 1000000, "multi_turn": False, "kinds": [kind],
        }  # fmt: skip
    cfg.data.benchmarks = {
        kind: {
            "source": {"_target_": WORLD, "split": "test", "size": ITEMS, "multi_turn": False, "kinds": [kind]},
            "metrics": [{"_target_": "vlmlab.evaluate.metrics.vqa.VqaAccuracy"}],
            "max_new_tokens": 8,
        }
        for kind in TASKS
    }
    return cfg


def trained(cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> dict[str, float]:
    """The scores of a run: read where it is finished, else trained by the stages of the recipe, and switched."""
    from vlmlab.train.run import train

    with RunFolder(folder) as run:
        result = run.open(plain(cfg), list(overrides))
        if result is None:
            result = train(cfg, folder, switched)
            used = resource.getrusage(resource.RUSAGE_SELF)
            OmegaConf.save({"cpu_seconds": used.ru_utime + used.ru_stime}, folder / "cpu.yaml")
    assert result is not None
    metrics: dict[str, float] = result["metrics"]
    return metrics


def switched(model: Any, cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Every adapter and the base on every task; switching between batches; merging."""
    from vlmlab.evaluate.baselines import Limited, Shuffled
    from vlmlab.evaluate.metrics.rows import write_rows
    from vlmlab.evaluate.metrics.scoring import predictions_file, score_rows
    from vlmlab.evaluate.run import answer

    model.eval()
    sources = {task: Limited(instantiate(cfg.data.benchmarks[task].source), cfg.budget.eval_limit) for task in TASKS}
    metrics: dict[str, float] = {}
    said: dict[str, list[str]] = {}
    for acting in (None, *TASKS):
        model.switch(acting)
        for task, source in sources.items():
            benchmark = cfg.data.benchmarks[task]
            makers = [instantiate(metric, _partial_=True) for metric in benchmark.metrics]
            for baseline, shown in (("", source), ("shuffled", Shuffled(source))):
                if baseline and acting != task:  # an adapter with wrong images on its own task
                    continue
                rows = answer(model, cfg, task, shown, benchmark.max_new_tokens)
                name = f"{acting or 'base'}_on_{task}"
                write_rows(predictions_file(folder, name, baseline), rows)
                metrics |= score_rows(rows, makers, name, baseline)
                if acting == task and not baseline:
                    said[task] = [row.prediction for row in rows]
    return metrics | _by_request(model, cfg, sources, said) | _merging(model, cfg, sources)


def _by_request(
    model: Any, cfg: DictConfig, sources: Mapping[str, Any], said: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """The tasks' batches in turn on one model: the share of answers that are those of the adapter alone."""
    from vlmlab.model.build import build_collator

    size, same, asked = 16, 0, 0
    for start in range(0, min(64, *(len(source) for source in sources.values())), size):
        for task, source in sources.items():
            samples = [source[i] for i in range(start, min(start + size, len(source)))]
            model.switch(task)
            batch = build_collator(cfg, model, "chat").ask(samples)
            texts = model.generate(batch, cfg.data.benchmarks[task].max_new_tokens)
            same += sum(a == b for a, b in zip(texts, said[task][start : start + size], strict=True))
            asked += len(texts)
    return {"by_request/same_answers": same / asked, "by_request/answers": asked}


def _merging(model: Any, cfg: DictConfig, sources: Mapping[str, Any]) -> dict[str, float]:
    """Largest difference of a logit between an adapter beside the weights and in them, in both precisions.

    What float32 leaves is its rounding if float64 leaves next to nothing.
    """
    import torch

    from vlmlab.model.build import build_collator

    found = {}
    with torch.no_grad():
        for task, source in sources.items():
            model.switch(task)
            batch = build_collator(cfg, model, "chat")([source[i] for i in range(min(32, len(source)))])
            for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
                beside = copy.deepcopy(model).to(dtype)
                unmerged = beside(batch).logits
                beside.merge()
                found[f"merging/{task}/{name}"] = float((beside(batch).logits - unmerged).abs().max())
            found[f"merging/{task}/largest_logit"] = float(unmerged.abs().max())
    return found


# -- memory ------------------------------------------------------------------------------------------------------------


def measured(cfg: DictConfig, folder: Path, kind: str) -> dict[str, float]:
    """Bytes of one model with both adapters, or of two models with one of them merged into each.

    ``growth`` is what the process holds more than before it built any model; ``peak`` is its most, libraries included.
    """
    import gc

    import torch

    from vlmlab.adapter.lora import LoraAdapter
    from vlmlab.engine.restore import load_trained
    from vlmlab.model.build import build_model

    torch.set_num_threads(1)
    with torch.device("meta"):  # libraries are in memory before anything is counted
        build_model(cfg).set_adapter(LoraAdapter())
    before = _resident()
    models = []
    for task in TASKS if kind == "two" else TASKS[:1]:
        model: Any = load_trained(cfg, folder)
        named = dict(model.named_parameters())
        adapters = sum(named[name].nbytes for task in TASKS for name in model.adapter_tensors(task) if name in named)
        if kind == "two":  # plain towers with this task's adapter in the weights
            model.switch(task)
            model.merge()
        models.append(model)
    del model, named
    gc.collect()
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    own = adapters if kind == "one" else 0
    return {"bytes": sum(storages.values()), "adapters": own, "growth": _resident() - before, "peak": peak}


def _resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _in_its_own_process(kind: str, folder: Path, overrides: Sequence[str]) -> dict[str, float]:
    words = [sys.executable, str(HERE / "run.py"), "--measure", kind, "--run", str(folder), *overrides]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- the table ---------------------------------------------------------------------------------------------------------


def _minutes(folder: Path, began: float) -> str:
    """CPU time of the run and wall time of this call."""
    cpu = OmegaConf.load(folder / "cpu.yaml").cpu_seconds if (folder / "cpu.yaml").exists() else float("nan")
    other = "; made by other code of the package than the present" if RunFolder(folder).by_other_code() else ""
    return f"{cpu:.0f} CPU-seconds to train and answer, {time.perf_counter() - began:.0f} s for this call{other}"


def report(
    metrics: Mapping[str, float], memory: Mapping[str, Mapping[str, float]], took: str, overrides: Sequence[str]
) -> str:
    """The page that is committed."""

    def score(acting: str, task: str) -> str:
        return f"{metrics[f'{acting}_on_{task}/vqa_accuracy']:.3f}"

    rows = [f"| {acting} | " + " | ".join(score(acting, task) for task in TASKS) + " |" for acting in ("base", *TASKS)]
    wrong = " | ".join(f"{metrics[f'{task}_on_{task}/vqa_accuracy/shuffled']:.3f}" for task in TASKS)
    chance = " | ".join(f"{metrics[f'{task}_on_{task}/chance']:.3f}" for task in TASKS)
    kept = [
        f"| {words} | " + " | ".join(f"{memory[kind][name] / 2**20:.2f}" for name in MEMORY) + " |"
        for words, kind in (("one base, two adapters", "one"), ("two models", "two"))
    ]
    merging = []
    for task in TASKS:
        names = [f"merging/{task}/{name}" for name in ("float32", "float64", "largest_logit")]
        single, double, largest = (metrics[name] for name in names)
        relative = f"{single / largest:.1e} of the largest logit"
        merging.append(f"- `{task}`: {single:.1e} in float32, which is {relative}; {double:.1e} in float64")
    count = int(metrics[f"{TASKS[0]}_on_{TASKS[0]}/vqa_accuracy/count"])
    command = " ".join(["python experiments/two_adapters/run.py", *overrides])
    return "\n".join(
        [
            f"`{command}`, {datetime.date.today().isoformat()}, one seed, {count} questions a task; {took}.",
            "",
            "| adapter that acts | accuracy: count | accuracy: attribute |",
            "|---|---|---|",
            *rows,
            f"| own adapter, shuffled images | {wrong} |",
            f"| chance | {chance} |",
            "",
            f"Batches of both tasks in turn, switched before each: {metrics['by_request/same_answers']:.1%} of "
            f"{int(metrics['by_request/answers'])} answers are those of the adapter alone.",
            "",
            "| MiB, each in a process of its own | weights | of which adapters | growth of the process | its peak |",
            "|---|---|---|---|---|",
            *kept,
            "",
            "Largest difference of a logit, merged against unmerged:",
            "",
            *merging,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
