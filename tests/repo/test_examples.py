"What the examples print is what they say they show."
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from rkd_fastai.study.config import read_study, teachers_of

def example(name):
    spec = spec_from_file_location(name, Path(__file__).parents[2]/'examples'/f'{name}.py')
    module = module_from_spec(spec); spec.loader.exec_module(module)
    return module

@pytest.mark.slow
@pytest.mark.skipif(not (find_spec('foolbox') and find_spec('pyautoattack')),
                    reason='needs the images of foolbox and the checkpoint of pyautoattack')
def test_foreign_checkpoint(capsys):
    "A plainly trained network: right on all 20 images, and on none under attack"
    res = example('foreign_checkpoint').main()
    assert res.results == dict(clean=1., pgd20=0., autoattack=0.) and res.n == 20
    assert 'all 20 images; Linf eps 8/255' in capsys.readouterr().out

@pytest.mark.parametrize('file', sorted((Path(__file__).parents[2]/'examples').glob('*.toml')), ids=lambda f: f.stem)
def test_studies_can_be_read(file):
    """Every study has a title, students, and a baseline with the compute of teacher and student, or, if it uses a
    published recipe for both, the teacher as the baseline"""
    cells,measure,title = read_study(file)
    students = [c for c in cells if c.distils]
    assert students and title != file.stem and 'autoattack' in measure['attacks']
    most = max(c.epochs + c.teacher_epoch*len(teachers_of(c)) for c in students)
    if all(c.recipe for c in cells): most = max(c.teacher_epochs for c in students)
    assert any(c.method == 'at' and c.epochs == most for c in cells)

@pytest.mark.parametrize('file', sorted((Path(__file__).parents[2]/'results').glob('*/*.toml')), ids=lambda f: f.stem)
def test_studies_behind_the_results_can_be_read(file):
    cells,_,title = read_study(file)
    assert title != file.stem and {c.method for c in cells} >= {'at','akd'} and len({c.data for c in cells}) == 1
