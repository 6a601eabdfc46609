"""What every example needs, but none is about: arguments, a progress bar, a picture."""

import argparse
import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn


matplotlib.use("Agg")  # no window: pictures are saved to files
import matplotlib.pyplot as plt


def options(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """The command-line arguments. Each default gives the name and the type of one."""
    parser = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default in {**defaults, "seed": 0}.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=default, help=" ")
    parser.add_argument(
        "--picture", type=pathlib.Path, metavar="FILE", help="where to save a picture"
    )
    return parser.parse_args()


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar. It yields a function to call once per step, with the text to show."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress("{task.description}", *columns) as bar:
        task = bar.add_task("compiling", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


@contextlib.contextmanager
def picture(path: pathlib.Path, n_axes: int = 2) -> Iterator[Any]:
    """A figure with axes side by side, saved at the end."""
    figure, axes = plt.subplots(1, n_axes, figsize=(11, 4.2), layout="constrained")
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"Written: {path}")
