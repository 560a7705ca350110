"""Settings of the pilot, which tries strategies on the seed set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from raypipe.config.base import Positive, Settings
from raypipe.config.choices import CandidateName
from raypipe.config.parts import part_names_accepted
from raypipe.config.select import KeepFraction, SelectSettings

CandidateOptions = dict[str, bool | int | float | str]
CANDIDATE_OPTIONS = (
    "beta_exponent",
    "by_class",
    "difficulty",
    "easy_fraction",
    "hard_cutoff",
    "strata",
)
"""Settings of `select` that a candidate can set."""


class PilotSettings(Settings):
    """Pilot: small trainings on the seed set, which show whether keep-lists help."""

    enabled: bool | Literal["auto"] = Field(
        "auto",
        description="Run the pilot. auto: if select.strategy is auto and the source has labels.",
    )
    budget: float = Field(
        0.5,
        gt=0,
        description="Work of the trainings, as a share of that of training the proxies. It is "
        "counted by network, pixels and images, so that every machine makes the same trainings. "
        "Images count with their full size (proxy.progressive_resizing).",
    )
    candidates: tuple[CandidateName | dict[CandidateName, CandidateOptions], ...] = Field(
        (
            {"ccs": {"strata": 1}},
            "ccs",
            {"beta": {"by_class": True}},
        ),
        min_length=1,
        description="Strategies to try: names, or {name: options of select}. The first come first "
        "if the budget does not suffice for all. Strategies from other packages have their options "
        "in select.options.",
    )
    keep: tuple[KeepFraction, ...] = Field(
        (0.2, 0.35, 0.6), min_length=1, description="Fractions that are tried."
    )
    sizes: tuple[KeepFraction, ...] = Field(
        (0.5, 1.0),
        min_length=1,
        description="Sizes of the set that lists are cut from, as shares of the seed set.",
    )
    max_samples: Positive = Field(
        10_000, description="Number of seed samples to use at most, drawn by a hash of the id."
    )
    max_repeats: int = Field(
        12, ge=2, description="Number of trainings of each list, with other weights and draws."
    )
    model: str = Field("small", min_length=1, description="Network. See proxy.model.")
    image_size: int = Field(
        32,
        ge=8,
        le=1024,
        description="Side of the images in pixels, at most. Larger seed images are halved.",
    )
    epochs: Positive = Field(15, description="Passes over a list.")
    batch_size: Positive = Field(32, description="Images per step.")
    lr: float = Field(0.05, gt=0, description="Peak learning rate.")
    seed: int = Field(0, ge=0, description="Random seed of weights, order and draws.")

    @field_validator("candidates", "keep", "sizes", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        single = isinstance(value, int | float | str | Mapping) and not isinstance(value, bool)
        return [value] if single else value

    @field_validator("keep", "sizes")
    @classmethod
    def _ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _candidates_fit(self) -> PilotSettings:
        from raypipe.config.choices import PROXY_MODELS

        if self.model not in PROXY_MODELS:
            raise ValueError(f"model: {self.model!r} is not one of {', '.join(PROXY_MODELS)}")
        names = [name for name, _ in self.named_candidates()]
        if len(set(names)) < len(names):
            raise ValueError("candidates: one of them occurs twice")
        return self

    def named_candidates(self) -> list[tuple[str, dict[str, Any]]]:
        """Return name and settings of `select` of every candidate.

        Raises
        ------
        ValueError
            If an option is unknown or has a wrong value.
        """
        result = []
        for item in self.candidates:
            choices = {item: {}} if isinstance(item, str) else item
            for strategy, options in choices.items():
                changes = {"strategy": strategy, **options}
                unknown = sorted(set(options) - set(CANDIDATE_OPTIONS))
                if unknown:
                    raise ValueError(
                        f"candidates: {strategy} has the unknown option {unknown[0]!r}; options "
                        f"are {', '.join(CANDIDATE_OPTIONS)}"
                    )
                try:
                    SelectSettings.model_validate({"keep": list(self.keep), **changes})
                except ValidationError as error:
                    problem = error.errors()[0]
                    where = ".".join(map(str, problem["loc"]))
                    raise ValueError(
                        f"candidates: {strategy}: {where} {problem['msg']}".rstrip()
                    ) from None
                result.append((candidate_name(strategy, options), changes))
        return result


def candidate_name(strategy: str, options: Mapping[str, Any]) -> str:
    """Return the name of a candidate, such as "ccs, strata 1"."""
    parts = [
        "by class" if name == "by_class" and value is True else f"{name.replace('_', ' ')} {value}"
        for name, value in sorted(options.items())
    ]
    return ", ".join([strategy, *parts])


def settings_of_candidate(select: SelectSettings, changes: Mapping[str, Any]) -> SelectSettings:
    """Return how a candidate cuts lists: the run's settings of `select` with its own.

    Without a `hard_cutoff` of its own, it has that of auto: a number need not fit the fractions of
    the pilot. The settings are not checked against `select.keep` and `select.weights`.
    """
    unchecked = {"hard_cutoff": "auto", "weights": "none"}
    with part_names_accepted():  # the pilot's settings are validated already
        settings = SelectSettings.model_validate({**select.model_dump(), **changes, **unchecked})
    cutoff = changes.get("hard_cutoff", "auto")
    return settings.model_copy(update={"hard_cutoff": cutoff, "weights": select.weights})


def random_settings(select: SelectSettings) -> SelectSettings:
    """Return how random lists within classes are cut.

    They are not within classes only if `select.by_class` is false.
    """
    changes = {"strategy": "random", "by_class": select.within_classes, "hard_cutoff": "auto"}
    with part_names_accepted():
        return SelectSettings.model_validate({**select.model_dump(), **changes})
