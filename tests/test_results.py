"Every number that is shown as ours is that of the cards beside it."
import json, re
from pathlib import Path

import pytest

from rkd_fastai.grid import read_study
from rkd_fastai.report import views
from rkd_fastai.rows import as_markdown, over_seeds, points
from rkd_fastai.study import Study, read_rows

root = Path(__file__).parent.parent
collected = sorted(f.parent for f in (root/'results').glob('*/*/study.json'))

@pytest.mark.parametrize('folder', collected, ids=lambda f: f.name)
def test_report_is_that_of_its_cards(folder):
    "The whole study is there, and its tables are what `rkd study report` makes of the cards"
    s = Study(folder.with_suffix('.toml'), folder)
    assert all(s.is_done(c) and (s.folder(c)/'card.json').exists() for c in s.cells) and all((s.folder(t)/'card.json').exists() for t in s.teachers)
    found = views(read_rows(folder))
    assert {f.stem for f in (folder/'report').glob('*.md')} == set(found) and 'gain' in found
    for name,v in found.items(): assert (folder/f'report/{name}.md').read_text(encoding='utf8') == as_markdown(v.table), name
    assert read_study(folder.with_suffix('.toml'))[2] in (folder/'report/index.html').read_text(encoding='utf8')

def _shown(page, start):
    "The numbers of the page's row that begins so"
    row, = [l for l in page.splitlines() if l.startswith(f'| {start}')]
    return [c.strip(' *') for c in row.strip('|').split('|')[2:]]

@pytest.mark.parametrize('page', ['README.md', 'results/fashion_mnist/README.md'])
def test_headline(page):
    text,cells = (root/page).read_text(encoding='utf8'),over_seeds(read_rows(root/'results/fashion_mnist/headline'))
    assert (cells.seeds >= 3).all()
    for start,method,which in (('adversarial training, last epoch','at','last'), ('the same, best epoch','at','best'), ('AKD⁺ student','akd','last')):
        c, = cells[(cells.method == method) & (cells.which == which)].to_dict('records')
        assert _shown(text, start) == [points(c[k], c[f'{k}_std']) for k in ('clean','pgd20','autoattack')], start
    assert (cells.n_clean == 10_000).all() and (cells.n_pgd20 == 10_000).all() and (cells.n_autoattack == 1000).all()
