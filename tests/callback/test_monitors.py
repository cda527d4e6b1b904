"""What watches a fit: called once an epoch of training and at no other time, and what `RobustOverfitting` says and
puts back."""
import copy, json
from functools import partial

import pytest, torch, torch.nn as nn
from fastai.vision.all import (Callback, CancelEpochException, CancelFitException, CancelTrainException,
                               CancelValidException, Metric, SaveModelCallback, accuracy, load_learner)

from rkd_fastai.all import *
from rkd_fastai.checkpoint import read_card, saved_epochs
from rkd_fastai.data.images import pixel_data
from rkd_fastai.callback.core import EachEpoch
from rkd_fastai.callback.monitor import RobustOverfitting

def weights(model): return {k: v.detach().clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

class Scripted(Metric):
    "The values that a test wants an epoch to have"
    name = 'robust_accuracy'
    def __init__(self, values): self.values,self.epoch = list(values),-1
    def reset(self): pass
    def accumulate(self, learn): self.epoch = learn.epoch
    @property
    def value(self): return self.values[self.epoch]
class Keep(EachEpoch):
    "The weights that each epoch was validated with"
    order = 50
    def __init__(self): self.at = []
    def each_epoch(self): self.at.append(weights(self.model))
class Raises(Callback):
    "Raises `error` at `event` of epoch `at`"
    order, run_valid = 70, False
    def __init__(self, event, error, at):
        def raises():
            if self.epoch == at: raise error('stopped')
        setattr(self, event, raises)

@pytest.fixture
def scripted(make_learner, make_dls, tiny_net):
    "Factory of Learners of which each epoch's robust accuracy is given"
    def make(values, cbs=(), **kw):
        cb, keep = RobustOverfitting(**kw), Keep()
        return make_learner(make_dls(n=64), tiny_net(), metrics=[accuracy, Scripted(values)],
                            cbs=[cb, keep, *cbs]), cb, keep
    return make

ANY = 'ignore:.*numpy.core is deprecated' # fastai's `learn.load`, which ends `lr_find`


# --- `EachEpoch` ---

class Count(EachEpoch):
    def __init__(self): self.epochs, self.found = [], []
    def each_epoch(self):
        self.epochs.append((self.epoch, len(self.recorder.values)))
        self.found.append((self.logged().get('accuracy'), self.logged().get('no such')))

@pytest.mark.filterwarnings(ANY)
def test_each_epoch(make_learner, make_dls):
    "Once each, when the Recorder has its values; never in `validate`, `get_preds`, `predict` or `lr_find`"
    learn = make_learner(make_dls(n=64), metrics=accuracy, cbs=Count())
    def others():
        learn.validate()
        learn.get_preds()
        learn.get_preds(ds_idx=0)
        learn.predict(learn.dls.valid_ds[0][0])
        learn.lr_find(show_plot=False, num_it=7) # more than one epoch
    others(); assert learn.count.epochs == []
    learn.fit(3); assert learn.count.epochs == [(0, 1), (1, 2), (2, 3)]
    assert learn.count.found == [(v[2], None) for v in learn.recorder.values]
    others(); assert len(learn.count.epochs) == 3
    learn.fit(1); assert len(learn.count.epochs) == 4
    learn.fit(3, start_epoch=2); assert [e for e,_ in learn.count.epochs[4:]] == [2]
    learn.fine_tune(1); assert len(learn.count.epochs) == 7

def test_each_epoch_that_is_cut_short(make_learner, make_dls):
    for error,event,want in ((CancelEpochException, 'after_batch', [0, 1, 2]),
                             (CancelTrainException, 'after_batch', [0, 1, 2]), (CancelFitException, 'after_batch', [0]),
                             (KeyboardInterrupt, 'after_batch', [0]), (CancelEpochException, 'before_epoch', [0, 2]),
                             (CancelFitException, 'after_epoch', [0, 1])):
        learn = make_learner(make_dls(n=64), cbs=[Count(), Raises(event, error, 1)])
        try: learn.fit(3)
        except KeyboardInterrupt: pass
        assert [e for e,_ in learn.count.epochs] == want


# --- what `RobustOverfitting` says ---

@pytest.mark.parametrize('values,expected', [
    ([.3, .5, .4], ('50.0% after epoch 2', '40.0% now')), ([.5, .4, .45], ('50.0% after epoch 1', '45.0% now')),
    ([.5, .5, .3], ('after epoch 1', '30.0%')), ([.3, .4, .5], None), ([.5, .4, .49], None), ([.5, .5, .5], None),
    ([.1], None), ([0., 0., 0.], None)])
@pytest.mark.parametrize('restore', [False, True], ids=['', 'restore'])
def test_message_of_the_loss_in_accuracy(values, expected, restore, scripted, capsys):
    learn, cb, keep = scripted(values, restore=restore)
    learn.fit(len(values), .01)
    out = capsys.readouterr().out
    if expected is None: assert out == ''
    else:
        assert out.count('robust overfitting') == 1 and all(s in out for s in expected)
        assert (('the weights of that epoch are restored' in out) == restore
                and (f'at_epoch(folder, {values.index(max(values))+1}' in out) == (not restore))
    assert cb.best == max(values) and cb.best_epoch == values.index(max(values)) + 1
    at = values.index(max(values)) if expected and restore else -1
    assert same(weights(learn.model), keep.at[at]) and (len(values) == 1 or not same(keep.at[0], keep.at[-1]))

@pytest.mark.parametrize('gap,says', [(0., True), (.05, True), (.15, False), (1., False)])
def test_gap(gap, says, scripted, capsys):
    learn, _, _ = scripted([.5, .4], gap=gap); learn.fit(2)
    assert ('robust overfitting' in capsys.readouterr().out) == says
    for bad in (-.1, 2, float('nan')):
        with pytest.raises(ValueError, match='`gap`'): RobustOverfitting(gap=bad)

@pytest.mark.parametrize('n,succeeded,says', [(200, .06, False), (200, .12, True), (5000, .04, True),
                                              (5000, .015, False), (1, .3, False), (None, .06, True)])
def test_a_fall_within_chance(n, succeeded, says, scripted, capsys):
    """More than two standard errors of the difference, and than the gap: (.5*.5 + .44*.56)/200 is .05 squared; the
    number of images is told"""
    learn, cb, _ = scripted([.3, .5, .5-succeeded], restore=True)
    learn.metrics[1].seen = n
    learn.fit(3)
    out = capsys.readouterr().out
    assert (('robust overfitting' in out) == says
            and (f' of {n:,} images was 50.0%' in out if says and n else 'images' not in out))

def test_images_that_a_metric_was_measured_on(make_learner, make_dls):
    "Ours and fastai's, after a real fit: all 48 of them, or the sample"
    n = 48
    for metric,by,want in ((RobustAccuracy(PGD(.1, steps=1)), 'robust_accuracy', n),
                           (RobustAccuracy(PGD(.1, steps=1), n=20), 'robust_accuracy', 20), (accuracy, 'accuracy', n)):
        learn = make_learner(make_dls(n=64, n_valid=n), metrics=metric, cbs=RobustOverfitting(by)); learn.fit(1)
        assert learn.robust_overfitting.n_images == want

def test_restores_batchnorm_too(scripted):
    "The running statistics and the step counter are those of the best epoch; the optimiser goes on from there"
    learn, _, keep = scripted([.5, .2, .1], restore=True)
    learn.fit(3, .05)
    bn = learn.model[1]
    assert (bn.num_batches_tracked == keep.at[0]['1.num_batches_tracked'] == 2
            and torch.equal(bn.running_var, keep.at[0]['1.running_var']))
    assert not torch.equal(bn.running_var, keep.at[1]['1.running_var']) and same(weights(learn.model), keep.at[0])
    ids = {id(p) for g in learn.opt.param_lists for p in g}
    assert {id(p) for p in learn.model.parameters()} == ids

def test_kept_weights_are_a_copy(scripted):
    "Which does not follow the model, and goes with the fit: an exported Learner is no larger"
    for values in ([.5, .2], [.2, .5]):
        learn, cb, keep = scripted(values, restore=True)
        learn.fit(2, .05)
        assert cb.kept is None

@pytest.mark.filterwarnings(ANY)
@pytest.mark.parametrize('restore', [False, True], ids=['', 'restore'])
def test_printed_once(restore, scripted, capsys):
    "What is no fit says nothing, and puts nothing back"
    learn, _, keep = scripted([.5, .4], restore=restore)
    learn.validate(); learn.get_preds(); learn.lr_find(show_plot=False, num_it=5)
    assert 'robust' not in capsys.readouterr().out
    learn.fit(2, .01)
    assert capsys.readouterr().out.count('robust overfitting') == 1
    with torch.no_grad(): learn.model[5].weight.add_(1)
    before = weights(learn.model)
    learn.validate()
    learn.get_preds()
    learn.predict(learn.dls.valid_ds[0][0])
    learn.lr_find(show_plot=False, num_it=5)
    learn.fit(0)
    with pytest.raises(RuntimeError): learn.fit(1, cbs=Raises('before_epoch', RuntimeError, 0))
    learn.fit(1, cbs=Raises('before_epoch', CancelFitException, 0))
    assert 'robust' not in capsys.readouterr().out and same(weights(learn.model), before)

@pytest.mark.parametrize('restore', [False, True], ids=['', 'restore'])
def test_second_fit_starts_afresh(restore, scripted, capsys):
    "With its best value; the number of the epoch is that under which `KeepEpochs` keeps it, counted over all fits"
    learn, cb, keep = scripted([.5, .4], restore=restore)
    learn.fit(2, .01); capsys.readouterr()
    learn.metrics[1].values = [.2, .3]
    learn.fit(2, .01)
    assert (capsys.readouterr().out == '' and (cb.best, cb.best_epoch) == (.3, 4)
            and same(weights(learn.model), keep.at[3]))
    learn.metrics[1].values = [.3, .1]
    learn.fit(2, .01)
    assert ('was 30.0% after epoch 5 and is 10.0% now' in capsys.readouterr().out
            and same(weights(learn.model), keep.at[4 if restore else 5]))

def test_continued_fit(scripted, capsys):
    "`start_epoch` after a fit that has ended: that one has been told, and its weights are gone"
    learn, cb, keep = scripted([.5, .4, .3, .2], restore=True)
    learn.fit(2, .01); learn.fit(4, .01, start_epoch=2)
    assert ('was 30.0% after epoch 3 and is 20.0% now; the weights' in capsys.readouterr().out
            and same(weights(learn.model), keep.at[2]))

@pytest.mark.parametrize('at', [0, 1, 2])
@pytest.mark.parametrize('event', ['after_batch', 'before_validate', 'after_pred'])
@pytest.mark.parametrize('restore', [False, True], ids=['', 'restore'])
def test_interrupted_fit(restore, event, at, scripted, capsys):
    "Nothing is put back that nobody waits for, neither then nor by what comes next; a new fit starts afresh"
    learn, cb, keep = scripted([.5, .4, .3], restore=restore)
    with pytest.raises(KeyboardInterrupt): learn.fit(3, .01, cbs=Raises(event, KeyboardInterrupt, at))
    before = weights(learn.model)
    learn.validate(); learn.get_preds()
    assert capsys.readouterr().out == '' and same(weights(learn.model), before)
    learn.metrics[1].values = [.1, .2]
    learn.fit(2, .01)
    assert capsys.readouterr().out == '' and (cb.best, cb.best_epoch) == (.2, at + 2) # after those that were finished

@pytest.mark.parametrize('error,event', [(e, w) for e,ws in {
    CancelEpochException: ('before_train', 'after_batch', 'after_train', 'before_validate'),
    CancelTrainException: ('before_train', 'after_batch'),
    CancelValidException: ('before_validate',),
    CancelFitException: ('before_train', 'after_batch', 'after_train', 'before_validate', 'after_epoch'),
}.items() for w in ws])
@pytest.mark.parametrize('at', [0, 1, 2])
def test_fastais_own_ways_to_stop(error, event, at, scripted, capsys):
    "An epoch that was not validated is none; of the others the last one counts"
    values = [.5, .4, .3]
    learn, cb, keep = scripted(values, restore=True)
    learn.fit(3, .01, cbs=Raises(event, error, at))
    measured = [v for i,v in enumerate(values) if i != at or event == 'after_epoch']
    if error is CancelFitException: measured = values[:at + (event == 'after_epoch')]
    out = capsys.readouterr().out
    if len(measured) > 1: assert f'was {measured[0]:.1%}' in out and f'is {measured[-1]:.1%} now' in out
    else: assert out == ''

@pytest.mark.parametrize('error', [CancelEpochException, CancelTrainException, CancelFitException])
def test_values_of_an_epoch_that_is_cut_short(error, make_learner, make_dls):
    "Without the training loss fastai logs each value under the name before; a card with that would mislead `at_epoch`"
    learn = make_learner(make_dls(n=64), metrics=[accuracy, RobustAccuracy(PGD(0., steps=0, random_start=False))],
                         cbs=[Count(), KeepEpochs()])
    learn.fit(2, cbs=Raises('after_batch', error, 1))
    cards = [read_card(learn.path/learn.model_dir/f'epoch_{i}.json')
             for i in range(1, 3 - (error is CancelFitException))]
    assert learn.count.found[0][0] is not None and all(f == (None, None) for f in learn.count.found[1:])
    assert 'valid_loss' in cards[0] and not any(k in c for c in cards[1:]
                                                for k in ('train_loss', 'valid_loss', 'accuracy', 'robust_accuracy'))

def kept(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
def ids(folder, fname='epoch'):
    return {read_card(p).get('training') for p in saved_epochs(folder, fname, '.json').values()}

@pytest.mark.parametrize('there', ['epochs', 'of an earlier version', 'card alone', 'weights alone',
                                   'by the same callback', 'damaged card', 'by `learn.save`'])
@pytest.mark.parametrize('every', [1, 2])
def test_epochs_of_an_older_training(every, there, make_learner, make_dls, tmp_path):
    "A Learner made anew is refused before its first step, and told what to do; not one byte changes"
    teacher = make_learner(make_dls(n=64), cbs=[] if there == 'by `learn.save`' else KeepEpochs())
    teacher.fit(3)
    folder = teacher.path/teacher.model_dir
    if there == 'by `learn.save`': teacher.save('epoch_2')
    if there == 'of an earlier version':
        for n in (1, 2, 3): (folder/f'epoch_{n}.json').write_text('{"epoch": %d, "robust_accuracy": 0.5}' % n)
    if there == 'damaged card': (folder/'epoch_1.json').write_text('{"training": ')
    if there.endswith('alone'):
        for p in folder.glob('epoch_[13]*'): p.unlink()
        (folder/('epoch_2.pth' if there == 'card alone' else 'epoch_2.json')).unlink()
    before, learn = kept(folder), make_learner(
        make_dls(n=64), cbs=teacher.cbs[-1] if there == 'by the same callback' else KeepEpochs(every))
    was = weights(learn.model)
    with pytest.raises(ValueError, match='epoch_(1 to epoch_3|2) of another training run.*'
                                         'delete them.*another `fname`.*overwrite=True'):
        learn.fit(2)
    assert kept(folder) == before and same(weights(learn.model), was) and len(learn.recorder.losses) == 0

def test_ways_out_of_the_folder_of_another_run(make_learner, make_dls):
    "Another name, another folder, or theirs deleted, to the last of them"
    teacher = make_learner(make_dls(n=64), cbs=KeepEpochs())
    teacher.fit(3)
    folder = teacher.path/teacher.model_dir
    before = kept(folder)
    make_learner(make_dls(n=64), cbs=[KeepEpochs(fname='student'), KeepEpochs(2, fname='deeper/epoch')]).fit(2)
    make_learner(make_dls(n=64), cbs=KeepEpochs(), model_dir='other').fit(2)
    with pytest.raises(ValueError, match='deeper` contains epoch_2 of another'):
        make_learner(make_dls(n=64), cbs=KeepEpochs(fname='deeper/epoch')).fit(1)
    after = {k: v for k,v in kept_files(folder).items() if not k.startswith('student')}
    assert (after == before and list(saved_epochs(folder, 'student')) == [1, 2]
            and list(saved_epochs(teacher.path/'other')) == [1, 2])
    other = make_learner(make_dls(n=64), cbs=KeepEpochs(overwrite=True))
    other.fit(2)
    assert (list(saved_epochs(folder)) == list(saved_epochs(folder, suffix='.json')) == [1, 2]
            and ids(folder) == {other.keep_epochs.training_id} != ids(folder, 'student'))
    other.fit(1)
    assert list(saved_epochs(folder)) == [1, 2, 3] # its own it does not delete
def kept_files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}

@pytest.mark.filterwarnings(ANY)
def test_further_fits_go_on_counting(make_learner, make_dls, tiny_net):
    """Of `fine_tune`, of the same Learner with the same callbacks and with new ones, after `lr_find` and an
    interrupted fit; the cards say so"""
    watch = lambda: [KeepEpochs(), KeepEpochs(2, 'second')]
    learn = make_learner(make_dls(n=64), metrics=[accuracy, Scripted([.5, .4, *[.3]*6])],
                         cbs=[*watch(), RobustOverfitting()])
    folder = learn.path/learn.model_dir
    learn.fine_tune(2)
    first = kept(folder)
    assert (list(saved_epochs(folder)) == [1, 2, 3] and list(saved_epochs(folder, 'second')) == [2]
            and learn.robust_overfitting.best_epoch == 2)
    learn.lr_find(show_plot=False, num_it=5); learn.validate()
    with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=Raises('after_batch', KeyboardInterrupt, 1))
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, KeepEpochs)])
    learn.fit(2, cbs=watch())
    learn.fit(8, start_epoch=6, cbs=watch()) # by hand
    assert (list(saved_epochs(folder)) == [*range(1, 9)] and list(saved_epochs(folder, 'second')) == [2, 4, 6, 8]
            and len(ids(folder)) == 1)
    assert [read_card(p)['epoch'] for p in saved_epochs(folder, suffix='.json').values()] == [*range(1, 9)]
    assert {k: v for k,v in kept(folder).items() if k in first} == first
    assert same(Teacher.at_epoch(folder, 8, tiny_net()).members[0].model.state_dict(), learn.model.state_dict())

def test_start_epoch_in_a_new_process(make_learner, make_dls):
    "The user says that the first epochs were done: they are this run's, and what lies behind them is not"
    make_learner(make_dls(n=64), cbs=KeepEpochs()).fit(2)
    learn = make_learner(make_dls(n=64), cbs=KeepEpochs())
    folder = learn.path/learn.model_dir
    with pytest.raises(ValueError, match='epoch_1 to epoch_2 of another'): learn.fit(4, start_epoch=1)
    learn.fit(4, start_epoch=2)
    assert (list(saved_epochs(folder)) == [1, 2, 3, 4] and len(ids(folder)) == 1
            and best_epoch(folder, by='valid_loss') in (1, 2, 3, 4))

@pytest.mark.parametrize('how', ['after the weights', 'after the card', 'other file', 'no file', 'finished'])
@pytest.mark.parametrize('every', [1, 2])
def test_killed_before_resume_knows(every, how, make_learner, make_dls, tmp_path, monkeypatch):
    """The first epoch is there and `Resume` has not kept it: the training that starts anew writes it again, and no
    other one does"""
    from rkd_fastai.callback import keep
    def start(path='run.pth', cbs=()):
        make_learner(make_dls(n=64), cbs=[KeepEpochs(every), *cbs, *([Resume(tmp_path/path)] if path else [])]
                     ).fit(every if how == 'finished' else 4)
    class Die(Callback):
        order, only_shows = 900, True
        def after_epoch(self):
            if self.epoch == every-1: raise KeyboardInterrupt
    def interrupt(): raise KeyboardInterrupt
    folder = tmp_path/'models'
    if how == 'finished': start(); (tmp_path/'run.pth').unlink()
    else:
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            write = keep.write_atomic
            if how == 'after the weights':
                m.setattr(keep, 'write_atomic', lambda path, text: (
                    interrupt() if path.name == f'epoch_{every}.json' else write(path, text)))
            start(cbs=[Die()])
    assert list(saved_epochs(folder)) == [every] and (tmp_path/'run.pth').exists() == (every == 2 and how != 'finished')
    if how in ('other file', 'no file', 'finished'):
        with pytest.raises(ValueError, match=f'epoch_{every} of another training run'):
            start('other.pth' if how == 'other file' else 'run.pth' if how == 'finished' else None)
        return
    start()
    assert list(saved_epochs(folder)) == [*range(every, 5, every)] and len(ids(folder)) == 1
    assert not [p for p in folder.iterdir() if p.name.startswith('.')]

def test_two_that_keep_the_same_epochs(make_learner, make_dls):
    learn = make_learner(make_dls(n=64), cbs=[KeepEpochs(), KeepEpochs(2)])
    with pytest.raises(ValueError, match='two `KeepEpochs` would both write.*its own `fname`'): learn.fit(2)
    assert not (learn.path/learn.model_dir).exists()

def test_two_runs_at_the_same_time(make_learner, make_dls):
    "Both began in an empty folder: the second to write is told"
    class Runs(Callback):
        order, run_valid = 40, False
        def after_train(self): make_learner(make_dls(n=64), cbs=KeepEpochs()).fit(1)
    learn = make_learner(make_dls(n=64), cbs=[KeepEpochs(), Runs()])
    with pytest.raises(ValueError, match='epoch_1.pth` was written by another training run'): learn.fit(1)
    assert ids(learn.path/learn.model_dir) != {learn.keep_epochs.training_id}

def test_epochs_of_two_runs_do_not_compare(make_learner, make_dls, tiny_net):
    "Copied into one folder by hand"
    for model_dir in ('a', 'b'):
        make_learner(make_dls(n=64), cbs=KeepEpochs(), model_dir=model_dir, metrics=Scripted([.5, .4, .3])).fit(3)
    a, b = (learn_dir for learn_dir in (make_learner().path/'a', make_learner().path/'b'))
    for suffix in ('.pth','.json'): (b/f'epoch_3{suffix}').rename(a/f'epoch_3{suffix}')
    with pytest.raises(ValueError, match=r'epochs of 2 training runs, \[1, 2\] and \[3\]'): best_epoch(a)
    with pytest.raises(ValueError, match='epochs of 2 training runs'): Teacher.at_epoch(a, 'best', tiny_net())
    Teacher.at_epoch(a, 3, tiny_net())

def test_needs_the_metric(make_learner, make_dls, scripted):
    with pytest.raises(ValueError, match="'robust_accuracy', which is not among the metrics"):
        make_learner(make_dls(), metrics=accuracy, cbs=RobustOverfitting()).fit(1)
    learn = make_learner(make_dls(), metrics=accuracy, cbs=RobustOverfitting('accuracy', restore=True)); learn.fit(2)
    assert learn.robust_overfitting.best == max(v[2] for v in learn.recorder.values)
    learn = make_learner(make_dls(), cbs=RobustOverfitting()); learn.validate(); learn.get_preds() # which need none
    learn = make_learner(make_dls(), metrics=RobustAccuracy(PGD(.1, steps=1)),
                         cbs=[RobustOverfitting(), AdversarialTraining(PGD(.1, steps=1))])
    learn.fit(2)
    assert learn.robust_overfitting.best == max(v[2] for v in learn.recorder.values)

@pytest.mark.parametrize('method', ['none', 'at'])
def test_the_function_in_place_of_the_metric(method, make_learner, make_dls):
    "`metrics=robust_accuracy` says which metric was meant: before the first step where one of our methods trains"
    for metric in (robust_accuracy, partial(robust_accuracy, attack=PGD(.1, steps=1))):
        learn = make_learner(make_dls(n=64), metrics=[accuracy, metric],
                             cbs=AdversarialTraining(PGD(.1, steps=1)) if method == 'at' else [])
        before = weights(learn.model)
        with pytest.raises(TypeError, match=r'`metrics=\[accuracy, RobustAccuracy\(\)\]`'): learn.fit(1)
        assert same(weights(learn.model), before) == (method == 'at')

@pytest.mark.parametrize('averaging_last', [False, True])
def test_restores_averaged_weights(averaging_last, scripted, make_dls):
    "With `WeightAveraging` the best epoch's weights are the average that was validated, whichever callback came first"
    learn, cb, keep = scripted([.5, .3, .2], restore=True)
    ema = WeightAveraging(.9)
    if averaging_last: learn.add_cb(ema)
    else: learn.cbs.insert(0, ema); ema.learn = learn
    raw = []
    class LastStep(Callback):
        order, run_valid = 60, False
        def after_step(self): raw.append(weights(self.model))
    learn.add_cb(LastStep())
    learn.fit(3, .05)
    assert same(weights(learn.model), keep.at[0]) and not same(keep.at[0], raw[1]) and not same(keep.at[0], keep.at[1])
    # another fit goes on from them
    learn.metrics[1].values = [.1, .2]
    learn.fit(2, .05)
    assert same(weights(learn.model), keep.at[4])

def test_restored_weights_are_as_accurate_as_printed(make_learner, make_dls, robust_net, plain_net):
    "Real networks: after the fit the Learner is as robust as in its best epoch"
    class Script(Callback):
        order, run_valid = 60, False
        def after_train(self): self.model.load_state_dict([plain_net, robust_net, plain_net][self.epoch].state_dict())
    metric = RobustAccuracy(PGD(.1, steps=3))
    learn = make_learner(make_dls(n=32, n_valid=100), copy.deepcopy(plain_net), metrics=metric,
                         cbs=[RobustOverfitting(restore=True), Script()])
    learn.fit(3, 0.)
    values = [v[2] for v in learn.recorder.values]
    assert (values[1] > values[2] + .05 and learn.validate()[1] == values[1]
            and same(weights(learn.model), weights(robust_net)))

@pytest.mark.filterwarnings('ignore:.*load_learner')
@pytest.mark.parametrize('interrupted', [False, True])
def test_export(interrupted, make_learner, make_dls, tmp_path):
    "No weights but the model's, after an interrupted fit neither"
    big = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1000), nn.Linear(1000, 10)) # 300 kB
    def export(name, cbs):
        learn = make_learner(make_dls(), big(), metrics=accuracy, cbs=cbs)
        try: learn.fit(2, .01, cbs=Raises('after_batch', KeyboardInterrupt, 1) if interrupted else None)
        except KeyboardInterrupt: pass
        learn.export(name)
        return (tmp_path/name).stat().st_size
    size = export('plain.pkl', None)
    for i,cb in enumerate((RobustOverfitting('accuracy', restore=True),
                           CatastrophicOverfitting(PGD(.1, steps=1), stop=True))):
        assert abs(export(f'{i}.pkl', cb) - size) < 10_000
        again = load_learner(tmp_path/f'{i}.pkl')
        again.dls = make_dls()
        with again.no_bar(), again.no_logging(): again.fit(1); again.validate()

def test_watching_changes_nothing(make_learner, make_dls, tiny_net):
    "Weights and random numbers are as without"
    def train(cbs):
        torch.manual_seed(5)
        learn = make_learner(make_dls(shuffle=False), tiny_net(dropout=.2), metrics=RobustAccuracy(PGD(.1, steps=1)),
                             cbs=[AdversarialTraining(FFGSM(.1)), *cbs])
        learn.fit(2, .01)
        return weights(learn.model), torch.get_rng_state()
    a, b = train([]), train([RobustOverfitting()])
    assert same(a[0], b[0]) and torch.equal(a[1], b[1])

@pytest.mark.parametrize('cb', [RobustAccuracy, CatastrophicOverfitting])
def test_monitors_leave_pythons_random_numbers(cb, make_learner, make_dls):
    "From which fastai seeds the loaders made next"
    import random
    def train(watched):
        kw = (dict(cbs=CatastrophicOverfitting(PGD(.1, steps=1))) if watched and cb is CatastrophicOverfitting
              else dict(metrics=RobustAccuracy(PGD(.1, steps=1))) if watched else {})
        learn = make_learner(make_dls(n=64), **kw)
        random.seed(3); learn.fit(1)
        return random.random()
    assert train(True) == train(False)

def test_metrics_called_as_a_cards_entries(make_learner, make_dls):
    "The card's own entries stay, and training goes on"
    class Odd(Scripted):
        def __init__(self, name): super().__init__([.5]); self._name = name
        name = property(lambda self: self._name)
    learn = make_learner(make_dls(n=64),
                         metrics=[Odd(n) for n in ('attack','arch','vocab','versions','robust_accuracy')],
                         cbs=KeepEpochs())
    learn.fit(1)
    card = read_card(learn.path/learn.model_dir/'epoch_1.json')
    assert card['arch'] == 'Sequential' and card['attack'] == 'None' and card['robust_accuracy'] == .5

def test_clean_distillation_has_no_attack(make_learner, make_dls, tiny_net):
    "Neither on its card nor for who looks for a radius, and it takes none"
    with pytest.raises(TypeError, match='`attack`'): CKDCallback(tiny_net(), attack=PGD(.1))
    learn = make_learner(make_dls(n=64), cbs=[CKDCallback(tiny_net()), KeepEpochs()])
    learn.fit(1)
    assert read_card(learn.path/learn.model_dir/'epoch_1.json')['attack'] == 'None'
    learn.add_cb(CatastrophicOverfitting())
    with pytest.raises(ValueError, match='takes `eps` from the training attack'): learn.fit(1)


# --- several `RobustAccuracy` on one Learner ---

several = dict(
    eps=([RobustAccuracy(PGD(8/255)), RobustAccuracy(PGD(.1))], ['robust_accuracy', 'robust_accuracy_eps0.1']),
    steps_and_n=([RobustAccuracy(PGD(.1, steps=3)), RobustAccuracy(PGD(.1, steps=50), n=10)],
                 ['robust_accuracy', 'robust_accuracy_steps50_n10']),
    attack=([RobustAccuracy(PGD(.1)), RobustAccuracy(FGSM(8/255))],
            ['robust_accuracy', 'robust_accuracy_FGSM_eps8/255']),
    no_settings=([RobustAccuracy(PGD(.1)), RobustAccuracy(lambda model, x, y: x)],
                 ['robust_accuracy', 'robust_accuracy_function']),
    alike=([RobustAccuracy() for _ in range(3)], ['robust_accuracy', 'robust_accuracy_2', 'robust_accuracy_3']),
    named=([RobustAccuracy(PGD(.1), name='mine'), RobustAccuracy(), RobustAccuracy(PGD(.2), name='mine')],
           ['mine', 'robust_accuracy', 'mine_eps0.2']))

@pytest.mark.parametrize('metrics,names', several.values(), ids=several)
def test_names_of_several_robust_accuracies(metrics, names, make_learner, make_dls):
    learn = make_learner(make_dls(n=64), metrics=[accuracy, *metrics])
    assert list(learn.metrics.attrgot('name')) == ['accuracy', *names]
    for m in metrics: # alone, each has its own again
        learn.metrics = m
        assert learn.metrics[0].name == ('mine' if 'mine' in m.name else 'robust_accuracy')
    learn.metrics = metrics[0]
    learn.metrics.append(metrics[1])
    assert len(set(learn.metrics.attrgot('name'))) == 2

@pytest.mark.filterwarnings(ANY)
def test_several_robust_accuracies_in_tables_cards_and_monitors(make_learner, make_dls, plain_net):
    """The weak attack, which comes first, is what all of them call `robust_accuracy`; none of them mistakes the
    strong one for it"""
    weak, strong = PGD(.02, steps=2), PGD(.3, steps=5)
    save, watch = SaveModelCallback('robust_accuracy'), RobustOverfitting()
    learn = make_learner(make_dls(n=64), copy.deepcopy(plain_net),
                         metrics=[RobustAccuracy(weak), RobustAccuracy(strong)], cbs=[KeepEpochs(), save, watch])
    best = []
    class BestSoFar(Callback):
        order = 90
        def after_epoch(self): best.append((save.best, watch.best))
    learn.fit(1, 0., cbs=BestSoFar())
    values = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    x, y = pixel_data(learn)
    want = {k: robust_accuracy(plain_net, x, y, a)
            for k,a in (('robust_accuracy', weak), ('robust_accuracy_eps0.3_steps5', strong))}
    assert want['robust_accuracy'] > .8 and want['robust_accuracy_eps0.3_steps5'] < .2
    card = json.loads((learn.path/'models/epoch_1.json').read_text())
    for k,v in want.items(): assert values[k] == card[k] == pytest.approx(v, abs=.05)
    assert best == [(values['robust_accuracy'],)*2]
