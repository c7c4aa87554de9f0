"""Spans: events of a recorder, and no overhead without one."""

import sys

import pytest
from helpers.steps import new_batch, new_step

from fastbyol import spans
from fastbyol.spans import BACKWARD, ONLINE, TARGET, UPDATE, recording, span


class Recorder:
    def __init__(self):
        self.events = []

    def begin(self, name):
        self.events.append(("begin", name))

    def end(self, name):
        self.events.append(("end", name))


def test_step_opens_its_spans_in_order():
    step, recorder = new_step(), Recorder()
    with recording(recorder):
        step(0, new_batch(0))
    names = [TARGET, ONLINE, BACKWARD, UPDATE]
    assert recorder.events == [event for name in names for event in (("begin", name), ("end", name))]


def test_span_ends_when_its_body_raises():
    recorder = Recorder()
    with recording(recorder), pytest.raises(ValueError, match="inside"), span("x"):
        raise ValueError("inside")
    assert recorder.events == [("begin", "x"), ("end", "x")]


def test_recording_restores_the_previous_recorder():
    outer, inner = Recorder(), Recorder()
    with recording(outer):
        with recording(inner), span("a"):
            pass
        with span("b"):
            pass
    assert (inner.events, outer.events) == ([("begin", "a"), ("end", "a")], [("begin", "b"), ("end", "b")])
    assert spans._recorder is None


def test_span_without_a_recorder_is_a_shared_no_op():
    assert span("a") is span("b") is spans._OFF


def test_span_without_a_recorder_makes_three_python_calls():
    """A count: times depend on the machine."""
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
    with span("x"):
        pass
    sys.setprofile(None)
    assert calls == ["span", "__enter__", "__exit__"]
