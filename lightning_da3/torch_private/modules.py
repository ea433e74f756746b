"""What `torch.nn.Module` and its subclasses hold without a public name."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lightning_da3.torch_private.finding import found, missing

_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)

NORM_LAYERS: Any = found("torch.nn.modules.batchnorm:_NormBase", _NORMS)
"""What norms with running statistics are instances of."""

DROPOUT_LAYERS: Any = found("torch.nn.modules.dropout:_DropoutNd", _DROPOUTS)
"""What dropouts are instances of."""

ASSERTION = found("torch:_assert", None)
"""The function that graphs call where a model's own code asserts."""

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
HOOKS_WITH_KWARGS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)
"""The names of all that a module holds by the numbers of hooks."""


def hooks_of(module: nn.Module, kinds: tuple[str, ...]) -> list[dict[int, Any]]:
    """The hooks on a module, of each of these kinds, by their numbers; to read and to edit."""
    absent = [kind for kind in kinds if not hasattr(module, kind)]
    if absent:
        missing(f"nn.Module.{absent[0]}", "keeping the hooks on a module")()
    return [getattr(module, kind) for kind in kinds]


def original_of(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` made this one of; None if it made none."""
    return dict(module.named_children()).get("_orig_mod")


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` made a module, or its method `compile` was called."""
    by_method = getattr(module, "_compiled_call_impl", None) is not None
    return by_method or original_of(module) is not None


def gradient_hooks(network: nn.Module) -> list[Any]:
    """The hooks on gradients: of parameters, and of the network as a whole."""
    of_parameters = [getattr(p, "_backward_hooks", None) or {} for p in network.parameters()]
    own = [getattr(network, kind, {}) for kind in BACKWARD_HOOKS]
    return [hook for hooks in (*of_parameters, *own) for hook in hooks.values()]


def silence_(graph: fx.GraphModule) -> None:
    """Let a graph of `torch.fx` raise what fails in it; by itself it prints that as well.

    Args:
        graph: One that nobody else uses: what others print meanwhile is theirs.
    """
    vars(graph)["_wrapped_call"] = _call_as_module


def _call_as_module(graph: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    return super(type(graph), graph).__call__(*args, **kwargs)  # each graph has a class of its own
