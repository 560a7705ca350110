"""Squared length of every sample's gradient, and its alignment with a direction, without the gradients of a whole network in memory.

One forward pass and one backward pass to the layers' outputs give, for each layer, its input a and the gradient d of its
output. From these two the layer's own per-sample gradient follows, is reduced to two numbers per sample, and is dropped
before the next layer's is made:

    linear       g = sum_t d_t a_t'          (one position: |g|^2 = |d|^2 |a|^2, without g itself)
    convolution  the same over the unfolded input, few samples at a time; |g|^2 = sum of (A'A) * (D'D) where that is cheaper
    norm layers  g = sum d * normalised a    (BatchNorm in eval mode, LayerNorm, GroupNorm)
    embedding    g = sum of d over the positions of a token

The identities are those of Goodfellow 2015 (arXiv 1510.01799) and of ghost clipping (Bu et al. 2022, arXiv 2205.10683). Parameters
of any other layer, of a layer that runs twice, or shared by two layers, are differentiated per sample with
`torch.func.vmap(grad)`: exact, slower, and reported by `slow_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

Reduced = tuple[Tensor, Tensor]
"""Squared length [n] and alignment [n]."""

FAST_LAYERS = (nn.Linear, nn.Conv2d, _BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Embedding)
CACHED_VALUES, MOST_VALUES = 1 << 19, 1 << 26
"""Values of unfolded input held at once, on a CPU and on a GPU."""
SLOW_CHUNK = 16
"""Samples differentiated at a time by vmap, which keeps their gradients."""


def norms_and_alignments(
    model: nn.Module, images: Tensor, labels: Tensor, direction: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """|grad l_i|^2 and < direction, grad l_i > of every sample's cross-entropy: two tensors [n].

    images     input of the model [n, ...];  labels  int64 [n]
    direction  tensors shaped like the parameters; None: the alignments are 0
    The model is put into eval mode, so that samples do not mix. Gradients are over all trainable parameters.
    """
    model.eval()
    if not len(images):  # the shapes below cannot be told from no sample
        return torch.zeros(0, device=images.device), torch.zeros(0, device=images.device)
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    fast = _fast_modules(model)
    calls: list[_Call] = []
    handles = [
        module.register_forward_hook(_recorder(name, module, calls))
        for name, module in fast.items()
    ]
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(
                functional_call(model, parameters, (images,)), labels, reduction="sum"
            )
    finally:
        for handle in handles:
            handle.remove()
    ran = [call.name for call in calls]
    usable = [call for call in calls if ran.count(call.name) == 1]
    gradients = (
        torch.autograd.grad(loss, [call.output for call in usable], allow_unused=True)
        if usable
        else ()
    )
    norm = torch.zeros(len(images), dtype=loss.dtype, device=loss.device)
    aligned = torch.zeros_like(norm)
    with torch.no_grad():
        for call, gradient in zip(usable, gradients, strict=True):
            if gradient is None:
                continue
            prefix = f"{call.name}." if call.name else ""
            wanted = {
                key: (direction or {}).get(prefix + key)
                for key, _ in call.module.named_parameters(recurse=False)
                if prefix + key in trainable
            }
            square, dot = _reduce(call, gradient, wanted)
            norm += square
            aligned += dot
    rest = trainable - _covered(model, {call.name for call in usable})
    # modules that never ran have no gradient; what is left ran in a way only the slow path understands
    rest -= _covered(model, set(fast) - set(ran))
    if rest:
        square, dot = _slow(model, parameters, sorted(rest), images, labels, direction)
        norm += square
        aligned += dot
    return norm, aligned


def slow_parameters(model: nn.Module) -> list[str]:
    """Trainable parameters whose layers are not of a kind with a fast rule: differentiated per sample, exact but slower."""
    covered = _covered(model, set(_fast_modules(model)))
    return [
        name
        for name, value in model.named_parameters()
        if value.requires_grad and name not in covered
    ]


@dataclass
class _Call:
    """One run of a layer in the forward pass."""

    name: str
    module: nn.Module
    input: Tensor = field(repr=False)
    output: Tensor = field(repr=False)


def _fast_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with a fast rule, without those that share a parameter."""
    uses: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for value in module.parameters(recurse=False):
            uses[id(value)] = uses.get(id(value), 0) + 1
    result: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, FAST_LAYERS) and own and all(uses[id(value)] == 1 for value in own):
            if isinstance(module, nn.Conv2d) and (
                module.padding_mode != "zeros" or isinstance(module.padding, str)
            ):
                continue
            if isinstance(module, nn.Embedding) and (
                module.max_norm is not None or module.padding_idx is not None
            ):
                continue
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                continue  # its statistics are those of the batch, even in eval mode: samples mix
            result[name] = module
    return result


def _covered(model: nn.Module, names: set[str]) -> set[str]:
    result = set()
    for name, module in model.named_modules():
        if name in names:
            result |= {
                f"{name}.{key}" if name else key
                for key, _ in module.named_parameters(recurse=False)
            }
    return result


def _recorder(
    name: str, module: nn.Module, calls: list[_Call]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output.requires_grad_()
        calls.append(_Call(name, module, inputs[0].detach(), output))
        return (
            output.clone()
        )  # an in-place activation behind this layer must not change what is differentiated by

    return hook


def _reduce(call: _Call, gradient: Tensor, wanted: Mapping[str, Tensor | None]) -> Reduced:
    """Both numbers of one layer, for the parameters in `wanted` and their directions."""
    module, count = call.module, len(gradient)
    norm = gradient.new_zeros(count)
    aligned = gradient.new_zeros(count)

    def add(part: Reduced) -> None:
        norm.add_(part[0])
        aligned.add_(part[1])

    if isinstance(module, nn.Linear | nn.Conv2d):
        if "bias" in wanted:
            axes = [
                axis
                for axis in range(1, gradient.ndim)
                if axis != (1 if isinstance(module, nn.Conv2d) else gradient.ndim - 1)
            ]
            add(_explicit(gradient.sum(axes) if axes else gradient, wanted["bias"]))
        if "weight" in wanted:
            rule = _convolution if isinstance(module, nn.Conv2d) else _linear
            add(rule(call, gradient, wanted["weight"]))
    elif isinstance(module, nn.Embedding):
        if "weight" in wanted:
            add(_embedding(call, gradient, wanted["weight"]))
    else:
        normalised, keep = _normalised(module, call.input)
        axes = [axis for axis in range(1, gradient.ndim) if axis not in keep]
        for key, factor in (("weight", normalised), ("bias", None)):
            if key in wanted:
                product = gradient if factor is None else gradient * factor
                add(_explicit(product.sum(axes) if axes else product, wanted[key]))
    return norm, aligned


def _explicit(gradients: Tensor, direction: Tensor | None) -> Reduced:
    """Both numbers from per-sample gradients [n, ...]."""
    flat = gradients.flatten(1)
    square = torch.einsum("np,np->n", flat, flat)
    return square, torch.zeros_like(square) if direction is None else flat @ direction.flatten().to(
        flat.dtype
    )


def _linear(call: _Call, gradient: Tensor, direction: Tensor | None) -> Reduced:
    inputs = call.input
    if inputs.ndim == 2:
        square = gradient.square().sum(1) * inputs.square().sum(1)
        if direction is None:
            return square, torch.zeros_like(square)
        return square, ((inputs @ direction.to(inputs.dtype).T) * gradient).sum(1)
    inputs, gradient = inputs.flatten(1, -2), gradient.flatten(1, -2)
    return _outer(inputs.transpose(1, 2), gradient.transpose(1, 2), direction)


def _convolution(call: _Call, gradient: Tensor, direction: Tensor | None) -> Reduced:
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
    # the products of few samples at a time, which stay in the processor's cache
    step = max(
        1,
        (CACHED_VALUES if gradient.device.type == "cpu" else MOST_VALUES)
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
        product = _products(columns, outputs)
        parts.append(_explicit(product.reshape(len(outputs) // module.groups, -1), weight))
    squares, dots = zip(*parts, strict=True)
    return torch.cat(squares), torch.cat(dots)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left right' of every pair: [n, a, t], [n, b, t] -> [n, a, b]."""
    if (
        left.device.type != "cpu"
        or left.dtype != torch.float32
        or not torch.backends.mkldnn.is_available()
    ):
        return torch.bmm(left, right.transpose(1, 2))
    # As 1x1 convolutions, since oneDNN has AVX-512 kernels on every processor, and MKL only on those of its maker: twice as fast there.
    result = left.new_empty(len(left), left.shape[1], right.shape[1])
    for own, other, target in zip(left, right, result, strict=True):
        pixels = own[None, None].permute(0, 3, 1, 2)
        product = torch.mkldnn_convolution(
            pixels, other[:, :, None, None], None, (0, 0), (1, 1), (1, 1), 1
        )
        target.copy_(product[0, :, 0].T)
    return result


def _patches(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What each output position sees of the input: [n, groups, kernel * channels, height, width].

    One copy of the padded input for every place in the kernel: five times faster on a CPU than `F.unfold`.
    """
    assert not isinstance(module.padding, str)
    (above, beside), (down, across), (apart, aside) = module.padding, module.stride, module.dilation
    (rows, columns), groups = module.kernel_size, module.groups
    padded = F.pad(inputs.contiguous(), (beside, beside, above, above)).unflatten(1, (groups, -1))
    high = (padded.shape[-2] - apart * (rows - 1) - 1) // down + 1
    wide = (padded.shape[-1] - aside * (columns - 1) - 1) // across + 1
    result = inputs.new_empty(len(inputs), groups, rows * columns, padded.shape[2], high, wide)
    for i in range(rows):
        for j in range(columns):
            top, left = i * apart, j * aside
            seen = padded[
                ...,
                top : top + down * (high - 1) + 1 : down,
                left : left + across * (wide - 1) + 1 : across,
            ]
            result[:, :, i * columns + j] = seen
    return result.flatten(2, 3)


def _gram_of_patches(call: _Call) -> Tensor:
    """Inner products of what two output positions see of the input: [n, positions, positions].

    With stride 1 it is a sum of shifted blocks of the inner products of single pixels: kernel times fewer multiplications.
    """
    module, inputs = call.module, call.input
    assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
    if module.stride != (1, 1) or module.dilation != (1, 1):
        columns = _patches(module, inputs)[:, 0].flatten(2)
        return torch.bmm(columns.transpose(1, 2), columns)
    (above, beside), (height, width) = module.padding, module.kernel_size
    pixels = F.pad(inputs, (beside, beside, above, above))
    rows, columns_ = pixels.shape[2], pixels.shape[3]
    flat = pixels.flatten(2)
    pairs = torch.bmm(flat.transpose(1, 2), flat).view(-1, rows, columns_, rows, columns_)
    high, across = rows - height + 1, columns_ - width + 1
    total = pairs.new_zeros(len(inputs), high, across, high, across)
    for i in range(height):
        for j in range(width):
            total += pairs[:, i : i + high, j : j + across, i : i + high, j : j + across]
    return total.view(len(inputs), high * across, high * across)


def _outer(inputs: Tensor, outputs: Tensor, direction: Tensor | None) -> Reduced:
    """Both numbers of g = sum_t outputs_t inputs_t', from [n, in, t] and [n, out, t]; through whichever product is smaller."""
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
    return _explicit(torch.bmm(outputs, inputs.transpose(1, 2)), direction)


def _embedding(call: _Call, gradient: Tensor, direction: Tensor | None) -> Reduced:
    tokens, outputs = call.input.flatten(1), gradient.reshape(len(gradient), -1, gradient.shape[-1])
    same = (tokens[:, :, None] == tokens[:, None, :]).to(outputs.dtype)
    square = (torch.bmm(outputs, outputs.transpose(1, 2)) * same).sum((1, 2))
    if direction is None:
        return square, torch.zeros_like(square)
    return square, (direction.to(outputs.dtype)[tokens] * outputs).sum((1, 2))


def _normalised(module: nn.Module, inputs: Tensor) -> tuple[Tensor, list[int]]:
    """The input of a norm layer, normalised, and the axes its parameters run over."""
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


def _slow(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: list[str],
    images: Tensor,
    labels: Tensor,
    direction: Mapping[str, Tensor] | None,
) -> Reduced:
    others = {
        **{key: value for key, value in parameters.items() if key not in names},
        **dict(model.named_buffers()),
    }

    def loss(part: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(
            functional_call(model, {**others, **part}, (image[None],)), label[None]
        )

    part = {name: parameters[name] for name in names}
    squares, dots = [], []
    for start in range(0, len(images), SLOW_CHUNK):
        rows = slice(start, start + SLOW_CHUNK)
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(part, images[rows], labels[rows])
        both = [_explicit(value, (direction or {}).get(name)) for name, value in gradients.items()]
        squares.append(torch.stack([square for square, _ in both]).sum(0))
        dots.append(torch.stack([dot for _, dot in both]).sum(0))
    return torch.cat(squares), torch.cat(dots)
