"""Learning on a device."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lightning_da3.device.checkpoint import Checkpoint
from lightning_da3.device.domains import check_same_model, read_domain_for, write_domain_of
from lightning_da3.device.predictor import Predictor, check_count, check_whole_parts
from lightning_da3.device.session import Array, Session, parts_of
from lightning_da3.errors import CheckpointError, DomainError, InputError
from lightning_da3.exporting.manifest import NEW, START
from lightning_da3.formatting import shown
from lightning_da3.schedule import LEAST_CHANCE, NOISE_UNTIL, annealed_target

IGNORED = -100  # a target that cross entropy leaves out


class Learner:
    """Learns a domain with a file that `DA3Model.export_training` wrote in ONNX.

    Gates, their noise and their target go as with a `DA3Callback`. The optimizer is that of the
    file. A file with ``accumulate=True`` takes a batch of any size in parts; the target of the
    gates then holds for every part.

    Args:
        path: The training file.
        domain_file: The domain to begin with, of the same model and with as many classes; None:
            the one that lies beside `path`, as it was when it was exported.
        inference: A file that `DA3Model.export` wrote with ``domains="inputs"``, for `predict`.
        part_size: Samples in a part, if the file accumulates and takes any number.
        seed: Of the noise and of the order of samples; None: another one every time.
        options: An `onnxruntime.SessionOptions`; None: as ONNX Runtime has it by default.

    Attributes:
        steps: How many steps were made.

    Raises:
        CheckpointError: A file is missing, damaged or foreign, or they do not fit each other.
        InputError: `part_size` is no number of samples.
        DA3Error: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        domain_file: str | os.PathLike[str] | None = None,
        inference: str | os.PathLike[str] | None = None,
        *,
        part_size: int = 1,
        seed: int | None = None,
        options: Any = None,
    ) -> None:
        check_count("part_size", part_size)
        self.session = Session(path, "training", options)
        self.part_size = self.session.samples or part_size
        self.random = np.random.default_rng(seed)
        self.steps = 0
        kept = [n.removeprefix(NEW) for n in self.session.outputs if n.startswith(NEW)]
        zeros = ("moment1.", "moment2.", "gradient.")
        self._names = [name for name in kept if not name.startswith(zeros)]
        start = os.fspath(path) + START if domain_file is None else domain_file
        self._start = read_domain_for(self.session, start, self._names)
        ports = self.session.inputs
        self._state: dict[str, Array] = {
            name: self._start.tensors[name].array
            if name in self._names
            else np.zeros([side or 0 for side in ports[name].shape], ports[name].dtype)
            for name in kept
        }
        self._predictor = None if inference is None else Predictor(inference, options=options)
        if self._predictor is not None:
            self._check_predictor(self._predictor)

    def _check_predictor(self, predictor: Predictor) -> None:
        check_same_model(self.session, predictor.session)
        lacking = sorted(set(predictor.parameters) - set(self._names))
        if lacking or not predictor.parameters:
            raise CheckpointError(
                f"{predictor.session.path!r} does not take the domain that "
                f"{self.session.path!r} learns. Export it with domains='inputs'."
            )

    @property
    def domain(self) -> str:
        """The name of the domain that is learned."""
        return str(self._start.metadata["domain"])

    @property
    def tensors(self) -> dict[str, Array]:
        """What was learned so far, by the names in the domain's file."""
        return {name: self._state[name] for name in self._names}

    @property
    def accumulates(self) -> bool:
        """Whether the file takes a batch in parts."""
        return "apply" in self.session.inputs

    def step(
        self, images: Any, targets: Any, learning_rate: float, *, progress: float = 1.0
    ) -> float:
        """Learn from one batch; if anything fails, nothing was learned.

        Args:
            images: An array (N, ...) of floats, or a tuple of arrays, as the network takes them.
            targets: Classes (N, *in); for another loss, what it takes.
            learning_rate: Of this step.
            progress: How far training is, from 0 to 1: gates begin open and reach their target at
                0.5, and their noise ends at 0.8.

        Returns:
            The loss, without that of the gates.

        Raises:
            InputError: The batch does not fit the network, a number is out of range, or the loss is
                not finite.
        """
        given = self._samples(images, targets)
        count = len(given["targets"])
        said = self._said(learning_rate, progress)
        if "noise" in self.session.inputs:
            given["noise"] = self._noise(count, progress)
        size = self.part_size if self.accumulates else count
        state, loss, done = self._state, 0.0, 0
        for part in parts_of(given, size):
            samples = len(part["targets"])
            done += samples
            said |= {"weight": samples / count, "apply": float(done == count)}
            found = self.session.run({**part, **self._numbers(said), **state})
            state = {name: found[NEW + name] for name in state}
            loss += samples / count * float(found["loss"])
        if not math.isfinite(loss):
            raise InputError(
                f"The loss of step {self.steps + 1} is {loss}, and the step was not made. Lower "
                "the learning rate, or look for values in the images that are not finite."
            )
        self._state = state
        self.steps += 1
        return loss

    def fit(
        self,
        images: Any,
        targets: Any,
        *,
        epochs: int,
        batch_size: int = 32,
        learning_rate: float | Callable[[float], float] = 1e-3,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> list[float]:
        """Learn from all samples, several times, in an order of its own each time.

        Args:
            images: As for `step`.
            targets: As for `step`.
            epochs: How many times.
            batch_size: Samples of a step. What is left at the end of an epoch is a smaller batch,
                or waits for another epoch if the file takes this number of samples alone.
            learning_rate: Of every step; or what it is at a progress from 0 to 1.
            checkpoint: A file that is written after every epoch. Where it exists, learning goes on
                from it as if it had not stopped, given the same samples. It is no domain file.

        Returns:
            The mean loss of every epoch.

        Raises:
            InputError: As for `step`.
            CheckpointError: The checkpoint cannot be written, or is of another fit.
        """
        check_count("epochs", epochs)
        check_count("batch_size", batch_size)
        given = self._samples(images, targets, whole=False)
        names, count = self.session.network_inputs, len(given["targets"])
        batches = list(self._cut(count, batch_size))
        if not batches:
            raise InputError(
                f"There are {count} samples, and {self.session.path!r} takes {self.part_size} at "
                "once. Give more, or export it with dynamic_batch=True."
            )
        run = {"domain": self.domain, "epochs": epochs, "batch_size": batch_size, "samples": count}
        losses = [] if checkpoint is None else self._gone_on(checkpoint, run)
        for epoch in range(len(losses), epochs):
            order, total = self.random.permutation(count), 0.0
            for i, (start, end) in enumerate(batches):
                chosen = np.sort(order[start:end])  # in the order in which they lie on a disk
                progress = (epoch + i / len(batches)) / epochs
                rate = learning_rate(progress) if callable(learning_rate) else learning_rate
                batch = tuple(given[name][chosen] for name in names)
                loss = self.step(batch, given["targets"][chosen], rate, progress=progress)
                total += loss * (end - start)
            losses.append(total / batches[-1][1])
            if checkpoint is not None:
                random = self.random.bit_generator.state
                now = Checkpoint(self._state, self.steps, losses, run, random)
                now.write(checkpoint, self._start)
        return losses

    def _gone_on(self, path: str | os.PathLike[str], run: Mapping[str, Any]) -> list[float]:
        """Take a checkpoint over, if there is one; the losses of its epochs."""
        if not os.path.lexists(path):
            return []
        found = Checkpoint.read(path, self.session, self._state, run)
        self._state, self.steps = dict(found.state), found.steps
        self.random.bit_generator.state = dict(found.random)
        return list(found.losses)

    def _cut(self, count: int, size: int) -> Iterator[tuple[int, int]]:
        """Where batches begin and end."""
        least = self.session.samples or 1
        for start in range(0, count, size):
            end = min(start + size, count)
            if (end - start) % least == 0:
                yield start, end

    def predict(self, images: Any, *, batch_size: int = 32) -> Any:
        """The network's outputs with what was learned so far, such as scores (N, classes).

        Args:
            images: As for `step`.
            batch_size: Samples that are computed at once, if the file takes any number.

        Returns:
            An array; a list of them if the network gives several.

        Raises:
            DomainError: There is no inference file.
            InputError: The images do not fit the network.
        """
        if self._predictor is None:
            raise DomainError(
                "A training file does not predict. Give `inference`, a file that "
                "`model.export(..., domains='inputs')` wrote."
            )
        return self._predictor.predict_with(self.tensors, images, batch_size)

    def save(self, path: str | os.PathLike[str], **metadata: Any) -> None:
        """Write the domain to a file that `DA3Model.load_domain` takes, whole or not at all.

        Args:
            path: The file; its folder must exist.
            metadata: Anything JSON holds that should lie with it, such as metrics.

        Raises:
            CheckpointError: It cannot be written, or holds NaN; a file that was there stays.
        """
        write_domain_of(self._start, self.tensors, path, metadata)

    # --- what goes in -----------------------------------------------------------------------------

    def _samples(self, images: Any, targets: Any, *, whole: bool = True) -> dict[str, Array]:
        """Images and targets, checked; `whole`: they are one batch."""
        given = self.session.images(images)
        count, port = len(next(iter(given.values()))), self.session.inputs["targets"]
        given["targets"] = port.for_samples(count).checked(targets, "targets")
        if self.session.manifest["loss"] == "cross_entropy":
            self._check_classes(given["targets"])
        if whole and self.session.samples is not None:
            check_whole_parts(given, self.session)
            if count != self.session.samples and not self.accumulates:
                raise InputError(
                    f"{self.session.path!r} takes batches of {self.session.samples}, got {count}. "
                    "Export it with dynamic_batch=True, or with accumulate=True."
                )
        return given

    def _check_classes(self, targets: Array) -> None:
        classes = self.session.manifest["num_classes"]
        largest = math.inf if classes is None else classes
        ignored = (targets == IGNORED) & (not self.accumulates)  # a mean over others than samples
        wrong = targets[((targets < 0) | (targets >= largest)) & ~ignored]
        if wrong.size:
            raise InputError(
                f"`targets` must be classes from 0 to {largest - 1}, got "
                f"{shown(sorted(set(wrong.tolist())))}."
            )

    def _said(self, learning_rate: float, progress: float) -> dict[str, float]:
        """The numbers that a step is told, whether or not the file takes them."""
        check_number("learning_rate", learning_rate, math.inf)
        check_number("progress", progress, 1.0)
        gate = self.session.manifest["config"]["gate"]
        target = 1.0 if gate is None else annealed_target(gate["target"], progress)
        return {
            "learning_rate": learning_rate,
            "step": self.steps + 1,
            "gate_target": target,
        }

    def _numbers(self, said: Mapping[str, float]) -> dict[str, Array]:
        ports = self.session.inputs
        return {n: np.asarray(value, ports[n].dtype) for n, value in said.items() if n in ports}

    def _noise(self, count: int, progress: float) -> Array:
        """Logistic noise, which samples have of their own; zeros towards the end."""
        port = self.session.inputs["noise"]
        shape = (count, *[side or 0 for side in port.shape[1:]])
        if progress >= NOISE_UNTIL:
            return np.zeros(shape, port.dtype)
        chance = self.random.random(shape).clip(LEAST_CHANCE, 1 - LEAST_CHANCE)
        return np.asarray(np.log(chance / (1 - chance)), port.dtype)


def check_number(name: str, value: Any, most: float) -> None:
    """Refuse what is no finite number from 0 to `most`.

    Raises:
        InputError: It is none.
    """
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    if not is_number or isinstance(value, bool) or not 0 <= value <= most or math.isinf(value):
        upper = "" if math.isinf(most) else f" and at most {most:g}"
        raise InputError(
            f"`{name}` must be a finite number of at least 0{upper}, got {shown(value)}."
        )
