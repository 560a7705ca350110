"""Per-sample gradient norms and alignments, without holding the gradients of a whole network.

One forward pass, and one backward pass to the outputs of the layers, give for each layer its
input a and the gradient d of its output. These two determine the layer's per-sample gradient g.
It is reduced to two numbers per sample and dropped before the next layer's gradient is computed:

    linear       g = sum_t d_t a_t'          (one position: |g|^2 = |d|^2 |a|^2, without g itself)
    convolution  the same over the unfolded input, a few samples at a time;
                 |g|^2 = sum of (A'A) * (D'D) where that is cheaper
    norm layers  g = sum d * normalised a    (BatchNorm in eval mode, LayerNorm, GroupNorm)
    embedding    g = sum of d over the positions of a token

The identities are those of Goodfellow 2015 (arXiv 1510.01799) and of ghost clipping (Bu et al.
2022, arXiv 2205.10683). Parameters of any other layer, of a layer that runs twice, or shared by
two layers, are differentiated per sample with `torch.func.vmap(grad)`: exact, slower, and
reported by `slow_parameters`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

Reduced = tuple[Tensor, Tensor]
"""Squared norm [n] and alignment [n]."""

FAST_LAYERS = (nn.Linear, nn.Conv2d, _BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Embedding)
"""Layers with a fast rule."""
MAX_VALUES_CPU, MAX_VALUES_GPU = 1 << 19, 1 << 26
"""Values of unfolded input held at once, on a CPU and on a GPU."""
SLOW_CHUNK = 16
"""Samples that vmap differentiates at a time; it holds all their gradients."""


def norms_and_alignments(
    model: nn.Module, images: Tensor, labels: Tensor, direction: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return |grad l_i|^2 and < direction, grad l_i > of every sample's cross-entropy.

    Gradients are taken over all trainable parameters. The model is put into eval mode, so that
    samples do not mix.

    Parameters
    ----------
    model : nn.Module
        Any network; layers without a fast rule are slow (see `slow_parameters`).
    images : Tensor
        Input of the model, [n, ...].
    labels : Tensor
        int64 [n].
    direction : Mapping[str, Tensor], optional
        Tensors shaped like the parameters. None: the alignments are 0.

    Returns
    -------
    squares, alignments : Tensor
        [n] each.
    """
    model.eval()
    if not len(images):  # without a sample the layers' shapes are unknown
        return torch.zeros(0, device=images.device), torch.zeros(0, device=images.device)
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    fast = _fast_modules(model)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    loss, calls = _recorded_loss(model, fast, parameters, images, labels)
    ran = Counter(call.name for call in calls)
    usable = [call for call in calls if ran[call.name] == 1]
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
            directions = {
                key: (direction or {}).get(prefix + key)
                for key, _ in call.module.named_parameters(recurse=False)
                if prefix + key in trainable
            }
            square, dot = _reduce(call, gradient, directions)
            norm += square
            aligned += dot
    # Modules that never ran have no gradient. What remains ran in a way that only vmap handles.
    rest = trainable - _parameter_names(model, {call.name for call in usable})
    rest -= _parameter_names(model, set(fast) - set(ran))
    if rest:
        square, dot = _slow(model, parameters, sorted(rest), images, labels, direction)
        norm += square
        aligned += dot
    return norm, aligned


def slow_parameters(model: nn.Module) -> list[str]:
    """Return the trainable parameters of layers without a fast rule.

    They are differentiated per sample: exact but slower.
    """
    fast = _parameter_names(model, set(_fast_modules(model)))
    return [
        name for name, value in model.named_parameters() if value.requires_grad and name not in fast
    ]


def _recorded_loss(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    parameters: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
) -> tuple[Tensor, list[_Call]]:
    """Return the summed cross-entropy of a batch, and every call of the given modules."""
    calls: list[_Call] = []
    handles = [
        module.register_forward_hook(_recorder(name, module, calls))
        for name, module in modules.items()
    ]
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(
                functional_call(model, parameters, (images,)), labels, reduction="sum"
            )
    finally:
        for handle in handles:
            handle.remove()
    return loss, calls


@dataclass
class _Call:
    """One call of a layer in the forward pass."""

    name: str
    module: nn.Module
    input: Tensor = field(repr=False)
    output: Tensor = field(repr=False)


def _fast_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with a fast rule by name, except those that share a parameter."""
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
                continue  # it uses the batch's statistics even in eval mode: samples mix
            result[name] = module
    return result


def _parameter_names(model: nn.Module, modules: set[str]) -> set[str]:
    """Return the names of the parameters that belong directly to the named modules."""
    return {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if name in modules
        for key, _ in module.named_parameters(recurse=False)
    }


def _recorder(
    name: str, module: nn.Module, calls: list[_Call]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a forward hook that records each call of a module."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output.requires_grad_()
        calls.append(_Call(name, module, inputs[0].detach(), output))
        # a following in-place activation must not change the tensor we differentiate by
        return output.clone()

    return hook


def _reduce(call: _Call, gradient: Tensor, directions: Mapping[str, Tensor | None]) -> Reduced:
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
            add(_explicit(gradient.sum(axes) if axes else gradient, directions["bias"]))
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
                add(_explicit(product.sum(axes) if axes else product, directions[key]))
    return norm, aligned


def _explicit(gradients: Tensor, direction: Tensor | None) -> Reduced:
    """Return both numbers from per-sample gradients [n, ...]."""
    flat = gradients.flatten(1)
    square = torch.einsum("np,np->n", flat, flat)
    return square, torch.zeros_like(square) if direction is None else flat @ direction.flatten().to(
        flat.dtype
    )


def _linear(call: _Call, gradient: Tensor, direction: Tensor | None) -> Reduced:
    """Return both numbers of a linear layer's weight."""
    inputs = call.input
    if inputs.ndim == 2:
        square = gradient.square().sum(1) * inputs.square().sum(1)
        if direction is None:
            return square, torch.zeros_like(square)
        return square, ((inputs @ direction.to(inputs.dtype).T) * gradient).sum(1)
    inputs, gradient = inputs.flatten(1, -2), gradient.flatten(1, -2)
    return _outer(inputs.transpose(1, 2), gradient.transpose(1, 2), direction)


def _convolution(call: _Call, gradient: Tensor, direction: Tensor | None) -> Reduced:
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
        product = _products(columns, outputs)
        parts.append(_explicit(product.reshape(len(outputs) // module.groups, -1), weight))
    squares, dots = zip(*parts, strict=True)
    return torch.cat(squares), torch.cat(dots)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return left right' of every pair: [n, a, t], [n, b, t] -> [n, a, b]."""
    if (
        left.device.type != "cpu"
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


def _gram_of_patches(call: _Call) -> Tensor:
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
    return _explicit(torch.bmm(outputs, inputs.transpose(1, 2)), direction)


def _embedding(call: _Call, gradient: Tensor, direction: Tensor | None) -> Reduced:
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


def _slow(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: list[str],
    images: Tensor,
    labels: Tensor,
    direction: Mapping[str, Tensor] | None,
) -> Reduced:
    """Return both numbers of the parameters `names`, by differentiating per sample."""
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
