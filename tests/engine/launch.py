"""Commands of train.py on several processes, one command after the other, on the images below.

    python -m tests.engine.launch N COMMAND…                            forks N processes, once all is imported
    torchrun --nproc_per_node=N -m tests.engine.launch 0 COMMAND…       as users start them

Each process writes the exit codes of its commands, and what `all_reduce_max` told it, to codes-RANK.json. The model has
two blocks; only torchrun's processes draw figures, most of the time of a short run. A command with `--seed 13` loses
its second process at the third step.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import torch

import data
import train
import vit
from engine import distributed
from tests.engine.runs import PLAIN, coloured

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SHALLOW = vit.ARCHS["vit_micro4"] | {"depth": 2}


def uneven(size=None):
    """30 training and 13 test images: two processes get 7 and 6 of these, in batches of 2 that is 4 and 3."""
    splits = (data.InMemory(*coloured(n, seed=n), *PLAIN) for n in (30, 13))
    return data.Dataset("photos", ["red", "green", "blue"], *PLAIN, *splits)


def main(commands, figures):
    """Run the commands; the largest of their exit codes."""
    torch.set_num_threads(1)
    codes, train_step = [], train.train_step
    data.photos, vit.ARCHS["vit_micro4"] = uneven, SHALLOW

    def die(config, *rest):
        step = rest[5]
        if config.seed == 13 and (distributed.RANK, step) == (1, 2):
            os._exit(9)  # as the kernel ends a process that takes too much memory: without a word
        return train_step(config, *rest)

    train.train_step = die
    if not figures:
        train.draw_figures = lambda *_: None
    for command in commands:
        codes.append(train.main(command.split()))
        print(flush=True)
    largest = list(distributed.all_reduce_max(distributed.RANK, 5 - distributed.RANK, codes[-1]))
    distributed.end()
    Path(f"codes-{distributed.RANK}.json").write_text(json.dumps(dict(codes=codes, largest=largest)))
    return max(codes)


def fork(n, commands):
    """`main` on n processes, as torchrun would start them; the largest of their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(n):
        child = os.fork()
        if child == 0:
            for name, value in zip(NAMES, (rank, rank, n, n), strict=True):
                os.environ[name] = str(value)
                setattr(distributed, name, value)
            code = 1
            try:
                code = main(commands, figures=False)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    number, *rest = sys.argv[1:]
    sys.exit(fork(int(number), rest) if int(number) else main(rest, figures=True))
