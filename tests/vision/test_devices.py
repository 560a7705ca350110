"""Adaptive batches, transfers and memory. GPU memory is simulated: no test here needs a GPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raypipe.config import EmbedSettings, MeasureSettings
from raypipe.proxies.networks import build_network
from raypipe.vision.devices import AdaptiveBatch, to_device
from raypipe.vision.forward import forward


def test_samples_go_in_parts_of_the_size_asked_for() -> None:
    parts = AdaptiveBatch(4)(
        lambda rows, labels: (rows.tolist(), labels.tolist()), torch.arange(10), np.arange(10) * 2
    )
    assert [rows for rows, _ in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [labels for _, labels in parts] == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]
    assert AdaptiveBatch(4)(len, []) == [0]


def test_half_as_many_where_the_memory_does_not_do_and_none_twice() -> None:
    batch_sizes: list[int] = []

    def room_for_three(rows: torch.Tensor) -> list[int]:
        batch_sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows.tolist()

    batched = AdaptiveBatch(1000)
    assert [row for part in batched(room_for_three, torch.arange(10)) for row in part] == list(
        range(10)
    )
    assert batch_sizes == [10, 5, 3, 3, 3, 1]
    assert batched(room_for_three, torch.arange(4)) == [[0, 1, 2], [3]]  # the batch stays small
    assert batch_sizes[6:] == [3, 1]

    def no_room(rows: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        AdaptiveBatch(8)(no_room, torch.arange(8))


def test_what_failed_holds_no_memory_when_it_is_tried_again() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def once(rows: torch.Tensor) -> int:
        assert all(reference() is None for reference in held)
        large = torch.zeros(8)
        held.append(weakref.ref(large))
        if len(held) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len(rows)

    assert AdaptiveBatch(8)(once, torch.arange(8)) == [4, 4]


def test_samples_are_not_copied_where_they_are_already() -> None:
    images = np.arange(6, dtype=np.uint8)
    tensor = to_device(images, "cpu")
    images[0] = 7
    assert tensor.tolist() == [7, 1, 2, 3, 4, 5]
    assert to_device(tensor, torch.device("cpu")) is tensor


def test_embeddings_are_the_same_in_halves() -> None:
    torch.manual_seed(0)
    model = build_network("small", 4, 8).eval()
    images, labels = (
        np.random.default_rng(0).integers(0, 256, (9, 3, 8, 8), np.uint8),
        np.arange(9, dtype=np.int32) % 5 - 1,
    )

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model.embed(pixels)

    whole = forward(model, images, labels, AdaptiveBatch(16), "cpu", amp=False)
    tight = forward(
        SimpleNamespace(embed=embed, head=model.head),
        images,
        labels,
        AdaptiveBatch(16),
        "cpu",
        amp=False,
    )
    assert whole["embedding"].shape == (9, 96)
    for name, values in whole.items():
        np.testing.assert_allclose(tight[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("settings", [EmbedSettings, MeasureSettings])
def test_on_a_gpu_more_of_smaller_images(settings: type[EmbedSettings | MeasureSettings]) -> None:
    auto = settings()
    assert [auto.images_at_once(True, size) for size in (448, 224, 112, 64, 32)] == [
        64,
        256,
        1024,
        2048,
        2048,
    ]
    assert auto.images_at_once(False, 32) == auto.images_at_once(False, 224) == 64
    assert settings(batch_size=7).images_at_once(True, 32) == 7


REPEATED = """
import resource, sys, torch
from raypipe.vision.devices import set_threads
if sys.argv[1] == "kept":
    set_threads(1)
for _ in range(20):  # alignment leaves gaps, which are filled one by one
    torch.empty(9 << 20).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.empty(9 << 20).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, torch.get_num_threads())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept with glibc only")
def test_memory_is_kept_for_the_next_batch() -> None:
    """36 MB, allocated five times: each time 9,216 pages are mapped, or none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    faults, threads = {}, {}
    for which in ("given back", "kept"):
        command = [sys.executable, "-c", REPEATED, which]
        output = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout
        faults[which], threads[which] = map(int, output.split())
    assert faults["kept"] < faults["given back"] / 4
    assert threads == {"given back": 2, "kept": 1}
