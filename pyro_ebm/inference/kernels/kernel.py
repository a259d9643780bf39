"""What the batched Markov kernels share: state, what a step reports, and their target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.entry import entry
from pyro_ebm.inference.density.log_density import LogDensity
from pyro_ebm.inference.density.model_target import VECTORIZE
from pyro_ebm.inference.kernels.pyro_options import Adapted, Blocks, check_full_mass, warn_of_ignored

if TYPE_CHECKING:
    from pyro_ebm.inference.kernels.one_chain import OneChain

__all__ = ["MAX_ENERGY_ERROR", "Info", "Kernel", "State", "Step", "Tuning", "ValueAndGrad", "uniforms"]

ValueAndGrad = Callable[[Tensor], tuple[Tensor, ...]]
MAX_ENERGY_ERROR = 1000.0  # as Stan: a trajectory this far off no longer follows the dynamics


class Tuning(NamedTuple):
    """What adaptation sets and a step reads.

    Args:
        step_size: (*batch,).
        inverse_mass: (*batch, dim), diagonal: the scale of each coordinate, squared.
        trajectory_length: 0-d, in units of the coordinates' scales.
        factor: (*batch, dim, dim), lower Cholesky factor of a dense inverse mass, whose diagonal ``inverse_mass``
            then is; ``None`` where it is diagonal.
    """

    step_size: Tensor
    inverse_mass: Tensor
    trajectory_length: Tensor
    factor: Tensor | None = None


class State(NamedTuple):
    """What the next step needs.

    Args:
        u: (chains, *batch, dim) points in unconstrained space.
        log_prob: (chains, *batch).
        grad: (chains, *batch, dim).
        tuning: of the kernel.
        iteration: steps taken.
    """

    u: Tensor
    log_prob: Tensor
    grad: Tensor
    tuning: Tuning
    iteration: int = 0


class Info(NamedTuple):
    """What diagnostics and adaptation need of a step.

    Args:
        acceptance_rate: (chains, *batch), the probability of acceptance.
        diverging: (chains, *batch), the energy error was above 1,000 or not finite.
        energy: (chains, *batch), of the state at the start of the step, momentum included.
        n_steps: gradient evaluations per chain.
        proposal: (chains, *batch, dim).
        velocity: (chains, *batch, dim) at the proposal, in units of the coordinates' scales.
        time: (*batch,), length of the trajectory.
    """

    acceptance_rate: Tensor
    diverging: Tensor
    energy: Tensor
    n_steps: int
    proposal: Tensor
    velocity: Tensor
    time: Tensor


Step = Callable[[State], tuple[State, Info]]


@dataclass(eq=False, repr=False)
class Kernel(ABC):
    """A Markov kernel that moves many chains at once.

    The arguments are those of Pyro's kernels. After a run by :class:`MCMC`, ``step_size``, ``transforms``,
    ``inverse_mass_matrix`` and ``initial_params`` say what the warm-up found; the next run begins from what was given.

    Args:
        model: a Pyro model, a distribution, or a :class:`LogDensity`.
        potential_fn: instead of a model, minus a log density: maps ``{name: value}``, the values of one chain in
            unconstrained space, to a number. Their shapes come from ``MCMC(initial_params=...)``.
        step_size: to start from; a search finds one when ``None``.
        adapt_step_size: adapt it during warm-up, over all chains, one for each element of an independent plate.
        adapt_mass_matrix: scale coordinates by their standard deviation over all chains.
        full_mass: learn covariances too: of all coordinates (``True``), or within blocks, a list of tuples of
            site names.
        transforms: site -> transform to unconstrained space, instead of the one its support has; with
            ``potential_fn``, what moves the draws back.
        max_plate_nesting: as many dimensions, from the right, are left to plates; more than the model's plates use.
        target_accept_prob: what the step size is adapted to.
        init_strategy: where chains start, one of ``pyro.infer.autoguide.init_to_*``; :class:`MCMC` chooses
            when ``None``.
        jit_compile, jit_options, ignore_jit_warnings, use_multinomial_sampling, max_tree_depth, min_stepsize,
            max_stepsize: accepted and, with a warning, ignored.
        independent: name of a plate of the model whose elements are targets of their own, each with its
            own acceptance and step size.
        vectorize: how the model is run on many chains; see :meth:`LogDensity.from_model`.

    Raises:
        ValueError: model and potential_fn both given, or neither; an option out of range.
        TypeError: a model that cannot be called.
    """

    model: Any = None
    potential_fn: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    step_size: float | None = cast(Any, Adapted())  # noqa: RUF009  (a descriptor is meant to be shared)
    _: KW_ONLY
    adapt_step_size: bool = True
    adapt_mass_matrix: bool = True
    full_mass: bool | list[tuple[str, ...]] = False
    transforms: Mapping[str, Any] | None = cast(Any, Adapted())  # noqa: RUF009
    max_plate_nesting: int | None = None
    target_accept_prob: float = 0.8
    init_strategy: Callable[..., Any] | None = None
    jit_compile: bool = False
    jit_options: dict[str, Any] | None = None
    ignore_jit_warnings: bool = False
    use_multinomial_sampling: bool = True
    max_tree_depth: int = 10
    min_stepsize: float = 1e-10
    max_stepsize: float = 1e10
    independent: str | None = None
    vectorize: str = "auto"

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if (self.model is None) == (self.potential_fn is None):
            raise ValueError("give one of model and potential_fn, not both and not neither")
        if not callable(self.target) and not isinstance(self.target, Distribution):
            raise TypeError(
                f"model must be a Pyro model, a distribution or a LogDensity, got {type(self.target).__name__}"
            )
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be positive and finite, got {self.step_size}")
        if not 0 < self.target_accept_prob < 1:
            raise ValueError(f"target_accept_prob must lie between 0 and 1, got {self.target_accept_prob}")
        if self.vectorize not in VECTORIZE:
            raise ValueError(f"vectorize must be one of {VECTORIZE}, got {self.vectorize!r}")
        check_full_mass(self.full_mass)
        warn_of_ignored(self)

    def __repr__(self) -> str:
        """One line: the model and the options that were set, as they were given."""
        options = {field.name: field.default for field in fields(self) if field.name not in ("model", "potential_fn")}
        given = {name: self.__dict__[name] for name, default in options.items() if self.__dict__[name] != default}
        shown = [f"{name}={_in_a_line(value)}" for name, value in given.items()]
        model = getattr(self.target, "__name__", type(self.target).__name__)
        return f"{type(self).__name__}({', '.join([model, *shown])})"

    @property
    def target(self) -> Any:
        """The model, or the potential."""
        return self.model if self.potential_fn is None else self.potential_fn

    @property
    def given_step_size(self) -> float | None:
        """The step size as given, whatever a run has found since."""
        return cast("float | None", self.__dict__["step_size"])

    @property
    def given_transforms(self) -> Mapping[str, Any] | None:
        """The transforms as given."""
        return cast("Mapping[str, Any] | None", self.__dict__["transforms"])

    @property
    def inverse_mass_matrix(self) -> dict[tuple[str, ...], Tensor]:
        """What the last run found, as in Pyro: site names -> (size,), or (size, size) for a dense block."""
        return self._of_last_run("inverse_mass_matrix")

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where the chains of the last run started: site -> (num_chains, *shape), unconstrained; (shape) for one chain.

        Set it before :meth:`setup` to start there.
        """
        return self._of_last_run("initial_params")

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor]) -> None:
        self.remember(initial_params=params, start=params)

    def _of_last_run(self, name: str) -> Any:
        if name not in self.__dict__.get("_found", {}):
            raise AttributeError(f"{name} is known after a run: call MCMC(kernel, ...).run() or setup() first")
        return self.__dict__["_found"][name]

    def remember(self, **found: Any) -> None:
        """What a run found, for users to read; no run begins from it."""
        self.__dict__.setdefault("_found", {}).update(found)

    @entry(gradients=True)
    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Get ready to move a single chain by hand, as Pyro's kernels do: then :meth:`sample`.

        Args:
            warmup_steps: so many first steps adapt the kernel.
            *args: arguments of the model.
            **kwargs: its keyword arguments.
        """
        from pyro_ebm.inference.kernels.one_chain import OneChain

        chain = OneChain(self, warmup_steps, args, kwargs, self.__dict__.get("_found", {}).get("start"))
        self.remember(initial_params=chain.start, chain=chain, **chain.found())

    @entry(gradients=True)
    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step of the single chain, from unconstrained values by site to the next ones; :meth:`setup` first."""
        chain: OneChain = self._of_last_run("chain")
        moved = chain.step(params)
        self.remember(**chain.found())
        return moved

    __call__ = sample

    def clear_cache(self) -> None:
        """Compute the density anew at the next :meth:`sample`."""
        self._of_last_run("chain").forget()

    def cleanup(self) -> None:
        """Forget the chain that :meth:`setup` made."""
        for name in ("chain", "start"):
            self.__dict__.get("_found", {}).pop(name, None)

    def blocks(self, density: LogDensity) -> Blocks:
        """The dense blocks of the mass matrix of a density."""
        return Blocks({name: shape.numel() for name, shape in density.shapes.items()}, self.full_mass)

    def density(self, *args: Any, **kwargs: Any) -> LogDensity:
        """The target for these arguments of the model."""
        if self.potential_fn is not None:
            raise ValueError(
                "a kernel of potential_fn= has no shapes of its own: run it by MCMC(kernel, initial_params=...)"
            )
        if isinstance(self.model, LogDensity | Distribution):
            if args or kwargs:
                raise ValueError(
                    f"the target of this kernel is a {type(self.target).__name__}, which takes no arguments; give "
                    f"the model itself to the kernel, or leave the arguments out"
                )
            if self.independent is not None:
                raise ValueError("independent= belongs to a model: use LogDensity.from_model(model, independent=...)")
            return self.model if isinstance(self.model, LogDensity) else LogDensity.from_distribution(self.model)
        return LogDensity.from_model(
            self.model,
            *args,
            independent=self.independent,
            vectorize=self.vectorize,
            transforms=self.given_transforms,
            max_plate_nesting=self.max_plate_nesting,
            model_kwargs=kwargs,
        )

    def initial_step_size(self, dim: int) -> float:
        """Where the search for a step size begins, for coordinates of unit scale."""
        return float(dim) ** -0.25

    def leapfrog_length(self, step_size: Tensor) -> Tensor:
        """The leapfrog step that belongs to a step size."""
        return step_size

    def initial_trajectory_length(self) -> float:
        """Where the adaptation of the trajectory length begins."""
        return 1.0

    def average_acceptance(self, acceptance_rate: Tensor) -> Tensor:
        """The statistic over chains that ``target_accept_prob`` is about, (chains, *batch) to (*batch,)."""
        return acceptance_rate.mean(0)

    @abstractmethod
    def bind(self, value_and_grad: ValueAndGrad, generator: torch.Generator) -> Step:
        """The kernel on a density: ``step(state) -> (state, info)``, without side effects but on the generator.

        Args:
            value_and_grad: maps (chains, *batch, dim) to log densities (chains, *batch) and gradients.
            generator: source of all randomness.
        """


def _in_a_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {type(each).__name__}' for name, each in value.items())}}}"
    if callable(value):
        return str(getattr(value, "__name__", type(value).__name__))
    return " ".join(repr(value).split())


def uniforms(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers of the shape of ``like``."""
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def normals(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape of ``like``."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def transition(
    state: State, end: tuple[Tensor, Tensor, Tensor], log_ratio: Tensor, accepted: Tensor
) -> tuple[State, Tensor]:
    """The state after a proposal that some chains take, and which chains diverged.

    Args:
        state: before.
        end: proposed points, their log densities and gradients.
        log_ratio: log of the Metropolis ratio, (chains, *batch); NaN where the proposal is out of bounds.
        accepted: which chains take it.
    """
    possible = log_ratio.isfinite()  # an infinite density, once entered, is never left
    diverging = ~(possible & (log_ratio > -MAX_ENERGY_ERROR))
    accepted = accepted & possible
    u, log_prob, grad = end
    moved = accepted[..., None]
    after = State(
        torch.where(moved, u, state.u),
        torch.where(accepted, log_prob, state.log_prob),
        torch.where(moved, grad, state.grad),
        state.tuning,
        state.iteration + 1,
    )
    return after, diverging
