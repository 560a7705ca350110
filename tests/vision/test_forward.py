"""The forward pass of a proxy on a CPU: no output depends on the other images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raypipe.proxies.networks import build_network
from raypipe.vision.devices import AdaptiveBatch, padded
from raypipe.vision.forward import CPU_BATCH, forward

COUNT = 2 * CPU_BATCH + 9


@pytest.mark.parametrize("network", ["small", "resnet18"])
def test_an_output_does_not_depend_on_the_other_images(network: str) -> None:
    torch.manual_seed(0)
    model = build_network(network, 5, 16).to(memory_format=torch.channels_last).eval()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 3, 16, 16), np.uint8)
    labels = rng.integers(-1, 5, COUNT)

    def outputs(rows: np.ndarray) -> dict[str, np.ndarray]:
        return forward(model, images[rows], labels[rows], AdaptiveBatch(64), "cpu", False)

    together = outputs(np.arange(COUNT))
    with torch.inference_mode():
        embedding = model.embed(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(together["embedding"], embedding, rtol=1e-4, atol=1e-5)
    for rows in ([COUNT - 1], [5, 3], [], rng.permutation(COUNT), rng.permutation(COUNT)[:41]):
        for name, values in outputs(np.array(rows, np.int64)).items():
            np.testing.assert_array_equal(values, together[name][np.array(rows, np.int64)], name)


@pytest.mark.parametrize("values", [np.ones((3, 2), np.uint8), torch.ones(3, 2)])
def test_padding(values: np.ndarray | torch.Tensor) -> None:
    longer = padded(values, 5)
    assert longer.shape == (5, 2) and longer.dtype == torch.as_tensor(values).dtype
    assert longer.tolist() == [[1, 1]] * 3 + [[0, 0]] * 2
    assert padded(values, 3) is values and padded(values, 2) is values
