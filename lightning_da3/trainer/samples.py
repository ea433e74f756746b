"""A few images of every domain, as its network was called with them, and what it makes of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_da3.model.model import DA3Model
from lightning_da3.model.modes import in_use
from lightning_da3.torch_private.fake import is_fake
from lightning_da3.torch_private.modules import is_compiled
from lightning_da3.torch_private.trees import tree_leaves

MOST = 4


@dataclasses.dataclass(frozen=True)
class Looked:
    """What a network made of the images.

    Attributes:
        images: (N, C, H, W).
        maps: By host (N, 1, *grid) of zeros and ones.
        captions: One an image: its class, and what it was taken for.
    """

    images: Tensor
    maps: dict[str, Tensor]
    captions: list[str]


class Samples:
    """Keeps the first images of every domain. Copies have none.

    They are taken from one of the network's own calls, after a step that nobody measures, and only
    if images are all that it is called with.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._tried: set[str] = set()
        self._call: list[Tensor] = []  # of this step
        self._hook: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """As new."""
        return vars(Samples())

    @property
    def domains(self) -> list[str]:
        """Those of which there are images."""
        return list(self._kept)

    def step_begins(self, model: DA3Model) -> None:
        """A training step begins, of a domain whose images may be wanted."""
        domain = model.active_domain
        if domain is None or domain in self._tried or is_compiled(model):
            return
        self._tried.add(domain)

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if not self._call and len(args) == 1 and len(tensors) == 1 and not is_fake(tensors[0]):
                self._call.append(tensors[0])

        self._hook = model.register_forward_pre_hook(note, with_kwargs=True)

    def step_ends(self, model: DA3Model, batch: Any) -> None:
        """The step is over: a copy of a few of its images is kept."""
        call, domain = self._call, model.active_domain
        self.abort()
        if domain is None or not call or not _are_images(call[0]):
            return
        images = call[0]
        labels = _labels_in(batch, len(images))
        kept = None if labels is None else labels[:MOST].detach().clone()
        self._kept[domain] = images[:MOST].detach().clone(), kept

    def abort(self) -> None:
        """Take nothing of this step."""
        self._call = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def look(self, model: DA3Model, domain: str) -> Looked:
        """What the network, whose active domain this is, makes of the domain's images.

        Args:
            model: The network; it is left as it was.
            domain: One of `domains`.
        """
        images, labels = self._kept[domain]
        with _in_eval(model), torch.random.fork_rng(devices=[]):
            maps, scores = model.gate_maps(images), model(images)
        names = model.domain(domain).class_names
        return Looked(images, maps, _captions(len(images), labels, scores, names))


@contextlib.contextmanager
def _in_eval(model: DA3Model) -> Iterator[None]:
    """Inference in the block; afterwards the model is as it was."""
    here = model.calls.here
    share, whole = here.executed, here.whole
    try:
        with in_use(model):
            yield
    finally:
        here.executed, here.whole = share, whole


def _are_images(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[1] in (1, 3) and x.is_floating_point() and len(x) > 0


def _labels_in(batch: Any, count: int) -> Tensor | None:
    whole = (torch.int64, torch.int32, torch.int16, torch.uint8)
    tensors = (x for x in tree_leaves(batch) if isinstance(x, Tensor))
    return next((x for x in tensors if x.shape == (count,) and x.dtype in whole), None)


def _captions(count: int, labels: Tensor | None, scores: Any, names: list[str] | None) -> list[str]:
    predicted = (
        scores.argmax(1).tolist() if isinstance(scores, Tensor) and scores.dim() == 2 else []
    )

    def name(label: int) -> str:
        known = names is not None and 0 <= label < len(names)
        return names[label] if names is not None and known else f"class {label}"

    true = [] if labels is None else labels.tolist()
    captions = []
    for i in range(count):
        said = name(true[i]) if true else ""
        if predicted:
            taken = (
                "right" if true and predicted[i] == true[i] else f"taken for {name(predicted[i])}"
            )
            said = f"{said}, {taken}" if said else taken
        captions.append(said)
    return captions
