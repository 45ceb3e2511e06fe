"""This module submits commands of ours as jobs to a Ray cluster, follows and stops them, and starts none twice.

usage: python infra/jobs.py submit [--address http://HOST:8265] [--wait] -- python -m train RUN.toml --address auto
       python infra/jobs.py status [NAME] | logs NAME [--follow] | stop NAME

A job has a name, which follows from its command and from the content of the files that the command names unless one is
given, so that the same question is the same job. Each start of it is an attempt, ``NAME-1``, ``NAME-2``, ...: what runs
is attached to, what has succeeded is left alone, and what failed, was stopped or lost its driver is started again and
goes on from the lake or from the run's last state.

The cluster is that of --address, RAY_API_SERVER_ADDRESS, RAY_ADDRESS or http://127.0.0.1:8265, the first that is there:
a dashboard's URL, or HOST:6379 or auto, whose dashboard Ray is asked for. The current folder travels with the job, less
what .gitignore and .rayignore name.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import http
import itertools
import json
import logging
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import aiohttp
import ray.exceptions
from ray.job_submission import JobDetails, JobSubmissionClient
from rich.table import Table

from store.command import UNREAD, answer, console, write
from store.errors import StorageError

DASHBOARD = "http://127.0.0.1:8265"
FROM_ENVIRONMENT = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TO_GIVE = "give --address http://HOST:8265, the URL that 'ray start --head' prints"
HASHED_BYTES = 16 * 2**20
"""A file that is larger counts by its size in a name, not by its content."""
CONNECT_S = 5
LOST_S = 60.0
"""Seconds without an answer of the dashboard after which a job is no longer waited for."""
STOP_S = 30.0
PENDING_S = 10.0
"""Seconds after which a job that has not started is told of; most start in less."""
SHOWN_CHARACTERS = 120
ASKED = "resources"
"""The key of an attempt's metadata under which it keeps what its driver asks for, as JSON."""
USAGE, UNREACHABLE, STOPPED, INTERRUPTED = 2, 5, 7, 130
"""Exit statuses beside the job's own; the first three mean the same as in ``store.errors``."""
FAILURES = (OSError, RuntimeError, ValueError, aiohttp.ClientError, ray.exceptions.RayError)
"""What Ray's client raises where a cluster does not do what it is asked; ``requests``' errors are OSErrors."""


class Refused(Exception):
    """What is asked for cannot be done; the message is for the user, ``status`` for the shell."""

    def __init__(self, message: str, status: int = USAGE) -> None:
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------- names
def name_of(words: Sequence[str], folder: Path) -> str:
    """Return the name of a command: what it is, and a digest of its words and of the content of files they name.

    The digest is of the words in order, each with the SHA-256 of the file that it names, as ``FILE`` or ``key=FILE``
    counted from ``folder``; a file above 16 MiB counts by its size, a folder by its name. Code, cluster and resources
    do not count: a job that is retried after a repair, elsewhere or with more memory, is the same job.
    """
    told = [[word, _content(folder, word)] for word in words]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]
    module = next((after for word, after in itertools.pairwise(words) if word == "-m"), Path(words[0]).name)
    recipe = next((Path(word).stem for word in words if word.endswith(".toml")), "")
    return "-".join(part for part in (_plain(module), _plain(recipe), digest) if part)


def _content(folder: Path, word: str) -> str:
    for text in (word, word.partition("=")[2]):
        path = folder / text
        if text and len(text) < 4096 and "\0" not in text and path.is_file():
            size = path.stat().st_size
            return hashlib.sha256(path.read_bytes()).hexdigest() if size <= HASHED_BYTES else f"{size} bytes"
    return ""


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:40]


def valid_name(text: str) -> str:
    """Return a name that was given, if it can be one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: a name has letters, digits, '-', '_' and '.', 100 at most")
    return text


# ---------------------------------------------------------------------- the cluster
def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of the cluster's dashboard.

    Raises:
        Refused: None answers there.
    """
    where, given = "--address", address
    for variable in FROM_ENVIRONMENT:
        from_environment = os.environ.pop(variable, None)  # Ray would let them count before what is given
        if not given and from_environment:
            where, given = variable, from_environment
    given = given or DASHBOARD
    if given == "local":
        raise Refused(f"{where} is 'local', a cluster for one command, and a job needs one that runs: {TO_GIVE}")
    try:
        _probe(given)
        return JobSubmissionClient(given)
    except FAILURES as error:
        reason = _reason(error)
        if "token" in reason and "RAY_AUTH_MODE" not in os.environ:
            said = f"the dashboard at {given!r} asks for a token ({reason}): export RAY_AUTH_MODE=token"
            raise Refused(f"{said}, with the cluster's token in ~/.ray/auth_token", UNREACHABLE) from None
        raise Refused(
            f"no Ray dashboard answers at {given!r} ({reason}); {TO_GIVE} (this one is from {where})", UNREACHABLE
        ) from None


def _probe(address: str) -> None:
    """Fail at once when nobody listens: Ray itself would go on trying."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.scheme not in ("", "http", "https", "ray"):
        raise ValueError(f"no address of kind {parts.scheme!r} is known")
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    if parts.hostname and port:
        socket.create_connection((parts.hostname, port), timeout=CONNECT_S).close()


def _reason(error: BaseException) -> str:
    """Return what an error says in one line: of a traceback the last, which names it."""
    first, *more = [line for line in str(error).splitlines() if line.strip(" .")] or [type(error).__name__]
    before, traceback, _ = first.partition("Traceback (most recent call last):")
    return (f"{before}{more[-1].strip()}" if traceback and more else first.strip())[:200]


def _answered(error: BaseException) -> int:
    """Return the HTTP status with which the dashboard answered; 0 where it did not."""
    said = re.match(r"Request failed with status code (\d+)", str(error))  # Ray's client keeps it in the words only
    return int(said[1]) if said else 0


def attempts_of(client: JobSubmissionClient, name: str) -> list[JobDetails]:
    """Return the attempts at a job, the newest last."""
    named = [job for job in client.list_jobs() if (job.metadata or {}).get("name") == name]
    return sorted(named, key=attempt)


def attempt(job: JobDetails) -> int:
    """Return the number of an attempt; 1 for a job that was submitted otherwise, whatever it says of itself."""
    told = (job.metadata or {}).get("attempt", "")
    return int(told) if re.fullmatch(r"[0-9]{1,9}", told) else 1


def found(client: JobSubmissionClient, name: str) -> JobDetails:
    """Return the newest attempt at a job, or the one that is named.

    Raises:
        Refused: There is none.
    """
    jobs = [job for job in client.list_jobs() if job.submission_id]
    mine = [job for job in jobs if (job.metadata or {}).get("name") == name]
    if mine:
        return max(mine, key=attempt)
    for job in jobs:
        if job.submission_id == name:
            return job
    known = sorted({(job.metadata or {}).get("name") or job.submission_id for job in jobs})
    raise Refused(f"no job {name!r} is on this cluster; there are: {', '.join(known) or 'none'}", UNREACHABLE)


# ---------------------------------------------------------------------- the verbs
def submit(options: argparse.Namespace) -> int:
    """Start a job, or attach to it; return the exit status."""
    words = options.command
    if not words:
        raise Refused("name a command after --, such as: submit -- python -m train RUN.toml --address auto")
    folder = Path.cwd()
    name = options.name or name_of(words, folder)
    client = connect(options.address)
    begun = attempts_of(client, name)
    job, how = (begun[-1], _as_it_stands(begun[-1], options)) if begun else (None, "")
    if job is not None and how == "replaced":
        client.stop_job(str(job.submission_id))  # it ends as soon as it would start
        said = f"job {job.submission_id} has not started, and ends when it does: it asked for other resources"
        console.print(said, markup=False, soft_wrap=True)
    if job is None or how in ("", "replaced"):
        job, how = _start(client, name, len(begun) and attempt(begun[-1]), options, folder)
    _say(job, how, options)
    if options.wait and how != "done":
        try:
            job = wait(client, str(job.submission_id), _on_stderr if options.json else write)
        except KeyboardInterrupt:
            console.print(f"job {job.submission_id} goes on", markup=False, soft_wrap=True)
            _say_how_to_follow(job, options)
            return INTERRUPTED
    if options.json:
        answer("jobs-submit/v1", job=as_json(job), how=how)
    return exit_status(job) if options.wait else 0


def _as_it_stands(job: JobDetails, options: argparse.Namespace) -> str:
    """Say what becomes of a submission where there is an attempt: nothing, if another is to be started.

    Raises:
        Refused: The attempt was at another command, which would be taken for this one.
    """
    ended = job.status.is_terminal()
    if ended and (job.status != "SUCCEEDED" or options.again):
        return ""
    if job.entrypoint != shlex.join(options.command):
        ways = "give another --name, or --again" if ended else "give another --name, or stop it first"
        command = textwrap.shorten(job.entrypoint, SHOWN_CHARACTERS, placeholder=" ...")
        raise Refused(f"job {job.submission_id} {'was' if ended else 'is'} `{command}`, another command: {ways}")
    if ended:
        return "done"
    asked = _resources_asked(options)
    other = (job.metadata or {}).get(ASKED, asked) != asked
    return "replaced" if job.status == "PENDING" and other else "attached"


def _resources_asked(options: argparse.Namespace) -> str:
    """Return what a driver asks for, as an attempt keeps it; Ray does not tell."""
    asked = {"CPU": options.cpus, "GPU": options.gpus} | (options.resources or {})
    return json.dumps({key: value for key, value in asked.items() if value}, sort_keys=True)


def _asked(job: JobDetails) -> str:
    asked = (job.metadata or {}).get(ASKED, "{}")
    return "" if asked == "{}" else asked


def _on_stderr(text: str) -> None:
    console.out(text, end="")


def _start(
    client: JobSubmissionClient, name: str, last: int, options: argparse.Namespace, folder: Path
) -> tuple[JobDetails, str]:
    """Start the next attempt; if somebody else was faster with it, attach to theirs."""
    submission = f"{name}-{last + 1}"
    _say_pipes(folder)
    try:
        client.submit_job(
            entrypoint=shlex.join(options.command),
            submission_id=submission,
            runtime_env={"working_dir": str(folder)},
            metadata={"name": name, "attempt": str(last + 1), ASKED: _resources_asked(options), **_commit(folder)},
            entrypoint_num_cpus=options.cpus,
            entrypoint_num_gpus=options.gpus,
            entrypoint_resources=options.resources,
        )
        return client.get_job_info(submission), "submitted"
    except FAILURES as error:
        for job in attempts_of(client, name):
            if job.submission_id == submission:
                return job, "attached"
        if _answered(error) == http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            raise Refused(
                f"the folder {folder} travels with the job, and is larger than the cluster takes (100 MB as Ray "
                "ships): name what the job does not need in its .rayignore, or submit from another folder"
            ) from None
        raise Refused(f"the cluster does not take the job: {_reason(error)}", UNREACHABLE) from None


def _say_pipes(folder: Path) -> None:
    """Name the pipes in a folder: packing it, Ray reads them, and waits for whoever writes."""
    for where, _, names in os.walk(folder):
        for path in (Path(where, name) for name in names):
            if path.is_fifo():
                console.print(
                    f"{path} is a pipe, and packing the folder waits for whoever writes to it: if this does not end, "
                    "name it in .rayignore, or submit from another folder",
                    markup=False,
                    soft_wrap=True,
                )


def _commit(folder: Path) -> dict[str, str]:
    """Return the commit of the folder, if it is a git checkout, and whether files differ from it."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return "" if done.returncode else done.stdout.strip()

    commit = git("rev-parse", "--verify", "-q", "HEAD")
    changed = bool(commit) and bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": commit + ("+changes" if changed else "")} if commit else {}


def _say(job: JobDetails, how: str, options: argparse.Namespace) -> None:
    told = {
        "submitted": f"job {job.submission_id} is submitted",
        "attached": f"job {job.submission_id} is {str(job.status).lower()} already: nothing is started",
        "done": f"job {job.submission_id} has succeeded: nothing is started; --again does",
    }
    console.print(told[how], markup=False, soft_wrap=True)
    if how != "done" and not options.wait:
        _say_how_to_follow(job, options)


def _say_how_to_follow(job: JobDetails, options: argparse.Namespace) -> None:
    at = f" --address {options.address}" if options.address else ""
    name = (job.metadata or {}).get("name") or job.submission_id
    console.print(f"follow it: python infra/jobs.py logs {name} --follow{at}", markup=False, soft_wrap=True)


def wait(client: JobSubmissionClient, submission: str, show: Callable[[str], object]) -> JobDetails:
    """Show a job's log until it ends, and return what it ended with.

    Raises:
        Refused: The cluster knows no such job any more, its dashboard has not answered for a minute, or the log cannot
            be shown; but for the first, the job may go on.
    """
    shown, heard = 0, time.monotonic()
    told_of = heard + PENDING_S

    async def tail() -> None:
        nonlocal shown, heard
        at = 0
        async for text in client.tail_job_logs(submission):
            heard = time.monotonic()
            fresh = text[max(0, shown - at) :]  # a log that is followed anew comes from its beginning
            at += len(text)
            if fresh:
                _shown(fresh, show, submission)
                shown = at

    while True:
        cut = _failed(lambda: asyncio.run(tail()))
        try:
            job = client.get_job_info(submission)
        except FAILURES as error:
            if _answered(error) == http.HTTPStatus.NOT_FOUND:
                raise Refused(
                    f"the cluster no longer knows job {submission} (its head was restarted): submit it again",
                    UNREACHABLE,
                ) from None
            if time.monotonic() - heard > LOST_S:
                raise Refused(
                    f"the dashboard has not answered for {LOST_S:g} s ({_reason(error)}); the job may go on: "
                    "submit it again to see",
                    UNREACHABLE,
                ) from None
        else:
            heard = time.monotonic()
            if job.status.is_terminal():
                if cut or not shown:
                    _show_rest(client, submission, shown, show)
                _say_message(job)
                return job
            if job.status == "PENDING" and heard > told_of:
                told_of = math.inf
                _say_message(job)
        time.sleep(1)


def _failed(ask: Callable[[], None]) -> BaseException | None:
    """Ask the cluster for something that can be asked for again; return what came in between, if anything."""
    try:
        ask()
    except FAILURES as error:
        return error
    return None


def _show_rest(client: JobSubmissionClient, submission: str, shown: int, show: Callable[[str], object]) -> None:
    try:
        rest = client.get_job_logs(submission)[shown:]
    except FAILURES as error:
        said = f"the log of job {submission} cannot be shown{' to its end' if shown else ''}: {_reason(error)}"
        console.print(said, markup=False, soft_wrap=True)
    else:
        _shown(rest, show, submission)


def _say_message(job: JobDetails) -> None:
    """Say what Ray says of a job whose command has not run."""
    if job.status == "PENDING" or (job.status == "FAILED" and job.driver_exit_code is None):
        asks = f" (its driver asks for {_asked(job)})" if _asked(job) else ""
        console.print(f"{job.submission_id}: {job.message}{asks}", markup=False, soft_wrap=True)


def _shown(text: str, show: Callable[[str], object], submission: str) -> None:
    """Show a part of a log; what fails there is not the cluster's."""
    try:
        show(text)
    except OSError as error:
        raise Refused(f"{error}; job {submission} goes on", UNREACHABLE) from None
    except SystemExit:  # asyncio would drop its tasks for it, and say so
        raise Refused(f"nobody reads the log any more; job {submission} goes on", UNREAD) from None


def exit_status(job: JobDetails) -> int:
    """Return the exit status of a job that has ended, as a shell would.

    That of its command, 128 and the signal's number if it was killed; 7 if it was stopped, 5 if it could not be run.
    """
    if job.status == "STOPPED":
        return STOPPED
    if job.driver_exit_code is None:
        return 0 if job.status == "SUCCEEDED" else UNREACHABLE
    return int(job.driver_exit_code) if job.driver_exit_code >= 0 else 128 - int(job.driver_exit_code)


def status(options: argparse.Namespace) -> int:
    """Show the newest attempt of every job, or all attempts of one."""
    client = connect(options.address)
    jobs = [job for job in client.list_jobs() if job.submission_id]
    if options.name:
        jobs = attempts_of(client, options.name) or [found(client, options.name)]
    else:
        newest = {(job.metadata or {}).get("name") or job.submission_id: job for job in sorted(jobs, key=attempt)}
        jobs = list(newest.values())
    jobs.sort(key=lambda job: job.start_time or 0)
    if options.json:
        answer("jobs-status/v1", jobs=[as_json(job) for job in jobs])
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("job", "state", "since", "took"):
        table.add_column(column, no_wrap=True)
    table.add_column("command", overflow="fold")  # the one that gives way
    for job in jobs:
        command = textwrap.shorten(job.entrypoint, SHOWN_CHARACTERS, placeholder=" ...")
        table.add_row(job.submission_id, _state(job), _clock(job.start_time), _took(job), command, style=_style(job))
    console.print(table)
    for job in jobs:
        if options.name or job.status == "PENDING":
            _say_message(job)
    return 0


def _state(job: JobDetails) -> str:
    state = str(job.status).lower()
    return f"{state}, exit {exit_status(job)}" if job.status == "FAILED" else state


def _style(job: JobDetails) -> str:
    return {"FAILED": "red", "RUNNING": "green"}.get(str(job.status), "")


def _clock(milliseconds: int | None) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(milliseconds / 1000)) if milliseconds else ""


def _took(job: JobDetails) -> str:
    if not job.start_time:
        return ""
    return f"{(job.end_time or time.time() * 1000) / 1000 - job.start_time / 1000:,.0f} s"


def logs(options: argparse.Namespace) -> int:
    """Print a job's log, or follow it until the job ends; return the exit status, which is then the job's."""
    if options.follow and options.json:
        raise Refused(
            "logs --follow shows text as it comes, --json is one object at the end; leave out one of them, or submit "
            "the job's command with --json --wait"
        )
    client = connect(options.address)
    job = found(client, options.name)
    if options.follow:
        return exit_status(wait(client, str(job.submission_id), write))
    text = client.get_job_logs(str(job.submission_id))
    if options.json:
        answer("jobs-logs/v1", job=as_json(job), log=text)
    else:
        write(text)
    return 0


def stop(options: argparse.Namespace) -> int:
    """Stop a job, and wait until it has stopped."""
    client = connect(options.address)
    job = found(client, options.name)
    until = time.monotonic() + STOP_S
    ran = client.stop_job(str(job.submission_id))
    while not (job := client.get_job_info(str(job.submission_id))).status.is_terminal():
        if time.monotonic() > until:
            if job.status == "PENDING":
                _say_message(job)
                raise Refused(
                    f"job {job.submission_id} has not started; it is told to stop, and ends when it would start, or "
                    "when Ray gives it up (after 15 minutes as Ray ships); the same command with other --cpus, --gpus "
                    "or --resources is its next attempt",
                    1,
                )
            raise Refused(f"job {job.submission_id} has not stopped within {STOP_S:g} s; look again: status", 1)
        time.sleep(0.2)
    if options.json:
        answer("jobs-stop/v1", job=as_json(job), stopped=ran)
    told = "is stopped; the same submission goes on with it" if ran else f"had ended: {_state(job)}"
    console.print(f"job {job.submission_id} {told}", markup=False, soft_wrap=True)
    return 0


def as_json(job: JobDetails) -> dict[str, Any]:
    """Return what a program may want to know of an attempt."""
    told = job.metadata or {}
    return {
        "name": told.get("name") or job.submission_id,
        "attempt": attempt(job),
        "submission_id": job.submission_id,
        "state": str(job.status),
        "exit_status": exit_status(job) if job.status.is_terminal() else None,
        "command": job.entrypoint,
        "commit": told.get("commit"),
        "begun_ms": job.start_time,
        "ended_ms": job.end_time,
        "message": job.message,
    }


# ---------------------------------------------------------------------- the command line
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python infra/jobs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--address", help="the dashboard, such as http://HOST:8265; or HOST:6379, or auto")
    common.add_argument("--json", action="store_true", help="answer with one JSON object on stdout")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], words: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, parents=[common], help=words, description=words)
        made.set_defaults(run=run)
        return made

    one = verb("submit", submit, "start a job, or attach to it: submit [options] -- COMMAND")
    one.add_argument("--name", type=valid_name, help="the job's name, in place of one made from the command")
    one.add_argument("--cpus", type=_amount, help="CPUs for the driver itself; without any it runs on the head")
    one.add_argument("--gpus", type=_amount, help="GPUs for the driver itself")
    one.add_argument("--resources", type=_resources, help='of your own, for the driver, such as {"big": 1}')
    one.add_argument("--wait", action="store_true", help="show the log, and end with the job's exit status")
    one.add_argument("--again", action="store_true", help="start it also where it has succeeded")
    one = verb("status", status, "show the newest attempt of every job, or all of one")
    one.add_argument("name", nargs="?", metavar="NAME")
    one = verb("logs", logs, "print the log of a job's newest attempt")
    one.add_argument("name", metavar="NAME", help="of a job or of one attempt, such as NAME-1")
    one.add_argument(
        "--follow", action="store_true", help="until the job ends, with its exit status; not beside --json"
    )
    one = verb("stop", stop, "stop a job")
    one.add_argument("name", metavar="NAME")
    return parser


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount: a number from 0 on is needed")
    return value


def _resources(text: str) -> dict[str, float]:
    try:
        asked = {str(key): _amount(json.dumps(value)) for key, value in json.loads(text).items()}
    except (ValueError, AttributeError, argparse.ArgumentTypeError):
        said = f"{text!r} is not a JSON object of numbers from 0 on, such as " + '{"big": 1}'
        raise argparse.ArgumentTypeError(said) from None
    for name, option in (("CPU", "--cpus"), ("GPU", "--gpus")):
        if name in asked:
            raise argparse.ArgumentTypeError(f"{name} is no resource of your own: say {option} {asked[name]:g}")
    return asked


def main() -> None:
    """Run the command line; what follows -- is the job's."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:cut])
    options.command = words[cut + 1 :]
    logging.disable(logging.WARNING)  # Ray's loggers set levels of their own
    try:
        sys.exit(options.run(options))
    except Refused as error:
        console.print(f"jobs: {error}", markup=False, soft_wrap=True)
        sys.exit(error.status)
    except StorageError as error:
        console.print(f"jobs: {error}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except FAILURES as error:
        console.print(f"jobs: the cluster's answer is of no use: {_reason(error)}", markup=False, soft_wrap=True)
        sys.exit(UNREACHABLE)
    except KeyboardInterrupt:
        console.print("not waited for any longer; what runs goes on: python infra/jobs.py status")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
