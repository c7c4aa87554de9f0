"""`fastbyol doctor`: exit codes, and a command for everything that is missing."""

import re

import pytest

from fastbyol.cli import main
from fastbyol.runtime import environment
from fastbyol.tools import doctor


@pytest.mark.slow
@pytest.mark.dali
@pytest.mark.ffcv
def test_doctor_reports_what_works(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"ok +images", out)
    assert re.search(r"ok +CPU kernels", out)
    assert re.search(r"(ok|--) +GPU", out)
    assert re.search(r"ok +DALI +\S+, decodes a gray JPEG on the CPU with an error of [0-3]/255", out)
    assert re.search(r"ok +FFCV +\S+, its loader works", out)
    assert re.search(r"(ok|--) +driver", out)
    assert re.search(r"ok +Triton", out)
    assert "FAIL" not in out


def test_doctor_names_the_command_for_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(environment, "has_module", lambda name: False)
    monkeypatch.setattr(environment, "installed", lambda name: "0.1" if name == "nvidia-dali" else None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"-- +DALI +nvidia-dali 0.1 is only a stub: pip install nvidia-dali-cuda\d+", out)
    assert re.search(r"-- +FFCV +not installed .*: apt-get install libopencv-dev", out)
    assert re.search(r"-- +Triton +not installed: pip install torch", out)


def test_a_failed_required_check_is_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "decode", lambda data: doctor.np.zeros((8, 8, 3), dtype="uint8"))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  images               a gray JPEG decodes 200/255 off: pip install" in out
    assert re.search(r"ok +CPU kernels", out)  # the other checks run all the same
