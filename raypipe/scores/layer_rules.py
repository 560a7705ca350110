"""Gradient norm and alignment of each sample, for the weights of one layer.

They come from its input and the gradient of its output.
`raypipe.scores.per_sample` describes the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Reduced = tuple[Tensor, Tensor]
"""Squared norm [n] and alignment [n]."""

FAST_LAYERS = (nn.Linear, nn.Conv2d, _BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Embedding)
"""Layers with a fast rule. It does not hold for a subclass that computes something else."""
MAX_VALUES_CPU, MAX_VALUES_GPU = 1 << 19, 1 << 26
"""Values of unfolded input held at once, on a CPU and on a GPU."""


@dataclass
class LayerCall:
    """One call of a layer in the forward pass."""

    name: str
    module: nn.Module
    input: Tensor = field(repr=False)
    output: Tensor = field(repr=False)


def reduce_layer(
    call: LayerCall, gradient: Tensor, directions: Mapping[str, Tensor | None]
) -> Reduced:
    """Return both numbers of one layer, over its parameters in `directions`."""
    module, count = call.module, len(gradient)
    norm = gradient.new_zeros(count)
    aligned = gradient.new_zeros(count)

    def add(part: Reduced) -> None:
        norm.add_(part[0])
        aligned.add_(part[1])

    if isinstance(module, nn.Linear | nn.Conv2d):
        if "bias" in directions:
            channels = 1 if isinstance(module, nn.Conv2d) else gradient.ndim - 1
            axes = [axis for axis in range(1, gradient.ndim) if axis != channels]
            add(explicit(gradient.sum(axes) if axes else gradient, directions["bias"]))
        if "weight" in directions:
            rule = _convolution if isinstance(module, nn.Conv2d) else _linear
            add(rule(call, gradient, directions["weight"]))
    elif isinstance(module, nn.Embedding):
        if "weight" in directions:
            add(_embedding(call, gradient, directions["weight"]))
    else:
        normalised, parameter_axes = _normalised(module, call.input)
        axes = [axis for axis in range(1, gradient.ndim) if axis not in parameter_axes]
        for key, factor in (("weight", normalised), ("bias", None)):
            if key in directions:
                product = gradient if factor is None else gradient * factor
                add(explicit(product.sum(axes) if axes else product, directions[key]))
    return norm, aligned


def explicit(gradients: Tensor, direction: Tensor | None) -> Reduced:
    """Return both numbers from per-sample gradients [n, ...]."""
    flat = gradients.flatten(1)
    square = torch.einsum("np,np->n", flat, flat)
    return square, torch.zeros_like(square) if direction is None else flat @ direction.flatten().to(
        flat.dtype
    )


def _linear(call: LayerCall, gradient: Tensor, direction: Tensor | None) -> Reduced:
    """Return both numbers of a linear layer's weight."""
    inputs = call.input
    if inputs.ndim == 2:
        square = gradient.square().sum(1) * inputs.square().sum(1)
        if direction is None:
            return square, torch.zeros_like(square)
        return square, ((inputs @ direction.to(inputs.dtype).T) * gradient).sum(1)
    inputs, gradient = inputs.flatten(1, -2), gradient.flatten(1, -2)
    return _outer(inputs.transpose(1, 2), gradient.transpose(1, 2), direction)


def _convolution(call: LayerCall, gradient: Tensor, direction: Tensor | None) -> Reduced:
    """Return both numbers of a convolution's weight, through whichever product is cheaper."""
    module = call.module
    assert isinstance(module, nn.Conv2d)
    positions, tall = gradient.shape[-2] * gradient.shape[-1], gradient.shape[1]
    wide = module.weight[0].numel()
    if module.groups == 1 and positions * (wide + tall) < wide * tall:
        outputs = gradient.flatten(2)
        square = (_gram_of_patches(call) * torch.bmm(outputs.transpose(1, 2), outputs)).sum((1, 2))
        if direction is None:
            return square, torch.zeros_like(square)
        moved = F.conv2d(
            call.input,
            direction.to(gradient.dtype),
            None,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
        )
        return square, (moved * gradient).sum((1, 2, 3))
    # the products of a few samples at a time, so that they stay in the processor's cache
    step = max(
        1,
        (MAX_VALUES_CPU if gradient.device.type == "cpu" else MAX_VALUES_GPU)
        // (wide * module.groups * max(positions, tall)),
    )
    weight = None
    if direction is not None:  # in the order of the products: [groups, kernel * channels, out]
        weight = direction.unflatten(0, (module.groups, -1)).permute(0, 3, 4, 2, 1)
    parts = []
    for start in range(0, len(gradient), step):
        outputs = gradient[start : start + step].reshape(-1, tall // module.groups, positions)
        columns = _patches(module, call.input[start : start + step]).reshape(
            len(outputs), wide, positions
        )
        product = _products(columns, outputs, small=module.groups > 1)
        parts.append(explicit(product.reshape(len(outputs) // module.groups, -1), weight))
    squares, dots = zip(*parts, strict=True)
    return torch.cat(squares), torch.cat(dots)


def _products(left: Tensor, right: Tensor, small: bool) -> Tensor:
    """Return left right' of every pair: [n, a, t], [n, b, t] -> [n, a, b].

    Many small products, as those of depthwise convolutions, are computed together.
    """
    if (
        small
        or left.device.type != "cpu"
        or left.dtype != torch.float32
        or not torch.backends.mkldnn.is_available()
    ):
        return torch.bmm(left, right.transpose(1, 2))
    # As 1x1 convolutions: oneDNN has AVX-512 kernels for every processor, MKL only for Intel's.
    # On other processors this is twice as fast.
    result = left.new_empty(len(left), left.shape[1], right.shape[1])
    for own, other, target in zip(left, right, result, strict=True):
        pixels = own[None, None].permute(0, 3, 1, 2)
        product = torch.mkldnn_convolution(
            pixels, other[:, :, None, None], None, (0, 0), (1, 1), (1, 1), 1
        )
        target.copy_(product[0, :, 0].T)
    return result


def _patches(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return what each output position sees of the input.

    The shape is [n, groups, kernel * channels, height, width].

    The padded input is copied once for every position in the kernel: five times faster on a CPU
    than `F.unfold`.
    """
    assert not isinstance(module.padding, str)
    pad_y, pad_x = module.padding
    (step_y, step_x), (dilation_y, dilation_x) = module.stride, module.dilation
    (rows, columns), groups = module.kernel_size, module.groups
    padded = F.pad(inputs.contiguous(), (pad_x, pad_x, pad_y, pad_y)).unflatten(1, (groups, -1))
    high = (padded.shape[-2] - dilation_y * (rows - 1) - 1) // step_y + 1
    wide = (padded.shape[-1] - dilation_x * (columns - 1) - 1) // step_x + 1
    result = inputs.new_empty(len(inputs), groups, rows * columns, padded.shape[2], high, wide)
    for i in range(rows):
        for j in range(columns):
            top, left = i * dilation_y, j * dilation_x
            result[:, :, i * columns + j] = padded[
                ...,
                top : top + step_y * (high - 1) + 1 : step_y,
                left : left + step_x * (wide - 1) + 1 : step_x,
            ]
    return result.flatten(2, 3)


def _gram_of_patches(call: LayerCall) -> Tensor:
    """Return inner products of what two output positions see: [n, positions, positions].

    With stride 1 this is a sum of shifted blocks of the inner products of single pixels, which
    takes fewer multiplications by a factor of the kernel's size.
    """
    module, inputs = call.module, call.input
    assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
    if module.stride != (1, 1) or module.dilation != (1, 1):
        columns = _patches(module, inputs)[:, 0].flatten(2)
        return torch.bmm(columns.transpose(1, 2), columns)
    (pad_y, pad_x), (height, width) = module.padding, module.kernel_size
    pixels = F.pad(inputs, (pad_x, pad_x, pad_y, pad_y))
    rows, cols = pixels.shape[2], pixels.shape[3]
    flat = pixels.flatten(2)
    pairs = torch.bmm(flat.transpose(1, 2), flat).view(-1, rows, cols, rows, cols)
    high, wide = rows - height + 1, cols - width + 1
    total = pairs.new_zeros(len(inputs), high, wide, high, wide)
    for i in range(height):
        for j in range(width):
            total += pairs[:, i : i + high, j : j + wide, i : i + high, j : j + wide]
    return total.view(len(inputs), high * wide, high * wide)


def _outer(inputs: Tensor, outputs: Tensor, direction: Tensor | None) -> Reduced:
    """Return both numbers of g = sum_t outputs_t inputs_t', through whichever product is smaller.

    `inputs` is [n, in, t], `outputs` [n, out, t].
    """
    wide, tall, positions = inputs.shape[1], outputs.shape[1], inputs.shape[2]
    if positions * (wide + tall) < wide * tall:
        gram = torch.bmm(inputs.transpose(1, 2), inputs) * torch.bmm(
            outputs.transpose(1, 2), outputs
        )
        square = gram.sum((1, 2))
        if direction is None:
            return square, torch.zeros_like(square)
        moved = torch.matmul(direction.reshape(tall, wide).to(inputs.dtype), inputs)
        return square, (moved * outputs).sum((1, 2))
    return explicit(torch.bmm(outputs, inputs.transpose(1, 2)), direction)


def _embedding(call: LayerCall, gradient: Tensor, direction: Tensor | None) -> Reduced:
    """Return both numbers of an embedding's weight."""
    tokens, outputs = call.input.flatten(1), gradient.reshape(len(gradient), -1, gradient.shape[-1])
    same = (tokens[:, :, None] == tokens[:, None, :]).to(outputs.dtype)
    square = (torch.bmm(outputs, outputs.transpose(1, 2)) * same).sum((1, 2))
    if direction is None:
        return square, torch.zeros_like(square)
    return square, (direction.to(outputs.dtype)[tokens] * outputs).sum((1, 2))


def _normalised(module: nn.Module, inputs: Tensor) -> tuple[Tensor, list[int]]:
    """Return the normalised input of a norm layer, and the axes of its parameters."""
    if isinstance(module, _BatchNorm):
        assert module.running_mean is not None and module.running_var is not None
        shape = [1, -1] + [1] * (inputs.ndim - 2)
        scale = torch.rsqrt(module.running_var + module.eps)
        return (inputs - module.running_mean.view(shape)) * scale.view(shape), [1]
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(inputs, module.num_groups, eps=module.eps), [1]
    assert isinstance(module, nn.LayerNorm)
    width = len(module.normalized_shape)
    return F.layer_norm(inputs, module.normalized_shape, eps=module.eps), list(
        range(inputs.ndim - width, inputs.ndim)
    )
