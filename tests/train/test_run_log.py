"""Log of a run: train.log, progress bar, and progress lines without a terminal."""

import io
import logging
import sys

from fastbyol.errors import RunError
from fastbyol.runtime import run_log
from fastbyol.runtime.console import safe_stdio
from fastbyol.runtime.logging import logger
from fastbyol.runtime.run_log import LOG, EarlyRecords, RunLog


class BrokenAfterOneWrite(io.StringIO):
    """A pipe whose reader exits."""

    left = 1

    def write(self, text):
        if self.left == 0:
            raise BrokenPipeError(32, "Broken pipe")
        self.left -= 1
        return super().write(text)


def new_log(tmp_path, **options):
    return RunLog(tmp_path, start=0, total_steps=4, steps_per_epoch=2, batch_size=8, **options)


def text_of(tmp_path):
    return [line[20:] for line in (tmp_path / LOG).read_text().splitlines()]  # without the timestamp


def test_train_log_survives_a_broken_console(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", BrokenAfterOneWrite())
    with safe_stdio(), new_log(tmp_path):
        logger.info("one [red]:smile: caf\udce9")
        logger.warning("two")
        logger.info("three")
    assert text_of(tmp_path) == [
        "one [red]:smile: caf\\udce9",
        "warning: two",
        "warning: the console is gone (Broken pipe): from here on only this file has the run's messages",
        "three",
    ]


def test_train_log_begins_with_early_records_and_ends_with_the_error(tmp_path):
    with EarlyRecords() as early:
        logger.warning("before the folder")
        try:
            with new_log(tmp_path, early=early.release()):
                logger.info("during the run")
                raise RunError("full disk")
        except RunError:
            pass
        logger.info("after the run")
    assert text_of(tmp_path) == ["warning: before the folder", "during the run", "error: full disk"]
    assert not any(isinstance(handler, run_log._TextLog | EarlyRecords) for handler in logger.handlers)


def test_other_ranks_write_nothing(tmp_path):
    with new_log(tmp_path, is_main_process=False) as log:
        logger.info("text")
        log.train(1, loss=1.0, lr=0.1, tau=0.99, projection_std=0.1, wait_s=0.0)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_does_not_stop_the_text_log(tmp_path):
    with new_log(tmp_path) as log:
        log._text._file.close()
        log._text._file = open("/dev/full", "wb", buffering=0)
        logger.log(logging.INFO, "lost")


def test_progress_bar_shows_loss_and_rate_from_the_first_step(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: float(next(clock)))
    with new_log(tmp_path) as log:
        assert log._shown == {}
        log.first(1, 1.25)
        assert log._shown == {"loss": "1.250", "img/s": "8"}
        log.advance(1)
        log.advance(3)
        assert log._shown == {"loss": "1.250", "img/s": "16"}  # two steps of 8 images in one second
        log.train(4, loss=1.0, lr=0.1, tau=0.99, projection_std=0.1, wait_s=0.0)
        assert log._shown["loss"] == "1.000"
        assert "wait" in log._shown


def test_progress_lines_every_ten_seconds_without_a_terminal(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: clock[0])
    values = {"loss": 1.0, "lr": 0.1, "tau": 0.99, "projection_std": 0.1, "wait_s": 0.0}
    with new_log(tmp_path) as log:
        for step, now in enumerate([4.0, 11.0, 12.0, 22.0], 1):
            clock[0] = now
            log.train(step, **values)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  loss")[0] for line in lines] == ["epoch 1/2  step 2/4", "epoch 2/2  step 4/4"]
