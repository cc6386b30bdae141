"""Compiles every Triton kernel in every tile configuration for sm_80 and sm_90; needs no GPU.

    python -m svitt_ops.kernels.compile_check [--quick]

The launchers run on meta tensors, and what they would launch is compiled instead, with the
arguments specialised as Triton's launcher would specialise them: the check covers exactly what a
GPU would run. For each compiled kernel it reports registers, spilled bytes, shared memory, how many
programs a multiprocessor holds, and of each innermost loop that multiplies matrices the
instructions, how many of them are integer, index or select, and the cycles. It fails if a kernel
spills or needs more than the architecture has, or, with `--kept`, if it leaves room for fewer
programs than when the file was written, by `--keep`, or if a loop takes more of anything in it:
instructions, cycles, ways of a bank conflict, uncoalesced accesses, or untraced ones. `--keep`
fails, too, where a bank conflict has more than two ways, which then have to be argued for. Run it
in a process of its own: TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import (
    block_layout,
    block_sparse_attention,
    block_sparse_attention_backward,
    cross_attention,
    cross_attention_backward,
    info_nce,
    info_nce_backward,
    queue_info_nce,
    retrieval_ranks,
    sample_hard_negatives,
    sigmoid_nce,
    tiles,
    token_pruning,
)
from .machine_code import REGISTERS, SHARED_LIMIT, Usage, usage

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
MOST_WAYS = 2  # of a bank conflict in a loop that is not kept


def attention_calls(quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of block-sparse attention over what the tile tables depend on."""
    half, single = torch.bfloat16, torch.float32
    cases = [(64, 56, 1, dtype) for dtype in (half, torch.float16, single)]
    if not quick:
        # Every padded head_dim, with and without padding, by every number of rows in a tile.
        shapes = [(dim, 56, 1) for dim in (8, 20, 32, 65, 80, 128, 251, 256)]
        shapes += [(dim, size, 1) for dim in (64, 128, 256) for size in (7, 32)]
        shapes += [(64, 64, 1), (64, 100, 1), (64, 56, 0), (64, 56, 3)]
        cases += [(*shape, dtype) for shape in shapes for dtype in (half, single)]
    for dim, block_size, num_global, dtype in cases:
        for bias in (False, True):
            name = f"D={dim} block={block_size} globals={num_global} {str(dtype)[6:]}"
            yield (
                name + " bias" * bias,
                partial(run_attention, dim, block_size, num_global, dtype, bias),
            )


def run_attention(
    dim: int, block_size: int, num_global: int, dtype: torch.dtype, bias: bool
) -> None:
    """Calls both launchers; per-sample lengths, codes and saliency come with the bias."""
    batch, heads, num_blocks = 2, 12, 14
    tokens = num_blocks * block_size
    # Strides of a packed projection: (batch, tokens, 3, heads, head_dim).
    packed = torch.empty(batch, num_global + tokens, 3, heads, dim, dtype=dtype, device="meta")
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    counts, listed_keys, listed_queries = (
        torch.empty(1, 1, num_blocks, *width, dtype=torch.int32, device="meta")
        for width in ((), (4,), (9,))
    )
    lists = (counts, listed_keys, counts, listed_queries)
    table = codes = lengths = None
    if bias:
        rows = 5103 + 2 * num_global + num_global**2
        table = torch.empty(rows, heads, device="meta")
        codes = torch.empty(batch, tokens, dtype=torch.int32, device="meta")
        lengths = torch.empty(batch, dtype=torch.int32, device="meta")
    tail: tuple[Any, ...] = (block_size, num_global, table, codes, lengths, 0.125)
    saliency = bias and num_global > 0
    inputs = (query, key, value)
    out, lse, _ = block_sparse_attention.block_sparse_attention(*inputs, *lists, *tail, saliency)
    block_sparse_attention_backward.block_sparse_attention_backward(
        torch.empty_like(out), *inputs, out, lse, *lists, *tail
    )


def cross_calls(quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of cross-attention over what its tile table depends on."""
    half, single = torch.bfloat16, torch.float32
    cases = [(64, 32, dtype) for dtype in (half, torch.float16, single)]
    if not quick:
        # Every padded head_dim, with and without padding, by every number of queries in a tile.
        dims = (8, 64, 65, 128, 251, 256)
        cases += [(dim, 100, dtype) for dim in dims for dtype in (half, single)]
        cases += [(dim, 32, half) for dim in (20, 65, 128, 251, 256)]
        cases += [(dim, 5, dtype) for dim in (8, 65, 256) for dtype in (half, single)]
    for dim, num_queries, dtype in cases:
        # Few heads split the keys; the mask and the saliency come with them.
        for split in (False, True):
            name = f"D={dim} queries={num_queries} {str(dtype)[6:]}"
            yield name + " split" * split, partial(run_cross, dim, num_queries, dtype, split)


def run_cross(dim: int, num_queries: int, dtype: torch.dtype, split: bool) -> None:
    """Calls both launchers, where keys are split with a mask and each kind of saliency."""
    batch, heads, num_keys = 1 if split else 32, 12, 1569
    query = torch.empty(batch, num_queries, heads, dim, dtype=dtype, device="meta").transpose(1, 2)
    # Strides of a packed projection: (batch, tokens, 2, heads, dim).
    packed = torch.empty(batch, num_keys, 2, heads, dim, dtype=dtype, device="meta")
    key, value = packed.permute(2, 0, 3, 1, 4)
    mask = torch.empty(batch, num_keys, dtype=torch.bool, device="meta") if split else None
    inputs = (query, key, value)
    for saliency in (1, 2) if split else (0,):
        out, lse, _ = cross_attention.cross_attention(*inputs, mask, 0.125, saliency)
    cross_attention_backward.cross_attention_backward(
        torch.empty_like(out), *inputs, out, lse, mask, 0.125
    )


def run_draw(num_blocks: int) -> None:
    """Calls the launcher that draws a layout."""
    noise = torch.empty(num_blocks, num_blocks, device="meta")
    block_layout.draw_block_layout(noise, 1, 3)


def layout_calls(quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Layout drawing over the range of row lengths."""
    for num_blocks in (14, 4096) if quick else (1, 14, 56, 100, 300, 1000, 4096):
        yield f"blocks={num_blocks}", partial(run_draw, num_blocks)


def run_pruning(
    batch: int, num_tokens: int, dim: int, dtypes: tuple[torch.dtype, torch.dtype], rich: bool
) -> None:
    """Calls the launchers of token pruning; codes per sample and strided tokens if rich."""
    token_dtype, score_dtype = dtypes
    tokens = torch.empty(
        batch, 1 + num_tokens, 2 if rich else 1, dim, dtype=token_dtype, device="meta"
    )
    scores = torch.empty(batch, num_tokens, dtype=score_dtype, device="meta")
    codes = torch.empty(batch, num_tokens, dtype=torch.int32, device="meta") if rich else None
    keep = -(-num_tokens * 6 // 10)
    out, _, inverse, _ = token_pruning.prune_tokens(tokens[:, :, 0], scores, keep, 1, codes)
    token_pruning.prune_tokens_backward(out, inverse, 1)
    token_pruning.select_tokens(scores, keep)


def pruning_calls(quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Token pruning over samples that fit one tile and do not, few and many, every dtype."""
    half, single = torch.bfloat16, torch.float32
    cases = [(8, 1568, 768, (half, single)), (128, 1568, 768, (half, single))]
    if not quick:
        for dtypes in ((single, single), (half, half), (torch.float16, torch.float16)):
            cases += [(8, tokens, 768, dtypes) for tokens in (1, 55, 385, 785, 3137, 10000)]
            cases += [(128, tokens, 768, dtypes) for tokens in (1, 785, 3137)]
            cases += [(128, 10000, 1024, dtypes), (8, 55, 8, dtypes)]
            cases += [(batch, 785, dim, dtypes) for batch in (8, 128) for dim in (1, 55, 1001)]
    for batch, num_tokens, dim, dtypes in cases:
        kinds = "/".join(str(dtype)[6:] for dtype in dtypes)
        rich = dim == 768
        name = f"batch={batch} N={num_tokens} D={dim} {kinds}{' codes' * rich}"
        yield name, partial(run_pruning, batch, num_tokens, dim, dtypes, rich)


def run_contrast(rows: int, dim: int, dtype: torch.dtype, ids: bool) -> None:
    """Calls the contrastive launchers: symmetric, or with ids one direction and wide gradients."""
    query, key = (torch.empty(rows, dim, dtype=dtype, device="meta") for _ in range(2))
    scalar = torch.empty((), device="meta")
    numbers = torch.empty(rows, dtype=torch.int64, device="meta") if ids else None
    inputs = (query, key, scalar, numbers, numbers)
    for weights in (None, torch.empty(rows, device="meta")) if ids else (None,):
        given = (*inputs, weights, weights, 0)
        symmetric = not ids or weights is not None
        _, of_rows, of_columns = info_nce.info_nce(*given, symmetric, 0.1)
        info_nce_backward.info_nce_backward(scalar, *given, of_rows, of_columns, 0.1, ids)
    for gradients in (False, True):
        sigmoid_nce.sigmoid_nce(*inputs[:3], scalar, *inputs[3:], 0, gradients)
    uniform = torch.empty(rows, dtype=torch.float64, device="meta")
    sample_hard_negatives.sample_hard_negatives(*inputs, uniform)
    retrieval_ranks.retrieval_ranks(query, key, numbers, numbers)
    queue = torch.empty(65536, dim, dtype=dtype, device="meta")
    of_queue = torch.empty(65536, dtype=torch.int64, device="meta") if ids else None
    taught = query if ids else None
    queue_info_nce.queue_info_nce(
        query, key, queue, scalar, taught, 0.4, numbers, numbers, of_queue, True
    )


def contrast_calls(quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Contrastive losses of few and of many rows, over the widths of a slice."""
    half, single = torch.bfloat16, torch.float32
    cases = [(rows, 256, dtype) for rows in (32, 4096) for dtype in (half, single)]
    if not quick:
        cases += [(rows, 256, torch.float16) for rows in (32, 4096)]
        cases += [(rows, dim, half) for rows in (32, 4096) for dim in (1, 48, 100, 128, 512, 768)]
        cases += [(32, dim, single) for dim in (1, 48, 100, 768)]
        cases += [(4096, dim, half) for dim in (251, 1001)]
    for rows, dim, dtype in cases:
        for ids in (False, True):
            name = f"B={rows} D={dim} {str(dtype)[6:]}{' ids' * ids}"
            yield name, partial(run_contrast, rows, dim, dtype, ids)


def specialise(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ASTSource:
    """What Triton's launcher would compile for these arguments, pointers aligned to 16 bytes."""
    named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        plain_int = isinstance(value, int) and not isinstance(value, bool)
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (plain_int and special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif plain_int:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes)


@contextmanager
def recorded_launches(arch: int) -> Iterator[list[tuple[str, ASTSource, dict[str, int]]]]:
    """Within, launching a kernel records its name, source and options."""
    launches: list[tuple[str, ASTSource, dict[str, int]]] = []

    def record(self: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        launches.append((self.fn.__name__, specialise(self, args, kwargs), options))

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", record))
        # The functions of `tiles` are checked, whatever table somebody tuned.
        patches.enter_context(mock.patch.object(tiles, "tuned", lambda tile, *_, **__: tile))
        for module in [x for x in globals().values() if hasattr(x, "device_arch")]:
            patches.enter_context(mock.patch.object(module, "device_arch", lambda device: arch))
        yield launches


def measure(source: ASTSource, options: dict[str, int], arch: int, loops: bool = True) -> Usage:
    """Compiles for one architecture and reads what it takes out of the cubin."""
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return usage(compiled, arch, options["num_warps"], loops)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One compiled kernel."""

    name: str
    line: str
    """To print."""
    usage: Usage
    faults: list[str]


def check(
    arch: int, name: str, call: Callable[[], object], kept: dict[str, Any] | None = None
) -> list[Checked]:
    """Compiles what one call launches; with `kept`, reads the loops of the kernels in it alone."""
    with recorded_launches(arch) as launches:
        call()
    found = []
    for kernel, source, config in launches:
        full = f"{arch} {kernel.strip('_')} {name}"
        if again := sum(x.name.partition(" #")[0] == full for x in found):
            full += f" #{again + 1}"
        taken = measure(source, config, arch, kept is None or full in kept)
        warps, stages = config["num_warps"], config["num_stages"]
        faults = []
        if taken.spills > 0:
            faults.append(f"spills {taken.spills} bytes")
        if taken.shared > SHARED_LIMIT[arch]:
            faults.append(f"{taken.shared} bytes of shared memory")
        if taken.registers * warps * 32 > REGISTERS:
            faults.append(f"{taken.registers} registers by {warps} warps")
        faults += worse((kept or {}).get(full), taken)
        line = f"{arch:4} {kernel.strip('_'):22} {warps:5} {stages:6} {taken.registers:4} "
        line += f"{taken.spills:5} {taken.shared:7} {taken.programs:5} "
        loops = "+".join(f"{x.instructions}({x.index}):{x.cycles}" for x in taken.loops)
        line += f"{loops or '-':>20} {name}"
        found.append(Checked(name=full, line=line, usage=taken, faults=faults))
    return found


def worse(kept: dict[str, Any] | None, found: Usage) -> list[str]:
    """What a kernel takes more of than what was kept of it, or than any may; words for each."""
    loops = [asdict(loop) for loop in found.loops]
    if kept is None:
        ways = [loop["conflict_ways"] for loop in loops]
        return [f"{n} conflict ways in a loop, at most {MOST_WAYS}" for n in ways if n > MOST_WAYS]
    if len(loops) != len(kept["loops"]):
        return [f"{len(loops)} loops, kept are {len(kept['loops'])}"]
    said = []
    if found.programs < kept["programs"]:
        said.append(f"{found.programs} programs side by side, kept are {kept['programs']}")
    for now, before in zip(loops, kept["loops"], strict=True):
        said += [
            f"{now[k]} {k.replace('_', ' ')} in a loop, kept are {before[k]}"
            for k in now
            if now[k] > before[k]
        ]
    return said


def main(argv: list[str] | None = None) -> int:
    """Prints one line per compiled kernel; 1 if any spills, exceeds a limit or became worse."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the fast configurations")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--kept", type=Path, help="JSON of this Triton's to compare with")
    parser.add_argument("--keep", type=Path, help="JSON to write, once a change is argued for")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("compile_check: TRITON_INTERPRET is set; run in a process without it")
    if (options.kept or options.keep) and not find_spec("cuxray"):
        sys.exit("compile_check: --kept and --keep read machine code by cuxray: pip install cuxray")
    kept = json.loads(options.kept.read_text()) if options.kept else {"kernels": {}}
    print(f"triton {triton.__version__}")
    if options.kept and kept["triton"] != triton.__version__:
        print(f"not compared: {options.kept} is of Triton {kept['triton']}")
        kept["kernels"] = {}
    print(
        f"{'arch':4} {'kernel':22} {'warps':5} {'stages':6} {'regs':>4} {'spill':>5} {'shared':>7} "
        f"{'at 1':>5} {'loops(index):cycles':>20}"
    )
    calls = [
        *layout_calls(options.quick),
        *pruning_calls(options.quick),
        *attention_calls(options.quick),
        *cross_calls(options.quick),
        *contrast_calls(options.quick),
    ]
    # Disassembling takes longer than most kernels take to compile.
    before = None if options.keep else kept["kernels"]
    arches = options.arch or sorted(SHARED_LIMIT)
    work = [(arch, *call, before) for arch in arches for call in calls]
    failures = compiled = 0
    taken = {}
    missing = {name for name in before or {} if int(name.partition(" ")[0]) in arches}
    known = len(missing)
    # Compilers live in processes of their own also because LLVM, after some hundred kernels, may
    # crash when Python shuts down.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for found in pool.map(check, *zip(*work, strict=True)):
            for kernel in found:
                if kernel.usage.loops:
                    taken[kernel.name] = asdict(kernel.usage)
                missing.discard(kernel.name)
                said = f"  FAILED: {'; '.join(kernel.faults)}" if kernel.faults else ""
                print(kernel.line + said, flush=True)
                compiled += 1
                failures += bool(kernel.faults)
    for name in sorted(missing):
        print(f"FAILED: {name} is kept, but nothing launches it")
    failures += len(missing)
    print(f"{compiled} kernels compiled, {known - len(missing)} compared, {failures} failed")
    if options.keep:
        document = {"triton": triton.__version__, "kernels": taken}
        options.keep.write_text(json.dumps(document, indent=1) + "\n")
    return int(failures > 0)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Without the interpreter's teardown, in which compilers that were loaded twice may crash.
    os._exit(status)
