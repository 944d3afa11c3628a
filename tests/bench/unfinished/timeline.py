"""When programs begin and end: src copied, kernels patched to write globaltimer into the unused lse buffer."""
import os, re, shutil, statistics, sys
from pathlib import Path
root = Path(__file__).resolve().parent
SRC = Path(os.environ.get("TL_SRC", root / "src"))
copy = Path("/tmp/tl")
if copy.exists():
    shutil.rmtree(copy)
shutil.copytree(SRC, copy / "src")
pk = copy / "src/hydragen/kernels"
def patch(name, *pairs):
    p = pk / name
    t = p.read_text()
    for a, b in pairs:
        assert t.count(a) >= 1, (name, a)
        t = t.replace(a, b, 1)
    p.write_text(t)
IMP = "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait"
IMP2 = "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer, smid"
def stamp(base, which, ns):
    ptr = f"lse_ptr.to({ns}.pointer_type({ns}.int64))"
    return f"    {ns}.store({ptr} + ({base} + {ns}.program_id(0)) * 8 + {which}, globaltimer())\n"
def sm(base, ns):
    ptr = f"lse_ptr.to({ns}.pointer_type({ns}.int64))"
    return f"    {ns}.store({ptr} + ({base} + {ns}.program_id(0)) * 8 + 2, smid().to({ns}.int64))\n"
patch("prefix_sm90.py", (IMP, IMP2),
      ("    if PDL:\n        # The next launch may take", stamp(0, 0, "gl") + sm(0, "gl") + "    if PDL:\n        # The next launch may take"),
      ("    if PDL:\n        # The merge waits", stamp(0, 1, "gl") + "    if PDL:\n        # The merge waits"))
patch("prefix_sm90.py", ("pages = (pages_ptr, num_pages) if PAGE_SIZE > 0 else ()", "pages = (lse_ptr, num_pages)"))
patch("fetch_sm90.py", ("from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma", "from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma\nfrom triton.language.extra.cuda import globaltimer"),
      ("        last = begin + (blocks - 1) * BLOCK_N\n", "        last = begin + (blocks - 1) * BLOCK_N\n        gl.store(pages[0].to(gl.pointer_type(gl.int64)) + gl.program_id(0) * 8 + 3, globaltimer())\n"))
def mark(i, ind=8):
    return " " * ind + "if WHICH == 0:\n" + " " * (ind + 4) + f"gl.store(lse_ptr.to(gl.pointer_type(gl.int64)) + gl.program_id(0) * 8 + {i}, globaltimer())\n"
patch("consume_sm90.py", ("from .fetch_sm90 import", "from triton.language.extra.cuda import globaltimer\n\nfrom .fetch_sm90 import"),
      ("        # The segment's last block.\n", mark(4) + "        # The segment's last block.\n"),
      ("        mbarrier.arrive(k_empty.index(done % STAGES), count=1)\n        keys = gl.arange", mark(5) + "        mbarrier.arrive(k_empty.index(done % STAGES), count=1)\n        keys = gl.arange"),
      ("        acc = weigh(weights, acc, rings, done - 1, STAGES)\n", "        acc = weigh(weights, acc, rings, done - 1, STAGES)\n" + mark(6)),
      ("            gl.store(part_lse_ptr + part_rows, lse, mask=row_ok)\n", "            gl.store(part_lse_ptr + part_rows, lse, mask=row_ok)\n" + mark(7, 12)))
patch("warp_sm90.py", (IMP, IMP2),
      ("    if PDL:\n        # The next launch may take", stamp(1000, 0, "gl") + sm(1000, "gl") + "    if PDL:\n        # The next launch may take"),
      ("    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, RIGHT))", stamp(1000, 3, "gl") + "    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, RIGHT))"),
      ("    # what is of a row, before rows", stamp(1000, 5, "gl") + "    # what is of a row, before rows"),
      ("    if MERGE:\n        merge_item(", stamp(1000, 1, "gl") + "    if MERGE:\n        merge_item("))
m = (pk / "merge.py").read_text()
print([l for l in m.splitlines() if "import" in l or "def merge" in l])
m = m.replace("gdc_wait()", "gdc_wait()\n        tl.store(lse_ptr.to(tl.pointer_type(tl.int64)) + (20000 + tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)) * 8 + 2, globaltimer())", 1)
m = re.sub(r"import gdc_wait\b", "import gdc_wait, globaltimer", m) if "import gdc_wait" in m else m
body = m.index("    acc = tl.zeros(")
m = m[:body] + stamp(20000, 0, "tl").replace("tl.program_id(0))", "tl.program_id(0) + tl.num_programs(0) * tl.program_id(1))") + m[body:]
m = m.rstrip("\n") + "\n" + stamp(20000, 1, "tl").replace("tl.program_id(0))", "tl.program_id(0) + tl.num_programs(0) * tl.program_id(1))")
(pk / "merge.py").write_text(m)
t = (copy / "src/hydragen/backends/triton.py").read_text()
assert "no_lse = torch.empty(0, dtype=torch.float32, device=device)" in t
t = t.replace("no_lse = torch.empty(0, dtype=torch.float32, device=device)", "no_lse = torch.zeros(1 << 21, dtype=torch.float32, device=device)")
(copy / "src/hydragen/backends/triton.py").write_text(t)
sys.path[:0] = [str(copy / "src"), str(root / "reference"), str(root / "tests/bench")]
import torch
import hydragen
assert hydragen.__file__.startswith("/tmp/tl")
from contextlib import nullcontext
from try_prefix_tiles import Variant, deciding
from try_warp_tiles import WARPS, with_warp
import numpy as np

LAYERS = int(os.environ.get('TL_LAYERS', 6))
B, P, CAP = int(os.environ.get("TL_B", 256)), 2048, int(os.environ.get("TL_CAP", 128))
torch.manual_seed(0)
levels = []
for _ in range(LAYERS):
    levels.append([tuple(torch.randn(1, P, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)),
                   tuple(torch.randn(B, CAP, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))])
qs = [torch.randn(B, 1, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(LAYERS)]
flush = torch.zeros(64 << 20, device="cuda")
sink = torch.zeros((), device="cuda")
tree = hydragen.PrefixTree.from_parents([-1] + [0] * B, row_to_node=np.arange(1, B + 1))
lens = torch.full((B,), 16, dtype=torch.int32, device="cuda")

def timed(run, n=30):
    s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        run(); run()
    torch.cuda.current_stream().wait_stream(s); torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        run()
    def go(k):
        out = []
        for _ in range(k):
            sink.copy_(flush.sum())
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record(); g.replay(); b.record(); torch.cuda.synchronize()
            out.append(a.elapsed_time(b) * 1e3)
        return statistics.median(out)
    return g, go

V = lambda tile, n: Variant("", tile, True, n)
VARIANTS = [("narrow+2/2 1+2", V("narrow+2", 2), "1+2"), ("wide/2 2+2", V("wide", 2), "2+2"), ("narrow+2/2 2+2", V("narrow+2", 2), "2+2"), ("wide+1/2 1+2", V("wide+1", 2), "1+2"), ("single/1 1+2", V("single", 1), "1+2"), ("single/1 2+2", V("single", 1), "2+2"), ("wide/1 2+2", V("wide", 1), "2+2"),
            ("suffixes alone 1+2", None, "1+2"), ("suffixes alone 2+2", None, "2+2"), ("suffixes alone L", None, "32: 2+2"), ("suffixes alone L1", None, "32: 1+2")]
if len(sys.argv) > 1:
    VARIANTS = [v for v in VARIANTS if re.search(sys.argv[1], v[0])]
reference = {}
for name, variant, warp in VARIANTS:
    with (deciding(variant) if variant else nullcontext()), (with_warp(WARPS[warp]) if warp else nullcontext()):
        alone = name.startswith("suffixes")
        if alone:
            plan = hydragen.plan(hydragen.PrefixTree.from_parents([-1] * B, row_to_node=np.arange(B)), levels[0][1:], num_q_heads=32, kv_lens=[lens])
        else:
            plan = hydragen.plan(tree, levels[0], num_q_heads=32, kv_lens=[None, lens])
        outs = [None] * LAYERS
        def run():
            for i in range(LAYERS):
                outs[i] = plan.run(qs[i], levels[i][alone:])
        try:
            g, go = timed(run)
        except Exception as e:
            print(name, "failed", repr(e)[:200]); continue
    work = plan._work
    print("==", name)
    key = ("tables", torch.device("cuda", 0))
    found = [v for k, v in work.uploads.items() if k[0] == "tables"][0][1]
    buf = found.no_lse
    total = []
    for own in [int(x) for x in os.environ.get('TL_OWN', '16 48 80 112').split()]:
        lens[:] = own
        plan.update([lens] if alone else [None, lens])
        us = go(30) / LAYERS
        torch.cuda.synchronize()
        st = buf.view(torch.int64).view(-1, 8).cpu().numpy()
        pre, suf, mer = st[:1000], st[1000:20000], st[20000:]
        pre, suf, mer = (x[x[:, 1] > 0] for x in (pre, suf, mer))
        total.append(us)
        got = outs[0].float()
        if not alone and own in reference:
            err = (got - reference[own]).abs().max().item()
            if not err < 2e-2: print("   WRONG", own, err)
        elif not alone:
            reference[own] = got.clone()
        if not len(suf):continue
        t0 = min([x[:, 0].min() for x in (pre, suf) if len(x)])
        r = lambda x: f"{float(x - t0) / 1e3:.0f}"
        q = lambda x, ps=(0, .5, 1): "-".join(r(np.quantile(x, p)) for p in ps) if len(x) else ""
        e = lambda x, a, b: f"{np.median(x[:, b] - x[:, a]) / 1e3:.1f}" if len(x) else ""
        rate = np.array([((suf[:, 1] - t0) / 1e3 < t).sum() for t in range(0, 60, 5)])
        detail = f" ask {e(pre,0,3)} q {e(pre,0,4)} s {e(pre,0,5)} sums {e(pre,0,6)} st {e(pre,6,7)}" if len(pre) else ""
        print(f" {own:3}: {us:5.1f}{detail} P {q(pre[:,1])} S {q(suf[:,1])} M {q(mer[:,2], (0,))}-{q(mer[:,1], (0, 1))};", end="")
    print(f"   MEAN {sum(total) / len(total):.1f}")
    buf.zero_()
    lens[:] = 16
