"Facts that stand in two places agree; what is shipped is complete."
import json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import requires, version
from pathlib import Path
from runpy import run_path
import pytest, rkd_fastai

root = Path(__file__).parents[2]

def test_version_is_one():
    cited = re.search(r'^version: (.+)$', (root/'CITATION.cff').read_text(), re.M).group(1)
    bibtex = re.search(r'version = \{(.+)\}', (root/'README.md').read_text(encoding='utf8')).group(1)
    assert rkd_fastai.__version__ == cited == bibtex == version('rkd_fastai')
    assert f'## {rkd_fastai.__version__}' in (root/'CHANGELOG.md').read_text()

def test_requirements_come_from_settings():
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(root/'settings.ini')
    wanted = {re.split('[<>=;]', r)[0] for r in cfg['DEFAULT']['requirements'].split()}
    assert wanted == {re.split('[<>=;! ]', r)[0] for r in requires('rkd_fastai') if 'extra' not in r}

@pytest.mark.parametrize('command', [[Path(sys.executable).parent/'rkd'], [sys.executable, '-m', 'rkd_fastai'],
                                     [sys.executable, '-m', 'rkd_fastai.cli']], ids=['rkd', 'package', 'module'])
def test_command_is_installed(command):
    out = subprocess.run([*command, '--version'], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == f'rkd_fastai {rkd_fastai.__version__}' and out.stderr == ''

notebooks = sorted(f for f in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)
tutorials = [f for f in notebooks if f.parent.name == 'tutorials']

def cells(nb): return json.loads(nb.read_text(encoding='utf8'))['cells']

def test_notebooks_are_small_and_without_outputs():
    "But for the tutorials, which show theirs"
    for nb in notebooks:
        assert nb.stat().st_size < 400_000 and (nb in tutorials) == any(c.get('outputs') for c in cells(nb)), nb

def test_tutorials_are_numbered_and_export_nothing():
    assert [f.name[0] for f in tutorials] == [str(i+1) for i in range(len(tutorials))] and len(tutorials) >= 6
    for nb in tutorials:
        assert not any(re.search(r'^#\| ?(default_exp|export)', ''.join(c['source']), re.M) for c in cells(nb)), nb

@pytest.mark.parametrize('nb', tutorials, ids=lambda f: f.stem)
def test_stored_outputs_make_no_noise(nb):
    """No errors or warnings, paths of a machine, addresses, progress bars or timings: what changes from run to run
    without meaning anything"""
    outputs = [o for c in cells(nb) for o in c.get('outputs', [])]
    assert not [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr']
    texts = [''.join(o.get('text', '')) + ''.join(''.join(v) for k,v in o.get('data', {}).items()
                                                  if k.startswith('text/')) for o in outputs]
    noise = re.compile(r'/(?:home|root|tmp|work|usr|Users|private)/|site-packages|\.venv| at '
                       r'0x[0-9a-f]+|[█\r]|\b\d+:\d\d\b|\bseconds\b')
    assert not [m for t in texts for m in [noise.search(t)] if m]
    assert all(c.get('execution_count') is None for c in cells(nb)) # as `nbdev-clean` leaves them

def words(nb):
    "What the cells of a notebook show as text, each number as #: those differ from machine to machine"
    outputs = [o for c in cells(nb) for o in c.get('outputs', [])]
    texts = [''.join(o.get('text') or o.get('data', {}).get('text/plain', '')) for o in outputs]
    return [re.sub(r'\s+', ' ', re.sub(r'[-−]?\d[\d.,]*(e-?\d+)?', '#', t)).strip() for t in texts]

@pytest.mark.slow
@pytest.mark.parametrize('nb', tutorials, ids=lambda f: f.stem)
def test_stored_outputs_are_what_the_code_says_now(nb, tmp_path):
    "Else `make tutorials` has to store them anew"
    for f in ('settings.ini', 'pyproject.toml', nb.relative_to(root)):
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/f, tmp_path/f)
    run = [Path(sys.executable).parent/'nbdev-test', nb.relative_to(root), '--save', '--n-workers', '0']
    subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert words(tmp_path/nb.relative_to(root)) == words(nb)

@pytest.mark.parametrize('nb', tutorials, ids=lambda f: f.stem)
def test_tutorials_assert_and_describe_their_figures(nb):
    "A caption in prose, in italics, follows each cell that shows a figure"
    found = cells(nb)
    assert sum(len(re.findall(r'^\s*(?:for .*: ?)?(?:assert |test_\w+\()', ''.join(c['source']), re.M))
               for c in found) >= 4
    for c,after in zip(found, found[1:]):
        if any('image/png' in o.get('data', {}) for o in c.get('outputs', [])):
            assert after['cell_type'] == 'markdown' and re.match(r'\*[^*]',
                                                                 ''.join(after['source'])), ''.join(c['source'])

@pytest.mark.parametrize('page', ['nbs/works_with.ipynb', 'tests/README.md'])
def test_tests_that_are_named_exist(page):
    "What the pages say is proved, and by which test"
    defined = {m for f in (root/'tests').rglob('test_*.py')
               for m in re.findall(r'^def (test_\w+)', f.read_text(encoding='utf8'), re.M)}
    named = set(re.findall(r'`(test_\w+)`', (root/page).read_text(encoding='utf8')))
    assert len(named) > 10 and named <= defined, named - defined

def test_table_of_teachers_is_that_of_its_cards():
    import importlib.util
    spec = importlib.util.spec_from_file_location('teacher_kinds', root/'results/teacher_kinds.py')
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    found = {k: [json.loads(f.read_text()) for f in sorted((root/'results/teacher_kinds').glob(f'{k}_*.json'))]
             for k in module.kinds}
    cards = {k: v for k,v in found.items() if v}
    assert len(cards) >= 4 and all(len(v) >= 2 for v in cards.values())
    page = ''.join(json.loads((root/'nbs/choosing_a_teacher.ipynb').read_text(encoding='utf8'))['cells'][2]['source'])
    for row in module.table(cards).splitlines(): assert row in page

def test_every_operator_has_its_mutants():
    "What `tools/mutate.py` lists is there to be changed"
    mutate = run_path(str(root/'tools/mutate.py'))
    for module,names,tests in mutate['groups'].values():
        assert len(list(mutate['mutants']((root/'rkd_fastai'/module).read_text(encoding='utf8'), names))) >= 8
        assert (root/tests[0]).is_file()

def test_security_names_tests_that_are_there():
    "Each word of a `-k` in SECURITY.md is part of a test's name in that file"
    named = re.findall(r'`((?:\w+/)?test_\w+\.py)(?: -k (?:"([^"]+)"|(\w+)))?`',
                       (root/'SECURITY.md').read_text(encoding='utf8'))
    assert len(named) > 10
    for file,several,one in named:
        tests = re.findall(r'^def (test_\w+)', (root/'tests'/file).read_text(encoding='utf8'), re.M)
        for word in filter(None, (several or one).split(' or ')):
            assert any(word in t for t in tests), f'{file} -k {word}'

def test_few_cases_are_quick(monkeypatch):
    "Of nine cases that are marked `few(3)`, the first, the middle and the last one are not slow"
    from conftest import pytest_collection_modifyitems
    class Item:
        path,originalname = Path('test_a.py'),'test_a'
        def __init__(self, i): self.nodeid,self.marks = f'test_a[{i}]',[pytest.mark.few(3).mark]
        def get_closest_marker(self, name): return next((m for m in self.marks if m.name == name), None)
        def add_marker(self, mark): self.marks.append(mark.mark)
    items = [Item(i) for i in (4, 0, 8, 3, 1, 7, 2, 6, 5)] # the order of collection does not matter
    pytest_collection_modifyitems(items)
    assert sorted(o.nodeid for o in items if not o.get_closest_marker('slow')) == ['test_a[0]','test_a[4]','test_a[8]']

def test_folders_of_an_older_study_are_renamed(tmp_path, capsys):
    "The script gives a cell of version 0.0, named after all its settings, the folder and settings of today"
    today = next((root/'results/fashion_mnist/early/cells').glob('akd_at@10_*'))
    files = {f: json.loads((today/f).read_text(encoding='utf8')) for f in ('card.json','results.json')}
    from rkd_fastai.study.config import cell_from
    settings = vars(cell_from(files['card.json']['cell']))
    old = {'stop' if k == 'teacher_epoch' else k: v for k,v in settings.items()}
    old |= {k: v.removeprefix('cifar_') for k,v in old.items() if k in ('arch','teacher_arch')}
    folder = tmp_path/'cells/akd_at@10_a0.5_s1_00000000'
    folder.mkdir(parents=True)
    for f,d in files.items(): (folder/f).write_text(json.dumps(d | dict(cell=old)))
    (tmp_path/'study.json').write_text('{}')
    run_path(str(root/'tools/rename_cells.py'))['main'](tmp_path)
    assert capsys.readouterr().out == f'{folder.name} -> {today.name}\n' and not folder.exists()
    for f,d in files.items(): assert json.loads((tmp_path/'cells'/today.name/f).read_text()) == d
