"""A run folder: one writer at a time, files that are whole or absent, a record of what made them, and resuming.

Notable: the lock is the operating system's (flock), so a killed process leaves none behind. Small files are written
beside their place and renamed into it; long ones (JSON Lines) only grow, and what a crash tore off their end is cut
when the run goes on. Everything here that depends on the clock stands under TIME_FIELDS, so that two runs of the same
settings can be compared byte for byte without them. Whatever the disk refuses is an `InputError` naming the path.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path

from mfllm_ref import ranks
from mfllm_ref.errors import InputError
from mfllm_ref.fields import an_object, number_field, read_json

# Of run.json and log.jsonl:
TIME_FIELDS = ("started", "ended", "wall_time", "actions_per_second", "seconds", "tokens_per_second")
RUN_FILE, LOCK_FILE = "run.json", ".lock"
_PACKAGES = ("torch", "triton", "safetensors", "tokenizers", "sentencepiece", "numpy", "matplotlib", "jinja2")


# ---- files ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses (no space, no right, no such place) into one line that names the path."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def _json(value: object, indent: int | None = None) -> bytes:
    # A lone surrogate (a path name that is not UTF-8) becomes \udcxx, which JSON reads back as it was.
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent).encode("utf-8", "backslashreplace")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside its place, then renamed into it. InputError where the disk refuses. Of several
    processes only rank 0 writes."""
    if ranks.rank():
        return
    beside = path.with_name(f".{path.name}.part")
    with _reported(path):
        try:
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: object) -> None:
    """`write_bytes` of indented UTF-8 JSON. NaN and infinity are a ValueError: JSON has neither."""
    write_bytes(path, _json(value, indent=1) + b"\n")


def _valid_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Length in bytes and row of each line, up to the first that is torn or damaged."""
    with _reported(path):
        with open(path, "rb") as file:
            for line in file:
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                except (ValueError, RecursionError):
                    return
                if not isinstance(row, dict):
                    return
                yield len(line), row


def read_json_lines(path: Path) -> Iterator[dict]:
    """The rows of a JSON Lines file up to the first line that is torn or damaged; none where there is no file."""
    return (row for _, row in _valid_lines(path)) if path.exists() else iter(())


class JsonLines:
    """An append-only JSON Lines file. On opening, whatever follows its valid prefix (a torn line) is cut off. Ranks other than
    0 count its rows and write nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reported(path):
            self._file = None if ranks.rank() else os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self.keep(None)
        ranks.gather(None)  # nobody adds a row before all have counted them

    def keep(self, rows: int | None) -> None:
        """Cut the file after its first `rows` rows (None: after all valid ones). `count` is how many there are. InputError where
        there are fewer."""
        valid = _valid_lines(self.path) if self.path.exists() else iter(())
        lengths = [length for length, _ in itertools.islice(valid, rows)]
        if rows is not None and len(lengths) < rows:
            raise InputError(f"{self.path}: damaged, cannot resume (has {len(lengths)} of {rows} rows)")
        self.count = len(lengths)
        if self._file is not None:
            with _reported(self.path):
                os.ftruncate(self._file, sum(lengths))

    def append(self, rows: Iterable[Mapping]) -> None:
        """Write rows and wait until they are on the disk, so that what a step reports as done survives a crash."""
        batch = list(rows)
        self.count += len(batch)
        if self._file is None:
            return
        rest = memoryview(b"".join(_json(row) + b"\n" for row in batch))
        with _reported(self.path):
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict]:
        """The rows so far, read from the disk one at a time."""
        return read_json_lines(self.path)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)


# ---- provenance ----------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with _reported(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git() -> dict[str, str | bool] | None:
    """The revision of the checkout this code runs from; None where it is not tracked in one, or git is not there."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie in some other project's checkout
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    return None


def provenance(inputs: Mapping[str, Path]) -> dict:
    """What a run must record to be attributable: {"versions", "git", "sha256": {name: digest of each input}}."""
    versions = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in ("mfllm-ref", *_PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):  # e.g. triton outside Linux, or run from a checkout
            versions[name] = metadata.version(name)
    return {"versions": versions, "git": _git(), "sha256": {name: sha256(path) for name, path in inputs.items()}}


# ---- the folder ----------------------------------------------------------------------------------------------------


def pretraining(backbone: Path) -> dict[str, dict]:
    """{"settings", "sha256"} of the run in which this project pretrained the checkpoint in a folder, both {} for any other.
    InputError where the run.json that lies there is damaged."""
    path = backbone / RUN_FILE
    record = an_object(read_json(path), str(path), "a run's record") if path.is_file() else {}
    found = {name: an_object(record.get(name, {}), str(path), f"'{name}'") for name in ("settings", "sha256")}
    return found if found["settings"].get("stage") == "pretrain" else dict.fromkeys(found, {})


def _now() -> str:
    return datetime.now().isoformat("T", "seconds")


def default_out() -> Path:
    """A new place for a run: runs/<time>, to the microsecond, so that two runs begun together have two places."""
    return ranks.gather(Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f"))[0]


class Run:
    """An open run folder; see `open_run`. `record` is what run.json says."""

    def __init__(self, out: Path, record: dict) -> None:
        self.out, self.record = out, record
        self.files: list[JsonLines] = []
        self._began = time.monotonic() - (record.get("wall_time") or 0.0)  # an interrupted run's time counts on

    @property
    def finished(self) -> bool:
        return self.record.get("status") == "finished"

    def lines(self, name: str) -> JsonLines:
        """The folder's JSON Lines file of that name, open for appending until the run closes."""
        self.files.append(JsonLines(self.out / name))
        return self.files[-1]

    def write(self, status: str, **fields: object) -> None:
        """Write run.json: what was given at the start, `fields`, and the time so far in seconds."""
        self.record |= {**fields, "status": status}
        if status != "running":
            self.record |= {"wall_time": round(time.monotonic() - self._began, 3), "ended": _now()}
        write_json(self.out / RUN_FILE, self.record)

    def complete(self, **fields: object) -> None:
        """Mark the run as finished, recording `fields` (those of TIME_FIELDS may differ between equal runs). No process goes
        on before that is on the disk."""
        self.write("finished", **fields)
        ranks.gather(None)


def _earlier(out: Path, record: Mapping) -> dict | None:
    """The record of the run that `out` holds, None for a folder that holds nothing. InputError if it is another run."""
    try:
        earlier = json.loads((out / RUN_FILE).read_bytes())
        then, now = ({**r["settings"], **{f"sha256.{k}": v for k, v in r["sha256"].items()}} for r in (earlier, record))
        number_field(earlier, "wall_time", str(out / RUN_FILE), 0.0)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{out / RUN_FILE}: damaged, cannot resume ({type(error).__name__})") from None
    now = json.loads(_json(now))  # as the file has it: a tuple is a list
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise InputError(f"--resume {out}: {key} was {then.get(key)!r} in that run and is {now.get(key)!r} now")
    return earlier


def check_place(out: Path, resume: bool) -> None:
    """InputError where `open_run` would refuse the folder for what lies in it; creates nothing."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    with _reported(out):
        names = {path.name for path in out.iterdir()} if out.exists() else set()
    held = {name for name in names if name != LOCK_FILE and not name.endswith(".part")}
    if held and not resume:
        raise InputError(f"--out {out}: not empty (--resume goes on with an interrupted run)")
    if held and RUN_FILE not in held:
        raise InputError(f"--resume {out}: holds files but no {RUN_FILE}, so it is not a run")


@contextlib.contextmanager
def open_run(out: Path, record: Mapping, resume: bool = False) -> Iterator[Run]:
    """Hold the folder `out` for one run and record what it is; a new `Run`, or the earlier one when resuming.

    record: what run.json says, with "settings" and "sha256" (mappings; on resuming they must be the earlier run's). An
    absent or empty folder starts anew, with `resume` or without. If an exception ends it, run.json says "interrupted" and
    the folder can be resumed; on Ctrl-C the message says how. InputError, in one line: another process writes there, the folder
    is not empty (without `resume`), holds something else or a run of other settings, or the disk refuses. Of several processes
    rank 0 holds the folder; the others take the same path and write nothing.
    """
    try:
        with _held(out, record, resume) as run:
            yield run
    except (KeyboardInterrupt, ranks.Lost) as error:
        error.add_note(f"--out {out} --resume goes on from what is on disk")
        raise


@contextlib.contextmanager
def _held(out: Path, record: Mapping, resume: bool) -> Iterator[Run]:
    check_place(out, resume)
    ranks.gather(None)  # all have seen the folder as it was
    if ranks.rank():
        yield Run(out, ranks.gather(None)[0])
        return
    with _reported(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    run = None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {out}: another run is writing there") from None
        check_place(out, resume)  # again, now that nobody else can write: it may have just been another run's
        run = Run(out, _earlier(out, record) or {"started": _now(), "processes": ranks.world_size(), **record})
        if not run.finished:
            run.write("running")
        ranks.gather(run.record)
        yield run
    except BaseException:
        if run is not None and not run.finished:
            with contextlib.suppress(InputError):  # the disk may be full: the first error is the one to report
                run.write("interrupted")
        raise
    finally:
        for file in run.files if run is not None else ():
            file.close()
        os.close(lock)
