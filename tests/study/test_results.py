"Every number that is shown as ours is that of the cards beside it."
import json, re
from pathlib import Path

import pytest

from rkd_fastai.study.config import read_study
from rkd_fastai.study.report.page import views
from rkd_fastai.study.results import as_markdown, over_seeds
from rkd_fastai.study.study import Study, read_rows
from rkd_fastai.study.report.tables import gains
from rkd_fastai.text import format_points

root = Path(__file__).parents[2]
collected = sorted(f.parent for f in (root/'results').glob('*/*/study.json'))

@pytest.mark.few(3)
@pytest.mark.parametrize('folder', collected, ids=lambda f: f.name)
def test_report_is_that_of_its_cards(folder):
    "The whole study is there, and its tables are what `rkd study report` makes of the cards"
    s = Study(folder.with_suffix('.toml'), folder)
    assert (all(s.is_done(c) and (c.method == 'teacher' or (s.folder(c)/'card.json').exists()) for c in s.cells)
            and all((s.folder(t)/'card.json').exists() for t in s.teachers))
    found = views(read_rows(folder))
    assert {f.stem for f in (folder/'report').glob('*.md')} == set(found) and 'gain' in found
    for name,v in found.items():
        assert (folder/f'report/{name}.md').read_text(encoding='utf8') == as_markdown(v.table), name
    assert (read_study(folder.with_suffix('.toml'))[2]
            == json.loads((folder/'study.json').read_text(encoding='utf8'))['title'])

baseline = {'adversarial training, last epoch': dict(method='at', checkpoint='last'),
            'adversarial training, best epoch': dict(method='at', checkpoint='best')}
early = {f'AKD⁺ student, α {a:g}, teacher of epoch {e}': dict(method='akd', alpha=a, teacher_epoch=e)
         for a,e in ((.8, 40), (.8, 20), (.5, 10))}
shown = [('README.md', 'early', 'What it is worth', baseline
          | {'AKD⁺ student': dict(teacher_epoch=40), 'AKD⁺ student, teacher of epoch 20': dict(teacher_epoch=20),
             'AKD⁺ student, teacher of epoch 10, α 0.5': dict(teacher_epoch=10, alpha=.5)}),
         ('results/fashion_mnist/README.md', 'headline', 'Does a student beat',
          baseline | {'AKD⁺ student': dict(method='akd')}),
         ('results/fashion_mnist/README.md', 'early', 'Students of early-stopped teachers', baseline | early),
         ('results/fashion_mnist/README.md', 'noise', 'With a fifth of the labels wrong',
          baseline | {f'AKD⁺ student, α {a:g}': dict(method='akd', alpha=a) for a in (.8, 1.)}),
         ('results/fashion_mnist/README.md', 'grid', 'Early stopping and label mixing',
          baseline | {f'{m}⁺, α {a:g}, teacher of epoch {e}': dict(method=m.lower(), alpha=a, teacher_epoch=e)
                      for m,a,e in (('AKD', .5, 10), ('AKD', .8, 20), ('RSLAD', .8, 20), ('RSLAD', .8, 40),
                                    ('AKD', .8, 40), ('AKD', 1., 10), ('ARD', .8, 40))}),
         ('results/fashion_mnist/README.md', 'teachers', 'Kinds of teacher and ensembles',
          baseline | {'four AT teachers themselves': dict(method='teacher', teacher='4 at'),
                      'RSLAD⁺, α 0.3, ST teacher': dict(method='rslad', teacher='st'),
                      'AKD⁺, α 0.8, LAT teacher (ε 2/255)': dict(method='akd', teacher='lat', alpha=.8),
                      'AKD⁺, α 0.8, four AT teachers': dict(method='akd', teacher='4 at')}
          | {f'AKD⁺, α 0.8, {t} teacher': dict(method='akd', teacher=t.lower(), alpha=.8)
             for t in ('ST','FFGSM','AT')}
          | {f'AKD⁺, α 0.8, two ST and two AT teachers, β {b:g}': dict(method='akd', teacher='2 st, 2 at', beta=b)
             for b in (0., .5, 1.)}),
         ('results/fashion_mnist/README.md', 'sizes', 'Number of images, and a smaller network',
          {f'{n:,} images, width {w}: {k}': v | dict(n=n)
           for n,w in ((500, '1/8'), (2000, '1/8'), (1000, '1/16'))
           for k,v in (baseline | {'AKD⁺ student': dict(method='akd')}).items()}),
         ('results/fashion_mnist/README.md', 'augment', 'A wider network, and augmentation',
          {f'{w}: {k}': v | has for w,has in (('width 1/4, flips', dict(augment='flip', width=1/4)),
                                              ('width 1/8, no augmentation', dict(augment='none')),
                                              ('width 1/8, crops and flips', dict(augment='usual')))
           for k,v in (baseline | {'AKD⁺ student': dict(method='akd')}).items()}),
         ('results/fashion_mnist/README.md', 'few', '500 images with three seeds',
          baseline | {'AKD⁺ student': dict(method='akd')}),
         ('results/fashion_mnist/README.md', 'radius', 'At three times the radius', baseline | early)]

@pytest.mark.parametrize('page, study, heading, networks', shown, ids=lambda o: o if isinstance(o, str) else '')
def test_tables_written_by_hand(page, study, heading, networks):
    "What stands under a heading is the mean over the study's seeds, row by row"
    section, = [s for s in re.split(r'^##+ ', (root/page).read_text(encoding='utf8'), flags=re.M)
                if s.startswith(heading)]
    cells = over_seeds(read_rows(root/'results/fashion_mnist'/study)).assign(
        augment=lambda o: o.augment.fillna('usual'))
    assert (cells.seeds >= 3).all() and (len(networks) == len(cells) or 'The report contains all' in section)
    for start,checkpoint in networks.items():
        c, = cells[(cells[list(checkpoint)] == list(checkpoint.values())).all(axis=1)].to_dict('records')
        row, = [[o.strip(' *') for o in l.strip('|').split('|')] for l in section.splitlines()
                if l.startswith(f'| {start} |')]
        assert row[2:] == [format_points(c[k], c[f'{k}_std']) for k in ('clean','pgd20','autoattack') if k in c], start

@pytest.mark.parametrize('study', ['headline', 'early'])
def test_headline_is_measured_on_all_test_images(study):
    cells = over_seeds(read_rows(root/'results/fashion_mnist'/study))
    assert (cells.n_clean == 10_000).all() and (cells.n_pgd20 == 10_000).all() and (cells.n_autoattack == 1000).all()

short = {"README's table, 40 + 40, AutoAttack": ('early', dict(teacher_epoch=40)),
         "README's table, 10 + 40, AutoAttack": ('early', dict(teacher_epoch=10)),
         'a fifth of the labels wrong, α 1, the better of two, PGD-20': ('noise', dict(alpha=1.)),
         '14×14 pixels, PGD-20': ('teachers', dict(teacher='at', alpha=.8)),
         '14×14 pixels, width 1/4, PGD-20': ('augment', dict(width=1/4)),
         '14×14 pixels, random crops, PGD-20': ('augment', dict(augment='usual')),
         'ε 25/255, PGD-20': ('radius', dict(teacher_epoch=40))}

def test_the_table_of_gains():
    "Of the page on teachers: the reports' own figures, and bold is what is beyond its ±"
    cells = json.loads((root/'nbs/choosing_a_teacher.ipynb').read_text(encoding='utf8'))['cells']
    lines = [l for c in cells if c['cell_type'] == 'markdown' for l in ''.join(c['source']).splitlines()]
    found = [[o.strip() for o in l.strip('|').split('|')] for l in lines if '±' in l and l.startswith('|')]
    rows = {name: r[:2] for name,*r in found if name in short}
    assert rows.keys() == short.keys()
    for name,(study,checkpoint) in short.items():
        g = gains(read_rows(root/'results/fashion_mnist'/study))[0].assign(augment=lambda o: o.augment.fillna('usual'))
        one, = g[(g[list(checkpoint)] == list(checkpoint.values())).all(axis=1)].to_dict('records')
        for cell,k in zip(rows[name], ('robust','clean')):
            gain,std = one[f'{k}_gain'],one[f'{k}_gain_std']
            text = format_points(gain, std, '+')
            assert cell == (f'**{text}**' if gain > std else text), (name, k)
