"""Make the documentation site in `_docs`: notebooks and Markdown pages become `_proc`, Sphinx does the rest.

nbdev's own `proc_nbs` runs every notebook's imports in a process of its own. Here the modules are imported once, and
the documentation of a symbol is a table."""
import ast, importlib, importlib.util, inspect, json, os, re, shutil, subprocess, sys, tempfile, textwrap, types, typing
from pathlib import Path
import pandas as pd

root = Path(__file__).parent.parent

# --- which page is where ---

how_to = ['command_line', 'choosing_a_teacher', 'works_with', 'faq']
# The reference: what most people use, each folder of nbs/, and the modules that all of these share
basics = ['learner', 'teachers', 'losses', 'models', 'schedules', 'recipes']
packages = dict(attacks='Attacks', callback='Callbacks', data='Data', evaluation='Evaluation', study='Studies',
                **{'study.report': 'Reports'}, cli='Commands')
about_modules = dict(Basics='Learners that train robustly: their teachers, losses, networks, schedules and recipes.',
                     Helpers='What the other modules share. You need them for methods and attacks of your own.')

# where a page's own is too long, or is none
titles = {'SECURITY': 'Security', 'CHANGELOG': 'Changelog', 'bench/NOTES': 'Benchmark notes'}

def notebooks(base=root):
    """Page name → notebook of `base`; numbered ones are the reference: `reference/attacks.pgd` →
    nbs/attacks/01_pgd.ipynb"""
    found = sorted(f for f in (base/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)
    def page(f):
        path = f.relative_to(base/'nbs').with_suffix('')
        if path.parts[0] == 'tutorials' or not re.match(r'\d+_', path.name): return path.as_posix()
        return 'reference/' + '.'.join([*path.parts[:-1], re.sub(r'^\d+_', '', path.name)])
    return {page(f): f for f in found}

def package_of(page): return page.removeprefix('reference/').rpartition('.')[0]

def groups(base=root):
    "Page name of each group of the reference → `(title, its pages)`"
    found = [p for p in notebooks(base) if p.startswith('reference/')]
    first = [p for m in basics if (p := f'reference/{m}') in found]
    titled = {'Basics': first, **{title: [] for title in packages.values()}}
    for p in found:
        if (k := package_of(p)): titled.setdefault(packages.get(k, k.capitalize()), []).append(p)
    titled['Helpers'] = [p for p in found if not package_of(p) and p not in first]
    return {f'reference/{title.lower()}': (title, pages) for title,pages in titled.items() if pages}

def navigation(base=root):
    "`[(caption, pages)]` of the sidebar"
    there = lambda names: [n for n in names if (base/f'{n}.md').exists()]
    return [('', ['quick_start']),
            ('Tutorials', [n for n in notebooks(base) if n.startswith('tutorials/')]),
            ('How-to', how_to),
            ('Reference', list(groups(base))),
            ('Paper and results', ['paper_to_code', *there(['results/README', 'results/fashion_mnist/README',
                                                            'bench/README', 'bench/NOTES'])]),
            ('Project', there(['docs/architecture', 'CONTRIBUTING', 'tests/README', 'SECURITY', 'CHANGELOG']))]

def sources(base=root):
    "Page name → its file, for all that are not made up here"
    nbs, listed = notebooks(base), [p for _,pages in navigation(base) for p in pages]
    return nbs | {p: base/f'{p}.md' for p in listed if p not in nbs and p not in groups(base)}

def check_navigation(base=root):
    "Raise unless each notebook is in the navigation once"
    listed = ['index', *[p for _,pages in navigation(base) for p in pages if p not in groups(base)],
              *[p for _,pages in groups(base).values() for p in pages]]
    twice, missing = {p for p in listed if listed.count(p) > 1}, set(notebooks(base)) - set(listed)
    gone = [p for p in listed if p not in sources(base) or not sources(base)[p].exists()]
    if twice or missing or gone:
        raise ValueError(f"the navigation in tools/docs.py has {sorted(twice)} twice, lacks {sorted(missing)} and "
                         f"names {gone}, which are not there")

# --- links ---

def split_code(md):
    "`md` as pieces, of which every second one is code"
    return re.split(r'(^```.*?^```|``.+?``|`[^`\n]+`)', md, flags=re.S | re.M)

class Links:
    "Where the links of a page lead on the site; what the site does not have is the repository's"
    def __init__(self, base=root):
        self.base, self.pages = base, sources(base)
        self.page_of = {f.resolve(): p for p,f in self.pages.items()}
        self.symbols, self.images = {}, {}
        pyproject = (base/'pyproject.toml').read_text(encoding='utf8')
        self.repository = re.search(r'^Repository = "(.+)"', pyproject, re.M).group(1)

    def find(self, target, page):
        "The file that relative `target` means: from its own folder, from nbs/ by name of the page, or from the root"
        f = self.pages[page].parent/target
        name = re.sub(r'\.html$', '', target)
        by_name = self.pages.get(name, self.pages.get(
            f'reference/{name}'.replace('/', '.').replace('reference.', 'reference/', 1), f))
        return next((o.resolve() for o in (f, by_name, self.base/target) if o.exists()), None)

    def to(self, page, other):
        "Relative path of the page `other` in `_proc`"
        return os.path.relpath(f'{other}{self.suffix(other)}', Path(page).parent)

    def suffix(self, page): return self.pages[page].suffix if page in self.pages else '.md'

    def target(self, link, page):
        "What stands in the parentheses of a link"
        if re.match(r'[a-z]+:|#', link): return link
        path, _, fragment = link.partition('#')
        f = self.find(path, page)
        if f is None:
            raise ValueError(f"{self.pages[page].relative_to(self.base)} links to `{link}`, which is not there")
        if f in self.page_of: return self.to(page, self.page_of[f]) + (f'#{fragment}' if fragment else '')
        inside = f.relative_to(self.base.resolve())
        if f.suffix in ('.png', '.svg', '.jpg'):
            self.images[inside] = f
            return os.path.relpath(inside, Path(page).parent)
        return f"{self.repository}/{'tree' if f.is_dir() else 'blob'}/main/{inside.as_posix()}"

    def code(self, span, page):
        "A code span, as a link if it names a symbol, a page or a file"
        name = re.sub(r'\(.*\)$', '', span[1:-1]).replace('learn.', 'Learner.')
        if name in self.symbols: return f'[{span}]({self.to(page, self.symbols[name])}#{name.lower().replace(".", "")})'
        is_path = re.fullmatch(r'[\w./-]+\.(md|ipynb|py|toml|json)', name) and '/' in name and (self.base/name).exists()
        return f'[{span}]({self.target(name, page)})' if is_path else span

    def rewrite(self, md, page):
        "Markdown `md` of `page` with all its links"
        pieces = split_code(md)
        for i,p in enumerate(pieces):
            if i % 2 == 0:
                pieces[i] = re.sub(r'(\]\()([^)\s]+)(\))', lambda m: m[1] + self.target(m[2], page) + m[3], p)
            else:
                line = ''.join(pieces[:i]).rpartition('\n')[2]
                bare = not line.startswith('#') and line.count('[') == line.count(']') and not p.startswith('``')
                if bare: pieces[i] = self.code(p, page)
        return ''.join(pieces)

# --- documentation of symbols ---

def directives(cell):
    return re.findall(r'^#\|\s*(\S+)', ''.join(cell['source']), re.M) if cell['cell_type'] == 'code' else []

def definitions(cell):
    "Public functions and classes of an exported cell, by name: `Learner.fit` where it is patched"
    from nbdev.showdoc import showdoc_nm
    if not {'export', 'exports'} & set(directives(cell)): return {}
    found = {}
    for node in ast.parse(''.join(cell['source'])).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
        names = showdoc_nm(node)
        for n in [names] if isinstance(names, str) else names: found[n] = node
    return found

def default_exp(cells):
    return next((m.group(1) for c in cells
                 if (m := re.search(r'^#\|\s*default_exp (\S+)', ''.join(c['source']), re.M))), None)

longest_default = 40 # characters; a sentence would take the room of what an argument means

def written_defaults(node):
    """Argument → default as it was written (`8/255`; `...` if that is long), of the syntax tree of a function, of a
    class's `__init__`, or of a dataclass's fields"""
    init = node
    if isinstance(node, ast.ClassDef):
        init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == '__init__'), None)
    if init is None: both = [(o.target.id, o.value) for o in node.body if isinstance(o, ast.AnnAssign)]
    else:
        a = init.args
        names = [o.arg for o in a.posonlyargs + a.args]
        both = (list(zip(names[len(names)-len(a.defaults):], a.defaults))
                + list(zip([o.arg for o in a.kwonlyargs], a.kw_defaults)))
    written = {n: re.sub(' ([/*]) ', r'\1', ast.unparse(d)) for n,d in both if d is not None}
    return {n: d if len(d) <= longest_default else '...' for n,d in written.items()}

def type_name(t):
    "Name of a type, without the bounds of an `Annotated` one"
    if t in (types.FunctionType, types.BuiltinFunctionType): return 'callable'
    if t in (inspect._empty, type(None)): return ''
    if hasattr(t, '__metadata__'): return type_name(t.__origin__)
    if typing.get_origin(t) in (typing.Union, types.UnionType):
        return ' | '.join(type_name(o) or 'None' for o in typing.get_args(t))
    return str(t) if typing.get_args(t) else getattr(t, '__name__', str(t))

def arguments(obj, node):
    "`(name, type, default, comment)` of every argument"
    from fastcore.docments import docments
    written, kinds, rows = (written_defaults(node),
                            {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}, [])
    try: docs = docments(obj, full=True)
    except (ValueError, TypeError): return []
    for name,o in docs.items():
        if name in ('self', 'cls', 'return'): continue
        default = ('' if o['default'] is inspect._empty
                   else written.get(name, getattr(o['default'], '__name__', repr(o['default']))))
        rows.append((kinds.get(o['kind'], '') + name, type_name(o['anno']), default, o['docment'] or ''))
    return rows

def escape(text, link=str):
    "Text outside code spans without Markdown's meaning, pipes escaped everywhere; code spans as `link` has them"
    pieces = re.split(r'(`[^`]+`)', text)
    pieces[1::2] = [link(p) for p in pieces[1::2]]
    pieces[::2] = [re.sub(r'([*_<$\\])', r'\\\1', p) for p in pieces[::2]]
    return ''.join(pieces).replace('|', r'\|').replace('\n', ' ')

def table(args, link=str):
    "Markdown table of arguments; columns without an entry are left out"
    code = lambda o: f'`{o}`'.replace('|', r'\|') if o else ''
    df = pd.DataFrame([(code(n), code(t), code(d), escape(c, link)) for n,t,d,c in args],
                      columns=['Argument', 'Type', 'Default', 'Meaning'])
    return df.loc[:, (df != '').any()].to_markdown(index=False, tablefmt='github')

def signature(name, args):
    "The call, wrapped between arguments where it is long"
    inner = ', '.join((n + (f'={d}' if d else '')).replace(' ', '\0') for n,_,d,_ in args)
    return '\n'.join(textwrap.wrap(f'{name}({inner})', 84, subsequent_indent=' '*4, break_long_words=False,
                                   break_on_hyphens=False)).replace('\0', ' ')

def source_url(obj, repository):
    "Page of the line where `obj` is defined, or None"
    try: f, line = inspect.getsourcefile(inspect.unwrap(obj)), inspect.getsourcelines(inspect.unwrap(obj))[1]
    except (TypeError, OSError): return None
    inside = Path(f).resolve()
    return (f'{repository}/blob/main/{inside.relative_to(root.resolve()).as_posix()}#L{line}'
            if inside.is_relative_to(root.resolve()) else None)

def documented_methods(cls, node):
    "Public methods that a class defines with a docstring of its own"
    if not isinstance(node, ast.ClassDef): return {}
    found = {f.name: f for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith('_')
             and ast.get_docstring(f)}
    return {n: f for n,f in found.items() if not isinstance(vars(cls).get(n), property)}

def show_doc(name, obj, node, repository, level=3, link=str):
    """Heading, source, signature, docstring and table of one symbol, and of a class its documented methods; `link`
    is of `escape`"""
    args, url = arguments(obj, node), source_url(obj, repository)
    own = {f'`{o}`' for o in (name, *(n for n,*_ in args))}
    other = lambda span: span if span in own else link(span)
    says_nothing = [n for n,*_ in args] == ['*args', '**kwargs'] # Python's own for a class without `__init__`
    parts = [f"{'#'*level} {name}", f'<a class="api-source" href="{url}">source</a>' if url else '',
             '' if says_nothing else f'```python\n{signature(name, args)}\n```',
             escape(ast.get_docstring(node) or '', other), table(args, other) if any(c for *_,c in args) else '']
    methods = [show_doc(f'{name}.{n}', getattr(obj, n), f, repository, level+1, link)
               for n,f in documented_methods(obj, node).items()]
    return '\n\n'.join([p for p in parts if p] + methods)

def shown(cell, module, page, links):
    "Documentation of what an exported cell of `page` defines, as a Markdown cell; or None"
    parts = []
    for name,node in definitions(cell).items():
        obj = module
        for n in name.split('.'): obj = getattr(obj, n)
        parts.append(show_doc(name, obj, node, links.repository, link=lambda span: links.code(span, page)))
    return markdown('\n\n'.join(parts)) if parts else None

# --- pages ---

def markdown(text): return dict(cell_type='markdown', metadata={}, source=text)

def described(cell, where):
    "`cell` with the alternative text of its figures, from `#| fig-alt:`, where Sphinx looks for it"
    src, images = ''.join(cell['source']), [o for o in cell['outputs'] if 'image/png' in o.get('data', {})]
    alt = re.search(r'^#\|\s*fig-alt:\s*"?(.+?)"?\s*$', src, re.M)
    if images and not alt:
        raise ValueError(f"{where} stores a figure without a `#| fig-alt:` line that describes it: {src[:80]}")
    meta = {'mystnb': {'image': {'alt': alt.group(1)}}} if alt else {}
    return dict(cell, metadata=meta, source=re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip('\n'))

def page_cells(page, links):
    "The cells of a notebook as its page shows them"
    cells = json.loads(links.pages[page].read_text(encoding='utf8'))['cells']
    name = default_exp(cells)
    module, out = importlib.import_module(f'rkd_fastai.{name}') if name else None, []
    for c in cells:
        src, d = ''.join(c['source']), set(directives(c))
        if c['cell_type'] == 'markdown': out.append(markdown(links.rewrite(src, page)))
        elif {'export', 'exports'} & d: out.append(shown(c, module, page, links))
        elif not {'hide', 'exporti', 'default_exp'} & d and src.strip(): out.append(described(c, page))
    return [c for c in out if c]

def toctree(page, pages, caption=''):
    "A toctree that only the sidebar shows"
    path = lambda p: os.path.relpath(p, Path(page).parent)
    inner = '\n'.join(f'{titles[p]} <{path(p)}>' if p in titles else path(p) for p in pages)
    head = f':caption: {caption}\n' if caption else ''
    return f'```{{toctree}}\n:hidden:\n{head}\n{inner}\n```'

def about(f):
    "What the line under a notebook's title says"
    text = ''.join(''.join(c['source']) + '\n' for c in json.loads(f.read_text(encoding='utf8'))['cells'][:2])
    m = re.search(r'^> (.+)$', text, re.M)
    return m.group(1) if m else ''

def about_group(title, pages, base=root):
    "What the line under a group's title says: of a package, its docstring"
    if title in about_modules: return about_modules[title]
    source = (base/'rkd_fastai'/package_of(pages[0]).replace('.', '/')/'__init__.py').read_text(encoding='utf8')
    return ast.get_docstring(ast.parse(source))

def write_group(page, links, out):
    "The page of one group of the reference"
    title, pages = groups(links.base)[page]
    lines = [f'- [{p.split("/")[1]}]({links.to(page, p)}): {links.rewrite(about(links.pages[p]), page)}' for p in pages]
    parts = [f'# {title}', f'> {about_group(title, pages, links.base)}', '\n'.join(lines), toctree(page, pages)]
    (out/page).parent.mkdir(parents=True, exist_ok=True)
    (out/f'{page}.md').write_text('\n\n'.join(parts), encoding='utf8')

def write_page(page, links, out):
    "One notebook or Markdown page"
    f, to = links.pages[page], out/f'{page}{links.suffix(page)}'
    to.parent.mkdir(parents=True, exist_ok=True)
    if f.suffix == '.md': return to.write_text(links.rewrite(f.read_text(encoding='utf8'), page), encoding='utf8')
    cells = page_cells(page, links)
    if page == 'index':
        cells += [markdown(toctree(page, pages, caption)) for caption,pages in navigation(links.base) if pages]
    nb = json.loads(f.read_text(encoding='utf8'))
    to.write_text(json.dumps(dict(nb, cells=[dict(c, id=f'c{i}') for i,c in enumerate(cells)])), encoding='utf8')

def write_static(out):
    "Style sheet, and of MathJax what its pages load"
    mathjax = Path(importlib.util.find_spec('sphinx-mathjax-offline').origin).parent/'static/mathjax'
    (out/'_static').mkdir(parents=True)
    shutil.copy(root/'docs/extra.css', out/'_static')
    shutil.copytree(mathjax/'output/chtml/fonts/woff-v2', out/'_static/mathjax/output/chtml/fonts/woff-v2')
    shutil.copy(mathjax/'tex-chtml.js', out/'_static/mathjax')

def symbols(links):
    "Public name → page, of what the notebooks export; not `train`, a word like others"
    found = {}
    for page,f in links.pages.items():
        if f.suffix != '.ipynb': continue
        for c in json.loads(f.read_text(encoding='utf8'))['cells']:
            found |= {name: page for name in definitions(c) if re.search('[A-Z_.]', name)}
    return found

def make_pages(out, base=root):
    "Write all pages to the folder `out`"
    check_navigation(base)
    links = Links(base)
    links.symbols = symbols(links)
    if out.exists(): shutil.rmtree(out)
    write_static(out)
    for page in links.pages: write_page(page, links, out)
    for page in groups(base): write_group(page, links, out)
    for inside,f in links.images.items():
        (out/inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, out/inside)

def build(pages=root/'_proc', site=root/'_docs'):
    "Pages, then the site, which is whole or not there"
    make_pages(pages)
    if site.exists(): shutil.rmtree(site)
    with tempfile.TemporaryDirectory() as tmp: # Sphinx and MyST leave things beside the site
        subprocess.run([sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-c', root/'docs',
                        '-d', f'{tmp}/doctrees', '-D', f'html_static_path={pages}/_static', pages, f'{tmp}/site'],
                       check=True)
        shutil.move(f'{tmp}/site', site)
    return site

if __name__ == '__main__': print(f'{build(*[Path(o).resolve() for o in sys.argv[1:]])}/index.html')
