"""The command ``pyro-ebm``: whole jobs from the shell."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pyro_ebm.recipes.debias import DebiasResult
    from pyro_ebm.recipes.debias_study import StudyResult

app = typer.Typer(
    help="Tilt Pyro models with learned energies.", no_args_is_help=True, pretty_exceptions_enable=False
)

# Options that several commands share.
_Data = Annotated[str, typer.Option(help="digits (bundled), mnist, fashion_mnist or kmnist")]
_DataRoot = Annotated[
    Path | None, typer.Option(help="folder with the torchvision data; downloaded there when missing")
]
_Digits = Annotated[str, typer.Option(help="classes to use, separated by commas")]
_Proportions = Annotated[str, typer.Option(help="share of each class in the biased set; sums to 1")]
_Fraction = Annotated[float, typer.Option(help="largest share of a class the biased set may take")]
_Progress = Annotated[bool, typer.Option(help="show progress bars")]
_WATCHED = sys.stderr.isatty()


@app.callback()
def _root() -> None:
    """Tilt Pyro models with learned energies."""


@app.command()
def debias(
    data: _Data = "digits",
    data_root: _DataRoot = None,
    digits: _Digits = "0,1,2,3,4",
    proportions: _Proportions = "0.12,0.33,0.28,0.20,0.07",
    fraction: _Fraction = 0.6,
    latent_dim: Annotated[int, typer.Option(help="dimensions of the latent z")] = 2,
    methods: Annotated[
        str, typer.Option(help="samplers, among snis, chees, nuts, hmc, mala, ula, smc")
    ] = "snis,chees,nuts,hmc",
    num_samples: Annotated[
        int | None,
        typer.Option(help="draws per MCMC method, 4000 for digits, else 12000; snis weighs ten times as many"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of everything")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("out/debias"),
    baselines: Annotated[
        bool, typer.Option("--baselines", help="also train on the reference alone, and fine-tune on it")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="short training, few draws")] = False,
    progress: _Progress = _WATCHED,
) -> None:
    """Train a VAE on biased images, tilt its latent by a few balanced ones, sample it, compare samplers."""
    from pyro_ebm.errors import CheckpointError
    from pyro_ebm.recipes.debias import DebiasConfig
    from pyro_ebm.recipes.debias import debias as run

    try:
        config = DebiasConfig(
            data=data,
            data_root=data_root,
            digits=_numbers("--digits", digits, int),
            proportions=_numbers("--proportions", proportions, float),
            fraction=fraction,
            latent_dim=latent_dim,
            methods=tuple(part.strip() for part in methods.split(",") if part.strip()),
            num_samples=num_samples,
            seed=seed,
            baselines=baselines,
            quick=quick,
            progress=progress,
        )
        result = run(config, out=out)
    except (ValueError, OSError, CheckpointError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    _print(result, out)


@app.command("debias-study")
def debias_study(
    data: _Data = "digits",
    data_root: _DataRoot = None,
    digits: _Digits = "0,1,2,3,4",
    proportions: _Proportions = "0.12,0.33,0.28,0.20,0.07",
    fraction: _Fraction = 0.6,
    reference_sizes: Annotated[
        str | None, typer.Option(help="balanced reference images; 25,105 for digits, else 50,250,1000,3425")
    ] = None,
    latent_dims: Annotated[
        str | None, typer.Option(help="dimensions of the latent z; 2,10 for digits, else 2,10,32,64")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="of everything, one study each; 0,1,2")] = None,
    methods: Annotated[
        str, typer.Option(help="what to compare")
    ] = "biased,reference_only,fine_tuned,importance_weighted,tilt,constraint",
    out: Annotated[Path, typer.Option(help="folder for the results; a study there is continued")] = Path("out/study"),
    quick: Annotated[bool, typer.Option("--quick", help="short training, few draws, a small grid")] = False,
    progress: _Progress = _WATCHED,
) -> None:
    """Compare ways to debias over reference sizes, latent dimensions and seeds; continue where it stopped."""
    from pyro_ebm.recipes.debias_study import StudyConfig
    from pyro_ebm.recipes.debias_study import debias_study as run

    def grid(option: str, text: str | None) -> tuple | None:
        return None if text is None else _numbers(option, text, int)

    try:
        config = StudyConfig(
            data=data,
            data_root=data_root,
            digits=_numbers("--digits", digits, int),
            proportions=_numbers("--proportions", proportions, float),
            fraction=fraction,
            reference_sizes=grid("--reference-sizes", reference_sizes),
            latent_dims=grid("--latent-dims", latent_dims),
            seeds=grid("--seeds", seeds),
            methods=tuple(part.strip() for part in methods.split(",") if part.strip()),
            quick=quick,
            progress=progress,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\d+ of \d+ cells failed")  # said below
            result = run(config, out=out)
    except (ValueError, OSError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.secho(f"stopped; the same command continues with what is kept in {out}", err=True)
        raise typer.Exit(130) from None
    _print_study(result, out)


def _numbers(option: str, text: str, kind: type) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be numbers separated by commas, got {text!r}") from None


def _print(result: DebiasResult, out: Path) -> None:
    from pyro_ebm.recipes.outputs import balance_table

    columns = ["target", "method", "ess_bulk", "r_hat", "pareto_k", "divergences", "ess_per_second"]
    if result.references:
        columns.append("worst_error_in_se")
    table = result.comparison[[*columns, "verdict"]]
    formats = {"ess_bulk": "{:.0f}".format, "r_hat": "{:.3f}".format, "pareto_k": "{:.2f}".format,
               "divergences": "{:.0f}".format, "ess_per_second": "{:.1f}".format,
               "worst_error_in_se": "{:.1f}".format}  # fmt: skip
    sizes = ", ".join(f"{part} {count}" for part, count in result.split.sizes.items())
    echo = typer.echo
    echo(f"\nImages: {sizes}. Label classifier: {result.classifier.accuracy:.1%} accurate.")
    echo("\nClass balance of decoded draws (TV: distance from uniform, 0 is perfect):\n")
    echo(balance_table(result).to_string(float_format="{:.3f}".format))
    echo("\nWhich sampler to trust (verdict names every threshold that fell):\n")
    echo(table.to_string(index=False, formatters=formats, na_rep="-"))
    found = result.summary["test_log_likelihood"]
    echo("\nLog likelihood per balanced test image: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
    echo(f"Most effective draws per second among the trusted: {result.best_method}.")
    seconds = result.summary["seconds"]["total"]
    echo(f"Done in {seconds:.0f} s. Open {out / 'report.html'} for figures and details.")


def _print_study(result: StudyResult, out: Path) -> None:
    echo, found = typer.echo, result.summary().reset_index()
    digits = {"tv": 3, "fairness_discrepancy": 3, "log_likelihood": 2, "confidence": 3, "diversity": 2, "kl": 2,
              "seconds": 0}  # fmt: skip

    def cell(mean: float, se: float, places: int) -> str:
        known = f"{mean:.{places}f}" if mean == mean else "-"
        return f"{known} +- {se:.{places}f}" if mean == mean and se == se else known

    table = found[["latent_dim", "reference_size", "method", "seeds"]].copy()
    for name, places in digits.items():
        pairs = zip(found[name], found[f"{name}_se"], strict=True)
        table[name] = [cell(mean, se, places) for mean, se in pairs]
    several = "means over seeds +- their standard errors" if table["seeds"].max() > 1 else "one seed"
    echo(f"\nWays to debias {result.config.data} ({several}; tv: distance from balanced classes, 0 is perfect;")
    echo("log_likelihood: nats per balanced test image; diversity: of a class, 1 as real images):\n")
    echo(table.to_string(index=False))
    for _, row in result.failures.iterrows():
        name = f"{row['method']}, {row['latent_dim']} dimensions, {row['reference_size']} images, seed {row['seed']}"
        typer.secho(f"failed: {name}: {row['error']}", fg=typer.colors.RED, err=True)
    echo(f"\nEvery cell: {out / 'study.csv'}; figure: {out / 'figures' / 'debias_study.png'}.")
    if len(result.failures):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console command."""
    app()


if __name__ == "__main__":
    main()
