"""When each phase of a round began and ended, on both clocks: the rows of the ``timeline`` table.

On the device clock a participant's phases follow one another, its upload and the profile for the next round run side
by side, and the server begins when the last upload is there. On the wall it is what happened: in process participants
work one after another; on other engines they overlap as their machines allow, and a profile made in the background
(:mod:`fluxlib.federation.client.later`) lies beside the server's work. Its row comes with the next reply.

Participants tell the time by their own clocks. Where those disagree with the server's, so that a reply would have been
made before it was asked for or after it came, all its phases are moved to the middle of the time between.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from fluxlib.federation.client.later import Span
from fluxlib.federation.server.outcome import Outcome, RoundOutcome

Row = dict[str, Any]

SERVER = -1
"""Participant number of the server's rows."""

MAX_PARTICIPANTS = 64
"""Participants of a round whose phases are recorded: the first ones asked."""

CHAIN = ("download", "merge", "probe", "train", "pcie")
"""Phases of the device clock that follow one another; ``upload`` follows them, a profile where it belongs."""

TOLERANCE_S = 0.05


class Timeline:
    """Collects rows of one run; ``start_s`` is what the clock on the wall has counted before (a resumed run)."""

    def __init__(self, run_id: str, start_s: float = 0.0) -> None:
        self.run_id = run_id
        self.epoch = time.time() - start_s

    def wall(self, outcome: RoundOutcome, server: Sequence[tuple[str, float, float]]) -> list[Row]:
        """Rows of one round as it was; ``server``: its phases with start and end, seconds since 1970."""
        spans = [(SERVER, "wall", (*span, outcome.round)) for span in server]
        for one in outcome.participants[:MAX_PARTICIPANTS]:
            spans += [(one.participant, "wall", span) for span in aligned(one)]
        return [self._row(who, clock, span, self.epoch) for who, clock, span in spans]

    def device(
        self,
        outcome: RoundOutcome,
        phases: Iterable[tuple[dict[str, float], dict[str, float] | None]],
        server_s: float,
        start_s: float,
    ) -> list[Row]:
        """Rows of one round on the device clock.

        Args:
            phases: of each accepted participant, seconds by phase, and those of a profile made before the round.
            start_s: when the round began.
        """
        rows: list[Row] = []
        arrived = start_s
        for one, (main, before) in zip(outcome.accepted, phases, strict=True):
            first = one.work is not None and one.work.first_profile
            spans = device_spans(main, before, first, start_s)
            arrived = max(arrived, next((end for name, _, end in spans if name == "upload"), start_s))
            if len(rows) < MAX_PARTICIPANTS * 10:
                rows += [self._row(one.participant, "device", (*span, outcome.round), 0.0) for span in spans]
        server = ("aggregate", arrived, arrived + server_s, outcome.round)
        return [*rows, self._row(SERVER, "device", server, 0.0)]

    def _row(self, participant: int, clock: str, span: Span, epoch: float) -> Row:
        name, start, end, number = span
        return {
            "run_id": self.run_id,
            "round": number,
            "participant": participant,
            "clock": clock,
            "phase": name,
            "start_s": start - epoch,
            "end_s": end - epoch,
        }


def device_spans(
    main: dict[str, float], before: dict[str, float] | None, first: bool, start_s: float
) -> list[tuple[str, float, float]]:
    """A participant's phases with start and end; what took no time is left out.

    Args:
        main: seconds by phase of the round.
        before: ``quantize`` and ``profile`` of a profile that was made before the round; None: there was none.
        first: whether the round's own profile stands before merging instead of beside the upload.
    """
    chain = [(name, before[name]) for name in ("quantize", "profile")] if before else []
    profile = [("quantize", main["quantize"]), ("profile", main["profile"])]
    for name in CHAIN:
        chain += profile if name == "merge" and first else []
        chain.append((name, main[name]))
    spans, now = _in_a_row(chain, start_s)
    spans += _in_a_row([("upload", main["upload"])], now)[0]
    spans += [] if first else _in_a_row(profile, now)[0]
    return [span for span in spans if span[2] > span[1]]


def _in_a_row(chain: Sequence[tuple[str, float]], now: float) -> tuple[list[tuple[str, float, float]], float]:
    spans = []
    for name, seconds in chain:
        spans.append((name, now, now + seconds))
        now += seconds
    return spans, now


def aligned(outcome: Outcome) -> list[Span]:
    """A participant's spans on the server's clock."""
    own = [span for span in outcome.spans if span[3] == max(s[3] for s in outcome.spans)]
    if not own:
        return []
    begin, end = min(span[1] for span in own), max(span[2] for span in own)
    early, late = outcome.sent_s - begin, end - outcome.received_s
    shift = 0.0
    if early > TOLERANCE_S or late > TOLERANCE_S:
        shift = (outcome.sent_s + outcome.received_s - begin - end) / 2
    return [(name, start + shift, stop + shift, number) for name, start, stop, number in outcome.spans]
