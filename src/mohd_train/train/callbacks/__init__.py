"""Callbacks that Composer does not have: file log, progress, realized mix, routing statistics, validation total, record."""

from mohd_train.train.callbacks.domain_mix import DomainMix
from mohd_train.train.callbacks.metrics_file import MetricsFile
from mohd_train.train.callbacks.progress import Progress
from mohd_train.train.callbacks.routing_statistics import RoutingStatistics
from mohd_train.train.callbacks.run_recorder import RunRecorder
from mohd_train.train.callbacks.validation_total import ValidationTotal

__all__ = ["DomainMix", "MetricsFile", "Progress", "RoutingStatistics", "RunRecorder", "ValidationTotal"]
