"""Studies: the same table however often they are killed and whoever shares the folder; every cell is what `rkd
train` and `rkd distill` would have made."""
import json, os, pickle, random, runpy, subprocess, sys, time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch

from rkd_fastai.evaluation.robustness import measure_robustness
from rkd_fastai.data.images import pixel_data
from rkd_fastai.study.cells import cell_dls
from rkd_fastai.study.config import Cell, make_cell, read_study, recipe_of, teachers_of
from rkd_fastai.data.loaders import with_label_noise
from rkd_fastai.study.run import load_run, make_dls, make_net, train_seconds
from rkd_fastai.study.study import Runner, Study, plan_text, read_rows, study_report as report_text

settings = dict(data='digits', n=200, width='1/16', eps='25/255', epochs=2, teacher_epochs=3, bs=50)
measured = dict(attacks=['clean','pgd2'], n=50)

def spec(*grids, measure={}, **more): return settings | more | dict(measure=measured | measure, grid=list(grids))

def weights(study, c): return torch.load(study.folder(c)/'model.pth')
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)
def table(df): return df.sort_values('id').reset_index(drop=True)

grids = (dict(method='at', epochs=4), dict(method=['akd','rslad'], teacher_epoch=[1,3]),
         dict(method='teacher', teacher='st, at', beta=[.25, 1.]))

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A small study that ran through undisturbed"
    s = Study(spec(*grids), tmp_path_factory.mktemp('study')/'s')
    s.run()
    return s

def test_cells_are_the_product_of_their_lists():
    cells,_,_ = read_study(spec(
        dict(method='akd', alpha=[.5,1.], teacher_epoch=[1,2,3]), dict(method=['at','st']), seed=[1,2]))
    assert len(cells) == 2*(2*3 + 2) and len({c.id for c in cells}) == len(cells)
    assert [c.seed for c in cells] == sorted(c.seed for c in cells)

def test_the_same_cell_is_there_once():
    assert len(read_study(spec(dict(method='akd', alpha=[.8, .8]), dict(method='akd'),
                               dict(method='akd', teacher='at', T=1.)))[0]) == 1

@pytest.mark.parametrize('one, other', [
    (dict(teacher='1 at'), dict(teacher='at')), (dict(teacher='at, at'), dict(teacher='2  at')),
    (dict(teacher='st,02 at'), dict(teacher='st, at, at')), (dict(attack='pgd7'), dict()),
    (dict(method='ard', attack='pgd7'), dict(method='ard')), (dict(eps='1'), dict(eps=1.)),
    (dict(arch='wrn-10-1', width=.5), dict(arch='wrn-10-1'))])
def test_the_same_cell_has_one_name(one, other):
    a,b = (make_cell(**settings | dict(method='akd') | o) for o in (one, other))
    assert a == b and a.id == b.id

def test_clean_accuracy_is_always_measured():
    assert read_study(spec(dict(method='at'), measure=dict(attacks=['pgd2','pgd2'])))[1]['attacks'] == ['clean','pgd2']

def test_settings_at_the_top_are_for_whom_they_mean_something():
    cells = read_study(spec(dict(method=['at','ckd','rslad']), alpha=.3, lam=.4))[0]
    assert [(c.alpha, c.lam) for c in cells] == [(None, None), (None, .4), (.3, .4)]

@pytest.mark.parametrize('wrong, says', [
    (dict(metod='akd'), "did you mean 'method'"), (dict(method='akdd'), "did you mean 'akd'"),
    (dict(method='akd', teacher='att'), "did you mean 'at'"),
    (dict(method='akd', beta=.5), '`beta` needs'), (dict(method='akd', teacher_epoch=4), 'beyond the teacher'),
    (dict(method='akd', schedule='exp'), "method 'akd' has no setting `schedule`"),
    (dict(method='akd', alpha='much'), '`alpha` must be a number'),
    (dict(method='akd', alpha=[.5, 1.5]), '`alpha` must be at most 1'),
    (dict(method='akd', eps=8), 'write 8/255'), (dict(method='akd', eps=0), '`eps` must be more than 0'),
    (dict(method='akd', eps='8/0'), '`eps` must be a number or a fraction'),
    (dict(method='akd', data=3), '`data` must be a text'), (dict(method='akd', lr=0), '`lr` must be more than 0'),
    (dict(method='akd', compile=1), '`compile` must be true or false'),
    (dict(method='akd', n=2.5), '`n` must be a whole number'), (dict(method='akd', n=True), '`n` must be a whole'),
    (dict(method='akd', n='3'), '`n` must be a whole number'),
    (dict(method='akd', lr=float('nan')), '`lr` must be finite'),
    (dict(method='akd', noise=-.1), '`noise` must be at least 0'),
    (dict(method='at', schedule='cosine'), 'unknown `schedule`'),
    (dict(method='akd', attack='pgd'), 'unknown `attack`'), (dict(method='ckd', alpha=.5), 'has no setting `alpha`'),
    (dict(method='trades', attack='pgd10'), 'has no setting `attack`'),
    (dict(method='akd', teacher='0 at, st'), 'name kinds with their numbers'),
    (dict(method='akd', member=1), "'member'"), (dict(method='at', augment='flipp'), "did you mean 'flip'"),
    (dict(alpha=.5), 'has no `method`'), (dict(method='akd', epochs=0), '`epochs` must be at least 1'),
    (dict(method='akd', teacher_epoch=0), '`teacher_epoch` must be at least 1'),
    (dict(method='akd', teacher_epochs=0), '`teacher_epochs` must be at least 1'),
    (dict(method='akd', alpha=[]), '`alpha` is an empty list'),
    (dict(method='at', title='Below the grid'), "unknown setting of [[grid]] 'title'"),
    (dict(method='at+', schedule='exp'), 'has no setting `schedule`')])
def test_mistakes_are_named_before_anything_is_made(wrong, says, tmp_path):
    with pytest.raises(ValueError) as e: Study(spec(wrong), tmp_path/'s')
    assert says in str(e.value) and 'pydantic' not in str(e.value), e.value
    assert not (tmp_path/'s').exists()

@pytest.mark.parametrize('wrong,says', [
    (dict(grid=dict(method='at')), '[[grid]], with two brackets'), (dict(grid=[]), 'two brackets'),
    (dict(grid=[3]), 'two brackets'), (dict(grid=3), 'two brackets'), (dict(measure=3), '[measure] above'),
    (dict(title=3), '`title` is a text'), (dict(eps=dict(a=1)), '`eps` must be a number'),
    (dict(epoch=3), "unknown setting 'epoch': did you mean 'epochs'")])
def test_a_file_of_another_form(wrong, says, tmp_path):
    with pytest.raises(ValueError) as e: Study(dict(grid=[dict(method='at')]) | wrong, tmp_path/'s')
    assert says in str(e.value), e.value

@pytest.mark.parametrize('measure, says', [
    (dict(attack=['pgd20']), "setting of .measure. 'attack': did you mean 'attacks'"),
    (dict(attacks=['pgd']), 'unknown attack'),
    (dict(attacks=[]), 'a non-empty list'), (dict(attacks='clean'), 'a list of names'),
    (dict(n=0), '`n` of .measure. must be at least 1'), (dict(n=-5), '`n` of'), (dict(n=2.5), '`n` of'),
    (dict(n_autoattack=0), '`n_autoattack` of'), (dict(seed='a'), '`seed` of'), (dict(seed=-1), '`seed` of'),
    (dict(bs=0), '`bs` of'),
    (dict(fast=1), '`fast` of .measure. must be true or false')])
def test_mistakes_in_what_is_measured(measure, says, tmp_path):
    with pytest.raises(ValueError, match=says): Study(spec(dict(method='at'), measure=measure), tmp_path/'s')

def test_a_cell_can_be_copied_and_looked_up():
    "It is pickled, hashed and replaced like any dataclass, and a copy is checked again"
    c = make_cell(method='akd', eps='25/255')
    assert pickle.loads(pickle.dumps(c)) == c and {c: 1}[replace(c)] == 1
    with pytest.raises(ValueError): replace(c, alpha=2.)

def test_file_that_is_no_toml(tmp_path):
    for content in (b'method = [', b'method = "\xff"'):
        (tmp_path/'s.toml').write_bytes(content)
        with pytest.raises(ValueError, match='is not a TOML file'): Study(tmp_path/'s.toml')

def test_a_folder_of_images_is_taken_from_the_files_folder(make_images, tmp_path, monkeypatch, capsys):
    """From wherever the study is run, planned, reported on and evaluated; a cell's id is that of the setting as it
    was written"""
    from rkd_fastai.cli.main import main
    images = make_images()
    (tmp_path/'my.toml').write_text('data = "images"\nsize = 32\nepochs = 1\nwidth = "1/16"\n'
                                    '[measure]\nattacks = ["clean", "pgd1"]\n[[grid]]\nmethod = "st"\n')
    (tmp_path/'elsewhere').mkdir(); monkeypatch.chdir(tmp_path/'elsewhere')
    for command in (['--dry-run'], ['--out', 'out']): main(['study', '../my.toml', *command])
    cell, = Path('out/cells').iterdir()
    assert cell.name == make_cell(method='st', data='images', size=32, epochs=1, width='1/16').id
    card = json.loads((cell/'card.json').read_text())
    assert (card['data'], card['cell']['data']) == (str(images), 'images')
    monkeypatch.chdir(tmp_path)
    main(['study', 'report', 'elsewhere/out'])
    main(['evaluate', str(Path('elsewhere')/cell), '--attacks', 'clean'])
    capsys.readouterr()
    Study('my.toml', 'elsewhere/out').run() # nothing is done again
    assert 'epochs' not in capsys.readouterr().out
    Path('my.toml').write_text(Path('my.toml').read_text().replace('images', 'pictures'))
    for command in (['--dry-run'], ['--out', 'other']):
        with pytest.raises(SystemExit) as e: main(['study', 'my.toml', *command])
        assert ("`data` of my.toml is 'pictures', but there is no folder " + str(tmp_path/'pictures') in e.value.code
                and '--data' not in e.value.code)
    assert not Path('other').exists()

def test_data_are_looked_at_before_anything_is_trained(tmp_path):
    s = Study(spec(dict(method='at'), dict(method='akd', n=5000)), tmp_path/'s')
    with pytest.raises(ValueError, match='`n` must be from 1'): s.run()
    assert not (tmp_path/'s').exists()

def test_teachers_are_shared(finished):
    assert {(t.method, t.seed) for t in finished.teachers} == {('at',0), ('st',0)}
    assert finished.teachers[teachers_of(finished.cells[1])[0]] == {1, 3}

def test_teachers_stop_where_the_cell_says(finished):
    x,_ = pixel_data(make_dls('digits'))
    for c in [c for c in finished.cells if c.distils]:
        teacher = load_run(finished.folder(teachers_of(c)[0])/f'epoch_{c.teacher_epoch}.pth')[0]
        torch.testing.assert_close(Runner(finished).teacher(c).probs(x[:5]), teacher.probs(x[:5]))
    assert {c.teacher_epoch for c in finished.cells if c.distils} == {1, 3}

def test_members_differ_in_their_start_and_not_in_their_data(tmp_path):
    first,second = teachers_of(make_cell(**settings, method='akd', teacher='2 at', seed=1))
    a,b = cell_dls(first),cell_dls(second)
    assert a.train_ds.idxs == b.train_ds.idxs
    starts = [next(recipe_of(c).learner(cell_dls(c)).model.parameters()) for c in (first, second, first)]
    assert not torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])

def test_students_are_those_of_their_settings(finished):
    "A cell's card says how it was trained, and its numbers are those of its weights"
    df = finished.to_df()
    x,y = pixel_data(make_dls('digits'), n=50)
    for c in [c for c in finished.cells if c.distils]:
        net,card = load_run(finished.folder(c))
        r = measure_robustness(net, x, y, ['clean','pgd2'], c.eps, fast=True)
        row = df[df.id == c.id].iloc[0]
        assert (row.clean, row.pgd2, row.n_clean, row.compute) == (r.clean, r.pgd2, 50, 2 + c.teacher_epoch)
        assert (card['method'], card['alpha'], card['attack']) == (c.method, .8, repr(recipe_of(c).attack))

def test_ensemble_is_measured_by_its_weights(finished):
    "`beta` is the weight of the last kind: with all of it the ensemble is that teacher"
    st,at = [c for c in finished.cells if c.method == 'teacher']
    x,y = pixel_data(make_dls('digits'), n=50)
    nets = {t.method: load_run(finished.folder(t)/'epoch_3.pth')[0] for t in teachers_of(st)}
    separate = measure_robustness(nets['at'], x, y, ['clean','pgd2'], at.eps)
    assert finished.results(at)['last']['clean']['accuracy'] == separate.clean
    mixed = Runner(finished).teacher(st)
    probs = .75*nets['st'].probs(x[:5]) + .25*nets['at'].probs(x[:5])
    torch.testing.assert_close(mixed.probs(x[:5]), probs)

def test_best_epoch_and_last(finished):
    c = finished.cells[0]
    res = finished.results(c)
    kept = sorted(p.name for p in finished.folder(c).glob('epoch_*.pth'))
    assert kept == [f"epoch_{res['best_epoch']}.pth"]
    assert set(finished.to_df().query('method == "at"').checkpoint) == {'last','best'}

def test_nothing_is_done_twice(finished, monkeypatch):
    monkeypatch.setattr(Runner, 'train', lambda *_: pytest.fail('trains again'))
    monkeypatch.setattr('rkd_fastai.study.study.measure_robustness', lambda *_, **__: pytest.fail('measures again'))
    before = table(finished.to_df())
    again = Study(spec(*grids), finished.out)
    pd.testing.assert_frame_equal(table(again.run()), before)
    assert again.seconds_left() == {}

def test_another_attack_is_all_that_is_added(tmp_path, monkeypatch):
    s = Study(spec(dict(method='at')), tmp_path/'s')
    first = s.run()
    monkeypatch.setattr(Runner, 'train', lambda *_: pytest.fail('trains again'))
    more = Study(spec(dict(method='at'), measure=dict(attacks=['clean','pgd2','fgsm'])), tmp_path/'s').run()
    assert list(more.clean) == list(first.clean) and more.fgsm.notna().all()
    other = Study(spec(dict(method='at'), measure=dict(n=20)), tmp_path/'s').run()
    assert set(other.n_clean) == {20}

def test_earlier_epoch_of_a_teacher_is_trained_for_again(tmp_path):
    "Checkpoints that nobody asked for are not kept: who asks later gets the same teacher"
    s = Study(spec(dict(method='akd', teacher_epoch=3)), tmp_path/'s')
    s.run()
    t = next(iter(s.teachers)); before = weights(s, t)
    later = Study(spec(dict(method='akd', teacher_epoch=[2,3])), tmp_path/'s')
    later.run()
    assert (s.folder(t)/'epoch_2.pth').exists() and same(before, weights(later, t))

@pytest.mark.parametrize('half', ['', '{"last": {"cl', '[]', '{"last": {}}',
                                  '{"last": {"clean": {"accuracy": 1.0, "n": 50, "asked": [50, 0]}}}'])
def test_half_written_results_are_not_trusted(half, finished, tmp_path):
    import shutil
    shutil.copytree(finished.out, tmp_path/'s')
    s = Study(spec(*grids), tmp_path/'s')
    c = s.cells[1]
    (s.folder(c)/'results.json').write_text(half)
    assert not s.is_done(c)
    pd.testing.assert_frame_equal(table(s.run()), table(finished.to_df()))

def test_a_cell_that_diverges_is_marked_and_the_grid_goes_on(tmp_path):
    s = Study(spec(dict(method='akd', lr=[1e30, .1])), tmp_path/'s')
    df = s.run()
    assert (df.diverged.notna().tolist() == [True, False] and df.diverged[0].startswith('epoch 1')
            and 0 <= df.clean[1] <= 1)
    assert s.is_done(s.cells[0]) and not (s.folder(s.cells[0])/'resume.pth').exists()

def test_students_of_a_teacher_that_diverged(tmp_path, monkeypatch):
    train = Runner.train
    def diverging(self, c, label):
        if c.schedule == 'teacher': raise FloatingPointError('the loss is NaN')
        return train(self, c, label)
    monkeypatch.setattr(Runner, 'train', diverging)
    df = Study(spec(dict(method='akd')), tmp_path/'s').run()
    assert len(df) == 1 and report_text(tmp_path/'s').endswith('yet; training runs that diverged: 1')
    df = Study(spec(dict(method='akd'), dict(method='at')), tmp_path/'s').run()
    assert 'its teacher' in df.diverged[0] and 'the loss is NaN' in df.diverged[0] and pd.isna(df.diverged[1])
    text = report_text(tmp_path/'s')
    assert ('which were trained without a teacher' in text
            and 'No student is compared: all training runs of students (1) diverged.' in text)

def test_other_version(finished, tmp_path):
    (tmp_path/'s').mkdir(); (tmp_path/'s/study.json').write_text(json.dumps(dict(rkd_fastai='99.0')))
    with pytest.raises(ValueError, match='made by rkd_fastai 99.0, this is'): Study(spec(*grids), tmp_path/'s')
    with pytest.raises(ValueError, match='made by rkd_fastai 99.0, this is'): report_text(tmp_path/'s')

@pytest.mark.slow
def test_parts_of_a_job_array(finished, tmp_path):
    "Any split of the cells ends in the same table"
    for part in ('2/3','3/3','1/3'): Study(spec(*grids), tmp_path/'s').run(cell=part)
    pd.testing.assert_frame_equal(table(read_rows(tmp_path/'s')), table(finished.to_df()))

def test_label_noise_and_subset_are_the_same_for_teacher_and_student():
    c = make_cell(**settings, method='akd', noise=.2, seed=3)
    plain = cell_dls(make_cell(**settings, method='akd', seed=3))
    ours,theirs,clean,wanted = ([int(y) for _,y in dls.train_ds]
                                for dls in (cell_dls(c), cell_dls(teachers_of(c)[0]), plain,
                                            with_label_noise(plain, .2, seed=3)))
    assert ours == theirs == wanted and sum(a != b for a,b in zip(ours, clean)) == 40

def test_plan_trains_nothing(tmp_path):
    s = Study(spec(*grids), tmp_path/'s')
    plan = s.plan()
    assert len(plan) == len(s.cells) and (plan.seconds > 0).all() and not (tmp_path/'s').exists()
    lines = plan_text(plan).splitlines()
    assert (len(lines) == len(plan)+1 and all(l.startswith(c) for l,c in zip(lines, plan.cell))
            and f'{len(plan)} cells' in lines[-1])

def test_a_long_plan_is_shown_whole():
    plan = pd.DataFrame(dict(cell=[f'akd at@40 seed {i} width 1/16 epochs 40 teacher_width 1/16' for i in range(80)],
                             state=['done'] + ['']*79, seconds=[0] + [60]*79))
    lines = plan_text(plan).splitlines()
    assert (len(lines) == 81 and lines[0].endswith('done') and 'seed 41 ' in lines[41] and lines[41].endswith('1:00')
            and 'about 1:19:00' in lines[-1])
    assert 'nothing left to do' in plan_text(plan.assign(seconds=0))

def test_a_run_that_was_begun_for_fewer_checkpoints(tmp_path, monkeypatch):
    "Killed after two epochs of three, then asked for the first one, too: that one is trained again"
    def killed(after):
        def stop(self, *_):
            if self.epoch + 1 == after: raise KeyboardInterrupt
        return stop
    first,then = (Study(spec(dict(method='teacher', teacher_epoch=teacher_epoch)), tmp_path/'s')
                  for teacher_epoch in (3, [1, 3]))
    with monkeypatch.context() as m:
        m.setattr('rkd_fastai.callback.monitor.NonFinite.after_epoch', killed(3), raising=False)
        with pytest.raises(KeyboardInterrupt): first.run()
    assert not list(tmp_path.glob('s/teachers/*/model.pth'))
    assert len(then.run()) == 2 and all(list(tmp_path.glob(f's/teachers/*/epoch_{k}.pth')) for k in (1, 3))

def test_the_best_epoch_is_that_of_all_epochs(tmp_path):
    "Where a run kept too few checkpoints, because it was not asked for the best, it is done again"
    Study(spec(dict(method='at'), measure=dict(best=False)), tmp_path/'s').run()
    s = Study(spec(dict(method='at')), tmp_path/'s')
    assert not s.is_trained(s.cells[0])
    folder = s.folder(s.cells[0])
    (folder/'epoch_2.json').write_text(json.dumps(dict(robust_accuracy=1.))) # half of them will not do
    assert not s.is_trained(s.cells[0])
    assert set(s.run().checkpoint) == {'last','best'}

def test_a_slow_autoattack_is_not_the_fast_one(finished):
    c = finished.cells[0]
    res = json.loads((finished.folder(c)/'results.json').read_text())
    s = Study(spec(*grids, measure=dict(fast=False)), finished.out)
    assert not s.missing(c) # PGD is what it is
    res['last']['autoattack'] = res['last']['pgd2'] | dict(fast=True)
    s.measure['attacks'] = ['clean','autoattack']
    s.measure['best'] = False
    s.results = lambda c: res
    assert s.missing(c) == {('last', 50): ['autoattack']}
    s.measure['fast'] = True
    assert not s.missing(c)

def test_more_parts_than_cells(tmp_path):
    assert len(Study(spec(dict(method='st', epochs=1)), tmp_path/'s').run('2/2')) == 0
    assert 'nothing has been measured' in report_text(tmp_path/'s')

def test_a_report_of_what_is_not_finished(tmp_path):
    "A study without students, or in its first epoch, has few tables: that is no error"
    s = Study(spec(dict(method='at')), tmp_path/'s')
    s.run()
    text = report_text(s.out)
    assert ('which were trained without a teacher' in text and 'No student is compared: none has been measured.' in text
            and 'all tables and figures' in text)
    other = tmp_path/'s/cells/another'
    other.mkdir(); (other/'history.csv').write_text('')
    report_text(s.out)

def test_radius_of_teachers_is_in_the_rows(finished):
    rows = finished.to_df()
    assert (rows[rows.method == 'akd'].teacher_eps.round(6).eq(round(25/255, 6)).all()
            and rows[rows.method == 'teacher'].teacher_eps.isna().all())

_child = '''
import sys, json, warnings
warnings.simplefilter('ignore')
import torch; torch.set_num_threads(1)
from rkd_fastai.study.study import Study
Study(json.loads(sys.argv[1]), sys.argv[2]).run(wait=.2)
'''

def start(out, *gs, **more):
    env = os.environ | dict(OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-c', _child, json.dumps(spec(*gs, **more)), str(out)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True)

def test_two_processes_share_a_folder(finished, tmp_path):
    both = [start(tmp_path/'s', *grids) for _ in range(2)]
    printed = [p.communicate(timeout=300)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], printed
    pd.testing.assert_frame_equal(table(read_rows(tmp_path/'s')), table(finished.to_df()))
    trained = sum(text.count('2 epochs,') for text in printed) # the last line of each student's training
    assert trained == sum(c.distils for c in finished.cells), printed

@pytest.mark.slow
def test_processes(finished, tmp_path, capfd):
    "Two at a time end in the same table, and none is left behind"
    df = Study(spec(*grids), tmp_path/'s').run(processes=2, wait=.2)
    pd.testing.assert_frame_equal(table(df), table(finished.to_df()))
    assert (tmp_path/'s'/'process_2.log').exists() and torch.get_num_threads() == 1
    assert not subprocess.run(['pgrep','-f',str(tmp_path)], capture_output=True).stdout
    with pytest.raises(ValueError, match='`processes`'): Study(spec(*grids), tmp_path/'s').run(processes=0)

@pytest.mark.slow
def test_killed_at_random_moments(finished, tmp_path):
    rng,kills,begun = random.Random(0),0,tmp_path/'s/study.json'
    while True:
        begun.unlink(missing_ok=True)
        p = start(tmp_path/'s', *grids)
        while not begun.exists() and p.poll() is None: time.sleep(.02)
        try: p.communicate(timeout=rng.random()*(2 + kills)) # later and later, or nothing would ever be finished
        except subprocess.TimeoutExpired: p.kill(); p.communicate(); kills += 1
        if p.returncode == 0: break
        assert kills < 60
    assert kills >= 3
    pd.testing.assert_frame_equal(table(read_rows(tmp_path/'s')), table(finished.to_df()))
    s = Study(spec(*grids), tmp_path/'s')
    for c in [c for c in s.cells if c.method != 'teacher'] + list(s.teachers):
        assert same(weights(s, c), weights(finished, c))

# --- tools/collect.py ---

_toml = """
title = "Collected"
data = "digits"
n = 200
width = "1/16"
eps = "25/255"
epochs = 2
teacher_epochs = 3
bs = 50
[measure]
attacks = ["clean", "pgd2"]
n = 50
[[grid]]
method = "akd"
teacher_epoch = [1, 3]
"""

def test_collected_is_the_study_without_weights(finished, tmp_path):
    root = Path(__file__).parents[2]
    collect = runpy.run_path(str(root/'tools/collect.py'))['collect']
    (tmp_path/'mine.toml').write_text(_toml)
    out = collect(tmp_path/'mine.toml', finished.out)
    assert out == tmp_path/'mine' and json.loads((out/'study.json').read_text())['title'] == 'Collected'
    s = Study(tmp_path/'mine.toml', out)
    assert ({f.name for f in out.rglob('*') if f.is_file()} == {'study.json','card.json','history.csv','results.json'}
            and len(s.cells) == 2)
    assert all((s.folder(c)/'card.json').exists() for c in [*s.cells, *s.teachers])
    columns,theirs = ['id','teacher_epoch','clean','pgd2','n_clean','compute'],finished.to_df()
    pd.testing.assert_frame_equal(table(s.to_df())[columns],
                                  table(theirs[theirs.id.isin([c.id for c in s.cells])])[columns], check_dtype=False)
    assert ('2 of 2 cells' in str(pytest.raises(SystemExit, collect, tmp_path/'mine.toml', tmp_path/'nowhere').value)
            and (out/'study.json').exists())

def test_a_gpu_is_waited_for(monkeypatch):
    "It works on after the call that gave it the work has returned, and the time would be that of the call"
    from rkd_fastai.study import cells
    order = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: order.append('waited'))
    assert cells._timed(lambda: order.append('ran'), 1, torch.device('cuda')) >= 0 and order == ['ran','waited']*2
    order.clear()
    cells._timed(lambda: order.append('ran'), 1, torch.device('cpu'))
    assert order == ['ran']*2

def test_a_learning_curve_that_was_damaged(finished, tmp_path):
    "Costs the report its time, not its tables"
    import shutil
    folder = Path(shutil.copytree(finished.out, tmp_path/'s'))
    one, other = sorted(folder.glob('cells/*/history.csv'))[:2]
    want = train_seconds(one.parent)
    cut = one.read_text().splitlines()[-1].rpartition(':')[0] + ':' # in the time
    one.write_text(one.read_text() + cut); other.write_text('epoch,trai')
    assert (train_seconds(one.parent), train_seconds(other.parent)) == (want, 0) and want > 0
    assert 'Only teacher' in report_text(folder)

def test_studies_that_share_a_folder_say_it_of_all_data(make_images, tmp_path):
    "That the best epoch was chosen on images it is measured on, of whichever data the folder has"
    images = make_images(20, 12)
    Study(spec(dict(method='at', epochs=1)), tmp_path/'s').run()
    Study(spec(dict(method='at', epochs=1), data=str(images), n=30, bs=10, size=8, measure=dict(n=8)),
          tmp_path/'s').run()
    printed = report_text(tmp_path/'s') and (tmp_path/'s/report/index.html').read_text()
    assert f"{images}, digits: there is no test split" in printed

def test_a_cell_keeps_its_name():
    "Folders of finished cells are found by these names: a change of them orphans what has been measured"
    assert make_cell(method='at', seed=2, n=500).id == 'at_s2_7e759173'
    assert make_cell(method='akd', teacher_epoch=20, alpha='1/2').id == 'akd_at@20_a0.5_s0_f61bc110'

@pytest.mark.parametrize('old, new, says', [
    (dict(stop=1), dict(teacher_epoch=1), '`stop` is now called `teacher_epoch`'),
    (dict(arch='resnet18'), dict(arch='cifar_resnet18'), '`arch` `resnet18` is now called `cifar_resnet18`'),
    (dict(teacher_arch='resnet18'), dict(teacher_arch='cifar_resnet18'), '`teacher_arch` `resnet18` is now'),
    (dict(arch=['resnet18', 'wrn-10-1']), dict(arch=['cifar_resnet18', 'wrn-10-1']), '`resnet18` is now called')])
def test_old_names_of_settings_are_read(old, new, says, capsys):
    "at the top of the file and in a grid, each with one line that names the new one"
    for where in (lambda o: spec(dict(method='akd'), **o), lambda o: spec(dict(method='akd') | o)):
        want = read_study(where(new))[0]
        assert capsys.readouterr().out == ''
        assert read_study(where(old))[0] == want
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 1 and says in printed[0]
    with pytest.raises(ValueError, match='`stop` and `teacher_epoch` are the same setting'):
        read_study(spec(dict(method='akd', stop=1, teacher_epoch=1)))

def test_cells_of_an_older_version_get_their_new_names(tmp_path, monkeypatch):
    sys.path.insert(0, str(Path(__file__).parents[2]/'tools'))
    import rename_cells
    old = ({f.name: getattr(Cell(method='akd'), f.name) for f in fields(Cell)}
           | dict(teacher='at', stop=20, teacher_epochs=40, arch='resnet18', teacher_arch='resnet18', alpha=.5))
    del old['teacher_epoch']
    folder = tmp_path/'s/cells/akd_at@20_a0.5_s0_00000000'
    folder.mkdir(parents=True)
    (tmp_path/'s/study.json').write_text('{}')
    clean = dict(accuracy=.5, n=4, asked=[4, 0])
    (folder/'results.json').write_text(json.dumps(dict(cell=old, last=dict(clean=clean))))
    rename_cells.main(tmp_path/'s')
    row = read_rows(tmp_path/'s').iloc[0]
    assert (row.method, row.teacher_epoch, row.arch, row.alpha, row.clean) == ('akd', 20, 'cifar_resnet18', .5, .5)
    rename_cells.main(tmp_path/'s') # a second time changes nothing
    assert len(read_rows(tmp_path/'s')) == 1

def test_n_valid_images_are_attacked_after_each_epoch(tmp_path):
    "The best epoch is chosen on them; 200, the number before the setting existed, leaves the names of cells unchanged"
    study = Study(settings | dict(method='at', epochs=1, n_valid=37, measure=dict(attacks=['clean'], n=10)), tmp_path)
    study.run()
    robust = pd.read_csv(study.folder(study.cells[0])/'history.csv')['robust_accuracy'] * 37
    assert abs(robust - robust.round()).max() < 1e-3 and robust.max() > 0
    assert make_cell(method='at', n_valid=200).id == make_cell(method='at').id != make_cell(method='at', n_valid=37).id

def test_recipes_and_synthetic_images(tmp_path):
    "A cell is trained as its recipe trains by itself; a path in a study's file is relative to the file"
    dls = make_dls('digits', bs=1)
    x,y = (t[:40] for t in dls.train.items())
    np.savez(tmp_path/'syn.npz', image=x[:,0].numpy(), label=y.numpy())
    (tmp_path/'s.toml').write_text('data = "digits"\nn = 100\nwidth = "1/16"\neps = "25/255"\nbs = 25\nepochs = 1\n'
                                   'recipe = "rebuffi_at_plus"\nsynthetic = "syn.npz"\nteacher_epochs = 1\n'
                                   '[measure]\nattacks = ["clean"]\nn = 10\nbest = false\n[[grid]]\nmethod = "at"\n'
                                   '[[grid]]\nmethod = "akd"\nteacher_recipe = "wang_at_plus"\n')
    study = Study(tmp_path/'s.toml', tmp_path/'out')
    study.run()
    at,akd = study.cells
    recipe,dls = recipe_of(at),cell_dls(at)
    assert (recipe.ema, recipe.synthetic, recipe.attack.eps, recipe.attack.steps) == (.995, .7, 25/255, 10)
    learn = recipe.learner(dls, make_net('cifar_resnet18', 1/16, 1, 10), synthetic=tmp_path/'syn.npz')
    with learn.no_bar(), learn.no_logging(): recipe.fit(learn, 1)
    assert same(learn.model.state_dict(), weights(study, at))
    teacher, = study.teachers
    assert recipe_of(akd).method == 'akd' and recipe_of(akd).ema == .995 and recipe_of(teacher).cutout == 0
    assert json.loads((study.folder(akd)/'card.json').read_text())['source'] == recipe.source
    df = study.to_df()
    assert df.recipe.tolist() == ['rebuffi_at_plus']*2 and df.teacher_recipe.tolist()[1:] == ['wang_at_plus']
    (tmp_path/'syn.npz').unlink()
    with pytest.raises(ValueError, match='`synthetic` is .* no file'): Study(tmp_path/'s.toml', tmp_path/'new').run()
