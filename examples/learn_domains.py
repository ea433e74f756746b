"""One pretrained network learns digits, textures and faces, one after the other, in little memory.

An EfficientNet-Lite0 with ImageNet weights learns three domains of real images, each with one
Lightning Trainer and one DA3Callback, which logs curves, pictures and tables by itself. A linear
probe and full fine-tuning learn the same data for as many epochs. With --gates, half of the hosts'
FLOPs are to be left out, and pictures show where. The table at the end and all that is in the
output folder are of this run. A run that was stopped goes on where it was when the command is given
again. The images are small: a demonstration, not a benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from comparison.backbones import Backbone, lite0
from comparison.input_errors import InputError
from comparison.methods.plain import fine_tuning, linear_probe
from datasets import DOMAINS, IMAGE_SIZE, DomainData, load_domain
from learning import BATCH_SIZE, Classifier, fit, loggers_for, scores_of, silence_lightning
from lightning.pytorch.loggers import Logger, WandbLogger
from measure import Cost, Step, costs, with_domain
from results import DA3, METHODS, PROBE, TUNED, Run, headline, report
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_da3 import DA3Callback, DA3Config, DA3Model, GateConfig, convert
from lightning_da3.metrics import AccuracyMatrix
from lightning_da3.plotting.accuracies import plot_accuracy_matrix
from lightning_da3.trainer.loggers import log_figure, log_summary

LEARNING_RATES = {PROBE: 1e-2, TUNED: 1e-3, DA3: 1e-3}  # the middle of compare.py's grids
ALONE = {PROBE: linear_probe, TUNED: fine_tuning}
START = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:4.0f} s] {text}", flush=True)


def config_of(settings: dict[str, Any]) -> DA3Config:
    return DA3Config(gate=GateConfig(target=0.5, by="cell") if settings["gates"] else None)


# --- learning -------------------------------------------------------------------------------------


def learn_domains(run: Run, backbone: Backbone, data: dict[str, DomainData]) -> None:
    """One LightningModule and one network through all domains, a Trainer and a callback each."""
    module, config = Classifier(backbone.make(), LEARNING_RATES[DA3]), config_of(run.settings)
    matrix = AccuracyMatrix(DOMAINS)
    kept: dict[str, Tensor] = {}
    for number, domain in enumerate(DOMAINS, 1):
        if run.finished(DA3, domain):
            say(f"DA3 learned {domain} before: loaded from its file")
            if not isinstance(module.network, DA3Model):
                module.network = convert(module.network, config)
            module.network.load_domain(run.path(domain))
        else:
            say(f"DA3 learns {domain} ({number} of {len(DOMAINS)})")
            L.seed_everything(run.settings["seed"], verbose=False)
            classes, folder = len(data[domain].classes), str(run.folder / "domains")
            callback = DA3Callback(domain, classes, config, save_dir=folder)
            _fit(run, module, domain, DA3, data[domain], callback)
        for earlier in DOMAINS[:number]:
            module.network.set_domain(earlier)
            scores = scores_of(module, data[earlier].test.tensors[0])
            matrix.update(domain, earlier, scores, data[earlier].test.tensors[1])
            if earlier in kept:  # learned before this domain was
                change = float((scores - kept[earlier]).abs().max())
                run.change[earlier] = max(change, run.change.get(earlier, 0.0))
        kept[domain] = scores
        run.executed[domain] = _executed_share(module, data[domain].test.tensors[0])
        run.file_bytes[domain] = run.path(domain).stat().st_size
        _finish(run, DA3, domain, scores, data[domain])
    for logger in run.loggers:
        log_figure(logger, "accuracy_matrix", plot_accuracy_matrix(matrix.compute(), DOMAINS))


def learn_alone(run: Run, backbone: Backbone, method: str, domain: str, data: DomainData) -> None:
    """A fresh copy of the network for one domain."""
    if run.finished(method, domain):
        return
    say(f"{method} learns {domain}")
    L.seed_everything(run.settings["seed"], verbose=False)
    network = ALONE[method](backbone.with_head(len(data.classes)))
    module = Classifier(network, LEARNING_RATES[method])
    _fit(run, module, domain, method, data)
    _finish(run, method, domain, scores_of(module, data.test.tensors[0]), data)


def _fit(run: Run, module: Classifier, domain: str, method: str, data: DomainData, *callbacks: Any):
    loggers = loggers_for(run.folder, domain, method, run.tracker)
    fit(module, data, run.settings["epochs"], run.settings["most_batches"], loggers, callbacks)


def _finish(run: Run, method: str, domain: str, scores: Tensor, data: DomainData) -> None:
    right = (scores.argmax(1) == data.test.tensors[1]).float().mean()
    run.accuracy[method][domain] = float(right)
    run.save()
    say(f"{method} on {domain}: {right:.1%} of {len(scores)} test images")


def _executed_share(module: Classifier, images: Tensor) -> float:
    scores_of(module, images[:256])
    return float(module.network.executed_flops_fraction)


# --- measuring ------------------------------------------------------------------------------------


def measure(
    backbone: Backbone, images: Tensor, labels: Tensor, rounds: int, config: DA3Config
) -> dict[str, Cost]:
    """What one step of every method costs, as it was trained."""
    images, steps = images.contiguous(memory_format=torch.channels_last), {}
    networks = {**ALONE, DA3: partial(with_domain, config=config)}
    for method in METHODS:
        network = networks[method](backbone.with_head(10)).to(memory_format=torch.channels_last)
        steps[method] = Step(network, images, labels, torch.optim.AdamW)
    return costs(steps, rounds)


# --- the command ----------------------------------------------------------------------------------


def some_of(data: DomainData) -> DomainData:
    """With fewer test images."""
    return dataclasses.replace(data, test=TensorDataset(*data.test[:: len(data.test) // 50]))


def demonstrate(
    run: Run, backbone: Backbone, *, with_costs: bool, rounds: int
) -> dict[str, Cost] | None:
    data = {domain: load_domain(domain, seed=run.settings["seed"]) for domain in DOMAINS}
    if run.settings["most_batches"]:
        data = {domain: some_of(whole) for domain, whole in data.items()}
    learn_domains(run, backbone, data)
    for domain in DOMAINS:
        for method in (PROBE, TUNED):
            learn_alone(run, backbone, method, domain, data[domain])
    cost = None
    if with_costs:
        say("memory and time of a step, in turns")
        images, labels = (part[:BATCH_SIZE].clone() for part in data["digits"].train.tensors)
        cost = measure(backbone, images, labels, rounds, config_of(run.settings))
    for logger in run.loggers:
        log_summary(logger, headline(run, cost))
    return cost


def track(arguments: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> Logger | None:
    if arguments.logger == "csv":
        return None
    name = f"learn_domains seed {settings['seed']}"
    tracker = WandbLogger(project="lightning-da3", name=name, save_dir=folder)
    tracker.log_hyperparams({**settings, "da3": config_of(settings).to_dict()})
    return tracker


def run_all(arguments: argparse.Namespace, runs: list[Run]) -> dict[str, Cost]:
    """Every seed; memory and time are measured with the first."""
    backbone = lite0(IMAGE_SIZE)
    paid: dict[str, Cost] = {}
    for seed in range(arguments.seeds):
        folder = arguments.output / f"seed{seed}" if arguments.seeds > 1 else arguments.output
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "seed": seed,
            "epochs": 1 if arguments.smoke else arguments.epochs,
            "most_batches": 4 if arguments.smoke else None,
            "gates": arguments.gates,
        }
        run = Run(folder, settings, track(arguments, folder, settings))
        run.resume(fresh=arguments.fresh)
        runs.append(run)
        rounds = 2 if arguments.smoke else 15
        cost = demonstrate(run, backbone, with_costs=seed == 0, rounds=rounds)
        paid = cost or paid
        if isinstance(run.tracker, WandbLogger):
            run.tracker.experiment.finish()
    return paid


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8, help="for every method and domain")
    parser.add_argument("--seeds", type=int, default=1, help="repeat and print means")
    parser.add_argument("--gates", action="store_true", help="DA3 with gates of cells")
    parser.add_argument("--logger", choices=("csv", "wandb"), default="csv")
    parser.add_argument("--output", type=Path, default=Path("outputs/learn_domains"))
    parser.add_argument("--fresh", action="store_true", help="learn again what is finished")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    arguments = parser.parse_args()
    silence_lightning()
    runs: list[Run] = []
    try:
        paid = run_all(arguments, runs)
    except InputError as error:
        raise SystemExit(f"learn_domains.py: {error}") from None
    except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns the first into the second
        if isinstance(stop, SystemExit) and isinstance(stop.code, str):
            raise  # a message of ours
        finished = [f"{m} on {d}" for run in runs for m in run.accuracy for d in run.accuracy[m]]
        print(f"\nInterrupted. Finished and kept in {arguments.output}: {finished or 'nothing'}.")
        raise SystemExit("The same command goes on from there.") from None
    report(runs, paid)
    if arguments.smoke:
        say("--smoke trains a few steps only: its accuracies mean nothing")
    say(f"pictures, logs and domains are in {arguments.output}")


if __name__ == "__main__":
    main()
