"Facts that stand in two places agree; what is shipped is complete."
import re, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import requires, version
from pathlib import Path
import pytest, rkd_fastai

root = Path(__file__).parent.parent

def test_version_is_one():
    cited = re.search(r'^version: (.+)$', (root/'CITATION.cff').read_text(), re.M).group(1)
    assert rkd_fastai.__version__ == cited == version('rkd_fastai')
    assert f'## {rkd_fastai.__version__}' in (root/'CHANGELOG.md').read_text()

def test_requirements_come_from_settings():
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(root/'settings.ini')
    wanted = {re.split('[<>=;]', r)[0] for r in cfg['DEFAULT']['requirements'].split()}
    assert wanted == {re.split('[<>=;! ]', r)[0] for r in requires('rkd_fastai') if 'extra' not in r}

def test_command_is_installed():
    rkd = Path(sys.executable).parent/'rkd'
    out = subprocess.run([rkd, '--version'], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == f'rkd_fastai {rkd_fastai.__version__}' and out.stderr == ''

def test_notebooks_are_small_and_without_outputs():
    for nb in (root/'nbs').glob('*.ipynb'):
        assert nb.stat().st_size < 400_000 and '"output_type"' not in nb.read_text(encoding='utf8'), nb

@pytest.mark.parametrize('page', ['nbs/works_with.ipynb', 'tests/README.md'])
def test_tests_that_are_named_exist(page):
    "What the pages say is proved, and by which test"
    defined = {m for f in (root/'tests').glob('test_*.py') for m in re.findall(r'^def (test_\w+)', f.read_text(encoding='utf8'), re.M)}
    named = set(re.findall(r'`(test_\w+)`', (root/page).read_text(encoding='utf8')))
    assert len(named) > 10 and named <= defined, named - defined

def test_table_of_teachers_is_that_of_its_cards():
    import importlib.util, json
    spec = importlib.util.spec_from_file_location('teacher_kinds', root/'results/teacher_kinds.py')
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    found = {k: [json.loads(f.read_text()) for f in sorted((root/'results/teacher_kinds').glob(f'{k}_*.json'))] for k in module.kinds}
    cards = {k: v for k,v in found.items() if v}
    assert len(cards) >= 4 and all(len(v) >= 2 for v in cards.values())
    page = ''.join(json.loads((root/'nbs/choosing_a_teacher.ipynb').read_text(encoding='utf8'))['cells'][2]['source'])
    for row in module.table(cards).splitlines(): assert row in page
