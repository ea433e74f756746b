"""The module that holds a network, and what trains beside the network in it.

A classifier beside a feature extractor, a projection head, a loss with weights: of every domain
there is one set of tensors (`lightning_da3.model.outside`), and one more that no domain owns, as
the module was when it was attached. New domains start from that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_da3.model.beside import outside_of
from lightning_da3.model.outside import (
    Outside,
    copied,
    lend_,
    outside_with,
    take_back_,
    tensors_of,
    typed,
    with_room,
)
from lightning_da3.model.pending import rest_


class Place(NamedTuple):
    """Where a module holds a parameter beside its network.

    Args:
        name: Its dotted name.
        live: What is there now.
        every: What can be there: of every domain, and of none.
        learned: What is there while each of the domains trains that are learned.
    """

    name: str
    live: Tensor
    every: list[Tensor]
    learned: list[Tensor]


class Holder:
    """The module that holds a network, where the set of the active domain is in use.

    Copied and pickled with that module; a copy of the network alone has none.

    Args:
        root: A LightningModule, say.
        path: Dotted name of the network inside of it.
        network: A `MultiDomain`.

    Attributes:
        policy: ``"domain"``: new domains get a set of their own; ``"shared"``: they train the one
            that no domain owns; ``"frozen"``: it does not train, and domains own its statistics.
    """

    def __init__(self, root: nn.Module, path: str, network: Any) -> None:
        self.root, self.path, self.network = root, path, network
        self.policy = "domain"
        self._lent: list[tuple[Outside, list[str]]] = []
        self._owners: dict[str, nn.Module] = {}  # that hold what is lent, by path
        self._domain: Any = None
        self._users: set[str] = set()  # whose parameters in use by no domain are the user's own
        root.register_load_state_dict_pre_hook(self.align_)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.network.holder = self
        for outside, names in self._lent:  # the network took them back, as it is alone at first
            lend_(outside, [n for n in names if n in dict(outside.named_parameters())])

    # --- in use -----------------------------------------------------------------------------------

    def lacking(self, outside: Outside | None) -> list[str]:
        """Names of a set for which the module has no place: the user took a part away."""
        return [name for name in tensors_of(outside) if _place(self.root, name) is None]

    @torch.inference_mode(False)
    @torch.no_grad()
    def put(self, domain: Any) -> None:
        """Let the module compute with a domain's set; None: with the one that nobody owns."""
        self._domain, own = domain, tensors_of(_own(domain))
        elsewhere = {*own, *self.lacking(self.network.shared)}
        shared = [name for name in tensors_of(self.network.shared) if name not in elsewhere]
        self._owners = {}
        self._put(self.network.shared, shared, self._trains_shared())
        self._put(_own(domain), list(own), True)

    def _trains_shared(self) -> bool:
        return self._domain is not None and self.policy == "shared"

    def _put(self, outside: Outside | None, names: list[str], trains: bool) -> None:
        if outside is None:
            return
        tensors, lent = tensors_of(outside), []
        for name in names:
            tensor, (path, _, leaf) = tensors[name], name.rpartition(".")
            owner = self._owners[path] = self.root.get_submodule(path)
            live = getattr(owner, leaf)
            if isinstance(tensor, nn.Parameter):
                lent.append(name)
                if trains:
                    tensor.requires_grad_(True)
                else:
                    rest_([tensor], self._trains_shared)
                setattr(owner, leaf, tensor)
            elif _fits(live, tensor):
                live.copy_(tensor)  # it stays the same object: DDP and averages hold it
            else:
                setattr(owner, leaf, tensor.clone())
        lend_(outside, lent)
        self._lent.append((outside, names))

    def take_back(self) -> None:
        """What the module computed with is its domain's again, with statistics as they are now."""
        self.refresh()
        for outside, _ in self._lent:
            take_back_(outside)
        self._lent = []

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Take over statistics as they are now, into the sets that are in use."""
        for outside, names in self._lent:
            buffers = dict(outside.named_buffers(remove_duplicate=False))
            for name in (name for name in names if name in buffers):
                path, _, leaf = name.rpartition(".")
                if _place(self.root, path) is not self._owners[path]:
                    continue  # the user put another in
                live = getattr(self._owners[path], leaf)
                if _fits(live, buffers[name]):
                    buffers[name].copy_(live)
                else:
                    setattr(outside.get_submodule(path), leaf, live.clone())

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Sets are whole in the block, and afterwards in use as before."""
        domain = self._domain
        self.take_back()
        try:
            yield
        finally:
            self.put(domain)

    def _replaced(self) -> set[str]:
        """Names of what the user put into the module in place of what was lent."""
        found = set()
        for outside, names in self._lent:
            tensors = tensors_of(outside)
            for name in names:
                path, live = name.rpartition(".")[0], _place(self.root, name)
                if isinstance(tensors[name], nn.Parameter):
                    same = live is tensors[name]
                else:
                    same = _place(self.root, path) is self._owners[path]
                found |= set() if same else {name}
        return found

    # --- sets -------------------------------------------------------------------------------------

    def renew(self, learned: Collection[str] = ()) -> None:
        """Look anew at what trains in the module: at first, and whenever a run begins.

        What the user replaced since is what new domains start from; and it is the active domain's,
        if that is to be learned.

        Args:
            learned: Names of the domains that are to be learned.

        Raises:
            ConfigError: A parameter has no shape yet.
        """
        network, current = self.network, self._domain
        known = tensors_of(network.shared) if network.holder is self else {}
        found = dict(outside_of(self.root, self.path, known))
        if network.holder not in (None, self):
            network.holder.take_back()
        new = self._replaced()
        self.take_back()
        sets = {
            name: known[name] if name in known and name not in new else _own_tensor(tensor)
            for name, tensor in found.items()
        }
        network.shared, network.holder = outside_with(sets), self
        self._users |= {name for name in sets if name not in known or name in new}
        for name in network.domains:
            domain = network.domain(name)
            if domain is current and domain.outside is not None and name in learned:
                mine = {k: v for k, v in tensors_of(domain.outside).items() if k not in new}
                again = {k: v for k, v in sets.items() if k in new}
                domain.outside = with_room(outside_with(mine), again, network.shared)
            domain.outside = typed(domain.outside, sets)
        self.put(None if self.lacking(_own(current)) else current)

    def fresh(self) -> Outside | None:
        """A new domain's set. The first has the user's own parameters: others may refer to them."""
        if self.policy == "shared":
            return None
        memo: dict[int, Tensor] = {}
        shared = tensors_of(self.network.shared)
        own = {
            name: copied(tensor, memo)
            for name, tensor in shared.items()
            if self.policy == "domain" or not isinstance(tensor, nn.Parameter)
        }
        users = {name: shared[name] for name in own if name in self._users}
        if users:
            with self.resting():
                self.network.shared = outside_with({**shared, **{n: own[n] for n in users}})
            self._users.clear()
        return outside_with({**own, **users})

    def complete(self, domain: Any) -> None:
        """Give a domain what it lacks of its set."""
        shared, own = tensors_of(self.network.shared), tensors_of(_own(domain))
        if self.policy == "shared" or set(shared) <= set(own):
            return
        fresh = tensors_of(self.fresh())
        with self.resting():
            domain.outside = outside_with({**fresh, **own})

    def places(self, domains: Collection[str]) -> list[Place]:
        """The places of the parameters of which these domains have their own."""
        every = [tensors_of(self.network.domain(name).outside) for name in self.network.domains]
        own = [tensors_of(self.network.domain(name).outside) for name in domains]
        return [
            Place(
                name,
                _place(self.root, name),
                [shared, *(tensors[name] for tensors in every if name in tensors)],
                [tensors[name] for tensors in own if name in tensors],
            )
            for name, shared in tensors_of(self.network.shared).items()
            if isinstance(shared, nn.Parameter) and any(name in tensors for tensors in own)
        ]

    # --- states -----------------------------------------------------------------------------------

    def align_(self, _: nn.Module, state: dict[str, Any], prefix: str, *__: object) -> None:
        """Let a state of the module say the same of what is in use as of the domain's set.

        Under the module's own names it has what was in use when it was saved, of whichever domain.
        """
        if self.network.holder is not self:
            return  # the network went into another module
        net = f"{prefix}{self.path}."
        extra = state.get(f"{net}_extra_state")
        shared = tensors_of(self.network.shared)
        if not isinstance(extra, Mapping) or "num_classes" not in extra:  # before the conversion
            for name, tensor in shared.items():
                given = state.get(prefix + name)
                if given is not None and _fits(given, tensor):
                    tensor.detach().copy_(given)
            return
        for name, tensor in shared.items():  # a state of before there were sets has one, in use
            value = state.get(f"{net}shared.{name}", state.get(prefix + name))
            sets = [f"{net}bank.{d}.outside." for d in extra["num_classes"] if self._has_set(d)]
            fits = value is not None and value.shape == tensor.shape
            for where in [f"{net}shared.", *sets] if fits else []:
                state.setdefault(where + name, value)
        for outside, names in self._lent:
            domain = None if outside is self.network.shared else self._domain_name()
            where = f"{net}shared." if domain is None else f"{net}bank.{domain}.outside."
            current = {} if domain in (None, *extra["num_classes"]) else tensors_of(outside)
            for name in names:
                if prefix + name in state or where + name in state:
                    here = current.get(name, state.get(prefix + name))
                    state[prefix + name] = state.get(where + name, here)

    def _has_set(self, name: str) -> bool:
        if name in self.network.domains:
            return self.network.domain(name).outside is not None
        return self.policy != "shared"

    def _domain_name(self) -> str:
        names: list[str] = self.network.domains
        return next(name for name in names if self.network.domain(name) is self._domain)


def hold_(
    root: nn.Module,
    path: str,
    network: Any,
    policy: str = "domain",
    learned: Collection[str] = (),
    copies: Collection[str] = (),
) -> None:
    """Say which module a network is in, if anything trains beside it there; edits both.

    The domain that is to be active is set afterwards.

    Args:
        root: A LightningModule, say.
        path: Dotted name of the network inside of it.
        network: A `MultiDomain`; it may stand in the module later.
        policy: As of `Holder`.
        learned: Names of the domains that are to be learned.
        copies: Names of copies of the network, which do not train.

    Raises:
        ConfigError: A parameter has no shape yet.
    """
    for name in copies:
        root.get_submodule(name).requires_grad_(False)
    holder = network.holder
    if holder is None or holder.root is not root:
        if not any(True for _ in outside_of(root, path)):
            return
        holder = Holder(root, path, network)
    holder.policy = policy
    holder.renew(learned)


def _own(domain: Any) -> Outside | None:
    return None if domain is None else domain.outside


def _place(root: nn.Module, name: str) -> Any:
    """What a module has under a dotted name; None if nothing."""
    path, _, leaf = name.rpartition(".")
    try:
        return getattr(root.get_submodule(path), leaf, None) if leaf else root
    except AttributeError:
        return None


def _fits(given: Any, tensor: Tensor) -> bool:
    return isinstance(given, Tensor) and given.shape == tensor.shape and given.dtype == tensor.dtype


def _own_tensor(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
