"""profile.html shows the numbers of profile.json."""

import re

import pytest

from fastbyol.tools.profile_page import write_profile_page


@pytest.fixture
def result():
    """A profile of three parts. The traced step took twice as long as the timed one."""
    parts = {"wait for data": 1.0, "backward": 6.0, "LARS + target": 3.0}
    spread = {"p20_ms": 0.25, "p50_ms": 0.5, "p95_ms": 0.75}
    roofline = {"gflop": 12.5, "gbyte": 0.125, "measured_ms": 6.0, "roofline_ms": 3.0, "share_of_roofline": 0.5}
    return {
        "what": "resnet18 at 32 px <&>",
        "steps": 7,
        "images_per_s": 123.45,
        "step_ms": {"p50": 10.25, "least": 9.125, "most": 11.5},
        "marked_step_ms": {"mean_ms": 10.0, "p20_ms": 9.5, "p50_ms": 10.5, "p95_ms": 12.5},
        "parts_over_step": {"p50": 0.975, "least": 0.9, "most": 1.0},
        "parts": [{"part": name, "mean_ms": ms, "share": ms / 10} | spread for name, ms in parts.items()],
        "operators": {
            "wait for data": [],
            "backward": [{"name": f"op{k}", "ms": 1.5, "calls": 1} for k in range(8)],
            "LARS + target": [{"name": "update<int>", "ms": 6.0, "calls": 2}],
        },
        "roofline": {
            "peak_flops_per_s": 1.5e12,
            "peak_bytes_per_s": 20e9,
            "mfu": 0.345,
            "units": 7.75,
            "parts": {"backward": roofline},
        },
        "loader_threads": {"decode": 1.125},
        "kernels": [{"name": "void gemm<float>", "ms": 4.5, "share": 0.25, "calls": 2.5}],
        "counts": "host syncs per step: 0; not compiled",
        "memory": {"ms": [0, 1], "bytes": [2**20, 0], "parts": [], "base_bytes": 0},
        "environment": {"torch": "2.11"},
    }


def cells(page, first):
    """The cells of the table rows that begin with `first`."""
    rows = (re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL))
    return [row[1:] for row in rows if row and row[0] == first]


def test_the_page_shows_every_number(result, tmp_path):
    page = write_profile_page(tmp_path, result).read_text()
    assert (tmp_path / "profile.html").read_text() == page
    assert cells(page, "wait for data") == [["10.0", "1.00", "0.25", "0.50", "0.75"]]
    assert cells(page, "sum") == [["100.0", "10.00", "9.50", "10.50", "12.50"]]
    assert cells(page, "backward") == [
        ["60.0", "6.00", "0.25", "0.50", "0.75"],
        ["12.5", "0.125", "3.00", "6.00", "50"],
    ]
    assert cells(page, "decode") == [["1.125"]]
    assert cells(page, "void gemm&lt;float&gt;") == [["4.50", "25.0", "2.5"]]
    for text in (
        "<p>resnet18 at 32 px &lt;&amp;&gt;</p>",
        '<div class="value">10.25 ms</div>\n<div class="detail">uninstrumented, range 9.12-11.50</div>',
        '<div class="value">123.5</div>\n<div class="detail">images/s</div>',
        '<div class="value">34.5%</div>',
        '<div class="value">97.5%</div>',
        "7 instrumented and 7 plain steps, interleaved",
        "1.500 TFLOP/s (matrix product),\n20.0 GB/s (copy)",
        "7.75 forward passes of one view",
        "host syncs per step: 0; not compiled",
        "<tr><th>torch</th><td>2.11</td></tr>",
    ):
        assert text in page
    assert page.count("data:image/png;base64,") == 1


def test_bars_share_one_time_scale(result, tmp_path):
    page = write_profile_page(tmp_path, result).read_text()
    bars = [
        [(title, float(percent)) for title, percent in re.findall(r'<div title="(.*?)" style="width:([\d.]+)%', bar)]
        for bar in page.split('<div class="stack">')[1:]
    ]
    measured, operators, roofline = bars
    assert measured == [("wait for data: 1.00 ms", 10), ("backward: 6.00 ms", 60), ("LARS + target: 3.00 ms", 30)]
    assert operators == [
        ("wait for data / others: 1.00 ms", 10),
        *((f"backward / op{k}: 0.75 ms", 7.5) for k in range(6)),
        ("backward / others: 1.50 ms", 15),
        ("LARS + target / update&lt;int&gt;: 3.00 ms", 30),
    ]
    assert roofline == [("backward: 3.00 ms", 30)]


def test_sections_without_data_are_left_out(result, tmp_path):
    page = write_profile_page(tmp_path, result).read_text()
    assert "<h2>Loader threads</h2>" in page
    assert "<h2>Memory</h2>" in page
    result["loader_threads"] = None
    result["memory"]["ms"] = []
    page = write_profile_page(tmp_path, result).read_text()
    assert "<h2>Loader threads</h2>" not in page
    assert "<h2>Memory</h2>" not in page
