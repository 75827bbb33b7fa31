"""Weights from the checkpoint files that people publish, all under one set of names, into the models here.

A ViT is the same function in every code base; only the files differ. This module reads them, says what they hold in
the names of this project (timm's for the encoder, those of `hpm.Autoencoder` for the rest), and puts it into a model.

    layouts     whose names are they? timm, DeiT, DINO, MAE, HPM, Hugging Face, Google: tables of pairs
    files       torch, safetensors and NumPy files, told apart by their first bytes; nothing in them is run
    read        a file or URL, out of what a training script saved around the model, under our names
    load        into a model, whatever its image size; what did not fit is said
    frozen      DINO and CLIP, whose features are targets of HPM
    write       our weights as a file that timm or Hugging Face's transformers loads, too

What no file says: Google's models use the tanh GELU (`gelu="tanh"`), and Hugging Face's converted ones the
LayerNorm eps in their config.json, often 1e-12. Create the model with that for equal logits.
"""

import argparse
import hashlib
import math
import os
import re
import urllib.parse
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import vit
from engine import files

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

# Names that tell a layout, after any prefix; its names; its values. The first that is found counts. A model of another
# kind is one more row here, with a table of its own, and a line in KNOWN.
LAYOUTS = (
    (("encoder.patch_embed.proj.weight", "decoder_embed.weight"), OURS, ()),
    (("patch_embed.proj.weight",), TIMM, AVERAGED),
    (("vit.embeddings.patch_embeddings.projection.weight",), HUGGING_FACE, ()),
    (("embeddings.patch_embeddings.projection.weight",), HUGGING_FACE, ()),
    (("embedding/kernel", "Transformer/encoder_norm/scale"), GOOGLE, FLAX),
    (("stem.conv.weight", "stages.0.blocks.0.conv1.weight"), TIMM_RESNET, CONVOLUTION_AS_LINEAR),
    (("root_block/standardized_conv2d/kernel", "group_norm/gamma"), BIT, BIT_VALUES),
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

# What training scripts save a model under, the one to look for first standing first.
WRAPPERS = {
    "student": ("student", "model", "state_dict", "module", "teacher", "ema_state_dict"),
    "teacher": ("teacher", "ema_state_dict", "model", "state_dict", "module", "student"),
}

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
    """What a file holds, most often a dict of tensors. Raises whatever its damage leads to."""
    kind = file_format(path)
    if kind == "safetensors":
        return safetensors.torch.load_file(path)
    if kind == "numpy":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    # Training scripts save their options beside the weights: a Namespace, which only holds values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def explain(error):
    """One line out of an exception."""
    text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2] or type(error).__name__
    if found := re.match(r"Unsupported (?:global: GLOBAL|class) (\S+)", text):
        return f"it holds more than tensors, {found[1]}, and no code from a file is ever run"
    return text.split(". ")[0]


def cached(url):
    """The path of a copy of the file at a URL, in $VIT_CACHE, by default ~/.cache/vit-hpm; made once, used again.

    A name as vit-0123abcd.pth carries the start of the file's SHA-256 (torch.hub's convention): it is checked.
    Raises ValueError if that, or the network, fails, or if what comes is no file of weights.
    """
    name = urllib.parse.urlsplit(url).path.rpartition("/")[2][-100:]
    folder = Path(os.environ.get("VIT_CACHE") or "~/.cache/vit-hpm").expanduser()
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"  # many are called model.safetensors
    hexadecimal = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    checksum = f"sha256:{hexadecimal[1]}" if hexadecimal else None
    try:  # a page that says "please log in" must not stay in the cache
        return files.download(url, path, checksum, check=file_format)
    except (OSError, ValueError) as error:
        raise ValueError(f"can't download {url}: {explain(error)}; try again") from None


# ---------------------------------------------------------------------------------------------
# Read
# ---------------------------------------------------------------------------------------------


def tensors(source, which="student"):
    """What a file holds by name, out of its wrappers but under its own names: see `read`."""
    if which not in WRAPPERS:
        raise ValueError(f"unknown model {which!r}; there are student and teacher")
    url = str(source).startswith(("http://", "https://"))
    path = cached(str(source)) if url else Path(source)
    if not path.is_file():
        raise ValueError(f"no weights at {source}; check the path" + ", it is that of a folder" * path.is_dir())
    try:
        content = read_file(path)
    except Exception as error:  # whatever the libraries meet in a file that is no checkpoint, or half of one
        where = f" (kept in {path}: delete it to download it again)" * url
        raise ValueError(f"{source} can't be read as weights{where}: {explain(error)}") from None
    for _ in range(4):  # deep enough, and a dict may hold itself
        inner = [content[w] for w in WRAPPERS[which] if isinstance(content, dict) and isinstance(content.get(w), dict)]
        content = inner[0] if inner else content
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds no weights but a {type(content).__name__}; it has to be tensors by name")
    return {str(name): value for name, value in content.items()}


def find_layout(state, which):
    """The first layout whose names are all there behind some prefix: (prefix, names, values), prefix None for none.

    With several prefixes, as `student.` and `teacher.`, the one that `which` names; else the first.
    """
    for (anchor, *others), names, values in LAYOUTS:
        prefixes = [name.removesuffix(anchor) for name in state if name.endswith(anchor)]
        prefixes = [p for p in prefixes if p[-1:] in ("", ".", "/") and all(p + other in state for other in others)]
        if prefixes:
            return max(prefixes, key=lambda prefix: which in prefix.split(".")), names, values
    return None, (), ()


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
    state = tensors(source, which)
    prefix, names, values = find_layout(state, which)
    if prefix is None:
        raise ValueError(f"{source} holds no ViT or ResNet that is known here; its keys are {show(state)}")
    out, unknown = {}, []
    for key, value in state.items():
        if not key.startswith(prefix):
            continue  # a teacher beside its student, DINO's projection head beside its backbone
        theirs = key.removeprefix(prefix)
        name = rename(theirs, names)
        if name and not re.fullmatch(KNOWN, name):
            unknown.append(key)
        elif name:
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{source} does not fit: its {key} is no tensor but a {type(value).__name__}")
            try:
                out[name] = next((change(value) for pattern, change in values if re.search(pattern, theirs)), value)
            except (RuntimeError, IndexError):
                raise ValueError(f"{source} does not fit: its {key} has the shape {tuple(value.shape)}") from None
    if unknown:
        raise ValueError(f"{source} is a model of another kind: no ViT here has its {show(unknown)}")
    return join_qkv(out, source)


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
            if any(part is None or part.ndim == 0 or part.shape != value.shape for part in parts):
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


def load(model, source, which="student"):
    """Load a checkpoint, a file or a URL, into a ViT, a hybrid, a ResNet or an `hpm.Autoencoder`: see `read`.

    which: "student" or "teacher", where the file holds both. Another image size is no obstacle: learned positions are
    interpolated, sine-cosine ones computed for the model's own grid. A head for other classes is left at its
    initial value; so are decoders that the file lacks. Returns sentences that say what was adapted, left or not used.
    Raises ValueError, and changes nothing, if the file can't be read or does not fit.
    """
    return load_state(model, read(source, which), source)


def load_state(model, state, source):
    """`load` from tensors by name, as `read` gives them; `source` is what messages call them."""
    own = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    for name in own.keys() & state.keys():
        if getattr(state[name], "ndim", None) != own[name].ndim:
            raise ValueError(f"{source} does not fit: its {name} is not a tensor with {own[name].ndim} dimensions")
    if not own.keys() & state.keys():
        raise ValueError(f"{source} does not fit: it has nothing of this model, which starts with {next(iter(own))}")
    check_depths(own, state, source)

    fitted, notes = fit_positions(own, state, getattr(model, "encoder", model), source)
    initial = set()  # names of layers for another number of outputs, which stay as they are
    for layer, what in (("head", "classes"), ("decoder.pred", "values a patch")):
        sizes = [len(s[f"{layer}.weight"]) for s in (own, state) if f"{layer}.weight" in s]
        if len(set(sizes)) == 2:
            notes.append(f"{layer} left at its initial value: {sizes[0]} {what} here, {sizes[1]} in the file")
            initial |= {f"{layer}.weight", f"{layer}.bias"}
    fitted = {name: value for name, value in fitted.items() if name in own and name not in initial}
    for name, value in fitted.items():
        if value.shape != own[name].shape:
            given, wanted = tuple(value.shape), tuple(own[name].shape)
            raise ValueError(f"{source} does not fit: its {name} has the shape {given}, this model's {wanted}")

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


def check_depths(own, state, source):
    """Raise ValueError unless all stacks of blocks are as deep in the file as here; it may lack those of decoders."""
    stages = [f"{part}stages.{i}.blocks." for part in ("", "patch_embed.backbone.") for i in range(4)]
    for stack in ("blocks.", "decoder.blocks.", "loss_predictor.blocks.", *stages):
        here, there = (len({n[len(stack) :].split(".")[0] for n in s if n.startswith(stack)}) for s in (own, state))
        optional = stack.startswith(("decoder", "loss_predictor"))
        if here and here != there and (there or not optional):
            part = stack.removesuffix("blocks.").replace(".", " ")
            raise ValueError(f"{source} does not fit: its {part}depth is {there} blocks, this model's {here}")


def fit_positions(own, state, encoder, source):
    """A checkpoint's tensors by name, with positions for the model's grid; and sentences on what was done to them.

    own, state: the model's tensors and the file's; encoder: the model's ViT, which knows its grid.
    """
    fitted, notes = dict(state), []
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in own and name in state:
            num_prefix_tokens = int("cls_token" in state)
            fitted[name], note = fit_pos_embed(own[name], encoder.grid, state[name], num_prefix_tokens, source)
            notes += [note] if note and note not in notes else []
    for name in ("row_pos_embed", "column_pos_embed"):  # (1, n, D/2), related/positions.py
        if name in own and name in state and own[name].shape[1] != state[name].shape[1]:
            old, new = state[name].shape[1], own[name].shape[1]
            fitted[name] = (vit.interpolation_matrix(old, new) @ state[name].double().cpu()).to(own[name])
            notes.append(f"{name} interpolated from {old} to {new}")
    return fitted, notes


def fit_pos_embed(own, grid, pos_embed, num_prefix_tokens, source):
    """A checkpoint's positions for the grid and the prefix tokens of a model; and a sentence on it, or None.

    own (1, prefix here + N here, D), the model's, of grid = (rows, columns); pos_embed (1, prefix + N, D), the file's.
    Those that follow the sine-cosine formula are computed anew, others interpolated.
    """
    N, D, (rows, columns) = pos_embed.shape[1] - num_prefix_tokens, pos_embed.shape[2], grid
    here, side = own.shape[1] - rows * columns, math.isqrt(max(N, 0))
    if follow_formula(pos_embed, [(n, N // n) for n in range(1, N + 1) if N % n == 0], num_prefix_tokens):
        if here == num_prefix_tokens and follow_formula(pos_embed, [grid], num_prefix_tokens):
            return pos_embed, None
        return vit.sincos_pos_embed(D, grid, here), f"sine-cosine positions computed for the {rows}x{columns} grid"
    note = None
    if follow_formula(own, [grid], here):
        note = "positions are the file's, which do not follow the sine-cosine formula"
    if N != rows * columns:
        if N < 1 or side**2 != N:
            raise ValueError(
                f"{source} has positions for {N} patches, no square grid; use the image size that it was trained with"
            )
        pos_embed = vit.resize_pos_embed(pos_embed, (side, side), grid, num_prefix_tokens)
        note = f"positions interpolated from {side}x{side} to {rows}x{columns}"
    tokens = pos_embed[:, :num_prefix_tokens] if num_prefix_tokens else own[:, :1].to(pos_embed)
    return torch.cat([tokens[:, :here], pos_embed[:, num_prefix_tokens:]], dim=1), note


def follow_formula(pos_embed, grids, num_prefix_tokens):
    """Whether positions (1, prefix + N, D) are the sine-cosine ones of one of the grids, up to their own precision."""
    N, D = pos_embed.shape[1] - num_prefix_tokens, pos_embed.shape[2]
    precision = 1e-5 if pos_embed.dtype in (torch.float32, torch.float64) else 1e-2

    def equal(some, formula):
        return torch.allclose(some.float().cpu(), formula, rtol=0, atol=precision)

    first = pos_embed[:, num_prefix_tokens : num_prefix_tokens + 1]
    if D % 4 or N < 1 or not equal(first, vit.sincos_pos_embed(D, (1, 1), 0)):
        return False  # the first patch is the same in all grids, so this spares most files the loop
    return any(equal(pos_embed, vit.sincos_pos_embed(D, g, num_prefix_tokens)) for g in grids if math.prod(g) == N)


# ---------------------------------------------------------------------------------------------
# Frozen
# ---------------------------------------------------------------------------------------------


def load_frozen(target, arch, img_size, source, in_chans=3):
    """The frozen ViT whose features are HPM's target "dino" or "clip", from its weights.

    DINO's have timm's names. CLIP's visual tower has its own, one more LayerNorm, no bias in E, the quick GELU and a
    projection at the end, which becomes our head. The model has the student's architecture, so that patches
    correspond; raises ValueError, with both sizes, for weights of another patch size or width.
    """
    state = clip_state(source) if target == "clip" else read(source, which="teacher")
    options = dict(num_classes=0)
    if target == "clip":
        options = dict(num_classes=len(state["head.weight"]), pre_norm=True, gelu="quick", eps=1e-5)
    frozen = vit.create(arch, img_size, in_chans=in_chans, **options)
    own = frozen.patch_embed.proj.weight
    for theirs in (value for name, value in state.items() if name.endswith("patch_embed.proj.weight")):
        for what, axis in (("width", 0), ("patch size", -1)):
            if theirs.shape[axis] != own.shape[axis]:
                raise ValueError(f"{source}: its {what} is {theirs.shape[axis]}, that of {arch} is {own.shape[axis]}")
    load_state(frozen, state, source)
    return frozen.requires_grad_(False).eval()


def clip_state(source):
    """CLIP's visual tower under our names, in float32. Raises ValueError for a file without one."""
    state = {rename(n, CLIP): value.float() for n, value in tensors(source).items() if n.startswith("visual.")}
    if not {"proj", "cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
        raise ValueError(f"{source} holds no visual tower of CLIP: no visual.conv1.weight, visual.proj and so on in it")
    state["cls_token"], state["pos_embed"] = state["cls_token"][None, None], state["pos_embed"][None]
    state["head.weight"] = state.pop("proj").T  # y @ proj, in their code
    state["patch_embed.proj.bias"] = torch.zeros(state["cls_token"].shape[-1])
    state["head.bias"] = torch.zeros(len(state["head.weight"]))
    return state


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


def write(path, state, layout="timm"):
    """Write name -> tensor as a .safetensors file; of a `vit.ViT.state_dict()` timm loads it as it is.

    layout  "timm"          our own names too: timm.models.load_checkpoint takes it, with global_pool="token" for
                            pool="cls" and "avg" for pool="mean"; its models have no "mlp" head any more
            "hugging-face"  for transformers' ViTForImageClassification with layer_norm_eps=1e-6 (see `eps`) and
                            hidden_act="gelu", or "gelu_pytorch_tanh" for gelu="tanh"
    Raises ValueError, before anything is written, for a part that Hugging Face's model does not have, as the norm of
    pool="mean".
    """
    if layout not in ("timm", "hugging-face"):
        raise ValueError(f"unknown layout {layout!r}; there are timm and hugging-face")
    state = hugging_face(state) if layout == "hugging-face" else state
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    copies = {n: v.detach().cpu().clone(memory_format=torch.contiguous_format) for n, v in state.items()}
    with files.whole(path) as part:
        safetensors.torch.save_file(copies, part, metadata={"format": "pt"})
