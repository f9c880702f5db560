"""What both doors share. Their exit codes and errors are tested with the doors themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfllm_ref import doors
from mfllm_ref.errors import InputError
from mfllm_ref.society.events import HALF_LIFE

WARNING = """
import warnings
from mfllm_ref import doors, errors
def main():
    warnings.warn("a notice", errors.Notice)
    warnings.warn("of a library")
doors.run_door("simulate.py", main)
warnings.warn("after the door", errors.Notice)
"""


def test_a_notice_is_one_line_and_other_warnings_say_where_they_come_from():
    said = subprocess.run([sys.executable, "-c", WARNING], capture_output=True, text=True, check=True).stderr.splitlines()
    assert said[0] == "simulate.py: a notice"
    assert said[1] == "<string>:6: UserWarning: of a library" and said[2].endswith(": Notice: after the door")


SAYING = """
import sys
from mfllm_ref import doors
def main():
    for i in range(3):
        doors.say("\\u4e2d" + str(i))
    print("reached", file=sys.stderr)
sys.exit(doors.run_door("simulate.py", main))
"""


CLOSED = """
from pathlib import Path
from mfllm_ref import doors
def main():
    assert not doors.progress(Path("out"))
    doors.say("no progress")
    raise doors.InputError("nobody hears it")
sys.exit(doors.run_door("simulate.py", main))
"""


def test_what_nobody_can_read_ends_no_run():
    """Neither a reader who has gone away, nor a full disk, nor a closed stderr, nor a terminal without the letters."""
    code = f"import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1); exec({SAYING!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "reached\n")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", SAYING], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "reached\n")
    closed = f"import os, sys; os.close(2); sys.stderr = None; exec({CLOSED!r})"
    done = subprocess.run([sys.executable, "-c", closed], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "no progress\n")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", SAYING], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, r"\u4e2d0")


SHAPES = """
import argparse
from mfllm_ref import doors, scale
doors.threads(argparse.Namespace(threads=1))
import torch
weight = torch.ones(192, 192, dtype=torch.bfloat16)
def products(lengths):
    for length in lengths:
        torch.nn.functional.linear(torch.ones(length, 192, dtype=torch.bfloat16), weight)
    return scale.peak_memory() / 1e6
print(-products(range(1, 401)) + products(range(401, 1001)))
"""


def test_products_of_ever_new_shapes_take_no_more_memory_in_bfloat16():
    grown = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, check=True).stdout
    assert float(grown) < 200, f"{grown} MB; a CPU that multiplies no bfloat16 keeps nothing anyway"


def asked(backbone, *options):
    """--half-life as a door has it, of a run with that backbone."""
    parser = doors.Parser()
    doors.add_half_life(parser)
    args = parser.parse_args(options)
    args.backbone = backbone
    return doors.half_life(args)


RECORDS = {
    "pretrained here": ({"settings": {"stage": "pretrain", "half_life": 960}}, 960),
    "tuned here": ({"settings": {"stage": "all", "half_life": 960}}, HALF_LIFE),
    "pretrained before there was a choice": ({"settings": {"stage": "pretrain"}}, HALF_LIFE),
    "made elsewhere": ({"job": 3}, HALF_LIFE),
}


@pytest.mark.parametrize("record, expected", RECORDS.values(), ids=RECORDS.keys())
def test_a_population_remembers_as_long_as_in_its_backbones_pretraining(tmp_path, record, expected):
    assert asked(None) == asked(tmp_path) == HALF_LIFE
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert asked(tmp_path) == expected and asked(tmp_path, "--half-life", "7") == 7


@pytest.mark.parametrize("settings", [[], 3, {"stage": "pretrain", "half_life": "long"}, {"stage": "pretrain", "half_life": 0}])
def test_a_damaged_record_of_pretraining_is_named(tmp_path, settings):
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(InputError, match="run.json: 'settings'|run.json: 'half_life'"):
        asked(tmp_path)


def test_the_committed_adapters_are_for_the_committed_backbone_wherever_its_name_leads(tmp_path, monkeypatch):
    monkeypatch.chdir(doors.CHECKPOINTS)
    (tmp_path / "link").symlink_to(doors.CHECKPOINTS / "tiny")
    for path in (doors.CHECKPOINTS / "tiny", Path("tiny"), Path("../checkpoints/tiny/"), tmp_path / "link"):
        assert doors.own_adapters(path) == doors.CHECKPOINTS / "tiny-adapters"
    assert doors.own_adapters(tmp_path) is None


def test_a_doors_first_import_is_quick():
    """What it needs before it can hear Ctrl-C: none of the packages that take a tenth of a second or more."""
    code = "import sys; from mfllm_ref import doors; print(sorted({'numpy', 'torch', 'matplotlib', 'jinja2', 'tqdm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


HELD = """
import os, signal, sys
from mfllm_ref import doors
def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs beside it has them ignore it
    with doors.interrupted_after():
        os.kill(os.getpid(), signal.SIGINT)
        print("imported whole", file=sys.stderr)
    print("not reached", file=sys.stderr)
sys.exit(doors.run_door("simulate.py", main))
"""


def test_an_interruption_waits_for_imports():
    """A package that Ctrl-C hits while it is imported may swallow it, or stay half imported."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "imported whole\nsimulate.py: interrupted\n")


@pytest.mark.parametrize("error", ['MemoryError()', 'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: 9 bytes\\nat x")'])
def test_no_memory_is_one_line(error):
    code = f"import sys\nfrom mfllm_ref import doors\ndef main(): raise {error}\nsys.exit(doors.run_door('train.py', main))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("train.py: out of memory (") and done.stderr.count("\n") == 1
    other = subprocess.run([sys.executable, "-c", code.replace(error, 'RuntimeError("else")')], capture_output=True, text=True)
    assert other.returncode == 1 and "Traceback" in other.stderr, "a fault of the program's own is not hidden"


def test_a_loop_of_links_is_no_backbone_of_ours(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert doors.own_adapters(tmp_path / "loop") is None
