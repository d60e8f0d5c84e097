"""What ``make reproduce`` shows: what is done, which pictures it drew, what runs now, and how long the rest will take.

Snakemake tells its logger of every step that begins, ends or fails. :func:`watch` listens there, in the place of
Snakemake's own messages.
"""

from __future__ import annotations

import csv
import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TextIO

from fluxlib.records import span

TICK_S = 1.0
"""How often the last line is written anew on a terminal."""
LAST_ROUND = re.compile(r".*seed\d+  round .*")
"""What a federated run's log says of a round; the last of them is its result."""


@dataclass(frozen=True)
class Step:
    """One notebook that is to be executed."""

    name: str
    """The notebook and its model, or the id of a federated run."""
    log: Path
    pictures: tuple[Path, ...] = ()

    @property
    def kind(self) -> str:
        """What takes about as long: the same notebook, or runs of the same method."""
        return self.name.partition("-")[0]

    def drawn(self) -> list[Path]:
        """Its pictures that are there, in the order in which they were drawn; Snakemake removes older ones first."""
        return sorted(filter(Path.is_file, self.pictures), key=lambda path: path.stat().st_mtime)

    def result(self) -> str:
        """The last round of a federated run, or the name."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        return next(filter(LAST_ROUND.fullmatch, reversed(lines)), self.name)


def step_name(benchmark: Path) -> str:
    """The name of the step whose time is kept in ``benchmark``, a file below ``build/<profile>/benchmarks``."""
    parts = benchmark.with_name(benchmark.name.removesuffix(".tsv")).parts
    return " ".join(parts[parts.index("benchmarks") + 1 :]).removeprefix("04_federated_run ")


def earlier(folder: Path) -> dict[str, float]:
    """Seconds that steps took when they were done before, by name, from ``build/<profile>/benchmarks``."""
    found: dict[str, float] = {}
    for file in folder.rglob("*.tsv"):
        with file.open(newline="") as opened:
            found |= {step_name(file): float(row["s"]) for row in csv.DictReader(opened, delimiter="\t")}
    return found


class Progress(logging.Handler):
    """A line for every step that has ended; on a terminal one more below them, which is always up to date.

    Args:
        steps: what is to be done, by Snakemake's number of the job.
        known: seconds of steps of earlier calls, by name.
        cores: how many steps run side by side.
        end: what is said at the end beside the time.
        stream: where all is said.
        now: a clock, in seconds.
    """

    def __init__(
        self,
        steps: Mapping[int, Step],
        known: Mapping[str, float],
        cores: int,
        end: str = "",
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.steps, self.known, self.cores, self.end = dict(steps), dict(known), cores, end
        self.stream, self.now = stream or sys.stderr, now
        self.live, self.begin = self.stream.isatty(), now()
        self.running: dict[int, float] = {}
        """When each step that runs began."""
        self.ended: set[int] = set()
        self.failed: list[str] = []
        self._over = threading.Event()
        if self.live:
            threading.Thread(target=self._tick, daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take what Snakemake says of a job; anything else is left to others."""
        number = getattr(record, "jobid", getattr(record, "job_id", None))
        if number not in self.steps:
            return
        event, step = getattr(record, "event", ""), self.steps[number]
        if event == "job_info":
            self.running[number] = self.now()
        elif event in ("job_finished", "job_error"):
            seconds = self.now() - self.running.pop(number, self.now())
            self.ended.add(number)
            if event == "job_finished":
                self.known[step.name] = seconds
                drawn = ", ".join(path.stem for path in step.drawn())
                self._say(f"{step.result()} in {span(seconds)}" + f"; drew {drawn}" * bool(drawn))
            else:
                self.failed.append(step.name)
                self._say(f"FAILED after {span(seconds)}: {step.name}, see {step.log}")

    def close(self) -> None:
        """Say how long it took."""
        if not self._over.is_set():
            self._over.set()
            failed = f", {len(self.failed)} failed" * bool(self.failed)
            done = f"{len(self.ended)} of {len(self.steps)} steps in {span(self.now() - self.begin)}{failed}"
            self._write(f"{done}\n{self.end}\n")
        super().close()

    def estimate(self, step: Step) -> float:
        """Seconds that ``step`` may take: what it took before, or those like it, or all that are known."""
        alike = [seconds for name, seconds in self.known.items() if name.partition("-")[0] == step.kind]
        return self.known.get(step.name) or mean(alike or self.known.values())

    def left(self) -> str:
        """When it will be done, in words; empty while nothing is known, or when all is done."""
        open_steps = {number: step for number, step in self.steps.items() if number not in self.ended}
        if not (self.known and open_steps):
            return ""
        spent = {number: self.now() - begin for number, begin in self.running.items()}
        rest = [max(0.0, self.estimate(step) - spent.get(number, 0.0)) for number, step in open_steps.items()]
        seconds = max(sum(rest) / self.cores, *rest)
        return f"about {span(seconds)} left, done at {time.strftime('%H:%M', time.localtime(time.time() + seconds))}"

    def status(self) -> str:
        """Where it is, in one line: steps, time left, what runs, the newest picture."""
        names = [f"{self.steps[n].name} {span(self.now() - begin)}" for n, begin in self.running.items()]
        drawn = [path for number in self.running for path in self.steps[number].drawn()]
        newest = max(drawn, key=lambda path: path.stat().st_mtime).name if drawn else ""
        parts = (f"{len(self.ended)} of {len(self.steps)}", self.left(), f"drew {newest}" * bool(newest), *names)
        return " · ".join(filter(None, parts))

    def make_room(self, record: logging.LogRecord) -> bool:
        """Whether ``record`` must be seen; the last line gives way to it."""
        if record.levelno >= logging.WARNING:
            self._write("")
            return True
        return False

    def _say(self, text: str) -> None:
        more = "" if self.live or not self.left() else f" ({self.left()})"
        self._write(f"{len(self.ended)} of {len(self.steps)}  {text}{more}\n")

    def _write(self, text: str, status: bool = False) -> None:
        self.stream.write(("\r\x1b[K" if self.live else "") + text)
        if self.live and status:
            self.stream.write(self.status()[: shutil.get_terminal_size().columns - 1])
        self.stream.flush()

    def _tick(self) -> None:
        while not self._over.wait(TICK_S):
            self.acquire()
            try:
                self._write("", status=True)
            finally:
                self.release()


def watch(jobs: Iterable[Any], cores: int, benchmarks: Path, end: str) -> None:
    """Listen to Snakemake from now on, and leave only its warnings and errors.

    With ``--quiet progress`` Snakemake does not say which step has ended.

    Args:
        jobs: of Snakemake's graph, those that are to be done; what keeps no time (``all``) does nothing itself.
        cores: how many of them run side by side.
        benchmarks: folder of the times of earlier calls.
        end: what is said at the end.
    """
    kept = {job.dag.jobid(job): job for job in jobs if job.benchmark}
    steps = {
        number: Step(
            step_name(Path(job.benchmark)),
            Path(job.log[0]),
            tuple(Path(file) for file in job.output if str(file).endswith(".png")),
        )
        for number, job in kept.items()
    }
    progress, logger = Progress(steps, earlier(benchmarks), cores, end), logging.getLogger("snakemake.logging")
    for other in logger.handlers:
        if other.name == "DefaultStreamHandler":
            other.addFilter(progress.make_room)
    logger.addHandler(progress)
