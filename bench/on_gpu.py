"""Ten minutes of a GPU: the tests, the step in its variants, a profile, and the benchmarks, one stage after the other.

    python -m bench.on_gpu --out FOLDER           # about nine minutes
    python -m bench.on_gpu --out FOLDER --small   # the same on the CPU with small shapes: does the script run?
    python -m bench.on_gpu --out FOLDER --only variants profile

Each stage is a process of its own with a time limit, and writes `FOLDER/STAGE.txt` as it goes, so that a stage that
fails or takes too long costs only its own figures. `FOLDER/summary.txt` says how each one ended.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path

# name: seconds that it may take, on a GPU
LIMITS = dict(tests=120, variants=150, profile=50, step=50, attack=40, overhead=25, memory=60, autoattack=60)

WAYS = dict(eager={}, graph=dict(cuda_graph=True), compiled=dict(compile=True),
            both=dict(compile=True, cuda_graph=True))
# way, bfloat16, channels-last weights, cuDNN searches for the fastest algorithm: first what is expected to be fast
VARIANTS = [*((w, True, True, False) for w in WAYS), *((w, True, True, True) for w in WAYS),
            ('eager', True, False, False), ('graph', True, False, False), ('eager', False, False, False),
            ('eager', False, True, False), ('graph', False, True, False), ('compiled', False, True, False)]

def small(a): return ['--device', 'cpu', '--width', '.0625', '--size', '8', '--bs', '16'] if a.small else []

def shapes(a, *args):
    from .timing import parse
    return parse('', [*small(a), *map(str, args)])

def tests(a):
    "The tests that are marked `cuda`"
    args = ['--collect-only'] if a.small else ['-x']
    sys.exit(subprocess.call([sys.executable, '-m', 'pytest', '-m', 'cuda', '-q', *args, 'tests/test_gpu.py']))

def variants(a):
    "A step with one change at a time: format, precision, how it is launched, and whether cuDNN searches"
    import copy, torch
    from rkd_fastai.attacks.pgd import PGD
    from rkd_fastai.teachers import Teacher
    from .attack import EPS, STEP, STEPS, batch, network_with_statistics
    from .step import bare_step, reference_step, sgd
    from .timing import seconds
    s = shapes(a)
    torch.manual_seed(0)
    net, t_net, (x, y) = network_with_statistics(s), network_with_statistics(s), batch(s)
    def milliseconds(fn, n=2 if a.small else 12):
        for _ in range(4): fn() # compiling and recording
        return statistics.median(seconds(fn, s.device) for _ in range(n))*1e3
    found, started = [], time.time()
    student = copy.deepcopy(net)
    opt = sgd(student)
    plain = milliseconds(lambda: reference_step(student, [t_net], opt, x, y))
    print(json.dumps(dict(way='plain loop', ms=plain)), flush=True)
    for way,bf16,last,search in VARIANTS[:6 if a.small else None]:
        if time.time() - started > a.seconds: print('no time is left'); break
        torch.backends.cudnn.benchmark = search
        student = copy.deepcopy(net).to(memory_format=torch.channels_last if last else torch.contiguous_format)
        args = student, Teacher(t_net), sgd(student), x, y, PGD(EPS, steps=STEPS, step_size=STEP)
        row = dict(way=way, bf16=bf16, channels_last=last, cudnn_searches=search)
        try: row['ms'] = milliseconds(lambda: bare_step(*args, bf16=bf16, **WAYS[way]))
        except Exception as e: row['error'] = f'{type(e).__name__}: {str(e)[:200]}'
        else: row['plain loop ÷ this'] = plain/row['ms']
        found.append(row)
        print(json.dumps(row, ensure_ascii=False), flush=True)
    best = min((r for r in found if 'ms' in r), key=lambda r: r['ms'])
    (a.out/'best.json').write_text(json.dumps(best))

def profile(a):
    "Ten kernels of the best variant, and the time of the host against that of the device"
    import torch
    from torch.profiler import ProfilerActivity, profile
    from rkd_fastai.attacks.pgd import PGD
    from rkd_fastai.teachers import Teacher
    from .attack import EPS, STEP, STEPS, batch, network_with_statistics
    from .step import bare_step, sgd
    best = a.out/'best.json'
    best = json.loads(best.read_text()) if best.exists() else dict(way='eager', bf16=True, channels_last=True)
    print('variant:', best)
    s = shapes(a)
    student = network_with_statistics(s)
    if best['channels_last']: student.to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = best.get('cudnn_searches', False)
    args = student, Teacher(network_with_statistics(s)), sgd(student), *batch(s), PGD(EPS, steps=STEPS, step_size=STEP)
    how = dict(bf16=best['bf16']) | WAYS[best['way']]
    for _ in range(5): bare_step(*args, **how)
    on_gpu = s.device.startswith('cuda')
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as p:
        for _ in range(3): bare_step(*args, **how)
        if on_gpu: torch.cuda.synchronize()
    by = 'self_cuda_time_total' if on_gpu else 'self_cpu_time_total'
    print(p.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=70))

def memory(a):
    "Memory after 300 steps and at the end"
    import torch
    from rkd_fastai.attacks.pgd import PGD
    from rkd_fastai.teachers import Teacher
    from .attack import batch, network_with_statistics
    from .step import bare_step, sgd
    s, n = shapes(a), 30 if a.small else 2000
    student = network_with_statistics(s)
    args = student, Teacher(network_with_statistics(s)), sgd(student), *batch(s), PGD(steps=2)
    for i in range(1, n+1):
        bare_step(*args, compile=not a.small, bf16=True, cuda_graph=True)
        if i in (n*3//20, n):
            mib = torch.cuda.memory_allocated()/2**20 if s.device.startswith('cuda') else float('nan')
            print(f'step {i}: {mib:.1f} MiB', flush=True)

def run_bench(module, *args):
    def stage(a):
        from importlib import import_module
        import_module(f'bench.{module}').main([*small(a), '--runs', '1' if a.small else '5', *args])
    stage.__doc__ = f'`bench.{module}`'
    return stage

def autoattack(a):
    "`bench.autoattack`, with convolutions in TF32 as PyTorch sets them"
    import torch
    from . import autoattack as bench
    if a.small: return print('left out with --small, because it trains on images of 28×28')
    print(f'convolutions in TF32: {torch.backends.cudnn.allow_tf32}')
    bench.main(['--n', '64', '--runs', '1', '--epochs', '4'])

STAGES = dict(tests=tests, variants=variants, profile=profile, step=run_bench('step'), attack=run_bench('attack'),
              overhead=run_bench('overhead', '--how', 'ours, all'), memory=memory, autoattack=autoattack)

def run_stage(a, name):
    "Run the stage in a process of its own, and return in a line how it ended"
    started,log = time.time(),a.out/f'{name}.txt'
    command = [sys.executable, '-m', 'bench.on_gpu', '--stage', name, '--out', str(a.out)] + ['--small']*a.small
    with log.open('w') as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, start_new_session=True)
        try: code = process.wait(LIMITS[name])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            code = f'stopped after {LIMITS[name]} s'
        except BaseException: os.killpg(process.pid, 9); raise
    return f"{name:<12}{'ok' if code == 0 else code!s:<22}{time.time() - started:6.0f} s   {log.name}"

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder for the results')
    p.add_argument('--small', action='store_true', help='small shapes on the CPU')
    p.add_argument('--only', nargs='+', choices=list(STAGES), default=list(STAGES))
    p.add_argument('--stage', choices=list(STAGES), help=argparse.SUPPRESS)
    a = p.parse_args(args)
    a.out.mkdir(parents=True, exist_ok=True)
    if a.stage:
        a.seconds = LIMITS[a.stage] - 20 # it ends by itself before it is stopped
        return STAGES[a.stage](a)
    with (a.out/'summary.txt').open('w') as f:
        for name in a.only:
            line = run_stage(a, name)
            print(line, flush=True)
            print(line, file=f, flush=True)

if __name__ == '__main__': main()
