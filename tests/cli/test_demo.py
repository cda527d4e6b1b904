"The demonstration, from the command line to its files."
import json, subprocess, sys
from pathlib import Path
import pytest

@pytest.fixture(scope='module')
def quick(tmp_path_factory):
    "Output and folder of `rkd demo --quick`"
    out = tmp_path_factory.mktemp('demo')
    rkd = Path(sys.executable).parent/'rkd'
    run = subprocess.run([rkd, 'demo', '--quick', '--out', out], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return run, out

def test_table_is_what_was_measured(quick):
    run,out = quick
    models = json.loads((out/'results.json').read_text())['models']
    table = (out/'results.md').read_text()
    assert set(models) == {'standard','teacher','baseline','student'}
    for name,cards in models.items():
        row = next(l for l in table.splitlines() if l.startswith(f'| {name}'))
        assert row in run.stdout
        for card in cards:
            for res in card['results'].values(): assert f"{res['accuracy']:.1%}" in row
    assert models['student'][0]['n'] == 360 and models['student'][1]['n'] == 20

def test_robust_training_shows(quick):
    "Plain training falls to PGD-20, the three robust models stand far better"
    models = json.loads((quick[1]/'results.json').read_text())['models']
    pgd = {k: cards[0]['results']['pgd20']['accuracy'] for k,cards in models.items()}
    assert min(pgd['teacher'], pgd['baseline'], pgd['student']) > pgd['standard'] + .1
    for cards in models.values(): # AutoAttack is at least as strong as PGD is on average; clean is above both
        assert cards[0]['results']['clean']['accuracy'] > cards[0]['results']['pgd20']['accuracy']

def test_files_and_silence(quick):
    run,out = quick
    assert {'results.md','results.json','curves.png','adversarial.png','models'} == {p.name for p in out.iterdir()}
    assert len(list((out/'models').glob('epoch_*.pth'))) == 8
    assert run.stderr == '' and '\r' not in run.stdout
