"""The additive attention adapter with its gate, and the two places where a host meets it.

Shapes: x (N, C, *in) enters the host, f (N, O, *out) leaves it; p (N, C, *grid) the cell means of
x; m hidden channels. For tokens, x (N, *in, C), the cells stand in one row: grid = (own + G,).
Source: Yang, Rakin, Fan, "DA3: Dynamic Additive Attention Adaption for Memory-Efficient On-Device
Multi-Domain Learning", arXiv 2012.01362.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_da3.errors import InputError
from lightning_da3.nn.call import Noise, Place
from lightning_da3.nn.convolution import FrozenConv
from lightning_da3.nn.shared_codes import SharedCodes
from lightning_da3.ops.adapter import KeptInput, adapt, keep
from lightning_da3.ops.adapter_cells import AdapterOptions, Weights
from lightning_da3.ops.codes import Reader, Rows, read_back, sample_group
from lightning_da3.ops.host import Means, coarse_grid, read, write
from lightning_da3.ops.tokens import TokenGrid, read_tokens, write_tokens

CONV_OF = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

OPEN_LOGIT = 2.0  # bias of a fresh gate: open, and steep enough to learn to close


class AdapterOutput(NamedTuple):
    """An adapter's output for one host and one batch.

    Attributes:
        addend: What is added, (N, O, *grid).
        gate: Zeros and ones, (N, 1, *grid), or None without gates.
        kept: What the adapter keeps of the host's input, if every position of it is a cell.
    """

    addend: Tensor
    gate: Tensor | None
    kept: KeptInput | None = None

    @property
    def alone(self) -> AdapterOutput:
        """This output, with nothing kept for others."""
        return AdapterOutput(self.addend, self.gate)


class Adapter(nn.Module):
    """One domain's adapter of one host.

    ``h = relu(norm(conv(p)))``, ``s = w_s . h + b_s``, addend ``4 (W_v (sigmoid(s) h) + b)``, gate
    ``1[s > 0]``. Scaling h by the attention before the value map is the same as scaling the value
    after it and keeps m channels instead of O.

    Fresh: ``W_v = 0``, ``b = 0`` and ``b_s > 0``: adds exactly zero and every gate is open.

    Args:
        in_channels: C.
        out_channels: O.
        hidden_channels: m.
        kernel_size: The first convolution's window: 1 or 3.
        axes: The number of axes of the grid.
        gated: Make a gate.
        exact: Keep p for the backward, not its 8-bit codes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        kernel_size: int,
        axes: int = 2,
        *,
        gated: bool,
        exact: bool,
    ) -> None:
        super().__init__()
        self.squeeze = CONV_OF[axes](
            in_channels, hidden_channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        if axes == 2:  # as compiled convolutions want it: they would keep a copy
            self.squeeze.to(memory_format=torch.channels_last)
        self.norm = nn.GroupNorm(1, hidden_channels)
        # by cell: for so few cells a matrix product is far quicker than a 1x1 convolution
        self.attend = nn.Linear(hidden_channels, 1)
        self.value = nn.Linear(hidden_channels, out_channels)
        for weight in (self.value.weight, self.value.bias, self.attend.weight):
            nn.init.zeros_(weight)  # nothing is added, and every gate is open whatever comes in
        nn.init.constant_(self.attend.bias, OPEN_LOGIT)
        self.gated, self.exact = gated, exact

    def forward(
        self, p: Tensor, noise: Tensor | None = None, kept: KeptInput | None = None
    ) -> AdapterOutput:
        """(N, C, *grid) to the addend (N, O, *grid) and the gate (N, 1, *grid).

        Args:
            p: (N, C, *grid) of G cells.
            noise: Added to s before the gate decides, (N, G, 1), or None.
            kept: What p follows from, if that is kept anyway.
        """
        options, weights = AdapterOptions(self.norm.eps, self.gated, self.exact), self.weights
        kept = keep(p, weights, options) if kept is None else kept
        return AdapterOutput(*adapt(p, noise, weights, options, kept), kept)

    @property
    def weights(self) -> Weights:
        """The parameters, as the op takes them."""
        return Weights(
            self.squeeze.weight,
            self.norm.weight,
            self.norm.bias,
            self.attend.weight,
            self.attend.bias,
            self.value.weight,
            self.value.bias,
        )


class MixedAdapters(nn.Module):
    """Stands for the adapters of several domains, one of which speaks for each sample of a batch.

    A sample that none speaks for is left as it is: its addend is zero and its gates are open.

    Args:
        host: The host's name, for errors.
        adapters: That host's adapters, at least one.
        samples: Positions in the batch, for every adapter.
        count: The number of samples in the batch.
    """

    gated = False  # its gates have no noise: it does not train
    exact = False  # they keep rows of their own

    def __init__(
        self, host: str, adapters: Sequence[Adapter], samples: Sequence[Tensor], count: int
    ) -> None:
        super().__init__()
        self.host, self.samples, self.count = host, samples, count
        self.adapters = nn.ModuleList(adapters)

    def forward(self, p: Tensor) -> AdapterOutput:
        """(N, C, *grid) to the addend (N, O, *grid) and the gate (N, 1, *grid)."""
        if len(p) != self.count:
            raise InputError(
                f"`domains` names {self.count} samples, but {self.host!r} works on {len(p)} at "
                "once: they cannot be told apart there. Call the network for one domain at a time: "
                "`set_domain(name)`."
            )
        said = [
            cast(AdapterOutput, adapter(p.index_select(0, own)))
            for adapter, own in zip(self.adapters, self.samples, strict=True)
        ]
        gates = [adapted.gate for adapted in said if adapted.gate is not None]
        addend = self._scattered([adapted.addend for adapted in said], 0.0)
        return AdapterOutput(addend, self._scattered(gates, 1.0) if gates else None)

    def _scattered(self, parts: Sequence[Tensor], otherwise: float) -> Tensor:
        """Every part's rows at their positions, laid out as the parts are."""
        shape = (self.count, *parts[0].shape[2:], parts[0].shape[1])
        whole = parts[0].new_full(shape, otherwise).movedim(-1, 1)
        for part, own in zip(parts, self.samples, strict=True):
            whole.index_copy_(0, own, part)
        return whole


class HostInput(Place):
    """Where a host begins: ``x`` becomes ``x, adapter(pool(x)), codes``.

    The adapter is that of the call that runs; it lives (and is saved) with its domain.

    Args:
        host: The host's name.
        max_cells: Most cells of the coarse grid.
        stride: The stride of the whole host, one number an axis; None for tokens.
        prefix_tokens: Leading tokens that are cells by themselves.
        samples: The axis of the samples: 1 of tokens (T, N, C).
    """

    def __init__(
        self,
        host: str,
        max_cells: int,
        stride: tuple[int, ...] | None,
        prefix_tokens: int = 0,
        samples: int = 0,
    ) -> None:
        super().__init__()
        self.host, self.samples = host, samples
        self.max_cells, self.stride, self.prefix_tokens = max_cells, stride, prefix_tokens

    @property
    def active(self) -> Adapter | MixedAdapters | None:
        """The adapter of the call that runs; None: the backbone alone."""
        return cast(Adapter | MixedAdapters | None, self.calls.now.adapters.get(self.host))

    def features(self, x: Tensor) -> Tensor:
        """The means of x over its positions, (N, C)."""
        if self.stride is not None:
            return x.flatten(2).mean(2)
        return x.flatten(1, -2).mean(1) if x.dim() > 2 else x

    def reads_every_position(self, x: Tensor) -> bool:
        """Whether every position of a map `x` is a cell, of which an adapter would keep codes."""
        own = isinstance(self.active, Adapter) and not self.active.exact
        return own and self.stride is not None and x.shape[2:] == self._grid(x, self.stride)

    def _grid(self, x: Tensor, stride: Sequence[int]) -> tuple[int, ...]:
        out = [-(-n // s) for n, s in zip(x.shape[2:], stride, strict=True)]
        return coarse_grid(out, self.max_cells)

    def forward(
        self, x: Tensor, shared: SharedCodes | None = None
    ) -> tuple[Tensor, AdapterOutput | None, Tensor | None]:
        """x, the adapter's output for it, and codes of x itself if the adapter keeps such.

        Args:
            x: (N, C, *in), or tokens.
            shared: What the activation that returned x keeps, if it shares that.
        """
        if not self.samples:
            return self._read(x, shared)
        x, adapted, codes = self._read(x.transpose(0, self.samples), None)
        return x.transpose(0, self.samples), adapted, codes

    def _read(
        self, x: Tensor, shared: SharedCodes | None
    ) -> tuple[Tensor, AdapterOutput | None, Tensor | None]:
        call = self.calls.now
        if call.features is not None and self.host in call.features:
            call.features[self.host] = self.features(x)
        active = self.active
        if active is None:
            return x, None, None
        if self.stride is None:
            tokens = x.unsqueeze(1) if x.dim() == 2 else x  # one token a sample
            place = TokenGrid.of(tokens.shape[1:-1], self.prefix_tokens, self.max_cells)
            tokens, pooled = read_tokens(tokens, place, apart=active.exact)
            adapted = _adapted(active, pooled, call.noise, self.host)
            codes = _codes_of(tokens, adapted.kept) if place.whole else None
            x = tokens.squeeze(1) if x.dim() == 2 else tokens
            return x, adapted.alone, codes
        grid = self._grid(x, self.stride)
        whole = x.shape[2:] == grid
        kept = None if shared is None or not whole else shared.of(x)
        x, pooled = read(x, grid)
        adapted = _adapted(active, pooled, call.noise, self.host, kept)
        return x, adapted if whole else adapted.alone, None


def _adapted(
    adapter: Adapter | MixedAdapters,
    p: Tensor,
    noise: Noise | None,
    host: str,
    kept: KeptInput | None = None,
) -> AdapterOutput:
    given = (p,) if noise is None or not adapter.gated else (p, noise.draw(host, p))
    shared = {} if kept is None else {"kept": kept}
    return cast(AdapterOutput, adapter(*given, **shared))


def _codes_of(tokens: Tensor, kept: KeptInput | None) -> Tensor | None:
    """The codes of cells that are single tokens, if these are coded alike by themselves."""
    rows = None if kept is None else kept.how
    if kept is None or not isinstance(rows, Rows) or not rows.last or not tokens.is_contiguous():
        return None
    return kept.tensor if rows.group == sample_group(tokens) else None


class HostOutput(nn.Module):
    """Where a host ends: ``f`` becomes ``up(gate) * f + up(addend)``.

    Args:
        macs_per_output: Multiply-accumulates of the whole host for one output position.
        exact: Keep the gate's cell means as they are, not as 8-bit codes.
        max_cells: Most cells of the coarse grid, for tokens.
        prefix_tokens: Leading tokens that are cells by themselves; None for maps.
        inplace: `f` may be overwritten.
        samples: The axis of the samples: 1 of tokens (T, N, C).

    Attributes:
        conv: The convolution that is all of the host, and cheap enough to compute f again.
    """

    conv: FrozenConv | None

    def __init__(
        self,
        macs_per_output: float,
        exact: bool,
        max_cells: int = 0,
        prefix_tokens: int | None = None,
        inplace: bool = True,
        samples: int = 0,
    ) -> None:
        super().__init__()
        self.macs_per_output, self.exact, self.inplace = macs_per_output, exact, inplace
        self.samples = samples
        self.max_cells, self.prefix_tokens = max_cells, prefix_tokens
        self.set_conv(None)

    def set_conv(self, conv: FrozenConv | None) -> None:
        """Refer to `conv` without owning it."""
        object.__setattr__(self, "conv", conv)

    def _means(self, f: Tensor, adapted: AdapterOutput) -> Means | None:
        """f of the input's cells, where cells are single pixels of the input and the output."""
        addend, kept = adapted.addend, adapted.kept
        if self.conv is None or kept is None or f.shape[2:] != addend.shape[2:]:
            return None
        return Means(kept.tensor.detach(), partial(_again, self.conv, kept.how, addend.dtype))

    def forward(
        self, f: Tensor, adapted: AdapterOutput | None
    ) -> tuple[Tensor, Tensor | None, float | None]:
        """y, of the shape of f, the gate, and multiply-accumulates of a sample with open gates."""
        if adapted is None:
            return f, None, None
        if self.prefix_tokens is None:
            size = f.shape[2:]
            f = f if self.inplace else f.clone()
            y = write(f, adapted.addend, adapted.gate, self.exact, self._means(f, adapted))
        else:
            tokens = f.transpose(0, self.samples) if self.samples else f
            tokens = tokens.unsqueeze(1) if f.dim() == 2 else tokens
            size = tokens.shape[1:-1]
            place = TokenGrid.of(size, self.prefix_tokens, self.max_cells)
            y = write_tokens(tokens, adapted.addend, adapted.gate, place, self.exact)
            y = y.squeeze(1) if f.dim() == 2 else y
            y = y.transpose(0, self.samples) if self.samples else y
        return y, adapted.gate, self.macs_per_output * size.numel()


def _again(conv: FrozenConv, how: Reader | None, dtype: torch.dtype, kept: Tensor) -> Tensor:
    return conv.forward(read_back(kept, how).to(dtype))  # without hooks
