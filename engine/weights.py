"""Weights from the checkpoint files that people publish, all under one set of names, into the models here.

A ViT is the same function in every code base; only the files differ. This module reads them, says what they hold in
the names of this project (timm's for the encoder, those of `hpm.Autoencoder` for the rest), and puts it into a model.

    layouts     whose names are they? timm, DeiT, DINO, MAE, HPM, Hugging Face, Google: tables of pairs
    files       torch, safetensors and NumPy files, told apart by their first bytes; nothing in them is run
    read        a file or URL, out of what a training script saved around the model, under our names; what it says of
                itself: the names of its classes, the grid of its positions
    load        into a model, whatever its image size, channels and classes; what did not fit is said
    frozen      DINO and CLIP, whose features are targets of HPM
    write       our weights as a file that timm or Hugging Face's transformers loads, too

What no file says: Google's models use the tanh GELU (`gelu="tanh"`), and Hugging Face's converted ones the
LayerNorm eps in their config.json, often 1e-12. Create the model with that for equal logits.
"""

import argparse
import hashlib
import json
import math
import os
import re
import stat
import urllib.parse
from pathlib import Path

import numpy as np
import pooch
import safetensors.torch
import torch
from torch.nn import functional as F

import vit
from engine import distributed, files

# ---------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------

# Every table is read from top to bottom: (pattern in their name, what to put there). A name that becomes empty is
# left out. q, k and v apart are joined afterwards.

OURS = ((r"^encoder\.", ""),)  # hpm.Autoencoder

TIMM = (  # and MAE's and HPM's official code: timm's names for the encoder, these for the decoders
    (r"^decoder_(blocks|norm|pred)_losspred\.", r"loss_predictor.\1."),
    (r"^decoder_(blocks|norm|pred)\.", r"decoder.\1."),
    (r"^patch_embed\.backbone\.(conv|norm)\.", r"patch_embed.backbone.stem.\1."),  # a hybrid with the stem alone
)

TIMM_RESNET = ((r"^head\.fc\.", "head."),)

HUGGING_FACE = (  # transformers' names in files, and inside version 5: layers.0.attention.q_proj
    (r"^vit\.", ""),
    (r"^pooler\..*", ""),
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^decoder\.(decoder_embed|decoder_pos_embed|mask_token)", r"\1"),
    (r"^decoder\.decoder_(norm|pred)", r"decoder.\1"),
    (r"^decoder\.decoder_(layers|encoder\.layer)\.", "decoder.blocks."),  # the second is what version 5 writes
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)

GOOGLE = (  # Flax: the numbers count a block's parts, whose dropout and residual have no weights
    (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
    (r"\.LayerNorm_0/", ".norm1."),
    (r"\.MultiHeadDotProductAttention_1/([qkv])(uery|ey|alue)/", r".attn.\1."),
    (r"\.MultiHeadDotProductAttention_1/out/", ".attn.proj."),
    (r"\.LayerNorm_2/", ".norm2."),
    (r"\.MlpBlock_3/Dense_0/", ".mlp.fc1."),
    (r"\.MlpBlock_3/Dense_1/", ".mlp.fc2."),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm."),
    (r"^cls$", "cls_token"),
    (r"^embedding/", "patch_embed.proj."),
    (r"^pre_logits/", "pre_logits.fc."),
    (r"^head/", "head."),
    # The hybrids: what becomes of block1/unit1, counted from 1, is stages.0.blocks.0.
    (r"^(conv|gn)_root/", r"patch_embed.backbone.stem.\1."),
    (r"^block(\d+)/unit(\d+)/", lambda m: f"patch_embed.backbone.stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}."),
    (r"\.(conv|gn)_proj/", r".downsample.\1."),
    (r"\.(conv|gn)(\d)/", r".\1\2."),
    (r"\.gn(\d?)\.", r".norm\1."),
    (r"\.(kernel|scale)$", ".weight"),
)

BIT = (  # its .npz files: a, b and c are the three convolutions of a unit
    (r"^root_block/standardized_conv2d/", "stem.conv."),
    (r"^block(\d+)/unit(\d+)/", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}."),
    (r"\.a/proj/standardized_conv2d/", ".downsample.conv."),
    (r"\.([abc])/standardized_conv2d/", lambda m: f".conv{'abc'.index(m[1]) + 1}."),
    (r"\.([abc])/group_norm/", lambda m: f".norm{'abc'.index(m[1]) + 1}."),
    (r"^group_norm/", "norm."),
    (r"^head/conv2d/", "head."),
    (r"\.(kernel|gamma)$", ".weight"),
    (r"\.beta$", ".bias"),
)

CLIP = (  # its visual tower, as OpenAI's code names it
    (r"^visual\.", ""),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)

# Values in another arrangement: (pattern in their name, what to do); the first that is found counts.
# The official HPM averages P*P*C outputs to one predicted loss. The mean of linear maps is the linear map of the means.
AVERAGED = ((r"^decoder_pred_losspred\.", lambda w: w.double().mean(0, keepdim=True).to(w.dtype)),)
CONVOLUTION_AS_LINEAR = ((r"^head\.fc\.weight$", lambda w: w.flatten(1)),)  # (classes, D, 1, 1)
FLAX = (  # a kernel's inputs come first, and heads have an axis of their own: (D, k, D_h), at the end (k, D_h, D)
    (r"(^embedding|conv\w*)/kernel$", lambda w: w.permute(3, 2, 0, 1)),  # (P, P, C, D) -> (D, C, P, P)
    (r"gn\w*/(scale|bias)$", lambda w: w.flatten()),  # in older files (1, 1, 1, C)
    (r"/out/kernel$", lambda w: w.flatten(0, 1).T),
    (r"/kernel$", lambda w: w.flatten(1).T),
    (r"/(query|key|value)/bias$", lambda w: w.flatten()),
)

BIT_VALUES = (
    (r"^head/conv2d/kernel$", lambda w: w.flatten(0, 2).T),  # (1, 1, D, classes)
    (r"/kernel$", lambda w: w.permute(3, 2, 0, 1)),
)

# Names that tell a layout, after any prefix; its names; its values; whose way of interpolating positions, see `resize`.
# The first that is found counts. A model of another kind is one more row here, with a table of its own, and a line in
# KNOWN.
LAYOUTS = (
    (("encoder.patch_embed.proj.weight", "decoder_embed.weight"), OURS, (), "timm"),
    (("patch_embed.proj.weight",), TIMM, AVERAGED, "timm"),
    (("vit.embeddings.patch_embeddings.projection.weight",), HUGGING_FACE, (), "torch"),
    (("embeddings.patch_embeddings.projection.weight",), HUGGING_FACE, (), "torch"),
    (("embedding/kernel", "Transformer/encoder_norm/scale"), GOOGLE, FLAX, "google"),
    (("stem.conv.weight", "stages.0.blocks.0.conv1.weight"), TIMM_RESNET, CONVOLUTION_AS_LINEAR, "timm"),
    (("root_block/standardized_conv2d/kernel", "group_norm/gamma"), BIT, BIT_VALUES, "timm"),
)

# Every name that is handed out, and q, k and v before they are joined.
BLOCK = r"blocks\.\d+\.((norm[12]|attn\.(q|k|v|qkv|proj)|mlp\.fc[12])\.(weight|bias)|attn\.relative\.pos_embed)"
RESNET = r"(stem\.(conv|norm)|stages\.\d+\.blocks\.\d+\.((conv|norm)[123]|downsample\.(conv|norm)))\.(weight|bias)"
KNOWN = "|".join(
    (
        rf"cls_token|(row_|column_)?pos_embed|{BLOCK}|(patch_embed\.backbone\.)?{RESNET}",
        r"(patch_embed\.proj|norm_pre|norm|fc_norm|pre_logits\.fc|head)\.(weight|bias)",
        rf"mask_token|decoder_pos_embed|decoder_embed\.(weight|bias)|(decoder|loss_predictor)\.{BLOCK}",
        r"(decoder|loss_predictor)\.(norm|pred)\.(weight|bias)",
    )
)

# From our names to those of Hugging Face's files, q, k and v apart.
TO_HUGGING_FACE = (
    (r"^(cls_token)$", r"vit.embeddings.\1"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.attn\.q\.", ".attention.attention.query."),
    (r"\.attn\.k\.", ".attention.attention.key."),
    (r"\.attn\.v\.", ".attention.attention.value."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
)

# What training scripts save a model under, in this order where a file holds several; and what, in such a name, says
# that its weights are an average over the steps. What compiled or sharded modules write between the names.
WRAPPERS = ("student", "model", "state_dict", "model_state_dict", "module", "net", "teacher", "ema_state_dict")
AVERAGED_NAME = r"EMA|(?i:(?<![a-z])(teacher|ema|averaged?|avg|swa|shadow|polyak|momentum|target)(?![a-z]))"
INSERTED = r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\."

# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def file_format(path):
    """ "torch", "numpy" or "safetensors", by what the file holds; its name says nothing.

    torch and NumPy both write zip files, whose checksums are looked at here: the first holds a data.pkl, the second
    only arrays. Raises ValueError for anything else, a damaged zip file included.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(b"PK"):
        names = files.check_zip(path)
        if any(name.endswith("/data.pkl") for name in names):
            return "torch"
        if names and all(name.endswith(".npy") for name in names):
            return "numpy"
        raise ValueError(f"a zip file without weights, with {', '.join(names[:3]) or 'nothing'} in it")
    if start[8:] == b"{":  # after 8 bytes with the header's length, the header, in JSON
        return "safetensors"
    if start.startswith(b"\x80"):  # a pickle: torch's format before 1.6
        return "torch"
    what = "a web page or XML" if start.lstrip().startswith(b"<") else "neither a torch, a safetensors nor an .npz file"
    raise ValueError(f"{what}, of {os.path.getsize(path)} bytes")


def read_file(path):
    """What a file holds, most often a dict of tensors; and what it says of them: see `metadata`.

    Raises whatever its damage leads to.
    """
    kind = file_format(path)
    if kind == "safetensors":
        with safetensors.safe_open(path, "pt") as file:
            said = file.metadata() or {}
        return safetensors.torch.load_file(path), described({key: parse(said.get(key)) for key in ("classes", "grid")})
    if kind == "numpy":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}, described({})
    # Training scripts save their options beside the weights: a Namespace, which only holds values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    return content, described(content if isinstance(content, dict) else {})


def parse(text):
    """A value out of JSON; None for what is none: other programs write what they like there."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def described(said):
    """What a file says of its weights, as `metadata` gives it. Other code may mean something else by these words."""
    classes, grid, config = said.get("classes"), said.get("grid"), said.get("config")
    named = isinstance(classes, (list, tuple)) and len(classes) > 0 and all(isinstance(name, str) for name in classes)
    pair = isinstance(grid, (list, tuple)) and len(grid) == 2 and all(type(n) is int and n > 0 for n in grid)
    return dict(
        classes=list(classes) if named else None,
        grid=tuple(grid) if pair else None,
        config=config if isinstance(config, dict) else None,
    )


def explain(error):
    """One line out of an exception."""
    text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2] or type(error).__name__
    if found := re.match(r"Unsupported (?:global: GLOBAL|class) (\S+)", text):
        return f"it holds more than tensors, {found[1]}, and no code from a file is ever run"
    return text.split(". ")[0]


def cached(url):
    """The path of a copy of the file at a URL, in $VIT_CACHE, by default ~/.cache/vit-hpm; made once, used again.

    A name as vit-0123abcd.pth carries the start of the file's SHA-256 (torch.hub's convention): it is checked, and
    again whenever the copy is used. Raises ValueError if that, or the network, fails, or if what comes is no file of
    weights.
    """
    name = urllib.parse.urlsplit(url).path.rpartition("/")[2][-100:]
    hexadecimal = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    checksum = f"sha256:{hexadecimal[1]}" if hexadecimal else None
    try:  # a page that says "please log in" must not stay in the cache
        folder = Path(os.environ.get("VIT_CACHE") or "~/.cache/vit-hpm").expanduser()
        path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"  # many are called model.safetensors
        files.download(url, path, checksum, check=file_format)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"can't download {url}: {explain(error)}; try again") from None
    regular(path, f"{path}, the copy of {url}")
    try:
        files.verify(path, checksum)
    except ValueError:
        kept = f"the copy of {url} that is kept in {path} has another checksum than its name says"
        raise ValueError(f"{kept}: it was changed; delete it to download it again") from None
    return path


def regular(path, source):
    """The path of a file. Raises ValueError, naming `source`, for what is none: a pipe or a device may never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # not there; links in a circle; too long a name, or one with a zero byte
        reason = "" if isinstance(error, FileNotFoundError) else f" ({getattr(error, 'strerror', None) or error})"
        raise ValueError(f"no weights at {source}{reason}; check the path") from None
    if not stat.S_ISREG(mode):
        what = "that of a folder" if stat.S_ISDIR(mode) else "no regular file but a pipe, a device or a socket"
        raise ValueError(f"no weights at {source}; check the path, it is {what}")
    return path


def local(source):
    """The path of a file on this machine: of `source` itself, or of the copy of a URL. Raises ValueError."""
    url = str(source).startswith(("http://", "https://"))
    return cached(str(source)) if url else regular(Path(source), source)


# ---------------------------------------------------------------------------------------------
# Read
# ---------------------------------------------------------------------------------------------


def content_of(source):
    """What is in a file or behind a URL, and what it says of it: see `read_file`. Raises ValueError, in one line."""
    path = local(source)
    try:
        return read_file(path)
    except Exception as error:  # whatever the libraries meet in a file that is no checkpoint, or half of one
        where = "" if path == Path(source) else f" (kept in {path}: delete it to download it again)"
        raise ValueError(f"{source} can't be read as weights{where}: {explain(error)}") from None


def metadata(source):
    """What a file of weights, or a URL, says of itself; None for what it does not say. Raises ValueError as `read`.

    classes  the names of its head's classes, in order
    grid     (rows, columns) of the patches that its positions are for
    config   the configuration of the run that wrote it, a dict
    """
    return content_of(source)[1]


def digest(source):
    """The SHA-256 of a file, or of the kept copy of a URL's, in hexadecimal. Raises ValueError if there is none."""
    return pooch.file_hash(str(local(source)), "sha256")


def tensors(source, which="student", wanted=None):
    """What a file holds by name, out of its wrappers but under its own names, and what it says of it: see `read`.

    wanted: says of a dict whether it is the one; by default whether it has a known layout.
    """
    if which not in ("student", "teacher"):
        raise ValueError(f"unknown model {which!r}; there are student and teacher")
    content, said = content_of(source)
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds no weights but a {type(content).__name__}; it has to be tensors by name")
    inside, wanted = list(dicts_in(content)), wanted or (lambda state: find_layout(state, which))
    models = sorted((rank(way, which), i, ".".join(way)) for i, (way, state) in enumerate(inside) if wanted(state))
    if len(models) > 1 and models[0][0] == models[1][0]:
        names = f"{models[0][2]} and {models[1][2]}"
        raise ValueError(f"{source} holds several models, {names}; save the one to load in a file of its own")
    if models:
        return inside[models[0][1]][1], said
    return max((state for _, state in inside), key=lambda state: sum(map(torch.is_tensor, state.values()))), said


def dicts_in(content):
    """A dict and all dicts in it: the names on the way to it, and what it holds by name. One that holds itself once."""
    seen, queue = set(), [((), content)]
    for way, inner in queue:
        if id(inner) not in seen and len(way) < 5:
            seen.add(id(inner))
            yield way, {str(name): value for name, value in inner.items()}
            queue += [((*way, str(name)), value) for name, value in inner.items() if isinstance(value, dict)]


def rank(names, which):
    """The order of models in a file, by the names on the way to them: the wanted kind first, then as in WRAPPERS."""
    averaged = any(re.search(AVERAGED_NAME, name) for name in names)
    return averaged != (which == "teacher"), [(*WRAPPERS, name).index(name) for name in names]


def find_layout(state, which):
    """The first layout whose names are all there behind some prefix: (prefix, its row after the names), or None.

    With several prefixes, as `student.` and `teacher.`, the one that `which` names; else the first.
    """
    for (anchor, *others), *rest in LAYOUTS:
        prefixes = [name.removesuffix(anchor) for name in state if name.endswith(anchor)]
        prefixes = [p for p in prefixes if p[-1:] in ("", ".", "/") and all(p + other in state for other in others)]
        if prefixes:
            return min(prefixes, key=lambda prefix: rank(re.split("[./]", prefix)[:-1], which)), *rest
    return None


def rename(name, table):
    """One name, changed by every pair of a table that fits, in order."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def read(source, which="student"):
    """The weights of a ViT or a masked autoencoder: name -> tensor, under this project's names.

    source  a path or an http(s) URL (see `cached`): a torch, safetensors or NumPy file by timm, DeiT, DINO, MAE,
            HPM, Hugging Face (ViTModel, ViTForImageClassification, ViTMAEForPreTraining), Google, or ours
    which   "student" or "teacher", where a file holds both; else the one that it holds

    Encoder: patch_embed.proj, cls_token, pos_embed, blocks.N.…, norm, fc_norm, pre_logits.fc, head. Of an autoencoder
    also decoder_embed, mask_token, decoder_pos_embed, decoder.…, loss_predictor.… as in `hpm.Autoencoder`.
    A hybrid's ResNet is patch_embed.backbone.{stem, stages}, as in timm; BiT's has stem, stages, norm, head.
    Raises ValueError, in one line with the source, for a file that can't be read, is no ViT, or holds parts that
    a ViT does not have: without them it would be another function. No code that a file may carry is ever run.
    """
    return recognise(source, which)[0]


def recognise(source, which="student"):
    """`read`, and what `load_state` has to know besides: what the file says, and how its code resizes positions."""
    state, said = tensors(source, which)
    layout = find_layout(state, which)
    if layout is None:
        raise ValueError(f"{source} holds no ViT or ResNet that is known here; its keys are {show(state)}")
    prefix, names, values, how = layout
    out, unknown = {}, []
    for key, value in state.items():
        if not key.startswith(prefix):
            continue  # a teacher beside its student, DINO's projection head beside its backbone
        theirs = re.sub(INSERTED, "", key.removeprefix(prefix))
        name = rename(theirs, names)
        if name and not re.fullmatch(KNOWN, name):
            unknown.append(key)
        elif name in out:
            raise ValueError(f"{source} does not fit: it has {name} twice, the second time as {key}")
        elif name:
            check_tensor(value, key, source)
            try:
                out[name] = next((change(value) for pattern, change in values if re.search(pattern, theirs)), value)
            except (RuntimeError, IndexError):
                raise ValueError(f"{source} does not fit: its {key} has the shape {tuple(value.shape)}") from None
    if unknown:
        raise ValueError(f"{source} is a model of another kind: no ViT here has its {show(unknown)}")
    return join_qkv(out, source), said | dict(how=how)


def check_tensor(value, key, source):
    """Raise ValueError for what is no plain tensor of floating-point numbers, and would be cast or fail in the end."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{source} does not fit: its {key} is no tensor but a {type(value).__name__}")
    kinds = {"nested": value.is_nested, "sparse": value.layout != torch.strided, "quantised": value.is_quantized}
    kinds |= {"without values (device meta)": value.is_meta, str(value.dtype): not value.is_floating_point()}
    if kind := next((kind for kind, found in kinds.items() if found), None):
        raise ValueError(f"{source} does not fit: its {key} is {kind}; save plain tensors of floating-point numbers")


def join_qkv(state, source):
    """U_q, U_k and U_v, three matrices in some files, as the one matrix U_qkv of ViT eq. 5, in their place."""
    out = {}
    for name, value in state.items():
        apart = re.fullmatch(r"(.*\.attn\.)[qkv](\.\w+)", name)
        joined = f"{apart[1]}qkv{apart[2]}" if apart else name
        if not apart:
            out[name] = value
        elif joined not in out:
            parts = [state.get(f"{apart[1]}{letter}{apart[2]}") for letter in "qkv"]
            if any(part is None or part.ndim == 0 or part.shape != value.shape for part in parts) or joined in state:
                raise ValueError(f"{source} does not fit: q, k and v of {apart[1]}* are not three of one shape")
            out[joined] = torch.cat(parts)
    return out


def show(names):
    """The first few of many names."""
    names = list(names)
    return ", ".join(names[:3]) + ", …" * (len(names) > 3) or "(none)"


# ---------------------------------------------------------------------------------------------
# Load
# ---------------------------------------------------------------------------------------------


def load(model, source, which="student", grid=None, classes=None):
    """Load a checkpoint, a file or a URL, into a ViT, a hybrid, a ResNet or an `hpm.Autoencoder`: see `read`.

    which    "student" or "teacher", where the file holds both
    grid     (rows, columns) of the file's positions, where it does not say; without, a square number is a square grid
    classes  the names of the model's classes: if the file names its own, the head is kept, in this order, when
             they are the same, and else left at its initial value; without names their number decides

    Another image size is no obstacle: positions are carried to the model's grid, see `fit_pos_embed`. Nor is another
    number of channels, see `fit_channels`. Decoders that the file lacks are left at their initial value. Returns
    sentences that say what was adapted, left or not used.
    Raises ValueError, and changes nothing, if the file can't be read or does not fit.
    """
    state, said = recognise(source, which)
    return load_state(model, state, source, said, grid, classes)


UNSAID = dict(classes=None, grid=None, config=None, how="timm")  # of tensors that come from no file


def load_state(model, state, source, said=UNSAID, grid=None, classes=None):
    """`load` from what `recognise` gives; `source` is what messages call it."""
    own = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    for name in own.keys() & state.keys():
        if state[name].ndim != own[name].ndim:
            raise ValueError(f"{source} does not fit: its {name} is not a tensor with {own[name].ndim} dimensions")
    if not own.keys() & state.keys():
        raise ValueError(f"{source} does not fit: it has nothing of this model, which starts with {next(iter(own))}")
    tokens = {"patch_embed.proj.weight", "norm.weight"} <= state.keys()  # of a ViT; the norm is that of all tokens
    if tokens and not {"cls_token", "fc_norm.weight"} & state.keys() and "decoder_embed.weight" not in own:
        what = "no class token, and the mean over patches follows its last LayerNorm (as in Google's -gap-norep)"
        raise ValueError(f"{source} does not fit: it has {what}; no ViT here computes that")
    check_blocks(own, state, source)

    encoder = getattr(model, "encoder", model)
    fitted, notes = fit_positions(own, state, encoder, source, said, grid)
    notes += fit_channels(own, fitted)
    head, initial = fit_heads(own, fitted, said["classes"], classes)
    notes += head
    fitted = {name: value for name, value in fitted.items() if name in own and name not in initial}
    for name, value in fitted.items():
        if value.shape != own[name].shape:
            given, wanted = tuple(value.shape), tuple(own[name].shape)
            raise ValueError(f"{source} does not fit: its {name} has the shape {given}, this model's {wanted}")
        if not value.to(own[name].dtype).isfinite().all():
            raise ValueError(f"{source} is of no use: its {name} holds NaN, infinite numbers or too large ones")

    loaded = {name.split(".")[0] for name in fitted}
    left = own.keys() - state.keys() - {"decoder_pos_embed"}  # without a file they are those of the formula
    for what, names in (("left at the initial value", left), ("not used", state.keys() - own.keys())):
        # A part by its name if nothing of it was loaded, else what is meant in it, for all blocks at once.
        parts = {
            re.sub(r"\.\d+\.", ".*.", name) if name.split(".")[0] in loaded else name.split(".")[0]
            for name in names - initial
        }
        if parts:
            notes.append(f"{what}: {', '.join(sorted(parts))}")
    model.load_state_dict({n: fitted.get(n.removeprefix("encoder."), v) for n, v in model.state_dict().items()})
    return notes


def check_blocks(own, state, source):
    """Raise ValueError unless all stacks of blocks are as deep in the file as here, and whole; decoders may be lacking.

    Of what a block has here the file may lack a bias, if all its blocks lack it: it stays zero, which is the same.
    """

    def stack_of(names, stack):  # number -> names in that block
        out = {}
        for number, _, part in (n.removeprefix(stack).partition(".") for n in names if n.startswith(stack)):
            out.setdefault(number, set()).add(part)
        return out

    stages = [f"{part}stages.{i}.blocks." for part in ("", "patch_embed.backbone.") for i in range(4)]
    for stack in ("blocks.", "decoder.blocks.", "loss_predictor.blocks.", *stages):
        here, there = stack_of(own, stack), stack_of(state, stack)
        if not here or (not there and stack.startswith(("decoder", "loss_predictor"))):
            continue
        part = stack.removesuffix("blocks.").replace(".", " ")
        if len(here) != len(there):
            raise ValueError(f"{source} does not fit: its {part}depth is {len(there)} blocks, this model's {len(here)}")
        if here.keys() != there.keys():
            raise ValueError(f"{source} does not fit: its {part}blocks are {show(there)}; number them from 0")
        somewhere = set.union(*there.values())
        for number, parts in here.items():
            for lacking in sorted(parts - there[number]):
                if lacking in somewhere or lacking.endswith(".weight"):
                    raise ValueError(f"{source} does not fit: its {stack}{number}.{lacking} is missing")


def fit_channels(own, fitted):
    """The first layer's filters for the model's channels, in place; and sentences on it. As timm does.

    For one channel they are summed; for more, those of 1 or 3 are repeated and scaled by old over new. So a grey image,
    as one channel or as three that are equal, gives the same as before.
    """
    for name in ("patch_embed.proj.weight", "patch_embed.backbone.stem.conv.weight", "stem.conv.weight"):
        if name in own and name in fitted:
            new, old = own[name].shape[1], fitted[name].shape[1]
            if old not in (1, 3) or new == old or new < 1:
                continue
            filters = fitted[name].double()
            if new == 1:
                fitted[name] = filters.sum(dim=1, keepdim=True).to(fitted[name].dtype)
                return [f"{name} summed over {old} channels, for 1"]
            filters = filters.repeat(1, math.ceil(new / old), 1, 1)[:, :new] * old / new
            fitted[name] = filters.to(fitted[name].dtype)
            return [f"{name} repeated from {old} to {new} channels, and scaled by {old}/{new}"]
    return []


def fit_heads(own, fitted, theirs, ours):
    """Last layers: sentences, and the names of tensors that stay as they are. A head is re-ordered in place.

    theirs, ours: the names of the classes in the file and here, or None.
    """
    notes, initial = [], set()
    for layer, what in (("head", "classes"), ("decoder.pred", "values a patch")):
        weight, names = f"{layer}.weight", {f"{layer}.weight", f"{layer}.bias"}
        if weight not in own or weight not in fitted:
            continue
        here, there = len(own[weight]), len(fitted[weight])
        reason = f"{here} {what} here, {there} in the file" if here != there else None
        if layer == "head" and not reason:
            if ("pre_logits.fc.weight" in own) != ("pre_logits.fc.weight" in fitted):
                reason = "the layer before it, pre_logits, is on one side alone"
            elif theirs and ours and theirs != list(ours):
                if sorted(theirs) != sorted(ours) or len(set(ours)) < len(ours):
                    reason = f"its classes are {show(ours)} here, {show(theirs)} in the file"
                else:
                    order = torch.tensor([theirs.index(name) for name in ours])
                    fitted |= {name: fitted[name][order] for name in names & fitted.keys()}
                    notes.append("head re-ordered: the file has the same classes in another order")
        if reason:
            notes.append(f"{layer} left at its initial value: {reason}")
            initial |= names
    return notes, initial


def fit_positions(own, state, encoder, source, said, grid):
    """A checkpoint's tensors by name, with positions for the model's grid; and sentences on what was done to them.

    own, state: the model's tensors and the file's; encoder: the model's ViT, which knows its grid; said: what the file
    says; grid: what is said of it by hand, which comes first.
    """
    fitted, notes, given = dict(state), [], grid or said["grid"]
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in own and name in state:
            prefix = int("cls_token" in state)
            fitted[name], note = fit_pos_embed(own[name], encoder.grid, state[name], prefix, source, said, given)
            notes += [note] if note and note not in notes else []
    for axis, name in enumerate(("row_pos_embed", "column_pos_embed")):  # (1, n, D/2), related/positions.py
        if name in own and name in state:
            old, new = state[name].shape[1], own[name].shape[1]
            if given and given[axis] != old:
                raise ValueError(f"{source} has {old} of {name}, its grid can't be {given[0]}x{given[1]}")
            if old != new:
                fitted[name] = (vit.interpolation_matrix(old, new) @ state[name].double().cpu()).to(own[name])
                notes.append(f"{name} interpolated from {old} to {new}")
    relative = {name for name in own.keys() & state.keys() if name.endswith(".relative.pos_embed")}
    if relative and all(state[name].shape == own[name].shape for name in relative):
        there = find_grid(math.prod(encoder.grid), encoder.grid, given, source)
        if there != tuple(encoder.grid):
            grids = "{}x{}, not those of {}x{}".format(*there, *encoder.grid)
            raise ValueError(f"{source} has relative positions of a grid of {grids}; use that of the file")
    return fitted, notes


def find_grid(N, here, given, source):
    """(rows, columns) that a file's N positions fill: as given; else a square, unless the model's own grid fits too."""
    side = math.isqrt(max(N, 0))
    if given and math.prod(given) != N:
        raise ValueError(f"{source} has positions for {N} patches, which do not fill a grid of {given[0]}x{given[1]}")
    if given:
        return tuple(given)
    if N < 1 or side**2 != N or (here[0] != here[1] and math.prod(here) == N):
        what = f"{source} has positions for {N} patches and does not say of which grid"
        raise ValueError(f"{what}; give --init-grid ROWSxCOLUMNS (grid= of load_weights), as {here[0]}x{here[1]}")
    return side, side


def fit_pos_embed(own, grid, pos_embed, num_prefix_tokens, source, said, given):
    """A checkpoint's positions for the grid and the prefix tokens of a model; and a sentence on it, or None.

    own (1, prefix here + N here, D), the model's, of grid = (rows, columns); pos_embed (1, prefix + N, D), the file's;
    said, given: as in `fit_positions`.
    Those that follow the sine-cosine formula are computed anew, others interpolated as the file's own code does it
    (`resize`). MAE's and HPM's code interpolates those of the formula, too, to fine-tune a model that learns positions.
    """
    N, D, (rows, columns) = pos_embed.shape[1] - num_prefix_tokens, pos_embed.shape[2], grid
    here, how, note = own.shape[1] - rows * columns, said["how"], None
    formula, fixed = formula_grid(pos_embed, num_prefix_tokens), formula_grid(own, here) == tuple(grid)
    if formula and given and formula != tuple(given):
        grids = "{}x{}, not of {}x{}".format(*formula, *given)
        raise ValueError(f"{source} has the sine-cosine positions of a grid of {grids}; leave the grid out")
    there = formula or find_grid(N, grid, given, source)
    if formula and there != tuple(grid):
        run = said["grid"] or "task" in (said["config"] or {})  # of this project
        if fixed or run:
            what = "sine-cosine positions computed for the {}x{} grid, in place of {}x{}".format(*grid, *there)
            return vit.sincos_pos_embed(D, grid, here), what
        how = "torch"
    if fixed and not formula:
        note = "positions are the file's, which do not follow the sine-cosine formula"
    if there != tuple(grid):
        pos_embed = resize(pos_embed, there, grid, num_prefix_tokens, how)
        note = "positions interpolated from {}x{} to {}x{}".format(*there, *grid)
    tokens = pos_embed[:, :num_prefix_tokens] if num_prefix_tokens else own[:, :1].to(pos_embed)
    return torch.cat([tokens[:, :here], pos_embed[:, num_prefix_tokens:]], dim=1), note


def resize(pos_embed, old, new, prefix, how):
    """`vit.resize_pos_embed` as the code that a file comes from does it.

    how  "google"  linear, both ends kept: scipy's zoom of order 1, in checkpoint.py of the ViT authors
         "torch"   torch's bicubic without antialias: util/pos_embed.py of MAE and HPM, Hugging Face
         "timm"    the same with antialias; so for DeiT and DINO, whose files are not told from timm's
    """
    if how != "torch":
        return vit.resize_pos_embed(pos_embed, old, new, prefix, original=how == "google")
    tokens, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
    image = patches.double().reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    image = F.interpolate(image, size=tuple(new), mode="bicubic", align_corners=False)
    return torch.cat([tokens, image.flatten(2).transpose(1, 2).to(pos_embed)], dim=1)


def formula_grid(pos_embed, num_prefix_tokens):
    """The grid whose sine-cosine positions (1, prefix + N, D) these are, up to their own precision; None for none."""
    N, D = pos_embed.shape[1] - num_prefix_tokens, pos_embed.shape[2]
    precision = 1e-5 if pos_embed.dtype in (torch.float32, torch.float64) else 1e-2

    def equal(some, formula):
        return torch.allclose(some.float().cpu(), formula, rtol=0, atol=precision)

    first = pos_embed[:, num_prefix_tokens : num_prefix_tokens + 1]
    if D % 4 or N < 1 or not equal(first, vit.sincos_pos_embed(D, (1, 1), 0)):
        return None  # the first patch is the same in all grids, so this spares most files the loop
    grids = [(n, N // n) for n in range(1, N + 1) if N % n == 0]
    return next((g for g in grids if equal(pos_embed, vit.sincos_pos_embed(D, g, num_prefix_tokens))), None)


# ---------------------------------------------------------------------------------------------
# Frozen
# ---------------------------------------------------------------------------------------------


def load_frozen(target, arch, img_size, source, in_chans=3):
    """The frozen ViT whose features are HPM's target "dino" or "clip", from its weights.

    DINO's have timm's names. CLIP's visual tower has its own, one more LayerNorm, no bias in E, the quick GELU and a
    projection at the end, which becomes our head. The model has the student's architecture, so that patches
    correspond; what was adapted or not used is printed. Raises ValueError, with both sizes, for weights of another
    patch size or width, and for those that lack a part.
    """
    state, said = clip_state(source) if target == "clip" else recognise(source, which="teacher")
    options = dict(num_classes=0)
    if target == "clip":
        options = dict(num_classes=len(state["head.weight"]), pre_norm=True, gelu="quick", eps=1e-5)
    frozen = vit.create(arch, img_size, in_chans=in_chans, **options)
    own = frozen.patch_embed.proj.weight
    for theirs in (value for name, value in state.items() if name.endswith("patch_embed.proj.weight")):
        for what, axis in (("width", 0), ("patch size", -1)):
            if theirs.ndim == own.ndim and theirs.shape[axis] != own.shape[axis]:
                raise ValueError(f"{source}: its {what} is {theirs.shape[axis]}, that of {arch} is {own.shape[axis]}")
    if lacking := [name for name in frozen.state_dict().keys() - state.keys() if not name.endswith("bias")]:
        raise ValueError(f"{source} does not fit: features need its {show(sorted(lacking))}, which is missing")
    for note in load_state(frozen, state, source, said):
        distributed.print0(f"{source}: {note}")
    return frozen.requires_grad_(False).eval()


def clip_state(source):
    """CLIP's visual tower under our names, in float32, and as `recognise` what is said of it.

    Raises ValueError for a file without one.
    """
    content, said = tensors(source, wanted=lambda state: any(name.startswith("visual.") for name in state))
    theirs = {name: value for name, value in content.items() if name.startswith("visual.")}
    for name, value in theirs.items():
        check_tensor(value, name, source)
    state = {rename(name, CLIP): value.float() for name, value in theirs.items()}
    dimensions = {"proj": 2, "cls_token": 1, "pos_embed": 2, "patch_embed.proj.weight": 4}
    if any(name not in state or state[name].ndim != n for name, n in dimensions.items()):
        raise ValueError(f"{source} holds no visual tower of CLIP: no visual.conv1.weight, visual.proj and so on in it")
    state["cls_token"], state["pos_embed"] = state["cls_token"][None, None], state["pos_embed"][None]
    state["head.weight"] = state.pop("proj").T  # y @ proj, in their code
    state["patch_embed.proj.bias"] = torch.zeros(state["cls_token"].shape[-1])
    state["head.bias"] = torch.zeros(len(state["head.weight"]))
    return state, said | dict(how="timm")


# ---------------------------------------------------------------------------------------------
# Write
# ---------------------------------------------------------------------------------------------


def hugging_face(state):
    """A ViT's weights under the names of transformers' ViTForImageClassification.

    Raises ValueError for a part that it does not have: without that it would be another function.
    """
    apart = {}
    for name, value in state.items():
        letters = "qkv" if ".attn.qkv." in name else [""]
        for letter, part in zip(letters, value.chunk(len(letters)), strict=True):
            apart[name.replace(".attn.qkv.", f".attn.{letter}.")] = part
    out = {rename(name, TO_HUGGING_FACE): value for name, value in apart.items()}
    if unknown := [name for name in out if not name.startswith(("vit.", "classifier."))]:
        raise ValueError(f"Hugging Face's ViT has no {show(unknown)}; write the layout timm")
    return out


def write(model, path, layout="timm", classes=None):
    """Write a model's weights as a .safetensors file; those of a `vit.ViT` timm loads as they are.

    layout   "timm"          our own names too: timm.models.load_checkpoint takes it, with global_pool="token" for
                             pool="cls" and "avg" for pool="mean"; its models have no "mlp" head any more
             "hugging-face"  for transformers' ViTForImageClassification with layer_norm_eps=1e-6 (see `eps`) and
                             hidden_act="gelu", or "gelu_pytorch_tanh" for gelu="tanh"
    classes  the names of the head's classes, in order

    They and the grid of the positions go into the file's metadata, as JSON: `metadata` gives them back.
    Raises ValueError, before anything is written, for a part that Hugging Face's model does not have, as the norm of
    pool="mean", and for another number of names than the head has outputs.
    """
    if layout not in ("timm", "hugging-face"):
        raise ValueError(f"unknown layout {layout!r}; there are timm and hugging-face")
    state, said = model.state_dict(), {"format": "pt"}
    if classes is not None:
        if "head.bias" not in state or len(classes) != len(state["head.bias"]):
            raise ValueError(f"{len(classes)} names of classes do not fit the model's head; give one for each output")
        said["classes"] = json.dumps(list(classes))
    if grid := getattr(getattr(model, "encoder", model), "grid", None):  # a ResNet has none
        said["grid"] = json.dumps(list(grid))
    state = hugging_face(state) if layout == "hugging-face" else state
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    copies = {n: v.detach().cpu().clone(memory_format=torch.contiguous_format) for n, v in state.items()}
    with files.whole(path) as part:
        safetensors.torch.save_file(copies, part, metadata=said)
