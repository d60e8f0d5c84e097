"""The course of a run on the server: join, evaluate the base model, then round after round; see :func:`serve`."""

from __future__ import annotations

import datetime
import logging
import math
import time
from contextlib import nullcontext
from functools import partial

import torch
from flwr.serverapp import Grid
from safetensors import SafetensorError

from fluxlib import models, records
from fluxlib.config import RunConfig
from fluxlib.devices import catalogue
from fluxlib.federation.checks import check, make_budgets
from fluxlib.federation.client.local_data import load_task
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.results import Output, RoundResult, Row, RunFailed, RunResult, experts_path
from fluxlib.federation.server.join import join
from fluxlib.federation.server.strategy import FluxStrategy
from fluxlib.federation.store import lock
from fluxlib.federation.store.checkpoint import Checkpoint, changed_tensors
from fluxlib.federation.store.tables import NOT_SCORED, Tables
from fluxlib.federation.store.tensor_file import write_tensors
from fluxlib.io import ConfigError
from fluxlib.models.loading import torch_device
from fluxlib.moe.adapter import Adapter
from fluxlib.tasks.batches import encode
from fluxlib.tasks.evaluate import evaluate
from fluxlib.tasks.partition import histogram

log = logging.getLogger(__name__)


def serve(grid: Grid, config: RunConfig, output: Output) -> RunResult:
    """All rounds on ``grid``, or those after a checkpoint; errors are those of :func:`fluxlib.federation.run.run`."""
    check(config, output.out)
    with lock.hold(output.out, config.run_id) if output.out else nullcontext():
        return _Run(grid, config, output).go()


class _Run:
    """One run in progress."""

    def __init__(self, grid: Grid, config: RunConfig, output: Output) -> None:
        self.config, self.output = config, output
        self.start = datetime.datetime.now(datetime.UTC)
        try:
            dtype, device = getattr(torch, config.torch_dtype), torch_device(config.torch_device)
            self.model, self.tokenizer = models.load(config.model, dtype, device)
        except (ValueError, OSError, SafetensorError) as error:
            raise ConfigError(f"model is {config.model!r}, it cannot be loaded: {error}") from None
        self.task, self.parts = load_task(config)
        examples = sorted((*self.task.train, *self.task.test), key=lambda example: len(example.response))
        try:
            for example in examples[-20:]:  # the longest responses must fit into max_tokens
                encode(example, self.tokenizer, config.training.max_tokens)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        store = ExpertStore(self.model, config.wire.downlink, Adapter.of(config))
        self.strategy = FluxStrategy(grid, config, store)
        self.tables = Tables(config, self.model, self.task.metric, len(store.keys))
        self.about: dict[str, object] = {}
        self.checkpoint = Checkpoint(output.out, config) if output.out else None

    def go(self) -> RunResult:
        """All rounds; tables are written however the run ends, the checkpoint stays unless it is complete."""
        done = self.checkpoint.resume(self.strategy, self.tables) if self.checkpoint else 0
        members = self.strategy.members = join(self.strategy.grid, self.config, self.strategy.store)
        self._notice_lost_states(done)
        # A participant may have said what its device is; the others stand for the run's fleet.
        fleet = [catalogue.DEVICES.get(members[one].device, device) for one, device in enumerate(self.tables.fleet)]
        self.tables.fleet, self.strategy.budgets = fleet, make_budgets(self.config, *self.strategy.store.shape, fleet)
        stopped = False
        if done == 0:
            self.tables.add_round(RoundResult(0, math.nan, (), (), 0), self._evaluate(), 0.0)
            stopped = self._tell()
        while not (stopped or self._is_last(done)):
            done += 1
            stopped = self._round(done)
        self._write("complete" if self._is_last(done) else "stopped")
        if self.output.keep_experts and self.output.out:  # with the base, they are the tuned model
            write_tensors(experts_path(self.output.out, self.config.run_id), changed_tensors(self.strategy.store))
        if self.checkpoint and self._is_last(done):
            self.checkpoint.remove()
        return RunResult(self.config.run_id, **self.tables.frames(), path=self.output.out, model=self.model)

    def _is_last(self, number: int, more_s: float = 0.0) -> bool:
        """Whether the run ends with round ``number``, if that takes it ``more_s`` further on the device clock."""
        rounds, seconds = self.config.federation.rounds, self.config.federation.device_seconds
        return number >= rounds or (seconds is not None and self.tables.device_s + more_s >= seconds)

    def _notice_lost_states(self, done: int) -> None:
        """Say who does not hold any more what it had when the run was interrupted, in the log and beside the tables.

        A node of a deployment may have no ``state-dir``; on Flower's simulation no run goes on. The model is the
        server's and is not affected; profiles and the residual of error feedback are.
        """
        last = {row["participant"]: row["round"] for row in self.tables.rows["participants"] if not row["rejected"]}
        # A participant holds the version that its last round began with: one less than that round's number.
        lost = [one for one, when in last.items() if self.strategy.members[one].held.number < when - 1]
        if lost:
            log.warning(
                "%s: %d participants no longer have what they kept after round %d (experts, profile, what rounding "
                "left out); they get the experts anew, and what follows differs from an uninterrupted run",
                self.config.run_id, len(lost), done,
            )  # fmt: skip
            self.about["states_lost"] = {"after_round": done, "participants": sorted(lost)}

    def _round(self, number: int) -> bool:
        """One round with its evaluation, rows and checkpoint; whether the run is to stop."""
        start, config = time.perf_counter(), self.config
        try:
            result = self.strategy.run_round(number)
        except RunFailed as error:
            if self.strategy.last:
                self.tables.add_participants(self.strategy.last)
            self._write("failed", str(error))
            raise
        wall_s = time.perf_counter() - start
        is_last = self._is_last(number, self.tables.round_seconds(result)[0])
        due = number % config.evaluation.every == 0 or is_last
        self.tables.add_round(result, self._evaluate() if due else NOT_SCORED, wall_s)
        if self.checkpoint and not is_last:
            self.checkpoint.save(number, self.strategy, self.tables)
        return self._tell()

    def _evaluate(self) -> Row:
        """Score the full global model on the test split, and on a quarter as many samples of its other groups."""
        start, samples, most = time.perf_counter(), self.config.evaluation.samples, self.config.training.max_tokens
        scored = partial(evaluate, self.model, self.tokenizer, self.task.metric, max_tokens=most)
        score, quarter = scored(self.task.test[:samples]), samples and max(1, samples // 4)
        recall, untaught = (
            scored(group[:quarter]).metric if group else math.nan for group in (self.task.recall, self.task.untaught)
        )
        found = {"metric": score.metric, "loss": score.loss, "recall": recall, "untaught": untaught}
        return found | {"evaluate_wall_s": time.perf_counter() - start}

    def _tell(self) -> bool:
        """Show the newest row to who asked for it; whether the run is to stop."""
        return bool(self.output.on_round and self.output.on_round(dict(self.tables.rows["rounds"][-1])))

    def _write(self, status: str, failure: str = "") -> None:
        if self.output.out is None:
            return
        private = self.config.engine == "deployment"  # what the participants hold is known to them alone
        shares = [] if private or len(self.parts) > 1000 else histogram(self.task.train, self.parts)
        about = records.about_run(
            self.config.model_dump(mode="json"), self.start, status=status, failure=failure,
            labels_by_participant=shares, **self.about,
        )  # fmt: skip
        self.tables.write(self.output.out, about)
