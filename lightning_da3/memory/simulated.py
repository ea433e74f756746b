"""What a training step will cost, known before it runs.

The step itself runs, forward, backward and optimizer, on fake tensors: shapes, types and layouts
without values, so that it takes seconds at most and next to no memory. Every storage that PyTorch's
operations return counts from its first use to its last. What a kernel allocates and frees inside is
not seen, except for the largest such: `lightning_da3.memory.kernels.scratch_bytes`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_da3.errors import DA3Error, InputError
from lightning_da3.memory.account import StepAccount
from lightning_da3.memory.by_batch import BatchPrediction
from lightning_da3.memory.costs import StepPrediction
from lightning_da3.memory.fake import fake_mode_of, quiet, resized, tensors_of, without_values
from lightning_da3.memory.names import Names, SavedByName
from lightning_da3.memory.saved import SavedActivations
from lightning_da3.torch_private.fake import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    new_fake_mode,
)
from lightning_da3.torch_private.trees import tree_leaves, tree_map_only

Loss = Callable[[Any], Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZER = "optimizer"  # the name that stands for all of it


class StepPredictor:
    """Predicts training steps of one network.

    Holds a copy of the network without values, which takes next to no memory. Later changes of the
    network do not reach the copy.

    Args:
        network: Has something that requires a gradient; left unchanged. Its tensors may be on the
            meta device or fake, and then count as if they were on the CPU.
        loss: Takes the network's output and returns a scalar. By default the cross entropy over
            axis 1 of every tensor that has one and requires a gradient, and the mean of others.
        optimizer: Makes an optimizer of the parameters that train; its state belongs to the resting
            model. By default plain SGD, which has no state.
        prepare: Edits the copy.
        call: What is called of the copy; by default the copy itself.
        name: The name of the network for errors; by default its class.

    Attributes:
        twin: The copy.

    Raises:
        DA3Error: The network cannot be copied.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        loss: Loss | None = None,
        optimizer: MakeOptimizer | None = None,
        prepare: Callable[[Any], None] | None = None,
        call: Callable[[Any], Callable[..., Any]] | None = None,
        name: str = "",
    ) -> None:
        self._loss, self._make_optimizer = loss or default_loss, optimizer
        self._mode = fake_mode_of(network) or new_fake_mode()
        self.twin = without_values(network, self._mode).train()
        if prepare is not None:
            prepare(self.twin)
        self._called: Callable[..., Any] = self.twin if call is None else call(self.twin)
        self._name = name or type(network).__name__
        self._cuts: frozenset[tuple[int, int]] = frozenset()

    def __call__(self, *inputs: Any, **kwargs: Any) -> StepPrediction:
        """Predict a step on these inputs.

        Args:
            inputs: What the network takes. Only shapes, types and strides of tensors matter.
            kwargs: What the network takes by name.

        Raises:
            InputError: The network cannot take them.
            DA3Error: Nothing requires a gradient, or the network asks for values of tensors.
        """
        inputs, kwargs = tree_map_only(Tensor, self._fake, (inputs, kwargs))
        trained = [p for p in self.twin.parameters() if p.requires_grad]
        if not trained:
            raise DA3Error(
                f"Nothing of {self._name} requires a gradient, so there is no training step to "
                "predict. Activate a domain with `set_domain(name)`, or unfreeze parameters."
            )
        make = self._make_optimizer
        with self._mode:
            optimizer = make(trained) if make else torch.optim.SGD(trained, lr=1e-3)
        if make is not None:
            self._step(inputs, kwargs, optimizer)  # makes the optimizer's state
        return self._step(inputs, kwargs, optimizer)

    def kept(self, *inputs: Any, **kwargs: Any) -> int:
        """What a step on these inputs keeps for its backward, in bytes: of a forward pass alone.

        Args:
            inputs: See `__call__`.
            kwargs: See `__call__`.

        Raises:
            InputError: The network cannot take them.
            DA3Error: The network asks for values of tensors.
        """
        return sum(self.kept_by_module(*inputs, **kwargs).values())

    def kept_by_module(self, *inputs: Any, **kwargs: Any) -> dict[str, int]:
        """What `kept` adds up, by the name of the module that keeps it.

        Args:
            inputs: See `__call__`.
            kwargs: See `__call__`.

        Raises:
            InputError: The network cannot take them.
            DA3Error: The network asks for values of tensors.
        """
        inputs, kwargs = tree_map_only(Tensor, self._fake, (inputs, kwargs))
        given = [t for t in tree_leaves((inputs, kwargs)) if isinstance(t, Tensor)]
        with quiet(), self._mode, self._explained(given):
            with SavedActivations(self.twin, inputs=(inputs, kwargs)) as saved:
                output = self._called(*inputs, **kwargs)
            del output
        return saved.by_module

    def by_batch(self, *inputs: Any) -> BatchPrediction:
        """Predict steps for every size of the batch, from a few of them.

        Args:
            inputs: What the network takes; axis 0 of every tensor is the batch, of any size.
        """

        def of_size(count: int) -> tuple[Any, ...]:
            return tree_map_only(Tensor, lambda x: resized(x, count), inputs)  # type: ignore[no-any-return]

        return BatchPrediction(lambda count: self(*of_size(count)), self.cuts)

    def cuts(self) -> Iterable[tuple[int, int]]:
        """The samples of a microbatch and of its batch, where the last step could split one."""
        return self._cuts

    def _fake(self, x: Tensor) -> Tensor:
        device = "cpu" if x.device.type == "meta" else x.device
        with self._mode:
            like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return like.requires_grad_(x.requires_grad)

    def _step(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], optimizer: torch.optim.Optimizer
    ) -> StepPrediction:
        names = Names()
        state = [s for s in tree_leaves(list(optimizer.state.values())) if isinstance(s, Tensor)]
        given = [t for t in tree_leaves((inputs, kwargs)) if isinstance(t, Tensor)]
        account = StepAccount(names, [*tensors_of(self.twin), *state, *given])
        aside = account.used_by(self.twin)
        with quiet(), self._mode, names.of(self.twin), aside, self._explained(given):
            saved = SavedByName(self.twin, (inputs, kwargs), names)
            with account:
                with saved:
                    loss = self._loss(self._called(*inputs, **kwargs))
                account.forward_end = len(account.timeline)
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
                account.backward_end = len(account.timeline)
                with names.inside(OPTIMIZER):
                    optimizer.step()
                    optimizer.zero_grad()
        self._cuts = frozenset(account.cuts)
        return account.prediction(saved)

    @contextlib.contextmanager
    def _explained(self, given: Sequence[Tensor]) -> Iterator[None]:
        try:
            yield
        except DA3Error:
            raise
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise DA3Error(
                f"{self._name} decides by values of its tensors ({error}), which are not known "
                "before a step. Measure it instead: `lightning_da3.memory.measure_step`."
            ) from error
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in given)
            reason = str(error).split("\n")[0]
            raise InputError(
                f"{self._name} cannot make a training step on inputs of shape {shapes}: {reason}"
            ) from error
        finally:
            for parameter in self.twin.parameters():
                parameter.grad = None


def predict_step(
    network: nn.Module,
    *inputs: Any,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None,
) -> StepPrediction:
    """Predict one training step of a network on these inputs; see `StepPredictor`.

    Args:
        network: See `StepPredictor`.
        inputs: What the network takes. Only shapes, types and strides of tensors matter.
        loss: See `StepPredictor`.
        optimizer: See `StepPredictor`.

    Raises:
        InputError: The network cannot take the inputs.
        DA3Error: Nothing requires a gradient, or the network asks for values of tensors.
    """
    return StepPredictor(network, loss=loss, optimizer=optimizer)(*inputs)


class NothingTrainsError(DA3Error):
    """What is to be predicted is no training step: a loss of it would train nothing."""


_NOTHING_TRAINS = "the output does not depend on anything that trains"


def mean_of(output: Any) -> Tensor:
    """The mean of all that trains."""
    trained = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not trained:
        raise NothingTrainsError(_NOTHING_TRAINS)
    return torch.stack([t.mean() for t in trained]).sum()


def default_loss(output: Any) -> Tensor:
    """The cross entropy over axis 1 of all that trains and has one; means of others."""
    trained = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    losses = [
        F.cross_entropy(t, t.new_zeros((len(t), *t.shape[2:]), dtype=torch.long))
        if t.dim() > 1
        else t.mean()
        for t in trained
    ]
    if not losses:
        raise NothingTrainsError(_NOTHING_TRAINS)
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]
