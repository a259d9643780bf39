"""Good calls of every public name, and bad values for each of their arguments: what `test_bad_calls.py` tries.

`python -m tests.bad_calls 1000 [seed]` tries so many and prints what was no error that names its argument.
"""

from __future__ import annotations

import collections
import inspect
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_ebm as pe
from tests.alarm import alarm

SECONDS = 8
_FOLDER = Path(tempfile.mkdtemp(prefix="bad-calls-"))
BASE = dist.Normal(torch.zeros(2), 1.0).to_event(1)
Y = torch.tensor([0.5, 1.0, -0.3])


def model(y: Tensor = Y) -> None:
    """Normal means."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def prior(x: Tensor | None = None) -> None:
    """A root site alone."""
    pyro.sample("z", BASE)


def simulator() -> None:
    """Data that can be simulated."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0))


def density() -> pe.LogDensity:
    """A standard Gaussian."""
    return pe.LogDensity(lambda u: -u.square().sum(-1) / 2, 2)


def vae() -> pe.VAE:
    """A small one."""
    return pe.VAE((2,), 1, hidden=(2,))


def tilted() -> Any:
    """A tilt of a small VAE."""
    return pe.tilt(VAE_.model, {"z": pe.MLPEnergy((1,), hidden=(2,))})


VAE_ = vae()
X = torch.rand(12, 2)
DRAWS = pe.Draws({"mu": torch.randn(2, 20)}, "nuts").with_model(model, Y)
DECENTERED = pe.Draws({"mu_decentered": torch.randn(2, 5)}, "nuts")
OTHER = pe.Draws({"mu": torch.randn(2, 20)}, "chees")
IMAGES = pe.ImageSet(torch.rand(40, 2, 2), torch.arange(40) % 2)
BALANCE = pe.class_balance(torch.tensor([0, 1, 1, 0]), (0, 1), num_bootstrap=10)


class Good(NamedTuple):
    """A call that works.

    Args:
        function: to call.
        args: by position, or by name where they have one.
        keywords: that make it fast; other arguments keep their defaults.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = {}


def _ran(kernel: type) -> Callable[..., Any]:
    """A kernel's arguments count where it is used at the latest."""
    def call(**options: Any) -> Any:
        if not {"model", "potential_fn"} & options.keys():
            options["model"] = density()
        made = kernel(**options)
        pe.MCMC(made, num_samples=2, warmup_steps=2, num_chains=2, seed=0, progress=False, init="prior").run()
        return made

    call.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    return call


def _fitted(objective: type) -> Callable[..., Any]:
    def call(**options: Any) -> Any:
        return pe.fit(
            tilted(), VAE_.guide, X, objective=objective(**options), epochs=1, seed=0, progress=False, validation=None
        )

    call.__signature__ = inspect.signature(objective)  # type: ignore[attr-defined]
    return call


def _elbo(m: Any, g: Any, *batch: Any) -> Any:
    return Trace_ELBO().differentiable_loss(m, g, *batch)


def _smc(target: Any = None, **options: Any) -> Any:
    return pe.SMC(target, **options).run()


_smc.__signature__ = inspect.signature(pe.SMC)  # type: ignore[attr-defined]


def _mcmc(kernel: Any = None, **options: Any) -> Any:
    return pe.MCMC(kernel, **options).run()


_mcmc.__signature__ = inspect.signature(pe.MCMC)  # type: ignore[attr-defined]


def _annealing(**options: Any) -> Any:
    fast = {"particles_per_island": 16, "num_islands": 2, "seed": 0, "progress": False}
    return pe.SMC(density(), annealing=pe.Annealing(**{"base": BASE, **options}), **fast).run()


_annealing.__signature__ = inspect.signature(pe.Annealing)  # type: ignore[attr-defined]


_CHAINS = {"num_samples": 4, "num_chains": 2, "seed": 0}
_QUIET = {"seed": 0, "progress": False}
# Made by the library and read by users, or without arguments: nothing is checked that a user would give.
RECORDS = {
    *("BoundedEstimate", "Estimate", "FitResult", "MomentFit", "StudyResult", "DebiasResult", "ClassBalance"),
    *("Calibration", "DensityRatio", "LabelClassifier", "EpochEnd", "Energy", "TiltELBO"),
    *("ObservedTiltLikelihood", "BiasedSplit", "TiltedModel", "__version__"),
    *("InputError", "ImproperError"),
    *("CheckpointError", "InfeasibleError", "InferenceError", "InferenceWarning", "TrainingWarning"),
    *("plot_debias_study", "debias", "debias_study"),  # whole jobs: their configurations are tried
}


def good_calls() -> dict[str, Good]:
    """By public name; all but the :data:`RECORDS`."""
    weights = pe.LinearEnergy([1.0])
    pe.save_weights(weights, _FOLDER / "w.pt")
    pe.save_arviz(pe.to_arviz(OTHER), _FOLDER / "d.nc")
    cheap_moments = {"num_samples": 640, "seed": 0}
    stock = {"num_samples": 2, "warmup_steps": 2, "num_chains": 1, "init": "uniform", **_QUIET}
    images = {"root": _FOLDER, "download": False}  # nothing is fetched: of `download` other values are not tried
    result = pe.FitResult([1.0, 0.5], [1.0, 0.6], 2, 2, "epochs", 0.1, 0)
    calibration = pe.calibrate(
        simulator, sampler=_sampler, num_simulations=6, num_draws=9, observed=["y"], seed=0, progress=False
    )
    return {
        "Annealing": Good(_annealing),
        "ChEES": Good(_ran(pe.ChEES)),
        "HMC": Good(_ran(pe.HMC), (), {"num_steps": 2}),
        "MALA": Good(_ran(pe.MALA)),
        "ULA": Good(_ran(pe.ULA)),
        "EachStep": Good(pe.EachStep, (), {"make": torch.optim.lr_scheduler.ExponentialLR}),
        "Weighted": Good(pe.Weighted, (), {"data": X, "weights": torch.ones(12)}),
        "Batches": Good(pe.Batches, (), {"size": 4}),
        "Average": Good(pe.Average),
        "Validation": Good(pe.Validation),
        "Checkpoint": Good(pe.Checkpoint, (), {"path": _FOLDER / "run.pt"}),
        "ContrastiveDivergence": Good(_fitted(pe.ContrastiveDivergence), (), {"num_steps": 2}),
        "ConvDecoder": Good(pe.ConvDecoder, (), {"latent_dim": 2, "event_shape": (1, 8, 8), "hidden": (4, 2)}),
        "ConvEncoder": Good(pe.ConvEncoder, (), {"event_shape": (1, 8, 8), "latent_dim": 2, "hidden": (2, 4)}),
        "ConvEnergy": Good(pe.ConvEnergy, (), {"event_shape": (1, 8, 8), "channels": (2, 4)}),
        "DebiasConfig": Good(pe.DebiasConfig),
        "Draws": Good(pe.Draws, (), {"values": {"mu": torch.randn(2, 5)}, "method": "mine"}),
        "FirstOrder": Good(_fitted(pe.FirstOrder)),
        "GaussianMixture2D": Good(pe.GaussianMixture2D),
        "ImageSet": Good(pe.ImageSet, (), {"images": torch.rand(4, 2, 2), "labels": torch.arange(4)}),
        "LinearEnergy": Good(pe.LinearEnergy, (), {"a": [1.0, 2.0]}),
        "LogDensity": Good(pe.LogDensity, (), {"log_prob": lambda u: u.sum(-1), "dim": 2}),
        "MCMC": Good(_mcmc, (), {
            "kernel": pe.MALA(density()), "warmup_steps": 2, **_CHAINS, **_QUIET, "init": "prior"}),
        "MLPDecoder": Good(pe.MLPDecoder, (), {"latent_dim": 1, "event_shape": (2,), "hidden": (2,)}),
        "MLPEncoder": Good(pe.MLPEncoder, (), {"event_shape": (2,), "latent_dim": 1, "hidden": (2,)}),
        "MLPEnergy": Good(pe.MLPEnergy, (), {"event_shape": (2,), "hidden": (2,)}),
        "MomentEnergy": Good(pe.MomentEnergy, (), {"features": lambda z: z}),
        "NoiseContrastive": Good(_fitted(pe.NoiseContrastive)),
        "Normalizer": Good(pe.Normalizer),
        "QuadraticEnergy": Good(pe.QuadraticEnergy, (), {"c": 1.0}),
        "ReconstructionEnergy": Good(pe.ReconstructionEnergy, (), {"energy": weights, "vae": VAE_}),
        "ReplayBuffer": Good(pe.ReplayBuffer),
        "CapturedLoss": Good(pe.CapturedLoss),
        "RunningControl": Good(pe.RunningControl, (), {"objective": pe.TiltELBO()}),
        "SMC": Good(_smc, (), {"target": density(), "particles_per_island": 16, "num_islands": 2, **_QUIET,
                               "annealing": pe.Annealing(base=BASE)}),
        "SamplingBound": Good(_fitted(pe.SamplingBound), (), {"num_proposals": 8}),
        "ShortRun": Good(_fitted(pe.ShortRun), (), {"prior_steps": 2, "posterior_steps": 2}),
        "StudyConfig": Good(pe.StudyConfig),
        "TiltLikelihood": Good(pe.TiltLikelihood, (), {"base": BASE}),
        "TiltedDistribution": Good(pe.TiltedDistribution, (), {"base": BASE, "energy": pe.QuadraticEnergy(1.0)}),
        "VAE": Good(pe.VAE, (), {"event_shape": (2,), "latent_dim": 1, "hidden": (2,)}),
        "annealed_importance": Good(
            pe.annealed_importance, (density(),),
            {"chains_per_group": 4, "num_groups": 2, "num_temperatures": 4, **_QUIET,
             "annealing": pe.Annealing(base=BASE)},
        ),
        "biased_split": Good(pe.biased_split, (), {
            "x": torch.rand(400, 2), "y": torch.arange(400) % 2, "proportions": (0.3, 0.7), "fraction": 0.5}),
        "calibrate": Good(pe.calibrate, (simulator,), {
            "sampler": _sampler, "num_simulations": 3, "num_draws": 9, "observed": ["y"], **_QUIET}),
        "centered": Good(pe.centered, (pe.noncentered(model), DECENTERED)),
        "class_balance": Good(pe.class_balance, (), {
            "labels": torch.tensor([0, 1, 1]), "classes": (0, 1), "num_bootstrap": 5}),
        "class_diversity": Good(pe.class_diversity, (), {
            "images": IMAGES.images, "labels": IMAGES.labels, "real_images": IMAGES.images,
            "real_labels": IMAGES.labels, "classes": (0, 1)}),
        "compare": Good(pe.compare, (), {"draws": {"a": DRAWS, "b": OTHER}}),
        "density_ratio": Good(pe.density_ratio, (), {"numerator": torch.rand(30, 2), "denominator": torch.rand(30, 2)}),
        "digits": Good(pe.digits),
        "fairness_discrepancy": Good(pe.fairness_discrepancy, (), {"p": torch.tensor([0.2, 0.8])}),
        "fashion_mnist": Good(pe.fashion_mnist, (), images),
        "kmnist": Good(pe.kmnist, (), images),
        "mnist": Good(pe.mnist, (), images),
        "fit": Good(pe.fit, (), {"model": VAE_.model, "guide": VAE_.guide, "data": X, "epochs": 1, **_QUIET}),
        "fit_moments": Good(pe.fit_moments, (), {
            "base": BASE, "energy": pe.MomentEnergy(lambda z: z), "target": [0.1, 0.1], **cheap_moments}),
        "fit_tilt": Good(pe.fit_tilt, (), {
            "model": tilted(), "guide": VAE_.guide, "x": X, "max_steps": 2, "folds": 0, "num_particles": 2, **_QUIET}),
        "gaussian_log_normalizer": Good(pe.gaussian_log_normalizer, (), {
            "energy": pe.LinearEnergy([1.0, 2.0]), "loc": torch.zeros(2), "scale": torch.ones(2)}),
        "importance": Good(pe.importance, (model,), {"num_samples": 200, "seed": 0}),
        "load_arviz": Good(pe.load_arviz, (), {"path": _FOLDER / "d.nc"}),
        "load_weights": Good(pe.load_weights, (), {"module": weights, "path": _FOLDER / "w.pt"}),
        "log_likelihood": Good(pe.log_likelihood, (), {
            "model": VAE_.model, "guide": VAE_.guide, "x": X, "num_samples": 20, "seed": 0}),
        "log_normalizer": Good(pe.log_normalizer, (), {
            "base": BASE, "energy": pe.QuadraticEnergy(0.1), "num_samples": 256, "seed": 0}),
        "marginal_density": Good(pe.marginal_density, (), {"vae": pe.VAE((2,), 1, "gaussian", hidden=(2,))}),
        "mean_confidence": Good(pe.mean_confidence, (), {"probabilities": torch.tensor([[0.5, 0.5]])}),
        "nested_r_hat": Good(pe.nested_r_hat, (), {"values": torch.randn(4, 20), "superchains": 2}),
        "noncentered": Good(pe.noncentered, (), {"model": model}),
        "plot_calibration": Good(pe.plot_calibration, (), {"calibration": calibration}),
        "plot_class_balance": Good(pe.plot_class_balance, (), {"balances": {"a": BALANCE}}),
        "plot_compare": Good(pe.plot_compare, (), {"draws": {"a": DRAWS, "b": OTHER}}),
        "plot_energy_landscape": Good(pe.plot_energy_landscape, (), {
            "energy": pe.QuadraticEnergy(1.0), "num_points": 9}),
        "plot_images": Good(pe.plot_images, (), {"images": IMAGES.images[:4]}),
        "plot_label_histograms": Good(pe.plot_label_histograms, (), {"labels": {"a": [0, 1]}}),
        "plot_latent_overlay": Good(pe.plot_latent_overlay, (), {
            "encodings": torch.randn(9, 2), "prior": torch.randn(9, 2), "tilted": torch.randn(9, 2)}),
        "plot_latent_scatter": Good(pe.plot_latent_scatter, (), {
            "z": torch.randn(9, 2), "labels": torch.arange(9) % 2}),
        "plot_training_curves": Good(pe.plot_training_curves, (), {"result": result}),
        "posterior_draws": Good(pe.posterior_draws, (), {
            "model": VAE_.model, "guide": VAE_.guide, "x": X, "num_samples": 5, "seed": 0}),
        "predictive": Good(pe.predictive, (prior,), {"num_samples": 5, "seed": 0}),
        "pyro_hmc": Good(pe.pyro_hmc, (model,), stock),
        "pyro_nuts": Good(pe.pyro_nuts, (model,), stock),
        "quadrature": Good(pe.quadrature, (density(),), {"num_points": 9}),
        "sample": Good(pe.sample, (model,), {"method": "snis", "num_samples": 200, "seed": 0}),
        "save_arviz": Good(pe.save_arviz, (), {"tree": pe.to_arviz(OTHER), "path": _FOLDER / "e.nc"}),
        "save_weights": Good(pe.save_weights, (), {"module": weights, "path": _FOLDER / "v.pt"}),
        "snis_log_likelihood": Good(pe.snis_log_likelihood, (), {
            "model": tilted(), "guide": VAE_.guide, "x": X, "num_samples": 20, "num_proposals": 8, "seed": 0}),
        "tilt": Good(pe.tilt, (), {"model": prior, "energies": {"z": pe.QuadraticEnergy(1.0)}}),
        "to_arviz": Good(pe.to_arviz, (), {"draws": OTHER}),
        "total_variation": Good(pe.total_variation, (), {"p": [0.5, 0.5]}),
    }  # fmt: skip


def _sampler(conditioned: Callable[..., Any], *args: Any, **options: Any) -> pe.Draws:
    return pe.Draws({"mu": torch.randn(1, 9)}, "mine")


# --------------------------------------------------------------------------------- bad values


class Thing:
    """Something that is nothing the library knows."""

    def __repr__(self) -> str:
        return "Thing()"


BAD: dict[str, Any] = {
    "None": None, "text": "no such thing", "minus one": -1, "zero": 0, "fraction": 1.5, "nan": float("nan"),
    "inf": float("inf"), "true": True, "thing": Thing(), "empty list": [], "list of text": ["a", 1], "dict": {"a": 1},
    "complex": 1 + 2j, "nan tensor": torch.tensor([float("nan"), 1.0]), "huge": 10**30, "array": np.array(["a", "b"]),
    "number for a function": lambda: 3, "class": int,
}  # fmt: skip

# What a value is, by the words of an annotation that it satisfies.
_FITS: dict[str, tuple[str, ...]] = {
    "None": ("None",), "text": ("str",), "minus one": ("int", "float"), "zero": ("int", "float"),
    "fraction": ("float",), "nan": (), "inf": ("float",), "true": ("bool",), "thing": (),
    "empty list": ("Sequence", "list", "Iterable", "Tensor", "Array"), "list of text": (),
    "dict": ("Mapping", "dict"), "complex": (), "nan tensor": (), "huge": ("int", "float"),
    "array": (),
    "number for a function": ("Callable",), "class": ("Callable",),
}  # fmt: skip
# Refused although the annotation admits the type: a count below 1.
_COUNTS = re.compile(
    r"^(num_|max_tree|epochs|batch_size|capacity|dim$|latent_dim|chains|particles|thin|every|patience|.*_steps$)"
)
_SIGNED = {"seed", "warmup_steps", "reference_size", "test_size", "num_gradients"}
_OPEN = {"Any", "Data", "Normalize", "MakeOptimizer", "MakeScheduler", "Callback", "Activation", "Quantity", "Axes"}
# Functions of the user's that fail by themselves: their own errors are passed on.
_FUNCTIONS = ("number for a function", "class")


def atoms(annotation: str) -> set[str]:
    """The words of an annotation before their brackets: `Mapping[str, int] | None` -> Mapping, None."""
    depth, flat = 0, ""
    for letter in str(annotation):
        depth += letter == "["
        flat += letter if depth == 0 else ""
        depth -= letter == "]"
    return {part.strip().strip("'").rpartition(".")[2] for part in flat.split("|")}


def is_bad(name: str, annotation: str, kind: str) -> bool:
    """Whether accepting such a value for the argument would be silent acceptance."""
    words = atoms(annotation)
    if _OPEN & words:
        return False
    if kind in ("minus one", "zero") and "int" in words and _COUNTS.match(name) and name not in _SIGNED:
        return True
    if kind in ("array", "nan tensor", "list of text") and re.search(r"\[(str|Any)\]", str(annotation)) or (
        kind == "nan" and name in ("seconds", "sampling_seconds", "pareto_k")
    ):
        return False
    return not set(_FITS[kind]) & words


class Call(NamedTuple):
    """One bad call: a name, its argument, and the kind of the value."""

    name: str
    argument: str
    kind: str


def calls(goods: Mapping[str, Good]) -> list[Call]:
    """All of them, generated from the signatures."""
    found = []
    for name, good in goods.items():
        for parameter in inspect.signature(good.function).parameters.values():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and parameter.name != "download":
                found += [Call(name, parameter.name, kind) for kind in BAD]
    return found


OWN = (pe.CheckpointError, pe.InferenceError, pe.InfeasibleError)


def fault(call: Call, goods: Mapping[str, Good]) -> str | None:
    """What was wrong with the answer to a bad call; None where an error named the argument, or the value will do."""
    good, value = goods[call.name], BAD[call.kind]
    parameters = inspect.signature(good.function).parameters
    args, keywords = list(good.args), dict(good.keywords)
    position = list(parameters).index(call.argument)
    if position < len(args):
        args[position] = value
    else:
        keywords[call.argument] = value
    annotation = parameters[call.argument].annotation
    theirs = call.kind in _FUNCTIONS and {"Callable", "Any", *_OPEN} & atoms(annotation)
    theirs = theirs or call.argument == "model_kwargs"  # keywords that the model lacks
    try:
        with alarm(SECONDS), warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            good.function(*args, **keywords)
    except TimeoutError:
        return "hang"
    except pe.InferenceError as error:
        return None if not is_bad(call.argument, annotation, call.kind) else f"late {error}"
    except (ValueError, TypeError, *OWN) as error:
        named = re.search(rf"(?<![A-Za-z_]){call.argument}(?![A-Za-z_])", str(error))
        return None if named or theirs else f"unnamed {type(error).__name__}: {error}"
    except FileNotFoundError as error:
        return None if "root" in good.keywords else f"raw {error!r}"
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"
    return "accepted" if is_bad(call.argument, annotation, call.kind) else None


def main() -> None:
    """Try many and print a table of the faults."""
    os.chdir(_FOLDER)  # "no such thing" is the name of a file that may be written
    wanted, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    only = set(sys.argv[3].split(",")) if len(sys.argv) > 3 else None
    goods = {name: good for name, good in good_calls().items() if only is None or name in only}
    chosen = calls(goods)
    random.Random(seed).shuffle(chosen)
    counts: collections.Counter[str] = collections.Counter()
    for call in chosen[:wanted]:
        found = fault(call, goods)
        counts["fine" if found is None else found.split()[0]] += 1
        if found:
            print(*call, "|", found.replace("\n", " ")[:200], sep="  ", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
