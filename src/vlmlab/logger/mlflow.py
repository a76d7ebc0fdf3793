"""``mlflow``: a run of an MLflow experiment."""

from __future__ import annotations

from lightning.pytorch.loggers import MLFlowLogger

from vlmlab.contracts.values import Text


class MLflow(MLFlowLogger):
    """One MLflow run a process: a run that goes on has the rows that the earlier ones lack.

    Args:
        experiment_name: the experiment.
        tracking_uri: of the server; None: files in `save_dir`.
        save_dir: None becomes the run folder.
        run_id: of an MLflow run to go on with.

    Raises:
        ModuleNotFoundError: mlflow is not installed.
    """

    def __init__(
        self,
        experiment_name: Text = "vlmlab",
        tracking_uri: Text | None = None,
        save_dir: Text | None = None,
        run_id: Text | None = None,
    ) -> None:
        super().__init__(
            experiment_name, tracking_uri=tracking_uri, save_dir=f"{save_dir or '.'}/mlruns", run_id=run_id
        )
