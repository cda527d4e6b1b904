"Masked gradients are found, whatever hides them; small ones are not taken for masked."
import copy

import pytest, torch, torch.nn as nn
from fastai.vision.all import DataLoader, load_learner
from rkd_fastai.all import *

class Behind(nn.Module):
    "A network behind something that hides its gradient"
    def __init__(self, net, before=lambda x: x, after=lambda o: o):
        super().__init__()
        self.net,self.before,self.after = net,before,after
    def forward(self, x): return self.after(self.net(self.before(x)))

blind = {'larger radius','along the gradient'} # what every mask of the gradient shows
shows = dict(quantised=blind | {'zero gradients','no gradient needed'}, saturated=blind | {'zero gradients'},
             sawtooth=blind | {'no gradient needed'}, detached=blind | {'zero gradients','no gradient needed'},
             misled=blind | {'no gradient needed'})
masks = dict(
    quantised = dict(before=lambda x: (x*10).round()/10),
    saturated = dict(after=lambda o: o*1e3),
    sawtooth  = dict(before=lambda x: x + .03*torch.sin(x*2e3)),
    detached  = dict(before=lambda x: x.detach() + 0*x),
    misled    = dict(before=lambda x: 2*x.detach() - x)) # the gradient points the other way

@pytest.mark.few(2)
@pytest.mark.parametrize('name', masks)
def test_masks_are_seen(name, robust_net, test_images):
    "By each symptom that it has"
    x, y = (t[:80] for t in test_images)
    report = check_masking(Behind(robust_net, **masks[name]).eval(), x, y, .1)
    assert not report.ok and {s.name for s in report.symptoms if s.suspicious} == shows[name]
    assert repr(report).count('SUSPICIOUS') == len(shows[name]) == report.to_df().suspicious.sum()

@pytest.mark.parametrize('check, accs, suspicious', [
    ('_more_steps', [.6, .5, .5], False), ('_more_steps', [.5, .5, .6], True), ('_more_steps', [.5, .51, .5], False),
    ('_one_step', [.6, .5], False), ('_one_step', [.5, .6], True)])
def test_accuracies_in_the_wrong_order(check, accs, suspicious, monkeypatch):
    "More steps, or many in place of one, must not help the defender by more than chance"
    from rkd_fastai.evaluation import masking
    left = iter(accs)
    monkeypatch.setattr(masking, '_accuracy', lambda *_: next(left))
    assert getattr(masking, check)(None, torch.zeros(200), None, .1)[1] == suspicious

@pytest.mark.few(1)
@pytest.mark.parametrize('eps', [.05, .1])
def test_robust_and_plain_networks_are_not_suspicious(eps, robust_net, plain_net, test_images, snapshot):
    "A network that falls is not one that hides; neither is changed by being looked at"
    x, y = (t[:80] for t in test_images)
    for net in (robust_net, plain_net):
        before, rng = snapshot.take(net), torch.get_rng_state()
        report = check_masking(net, x, y, eps)
        assert report.ok, report
        assert snapshot.same(before, snapshot.take(net)) and torch.equal(rng, torch.get_rng_state())
        assert repr(check_masking(net, x, y, eps)) == repr(report)

def test_of_a_normalised_learner(make_learner, make_dls, robust_net):
    "In pixels, whatever the DataLoaders do; on validation images"
    class Denormalised(nn.Module):
        def __init__(self): super().__init__(); self.net = robust_net
        def forward(self, x): return self.net(x*.25 + .5)
    plain, normalised = (make_learner(make_dls(n_valid=60, stats=stats), net).check_robustness(eps=.1, n=50)
                         for stats,net in ((None, robust_net), (([.5], [.25]), Denormalised())))
    assert plain.ok and plain.n == normalised.n and repr(plain) == repr(normalised)

@pytest.mark.filterwarnings('ignore:load_learner')
def test_of_an_exported_learner(make_learner, robust_net, tmp_path):
    "It has left its images behind, says so, and takes others"
    learn = make_learner(model=copy.deepcopy(robust_net))
    learn.export('it.pkl')
    again = load_learner(tmp_path/'it.pkl')
    with pytest.raises(ValueError, match='`dl` is empty.*exported.*`dl=dls.valid`'): again.check_robustness(eps=.1)
    with pytest.raises(ValueError, match='`n` must be >= 1'): learn.check_robustness(eps=.1, n=0)
    assert again.check_robustness(eps=.1, dl=learn.dls.valid).symptoms == learn.check_robustness(eps=.1).symptoms

def test_noise_in_the_network_is_seen(robust_net, test_images):
    "A randomised network is attacked less the more steps are taken"
    class Noisy(nn.Module):
        def __init__(self): super().__init__(); self.net = robust_net
        def forward(self, x): return self.net(x + .3*torch.randn_like(x))
    x, y = (t[:80] for t in test_images)
    assert {'noise','along the gradient'} <= {
        s.name for s in check_masking(Noisy().eval(), x, y, .1).symptoms if s.suspicious}

def test_a_check_of_ones_own(robust_net, test_images):
    from rkd_fastai.evaluation import masking
    @masking.symptom('dummy_symptom', 'Take an umbrella.')
    def dummy_symptom(model, x, y, eps): return 'rain', True
    try: report = check_masking(robust_net, *(t[:40] for t in test_images), .1)
    finally: masking._symptoms.pop()
    assert not report.ok and 'Take an umbrella.' in repr(report)

@pytest.mark.slow
def test_in_batches_and_in_float32(robust_net, test_images, make_learner, make_dls, monkeypatch):
    """No more images at a time than `bs`, with gradients neither; a network in half precision is measured as
    float32, where the loaders are"""
    x, y, most = *(t[:60] for t in test_images), []
    net = Behind(robust_net, before=lambda x: (most.append(len(x)), x)[1]).eval()
    report = check_masking(net, x, y, .1, bs=16)
    assert max(most) == 16 and report.ok and report.n == check_masking(robust_net, x, y, .1).n
    learn = make_learner(make_dls(n_valid=40), copy.deepcopy(robust_net))
    want = repr(learn.check_robustness(eps=.1))
    monkeypatch.setattr(learn.model, 'to', lambda device: most.append(device))
    learn.model.half()
    half = learn.check_robustness(eps=.1)
    assert (half.ok and half.n and torch.device(most[-1]).type == 'cpu'
            and next(learn.model.parameters()).dtype == torch.float16 and want)

def test_which_images(make_learner, make_dls, robust_net):
    "None are all, an empty loader is not the validation set, and inference mode changes nothing"
    learn = make_learner(make_dls(n_valid=40), copy.deepcopy(robust_net))
    want = repr(learn.check_robustness(eps=.1))
    with torch.inference_mode(): assert repr(learn.check_robustness(eps=.1, n=None)) == want
    with pytest.raises(ValueError, match='`dl` is empty'): learn.check_robustness(eps=.1, dl=DataLoader([], bs=4))
    assert Teacher(learn).check(learn.dls, 'clean', n=None).n == 40
