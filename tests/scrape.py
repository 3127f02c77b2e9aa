"""Pages of metrics, read as Prometheus reads them."""

from collections.abc import Callable, Iterable

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from kvstore.metrics import make_exposition
from tests.house import House, page

Labels = tuple[tuple[str, str], ...]


class Scrape:
    """One page of metrics; ``samples`` are its numbers by name and sorted labels."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples: dict[tuple[str, Labels], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.samples[sample.name, tuple(sorted(sample.labels.items()))] = sample.value

    def all(self, sample: str, /, **labels: str) -> list[float]:
        """Every sample with this name and at least these labels."""
        return [
            value
            for (name, given), value in self.samples.items()
            if name == sample and labels.items() <= dict(given).items()
        ]

    def number(self, sample: str, /, **labels: str) -> float:
        """The one sample with this name and at least these labels."""
        (found,) = self.all(sample, **labels)
        return found

    def true(self, sample: str, /, **labels: str) -> dict[str, str]:
        """The labels of the one sample with this name and at least these labels that is not 0."""
        (found,) = (
            dict(given)
            for (name, given), value in self.samples.items()
            if name == sample and value and labels.items() <= dict(given).items()
        )
        return found


def read(collect: Callable[[], Iterable[Metric]]) -> Scrape:
    """The page with one section."""
    return Scrape(make_exposition([collect])().decode())


async def scrape(house: House) -> Scrape:
    """Ask a server for its page over a socket."""
    status, text = await page(house.port, "/metrics")
    assert status == 200
    return Scrape(text)
