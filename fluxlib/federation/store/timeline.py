"""When each phase of a round began and ended, on both clocks: the rows of the ``timeline`` table.

On the device clock a participant's phases follow one another, its upload and the profile for the next round run side
by side, and the server begins when the last upload is there. On the wall it is what happened: in process participants
work one after another; on other engines they overlap as their machines allow, and a profile made in the background
lies beside the server's work. Its row comes with the next reply.

Participants tell the time by their own clocks. Where those disagree with the server's, so that a reply would have been
made before it was asked for or after it came, all its phases are moved to the middle of the time between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fluxlib.federation.results import Participation, RoundResult, Row

Span = tuple[str, float, float]
"""A phase with its start and end."""

SERVER = -1
"""Participant number of the server's rows."""

MAX_PARTICIPANTS = 64
"""Participants of a round whose phases are recorded: the first ones asked."""

CHAIN = ("download", "merge", "probe", "train", "pcie")
"""Phases of the device clock that follow one another; ``upload`` follows them, a profile where it belongs."""

TOLERANCE_S = 0.05


def wall_rows(result: RoundResult, server: Sequence[Span], epoch: float) -> list[Row]:
    """A round as it was, from ``epoch`` on (seconds since 1970, as are the times of the ``server``'s own phases)."""
    rows = [_row(SERVER, "wall", result.round, name, start - epoch, end - epoch) for name, start, end in server]
    for one in result.participants[:MAX_PARTICIPANTS]:
        spans = aligned(one)
        rows += [_row(one.participant, "wall", n, name, start - epoch, end - epoch) for name, start, end, n in spans]
    return rows


def device_rows(
    result: RoundResult,
    phases: Mapping[int, tuple[dict[str, float], dict[str, float] | None]],
    server_s: float,
    start_s: float,
) -> list[Row]:
    """A round on the device clock.

    Args:
        phases: of each accepted participant, seconds by phase, and those of a profile made before the round.
        server_s: what the server takes.
        start_s: when the round began.
    """
    rows: list[Row] = []
    arrived = start_s
    for position, one in enumerate(result.accepted):
        main, before = phases[one.participant]
        spans = device_spans(main, before, one.work is not None and one.work.first_profile, start_s)
        arrived = max(arrived, next((end for name, _, end in spans if name == "upload"), start_s))
        if position < MAX_PARTICIPANTS:
            rows += [_row(one.participant, "device", result.round, *span) for span in spans]
    return [*rows, _row(SERVER, "device", result.round, "aggregate", arrived, arrived + server_s)]


def device_spans(main: dict[str, float], before: dict[str, float] | None, first: bool, start_s: float) -> list[Span]:
    """A participant's phases with start and end; what took no time is left out.

    Args:
        main: seconds by phase of the round.
        before: ``quantize`` and ``profile`` of a profile that was made before the round; None: there was none.
        first: whether the round's own profile stands before merging instead of beside the upload.
        start_s: when the round began.
    """
    profile = [("quantize", main["quantize"]), ("profile", main["profile"])]
    chain = [(name, before[name]) for name in ("quantize", "profile")] if before else []
    for name in CHAIN:
        chain += profile if name == "merge" and first else []
        chain.append((name, main[name]))
    spans = _in_a_row(chain, start_s)
    end = spans[-1][2]
    spans += _in_a_row([("upload", main["upload"])], end) + ([] if first else _in_a_row(profile, end))
    return [span for span in spans if span[2] > span[1]]


def _in_a_row(chain: Sequence[tuple[str, float]], now: float) -> list[Span]:
    spans = []
    for name, seconds in chain:
        spans.append((name, now, now + seconds))
        now += seconds
    return spans


def aligned(one: Participation) -> list[tuple[str, float, float, int]]:
    """A participant's phases on the server's clock, each with its round."""
    own = [span for span in one.spans if span[3] == max(s[3] for s in one.spans)]
    if not own:
        return []
    begin, end = min(span[1] for span in own), max(span[2] for span in own)
    early, late = one.sent_s - begin, end - one.received_s
    shift = 0.0
    if early > TOLERANCE_S or late > TOLERANCE_S:
        shift = (one.sent_s + one.received_s - begin - end) / 2
    return [(name, start + shift, stop + shift, number) for name, start, stop, number in one.spans]


def _row(participant: int, clock: str, number: int, name: str, start_s: float, end_s: float) -> Row:
    return {
        "round": number, "participant": participant, "clock": clock, "phase": name, "start_s": start_s, "end_s": end_s,
    }  # fmt: skip
