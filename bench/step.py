"""One training step of AKD⁺ with PGD-7: ours, the loop of the published scripts, and the floor of 18 bare forward
passes.

    python -m bench.step
    python -m bench.step --teachers 4

A step is 18 forward passes' worth of work: 7 × (forward + input gradient) + the teacher's forward + forward and
backward of training, the backward counted as two. On a GPU 'bf16' trains in bfloat16 too, as `learn.to_bf16()` does.
"""
import copy, statistics
from contextlib import nullcontext
import torch, torch.nn.functional as F
from rkd_fastai.attacks.pgd import PGD
from rkd_fastai.core import checked_later
from rkd_fastai.speed import compiled, faster
from rkd_fastai.losses import akd_loss
from rkd_fastai.teachers import Teacher
from .attack import EPS, STEP, STEPS, batch, reference_pgd, network_with_statistics
from .timing import compare, forward_flops, matmul_rate, parse, peak_mib, ratio, setting, table, ways

ALPHA = .8

def sgd(model): return torch.optim.SGD(model.parameters(), .1, momentum=.9, nesterov=True, weight_decay=5e-4)

def reference_step(model, teachers, opt, x, y):
    "As the RSLAD authors' script goes about it, with the loss of Eq. 7: eager float32, nothing shared, nothing folded"
    for t in teachers: t.eval()
    x_adv = reference_pgd(model, x, y)
    model.train()
    with torch.no_grad(): probs = sum(F.softmax(t(x_adv), dim=1) for t in teachers)/len(teachers)
    opt.zero_grad()
    target = ALPHA*probs + (1-ALPHA)*F.one_hot(y, probs.shape[1])
    loss = -(target*F.log_softmax(model(x_adv), dim=1)).sum(1).mean()
    loss.backward()
    opt.step()

def bare_step(model, teacher, opt, x, y, attack, compile=False, bf16=False, cuda_graph=False):
    "Our pieces in a bare loop: what `AKDCallback` does in a batch"
    model.train()
    with faster(compile, bf16, cuda_graph), checked_later() as checks:
        x_adv = attack(model, x, y)
        probs = teacher.probs(x_adv)
    with (compiled(model) if compile else nullcontext(),
          torch.autocast('cuda', torch.bfloat16, enabled=bf16 and x.is_cuda)):
        loss = akd_loss(model(x_adv), probs, y, ALPHA)
    loss.backward()
    for check in checks: check()
    opt.step()
    opt.zero_grad()

def our_steps(model, teachers, x, y):
    "Our step in every way of running it, each with a student of its own"
    attack, steps = PGD(EPS, steps=STEPS, step_size=STEP), {}
    for name,how in ways(str(x.device)).items():
        fmt = torch.channels_last # as in a fit
        student = copy.deepcopy(model).to(memory_format=fmt)
        args = student, Teacher(teachers), sgd(student), x, y, attack
        steps[name] = lambda args=args, how=how: bare_step(*args, **how)
    return steps

def main(args=None):
    a = parse(__doc__, args, teachers=dict(type=int, default=1, help='in the ensemble'))
    torch.manual_seed(0)
    model, teachers = network_with_statistics(a), [network_with_statistics(a) for _ in range(a.teachers)]
    x, y = batch(a)
    n = 2*STEPS + a.teachers + 3
    ours = our_steps(model, teachers, x, y)
    reference, opt = copy.deepcopy(model), sgd(model)
    def floor():
        model.eval()
        with torch.no_grad():
            for _ in range(n): model(x)
    opt = sgd(reference)
    contestants = ours | {'plain loop': lambda: reference_step(reference, teachers, opt, x, y),
                          f'floor, {n} forward passes': floor}
    one = our_steps(model, teachers[:1], x, y) if a.teachers > 1 else {}
    contestants |= {f'{k}, one teacher': fn for k,fn in one.items()}
    print(f'AKD⁺ with PGD-{STEPS}, {a.teachers} teacher(s), {setting(a)}')
    times = compare(contestants, a.device, a.runs)
    table({k: ts for k,ts in times.items() if 'one teacher' not in k}, list(ways(a.device)), a.bs)
    for k in one: print(f'{a.teachers} teachers ÷ one, {k}: {ratio(times[k], times[f"{k}, one teacher"])}')
    flops, rate = n*forward_flops(model, x), matmul_rate(a.device)
    print(f'{flops/1e9:.1f} GFLOP a step; a bfloat16 matrix product runs at {rate/1e12:.2f} TFLOP/s; share of it: '
          + ', '.join(f'{k} {flops/statistics.median(times[k])/rate:.1%}' for k in (*ways(a.device), 'plain loop')))
    if a.device.startswith('cuda'):
        print('peak memory, MiB: ' + ', '.join(f'{k} {peak_mib(contestants[k], a.device):.0f}'
                                               for k in (*ways(a.device), 'plain loop')))

if __name__ == '__main__': main()
