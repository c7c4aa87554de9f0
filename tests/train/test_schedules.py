import math
from fractions import Fraction

import pytest

from fastbyol.config import OptimConfig
from fastbyol.schedules import Schedule, learning_rate, scaled_lr, target_decay, total_steps

IMAGENET = 1_281_167


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


@pytest.mark.parametrize(
    ("epochs", "steps"),  # epochs * 1,281,167 // 4096, as byol/configs/byol.py computes max_steps
    [(40, 12_511), (100, 31_278), (300, 93_835), (1000, 312_784)],
)
def test_steps_and_warmup_are_the_authors(epochs, steps):
    schedule = Schedule(OptimConfig(epochs=epochs), 4096, Fraction(IMAGENET, 4096))
    assert (schedule.total_steps, schedule.warmup_steps) == (steps, 3_127)
    assert schedule.lr(3_127) == scaled_lr(0.45, 4096)
    assert schedule.lr(3_126) == pytest.approx(scaled_lr(0.45, 4096) * 3_126 / 3_127)


def test_a_decimal_number_of_epochs_is_taken_as_written():
    assert total_steps(0.29, Fraction(100)) == 29  # 28.999... in binary
    assert total_steps(1e-6, Fraction(10**6)) == 1


@pytest.mark.parametrize(("images", "batch"), [(72, 16), (64, 16), (17, 16), (16, 16), (IMAGENET, 4096), (100, 7)])
def test_epochs_end_after_floor_of_epochs_times_images_over_batch(images, batch):
    epochs = 12
    schedule = Schedule(OptimConfig(epochs=epochs), batch, Fraction(images, batch))
    ends = [done for done in range(1, schedule.total_steps + 1) if schedule.ends_epoch(done)]
    assert ends == [epoch * images // batch for epoch in range(1, epochs + 1)]
    assert [schedule.epoch(done) for done in ends] == list(range(1, epochs + 1))
    assert schedule.epoch(0) == 0
    assert ends[-1] == schedule.total_steps
