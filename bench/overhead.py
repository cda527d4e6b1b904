"""fastai and the callback against the same step in a bare loop.

    python -m bench.overhead
    python -m bench.overhead --how 'ours, both'

One Learner with `AKDCallback` trains on batches that are already there; the bare loop runs the same pieces on the same
batches. Peak memory is that of a process of its own for each: `python -m bench.overhead --only learner`.
"""
import copy, resource
import torch
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner
from rkd_fastai.attacks.pgd import PGD
from rkd_fastai.callback.distill import AKDCallback
from rkd_fastai.schedules import sgd_nesterov
from rkd_fastai.teachers import Teacher
from .attack import EPS, STEP, STEPS, batch, network_with_statistics
from .step import ALPHA, bare_step, sgd
from .timing import compare, parse, peak_mib, setting, table, ways

N = 6 # batches in an epoch

class Batches:
    "A loader of the same batch, `n` times: no time is spent on data"
    def __init__(self, batch, n, device):
        self.batch,self.n,self.device,self.bs,self.drop_last = batch,n,torch.device(device),len(batch[0]),True
    def __len__(self): return self.n
    def __iter__(self): return (self.batch for _ in range(self.n))
    def to(self, device): return self
    dataset = ()

def main(args=None):
    a = parse(__doc__, args, only=dict(choices=['learner','loop'],
                                       help='run this one alone, and print the peak memory of the process'),
              how=dict(choices=list(ways('cuda')), default='ours', help='float32 as it is, compiled, in bfloat16, ...'))
    torch.manual_seed(0)
    attack, how, (x, y) = PGD(EPS, steps=STEPS, step_size=STEP), ways('cuda')[a.how], batch(a)
    net, teacher = network_with_statistics(a), Teacher(network_with_statistics(a))
    model = copy.deepcopy(net)
    model.to(memory_format=torch.channels_last) # as in a fit
    opt = sgd(model)
    def bare():
        for _ in range(N): bare_step(model, teacher, opt, x, y, attack, **how)
    dls = DataLoaders(Batches((x, y), N, a.device), Batches((x, y), 0, a.device))
    dls.c = 10
    learn = Learner(dls, copy.deepcopy(net), loss_func=CrossEntropyLossFlat(), opt_func=sgd_nesterov)
    cb = AKDCallback(teacher, alpha=ALPHA, attack=attack, **how)
    cb.check = lambda dls: None # there are no images to look at but the batch
    learn.add_cb(cb)
    if how.get('bf16') and x.is_cuda: learn.to_bf16()
    def with_fastai():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
    contestants = {'bare loop': bare, 'fastai + AKDCallback': with_fastai}
    print(f'AKD⁺ with PGD-{STEPS}, {a.how}, {N} steps, {setting(a)}')
    if a.only:
        fn = contestants['bare loop' if a.only == 'loop' else 'fastai + AKDCallback']
        for _ in range(2): fn()
        if x.is_cuda: print(f'peak memory: {peak_mib(fn, a.device):.0f} MiB'); return
        fn()
        print(f'peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024:.0f} MiB')
    else: table(compare(contestants, a.device, a.runs), ['bare loop'], a.bs*N)

if __name__ == '__main__': main()
