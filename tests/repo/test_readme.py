"Every code block of README.md and of the pages that it leads to first runs, in order, on a small folder of images."
import json, re, shlex, subprocess
from pathlib import Path
import numpy as np, pytest
from fastai.learner import Learner
from rkd_fastai.cli.main import main

root = Path(__file__).parents[2]

def prose(page):
    "The Markdown of a page"
    text = (root/page).read_text(encoding='utf8')
    if page.endswith('.md'): return text
    return '\n\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')

def blocks(language, page='README.md'): return re.findall(rf'```{language}\n(.*?)```', prose(page), re.S)

@pytest.fixture
def one_epoch(monkeypatch):
    "Every fit lasts one epoch, whatever it is asked for"
    fit = Learner.fit
    monkeypatch.setattr(Learner, 'fit', lambda self, n_epoch, *args, **kw: fit(self, 1, *args, **kw))

@pytest.mark.filterwarnings("ignore:Your training dataloader is empty")
def test_python_blocks(one_epoch, make_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme,quick_start = blocks('python'),blocks('python', 'nbs/quick_start.ipynb')
    found = readme + quick_start
    assert len(readme) >= 1 and len(quick_start) >= 4
    space = {'path': make_images(size=64)}
    for i,block in enumerate(found):
        if 'bs=' not in block: block = block.replace('item_tfms=Resize(64)', 'item_tfms=Resize(64), bs=4')
        block = block.replace('wide_resnet(28, 10', 'wide_resnet(10, 1')
        if '1m.npz' in block: np.savez('1m.npz', image=np.zeros((9,64,64,3), np.uint8), label=np.arange(9) % 2)
        block = block.replace("'models', 10,", "'models', 1,") # of the one epoch there is
        exec(compile(block, f'block {i}', 'exec'), space)
    assert space['student'].cbs # the last block made a Learner

@pytest.mark.slow
def test_rkd_lines(tmp_path, monkeypatch, capsys):
    "The terminal session, on digits, for one epoch and without AutoAttack's minutes"
    monkeypatch.chdir(tmp_path)
    small = {'fashion_sample':'digits', '--epochs 40':'--epochs 1', 'epoch_20':'epoch_1', ',autoattack':''}
    lines = [l for b in blocks('bash', 'nbs/command_line.ipynb') for l in b.splitlines() if l.startswith('rkd ')]
    assert len(lines) == 3 # `rkd study` has a test of its own
    for line in lines:
        for a,b in small.items(): line = line.replace(a, b)
        if 'evaluate' not in line and '--epochs' not in line: line += ' --epochs 1'
        main(shlex.split(line)[1:])
    assert '100 of 360 validation images' in capsys.readouterr().out

@pytest.mark.slow
def test_the_study(tmp_path, monkeypatch, capsys):
    "The study's file, on digits, for one epoch, without AutoAttack: from the plan to the page"
    monkeypatch.chdir(tmp_path)
    block, = blocks('toml', 'nbs/command_line.ipynb')
    small = {'"fashion_sample"': '"digits"\nwidth = "1/16"\neps = "25/255"', '[1, 2, 3]': '1', '= 30': '= 1',
             '= 60': '= 2', '[0.5, 0.8, 1.0]': '[0.5, 0.8]', '[15, 30]': '1',
             ', "pgd20", "autoattack"': ', "pgd2"', 'n_autoattack = 100': 'n = 60'}
    for a,b in small.items():
        assert a in block
        block = block.replace(a, b)
    Path('my.toml').write_text(block)
    main(['study','my.toml','--dry-run'])
    assert capsys.readouterr().out.count('alpha 0.8') == 2 and not Path('studies').exists()
    main(['study','my.toml'])
    printed = capsys.readouterr().out
    assert 'Only teacher' in printed and 'without a teacher' in printed
    assert Path('studies/my/report/index.html').exists()
    main(['study','report','studies/my'])
    assert capsys.readouterr().out in printed

def test_make_lines():
    lines = [l.split('#')[0].split() for b in blocks('bash') for l in b.splitlines() if l.startswith('make ')]
    assert lines == [['make','demo'], ['make','test']]
    for line in lines: subprocess.run([*line, '-n'], cwd=root, check=True, capture_output=True)

@pytest.mark.parametrize('page', ['README.md','nbs/index.ipynb'])
def test_links_lead_somewhere(page):
    "In the notebook from its own folder, in the README from the root"
    links = [l for l in re.findall(r'\]\(([^)]+)\)', (root/page).read_text(encoding='utf8'))
             if not l.startswith('http')]
    assert len(links) > 20 and all(((root/page).parent/l.split('#')[0]).exists() for l in links), links
