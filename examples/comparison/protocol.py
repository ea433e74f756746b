"""The comparison itself, one finished piece of work after the other.

1. rate: every method learns a part of a domain's training images at every rate of its grid, and
   beyond it while an end of it is best; the rest of them says which rate is best. Test images are
   not seen.
2. learn: it learns all training images at that rate, with every seed, and is tested.
3. forget: what is left of a domain once the others were learned. Methods that train what domains
   share learn all domains in a row on one network, each with a head of its own. Others have each
   domain's state put back, into a network made anew.
4. cost: memory, time and FLOPs of a step, and the time of inference, all methods in turns.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measure import apart, processor
from torch import Tensor, nn

from comparison.backbones import Backbone
from comparison.costs import measure
from comparison.images import Domain
from comparison.input_errors import InputError
from comparison.methods import METHODS
from comparison.methods.plain import head_of
from comparison.rates import Found, best_rate, rates_to_try
from comparison.records import Key, Records, write_whole
from comparison.training import Schedule, evaluate, learn, learn_on, load_, ready
from lightning_da3 import DA3Error

LARGEST_LOSS = 1e9  # also of what is not finite
VALIDATED = 0.25  # share of the training images by which rates are chosen


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where results go.

    Args:
        backbone: The pretrained network.
        source: Its name, weights and image size, to load it in another process.
        domains: All, in the order in which forgetting is measured.
        methods: Names, out of `METHODS`.
        seeds: As many runs of everything but the choice of rates.
        schedule: Of all methods.
        rounds: Timed steps of every method.
        most_rates: Rates to try at most: the middle of each grid, then beyond it.
        records: What is finished.
        folder: Where states lie.
        say: Tells of progress.
    """

    backbone: Backbone
    source: tuple[str, Path | None, int]
    domains: Sequence[Domain]
    methods: Sequence[str]
    seeds: int
    schedule: Schedule
    rounds: int
    most_rates: int
    records: Records
    folder: Path
    say: Callable[[str], None]

    def run(self) -> None:
        """Does all that is not finished, in an order in which nothing waits for later work."""
        began, finished = time.perf_counter(), 0
        while todo := [piece for piece in self._work() if not self._finished(piece[0])]:
            key, work = todo[0]
            what = ", ".join(part for part in key if part)
            self.records.add(key, work())
            finished += 1
            each = (time.perf_counter() - began) / finished
            all_work = [key for key, _ in self._work()]
            left = sum(not self._finished(key) for key in all_work)
            number = f"{len(all_work) - left}/{len(all_work)}"
            self.say(f"{number} {what}: {self._told(key)} (~{each * left:.0f} s left)")
        self._measure()

    def rate(self, method: str, domain: str) -> float:
        """The best by the validation images; of those that are equal, the one with less loss."""
        return best_rate(self._rates(method, domain), self._found(method, domain))

    def _rates(self, method: str, domain: str) -> list[float]:
        grid = METHODS[method].grid(self.most_rates)
        return rates_to_try(grid, self.most_rates, self._found(method, domain))

    def _found(self, method: str, domain: str) -> Found:
        return lambda rate: self.records.get("rate", method, domain, f"{rate:g}")

    def _work(self) -> Iterator[tuple[Key, Callable[[], dict[str, Any]]]]:
        """Every piece of work, as far as what is finished tells it: its key, and what does it."""
        for method in self.methods:
            if METHODS[method].learns_as is not None:
                continue
            for domain in self.domains:
                rates = self._rates(method, domain.name)
                for rate in rates if len(rates) > 1 else ():  # one is taken as it is
                    key = ("rate", method, domain.name, f"{rate:g}")
                    yield key, lambda m=method, d=domain, r=rate: self._try(m, d, r)
                for seed in range(self.seeds):
                    key = ("learn", method, domain.name, str(seed))
                    yield key, lambda m=method, d=domain, s=seed: self._learn(m, d, s)
            if len(self.domains) > 1:
                names = ", ".join(domain.name for domain in self.domains)
                yield ("forget", method, names), lambda m=method: self._forget(m)

    def _finished(self, key: Key) -> bool:
        """Whether it need not be done (again): at the rates that are best by now."""
        if (record := self.records.get(*key)) is None:
            return False
        if key[0] == "learn":
            _, method, domain, _ = key
            chosen = record["rate"] == self.rate(method, domain)
            return chosen and self.state_path(*key[1:]).exists()
        return key[0] != "forget" or record.get("rates") == self._chosen_rates(key[1])

    def _chosen_rates(self, method: str) -> list[float]:
        return [self.rate(method, domain.name) for domain in self.domains]

    def _told(self, key: Key) -> str:
        record = self.records[key]
        if key[0] == "forget":
            return f"{100 * record['forgetting']:.1f} points forgotten"
        return f"{100 * record['accuracy']:.1f} %"

    # --- the stages -------------------------------------------------------------------------------

    def _try(self, method: str, domain: Domain, rate: float) -> dict[str, Any]:
        part = domain.validating(VALIDATED)
        try:
            learned = learn(METHODS[method], self.backbone, part, rate, 0, self.schedule)
        except DA3Error as error:  # of a loss that is not finite, above all
            self.say(f"{method} does not learn {domain.name} at {rate:g}: {error}")
            return {"accuracy": 0.0, "loss": LARGEST_LOSS}
        accuracy, loss = evaluate(learned.network, part.test)
        return {"accuracy": accuracy, "loss": loss if loss < LARGEST_LOSS else LARGEST_LOSS}

    def _learn(self, method: str, domain: Domain, seed: int) -> dict[str, Any]:
        rate = self.rate(method, domain.name)
        learned = learn(METHODS[method], self.backbone, domain, rate, seed, self.schedule)
        accuracy, _ = evaluate(learned.network, domain.test)
        self._write(learned.state, self.state_path(method, domain.name, str(seed)))
        return {
            "accuracy": accuracy,
            "rate": rate,
            "curve": learned.curve,
            "skipped": list(learned.skipped),
            "stored_parameters": sum(value.numel() for value in learned.state.values()),
            "stored_bytes": stored_bytes(learned.state, METHODS[method].stored_as_bits),
            "steps": self.schedule.steps(len(domain.train_labels)),
            "test_images": len(domain.test_labels),
        }

    def _forget(self, method: str) -> dict[str, Any]:
        """Mean loss of accuracy on all domains but the last, with the first seed."""
        after = self._in_a_row(method) if METHODS[method].overwrites else self._put_back(method)
        before = {name: self.records["learn", method, name, "0"]["accuracy"] for name in after}
        lost = {name: before[name] - accuracy for name, accuracy in after.items()}
        mean, rates = sum(lost.values()) / len(lost), self._chosen_rates(method)
        return {"forgetting": mean, "by_domain": lost, "rates": rates}

    def _put_back(self, method: str) -> dict[str, float]:
        after = {}
        for domain in self.domains[:-1]:
            network = METHODS[method].build(self.backbone.with_head(len(domain.classes)))
            network = self._with_state(network, method, domain.name)
            after[domain.name] = evaluate(network, domain.test)[0]
        return after

    def _in_a_row(self, method: str) -> dict[str, float]:
        L.seed_everything(0, verbose=False)  # whatever ran before it in this process
        first, *others = self.domains
        network = METHODS[method].build(self.backbone.with_head(len(first.classes)))
        self._with_state(network, method, first.name)
        name, head = head_of(network)
        heads = {first.name: head}
        for domain in others:
            heads[domain.name] = head_of(self.backbone.with_head(len(domain.classes)))[1]
            network.set_submodule(name, heads[domain.name])
            METHODS[method].build(network)  # modes, and what trains
            rate = self.rate(method, domain.name)
            learn_on(METHODS[method], network, domain, rate, self.schedule)
        after = {}
        for domain in self.domains[:-1]:
            network.set_submodule(name, heads[domain.name])
            after[domain.name] = evaluate(network.eval(), domain.test)[0]
        return after

    def _measure(self) -> None:
        missing = [m for m in self.methods if ("cost", m) not in self.records]
        if not missing:
            return
        self.say(f"memory and time of a step, {len(missing)} methods in turns")
        domain = self.domains[0]
        sources = {m: METHODS[m].learns_as or m for m in missing}
        states = {
            m: (self.state_path(m, domain.name, "0"), self._skipped(source, domain.name))
            for m, source in sources.items()
        }
        sizes = len(domain.classes), self.schedule.batch_size, self.rounds
        for method, paid in apart(measure, self.source, states, *sizes).items():
            self.records.add(("cost", method), {**paid, "processor": processor()})

    def _skipped(self, method: str, domain: str) -> list[str]:
        learned = self.records.get("learn", method, domain, "0") or {}
        return list(learned.get("skipped", ()))

    # --- states -----------------------------------------------------------------------------------

    def state_path(self, method: str, domain: str, seed: str) -> Path:
        return self.folder / "states" / method / domain / f"{seed}.pt"

    def _write(self, state: dict[str, Tensor], path: Path) -> None:
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(path, content.getvalue())

    def _with_state(self, network: nn.Module, method: str, domain: str) -> nn.Module:
        path = self.state_path(method, domain, "0")
        if load_(network, path, self._skipped(method, domain)):
            raise InputError(
                f"{path} is of another network: begin anew with --fresh, or give another --output."
            )
        return ready(network)


def stored_bytes(state: dict[str, Tensor], as_bits: str | None) -> int:
    """Of a domain's state, where names that end with `as_bits` are kept as one bit a value."""
    bits = [v for name, v in state.items() if as_bits is not None and name.endswith(as_bits)]
    whole = sum(v.nbytes for v in state.values()) - sum(v.nbytes for v in bits)
    return whole + (sum(v.numel() for v in bits) + 7) // 8
