"""Callbacks that Composer lacks: file log, progress, realized mix, routing statistics, validation total, run
record, kernel block sizes; and those that watch for faults in the loss, the routers and the first batch."""

from mohd_train.train.callbacks.domain_mix import DomainMix
from mohd_train.train.callbacks.kernel_sizes import KernelSizes
from mohd_train.train.callbacks.loss_guard import LossGuard
from mohd_train.train.callbacks.metrics_file import MetricsFile
from mohd_train.train.callbacks.progress import Progress
from mohd_train.train.callbacks.router_collapse import RouterCollapse
from mohd_train.train.callbacks.routing_statistics import RoutingStatistics
from mohd_train.train.callbacks.run_recorder import RunRecorder
from mohd_train.train.callbacks.uploads import Uploads
from mohd_train.train.callbacks.validation_total import ValidationTotal
from mohd_train.train.callbacks.watchdog import FirstBatchWatchdog
from mohd_train.train.callbacks.worker_watch import WorkerWatch

__all__ = [
    "DomainMix",
    "FirstBatchWatchdog",
    "KernelSizes",
    "LossGuard",
    "MetricsFile",
    "Progress",
    "RouterCollapse",
    "RoutingStatistics",
    "RunRecorder",
    "Uploads",
    "ValidationTotal",
    "WorkerWatch",
]
