"""Draw every site of a (tilted) model: prior and posterior predictive draws that respect the tilt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.mcmc.api import AbstractMCMC
from torch import Tensor

from pyro_ebm.annotations import checked
from pyro_ebm.arviz_statistics import importance_ess, psis
from pyro_ebm.deadline import stopped_by
from pyro_ebm.entry import entry
from pyro_ebm.errors import warn_user
from pyro_ebm.inference.as_draws import as_draws, samples_as_draws
from pyro_ebm.inference.chains.mcmc import MCMC
from pyro_ebm.inference.density.summed_draws import summed_out_draws
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.resampled import resampled
from pyro_ebm.keywords import passes_keywords
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.randomness import random_stream
from pyro_ebm.structure import (
    BatchedModel,
    Layout,
    TiltedCall,
    check_simulates,
    is_factor,
    nothing,
    prototype_trace,
    sample_sites,
    tilted_call,
    unconditioned,
    untilted,
)
from pyro_ebm.thresholds import weights_problem
from pyro_ebm.tilts.normalizer import checked_energy

__all__ = ["predictive"]

_DEFAULT = 1000
_LOOPS = 64  # at once where the model is run for one draw after another, so that Ctrl-C loses few
_CHUNK = 4096  # draws of a run with 64 chains are many
_OVERSAMPLING = 16
_MIN_POOL = 2048  # resampling a small pool would follow the untilted model


@entry()
@passes_keywords()
@checked
def predictive(
    model: Callable[..., Any],
    *args: Any,
    draws: Any = None,
    num_samples: int | None = None,
    seed: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Draw all sites of a model, observed ones included; factors are respected, not ignored.

    (``pyro.infer.Predictive`` runs a tilted model as if it had no tilt.) Without ``draws``: the joint
    prior predictive, by resampling forward runs with weights ``exp(-E)``. With ``draws``: the remaining sites are
    drawn given each of them, in their order (chain after chain), so that rows belong to draws (discrete ones that the
    sampler summed out from their posterior, given the data among the arguments where these are the draws' own, or the
    draws do not tell theirs; else as for new data); weighted draws are
    resampled first, the same way each time and as :func:`to_arviz` does it, so that rows belong to its draws.

    Args:
        model: any Pyro model, tilted or not; quickest where it broadcasts over an outer plate.
        *args: its arguments; observed values among them are redrawn.
        draws: posterior draws of its latent sites: :class:`Draws`, an ``MCMC`` (ours or Pyro's) after its ``run``, or
            samples by site, (sample, *site_shape), as ``mcmc.get_samples()`` returns.
        num_samples: how many. All the draws by default; fewer are spread evenly over them, the same number of each
            chain where it divides. Of weighted draws as many as their weights are worth (100 at least, 4,000 of a
            grid); 1,000 without ``draws``.
        seed: a number for the same draws twice; ``None`` uses the global generator.
        model_kwargs: the model's keyword arguments, whatever their names.
        **kwargs: the same, where no option has their name.

    Returns:
        site -> tensor (num_samples, *site_shape); after Ctrl-C the draws so far, with a warning.

    Raises:
        ValueError: where a tilted site is not among ``draws`` (given the others its distribution is not the model's);
            where ``draws`` do not fit the model; where, without ``draws``, the model has factors of its own.
    """
    kwargs = dict(model_kwargs or {})
    if draws is None and any(isinstance(arg, Draws | MCMC | AbstractMCMC) for arg in args):
        raise TypeError("predictive() takes draws by keyword, after the model's arguments: draws=...")
    if draws is not None:
        draws = samples_as_draws(draws) if isinstance(draws, Mapping) else as_draws(draws)
    base, call = untilted(model), tilted_call(model, args, kwargs)
    with random_stream(seed), evaluation_mode(model), torch.no_grad():
        if draws is not None:
            missing = [site for site in (call.tilted.energies if call else {}) if site not in draws.values]
            if missing:
                raise ValueError(
                    f"the tilted site(s) {missing} are not among the draws ({sorted(draws.values)}): given the "
                    f"others they do not follow the model; draw them too, or leave draws=None"
                )
            given = _rows(draws, num_samples)
            given |= summed_out_draws(base, args, kwargs, given, draws.observed)
            return _forward(base, args, kwargs, len(next(iter(given.values()))), given=given)
        num_samples = _DEFAULT if num_samples is None else num_samples
        if call is not None:
            return _resampled(base, call, args, kwargs, num_samples)
        return _forward(base, args, kwargs, num_samples)


def _rows(draws: Draws, num_samples: int | None) -> dict[str, Tensor]:
    """Values by site, (num_samples, *site_shape): in the order of the draws, or resampled where they are weighted."""
    if draws.log_weights is not None:
        chosen = resampled(draws, num_samples).draws
        return {site: chosen.flat(site) for site in chosen.values}
    total = draws.num_chains * draws.num_draws
    wanted = total if num_samples is None else num_samples
    index = torch.arange(wanted, device="cpu") * total // wanted
    return {site: draws.flat(site)[index.to(value.device)] for site, value in draws.values.items()}


def _forward(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
    *,
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Many runs of the unconditioned model, with some sites fixed."""
    free = unconditioned(model)
    trace = prototype_trace(free, args, kwargs)
    factors = [name for name, site in sample_sites(trace).items() if is_factor(site)]
    if factors and given is None:
        raise ValueError(
            f"the model has factor(s) {factors}, which running it forward cannot respect; write them as a tilt of "
            f"the site they look at, or sample the latent sites and pass draws="
        )
    if given is None:
        check_simulates(trace, "the prior predictive", "sample the latent sites and pass draws=")
    _check_no_chains(given or {}, Layout.of(trace).shapes)
    runs = BatchedModel(free, args, kwargs, layout=Layout.of(trace))
    looped = runs.choose(given) == "loop"
    size = _LOOPS if looped else num_samples if given is None else _CHUNK
    parts: list[dict[str, Tensor]] = []
    try:
        for k in range(0, num_samples, size):
            piece = {site: value[k : k + size] for site, value in (given or {}).items()}
            parts.append(runs.run(piece, min(size, num_samples - k), measure=nothing).values)
    except KeyboardInterrupt as stop:
        if not parts:
            raise KeyboardInterrupt("interrupted before any draws were made: there are no draws yet") from None
        stopped_by(stop)
        done = sum(len(next(iter(part.values()))) for part in parts)
        warn_user(f"predictive: interrupted after {done} of {num_samples} draws, which are returned")
    return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}


def _check_no_chains(given: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    for name, value in given.items():
        if name in shapes and value.ndim == len(shapes[name]) + 2 and value.shape[2:] == shapes[name]:
            raise ValueError(
                f"draws[{name!r}], of shape {tuple(value.shape)}, has dimensions for chains and draws before those "
                f"of the site, {tuple(shapes[name])}: give draws= the Draws or the MCMC itself, or mcmc.get_samples(), "
                f"which has no dimension for chains"
            )


def _resampled(
    base: Callable[..., Any], call: TiltedCall, args: tuple[Any, ...], kwargs: Mapping[str, Any], num_samples: int
) -> dict[str, Tensor]:
    """Resample forward runs with weights ``exp(-E)``; element by element where all sites share free plates."""
    structure, energies = call.tilted.structure(*call.args, **call.kwargs), call.tilted.energies
    pool_size = max(_OVERSAMPLING * num_samples, _MIN_POOL)
    pool = _forward(base, args, kwargs, pool_size)
    plates = structure.free_plates(list(energies))
    if not all(plates.items() <= structure.plates[site].items() for site in structure.order):
        plates = {}
    # The positions of free plates differ between sites with different event shapes: move them to the front.
    event_dims = structure.layout.event_dims
    axes = {site: [dim - event_dims[site] for dim in plates.values()] for site in structure.order}
    front = {site: pool[site].movedim(axes[site], list(range(1, 1 + len(plates)))) for site in structure.order}
    sizes = next(iter(front.values())).shape[1 : 1 + len(plates)]
    log_weights: Any = 0.0
    for site, energy in energies.items():
        found = checked_energy(energy, pool[site], event_dims[site], f"site {site!r}")
        found = found.movedim(list(plates.values()), list(range(1, 1 + len(plates))))
        log_weights = log_weights - found.reshape(pool_size, sizes.numel(), -1).sum(-1)
    _check_weights(log_weights)
    index = torch.multinomial(log_weights.T.softmax(-1), num_samples, replacement=True).T
    copies = torch.arange(sizes.numel(), device=index.device)
    result = {}
    for site, values in front.items():
        chosen = values.reshape(len(values), sizes.numel(), *values.shape[1 + len(plates) :])[index, copies]
        chosen = chosen.reshape(num_samples, *values.shape[1:])
        result[site] = chosen.movedim(list(range(1, 1 + len(plates))), axes[site])
    return result


def _check_weights(log_weights: Tensor) -> None:
    peaks = log_weights.amax(0)
    if bool(log_weights.isnan().any()) or not bool(peaks.isfinite().all()):
        raise ValueError(
            "predictive draws of a tilted model: the weights exp(-E) of forward runs are NaN, infinite or all zero; "
            "the energy returns NaN, is unbounded below, or is +inf wherever the model puts its draws"
        )
    worst = int(log_weights.softmax(0).square().sum(0).argmax())
    weights = log_weights[:, worst]
    problem = weights_problem(psis(weights)[1], float(importance_ess(weights)), len(weights))
    if problem:
        warn_user(
            f"predictive draws of a tilted model: the weights exp(-E) of forward runs are not reliable ({problem}); "
            f"draw the tilted sites by MCMC and pass them as draws="
        )
