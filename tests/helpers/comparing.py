"""What tests of conversion share: domains that have learned something, and comparisons."""

import dataclasses

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_da3.ops.adapter_cells import VALUE_SCALE


def leaves(outputs):
    """Every tensor of floats, in order."""
    for leaf in tree_leaves(outputs):
        if dataclasses.is_dataclass(leaf):
            yield from leaves(list(vars(leaf).values()))
        elif isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def add(model, name, seed=1):
    """A new domain that has learned something: random parameters."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model.add_domain(name, None if model.plan.head is None else 3)
        domain = model.domain(name)
        for parameter in domain.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        for adapter in domain.adapters.values():  # addends of the size of those learned
            adapter.value.weight /= VALUE_SCALE
            adapter.value.bias /= VALUE_SCALE
        if domain.head is not None:
            domain.head.bias.add_(1.0)  # some networks have a ReLU behind
    return model


def mix_gates_(model, x):
    """Shift every gate of the active domain: open for some cells, closed for others."""

    def centre_(adapter, args):
        hidden = adapter.norm(adapter.squeeze(args[0])).relu()
        logits = adapter.attend(hidden.movedim(1, -1))
        adapter.attend.bias -= (logits.amax() + logits.amin()) / 2

    adapters = model.domain(model.active_domain).adapters.values()
    hooks = [adapter.register_forward_pre_hook(centre_) for adapter in adapters]
    with torch.no_grad():
        model(*x)
    for hook in hooks:
        hook.remove()


def score(outputs):
    """A scalar that weighs every output differently."""
    generator = torch.Generator().manual_seed(5)
    return sum(
        (leaf * torch.randn(leaf.shape, generator=generator).to(leaf.dtype)).sum()
        for leaf in leaves(outputs)
    )


def gradients(model, x, outputs=None):
    outputs = model(*x) if outputs is None else outputs
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(score(outputs), trained)


def assert_relatively_close(actual, expected, tolerance):
    for one, other in zip(leaves(actual), leaves(expected), strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def assert_gradients_close(got, want, tolerance):
    """Each as near as its length asks, or a twentieth of the longest: small ones cancel."""
    largest = max(other.norm() for other in want)
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() <= tolerance * max(other.norm(), 0.05 * largest)


def assert_identical(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def photograph(net):
    """Everything of a network that conversion might change."""
    state = {key: value.numpy().tobytes() for key, value in net.state_dict().items()}
    flags = {name: module.training for name, module in net.named_modules()}
    trained = {name: (id(p), p.requires_grad) for name, p in net.named_parameters()}
    attributes = {name: sorted(vars(module)) for name, module in net.named_modules()}
    hooks = {
        name: {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        for name, module in net.named_modules()
    }
    return state, flags, trained, attributes, hooks
