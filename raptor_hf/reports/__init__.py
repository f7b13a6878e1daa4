"""Result files as tables, figures and pages."""

from .figures import plot_layer_distance
from .report import write_report
from .tables import COLUMNS, load_results, markdown_table, mean_std

__all__ = [
    "COLUMNS",
    "load_results",
    "markdown_table",
    "mean_std",
    "plot_layer_distance",
    "write_report",
]
