"""Which findings are sent, and when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.alerts.finding_alerts import FindingAlerts
from traceml.database.store.reader import StoreReader
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.errors import TraceMLError
from traceml.privacy.masker import Masker
from traceml.run_folder import STORE_NAME

SLOW = Finding(kind=Kind.INPUT_BOUND, severity=Severity.WARNING, phase="input_wait", summary="Slow.", next="Do.")
LOST = Finding(kind=Kind.RANK_LOST, severity=Severity.CRITICAL, ranks=(1,), summary="Lost.", next="Look.")


class _Inbox:
    """A target that keeps what it gets, or fails."""

    name = "inbox"

    def __init__(self, error: str = "", *, is_masked: bool = False) -> None:
        self.documents: list[dict[str, Any]] = []
        self.error, self.is_masked = error, is_masked

    @property
    def kinds(self) -> list[str]:
        return [each["finding"]["kind"] for each in self.documents]

    async def send(self, document: bytes) -> None:
        self.documents.append(json.loads(document))
        if self.error:
            raise TraceMLError(self.error)


class _Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def run(tmp_path: Path) -> Iterator[ActiveRun]:
    (tmp_path / "run").mkdir()
    made = ActiveRun(tmp_path / "run", "key", named=True)
    yield made
    made.close()


def _alerts(work: Callable[[FindingAlerts, _Clock], None], *inboxes: _Inbox) -> None:
    async def main() -> None:
        clock = _Clock()
        alerts = FindingAlerts(inboxes, 30.0, clock, Masker(["customer_*"]))
        work(alerts, clock)
        await alerts.close(5.0)

    asyncio.run(main())


def test_a_finding_that_stands_is_sent_once(run: ActiveRun) -> None:
    """After its time, with the run and a text for chat programs."""
    inbox = _Inbox()

    def work(alerts: FindingAlerts, clock: _Clock) -> None:
        for seconds in (0.0, 29.0, 1.0, 60.0):
            clock.now_s += seconds
            alerts.check(run, [SLOW])
            if seconds == 29.0:
                assert not alerts.is_busy

    _alerts(work, inbox)

    assert inbox.kinds == ["INPUT_BOUND"]
    document = inbox.documents[0]
    assert (document["schema"], document["run"]["id"], document["run"]["path"]) == (
        "traceml.alert/1", "run", str(run.path)
    )  # fmt: skip
    assert document["text"].startswith("INPUT_BOUND in run run: ")
    assert document["host"]


def test_a_finding_that_comes_and_goes_is_not_sent(run: ActiveRun) -> None:
    """Its time begins anew; neither are infos sent."""
    inbox = _Inbox()
    calm = Finding(kind=Kind.HEALTHY, severity=Severity.INFO, summary="Well.", next="Go on.")

    def work(alerts: FindingAlerts, clock: _Clock) -> None:
        for number in range(20):
            clock.now_s += 10.0
            alerts.check(run, [calm, SLOW] if number % 3 else [calm])

    _alerts(work, inbox)

    assert inbox.kinds == []


def test_the_end_of_a_run_is_sent_at_once(run: ActiveRun) -> None:
    """A lost rank and a hang, unless they were sent before; no other finding."""
    inbox = _Inbox()

    def work(alerts: FindingAlerts, clock: _Clock) -> None:
        alerts.check_end(run, [LOST, SLOW])
        alerts.check_end(run, [LOST])

    _alerts(work, inbox)

    assert inbox.kinds == ["RANK_LOST"]


def test_texts_for_a_webhook_are_masked(run: ActiveRun) -> None:
    """Also those of the finding itself; a command of this machine gets them as they are."""
    told = "FileNotFoundError: 'customer_4711' in /home/alice"
    finding = structs.replace(LOST, summary=told, evidence={"exits": [{"exception": told}]})
    webhook, command = _Inbox(is_masked=True), _Inbox()

    _alerts(lambda alerts, _: alerts.check_end(run, [finding]), webhook, command)

    sent = json.dumps(webhook.documents)
    assert "alice" not in sent
    assert "customer_4711" not in sent
    assert webhook.kinds == ["RANK_LOST"]
    assert command.documents[0]["finding"]["summary"] == told


def test_many_findings_are_spread_over_time(run: ActiveRun) -> None:
    """Ten a minute; those above come later, none is dropped."""
    inbox = _Inbox()
    findings = [Finding(kind=Kind.STRAGGLER, severity=Severity.WARNING, ranks=(rank,), summary="x", next="y")
                for rank in range(25)]  # fmt: skip

    def work(alerts: FindingAlerts, clock: _Clock) -> None:
        alerts.check(run, findings)
        for minute in range(3):
            clock.now_s += 61.0
            alerts.check(run, findings)
            alerts.check(run, findings)
            assert len(alerts._tasks) == min(10 * (minute + 1), 25)

    _alerts(work, inbox)

    assert len({tuple(each["finding"]["ranks"]) for each in inbox.documents}) == 25 == len(inbox.documents)


def test_the_end_of_a_run_is_sent_however_many_were(run: ActiveRun) -> None:
    """It has no later try: ten other findings in this minute do not swallow it."""
    inbox = _Inbox()
    others = [Finding(kind=Kind.STRAGGLER, severity=Severity.WARNING, ranks=(rank,), summary="x", next="y")
              for rank in range(10)]  # fmt: skip

    def work(alerts: FindingAlerts, clock: _Clock) -> None:
        alerts.check(run, others)
        clock.now_s += 30.0
        alerts.check(run, others)
        alerts.check_end(run, [LOST])

    _alerts(work, inbox)

    assert inbox.kinds == [*["STRAGGLER"] * 10, "RANK_LOST"]


def test_a_failure_is_logged_and_stored(run: ActiveRun, caplog: pytest.LogCaptureFixture) -> None:
    """Another try is the target's own matter."""
    inbox = _Inbox("the printer is on fire")

    def work(alerts: FindingAlerts, clock: _Clock) -> None:
        alerts.check(run, [SLOW])
        clock.now_s += 30.0
        alerts.check(run, [SLOW])

    _alerts(work, inbox)
    run.commit(force=True)

    assert "the alert INPUT_BOUND of run run was not delivered: the printer is on fire" in caplog.text
    with StoreReader(run.path / STORE_NAME) as reader:
        (event,) = reader.events(kind="alert")

    assert event.data == {"kind": "INPUT_BOUND", "target": "inbox", "error": "the printer is on fire"}


def test_an_alert_under_way_is_given_up_at_the_end(run: ActiveRun) -> None:
    """After the aggregator's last seconds."""

    class Slow(_Inbox):
        async def send(self, document: bytes) -> None:
            await super().send(document)
            await asyncio.Event().wait()

    async def main() -> bool:
        alerts = FindingAlerts([Slow()], 0.0)
        alerts.check(run, [SLOW])
        assert alerts.is_sending(run.path)
        await alerts.close(0.1)
        return alerts.is_busy

    assert not asyncio.run(main())
