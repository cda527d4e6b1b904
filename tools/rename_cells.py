"""Give the cells of a study that an older version wrote the names that they have now.

    python tools/rename_cells.py studies/mine

Until version 0.1 a cell's folder was named after all its settings; now it is named after those that differ from a table
that never changes. Settings and folders are written anew, accuracies and weights stay as they are.
"""
import json, sys
from pathlib import Path
from rkd_fastai.checkpoint import write_atomic
from rkd_fastai.study.config import cell_from, settings_of

old_names = dict(stop='teacher_epoch')
old_values = dict(resnet18='cifar_resnet18')

def new_settings(settings):
    "The settings of a cell as they are written now, from those that an older version wrote"
    named = {old_names.get(k, k): old_values.get(v, v) if k in ('arch','teacher_arch') else v
             for k,v in settings.items()}
    return settings_of(cell_from(named))

def rename(folder):
    "Rename one cell's folder and return its new name"
    files = {f: json.loads(f.read_text(encoding='utf8')) for name in ('card.json','results.json')
             if (f := folder/name).exists()}
    settings = [new_settings(d['cell']) for d in files.values()]
    if not settings or any(s != settings[0] for s in settings):
        raise SystemExit(f"{folder}: its files do not name one cell")
    for f,d in files.items():
        new = d | dict(cell=settings[0]) | ({'arch': old_values.get(d['arch'], d['arch'])} if 'arch' in d else {})
        if new != d: write_atomic(f, json.dumps(new, indent=2))
    new = folder.with_name(cell_from(settings[0]).id)
    if new != folder:
        if new.exists(): raise SystemExit(f"{folder} would be called {new.name}, which is there: remove one of them")
        folder.rename(new)
    return new.name

def main(study):
    if not (Path(study)/'study.json').exists():
        raise SystemExit(f"{study} holds no study.json: name the folder of a study")
    for folder in sorted([*Path(study).glob('cells/*/'), *Path(study).glob('teachers/*/')]):
        print(f'{folder.name} -> {rename(folder)}')

if __name__ == '__main__': main(*sys.argv[1:])
