"""One pretrained network learns digits, textures and faces, one after the other, in little memory.

A network that knows printed characters learns three domains of real images, each with one Lightning
Trainer and one DA3Callback. A linear probe, full fine-tuning, and DA3 with frozen weights that rest
in bfloat16 learn the same data for as many epochs. The table at the end, and the pictures and CSV
logs in the output folder, are all of this run. A run that was stopped goes on where it was when the
command is given again. The images are small: a demonstration, not a benchmark.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import DOMAINS, TEST_FONTS, DomainData, draw_characters, load_domain
from learning import BATCH_SIZE, Classifier, fit, loggers_for, scores_of, silence_lightning
from lightning.pytorch.loggers import Logger, WandbLogger
from measure import FORMATS, Cost, Step, costs, fastest, with_domain
from network import build_network
from results import DA3, HALVED, METHODS, PROBE, TUNED, Run, headline, report
from torch import Tensor, nn

from lightning_da3 import DA3Callback, DA3Config, DA3Model, MemoryConfig, convert
from lightning_da3.metrics import AccuracyMatrix
from lightning_da3.plotting.accuracies import plot_accuracy_matrix
from lightning_da3.plotting.gates import plot_gate_maps
from lightning_da3.plotting.memory import plot_memory
from lightning_da3.trainer.loggers import (
    log_domain,
    log_figure,
    log_first_steps,
    log_plan_table,
    log_summary,
)

LEARNING_RATES = {PROBE: 3e-2, TUNED: 3e-3, DA3: 1e-2, HALVED: 1e-2}
CONFIGS = {DA3: DA3Config(), HALVED: DA3Config(memory=MemoryConfig(weights="bfloat16"))}
START = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:4.0f} s] {text}", flush=True)


# --- learning -------------------------------------------------------------------------------------


def learn_domains(run: Run, data: dict[str, DomainData]) -> DA3Model:
    """One LightningModule and one network through all domains, a Trainer and a callback each."""
    module = Classifier(build_network(), LEARNING_RATES[DA3])
    matrix = AccuracyMatrix(DOMAINS)
    kept: dict[str, Tensor] = {}
    for number, domain in enumerate(DOMAINS, 1):
        if run.finished(DA3, domain):
            say(f"DA3 learned {domain} before: loaded from its file")
            if not isinstance(module.network, DA3Model):
                module.network = convert(module.network)
            module.network.load_domain(run.path(domain))
        else:
            say(f"DA3 learns {domain} ({number} of {len(DOMAINS)})")
            L.seed_everything(run.settings["seed"], verbose=False)
            callback = DA3Callback(
                domain, num_classes=len(data[domain].classes), save_dir=str(run.folder / "domains")
            )
            _fit(run, module, domain, DA3, data[domain], callback)
            for logger in run.loggers:
                log_first_steps(logger, callback.first_steps, f"step_{domain}")
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
            log_domain(logger, run.path(domain), domain, {"accuracy": run.accuracy[DA3][domain]})
    for logger in run.loggers:
        log_figure(logger, "accuracy_matrix", plot_accuracy_matrix(matrix.compute(), DOMAINS))
    return module.network


def learn_alone(run: Run, method: str, domain: str, data: DomainData) -> None:
    """A fresh copy of the network for one domain."""
    if run.finished(method, domain):
        return
    say(f"{method} learns {domain}")
    L.seed_everything(run.settings["seed"], verbose=False)
    classes, callbacks = len(data.classes), []
    if method in CONFIGS:
        callbacks = [DA3Callback(domain, classes, CONFIGS[method])]
    module = Classifier(baseline(method, classes), LEARNING_RATES[method])
    _fit(run, module, domain, method, data, *callbacks)
    _finish(run, method, domain, scores_of(module, data.test.tensors[0]), data)


def baseline(method: str, num_classes: int) -> nn.Module:
    network = build_network()
    if method == PROBE:
        network.eval().requires_grad_(False)
    if method not in CONFIGS:
        network.fc = nn.Linear(network.fc.in_features, num_classes)
    return network


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
    share = module.network.executed_flops_fraction
    return 1.0 if share is None else float(share)


# --- measuring and pictures -----------------------------------------------------------------------


def measure(images: Tensor, labels: Tensor, rounds: int) -> dict[str, Cost]:
    """What one step of every method costs, each in its faster memory format."""
    steps = {}
    for layout, memory_format in FORMATS.items():
        for method in METHODS:
            network = baseline(method, 10)
            if method in CONFIGS:
                network = with_domain(network, CONFIGS[method])
            network.to(memory_format=memory_format)
            batch = images.contiguous(memory_format=memory_format)
            steps[f"{method}, {layout}"] = Step(network, batch, labels, torch.optim.AdamW)
    measured = costs(steps, rounds)
    return {method: measured[fastest(measured, f"{method},")] for method in METHODS}


def picture(run: Run, model: DA3Model, data: dict[str, DomainData], cost: dict[str, Cost]) -> None:
    before, after = cost[TUNED].saved_by_module, cost[DA3].saved_by_module
    for logger in run.loggers:
        log_figure(logger, "memory", plot_memory(before, after, head=model.plan.head))
        log_plan_table(logger, model.plan, after)
        for domain in model.domains:
            model.eval().set_domain(domain)
            test = data[domain].test.tensors[0]
            images = test[:: len(test) // 4][:4].clone()
            figure = plot_gate_maps(images, model.gate_maps(images))
            log_figure(logger, f"gates_{domain}", figure)


# --- the command ----------------------------------------------------------------------------------


def demonstrate(run: Run, *, with_costs: bool, rounds: int) -> dict[str, Cost] | None:
    data = {domain: load_domain(domain, seed=run.settings["seed"]) for domain in DOMAINS}
    model = learn_domains(run, data)
    for domain in DOMAINS:
        for method in (PROBE, TUNED, HALVED):
            learn_alone(run, method, domain, data[domain])
    cost = None
    if with_costs:
        say("memory and time of a step, in turns")
        images, labels = (part[:BATCH_SIZE].clone() for part in data["digits"].train.tensors)
        cost = measure(images, labels, rounds)
        picture(run, model, data, cost)
    for logger in run.loggers:
        log_summary(logger, headline(run, cost))
    return cost


def track(arguments: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> Logger | None:
    if arguments.logger == "csv":
        return None
    name = f"learn_domains seed {settings['seed']}"
    tracker = WandbLogger(project="lightning-da3", name=name, save_dir=folder)
    tracker.log_hyperparams({**settings, "da3": DA3Config().to_dict()})
    return tracker


def source_accuracy() -> float:
    images, labels = draw_characters(TEST_FONTS, 500, seed=2**31)
    return float((scores_of(build_network(), images).argmax(1) == labels).float().mean())


def run_all(arguments: argparse.Namespace, runs: list[Run]) -> dict[str, Cost]:
    """Every seed; memory and time are measured with the first."""
    say(f"source: {source_accuracy():.1%} of printed characters in unseen fonts")
    paid: dict[str, Cost] = {}
    for seed in range(arguments.seeds):
        folder = arguments.output / f"seed{seed}" if arguments.seeds > 1 else arguments.output
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "seed": seed,
            "epochs": 1 if arguments.smoke else arguments.epochs,
            "most_batches": 4 if arguments.smoke else None,
        }
        run = Run(folder, settings, track(arguments, folder, settings))
        run.resume(fresh=arguments.fresh)
        runs.append(run)
        rounds = 2 if arguments.smoke else 15
        cost = demonstrate(run, with_costs=seed == 0, rounds=rounds)
        paid = cost or paid
        if isinstance(run.tracker, WandbLogger):
            run.tracker.experiment.finish()
    return paid


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=15, help="for every method and domain")
    parser.add_argument("--seeds", type=int, default=1, help="repeat and print means")
    parser.add_argument("--logger", choices=("csv", "wandb"), default="csv")
    parser.add_argument("--output", type=Path, default=Path("outputs/learn_domains"))
    parser.add_argument("--fresh", action="store_true", help="learn again what is finished")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    arguments = parser.parse_args()
    silence_lightning()
    runs: list[Run] = []
    try:
        paid = run_all(arguments, runs)
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
