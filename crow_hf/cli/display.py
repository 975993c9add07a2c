"""The terminal of a run: its phases by name, the one that runs with a bar, and about how long is left."""

import logging as std_logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import datasets
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from ..data.visible import printable
from ..progress import duration, shown_on
from ..secrets import hide_secrets
from .words import as_options


# Seconds between two lines of the same phase where there is no terminal.
SECONDS_BETWEEN_LINES = 30.0
_NAME_WIDTH, _BAR_WIDTH = 24, 24


@contextmanager
def watched(command: str, verbose: bool = False, console: Console | None = None) -> Iterator[None]:
    """
    Show the phases of the `with` block: live on a terminal, and otherwise as plain lines. Warnings stand above them.

    Args:
        command (`str`):
            The command, whose options the warnings name.
        verbose (`bool`, *optional*, defaults to `False`):
            Whether to print the log lines of the training too.
        console (`Console`, *optional*):
            Where to show them. Defaults to the standard error. Of several processes, only the first shows something.
    """
    if console is None:
        is_live = sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        # Outside of a terminal, a line is a line, however long.
        width = None if is_live else 10_000
        quiet = os.environ.get("RANK", "0") != "0"
        console = Console(stderr=True, force_terminal=is_live, width=width, quiet=quiet, highlight=False)
    display = _Display(console, verbose)
    had_bars = datasets.are_progress_bars_disabled() is False
    if had_bars and not console.is_terminal:
        datasets.disable_progress_bars()
    hook = logging.set_tqdm_hook(display.make_bar)
    try:
        with shown_on(display), _log_lines(command, verbose):
            yield
    finally:
        logging.set_tqdm_hook(hook)
        if had_bars:
            datasets.enable_progress_bars()


class _LogLines(std_logging.Handler):
    """Prints log lines in the words of the command line. A live display stands in for the standard error."""

    def __init__(self, command: str) -> None:
        super().__init__()
        self.command = command
        self.printed: set[str] = set()

    def emit(self, record: std_logging.LogRecord) -> None:
        level = "Note" if record.levelno < std_logging.WARNING else record.levelname.capitalize()
        line = f"{level}: {printable(as_options(hide_secrets(record.getMessage()), self.command))}"
        # Layers of bitsandbytes warn in every pass.
        if line not in self.printed:
            self.printed.add(line)
            print(line, file=sys.stderr)


@contextmanager
def _log_lines(command: str, verbose: bool) -> Iterator[None]:
    """Print the log lines of all packages in one way. Those of Hugging Face write to the terminal by themselves."""
    own, handler = std_logging.getLogger("crow_hf"), _LogLines(command)
    libraries = [std_logging.getLogger(name) for name in ("transformers", "datasets", "huggingface_hub")]
    before = [(each.handlers, each.propagate) for each in libraries]
    for each in libraries:
        each.handlers, each.propagate = [], True
    std_logging.root.addHandler(handler)
    level = own.level
    if verbose:
        own.setLevel(std_logging.INFO)
    try:
        with warnings.catch_warnings():
            if not verbose:
                # They tell developers of libraries what to change.
                warnings.simplefilter("ignore", FutureWarning)
            # Python writes warnings to the terminal by itself.
            warnings.showwarning = lambda message, *_, **__: std_logging.warning(message)
            yield
    finally:
        own.setLevel(level)
        std_logging.root.removeHandler(handler)
        for each, (handlers, propagate) in zip(libraries, before, strict=True):
            each.handlers, each.propagate = handlers, propagate


class _Bar:
    """What code gets instead of a progress bar of tqdm. Methods that only change the looks of one do nothing."""

    def __init__(
        self, display: "_Display", iterable: Iterable | None = None, total: float | None = None, **kwargs: Any
    ):
        self.display, self.iterable = display, iterable
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.name, self.unit = printable(kwargs.get("desc") or ""), kwargs.get("unit", "")
        self.n, self.note, self.began = 0.0, "", time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for each in self.iterable or ():
            yield each
            self.update()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def update(self, n: float = 1) -> None:
        self.n += n
        self.display.advanced()

    def set_postfix_str(self, note: str = "", refresh: bool = True) -> None:
        self.note = note

    def write(self, text: str) -> None:
        self.display.log(text)

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def seconds_left(self) -> float:
        """The time that is left at the speed so far."""
        return (time.monotonic() - self.began) / self.n * max(0.0, (self.total or 0) - self.n)

    def count(self) -> str:
        """What is done: `"3/16 prompts"`."""
        plural = f"{self.unit}es" if self.unit.endswith("ch") else f"{self.unit}s"
        return f"{self.n:.0f}/{self.total:.0f} {self.unit if self.total == 1 else plural}"


class _Display:
    """Shows the phases on a console. Between two phases nothing is live, so that anything can be printed."""

    def __init__(self, console: Console, verbose: bool) -> None:
        self.console, self.verbose = console, verbose
        # The phases to come and the current one, and the seconds that are expected of each.
        self.planned: dict[str, float] = {}
        self.name = ""
        self.bar: _Bar | None = None
        self.live: Live | None = None
        self.started = self.began = self.last_line = time.monotonic()
        # What the phases that are over took, and what was expected of them.
        self.taken = self.expected = 0.0

    def announce(self, text: str, seconds: Mapping[str, float]) -> None:
        self.console.print(Text(printable(text)))
        self.planned = dict(seconds)

    def begin(self, name: str) -> None:
        names = list(self.planned)
        if name in names:
            # A run may have skipped some.
            self.planned = {each: self.planned[each] for each in names[names.index(name) :]}
        self.name, self.bar = name, None
        self.began = self.last_line = time.monotonic()
        if self.console.is_terminal:
            datasets.disable_progress_bars()
            self.live = Live(get_renderable=self._lines, console=self.console, transient=True)
            self.live.start()
        else:
            self.console.print(Text(f"{name} ..."))

    def end(self, completed: bool) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        took = time.monotonic() - self.began
        if self.name in self.planned:
            self.taken, self.expected = self.taken + took, self.expected + self.planned[self.name]
            self.planned = {name: seconds for name, seconds in self.planned.items() if name != self.name}
        outcome = f"done in {duration(took)}" if completed else f"stopped after {duration(took)}"
        name = f"{self.name:{_NAME_WIDTH}}  " if self.console.is_terminal else f"{self.name}: "
        self.console.print(Text(name + outcome))
        self.name, self.bar = "", None

    def make_bar(self, factory: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return the bar of a phase. Between two phases, a terminal shows the ordinary one, unless bars are off."""
        if not logging.is_progress_bar_enabled() or (not self.name and self.console.is_terminal):
            return factory(*args, **kwargs)
        bar = _Bar(self, *args, **kwargs)
        if self.name and bar.total and not kwargs.get("disable"):
            self.bar = bar
        return bar

    def advanced(self) -> None:
        """Print a line now and then if there is no terminal."""
        now = time.monotonic()
        if self.console.is_terminal or self.bar is None or now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        left = self._seconds_left()
        said = [self._state(), "" if left is None else f"about {duration(left)} left in all"]
        self.console.print(Text(f"{self.name}: {', '.join(filter(None, said))}"))

    def log(self, text: str) -> None:
        """Print a log line of the training."""
        if self.verbose:
            self.console.print(Text(printable(text)))

    def _state(self) -> str:
        if self.bar is None:
            return ""
        name = "" if self.bar.name == self.name else self.bar.name
        return "  ".join(filter(None, [name, self.bar.count(), self.bar.note]))

    def _seconds_left(self) -> float | None:
        """About the time that all phases take from now on. `None` without a plan."""
        if self.name not in self.planned:
            return None
        # The phases so far tell how much faster or slower this machine is than it seemed. A short one tells little.
        to_come = sum(self.planned.values())
        scale = (self.taken + to_come) / (self.expected + to_come)
        later = sum(seconds for name, seconds in self.planned.items() if name != self.name) * scale
        if self.bar is not None and self.bar.name == self.name and self.bar.n:
            return later + self.bar.seconds_left()
        return later + max(0.0, self.planned[self.name] * scale - (time.monotonic() - self.began))

    def _lines(self) -> Table:
        """Return the current phase and, if there is a plan, the whole run, each with a bar and its time so far."""
        now, table = time.monotonic(), Table.grid(padding=(0, 2, 0, 0))
        for width in (_NAME_WIDTH, _BAR_WIDTH, None):
            table.add_column(width=width, no_wrap=True, overflow="ellipsis")
        bar = self.bar
        done = ProgressBar(total=bar.total, completed=bar.n) if bar else ProgressBar(total=None, pulse=True)
        table.add_row(
            Text(self.name, "bold"), done, Text("  ".join(filter(None, [duration(now - self.began), self._state()])))
        )
        if (left := self._seconds_left()) is not None:
            elapsed = now - self.started
            in_all = ProgressBar(total=elapsed + left, completed=elapsed)
            table.add_row("In all", in_all, Text(f"{duration(elapsed)}  about {duration(left)} left"))
        return table
