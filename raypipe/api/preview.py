"""Inspect a source before a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raypipe import storage
from raypipe.api.runs import config_data
from raypipe.config import Config, apply_overrides, parse_config
from raypipe.errors import ConfigError, RaypipeError, SourceError
from raypipe.plugins import code_allowed
from raypipe.runs.rejects import nothing_readable

if TYPE_CHECKING:
    from raypipe.estimate import Survey
    from raypipe.estimate.cost import Machine


def inspect(
    uri: str | os.PathLike[str] | None = None,
    *,
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    samples: int = 256,
    seed: int = 0,
    grid: str | None = None,
    like: str | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    address: str | None = None,
    allow_code: bool = False,
) -> Survey:
    """Inspect a source before running anything, and estimate the cost of a run. Takes seconds.

    Reports the balance of the classes, the sizes of the images and the expected rejects, from
    samples spread over the source.

    Parameters
    ----------
    uri : str or os.PathLike, optional
        The source. Default: that of `config`.
    config : Config, mapping or str, optional
        A `Config`, a mapping of the same shape (`run` is not needed), or the path or URI of a YAML
        file. Default: the default settings.
    overrides : sequence of str
        `field=value` of the section `source`, or `section.field=value`.
    samples : int
        Number of samples to draw.
    seed : int
        Random seed of the draw.
    grid : str, optional
        Path or URI of a PNG to write, which shows 64 of the samples.
    like : str, optional
        A finished run. The estimate scales its ledger instead of stored constants.
    cpus, gpus : float, optional
        Resources of the run. Default: those of this machine.
    address : str, optional
        A Ray cluster whose resources are used instead; "auto": RAY_ADDRESS. Ray is not touched
        otherwise.
    allow_code : bool
        Import the code that the configuration names, and check its options. Only for
        configurations that you trust.

    Returns
    -------
    Survey
        What the source contains; its `cost` is the estimate, None without samples.

    Raises
    ------
    ConfigError
        For settings or options that are not allowed.
    SourceError
        If nothing can be read.
    RunError
        If `like` is not a run.

    Examples
    --------
    >>> import raypipe
    >>> raypipe.inspect("digits://").samples
    1797
    """
    from raypipe.estimate import inspect_source
    from raypipe.estimate.cost import estimate
    from raypipe.estimate.outside_code import described_code
    from raypipe.scores.registry import check_scores

    if samples < 1:
        raise ConfigError(f"samples: {samples} is not allowed: give at least 1")
    settings = _settings(uri, {} if config is None else config_data(config), overrides)
    machine = _machine(cpus, gpus, address)
    if grid is not None:
        from raypipe.estimate.contact_sheet import refuse_other_file

        refuse_other_file(grid)
    with code_allowed(allow_code):
        check_scores(settings)
        inspection = inspect_source(
            settings.source, samples=samples, seed=seed, image_size=settings.proxy.image_size
        )
        if grid is not None:
            from raypipe.estimate.contact_sheet import contact_sheet
            from raypipe.vision.own_code import transform_to_show

            transform = transform_to_show(settings.source)
            storage.write_bytes(
                grid, contact_sheet(inspection.survey, inspection.drawn, transform=transform)
            )
        survey = replace(inspection.survey, code=described_code(settings))
    if not survey.samples:
        raise SourceError(nothing_readable(settings.source.uri, survey.unreadable_files))
    name = _name_of_settings(config, bool(overrides))
    cost = estimate(survey, settings, machine, settings=name, like=like)
    if settings.embed.table is not None:
        from raypipe.estimate.table_warnings import table_warnings

        ids = [item.sample.sample_id for item in inspection.drawn]
        cost = replace(cost, warnings=(*cost.warnings, *table_warnings(settings, ids, survey)))
    return replace(survey, cost=cost)


def _settings(
    uri: str | os.PathLike[str] | None, data: Mapping[str, Any], overrides: Sequence[str]
) -> Config:
    """Return the settings of a run over the source."""
    data = {"run": "unused", **data}
    section = data.get("source") or {}
    if isinstance(section, Mapping):
        data["source"] = section if uri is None else {**section, "uri": uri}
    dotted = [item if "." in item.partition("=")[0] else f"source.{item}" for item in overrides]
    data = apply_overrides(data, dotted)
    if not data["source"]:
        raise ConfigError("nothing to inspect: give a source, or a configuration with source.uri")
    return parse_config(data)


def _name_of_settings(config: object, overridden: bool) -> str:
    if config is None:
        return f"{'the given settings, otherwise ' if overridden else ''}default settings"
    if isinstance(config, str | os.PathLike):
        return f"the settings of {os.fspath(config)}{' and --set' if overridden else ''}"
    return "the given settings"


def _machine(cpus: float | None, gpus: float | None, address: str | None) -> Machine:
    """Return the resources of a run: the given ones, or those of the cluster or this machine."""
    from raypipe.estimate.cost import Machine, this_machine

    for name, value, minimum in (("cpus", cpus, 1), ("gpus", gpus, 0)):
        if value is not None and not minimum <= value <= 1e6:
            raise ConfigError(f"{name}: {value:g} is not allowed: give at least {minimum}")
    machine = this_machine() if address is None else _cluster_of(address)
    if address is None and os.environ.get("RAY_ADDRESS"):
        machine = replace(
            machine, where="this machine (--address auto estimates for the cluster at RAY_ADDRESS)"
        )
    if cpus is None and gpus is None:
        return machine
    return Machine(
        cpus if cpus is not None else machine.cpus,
        gpus if gpus is not None else machine.gpus,
        "as given",
    )


def _cluster_of(address: str) -> Machine:
    from raypipe.distributed.cluster import resources_at
    from raypipe.estimate.cost import Machine

    if address == "auto" and not os.environ.get("RAY_ADDRESS"):
        raise RaypipeError("--address auto: RAY_ADDRESS is not set; give the address of a cluster")
    cluster = resources_at(address)
    return Machine(
        cluster.cpus,
        cluster.gpus,
        f"the cluster at {os.environ['RAY_ADDRESS'] if address == 'auto' else address}",
    )
