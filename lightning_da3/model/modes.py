"""Layers that compute differently in train mode, which the backbone must not."""

from __future__ import annotations

from torch import fx, nn

_MODAL = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
)


def hold_in_eval_(backbone: nn.Module) -> None:
    """Put layers in eval that could compute differently in train mode; the others stay."""
    for layer in backbone.modules():
        if _has_modes(layer):
            layer.eval()


def _has_modes(layer: nn.Module) -> bool:
    """Whether a layer of the rewritten backbone may compute differently in train mode."""
    home = type(layer).__module__
    if home.startswith("torch.nn."):
        return isinstance(layer, _MODAL)
    return not isinstance(layer, fx.GraphModule) and not home.startswith("lightning_da3.")
