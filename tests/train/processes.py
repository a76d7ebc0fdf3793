"""Training in forked processes: cheap to start, and free to be killed."""

import multiprocessing
import os
import signal
import socket
from pathlib import Path

from fake_lab import evaluate, run


def forked(target, *args):
    """A started process running ``target(*args)``."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def run_and_die(cfg, folder: Path, steps: int) -> None:
    """Train in a process that kills itself in the middle of optimizer step `steps` (from 0, over all stages)."""
    process = forked(_dying, cfg, folder, steps)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def _dying(cfg, folder, steps):
    from fake_lab import _die_after

    _die_after(steps)
    run(cfg, folder)


def run_ranks(cfg, folder: Path, ranks: int = 2, die_in: int | None = None, patience: float = 120) -> list[int | None]:
    """Train with several gloo ranks, which all kill themselves in optimizer step `die_in`; their exit codes.

    Ranks are forked from a process that has only imported: one forked from a process that has computed inherits the
    state of its threads without the threads. Ranks that hang are killed after `patience` seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cfg.trainer.devices = ranks
    clean = multiprocessing.get_context("forkserver")
    clean.set_forkserver_preload(["fake_lab", "tower_lab"])
    processes = [clean.Process(target=_rank, args=(cfg, folder, rank, ranks, port, die_in)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(patience)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def _rank(cfg, folder, rank, ranks, port, die_in):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(ranks)
    )
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = rank
    if die_in is not None:
        from fake_lab import _die_after

        _die_after(die_in)
    if rank:
        from vlmlab.train.run import train

        train(cfg, folder, evaluate)
    else:
        run(cfg, folder)
