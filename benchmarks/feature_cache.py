"""The feature cache over a sweep of four cells: CPU time with ``cache=disk`` against ``cache=none``, in one process.

    python benchmarks/feature_cache.py [--images 128]

The cells are connector=mlp,linear x mask=bidir,causal, each one epoch of alignment over the same images with a frozen
tower and a frozen LM, both random: so the sweep shows every image to the tower four times, or once. Sweeps with and
without the cache take turns, cell by cell; one thread; the folder of features is empty at the beginning, and so every
ratio holds the time of filling it. The losses of both are compared.

The ratio hangs on the tower's share of the time, which is measured in the same run: 1 - share x 3/4 is the floor that
a cache without any cost would reach. "as at 900M" has the share that the tower of preset=improved_alignment_900m has in
its first stage (a third of the FLOPs, see ``vlmlab plan``); "heavy tower" is the same tower before a small LM.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from transformers import AutoConfig, Qwen2ForCausalLM

from vlmlab.cache.address import image_key
from vlmlab.cache.shelf import Shelf
from vlmlab.cli.conf import conf_folder
from vlmlab.encoder.scratch import ScratchEncoder
from vlmlab.runs import names as names  # registers the resolvers
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.towers.source import embedded, quiet
from vlmlab.train.run import train

CELLS = tuple((connector, mask) for connector in ("mlp", "linear") for mask in ("bidir", "causal"))


@dataclass(frozen=True)
class Setting:
    """Sizes of a comparison: of the tower (``ScratchEncoder``) and of the LM (``Qwen2Config``)."""

    name: str
    tower: dict[str, int]
    lm: dict[str, int]
    images: int
    batch: int


TOWER = {
    "image_size": 128,
    "patch_size": 8,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
}
LARGE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5}
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2}
SETTINGS = (("as at 900M", LARGE), ("heavy tower", SMALL))


@dataclass(frozen=True)
class Sweep:
    """CPU seconds and last losses of the four cells."""

    seconds: list[float]
    losses: list[float]


def save_lm(folder: Path, sizes: dict[str, int]) -> None:
    """A random Qwen2 of these sizes with the embedded tokenizer."""
    shutil.copytree(embedded("lm"), folder)
    config = AutoConfig.from_pretrained(folder)
    for name, value in (sizes | {"layer_types": ["full_attention"] * sizes["num_hidden_layers"]}).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    with quiet():
        Qwen2ForCausalLM(config).save_pretrained(folder)


def composed(setting: Setting, work: Path, connector: str, mask: str, cache: str) -> DictConfig:
    sizes = [f"encoder.{name}={value}" for name, value in setting.tower.items()]
    kept = [f"cache.folder={work / 'features'}"] if cache == "disk" else []
    align, steps = "recipe.stages.align", setting.images // setting.batch
    overrides = [
        "encoder=scratch", *sizes, "lm=hf", f"lm.path={work / 'lm'}", f"connector={connector}", f"mask={mask}",
        f"cache={cache}", *kept, "recipe=two_stage", "~recipe.stages.instruct", "collate.pack_length=null",
        f"{align}.batch_size={setting.batch}", f"{align}.steps={steps}", f"debug.overfit={setting.images}",
        "trainer.accelerator=cpu", "trainer.progress=false",
    ]  # fmt: skip
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("train", overrides)


def run_cell(cfg: DictConfig, folder: Path) -> tuple[float, float]:
    """CPU seconds of one training from its configuration to its result, without benchmarks; its last loss."""
    begin = time.process_time()
    with RunFolder(folder) as opened, contextlib.redirect_stdout(io.StringIO()):
        opened.open(plain(cfg))
        train(cfg, folder, lambda model, cfg, folder: {})
    spent = time.process_time() - begin
    return spent, [row["loss"] for row in RunFolder(folder).metrics() if "loss" in row][-1]


def sweeps(setting: Setting, work: Path) -> dict[str, Sweep]:
    """The sweep with and without the cache, cell by cell in turn."""
    save_lm(work / "lm", setting.lm)
    found = {cache: Sweep([], []) for cache in ("none", "disk")}
    for connector, mask in CELLS:
        for cache, sweep in found.items():
            cfg = composed(setting, work, connector, mask, cache)
            seconds, loss = run_cell(cfg, work / f"{connector}-{mask}-{cache}")
            sweep.seconds.append(seconds)
            sweep.losses.append(loss)
    return found


def milliseconds(work: Callable[[], Any], times: int, rounds: int = 3) -> float:
    """CPU milliseconds of one of `times` things that `work` does; the best of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
    return best / times * 1e3


@torch.no_grad()
def per_image(setting: Setting, work: Path) -> dict[str, float]:
    """Milliseconds of the tower in a batch and alone, of the hash, and of reading a record; bytes of a record."""
    encoder = ScratchEncoder(**setting.tower).eval()
    size, count = setting.tower["image_size"], setting.batch
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    length = encoder(pixels[:1]).grids[0].nbytes
    shelf, into = Shelf(work / "per_image.features", length), torch.zeros(length, dtype=torch.uint8).numpy().data
    keys = [image_key(image) for image in pixels]
    for key in keys:
        shelf.write(key, into)
    return {
        "batch": milliseconds(lambda: encoder(pixels), count),
        "alone": milliseconds(lambda: [encoder(image[None]) for image in pixels], count),
        "hash": milliseconds(lambda: [image_key(image) for image in pixels], count),
        "read": milliseconds(lambda: [shelf.read(key, into) for key in keys], count),
        "bytes": float(length),
    }


def compare(setting: Setting, work: Path) -> list[str]:
    """Lines of the comparison; runs and features are left in the folder `work`."""
    found, one = sweeps(setting, work), per_image(setting, work)
    none, disk = found["none"], found["disk"]
    difference = max(abs(a - b) / abs(a) for a, b in zip(none.losses, disk.losses, strict=True))
    assert difference < 1e-3, f"with the cache the loss is another: {none.losses}, {disk.losses}"
    share = one["batch"] * setting.images * len(CELLS) / 1e3 / sum(none.seconds)
    floor = 1 - share * (1 - 1 / len(CELLS))
    ratio = sum(disk.seconds) / sum(none.seconds)
    first, later = disk.seconds[0] / none.seconds[0], sum(disk.seconds[1:]) / sum(none.seconds[1:])
    return [
        f"{setting.name}: the tower takes {share:.2f} of the time, {setting.images} images in {len(CELLS)} cells",
        f"  CPU {sum(none.seconds):.1f} s with none, {sum(disk.seconds):.1f} s with disk: ratio {ratio:.2f}, "
        f"floor {floor:.2f}; first cell {first:.2f}, later ones {later:.2f}",
        f"  an image: tower {one['batch']:.2f} ms in a batch, {one['alone']:.2f} ms alone; hash {one['hash']:.3f} ms, "
        f"read {one['read']:.3f} ms ({one['bytes'] / 1e3:.0f} kB)",
        f"  losses differ by {difference:.1e} of themselves at most",
    ]


def real_size(work: Path) -> str:
    """What one image costs at 384 pixels and 729 features of width 1152, in bfloat16, without any tower."""
    pixels = torch.randint(0, 256, (3, 384, 384), dtype=torch.uint8)
    shelf, into = Shelf(work / "real.features", 729 * 1152 * 2), torch.zeros(729 * 1152 * 2, dtype=torch.uint8).numpy()
    key = image_key(pixels)
    write = milliseconds(lambda: [shelf.write(key, into.data) for _ in range(20)], 20)
    read = milliseconds(lambda: [shelf.read(key, into.data) for _ in range(20)], 20)
    hashed = milliseconds(lambda: [image_key(pixels) for _ in range(20)], 20)
    return f"SigLIP-So400m at 384: hash {hashed:.2f} ms, read {read:.2f} ms, write {write:.2f} ms an image (1.7 MB)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=128)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # what is done once per process comes before the first cell
        tiny = Setting("warm-up", TOWER | {"num_hidden_layers": 1}, SMALL, 4, 2)
        save_lm(Path(folder) / "lm", tiny.lm)
        run_cell(composed(tiny, Path(folder), "mlp", "bidir", "disk"), Path(folder) / "run")
        print(real_size(Path(folder)), flush=True)
    for name, lm in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(compare(Setting(name, TOWER, lm, given.images, 16), Path(folder))), flush=True)


if __name__ == "__main__":
    main()
