"""Runs the doors in forked processes that can be killed, for `test_crashes.py`: torch is imported once, not once a run.

Reads one JSON request a line and answers with one: {"start": [DOOR, ARGUMENT, ...]} forks a run and answers {"run": id};
{"end": id} waits for it and answers {"code", "stdout", "stderr", "seconds", "operations"}, where a run that a signal ended has
minus its number as code. A request to start may hold "file_bytes", a limit on the size of files, which stands for a full disk;
"die_at", the number of the disk operation in whose middle the run kills itself; "env", more of its environment; with "end" there may be "signal" and
"after", the seconds before it is sent.
"""

import functools
import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  (what the doors import late, so that a run starts at once)
import torch
import torch._dynamo  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import simulate
import train
from mfllm_ref import doors, ib_tune, pretrain, report, simulation, tuning  # noqa: F401
from mfllm_ref.lm import language_model
from mfllm_ref.society import response

# Everything as in earnest, but small.
pretrain.SHAPES["tiny"] = pretrain.Shape(dim=32, layers=1, heads=2, kv_heads=1, intermediate=48, vocab=700)
language_model.ROWS = (8, 8)
pretrain.TOKENIZER_DOCUMENTS, pretrain.HELD_OUT = 40, 1
response.LEVELS = (0.1, 0.9)
pretrain.response_curves = tuning.response_curves = functools.partial(response.response_curves, agents=3, action_tokens=4)
tuning.SHOWN = 1
figure, saved = report.Figure, report._save
report.Figure = lambda **how: figure(**how | {"layout": None})  # laying out takes as long as drawing


def first_panel(page, path):
    """A picture of one panel: it is written as any other, and drawing all takes half of a run."""
    for axis in page.axes[1:]:
        axis.remove()
    saved(page, path)


report._save = first_panel
DOORS = {"simulate.py": simulate.main, "train.py": train.main}
operations = 0


def dying(operation, die_at):
    """The disk operation; the die_at-th is cut short by SIGKILL: a write is half done, all others are not."""

    def run(*arguments, **options):
        global operations
        operations += 1
        if operations == die_at:
            if operation.__name__ == "write":
                operation(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*arguments, **options)

    return run


def saying(apply):
    """An update that says the digest of the adapter it leaves, on ranks that write no file too."""

    def run(lm, update, optimizer, *rest):
        row = apply(lm, update, optimizer, *rest)
        content = b"".join(p.detach().numpy().tobytes() for p in optimizer.param_groups[0]["params"])
        os.write(2, hashlib.sha256(content).hexdigest().encode() + b"\n")
        return row

    return run


def child(arguments, out, err, count, file_bytes=None, die_at=None, env=()):
    os.environ.update(env)
    if "SAY_ADAPTERS" in os.environ:
        ib_tune.apply = saying(ib_tune.apply)
    torch.set_num_threads(1)
    os.dup2(out, 1)
    os.dup2(err, 2)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    for name in ("write", "replace", "fsync", "ftruncate", "unlink"):
        setattr(os, name, dying(getattr(os, name), die_at))
    sys.argv = [str(argument) for argument in arguments]
    code = doors.run_door(arguments[0], DOORS[arguments[0]])
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(count, str(operations).encode())
    os._exit(code)


def main():
    runs = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pipes = [os.pipe() for _ in range(3)]  # files would fall under the limit; what a run says fits into a pipe
            pid = os.fork()
            if pid == 0:
                # What runs the tests in the background of a shell has Ctrl-C ignored, and children inherit that.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                try:
                    child(request.pop("start"), *(pipe[1] for pipe in pipes), **request)
                except BaseException:  # noqa: BLE001  (an uncaught error is what a test must see: as the interpreter shows it)
                    sys.excepthook(*sys.exc_info())
                    sys.stderr.flush()
                os._exit(1)
            for pipe in pipes:
                os.close(pipe[1])
            runs[pid] = [os.fdopen(pipe[0]) for pipe in pipes], time.monotonic()
            answer = {"run": pid}
        else:
            pid = request["end"]
            if "signal" in request:
                time.sleep(request["after"])
                os.kill(pid, request["signal"])
            sent = time.monotonic()
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            files, began = runs.pop(pid)
            texts = []
            for file in files:
                with file:
                    texts.append(file.read())
            answer = {"code": code, "stdout": texts[0], "stderr": texts[1], "operations": int(texts[2] or 0),
                      "seconds": time.monotonic() - began, "after_signal": time.monotonic() - sent}  # fmt: skip
        print(json.dumps(answer), flush=True)


main()
os._exit(0)  # the interpreter takes seconds to clean up after torch
