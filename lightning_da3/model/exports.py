"""Domains as files for runtimes without Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning_da3.exporting.inference import Format, Place, export_inference
from lightning_da3.model.batches import check_input, laid_out
from lightning_da3.model.identity import identity
from lightning_da3.model.running import Running
from lightning_da3.model.state import OUTSIDE


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
        with the model's. Closed gates save no time in it.

        Args:
            domain: One of `domains`, active or not; None: the backbone alone.
            path: The file; its folder must exist.
            example_inputs: A tensor, or a tuple of the tensors that the network takes.
            format: "onnx", which needs the extra `export`; or "pt2", of `torch.export`.
            domains: "inside": the domain's tensors are constants of the file. "inputs": they are
                inputs, by their names in the domain's own file; so one file serves all domains
                with as many classes.
            dynamic_batch: The first axis of every input may be of any size.

        Returns:
            The path.

        Raises:
            DomainError: There is no such domain.
            ConfigError: `format` or `domains` is none of these, or `domains` needs a domain.
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
        named = {} if own is None else dict(own.named_parameters())
        parameters = {n: p for n, p in named.items() if not n.startswith(OUTSIDE)}
        return export_inference(
            *(self, domain, own, parameters, about, path, example_inputs),
            format=format,
            domains=domains,
            dynamic_batch=dynamic_batch,
        )

    def run_domain(self, name: str | None, *args: Any) -> Any:
        """The output for a domain, whichever is active, without noise or loss.

        Args:
            name: One of `domains`; None: the backbone alone.
            args: As `forward` takes them.
        """
        call = self._slots.call(None if name is None else self.domain(name))
        output, _ = self._run(call, *args)
        return laid_out(output, (args, {}))
