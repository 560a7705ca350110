"""`raypipe.testing.check_source` accepts sound sources and names what is broken in others."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raypipe import storage
from raypipe.sources import FileScan, Fragment, IdFilter, RawSample, Source, SourceFile
from raypipe.sources.location import Location
from raypipe.testing import ContractError, check_source


class Npz(Source):
    """The example of `Source`: files with arrays `images` and `labels`."""

    format = "npz"
    summary = "NumPy archives with images and labels"

    def files(self) -> Iterator[SourceFile]:
        for info in Location(self.settings).listing():
            yield SourceFile(info.path, info.size, info.stamp)

    def scan(self, file: SourceFile) -> FileScan:
        try:
            labels = self._load(file.path)["labels"]
        except ValueError as error:
            return self.unreadable_file(file, error)
        return FileScan(self.cut_fragments(file, len(labels)), labels=frozenset(labels.tolist()))

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        arrays = self._load(fragment.path)
        for row in range(fragment.start, fragment.stop):
            sample_id = f"{fragment.path}#{row}"
            if keep_id is None or keep_id(sample_id):
                yield RawSample(sample_id, arrays["images"][row], int(arrays["labels"][row]))

    def _load(self, path: str) -> Any:
        data = storage.read_bytes(Location(self.settings).uri(path))
        return np.load(io.BytesIO(data), allow_pickle=False)


class Changed(Npz):
    """A source that changes each sample that it reads."""

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        for sample in super().read(fragment):
            changed = self.changed(sample, fragment)
            if keep_id is None or keep_id(changed.sample_id):
                yield changed

    def changed(self, sample: RawSample, fragment: Fragment) -> RawSample:
        return sample


class Shuffled(Npz):
    calls = 0

    def files(self) -> Iterator[SourceFile]:
        Shuffled.calls += 1
        yield from sorted(super().files(), key=lambda file: file.path, reverse=self.calls % 2 > 0)


class IdsByFragment(Changed):
    def changed(self, sample: RawSample, fragment: Fragment) -> RawSample:
        return sample._replace(sample_id=f"{fragment.fragment_id}/{sample.sample_id}")


class SameIds(Changed):
    def changed(self, sample: RawSample, fragment: Fragment) -> RawSample:
        return sample._replace(sample_id=sample.sample_id.partition("#")[2])


class Floats(Changed):
    def changed(self, sample: RawSample, fragment: Fragment) -> RawSample:
        return sample._replace(image=np.asarray(sample.image, np.float32))


class NoReason(Changed):
    def changed(self, sample: RawSample, fragment: Fragment) -> RawSample:
        return sample._replace(image=None)


class FloatLabels(Changed):
    def changed(self, sample: RawSample, fragment: Fragment) -> RawSample:
        return sample._replace(label=0.5)  # type: ignore[arg-type]


class Ignores(Npz):
    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        yield from super().read(fragment)


class Short(Npz):
    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        yield from list(super().read(fragment, keep_id))[:-1]


class Random(Changed):
    random = np.random.default_rng(0)

    def changed(self, sample: RawSample, fragment: Fragment) -> RawSample:
        return sample._replace(image=self.random.integers(0, 256, (4, 4), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("npz")
    for number in range(2):
        images = np.random.default_rng(number).integers(0, 256, (20, 6, 6, 3), np.uint8)
        np.savez(folder / f"{number}.npz", images=images, labels=np.arange(20) % 3)
    return str(folder)


def test_accepts_a_sound_source(folder: str) -> None:
    check_source(Npz, folder)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Shuffled, "Shuffled: files lists others, or in another order, at a second call"),
        (IdsByFragment, "IdsByFragment: 0.npz: ids depend on source.fragment_samples"),
        (SameIds, "SameIds: 1.npz: the id '0' occurs twice"),
        (Floats, r"Floats: sample '0.npz#0': the image is float32 \[6, 6, 3\]; expected uint8"),
        (NoReason, "NoReason: sample '0.npz#0' has neither an image nor a reason"),
        (FloatLabels, "FloatLabels: sample '0.npz#0': the label is float"),
        (Ignores, "Ignores: 0.npz, samples 0 to 20: read with keep_id yields other samples"),
        (Short, "Short: 0.npz, samples 0 to 20: read yields 19 samples"),
        (Random, "Random: 0.npz, samples 0 to 20: read yields other samples at a second call"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_names_what_is_broken(folder: str, part: type[Source], message: str) -> None:
    with pytest.raises(ContractError, match=f"^{message}") as caught:
        check_source(part, folder)
    assert "\n" not in str(caught.value)
