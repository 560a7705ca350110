"""The settings of a run: one model per stage (`raypipe.settings`), validated before any work starts.

A configuration is YAML (safe loading only). An unknown key or a bad value raises `ConfigError`, naming the field, the
value and what is allowed. Descriptions of the fields are also the comments `raypipe init` prints.
"""

from __future__ import annotations

import copy
import os
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from raypipe.errors import ConfigError
from raypipe.settings.base import Settings
from raypipe.settings.measure import SELF_TERM_BELOW, MeanSettings, MeasureSettings
from raypipe.settings.nightly import NightlySettings
from raypipe.settings.proxy import AdversarySettings, PoolSettings, ProxySettings
from raypipe.settings.pseudo_labels import PseudoLabelSettings
from raypipe.settings.results import (
    ClusterSettings,
    EmbedSettings,
    ExtrapolateSettings,
    ReportSettings,
    SelectSettings,
    TrustSettings,
)
from raypipe.settings.source import SeedSettings, SourceSettings

__all__ = [
    "SELF_TERM_BELOW",
    "AdversarySettings",
    "ClusterSettings",
    "Config",
    "EmbedSettings",
    "ExtrapolateSettings",
    "MeanSettings",
    "MeasureSettings",
    "NightlySettings",
    "PoolSettings",
    "ProxySettings",
    "PseudoLabelSettings",
    "ReportSettings",
    "SeedSettings",
    "SelectSettings",
    "SourceSettings",
    "TrustSettings",
    "absolute_paths",
    "apply_overrides",
    "commented_config",
    "dump_config",
    "load_config",
    "parse_config",
    "parse_settings",
    "read_config",
]

Section = TypeVar("Section", bound=Settings)


class Config(Settings):
    """Everything that decides what a run produces."""

    run: str = Field(description="where everything is written: local path, file:// or s3://")
    source: SourceSettings
    seed: SeedSettings = SeedSettings()
    pseudo_labels: PseudoLabelSettings = PseudoLabelSettings()
    proxy: ProxySettings = ProxySettings()
    measure: MeasureSettings = MeasureSettings()
    embed: EmbedSettings = EmbedSettings()
    extrapolate: ExtrapolateSettings = ExtrapolateSettings()
    trust: TrustSettings = TrustSettings()
    select: SelectSettings = SelectSettings()
    report: ReportSettings = ReportSettings()
    nightly: NightlySettings = NightlySettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _scores_fit(self) -> Config:
        wanted, given = self.extrapolate.score, self.measure.scores
        if wanted != "auto" and wanted not in given:
            raise ValueError(f"extrapolate.score: {wanted!r} is not one of measure.scores ({', '.join(given)})")
        followed = sorted(set(given) - set(self.measure.at_checkpoints))
        if self.proxy.trajectory == "none" and followed:
            raise ValueError("proxy.trajectory: 'none' leaves nothing to compute " + ", ".join(followed))
        epochs = self.proxy.checkpoint_epochs()
        for score in self.measure.at_checkpoints:
            settings = self.measure.settings_of(score)
            if isinstance(settings, MeanSettings) and not any(map(settings.takes, epochs)):
                raise ValueError(
                    f"measure.{score}: at checkpoints, but none is between first_epoch {settings.first_epoch} and last_epoch "
                    f"{settings.last_epoch}; they are of epochs {', '.join(map(str, epochs))} (from 0). See proxy.checkpoints"
                )
        if self.extrapolate.rehearsal is True and self._nothing_to_rehearse:
            raise ValueError(f"extrapolate.rehearsal: there is nothing to rehearse, since {self._nothing_to_rehearse}")
        return self

    @model_validator(mode="after")
    def _labels_from_somewhere(self) -> Config:
        if self.unsupervised and self.source.label_column is not None:
            raise ValueError(
                "pseudo_labels.clusters: the source's own labels would not be used; set source.label_column to null, which says that it "
                "has none or that they are not to be read, or leave pseudo_labels.clusters out"
            )
        if not self.unsupervised and self.source.label_column is None:
            raise ValueError(
                "source.label_column: null leaves no labels to train the proxy on; set pseudo_labels.clusters to have some from clusters"
            )
        return self

    @property
    def unsupervised(self) -> bool:
        """Whether labels are clusters, and no label of the source is read."""
        return self.pseudo_labels.clusters is not None

    @property
    def score(self) -> str:
        """The score that is extrapolated."""
        return self.measure.scores[0] if self.extrapolate.score == "auto" else self.extrapolate.score

    @property
    def rehearses(self) -> bool:
        """Whether a second proxy is trained to learn how the score differs where there was no training on the sample."""
        asked = self.extrapolate.rehearsal
        return self._nothing_to_rehearse == "" if asked == "auto" else asked

    @property
    def _nothing_to_rehearse(self) -> str:
        """Why there is nothing to rehearse; "" where there is."""
        if self.score in self.measure.at_checkpoints:
            return f"{self.score} is measured at checkpoints, on an audit set too"
        if self.extrapolate.method != "gnn":
            return f"method {self.extrapolate.method} does not learn from it"
        return "proxy.parts is above 1" if self.proxy.parts > 1 else ""

    @field_validator("proxy")
    @classmethod
    def _model_exists(cls, value: ProxySettings) -> ProxySettings:
        from raypipe.names import PROXY_MODELS

        if value.model not in PROXY_MODELS:
            raise ValueError(f"model: {value.model!r} is not one of {', '.join(PROXY_MODELS)}")
        return value


def parse_config(data: Mapping[str, Any]) -> Config:
    """Validate a mapping. Raises `ConfigError` with one line for each wrong field."""
    try:
        return Config.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError("bad configuration\n" + "\n".join(_lines(error))) from None


def parse_settings(section: type[Section], data: Mapping[str, Any], name: str) -> Section:
    """Validate settings that are no part of a configuration. Raises `ConfigError` with one line for each wrong field."""
    try:
        return section.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(f"bad settings of {name}\n" + "\n".join(_lines(error, section))) from None


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Read YAML from a path or URI and apply `section.field=value` overrides. Raises `ConfigError`.

    Relative paths in the file (`run`, `source.uri`) are relative to the working directory, as on any command line.
    """
    return absolute_paths(parse_config(apply_overrides(read_config(path), overrides)))


def read_config(path: str) -> dict[str, Any]:
    """The sections of a YAML file as they stand there, not validated. Raises `ConfigError`."""
    from raypipe.storage import read_bytes

    try:
        data = yaml.safe_load(read_bytes(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected sections such as 'source:' and 'proxy:', found {type(data).__name__}")
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with every `section.field=value` set; values are YAML. Raises `ConfigError` on a malformed one."""
    result = copy.deepcopy(dict(data))
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {item!r}: expected section.field=value")
        *sections, field = name.strip().split(".")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {item!r}: {section!r} is a value, not a section")
        try:
            target[field] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item!r}: not a YAML value: {error}") from None
    return result


def absolute_paths(config: Config) -> Config:
    """Make local paths absolute, since workers have other working directories."""

    def absolute(uri: str) -> str:
        return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))

    def absolute_in(section: Section, *names: str) -> Section:
        given = {name: getattr(section, name) for name in names}
        return section.model_copy(update={name: absolute(uri) for name, uri in given.items() if uri is not None})

    source = absolute_in(config.source, "uri", "root", "class_map")
    select, labels = absolute_in(config.select, "always_keep", "never_keep"), absolute_in(config.pseudo_labels, "weights")
    return config.model_copy(update={"run": absolute(config.run), "source": source, "pseudo_labels": labels, "select": select})


def dump_config(config: Config, sections: Mapping[str, Any] | None = None) -> str:
    """The resolved configuration, or some sections of it, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json", include=sections), sort_keys=False, allow_unicode=True)


def commented_config() -> str:
    """A complete configuration with a comment on every field, for `raypipe init`."""
    lines = ["# A raypipe configuration. Every value shown is the default; only run and source.uri are required.", ""]
    lines += ["run: runs/first              # " + str(Config.model_fields["run"].description)]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, Settings)):
            continue
        lines += ["", f"# {(section.__doc__ or '').strip()}", f"{name}:"]
        lines += _commented(section, "  ")
    return "\n".join(lines) + "\n"


def _commented(section: type[Settings], indent: str) -> Iterable[str]:
    for key, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            yield f"{indent}{key}:".ljust(29) + f"# {(info.annotation.__doc__ or '').strip()}"
            yield from _commented(info.annotation, indent + "  ")
            continue
        default = "data/train" if info.is_required() else info.default
        value = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
        value = value.removesuffix("\n").removesuffix("\n...").strip()
        yield f"{indent}{key}: {value}".ljust(29) + f"# {info.description}"


def _lines(error: ValidationError, root: Any = None) -> Iterable[str]:
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if not _is_union_branch(part)) or "configuration"
        if item["type"] == "extra_forbidden":
            yield f"  {where}: unknown setting{_suggestion(item['loc'], root or Config)}"
        elif item["type"] == "missing":
            yield f"  {where}: required, but missing"
        else:
            # of a rule on several settings the input is all of the section; the message names those that matter
            what = (
                ""
                if item["type"] == "value_error" and isinstance(item["input"], dict)
                else f"{_shown(item['input'])} is not allowed: "
            )
            yield f"  {where}: {what}{item['msg'].removeprefix('Value error, ')}"


def _shown(value: Any) -> str:
    """A value as it was given, shortened: what YAML writes with anchors can be longer than memory when it is written out."""
    short = reprlib.Repr()
    short.maxstring, short.maxother, short.maxlevel = 200, 200, 2
    return short.repr(value)[:400]


def _is_union_branch(part: str | int) -> bool:
    # pydantic puts the tried type ("int", "literal['auto']", "constrained-int") into the location of a union's error
    return isinstance(part, str) and (part in {"int", "bool", "float", "str"} or "[" in part or "-" in part)


def _suggestion(location: tuple[str | int, ...], model: Any) -> str:
    import difflib

    for part in location[:-1]:
        model = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
    names = list(getattr(model, "model_fields", {}))
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(names)}" if names else ""
