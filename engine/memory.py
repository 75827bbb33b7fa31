"""How many images go through a model at a time: measured on a GPU, and what to do where memory is out."""

import torch

from engine import distributed

# What libraries say, each in its own words, when the host or a device has no more memory.
WORDS = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "bad allocation", "alloc_failed")
# A process that decodes images was killed, by the kernel as a rule, or the memory that it shares is full.
WORKER_WORDS = ("is killed by signal", "exited unexpectedly", "shared memory", "unable to mmap")
SHARE = 0.9  # of a GPU's memory that is used: what is freed in pieces does not always come together again
FEW, MORE = 4, 12  # images, to measure with


def is_out_of_memory(error):
    """Whether an error says that the host or a device has no more memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and says(error, WORDS + WORKER_WORDS)


def says(error, words):
    return any(word in str(error).lower() for word in words)


def advice(error, config, fitting=None):
    """What to try after an error that `is_out_of_memory`. config: of the run, or None if it did not get so far;
    fitting: a micro-batch that is known to fit, or None."""
    if says(error, WORKER_WORDS):
        return "a process that decodes images is gone, as a rule for lack of memory; try a smaller --workers"
    if config is None or config.micro_batch is None:
        return "try --micro-batch 1, or a smaller --img-size or --arch"
    share = config.batch_size // distributed.WORLD_SIZE
    smaller = [n for n in range(1, config.micro_batch) if share % n == 0 and n <= (fitting or n)]
    if smaller:
        return f"with {config.micro_batch} images at a time; try --micro-batch {smaller[-1]}"
    return "with one image at a time; try --checkpointing, or a smaller --img-size or --arch"


def fit_micro_batch(step, share, later, device):
    """The largest divisor of `share` images whose step fits into the free memory of a GPU, at least 1.

    step(n): forward and backward pass of n images, nothing of which stays. Its peak is a straight line in n, found
    from two small ones. later: bytes that the run will take besides, as those of the optimizer.
    """
    try:
        step(FEW)  # at first, libraries take workspaces of their own
        few, more = (peak_memory(step, n, device) for n in (FEW, MORE))
    except torch.OutOfMemoryError:
        return 1
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    each = max(1, (more - few) / (MORE - FEW))
    fits = FEW + (SHARE * free - later - few) / each
    return max(n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n <= fits))


def peak_memory(step, n, device):
    """The most bytes that are in use on a GPU while step(n) runs."""
    torch.cuda.reset_peak_memory_stats(device)
    step(n)
    return torch.cuda.max_memory_allocated(device)
