"""Composer's loggers and callbacks by name, with their keyword arguments checked before anything is built."""

from __future__ import annotations

import inspect
import logging
import netrc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from composer import callbacks as composer_callbacks
from composer import loggers as composer_loggers
from composer.core import Callback, Event, State
from composer.loggers import Logger, LoggerDestination

from mohd_train import compat
from mohd_train.errors import UserError
from mohd_train.utils.text import first_line, nearest

log = logging.getLogger(__name__)


class WandBLogger(composer_loggers.WandBLogger):
    """Composer's W&B logger, without letting W&B's absence or failure stop the run."""

    def init(self, state: State, logger: Logger) -> None:
        """Records offline if W&B can't be reached."""
        import wandb

        compat.wandb_has_get_url()
        try:
            super().init(state, logger)
        except (wandb.errors.Error, OSError) as error:
            if self._init_kwargs.get("mode") == "offline":
                raise
            print(
                f"warning: W&B can't be reached ({first_line(error)}); this session is recorded offline: upload it later "
                f"with `wandb sync {self._init_kwargs.get('dir', '.')}/wandb/offline-run-*`",
                file=sys.stderr,
                flush=True,
            )
            self._init_kwargs["mode"] = "offline"
            super().init(state, logger)


LOGGERS: dict[str, type[LoggerDestination]] = {
    "wandb": WandBLogger,
    "tensorboard": composer_loggers.TensorboardLogger,
    "file_logger": composer_loggers.FileLogger,
    "in_memory": composer_loggers.InMemoryLogger,
    "mlflow": composer_loggers.MLFlowLogger,
}
CALLBACKS: dict[str, type[Callback]] = {
    "speed_monitor": composer_callbacks.SpeedMonitor,
    "lr_monitor": composer_callbacks.LRMonitor,
    "memory_monitor": composer_callbacks.MemoryMonitor,
    "optimizer_monitor": composer_callbacks.OptimizerMonitor,
    "activation_monitor": composer_callbacks.ActivationMonitor,
    "runtime_estimator": composer_callbacks.RuntimeEstimator,
    "system_metrics_monitor": composer_callbacks.SystemMetricsMonitor,
    "nan_monitor": composer_callbacks.NaNMonitor,
    "early_stopper": composer_callbacks.EarlyStopper,
    "threshold_stopper": composer_callbacks.ThresholdStopper,
    "memory_snapshot": composer_callbacks.MemorySnapshot,
    "oom_observer": composer_callbacks.OOMObserver,
}
# In every run; a config entry of that name replaces the arguments, null leaves it out.
DEFAULT_CALLBACKS: dict[str, dict[str, Any]] = {"speed_monitor": {"window_size": 10}, "lr_monitor": {}}


def _check(section: str, wanted: Mapping[str, Any], known: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """``wanted`` as name -> keyword arguments, without those set to null. Raises UserError for what is unknown."""
    checked: dict[str, dict[str, Any]] = {}
    for name, arguments in wanted.items():
        if name not in known:
            raise UserError(f"{section}: unknown name {name!r}{nearest(name, list(known))}; known: {', '.join(known)}")
        if arguments is None:
            continue
        if not isinstance(arguments, Mapping):
            raise UserError(
                f"{section}.{name} is {arguments!r}; it must be a mapping of keyword arguments, or null for off"
            )
        parameters = inspect.signature(known[name]).parameters
        for key in arguments:
            if key not in parameters:
                raise UserError(
                    f"{section}.{name}: unknown keyword argument {key!r}{nearest(str(key), list(parameters))}"
                )
        checked[name] = dict(arguments)
    return checked


def check_loggers(wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Checks the ``loggers`` section of a config."""
    return _check("loggers", wanted, LOGGERS)


def check_callbacks(wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Checks the ``callbacks`` section of a config, with the defaults filled in."""
    return _check("callbacks", DEFAULT_CALLBACKS | dict(wanted), CALLBACKS)


def _build(section: str, name: str, kind: type, arguments: dict[str, Any]) -> Any:
    try:
        return kind(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"{section}.{name}: {first_line(error)}") from error


def build_callbacks(wanted: Mapping[str, Any]) -> list[Callback]:
    """Composer's callbacks that a config names, and the default ones."""
    return [_build("callbacks", name, CALLBACKS[name], kwargs) for name, kwargs in check_callbacks(wanted).items()]


def wandb_is_offline() -> bool:
    """Whether W&B records to disk alone: WANDB_MODE says so, or there is no key (WANDB_API_KEY, or netrc by ``wandb
    login``)."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode == "offline"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return not os.environ.get("WANDB_API_KEY") and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is None
    except (FileNotFoundError, netrc.NetrcParseError):
        return True


def tolerated(name: str, destination: LoggerDestination) -> LoggerDestination:
    """``destination``, switched off for the session, with an error message, once it fails after its start: a logger
    must not end a run of weeks. ``metrics.jsonl`` has everything."""
    theirs: Any = destination
    run_event = theirs.run_event
    guarded = {
        method: getattr(theirs, method) for method in ("log_metrics", "log_hyperparameters", "log_images", "log_traces")
    }
    is_off = False

    def switch_off(error: Exception) -> None:
        nonlocal is_off
        is_off = True
        log.error("%s failed (%s: %s): switched off for this session", name, type(error).__name__, first_line(error))

    def on_event(event: Event, state: State, logger: Logger) -> None:
        if is_off:
            return
        try:
            run_event(event, state, logger)
        except Exception as error:  # whatever its library raises
            if event == Event.INIT:  # a wrong setting is the user's to mend, before any training
                raise
            switch_off(error)

    def guard(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            if is_off:
                return
            try:
                method(*args, **kwargs)
            except Exception as error:
                switch_off(error)

        return call

    theirs.run_event = on_event
    for method, original in guarded.items():
        setattr(theirs, method, guard(original))
    return destination


def build_loggers(wanted: Mapping[str, Any], run_folder: Path, run_id: str) -> list[LoggerDestination]:
    """Composer's loggers that a config names, writing below ``run_folder``.

    Args:
        wanted: the ``loggers`` section.
        run_folder: where TensorBoard and W&B put their files unless told otherwise.
        run_id: W&B's id, fixed for a run so that a resumed session continues the same W&B run.
    """
    destinations: list[LoggerDestination] = []
    for name, kwargs in check_loggers(wanted).items():
        if name == "wandb":
            offline = wandb_is_offline()
            # The terminal is for progress: online, the run's address alone; offline, nothing.
            quiet = {"silent": True} if offline else {"quiet": True}
            ours = {"id": run_id, "resume": "allow", "dir": str(run_folder), "settings": quiet}
            mode = {"mode": "offline"} if offline else {}
            kwargs["init_kwargs"] = ours | mode | dict(kwargs.get("init_kwargs") or {})
        elif name == "tensorboard":
            kwargs.setdefault("log_dir", str(run_folder / "tensorboard"))
        elif name == "file_logger":
            kwargs.setdefault("filename", str(run_folder / "logs" / "composer-rank{rank}.txt"))
        destinations.append(tolerated(name, _build("loggers", name, LOGGERS[name], kwargs)))
    return destinations
