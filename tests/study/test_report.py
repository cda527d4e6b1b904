"Tables, figures and the page of a study against plain loops over its rows; every number here is made up."
import base64, io, itertools, re, statistics, subprocess, sys
from html.parser import HTMLParser
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from rkd_fastai.study.report import page as page_module
from rkd_fastai.study.report.line_plots import (axis_table, beta_table, capacity_table, plot_axis, plot_beta,
                                                plot_capacity)
from rkd_fastai.study.report.plots import front_table, map_table, plot_map, plot_pareto
from rkd_fastai.study.report.page import views, write_report
from rkd_fastai.study.results import (NotEnough, as_markdown, kind_name, main_task, measures, methods, over_seeds,
                                      pareto, settings, strongest)
from rkd_fastai.study.study import pareto_text
from rkd_fastai.study.report.tables import (baselines, gain, gains, select, table1, table2, table3, table5, table6,
                                            table12)

@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    plt.close('all')

base = dict(data='toys', eps=8/255, n=1000, noise=0., width=1.)

def at(clean, robust, checkpoint='last', epochs=80, **kwargs):
    "A baseline"
    return base | dict(method='at', checkpoint=checkpoint, epochs=epochs, clean=clean, pgd20=robust, n_clean=400,
                       n_pgd20=400, seed=0) | kwargs

def student(clean, robust, method='akd', teacher='at', alpha=.5, teacher_epoch=40, **kwargs):
    "A student"
    return base | dict(method=method, teacher=teacher, alpha=alpha, teacher_epoch=teacher_epoch, teacher_epochs=40,
                       epochs=40, clean=clean, pgd20=robust, n_clean=400, n_pgd20=400, seed=0) | kwargs

def frame(*rows): return pd.DataFrame(list(rows))

def study(seed=0, methods=('akd','rslad'), teachers=('st','at'), stops=(10,20,40), alphas=(.3,.6,1.), seeds=2,
          **kwargs):
    "Invented rows of a grid, with baselines"
    rng,found = np.random.default_rng(seed),[]
    for checkpoint,i in itertools.product(('last','best'), range(seeds)):
        found.append(at(*rng.uniform([.7,.4], [.75,.45]), checkpoint, seed=i, **kwargs))
    for m,t,s,a,i in itertools.product(methods, teachers, stops, alphas, range(seeds)):
        found.append(student(*rng.uniform([.66,.36], [.78,.48]), m, t, a, s, seed=i,
                             lam=5/6 if m == 'rslad' else None, **kwargs))
    return frame(*found)

def number(text): return float(text.split(' ')[0].replace('−', '-'))

# --- rows ---

def test_means_against_a_loop():
    df = study(seeds=3).sample(frac=1, random_state=0)
    got = over_seeds(df)
    groups = {}
    for r in df.to_dict('records'):
        groups.setdefault((r['method'], r.get('teacher'), r['teacher_epoch'], r['alpha'], r['checkpoint'])
                          if r['method'] in methods else r['checkpoint'], []).append(r)
    assert len(got) == len(groups) == 2*2*9 + 2 and (got.seeds == 3).all()
    want = sorted((statistics.mean(r['clean'] for r in g), statistics.stdev(r['clean'] for r in g),
                   statistics.mean(r['pgd20'] for r in g), statistics.stdev(r['pgd20'] for r in g))
                  for g in groups.values())
    np.testing.assert_allclose(sorted(map(tuple, got[['clean','clean_std','pgd20','pgd20_std']].to_numpy())), want)

@pytest.mark.parametrize('name', settings)
def test_settings_are_kept_apart(name):
    other = {'data': 'others', 'method': 'rslad', 'teacher': 'st', 'checkpoint': 'best'}.get(name, .25)
    a = student(.7, .4, teacher_width=1., members=1, lam=.5, T=1., beta=.5, teacher_eps=0., checkpoint='last')
    got = over_seeds(frame(a, a | {name: other, 'clean': .6, 'seed': 1}))
    assert got.clean.tolist() == [.7,.6] and (got.seeds == 1).all() and got.clean_std.isna().all()

def test_missing_columns_are_empty_ones():
    short = frame(dict(method='akd', clean=.7, pgd20=.4), dict(method='at', clean=.6, pgd20=.3))
    full = short.assign(**{c: None for c in [*settings, 'seed','compute','diverged'] if c not in short})
    pd.testing.assert_frame_equal(over_seeds(short), over_seeds(full))
    assert (select(short).Method.tolist() == select(full).Method.tolist()
            == ['Only teacher, last epoch','RKD-Acc.','RKD-Rob.'])

def test_what_diverged_counts_nowhere():
    df = frame(student(.7, .4), student(.9, .9, seed=1, diverged='loss is NaN'),
               student(.9, .9, alpha=.9, diverged='loss is NaN'), at(.7, .4))
    assert (over_seeds(df).clean.tolist() == [.7, .7]
            and '2 diverged training runs are left out.' in gain(df).attrs['caption'] and len(gain(df)) == 1)

def test_the_same_seed_twice():
    with pytest.raises(ValueError, match='seed 0 twice for .*method=akd'):
        over_seeds(frame(student(.7, .4), student(.71, .4)))
    assert over_seeds(frame(student(.7, .4, seed=None), student(.72, .4, seed=None))).clean_std.notna().all()

def test_compute_is_that_of_all_networks():
    got = over_seeds(frame(student(.7, .4, teacher_epoch=10), student(.7, .4, teacher='4 at', teacher_epoch=10),
                           student(.7, .4, teacher='2 st, 2 at', teacher_epoch=None), at(.7, .4),
                           student(.7, .4, teacher_epoch=20, compute=99)))
    assert got.compute.tolist() == [50, 80, 200, 80, 99]

@pytest.mark.parametrize('attacks, want', [
    (dict(pgd20=[.1,.2], autoattack=[.1,.1]), 'autoattack'), (dict(pgd20=[.1,.2], autoattack=[.1,None]), 'pgd20'),
    (dict(pgd7=[.1,.2], pgd50=[.1,.2], pgd20=[.1,.2]), 'pgd50'),
    (dict(pgd50x10=[.1,.1], pgd100=[.1,.1]), 'pgd50x10'), (dict(fgsm=[.3,.3], pgd7=[.1,.1]), 'pgd7'),
    (dict(fgsm=[.3,.3]), 'fgsm'), (dict(pgd20=[.1,None], pgd50=[None,.1], pgd7=[.1,.1]), 'pgd7')])
def test_strongest(attacks, want):
    assert strongest(pd.DataFrame(dict(method=['akd','at'], clean=.5) | attacks)) == want

def test_strongest_asks_trained_networks():
    df = pd.DataFrame(dict(method=['akd','teacher','at'], clean=[.5,.5,None], pgd20=.1, autoattack=[.1,None,None]))
    assert strongest(df) == 'autoattack' and measures(df) == ['clean','autoattack','pgd20']
    with pytest.raises(ValueError, match='no robust accuracy'): strongest(df.drop(columns=['pgd20','autoattack']))

@pytest.mark.parametrize('seed', range(20))
def test_pareto_against_all_pairs(seed):
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(dict(method='akd', clean=rng.integers(0, 8, 40)/8, pgd20=rng.integers(0, 8, 40)/8),
                      index=rng.permutation(40)) # many ties
    df.loc[0,'clean'],df.loc[1,'pgd20'] = np.nan,np.nan
    dominated = lambda a: any(b.clean >= a.clean and b.pgd20 >= a.pgd20 and (b.clean > a.clean or b.pgd20 > a.pgd20)
                              for b in df.itertuples())
    want = {a.Index for a in df.itertuples() if not (np.isnan(a.clean) or np.isnan(a.pgd20) or dominated(a))}
    got = pareto(df, robust='pgd20')
    assert set(got.index) == want and len(got) == len(want) and got.clean.is_monotonic_increasing

def test_main_is_the_task_of_most_students():
    df = pd.concat([study(width=.25), frame(student(.7, .4, width=.25, T=4.)), study(), study(n=500, stops=(10,)),
                    study(noise=.2, stops=(10,)),
                    frame(student(.7, .4, T=4.), base | dict(method='teacher', teacher='at', n=500, clean=.5,
                                                             pgd20=.3))])
    got = main_task(df) # as many of width 1/4
    assert (len(got) == len(study()) + 1 and set(got[got.method != 'teacher'].width) == {1.}
            and not (got['T'] == 4).any())
    assert set(main_task(df, free=['n']).n) == {1000, 500}
    assert set(main_task(df, free=['noise']).noise.dropna()) == {0., .2}
    for f in (front_table, map_table, table3, plot_pareto):
        with pytest.raises(ValueError, match='different `n`: 500 and 1,000'): f(df)

# --- the best students ---

@pytest.mark.parametrize('seed', range(12))
def test_select_against_a_loop(seed):
    df = study(seed)
    mean = df.groupby(['method','teacher','alpha','teacher_epoch','checkpoint'],
                      dropna=False)[['clean','pgd20']].mean().reset_index()
    teachers = mean[mean.method == 'at'].sort_values('pgd20').to_dict('records')
    b = teachers[-1]
    acc = [r for r in mean.to_dict('records') if r['method'] != 'at' and r['pgd20'] >= b['pgd20'] - .02]
    rob = [r for r in mean.to_dict('records') if r['method'] != 'at' and r['clean'] >= b['clean'] - .02]
    acc,rob = max(acc, key=lambda r: r['clean']),max(rob, key=lambda r: r['pgd20'])
    got = select(df)
    assert got.Method.tolist() == [f"Only teacher, {b['checkpoint']} epoch",
                                   f"Only teacher, {teachers[0]['checkpoint']} epoch",
                                   'RKD-Acc.', 'RKD-Rob.']
    assert 'the baseline' in got.Hyperparameters[0] and 'the baseline' not in got.Hyperparameters[1]
    for i,r in ((0, b), (2, acc), (3, rob)):
        assert (number(got.Clean[i]), number(got['PGD-20'][i])) == (round(100*r['clean'], 1), round(100*r['pgd20'], 1))
    for i,r in ((2, acc), (3, rob)):
        assert got['Best loss'][i] == methods[r['method']]
        stop = 'no ES' if r['teacher_epoch'] == 40 else f"ES={r['teacher_epoch']:g}"
        assert got.Hyperparameters[i] == f"{stop}, α={r['alpha']:g}, {r['teacher'].upper()}"

@pytest.mark.parametrize('loss, holds', [(.02, True), (.0201, False)])
def test_two_points_less_is_allowed(loss, holds):
    accurate,robust = (select(frame(at(.7, .44), student(*v)))[i:i+1]
                       for v,i in (((.75, .44-loss), 1), ((.7-loss, .5), 2)))
    assert accurate.Method.item() == 'RKD-Acc.' and accurate.Clean.item() == ('75.0' if holds else '–')
    assert robust.Method.item() == 'RKD-Rob.' and robust['PGD-20'].item() == ('50.0' if holds else '–')
    if not holds:
        assert (accurate.Hyperparameters.item() == 'none: every student loses more than 2 points PGD-20'
                and robust.Hyperparameters.item() == 'none: every student loses more than 2 points clean')
        assert select(frame(at(.7, .44), student(.75, .44-loss)), within=.03).Clean[1] == '75.0'

def test_of_equally_robust_epochs_the_last_is_compared_with():
    got = select(frame(at(.6, .4, 'best'), at(.7, .4, 'last'), student(.7, .4)))
    assert got.Method[0] == 'Only teacher, last epoch' and 'the baseline' in got.Hyperparameters[0]

def test_select_shows_a_stronger_attack_where_it_was_run():
    df = frame(at(.7, .4, autoattack=.35), student(.72, .41, alpha=.1), student(.7, .45, alpha=.9, autoattack=.38))
    got = select(df)
    assert got.AutoAttack.tolist() == ['35.0','–','38.0'] and 'by the clean and PGD-20 accuracy' in got.attrs['caption']
    assert (select(df, robust='autoattack').Clean.tolist() == ['70.0']*3
            and '1 row without AutoAttack is left out.' in select(df, robust='autoattack').attrs['caption'])

def test_table2_is_of_students_of_one_teacher_per_width():
    df = pd.concat([study(0), study(1, width=.25),
                    frame(student(.9, .9, teacher='4 at', members=4), student(.9, .9, teacher_width=4.))])
    assert '90.0' in select(df).Clean.tolist()
    got = table2(df)
    assert '90.0' not in got.Clean.tolist() and got['Width'].tolist() == ['1']*4 + ['1/4']*4

@pytest.mark.parametrize('name, value', [('data','others'), ('eps',.1), ('n',500), ('noise',.4), ('width',.5)])
def test_only_the_same_task_is_compared(name, value):
    better = at(.9, .9) | {name: value}
    df = frame(at(.7, .4), better, student(.72, .42))
    assert select(df).Clean.tolist() == ['70.0','72.0','72.0'] and gain(df)['PGD-20 gain'].tolist() == ['+2.0 ± 3.5']
    with pytest.raises(ValueError, match='no baseline for the task'): gain(frame(better, student(.72, .42)))

# --- gains ---

def test_gain_is_over_the_baseline_nearest_in_compute():
    df = frame(at(.6, .30, epochs=40), at(.7, .40, epochs=80), at(.8, .50, epochs=160),
               student(.75, .45, teacher_epoch=10), student(.75, .45, teacher_epoch=20),
               student(.75, .45, teacher_epoch=40, teacher='4 ffgsm'))
    got = gains(df)[0].set_index('teacher_epoch')
    assert got.baseline_compute.to_dict() == {10: 40, 20: 80, 40: 160} or got.baseline_compute.tolist() == [40, 80, 160]
    np.testing.assert_allclose(got.robust_gain, [.15, .05, -.05])
    np.testing.assert_allclose(got.clean_gain, [.15, .05, -.05])

@pytest.mark.parametrize('compute, mark', [(100, ''), (110, ''), (90, ''), (111, ' ‡'), (89, ' †')])
def test_unequal_compute_is_marked(compute, mark):
    df = frame(at(.7, .4, epochs=100), student(.8, .5, compute=compute))
    assert gain(df)['Epochs in all'][0] == f'{compute}{mark}' == select(df)['Epochs in all'][1]
    assert ('does not win' in gain(df).attrs['verdict']) == (mark == ' ‡') # what costs more is no win

def test_spread_of_a_gain():
    two = frame(at(.7, .4), at(.72, .44, seed=1), student(.8, .5), student(.81, .51, seed=1))
    got = gains(two)[0].iloc[0]
    assert (got.robust_gain_std == pytest.approx((statistics.variance([.4,.44]) + statistics.variance([.5,.51]))**.5)
            and got.robust_gain == pytest.approx(.085))
    one = gains(frame(at(.7, .4), student(.8, .5)))[0].iloc[0]
    assert (one.robust_gain_std == pytest.approx((.4*.6/400 + .5*.5/400)**.5)
            and one.clean_gain_std == pytest.approx((.7*.3/400 + .8*.2/400)**.5))

not_robust = ('Distillation does not win in robustness: '
              'no student is shown to be more robust than the baseline. {}.')

@pytest.mark.parametrize('clean, robust, result, verdict', [
    (.8, .6, 'better in both',
     'Distillation wins in robustness: a student is more robust than the baseline by +20.0 ± 3.5 points.\n'
     'Distillation wins in clean accuracy: a student is more accurate than the baseline by +10.0 ± 3.0 points.'),
    (.7, .6, 'more robust',
     'Distillation wins in robustness: a student is more robust than the baseline by +20.0 ± 3.5 points.\n'
     'Distillation does not win in clean accuracy: no student is shown to be more accurate than the baseline. '
     'The best student gains +0.0 ± 3.2 points.'),
    (.6, .6, 'more robust, less accurate', not_robust.format(
        "No student keeps its clean accuracy within 2 points of the baseline's")),
    (.8, .3, 'more accurate, less robust', not_robust.format('The best student gains −10.0 ± 3.4 points')),
    (.71, .41, 'no difference', not_robust.format('The best student gains +1.0 ± 3.5 points')),
    (.7, .3, 'worse', not_robust.format('The best student gains −10.0 ± 3.4 points'))])
def test_what_a_gain_means(clean, robust, result, verdict):
    got = gain(frame(at(.7, .4), student(clean, robust)))
    assert got.Result[0] == result and got.attrs['verdict'].startswith(verdict)

def test_verdict_names_where_distillation_does_not_win():
    good,bad = ([(at(.7, .4, width=w), student(.8, .6, width=w)) for w in (1., 1/4)],
                (at(.5, .3, width=1/16), student(.6, .2, width=1/16)))
    verdict = gain(frame(*good[0], *good[1], *bad)).attrs['verdict'].splitlines()
    assert verdict[0].startswith('Distillation does not win in robustness at width 1/16: ')
    for sentence,w in zip(verdict[1:3], ('1/4', '1')):
        assert sentence.startswith(f'Distillation wins in robustness at width {w}: '
                               'a student is more robust than the baseline by +20')

def test_verdict_names_all_that_differs():
    "Of equally many students none are 'the main task': once it was another one than that of `main_task`"
    df = pd.concat([frame(at(.7, .4), student(.8, .6)).assign(n=n, width=w)
                    for n,w in ((500, 1.), (2000, 1.), (1000, .25), (None, 1.))])
    verdict = gain(df).attrs['verdict'].splitlines()
    for where in ('with 500 training images at width 1', 'with 2,000 training images at width 1',
                  'with 1,000 training images at width 1/4', 'with all training images at width 1'):
        assert sum(f'in robustness {where}: ' in sentence for sentence in verdict) == 1

@pytest.mark.parametrize('table', [gain, select, capacity_table])
def test_students_without_a_baseline_are_named(table):
    pairs = [frame(at(.7, .4, width=w), student(.8, .6, width=w)) for w in (1., .5)]
    assert 'no baseline' not in table(pd.concat(pairs)).attrs['caption']
    one,two = frame(student(.8, .6, width=.25)),frame(student(.8, .6, width=.25), student(.8, .6, width=.25, alpha=.9))
    assert '1 student has no baseline of the same task here and is left out.' in table(
        pd.concat([*pairs, one])).attrs['caption']
    assert '2 students have no baseline of the same task here and are left out.' in table(
        pd.concat([*pairs, two])).attrs['caption']

@pytest.mark.few(2)
@pytest.mark.parametrize('name, values, where', [
    ('augment', ('flip', 'none'), 'with no augmentation'), ('augment', ('flip', None), 'with usual augmentation'),
    ('size', (None, 14), 'at image size 14'), ('arch', ('resnet18', 'wrn-28-10'), 'with wrn-28-10')])
def test_every_setting_of_a_task_has_a_text(name, values, where):
    "Augmentation, image size and network once ended every report that they differed in"
    df = pd.concat([frame(at(.7, .4), student(.8, r)).assign(**{name: v}) for v,r in zip(values, (.6, .2))])
    assert where in gain(df).attrs['verdict'] and len(select(df)) == 6 and set(views(df)) >= {'selected','gain'}

def test_what_only_training_for_longer_can_win():
    got = gain(frame(at(.7, .4, epochs=80), student(.8, .5, compute=120)))
    dearer = gain(frame(at(.7, .4, epochs=80), student(.8, .2, compute=120)))
    assert dearer.Result[0] == 'better, but with more epochs, less robust'
    assert got.Result[0] == 'better, but with more epochs'
    assert 'Every student needed over 10 % more epochs' in got.attrs['verdict']

def test_a_gain_without_a_number_of_images_shows_nothing():
    got = gain(frame(at(.7, .4), student(.8, .6)).drop(columns=['n_clean','n_pgd20']))
    assert got['PGD-20 gain'][0] == '+20.0' and got.Result[0] == 'no difference'

def test_runs_of_one_folder_may_be_compiled_or_not():
    df = pd.concat([study(seeds=1).assign(compile=c, bf16=c) for c in (False, True)])
    assert len(over_seeds(df)) == len(df) and len(views(df)) > 3

def test_students_that_were_trained_differently_are_distinguished():
    df = frame(at(.7, .4), *(student(.7+i/100, .5, lr=lr, attack=a)
                             for i,(lr,a) in enumerate([(.1, None), (.2, None), (.2, 'pgd3')])))
    got = gain(df)
    assert got['Learning rate'].tolist() == ['0.2','0.2','0.1'] and got['Attack'].tolist() == ['pgd3','–','–']
    assert 'Learning rate=0.2' in select(df).Hyperparameters.iloc[-1]
    by = select(pd.concat([frame(*(at(.6+i/100, .4, schedule=k) for i,k in enumerate(('onecycle','exp')))),
                           frame(student(.7, .4))])).Hyperparameters
    assert (sorted(by[:2]) == ['AT, schedule exp', 'AT, schedule onecycle, the baseline']
            or sorted(by[:2]) == ['AT, schedule exp, the baseline', 'AT, schedule onecycle'])

def test_teacher_width_is_named_where_it_differs():
    own = frame(*(r for w in (1., .25) for r in (
        at(.7, .4, width=w), student(.7, .5, width=w, teacher_width=w),
        student(.7, .5, width=w, teacher_width=w, alpha=.8))))
    assert len(main_task(own, free=['width'])) == len(own) and set(views(own)) >= {'selected','capacity'}
    assert 'Teacher' not in ' '.join(select(own).Hyperparameters) and 'Teacher’s width' not in gain(own)
    both = pd.concat([own, frame(student(.7, .5, width=.25, teacher_width=1.))])
    assert 'Teacher’s width' in gain(both) and len(main_task(both, free=['width'])) == len(own)

def test_table2_leaves_out_students_of_another_architecture():
    df = frame(at(.7, .4, arch='resnet18'), student(.7, .5, arch='resnet18', teacher_arch='resnet18'),
               student(.9, .9, arch='resnet18', teacher_arch='wrn-28-10', alpha=.8))
    assert '90.0' in select(df).Clean.tolist() and '90.0' not in table2(df).Clean.tolist()

# --- one choice per teacher ---

def test_radius_of_the_teachers():
    df = frame(at(.7, .4, eps=24/255), *(student(.7, .4, teacher=t, eps=24/255) for t in ('st','lat','at')))
    assert table3(df)['ε of the teacher'].tolist() == ['0','6/255','24/255']
    assert (table3(df.assign(teacher_eps=df.teacher.map(dict(st=0., lat=2/255, at=24/255))))['ε of the teacher']
            .tolist() == ['0','2/255','24/255'])

def test_what_is_chosen_for_each_kind_of_teacher():
    df = frame(at(.7, .4), *(student(*v, m, t, alpha=a) for m in ('akd','rslad') for t,a,v in [
        ('at', .1, (.75,.45)), ('at', .9, (.6,.5)), # the most robust one, whatever it costs
        # the most accurate one that keeps the robustness
        ('st', .1, (.72,.39)), ('st', .5, (.74,.38)), ('st', 1., (.9,.0)),
        # none keeps it: the most robust
        ('lat', .2, (.8,.37)), ('lat', .3, (.85,.2))])).query("not (method == 'rslad' and teacher == 'lat')")
    got = table3(df).set_index('Teacher training')
    assert list(got.index) == ['ST','LAT','AT'] and got['ε of the teacher'].tolist() == ['0','2/255','8/255']
    assert (got['AKD⁺ clean'].tolist() == ['74.0','80.0','60.0']
            and got['AKD⁺ PGD-20'].tolist() == ['38.0','37.0','50.0'])
    assert (got['AKD⁺ chosen'].tolist() == ['no ES, α=0.5','no ES, α=0.2 §','no ES, α=0.9']
            and got['RSLAD⁺ clean'].tolist() == ['74.0','–','60.0'])
    assert 'AT without a teacher (last epoch): 70.0 clean, 40.0 PGD-20' in got.attrs['caption']
    assert table3(df, within=.01).set_index('Teacher training')['AKD⁺ clean']['ST'] == '72.0'
    assert table3(df.query("method != 'at'"))['AKD⁺ clean'][0] == '90.0' # with no baseline there is no bound

def test_ensembles_are_compared_at_the_same_settings():
    df = frame(student(.7, .40, alpha=.5), student(.7, .50, alpha=.9), student(.71, .45, teacher='4 at', members=4),
               student(.72, .46, teacher='2 at', members=2), student(.7, .9, teacher='2 st, 2 at', beta=.5),
               student(.7, .3, teacher='ffgsm'), student(.7, .31, teacher='4 ffgsm', alpha=.7))
    got = table5(df).set_index('Teacher training')
    assert (got.loc['AT','1 model PGD-20'].tolist() == ['40.0','40.0']
            and sorted(got.loc['AT','4 models PGD-20']) == ['45.0','–']
            and sorted(got.loc['AT','2 models PGD-20']) == ['46.0','–'])
    assert got.loc['AT (FFGSM)',['1 model PGD-20','4 models PGD-20']].tolist() == ['30.0','31.0'] # nothing in common
    with pytest.raises(ValueError, match='both alone and as an ensemble'): table5(study())

def test_teachers_themselves():
    own = lambda t, *v, **kw: base | dict(
        method='teacher', teacher=t, clean=v[0], pgd7=v[1], autoattack=v[2], seed=0) | kw
    got = table12(frame(own('at', .8, .5, .4), own('at', .82, .52, None, seed=1),
                        own('4 at', .81, .51, .45), at(.1, .1)))
    assert got.Teacher.tolist() == ['AT','4 × AT'] and got.Models.tolist() == ['1','4']
    assert (got.Clean.tolist() == ['81.0 ± 1.4','81.0'] and got['PGD-7'].tolist() == ['51.0 ± 1.4','51.0']
            and got.AutoAttack.tolist() == ['40.0 (1 of 2 seeds)','45.0'])

def test_caption_counts_the_images_of_every_column():
    "Of an attack other than the strongest they were once not counted"
    many = dict(split='test', autoattack=.35, n_clean=10_000, n_pgd20=10_000, n_autoattack=1000)
    df = frame(at(.7, .4, **many, drawn_autoattack='the first of the split'))
    counts = 'test images: 10,000 for Clean and PGD-20, 1,000 (the first of the split) for AutoAttack'
    assert counts in baselines(df).attrs['caption']
    same = frame(at(.7, .4, **many | dict(n_clean=1000, n_pgd20=1000)))
    assert '; 1,000 test images.' in baselines(same).attrs['caption']

def test_a_view_names_the_tasks_that_it_leaves_out():
    df = pd.concat([study(), *(frame(at(.7, .4, n=n), student(.8, .6, n=n)) for n in (2000, 500))])
    left_out = [f'Students with {n} training images are left out.' for n in ('500', '2,000')]
    assert views(df)['selected'].table.attrs['caption'].splitlines()[-2:] == left_out
    assert 'training images are left out' not in views(df)['gain'].table.attrs['caption']
    more = pd.concat([df, *(frame(student(.8, .6, n=n)) for n in (300, 400))])
    assert views(more)['selected'].table.attrs['caption'].endswith('\nStudents of 4 other tasks are left out.')

# --- what figures show ---

def test_map_table_has_every_cell():
    df = study()
    for value,c in (('clean','clean'), ('robust','pgd20'), ('pgd20','pgd20')):
        got = map_table(df, value).set_index(['Method','Teacher','α'])
        for (m,t,a,s),g in df[df.method != 'at'].groupby(['method','teacher','alpha','teacher_epoch']):
            assert number(got.loc[(methods[m], t.upper(), f'{a:g}'), f'ES {s:g}']) == round(100*g[c].mean(), 1)
    with pytest.raises(ValueError, match=r"differ in \['T'\]"):
        map_table(pd.concat([df, frame(student(.7, .4, alpha=.3, T=4.))]))

def test_axis_takes_the_setting_with_the_most_values():
    df = frame(*(at(.6+n/1e4, .4, w, n=n) for n in (500,1000,2000) for w in ('last','best')),
               *(student(.6+n/1e4, .41, n=n, alpha=.3) for n in (500,1000,2000)),
               *(student(.9, .9, n=n, alpha=.9) for n in (500,1000)), *(student(.6, .9, 'rslad', n=n) for n in (500,)))
    got = axis_table(df, 'n')
    assert (got.Network.tolist() == ['AT alone, last epoch']*3 + ['AT alone, best epoch']*3 + ['AKD⁺, AT']*3
            and got['Training images'].tolist() == ['500','1,000','2,000']*3)
    assert got.Clean.tolist() == ['65.0','70.0','80.0']*3 and set(got.Chosen) == {'–','no ES, α=0.3'}

def test_beta_and_capacity_tables():
    df = pd.concat([study(), frame(*(student(.7+b/10, .4, teacher='2 st, 2 at', beta=b) for b in (0,.5,1)))])
    got = beta_table(df)
    assert (got['β'].tolist() == ['0','0.5','1'] and got.Clean.tolist() == ['70.0','75.0','80.0']
            and set(got.Network) == {'AKD⁺, 2 × ST + 2 × AT'})
    widths = frame(*(r for w in (1/16,1.) for r in (
        at(.6, .3, width=w), student(.6+w/10, .3-w/10, width=w, alpha=.1),
        student(.59, .35+w/10, width=w, alpha=.9), student(.9, .9, width=w, teacher='4 at'))))
    got = capacity_table(widths)
    assert (got['Width'].tolist() == ['1/16','1']
            and [number(v) for v in got['RKD-Rob.: PGD-20 gain']] == [5.6,15.0])
    assert [number(v) for v in got['RKD-Acc.: clean gain']] == [.6,-1.0] # at width 1 the accurate one costs 10 points

def test_front_table():
    df = study()
    means = over_seeds(df)
    means = means[means.method != 'at']
    assert [number(v) for v in front_table(df).Clean] == [round(100*v, 1) for v in pareto(means, robust='pgd20').clean]
    assert len(front_table(df, by='teacher')) == sum(len(pareto(g, robust='pgd20')) for _,g in means.groupby('teacher'))

# --- captions and files ---

def test_captions_say_how_it_was_measured():
    df = study(seeds=2).assign(n_pgd20=300, split='test')
    df = pd.concat([df, frame(student(None, None, alpha=.9, diverged='loss is NaN'), student(None, None, alpha=.95),
                              student(.1, None, alpha=.97), student(.7, .4, alpha=.98))])
    for f in (select, gain, table3, front_table):
        text = f(df, robust='pgd20').attrs['caption']
        assert ('± is the standard deviation' in text) == (f is not gain) # there it is that of a difference
        for part in ('toys; 1,000 training images; ε = 8/255; width 1; '
                     'test images: 400 for Clean, 300 and 400 for PGD-20',
                     '1 to 2 seeds were used', '1 diverged training run is left out.',
                     '1 row without accuracies is left out.', '1 row without PGD-20 is left out.'):
            assert part in text, (f, part, text)
    assert ('One seed was used, so there is no ±.' in select(study(seeds=1)).attrs['caption']
            and 'left out' not in select(study()).attrs['caption'])
    assert ('20 % wrong labels' in select(study(noise=.2)).attrs['caption']
            and 'wrong labels' not in select(study()).attrs['caption'])

def test_markdown_and_csv():
    table = pd.DataFrame({'Method': ['a|b <i>', 'c\nd'], 'Clean': ['48.1 ± 0.3', '–']})
    table.attrs.update(caption='Made up.\nTruly.', verdict='One.\nTwo.')
    assert as_markdown(table) == ('| Method         |      Clean |\n|:---------------|-----------:|\n'
                                  '| a\\|b &lt;i&gt; | 48.1 ± 0.3 |\n| c d            |          – |\n\n'
                                  'One.\n\nTwo.\n\n- Made up.\n- Truly.\n')
    got = select(study())
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(got.to_csv(index=False)), dtype=str, keep_default_na=False),
                                  got.astype(str), check_dtype=False)

# --- figures ---

def dots(ax):
    return sorted(map(tuple, np.concatenate([c.get_offsets() for c in ax.collections if hasattr(c, 'get_offsets')
                                             and len(c.get_sizes() if hasattr(c, 'get_sizes') else [])]
                                            or [np.zeros((0,2))]).round(6)))

@pytest.mark.parametrize('color', ['teacher_epoch','alpha','method','teacher'])
def test_every_student_is_where_it_belongs(color):
    df = study()
    fig = plot_pareto(df, color=color, below=None)
    means = over_seeds(df)
    panels = {ax.get_title(): ax for ax in fig.axes}
    assert len(panels) == dict(teacher_epoch=4, alpha=4, method=2, teacher=2)[color]
    for title,ax in panels.items():
        students = means[means.method != 'at']
        mine = students[[(color == 'method' or methods[m] in title.split(', '))
                         and (color == 'teacher' or f'{t.upper()} teacher' in title)
                         for m,t in zip(students.method, students.teacher)]]
        np.testing.assert_allclose(dots(ax), sorted(map(tuple, 100*mine[['clean','pgd20']].to_numpy())))
    stars = means[means.method == 'at'].sort_values('pgd20')
    drawn = [l.get_xydata()[0] for l in fig.axes[0].lines if l.get_marker() == '*']
    np.testing.assert_allclose(sorted(y for _,y in drawn), 100*stars.pgd20)
    labels = [t.get_text() for t in fig.legends[0].get_texts()]
    assert set(dict(teacher_epoch=['ES 10','ES 40','α = 0.3'], alpha=['α = 0.3','ES 10'], method=['AKD⁺','RSLAD⁺'],
                    teacher=['ST','AT'])[color]) <= set(labels)
    assert sum('AT alone' in t for t in labels) == 2 and '36 students' in fig.get_label()

def test_colours_and_sizes_grow():
    df = frame(at(.7, .4), *(student(.7+a/100, .4-s/1000, alpha=a, teacher_epoch=s)
                             for a in (.1,.5,.9) for s in (10,20)))
    fig = plot_pareto(df)
    drawn, = [c for c in fig.axes[0].collections if hasattr(c, 'get_sizes') and len(c.get_offsets()) == 6]
    look = pd.DataFrame(dict(alpha=((drawn.get_offsets()[:,0]-70)).round(1),
                             teacher_epoch=(1000*(.4-drawn.get_offsets()[:,1]/100)).round(), size=drawn.get_sizes(),
                             green=drawn.get_facecolors()[:,1]))
    assert ((look.groupby('alpha')['size'].nunique() == 1).all()
            and look.groupby('alpha')['size'].first().is_monotonic_increasing and look['size'].nunique() == 3)
    assert ((look.groupby('teacher_epoch').green.nunique() == 1).all()
            and look.groupby('teacher_epoch').green.first().tolist()[0]
                < look.groupby('teacher_epoch').green.first().tolist()[1])

def test_what_is_far_below_is_counted():
    df = frame(at(.7, .4), student(.72, .41), student(.9, .05, alpha=1.), student(.5, .5, alpha=.9))
    ax, = plot_pareto(df).axes
    assert len(dots(ax)) == 1 and '2 far below' in [t.get_text() for t in ax.texts]
    assert len(dots(plot_pareto(df, below=.4).axes[0])) == 3
    # all are far below
    assert len(dots(plot_pareto(frame(at(.9, .9), student(.7, .1), student(.7, .1, alpha=1.))).axes[0])) == 2

def test_front_in_the_figure_is_a_staircase():
    df = frame(at(.5, .3), student(.7, .40, alpha=.1), student(.75, .35, alpha=.2), student(.72, .30, alpha=.3))
    ax, = plot_pareto(df, below=None).axes
    line, = [l for l in ax.lines if l.get_drawstyle() == 'steps-pre']
    np.testing.assert_allclose(line.get_xydata()[1:3], [[70,40],[75,35]])
    assert line.get_xdata()[0] == ax.get_xlim()[0] and line.get_ydata()[-1] == ax.get_ylim()[0]

@pytest.mark.parametrize('value, c', [('clean','clean'), ('robust','pgd20')])
def test_map_shows_its_numbers(value, c):
    df = study()
    fig = plot_map(df, value)
    for (m,t),g in df[df.method != 'at'].groupby(['method','teacher']):
        ax, = [a for a in fig.axes if a.get_title() == f'{methods[m]}, {t.upper()} teacher']
        want = (100*g.pivot_table(index='alpha', columns='teacher_epoch', values=c)).round(1).to_numpy()
        got = {(round(x.get_position()[1]), round(x.get_position()[0])): float(x.get_text()) for x in ax.texts}
        assert got == {k: v for k,v in np.ndenumerate(want)}
        frames = [(round(p.get_y()+.45), round(p.get_x()+.47)) for p in ax.patches]
        exact = g.pivot_table(index='alpha', columns='teacher_epoch', values=c).to_numpy()
        assert frames == [np.unravel_index(exact.argmax(), exact.shape)]
        shade = ax.images[0]
        assert shade.norm.vcenter == pytest.approx(
            100*over_seeds(df).query("method == 'at'").sort_values('pgd20')[c].iloc[-1])
    assert plot_map(df[df.method != 'at'], value).axes[0].images[0].cmap.name == 'viridis' # nothing to compare with

def test_lines_and_gains_are_where_they_belong():
    df = frame(*(at(.6+e, .5-e, eps=e) for e in (.01,.02,.1)), *(student(.61+e, .5-e/2, eps=e) for e in (.01,.02,.1)))
    clean,robust = plot_axis(df, 'eps').axes
    drawn = {l.get_color(): l.get_ydata().astype(float) for l in robust.lines if len(l.get_xdata()) == 3}
    assert (any(np.allclose(y, [49,48,40]) for y in drawn.values())
            and any(np.allclose(y, [49.5,49,45]) for y in drawn.values())
            and [t.get_text() for t in clean.get_xticklabels()] == ['0.01','0.02','0.1'])
    level = plot_axis(pd.concat([study()]), 'alpha').axes[0]
    assert any(len(set(l.get_ydata())) == 1 and l.get_linestyle() == '--' for l in level.lines)
    mixed = pd.concat([study(), frame(*(student(.7+b/10, .4-b/10, teacher='2 st, 2 at', beta=b) for b in (0,.5,1)))])
    a,b,path = plot_beta(mixed).axes
    np.testing.assert_allclose([l.get_ydata() for l in a.lines if len(l.get_xdata()) == 3][0].astype(float), [70,75,80])
    assert [t.get_text() for t in path.texts] == ['0','0.5','1'] and a.get_xlabel() == 'β, weight of 2 × AT'
    widths = frame(*(r for w in (1/16,1.) for r in (at(.6, .3, width=w), student(.6+w/10, .3+w/20, width=w))))
    ax, = plot_capacity(widths).axes
    assert ([t.get_text() for t in ax.texts] == ['+0.6','+10.0','+0.3','+5.0']
            and [t.get_text() for t in ax.get_xticklabels()] == ['1/16','1'])

def test_figures_leave_matplotlib_as_it_was():
    before = dict(plt.rcParams)
    plot_pareto(study()); plot_map(study())
    assert dict(plt.rcParams) == before

def test_a_figure_that_fails_is_closed(monkeypatch):
    def fails(*args, **kwargs): raise RuntimeError('no room')
    plt.figure()
    monkeypatch.setattr(plt.Axes, 'set_title', fails)
    with pytest.raises(RuntimeError, match='no room'): plot_pareto(study(seeds=1))
    assert len(plt.get_fignums()) == 1 # that which was there before

# --- the page ---

class Page(HTMLParser):
    "What is on a page; raises where a tag is not closed"
    def __init__(self, text):
        super().__init__()
        self.open,self.tags,self.texts = [],[],[]
        self.feed(text); self.close()
        assert not self.open, self.open
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta','img','source','br'): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag, tag
    def handle_data(self, data): self.texts.append(data)
    def all(self, tag): return [a for t,a in self.tags if t == tag]

evil = '<script>alert(1)</script>"&|'

@pytest.fixture(scope='module')
def whole():
    "Rows for every view, with texts that want escaping"
    df = pd.concat([study(methods=('akd',), stops=(20,40), alphas=(.3,1.)), frame(
        *(r for n in (250,500) for r in (at(.6, .3, n=n), student(.62, .33, n=n, alpha=.3))),
        *(r for e in (.01,.02) for r in (at(.8, .6, eps=e), student(.8, .6, eps=e, alpha=.3))),
        *(r for v in (.2,.4) for r in (at(.5, .3, noise=v), student(.6, .35, noise=v, alpha=.3))),
        *(r for w in (1/4,1/16) for r in (at(.5, .2, width=w), student(.5, .2, width=w, alpha=.3))),
        *(student(.7, .4, teacher='2 st, 2 at', beta=b, alpha=.3) for b in (0,1)),
        student(.7, .4, teacher='4 at', alpha=.3), student(.7, .4, alpha=.3, epochs=20),
        at(.6, .3, recipe='wang_at_plus'), base | dict(method='teacher', teacher=evil, clean=.7, pgd20=.4),
        student(None, None, alpha=.8, diverged=evil))])
    return df.assign(data=evil)

@pytest.fixture(scope='module')
def written(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    before = whole.copy(deep=True)
    plt.close('all')
    path = write_report(whole, folder, evil, f'First {evil}\n\nSecond')
    assert not plt.get_fignums()
    pd.testing.assert_frame_equal(whole, before)
    return folder,path.read_text(encoding='utf8')

def test_files_of_every_view(whole, written):
    folder,_ = written
    found = views(whole)
    assert list(found) == list(page_module._views)
    want = {'index.html','means.csv'} | {f'{k}.{e}' for k,v in found.items()
                                         for e in (('md','csv','png') if v.plot else ('md','csv'))}
    assert {p.name for p in folder.iterdir()} == want
    for k,v in found.items():
        assert ((folder/f'{k}.md').read_text(encoding='utf8') == as_markdown(v.table)
                and (folder/f'{k}.csv').read_text(encoding='utf8') == v.table.to_csv(index=False))
        if v.plot: assert plt.imread(folder/f'{k}.png').shape[1] > 450
    assert len(pd.read_csv(folder/'means.csv')) == len(over_seeds(whole))

@pytest.mark.few(1)
def test_page_is_whole_and_fetches_nothing(whole, written):
    _,text = written
    page,found = Page(text),views(whole)
    assert 'script' not in {t for t,_ in page.tags} and not re.search(r'url\(|@import|https?:', text)
    assert (all(a['href'].startswith('#') for a in page.all('a'))
            and [a['href'][1:] for a in page.all('a')] == [a['id'] for a in page.all('section') if 'id' in a]
            == list(found))
    assert page.texts.count(evil) >= 3 and f'First {evil}' in page.texts # title, heading, a teacher's kind
    images = page.all('img')
    assert (len(images) == len(page.all('source')) == sum(v.plot is not None for v in found.values())
            and all(len(a['alt']) > 40 for a in images))
    for a in [*(i['src'] for i in images), *(s['srcset'] for s in page.all('source'))]:
        assert base64.b64decode(a.removeprefix('data:image/png;base64,')).startswith(b'\x89PNG')
    assert all(s['media'] == '(prefers-color-scheme: dark)' and s['srcset'] != i['src']
               for s,i in zip(page.all('source'), images))
    assert (len(page.all('table')) == len(found)
            and all(l in page.texts for v in found.values() for l in v.table.attrs['caption'].splitlines()))
    assert 'name="viewport"' in text

def test_dark_figures_are_dark():
    plot = views(study(methods=('akd',), teachers=('at',)))['trade_off'].plot
    light,dark = (plt.imread(io.BytesIO(page_module._png(plot, d)[0])) for d in (False, True))
    assert light[0,0,:3].mean() > .9 and dark[0,0,:3].mean() < .2 and light.shape == dark.shape

def test_views_without_rows_are_named_and_their_old_files_go(tmp_path):
    (tmp_path/'capacity.md').write_text('old')
    (tmp_path/'capacity.png').write_text('old')
    (tmp_path/'mine.md').write_text('mine')
    df = study(methods=('akd',), stops=(20,), alphas=(.5,), seeds=1)
    page = Page(write_report(df, tmp_path, 'A study').read_text(encoding='utf8'))
    found = list(views(df))
    missing = [k for k in page_module._views if k not in found]
    assert found == ['selected','gain','teachers','teacher_kinds','baselines'] and 'capacity' in missing
    assert list(views(study())) == ['selected','gain','trade_off','map_clean','map_robust','teachers','teacher_kinds',
                                    'baselines']
    for k in missing: assert any(t.startswith(f"{k}: the study has") for t in page.texts), k
    assert not any("`df`" in t for t in page.texts) # a reader of the page knows of none
    assert (not (tmp_path/'capacity.md').exists() and not (tmp_path/'capacity.png').exists()
            and (tmp_path/'mine.md').read_text() == 'mine')

def test_a_report_where_no_baseline_is_the_one(tmp_path):
    "Networks trained by two other methods than AT: a caller is asked which, the page leaves out what compares"
    df = pd.concat([frame(student(.7, .4)), frame(at(.7, .4, method='st'), at(.7, .4, method='trades'))])
    page = Page(write_report(df, tmp_path, 'A study').read_text(encoding='utf8'))
    assert list(views(df)) == ['baselines'] and any(
        t.startswith("gain: the study has no network trained by 'at' to compare with, but some by ['st', 'trades']")
        for t in page.texts)

def test_nothing_is_written_where_a_figure_fails(tmp_path, monkeypatch):
    def fails(*args, **kwargs): raise RuntimeError('no room')
    monkeypatch.setattr(plt.Figure, 'savefig', fails)
    with pytest.raises(RuntimeError, match='no room'): write_report(study(), tmp_path/'new', 'A study')
    assert not (tmp_path/'new').exists() and not plt.get_fignums()

def test_the_same_rows_give_the_same_page(tmp_path):
    df = study(methods=('akd',), stops=(20,), alphas=(.5,), seeds=1)
    assert len({write_report(df, tmp_path/k, 'A study').read_bytes() for k in 'ab'}) == 1

def test_neither_fastai_nor_a_display_is_needed():
    code = ("import sys, rkd_fastai.study.report.page; "
            "assert not [m for m in sys.modules if m.split('.')[0] == 'fastai']")
    subprocess.run([sys.executable, '-c', code], check=True)

# --- bad input ---

students,teachers = frame(student(.7, .4), student(.7, .4, alpha=.9)),frame(at(.7, .4))

@pytest.mark.parametrize('call, says', [
    (lambda: select([1]), '`df` must be a DataFrame'),
    (lambda: select(pd.DataFrame(dict(method=['akd']))), "no column 'clean'"),
    (lambda: over_seeds(pd.DataFrame(dict(clean=[.5]))), "no column 'method'"),
    (lambda: select(students.assign(clean=70.)), "'clean' must hold fractions"),
    (lambda: select(students.assign(eps='8/255')), "'eps' must hold numbers"),
    (lambda: select(students.assign(method=None)), "'method' is empty"),
    (lambda: select(teachers), 'has no students'), (lambda: gain(teachers), 'has no students'),
    (lambda: table3(teachers), 'has no students'), (lambda: plot_pareto(teachers), 'has no students'),
    (lambda: main_task(teachers), 'has no students'),
    (lambda: select(students), 'has no baseline'), (lambda: gain(students), 'has no baseline'),
    (lambda: plot_capacity(students), 'has no baseline'),
    (lambda: select(pd.concat([students, teachers]), baseline='trades'), r"no rows of 'trades', only of \['at'\]"),
    (lambda: select(pd.concat([students, frame(at(.7, .4, method='st'), at(.7, .4, method='trades'))])),
     r"`baseline`: which of \['st', 'trades'\]"),
    (lambda: select(pd.concat([students, teachers]), robust='cw'), "`robust`: `df` has no column 'cw'"),
    (lambda: pareto(students, clean='tidy'), "`clean`: `df` has no column 'tidy'"),
    (lambda: front_table(students, by='colour'), "`by`: `df` has no column 'colour'"),
    (lambda: plot_pareto(students, color='seed'), '`color` must be'),
    (lambda: plot_axis(students, 'seed'), '`x` must be one of'),
    (lambda: map_table(students, 'loss'), "`value`: `df` has no column 'loss'"),
    (lambda: select(pd.concat([students, teachers]), within=2), '`within`'),
    (lambda: select(students.assign(clean=None)), 'no row with accuracies'),
    (lambda: write_report(students, 'nowhere', ' '), '`title`'),
    (lambda: write_report(students.drop(columns='pgd20'), 'nowhere', 'A'), 'not enough for any'),
    (lambda: baselines(students), 'no network trained without a teacher'),
    (lambda: table12(students), 'no teachers that were measured'),
    (lambda: beta_table(students), 'no students of mixed ensembles'),
    (lambda: axis_table(students, 'n'), 'differ in `n`'), (lambda: plot_map(students[:1]), 'two values of α'),
    (lambda: table5(students), 'both alone and as an ensemble'),
    (lambda: write_report(students, __file__, 'A'), '`folder` is a file')])
def test_errors_say_what_is_missing(call, says):
    with pytest.raises(ValueError, match=says): call()
    assert not plt.get_fignums()

# --- what a terminal shows, and what a figure's edge cuts off ---

def test_text_plot_is_of_one_task():
    "Students of another radius are no rivals, and a teacher is no baseline"
    df = frame(at(.7, .4), student(.75, .45), student(.72, .5, alpha=.8))
    plot = pareto_text(df)
    other = frame(student(.9, .9, eps=1/255),
                  base | dict(method='teacher', teacher='st', checkpoint='last', clean=.95, pgd20=.01, seed=0))
    assert pareto_text(pd.concat([df, other])) == plot and plot.count('●') == 3 and ' 50.0 ┤' in plot

def test_figures_and_text_round_as_tables_do():
    "Halves of a tenth: 45.25 is 45.3 everywhere, where Python alone says 45.2"
    df = frame(at(.7, .4025), student(.7525, .4525), student(.7225, .4425, alpha=.8),
               student(.7225, .4325, teacher_epoch=20))
    shown = {t.get_text() for ax in plot_map(df).axes for t in ax.texts}
    assert (shown == {'45.3','44.3','43.3'}
            and {v for v in map_table(df).iloc[:, 3:].to_numpy().ravel()} - {'–'} == shown)
    assert (' 45.3 ┤' in pareto_text(df) and ' 40.3 ┤' in pareto_text(df)
            and pareto_text(df).splitlines()[-2].split() == ['70.0','clean,','%','75.3'])
    for words in (plot_map(df).get_label(), plot_pareto(df).get_label()): assert '45.3 %' in words and '40.3 %' in words
    assert '75.3 % clean' in plot_pareto(df).get_label()

def test_all_stars_of_the_mixture_are_in_its_legend():
    df = frame(at(.7, .4), at(.69, .42, checkpoint='best'),
               *[student(.7+b/50, .5-b/50, teacher='2 st, 2 at', beta=b) for b in (0., .5, 1.)])
    fig = plot_beta(df)
    texts = [t.get_text() for t in fig.legends[0].get_texts()]
    assert texts == ['AKD⁺, 2 × ST + 2 × AT', 'AT alone, best epoch', 'AT alone, last epoch']
    # of the first there is a level line, too
    assert [h.get_linestyle() for h in fig.legends[0].legend_handles[1:]] == ['--', 'None']

def test_baselines_as_they_are():
    df = frame(at(.7, .4), at(.72, .42, seed=1), at(.69, .42, checkpoint='best'),
               at(.71, .41, method='trades', epochs=60),
               student(.9, .9), base | dict(method='teacher', teacher='st', checkpoint='last', clean=.9, pgd20=0.))
    got = baselines(df)
    assert (got.Method.tolist() == ['AT','AT','TRADES'] and got.Epoch.tolist() == ['last','best','last']
            and got.Epochs.tolist() == ['80','80','60'])
    assert got.Clean.tolist() == ['71.0 ± 1.4','69.0','71.0'] and got['PGD-20'].tolist() == ['41.0 ± 1.4','42.0','41.0']
    assert list(views(frame(at(.7, .4)))) == ['baselines']

def test_legend_of_one_panel_is_whole():
    df = frame(at(.7, .4), at(.69, .42, checkpoint='best'), student(.75, .45), student(.72, .5, alpha=.8))
    fig = plot_pareto(df)
    fig.canvas.draw()
    legend, = fig.legends
    box,(width,high) = legend.get_window_extent(),fig.get_size_inches()*fig.dpi
    assert len(fig.axes) == 1 and box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= high

def test_why_a_figure_is_not_shown(tmp_path):
    "Where nothing varies that it would show, and not that there were no students"
    page = write_report(frame(at(.7, .4), student(.75, .45)), tmp_path, 'One').read_text(encoding='utf8')
    assert 'several values of α or of the stopping epoch' in page and 'no students: rows' not in page

def test_kinds_of_teacher_by_name(): assert kind_name('at+') == 'AT⁺' and kind_name('2 st, at') == '2 × ST + AT'

# --- Table 1, and the tables of published recipes ---

def test_table1_names_the_baseline_and_the_best_students_of_each_task():
    "One line if a student is the best in both; a student that loses too much in the other accuracy is in no line"
    rows = [at(.70, .40, data='a'), student(.75, .385, teacher='lat', data='a'), student(.69, .45, data='a'),
            student(.99, .30, teacher='st', data='a'), at(.60, .30, data='b'), student(.65, .35, data='b')]
    got = table1(frame(*rows))
    assert got[['Data','Teacher','Clean','PGD-20']].values.tolist() == [
        ['a','none (AT)','70.0','40.0'], ['a','LAT','75.0','38.5'], ['a','AT','69.0','45.0'],
        ['b','none (AT)','60.0','30.0'], ['b','AT','65.0','35.0']]
    assert 'at most 2 points less robust' in got.attrs['caption']

def test_table6_is_of_networks_with_a_recipe():
    "Networks without a teacher first; students are compared with baselines of the same recipe and synthetic images"
    own = dict(recipe='rebuffi_at_plus', synthetic='ddpm.npz')
    df = frame(student(.8, .5, alpha=1.0, autoattack=.48, **own), at(.7, .4, autoattack=.38, **own), at(.9, .9),
               student(.82, .52, 'rslad', autoattack=.49, **own), student(.9, .9))
    got = table6(df)
    assert got[['Method','Teacher','α','Clean','PGD-20','AutoAttack']].values.tolist() == [
        ['AT','–','–','70.0','40.0','38.0'], ['AKD⁺','AT','1','80.0','50.0','48.0'],
        ['RSLAD⁺','AT','0.5','82.0','52.0','49.0']]
    assert 'recipe: rebuffi_at_plus; synthetic images: ddpm.npz' in got.attrs['caption']
    with pytest.raises(NotEnough, match='no networks that are trained by a `recipe`'): table6(frame(at(.9, .9)))
    g,_ = gains(df)
    assert sorted(g.clean_gain.round(3)) == [0, .1, .12] # the student without a recipe has its own baseline
