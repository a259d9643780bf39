"""The command ``pyro-ebm``: whole jobs from the shell."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_ebm import __version__
from pyro_ebm.errors import CheckpointError

# Both load nothing heavy, so that --help is quick; what computes is imported by the commands.
from pyro_ebm.recipes.debias_config import DATASETS, NUM_SAMPLES, QUICK, DebiasConfig
from pyro_ebm.recipes.debias_config import METHODS as SAMPLERS
from pyro_ebm.recipes.study_config import GRID, METHODS, StudyConfig

if TYPE_CHECKING:
    from pyro_ebm.recipes.debias_study import StudyResult
    from pyro_ebm.recipes.result import DebiasResult

app = typer.Typer(
    help="Tilt Pyro models with learned energies.", no_args_is_help=True, pretty_exceptions_enable=False
)
_INTERRUPTED = 130  # as shells have it: 128 and the number of the signal


def _listed(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


def _grid(name: str, what: str) -> Any:
    """An option of the grid; its default depends on the data."""
    small, large = (_listed(default) for default in GRID[name])
    return typer.Option(help=f"{what}; {small} for digits, else {large}" if small != large else f"{what}; {small}")


# Options that several commands share.
_Data = Annotated[str, typer.Option(help=f"{', '.join(DATASETS)}; digits come with the library")]
_DataRoot = Annotated[
    Path | None, typer.Option(help="folder with the torchvision data; downloaded there when missing")
]
_Digits = Annotated[str, typer.Option(help="classes to use, separated by commas")]
_Proportions = Annotated[str, typer.Option(help="share of each class in the biased set; sums to 1")]
_Fraction = Annotated[float, typer.Option(help="largest share of a class the biased set may take")]
_Progress = Annotated[bool, typer.Option(help="show progress bars")]
_DIGITS, _PROPORTIONS = _listed(DebiasConfig.digits), _listed(DebiasConfig.proportions)
_SAMPLERS, _WAYS = _listed(DebiasConfig.methods), _listed(METHODS)
_WATCHED = sys.stderr.isatty()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pyro-ebm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="show the version and leave", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Tilt Pyro models with learned energies."""


@app.command()
def debias(
    data: _Data = DebiasConfig.data,
    data_root: _DataRoot = None,
    digits: _Digits = _DIGITS,
    proportions: _Proportions = _PROPORTIONS,
    fraction: _Fraction = DebiasConfig.fraction,
    latent_dim: Annotated[int, typer.Option(help="dimensions of the latent z")] = DebiasConfig.latent_dim,
    methods: Annotated[str, typer.Option(help=f"samplers, among {', '.join(SAMPLERS)}")] = _SAMPLERS,
    num_samples: Annotated[
        int | None,
        typer.Option(
            help=f"draws per MCMC method, {NUM_SAMPLES[0]} for digits, else {NUM_SAMPLES[1]}; snis weighs tenfold"
        ),
    ] = None,
    num_chains: Annotated[
        int, typer.Option(help="chains of nuts and hmc; the others run 64 as one batch")
    ] = DebiasConfig.num_chains,
    max_seconds: Annotated[
        float, typer.Option(help="what a sampler may spend on one target; nuts and hmc are cut there")
    ] = DebiasConfig.max_seconds,
    seed: Annotated[int, typer.Option(help="of everything")] = DebiasConfig.seed,
    device: Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1, ...")] = DebiasConfig.device,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("out/debias"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with the job in --out")] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="also train on the reference alone, and fine-tune on it")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="short training, few draws: the numbers mean nothing")
    ] = False,
    progress: _Progress = _WATCHED,
) -> None:
    """Train a VAE on biased images, tilt its latent by a few balanced ones, sample it, compare samplers.

    What is finished is kept: after Ctrl-C or a crash, --resume goes on, to the same numbers.
    """
    config = None
    with _failing_in_words(lambda: _how_to_go_on(config, out)):
        config = DebiasConfig(
            data=data,
            data_root=data_root,
            digits=_numbers("--digits", digits, int),
            proportions=_numbers("--proportions", proportions, float),
            fraction=fraction,
            latent_dim=latent_dim,
            methods=_words(methods),
            num_samples=num_samples,
            num_chains=num_chains,
            max_seconds=max_seconds,
            seed=seed,
            device=device,
            baselines=baselines,
            quick=quick,
            progress=progress,
        )
        from pyro_ebm.recipes.debias import debias as run

        result = run(config, out=out, resume=resume)
    _print(result, out)


@app.command("debias-study")
def debias_study(
    data: _Data = StudyConfig.data,
    data_root: _DataRoot = None,
    digits: _Digits = _DIGITS,
    proportions: _Proportions = _PROPORTIONS,
    fraction: _Fraction = StudyConfig.fraction,
    reference_sizes: Annotated[str | None, _grid("reference_sizes", "balanced reference images")] = None,
    latent_dims: Annotated[str | None, _grid("latent_dims", "dimensions of the latent z")] = None,
    seeds: Annotated[str | None, _grid("seeds", "of everything, one study each")] = None,
    methods: Annotated[str, typer.Option(help="what to compare")] = _WAYS,
    out: Annotated[Path, typer.Option(help="folder for the results; a study there is continued")] = Path("out/study"),
    quick: Annotated[
        bool, typer.Option("--quick", help="short training, few draws, a small grid: the numbers mean nothing")
    ] = False,
    progress: _Progress = _WATCHED,
) -> None:
    """Compare ways to debias over reference sizes, latent dimensions and seeds; continue where it stopped."""

    def grid(option: str, text: str | None) -> tuple | None:
        return None if text is None else _numbers(option, text, int)

    with _failing_in_words(lambda: f"the same command continues with what is kept in {out}"):
        config = StudyConfig(
            data=data,
            data_root=data_root,
            digits=_numbers("--digits", digits, int),
            proportions=_numbers("--proportions", proportions, float),
            fraction=fraction,
            reference_sizes=grid("--reference-sizes", reference_sizes),
            latent_dims=grid("--latent-dims", latent_dims),
            seeds=grid("--seeds", seeds),
            methods=_words(methods),
            quick=quick,
            progress=progress,
        )
        from pyro_ebm.recipes.debias_study import debias_study as run

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\d+ of \d+ cells failed")  # said below
            result = run(config, out=out)
    _print_study(result, out)


@contextmanager
def _failing_in_words(after_interruption: Callable[[], str]) -> Iterator[None]:
    """Errors of use as one line and exit status 2, an interruption as status 130 and how to go on."""
    try:
        yield
    except (ValueError, OSError, CheckpointError) as error:
        hint = "; --data-root names another folder" if isinstance(error, FileNotFoundError) else ""
        typer.secho(f"error: {error}{hint}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.secho(f"stopped; {after_interruption()}", err=True)
        raise typer.Exit(_INTERRUPTED) from None


def _how_to_go_on(config: DebiasConfig | None, out: Path) -> str:
    if config is None or not (out / "steps").is_dir():
        return "nothing was finished yet"
    return f"what is finished is kept in {out / 'steps'}. Go on with\n  {config.command(out)} --resume"


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


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
    for remark in result.remarks:
        typer.secho(f"\n{remark}", fg=typer.colors.YELLOW)
    echo(f"\nImages: {sizes}. Label classifier: {result.classifier.accuracy:.1%} accurate.")
    echo("\nClass balance of decoded draws (TV: distance from uniform, 0 is perfect; chance: that of as many balanced")
    echo("labels; worth: independent labels that the images count for):\n")
    echo(balance_table(result).to_string(float_format="{:.3f}".format))
    echo("\nWhich sampler to trust (verdict names every threshold that fell):\n")
    echo(table.to_string(index=False, formatters=formats, na_rep="-"))
    found = result.summary["test_log_likelihood"]
    echo("\nLog likelihood per balanced test image: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
    echo(f"Most effective draws per second among the trusted: {result.best_method}.")
    seconds = result.summary["seconds"]["total"]
    resumed = f" ({len(result.resumed)} steps were kept from before)" if result.resumed else ""
    echo(f"Done in {seconds:.0f} s{resumed}. Open {out / 'report.html'} for figures and details.")


def _print_study(result: StudyResult, out: Path) -> None:
    echo, found = typer.echo, result.summary().reset_index()
    digits = {"tv": 3, "fairness_discrepancy": 3, "log_likelihood": 2, "confidence": 3, "diversity": 2, "kl": 2,
              "seconds": 0}  # fmt: skip

    def cell(mean: float, se: float, places: int) -> str:
        known = f"{mean:.{places}f}" if mean == mean else "-"
        return f"{known} +- {se:.{places}f}" if mean == mean and se == se else known

    if result.config.quick:
        typer.secho(f"\n{QUICK}", fg=typer.colors.YELLOW)
    table = found[["latent_dim", "reference_size", "method", "seeds"]].copy()
    for name, places in digits.items():
        pairs = zip(found[name], found[f"{name}_se"], strict=True)
        table[name] = [cell(mean, se, places) for mean, se in pairs]
    several = "means over seeds +- their standard errors" if table["seeds"].max() > 1 else "one seed"
    echo(f"\nWays to debias {result.config.data} ({several}; tv: distance from balanced classes, 0 is perfect;")
    echo("log_likelihood: nats per balanced test image; diversity: of a class, 1 as real images):\n")
    echo(table.to_string(index=False))
    for _, row in result.infeasible.iterrows():
        echo(f"\nnot possible: {_cell_name(row)}: {row['infeasible']}")
    for _, row in result.failures.iterrows():
        typer.secho(f"failed: {_cell_name(row)}: {row['error']}", fg=typer.colors.RED, err=True)
    echo(f"\nEvery cell: {out / 'study.csv'}; figure: {out / 'figures' / 'debias_study.png'}.")
    if len(result.failures):
        raise typer.Exit(1)


def _cell_name(row: Any) -> str:
    return f"{row['method']}, {row['latent_dim']} dimensions, {row['reference_size']} images, seed {row['seed']}"


def main() -> None:
    """Entry point of the console command."""
    app()


if __name__ == "__main__":
    main()
