"""The configuration of a run: all sections, and the rules between them."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from raypipe.config.base import Settings
from raypipe.config.choices import AUTO
from raypipe.config.cluster import ClusterSettings
from raypipe.config.embed import EmbedSettings
from raypipe.config.extrapolate import ExtrapolateSettings
from raypipe.config.measure import MeanSettings, MeasureSettings
from raypipe.config.nightly import NightlySettings
from raypipe.config.pilot import PilotSettings
from raypipe.config.proxy import ProxySettings
from raypipe.config.pseudo_labels import PseudoLabelSettings
from raypipe.config.report import ReportSettings
from raypipe.config.seed import SeedSettings
from raypipe.config.select import SelectSettings
from raypipe.config.source import SourceSettings
from raypipe.config.trust import TrustSettings


class Config(Settings):
    """Everything that determines what a run produces.

    Attributes
    ----------
    run : str
        The run folder, where everything is written: local path, file://, s3://, gs:// or az://.
    source : SourceSettings
        The dataset.
    seed, pseudo_labels, proxy, measure, embed, extrapolate, pilot, trust, select, report, nightly,
    cluster
        The other sections. All of them have defaults.

    Examples
    --------
    >>> from raypipe import Config
    >>> config = Config(run="runs/digits", source={"uri": "digits://"})
    >>> config.proxy.epochs
    'auto'
    """

    run: str = Field(
        description="Run folder, where everything is written: local path, file:// or s3://."
    )
    source: SourceSettings
    seed: SeedSettings = SeedSettings()
    pseudo_labels: PseudoLabelSettings = PseudoLabelSettings()
    proxy: ProxySettings = ProxySettings()
    measure: MeasureSettings = MeasureSettings()
    embed: EmbedSettings = EmbedSettings()
    extrapolate: ExtrapolateSettings = ExtrapolateSettings()
    pilot: PilotSettings = PilotSettings()
    trust: TrustSettings = TrustSettings()
    select: SelectSettings = SelectSettings()
    report: ReportSettings = ReportSettings()
    nightly: NightlySettings = NightlySettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _resolve_auto(self) -> Config:
        measure = self.measure.resolved(self.proxy.cross_fits)
        all_of_them = set(measure.from_embeddings) == set(measure.scores)
        proxy = self.proxy.resolved(from_embeddings=all_of_them)
        for name, section in {"measure": measure, "proxy": proxy}.items():
            object.__setattr__(self, name, section)  # settings are fixed, except in a validator
        return self

    @model_validator(mode="after")
    def _scores_fit(self) -> Config:
        extrapolated, measured = self.extrapolate.score, self.measure.scores
        if extrapolated != "auto" and extrapolated not in measured:
            raise ValueError(
                f"extrapolate.score: {extrapolated!r} is not one of measure.scores "
                f"({', '.join(measured)})"
            )
        from_trajectory = sorted(self.measure.from_trajectory)
        if self.proxy.trajectory == "none" and from_trajectory:
            raise ValueError(
                f"proxy.trajectory: {', '.join(from_trajectory)} cannot be computed without a "
                "trajectory; set it to train or eval"
            )
        if self.measure.from_embeddings and not self.proxy.cross_fits:
            raise ValueError(
                f"measure.{self.measure.from_embeddings[0]}.at: embeddings needs proxies that were "
                "not trained on a sample; set proxy.parts to 3 or more, or at to trajectory"
            )
        epochs = self.proxy.checkpoint_epochs()
        for score in self.measure.at_checkpoints:
            settings = self.measure.settings_of(score)
            if isinstance(settings, MeanSettings) and not any(map(settings.takes, epochs)):
                raise ValueError(
                    f"measure.{score}: no checkpoint is between first_epoch {settings.first_epoch} "
                    f"and last_epoch {settings.last_epoch}; checkpoints are at epochs "
                    f"{', '.join(map(str, epochs))} (from 0). Change these settings or "
                    "proxy.checkpoints"
                )
        if self.proxy.cross_fits and self.extrapolate.method == "gnn-published":
            raise ValueError(
                "extrapolate.method: the graph of gnn-published needs the embeddings of one proxy; "
                "set proxy.cross_fit to false, or choose another method"
            )
        if self.extrapolate.rehearsal is True and self._nothing_to_rehearse:
            raise ValueError(
                f"extrapolate.rehearsal: nothing to rehearse: {self._nothing_to_rehearse}. Set it "
                "to auto or false"
            )
        if self.rehearses and self.embed.has_features:
            raise ValueError(
                "extrapolate.rehearsal: a rehearsal works with the embeddings of the proxy alone; "
                "set it to false, proxy.parts to 3 or more, or remove embed.model and embed.from"
            )
        return self

    @model_validator(mode="after")
    def _pixels_fit(self) -> Config:
        if self.embed.decode == "gpu" and (self.source.transform or self.proxy.channels != 3):
            raise ValueError(
                "embed.decode: a GPU decodes JPEGs to 3 channels without source.transform; set "
                "decode to cpu"
            )
        if self.unsupervised and self.proxy.channels != 3:
            raise ValueError(
                "pseudo_labels.clusters: the networks that clusters come from take 3 channels, not "
                f"proxy.channels {self.proxy.channels}"
            )
        return self

    @model_validator(mode="after")
    def _labels_from_somewhere(self) -> Config:
        if self.unsupervised and self.source.label_column is not None:
            raise ValueError(
                "pseudo_labels.clusters replaces the source's own labels. If that is intended, or "
                "the source has none, set source.label_column to null; to use its labels, remove "
                "pseudo_labels.clusters"
            )
        if not self.unsupervised and self.source.label_column is None:
            raise ValueError(
                "source.label_column: null leaves no labels to train the proxy on; set "
                "pseudo_labels.clusters to use clusters as labels"
            )
        if self.unsupervised and self.pilot.enabled is True:
            raise ValueError(
                "pilot.enabled: a pilot tests on true labels, which an unlabelled source does not "
                "have; set it to auto or false"
            )
        return self

    @property
    def unsupervised(self) -> bool:
        """Whether clusters are used as labels, and no label of the source is read."""
        return self.pseudo_labels.clusters is not None

    @property
    def score(self) -> str:
        """The score that is extrapolated."""
        return (
            self.measure.scores[0] if self.extrapolate.score == "auto" else self.extrapolate.score
        )

    @property
    def scores_embeddings(self) -> bool:
        """Whether the score is that of a linear probe, which every sample has."""
        return self.score in self.measure.from_embeddings

    def for_seed_set(self, samples: int) -> Config:
        """Return the configuration with a number in place of `proxy.epochs: auto`."""
        return self.model_copy(update={"proxy": self.proxy.for_seed_set(samples)})

    def extreme_samples(self, samples: int) -> int:
        """Return how many extreme predictions to audit in a source of `samples` samples.

        There are none where the score of a new sample cannot be measured, where all samples are
        predicted together, or where one proxy has no audit set for comparison.
        """
        audit, setting = self.seed.audit_samples(samples), self.extrapolate.audit_extremes
        if (
            self.score not in self.measure.at_checkpoints
            or self.extrapolate.method == "gnn-published"
            or not (audit or self.proxy.cross_fits)
        ):
            return 0
        return audit if setting == "auto" else setting

    @property
    def pilots(self) -> bool:
        """Whether the run has a pilot."""
        if self.unsupervised:
            return False
        enabled = self.pilot.enabled
        return self.select.strategy == AUTO if enabled == "auto" else enabled

    @property
    def rehearses(self) -> bool:
        """Whether a second proxy is trained, to learn how scores of unseen samples differ."""
        setting = self.extrapolate.rehearsal
        return self._nothing_to_rehearse == "" if setting == "auto" else setting

    @property
    def _nothing_to_rehearse(self) -> str:
        """Why a rehearsal is of no use; "" if it is."""
        if self.score in self.measure.from_embeddings:
            return f"{self.score} is computed for every sample"
        if self.score in self.measure.at_checkpoints:
            return f"{self.score} is measured at checkpoints, also on an audit set"
        if self.extrapolate.method != "gnn":
            return f"method {self.extrapolate.method} does not learn from it"
        return "proxy.parts is above 1" if self.proxy.parts > 1 else ""

    @field_validator("run")
    @classmethod
    def _writable(cls, run: str) -> str:
        if run.lower().startswith(("http://", "https://", "ftp://")):
            raise ValueError(
                "a web server cannot hold a run: give a local path, s3://, gs:// or az://"
            )
        return run

    @field_validator("proxy")
    @classmethod
    def _model_exists(cls, value: ProxySettings) -> ProxySettings:
        from raypipe.config.choices import is_model, unknown_model

        if not is_model(value.model):
            raise ValueError(unknown_model(value.model))
        return value
