"""The process's metrics as Prometheus reads them, if prometheus-client is installed (the extra `prometheus`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from bus.errors import FoldbusError
from bus.metrics import MemoryMetrics

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MissingPrometheus(FoldbusError):
    """prometheus-client is not installed."""


def render(metrics: MemoryMetrics) -> bytes:
    """Text exposition format: what was counted, and the process's own figures. Raises MissingPrometheus."""
    try:
        from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
    except ImportError as error:
        raise MissingPrometheus(
            "metrics are exposed by prometheus-client: pip install 'foldbus[prometheus]'"
        ) from error
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    registry.register(Collector(metrics))
    return bytes(generate_latest(registry))


class Collector:
    """Reads a MemoryMetrics anew at every scrape; for a registry of your own, too."""

    def __init__(self, metrics: MemoryMetrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, series in sorted(_by_name(self._metrics.counters).items()):
            labels = _labels(series)
            counter = CounterMetricFamily(name.removesuffix("_total"), name, labels=labels)
            for found, value in series:
                counter.add_metric([found.get(label, "") for label in labels], value)
            yield counter
        for name, series in sorted(_by_name(self._metrics.gauges).items()):
            labels = _labels(series)
            gauge = GaugeMetricFamily(name, name, labels=labels)
            for found, value in series:
                gauge.add_metric([found.get(label, "") for label in labels], value)
            yield gauge


_Series = list[tuple[Mapping[str, str], float]]


def _by_name(values: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]) -> dict[str, _Series]:
    found: dict[str, _Series] = {}
    for (name, labels), value in values.items():
        found.setdefault(name, []).append((dict(labels), value))
    return found


def _labels(series: _Series) -> list[str]:
    """All that any series of a name carries: Prometheus wants the same of each."""
    return sorted({label for labels, _ in series for label in labels})
