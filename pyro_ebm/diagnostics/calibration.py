"""Simulation-based calibration: does a sampler return the posterior of a model's own simulated data?"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_ebm.annotations import checked
from pyro_ebm.checks import whole_number
from pyro_ebm.deadline import interruptions_pass
from pyro_ebm.diagnostics.moments import component_names, components, is_exact, worth
from pyro_ebm.diagnostics.ranks import Calibration
from pyro_ebm.entry import entry
from pyro_ebm.errors import InferenceError, InferenceWarning, warn_user
from pyro_ebm.inference.draws import Draws
from pyro_ebm.inference.predictive import predictive
from pyro_ebm.keywords import model_arguments, passes_keywords
from pyro_ebm.modules import evaluation_mode
from pyro_ebm.randomness import fingerprint, forked_rng
from pyro_ebm.structure import (
    BatchedModel,
    Layout,
    check_simulates,
    latent_sites,
    observed_sites,
    prototype_trace,
    scaled_log_prob,
    tilted_call,
    untilted,
)
from pyro_ebm.tilts.tilt import tilt

__all__ = ["calibrate"]

LOG_LIKELIHOOD = "log_likelihood"
_BLOCK = 4  # of a tilted model: so few, resampled from a pool of thousands, hardly ever coincide
_GIVE_UP = 5
Quantity = Callable[[dict[str, Tensor]], Tensor]


@entry(gradients=True)
@passes_keywords()
@checked
def calibrate(
    model: Callable[..., Any],
    *args: Any,
    sampler: Callable[..., Draws],
    num_simulations: int = 100,
    num_draws: int = 99,
    observed: Sequence[str] = (),
    quantities: Mapping[str, Quantity] | None = None,
    seed: int | None = None,
    progress: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Calibration:
    r"""Simulate true values and data from a model, sample the posterior, and rank the truth among the draws.

    .. math:: \theta, y \sim p(\theta, y), \quad \theta_1, \dots, \theta_L \sim p(\theta \mid y)
       \quad\Rightarrow\quad \mathrm{rank}(\theta) \text{ uniform on } 0, \dots, L

    Chains are thinned to ``num_draws`` draws, or to their smallest effective sample size (bulk or tail) where
    that is less; weighted draws are resampled; ties are broken at random. Ranked are all components of the
    latent sites that vary and, where there are data, their ``"log_likelihood"``: it exposes a sampler that
    ignores the data, which no latent site alone does. Without data the sampler of the prior is tested.

    Args:
        model: any Pyro model, tilted or not; quickest where it broadcasts over an outer plate.
        *args: its arguments. Values of observed sites among them give the shapes only: they are simulated.
        sampler: called as ``sampler(conditioned_model, *args, seed=..., **kwargs)``, for example
            ``functools.partial(sample, method="nuts", progress=False)``; with ``model_kwargs=kwargs`` where the
            model has an argument ``seed``. The model is conditioned on the
            simulated data, and an argument that is itself an observed value is replaced by them. Let it return
            a few times ``num_draws`` effective draws.
        num_simulations: data sets, one run of the sampler each.
        num_draws: L. 99 resolves ranks to a hundredth.
        observed: names of sites that are data although ``model(*args)`` does not observe them
            (``model(x=None)``); those that it observes need not be named.
        quantities: name -> function of ``{site: (draw, *site_shape)}``, data included, to (draw,).
        seed: a number for the same result twice; ``None`` takes one from the global generator.
        progress: show a progress bar.
        model_kwargs: the model's keyword arguments, whatever their names.
        **kwargs: the same, where no option has their name.

    Returns:
        Ranks with their test. Ctrl-C returns the simulations so far.

    Raises:
        TypeError: if the sampler does not return ``Draws``.
        ValueError: numbers below 1, unknown sites, draws that do not fit the model.
        InferenceError: if the sampler fails in each of the first simulations.

    Warns:
        InferenceWarning: if simulations failed, were interrupted, or kept few draws.

    Reference:
        Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian inference algorithms with
        simulation-based calibration; Modrak et al. (2023), SBC checking using data-dependent test quantities.
    """
    _check_options(sampler, num_simulations, num_draws, quantities)
    start = time.perf_counter()
    seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
    study = _Study(model, sampler, (args, dict(model_kwargs or {})), observed, quantities or {})
    record = _simulate(study, num_simulations, num_draws, seed=seed, progress=progress)
    moving = torch.stack([outcome.moves for outcome in record.outcomes]).any(0)
    ranks = torch.stack([outcome.ranks for outcome in record.outcomes], 1)
    result = Calibration(
        {name: row for name, row, moves in zip(study.names, ranks, moving, strict=True) if moves},
        num_draws,
        torch.tensor([outcome.kept for outcome in record.outcomes], device="cpu"),
        failures=record.failures,
        warned=record.warned,
        interrupted=record.interrupted,
        seconds=time.perf_counter() - start,
    )
    _report(result)
    return result


def _check_options(sampler: Any, num_simulations: int, num_draws: int, quantities: Any) -> None:
    if not callable(sampler):
        raise TypeError(
            f"sampler must be callable as sampler(model, *args, seed=...), got {type(sampler).__name__}"
        )
    for name, value in {"num_simulations": num_simulations, "num_draws": num_draws}.items():
        whole_number(name, value)
    if not isinstance(quantities or {}, Mapping):
        raise TypeError(f"quantities must be a mapping {{name: function}}, got {type(quantities).__name__}")


class _Outcome(NamedTuple):
    """One simulation: rank of each quantity, whether it varied, draws kept, whether the sampler was stopped."""

    ranks: Tensor
    moves: Tensor
    kept: int
    interrupted: bool


@dataclass
class _Record:
    """What the simulations so far have left."""

    outcomes: list[_Outcome] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    warned: dict[int, str] = field(default_factory=dict)
    interrupted: bool = False


class _FailedError(Exception):
    """One simulation has no ranks; the text says why."""


def _simulate(
    study: _Study, num_simulations: int, num_draws: int, *, seed: int, progress: bool
) -> _Record:
    from tqdm.auto import tqdm

    record = _Record()
    truths = study.truths(num_simulations, seed)
    with _inference_warnings() as heard:
        for index in tqdm(range(num_simulations), desc="calibrate", unit="simulation", disable=not progress):
            before = len(heard)
            try:
                outcome = study.run(next(truths), num_draws, fingerprint((), seed, "sampler", index) % 2**31)
            except _FailedError as error:
                record.failures[index] = str(error)
                if not record.outcomes and len(record.failures) >= min(_GIVE_UP, num_simulations):
                    raise InferenceError(
                        f"the sampler failed in each of the first {len(record.failures)} simulations; "
                        f"{_first(record.failures)}"
                    ) from error
                continue
            except KeyboardInterrupt:
                if not record.outcomes:
                    raise
                record.interrupted = True
                break
            record.outcomes.append(outcome)
            if len(heard) > before:
                record.warned[index] = heard[before]
            if outcome.interrupted and index + 1 < num_simulations:
                record.interrupted = True
                break
    return record


def _first(found: Mapping[int, str]) -> str:
    index, text = next(iter(found.items()))
    return f"simulation {index}: {text}"


def _report(result: Calibration) -> None:
    """One warning for all that makes the ranks less than they seem."""
    problems = []
    if result.interrupted:
        problems.append(f"interrupted after {result.num_simulations} simulations")
    if result.failures:
        problems.append(
            f"{len(result.failures)} simulations failed and have no ranks, so that data on which the sampler works "
            f"are over-represented ({_first(result.failures)})"
        )
    if result.warned:
        problems.append(f"the sampler warned in {len(result.warned)} simulations ({_first(result.warned)})")
    if float(result.kept.double().median()) < result.num_draws / 2:
        problems.append(
            f"the truth was ranked among {int(result.kept.median())} draws in the median and not "
            f"{result.num_draws}, the smallest effective sample size: run the sampler longer, or lower num_draws"
        )
    if problems:
        warn_user("calibration: " + "; ".join(problems))


@contextmanager
def _inference_warnings() -> Iterator[list[str]]:
    """The texts of :class:`InferenceWarning`, which are not shown; other warnings go their usual way."""
    heard: list[str] = []
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def listen(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if issubclass(category, InferenceWarning):
                heard.append(str(message))
            else:
                usual(message, category, *place, **options)

        warnings.showwarning = listen  # type: ignore[assignment]  # put back by catch_warnings
        warnings.simplefilter("always", InferenceWarning)
        yield heard


class _Study:
    """A model ready to be simulated from, conditioned on what was simulated, and ranked."""

    def __init__(
        self,
        model: Callable[..., Any],
        sampler: Callable[..., Draws],
        call: tuple[tuple[Any, ...], Mapping[str, Any]],
        observed: Sequence[str],
        quantities: Mapping[str, Quantity],
    ) -> None:
        self.model, self.sampler, self.call, self.quantities = model, sampler, call, quantities
        self.base, self.tilted = untilted(model), tilted_call(model)
        trace = prototype_trace(self.base, *call)
        check_simulates(trace, "simulation-based calibration", "give the site a proper prior", scales=True)
        self.given = observed_sites(trace)
        random = [*latent_sites(trace), *self.given]
        wrong = [name for name in observed if name not in random]
        if isinstance(observed, str) or wrong:
            raise ValueError(f"observed must be a list of the model's sites {random}, got {observed!r}")
        self.data = [name for name in random if name in self.given or name in observed]
        self.latent = [name for name in random if name not in self.data]
        if not self.latent:
            raise ValueError("the model has no latent sample sites: there is nothing to rank")
        self.likelihood = BatchedModel(self.base, *call, layout=Layout.of(trace), returned=())
        self.names: list[str] = []

    def truths(self, num: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """``num`` draws of the joint prior predictive, one after the other."""
        args, kwargs = self.call
        size = num if self.tilted is None else _BLOCK
        for start in range(0, num, size):
            stream = fingerprint((), seed, "truth", start)
            with interruptions_pass():
                many = predictive(
                    self.model, *args, num_samples=min(size, num - start), seed=stream, model_kwargs=kwargs
                )
            for index in range(min(size, num - start)):
                yield {name: many[name][index] for name in [*self.latent, *self.data]}

    def run(self, truth: Mapping[str, Tensor], num_draws: int, seed: int) -> _Outcome:
        """Sample the posterior of one simulated data set and rank the truth."""
        generator = torch.Generator().manual_seed(seed)
        with forked_rng(seed):
            draws = self._posterior(truth, seed)
            values = _independent_draws(draws, [s for s in self.latent if s in draws.values], num_draws, generator)
            names, table = self._table(truth, values)
        if not bool(table.isfinite().all()):
            bad = [name for name, column in zip(names, table.T, strict=True) if not column.isfinite().all()]
            raise _FailedError(f"values of {', '.join(bad[:3])} are not finite")
        if self.names and names != self.names:
            raise ValueError(f"sampler must return the same sites each time, got {names} after {self.names}")
        self.names = names
        ranks = _ranks(table[0], table[1:], num_draws, generator)
        moves = (table != table[0]).any(0)
        return _Outcome(ranks, moves, len(table) - 1, bool(draws.notes.get("interrupted", False)))

    def _posterior(self, truth: Mapping[str, Tensor], seed: int) -> Draws:
        data = {name: truth[name] for name in self.data}
        args, kwargs = tree_map(lambda leaf: self._simulated(leaf, data), self.call)
        try:
            draws = self.sampler(self._conditioned(data), *args, seed=seed, **self._for_sampler(kwargs))
        except Exception as error:  # whatever goes wrong for these data is a finding about the sampler
            raise _FailedError(f"{type(error).__name__}: {error}") from error
        if not isinstance(draws, Draws):
            raise TypeError(f"sampler must return Draws, got {type(draws).__name__}")
        found = {name: tuple(draws.values[name].shape[2:]) for name in self.latent if name in draws.values}
        due = {name: tuple(truth[name].shape) for name in self.latent}
        if not found or any(due[name] != shape for name, shape in found.items()):
            raise ValueError(f"sampler must return draws of the model's latent sites {due}, got {draws!r}")
        return draws

    def _for_sampler(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A model with a ``seed`` of its own shares the name with the sampler's option."""
        args, _ = self.call
        return {"model_kwargs": kwargs} if "seed" in model_arguments(self.model, len(args)).names else kwargs

    def _conditioned(self, data: dict[str, Tensor]) -> Callable[..., Any]:
        if not data:
            return self.model
        conditioned = poutine.condition(self.base, data=data)
        if self.tilted is None:
            return conditioned
        return tilt(conditioned, self.tilted.tilted.energies, normalize=False)  # log Z does not depend on the data

    def _simulated(self, leaf: Any, data: Mapping[str, Tensor]) -> Any:
        """The simulated data in place of an argument that the model observes: a guide reads the argument."""
        for name, value in self.given.items():
            if isinstance(leaf, Tensor) and leaf.numel() and leaf.numel() == value.numel():
                if leaf.data_ptr() == value.data_ptr() and leaf.dtype == value.dtype:
                    return data[name].reshape(leaf.shape)
        return leaf

    def _table(self, truth: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> tuple[list[str], Tensor]:
        """All quantities side by side: the truth in row 0, a draw in each further one."""
        rows = {name: torch.cat([truth[name][None].to(value), value]) for name, value in values.items()}
        merged = Draws({name: value[None] for name, value in rows.items()}, "calibration")
        names, columns = component_names(merged, rows), [components(merged, rows)[0]]
        count = len(columns[0])
        everything = rows | {name: truth[name].expand(count, *truth[name].shape) for name in self.data}
        functions = dict(self.quantities)
        if self.data and len(values) == len(self.latent):
            functions[LOG_LIKELIHOOD] = self._log_likelihood
        for name, function in functions.items():
            column = torch.as_tensor(function(everything))
            if name in names or column.shape != (count,):
                raise ValueError(
                    f"quantities[{name!r}] must have a name of its own and return one number per draw, shape "
                    f"({count},), got {tuple(column.shape)}"
                )
            names.append(name)
            columns.append(column.detach().cpu().double()[:, None])
        return names, torch.cat(columns, 1)

    @torch.no_grad()
    def _log_likelihood(self, values: dict[str, Tensor]) -> Tensor:
        """Log density of the data given each draw, (draw,)."""
        with evaluation_mode(self.base):
            return self.likelihood.run(values, measure=self._log_prob_of_data).total

    def _log_prob_of_data(self, name: str, site: Mapping[str, Any]) -> Tensor | None:
        return scaled_log_prob(site) if name in self.data else None


def _independent_draws(
    draws: Draws, sites: list[str], num_draws: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Site -> (draw, *site_shape), at most ``num_draws`` and at most as many as the draws are worth."""
    total = draws.num_chains * draws.num_draws
    kept = max(min(num_draws, total, _worth(draws, sites)), 1)
    if draws.log_weights is None:
        index = ((torch.arange(kept) + 0.5) * total / kept).long()
    else:
        if not bool(draws.weights.isfinite().all()):
            raise _FailedError("the weights are not finite")
        index = torch.multinomial(draws.weights.cpu(), kept, replacement=True, generator=generator)
    return {site: draws.flat(site)[index.to(draws.values[site].device)].detach() for site in sites}


def _worth(draws: Draws, sites: list[str]) -> int:
    """Effective number of draws of the worst component."""
    if is_exact(draws):  # a grid: as many as one likes
        return draws.num_draws
    x = components(draws, sites)
    known = worth(draws, x)
    sizes = torch.cat([known.bulk, known.tail])
    sizes = sizes[sizes.isfinite()]
    return int(sizes.min() + 1e-6) if len(sizes) else draws.num_chains  # too short to tell, or stuck: one a chain


def _ranks(truth: Tensor, draws: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """Rank of each column's truth among its draws, ties broken at random, on the scale 0, ..., ``num_draws``."""
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    first, second = torch.rand(2, len(truth), generator=generator, dtype=torch.float64, device="cpu")
    ranks = below + (first * (ties + 1)).long()
    if len(draws) == num_draws:
        return ranks
    # uniform on a coarser scale: (rank + U) / (kept + 1) is uniform on (0, 1), and so uniform on any scale
    return ((ranks + second) / (len(draws) + 1) * (num_draws + 1)).long()
