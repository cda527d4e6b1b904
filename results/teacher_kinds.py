"""How a teacher is made decides what it is: clean and robust accuracy of every kind, by the command line alone.

    python results/teacher_kinds.py --data-path /path/to/fashion-mnist --out runs/teacher_kinds

Trains each kind with each seed by `rkd train`, measures it by `rkd evaluate` and prints a table. What is finished is
not done again, and what was cut off goes on.
"""
import argparse, json, subprocess, sys
from pathlib import Path
import pandas as pd
from rkd_fastai.text import format_points

kinds = {'st': 'standard (ST)', 'lat': 'adversarial, 2/255 (LAT)', 'ffgsm': 'adversarial, FFGSM',
         'at': 'adversarial, PGD-7 (AT)', 'trades': 'TRADES', 'at+': 'averaged weights, Cutout (AT+)'}

def rkd(*args): subprocess.run([Path(sys.executable).parent/'rkd', *map(str, args)], check=True)

def one(kind, seed, a):
    "The card of one teacher, trained and measured where that is not done yet"
    run,card = a.out/f'{kind}_{seed}', a.out/f'{kind}_{seed}.json'
    data = ['--data', 'fashion_mnist', *(['--data-path', a.data_path] if a.data_path else [])]
    if not (run/'model.pth').exists():
        rkd('train', *data, '--how', kind, '--n', a.n, '--epochs', a.epochs, '--eps', a.eps, '--width', a.width,
            '--seed', seed, '--keep', a.epochs, '--compile', '--bf16', '--resume', '--out', run)
    if not card.exists():
        rkd('evaluate', run, *data[2:], '--attacks', 'clean,pgd20', '--eps', a.eps, '--json', card,
            *(['--n', a.n_test] if a.n_test else []))
    return json.loads(card.read_text())

def table(cards):
    "Mean and standard deviation over the seeds, as Markdown"
    df = pd.DataFrame([dict(kind=k, **{name: r['accuracy'] for name,r in card['results'].items()})
                       for k,cs in cards.items() for card in cs])
    g = df.groupby('kind', sort=False).agg(['mean','std'])
    shown = pd.DataFrame({'teacher': [kinds[k] for k in g.index]} | {
        f'{head}, %': [format_points(mean, std) for mean,std in g[name].itertuples(index=False)]
        for name,head in (('clean','clean'), ('pgd20','PGD-20'))})
    return shown.to_markdown(index=False, colalign=['left','right','right'], disable_numparse=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data-path', help="Fashion-MNIST's folder; left out, it is found or downloaded")
    p.add_argument('--out', type=Path, default=Path('runs/teacher_kinds'))
    p.add_argument('--seeds', type=int, nargs='+', default=[1, 2])
    p.add_argument('--kinds', nargs='+', choices=list(kinds), default=['st','lat','ffgsm','at'])
    p.add_argument('--n', type=int, default=3000, help='training images')
    p.add_argument('--n-test', type=int, help='test images; left out, all 10,000')
    p.add_argument('--epochs', type=int, default=40)
    p.add_argument('--eps', default='8/255')
    p.add_argument('--width', default='1/8')
    a = p.parse_args()
    cards = {k: [] for k in a.kinds}
    for seed in a.seeds:
        for kind in a.kinds: cards[kind].append(one(kind, seed, a))
    n = next(iter(cards.values()))[0]['n']
    print(f'\n{table(cards)}\n\nFashion-MNIST, {a.n} training images, ResNet-18 width {a.width}, {a.epochs} epochs, '
          f'eps {a.eps}; mean ± standard deviation over {len(a.seeds)} seeds, on {n} test images.')

if __name__ == '__main__': main()
