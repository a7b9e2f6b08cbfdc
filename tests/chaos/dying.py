"""Runs train.py in processes that are killed at the first thing they have not done yet.

    python dying.py

reads a request in JSON from every line of standard input, forks, trains in the child,
and answers with the exit status. What a process does to its files is seen by an audit
hook, just before it is done; only Python's own calls are seen, not TensorStore's.
"""

import json
import os
import pathlib
import re
import signal
import sys

import train

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PLACES = {  # positions of paths, and of the folders that they are relative to
    "open": ((0, None),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.truncate": ((0, None),),
}


def _path(arguments, place):
    """The absolute path of an audit event, or "" where it has none."""
    path = arguments[place[0]]
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    path = os.fsdecode(path)
    folder = -1 if place[1] is None else arguments[place[1]]
    if folder != -1:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.abspath(path)


def operation(event, arguments, workdir):
    """Returns what is about to be done to a workdir's files, or None.

    Numbers and names that differ from run to run are left out: "os.rename
    snapshots/#.partial snapshots/#" is the same for all steps.
    """
    if event not in _PLACES or (event == "open" and not arguments[2] & _WRITES):
        return None
    paths = [_path(arguments, place) for place in _PLACES[event]]
    if not all(path.startswith(f"{workdir}{os.sep}") for path in paths):
        return None
    # What is tried out in a folder of its own is removed whole, whatever is there.
    differs = r"(?<=\.tried-).*|[0-9a-f]{32}|\d+"
    names = (re.sub(differs, "#", path[len(workdir) + 1 :]) for path in paths)
    return re.sub(r"\.tfevents\..*", "", " ".join([event, *names]))


def _watch(request):
    """Kills this process just before its first operation that is new and wanted."""
    done, stopping = set(request["done"]), request["stopping"]

    def hook(event, arguments):
        nonlocal stopping
        name = operation(event, arguments, request["workdir"])
        if name is None:
            return
        if stopping and name == "open events.out":
            stopping = False
            os.kill(os.getpid(), signal.SIGTERM)
        if name not in done and re.search(request["wanted"], name):
            done.add(name)
            pathlib.Path(request["log"]).write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _train(request):
    with open(f"{request['log']}.out", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _watch(request)
    try:
        status = train.main(["train.py", *request["argv"]])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    os._exit(status)


def main():
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _train(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
