"""The command: what training will cost, whether a conversion computes the same, and exports.

``python -m lightning_da3 plan resnet50``, ``verify resnet50`` and ``export module:factory``.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning_da3.cli.comparing import plan as run_plan
from lightning_da3.cli.comparing import verify as run_verify
from lightning_da3.cli.exporting import export as run_export
from lightning_da3.errors import DA3Error
from lightning_da3.exporting.inference import PLACES
from lightning_da3.exporting.optimizers import OPTIMIZERS
from lightning_da3.exporting.writing import WRITERS


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
    gates = argparse.BooleanOptionalAction  # --no-gates was the way to what is the default now
    shared.add_argument("--gates", action=gates, default=False, help="gates of cells")

    about = "what training a domain will cost"
    plan = commands.add_parser("plan", help=about, description=about, parents=[shared])
    plan.add_argument("--batch-size", type=int, default=1)
    plan.add_argument("--budget", help="of the peak, such as 128MiB, or auto: splits the batch")
    plan.add_argument("--split", choices=("pieces", "accumulate"), help="how to hold the budget")
    plan.add_argument("--num-classes", type=int, help="of a domain; by default the network's own")
    plan.add_argument("--nodes", action="store_true", help="list what every node costs")
    plan.add_argument("--format", choices=("text", "json"), default="text")
    plan.add_argument("--plot", help="picture of the memory over the step, to write")
    plan.set_defaults(run=run_plan)

    about = "whether the converted network computes what the network does"
    verify = commands.add_parser("verify", help=about, description=about, parents=[shared])
    verify.set_defaults(run=run_verify)
    _add_export(commands)
    return parser


def _add_export(commands: Any) -> None:
    about = "a domain's inference, or a step of its training, as a file that needs no Python"
    export = commands.add_parser("export", help=about, description=about)
    export.add_argument("network", help="a torchvision or timm name, or module:factory")
    export.add_argument("--output", "-o", required=True, help="the file to write")
    export.add_argument("--state", help="the backbone's weights: .safetensors, .pt or .pth")
    export.add_argument("--domain", help="the domain's file; without it, the backbone alone")
    export.add_argument("--num-classes", type=int, help="of a fresh domain, to be trained")
    export.add_argument(
        "--image-size", "--size", type=int, nargs="+", help="of every spatial axis", metavar="N"
    )
    export.add_argument("--batch-size", type=int, help="as many samples at once, and no others")
    export.add_argument("--format", choices=tuple(WRITERS), default="onnx")
    export.add_argument("--domains", choices=PLACES, default="inside", help="where tensors are")
    export.add_argument("--training", action="store_true", help="one step of training")
    export.add_argument("--loss", default="cross_entropy", help="or module:function")
    export.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="sgd")
    export.add_argument("--accumulate", action="store_true", help="gradients add up over calls")
    export.set_defaults(run=run_export)
