"""How a run ends before its time: by a signal, or with one line for what went wrong and what to do about it.

What a user can mend never ends in a traceback, and nothing that was saved is lost.
"""

import os
import shlex
import signal
import subprocess
import sys
import time

from engine import distributed, image_folder, memory

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# ---------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """A signal came where there is no step to finish: before training, or while features are computed."""


def stop_at_once():
    """Raise `Stopped`, with its number, when a signal asks to stop."""

    def stop_now(number, frame):
        raise Stopped(number)

    for number in SIGNALS:
        signal.signal(number, stop_now)


def stop_after_this_step():
    """Let the step in progress finish, whatever signal asks to stop. Returns {"signal": its number, 0 before}.

    A cluster sends a signal to all processes, and torchrun passes it on again: what comes within five seconds is the
    same wish. After that a second one kills.
    """
    stop = {"signal": 0, "time": 0.0}

    def ask(number, frame):
        if not stop["signal"]:
            stop.update(signal=number, time=time.monotonic())
        elif time.monotonic() - stop["time"] > 5:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in SIGNALS:
        signal.signal(number, ask)
    return stop


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


def explain(error, out, config, begun, fitting=None):
    """Say in one line what an error means. Returns the exit code, None for an error that is a fault of the program.

    2 for bad input, 1 for what broke on the way. out, config: of the run, or None if it did not get so far; begun:
    whether its folder has been written to; fitting: a micro-batch that is known to fit, or None.
    """
    if memory.is_out_of_memory(error):
        what = reason(str(error).rpartition("DefaultCPUAllocator: ")[2]) or type(error).__name__
        complain(f"out of memory ({what}); {kept(out)}; {memory.advice(error, config, fitting)}", everywhere=True)
        return 1
    if isinstance(error, ValueError):
        complain(error, everywhere=isinstance(error, image_folder.UnreadableImages))
        return 2
    if isinstance(error, FloatingPointError):
        complain(f"{error}; {kept(out)}; try a lower --lr")
        return 1
    if isinstance(error, OSError):  # a full disk, a read-only one
        complain(f"{error}; {kept(out)}", everywhere=True)
        return 1 if begun else 2
    if distributed.is_peer_lost(error):
        complain(f"another process is gone, see its message ({reason(error)}); {kept(out)}", everywhere=True)
        return 1
    return None


def reason(error):
    """The first sentence of what an error says."""
    return (str(error).splitlines() or [""])[0].split(". ")[0]


def complain(text, everywhere=False):
    """Print an error, once on each machine: all processes there meet the same one. everywhere: one process met it."""
    if everywhere or distributed.LOCAL_RANK == 0:
        print(f"error: {text}", file=sys.stderr)


def kept(out):
    """What is left after an error."""
    if out is None or not (out / "last.pt").exists():
        return "nothing was saved before"
    return f"{out / 'last.pt'} has the last good state"


def how_to_go_on(out):
    """What to type after a signal, as the shell of this system reads it."""
    if out is None or not (out / "last.pt").exists():
        return "stopped before anything was saved; start again with the same command"
    several = ["torchrun", f"--nproc_per_node={distributed.LOCAL_WORLD_SIZE}"]
    start = several if distributed.WORLD_SIZE > 1 else ["python"]
    folder = f"./{out}" if str(out).startswith("-") else str(out)  # else it would be taken for a flag
    quoted = shlex.join if os.name == "posix" else subprocess.list2cmdline
    return f"stopped; go on with: {quoted([*start, 'train.py', '--resume', '--out', folder])}"
