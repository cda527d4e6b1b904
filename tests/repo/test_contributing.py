"The walkthroughs of CONTRIBUTING.md, followed to the letter in a copy of the repository."
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

root,bin = Path(__file__).parents[2], Path(sys.executable).parent
page = (root/'CONTRIBUTING.md').read_text(encoding='utf8')
slow = pytest.mark.slow

def walkthrough(title):
    "The notebook that the section `title` makes, its cells as (language, text), and what it says to do from then on"
    section, = re.findall(rf'^## {title}\n(.*?)(?=^## |\Z)', page, re.M | re.S)
    *cells,use = re.findall(r'^```(\w+)\n(.*?)\n```$', section, re.M | re.S)
    return re.search(r'`(nbs/[\w/]+\.ipynb)`', section)[1], cells, use[1]

def write_notebook(path, cells):
    "In the format of 4.4, whose cells have no ids, as some editors still write it"
    def cell(language, text):
        both = dict(metadata={}, source=text.splitlines(True))
        if language == 'markdown': return dict(cell_type='markdown', **both)
        return dict(cell_type='code', execution_count=None, outputs=[], **both)
    kernel = dict(display_name='python3', language='python', name='python3')
    nb = dict(cells=[cell(*c) for c in cells], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=4)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf8')

class Repository:
    "A copy of what the walkthroughs need"
    def __init__(self, path):
        self.path = path
        skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'tutorials')
        for folder in ('nbs', 'rkd_fastai', 'tools'): shutil.copytree(root/folder, path/folder, ignore=skip)
        for file in ('settings.ini', 'pyproject.toml', 'README.md'): shutil.copy(root/file, path)

    def files(self):
        found = [f for f in self.path.rglob('*') if f.is_file() and '__pycache__' not in f.parts]
        return {f.relative_to(self.path).as_posix(): f.read_bytes() for f in found}

    def run(self, *cmd):
        env = os.environ | dict(PYTHONPATH=str(self.path), OMP_NUM_THREADS='1')
        res = subprocess.run(cmd, cwd=self.path, env=env, capture_output=True, text=True, timeout=300)
        assert res.returncode == 0, res.stdout[-2000:] + res.stderr[-4000:]
        return res.stdout

def export_lines():
    "What `make export` runs, a list of words each"
    recipe, = re.findall(r'^export:.*\n((?:\t.+\n)+)', (root/'Makefile').read_text(encoding='utf8'), re.M)
    lines = [l.split() for l in recipe.replace('$(BIN)/', '').splitlines()]
    assert [l[0] for l in lines].count('nbdev-export') == 1
    return lines

walks = {'Add a loss': 'callback.brier', 'Add an attack': 'attacks.mifgsm'}

@pytest.fixture(scope='module')
def repo(tmp_path_factory):
    "The copy after both walkthroughs and `make export`, with its files before"
    repo = Repository(tmp_path_factory.mktemp('walk')/'rkd_fastai')
    repo.before = repo.files()
    for title in walks:
        path,cells,_ = walkthrough(title)
        assert path not in repo.before and len(cells) >= 4
        write_notebook(repo.path/path, cells)
    for line in export_lines(): repo.run(bin/line[0], *line[1:])
    return repo

@slow
def test_nothing_but_the_notebooks_and_their_modules_changes(repo):
    after = repo.files()
    new = {walkthrough(t)[0] for t in walks} | {f'rkd_fastai/{m.replace(".", "/")}.py' for m in walks.values()}
    changed = {f for f in {*after, *repo.before} if after.get(f) != repo.before.get(f)}
    assert changed == new | {'rkd_fastai/_modidx.py'}

@slow
def test_all_is_in_step(repo): assert 'in step' in repo.run(sys.executable, 'tools/check.py')

@slow
def test_imports_still_point_down(repo):
    "No module has to be added to the layers in pyproject.toml"
    repo.run(bin/'lint-imports', '--no-cache')

@slow
def test_both_have_a_page(repo):
    "On the site, in the group of their package; the copy has none of the site's other pages, so none is asked for"
    groups = {'reference/callbacks': 'reference/callback.brier', 'reference/attacks': 'reference/attacks.mifgsm'}
    asked = f'''
import sys; sys.path.insert(0, 'tools')
import docs
grouped = {{p for _,ps in docs.groups().values() for p in ps}}
reference = {{p for p in docs.notebooks() if p.startswith('reference/')}}
print([p in docs.groups()[g][1] for g,p in {groups}.items()], reference - grouped)'''
    assert repo.run(sys.executable, '-c', asked).strip() == '[True, True] set()'

@slow
@pytest.mark.parametrize('title', walks)
def test_the_notebook_passes(title, repo): assert 'Success' in repo.run(bin/'nbdev-test', walkthrough(title)[0])

@slow
@pytest.mark.parametrize('title,callback', [('Add a loss','BrierCallback'), ('Add an attack','AdversarialTraining')])
def test_the_new_name_trains(title, callback, repo):
    "One epoch on the digits, with the loss or the attack that was added, from the copy; the callback is the last"
    use = 'import warnings; warnings.filterwarnings("ignore")\n' + walkthrough(title)[2]
    asked = '''
from rkd_fastai.callback import RobustCallback
cb, = [cb for cb in learn.cbs if isinstance(cb, RobustCallback)]
finite = all(map(np.isfinite, learn.recorder.values[-1]))
print(type(cb).__name__, type(cb.attack).__name__, len(learn.recorder.losses), rkd_fastai.__file__, finite)'''
    printed = repo.run(sys.executable, '-c', use + '\nimport rkd_fastai' + asked)
    name,attack,steps,file,finite = printed.splitlines()[-1].split()
    assert name == callback and attack == dict(BrierCallback='PGD').get(callback, 'MIFGSM') and finite == 'True'
    assert int(steps) == 1437//128 and Path(file).is_relative_to(repo.path)

def test_what_the_page_names_is_there():
    "Files, make targets and public names"
    targets = re.findall(r'^([\w-]+):', (root/'Makefile').read_text(encoding='utf8'), re.M)
    named = {t for o in re.findall(r'`make ([\w -]+)`', page) for t in o.split()}
    assert named >= {'test', 'export', 'check', 'tutorials', 'test-all'} and named <= {*targets}
    new = {walkthrough(t)[0] for t in walks}
    files = {o for o in re.findall(r'`([\w./]+/[\w./]*)`', page) if not o.startswith('x_adv')} - new - {'eps/steps'}
    assert len(files) >= 8 and all((root/f).exists() for f in files), [f for f in files if not (root/f).exists()]
