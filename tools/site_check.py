"""Open every page of a built site in headless Chromium, on a phone and a desk, light and dark, and say what is wrong
with it."""
import argparse, shutil, sys, threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag
from docs import Links, root

screens = [(width, scheme) for width in (380, 1280) for scheme in ('light', 'dark')]
own_pages_of_sphinx = {'search.html', 'genindex.html'}

# What is wrong with a page's content, by name of the fault; its links and its ids
content_js = r"""async () => {
  if (window.MathJax?.startup?.promise) await MathJax.startup.promise
  await document.fonts.ready
  const prose = document.body.cloneNode(true)
  prose.querySelectorAll('pre, code, script, style, mjx-container').forEach(o => o.remove())
  const all = selector => [...document.querySelectorAll(selector)]
  const texts = found => found.map(o => o.textContent)
  const images = [...document.images]
  const code = all('.highlight-python pre, .highlight-ipython3 pre').filter(o => /[=()]/.test(o.textContent))
  const faults = {
    'has no h1': all('h1').length == 1 ? [] : [`${all('h1').length} of them`],
    'image without alt': images.filter(o => !o.alt.trim()).map(o => o.src),
    'image that does not load': images.filter(o => o.complete && !o.naturalWidth).map(o => o.src),
    'raw mathematics':
      prose.textContent.match(/.{0,30}(\$|\\(frac|tag|mathrm|lambda|alpha|[(\[])).{0,30}/g) || [],
    'mathematics that is not rendered':
      texts([...all('.math').filter(o => !o.querySelector('mjx-container')), ...all('mjx-merror')]),
    'code that is not highlighted': texts(code.filter(o => !o.querySelector('span[class]')))}
  return [faults, [...document.links].map(o => o.href), all('[id]').map(o => o.id)]
}"""

# By how many pixels a page is too wide, and for which element; how light its colours are, from 0 to 1
layout_js = r"""() => {
  const style = o => getComputedStyle(o)
  const light = colour => {
    const [r, g, b] = colour.match(/[\d.]+/g).map(Number)
    return (.3*r + .6*g + .1*b)/255
  }
  const scrolls = o => o && o.tagName != 'ARTICLE' &&
    (/auto|scroll/.test(style(o).overflowX) || scrolls(o.parentElement))
  const past = o => Math.ceil(o.getBoundingClientRect().right - innerWidth)
  const wide = [...document.querySelectorAll('article *')].filter(
    o => past(o) > 1 && !o.closest('mjx-container') && !scrolls(o.parentElement))
  const {scrollWidth, clientWidth} = document.documentElement
  const code = document.querySelector('.highlight')
  return {over: Math.max(scrollWidth - clientWidth, ...wide.map(past)),
          widest: wide.slice(0, 1).map(o => o.outerHTML.slice(0, 80)).join(),
          grounds: [document.body, code].filter(o => o).map(o => light(style(o).backgroundColor)),
          ink: light(style(document.body).color)}
}"""

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@contextmanager
def served(site):
    "The address of `site` on this machine, while it is served"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site)))
    server.handle_error = lambda *_: None # a page that is left drops its requests
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown(); server.server_close()

def find_chromium():
    return next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)

@contextmanager
def open_browser():
    "A headless Chromium, or a SystemExit that says how to get it"
    from playwright.sync_api import sync_playwright
    if (path := find_chromium()) is None:
        raise SystemExit('no chromium found: install it, for example with `apt-get install chromium`')
    flags = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
             '--disable-component-update', '--disable-sync']
    with sync_playwright() as p, p.chromium.launch(executable_path=path, args=flags) as browser: yield browser

def collect_browser_errors(page, home):
    "A list to which each error on the console, failed request and request to elsewhere is added from now on"
    complaints = []
    def note(event, is_wrong, text): page.on(event, lambda o: complaints.append(text(o)) if is_wrong(o) else None)
    note('pageerror', lambda error: True, lambda error: f'error: {error}')
    note('console', lambda message: message.type in ('error', 'assert'),
         lambda message: f"on the console: {message.text} ({message.location['url']})")
    note('request', lambda request: not request.url.startswith((home, 'data:', 'blob:')),
         lambda request: f'fetches {request.url}')
    note('requestfailed', lambda request: request.failure != 'net::ERR_ABORTED',
         lambda request: f'a request failed, {request.failure}: {request.url}')
    note('response', lambda response: response.status >= 400, lambda response: f'{response.status}: {response.url}')
    return complaints

def layout_problems(page, width, scheme):
    "What is wrong with the open page's layout at this width and in this scheme"
    found, where = page.evaluate(layout_js), f'at {width} pixels, {scheme}'
    if found['over'] > 0: yield f"{found['over']} pixels too wide {where}: {found['widest']}"
    shades = [*found['grounds'], 1 - found['ink']]
    if any((s > .5) != (scheme == 'light') for s in shades):
        yield f'page, text or code in the colours of the other scheme {where}: {shades}'

def save_screenshot(page, path, width, max_height=2600):
    height = min(max_height, page.evaluate('document.documentElement.scrollHeight'))
    page.screenshot(path=path, full_page=True, clip=dict(x=0, y=0, width=width, height=height))

def check_page(browser, home, name, screenshots=None):
    "`(problems, links, ids)` of one page"
    with browser.new_page() as page: # of its own: nothing is left in a cache
        complaints = collect_browser_errors(page, home)
        page.goto(f'{home}/{name}')
        faults, links, ids = page.evaluate(content_js)
        problems = [f'{fault}: {o.strip()[:120]}' for fault,found in faults.items() for o in found]
        for width,scheme in screens:
            page.set_viewport_size(dict(width=width, height=900))
            page.emulate_media(color_scheme=scheme)
            problems += layout_problems(page, width, scheme)
            if screenshots:
                file = f"{name.removesuffix('.html').replace('/', '_')}_{width}_{scheme}.png"
                save_screenshot(page, screenshots/file, width)
    return [f'{name}: {p}' for p in complaints + problems], links, set(ids)

def dead_links(links, ids, site, home, repository):
    "Links of the pages `{page: [url]}` that lead nowhere, on the site or in the repository"
    for page,urls in links.items():
        for url in sorted(set(urls)):
            plain, fragment = urldefrag(url)
            if plain.startswith(home):
                other = unquote(plain[len(home):]).lstrip('/') or 'index.html'
                if not (site/other).exists(): yield f'{page}: {other} is not there'
                elif fragment and other in ids and unquote(fragment) not in ids[other]:
                    yield f'{page}: {other} has no #{fragment}'
            elif plain.startswith(f'{repository}/'):
                inside = plain[len(repository)+1:].split('/', 2)
                if inside[0] in ('blob', 'tree') and not (root/unquote(inside[2])).exists():
                    yield f'{page}: the repository has no {inside[2]}'

def search_problems(browser, home, word='AKDCallback', target='callback.distill.html', seconds=20):
    "What is wrong with the search for `word`, which the page `target` defines"
    from playwright.sync_api import TimeoutError
    with browser.new_page() as page:
        page.goto(f'{home}/search.html')
        box = page.locator('input[name=q]').first
        box.fill(word)
        box.press('Enter')
        try: page.wait_for_selector(f'#search-results li a[href*="{target}"]', timeout=1000*seconds)
        except TimeoutError: return [f'search.html: {word} does not find {target}']
    return []

def check(site, screenshots=None, only=None):
    """All that is wrong with the site in folder `site`, a line each, and how many pages were opened; with pictures of
    them in the folder `screenshots`"""
    names = {f.relative_to(site).as_posix() for f in site.rglob('*.html')} - own_pages_of_sphinx
    problems, links, ids = [], {}, {}
    with served(site) as home, open_browser() as browser:
        for name in sorted(names & set(only) if only else names):
            found, links[name], ids[name] = check_page(browser, home, name, screenshots)
            problems += found
        problems += [*dead_links(links, ids, site, home, Links().repository), *search_problems(browser, home)]
    return problems, len(links)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('site', type=Path)
    parser.add_argument('--screenshots', type=Path, help='folder for a picture of every page')
    parser.add_argument('--only', nargs='+', help='pages to open, as `losses.html`; all if left out')
    args = parser.parse_args()
    problems, n = check(args.site, args.screenshots, args.only)
    print('\n'.join(problems) or f'{n} pages, nothing wrong')
    sys.exit(bool(problems))
