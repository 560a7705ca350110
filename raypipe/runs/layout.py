"""Layout of a run folder: the only module that knows the names of its files.

All files are Parquet, JSON, YAML, HTML or safetensors: formats that execute no code when opened.
"""

from __future__ import annotations

import os
import re

from raypipe import storage

VALID_NAME = re.compile(r"[\w-][\w.-]*").fullmatch
"""Match a valid name of a fragment or shard; it must not contain a path separator."""
STAGE_FOLDERS = {
    "index": ("index", "duplicates"),
    "seed": ("seed", "drawn"),
    "label": ("labels",),
    "proxy": ("proxy",),
    "measure": ("measured",),
    "rehearse": ("rehearsal",),
    "embed": ("embeddings", "views", "rejects", "features"),
    "extrapolate": ("extrapolator", "scores"),
    "pilot": ("pilot",),
    "select": ("keep",),
    "report": ("report",),
}
"""Folders that each stage writes, in the order of the stages."""
OPTIONAL_STAGES = {"label", "rehearse", "pilot"}
"""Stages that a finished run need not have."""


class Layout:
    """URIs of the files of one run. Nothing is read or written.

    Attributes
    ----------
    uri : str
        The run folder: an absolute path, or a URI without a trailing slash.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        uri = os.fspath(uri)
        self.uri = uri.rstrip("/") if "://" in uri else os.path.abspath(os.path.expanduser(uri))

    def path(self, *parts: str) -> str:
        """Return the URI of something below the run folder."""
        return storage.join(self.uri, *parts)

    @property
    def ledger_file(self) -> str:
        """The ledger: state, fingerprint and cost of every stage."""
        return self.path("run.json")

    @property
    def config_file(self) -> str:
        """The resolved configuration."""
        return self.path("config.yaml")

    @property
    def driver_file(self) -> str:
        """The lease: the driver that writes the run, or wrote it last."""
        return self.path("driver.json")

    @property
    def logs_folder(self) -> str:
        """One file per start of a driver."""
        return self.path("logs")

    @property
    def source_copy(self) -> str:
        """The copy of a Ray Data dataset."""
        return self.path("source")

    @property
    def index_folder(self) -> str:
        """Fragments and classes of the source."""
        return self.path("index")

    @property
    def classes_file(self) -> str:
        """Class names."""
        return self.path("index", "classes.json")

    @property
    def seed_folder(self) -> str:
        """Shards of the seed set and the audit set."""
        return self.path("seed")

    @property
    def drawn_folder(self) -> str:
        """Drawn samples by fragment; removed once the seed shards are written."""
        return self.path("drawn")

    @property
    def seed_manifest_file(self) -> str:
        """See `raypipe.runs.manifests.SeedManifest`."""
        return self.path("seed", "manifest.json")

    @property
    def pseudo_labels_file(self) -> str:
        """Manifest of the pseudo-labels, with the number of samples of each."""
        return self.path("labels", "labels.json")

    @property
    def pseudo_classes_file(self) -> str:
        """Names of the clusters that stand for classes."""
        return self.path("labels", "classes.json")

    @property
    def proxy_folder(self) -> str:
        """The training of the proxies."""
        return self.path("proxy")

    @property
    def proxy_manifest_file(self) -> str:
        """See `raypipe.runs.manifests.ProxyManifest`."""
        return self.path("proxy", "proxy.json")

    @property
    def measured_folder(self) -> str:
        """Measured scores of the seed set."""
        return self.path("measured")

    @property
    def embeddings_folder(self) -> str:
        """One file per fragment."""
        return self.path("embeddings")

    @property
    def rejects_folder(self) -> str:
        """One file per fragment with unreadable samples."""
        return self.path("rejects")

    @property
    def scores_folder(self) -> str:
        """One file per fragment."""
        return self.path("scores")

    @property
    def extrapolator_folder(self) -> str:
        """The fitted extrapolator and its assessment."""
        return self.path("extrapolator")

    @property
    def model_file(self) -> str:
        """Metadata of the fitted extrapolator."""
        return self.path("extrapolator", "model.json")

    @property
    def model_weights(self) -> str:
        """Tensors of the fitted extrapolator."""
        return self.path("extrapolator", "model.safetensors")

    def part_model_file(self, part: int) -> str:
        """Metadata of the extrapolator to samples of a part, with cross-fitting."""
        return self.path("extrapolator", f"model-{part}.json")

    def part_model_weights(self, part: int) -> str:
        """Tensors of the extrapolator to samples of a part, with cross-fitting."""
        return self.path("extrapolator", f"model-{part}.safetensors")

    @property
    def probe_weights(self) -> str:
        """Linear probes on the embeddings of each viewer."""
        return self.path("extrapolator", "probe.safetensors")

    @property
    def transfer_weights(self) -> str:
        """The map that a rehearsal learned."""
        return self.path("extrapolator", "transfer.safetensors")

    @property
    def fidelity_file(self) -> str:
        """Fidelity and calibrated intervals."""
        return self.path("extrapolator", "fidelity.json")

    @property
    def learning_curve_file(self) -> str:
        """Fidelity against the size of the seed set."""
        return self.path("extrapolator", "curve.json")

    @property
    def published_predictions(self) -> str:
        """Predictions of gnn-published for comparison."""
        return self.path("extrapolator", "published.parquet")

    @property
    def extrapolator_summary(self) -> str:
        """Method, fidelity, learning curve and intervals."""
        return self.path("extrapolator", "extrapolator.json")

    @property
    def given_scores(self) -> str:
        """Scored samples from tables, in place of a seed set."""
        return self.path("extrapolator", "scored.parquet")

    @property
    def checked_tables(self) -> str:
        """Result of the check of the input tables."""
        return self.path("extrapolator", "checked.json")

    @property
    def pilot_plan(self) -> str:
        """Which trainings the pilot makes; see `raypipe.runs.pilot`."""
        return self.path("pilot", "plan.json")

    @property
    def pilot_samples(self) -> str:
        """Samples of the pilot: pixels, labels and scores."""
        return self.path("pilot", "samples.parquet")

    @property
    def pilot_trainings_folder(self) -> str:
        """One file per training of the pilot."""
        return self.path("pilot", "trainings")

    @property
    def pilot_result(self) -> str:
        """What the pilot found: trainings and their test results."""
        return self.path("pilot", "pilot.json")

    @property
    def keep_folder(self) -> str:
        """Keep-lists."""
        return self.path("keep")

    @property
    def report_folder(self) -> str:
        """The report page and its figures."""
        return self.path("report")

    @property
    def report_page(self) -> str:
        """The report."""
        return self.path("report", "index.html")

    @property
    def report_summary(self) -> str:
        """Every figure of the report."""
        return self.path("report", "summary.json")

    @property
    def report_map(self) -> str:
        """Points of the map of embeddings."""
        return self.path("report", "map.parquet")

    @property
    def evaluation_folder(self) -> str:
        """Results of `raypipe evaluate`."""
        return self.path("evaluation")

    @property
    def evaluation_pixels(self) -> str:
        """Decoded images, while trainings are missing."""
        return self.path("evaluation", "pixels")

    @property
    def evaluation_table(self) -> str:
        """One row for each training."""
        return self.path("evaluation", "trainings.parquet")

    @property
    def evaluation_summary(self) -> str:
        """What is printed and reported of all trainings."""
        return self.path("evaluation", "summary.json")

    @property
    def table_summary(self) -> str:
        """Summary of an extrapolation from tables."""
        return self.path("summary.json")

    def evaluation_file(self, name: str) -> str:
        """One file about a training or the data, by its name."""
        return self.path("evaluation", name)

    def index_file(self, name: str) -> str:
        """One file of fragments."""
        return self.path("index", name)

    def seed_shard(self, shard: str) -> str:
        """Return a shard of the seed set or the audit set."""
        return self.path("seed", f"{shard}.parquet")

    def drawn_file(self, name: str) -> str:
        """Drawn samples of some fragments, until the seed shards are written."""
        return self.path("drawn", f"{name}.parquet")

    def label_shard(self, shard: str) -> str:
        """Pseudo-labels of a seed or audit shard."""
        return self.path("labels", f"{shard}.parquet")

    def measured_shard(self, shard: str) -> str:
        """Measured scores of a seed shard."""
        return self.path("measured", f"{shard}.parquet")

    def embedding_shard(self, fragment_id: str) -> str:
        """Embeddings of one fragment."""
        return self.path("embeddings", f"{fragment_id}.parquet")

    def view_shard(self, fragment_id: str) -> str:
        """Embeddings of one fragment by a second proxy, for cross-fitting."""
        return self.path("views", f"{fragment_id}.parquet")

    @property
    def feature_scale(self) -> str:
        """What embeddings of `embed.from` are multiplied by, next to those of a network."""
        return self.path("features", "scale.json")

    def feature_index(self, number: int) -> str:
        """Hashes and places of the ids in a file of `embed.from`."""
        return self.path("features", f"index-{number:06d}.parquet")

    def reject_shard(self, fragment_id: str) -> str:
        """Rejects of one fragment."""
        return self.path("rejects", f"{fragment_id}.parquet")

    def score_shard(self, fragment_id: str) -> str:
        """Scores of one fragment."""
        return self.path("scores", f"{fragment_id}.parquet")

    def held_out_predictions(self, name: str) -> str:
        """Predictions that the extrapolator is assessed by."""
        return self.path("extrapolator", f"{name}.parquet")

    def keep_list(self, file: str) -> str:
        """Return a keep-list by the name of its file."""
        return self.path("keep", file)
