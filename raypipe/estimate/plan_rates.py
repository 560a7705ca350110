"""The rates of `raypipe plan`: what was measured, on which machine, and how to replace them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raypipe import storage
from raypipe.errors import ConfigError
from raypipe.estimate import rates as constants
from raypipe.vision import network_costs


@dataclass(frozen=True)
class Rates:
    """Rates and where they were measured.

    Attributes
    ----------
    machine
        A description.
    decode
        Images that a CPU core decodes in a second, by the pixels a side to which they are decoded
        (images of 104 kB and 0.2 megapixels).
    cpu_macs, gpu_macs
        Multiply-adds of a CPU core and of a GPU in a second.
    driver_bytes
        Memory of the driver for a fragment.
    decision_seconds
        Processor seconds for a fragment until a restarted run knows what is left.
    list_seconds
        Processor seconds for a listed file.
    index_bytes
        Bytes of the index for a fragment.
    sources
        Field -> where its number comes from.
    """

    machine: str = "one core of an AMD EPYC server, no GPU"
    decode: Mapping[int, float] = field(default_factory=lambda: {64: 873.0, 224: 514.0})
    cpu_macs: float = network_costs.CPU_MACS
    gpu_macs: float = constants.GPU_MACS
    driver_bytes: float = 1000.0
    decision_seconds: float = 1.2e-5
    list_seconds: float = 6e-5
    index_bytes: float = 40.0
    sources: Mapping[str, str] = field(
        default_factory=lambda: {
            "decode": "benchmarks/results/reading-cpu.txt",
            "cpu_macs": "raypipe.estimate.rates; alignment-cpu.txt has 60 to 90e9",
            "gpu_macs": "assumed, about that of a T4",
            "driver_bytes": "benchmarks/results/fragments-cpu.txt",
            "decision_seconds": "benchmarks/results/fragments-cpu.txt",
            "list_seconds": "benchmarks/results/indexing-cpu.txt",
            "index_bytes": "benchmarks/results/fragments-cpu.txt",
        }
    )

    def decode_seconds(self, side: int) -> float:
        """Return the seconds that a core takes to decode one image to a square of this side.

        Between measured sides they are interpolated; beyond, those of the nearest side hold.
        """
        sides = sorted(self.decode)
        low = max((known for known in sides if known <= side), default=sides[0])
        high = min((known for known in sides if known >= side), default=sides[-1])
        part = (side - low) / (high - low) if high > low else 0.0
        return (1 - part) / self.decode[low] + part / self.decode[high]

    def changed(self, values: Mapping[str, Any], source: str) -> Rates:
        """Return these rates with other values of some fields, which come from `source`.

        Raises
        ------
        ConfigError
            If a name is not a field, or a value is not a rate.
        """
        names = {item.name for item in dataclasses.fields(self)} - {"sources"}
        fresh: dict[str, Any] = {}
        for name, value in values.items():
            if name not in names:
                raise ConfigError(f"{source}: {name!r} is not one of {', '.join(sorted(names))}")
            try:
                fresh[name] = _field_value(name, value)
            except (TypeError, ValueError):
                raise ConfigError(
                    f"{source}: {name} = {value!r} is not a rate; give a number above 0"
                ) from None
        return dataclasses.replace(
            self, **fresh, sources={**self.sources, **dict.fromkeys(fresh, source)}
        )


def _field_value(name: str, value: Any) -> Any:
    """Return the value of a field of `Rates`; raise TypeError or ValueError for a wrong one."""
    if name == "machine":
        return str(value)
    if name != "decode":
        return _positive(value)
    by_side = value.items() if isinstance(value, Mapping) else [(64, value)]
    rates = {int(side): _positive(rate) for side, rate in by_side}
    if not rates:
        raise ValueError("no rate")
    return rates


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf or isinstance(value, bool):
        raise ValueError(value)
    return number


def read_rates(uri: str) -> Rates:
    """Read rates from a JSON file with fields of `Rates`; missing fields keep their default.

    Raises
    ------
    ConfigError
        If the file does not exist or has something else in it.
    """
    try:
        content = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        raise ConfigError(f"{uri}: no such file") from None
    except ValueError as error:
        raise ConfigError(f"{uri}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{uri}: expected an object with rates such as decode, not {type(content).__name__}"
        )
    return Rates().changed(content, uri)
