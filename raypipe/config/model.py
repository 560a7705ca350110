"""The settings of a run: one model per section, validated before any work starts."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from raypipe.config.base import Settings
from raypipe.config.cluster import ClusterSettings
from raypipe.config.embed import EmbedSettings
from raypipe.config.extrapolate import ExtrapolateSettings
from raypipe.config.measure import MeanSettings, MeasureSettings
from raypipe.config.nightly import NightlySettings
from raypipe.config.proxy import ProxySettings
from raypipe.config.pseudo_labels import PseudoLabelSettings
from raypipe.config.report import ReportSettings
from raypipe.config.seed import SeedSettings
from raypipe.config.select import SelectSettings
from raypipe.config.source import SourceSettings
from raypipe.config.trust import TrustSettings


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
            raise ValueError(
                f"extrapolate.score: {wanted!r} is not one of measure.scores ({', '.join(given)})"
            )
        followed = sorted(set(given) - set(self.measure.at_checkpoints))
        if self.proxy.trajectory == "none" and followed:
            raise ValueError(
                "proxy.trajectory: 'none' leaves nothing to compute " + ", ".join(followed)
            )
        epochs = self.proxy.checkpoint_epochs()
        for score in self.measure.at_checkpoints:
            settings = self.measure.settings_of(score)
            if isinstance(settings, MeanSettings) and not any(map(settings.takes, epochs)):
                raise ValueError(
                    f"measure.{score}: at checkpoints, but none is between first_epoch {settings.first_epoch} and last_epoch "
                    f"{settings.last_epoch}; they are of epochs {', '.join(map(str, epochs))} (from 0). See proxy.checkpoints"
                )
        if self.extrapolate.rehearsal is True and self._nothing_to_rehearse:
            raise ValueError(
                f"extrapolate.rehearsal: there is nothing to rehearse, since {self._nothing_to_rehearse}"
            )
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
        return (
            self.measure.scores[0] if self.extrapolate.score == "auto" else self.extrapolate.score
        )

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
        from raypipe.config.choices import PROXY_MODELS

        if value.model not in PROXY_MODELS:
            raise ValueError(f"model: {value.model!r} is not one of {', '.join(PROXY_MODELS)}")
        return value
