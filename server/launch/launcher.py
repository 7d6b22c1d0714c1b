"""`enginehouse-launch ENGINE`: start the server so that every rank of the engine finds its GPU.

    one GPU, or one node    gunicorn; TensorRT-LLM spawns a worker for each GPU by itself
    several nodes           srun or mpirun starts a task for each GPU; trtllm-llmapi-launch makes
                            task 0 the server and the others its workers
    pods of a               the same by mpirun: --ssh-keys in the leader, which waits for the
    LeaderWorkerSet         others, and with --worker in each of those
    TensorRT plans over     --ranks-key on the first, whose server the ranks come to, and with
    several nodes           --worker on each of the others, which starts its node's

Prints the command; --dry-run prints only. This process becomes it, but for mpirun and srun, which
it starts and watches (`nodes/rank_group.py`), and ranks of TensorRT plans
(`nodes/rank_processes.py`). Knows no HTTP and no tensor.
Source: TensorRT-LLM 1.2.1, trtllm-llmapi-launch; NVIDIA/TensorRT-LLM issues 2813, 1826.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from enginehouse.runtime.engine import is_hf_checkpoint, read_engine, read_manifest
from enginehouse.runtime.errors import EngineError, EnginehouseError
from enginehouse.runtime.host.log_lines import log_to_stderr
from enginehouse.runtime.machine.gpus import visible_gpus
from enginehouse.runtime.machine.mpi_environment import without_ranks
from enginehouse.runtime.machine.secret_file import read_secret
from enginehouse.server.launch.process_settings import log_format, num_replicas
from enginehouse.server.nodes.leader_worker import (
    check_keys,
    group_hosts,
    ssh_settings,
    sshd_command,
    wait_for_workers,
)
from enginehouse.server.nodes.rank_group import RankGroup
from enginehouse.server.nodes.rank_processes import RankProcesses
from enginehouse.server.nodes.tensorrt_ranks import (
    RankCommand,
    find_node,
    leader_settings,
    rank_commands,
    ranks_per_node,
)

_LOG = logging.getLogger("enginehouse.launch")
APP = "enginehouse.server.app:create_app()"
CONFIG = "python:enginehouse.server.launch.gunicorn_conf"
GPUS_PER_NODE = 8  # as the engine's mapping counts: a rank takes GPU rank % 8 of its node
# What mpirun hands on to other nodes; srun hands on everything.
_HANDED_ON = ("ENGINEHOUSE_", "TLLM", "TRTLLM", "NCCL_", "CUDA_", "HF_")
_ALLOW_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
_HANDED_ON_NAMES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")


class Served(NamedTuple):
    """What is launched. num_ranks: GPUs of TensorRT-LLM's; num_plans: of TensorRT plans, whose
    ranks are processes of their own. 0 for another backend.
    """

    path: Path
    num_ranks: int
    num_plans: int = 0


class Launch(NamedTuple):
    """command: what to become. env: its whole environment. said: what to print."""

    command: list[str]
    env: dict[str, str]
    said: str


def read_served(path: Path, env: Mapping[str, str]) -> Served:
    """An engine, whose ranks are its mapping's, or a checkpoint of `--format hf`, which is cut over
    ENGINEHOUSE_TP_SIZE GPUs while it loads. Raises EngineError when it is neither.
    """
    if is_hf_checkpoint(read_manifest(path)):
        text = env.get("ENGINEHOUSE_TP_SIZE") or "1"
        if not text.isdigit() or text == "0":
            raise EngineError(f"ENGINEHOUSE_TP_SIZE={text!r}; wanted a number of GPUs")
        return Served(path, int(text))
    engine = read_engine(path)
    backend, num_ranks = engine.manifest.backend, engine.config.mapping.world_size
    return Served(
        path,
        num_ranks if backend == "tensorrt_llm" else 0,
        num_ranks if backend == "tensorrt" else 0,
    )


def plan_launch(
    served: Served,
    env: Mapping[str, str],
    *,
    gunicorn: Sequence[str],
    settings: Mapping[str, str] | None = None,
    nodes: int = 1,
    launcher: str = "auto",
    hostfile: str | None = None,
    hosts: Sequence[str] = (),
    num_gpus: int | None = None,
    as_root: bool = False,
) -> Launch:
    """The command that serves it on so many nodes.

    gunicorn: the server's own command. settings: variables that override those of env. launcher:
    auto, spawn, mpirun or srun; auto spawns on one node. hosts: mpirun's machines, instead of a
    hostfile. num_gpus: GPUs that are visible here, None
    when that is not known. as_root: mpirun is told that root may run it, as it is in most
    containers.
    Raises EngineError when it cannot run that way.
    """
    path, num_ranks, num_plans = served
    ours = {**env, **(settings or {}), "ENGINEHOUSE_ENGINE": str(path)}
    if launcher == "auto":
        several = "srun" if "SLURM_JOB_ID" in env else "mpirun"
        launcher = several if nodes > 1 else "spawn"
    if launcher != "spawn" and num_replicas(ours) > 1:
        raise EngineError(
            f"ENGINEHOUSE_REPLICAS={num_replicas(ours)} are started by one server on its own node, "
            f"and {launcher} starts one engine's ranks; leave one of them out"
        )
    if hostfile is not None and launcher != "mpirun":
        raise EngineError(f"--hostfile is mpirun's, and {launcher} starts the ranks; leave it out")
    if num_plans and (nodes > 1 or launcher != "spawn"):
        raise EngineError(
            f"the ranks of {path} are TensorRT plans, which no {launcher} starts: name the secret "
            "that they prove to have with --ranks-key, and leave --launcher out"
        )
    if not num_ranks and (nodes > 1 or launcher != "spawn"):
        raise EngineError(
            f"{path} runs on the CPU backend, in one process on one node; leave --nodes "
            "and --launcher out"
        )
    if launcher == "spawn":
        if nodes > 1:
            raise EngineError(f"--nodes {nodes} wants --launcher mpirun or srun")
        if num_gpus is not None and num_gpus < num_ranks:
            raise EngineError(
                f"{path} runs on {num_ranks} GPUs and {num_gpus} are visible; set "
                "CUDA_VISIBLE_DEVICES, or use --nodes"
            )
        return _launch(list(gunicorn), env, without_ranks(ours))
    per_node, rest = divmod(num_ranks, nodes)
    if rest or (nodes > 1 and per_node != GPUS_PER_NODE):
        raise EngineError(
            f"the {num_ranks} ranks of {path} cannot be laid on {nodes} nodes: a rank "
            f"takes GPU rank % {GPUS_PER_NODE} of its node; use nodes of {GPUS_PER_NODE} GPUs, all "
            "of them"
        )
    if hosts and len(hosts) != nodes:
        raise EngineError(f"there are {len(hosts)} pods in the group; wanted --nodes {len(hosts)}")
    task = ["trtllm-llmapi-launch", *gunicorn]
    if launcher == "srun":
        tasks = ["-N", str(nodes), "--ntasks", str(num_ranks)]
        tasks += ["--ntasks-per-node", str(per_node)]
        return _launch(["srun", "--mpi=pmix", *tasks, *task], env, ours)
    ours = without_ranks(ours)  # mpirun gives each task its own
    if as_root:
        ours = dict.fromkeys(_ALLOW_ROOT, "1") | ours
    where = ["--map-by", f"ppr:{per_node}:node"] + (["--hostfile", hostfile] if hostfile else [])
    if hosts:
        where += ["--host", ",".join(f"{host}:{per_node}" for host in hosts)]
    handed = [name for name in sorted(ours) if _is_handed_on(name)]
    words = [word for name in handed for word in ("-x", name)]
    return _launch(["mpirun", "-n", str(num_ranks), *where, *words, *task], env, ours)


def plan_leader(
    served: Served,
    env: Mapping[str, str],
    key_file: Path,
    *,
    gunicorn: Sequence[str],
    nodes: int,
) -> Launch:
    """The server of TensorRT plans over so many nodes, to which the ranks of the others come.

    Raises EngineError for another engine, and where its ranks cannot be laid on the nodes.
    """
    path = _checked_plans(served)
    if num_replicas(env) > 1:
        raise EngineError(
            f"ENGINEHOUSE_REPLICAS={num_replicas(env)} are of one node, and the ranks of {path} "
            f"of {nodes}; leave one of them out"
        )
    num_local = ranks_per_node(path, served.num_plans, nodes)
    settings = leader_settings(env, key_file, nodes, num_local)
    ours = {**env, **settings, "ENGINEHOUSE_ENGINE": str(path)}
    return _launch(list(gunicorn), env, without_ranks(ours))


def _checked_plans(served: Served) -> Path:
    if not served.num_plans:
        raise EngineError(
            f"{served.path} holds no TensorRT plans (backend=tensorrt), whose ranks come with a "
            "key; leave --ranks-key out"
        )
    return served.path


def _is_handed_on(name: str) -> bool:
    return name in _HANDED_ON_NAMES or name.startswith(_HANDED_ON)


def _launch(command: list[str], before: Mapping[str, str], after: dict[str, str]) -> Launch:
    """What is said is a line to paste: variables left out or set, then the command."""
    words = [word for name in sorted(before.keys() - after.keys()) for word in ("-u", name)]
    words += [f"{name}={after[name]}" for name in sorted(after) if before.get(name) != after[name]]
    return Launch(command, after, shlex.join(["env", *words, *command] if words else command))


def gunicorn_command(config: Path | None = None) -> list[str]:
    """gunicorn beside this interpreter, else on PATH, with a configuration and our application.

    config None: the one that is installed with this file.
    """
    if config is not None and not config.is_file():
        raise EnginehouseError(f"{config} is not there; leave --config out for the one installed")
    beside = Path(sys.executable).with_name("gunicorn")
    program = str(beside) if beside.exists() else shutil.which("gunicorn") or "gunicorn"
    return [program, "-c", str(config or CONFIG), APP]


def tell(launch: Launch, form: str = "text") -> None:
    """Say what this process becomes. form: of the log's lines."""
    if form == "text":
        print(launch.said, flush=True)
        return
    log_to_stderr("info", traffic=False, form=form)
    _LOG.info("this process becomes the server", extra={"command": launch.said})
    logging.shutdown()  # what is written by another thread would be lost


def become(launch: Launch) -> NoReturn:
    """Put the launched command in this process's place, so that signals reach it.

    Raises EnginehouseError when it cannot be run.
    """
    try:
        os.execvpe(launch.command[0], launch.command, launch.env)
    except OSError as error:
        raise EnginehouseError(f"{launch.command[0]}: {error.strerror}") from None


def main(argv: list[str] | None = None) -> int:
    """Command line of `enginehouse-launch`; exit status 2 when it cannot be done."""
    parser = argparse.ArgumentParser(
        prog="enginehouse-launch",
        description="Serve an engine on one GPU, on one node, or on several nodes.",
    )
    parser.add_argument("engine", type=Path, help="directory made by enginehouse-build")
    parser.add_argument("--nodes", type=int, help="machines (default 1)")
    parser.add_argument(
        "--launcher",
        choices=("auto", "spawn", "mpirun", "srun"),
        default="auto",
        help="who starts the ranks; auto: TensorRT-LLM itself on one node, else srun in a job of "
        "SLURM, else mpirun",
    )
    parser.add_argument("--hostfile", help="mpirun's list of machines")
    parser.add_argument(
        "--config", type=Path, help="gunicorn's configuration; without it, the installed one"
    )
    parser.add_argument(
        "--ssh-keys",
        type=Path,
        metavar="DIR",
        help="in a pod of a LeaderWorkerSet: id, id.pub and known_hosts, by which mpirun reaches "
        "the others",
    )
    parser.add_argument(
        "--ranks-key",
        type=Path,
        metavar="FILE",
        help="of TensorRT plans over several nodes: the secret that their ranks prove to have; on "
        "the first node, or with --worker on each of the others",
    )
    parser.add_argument(
        "--worker",
        action="store_true",
        help="with --ssh-keys, be the sshd by which the leader starts ranks here; with "
        "--ranks-key, start the ranks of this node's GPUs, again whenever they lose their leader",
    )
    parser.add_argument(
        "--leader", metavar="HOST", help="of a worker; else as its LeaderWorkerSet says"
    )
    parser.add_argument(
        "--node", type=int, metavar="N", help="a worker's, from 1 on; else as its set says"
    )
    parser.add_argument(
        "--ready-file", type=Path, metavar="FILE", help="there while a worker's ranks all run"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    args = parser.parse_args(argv)
    if args.nodes is not None and args.nodes < 1:
        parser.error("--nodes is below 1")
    if args.ssh_keys is not None and args.ranks_key is not None:
        parser.error("--ssh-keys is for TensorRT-LLM, --ranks-key for TensorRT plans; give one")
    if args.worker and args.ssh_keys is None and args.ranks_key is None:
        parser.error("--worker wants --ssh-keys, or of TensorRT plans --ranks-key")
    if args.ssh_keys is not None and args.hostfile is not None:
        parser.error("--ssh-keys finds the machines itself; leave --hostfile out")
    if args.ranks_key is not None and (args.hostfile is not None or args.launcher != "auto"):
        parser.error("with --ranks-key, ranks come by themselves; leave --launcher, --hostfile out")
    of_ranks = args.worker and args.ranks_key is not None
    if not of_ranks and (args.leader, args.node, args.ready_file) != (None, None, None):
        parser.error("--leader, --node and --ready-file are for --worker with --ranks-key")
    try:
        if args.ssh_keys is not None and not args.dry_run:
            check_keys(args.ssh_keys)
        if args.ranks_key is not None and not args.dry_run:
            read_secret(args.ranks_key)
        if of_ranks:
            return _start_ranks(args)
        launch, others = _of_arguments(args)
        tell(launch, "text" if args.dry_run else log_format(os.environ))
        if args.dry_run:
            return 0
        wait_for_workers(others)
        if launch.command[0] in ("mpirun", "srun"):
            log_to_stderr("info", traffic=False, form=log_format(os.environ))
            return RankGroup(launch.command, launch.env).run()
        become(launch)
    except EnginehouseError as error:
        print(f"enginehouse-launch: {error}", file=sys.stderr)
        return 2


def _start_ranks(args: argparse.Namespace) -> int:
    """Those of a worker's node; returns when they are told to end."""
    served = read_served(Path(os.path.abspath(args.engine)), os.environ)
    node = find_node(os.environ, number=args.node, num_nodes=args.nodes, leader=args.leader)
    key_file = Path(os.path.abspath(args.ranks_key))
    path = _checked_plans(served)
    ranks = rank_commands(path, served.num_plans, node, key_file, os.environ)
    if args.dry_run:
        print(*map(_said_of_rank, ranks), sep="\n", flush=True)
        return 0
    log_to_stderr("info", traffic=False, form=log_format(os.environ))
    for rank in ranks:
        _LOG.info("%s", _said_of_rank(rank))
    return RankProcesses(ranks, os.environ, args.ready_file).run()


def _said_of_rank(rank: RankCommand) -> str:
    return shlex.join(["env", f"CUDA_VISIBLE_DEVICES={rank.gpu}", *rank.command])


def _of_arguments(args: argparse.Namespace) -> tuple[Launch, Sequence[str]]:
    """What to become, and the machines that have to listen before."""
    keys, env = args.ssh_keys, os.environ
    served = read_served(Path(os.path.abspath(args.engine)), env)
    if args.ranks_key is not None:
        key_file, nodes = Path(os.path.abspath(args.ranks_key)), args.nodes or 1
        gunicorn = gunicorn_command(args.config)
        return plan_leader(served, env, key_file, gunicorn=gunicorn, nodes=nodes), ()
    if args.worker:
        return _launch(sshd_command(keys, env), env, dict(env)), ()
    hosts = [] if keys is None else group_hosts(env)
    launch = plan_launch(
        served,
        env,
        gunicorn=gunicorn_command(args.config),
        settings=None if keys is None else ssh_settings(keys),
        nodes=args.nodes or 1,
        launcher="mpirun" if hosts else args.launcher,
        hostfile=args.hostfile,
        hosts=hosts,
        num_gpus=len(visible_gpus()) or None,
        as_root=os.geteuid() == 0,
    )
    return launch, hosts[1:]
