"""Compile every kernel for every tile that tuning can choose, without a GPU, and fail on what costs speed.

For sm_80, sm_90 and sm_100 (or the architectures given as arguments): no register spills, no stack, shared
memory within the limit, and the right matrix instruction: wgmma on sm_90 and tcgen05 on sm_100 for tiles of
64 rows and more, mma.sync for the smaller ones and on sm_80; for the specialised tiles of sm_90 also TMA, and
for the prefix tile the hand-over of registers. Uses the installed Triton and the assembler it bundles.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from compile_cases import CAUSAL_VARIANTS, RUN_VARIANTS, SPECIAL_VARIANTS, VARIANTS, Case, cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from hydragen.backends.launches import padded
from hydragen.backends.tma import MOST_LEVELS, box
from hydragen.kernels.append import append
from hydragen.kernels.attend import attend
from hydragen.kernels.merge import merge
from hydragen.kernels.prefix_sm90 import BLOCK_LAYOUT, attend_prefix
from hydragen.kernels.warp_sm90 import attend_rows
from hydragen.prefix_tiles import PrefixTile
from hydragen.target import Target
from hydragen.tiles import MergeShape, has_double_matrices, merge_registers
from hydragen.warp_tiles import WarpTile

ARCHITECTURES = (80, 90, 100)
# Shared memory that one program may ask for, in bytes: CUDA C++ Programming Guide, table "technical
# specifications".
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
NUM_LEVELS, GROUP_SIZE, NUM_KV_HEADS = 2, 4, 8


def compile_case(case: Case) -> Any:
    """Compile one case as the launcher would for typical arguments: 16-byte aligned, even strides."""
    if case.tile is None:
        size = padded(case.head_dim, 4 if case.dtype == "fp32" else 2)
        constants: dict[str, Any] = {
            "q_len": 1, "HEAD_DIM": case.head_dim, "HEAD_DIM_V": case.head_dim, "BLOCK_H": 8, "BLOCK_D": size,
            "BLOCK_DV": size, "HAS_INNER": True, "HAS_SOURCE": True, "HAS_FRESH": True,
        }  # fmt: skip
        types: dict[str, Any] = dict.fromkeys(("outer_ptr", "inner_ptr", "source_ptr"), "*i64")
        types |= dict.fromkeys(("k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr"), f"*{case.dtype}")
        strides = ("strides_k", "strides_v", "strides_k_cache", "strides_v_cache")
        types |= {"fresh_ptr": "*u8"} | dict.fromkeys(strides, ("i32",) * 4)
        return _compile(append, constants, types, case.arch, 4, 3, None)
    if isinstance(case.tile, MergeShape):
        flags: dict[str, Any] = {
            "GATHER_Q": True,
            "HAS_SINKS": True,
            "HAS_LSE": True,
            "PDL": case.arch >= 90,
            "INTERPRET": False,
        }
        constants = flags | {
            "HEAD_DIM_V": case.head_dim, "BLOCK_H": case.tile.heads,
            "BLOCK_DV": padded(case.head_dim, 2), "UNROLL": case.tile.unroll,
        }  # fmt: skip
        types = {"out_ptr": f"*{case.dtype}", "sinks_ptr": f"*{case.dtype}"}
        registers = merge_registers(Target(case.arch, 132, 1.0, 1.0)) or None
        return _compile(merge, constants, types, case.arch, case.tile.num_warps, 3, registers)
    if isinstance(case.tile, PrefixTile):
        own = {
            "STAGES": case.tile.num_stages, "CONSUMERS": case.tile.consumers,
            "CONSUMER_REGISTERS": case.tile.consumer_registers, "Q_SHARED": case.tile.q_shared,
            "LAZY": case.tile.lazy,
        }  # fmt: skip
        return _compile_special(case, case.tile, attend_prefix, own, 4)
    if isinstance(case.tile, WarpTile):
        own = {"K_STAGES": case.tile.k_stages, "V_STAGES": case.tile.v_stages, "MERGE": case.tile.merges}
        return _compile_special(case, case.tile, attend_rows, own, 1)
    tile = case.tile
    variant = (VARIANTS | RUN_VARIANTS)[case.variant]
    itemsize = 4 if case.dtype == "fp32" else 2
    head_dim = case.head_dim - 8 if variant.get("PADDED") else case.head_dim
    on: dict[str, Any] = {name: variant.get(name, False) for name in (
        "GATHER_Q", "HAS_LENS", "HAS_SINKS", "HAS_LSE", "FINAL", "RUNS", "CAUSAL", "WINDOW",
        "SOFTCAP",
    )}  # fmt: skip
    constants = on | {
        "q_len": 1, "stride_qd": 1, "GROUP_SIZE": GROUP_SIZE, "HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": padded(head_dim, itemsize),
        "BLOCK_DV": padded(head_dim, itemsize),
        "PAGE_SIZE": variant.get("PAGE_SIZE", 0), "CONTIGUOUS": not variant.get("STRIDED"),
        "NUM_KV_HEADS": NUM_KV_HEADS,
        "HEADS_FIRST": tile.block_m <= 16,
        "HEADS": max(1, 16 // GROUP_SIZE) if tile.block_m <= 16 and itemsize == 2 else 1,
        "PDL": case.arch >= 90,
        "FOLD_SCALE": variant.get("FOLD_SCALE", itemsize == 2),
        "DOUBLE": itemsize == 4 and has_double_matrices(Target(case.arch, 132, 1.0, 1.0), head_dim),
        "NUM_STAGES": tile.num_stages,
        "LOOP_TAIL": tile.loop_tail,
        "INTERPRET": False,
    }  # fmt: skip
    pointer = f"*{case.dtype}"
    types = {"q_ptr": pointer, "out_ptr": pointer, "sinks_ptr": pointer, "k_ptrs": (pointer,) * NUM_LEVELS}
    types["v_ptrs"] = types["k_ptrs"]
    for side in "kv":
        for axis in "nth":
            types[f"strides_{side}{axis}"] = ("i32",) * NUM_LEVELS
        types[f"strides_{side}d"] = ("constexpr",) * NUM_LEVELS
    plain = not variant.keys() & {"FINAL", "CAUSAL", "WINDOW", "SOFTCAP", "STRIDED"}
    registers = tile.max_registers(plain, "PAGE_SIZE" in variant)
    return _compile(attend, constants, types, case.arch, tile.num_warps, tile.num_stages, registers)


def _compile_special(
    case: Case, tile: PrefixTile | WarpTile, kernel: Any, own: dict[str, int], warps: int
) -> Any:
    on = {
        "FINAL": False, "HAS_SINKS": False, "HAS_LSE": False, "GATHER_Q": False, "HAS_LENS": False,
        "NUM_LEVELS": 1, "PAGE_SIZE": 0, "RESERVED": False, "CAUSAL": False,
    }  # fmt: skip
    variants = SPECIAL_VARIANTS | CAUSAL_VARIANTS
    constants: dict[str, Any] = on | variants[case.variant] | own | {
        "q_len": 1, "GROUP_SIZE": GROUP_SIZE, "NUM_KV_HEADS": NUM_KV_HEADS, "HEAD_DIM": case.head_dim,
        "HEAD_DIM_V": case.head_dim, "BLOCK_N": tile.block_n, "PDL": True,
    }  # fmt: skip
    keys, columns = box(tile, case.head_dim, constants["PAGE_SIZE"], tile.block_n)
    pointer, block = f"*{case.dtype}", f"{case.dtype}[{keys}, {columns}]"
    types: dict[str, Any] = {"q_ptr": pointer, "out_ptr": pointer, "sinks_ptr": pointer}
    levels = int(constants["NUM_LEVELS"])
    for name in ("k_desc", "v_desc"):
        for level in range(MOST_LEVELS):
            field = f"{name}_{level}" if level else name
            if level < levels:
                types[field] = f"tensordesc<{block},{BLOCK_LAYOUT!r}>"
            else:
                constants[field] = None
    for name in ("levels", "k_slot_rows", "v_slot_rows"):
        types[name] = ("i32",) * levels
    return _compile(kernel, constants, types, case.arch, warps, 3, tile.registers)


def _compile(
    kernel: Any,
    constants: dict[str, Any],
    types: dict[str, Any],
    arch: int,
    warps: int,
    stages: int,
    registers: int | None,
) -> Any:
    signature: dict[str, Any] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            fixed[(index,)] = constants[name]
            continue
        default = "fp32" if name in ("scale_log2", "softcap") else "*i32" if name.endswith("_ptr") else "i32"
        if name.startswith(("part_", "lse_")):
            default = "*fp32"
        signature[name] = kind = types.get(name, default)
        places = [(index, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(index,)]
        for place in places:
            if isinstance(kind, tuple) and kind[0] == "constexpr":
                fixed[place] = 1
            elif name.endswith("_ptr") or name.startswith("stride") or isinstance(kind, tuple):
                attributes[place] = aligned
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    if registers is not None:
        options["maxnreg"] = registers
    kind_of_source = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind_of_source(kernel, signature=signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any) -> tuple[int, int]:
    """Return registers per thread and bytes of stack (where spills live), as the bundled cuobjdump has it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(registers.group(1)), int(stack.group(1))


def asks_after_reading(compiled: Any, case: Case) -> bool:
    """Whether the tile of one warp still does what kernels/warp_sm90.py relies on, in the machine's code.

    In its loop the products with the keys come first, then the vote on their scores, then what is asked for
    next, then the products with the values, which end before the loop begins anew.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout
    order = re.findall(
        r"\b(HMMA|REDUX|UTMALDG|BRA)\b[^;]*?(\.L_x_\d+)?\)? *;|^(\.L_x_\d+):", text, re.MULTILINE
    )
    places = {label: i for i, (_, _, label) in enumerate(order) if label}
    vote = next(i for i, (name, _, _) in enumerate(order) if name == "REDUX")
    # the loop around the vote: the branch behind it that goes back before it
    back = next(
        i for i, (n, to, _) in enumerate(order) if n == "BRA" and i > vote and places.get(to, i) < vote
    )
    loop = [name for name, _, _ in order[places[order[back][1]] : back]]
    at = loop.index("REDUX")
    keys = case.head_dim // 16 * (case.tile.block_n // 16)
    return loop[:at].count("HMMA") == keys == loop[at:].count("HMMA") and "UTMALDG" not in loop[:at]


def judge(case: Case) -> tuple[Case, int, str]:
    """Compile a case; return it with its registers and what is wrong with it ("" if nothing is)."""
    try:
        compiled = compile_case(case)
        registers, stack = resources(compiled)
    except Exception as error:  # noqa: BLE001 (whatever a compiler raises is a failed case, to be shown with the others)
        return case, 0, f"does not compile: {type(error).__name__}: {str(error)[-400:]}"
    problems = []
    if stack:
        problems.append(f"spills: {stack} bytes of stack with {registers} registers")
    if compiled.metadata.shared > SHARED_LIMIT[case.arch]:
        problems.append(f"shared memory {compiled.metadata.shared} exceeds {SHARED_LIMIT[case.arch]}")
    if isinstance(case.tile, WarpTile) and not asks_after_reading(compiled, case):
        problems.append("asks for blocks before it has read those that they overwrite")
    missing = [name for name in instructions(case) if name not in compiled.asm["ptx"]]
    if missing:
        problems.append(f"no {' or '.join(missing)} in the PTX")
    return case, registers, "; ".join(problems)


def instructions(case: Case) -> tuple[str, ...]:
    """Return the instructions that a case must use; float32 has exact ones only by way of float64."""
    if isinstance(case.tile, PrefixTile):
        return ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg", "griddepcontrol.launch_dependents")
    if isinstance(case.tile, WarpTile):
        return (
            "mma.sync",
            "cp.async.bulk.tensor",
            "redux.sync",
            "movmatrix",
            "griddepcontrol.launch_dependents",
        )
    if case.tile is None or isinstance(case.tile, MergeShape):
        return ()
    if case.dtype == "fp32":
        doubles = has_double_matrices(Target(case.arch, 132, 1.0, 1.0), case.head_dim)
        return ("f64.f64.f64.f64",) if doubles else ()
    if case.tile.block_m >= 64 and case.arch in (90, 100):
        return ({90: "wgmma.mma_async", 100: "tcgen05.mma"}[case.arch],)
    return ("mma.sync",)


def main() -> int:
    """Compile everything on all cores; print what fails and a summary."""
    architectures = tuple(int(arg) for arg in sys.argv[1:]) or ARCHITECTURES
    todo = cases(architectures)
    failures = 0
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for case, registers, problem in pool.map(judge, todo):
            if problem or os.environ.get("HYDRAGEN_GATE_VERBOSE"):
                print(f"{'FAIL' if problem else 'ok  '} {case}: {registers} registers {problem}", flush=True)
            failures += bool(problem)
    print(f"compile gate: triton {triton.__version__}, {len(todo) - failures} passed, {failures} failed")
    return failures > 0


if __name__ == "__main__":
    raise SystemExit(main())
