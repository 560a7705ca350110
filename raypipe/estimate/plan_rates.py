"""The rates that `raypipe plan` goes by: what was measured, on which machine, and how a user's own take their place."""

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


@dataclass(frozen=True)
class Rates:
    """What was measured, and where.

    machine          in words
    decode           images a CPU core decodes in a second, by the side they are brought to, in pixels (104 kB, 0.2 megapixels)
    cpu_macs         multiply-adds of a CPU core in a second
    gpu_macs         of a GPU
    driver_bytes     of the driver's memory for a fragment
    decision_seconds processor seconds for a fragment until a run that is started again knows what is left
    list_seconds     processor seconds for a listed file
    index_bytes      of the index for a fragment
    sources          field -> where its number comes from
    """

    machine: str = "one core of an AMD EPYC server, no GPU"
    decode: Mapping[int, float] = field(default_factory=lambda: {64: 873.0, 224: 514.0})
    cpu_macs: float = constants.CPU_MACS
    gpu_macs: float = constants.GPU_MACS
    driver_bytes: float = 1000.0
    decision_seconds: float = 1.2e-5
    list_seconds: float = 6e-5
    index_bytes: float = 40.0
    sources: Mapping[str, str] = field(
        default_factory=lambda: {
            "decode": "benchmarks/results/reading-cpu.txt",
            "cpu_macs": "raypipe.estimate.rates; alignment-cpu.txt has 60 to 90e9",
            "gpu_macs": "assumed, about a T4: no GPU was measured",
            "driver_bytes": "benchmarks/results/fragments-cpu.txt",
            "decision_seconds": "benchmarks/results/fragments-cpu.txt",
            "list_seconds": "benchmarks/results/indexing-cpu.txt",
            "index_bytes": "benchmarks/results/fragments-cpu.txt",
        }
    )

    def decode_seconds(self, side: int) -> float:
        """Seconds of a core to decode one image to a square; between the measured sides along a line, beyond them as at the nearest."""
        sides = sorted(self.decode)
        low = max((known for known in sides if known <= side), default=sides[0])
        high = min((known for known in sides if known >= side), default=sides[-1])
        part = (side - low) / (high - low) if high > low else 0.0
        return (1 - part) / self.decode[low] + part / self.decode[high]

    def changed(self, values: Mapping[str, Any], source: str) -> Rates:
        """With other values of some fields, which come from `source`. Raises ConfigError for what is no rate."""
        known = {item.name for item in dataclasses.fields(self)} - {"sources"}
        fresh: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"{source}: {name!r} is not one of {', '.join(sorted(known))}")
            try:
                if name == "machine":
                    fresh[name] = str(value)
                elif name == "decode":
                    table = value.items() if isinstance(value, Mapping) else [(64, value)]
                    fresh[name] = {int(side): _positive(rate) for side, rate in table}
                    if not fresh[name]:
                        raise ValueError("no rate")
                else:
                    fresh[name] = _positive(value)
            except (TypeError, ValueError):
                raise ConfigError(
                    f"{source}: {name} = {value!r} is not a rate: a number above 0"
                ) from None
        return dataclasses.replace(
            self, **fresh, sources={**self.sources, **dict.fromkeys(fresh, source)}
        )


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf or isinstance(value, bool):
        raise ValueError(value)
    return number


def read_rates(uri: str) -> Rates:
    """Rates of a JSON file: fields of `Rates`, those that are left out as measured here. Raises ConfigError."""
    try:
        found = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        raise ConfigError(f"{uri}: no such file") from None
    except ValueError as error:
        raise ConfigError(f"{uri}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{uri}: expected an object with rates such as decode, found {type(found).__name__}"
        )
    return Rates().changed(found, uri)
