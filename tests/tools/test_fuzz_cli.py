"""Random command lines and YAML files: exit code 0, 1 or 2, one line on stderr, no hang."""

import random
import signal

import pytest
from helpers.common import ROOT

from fastbyol import cli
from fastbyol.cli import main
from fastbyol.config import Config
from fastbyol.settings.base import leaves
from fastbyol.settings.commands import Command, options_of

HANG_S = 120  # more than any command takes under any load
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

ODD = [
    *(
        "",
        " ",
        "-",
        "--",
        "-1",
        "0",
        "1",
        "3",
        "3.5",
        "1e-6",
        "1_000",
        "010",
        "0x10",
        "1e400",
        "-1e-3",
        "nan",
        ".inf",
        "-inf",
        "9" * 30,
    ),
    *(
        "9" * 5000,
        "10" * 9,
        str(10**18),
        str(2**63),
        "true",
        "yes",
        "off",
        "null",
        "~",
        "None",
        "auto",
        "none",
        "many",
        "[",
        "[1, 2",
        "[1,x]",
    ),
    *(
        "1,5,10",
        ",",
        "{a: 1}",
        "&a [*a]",
        "*a",
        "!!python/object:os.system x",
        "a\0b",
        "a\nb",
        "\udcff",
        "\ud800",
        "ü" * 130,
        "x" * 300,
    ),
    *(
        "x" * 5000,
        "..",
        ".",
        "/",
        "a/b",
        "-x",
        "\x1b[2J",
        "%s",
        "{}",
        "日本",
        "/dev/null",
        "/nowhere/x",
        "~",
        "2026-01-01",
        "é",
        "\u202e",
    ),
]


class _Hang(Exception):
    pass


@pytest.fixture(autouse=True)
def hang_guard(tmp_path, monkeypatch):
    """Fail a test whose command hangs, and run it in an empty folder."""

    def stop(number, frame):
        raise _Hang

    before = signal.signal(signal.SIGALRM, stop)
    monkeypatch.chdir(tmp_path)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def commands_of(commands, path=()):
    for word, command in commands.commands.items():
        if isinstance(command, Command):
            yield [*path, word], command
        else:
            yield from commands_of(command, (*path, word))


# doctor takes no options and several seconds.
COMMANDS = [(path, command) for path, command in commands_of(cli.COMMANDS) if path != ["doctor"]]


def run_checked(capsys, words):
    """Run a command line in this process and check how it ends."""
    signal.alarm(HANG_S)
    code = main(words)
    signal.alarm(0)
    out, err = capsys.readouterr()
    context = f"{words!r}: {code}, {err!r}"
    assert code in (0, 1, 2), context
    assert "Traceback" not in out + err, context
    assert "typing." not in err, context
    if code:
        assert err.startswith("fastbyol: error: "), context
        assert err.count("\n") == 1, context
        assert err.endswith("\n"), context
        assert len(err) < 1500 or max(map(len, words)) > 1000, context
        assert err[:-1].isprintable(), context
    return code, err


def misspelled(rng, word):
    k = rng.randrange(len(word))
    return rng.choice(
        [
            word[:k],
            word[:k] + word[k + 1 :],
            word[:k] + word[k : k + 1] * 2 + word[k + 1 :],
            word.replace("_", "-"),
            word.upper(),
        ]
    )


def good_value(rng, option):
    """Return a value that the type accepts, mostly."""
    kind = str(option.field.type)
    for mark, values in (
        ("Literal", ["auto", "cpu", "none", "byol", "lars", "jpg", "timm", "h100"]),
        ("tuple", ["1,5", "0.1,0.3", "[1, 2]"]),
        ("list", ["cat,dog", "[]"]),
        ("bool", ["true", "no"]),
        ("int", ["1", "2", "16", "64"]),
        ("float", ["0.1", "1e-3", "0.5"]),
    ):
        if mark in kind:
            return rng.choice(values)
    return rng.choice(["x", "some/path", "/nowhere"])


def command_line(rng, folder):
    """Return a random command line that starts nothing long: no input exists, no output is
    writable.
    """
    path, command = rng.choice(COMMANDS)
    words = list(path)
    if rng.random() < 0.05:
        k = rng.randrange(len(words))
        words[k] = rng.choice([misspelled(rng, words[k]), rng.choice(ODD)])
    options = [*options_of(command.options), *(options_of(Config) if command.takes_config else ())]
    for _ in range(rng.randrange(7)):
        option = rng.choice(options)
        name = option.name if rng.random() < 0.9 else misspelled(rng, option.name)
        value = rng.choice(ODD) if rng.random() < 0.4 else good_value(rng, option)
        if not option.named:
            words.append(value)
        elif rng.random() < 0.05:
            words.append(name)
        else:
            words += [f"{name}={value}"] if rng.random() < 0.5 else [name, value]
    if command.takes_config and rng.random() < 0.3:
        words.insert(rng.randrange(len(path), len(words) + 1), f"--config={yaml_file(rng, folder)}")
    if rng.random() < 0.05:
        words.insert(
            rng.randrange(len(words) + 1), rng.choice(["--help", "-h", "--help-all", "help", "--version", *ODD])
        )
    last = {option.name for option in options}
    for name in ("--data.root", "--out", "--run", "--source", "--rates"):  # they neither exist nor can be created
        if name in last:
            words.append(f"{name}=/proc/nowhere/{'x' * rng.choice([1, 300])}")
    if "--gpus" in last:
        words.append("--gpu=h100")  # an error together with --rates
    return words


def yaml_value(rng, kind):
    odd = rng.choice(
        ['"', "[", "{a: b}", "- x", "!!int 3", "&x 3", "*x", "|\n    text", "null", "", '"\\ud800"', '"\\0"', *ODD]
    )
    return odd if rng.random() < 0.5 else rng.choice(["1", "0.5", "true", "auto", "lars", "cat", "[a, b]"])


def yaml_file(rng, folder):
    """Write random settings, random bytes, or a shipped config with changed bytes."""
    kind = rng.randrange(4)
    if kind == 0:
        data = rng.randbytes(rng.randrange(200))
    elif kind == 1:
        data = bytearray(rng.choice(CONFIGS).read_bytes())
        for _ in range(rng.randrange(1, 5)):
            k = rng.randrange(len(data))
            data[k : k + rng.randrange(3)] = rng.choice(
                [b"", b":", b"\n", b"\t", b"\xe9", b" ", b"-", b"#", b"'", b"\0", b"&a ", b"<<: "]
            )
    else:
        sections = {}
        for _ in range(rng.randrange(6)):
            name, f, _ = rng.choice(list(leaves(Config)))
            section, _, key = name.rpartition(".")
            key = misspelled(rng, key) if rng.random() < 0.1 else key
            sections.setdefault(section, []).append(f"{key}: {yaml_value(rng, f.type)}")
        lines = [*sections.pop("", [])]
        for section, inner in sections.items():
            lines += (
                [f"{section}: {rng.choice(ODD)}"]
                if rng.random() < 0.1
                else [f"{section}:", *(f"  {line}" for line in inner)]
            )
        rng.shuffle(lines) if rng.random() < 0.1 else None
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
    path = folder / f"{rng.randrange(10**9)}.yaml"
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("seed", range(5))
def test_random_command_lines(seed, capsys, tmp_path):
    rng = random.Random(seed)
    found = [run_checked(capsys, command_line(rng, tmp_path)) for _ in range(60)]
    assert {code for code, _ in found} >= {2}
    assert any("did you mean" in err for _, err in found)


@pytest.mark.parametrize("seed", range(5))
def test_random_yaml_files(seed, capsys, tmp_path):
    rng = random.Random(1000 + seed)
    for _ in range(40):
        code, _ = run_checked(capsys, ["preview", f"--config={yaml_file(rng, tmp_path)}", "--data.root=/proc/nowhere"])
        assert code == 2
