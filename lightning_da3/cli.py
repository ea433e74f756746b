"""What training will cost, before it begins; and whether a conversion computes the same.

``python -m lightning_da3 plan resnet50`` and ``python -m lightning_da3 verify resnet50``.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_da3.config import AdapterConfig, DA3Config, MemoryConfig
from lightning_da3.converting import compared, convert
from lightning_da3.costs.steps import step_costs
from lightning_da3.errors import ConfigError, DA3Error
from lightning_da3.layers import CONVS
from lightning_da3.memory import without_values
from lightning_da3.plotting.memory import plot_step
from lightning_da3.torch_private.fake import (
    READ_ONE_VALUE,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    new_fake_mode,
)
from lightning_da3.torch_private.trees import tree_leaves

LARGE = 2**16  # elements


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What stands behind the program's name; None: those of this process.

    Returns:
        0; or 1, if a conversion computes something else. What is wrong ends the process with the
        exit code 2, and a line on standard error.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other packages, about weights that are not there
            text, code = given.run(given)
            sys.stdout.write(text + "\n")
    except DA3Error as error:
        _refuse(parser, str(error))
    return int(code)


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    parser.exit(2, f"{parser.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-da3", description="Learn domains in little.")
    version = sys.modules["lightning_da3"].__version__
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("network", help="a torchvision or timm name, or module:factory")
    shared.add_argument(
        "--image-size", "--size", type=int, nargs="+", help="of every spatial axis", metavar="N"
    )
    shared.add_argument("--exact", action="store_true", help="MemoryConfig(exact=True)")
    shared.add_argument("--head", default="auto", help="name of the classifier; 'none': keep it")
    shared.add_argument("--weights", choices=("same", "bfloat16"), default="same")
    shared.add_argument("--min-stride", help="AdapterConfig(min_stride=...), a number or auto")
    shared.add_argument("--min-depth", help="AdapterConfig(min_depth=...), a number or auto")
    shared.add_argument("--no-gates", action="store_true", help="hosts always run whole")

    about = "what training a domain will cost"
    plan = commands.add_parser("plan", help=about, description=about, parents=[shared])
    plan.add_argument("--batch-size", type=int, default=1)
    plan.add_argument("--budget", help="of the peak, such as 128MiB, or auto: splits the batch")
    plan.add_argument("--split", choices=("pieces", "accumulate"), help="how to hold the budget")
    plan.add_argument("--num-classes", type=int, help="of a domain; by default the network's own")
    plan.add_argument("--nodes", action="store_true", help="list what every node costs")
    plan.add_argument("--format", choices=("text", "json"), default="text")
    plan.add_argument("--plot", help="picture of the memory over the step, to write")
    plan.set_defaults(run=_plan)

    about = "whether the converted network computes what the network does"
    verify = commands.add_parser("verify", help=about, description=about, parents=[shared])
    verify.set_defaults(run=_verify)
    return parser


def _verify(given: argparse.Namespace) -> tuple[str, int]:
    """Every comparison, and 1 if anything differs. Weights are random, the same each time."""
    torch.manual_seed(0)
    network = _made(_factory(given.network), given.network)
    examples = None if given.image_size is None else _images(network, given.image_size)
    model, found = compared(network, _config(given), examples)
    width = max((len(c.name) for c in found), default=0)
    lines = [model.plan.headline]
    for c in found:
        how = c.note or f"{c.difference:.2g} of at most {c.tolerance:.2g}"
        lines.append(f"{c.name:<{width}}  {'ok' if c.ok else 'differs':<7}  {how}")
    return "\n".join(lines), int(not all(c.ok for c in found))


def _images(network: nn.Module, sides: Sequence[int]) -> Tensor:
    """Two images of a size that a network should be compared on."""
    first = next((m for m in network.modules() if isinstance(m, CONVS)), None)
    axes = 0 if first is None else first.weight.dim() - 2
    if first is None or len(sides) not in (1, axes) or min(sides) < 1:
        raise ConfigError(
            f"`--image-size` must be one positive number or one for each spatial axis of what the "
            f"network's first convolution takes, got {[*sides]}; without convolution, leave it out."
        )
    size = [*sides] * (axes // len(sides))
    return torch.randn(2, first.in_channels, *size, dtype=first.weight.dtype)


def _config(given: argparse.Namespace, **memory: Any) -> DA3Config:
    """The config that options say."""
    options: dict[str, Any] = {}
    chosen = {name: getattr(given, name) for name in ("min_stride", "min_depth")}
    where: dict[str, Any] = {k: _number(text) for k, text in chosen.items() if text is not None}
    if where:
        options["adapter"] = AdapterConfig(**where)
    if given.no_gates:
        options["gate"] = None
    return DA3Config(
        memory=MemoryConfig(exact=given.exact, weights=given.weights, **memory),
        head=None if given.head.lower() == "none" else str(given.head),
        **options,
    )


def _number(text: str) -> int | float | str:
    """The number that a text is, if it is one."""
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[0-9]*\.[0-9]{1,9}", text) else text


def _plan(given: argparse.Namespace) -> tuple[str, int]:
    _check_plot(given.plot)
    network = network_without_values(_factory(given.network), given.network)
    digits = re.fullmatch("[0-9]{1,19}", given.budget or "")
    budget = int(given.budget) if digits else given.budget
    if given.split is not None and budget is None:
        raise ConfigError("`--split` says how a budget is held: give `--budget` as well.")
    model = convert(network, _config(given, budget=budget, split=given.split or "pieces"))
    costs = step_costs(model, given.batch_size, given.image_size, num_classes=given.num_classes)
    if given.plot is not None:
        figure = plot_step(costs.ours, costs.finetune, title=_title(given.network, costs.inputs))
        try:
            figure.savefig(given.plot)
        except (OSError, ValueError) as error:  # ValueError: an ending it has no format for
            raise ConfigError(f"--plot: cannot write {given.plot!r}: {error}") from error
    text = str(costs) if given.nodes else f"{costs.summary}\n`--nodes` lists every node."
    return json.dumps(costs.to_dict(), indent=1) if given.format == "json" else text, 0


def _check_plot(plot: str | None) -> None:
    """Refuse a picture that cannot be written before anything is computed for it."""
    if plot is None:
        return
    if not plot.strip() or Path(plot).is_dir():
        raise ConfigError(f"--plot: {plot!r} is no file. Give the name of one, such as plan.png.")
    folder = Path(plot).resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"--plot: there is no folder {str(folder)!r}.")


def _title(name: str, inputs: Sequence[Sequence[int]]) -> str:
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in inputs)
    return f"Memory over one training step of {name}, {shapes}"


# --- networks -------------------------------------------------------------------------------------


def network_without_values(factory: Callable[[], Any], name: str) -> nn.Module:
    """What `factory` makes, with parameters that have shapes and types but take no memory.

    Args:
        factory: Makes a network.
        name: The network's name, for errors.

    Raises:
        ConfigError: `factory` fails, or makes something else.
    """
    mode = new_fake_mode(allow_non_fake_inputs=True)
    with _Constructing(mode):
        network = _made(factory, name)
    return without_values(network, mode)


def _made(factory: Callable[[], Any], name: str) -> nn.Module:
    try:
        network = factory()
    except DA3Error:
        raise
    except (Exception, SystemExit) as error:  # of the user's: anything can come
        raise ConfigError(f"{name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{name!r} makes a {type(network).__name__}, not a torch.nn.Module.")
    return network


class _Constructing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Large tensors are made without values, and questions about such values answered with zero.

    Small ones are real, as constructors compute with them. Initialisers ask, say, whether any
    number that they drew lies too far out.

    Args:
        mode: The mode of the tensors without values.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is READ_ONE_VALUE and isinstance(args[0], FakeTensor):
            return torch.zeros((), dtype=args[0].dtype).item()
        if not given and _elements(args) >= LARGE:
            with self.mode:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _elements(args: tuple[Any, ...]) -> int:
    """How many elements `torch.empty`, `zeros`, `randn` and their like make of these arguments."""
    size = args[0] if args else ()
    is_size = isinstance(size, (list, tuple)) and all(isinstance(n, int) for n in size)
    return math.prod(size) if is_size else 0


def _factory(name: str) -> Callable[[], Any]:
    """How to make the network of a name.

    Raises:
        ConfigError: There is none; names that are near are told.
    """
    if ":" in name:
        return _imported(name)
    known: dict[str, Callable[[], Any]] = {}
    packages = [("timm", _timm), ("torchvision", _torchvision)]  # the latter's names go first
    installed = [list_ for package, list_ in packages if importlib.util.find_spec(package)]
    for list_ in installed:
        known.update(list_())
    if name in known:
        return known[name]
    base = name.split(".")[0]  # behind a point stands a tag of weights, as in resnet50.a1_in1k
    if base in known:
        return known[base]
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f" Near it: {', '.join(near)}." if near else ""
    lacking = "" if installed else " Neither torchvision nor timm is installed."
    raise ConfigError(
        f"There is no network {name!r} in torchvision or timm.{lacking}{hint} For another network "
        "give `module:factory`."
    )


def _torchvision() -> Iterator[tuple[str, Callable[[], Any]]]:
    import torchvision

    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        options: dict[str, Any] = {"weights": None}
        takes = inspect.signature(builder).parameters
        if "weights_backbone" in takes:
            options["weights_backbone"] = None
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        yield name, partial(builder, **options)


def _timm() -> Iterator[tuple[str, Callable[[], Any]]]:
    import timm

    for name in timm.list_models():
        yield name, partial(timm.create_model, name, pretrained=False)


def _imported(name: str) -> Callable[[], Any]:
    module_name, _, path = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does for its own
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # of the user's module: anything can come
        raise ConfigError(
            f"The module of {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            names = [n for n in dir(found) if not n.startswith("_")]
            near = difflib.get_close_matches(attribute, names, n=4, cutoff=0.5)
            hint = f" Near it: {', '.join(near)}." if near else ""
            raise ConfigError(f"{module_name!r} has no {path!r}.{hint}")
        found = getattr(found, attribute)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise ConfigError(f"{name!r} is a {type(found).__name__}: it cannot make a network.")
    return found  # type: ignore[no-any-return]
