"""Nested lists, tuples, dictionaries and registered classes: their leaves."""

from typing import TYPE_CHECKING

from lightning_da3.torch_private.finding import needed

if TYPE_CHECKING:
    from torch.utils._pytree import (
        TreeSpec,
        tree_flatten,
        tree_leaves,
        tree_map,
        tree_map_only,
        tree_unflatten,
    )
else:
    _PLACE, _USE = "torch.utils._pytree", "reading nested inputs and outputs"
    TreeSpec = needed(f"{_PLACE}:TreeSpec", _USE)
    tree_flatten = needed(f"{_PLACE}:tree_flatten", _USE)
    tree_leaves = needed(f"{_PLACE}:tree_leaves", _USE)
    tree_map = needed(f"{_PLACE}:tree_map", _USE)
    tree_map_only = needed(f"{_PLACE}:tree_map_only", _USE)
    tree_unflatten = needed(f"{_PLACE}:tree_unflatten", _USE)

__all__ = ["TreeSpec", "tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_unflatten"]
