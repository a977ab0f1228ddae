#!/usr/bin/env python3
"""Writes unicode_table.h: the code points of general category L, N and P, as ranges.

Usage: make_unicode.py > unicode_table.h   (then clang-format)
Source: utf8proc 2.8 (Unicode 15.0), plus the one block of letters that Unicode 15.1 added
(CJK Unified Ideographs Extension I), which is the version that llama.cpp's tokenizer uses."""
import ctypes

proc = ctypes.CDLL("libutf8proc.so.2")
proc.utf8proc_category_string.restype = ctypes.c_char_p
EXTENSION_I = range(0x2EBF0, 0x2EE5E)
NAMES = {"L": "IBIDI_LETTER", "N": "IBIDI_NUMBER", "P": "IBIDI_PUNCT"}


def category(c):
    return "L" if c in EXTENSION_I else proc.utf8proc_category_string(c).decode()[0]


ranges, start, last = [], 0, None
for c in range(0x110001):
    now = category(c) if c < 0x110000 else None
    now = now if now in NAMES else None
    if now != last:
        if last:
            ranges.append((start, c - 1, last))
        start, last = c, now

print("/* Written by make_unicode.py from Unicode 15.1: do not edit. Sorted, no two overlap. */")
print("static const struct range ranges[] = {")
print(",".join("{0x%X, 0x%X, %s}" % (a, b, NAMES[k]) for a, b, k in ranges))
print("};")
