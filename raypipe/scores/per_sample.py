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
2022, arXiv 2205.10683). They hold where a layer computes with its weights, once, for a batch whose
first axis is that of the samples. All other parameters are differentiated per sample: exact,
slower, and reported by `slow_parameters`. These are parameters of other layers, of layers that run
twice or share weights, those that a network uses without calling their layer, as attention does,
and those of layers that see something other than samples, such as the windows of a Swin network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from raypipe.scores.attention import mathematical_attention
from raypipe.scores.layer_rules import FAST_LAYERS, LayerCall, Reduced, explicit, reduce_layer

SLOW_CHUNK = 16
"""Samples that are differentiated at a time; all their gradients are held."""


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
    parameters = {
        name: value.detach().requires_grad_(name in trainable)
        for name, value in model.named_parameters()
    }
    usable, loss, used = _fast_calls(model, parameters, images, labels)
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
            square, dot = reduce_layer(call, gradient, directions)
            norm += square
            aligned += dot
    # a parameter that the loss does not depend on has no gradient
    rest = (trainable & used) - _parameter_names(model, {call.name for call in usable})
    if rest:
        values = {name: value.detach() for name, value in parameters.items()}
        square, dot = _slow(model, values, sorted(rest), images, labels, direction)
        norm += square
        aligned += dot
    return norm, aligned


def slow_parameters(model: nn.Module, image: Tensor) -> list[str]:
    """Return the trainable parameters that are differentiated per sample: exact but slower.

    Parameters
    ----------
    model : nn.Module
        Put into eval mode.
    image : Tensor
        Some input of the model, [1, ...].
    """
    model.eval()
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    parameters = {
        name: value.detach().requires_grad_(name in trainable)
        for name, value in model.named_parameters()
    }
    images, labels = torch.cat([image, image]), torch.zeros(2, dtype=torch.int64)
    calls, _, used = _fast_calls(model, parameters, images, labels.to(image.device))
    fast = _parameter_names(model, {call.name for call in calls})
    return [name for name in parameters if name in (trainable & used) - fast]


def _fast_calls(
    model: nn.Module, parameters: dict[str, Tensor], images: Tensor, labels: Tensor
) -> tuple[list[LayerCall], Tensor, set[str]]:
    """Return the calls that a fast rule holds for, the loss, and the parameters that it uses."""
    fast = _fast_modules(model)
    with torch.enable_grad():
        loss, calls = _recorded_loss(model, fast, parameters, images, labels)
    uses = _uses(loss, parameters)
    ran = Counter(call.name for call in calls)
    single: dict[str, int] = {}
    if len(images) > 1:  # an axis can be as long as the batch by chance, but not for two batches
        with torch.no_grad(), mathematical_attention():
            _, once = _recorded_loss(model, fast, parameters, images[:1], labels[:1])
        single = {call.name: call.output.shape[0] for call in once if call.output.ndim}
    usable = [
        call
        for call in calls
        if ran[call.name] == 1
        and call.output.shape[:1] == (len(images),)
        and single.get(call.name, 1) == 1
        and all(uses[name] <= 1 for name in _parameter_names(model, {call.name}))
    ]
    return usable, loss, set(uses)


def _uses(loss: Tensor, parameters: Mapping[str, Tensor]) -> Counter[str]:
    """Count how often the computation of a loss uses each parameter that requires a gradient."""
    names = {id(value): name for name, value in parameters.items()}
    counts: Counter[str] = Counter()
    pending, seen = [loss.grad_fn], {loss.grad_fn}
    while pending:
        node = pending.pop()
        for following, _ in node.next_functions if node is not None else ():
            variable = getattr(following, "variable", None)
            if variable is not None and id(variable) in names:
                counts[names[id(variable)]] += 1
            elif following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return counts


def _recorded_loss(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    parameters: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
) -> tuple[Tensor, list[LayerCall]]:
    """Return the summed cross-entropy of a batch, and every call of the given modules."""
    calls: list[LayerCall] = []
    handles = [
        module.register_forward_hook(_recorder(name, module, calls))
        for name, module in modules.items()
    ]
    try:
        loss = F.cross_entropy(
            functional_call(model, parameters, (images,)), labels, reduction="sum"
        )
    finally:
        for handle in handles:
            handle.remove()
    return loss, calls


def _fast_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with a fast rule by name, except those that share a parameter."""
    uses: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for value in module.parameters(recurse=False):
            uses[id(value)] = uses.get(id(value), 0) + 1
    result: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if _computes_as_stated(module) and own and all(uses[id(value)] == 1 for value in own):
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


def _computes_as_stated(module: nn.Module) -> bool:
    """Whether a module is a layer with a fast rule, and neither its class nor a hook changes it."""
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks or not isinstance(module, FAST_LAYERS):
        return False
    convolve = getattr(kind, "_conv_forward", nn.Conv2d._conv_forward)
    if isinstance(module, nn.Conv2d) and convolve is not nn.Conv2d._conv_forward:
        return False
    return any(kind.forward is layer.forward for layer in FAST_LAYERS)


def _parameter_names(model: nn.Module, modules: set[str]) -> set[str]:
    """Return the names of the parameters that belong directly to the named modules."""
    return {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if name in modules
        for key, _ in module.named_parameters(recurse=False)
    }


def _recorder(
    name: str, module: nn.Module, calls: list[LayerCall]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a forward hook that records each call of a module."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()
        calls.append(LayerCall(name, module, inputs[0].detach(), output))
        # a following in-place activation must not change the tensor we differentiate by
        return output.clone()

    return hook


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
        gradients = _per_sample(loss, part, images[rows], labels[rows])
        both = [explicit(value, (direction or {}).get(name)) for name, value in gradients.items()]
        squares.append(torch.stack([square for square, _ in both]).sum(0))
        dots.append(torch.stack([dot for _, dot in both]).sum(0))
    return torch.cat(squares), torch.cat(dots)


def _per_sample(
    loss: Callable[[dict[str, Tensor], Tensor, Tensor], Tensor],
    part: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """Return the gradient of every sample's loss by `part`, [n, ...] each.

    A network that `vmap` cannot run, because its code looks at values, is run once per sample.
    """
    with mathematical_attention():
        try:
            return vmap(grad(loss), in_dims=(None, 0, 0))(part, images, labels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass
    leaves = {name: value.clone().requires_grad_() for name, value in part.items()}
    with torch.enable_grad():
        of_each = [
            torch.autograd.grad(
                loss(leaves, *sample), list(leaves.values()), materialize_grads=True
            )
            for sample in zip(images, labels, strict=True)
        ]
    return {
        name: torch.stack(values)
        for name, values in zip(leaves, zip(*of_each, strict=True), strict=True)
    }
