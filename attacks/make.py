#!/usr/bin/env python3
"""Writes the files of this folder and README.md, which says what each is.

    python3 attacks/make.py

Plain Python alone: what is here has to be what a stranger could write, not what leank writes. Each file is
listed with words that the refusal must say; files without words are sound, and what the others were made of.
"""

import hashlib
import io
import json
import pathlib
import shutil
import struct
import zipfile
import zlib

HERE = pathlib.Path(__file__).parent
ROWS = []


def put(name, what, words, content):
    """A file; or, where the content is a dictionary, a folder of them."""
    path = HERE / name
    parts = content if isinstance(content, dict) else {"": content}
    for part, data in parts.items():
        file = path / part if part else path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    ROWS.append((name, what, words))


def u32(n):
    return struct.pack("<I", n)


def u64(n):
    return struct.pack("<Q", n % (1 << 64))


def replaced(data, old, new):
    assert data.count(old) >= 1, old
    return data.replace(old, new, 1)


# Masks as safetensors.


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return u64(len(text) if length is None else length) + text + data


def mask_header(shape=(1, 1, 4), offsets=(0, 4), meta='{"version": 1}', dtype="U8", **more):
    mask = {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
    return {"__metadata__": {"leank": meta}, "mask": mask, **more}


def native():
    data = bytes([1, 0, 1, 1])

    def mask(name, what, words, header, data=data, length=None):
        put(f"mask_native/{name}.safetensors", what, words, safetensors(header, data, length))

    mask("sound", "a mask of one head", [], mask_header())
    mask("length-2-63", "a header of 2⁶³ bytes", ["header"], b"{}", b"", 1 << 63)
    mask("length-minus-1", "a header of 2⁶⁴ − 1 bytes", ["header"], b"{}", b"", -1)
    mask("length-100-mb", "a header of 100 MB in 10 bytes", ["header"], b"{}", b"", 100 << 20)
    mask("header-nested", "a header of 5000 open brackets", ["recursion limit"], b'{"a":' + b"[" * 5000, b"")
    mask("header-not-json", "a header that is cut within its JSON", ["JSON"], b'{"mask":{"dtype":', b"")
    mask("header-not-utf8", "a header that is no UTF-8", ["UTF-8"], b'{"\xff\xfe":1}', b"")
    mask("shape-2-63", "an axis of 2⁶³", ["overflow"], mask_header((1, 1, 1 << 63)))
    mask("shape-minus-1", "an axis of −1", ["header"], mask_header((1, 1, -1)))
    mask("shape-wraps", "2³² in each axis: the product wraps to 0", ["overflow"], mask_header((1 << 32,) * 3))
    mask("shape-many-heads", "2²⁸ heads in no bytes", ["shape"], mask_header((1 << 14, 1 << 14, 1)))
    mask("shape-zero", "an axis of 0", ["0"], mask_header((1, 0, 4), (0, 0)), b"")
    mask("shape-two-axes", "a mask of two axes", ["three axes"], mask_header((1, 4)))
    mask("offsets-beyond", "a tensor that ends at 2⁶⁴ − 1", ["offset"], mask_header(offsets=(0, (1 << 64) - 1)))
    mask("offsets-backwards", "a tensor that ends before it begins", ["offset"], mask_header(offsets=(4, 0)))
    mask("offsets-hole", "a hole before the tensor", ["offset"], mask_header(offsets=(1, 5)), bytes(5))
    other = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    mask("offsets-overlap", "two tensors in the same bytes", ["offset"], mask_header(other=other))
    mask("data-behind", "bytes behind the last tensor", ["not fully covered"], mask_header(), data + bytes(64))
    put("mask_native/tensor-twice.safetensors", "a tensor that is described twice", ["twice"], twice(safetensors(mask_header(), data), "mask"))
    mask("value-2", "a flag of 2", ["neither 0 nor 1"], mask_header(), bytes([1, 0, 2, 1]))
    mask("no-metadata", "no metadata", ["metadata key"], {"mask": mask_header()["mask"]})
    mask("metadata-nested", "metadata of 5000 open brackets", ["invalid type"], mask_header(meta="[" * 5000))
    mask("version-0", "format version 0", ["version 0"], mask_header(meta='{"version": 0}'))
    mask("version-2-63", "format version 2⁶³", ["version 9223372036854775808"], mask_header(meta='{"version": %d}' % (1 << 63)))
    for name, field, words in [
        ("alignment-0", '"alignment": 0', ["alignment"]),
        ("alignment-2-63", '"alignment": 9223372036854775808', ["alignment"]),
        ("exempt-2-63", '"exempt_layers": [9223372036854775808]', ["layer"]),
        ("exempt-twice", '"exempt_layers": [0, 0]', ["ascending"]),
        ("kl-1e999", '"predicted_kl": 1e999', ["out of range"]),
        ("kl-negative", '"predicted_kl": -1.0', ["predicted KL"]),
        ("fingerprint-2-63", '"fingerprint": {"architecture": "a", "config_hash": "0", "rope_base": 1.0, "shape": '
         '{"layers": 9223372036854775808, "query_heads": 1, "kv_heads": 1, "head_dim": 4}}', ["layers"]),
    ]:
        mask(name, f"metadata that say `{field[:40]}`", words, mask_header(meta='{"version": 1, %s}' % field))
    scores = {"dtype": "F32", "shape": [1, 1, 4], "data_offsets": [4, 20]}
    mask("scores-nan", "a score that is NaN", ["scores"], mask_header(scores=scores), data + struct.pack("<4f", 0, 1, float("nan"), 2))
    bits = {"dtype": "U8", "shape": [1, 1, 2], "data_offsets": [4, 6]}
    mask("bits-3", "a head in 3 bits", ["3 bits"], mask_header(meta='{"version": 2}', bits=bits), data + bytes([16, 3]))
    put("mask_native/zip.safetensors", "a zip archive under this name", ["torch.save"], torch_zip([("a/data.pkl", b"N.")]))
    put("mask_native/empty.safetensors", "nothing", ["empty"], b"")


# Masks as torch.save writes them.


def torch_zip(entries, change=None):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content, *how in entries:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.compress_type = how[0] if how else zipfile.ZIP_STORED
            info.external_attr = (how[1] if len(how) > 1 else 0o644) << 16
            archive.writestr(info, content)
    return change(out.getvalue()) if change else out.getvalue()


def text(words):
    data = words.encode()
    return b"X" + u32(len(data)) + data


def number(n):
    return b"\x8a\x08" + struct.pack("<q", n)


def pickle(shape=(1, 1, 4), strides=(4, 4, 1), offset=0, elements=4, key="0", kind="FloatStorage"):
    sizes = b"".join(b"(" + b"".join(map(number, axes)) + b"t" for axes in (shape, strides))
    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(elements)
    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + number(offset)
    return head + sizes + b"\x89ccollections\nOrderedDict\n)RtR."


DATA = struct.pack("<4f", 1, 0, 1, 1)


def torch(script=None, data=DATA, **more):
    return torch_zip([("a/data.pkl", script or pickle(**more)), ("a/data/0", data), ("a/version", b"3\n")])


def overlapping():
    """Many entries of the directory that all mean the same bytes."""
    kernel = torch_zip([("a/data.pkl", bytes(1000))])
    start = kernel.index(b"PK\x01\x02")
    end = kernel.index(b"PK\x05\x06")
    local, entry = kernel[:start], kernel[start:end]
    directory = b"".join(replaced(entry, b"a/data.pkl", b"a/data.pk" + bytes([65 + n])) for n in range(20)) + entry
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 21, 21, len(directory), start, 0)
    return local + directory + tail


def pth():
    def mask(name, what, words, content):
        put(f"mask_pth/{name}.pth", what, words, content)

    mask("sound", "a mask of one head", [], torch())
    bomb = [("a/data.pkl", bytes(10 << 20), zipfile.ZIP_DEFLATED), ("a/data/0", DATA)]
    mask("zip-bomb", "10 MB of zeros, compressed to 10 kB, where the pickle is", ["compressed"], torch_zip(bomb))
    bomb = [("a/data.pkl", pickle()), ("a/data/0", bytes(10 << 20), zipfile.ZIP_DEFLATED)]
    mask("zip-bomb-data", "the same where the elements are", ["compressed"], torch_zip(bomb))
    mask("zip-overlap", "21 entries that share the same bytes", ["zip"], overlapping())
    many = torch_zip([(f"a/{n}", b"") for n in range(200)])
    mask("zip-many", "200 entries", ["200 entries"], many)
    whole = torch()
    end = whole.index(b"PK\x05\x06")
    mask("zip-65535", "a directory that claims 65535 entries", ["65535 entries"], whole[: end + 8] + b"\xff\xff\xff\xff" + whole[end + 12 :])
    mask("zip-two-ends", "two ends: programs disagree about what is in it", ["damaged"], whole + whole[end:])
    record = b"PK\x06\x06" + u64(44) + bytes(12) + u64(1 << 40) * 2 + u64(1 << 62) * 2
    locator = b"PK\x06\x07" + bytes(4) + u64(end) + u32(1)
    mask("zip-zip64", "a zip64 directory of 2⁴⁰ entries at 2⁶²", ["entries"], whole[:end] + record + locator + whole[end:])
    start = whole.index(b"PK\x01\x02")
    mask("zip-size-2-32", "an entry of 2³² − 1 bytes", ["zip"], whole[: start + 20] + b"\xff" * 8 + whole[start + 28 :])
    mask("zip-encrypted", "an entry that says it is encrypted", ["zip"], whole[: start + 8] + b"\x01" + whole[start + 9 :])
    mask("zip-checksum", "elements that are not those of the checksum", ["checksum"], replaced(whole, DATA, struct.pack("<4f", 1, 1, 1, 1)))
    for name, place in [("parent", "../../a/"), ("root", "/tmp/a/"), ("drive", "C:\\a\\")]:
        mask(f"zip-path-{name}", f"entries whose names lead to `{place}`", ["data.pkl"], torch_zip([(place + "data.pkl", pickle()), (place + "data/0", DATA)]))
    link = [("a/data.pkl", b"/etc/passwd", zipfile.ZIP_STORED, 0o120777), ("a/data/0", DATA)]
    mask("zip-symlink", "an entry that is a symbolic link", ["pickle"], torch_zip(link))
    mask("zip-no-pickle", "no pickle", ["data.pkl"], torch_zip([("a/data/0", DATA)]))
    mask("zip-two-pickles", "two pickles", ["data.pkl"], torch_zip([("a/data.pkl", pickle()), ("b/data.pkl", pickle())]))
    call = text("touch /tmp/leank-was-here")
    for name, what, script in [
        ("system", "calls `os.system` by REDUCE", b"\x80\x02cos\nsystem\n" + call + b"\x85R."),
        ("posix", "calls `posix.system` by REDUCE", b"\x80\x02cposix\nsystem\n" + call + b"\x85R."),
        ("eval", "calls `builtins.eval`", b"\x80\x02cbuiltins\neval\n" + text("__import__('os')") + b"\x85R."),
        ("inst", "calls by INST", b"(" + b"S'true'\nios\nsystem\n."),
        ("obj", "calls by OBJ", b"\x80\x02(cos\nsystem\n" + call + b"o."),
        ("newobj", "makes `subprocess.Popen` by NEWOBJ", b"\x80\x02csubprocess\nPopen\n" + call + b"\x85\x81."),
        ("newobj-ex", "the same by NEWOBJ_EX", b"\x80\x04csubprocess\nPopen\n" + call + b"\x85}\x92."),
        ("stack-global", "names `os.system` by STACK_GLOBAL", b"\x80\x04\x8c\x02os\x8c\x06system\x93" + call + b"\x85R."),
        ("getattr", "reaches `os.system` by `getattr`", b"\x80\x02cbuiltins\ngetattr\ncos\n__dict__\n" + text("system") + b"\x86R."),
        ("build", "sets state of the tensor by BUILD", pickle()[:-1] + b"}" + text("__class__") + text("x") + b"sb."),
        ("extension", "names a function by its number", b"\x80\x02\x82\x01)R."),
        ("persistent", "asks for another object by PERSID", b"Ppath/to/it\n."),
        ("torch-load", "calls `torch.load` on another file", b"\x80\x02ctorch\nload\n" + text("/etc/passwd") + b"\x85R."),
        ("torch-hub", "calls `torch.hub.load`", b"\x80\x02ctorch.hub\nload\n" + text("a/b") + b"\x85R."),
    ]:
        mask(f"pickle-{name}", f"a pickle that {what}", ["pickle"], torch(script))
    for name, what, script, words in [
        ("nested", "5000 nested tuples", b"\x80\x02" + b")" + b"\x85" * 5000 + b".", ["no tensor"]),
        ("long-2-31", "an integer of 2³¹ − 1 bytes", b"\x80\x02\x8b\xff\xff\xff\x7f.", ["pickle"]),
        ("text-2-63", "a text of 2⁶³ bytes", b"\x80\x04\x8d" + u64(1 << 63) + b".", ["pickle"]),
        ("memo-2-32", "the memo's place 2³² − 1", b"\x80\x02Nr\xff\xff\xff\xff.", ["memo"]),
        ("frame-2-63", "a frame of 2⁶³ bytes", b"\x80\x04\x95" + u64(1 << 63) + b"N.", ["pickle"]),
        ("laughs", "each tuple twice in the next, forty times", b"\x80\x02)" + b"2\x86" * 40 + b".", ["opcode"]),
        ("no-end", "no STOP", pickle()[:-1], ["pickle"]),
        ("pops", "more POPs than there is", b"\x80\x0200.", ["pickle"]),
        ("long", "20 kB of NOPs", b"\x80\x02" + b"N0" * 10000 + pickle()[2:], ["20"]),
    ]:
        mask(f"pickle-{name}", f"a pickle with {what}" if name != "laughs" else f"a pickle that holds {what}", words, torch(script))
    for name, what, words, fields in [
        ("shape-2-63", "an axis of 2⁶³ − 1", ["shape"], {"shape": (1, 1, (1 << 63) - 1)}),
        ("shape-wraps", "axes whose product wraps", ["shape"], {"shape": (1 << 32, 1 << 32, 4)}),
        ("shape-negative", "an axis of −1", ["negative"], {"shape": (1, 1, -1)}),
        ("stride-0", "a tensor expanded from one element", ["elements"], {"shape": (64, 64, 64), "strides": (0, 0, 0)}),
        ("stride-2-62", "a stride of 2⁶²", ["beyond"], {"strides": (4, 4, 1 << 62)}),
        ("stride-negative", "a stride of −1", ["negative"], {"strides": (4, 4, -1)}),
        ("offset-2-62", "a tensor that begins at 2⁶²", ["beyond"], {"offset": 1 << 62}),
        ("elements-2-62", "a storage of 2⁶² elements", ["elements"], {"elements": 1 << 62}),
        ("key-path", "a storage called `../../etc/passwd`", ["storage"], {"key": "../../etc/passwd"}),
        ("kind-object", "a storage of objects", ["pickle"], {"kind": "UntypedStorage"}),
    ]:
        mask(f"tensor-{name}", what, words, torch(**fields))
    mask("legacy", "the format of PyTorch before 1.6, whose magic number is a pickle", ["before PyTorch 1.6"], b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + pickle())


# Masks as NumPy writes them.


def npy(header, data=b"", version=(1, 0), length=None):
    text = header.encode() + b"\n"
    size = len(text) if length is None else length
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version[0] == 1 else "<I", size) + text + data


def numpy():
    def mask(name, what, words, content):
        put(f"mask_npy/{name}.npy", what, words, content)

    def fields(descr="'|b1'", shape="(1, 1, 4)", order="False"):
        return "{'descr': %s, 'fortran_order': %s, 'shape': %s, }" % (descr, order, shape)

    data = bytes([1, 0, 1, 1])
    mask("sound", "a mask of one head", [], npy(fields(), data))
    mask("shape-2-63", "an axis of 2⁶³", ["header"], npy(fields(shape=f"(1, 1, {1 << 63})"), data))
    mask("shape-wraps", "2³² in each axis", ["header"], npy(fields(shape=f"({1 << 32}, {1 << 32}, {1 << 32})"), data))
    mask("shape-negative", "an axis of −1", ["header"], npy(fields(shape="(1, 1, -1)"), data))
    mask("shape-nested", "a tuple in 500 tuples", ["header"], npy(fields(shape="(" * 500 + ")" * 500), data))
    mask("shape-none", "no axis", ["three axes"], npy(fields(shape="()"), data[:1]))
    mask("header-4-gb", "a header of 4 GB", ["header"], npy(fields(), data, (2, 0), (1 << 32) - 1))
    mask("header-8-kb", "a header of 8 kB of spaces", ["header"], npy(fields() + " " * 8000, data))
    mask("header-code", "a header that is a call", ["header"], npy("__import__('os').system('touch /tmp/leank-was-here')", data))
    mask("version-9", "format version 9", ["version"], npy(fields(), data, (9, 0)))
    mask("objects", "Python objects, which NumPy reads by a pickle", ["O"], npy(fields("'|O'"), b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R."))
    mask("records", "records", ["records"], npy(fields("[('a', '<f4')]"), data))
    mask("item-2-63", "elements of 2⁶³ bytes", ["invalid size"], npy(fields("'<f9223372036854775808'"), data))
    mask("value-nan", "NaN", ["neither 0 nor 1"], npy(fields("'<f4'"), struct.pack("<4f", 1, 0, float("nan"), 1)))
    mask("data-behind", "bytes behind the elements", ["bytes"], npy(fields(), data + bytes(64)))


# Tables of scaling factors, of 1 layer, 1 KV head and head_dim 4.


def tsv():
    def table(name, what, words, content):
        put(f"mask_tsv/{name}.tsv", what, words, content)

    table("sound", "a table of one head", [], b"0.1\t0.9\t0.5\t1\n")
    table("nan", "NaN", ["column 3"], b"0.1 0.9 nan 1\n")
    table("infinite", "infinity", ["column 3"], b"0.1 0.9 inf 1\n")
    table("1e999", "a number beyond all of f32", ["column 3"], b"0.1 0.9 1e999 1\n")
    table("digits", "a number of 2000 digits", ["column 1"], b"1" * 2000 + b" 0 0 0\n")
    table("long", "a thousand factors", ["line 1"], b"0.5 " * 1000)
    table("short", "three factors", ["3"], b"1 1 1\n")
    table("not-utf8", "bytes that are no text", ["tsv"], b"0.1 \xff\xfe 0 0\n")
    table("nul", "a NUL", ["tsv"], b"0.1 0\x00 0 0\n")
    table("comments", "comments alone", ["0"], b"# 1 1 1 1\n\n")


# Models as GGUF.

KINDS = {"u32": 4, "f32": 6, "bool": 7, "text": 8, "u64": 10}


def gguf_text(words):
    data = words if isinstance(words, bytes) else words.encode()
    return u64(len(data)) + data


def gguf_value(value):
    """The type and the bytes of a metadata value; bytes are given as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return u32(7) + bytes([value])
    if isinstance(value, int):
        return u32(4) + u32(value) if value < 1 << 32 else u32(10) + u64(value)
    if isinstance(value, float):
        return u32(6) + struct.pack("<f", value)
    if isinstance(value, str):
        return u32(8) + gguf_text(value)
    kind = {str: 8, float: 6, int: 4, bytes: 8}[type(value[0])] if value else 8
    pack = {8: gguf_text, 6: lambda x: struct.pack("<f", x), 4: u32}[kind]
    return u32(9) + u32(kind) + u64(len(value)) + b"".join(map(pack, value))


class Noise:
    def __init__(self):
        self.state = 1

    def bytes(self, elements, kind):
        numbers = []
        for _ in range(elements):
            self.state = (self.state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
            numbers.append(((self.state >> 40) / (1 << 23) - 1) / 2)
        if kind == 0:
            return struct.pack(f"<{elements}f", *numbers)
        # Q8_0: 32 codes behind an f16 scale.
        blocks = [numbers[at : at + 32] for at in range(0, elements, 32)]
        return b"".join(struct.pack("<e32b", 1 / 128, *(round(x * 127) for x in block)) for block in blocks)


class Model:
    """A model of one layer as a GGUF file, to be changed before it is written."""

    def __init__(self, family="llama", hidden=8, kind=0, tokens=None):
        heads, kv, self.dim = 2, 1, hidden // 2
        bytewise = family != "llama"
        if tokens is None:
            tokens = [chr(ord("a") + n) for n in range(12)] if bytewise else ["<unk>", "<s>", "</s>", "▁", *"abcdef", "▁a", "ab"]
        vocab, mlp = len(tokens), hidden
        self.meta = {
            "general.architecture": family,
            f"{family}.block_count": 1,
            f"{family}.context_length": 64,
            f"{family}.embedding_length": hidden,
            f"{family}.feed_forward_length": mlp,
            f"{family}.attention.head_count": heads,
            f"{family}.attention.head_count_kv": kv,
            f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{family}.rope.freq_base": 10000.0,
            "tokenizer.ggml.model": "gpt2" if bytewise else "llama",
            "tokenizer.ggml.tokens": tokens,
        }
        if bytewise:
            self.meta |= {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": ["a b"]}
            tokens[11] = "ab"
        else:
            types = [2, 3, 3] + [1] * (vocab - 3)
            self.meta |= {
                "tokenizer.ggml.scores": [-float(n) for n in range(vocab)],
                "tokenizer.ggml.token_type": types,
                "tokenizer.ggml.unknown_token_id": 0,
                "tokenizer.ggml.bos_token_id": 1,
                "tokenizer.ggml.eos_token_id": 2,
            }
        if family == "gemma3":
            self.meta |= {"gemma3.attention.key_length": self.dim, "gemma3.attention.sliding_window": 4, "gemma3.attention.sliding_window_pattern": 1}
        dim = self.dim
        parts = {
            "token_embd.weight": [vocab, hidden],
            "output_norm.weight": [hidden],
            "blk.0.attn_norm.weight": [hidden],
            "blk.0.attn_q.weight": [heads * dim, hidden],
            "blk.0.attn_k.weight": [kv * dim, hidden],
            "blk.0.attn_v.weight": [kv * dim, hidden],
            "blk.0.attn_output.weight": [hidden, heads * dim],
            "blk.0.ffn_norm.weight": [hidden],
            "blk.0.ffn_gate.weight": [mlp, hidden],
            "blk.0.ffn_up.weight": [mlp, hidden],
            "blk.0.ffn_down.weight": [hidden, mlp],
        }
        if family == "qwen2":
            parts |= {f"blk.0.attn_{part}.bias": [n * dim] for part, n in [("q", heads), ("k", kv), ("v", kv)]}
        if family == "gemma3":
            parts |= {f"blk.0.{part}.weight": [hidden] for part in ["post_attention_norm", "post_ffw_norm"]}
            parts |= {f"blk.0.attn_{part}_norm.weight": [dim] for part in "qk"}
        noise = Noise()
        # Name, axes with the rows first, type, bytes.
        self.tensors = []
        for name, dims in parts.items():
            own = kind if len(dims) == 2 and dims[1] % 32 == 0 else 0
            elements = dims[0] * (dims[1] if len(dims) == 2 else 1)
            self.tensors.append([name, dims, own, noise.bytes(elements, own)])

    def bytes(self, counts=None, offsets=None, version=3, magic=b"GGUF"):
        """`counts`: of tensors and of metadata, other than they are; `offsets` of tensors by name."""
        tensors, values = counts or (len(self.tensors), len(self.meta))
        out = magic + u32(version) + u64(tensors) + u64(values)
        for key, value in self.meta.items():
            out += gguf_text(key) + gguf_value(value)
        at, data = 0, b""
        for name, dims, kind, own in self.tensors:
            offset = (offsets or {}).get(name, at)
            out += gguf_text(name) + u32(len(dims)) + b"".join(u64(n) for n in reversed(dims)) + u32(kind) + u64(offset)
            data += own + bytes(-len(own) % 32)
            at = len(data)
        return out + bytes(-len(out) % 32) + data


def gguf():
    def file(name, what, words, content):
        put(f"gguf/{name}.gguf", what, words, content)

    file("sound-llama", "a llama, with SentencePiece's tokens", [], Model().bytes())
    file("sound-qwen2", "a qwen2, with tokens of bytes", [], Model("qwen2").bytes())
    file("sound-gemma3", "a gemma3", [], Model("gemma3").bytes())
    file("sound-q8", "a llama in 8 bits", [], Model(hidden=32, kind=8).bytes())
    model = Model()
    whole = model.bytes()
    file("empty", "nothing", ["empty"], b"")
    file("big-endian", "a header in the other byte order", ["version"], model.bytes(version=3 << 24))
    file("version-1", "version 1", ["version 1"], model.bytes(version=1))
    file("tensors-2-63", "2⁶³ tensors", ["announces 9223372036854775808 tensors"], model.bytes((1 << 63, len(model.meta))))
    file("values-2-63", "2⁶³ metadata entries", ["announces 9223372036854775808 metadata"], model.bytes((11, 1 << 63)))
    file("values-1000", "a thousand metadata entries, of which few are there", ["gguf"], model.bytes((11, 25)))

    def changed(name, what, words, key, value):
        other = Model("gemma3" if key.startswith("gemma3") else "llama")
        other.meta[key] = value
        file(name, what, words, other.bytes())

    changed("text-2-63", "a text of 2⁶³ bytes", ["bytes of text"], "general.name", u32(8) + u64(1 << 63))
    changed("array-2-63", "an array of 2⁶³ elements", ["array elements"], "x", u32(9) + u32(4) + u64(1 << 63))
    changed("array-of-nothing", "an array of an unknown type", ["type of metadata"], "x", u32(9) + u32(77) + u64(1) + u64(0))
    changed("array-nested", "an array in 500 arrays", ["too deep"], "x", u32(9) + (u32(9) + u64(1)) * 500 + u32(4) + u64(0))
    changed("value-type", "a value of an unknown type", ["type of metadata"], "x", u32(99))
    changed("alignment-0", "an alignment of 0", ["general.alignment"], "general.alignment", 0)
    changed("alignment-2-63", "an alignment of 2⁶³", ["general.alignment"], "general.alignment", 1 << 63)
    changed("alignment-text", "an alignment that is a text", ["general.alignment"], "general.alignment", "32")
    for key, value, words in [
        ("block_count", 0, ["layers"]),
        ("block_count", 1 << 31, ["layers"]),
        ("block_count", 1 << 63, ["layers"]),
        ("block_count", 200, ["blk.1.attn"]),
        ("block_count", 12000, ["layers"]),
        ("attention.head_count", 0, ["query heads"]),
        ("attention.head_count", 1 << 63, ["query heads"]),
        ("attention.head_count_kv", 0, ["KV heads"]),
        ("attention.head_count_kv", 3, ["KV heads"]),
        ("attention.key_length", 3, ["head_dim"]),
        ("attention.key_length", 1 << 63, ["head_dim"]),
        ("embedding_length", 1 << 63, ["head_dim"]),
        ("embedding_length", 0, ["gguf"]),
        ("feed_forward_length", 1 << 63, ["intermediate size"]),
        ("context_length", 1 << 63, ["context length"]),
        ("context_length", 0, ["context length"]),
        ("rope.freq_base", float("nan"), ["RoPE base"]),
        ("rope.freq_base", -1.0, ["RoPE base"]),
        ("attention.layer_norm_rms_epsilon", float("inf"), ["RMS norm epsilon"]),
        ("block_count", "one", ["block_count"]),
    ]:
        shown = {0: "0", 1 << 31: "2-31", 1 << 63: "2-63"}.get(value, str(value)) if not isinstance(value, float) else str(value)
        name = key.split(".")[-1].replace("_", "-") + "-" + shown
        changed(name, f"`{key}` of {shown.replace('2-31', '2³¹').replace('2-63', '2⁶³')}", words, f"llama.{key}", value)
    changed("pattern-0", "sliding layers in a pattern of 0", ["at least 1"], "gemma3.attention.sliding_window_pattern", 0)
    changed("window-0", "a sliding window of 0", ["sliding window"], "gemma3.attention.sliding_window", 0)
    tokens = model.meta["tokenizer.ggml.tokens"]
    changed("tokens-more", "more tokens than rows of the embedding", ["tokens of the tokenizer"], "tokenizer.ggml.tokens", tokens + ["x"])
    changed("tokens-long", "a token of 5000 letters, of which every pair of parts is tried", ["5000 bytes"], "tokenizer.ggml.tokens", tokens[:-1] + ["a" * 5000])
    # Of each token every pair of parts is a merge.
    merging = Model(tokens=[*tokens, *("a" * n for n in range(2, 900))])
    file("tokens-merges", "898 tokens that 403 000 merges make, of 300 MB", ["merges of the tokenizer"], merging.bytes())
    changed("tokens-numbers", "tokens that are numbers", ["array of texts"], "tokenizer.ggml.tokens", [1] * 12)
    changed("scores-few", "fewer scores than tokens", ["scores"], "tokenizer.ggml.scores", [0.0])
    changed("types-negative", "types of tokens below zero", ["token_type"], "tokenizer.ggml.token_type", u32(9) + u32(5) + u64(12) + b"\xff" * 48)
    changed("bos-2-63", "BOS is token 2⁶³", ["bos_token_id"], "tokenizer.ggml.bos_token_id", 1 << 63)
    changed("bos-beyond", "BOS is token 4000000000 of 12", ["4000000000"], "tokenizer.ggml.bos_token_id", 4000000000)
    changed("unknown-tokenizer", "a tokenizer that nobody knows", ["tokenizer"], "tokenizer.ggml.model", "../../x")
    third = "is not of two tokens to a third"
    for name, what, merges, words in [
        ("one", "a merge of one token", ["ab"], "tokenizer"),
        ("missing", "a merge of tokens that there are not", ["x y"], f'"x y" {third}'),
        ("empty", "a merge of nothing", [" "], "tokenizer"),
        ("no-third", "a merge of two tokens to one that there is not", ["c d"], f'"c d" {third}'),
        ("longer", "a merge to what is longer than any token", ["ab a"], f'"ab a" {third}'),
        ("second", "a good merge, and one to what is longer than any token", ["a b", "ab c"], f'"ab c" {third}'),
    ]:
        other = Model("qwen2")
        other.meta["tokenizer.ggml.merges"] = merges
        file(f"merge-{name}", what, [words], other.bytes())

    def tensor(name, what, words, change, **more):
        other = Model(**more)
        change(other)
        file(name, what, words, other.bytes())

    def at(name):
        return next(n for n, own in enumerate(model.tensors) if own[0] == name)

    gate, up = at("blk.0.ffn_gate.weight"), at("blk.0.ffn_up.weight")

    def dims(n, dims):
        return lambda other: other.tensors[n].__setitem__(1, dims)

    tensor("rank-0", "a tensor without axes", ["0 dimensions"], dims(gate, []))
    tensor("rank-2000", "a tensor of 2000 axes", ["2000 dimensions"], dims(gate, [1] * 2000))
    tensor("dim-2-63", "an axis of 2⁶³", ["impossible shape"], dims(gate, [1 << 63, 8]))
    tensor("dims-wrap", "axes whose product wraps to 0", ["impossible shape"], dims(gate, [1 << 32, 1 << 32]))
    tensor("dim-0", "an axis of 0", ["shape"], dims(gate, [0, 8]))
    tensor("vocabulary-0", "an embedding without rows", ["gguf"], dims(0, [0, 8]))
    tensor("kind-999", "a tensor of type 999", ["999"], lambda other: other.tensors[gate].__setitem__(2, 999))
    tensor("kind-blocks", "rows that are no whole blocks", ["impossible shape"], lambda other: other.tensors[gate].__setitem__(2, 8))
    tensor("tensor-missing", "a tensor less", ["is missing"], lambda other: other.tensors.pop(gate))
    tensor("tensor-foreign", "a tensor that no llama has", ["blk.0.other"], lambda other: other.tensors.append(["blk.0.other.weight", [8], 0, bytes(32)]))
    tensor("tensor-twice", "a tensor twice", ["twice"], lambda other: other.tensors.append(list(other.tensors[gate])))
    twice = gguf_text("llama.block_count") + gguf_value(1)
    header = 4 + 4 + 8
    file("key-twice", "a key twice: programs disagree which counts", ["twice"], whole[:header] + u64(len(model.meta) + 1) + twice + whole[header + 8 :])
    name = model.tensors[gate][0]
    offset = sum(len(own[3]) for own in model.tensors[:gate])
    file("offset-2-63", "a tensor at 2⁶³", ["ends at"], model.bytes(offsets={name: 1 << 63}))
    file("offset-wraps", "a tensor at −32: the sum wraps into the header", ["beyond any file"], model.bytes(offsets={name: -32}))
    file("offset-overlap", "two tensors in the same bytes", ["overlap"], model.bytes(offsets={model.tensors[up][0]: offset}))
    file("offset-all", "all tensors in the same bytes", ["overlap"], model.bytes(offsets={own[0]: 0 for own in model.tensors}))
    file("names-broken", "names that are no UTF-8", ["missing"], replaced(whole, b"token_embd.weight", b"\xff\xfe\xfd\xfc\xfb_embd.weight"))
    file("zip", "a zip archive under this name", ["GGUF"], torch())


def twice(data, name):
    """A safetensors file with a tensor that is described twice."""
    size = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + size]
    again = json.dumps({name: json.loads(header)[name]}).encode()
    return safetensors(header[:-1] + b", " + again[1:], data[8 + size :])


# Models as folders.


def folder_config(**changes):
    config = {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 8,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    }
    return json.dumps(config | changes).encode()


def folder_weights(change=None, more=()):
    noise, header, data = Noise(), {}, b""
    layer = "model.layers.0."
    for name, dims in [
        ("model.embed_tokens", [8, 8]), ("model.norm", [8]), (layer + "input_layernorm", [8]),
        (layer + "post_attention_layernorm", [8]), (layer + "self_attn.q_proj", [8, 8]),
        (layer + "self_attn.k_proj", [4, 8]), (layer + "self_attn.v_proj", [4, 8]), (layer + "self_attn.o_proj", [8, 8]),
        (layer + "mlp.gate_proj", [8, 8]), (layer + "mlp.up_proj", [8, 8]), (layer + "mlp.down_proj", [8, 8]),
        *((name, [8]) for name in more),
    ]:
        own = noise.bytes(dims[0] * (dims[1] if len(dims) == 2 else 1), 0)
        header[name + ".weight"] = {"dtype": "F32", "shape": dims, "data_offsets": [len(data), len(data) + len(own)]}
        data += own
    if change:
        change(header)
    return safetensors(header, data)


def models():
    vocab = {letter: n for n, letter in enumerate("abcdefgh")}
    tokenizer = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}}).encode()

    def model(name, what, words, **files):
        parts = {"config.json": folder_config(), "tokenizer.json": tokenizer, "model.safetensors": folder_weights()}
        parts |= {key.replace("__", "."): value for key, value in files.items()}
        put(f"models/{name}", what, words, {key: value for key, value in parts.items() if value is not None})

    model("sound", "a llama", [])
    huge = 1 << 63
    for key, value, words in [
        ("num_hidden_layers", huge, ["layers"]), ("num_hidden_layers", 1 << 20, ["layers"]),
        ("num_hidden_layers", 12000, ["layers"]),
        ("hidden_size", huge, ["hidden size"]), ("vocab_size", huge, ["vocabulary"]), ("head_dim", huge, ["head_dim"]),
        ("max_position_embeddings", huge, ["context length"]), ("num_attention_heads", 0, ["query heads"]),
        ("num_key_value_heads", -1, ["config.json"]), ("rope_scaling", {"rope_type": "linear", "factor": 0.0}, ["RoPE scaling"]),
        ("rope_theta", -1.0, ["RoPE base"]), ("layer_types", ["full_attention"] * 3, ["layer_types"]),
    ]:
        shown = {huge: "2-63", 1 << 20: "2-20", 12000: "12000", 0: "0"}.get(value, "wrong") if isinstance(value, int) else "wrong"
        model(f"{key.replace('_', '-')}-{shown}", f"`config.json` with `{key}` of {json.dumps(value)[:40]}", words, config__json=folder_config(**{key: value}))
    model("config-nested", "`config.json` of 5000 open brackets", ["config.json", "recursion limit"], config__json=b"[" * 5000)
    model("config-not-utf8", "`config.json` that is no text", ["config.json"], config__json=b'{"model_type": "\xff"}')
    model("tokenizer-nested", "`tokenizer.json` of 5000 open brackets", ["tokenizer.json"], tokenizer__json=b'{"a":' + b"[" * 5000)
    model("tokenizer-merges", "merges of tokens that there are not", ["tokenizer.json"], tokenizer__json=tokenizer.replace(b"[]", b'[["x", "y"]]'))
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    steps = {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "/////wAA"}]}
    padding = {"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 5}
    model_json = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}
    for name, what, words, fields in [
        ("merge-longer", "a merge to what is longer than any token", ['"a b" is not of two tokens'], {"model": model_json}),
        ("ids", "two tokens of one id", ['"c" and "d" are both token 2'], {"model": model_json | {"vocab": vocab | {"d": 2}, "merges": []}}),
        ("prefix", "a prefix of tokens within words that is longer than they", ['"a b" is not of two tokens'], {"model": model_json | {"continuing_subword_prefix": "##longer"}}),
        ("template", "a token before every text that it does not list", ["post-processor"], {"post_processor": template | {"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]}}),
        ("template-pair", "the second of two texts around one", ["post-processor"], {"post_processor": template | {"single": [{"Sequence": {"id": "B", "type_id": 0}}]}}),
        ("pieces-0", "pieces of no length", ["no length"], {"pre_tokenizer": {"type": "FixedLength", "length": 0}}),
        ("steps", "steps that double a text forty times", ["1024 times as long"], {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}}),
        ("decoder", "a decoder that makes a text 5⁴⁰ times as long", ["1024 times as long"], {"decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}] * 40}}),
        ("words", "words of 2⁶⁰ letters, every part of which is tried", ["words of"], {"model": {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 1 << 60, "vocab": vocab}}),
        ("token-long", "a token of 5000 letters, tried at every place", ["5000 bytes"], {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 5000, 0.0]]}}),
        ("spaces", "an added token of a space, which takes all spaces behind it along", ["begins with a space"], {"added_tokens": [{"id": 8, "content": " ", "single_word": False, "lstrip": False, "rstrip": True, "normalized": False, "special": False}]}),
        ("charsmap", "a map of characters that says it has 4 GB", ["precompiled_charsmap"], {"normalizer": steps}),
        ("padding-2-40", "padding of each text to 2⁴⁰ tokens, which is not done", [], {"padding": padding}),
        ("truncation", "truncation with a stride that is longer than what is left, which is not done", [], {"truncation": truncation}),
    ]:
        model(f"tokenizer-{name}", what, words, tokenizer__json=json.dumps(json.loads(tokenizer) | fields).encode())
    index = b'{"weight_map": {"a": "%s"}}'
    gone = {"model__safetensors": None}
    model("index-parent", "an index that names a file outside", ["not a file of the folder"], model__safetensors__index__json=index % b"../sound/model.safetensors", **gone)
    model("index-root", "an index that names `/dev/zero`", ["not a file of the folder"], model__safetensors__index__json=index % b"/dev/zero", **gone)
    model("index-dots", "an index that names `..`", ["not a file of the folder"], model__safetensors__index__json=index % b"..", **gone)
    model("index-nested", "an index of 5000 open brackets", ["index.json"], model__safetensors__index__json=b"[" * 5000, **gone)
    name = "model.layers.0.mlp.up_proj.weight"

    def changed(key, value):
        return folder_weights(lambda header: header[name].__setitem__(key, value))

    model("weights-overlap", "two tensors in the same bytes", ["model.safetensors"], model__safetensors=changed("data_offsets", [0, 256]))
    model("weights-2-63", "an axis of 2⁶³", ["model.safetensors"], model__safetensors=changed("shape", [huge, 8]))
    model("weights-shape", "another shape of the same bytes", ["up_proj"], model__safetensors=changed("shape", [64]))
    model("weights-twice", "a tensor that is described twice", ["twice"], model__safetensors=twice(folder_weights(), name))
    twin = folder_weights(more=["language_model.model.norm"])
    model("weights-renamed", "two tensors of one name, but for the place that it has in a model of images", ["another tensor"], model__safetensors=twin)
    shards = {"one__safetensors": folder_weights(), "two__safetensors": folder_weights(), **gone}
    both = b'{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    model("shards-twice", "two shards with the same tensors", ["another tensor"], model__safetensors__index__json=both, **shards)
    model("weights-length-2-63", "a header of 2⁶³ bytes", ["model.safetensors"], model__safetensors=safetensors(b"{}", b"", huge))


# Dumps.


def dump_parts(manifest_change=None, layer_change=None, data_change=None, sums=True, layer_number="0", length=None, raw=None):
    shape = {"layers": 1, "query_heads": 2, "kv_heads": 1, "head_dim": 4}
    manifest = {
        "version": 1, "model_id": "m", "shape": shape, "dtype": "f32", "probe": "random",
        "fingerprint": {"architecture": "m", "shape": dict(shape), "rope_base": 1e4, "config_hash": "0"},
        "draws": 1, "positions": 2, "seed": 0,
        "sequences": [{"prefix": 3, "valid": [0, 1], "source": "noise"}],
    }
    if manifest_change:
        manifest_change(manifest)
    text = raw if raw is not None else json.dumps(manifest).encode()
    noise, header, data, crcs = Noise(), {}, b"", ""
    for name, dims in [("q.0", [2, 2, 4]), ("g.0", [1, 2, 2, 4]), ("k.0", [1, 5, 4]), ("v.0", [1, 5, 4])]:
        elements = 1
        for n in dims:
            elements *= n
        own = noise.bytes(elements, 0)
        crcs += f"{zlib.crc32(own):08x}"
        header[name] = {"dtype": "F32", "shape": dims, "data_offsets": [len(data), len(data) + len(own)]}
        data += own
    meta = {"leank.layer": layer_number, "leank.dump": hashlib.sha256(text).hexdigest()}
    if sums:
        meta["leank.sums"] = crcs
    header = {"__metadata__": meta, **header}
    if layer_change:
        layer_change(header)
    if data_change:
        data = data_change(data)
    return {"manifest.json": text, "layer-000.safetensors": safetensors(header, data, length)}


def dumps():
    def dump(name, what, words, **how):
        put(f"dumps/{name}", what, words, dump_parts(**how))

    def field(*path, value):
        def change(manifest):
            for key in path[:-1]:
                manifest = manifest[key]
            manifest[path[-1]] = value

        return change

    def both(key, value):
        return lambda manifest: (manifest["shape"].__setitem__(key, value), manifest["fingerprint"]["shape"].__setitem__(key, value))

    huge = 1 << 63
    dump("sound", "a dump of one sequence", [])
    dump("sound-no-sums", "the same without checksums", [], sums=False)
    for key in ["layers", "query_heads", "kv_heads", "head_dim"]:
        dump(f"shape-{key.replace('_', '-')}-2-63", f"`{key}` of 2⁶³", ["manifest.json"], manifest_change=both(key, huge))
    dump("layers-1000", "a thousand layers, of which one is there", ["layer-"], manifest_change=both("layers", 1000))
    dump("kv-heads-0", "no KV head", ["manifest.json"], manifest_change=both("kv_heads", 0))
    for name, path, value in [
        ("draws-2-63", ("draws",), huge), ("draws-0", ("draws",), 0), ("positions-2-63", ("positions",), huge),
        ("positions-0", ("positions",), 0), ("version-2-63", ("version",), huge), ("dtype", ("dtype",), "f64"),
        ("prefix-2-63", ("sequences", 0, "prefix"), huge), ("valid-beyond", ("sequences", 0, "valid"), [0, 4294967295]),
        ("valid-backwards", ("sequences", 0, "valid"), [1, 0]), ("sequences-none", ("sequences",), []),
    ]:
        dump(name, f"a manifest with `{path[-1]}` of {json.dumps(value)}", ["manifest.json"], manifest_change=field(*path, value=value))
    dump("prefix-2-24", "a prefix of 16 million tokens, of which three are there", ["layer-000"], manifest_change=field("sequences", 0, "prefix", value=1 << 24))
    dump("manifest-nested", "a manifest of 5000 open brackets", ["manifest.json", "invalid type"], raw=b"[" * 5000)
    dump("manifest-not-utf8", "a manifest that is no text", ["manifest.json"], raw=b'{"version": 1, "model_id": "\xff"}')
    dump("manifest-twice", "a manifest that says its draws twice", ["manifest.json", "duplicate"], raw=json.dumps(json.loads(dump_parts()["manifest.json"])).encode().replace(b'"draws": 1', b'"draws": 1, "draws": 2'))

    def tensor(name, key, value):
        return lambda header: header[name].__setitem__(key, value)

    layer = ["layer-000.safetensors"]
    dump("offsets-overlap", "k and v in the same bytes", layer, layer_change=lambda header: header.__setitem__("v.0", header["k.0"]))
    dump("offsets-beyond", "a tensor that ends at 2⁶⁴ − 1", layer, layer_change=tensor("k.0", "data_offsets", [128, (1 << 64) - 1]))
    dump("offsets-backwards", "a tensor that ends before it begins", layer, layer_change=tensor("k.0", "data_offsets", [208, 128]))
    dump("shape-2-63", "a tensor with an axis of 2⁶³", layer, layer_change=tensor("k.0", "shape", [1, huge, 4]))
    dump("shape-other", "another shape of the same bytes", layer + ["k.0"], layer_change=tensor("k.0", "shape", [5, 1, 4]))
    dump("dtype-other", "another type of the same bytes", layer, layer_change=tensor("k.0", "dtype", "I32"))
    parts = dump_parts()
    parts["layer-000.safetensors"] = twice(parts["layer-000.safetensors"], "k.0")
    put("dumps/tensor-twice", "a tensor that is described twice", layer + ["twice"], parts)
    dump("length-2-63", "a header of 2⁶³ bytes", layer, length=huge)
    dump("length-minus-1", "a header of 2⁶⁴ − 1 bytes", layer, length=-1)
    dump("data-behind", "bytes behind the last tensor", layer, data_change=lambda data: data + bytes(64))
    dump("data-short", "a tensor that is cut off", layer, data_change=lambda data: data[:-4])
    dump("layer-other", "the file of another layer", layer + ["elsewhere"], layer_number="7")
    dump("layer-2-63", "the file of layer 2⁶³", layer + ["elsewhere"], layer_number=str(huge))
    dump("manifest-other", "a file of another dump", layer + ["elsewhere"], layer_change=lambda header: header["__metadata__"].__setitem__("leank.dump", "0" * 64))
    dump("sums-few", "fewer checksums than parts", layer + ["checksums"], layer_change=lambda header: header["__metadata__"].__setitem__("leank.sums", "00000000"))
    dump("sums-not-hex", "checksums that are no numbers", layer + ["checksums"], layer_change=lambda header: header["__metadata__"].__setitem__("leank.sums", "+1234567" * 4))
    flip = lambda data: data[:140] + bytes([data[140] ^ 1]) + data[141:]
    dump("data-flipped", "a bit of a key that flipped", layer + ["damaged at bytes"], data_change=flip)
    nan = lambda data: data[:140] + struct.pack("<f", float("nan")) + data[144:]
    dump("data-nan", "a key that is NaN, without checksums", layer + ["NaN"], data_change=nan, sums=False)


# Records of learning: of a dump that is not here, so each is refused as another's at the latest.


def records():
    def record(name, what, words, content):
        put(f"record/{name}.json", what, words, content)

    def whole(**changes):
        head = {"order": [0, 1, 2, 3], "counts": [0, 4], "losses": [1.0, 0.0], "scores": []}
        return json.dumps({"version": 1, "dump": "0" * 64, "layer": 0, "heads": [head]} | changes).encode()

    def summed(body, crc=None):
        behind = b'",' + body[1:]
        return b'{"sum":"' + f"{zlib.crc32(behind) if crc is None else crc:08x}".encode() + behind

    record("other-dump", "a record of another dump", ["its dump is"], summed(whole()))
    record("sum-wrong", "a checksum that is not its own", ["checksum is"], summed(whole(), 0xDEADBEEF))
    record("sum-moved", "a checksum that does not stand in the front", ["not in its front"], whole(sum="00000000"))
    record("nested", "5000 open brackets", ["EOF"], b'{"version":1,"dump":' + b"[" * 5000)
    record("version-2-63", "version 2⁶³", ["expected u32"], whole(version=1 << 63))
    record("layer-2-63", "layer 2⁶³", ["its "], whole(layer=1 << 63))
    record("losses-1e999", "a loss of 1e999", ["out of range"], whole().replace(b"1.0", b"1e999"))
    record("unknown-field", "a field that nobody knows", ["unknown field"], whole(extra=1))
    record("not-utf8", "bytes that are no text", ["layer-000.json"], b'{"version":1,"dump":"\xff"}')
    record("empty", "nothing", ["EOF"], b"")


# Sequences saved from a cache of 1 layer, 1 KV head, head_dim 4 with all channels kept, f16.


def saved(tokens=0, packed=1, shape=(1, 1, 1, 4), block=64, formats=(1, 1, 1), mask=b"\x0f", windows=(32, 128), model=b"", version=1, length=None, crc=None, behind=b""):
    fields = b"".join(map(u32, (*shape, block))) + b"".join(map(u64, (*windows, tokens, packed)))
    fields += bytes(formats) + mask + u32(len(model)) + model
    start = b"LEANKSEQ" + u32(version) + u32(len(fields) if length is None else length) + fields
    return start + u32(zlib.crc32(start) if crc is None else crc) + behind


def sequences():
    huge = 1 << 63

    def sequence(name, what, words, **how):
        put(f"saved_sequence/{name}.bin", what, words, saved(**how))

    sequence("sound", "a sequence without tokens", [])
    sequence("tokens-2-63", "2⁶³ tokens, with a good checksum", ["cannot be"], tokens=huge)
    sequence("tokens-2-30", "2³⁰ tokens, of which none is there", ["saved sequence"], tokens=1 << 30)
    sequence("packed-2-63", "lean blocks up to 2⁶³", ["cannot be"], packed=huge)
    sequence("length-2-32", "a header of 2³² − 1 bytes", ["header claims"], length=(1 << 32) - 1)
    sequence("length-16-mb", "a header of 16 MB that is not there", ["header"], length=16 << 20)
    sequence("length-0", "a header of no bytes", ["header"], length=0)
    sequence("shape-2-32", "2³² − 1 layers", ["shape"], shape=((1 << 32) - 1, 1, 1, 4))
    sequence("block-0", "blocks of no tokens", ["block size"], block=0)
    sequence("format-99", "an unknown format", ["unknown format"], formats=(1, 99, 1))
    sequence("model-5000", "a model's description of 5000 bytes", ["description of 5000 bytes"], model=b"m" * 5000)
    sequence("mask-other", "another mask", ["mask"], mask=b"\x05")
    sequence("version-0", "version 0", ["version 0"], version=0)
    sequence("version-2-32", "version 2³² − 1", ["version 4294967295"], version=(1 << 32) - 1)
    sequence("checksum", "a checksum that is not its own", ["checksum"], crc=0)


# Evaluations, as `leank report --eval` reads them, and texts.


def rest():
    for name, what, words, content in [
        ("nested", "5000 open brackets", ["invalid type"], b"[" * 5000),
        ("not-a-list", "a number beyond all", ["out of range"], b"1e999"),
        ("not-utf8", "bytes that are no text", ["--eval"], b'[{"mask": "\xff"}]'),
    ]:
        put(f"evaluation/{name}.json", what, words, content)
    for name, what, words, content in [
        ("latin-1", "text that is no UTF-8", ["UTF-8"], "café ".encode("latin-1") * 100),
        ("utf-16", "text in UTF-16", ["UTF-8"], ("words " * 100).encode("utf-16")),
        ("surrogate", "half a surrogate pair, as UTF-8 must not have it", ["UTF-8"], b"a \xed\xa0\x80 b " * 100),
        ("blank", "spaces alone", ["empty"], b" \n\t" * 100),
    ]:
        put(f"text/{name}.txt", what, words, content)


README = """# Attack files

What a stranger could hand to leank: files that lie about sizes, share bytes, ask for gigabytes, run code where
somebody unpickles them. Each is refused with one message that names the file and says the words in the last
column; no code of theirs runs, nothing is left behind, and no more than 1 GiB of memory is asked for. Files without
words are sound, or what is bad in them is not done: the others were made of them.

`python3 attacks/make.py` writes the files and this table. `leank/tests/command/attacks.rs` reads the table and hands
each file to the library and to every command that takes such a file; it also cuts every sound file at each byte, and puts
loops, pipes, folders and `/dev/zero` in the place of files. The fuzzer begins with the files of the folders that are
called like a target ([fuzz](../fuzz/README.md)).

"""


def main():
    for old in HERE.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    for kind in [native, pth, numpy, tsv, gguf, models, dumps, records, sequences, rest]:
        kind()
    table = "| file | is | must say |\n|---|---|---|\n"
    for name, what, words in ROWS:
        table += f"| `{name}` | {what} | {', '.join(f'`{word}`' for word in words)} |\n"
    (HERE / "README.md").write_text(README + table)


if __name__ == "__main__":
    main()
