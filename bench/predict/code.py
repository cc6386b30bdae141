"""What a warp does on its way through a compiled kernel, read off the disassembly.

The listing becomes a graph of basic blocks, its loops a tree. Where both sides of a branch do the
same matrix products, the shorter one is taken: kernels keep apart what the edges need, and most
steps do not go there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Counts = dict[str, float]
"""Of a warp: clocks of each unit of `CLOCKS`, `flops` on the tensor cores, and the `bytes` that its
32 threads load and store."""
CLOCKS = ("issue", "alu", "exp", "memory")
KINDS = (*CLOCKS, "flops", "bytes")

# Clocks of a scheduler: a warp over its quarter of a multiprocessor's results a clock, from the
# table of throughputs in the CUDA C++ programming guide (compute capability 8.0 and 9.0).
_ALU = (
    "LOP3", "IADD3", "ISETP", "SEL", "SHF", "PRMT", "LEA", "VIADD", "IABS", "PLOP3", "VIMNMX",
    "VIADDMNMX", "FMNMX", "FMNMX3", "FSETP", "FSEL", "F2FP", "I2FP", "POPC", "FLO",
)  # fmt: skip
_ALU_CLOCKS, _EXP_CLOCKS, _MEMORY_CLOCKS = 2, 8, 4
_GLOBAL = ("LDG", "LDGSTS", "STG")
_MEMORY = (
    *_GLOBAL, "LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMG", "RED", "REDG", "LDL", "STL",
)  # fmt: skip
_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


def counts_of(name: str) -> Counts:
    """Of one instruction, under its full name, such as HGMMA.64x64x16.F32.BF16."""
    head, _, rest = name.partition(".")
    suffixes = rest.split(".")
    found: Counts = {"issue": 1.0}
    if head in _ALU:
        found["alu"] = _ALU_CLOCKS
    elif head == "MUFU":
        found["exp"] = _EXP_CLOCKS
    elif head == "HGMMA" and (shape := re.match(r"(\d+)x(\d+)x(\d+)", rest)):
        rows, columns, terms = map(int, shape.groups())
        found["flops"] = 2.0 * rows * columns * terms / 4  # by four warps
    elif head == "HMMA":
        found["flops"] = 2.0 * 16 * 8 * (16 if "16816" in suffixes else 8)
    elif head in _MEMORY:
        width = 4 if "128" in suffixes or "4" in suffixes or "M88" in suffixes else 1
        width = 2 if "64" in suffixes or "2" in suffixes else width
        found["memory"] = _MEMORY_CLOCKS * width
        if head in _GLOBAL:
            small = {"U16": 2, "S16": 2, "U8": 1, "S8": 1}
            each = next((small[x] for x in suffixes if x in small), 4 * width)
            found["bytes"] = 32.0 * each
    return found


@dataclass
class Loop:
    """One loop, or, at the root, the whole kernel: its own code on the way through, and loops."""

    counts: Counts = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    loops: list[Loop] = field(default_factory=list)

    @property
    def products(self) -> bool:
        """Whether matrices are multiplied here or further in."""
        return self.counts["flops"] > 0 or any(x.products for x in self.loops)


def kernel(listing: str) -> Loop:
    """The tree of what `nvdisasm -c` prints of a kernel."""
    names, edges, starts = _graph(listing)
    blocks: list[Counts] = []
    for first, last in zip(starts, [*starts[1:], len(names)], strict=True):
        total = dict.fromkeys(KINDS, 0.0)
        for name in names[first:last]:
            add(total, counts_of(name))
        blocks.append(total)
    if not any(block["flops"] for block in blocks):
        _count_multiply_adds(blocks, names, starts)
    loops = _natural_loops(edges)
    return _tree(frozenset(range(len(blocks))), 0, blocks, edges, loops)


def add(total: Counts, more: Mapping[str, float], times: float = 1.0) -> None:
    """Adds counts to counts."""
    for kind, value in more.items():
        total[kind] += times * value


def _graph(listing: str) -> tuple[list[str], list[list[int]], list[int]]:
    """Names of all instructions; of each basic block its successors, and where it starts."""
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: dict[int, tuple[str, bool]] = {}  # to where, and whether always
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif code := _LINE.match(line):
            name, always = code[2], code[1] is None and not re.match(r"\s+!?U?P\d", code[3])
            target = _TARGET.search(code[3])
            if name.startswith("BRA") and target:
                jumps[len(names)] = (target[1], always and name != "BRA.DIV")
            elif name.partition(".")[0] in ("EXIT", "RET"):
                jumps[len(names)] = ("", always)
            names.append(name)
    heads = {0, *labels.values(), *(at + 1 for at in jumps)}
    starts = sorted(x for x in heads if x < len(names))
    number = {start: i for i, start in enumerate(starts)}
    edges: list[list[int]] = []
    for i, end in enumerate([*(x - 1 for x in starts[1:]), len(names) - 1]):
        target_name, always = jumps.get(end, ("", False))
        following = [] if always or i + 1 == len(starts) else [i + 1]
        if target_name in labels and labels[target_name] in number:
            following.append(number[labels[target_name]])
        edges.append(following)
    return names, edges, starts


def _count_multiply_adds(blocks: list[Counts], names: list[str], starts: list[int]) -> None:
    """Full precision has no tensor cores: where there are none, 64 or more FFMA are a product."""
    for block, first, last in zip(blocks, starts, [*starts[1:], len(names)], strict=True):
        fused = sum(name.startswith("FFMA") for name in names[first:last])
        block["flops"] = 64.0 * fused if fused >= 64 else 0.0


def _natural_loops(edges: list[list[int]]) -> dict[int, frozenset[int]]:
    """The blocks of each loop, by the block that it begins with."""
    count = len(edges)
    before: list[list[int]] = [[] for _ in range(count)]
    for block, following in enumerate(edges):
        for x in following:
            before[x].append(block)
    everything = set(range(count))
    over = [{0}] + [set(everything) for _ in range(count - 1)]  # which blocks lead to each
    changed = True
    while changed:
        changed = False
        for block in range(1, count):
            known = [over[x] for x in before[block]]
            found = {block} | (set.intersection(*known) if known else set())
            if found != over[block]:
                over[block], changed = found, True
    loops: dict[int, frozenset[int]] = {}
    for block, following in enumerate(edges):
        for head in (x for x in following if x in over[block]):
            body, left = {head, block}, [block]
            while left:
                at = left.pop()
                if at != head:
                    left += [x for x in before[at] if x not in body]
                    body.update(before[at])
            loops[head] = loops.get(head, frozenset()) | body
    return loops


def _tree(
    body: frozenset[int],
    head: int,
    blocks: list[Counts],
    edges: list[list[int]],
    loops: dict[int, frozenset[int]],
) -> Loop:
    """The loop of `body`, which begins with `head`."""
    inner = {h: b for h, b in loops.items() if b < body}
    nested = {h: b for h, b in inner.items() if not any(b < other for other in inner.values())}
    place = {block: h for h, b in nested.items() for block in b}
    trees = {h: _tree(b, h, blocks, edges, loops) for h, b in nested.items()}
    nodes = {place.get(block, block) for block in body}
    following: dict[int, set[int]] = {node: set() for node in nodes}
    for block in body:
        for to in (place.get(x, x) for x in edges[block] if x in body and x != head):
            if to != place.get(block, block):
                following[place.get(block, block)].add(to)
    way: Iterable[int] = nodes
    if any(trees[x].products if x in trees else blocks[x]["flops"] for x in nodes):
        way = _way(place.get(head, head), following, blocks, trees)
    found = Loop()
    for node in sorted(way):
        if node in trees:
            found.loops.append(trees[node])
        else:
            add(found.counts, blocks[node])
    return found


def _way(
    head: int, following: dict[int, set[int]], blocks: list[Counts], trees: dict[int, Loop]
) -> list[int]:
    """From `head` to an end, with the most products, and among those the fewest instructions."""

    def cost(node: int) -> tuple[float, float]:
        if node in trees:
            return -_flops(trees[node]), trees[node].counts["issue"]
        return -blocks[node]["flops"], blocks[node]["issue"]

    best: dict[int, tuple[tuple[float, float], list[int]]] = {}
    for node in reversed(_order(head, following)):
        known = [best[x] for x in following[node] if x in best]
        (flops, issue), rest = min(known, key=lambda x: x[0], default=((0.0, 0.0), []))
        own = cost(node)
        best[node] = (own[0] + flops, own[1] + issue), [node, *rest]
    return best[head][1]


def _flops(loop: Loop) -> float:
    return loop.counts["flops"] + sum(_flops(x) for x in loop.loops)


def _order(head: int, following: dict[int, set[int]]) -> list[int]:
    """Nodes after those that lead to them."""
    done: list[int] = []
    seen = {head}
    stack = [(head, iter(sorted(following[head])))]
    while stack:
        node, rest = stack[-1]
        for to in rest:
            if to not in seen:
                seen.add(to)
                stack.append((to, iter(sorted(following[to]))))
                break
        else:
            done.append(node)
            stack.pop()
    return done[::-1]
