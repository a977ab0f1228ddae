#!/usr/bin/env python3
"""Writes tokenizer.bin: texts and the token ids that llama.cpp gives them.

Usage: make_tokenizer.py MODEL.gguf OUT   (needs llama-cpp-python, gguf, libzstd)
MODEL is the default model. Other pre-tokenizers are tried over the same vocabulary, by writing
vocabulary-only copies of the file with another tokenizer.ggml.pre. Same seed, same texts.

The default vocabulary merges no digits, so a small vocabulary made here, with digits, line ends,
contractions and user-defined tokens, shows where words are cut; its GGUF file is part of the output.

The file is one zstd frame of
  "IBTK", u32 version 2, varint n_texts, then per text: varint bytes, the bytes;
  varint bytes, a vocabulary-only GGUF file (vocabulary 1; vocabulary 0 is the default model's);
  varint n_runs, then per run: u8 vocabulary, varint bytes, name of the pre-tokenizer, u8 parse_special,
  varint n (the first n texts), then per text: varint n_ids, per id a varint;
  varint n_end, then the ids that end generation in vocabulary 0, each a varint.
Varints are little-endian base 128."""
import ctypes
import os
import random
import struct
import sys
import tempfile

import llama_cpp
from gguf import GGUFReader, GGUFWriter

SEED = 20261121
N_RANDOM = 10400
# The run over the default pre-tokenizer takes all texts; the others the first so many.
N_OTHER = 2600

FIXED = [
    "", " ", "  ", "   ", "\n", "\r\n", "\r\n\r\n", "\t", "\t\t x", " \n \n x", "a", " a", "  a", "a ",
    "Hello, world!", "It's they're we've I'm you'll he'd IT'S THEY'RE", "'s't're've'm'll'd", "'S'T'RE",
    "x's 's  's", "''s", "'", "' s", "don’t", "1", "12", "123", "1234", "12345678", "3.14159", "1,000,000",
    " 1 22 333 4444", "a1b2c3", "٣٤٥ ४५६ ⅷ ½ ²", "12 34  56   78", "0x1F 1e-9 192.168.0.1",
    "int main(void) {\n\treturn 0;\n}\n", "#include <stdio.h>\r\n", "for (i = 0; i < n; ++i) a[i] += b[i]->c;",
    "<|im_start|>user\nHi<|im_end|>\n", "<|endoftext|>", "<|im_start|", "<|im_start|><|im_start|>", "<|im_end|> x",
    "<user>a <user><user>", "x  <tag>y<tag>", "e.g. this, e.g.that",
    "<repo_name>x<file_sep>", "<|eot_id|>", "<empty_output>  <filename>", "a<|im_end|>b<|im_end|>c",
    "日本語のテキスト", "中文，没有空格。", "한국어 문장", "Привет, мир!", "مرحبا بالعالم", "שלום", "नमस्ते दुनिया", "ไทย",
    "e\u0301 n\u0303 a\u030a", "\u200b\u200c\u200d\ufeff", "👩‍👩‍👧‍👦 🇩🇪 👍🏽", "\u00a0x\u3000y\u2003z\u2028\u2029", "\u0085x",
    "a\u0000b", "\u0001\u0002\u007f", "ſ 's 'ſ K Å", "…—–“”‘’", "$+<=>^~|`", "a$b+c<d=e>f^g~h|i`j", "!!!???...", "__init__",
    "\x1c\x1d\x1e\x1f", "\x0b\x0c", "x\x0by", "\U0002ebf0\U0002ee5d", "\U0001f600" * 9, "\U000e0001\U0010ffff",
    "http://example.org/a?b=c&d=%20#e", "name@example.org", "C++ C# F# .NET", "“It’s”", "naïve café Ångström",
]
SCRIPTS = [
    (0x20, 0x7E), (0xA0, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F),
    (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F), (0x2070, 0x20CF), (0x2100, 0x218F), (0x2190, 0x23FF),
    (0x2460, 0x24FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xFB00, 0xFFFD),
    (0x10000, 0x1FFFF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2FFFF), (0x30000, 0x3FFFF),
    (0x40000, 0xDFFFF), (0xE0000, 0xEFFFF), (0xF0000, 0x10FFFF),
]
WORDS = ("the of and storage keys values memory river question answer light window paper stone seven language model "
         "quickly under because 2024 17 0.5 isn't we've O'Neil state-of-the-art e.g. U.S. TCP/IP fooBar snake_case "
         "HTTPServer xyzzy Straße fiancée größer ÉCOLE чтение город 学习 东京 テスト 서울 كتاب").split()
SPACES = [" ", "  ", "   ", "\n", "\r\n", "\t", "\n\n", " \n", "\n ", "\u00a0", "\u3000", " \t ", "        "]
MARKS = list(".,;:!?\"'()[]{}<>/\\|@#$%^&*-_=+~`") + ["...", "--", "->", "::", "'s", "'LL", "”", "—", "。", "🙂"]


def character(rng):
    low, high = rng.choice(SCRIPTS)
    while True:
        c = rng.randint(low, high)
        if not 0xD800 <= c <= 0xDFFF:
            return chr(c)


def piece(rng):
    kind = rng.randrange(9)
    if kind < 3:
        return rng.choice(WORDS)
    if kind == 3:
        return rng.choice(SPACES)
    if kind == 4:
        return rng.choice(MARKS)
    if kind == 5:
        return str(rng.randrange(10 ** rng.randint(1, 9)))
    if kind == 6:
        return "".join(character(rng) for _ in range(rng.randint(1, 3)))
    if kind == 7:
        return rng.choice(" \n\t.a1é中") * rng.randint(1, 30)
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyzABCDEFGH '0159") for _ in range(rng.randint(1, 8)))


def texts():
    rng = random.Random(SEED)
    out = list(FIXED)
    for c in "a \n.1'é中🙂=\t":
        out += [c * 47, c * 48, c * 49, c * 50, "x" + c * 200, c * 1500 + "y"]
    for _ in range(N_RANDOM):
        parts = rng.randint(1, 9)
        join = " " if rng.random() < 0.4 else ""
        out.append(join.join(piece(rng) for _ in range(parts)))
    for _ in range(400):  # long words of random letters: the heap's case
        out.append("".join(rng.choice("etaoinshrdlu") for _ in range(rng.randint(49, 120))))
    return out


def with_pre(model, pre, path):
    """A copy of the model's metadata only, under another pre-tokenizer name."""
    raw = open(model, "rb").read(16 << 20)
    tensors = GGUFReader(model).tensors
    end = tensors[0].field.offset if tensors else len(raw)
    head = bytearray(raw[:end])
    struct.pack_into("<Q", head, 8, 0)
    key = b"tokenizer.ggml.pre"
    at = head.index(struct.pack("<Q", len(key)) + key) + 8 + len(key) + 4
    (n,) = struct.unpack_from("<Q", head, at)
    head[at : at + 8 + n] = struct.pack("<Q", len(pre)) + pre.encode()
    with open(path, "wb") as f:
        f.write(head + bytes(-len(head) % 32))


def byte_texts():
    """Per byte, the character that stands for it in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def small_vocabulary(path):
    chars = byte_texts()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<user>", "  <tag>", "e.g."] + [chars[b] for b in range(256)]
    types = [3, 3, 3, 4, 4, 4] + [1] * 256
    merges = []

    def merge(left, right):
        left, right = ("".join(chars[b] for b in x) for x in (left, right))
        merges.append(left + " " + right)
        if left + right not in tokens:
            tokens.append(left + right)
            types.append(1)

    for line in ("' s|' S|' r|'r e|' R|'R E|' l|'l l|t h|th e|  t|   |    |\n \n|\r \n|\n  |. \n|) \n|! !|!! !|. .|( a|\t x|= =|"
                 "a +|$ a|  '|  (|a b").replace("|   |", "|\x00|").split("|"):
        if line == "\x00":
            merge(b" ", b" ")
            continue
        # The last blank parts left from right, unless the right side is itself a blank.
        left, right = (line[:-2], line[-1]) if len(line) > 2 else (line[0], line[1])
        merge(left.encode(), right.encode())
    for a in range(10):
        for b in range(10):
            merge(b"%d" % a, b"%d" % b)
    for a in range(0, 100, 3):
        for b in range(10):
            merge(b"%02d" % a, b"%d" % b)
    for b in range(10):
        merge(b" ", b"%d" % b)
    merge("½".encode()[:1], "½".encode()[1:])
    merge("½".encode(), "½".encode()[:1])
    w = GGUFWriter(path, "llama")
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges(merges)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_add_bos_token(False)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()


def varint(n):
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def zstd(data):
    lib = ctypes.CDLL("libzstd.so.1")
    lib.ZSTD_compressBound.restype = lib.ZSTD_compress.restype = ctypes.c_size_t
    lib.ZSTD_compressBound.argtypes = [ctypes.c_size_t]
    lib.ZSTD_compress.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
    room = lib.ZSTD_compressBound(len(data))
    out = ctypes.create_string_buffer(room)
    n = lib.ZSTD_compress(out, room, data, len(data), 19)
    return out.raw[:n]


def run(path, pre, special, texts, out):
    llama = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    total = 0
    for t in texts:
        ids = llama.tokenize(t, add_bos=False, special=bool(special)) if t else []
        total += len(ids)
        out.append(varint(len(ids)) + b"".join(map(varint, ids)))
    print(f"{pre}: parse_special {special}, {len(texts)} texts, {total} tokens")
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    return [i for i in range(llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]


def main():
    model, target = sys.argv[1:]
    all_texts = [t.encode() for t in texts()]
    out = [b"IBTK", struct.pack("<I", 2), varint(len(all_texts))]
    for t in all_texts:
        out += [varint(len(t)), t]
    with tempfile.TemporaryDirectory() as folder:
        small = os.path.join(folder, "small.gguf")
        small_vocabulary(small)
        data = open(small, "rb").read()
        out += [varint(len(data)), data]
        runs = [(0, "smollm", 0, len(all_texts)), (0, "smollm", 1, N_OTHER)]
        runs += [(0, p, 0, N_OTHER) for p in ("gpt-2", "default", "llama-bpe", "qwen2")]
        runs += [(1, p, 0, N_OTHER) for p in ("smollm", "gpt-2", "default", "llama-bpe", "qwen2")]
        runs += [(1, "llama-bpe", 1, 300)]
        out.append(varint(len(runs)))
        ends = None
        for vocabulary, pre, special, n in runs:
            path = os.path.join(folder, "vocab.gguf")
            with_pre(small if vocabulary else model, pre, path)
            out += [bytes([vocabulary]), varint(len(pre)), pre.encode(), bytes([special]), varint(n)]
            found = run(path, pre, special, all_texts[:n], out)
            ends = ends or found
    print("ends generation:", ends)
    out.append(varint(len(ends)) + b"".join(map(varint, ends)))
    data = b"".join(out)
    packed = zstd(data)
    with open(target, "wb") as f:
        f.write(packed)
    print(f"{len(all_texts)} texts, {len(data)} bytes, {len(packed)} written to {target}")


main()
