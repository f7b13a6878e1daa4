"""Result files as tables, figures and pages."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "figures": ["plot_layer_distance"],
        "report": ["write_report"],
        "tables": ["COLUMNS", "load_results", "markdown_table", "mean_std"],
    },
)
