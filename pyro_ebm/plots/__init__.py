"""One figure per function: each draws on the axes it is given, or on new ones, and returns them.

None of them shows, saves or restyles anything: backend and ``rcParams`` stay the user's.
"""

from __future__ import annotations

from pyro_ebm.plots.balance import plot_class_balance, plot_label_histograms
from pyro_ebm.plots.calibration import plot_calibration
from pyro_ebm.plots.comparison import plot_compare
from pyro_ebm.plots.images import plot_images
from pyro_ebm.plots.landscape import plot_energy_landscape
from pyro_ebm.plots.latent import plot_latent_overlay, plot_latent_scatter
from pyro_ebm.plots.study import plot_debias_study
from pyro_ebm.plots.training import plot_training_curves

__all__ = [
    "plot_calibration",
    "plot_class_balance",
    "plot_compare",
    "plot_debias_study",
    "plot_energy_landscape",
    "plot_images",
    "plot_label_histograms",
    "plot_latent_overlay",
    "plot_latent_scatter",
    "plot_training_curves",
]
