"The demonstration, from the command line to its files."
import contextlib, io, json, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import pytest
from rkd_fastai.cli import demo
from rkd_fastai.cli.main import main

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Output, folder and settings of the demonstration with hardly any training"
    setup = demo._setups['quick']._replace(teacher=2, teacher_epoch=1, student=1, n_auto=4, n_curve=20)
    out,texts = tmp_path_factory.mktemp('demo'),[io.StringIO(), io.StringIO()]
    with pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(texts[0]), contextlib.redirect_stderr(texts[1]):
        m.setitem(demo._setups, 'quick', setup)
        main(['demo', '--quick', '--out', str(out)])
    stdout,stderr = (t.getvalue() for t in texts)
    return SimpleNamespace(stdout=stdout, stderr=stderr), out, setup

@pytest.fixture(scope='module')
def quick(tmp_path_factory):
    "Output, folder and settings of `rkd demo --quick`"
    out = tmp_path_factory.mktemp('demo')
    rkd = Path(sys.executable).parent/'rkd'
    run = subprocess.run([rkd, 'demo', '--quick', '--out', out], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return run, out, demo._setups['quick']

both = pytest.mark.parametrize('name', ['tiny', pytest.param('quick', marks=pytest.mark.slow)])

@both
def test_table_is_what_was_measured(name, request):
    run,out,setup = request.getfixturevalue(name)
    models = json.loads((out/'results.json').read_text())['models']
    table = (out/'results.md').read_text()
    assert set(models) == {'standard','teacher','baseline','student'}
    for name,cards in models.items():
        row = next(l for l in table.splitlines() if l.startswith(f'| {name}'))
        assert row in run.stdout
        for card in cards:
            for res in card['results'].values(): assert f"{res['accuracy']:.1%}" in row
    assert models['student'][0]['n'] == 360 and models['student'][1]['n'] == setup.n_auto

@pytest.mark.slow
def test_robust_training_shows(quick):
    "The three robust models withstand PGD-20 far better than the one that is trained plainly"
    models = json.loads((quick[1]/'results.json').read_text())['models']
    pgd = {k: cards[0]['results']['pgd20']['accuracy'] for k,cards in models.items()}
    assert min(pgd['teacher'], pgd['baseline'], pgd['student']) > pgd['standard'] + .1
    for cards in models.values(): # AutoAttack is at least as strong as PGD is on average; clean is above both
        assert cards[0]['results']['clean']['accuracy'] > cards[0]['results']['pgd20']['accuracy']

@both
def test_files_and_silence(name, request):
    run,out,setup = request.getfixturevalue(name)
    assert {'results.md','results.json','curves.png','adversarial.png','models'} == {p.name for p in out.iterdir()}
    assert len(list((out/'models').glob('epoch_*.pth'))) == setup.teacher
    assert run.stderr == '' and '\r' not in run.stdout
