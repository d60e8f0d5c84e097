"""The course of a run on the server: join, evaluate, and round after round until the last; see :func:`serve`."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext

import pandas as pd
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from safetensors import SafetensorError

from fluxlib import methods, models, records
from fluxlib.config import ConfigError, RunConfig
from fluxlib.federation.client.participant import load_task
from fluxlib.federation.engines.exchange import exchange
from fluxlib.federation.options import Options, RunResult, check, experts_path, table_path
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.server.budgets import make_budgets
from fluxlib.federation.server.joining import join
from fluxlib.federation.server.outcome import RunFailed
from fluxlib.federation.server.strategy import FluxStrategy
from fluxlib.federation.store import lock
from fluxlib.federation.store.checkpoint import TABLES, Checkpoints, save_tensors, store_tensors
from fluxlib.federation.store.tables import Row, RowMaker, Totals
from fluxlib.federation.store.timeline import Timeline
from fluxlib.models.hardware import torch_device
from fluxlib.tasks.batches import encode
from fluxlib.tasks.evaluate import Score, evaluate
from fluxlib.tasks.partition import histogram

log = logging.getLogger(__name__)


def serve(grid: Grid, config: RunConfig, options: Options) -> RunResult:
    """Run all rounds on ``grid``, from the first or from where a checkpoint of the same configuration ends.

    Raises:
        ConfigError: something that :func:`~fluxlib.federation.options.check` refuses, or a model that cannot be loaded.
        RunFailed: too few participants, or too few good replies; what was complete before is written.
        CheckpointError: there is a checkpoint of this configuration, and it is damaged.
    """
    check(config, options.out)
    with lock.hold(options.out, config.run_id) if options.out else nullcontext():
        return _Run(grid, config, options).go()


class _Run:
    """One run in progress."""

    def __init__(self, grid: Grid, config: RunConfig, options: Options) -> None:
        self.grid, self.config, self.options = grid, config, options
        self.start = datetime.datetime.now(datetime.UTC)
        try:
            self.model, self.tokenizer = models.load(config.model, device=torch_device(config.torch_device))
        except (ValueError, OSError, SafetensorError) as error:
            raise ConfigError(f"model is {config.model!r}, it cannot be loaded: {error}") from None
        self.task, self.parts = load_task(config)
        self._check_lengths()
        store = ExpertStore(self.model, config.wire.downlink, approximates=config.wire.merged == "4bit")
        self.strategy = FluxStrategy(config, methods.get(config.method), store, make_budgets(config, *store.shape))
        self.row_maker = RowMaker(config, self.model, self.task.metric, len(store.keys))
        self.rows: dict[str, list[Row]] = {table: [] for table in TABLES}
        self.totals = Totals()
        self.about: dict[str, object] = {}
        self.checkpoints = Checkpoints(options.out, config) if options.out else None

    def _check_lengths(self) -> None:
        """Refuse a ``max_tokens`` that the task's longest responses do not fit into."""
        examples = sorted((*self.task.train, *self.task.test), key=lambda example: len(example.response))
        try:
            for example in examples[-20:]:
                encode(example, self.tokenizer, self.config.training.max_tokens)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def go(self) -> RunResult:
        """All rounds; tables are written however the run ends, the checkpoint stays unless it is complete."""
        done = self._resume()
        self.strategy.roster.enrol(join(self.grid, self.config, self.strategy.store))
        self._notice_lost_states(done)
        self.row_maker.use_devices(self.strategy.roster.devices)
        self.strategy.summary()
        stopped = self._first_row() if done == 0 else False
        try:
            while not stopped and done < self.config.federation.rounds:
                done += 1
                stopped = self._round(done)
        except RunFailed as error:
            self._write("failed", str(error))
            raise
        complete = done == self.config.federation.rounds
        self._write("complete" if complete else "stopped", "")
        if self.options.keep_experts:
            self._keep_experts()
        if self.checkpoints and complete:
            self.checkpoints.remove()
        frames = {table: self._frame(table) for table in self.rows}
        return RunResult(self.config.run_id, **frames, path=self.options.out, model=self.model)

    def _resume(self) -> int:
        """Rounds that are done already."""
        found = self.checkpoints.resume(self.strategy, self.grid) if self.checkpoints else None
        if found is None:
            return 0
        self.totals = found.totals
        self.rows = {table: getattr(found, table).to_dict(orient="records") for table in TABLES}
        walls = (row["end_s"] for row in self.rows["timeline"] if row["clock"] == "wall")
        self.row_maker.times = Timeline(self.config.run_id, max(walls, default=0.0))
        log.info("%s goes on after round %d", self.config.run_id, found.round)
        return found.round

    def _notice_lost_states(self, done: int) -> None:
        """Say who does not hold any more what it had when the run was interrupted, in the log and beside the tables.

        Flower's simulation keeps nodes' states in its own process; a node of a deployment may have no ``state-dir``.
        The model is the server's and is not affected; profiles and the residual of error feedback are.
        """
        last = {row["participant"]: row["round"] for row in self.rows["participants"] if not row["rejected"]}
        forgetful, held = self.config.engine == "simulation", self.strategy.roster.held
        # A participant holds the version that its last round began with: one less than that round's number.
        lost = [number for number, when in last.items() if forgetful or held(number).version < when - 1]
        if lost:
            log.warning(
                "%s: %d participants no longer have what they kept after round %d (experts, profile, what rounding "
                "left out); they get the experts anew, and what follows differs from an uninterrupted run",
                self.config.run_id, len(lost), done,
            )  # fmt: skip
            self.about["states_lost"] = {"after_round": done, "participants": sorted(lost)}

    def _first_row(self) -> bool:
        score, seconds = self._evaluate()
        self.rows["rounds"].append(self.row_maker.base(score, seconds))
        return self._tell()

    def _round(self, number: int) -> bool:
        """One round: profiles that are missing, training, aggregation, evaluation, rows, checkpoint."""
        start, strategy = time.perf_counter(), self.strategy
        requests = strategy.configure_profile(number, strategy.sample(number))
        strategy.aggregate_profile(number, exchange(self.grid, requests, self.config.federation.round_timeout_s))
        try:
            strategy.aggregate_train(number, self._replies(number))
        except RunFailed:
            assert strategy.last is not None
            self.rows["participants"] += self.row_maker.participants(strategy.last)
            raise
        wall_s, before, aggregated = time.perf_counter() - start, self.totals, time.time()
        assert strategy.last is not None
        due = number % self.config.evaluation.every == 0 or number == self.config.federation.rounds
        score, seconds = self._evaluate() if due else (None, 0.0)
        row, self.totals = self.row_maker.round(strategy.last, score, seconds, wall_s, self.totals)
        self.rows["rounds"].append(row)
        self.rows["participants"] += self.row_maker.participants(strategy.last)
        server = [("aggregate", strategy.aggregating_s, aggregated), ("evaluate", aggregated, aggregated + seconds)]
        self.rows["timeline"] += self.row_maker.timeline(strategy.last, server[: 1 + due], before)
        if self.checkpoints and number < self.config.federation.rounds:
            self.checkpoints.save(number, strategy, self.grid, self._frame, self.totals)
        if self.options.on_outcome:
            self.options.on_outcome(strategy.last)
        return self._tell()

    def _replies(self, number: int) -> Iterator[Message]:
        """Replies to the round's requests; who asks for every expert anew is asked once more, with every expert."""
        strategy, timeout_s = self.strategy, self.config.federation.round_timeout_s
        requests = strategy.configure_train(number, ArrayRecord(), ConfigRecord(), self.grid)
        yield from strategy.notice_resync(exchange(self.grid, requests, timeout_s))
        yield from exchange(self.grid, strategy.configure_resync(number), timeout_s)

    def _evaluate(self) -> tuple[Score, float]:
        """Score of the full global model on the server's test split, and the seconds it took."""
        config, start = self.config, time.perf_counter()
        examples = self.task.test[: config.evaluation.samples]
        score = evaluate(self.model, self.tokenizer, self.task.metric, examples, config.training.max_tokens)
        return score, time.perf_counter() - start

    def _tell(self) -> bool:
        """Show the newest row to who asked for it; whether the run is to stop."""
        return bool(self.options.on_round and self.options.on_round(dict(self.rows["rounds"][-1])))

    def _frame(self, table: str) -> pd.DataFrame:
        """The rows so far, checked against the schema, as they will be read back."""
        names = [column.name for column in records.columns(table)]
        return records.validate(table, pd.DataFrame(self.rows[table], columns=names)).to_pandas()

    def _keep_experts(self) -> None:
        """Write the experts that are no longer the base's: with the base, they are the tuned model."""
        assert self.options.out is not None
        path = experts_path(self.options.out, self.config.run_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, store_tensors(self.strategy.store))

    def _write(self, status: str, failure: str) -> None:
        out = self.options.out
        if out is None:
            return
        private = self.config.engine == "deployment"  # what the participants hold is known to them alone
        shares = [] if private or len(self.parts) > 1000 else histogram(self.task.train, self.parts)
        about = records.about_run(
            self.config.model_dump(mode="json"),
            self.start,
            status=status,
            failure=failure,
            labels_by_participant=shares,
            **self.about,
        )
        for table in self.rows:
            records.write(table, self._frame(table), table_path(out, table, self.config.run_id), about)
