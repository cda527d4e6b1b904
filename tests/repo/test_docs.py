"The documentation site: its navigation, links and tables without building it; slow, the built site in a browser."
import ast, inspect, json, re, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import pytest, yaml

root = Path(__file__).parents[2]
sys.path.insert(0, str(root/'tools'))
import docs, site_check

def single_spaced(text): return re.sub(' +', ' ', text) # without the padding of the tables' columns
def cells(f): return json.loads(f.read_text(encoding='utf8'))['cells']
def prose(f):
    "The Markdown of a page"
    return (f.read_text(encoding='utf8') if f.suffix == '.md'
            else '\n\n'.join(''.join(c['source']) for c in cells(f) if c['cell_type'] == 'markdown'))

# --- navigation and links ---

@pytest.fixture
def base(tmp_path):
    "A repository with the same pages, all of them empty but for a title"
    for f in docs.sources().values():
        to = tmp_path/f.relative_to(root)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text('# A page\n' if f.suffix == '.md' else json.dumps(dict(cells=[docs.markdown('# A page')])),
                      encoding='utf8')
    shutil.copy(root/'pyproject.toml', tmp_path)
    (tmp_path/'nbs/images').mkdir()
    (tmp_path/'nbs/images/a.png').write_bytes(b'')
    (tmp_path/'examples').mkdir()
    (tmp_path/'examples/one.py').write_text('')
    return tmp_path

def test_every_notebook_is_in_the_navigation_once():
    docs.check_navigation()
    assert 'results/README' in docs.sources()
    assert len(docs.notebooks()) >= 40 and docs.sources()['reference/losses'] == root/'nbs/04_losses.ipynb'

def test_new_and_lost_notebooks_are_noticed(base, monkeypatch):
    docs.check_navigation(base)
    (base/'nbs/loose.ipynb').write_text('{}')
    with pytest.raises(ValueError, match="lacks .*'loose'"): docs.check_navigation(base)
    (base/'nbs/loose.ipynb').unlink()
    monkeypatch.setattr(docs, 'how_to', [*docs.how_to, 'faq'])
    with pytest.raises(ValueError, match='faq.* twice'): docs.check_navigation(base)
    monkeypatch.undo()
    (base/'nbs/faq.ipynb').unlink()
    with pytest.raises(ValueError, match="names .*'faq'"): docs.check_navigation(base)

def test_a_module_of_ones_own_is_in_a_group(base):
    (base/'nbs/99_new.ipynb').write_text('{}')
    docs.check_navigation(base)
    assert 'reference/new' in docs.groups(base)['reference/helpers'][1]
    (base/'nbs/own').mkdir(exist_ok=True)
    (base/'nbs/own/00_mine.ipynb').write_text('{}')
    docs.check_navigation(base)
    assert (docs.groups(base)['reference/own'] == ('Own', ['reference/own.mine'])
            and 'reference/own' in dict(docs.navigation(base))['Reference'])

def test_groups_of_the_reference():
    "What most people use comes first, the helpers come last; every package says in a line what it is"
    found = docs.groups()
    titles = [title for title,_ in found.values()]
    assert titles == ['Basics', *docs.packages.values(), 'Helpers']
    assert found['reference/basics'][1] == [f'reference/{m}' for m in docs.basics]
    inits = (root/'rkd_fastai').rglob('*/__init__.py')
    packages = {'.'.join(f.parent.relative_to(root/'rkd_fastai').parts) for f in inits}
    assert packages == {*docs.packages}
    for title,pages in found.values(): assert docs.about_group(title, pages).endswith('.')

def test_tutorials_are_picked_up(base):
    (base/'nbs/tutorials/7_seventh.ipynb').write_text('{}')
    docs.check_navigation(base)
    assert 'tutorials/7_seventh' in dict(docs.navigation(base))['Tutorials']

def slugs(links, page):
    "The anchors of a page: its headings, and the symbols that it documents"
    f = links.pages[page]
    found = re.findall(r'^#+ (.+)$', ''.join(docs.split_code(prose(f))[::2]), re.M)
    if f.suffix == '.ipynb': found += [n for c in cells(f) for n in docs.definitions(c)]
    return {re.sub(r'[^\w -]', '', h.lower()).replace(' ', '-') for h in found}

def test_links_of_all_pages_lead_somewhere():
    links, seen = docs.Links(), 0
    for page,f in links.pages.items():
        for link in re.findall(r'\]\(([^)\s]+)\)', ''.join(docs.split_code(prose(f))[::2])):
            new = links.target(link, page)
            seen += 1
            if '#' in link and not link.startswith('http'):
                other = links.page_of[links.find(link.split('#')[0], page)] if not link.startswith('#') else page
                assert link.split('#')[1] in slugs(links, other), f'{f}: {link}'
            elif new.startswith(links.repository): assert (root/new.split('/main/')[1]).exists(), f'{f}: {link}'
    assert seen > 40

def test_where_links_lead(base):
    links = docs.Links(base)
    target = lambda link, page='bench/README': links.target(link, page)
    # from the page's own folder
    assert target('NOTES.md') == 'NOTES.md' and target('../CONTRIBUTING.md') == '../CONTRIBUTING.md'
    assert target('bench/NOTES.md', 'index') == 'bench/NOTES.md' # of the root, as in README.md
    assert target('nbs/works_with.ipynb', 'index') == 'works_with.ipynb'
    assert target('attacks/apgd.html#apgd', 'reference/attacks.pgd') == 'attacks.apgd.ipynb#apgd' # as nbdev names pages
    assert target('04_losses.ipynb', 'faq') == 'reference/losses.ipynb'
    assert (target('images/a.png', 'index') == 'nbs/images/a.png'
            and target('images/a.png', 'reference/losses') == '../nbs/images/a.png')
    assert target('../examples/one.py') == f'{links.repository}/blob/main/examples/one.py'
    assert target('examples', 'index') == f'{links.repository}/tree/main/examples'
    assert target('https://a.b/c') == 'https://a.b/c' and target('#here') == '#here'
    with pytest.raises(ValueError, match=r'bench/README.md links to `lost.md`'): target('lost.md')

def test_what_becomes_a_link(base):
    links = docs.Links(base)
    links.symbols = {'AKDCallback': 'reference/callback.distill',
                     'Learner.robustness': 'reference/evaluation.robustness'}
    new = lambda md: links.rewrite(md, 'index')
    assert new('by `AKDCallback`.') == 'by [`AKDCallback`](reference/callback.distill.ipynb#akdcallback).'
    assert (new('`AKDCallback(t, alpha=.3)`').endswith('#akdcallback)')
            and new('`learn.robustness()`').endswith('#learnerrobustness)'))
    assert new('see `bench/README.md`') == 'see [`bench/README.md`](bench/README.md)'
    for md in ('# `AKDCallback`', '[`AKDCallback`](https://a.b)', '```python\nAKDCallback\n[a](lost.md)\n```',
               '`other`', '`lost/file.md`', '``AKDCallback``'):
        assert new(md) == md
    assert new('```\n`a`\n```\n`AKDCallback`').count('](') == 1

# --- documentation of symbols ---

source = '''
def f(
    x, # images, `(bs, c)` | a*b
    eps=8/255, # radius
    mode:str='a', # how
    *, cut=None, # or not
    **kwargs
):
    "What is *returned*"
'''

def test_table_of_a_function(tmp_path):
    (tmp_path/'made_up.py').write_text(source)
    sys.path.insert(0, str(tmp_path))
    try: import made_up
    finally: sys.path.remove(str(tmp_path))
    text = docs.show_doc('f', made_up.f, ast.parse(source).body[0], 'https://repo')
    assert (text.startswith('### f\n') and 'f(x, eps=8/255, mode=\'a\', cut=None, **kwargs)' in text
            and r'What is \*returned\*' in text)
    lines = [l for l in single_spaced(text).splitlines() if l.startswith('|')]
    assert lines[0] == '| Argument | Type | Default | Meaning |' and len(lines) == 7
    assert lines[2] == r'| `x` | | | images, `(bs, c)` \| a\*b |'
    assert lines[3] == '| `eps` | `float` | `8/255` | radius |' and lines[4] == "| `mode` | `str` | `'a'` | how |"

def test_calls_are_wrapped_between_arguments():
    "Not inside a string; a default that is a sentence is left out"
    args = [(f'argument_{i}', 'str', "'a b c d e f g h i j k l m n o p'", '') for i in range(4)]
    lines = docs.signature('call', args).splitlines()
    assert len(lines) > 1 and all(l.count("'") % 2 == 0 and len(l) <= 84 for l in lines)
    node, = ast.parse(f"def f(a='{'word '*9}', b='{'word '*3}'): pass").body
    assert docs.written_defaults(node) == dict(a='...', b=repr('word '*3))

def test_docstrings_link_to_symbols():
    "Of their text and their tables, but not their own name and arguments"
    from rkd_fastai.study import config as grid
    from rkd_fastai.study.report import tables
    links = docs.Links()
    links.symbols = docs.symbols(links)
    text = single_spaced('\n'.join(docs.shown(c, grid, 'reference/study.config', links)['source']
                                   for c in cells(docs.notebooks()['reference/study.config']) if docs.definitions(c)))
    for name,where in dict(make_dls='study.run', AdversarialTraining='callback.adversarial').items():
        assert f'| see [`{name}`]({where}.ipynb#{name.lower()}) |' in text
    assert '[`Cell`](study.config.ipynb#cell)' in text and '### Cell\n' in text
    node, = [o for o in ast.parse(Path(tables.__file__).read_text(encoding='utf8')).body
             if getattr(o, 'name', '') == 'own_students']
    text = docs.show_doc('own_students', tables.own_students, node, 'https://repo', link=lambda span: f'linked {span}')
    assert '| `df` | from linked `read_rows` |' in single_spaced(text) and '\n`df` with no students' in text

def test_fields_of_a_dataclass_are_as_written():
    from rkd_fastai.study import config as grid
    node, = [o for o in ast.parse(Path(grid.__file__).read_text(encoding='utf8')).body
             if getattr(o, 'name', '') == 'Cell']
    text = single_spaced(docs.show_doc('Cell', grid.Cell, node, 'https://repo'))
    assert 'width=1/8, eps=8/255' in text and '| `eps` | `float` | `8/255` |' in text and 'Cell(method, ' in text

def test_every_public_symbol_has_its_table():
    "One class and one patched method of the library, and no name is lost"
    import rkd_fastai.callback.distill as distill, rkd_fastai.evaluation.robustness as evaluation
    links = docs.Links()
    for module,page,name in ((distill, 'reference/callback.distill', 'AKDCallback'),
                             (evaluation, 'reference/evaluation.robustness', 'Learner.robustness')):
        found = {n: (c, node) for c in cells(docs.notebooks()[page]) for n,node in docs.definitions(c).items()}
        assert name in found and {n for n in module.__all__ if inspect.isfunction(getattr(module, n))
                                  or inspect.isclass(getattr(module, n))} <= set(found)
        text = single_spaced(docs.shown(found[name][0], module, page, links)['source'])
        assert (f'### {name}\n' in text
                and f"{links.repository}/blob/main/{module.__name__.replace('.', '/')}.py#L" in text)
        args = list(inspect.signature(evaluation.Learner.robustness if '.' in name else distill.AKDCallback).parameters)
        assert all(f'| `{a}` |' in text for a in args if a not in ('self', 'compile', 'bf16'))

def test_figures_need_a_description():
    cell = lambda src: dict(cell_type='code', source=src, metadata={},
                            outputs=[{'output_type': 'display_data', 'data': {'image/png': ''}}])
    with pytest.raises(ValueError, match='page .*fig-alt'): docs.described(cell('plot()'), 'page')
    found = docs.described(cell('#| fig-alt: "Two lines that cross"\nplot()'), 'page')
    assert found['metadata'] == {'mystnb': {'image': {'alt': 'Two lines that cross'}}} and found['source'] == 'plot()'

# --- pages ---

@pytest.mark.parametrize('kind, n', [('Equation', 8), ('Table', 12), ('Figure', 17)])
def test_paper_to_code_is_complete(kind, n):
    "Each number of the paper's captions has one line"
    lines = re.findall(rf'^\| {kind} (\d+) \|(.+)\|$', prose(root/'nbs/paper_to_code.ipynb'), re.M)
    assert [int(k) for k,_ in lines] == list(range(1, n+1))
    assert all(len(rest.split('|')) == 4 and all(cell.strip() for cell in rest.split('|')) for _,rest in lines)

def test_every_question_is_answered_and_shown():
    questions = []
    for c in cells(root/'nbs/faq.ipynb'):
        src = ''.join(c['source'])
        if src.startswith('## '): questions.append([src, []])
        elif questions: questions[-1][1].append(src)
    assert len(questions) >= 16
    for text,code in questions:
        words = len(text.split('\n', 2)[2].split())
        assert 30 < words < 140, text
        assert re.search(r'\b(assert|test_eq|test_close|test_fail)\b',
                         '\n'.join(code)) and all(len(c.splitlines()) <= 15 for c in code), text

def test_quick_start_runs_what_it_says():
    code = '\n'.join(''.join(c['source']) for c in cells(root/'nbs/quick_start.ipynb') if c['cell_type'] == 'code')
    assert (all(o in code for o in ('to_adversarial', 'to_rkd', 'KeepEpochs', 'robustness', 'check_robustness'))
            and code.count('assert') >= 3)

# --- what is automated ---

targets = set(re.findall(r'^([\w-]+):', (root/'Makefile').read_text(), re.M))
workflows = sorted((root/'.github/workflows').glob('*.yml'))

@pytest.mark.parametrize('f', workflows, ids=lambda f: f.name)
def test_workflows_call_make_and_nothing_else(f):
    steps = [s for job in yaml.safe_load(f.read_text())['jobs'].values() for s in job['steps']]
    runs = [s['run'] for s in steps if 'run' in s]
    assert runs and all(re.fullmatch(r'make [\w-]+', r) and r.split()[1] in targets for r in runs)

def test_workflows_test_and_document():
    runs = re.findall(r'make ([\w-]+)', ''.join(f.read_text() for f in workflows))
    assert set(runs) == {'check', 'test', 'docs-check'} and {'docs', 'docs-check'} <= targets

@pytest.mark.parametrize('f', sorted((root/'.github/ISSUE_TEMPLATE').glob('*.yml')), ids=lambda f: f.name)
def test_issue_forms(f):
    form = yaml.safe_load(f.read_text())
    assert {'name', 'description', 'body'} <= set(form)
    ids = [o['id'] for o in form['body'] if o['type'] != 'markdown']
    assert len(ids) == len(set(ids)) >= 3 and all(o['attributes'].get('label') or o['attributes'].get('value')
                                                  for o in form['body'])
    assert any(o.get('validations', {}).get('required') for o in form['body'])

def test_commit_hooks_run_what_is_there():
    hooks = [h for r in yaml.safe_load((root/'.pre-commit-config.yaml').read_text())['repos'] for h in r['hooks']]
    assert [h['id'] for h in hooks] == ['nbdev-clean', 'check']
    for h in hooks:
        program, *args = h['entry'].split()
        assert (Path(sys.executable).parent/Path(program).name).exists() and all((root/a).exists() for a in args)

# --- the checker, without a browser ---

def test_dead_links_are_seen(tmp_path):
    (tmp_path/'a.html').write_text('')
    home, repo = 'http://h:1', 'https://repo'
    dead = lambda *urls: list(site_check.dead_links({'a.html': urls}, {'a.html': {'top', 'é'}}, tmp_path, home, repo))
    assert dead(f'{home}/a.html', f'{home}/a.html#top', f'{home}/a.html#%C3%A9', f'{repo}/blob/main/Makefile#L3',
                f'{repo}/tree/main/tests', f'{repo}/issues', 'https://else.where/x') == []
    assert (dead(f'{home}/b.html') == ['a.html: b.html is not there']
            and dead(f'{home}/a.html#low') == ['a.html: a.html has no #low'])
    assert dead(f'{repo}/blob/main/lost.py') == ['a.html: the repository has no lost.py']

class FakePage:
    "Keeps the handlers of a page's events, to call them without a browser"
    def __init__(self): self.handlers = {}
    def on(self, event, handler): self.handlers[event] = handler

@pytest.mark.parametrize('event, harmless, bad', [
    ('request', dict(url='http://h:1/a.js'), dict(url='https://cdn.net/x.js')),
    ('request', dict(url='data:image/png'), dict(url='http://h:2/a.js')),
    ('requestfailed', dict(url='x', failure='net::ERR_ABORTED'), dict(url='x', failure='net::ERR_CONNECTION_RESET')),
    ('response', dict(url='x', status=304), dict(url='x', status=404)),
    ('console', dict(text='yes', type='log'), dict(text='no', type='error')),
    ('console', dict(text='yes', type='info'), dict(text='no', type='assert')),
    ('pageerror', None, dict(message='thrown'))])
def test_complaints_of_the_browser(event, harmless, bad):
    page = FakePage()
    complaints = site_check.collect_browser_errors(page, 'http://h:1')
    happen = lambda values: page.handlers[event](SimpleNamespace(location=dict(url='x'), **values))
    if harmless: happen(harmless)
    assert complaints == []
    happen(bad)
    assert len(complaints) == 1 and any(str(v) in complaints[0] for v in bad.values())

# --- the built site ---

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built in a temporary folder"
    for name in ('sphinx', 'playwright'):
        pytest.importorskip(name, reason="the site needs the extra `docs`: pip install -e '.[docs]'")
    if site_check.find_chromium() is None: pytest.skip('the site is looked at in chromium, which is not installed')
    folder = tmp_path_factory.mktemp('site')
    subprocess.run([sys.executable, '-W', 'ignore', root/'tools/docs.py', folder/'pages', folder/'site'],
                   check=True, cwd=root)
    return folder/'site'

@pytest.mark.slow
def test_every_page_in_a_browser(site):
    problems, n = site_check.check(site)
    assert problems == [] and n == len(docs.sources()) + len(docs.groups())

faults = {
    'has no h1': '<h1>another</h1>',
    'image without alt': '<img src="_static/pygments.css" width=1 height=1>',
    'does not load': '<img src="lost.png" alt="lost">',
    '404': '<script src="lost.js"></script>',
    'on the console': '<script>console.error("no")</script>',
    'error:': '<script>lost()</script>',
    'fetches https://example.org': '<script src="https://example.org/x.js"></script>',
    'lost.html is not there': '<a href="lost.html">there</a>',
    'has no #lost': '<a href="#lost">there</a>',
    'the repository has no lost.py': '<a href="REPO/blob/main/lost.py">there</a>',
    'raw mathematics': r'<p>where $\frac{1}{K}$ is</p>',
    'not rendered': '<div class="math">x</div>',
    'not highlighted': '<div class="highlight-python"><pre>a = 1</pre></div>',
    'too wide at 380': '<div style="width:600px">wide</div>',
    'colours of the other scheme': '<style>body{background:#fff!important}</style>'}

@pytest.mark.slow
def test_each_fault_is_seen(site, tmp_path):
    shutil.copytree(site, tmp_path/'site')
    page = tmp_path/'site/faq.html'
    clean, repository = page.read_text(encoding='utf8'), docs.Links().repository
    with site_check.served(tmp_path/'site') as home, site_check.open_browser() as browser:
        for what,html in faults.items():
            page.write_text(clean.replace('</article>', html.replace('REPO', repository) + '</article>', 1),
                            encoding='utf8')
            problems, links, ids = site_check.check_page(browser, home, 'faq.html')
            problems += site_check.dead_links({'faq.html': links}, {'faq.html': ids}, tmp_path/'site', home, repository)
            assert any(what in p for p in problems), what
        (tmp_path/'site/searchindex.js').write_text('Search.setIndex({})')
        assert site_check.search_problems(browser, home, seconds=2)
