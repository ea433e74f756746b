"""DA3 beside other ways to teach a pretrained network new domains, all in one run.

An EfficientNet-Lite0 with ImageNet weights learns digits, textures and faces, or the domains of a
folder, by every method: the same Trainer, images, seeds and epochs. Each method has the learning
rate that is best for it on a part of the training images; test images choose nothing. Printed and
saved are accuracy, forgetting, stored parameters, memory, time and FLOPs.

Whatever is finished is kept: a run that was stopped goes on where it was when the same command is
given again. `--smoke` takes about a minute on one core, the default many times that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.backbones import LITE0, Backbone, load_backbone
from comparison.images import Domain, folders, packaged
from comparison.input_errors import InputError, check_installed
from comparison.methods import BIASES, DA3, GATED, METHODS, PROBE, TUNED
from comparison.protocol import Comparison
from comparison.protocols import PROTOCOLS, load_protocol
from comparison.records import Records
from comparison.report import log_to_wandb, write_report
from comparison.tables import as_text, processor_of, rates_text, rows_of
from comparison.training import Schedule
from learning import silence_lightning

from lightning_da3 import DA3Error

START = time.perf_counter()
QUICK = [TUNED, "checkpointing", PROBE, BIASES, "parallel adapters", "TinyTL", DA3, GATED]
SMOKE = [TUNED, PROBE, DA3]
PACKAGED_IMAGES = 160  # of each packaged domain, to train and to test with, by default


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", flush=True)


# --- what is compared -----------------------------------------------------------------------------


def load_domains(given: argparse.Namespace, backbone: Backbone) -> list[Domain]:
    """Those of a protocol, of a folder, or those that come with packages."""
    if given.protocol is not None:
        if given.data is None:
            raise InputError(f"--protocol {given.protocol} needs --data FOLDER with its images.")
        found = load_protocol(given.protocol, given.data, backbone, given.domains)
    elif given.data is not None:
        found = folders(given.data, backbone, given.image_size, given.domains)
    else:
        found = packaged(backbone, given.image_size, given.domains)
    return [d.limited(given.train_images, given.test_images) for d in found]


def settings_of(given: argparse.Namespace) -> dict[str, Any]:
    """What results depend on; methods, domains and seeds may be added later."""
    return {
        "network": given.network,
        "weights": None if given.weights is None else str(given.weights.resolve()),
        "data": None if given.data is None else str(given.data.resolve()),
        "protocol": given.protocol,
        "image_size": given.image_size,
        "epochs": given.epochs,
        "batch_size": given.batch_size,
        "train_images": given.train_images,
        "test_images": given.test_images,
        "rates": given.rates,
    }


def compare(given: argparse.Namespace) -> None:
    """Loads, learns what is not finished, and reports."""
    check_installed(filter(None, (METHODS[method].package for method in given.methods)), "compare")
    check_installed(["wandb"] if given.wandb else [], "wandb")
    check_installed(["matplotlib"], "plot")
    records = Records(given.output / "finished.jsonl", settings_of(given), fresh=given.fresh)
    backbone = load_backbone(given.network, given.weights, given.image_size)
    domains = load_domains(given, backbone)
    for domain in domains:
        sizes = f"{len(domain.train_labels)} images to train, {len(domain.test_labels)} to test"
        say(f"{domain.name}: {len(domain.classes)} classes, {sizes}")
    for method in given.methods:
        source = METHODS[method].learns_as
        rates = ", ".join(f"{rate:g}" for rate in METHODS[method].grid(given.rates))
        say(f"{method}: learning rates " + (f"of {source}" if source else rates))
    Comparison(
        backbone=backbone,
        source=(given.network, given.weights, given.image_size),
        domains=domains,
        methods=given.methods,
        seeds=given.seeds,
        schedule=Schedule(given.epochs, given.batch_size),
        rounds=given.rounds,
        most_rates=given.rates,
        records=records,
        folder=given.output,
        say=say,
    ).run()
    report(given, records, [domain.name for domain in domains])


def report(given: argparse.Namespace, records: Records, domains: Sequence[str]) -> None:
    """Prints and writes everything that is finished."""
    rows = rows_of(records, given.methods, domains)
    size = f"{given.image_size}x{given.image_size}"
    about = (
        f"{given.network}, {size}, {given.epochs} epochs, batches of {given.batch_size}, "
        f"{given.seeds} seed(s). Times: {processor_of(records, given.methods)}."
    )
    print(f"\n{about}\n\n{as_text(rows)}\n\nLearning rates (* at an end of what was tried)")
    print(rates_text(rows))
    title = f"{len(rows)} ways to learn {', '.join(domains)}"
    paths = write_report(given.output, title, about, rows)
    print()
    if given.smoke:
        say("--smoke trains a few steps only: its accuracies mean nothing")
    say(f"written to {given.output}: {', '.join(paths)}")
    if given.wandb:
        log_to_wandb(given.output, title, records.settings, rows, paths)


# --- the command ----------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(METHODS)
    whole = {"type": _positive}
    parser.add_argument(
        "--methods", nargs="+", help=f"'all', or some of: {names}; by default {', '.join(QUICK)}"
    )
    parser.add_argument("--data", type=Path, help="folder of <domain>/{train,test}/<class>/<image>")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), help="of the images in --data")
    parser.add_argument("--domains", nargs="+", default=[], help="some of them")
    parser.add_argument("--network", default=LITE0, help="a name of torchvision or timm")
    parser.add_argument("--weights", type=Path, help="its state dict (.pth, .pt, .safetensors)")
    parser.add_argument("--image-size", **whole, help="default 128, or the protocol's")
    parser.add_argument("--epochs", **whole, help="for every method and domain; default 5")
    parser.add_argument("--batch-size", default=16, **whole)
    parser.add_argument("--seeds", default=1, **whole, help="repeat; prints means and spreads")
    rates = "learning rates tried at most; of more than 3, those behind an end that is best"
    parser.add_argument("--rates", default=3, **whole, help=rates)
    parser.add_argument("--train-images", **whole, help="of each domain, at most")
    parser.add_argument("--test-images", **whole, help="of each domain, at most")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--fresh", action="store_true", help="learn again what is finished")
    parser.add_argument("--wandb", action="store_true", help="log the results to W&B as well")
    parser.add_argument("--smoke", action="store_true", help="a few steps of three methods")
    return _completed(parser.parse_args(arguments))


def _completed(given: argparse.Namespace) -> argparse.Namespace:
    """With the defaults that depend on each other."""
    chosen = given.methods or (SMOKE if given.smoke else QUICK)
    chosen = list(METHODS) if chosen == ["all"] else chosen
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        raise InputError(f"--methods {', '.join(unknown)}: there are {', '.join(METHODS)}.")
    sources = [METHODS[name].learns_as for name in chosen]
    given.methods = [name for name in METHODS if name in chosen or name in sources]
    size = PROTOCOLS[given.protocol].image_size if given.protocol is not None else 128
    if given.protocol is not None and given.image_size not in (None, size):
        raise InputError(f"--image-size: {given.protocol} has {size}; leave it out.")
    most = 24 if given.smoke else None if given.data is not None else PACKAGED_IMAGES
    given.image_size = given.image_size or (32 if given.smoke and not given.protocol else size)
    given.epochs = given.epochs or (1 if given.smoke else 5)
    given.train_images = given.train_images or most
    given.test_images = given.test_images or most
    given.rates = 1 if given.smoke else given.rates
    if given.smoke and given.data is None:
        given.domains = given.domains or ["digits", "faces"]
    given.rounds = 2 if given.smoke else 9
    return given


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an int of at least 1, got {text!r}")
    return int(text)


def main() -> int:
    """0 if all is done; 2 with a sentence if a user can mend what is wrong; 130 if interrupted."""
    silence_lightning()
    output = None
    try:
        given = parse()
        output = given.output
        compare(given)
    except (InputError, DA3Error) as error:
        print(f"compare.py: {error}", flush=True)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns the first into the second
        if output is None:
            raise  # the parser's own
        if isinstance(stop, SystemExit) and stop.code not in (0, 1):
            raise
        print(f"\nInterrupted. What is finished is in {output}; the same command goes on from it.")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
