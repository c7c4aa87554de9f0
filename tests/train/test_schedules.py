import math

import pytest

from fastbyol.schedules import learning_rate, scaled_lr, target_decay


def test_peak_follows_the_linear_scaling_rule():
    assert scaled_lr(0.45, 4096) == pytest.approx(7.2)
    assert scaled_lr(2.0, 256) == 2.0


def test_learning_rate_schedule():
    rate = {"peak": 7.2, "warmup_steps": 10, "total_steps": 110}
    assert learning_rate(0, **rate) == 0
    assert learning_rate(9, **rate) == pytest.approx(7.2 * 0.9)
    assert learning_rate(10, **rate) == 7.2
    assert learning_rate(60, **rate) == pytest.approx(3.6)
    assert learning_rate(109, **rate) == pytest.approx(7.2 * (1 + math.cos(math.pi * 0.99)) / 2)
    assert learning_rate(110, **rate) == pytest.approx(0, abs=1e-12)


def test_learning_rate_without_warmup_or_with_warmup_only():
    assert learning_rate(0, peak=1, warmup_steps=0, total_steps=10) == 1
    assert learning_rate(3, peak=1, warmup_steps=4, total_steps=4) == 0.75


def test_target_decay_rises_from_its_base_to_one():
    assert target_decay(0, base=0.996, total_steps=1000) == pytest.approx(0.996)
    assert target_decay(500, base=0.996, total_steps=1000) == pytest.approx(0.998)
    assert target_decay(999, base=0.996, total_steps=1000) == pytest.approx(1, abs=1e-7)
    assert target_decay(1000, base=0.996, total_steps=1000) == 1
