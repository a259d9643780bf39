r"""The tilt: ``p_theta(v) = exp(-E_theta(v)) p(v) / Z_theta`` at any sample site of any Pyro model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_flatten

from pyro_ebm.annotations import checked
from pyro_ebm.checks import real_numbers
from pyro_ebm.display import number, table
from pyro_ebm.energies import Energy, as_energy
from pyro_ebm.entry import entry
from pyro_ebm.estimates import Estimate, importance_estimate
from pyro_ebm.keywords import passes_keywords
from pyro_ebm.modules import modules_of, name_of, register_for_svi
from pyro_ebm.randomness import fingerprint
from pyro_ebm.structure import ModelStructure, event_dim_of, latent_masks, model_structure, prototype_trace
from pyro_ebm.tilts.forward import forward_log_normalizer, forward_log_weights, forward_way
from pyro_ebm.tilts.normalizer import (
    METHODS,
    Normalizer,
    checked_energy,
    log_z_key,
    sampled_log_normalizer,
    site_log_normalizer,
    warn_if_unreliable,
)

__all__ = ["TiltedModel", "tilt"]

_MAX_STRUCTURES = 32  # of one tilted model, for arguments of other shapes or values

Normalize = bool | float | str | Tensor | Normalizer


@checked
def tilt(
    model: Callable[..., Any],
    energies: Mapping[str, Energy | Callable[[Tensor], Tensor]],
    *,
    normalize: Normalize = True,
) -> TiltedModel:
    r"""Return the model that, at each named site ``v``, also does ``pyro.factor("v_tilt", -E(v) - log Z)``.

    The joint density is multiplied by ``exp(-E(v))`` and divided by one constant
    ``Z = E[exp(-E(v))]`` per setting of the model's inputs, the expectation being under the model
    without its observations (the *global* tilt). At a site without random parents ``Z`` comes from
    the site's own distribution; elsewhere the model is run forward. With several sites that
    depend on each other, ``Z`` is that of their joint tilt. For the tilt that renormalizes the site's
    own conditional, put a :class:`TiltedDistribution` inside the model.

    Tilting a tilted model adds the energies. The factor lies in the site's plates, scales and masks: where
    ``poutine.mask`` takes an element out, its tilt goes too (``prior.mask(...)`` takes out the prior alone).

    Args:
        model: any Pyro model; a bound method such as ``vae.model`` too.
        energies: site name -> energy, (*batch, *event) -> (*batch,).
        normalize: ``True``: estimate log Z at each model call (needed while the tilt is trained); a
            :class:`Normalizer`, or ``"importance"`` / ``"qmc"``, says how; ``False``: leave log Z out
            (enough whenever only latent values move, as in MCMC); a number: that constant, for a
            single tilted site.

    Returns:
        A callable with the model's signature; an ``nn.Module`` that holds the energies and, where the
        model is a module or a method of one, that module.

    Raises:
        ValueError: no energies, an energy of the wrong shape, a site the model does not have.

    Reference:
        Pang, Han, Nijkamp, Zhu, Wu (2020), Learning Latent Space Energy-Based Prior Model.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_ebm import LinearEnergy, tilt
        >>> def model():
        ...     return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> shifted = tilt(model, {"z": LinearEnergy([3.0, 0.0])}, normalize=4.5)  # N((3, 0), I)
        >>> z = torch.tensor([3.0, 0.0])
        >>> trace = pyro.poutine.trace(pyro.condition(shifted, {"z": z})).get_trace()
        >>> round(float(trace.log_prob_sum().detach().exp() * 2 * torch.pi), 4)
        1.0
    """
    if not isinstance(energies, Mapping) or not energies:
        raise ValueError(f"energies must be a non-empty mapping from site name to energy, got {energies!r}")
    wrapped = {name: as_energy(energy, name=f"energies[{name!r}]") for name, energy in energies.items()}
    if isinstance(model, TiltedModel):
        inner = dict(model.energies.items())
        wrapped = inner | {k: inner[k] + e if k in inner else e for k, e in wrapped.items()}
        model = model.base_model
    return TiltedModel(model, wrapped, normalize)


class TiltedModel(nn.Module):
    """What :func:`tilt` returns: call it as you would the model.

    Attributes:
        base_model: the model without any tilt.
        energies: site name -> energy.
    """

    def __init__(
        self, model: Callable[..., Any], energies: Mapping[str, Energy], normalize: Normalize
    ) -> None:
        super().__init__()
        self.base_model = model
        # Site names may contain dots, which module names may not; the order of both lists is the same.
        self._sites = list(energies)
        self._energies = nn.ModuleList(energies.values())
        self._owners = nn.ModuleList([] if isinstance(model, nn.Module) else modules_of(model))
        self.normalize = _checked_normalize(normalize, self._sites)
        self._structures: dict[object, ModelStructure] = {}
        self._constants: dict[str, tuple[object, Tensor]] = {}

    @property
    def energies(self) -> dict[str, Energy]:
        return dict(zip(self._sites, self._energies, strict=True))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        tilts = ", ".join(f"{site}: {type(energy).__name__}" for site, energy in self.energies.items())
        return f"TiltedModel({name_of(self.base_model)}, {{{tilts}}}, log Z: {self._log_z_text()})"

    def _repr_html_(self) -> str:
        rows = [
            [site, type(energy).__name__, number(sum(p.numel() for p in energy.parameters()))]
            for site, energy in self.energies.items()
        ]
        facts = [f"of {name_of(self.base_model)}", f"log Z: {self._log_z_text()}"]
        return table("TiltedModel", facts, ["tilted site", "energy", "parameters"], rows)

    def _log_z_text(self) -> str:
        if isinstance(self.normalize, Normalizer):
            return f"estimated at each call ({self.normalize.method}, {self.normalize.num_samples:,} draws)"
        return "left out" if self.normalize is False else number(float(self.normalize))

    def unnormalized(self) -> TiltedModel:
        """The same tilt without log Z: for samplers, which need densities only up to a constant."""
        return self if self.normalize is False else TiltedModel(self.base_model, self.energies, False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for energy in self._energies:
            register_for_svi(energy, "tilt")
        log_normalizers = self._log_normalizers(args, kwargs)
        with _TiltMessenger(self.energies, log_normalizers):
            return self.base_model(*args, **kwargs)

    def structure(self, *args: Any, **kwargs: Any) -> ModelStructure:
        """Dependencies between the sites of the base model, found once for arguments of the same shapes.

        Other arguments than tensors may decide what the model does, so each of their values has an entry of its own;
        the ones used longest ago go, or an argument that changes with each step would fill the memory.
        """
        leaves, spec = tree_flatten((args, kwargs))
        key = (str(spec), *map(_kind_of, leaves))
        found = self._structures.pop(key, None)
        if found is None:
            structure = model_structure(self.base_model, args, kwargs)
            _check_sites(self._sites, structure.order)
            _check_priors(self._sites, structure, prototype_trace(self.base_model, args, kwargs))
            if any(_needs_forward(group, structure) for group in _dependent_groups(self._sites, structure)):
                way = forward_way(self.base_model, args, kwargs, self.energies, structure)
                structure = dataclasses.replace(structure, way=way)
            found = structure
        self._structures[key] = found  # at the end: used last
        while len(self._structures) > _MAX_STRUCTURES:
            del self._structures[next(iter(self._structures))]
        return found

    def _log_normalizers(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, _LogZ]:
        """For each site that carries a log Z, a function from its distribution to that log Z."""
        if self.normalize is False:
            return {}
        if isinstance(self.normalize, Tensor):
            constant = self.normalize
            return {self._sites[0]: lambda fn: constant}
        structure = self.structure(*args, **kwargs)
        found: dict[str, _LogZ] = {}
        for group in _dependent_groups(self._sites, structure):
            if _needs_forward(group, structure):
                found[group[-1]] = self._forward_log_z(group, structure, args, kwargs)
            else:
                found[group[0]] = self._site_log_z(group[0])
        return found

    @entry(of_model=False)
    @passes_keywords()
    @torch.no_grad()
    def log_normalizer(
        self,
        *args: Any,
        num_samples: int = 16384,
        seed: int | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Estimate:
        """Log Z of the tilt for these arguments, summed over groups of sites that are independent.

        Args:
            *args: the model's arguments.
            num_samples: draws of the base model.
            seed: a number for the same answer twice.
            model_kwargs: the model's keyword arguments, whatever their names.
            **kwargs: the same, where no option has their name.

        Returns:
            ``(value, se)``: 0-d where log Z does not depend on the inputs, else one number per datum.

        Warns:
            InferenceWarning: where the estimate is not finite or its weights have too heavy a tail.
        """
        kwargs = dict(model_kwargs or {})
        structure = self.structure(*args, **kwargs)
        trace = prototype_trace(self.base_model, args, kwargs)
        settings = Normalizer(num_samples=num_samples)
        parts: list[Estimate] = []
        for group in _dependent_groups(self._sites, structure):
            # A stream for each group: their errors must be independent for their variances to add.
            stream = int(torch.randint(2**31, (), device="cpu")) if seed is None else fingerprint((), seed, *group)
            if not _needs_forward(group, structure):
                fn, energy = trace.nodes[group[0]]["fn"], self.energies[group[0]]
                part = sampled_log_normalizer(fn, energy, num_samples=num_samples, seed=stream)
            else:
                energies = {site: self.energies[site] for site in group}
                log_weights = forward_log_weights(
                    self.base_model, args, kwargs, energies, structure, settings, seed=stream
                )
                part = importance_estimate(log_weights)
                warn_if_unreliable(log_weights, part)
            parts.append(part)
        # Not from a zero of torch's default device, which may be another than that of the draws.
        value, variance = parts[0].value, parts[0].se ** 2
        for part in parts[1:]:
            value, variance = value + part.value, variance + part.se**2
        return Estimate(value, variance.sqrt())

    def _settings(self) -> Normalizer:
        return self.normalize if isinstance(self.normalize, Normalizer) else Normalizer()

    def _site_log_z(self, site: str) -> _LogZ:
        energy, settings = self.energies[site], self._settings()

        def log_z(fn: Distribution) -> Tensor:
            key = None if torch.is_grad_enabled() else log_z_key(fn, energy, f"site {site!r}")
            if key is None:
                return site_log_normalizer(fn, energy, settings, name=f"site {site!r}")
            if self._constants.get(site, (None,))[0] != key:
                value = site_log_normalizer(fn, energy, settings, name=f"site {site!r}")
                self._constants[site] = (key, value.detach())
            return self._constants[site][1]

        return log_z

    def _forward_log_z(
        self, group: list[str], structure: ModelStructure, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> _LogZ:
        energies = {site: self.energies[site] for site in group}
        free = structure.free_plates(group).values()
        value = forward_log_normalizer(self.base_model, args, kwargs, energies, structure, self._settings())

        def share(fn: Distribution) -> Tensor:
            # One log Z for all elements that are not independent of each other: each carries its part.
            inner = fn.batch_shape[max(len(fn.batch_shape) - structure.max_plate_nesting, 0) :]
            coupled = [size for dim, size in enumerate(inner, -len(inner)) if dim not in free]
            trimmed = value.reshape(value.shape[value.ndim - len(inner) :]) if value.ndim else value
            return trimmed / math.prod(coupled)

        return share


_LogZ = Callable[[Distribution], Tensor]


class _TiltMessenger(Messenger):
    """Adds the factor right after the site, inside the site's own plates and scales."""

    def __init__(self, energies: Mapping[str, Energy], log_normalizers: Mapping[str, _LogZ]) -> None:
        super().__init__()
        self.energies = energies
        self.log_normalizers = log_normalizers
        self.seen: list[str] = []

    def __enter__(self) -> _TiltMessenger:
        self.seen = []
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None:
            _check_sites(list(self.energies), self.seen)

    def _pyro_sample(self, msg: Any) -> None:
        # Handlers inside the model have set the mask by now, those around the tilted model not yet.
        if msg["name"] in self.energies and _hides_all(msg["mask"]):
            raise ValueError(
                f"the tilted site {msg['name']!r} lies under poutine.mask(mask=False), which takes its tilt out too; "
                f"take that mask off, or, for a flat prior that is tilted, mask the distribution, as in "
                f"pyro.sample({msg['name']!r}, prior.mask(False))"
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if poutine.util.site_is_subsample(msg) or type(msg["fn"]).__name__ == "Unit":
            return
        self.seen.append(name)
        if name not in self.energies:
            return
        log_factor = -checked_energy(self.energies[name], msg["value"], event_dim_of(msg), f"site {name!r}")
        if name in self.log_normalizers:
            log_factor = log_factor - self.log_normalizers[name](msg["fn"])
        pyro.factor(f"{name}_tilt", log_factor)


def _hides_all(mask: Any) -> bool:
    """Whether a mask is ``False`` as a whole; one by element may hide all of a minibatch, as where it is padded."""
    return mask is False or (isinstance(mask, Tensor) and mask.ndim == 0 and not bool(mask))


def _checked_normalize(normalize: Normalize, sites: list[str]) -> bool | Tensor | Normalizer:
    if normalize is True:
        return Normalizer()
    if normalize is False or isinstance(normalize, Normalizer):
        return normalize
    if isinstance(normalize, str) and normalize in METHODS:
        return Normalizer(normalize)
    if isinstance(normalize, (int, float, Tensor)):
        if isinstance(normalize, int) and abs(normalize) > 2**53:
            raise ValueError(f"normalize as a number must be one log Z, got {normalize!r}")
        constant = real_numbers("normalize", torch.as_tensor(normalize))
        if constant.ndim or not bool(constant.isfinite()):
            raise ValueError(f"normalize as a number must be one finite log Z, got {normalize!r}")
        if len(sites) > 1:
            raise ValueError(
                f"normalize={float(constant)} is ambiguous for {len(sites)} tilted sites {sites}; "
                f"use normalize=True or normalize=False"
            )
        return constant
    raise TypeError(
        f"normalize must be True, False, a number, 'importance', 'qmc' or a Normalizer, got {normalize!r}"
    )


def _check_sites(wanted: list[str], present: tuple[str, ...] | list[str]) -> None:
    missing = [site for site in wanted if site not in present]
    if missing:
        raise ValueError(
            f"the model has no sample site {missing[0]!r} to tilt; "
            f"its sample sites are {sorted(set(present))}"
        )


def _kind_of(argument: Any) -> object:
    """What of an argument may decide how a model is built."""
    return (argument.shape, argument.dtype, argument.device) if isinstance(argument, Tensor) else repr(argument)


def _check_priors(sites: list[str], structure: ModelStructure, trace: poutine.Trace) -> None:
    """A tilt of what has no distribution has no log Z."""
    involved = set(sites).union(*(structure.ancestors[site] for site in sites))
    flat = [name for name, mask in latent_masks(trace).items() if name in involved and not bool(mask.any())]
    if flat:
        raise ValueError(
            f"the latent site(s) {flat} have a flat prior (their density is masked): the tilt of {sites} has no log Z; "
            f"use normalize=False, or give them a prior"
        )


def _needs_forward(group: list[str], structure: ModelStructure) -> bool:
    return len(group) > 1 or bool(structure.ancestors[group[0]])


def _dependent_groups(sites: list[str], structure: ModelStructure) -> list[list[str]]:
    """Tilted sites that share randomness, each group in the order the model runs them."""
    groups: list[set[str]] = []
    for site in sites:
        family = structure.ancestors[site] | {site}
        linked = [g for g in groups if any(family & (structure.ancestors[o] | {o}) for o in g)]
        groups = [g for g in groups if g not in linked] + [{site}.union(*linked)]
    return [sorted(group, key=structure.order.index) for group in groups]
