"""Result files as tables, figures and pages."""

from .figures import plot_layer_distance
from .report import write_report
from .tables import load_results

__all__ = ["load_results", "plot_layer_distance", "write_report"]
