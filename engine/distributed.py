"""Several processes, one run: what `torchrun` starts, one for each GPU.

    torchrun --nproc_per_node=8 train.py --task hpm --arch vit_b16 --data folder:PATH

All of them run the same program. Each takes its shard of every batch, and their gradients are averaged before each
step (DistributedDataParallel), so that all models stay equal; with --fsdp each keeps only its part of every parameter,
and parameters come together block by block when they are needed. Without torchrun there is one process, and everything
here returns what it was given.
"""

import contextlib
import datetime
import os
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import vit

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor
else:  # some builds of PyTorch, as those for small computers, know one process alone: nothing is ever sharded
    FSDPModule = DTensor = ()

# torchrun numbers the processes: over all machines, on this one, and how many there are.
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE, LOCAL_WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
# How long one waits for the others. The death of a process is noticed at once; this is for one that is silent, and
# longer than what the first process does alone, as saving.
TIMEOUT = datetime.timedelta(minutes=10)


def start(device):
    """Take the GPU of this process, and meet the others: NCCL between GPUs, gloo between CPUs.

    device: "cuda" is the first GPU, or with torchrun one for each process; "cuda:N" is that one; "mps" and "cpu".
    """
    device = torch.device(device)
    gpu = LOCAL_RANK if device.index is None else device.index
    if device.type == "cuda":
        torch.cuda.set_device(gpu)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def end():
    """Part from the others."""
    if WORLD_SIZE > 1 and dist.is_initialized():
        dist.destroy_process_group()


def print0(text):
    """Print once, whatever the number of processes."""
    if RANK == 0:
        print(text)


def is_peer_lost(error):
    """Whether an error says that another process, which was waited for, can't be reached: it has died."""
    words = ("onnection closed by peer", "onnection reset by peer", "Timed out", "communicator was aborted")
    return WORLD_SIZE > 1 and any(word in str(error) for word in words)


def shard(batch_size):
    """The slice of a batch that this process takes: contiguous, as long as those of the others."""
    share = batch_size // WORLD_SIZE
    return slice(RANK * share, (RANK + 1) * share)


def test_shard():
    """The slice of a test set that this process takes: every WORLD_SIZE-th image, so that sizes need not divide."""
    return slice(RANK, None, WORLD_SIZE)


# ---------------------------------------------------------------------------------------------
# What processes tell each other
# ---------------------------------------------------------------------------------------------


def all_reduce_sum(tensor):
    """The sum over all processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(*flags):
    """The largest of each flag over all processes: integers, so that all do the same. No device is waited for."""
    if WORLD_SIZE == 1:
        return flags
    flags = torch.tensor(flags)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.tolist()


def all_gather(tensor):
    """The tensors of all processes: (n, …), n the same everywhere -> (WORLD_SIZE, n, …)."""
    if WORLD_SIZE == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def gather_dicts(entries):
    """The entries of all processes' dictionaries."""
    parts = [entries] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(parts, entries)
    return {name: value for part in parts for name, value in part.items()}


def from_rank0(call):
    """Let the first process call, and tell the others what it returned; a ValueError is raised on all."""
    outcome = [None, None]
    if RANK == 0:
        try:
            outcome = [call(), None]
        except ValueError as error:
            outcome = [None, error]
    if WORLD_SIZE > 1:
        dist.barrier()  # what all have done so far is done, as reading files that `call` replaces
        dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise outcome[1]
    return outcome[0]


# ---------------------------------------------------------------------------------------------
# The model on several processes
# ---------------------------------------------------------------------------------------------


def wrap_model(model, fsdp=False, dtype="float32"):
    """The module to call in place of `model` in training, so that its gradients are averaged over the processes.

    `model` stays what it is: its parameters are the same ones, and names, updates and evaluation go through it. With
    fsdp they are replaced by shards, in place; build the optimizer after that. dtype: that of the arithmetic.
    """
    if WORLD_SIZE == 1:
        return model
    if not fsdp:
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # PyTorch 2.11 knows no other name
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (WORLD_SIZE,))
    # With autocast to bfloat16 parameters travel in it too, half the bytes; their gradients are summed in float32.
    options = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if dtype == "bfloat16" else {}
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(**options, cast_forward_inputs=False))
    for module in model.modules():
        if isinstance(module, vit.Block):
            fully_shard(module, **options)
    # HPM returns views, as the indices of hidden patches; nothing changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    return fully_shard(model, **options)


def is_sharded(model):
    """Whether each process has but a part of its parameters: then all have to call it, as often as the others."""
    return isinstance(model, FSDPModule)


def averaged_gradients(wrapped_model, last):
    """`with averaged_gradients(…):` around a micro-batch: after the last one gradients are averaged, not before."""
    waits = not last and hasattr(wrapped_model, "no_sync")  # FSDP averages after each, for it keeps shards alone
    return wrapped_model.no_sync() if waits else contextlib.nullcontext()


def full_state_dict(state):
    """A state_dict without shards: full tensors on the CPU of the first process. All processes have to call it."""
    if isinstance(state, dict):
        return {name: full_state_dict(value) for name, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    full = state.full_tensor()
    return full.cpu() if RANK == 0 else None


def sharded(full, like):
    """A full tensor, which all processes have, in shards like those of the parameter `like`."""
    return distribute_tensor(full, like.device_mesh, like.placements) if isinstance(like, DTensor) else full
