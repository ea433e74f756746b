"""Domains as files for runtimes without Python."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_da3.errors import ConfigError, ConversionError
from lightning_da3.exporting.inference import Format, Place, export_inference
from lightning_da3.exporting.steps import Loss
from lightning_da3.exporting.training import export_training
from lightning_da3.files.domain_file import write_domain
from lightning_da3.model.batches import check_input, laid_out
from lightning_da3.model.domain import Domain
from lightning_da3.model.identity import identity
from lightning_da3.model.running import Running
from lightning_da3.model.state import OUTSIDE
from lightning_da3.nn.call import Executed, Noise


class Exports(Running):
    """A backbone with domains that are exported. Everything is an attribute of `DA3Model`."""

    def export(
        self,
        domain: str | None,
        path: str | os.PathLike[str],
        example_inputs: Any,
        *,
        format: Format = "onnx",  # noqa: A002 - as in `torch.export` and others
        domains: Place = "inside",
        dynamic_batch: bool = True,
    ) -> Path:
        """Write the inference of a domain as one file, for runtimes that need no Python.

        The file has standard operations only, and says in its metadata, and in ``<path>.json``
        beside it, what goes in and comes out. Before it takes its place its outputs are compared
        with the model's. Closed gates of cells save no time in it; branches that the domain skips
        are not in it.

        Args:
            domain: One of `domains`, active or not; None: the backbone alone.
            path: The file; its folder must exist.
            example_inputs: A tensor, or a tuple of the tensors that the network takes.
            format: "onnx", which needs the extra `export`; "pt2", of `torch.export`; "executorch",
                which needs the extra `executorch`; or "executorch-xnnpack", with convolutions and
                linear layers computed by XNNPACK.
            domains: "inside": the domain's tensors are constants of the file. "inputs": they are
                inputs, by their names in the domain's own file; so one file serves all domains
                with as many classes that skip nothing.
            dynamic_batch: The first axis of every input may be of any size; not in ExecuTorch.

        Returns:
            The path.

        Raises:
            DomainError: There is no such domain.
            ConfigError: `format` or `domains` is none of these, or `domains` needs a domain, or
                one that skips no branches.
            InputError: The examples do not fit the network.
            ConversionError: The network has parts that stay Python or that the format lacks, or
                the file would compute something else.
            CheckpointError: The file cannot be written; one that was there stays.
            DA3Error: The extra is missing.
        """
        none: dict[str, Any] = {"domain": None, **identity(self)}
        about = none if domain is None else self._about(domain, {})
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        check_input(args, self.plan)
        self.refresh()
        own = None if domain is None else self.domain(domain)
        if domains == "inputs" and own is not None and own.skipped:
            raise ConfigError(
                f"domains='inputs' is for domains that compute the whole network, but {domain!r} "
                f"skips {list(own.skipped)}: the file would be right for no other domain. Say "
                "domains='inside'."
            )
        acting = None if own is None else own.acting
        parameters = {} if acting is None else dict(acting.named_parameters())
        with self._held_still(own) as network:
            return export_inference(
                *(self, network, domain, acting, parameters, about, path, example_inputs),
                format=format,
                domains=domains,
                dynamic_batch=dynamic_batch,
            )

    def export_training(
        self,
        domain: str,
        path: str | os.PathLike[str],
        example_inputs: Any,
        *,
        loss: str | Loss = "cross_entropy",
        optimizer: str = "sgd",
        format: Format = "onnx",  # noqa: A002 - as in `torch.export` and others
        dynamic_batch: bool = True,
        accumulate: bool = False,
        example_targets: Tensor | None = None,
    ) -> Path:
        """Write one training step of a domain as a file, for runtimes that need no Python.

        To a runtime it is a network as any other: what the network takes, targets, the learning
        rate and the domain's tensors go in, the loss and the new tensors come out. See
        docs/export.md for all names. Before it takes its place its results are compared with the
        model's, for a batch of one, too. ``<path>.safetensors`` beside it is the domain as it is
        now, which learning begins with. `lightning_da3.device.Learner` learns with these files.

        Args:
            domain: One of `domains`, active or not.
            path: The file; its folder must exist.
            example_inputs: A tensor, or a tuple of the tensors that the network takes.
            loss: "cross_entropy", of scores (N, classes, *in) and classes (N, *in); or a callable
                that takes the network's one output and the targets and gives a number.
            optimizer: "sgd", without momentum; or "adam", as `torch.optim.Adam` by default.
            format: "onnx", which needs the extra `export`; "pt2", of `torch.export`; "executorch",
                which needs the extra `executorch`; or "executorch-xnnpack", with convolutions and
                linear layers computed by XNNPACK.
            dynamic_batch: The first axis of inputs and targets may be of any size; not in
                ExecuTorch.
            accumulate: Gradients go in and come out as well, so that those of several calls add
                up to one step on a batch, which is taken in parts, even of one sample.
            example_targets: Targets, if they are no classes.

        Returns:
            The path.

        Raises:
            DomainError: There is no such domain.
            ConfigError: `loss`, `optimizer`, `format` or `accumulate` is none of these.
            InputError: The examples do not fit the network.
            ConversionError: The network has parts that stay Python or that the format lacks, gives
                several tensors, or its domain learns outside of it; or the loss cannot be traced;
                or the file would compute something else.
            CheckpointError: The file cannot be written; one that was there stays.
            DA3Error: The extra is missing.
        """
        about = self._about(domain, {})
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        check_input(args, self.plan)
        self.refresh()
        own = self.domain(domain)
        named = dict(own.named_parameters())
        outside = [n for n in named if n.startswith(OUTSIDE)]
        if outside:
            raise ConversionError(
                f"{domain!r} also learns outside of the network ({', '.join(outside[:4])}), which "
                "the training step of the network does not hold. Export a model that was made by "
                "`convert` of the whole module."
            )
        acting = own.acting
        trained = dict(acting.named_parameters())
        with self._held_still(own) as network:
            return export_training(
                *(self, network, domain, acting, trained, about, path, example_inputs),
                loss=loss,
                optimizer=optimizer,
                format=format,
                dynamic_batch=dynamic_batch,
                accumulate=accumulate,
                example_targets=example_targets,
                start=partial(write_domain, tensors=self._tensors(domain), metadata=about),
            )

    @contextmanager
    def _held_still(self, domain: Domain | None) -> Iterator[nn.Module]:
        """The rewritten network that a domain computes with, which may get other tensors inside."""
        network, _ = self._computing_for(self._slots.call(domain))
        self._follows = False
        try:
            yield network
        finally:
            self._follows = True

    def run_domain(self, name: str | None, *args: Any) -> Any:
        """The output for a domain, whichever is active, without noise or loss.

        Args:
            name: One of `domains`; None: the backbone alone.
            args: As `forward` takes them.
        """
        return self.run_noisy(name, None, *args)[0]

    def run_noisy(
        self, name: str | None, noise: Noise | None, *args: Any
    ) -> tuple[Any, list[tuple[str, Executed]]]:
        """The output for a domain, and how much of every host was executed, with its name.

        Args:
            name: One of `domains`; None: the backbone alone.
            noise: On its gates, or None.
            args: As `forward` takes them.
        """
        call = self._slots.call(None if name is None else self.domain(name))
        output, ledger = self._run(call if noise is None else call.with_noise(noise), *args)
        return laid_out(output, (args, {})), ledger
