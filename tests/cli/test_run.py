"""`hasten run`: ranks that start, speak, fail and end together, on one node and on several."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.cli import run as command_run
from hasten.cli.__main__ import main, parser
from hasten.cli.launch import hosts, ssh
from hasten.errors import ConfigError
from tests.parallel.ranks import free_port

ROOT = Path(__file__).parents[2]
STARTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# torch leaves the logs of ranks that have ended by themselves to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

Script = Callable[[str], Path]


@pytest.fixture(autouse=True)
def nobody_has_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in STARTED or name.startswith(("SLURM_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Writes a script that knows its `rank` and a folder, `here`."""

    def write(body: str) -> Path:
        path = tmp_path / "script.py"
        start = (
            f"import os, sys, time, pathlib\nrank, here = int(os.environ['RANK']), pathlib.Path({str(tmp_path)!r})\n"
        )
        path.write_text(start + textwrap.dedent(body))
        return path

    return write


@pytest.fixture
def launch(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`hasten run` in this process: exit status, output, errors."""

    def start(*argv: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = main(["run", *map(str, argv)])
        except SystemExit as e:
            status = int(e.code or 0)
        return (status, *capfd.readouterr())

    return start


def popen(*argv: object, **more: Any) -> subprocess.Popen[str]:
    """`hasten run` in a process of its own."""
    command = [sys.executable, "-m", "hasten", "run", *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def environments(folder: Path) -> list[dict[str, str]]:
    """What ranks that ran TELL found, in order."""
    return [json.loads(p.read_text()) for p in sorted(folder.glob("rank*.json"), key=lambda p: int(p.stem[4:]))]


TELL = "import json; (here / f'rank{rank}.json').write_text(json.dumps({**os.environ, 'argv': sys.argv[1:]}))\n"


# One node.


def test_ranks_find_torchruns_environment(launch: Any, script: Script, tmp_path: Path) -> None:
    assert launch("--num_gpus", 2, script(TELL)) == (0, "", "")
    found = environments(tmp_path)
    assert [[e[name] for name in STARTED[:5]] for e in found] == [
        ["0", "2", "0", "2", "127.0.0.1"],
        ["1", "2", "1", "2", "127.0.0.1"],
    ]
    assert len({e["MASTER_PORT"] for e in found}) == 1
    assert int(found[0]["MASTER_PORT"]) > 1023


def test_ranks_meet_over_the_launchers_store(launch: Any, script: Script) -> None:
    body = """
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    x = torch.tensor([rank + 1.0])
    dist.all_reduce(x)
    print(x.item(), flush=True)
    dist.destroy_process_group()
    """
    assert launch("--num_gpus", 2, "--master_port", free_port(), script(body))[:2] == (0, "3.0\n")


def test_one_rank_where_there_is_no_gpu_and_all_visible_gpus_elsewhere(
    launch: Any, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_run, "visible", lambda: ())
    assert launch(script(TELL))[0] == 0
    assert len(environments(tmp_path)) == 1
    monkeypatch.setattr(command_run, "visible", lambda: ("0", "3"))
    assert launch(script(TELL))[0] == 0
    assert len(environments(tmp_path)) == 2


@pytest.mark.parametrize(
    ("argv", "devices"),
    [
        (["--include", "localhost:1,3"], "1,3"),
        (["--exclude", "localhost:1"], "0,2,3"),
        (["--include", "localhost"], "0,1,2,3"),
        (["--num_gpus", "2"], None),
    ],
)
def test_filters_choose_the_visible_devices(
    argv: list[str], devices: str | None, launch: Any, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_run, "visible", lambda: ("0", "1", "2", "3"))
    assert launch(*argv, script(TELL)) == (0, "", "")
    found = environments(tmp_path)
    assert len(found) == (2 if devices is None else devices.count(",") + 1)
    assert {e.get("CUDA_VISIBLE_DEVICES") for e in found} == {devices}


def test_devices_that_are_visible_are_named_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command_run.visible() == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-12ab")
    assert command_run.visible() == ("3", "GPU-12ab")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert command_run.visible() == ()


def test_ranks_share_the_processors_unless_told_otherwise(
    launch: Any, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch("--num_gpus", 2, script(TELL))[0] == 0
    assert {e["OMP_NUM_THREADS"] for e in environments(tmp_path)} == {"3"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launch("--num_gpus", 2, script(TELL))[0] == 0
    assert {e["OMP_NUM_THREADS"] for e in environments(tmp_path)} == {"5"}


NASTY = ["--", "--num_gpus", "7", "-h", "a b", "", "'", '"', "$HOME;`x`", "*", "\\", "--x=y z", "ä\n"]


def test_arguments_reach_the_script_as_they_stand(launch: Any, script: Script, tmp_path: Path) -> None:
    assert launch("--num_gpus", 2, script(TELL), *NASTY)[0] == 0
    assert [e["argv"] for e in environments(tmp_path)] == [NASTY, NASTY]


PARSER = parser()


@given(st.lists(st.one_of(st.sampled_from(["--", "-h", "--version", "--module", "-x"]), st.text(max_size=5))))
def test_no_argument_behind_the_script_is_taken_for_ours(args: list[str]) -> None:
    found = PARSER.parse_args(["run", "--num_gpus", "2", "s.py", *args])
    assert (found.num_gpus, found.module, found.script) == (2, False, ["s.py", *args])


def test_a_module_runs_as_main_from_the_current_folder(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "pack" / "tool.py").write_text("import sys\nprint(__name__, __package__, sys.argv[1:], sys.path[0])")
    monkeypatch.chdir(tmp_path)
    assert launch("--num_gpus", 2, "--module", "pack.tool", "-a") == (0, f"__main__ pack ['-a'] {tmp_path}\n", "")


def test_a_script_runs_as_main_beside_its_neighbours(launch: Any, script: Script, tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text("me = 'neighbour'")  # and not a module of the launcher
    body = "import check\nprint(__name__, check.me, sys.argv[0] == __file__)\n"
    assert launch(script(body)) == (0, "__main__ neighbour True\n", "")


def test_a_program_runs_by_itself(launch: Any) -> None:
    assert launch("--num_gpus", 2, "--no_python", "sh", "-c", 'echo "$RANK of $WORLD_SIZE"') == (0, "0 of 2\n", "")
    status, _, err = launch("--num_gpus", 2, "--no_python", "sh", "-c", "echo bad $RANK >&2; exit $((RANK * 4))")
    assert (status, err) == (4, "bad 0\nbad 1\nhasten: rank 1 of 2 failed with exit status 4\n")


def test_a_file_of_variables_reaches_every_rank(launch: Any, script: Script, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("# for all\nA_B=x = y 'z'\n\nEMPTY=\n")
    assert launch("--num_gpus", 2, "--env-file", tmp_path / "env", script(TELL))[0] == 0
    assert [(e["A_B"], e["EMPTY"]) for e in environments(tmp_path)] == [("x = y 'z'", "")] * 2


# What is heard.

SPEAK = """
for word in "one", " two", "\\nthree", "\\n":
    for stream in sys.stdout, sys.stderr:
        stream.write(word); stream.flush()
    time.sleep(0.1)
"""


def test_rank_0_alone_prints(launch: Any, script: Script) -> None:
    assert launch("--num_gpus", 2, script(SPEAK)) == (0, "one two\nthree\n", "one two\nthree\n")


def test_all_output_is_whole_lines_with_their_rank(launch: Any, script: Script) -> None:
    status, out, err = launch("--num_gpus", 2, "--all_output", script(SPEAK + "sys.stdout.write('end')"))
    said = ["[0] one two", "[0] three", "[1] one two", "[1] three"]
    assert status == 0
    assert sorted(out.splitlines()) == sorted([*said, "[0] end", "[1] end"])
    assert sorted(err.splitlines()) == said


# Failure.


def test_the_first_traceback_is_shown_first_and_once(launch: Any, script: Script) -> None:
    body = """
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    dist.barrier()
    if rank == 1:
        raise ValueError("the cause")
    dist.barrier()
    """
    status, _, err = launch("--num_gpus", 2, path := script(body))
    assert status == 1
    assert err.startswith(f'Traceback (most recent call last):\n  File "{path}", line 8, in <module>\n')
    assert err.endswith("\nValueError: the cause\nhasten: rank 1 of 2 failed with exit status 1\n")
    assert err.count("Traceback") == 1


def test_what_was_raised_first_is_told_even_if_its_traceback_takes_longer(launch: Any, script: Script) -> None:
    body = """
    import atexit
    class Slow(Exception):
        def __str__(self):
            (here / "raised").touch()
            time.sleep(0.1)
            return "the cause"
    if rank == 1:
        raise Slow
    atexit.register(time.sleep, 0.5)
    while not (here / "raised").exists():
        time.sleep(0.001)
    raise RuntimeError("the effect")
    """
    status, _, err = launch("--num_gpus", 2, script(body))
    assert (status, err.count("Traceback"), "the effect" in err) == (1, 1, False)
    assert err.endswith("Slow: the cause\nhasten: rank 1 of 2 failed with exit status 1\n")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("sys.exit(7 * rank)", 7, "hasten: rank 1 of 2 failed with exit status 7\n"),
        ("os._exit(3 * rank)", 3, "hasten: rank 1 of 2 failed with exit status 3\n"),
        ("rank and sys.exit('no such thing')", 1, "no such thing\nhasten: rank 1 of 2 failed with exit status 1\n"),
        ("rank and os.kill(os.getpid(), 9)", 137, "hasten: rank 1 of 2 was killed by SIGKILL\n"),
    ],
)
def test_the_exit_status_is_that_of_the_rank(body: str, status: int, says: str, launch: Any, script: Script) -> None:
    assert launch("--num_gpus", 2, script(body + "\ntime.sleep(0 if rank else 60)")) == (status, "", says)


def test_a_syntax_error_looks_as_it_does_in_python(launch: Any, script: Script) -> None:
    path = script("x = (\n")
    alone = subprocess.run([sys.executable, path], env={"RANK": "0"}, capture_output=True, text=True, check=False)
    assert launch(path) == (1, "", alone.stderr + "hasten: rank 0 of 1 failed with exit status 1\n")


def test_ranks_that_do_not_want_to_end_are_ended_within_ten_seconds(
    launch: Any, script: Script, tmp_path: Path
) -> None:
    body = """
    import signal, subprocess, threading
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (here / f"pid{rank}").write_text(str(os.getpid()))
    while not (here / "pid0").exists() or not (here / "pid1").exists():
        time.sleep(0.01)
    if rank == 1:
        threading.Thread(target=time.sleep, args=(60,)).start()  # so that it does not end by itself either
        raise ValueError("the cause")
    time.sleep(60)
    """
    began = time.monotonic()
    status, _, err = launch("--num_gpus", 2, script(body))
    assert time.monotonic() - began < 10
    assert (status, err.count("the cause")) == (1, 2)  # the line of the script, and the message
    assert not any(alive(int((tmp_path / f"pid{i}").read_text())) for i in range(2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_no_process(number: signal.Signals, script: Script, tmp_path: Path) -> None:
    body = """
    import subprocess
    child = subprocess.Popen(["sh", "-c", "trap '' INT TERM HUP; sleep 60"])
    (here / f"pids{rank}.part").write_text(f"{os.getpid()} {child.pid}")
    os.rename(here / f"pids{rank}.part", here / f"pids{rank}")
    time.sleep(60)
    """
    process = popen("--num_gpus", 2, script(body))
    until(lambda: all((tmp_path / f"pids{i}").exists() for i in range(2)))
    pids = [int(pid) for i in range(2) for pid in (tmp_path / f"pids{i}").read_text().split()]
    assert all(map(alive, pids))
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 8
    assert (process.returncode, out, err) == (128 + number, "", "")
    until(lambda: not any(map(alive, pids)), 2)


# Bad input.


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("", "the following arguments are required: script (see hasten run --help)"),
        ("nowhere.py", "nowhere.py does not exist; name a script, or a module with --module"),
        ("--num_gpus x S", "invalid int value: 'x'"),
        ("--num_gpus 0 S", "--num_gpus 0: it must be 1 or more"),
        ("--num_gpus 5 S", "--num_gpus 5: this machine has 4 visible (0, 1, 2, 3)"),
        ("--num_nodes -1 S", "--num_nodes -1: it must be 1 or more"),
        ("--num_nodes 2 S", "--num_nodes 2 needs --hostfile, or --node_rank and --master_addr on every node"),
        ("--num_nodes 2 --node_rank 2 S", "--node_rank 2: with --num_nodes 2 it must be between 0 and 1"),
        ("--master_port 65536 S", "--master_port 65536: it must be between 1 and 65535"),
        ("--module --no_python S", "--module and --no_python contradict each other"),
        ("--include localhost:1 --exclude localhost:2 S", "--include and --exclude contradict each other"),
        ("--include localhost:1 --num_gpus 1 S", "--include says which slots; --num_gpus and --num_nodes cannot"),
        ("--include elsewhere:1 S", "--include elsewhere:1: elsewhere is none of the hosts localhost"),
        ("--include localhost:1,4 S", "--include localhost:1,4: no slot 4 in localhost:0,1,2,3"),
        ("--include localhost:1,1 S", "--include localhost:1,1: a slot of localhost is named twice"),
        ("--include localhost@localhost:1 S", "localhost is named twice"),
        ("--include localhost: S", "'localhost:' is not of the form 'host' or 'host:0,2'"),
        ("--exclude localhost S", "--exclude localhost: no slot is left of localhost:0,1,2,3"),
        ("--hostfile nowhere S", "nowhere: No such file or directory"),
        ("--hostfile H --node_rank 0 S", "--hostfile starts every node; --node_rank is for nodes that are"),
        ("--hostfile H --num_nodes 3 S", "--num_nodes 3: H has 2 hosts"),
        ("--hostfile H --num_gpus 4 S", "--num_gpus 4: node2 has slots=2 in H"),
        ("--hostfile H --exclude node3 S", "--exclude node3: node3 is none of the hosts node1, node2"),
        ("--hostfile L S", "L: localhost among several hosts: name it as the others reach it"),
        ("--env-file H S", "H: line 2: 'node1 slots=4' is not of the form 'NAME=value'; line 3: "),
        ("--no_python no-such-program", "no-such-program: No such file or directory"),
    ],
)
def test_what_cannot_be_followed_is_told_in_one_line(
    argv: str, says: str, launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_run, "visible", lambda: ("0", "1", "2", "3"))
    Path("S").touch()
    Path("H").write_text("# two\nnode1 slots=4\nnode2 slots=2\n")
    Path("L").write_text("localhost slots=4\nnode2 slots=2\n")
    status, out, err = launch(*shlex.split(argv))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_slots_need_gpus(launch: Any, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_run, "visible", lambda: ())
    status, _, err = launch("--include", "localhost:1", script(""))
    assert (status, err) == (
        2,
        "hasten: --include and --exclude: this machine has no visible GPUs; say --num_gpus N\n",
    )


def test_a_port_in_use_is_named(launch: Any, script: Script) -> None:
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = s.getsockname()[1]
        said = f"hasten: --master_port {port}: in use on this machine; name another\n"
        assert launch("--master_port", port, script(""))[::2] == (2, said)


def test_the_command_reads_its_arguments_without_torch() -> None:
    code = "import sys, hasten.cli.run; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "False\n"


# Hosts.

NAMES = st.from_regex(r"[a-z0-9_][a-z0-9_.-]{0,8}", fullmatch=True)
COUNTS = st.dictionaries(NAMES, st.integers(1, 12), min_size=1, max_size=6)
NOISE = st.sampled_from(["", "  ", "# a comment", "\t# host slots=x", "\r"])


@given(counts=COUNTS, data=st.data())
def test_hostfiles_are_read_as_deepspeed_writes_them(
    counts: dict[str, int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("hosts") / "hostfile"
    lines = []
    for host, n in counts.items():
        gap, noise = data.draw(st.sampled_from([" ", "  ", "\t"])), data.draw(NOISE)
        lines += [data.draw(NOISE), f"{host}{gap}slots={n} {noise}"]
    file.write_text("\n".join(lines))
    found = hosts.read_hostfile(str(file))
    assert list(found.items()) == [(h, tuple(str(i) for i in range(n))) for h, n in counts.items()]


def test_everything_wrong_with_a_hostfile_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text("a slots=2\n\nb\nc slots=0\n# d\na slots=3\n-oProxyCommand=x slots=1\ne slots=-1\n")
    with pytest.raises(ConfigError) as caught:
        hosts.read_hostfile(str(file))
    assert str(caught.value) == (
        f"{file}: line 3: 'b' is not of the form 'host slots=N'; line 4: c has slots=0, and needs one at least; "
        "line 6: a stands in line 1 already; line 7: '-oProxyCommand=x slots=1' is not of the form 'host slots=N'; "
        "line 8: 'e slots=-1' is not of the form 'host slots=N'"
    )
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="no host, where lines of the form 'host slots=N' were expected"):
        hosts.read_hostfile(str(file))
    file.write_bytes(b"a slots=\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        hosts.read_hostfile(str(file))


@given(counts=COUNTS, data=st.data())
def test_include_and_exclude_are_complements(counts: dict[str, int], data: st.DataObject) -> None:
    known = {h: tuple(str(i) for i in range(n)) for h, n in counts.items()}
    named = data.draw(st.lists(st.sampled_from(sorted(known)), min_size=1, unique=True))
    slots = {h: data.draw(st.none() | st.lists(st.sampled_from(known[h]), min_size=1, unique=True)) for h in named}
    text = "@".join(h if s is None else f"{h}:{','.join(s)}" for h, s in slots.items())
    every = {(h, s) for h in known for s in known[h]}
    wanted = {(h, s) for h in named for s in (known[h] if slots[h] is None else slots[h])}  # type: ignore[union-attr]
    found = hosts.choose(known, text, None)
    assert [(h, s) for h in found for s in found[h]] == sorted(wanted, key=[*_pairs(known)].index)
    if wanted == every:
        with pytest.raises(ConfigError, match="no slot is left"):
            hosts.choose(known, None, text)
    else:
        assert set(_pairs(hosts.choose(known, None, text))) == every - wanted


def _pairs(known: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(h, s) for h in known for s in known[h]]


# Several nodes.

SSH = """#!/bin/sh
# As ssh does: options, host, and a command that a shell on the host reads.
[ "$1 $2 $3" = "-o BatchMode=yes --" ] || exit 99
echo "$4" >> "$FAKE/asked"
[ "$4" = unreachable ] && { echo "ssh: $4: no route" >&2; exit 255; }
exec env -i PATH=/usr/bin:/bin HOST="$4" sh -c "$5"
"""


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Writes a hostfile; gives the arguments of a run over an ssh that stays on this machine."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    port = free_port()

    def arguments(*lines: str) -> list[str]:
        (tmp_path / "hostfile").write_text("\n".join(lines))
        return ["--hostfile", "hostfile", "--master_addr", "127.0.0.1", "--master_port", str(port)]

    return arguments


def test_a_hostfile_starts_every_node_over_ssh(
    launch: Any, fake_ssh: Any, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "a 'b'")
    monkeypatch.setenv("SECRET", "stays here")
    (tmp_path / "env").write_text("A=$HOME; x\n")
    argv = fake_ssh("one slots=3", "two slots=1")
    status, out, err = launch(*argv, "--env_file", "env", "--exclude", "one:1", script(TELL + "print(rank)"), *NASTY)
    assert (status, out, err) == (0, "0\n", "")
    found = environments(tmp_path)
    assert [
        (e["HOST"], e["RANK"], e["WORLD_SIZE"], e["LOCAL_RANK"], e["LOCAL_WORLD_SIZE"], e["CUDA_VISIBLE_DEVICES"])
        for e in found
    ] == [
        ("one", "0", "3", "0", "2", "0,2"),
        ("one", "1", "3", "1", "2", "0,2"),
        ("two", "2", "3", "0", "1", "0"),
    ]
    for e in found:
        assert (e["argv"], e["NCCL_DEBUG"], e["A"], "SECRET" in e) == (NASTY, "a 'b'", "$HOME; x", False)
        assert (e["PWD"], e["MASTER_ADDR"]) == (str(tmp_path), "127.0.0.1")


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4))
def test_a_hosts_shell_reads_back_every_argument(args: list[str]) -> None:
    words = shlex.split(ssh.remote(args, {"A": "b c"}))
    assert words[:4] == ["cd", os.getcwd(), "&&", "exec"]
    assert words[len(words) - len(args) - 3 :] == [sys.executable, "-m", "hasten", *args]
    assert "A=b c" in words


def test_one_node_that_fails_ends_all_and_tells_alone(
    launch: Any, fake_ssh: Any, script: Script, tmp_path: Path
) -> None:
    body = """
    (here / f"pid{rank}").write_text(str(os.getpid()))
    while not (here / "pid0").exists() or not (here / "pid1").exists():
        time.sleep(0.01)
    if rank == 1:
        raise ValueError("the cause")
    time.sleep(60)
    """
    began = time.monotonic()
    status, out, err = launch(*fake_ssh("one slots=1", "two slots=1"), script(body))
    assert time.monotonic() - began < 25
    assert (status, out, err.count("Traceback")) == (1, "", 1)
    assert err.startswith("Traceback")
    assert "\nValueError: the cause\nhasten: rank 1 of 2 failed with exit status 1\n" in err
    assert err.endswith("\nhasten: two: ended with exit status 1\n")
    assert not any(alive(int((tmp_path / f"pid{i}").read_text())) for i in range(2))


def test_a_host_that_cannot_be_reached_ends_all(launch: Any, fake_ssh: Any, script: Script) -> None:
    status, out, err = launch(*fake_ssh("unreachable slots=1", "two slots=1"), script("time.sleep(60)"))
    assert (status, out) == (255, "")
    assert "ssh: unreachable: no route\n" in err
    assert err.endswith("hasten: unreachable: ssh failed with exit status 255\n")


def test_the_end_of_the_launcher_ends_every_node(fake_ssh: Any, script: Script, tmp_path: Path) -> None:
    path = script("(here / f'pid{rank}').write_text(str(os.getpid()))\ntime.sleep(60)")
    process = popen(*[tmp_path / a if a == "hostfile" else a for a in fake_ssh("one slots=1", "two slots=1")], path)
    until(lambda: all((tmp_path / f"pid{i}").exists() and (tmp_path / f"pid{i}").read_text() for i in range(2)))
    pids = [int((tmp_path / f"pid{i}").read_text()) for i in range(2)]
    process.kill()  # which it cannot handle
    process.communicate(timeout=20)
    until(lambda: not any(map(alive, pids)), 10)


def test_one_host_that_is_this_one_needs_no_ssh(launch: Any, fake_ssh: Any, script: Script, tmp_path: Path) -> None:
    argv = fake_ssh("localhost slots=2", "other slots=2")
    assert launch(*argv, "--num_nodes", 1, script(TELL))[0] == 0
    assert (len(environments(tmp_path)), (tmp_path / "asked").exists()) == (2, False)


def test_nodes_started_one_by_one_end_together(fake_ssh: Any, script: Script) -> None:
    path = script("rank == 2 and sys.exit(5)\ntime.sleep(60)")
    nodes = ["--num_nodes", 2, *fake_ssh()[2:]]
    zero = popen(*nodes, "--node_rank", 0, "--num_gpus", 2, path)
    one = popen(*nodes, "--node_rank", 1, "--num_gpus", 1, path)
    assert one.communicate(timeout=60)[1] == "hasten: rank 2 of 3 failed with exit status 5\n"
    assert zero.communicate(timeout=10)[1] == ""
    assert (one.returncode, zero.returncode) == (5, 143)


# Ranks that somebody else has started.


def started(script: Path, environment: Mapping[str, str], *argv: str) -> tuple[int, str, str]:
    process = popen(*argv, script, env={**os.environ, **environment})
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_inside_torchruns_environment_the_script_runs_once_as_it_stands(script: Script, tmp_path: Path) -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"}
    assert started(script(TELL), torchrun) == (0, "", "")
    (found,) = environments(tmp_path)
    assert {name: found[name] for name in torchrun} == torchrun
    said = "hasten: torchrun or DeepSpeed (RANK=1, WORLD_SIZE=2) has started the ranks already: leave out --num_gpus\n"
    assert started(script(TELL), torchrun, "--num_gpus", "2") == (2, "", said)


def test_tasks_of_srun_are_the_ranks(script: Script, tmp_path: Path) -> None:
    slurm = {
        "SLURM_PROCID": "4",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2),3",
        "SLURM_STEP_NODELIST": "gpu[07-08,11]-ib,other",
        "SLURM_JOB_ID": "123456",
    }
    assert started(script(TELL), slurm) == (0, "", "")
    (found,) = environments(tmp_path)
    assert [found[name] for name in STARTED] == ["4", "5", "0", "3", "gpu07-ib", "23456"]


def test_a_batch_script_of_slurm_is_no_task(launch: Any, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    assert launch("--num_gpus", 2, script("print(os.environ['WORLD_SIZE'])")) == (0, "2\n", "")
