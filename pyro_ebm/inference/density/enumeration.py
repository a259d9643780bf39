"""Discrete latent sites, summed out of a model's density as Pyro's own kernels do."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.contract import contract_to_tensor
from pyro.ops.einsum.util import EINSUM_SYMBOLS_BASE
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyro_ebm.structure import Batch, BatchedModel, Layout, latent_sites, sample_sites
from pyro_ebm.structure.batched import unvalidated

__all__ = ["SummedOut", "enumerable_sites", "summed_out"]

_WAYS = ("vmap",)  # in a plate of chains, enumerated dims would have to lie left of it


def enumerable_sites(trace: poutine.Trace, known: Collection[str] = ()) -> list[str]:
    """The discrete latent sites of a trace, but those known.

    Raises:
        ValueError: one that has no finite list of values.
    """
    latent = {name: site["fn"] for name, site in latent_sites(trace).items() if name not in known}
    discrete = {name: fn for name, fn in latent.items() if fn.support.is_discrete}
    for name, fn in discrete.items():
        if not fn.has_enumerate_support:
            raise ValueError(
                f"site {name!r} is discrete ({type(fn).__name__}) and has no finite list of values to sum over; "
                f"marginalize it in the model"
            )
    return list(discrete)


def summed_out(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    vectorize: str,
    layout: Layout,
    sites: Sequence[str],
    prior: bool = False,
) -> SummedOut:
    """The model as a function of its continuous sites, for many values of them at once.

    Args:
        model: any Pyro model.
        args: its arguments.
        kwargs: its keyword arguments.
        vectorize: ``"auto"`` or ``"vmap"``.
        layout: of the model.
        sites: the discrete ones; they are enumerated in parallel, in dimensions left of the model's plates.
        prior: leave the observed sites out, which Pyro's enumeration has to see all the same.
    """
    continuous = tuple(name for name in layout.latent if name not in sites)
    known = dataclasses.replace(layout, latent=continuous)
    found = SummedOut(model, args, kwargs, vectorize=vectorize, ways=_WAYS, layout=known, returned=())
    found.prior = prior
    return found


class _Structure(NamedTuple):
    """How the log probabilities of one run hang together, in Pyro's packed notation: one letter a dimension.

    Args:
        plates: site -> letters of the plates it lies in.
        letters: site -> those of its log probability's dimensions.
        summed: those to sum over.
    """

    plates: dict[str, frozenset[str]]
    letters: dict[str, str]
    summed: set[str]


class SummedOut(BatchedModel):
    """Runs return packed log probabilities, which are contracted for all chains at once: a plate around everything."""

    prior = False

    def _single(
        self, row: Mapping[str, Tensor], *, returned: Sequence[str], measure: Any
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        enumerated = _Enumerating(-1 - self.layout.depth)(config_enumerate(self.model))
        conditioned = poutine.condition(enumerated, data=dict(row))
        trace = poutine.trace(conditioned).get_trace(*self.args, **self.kwargs)
        for site in sample_sites(trace).values():
            site["fn"] = unvalidated(site["fn"])
        for name, site in sample_sites(trace).items() if measure is not None else ():
            site["log_prob"] = site["unscaled_log_prob"] = measure(name, site)
        trace.compute_log_prob()
        trace.pack_tensors()
        letter = trace.plate_to_symbol
        # Conditioned on its value here, a latent site counts as observed too.
        hidden = {name for name, site in sample_sites(trace).items() if site["is_observed"]} - set(row)
        sites = {name: site for name, site in sample_sites(trace).items() if not self.prior or name not in hidden}
        packed = {name: site["packed"]["log_prob"] for name, site in sites.items()}
        self._structure = _Structure(
            {
                name: frozenset(letter[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized)
                for name, site in sites.items()
            },
            {name: value._pyro_dims for name, value in packed.items()},
            set(trace.symbol_to_dim) - set(letter.values()),
        )
        return {}, packed

    def _run(self, way: str, values: Mapping[str, Tensor], num: int, *rest: Any) -> Batch:
        batch = super()._run(way, values, num, *rest)
        return Batch({}, {"summed out": self._contracted(batch.measured)}, batch.way)

    def marginal(self, values: Mapping[str, Tensor], site: str) -> Tensor:
        """Probabilities of the values of a discrete site given those of the continuous ones, (num, *plates, states).

        Args:
            values: site -> (num, *site_shape), of all continuous sites.
            site: the first discrete one, whose log probability depends on no other that is summed out.
        """
        with pyro.validation_enabled(False):
            packed = super()._run("vmap", values, len(next(iter(values.values()))), ()).measured
        packed = {name: value.detach() for name, value in packed.items()}
        with torch.enable_grad():
            logs = packed[site].requires_grad_()
            (grad,) = torch.autograd.grad(self._contracted(packed).sum(), logs)
        letters = self._structure.letters[site]
        own = [place for place, letter in enumerate(letters, 1) if letter in self._structure.summed]
        return grad.movedim(own[0], -1) if own else grad[..., None]  # of size one, no letter

    def _contracted(self, packed: Mapping[str, Tensor]) -> Tensor:
        """(chains, *packed) by site, to (chains,)."""
        plates, letters, summed = self._structure
        used = summed.union(*letters.values(), *plates.values())
        chains = next(letter for letter in EINSUM_SYMBOLS_BASE if letter not in used)
        terms: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
        for name, value in packed.items():
            term: Any = value.clone()  # a name of its own for each, which the contraction goes by
            term._pyro_dims = chains + letters[name]
            terms.setdefault(plates[name] | {chains}, []).append(term)
        with shared_intermediates() as cache:
            return contract_to_tensor(terms, summed, frozenset({chains}), cache=cache)


class _Enumerating(EnumMessenger):
    """Pyro's, which reads ``value.data.shape``: under vmap only the shape can be read."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        msg["value"] = torch.empty(value.shape, device="meta") if isinstance(value, Tensor) else value
        try:
            super()._pyro_post_sample(msg)
        finally:
            msg["value"] = value
