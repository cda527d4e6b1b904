"""fastai and the callback against the same step in a bare loop.

    python -m bench.overhead

One Learner with `AKDCallback` trains on batches that are already there; the bare loop runs the same pieces on the same
batches. Peak memory is that of a process of its own for each: `python -m bench.overhead --only learner`.
"""
import resource
import torch
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, ProgressCallback
from rkd_fastai.attacks import PGD
from rkd_fastai.callback import AKDCallback
from rkd_fastai.learner import sgd_nesterov
from rkd_fastai.teachers import Teacher
from .attack import EPS, STEP, STEPS
from .step import ALPHA, bare_step, make, sgd
from .timing import compare, machine, parse, table

N = 6 # batches in an epoch

class Batches:
    "A loader of the same batch, `n` times: no time is spent on data"
    def __init__(self, batch, n, device): self.batch,self.n,self.device,self.bs,self.drop_last = batch,n,torch.device(device),len(batch[0]),True
    def __len__(self): return self.n
    def __iter__(self): return (self.batch for _ in range(self.n))
    def to(self, device): return self
    dataset = ()

def main(args=None):
    a = parse(__doc__, args, only=dict(choices=['learner','loop'], help='run this one alone, and print the peak memory of the process'))
    a.teachers = 1
    attack = PGD(EPS, steps=STEPS, step_size=STEP)
    def bare():
        for _ in range(N): bare_step(model, teacher, opt, x, y, attack)
    def with_fastai():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
    model, teachers, x, y = make(a)
    opt, teacher = sgd(model), Teacher(teachers)
    student, teachers, x, y = make(a)
    dls = DataLoaders(Batches((x, y), N, a.device), Batches((x, y), 0, a.device))
    dls.c = 10
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), opt_func=sgd_nesterov)
    cb = AKDCallback(teachers[0], alpha=ALPHA, attack=attack)
    cb.check = lambda dls: None # there are no images to look at but the batch
    learn.add_cb(cb)
    contestants = {'bare loop': bare, 'fastai + AKDCallback': with_fastai}
    print(f'AKD⁺ with PGD-{STEPS}, ResNet-18 width {a.width:g}, {a.size}×{a.size}, batch {a.bs}, {N} steps\n{machine(a.device)}')
    if a.only:
        for _ in range(3): contestants['bare loop' if a.only == 'loop' else 'fastai + AKDCallback']()
        peak = torch.cuda.max_memory_allocated() if a.device.startswith('cuda') else 1024*resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f'peak memory: {peak/2**20:.0f} MiB')
    else: table(compare(contestants, a.device, a.runs, warmup=1), 'bare loop', a.bs*N)

if __name__ == '__main__': main()
