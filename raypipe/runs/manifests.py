"""Manifests that the stages seed, proxy and measure exchange: one frozen dataclass per file."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe import storage
from raypipe.errors import RunError
from raypipe.runs.layout import VALID_NAME
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import audit_name, distinguished_classes, shard_statistics


@dataclass(frozen=True)
class SeedManifest:
    """The seed set and the audit set, `seed/manifest.json`.

    Attributes
    ----------
    samples : int
        Samples in the seed set.
    image_size : int
        Side of the stored images, pixels.
    per_class : tuple of int
        Seed samples of each class. For an unlabelled source those of each pseudo-label; empty
        before the stage `label` has run.
    mean, std : tuple of float
        Of each colour channel over the seed set, 0..1.
    shards : tuple of str
        Names of the seed shards, in order.
    shard_samples : tuple of int
        Samples in each seed shard.
    audit_fraction : float
        Share of the samples outside the seed set that is in the audit set.
    audit_samples : int
        Samples in the audit set.
    audit_shards, audit_shard_samples
        Names and sizes of the audit shards that hold any sample.
    unlabelled : bool
        Whether the source has no labels.
    """

    samples: int = 0
    image_size: int = 0
    per_class: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    shards: tuple[str, ...] = ()
    shard_samples: tuple[int, ...] = ()
    audit_fraction: float = 0.0
    audit_samples: int = 0
    audit_shards: tuple[str, ...] = ()
    audit_shard_samples: tuple[int, ...] = ()
    unlabelled: bool = False

    @property
    def all_shards(self) -> tuple[str, ...]:
        """Seed shards, then audit shards."""
        return (*self.shards, *self.audit_shards)

    @classmethod
    def read(cls, run: Run) -> SeedManifest:
        """Read the manifest of a run.

        Raises
        ------
        FileNotFoundError
            If there is none yet.
        RunError
            If it is damaged, or names a file outside its folder.
        """
        data = dict(storage.read_json(run.seed_manifest_file))
        if data.get("unlabelled"):
            with contextlib.suppress(FileNotFoundError):  # until the stage `label` has run
                data["per_class"] = storage.read_json(run.pseudo_labels_file)["per_class"]
        try:
            manifest = cls(**_frozen(data))
        except TypeError as error:
            raise RunError(f"{run.uri}: seed/manifest.json is damaged ({error})") from None
        if not all(map(VALID_NAME, manifest.all_shards)):
            raise RunError(
                f"{run.uri}: seed/manifest.json is damaged: it has an invalid shard name"
            )
        return manifest

    @classmethod
    def from_shards(cls, run: Run, shards: Sequence[str], audit_fraction: float) -> SeedManifest:
        """Compute the manifest from the statistics that every shard carries."""
        classes = run.classes()
        counts = np.zeros(distinguished_classes(classes), int)
        sums = squares = np.zeros(1)  # one number for each channel, once a shard is read
        sizes, image_size = [], 0
        for shard in shards:
            statistics = shard_statistics(run, shard)
            image_size = statistics["image_size"]
            sizes.append(statistics["samples"])
            counts += np.array(statistics["per_class"], int)
            sums = sums + statistics["sum"]
            squares = squares + statistics["square"]
        pixels = max(1, sum(sizes) * image_size**2)
        mean = sums / pixels
        std = np.sqrt(np.maximum(squares / pixels - mean**2, 1e-6))
        audited: dict[str, int] = {}
        for shard in map(audit_name, shards) if audit_fraction else ():
            if count := shard_statistics(run, shard)["samples"]:
                audited[shard] = count
        return cls(
            samples=sum(sizes),
            image_size=image_size,
            per_class=tuple(counts.tolist()),
            mean=tuple(mean.round(6).tolist()),
            std=tuple(std.round(6).tolist()),
            shards=tuple(shards),
            shard_samples=tuple(sizes),
            audit_fraction=audit_fraction,
            audit_samples=sum(audited.values()),
            audit_shards=tuple(audited),
            audit_shard_samples=tuple(audited.values()),
            unlabelled=classes.clusters,
        )

    def as_json(self) -> dict[str, Any]:
        """Return what `seed/manifest.json` holds."""
        data = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }
        if not self.unlabelled:
            del data["unlabelled"]
        return data

    def write(self, run: Run) -> None:
        """Write the manifest of a run."""
        storage.write_json(run.seed_manifest_file, self.as_json())


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch of a proxy, `epochs/epoch-0007.json`.

    Attributes
    ----------
    epoch : int
        From 0.
    lr : float
        Learning rate of its last step.
    steps : int
        Steps since the start of the training.
    loss, accuracy : float
        Mean over the epoch, on augmented training images.
    checkpoint : str
        File of its checkpoint; empty when none was written.
    scored : bool
        Whether scores are measured at that checkpoint.
    trajectory : tuple of str
        Files of the trajectory, one per worker.
    cpu_seconds : float
        Processor time of all workers.
    """

    epoch: int
    lr: float
    steps: int
    loss: float
    accuracy: float
    checkpoint: str
    scored: bool
    trajectory: tuple[str, ...]
    cpu_seconds: float

    @classmethod
    def read_all(cls, run: Run, folder: str = "proxy") -> list[EpochRecord]:
        """Read the finished epochs of the proxy in a folder of the run, in order."""
        epochs = run.path(folder, "epochs")
        files = sorted(storage.names(epochs))
        return [cls(**_frozen(storage.read_json(storage.join(epochs, file)))) for file in files]

    def write(self, run: Run, folder: str) -> None:
        """Write the record: from then on the epoch counts as finished."""
        data = {**vars(self), "trajectory": list(self.trajectory)}
        storage.write_json(run.path(folder, "epochs", f"epoch-{self.epoch:04d}.json"), data)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint at which scores are measured: epoch (from 0), learning rate and file."""

    epoch: int
    lr: float
    file: str


@dataclass(frozen=True)
class TrainedProxy:
    """Result of the training of one proxy.

    Attributes
    ----------
    steps, epochs : int
        Length of the training.
    trajectory : tuple of tuple of str
        Per epoch the files of the trajectory.
    checkpoints : tuple of Checkpoint
        Checkpoints at which scores are measured.
    final : str
        File of the last checkpoint.
    """

    steps: int
    epochs: int
    trajectory: tuple[tuple[str, ...], ...]
    checkpoints: tuple[Checkpoint, ...]
    final: str

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the checkpoints at which scores are measured."""
        return tuple(checkpoint.file for checkpoint in self.checkpoints)

    @classmethod
    def from_epochs(cls, epochs: Sequence[EpochRecord]) -> TrainedProxy:
        """Summarise a complete training."""
        return cls(
            steps=epochs[-1].steps,
            epochs=len(epochs),
            trajectory=tuple(record.trajectory for record in epochs),
            checkpoints=tuple(
                Checkpoint(record.epoch, record.lr, record.checkpoint)
                for record in epochs
                if record.scored
            ),
            final=epochs[-1].checkpoint,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainedProxy:
        """Restore what `as_json` returned."""
        return cls(
            steps=data["steps"],
            epochs=data["epochs"],
            trajectory=tuple(map(tuple, data["trajectory"])),
            checkpoints=tuple(Checkpoint(**item) for item in data["checkpoints"]),
            final=data["final"],
        )

    def as_json(self) -> dict[str, Any]:
        """Return its part of `proxy.json`."""
        return {**vars(self), "checkpoints": [vars(checkpoint) for checkpoint in self.checkpoints]}


@dataclass(frozen=True)
class ProxyOfPart:
    """A proxy of one part of the seed set, with the samples of the part: all, and by shard."""

    samples: int
    shard_samples: tuple[int, ...]
    trained: TrainedProxy


@dataclass(frozen=True)
class ProxyManifest:
    """The trained proxy, `proxy/proxy.json`, written last.

    Attributes
    ----------
    model : str
        Name of the network, `proxy.model`.
    classes, image_size : int
        Width of its last layer; side of its input, pixels.
    mean, std : tuple of float
        Normalisation of its input, per channel.
    samples : int
        Seed samples.
    seed : int
        Seed of the division into parts.
    parts : tuple of ProxyOfPart
        One per proxy, by repeat and then by part of the seed set.
    repeats : int
        Proxies per part (`proxy.repeats`).
    freeze, train : str
        Which weights were trained (`proxy.freeze`, `proxy.train`).
    """

    model: str
    classes: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    samples: int
    seed: int
    parts: tuple[ProxyOfPart, ...]
    repeats: int = 1
    freeze: str = "none"
    train: str = "full"

    @classmethod
    def read(cls, run: Run) -> ProxyManifest:
        """Read the manifest of a run. Raises FileNotFoundError if the proxy is not trained yet."""
        data = storage.read_json(run.proxy_manifest_file)
        if "parts" in data:
            parts = tuple(
                ProxyOfPart(
                    item["samples"], tuple(item["shard_samples"]), TrainedProxy.from_json(item)
                )
                for item in data["parts"]
            )
        else:
            sizes = SeedManifest.read(run).shard_samples
            parts = (ProxyOfPart(data["samples"], sizes, TrainedProxy.from_json(data)),)
        names = ("model", "classes", "image_size", "samples")
        return cls(
            **{name: data[name] for name in names},
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            seed=data.get("seed", 0),
            parts=parts,
            repeats=data.get("repeats", 1),
            freeze=data.get("freeze", "none"),
            train=data.get("train", "full"),
        )

    def write(self, run: Run) -> None:
        """Write the manifest: a single proxy at the top level, several proxies as a list."""
        data: dict[str, Any] = {
            "model": self.model,
            "classes": self.classes,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "samples": self.samples,
        }
        if (self.freeze, self.train) != ("none", "full"):
            data |= {"freeze": self.freeze, "train": self.train}
        if len(self.parts) == 1:
            data |= self.parts[0].trained.as_json()
        else:
            data["seed"] = self.seed
            if self.repeats > 1:
                data["repeats"] = self.repeats
            parts = len(self.parts) // self.repeats
            data["parts"] = [
                {
                    "folder": proxy_folder(number % parts, parts, number // parts, self.repeats),
                    "samples": part.samples,
                    "shard_samples": list(part.shard_samples),
                    **part.trained.as_json(),
                }
                for number, part in enumerate(self.parts)
            ]
        storage.write_json(run.proxy_manifest_file, data)


def proxy_folder(part: int, parts: int, repeat: int, repeats: int) -> str:
    """Return the name of the folders of a proxy; empty for the only proxy of a run."""
    names = [f"part-{part}"] if parts > 1 else []
    names += [f"repeat-{repeat}"] if repeats > 1 else []
    return "-".join(names)


def _frozen(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON with tuples in place of lists."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
    }
