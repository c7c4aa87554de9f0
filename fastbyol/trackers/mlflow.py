"""MLflow. Its variables: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and more."""

import os
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from operator import attrgetter
from typing import Any

from fastbyol.config import Config
from fastbyol.run import Run
from fastbyol.settings.base import leaves
from fastbyol.trackers.base import Status, Tracker, summary_numbers, tagged

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_MAX_PARAMS = 100  # of a request


class MLflow(Tracker):
    """Sends metrics in a thread: a request to a server that is down is repeated for minutes."""

    name, label = "mlflow", "MLflow"

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastbyol-mlflow")
        self._pending: deque[Future[None]] = deque()

    def start(self, run: Run, known: str | None) -> str:
        """Start a run with the settings as parameters, or continue one.

        MLflow's parameters cannot change: a continued run keeps those that it began with.
        """
        import mlflow

        self._client = mlflow.MlflowClient()
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            return known
        chosen = os.environ.get("MLFLOW_EXPERIMENT_ID")
        experiment = chosen or mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "fastbyol")).experiment_id
        created = self._client.create_run(experiment, run_name=run.config.name).info.run_id
        params = [mlflow.entities.Param(key, str(attrgetter(key)(run.config))) for key, _, _ in leaves(Config)]
        for first in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(created, params=params[first : first + _MAX_PARAMS])
        return created

    def log(self, run: Run, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Queue a line. Raises what an earlier line raised."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        self._submit(step, tagged(kind, values))

    def _submit(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = time.time_ns() // 10**6
        metrics = [Metric(key, value, now_ms, step) for key, value in values.items()]
        self._pending.append(self._thread.submit(self._client.log_batch, self.id, metrics))

    def finish(self, summary: Mapping[str, Any], status: Status) -> None:
        """Send what is queued, and the numbers of the summary as metrics."""
        if numbers := summary_numbers(summary):
            self._submit(summary["steps"], numbers)
        for request in self._pending:
            request.result()
        self._client.set_terminated(self.id, _STATUS[status])
        self._thread.shutdown()

    def close(self) -> None:
        """Drop what is queued."""
        self._thread.shutdown(wait=False, cancel_futures=True)
