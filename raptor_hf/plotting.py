"""Figures without a window."""


def make_figure(rows: int = 1, columns: int = 1, *, figsize, **grid):
    """Make a figure and its axes as `pyplot.subplots` does, without a window or a global state.

    Args:
        rows, columns: of axes.
        figsize: of `matplotlib.figure.Figure`.
        grid: options of its `subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **grid)
