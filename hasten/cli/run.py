"""Run a script on several GPUs or nodes, one process each, with torchrun's environment.

Where torchrun, DeepSpeed's launcher or srun has started the processes already, each runs the script itself.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from hasten.cli.launch import hosts, node, script, ssh
from hasten.errors import ConfigError

PORT = 29500  # of several nodes, as torchrun and DeepSpeed have it

PLACES = ("num_gpus", "num_nodes", "node_rank", "hostfile", "include", "exclude", "master_addr", "master_port")


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--num_gpus", "--num-gpus", type=int, metavar="N", help="processes a node (default: its GPUs, or 1)")
    p.add_argument("--num_nodes", "--num-nodes", type=int, metavar="N", help="nodes, the first of a hostfile")
    p.add_argument(
        "--node_rank", "--node-rank", type=int, metavar="R", help="of this node, where each is started alone"
    )
    p.add_argument("--hostfile", metavar="FILE", help="'host slots=N' a line; starts every node over ssh")
    p.add_argument(
        "--include", metavar="HOST:SLOT,...@...", help="use only these, as in localhost:1,3 or host1@host2:0"
    )
    p.add_argument("--exclude", metavar="HOST:SLOT,...@...", help="use all but these")
    p.add_argument("--master_addr", "--master-addr", metavar="HOST", help="where ranks meet (default: the first host)")
    p.add_argument("--master_port", "--master-port", type=int, metavar="PORT", help="(default: a free one, or 29500)")
    p.add_argument("--module", action="store_true", help="script is a module, as in python -m")
    p.add_argument("--no_python", "--no-python", action="store_true", help="script is a program")
    p.add_argument("--env_file", "--env-file", metavar="FILE", help="'NAME=value' a line, for every process")
    p.add_argument("--all_output", "--all-output", action="store_true", help="every rank prints, not only rank 0")
    p.add_argument("--until_eof", "--until-eof", action="store_true", help="end when standard input does (for ssh)")
    # argparse's PARSER, unlike REMAINDER, takes all that follows as it stands, "--" included.
    p.add_argument("script", nargs=argparse.PARSER, help="what to run, and its arguments")


def run(args: argparse.Namespace) -> int:
    _check(args)
    started = _started(os.environ) if args.node_rank is None else None
    if started is not None:
        return _become(args, *started)
    variables = hosts.read_variables(args.env_file) if args.env_file else {}
    if args.hostfile:
        chosen = _of_hostfile(args)
        if not (len(chosen) == 1 and set(chosen) <= {"localhost", "127.0.0.1", socket.gethostname()}):
            return ssh.launch(_commands(args, chosen, variables))
        slots = next(iter(chosen.values()))
        args.num_gpus, args.include = (None, f"localhost:{','.join(slots)}") if _filtered(args) else (len(slots), None)
        args.exclude = args.num_nodes = None
    if args.until_eof:
        _end_with_input()
    workers, slots = _here(args)
    if slots is not None:
        variables = {"CUDA_VISIBLE_DEVICES": ",".join(slots), **variables}
    nodes = args.num_nodes or 1
    addr = args.master_addr or "127.0.0.1"
    port = args.master_port or (0 if nodes == 1 else PORT)
    place = node.Node(args.node_rank or 0, nodes, workers, addr, port)
    return node.launch(_worker(args), place, variables, all_output=args.all_output)


def _check(args: argparse.Namespace) -> None:
    """Refuses what no machine could make sense of."""
    for name in ("num_gpus", "num_nodes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: it must be 1 or more")
    if args.master_port is not None and not 0 < args.master_port < 65536:
        raise ConfigError(f"--master_port {args.master_port}: it must be between 1 and 65535")
    if args.module and args.no_python:
        raise ConfigError("--module and --no_python contradict each other: give one of them")
    for name in ("include", "exclude"):
        if getattr(args, name) and (args.num_gpus or args.num_nodes):
            raise ConfigError(f"--{name} says which slots; --num_gpus and --num_nodes cannot be given beside it")
    if args.hostfile and args.node_rank is not None:
        raise ConfigError("--hostfile starts every node; --node_rank is for nodes that are started one by one")
    nodes = args.num_nodes or 1
    if args.node_rank is not None and not 0 <= args.node_rank < nodes:
        raise ConfigError(
            f"--node_rank {args.node_rank}: with --num_nodes {nodes} it must be between 0 and {nodes - 1}"
        )
    if nodes > 1 and not args.hostfile and (args.node_rank is None or args.master_addr is None):
        raise ConfigError(f"--num_nodes {nodes} needs --hostfile, or --node_rank and --master_addr on every node")
    if not (args.module or args.no_python or Path(args.script[0]).exists()):
        raise ConfigError(f"{args.script[0]} does not exist; name a script, or a module with --module")


def _worker(args: argparse.Namespace) -> list[str]:
    """What each rank runs."""
    if args.no_python:
        return args.script
    assert script.__file__
    return [sys.executable, script.__file__, "module" if args.module else "script", *args.script]


def _here(args: argparse.Namespace) -> tuple[int, tuple[str, ...] | None]:
    """How many ranks this node has, and the GPUs they see where that is not all that are visible."""
    gpus = visible()
    if args.include or args.exclude:
        if not gpus:
            raise ConfigError("--include and --exclude: this machine has no visible GPUs; say --num_gpus N")
        chosen = hosts.choose({"localhost": gpus}, args.include, args.exclude)["localhost"]
        return len(chosen), chosen
    if args.num_gpus is None:
        return len(gpus) or 1, None
    if gpus and args.num_gpus > len(gpus):
        raise ConfigError(f"--num_gpus {args.num_gpus}: this machine has {len(gpus)} visible ({', '.join(gpus)})")
    return args.num_gpus, None


def visible() -> tuple[str, ...]:
    """The GPUs of this machine that are visible, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(map(str, range(count))) if named is None else tuple(s.strip() for s in named.split(","))[:count]


# Several nodes.


def _filtered(args: argparse.Namespace) -> bool:
    return bool(args.include or args.exclude)


def _of_hostfile(args: argparse.Namespace) -> hosts.Hosts:
    """The hosts of this run and their slots."""
    known = hosts.read_hostfile(args.hostfile)
    if args.num_nodes is not None and args.num_nodes > len(known):
        raise ConfigError(f"--num_nodes {args.num_nodes}: {args.hostfile} has {len(known)} hosts")
    chosen = dict(list(hosts.choose(known, args.include, args.exclude).items())[: args.num_nodes])
    short = [h for h, slots in chosen.items() if args.num_gpus and args.num_gpus > len(slots)]
    if short:
        raise ConfigError(
            f"--num_gpus {args.num_gpus}: {short[0]} has slots={len(chosen[short[0]])} in {args.hostfile}"
        )
    if len(chosen) > 1 and "localhost" in chosen and args.master_addr is None:
        raise ConfigError(f"{args.hostfile}: localhost among several hosts: name it as the others reach it")
    return {h: slots[: args.num_gpus] for h, slots in chosen.items()}


def _commands(args: argparse.Namespace, chosen: hosts.Hosts, variables: Mapping[str, str]) -> dict[str, str]:
    """What each host's shell is given."""
    common = ["--num_nodes", str(len(chosen)), "--master_addr", args.master_addr or next(iter(chosen))]
    common += ["--master_port", str(args.master_port or PORT), "--until_eof"]
    common += [f"--{flag}" for flag in ("module", "no_python", "all_output") if getattr(args, flag)]
    commands = {}
    for rank, (host, slots) in enumerate(chosen.items()):
        which = {"CUDA_VISIBLE_DEVICES": ",".join(slots)} if _filtered(args) else {}
        size = ["--num_gpus", str(len(slots)), "--node_rank", str(rank)]
        commands[host] = ssh.remote(["run", *common, *size, *args.script], {**variables, **which})
    return commands


def _end_with_input() -> None:
    """Takes standard input for a sign of life: when it ends, so does this process."""
    alive = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)

    def watch() -> None:
        alive.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


# Ranks that somebody else has started.


def _started(environment: Mapping[str, str]) -> tuple[str, dict[str, str]] | None:
    """Who has started this process as a rank, and what its environment lacks; None if nobody has."""
    e = environment
    if "RANK" in e and "WORLD_SIZE" in e:
        return f"torchrun or DeepSpeed (RANK={e['RANK']}, WORLD_SIZE={e['WORLD_SIZE']})", {}
    if "SLURM_PROCID" not in e or int(e.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return None
    per_node = [
        int(n)
        for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", e.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(times or 1))
    ]
    here = int(e.get("SLURM_NODEID", "0"))
    first = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", e.get("SLURM_STEP_NODELIST", ""))
    lacks = {
        "RANK": e["SLURM_PROCID"],
        "WORLD_SIZE": e["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": e.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(per_node[here] if here < len(per_node) else 1),
        "MASTER_ADDR": "".join(filter(None, first.groups())) if first else "127.0.0.1",
        "MASTER_PORT": str(20000 + int(e.get("SLURM_JOB_ID", "0")) % 10000),
    }
    return f"srun (SLURM_PROCID={e['SLURM_PROCID']} of {lacks['WORLD_SIZE']})", lacks


def _become(args: argparse.Namespace, who: str, lacks: dict[str, str]) -> int:
    """The script itself, in place of this process."""
    given = [f"--{name}" for name in PLACES if getattr(args, name) is not None]
    if given:
        raise ConfigError(f"{who} has started the ranks already: leave out {', '.join(given)}")
    variables = hosts.read_variables(args.env_file) if args.env_file else {}
    python = [] if args.no_python else [sys.executable, *(["-m"] if args.module else [])]
    command = [*python, *args.script]
    sys.stdout.flush()
    os.execvpe(command[0], command, {**os.environ, **lacks, **variables})
