"""Figures without a window."""

_GRID_OPTIONS = ("sharex", "sharey", "height_ratios", "width_ratios")


def make_figure(rows: int = 1, columns: int = 1, *, squeeze: bool = True, **options):
    """Make a figure and its axes as `pyplot.subplots` does, without a window or a global state.

    Args:
        rows, columns: of axes.
        squeeze: return one axes instead of an array of one.
        options: of `matplotlib.figure.Figure`, and those of its `subplots` in `_GRID_OPTIONS`.
    """
    from matplotlib.figure import Figure

    grid = {name: options.pop(name) for name in _GRID_OPTIONS if name in options}
    figure = Figure(**options)
    return figure, figure.subplots(rows, columns, squeeze=squeeze, **grid)
