"""Bring what a study found into `results/`: settings, cards, learning curves and accuracies of its networks, and their
report; weights stay where they are.

    python tools/collect.py results/fashion_mnist/headline.toml runs/fashion_mnist

The folder beside the study's file, here `results/fashion_mnist/headline`, is a study's folder itself: `rkd study
report results/fashion_mnist/headline` makes the tables again.
"""
import json, shutil, sys
from pathlib import Path
from rkd_fastai.study.study import Study, study_report

kept = ('card.json', 'history.csv', 'results.json')

def collect(spec, folder):
    """The new folder, with those cells of `folder`, and their teachers, that the study `spec` asks for; an older one
    is replaced"""
    study,out = Study(spec, folder),Path(spec).with_suffix('')
    undone = [c.id for c in study.cells if not study.is_done(c)]
    if undone:
        raise SystemExit(f"{len(undone)} of {len(study.cells)} cells in {folder} are not done: {', '.join(undone)}")
    if out.resolve() == study.out.resolve():
        raise SystemExit(f"{out} is where the results go: name the folder that the study ran in")
    shutil.rmtree(out, ignore_errors=True)
    for c in [*study.cells, *study.teachers]:
        was = study.folder(c)
        to = out/was.relative_to(study.out)
        to.mkdir(parents=True, exist_ok=True)
        for name in kept:
            if (was/name).exists(): shutil.copy(was/name, to)
    made = json.loads((study.out/'study.json').read_text(encoding='utf8'))
    # several studies may share `folder`
    (out/'study.json').write_text(json.dumps(made | dict(title=study.title), indent=2), encoding='utf8')
    return out

def main(spec, folder):
    "Collect and report; of the report the page stays out, which holds all its figures once more"
    out = collect(spec, folder)
    print(study_report(out).rpartition('\n\n')[0])
    (out/'report/index.html').unlink()

if __name__ == '__main__': main(*sys.argv[1:])
