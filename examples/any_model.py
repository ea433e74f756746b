"""Every float model of torchvision: what learning a domain keeps beside fine-tuning, and how exact.

Saved: activation bytes that autograd keeps for the backward, in train mode, fine-tuning beside DA3
with gates, else by default, and in exact mode. Gradients: of every parameter of the domain (random,
some gates shut) against plain autograd on the same folded network; the least cosine by default, the
greatest relative error in exact mode. Where rounding let one ReLU, one gate or one matched box
decide otherwise in float32, exact mode is measured in float64 as well. Weights are random: bytes do
not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_with_path

from lightning_da3 import DA3Config, DA3Model, GateConfig, MemoryConfig, convert
from lightning_da3.memory import SavedActivations
from lightning_da3.reference import PlainPyTorch

CLASSES = 10
# parameters from which two images are a batch, and one is
GIANT, TITAN = 30_000_000, 500_000_000


@dataclass(frozen=True)
class Asked:
    """Of one kind of network: least ratio to fine-tuning by default and in exact mode."""

    default: float
    exact: float
    names: tuple[str, ...] = field(default=())


PYTHON = Asked(5, 4, ("raft",))  # much of what it keeps belongs to a loop that stays Python
DENSE = Asked(10, 5, ("deeplab", "fcn", "lraspp", "rcnn", "fcos", "retina", "ssd"))
VIDEO = Asked(10, 5, ("mvit", "r3d", "mc3", "r2plus1d", "s3d", "swin3d"))
TOKENS = Asked(12, 8, ("convnext", "vit", "swin", "maxvit"))
SMOOTH = Asked(20, 15, ("mobilenet_v3", "efficientnet", "regnet_y"))
WITH_NORM = Asked(37, 15, ("_bn", "mobilenet_v2", "mnasnet", "shufflenet", "regnet_x", "densenet"))
OTHERS_WITH_NORM = Asked(37, 15, ("resne", "googlenet", "inception"))
WITHOUT = Asked(19, 15, ("alexnet", "vgg", "squeezenet"))
KINDS = (PYTHON, DENSE, VIDEO, TOKENS, SMOOTH, WITH_NORM, OTHERS_WITH_NORM, WITHOUT)
LEAST_COSINE, MOST_ERROR, MOST_ERROR_64 = 0.999, 1e-4, 1e-9

QUICK = (
    "resnet18 alexnet densenet121 mobilenet_v2 mobilenet_v3_small efficientnet_b0 regnet_y_400mf "
    "shufflenet_v2_x0_5 squeezenet1_1 convnext_tiny vit_b_32 swin_t swin_v2_t "
    "lraspp_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn r3d_18 raft_small"
).split()


def asked_of(name: str) -> Asked:
    return next(kind for kind in KINDS if any(part in name for part in kind.names))


def build(name: str) -> nn.Module:
    """A torchvision model with random weights and its own number of classes."""
    parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in parameters:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return torchvision.models.get_model(name, **options)


def own_size(name: str, network: nn.Module) -> int:
    """The image size that the network's published weights were made for."""
    size = getattr(network, "image_size", None)
    if isinstance(size, int):
        return size
    weights = torchvision.models.get_model_weights(name).DEFAULT
    crop = getattr(weights.transforms(), "crop_size", None)
    return int(crop[0]) if crop else 320


def batch_for(name: str, size: int, count: int) -> tuple[Any, ...]:
    """What the network's forward takes in training."""
    kind = asked_of(name)
    if kind is VIDEO:
        side = size if size % 16 == 0 and name != "s3d" else 224
        return (torch.randn(1, 3, 16, side, side),)
    if name.startswith("raft"):
        return torch.randn(count, 3, 128, 128), torch.randn(count, 3, 128, 128)
    if kind in (DENSE, PYTHON) and not name.startswith(("deeplab", "fcn", "lraspp")):
        return [torch.rand(3, size, size) for _ in range(count)], _targets(size, count)
    return (torch.randn(count, 3, size, size),)


def _targets(size: int, count: int) -> list[dict[str, Tensor]]:
    edge = size * 2 / 3
    box, labels = torch.tensor([[size / 16, size / 16, edge, edge]]), torch.tensor([1])
    masks = torch.ones(1, size, size, dtype=torch.uint8)
    keypoints = torch.rand(1, 17, 3) * size / 2
    return [
        {"boxes": box, "labels": labels, "masks": masks, "keypoints": keypoints}
        for _ in range(count)
    ]


def score(outputs: Any) -> Tensor:
    """A scalar that weighs every output differently; losses are summed."""
    generator = torch.Generator().manual_seed(5)
    leaves = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    total = sum((t * torch.randn(t.shape, generator=generator)).mean() for t in leaves if t.dim())
    return total + sum(t for t in leaves if not t.dim())


def with_domain(network: nn.Module, *, exact: bool) -> DA3Model:
    """Converted, with a domain of random parameters and gates that are partly closed."""
    model = convert(
        network, DA3Config(gate=GateConfig(target=0.5, by="cell"), memory=MemoryConfig(exact=exact))
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.add_domain("measured", None if model.plan.head is None else CLASSES)
        with torch.no_grad():
            for parameter in model.domain("measured").adapters.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    model.set_domain("measured")
    return model.train()


def saved_bytes(network: nn.Module, inputs: tuple[Any, ...]) -> int:
    with SavedActivations(network, inputs=inputs) as saved:
        outputs = network(*inputs)
    del outputs  # the graph lived until here
    return saved.bytes


def gradients(model: DA3Model, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


@dataclass
class Row:
    """What was measured of one model."""

    name: str
    hosts: int
    islands: int
    share: float
    tuned: int
    default: int
    exact: int
    error: float
    error_64: float | None
    cosine: float
    seconds: float

    def failures(self) -> list[str]:
        asked = asked_of(self.name)
        checks = {
            f"default {asked.default}x": self.tuned / self.default >= asked.default,
            f"exact {asked.exact}x": self.tuned / self.exact >= asked.exact,
            f"cosine {LEAST_COSINE}": self.cosine >= LEAST_COSINE,
            f"error {MOST_ERROR:.0e}": self.error <= MOST_ERROR or self.error_64 is not None,
            f"error in float64 {MOST_ERROR_64:.0e}": (self.error_64 or 0.0) <= MOST_ERROR_64,
        }
        return [what for what, good in checks.items() if not good]

    def __str__(self) -> str:
        mib = 2.0**20
        verdict = ", ".join(self.failures()) or "pass"
        if self.error_64 is not None:
            verdict += f" (float64: {self.error_64:.0e})"
        return (
            f"{self.name:38}{self.hosts:6}{self.islands:8}{self.share:9.2%}{self.tuned / mib:11.1f}"
            f"{self.default / mib:9.2f}{self.tuned / self.default:8.1f}x"
            f"{self.exact / mib:9.2f}{self.tuned / self.exact:8.1f}x{self.error:10.1e}"
            f"{self.cosine:10.5f}{self.seconds:8.1f}  {verdict}"
        )


HEADER = (
    f"{'':38}{'hosts':>6}{'islands':>8}{'domain':>9}{'tuned MiB':>11}{'default':>9}{'ratio':>9}"
    f"{'exact':>9}{'ratio':>9}{'error':>10}{'cosine':>10}{'s':>8}  asked"
)


def measure(name: str, size: int | None, count: int) -> Row:
    """Measures one model; `seconds` are those of its conversion."""
    torch.manual_seed(0)
    network = build(name).train()
    size = own_size(name, network) if size is None else size
    total = sum(p.numel() for p in network.parameters())
    if total > GIANT or size > 400:
        count = min(count, 1 if total > TITAN else 2)
    inputs = batch_for(name, size, count)
    tuned = saved_bytes(network, inputs)
    network.requires_grad_(False)

    start = time.perf_counter()
    model = with_domain(network, exact=True)
    seconds = time.perf_counter() - start
    exact = saved_bytes(model, inputs)
    want, error = _against_plain(network, model, inputs)
    least = 1e-6 * max(float(g.norm()) for g in want.values())
    del model
    gc.collect()
    error_64 = None
    if error > MOST_ERROR:
        error_64 = _in_float64(network, inputs)

    model = with_domain(network, exact=False)
    default = saved_bytes(model, inputs)
    model.gate_loss_scale = 1.0  # as in `_against_plain`
    torch.manual_seed(2)
    got = gradients(model, score(model(*inputs)))
    cosine = min(
        float(nn.functional.cosine_similarity(got[k].flatten(), g.flatten(), dim=0))
        for k, g in want.items()
        if g.norm() > least
    )
    share = sum(p.numel() for p in model.domain("measured").adapters.parameters()) / total
    hosts, islands = len(model.plan.hosts), len(model.plan.parts) if model.plan.python else 0
    return Row(name, hosts, islands, share, tuned, default, exact, error, error_64, cosine, seconds)


def _against_plain(
    network: nn.Module, model: DA3Model, inputs: tuple[Any, ...]
) -> tuple[dict[str, Tensor], float]:
    """Plain autograd's gradients, and the greatest relative error of the model's."""
    torch.manual_seed(2)  # detectors draw samples
    model.gate_loss_scale = 1.0  # as `plain.loss` is added
    got = gradients(model, score(model(*inputs)))
    torch.manual_seed(2)
    plain = PlainPyTorch(network, model, folded=True)
    outputs = plain(*inputs)
    want = gradients(model, score(outputs) + plain.loss())
    # of tensors whose gradient is not zero but for rounding
    least = 1e-6 * max(float(g.norm()) for g in want.values())
    errors = [float((got[k] - g).norm()) / max(float(g.norm()), least) for k, g in want.items()]
    return want, max(errors)


def _in_float64(network: nn.Module, inputs: tuple[Any, ...]) -> float:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        network.double()
        wide = tree_map_with_path(_widened, inputs)
        with mock.patch.object(Tensor, "float", Tensor.double):  # RAFT asks for float32
            return _against_plain(network, with_domain(network, exact=True), wide)[1]
    finally:
        network.float()
        torch.set_default_dtype(before)


def _widened(path: tuple[Any, ...], leaf: Any) -> Any:
    """In float64; keypoints, which networks want in float32, stay."""
    stays = any(getattr(entry, "key", None) == "keypoints" for entry in path)
    wide = isinstance(leaf, Tensor) and leaf.is_floating_point() and not stays
    return leaf.double() if wide else leaf


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every model asked for; the exit code tells whether all figures are reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", help="names; by default all float models")
    parser.add_argument("--quick", action="store_true", help="one of every family")
    parser.add_argument("--image-size", type=int, help="by default the model's own")
    parser.add_argument("--batch-size", type=int, default=4)
    given = parser.parse_args(arguments)
    every = [n for n in torchvision.models.list_models() if not n.startswith("quantized")]
    names = given.models or (QUICK if given.quick else every)
    warnings.filterwarnings("ignore", message="The default weight initialization of")
    print(HEADER, flush=True)
    failed = []
    for name in names:
        row = measure(name, given.image_size, given.batch_size)
        print(row, flush=True)
        failed += [name] if row.failures() else []
        gc.collect()
    print(f"\n{len(names) - len(failed)} of {len(names)} models reach every figure", end="")
    print(f"; not {', '.join(failed)}" if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
