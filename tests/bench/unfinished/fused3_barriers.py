"""Barriers of fused3_sm90.py in random order: is there a deadlock, does a consumer ever read another block than it wants?"""
import random
class Bar:
    def __init__(s,c): s.c=s.left=c; s.phase=0
    def arrive(s):
        s.left-=1
        if s.left==0: s.phase+=1; s.left=s.c
    def ready(s,parity): return (s.phase&1)!=parity
def ring(n,c): return [Bar(1) for _ in range(n)],[Bar(c) for _ in range(n)],[None]*n
def run(tasks,KS,VS,OK,OV,LEAD,seed):
    K,V=ring(KS,2),ring(VS,2); oK=[ring(OK,1) for _ in range(2)]; oV=[ring(OV,1) for _ in range(2)]
    def wait_full(r,at):
        f,e,s=r
        while not f[at%len(f)].ready((at//len(f))&1): yield
    def fill(r,at,tag):
        f,e,s=r
        while not e[at%len(f)].ready(((at//len(f))&1)^1): yield
        s[at%len(f)]=tag; yield
        f[at%len(f)].arrive(); yield
    def use(r,at,tag):
        yield from wait_full(r,at); assert r[2][at%len(r[0])]==tag,(r[2],at,tag)
    def free(r,at): r[1][at%len(r[0])].arrive(); yield
    def shared():
        d=0
        for t,(sh,own) in enumerate(tasks):
            yield from fill(K,d,(t,0))
            for j in range(1,sh):
                yield from fill(K,d+j,(t,j)); yield from fill(V,d+j-1,(t,j-1))
            yield from fill(V,d+sh-1,(t,sh-1)); d+=sh
    def owner(w):
        at=0
        for t,(sh,own) in enumerate(tasks):
            for j in range(own[w]):
                yield from fill(oK[w],at,(t,j)); yield from fill(oV[w],at,(t,j)); at+=1
    def consumer(w):
        d=od=0
        for t,(sh,owns) in enumerate(tasks):
            own=owns[w]
            yield from use(K,d,(t,0)); yield from free(K,d)
            lead=min(sh,LEAD); turns=min(own,sh-lead)
            def step(at):
                yield from use(K,at,(t,at-d)); yield from use(V,at-1,(t,at-1-d))
            def after(at):
                yield from free(K,at); yield from free(V,at-1)
            for at in range(d+1,d+lead): yield from step(at); yield from after(at)
            for at in range(d+lead,d+lead+turns):
                oa=od+at-d-lead
                yield from step(at); yield from use(oK[w],oa,(t,oa-od)); yield from after(at)
                yield from use(oV[w],oa,(t,oa-od)); yield from free(oK[w],oa); yield from free(oV[w],oa)
            for at in range(d+lead+turns,d+sh): yield from step(at); yield from after(at)
            d+=sh
            yield from use(V,d-1,(t,sh-1)); yield from free(V,d-1)
            for oa in range(od+turns,od+own):
                yield from use(oK[w],oa,(t,oa-od)); yield from use(oV[w],oa,(t,oa-od)); yield from free(oK[w],oa); yield from free(oV[w],oa)
            od+=own
    rnd=random.Random(seed); act={"p":shared(),"o0":owner(0),"o1":owner(1),"c0":consumer(0),"c1":consumer(1)}
    idle=0
    bars=[b for r in (K,V,*oK,*oV) for b in r[0]+r[1]]
    while act:
        n=rnd.choice(list(act)); st=[(b.phase,b.left) for b in bars]
        try: next(act[n])
        except StopIteration: del act[n]; idle=0; continue
        idle=idle+1 if st==[(b.phase,b.left) for b in bars] else 0
        if idle>400: return "DEADLOCK",list(act)
    return "ok"
bad=0
for s in range(400):
    rnd=random.Random(s)
    tasks=[(rnd.randrange(1,9),(rnd.randrange(0,12),rnd.randrange(0,12))) for _ in range(rnd.randrange(1,4))]
    a=(rnd.randrange(1,4),rnd.randrange(1,4),rnd.randrange(1,3),rnd.randrange(1,3),rnd.randrange(1,4))
    r=run(tasks,*a,seed=s)
    if r!="ok": bad+=1; print(a,tasks,r)
print("bad",bad)
