"""Open every page of a built site in headless Chromium, on a phone and a desk, light and dark, and say what is wrong
with it."""
import argparse, base64, json, shutil, subprocess, sys, tempfile, threading, time
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag
from docs import Links, root

widths, schemes = (380, 1280), ('light', 'dark')

look = r"""(async () => {
  if (window.MathJax?.startup?.promise) await MathJax.startup.promise
  await document.fonts.ready
  const text = document.body.cloneNode(true)
  text.querySelectorAll('pre, code, script, style, mjx-container').forEach(o => o.remove())
  const all = s => [...document.querySelectorAll(s)]
  return {
    'has no h1': all('h1').length == 1 ? [] : [`${all('h1').length} of them`],
    'image without alt': [...document.images].filter(o => !o.alt.trim()).map(o => o.src),
    'image that does not load': [...document.images].filter(o => o.complete && !o.naturalWidth).map(o => o.src),
    'raw mathematics': text.textContent.match(/.{0,30}(\$|\\(frac|tag|mathrm|lambda|alpha|[(\[])).{0,30}/g) || [],
    'mathematics that is not rendered': all('.math').filter(o => !o.querySelector('mjx-container')).concat(all('mjx-merror')).map(o => o.textContent),
    'code that is not highlighted': all('.highlight-python pre, .highlight-ipython3 pre').filter(o => !o.querySelector('span[class]') && /[=()]/.test(o.textContent)).map(o => o.textContent),
    links: [...document.links].map(o => o.href), ids: all('[id]').map(o => o.id)}
})()""" # noqa: E501

measure = r"""(() => {
  const light = c => { const [r,g,b] = c.match(/[\d.]+/g).map(Number); return (.3*r + .6*g + .1*b)/255 }
  const pre = document.querySelector('.highlight')
  const scrolls = o => o && o.tagName != 'ARTICLE' && (/auto|scroll/.test(getComputedStyle(o).overflowX) || scrolls(o.parentElement))
  const past = o => Math.ceil(o.getBoundingClientRect().right - innerWidth)
  const wide = [...document.querySelectorAll('article *')].filter(o => past(o) > 1 && !o.closest('mjx-container') && !scrolls(o.parentElement))
  return {over: Math.max(document.documentElement.scrollWidth - document.documentElement.clientWidth, ...wide.map(past)),
          widest: wide.slice(0, 1).map(o => o.outerHTML.slice(0, 80)).join(),
          page: light(getComputedStyle(document.body).backgroundColor), code: pre ? light(getComputedStyle(pre).backgroundColor) : null,
          ink: light(getComputedStyle(document.body).color)}
})()""" # noqa: E501

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

def chromium():
    "Chromium's path, or a SystemExit that says how to get it"
    if (found := find_chromium()) is None:
        raise SystemExit('no chromium found: install it, for example with `apt-get install chromium`')
    return found

class Browser:
    "A headless Chromium with one page, spoken to through its DevTools protocol"
    def __enter__(self):
        self.folder, self.n, self.events, self.stack = tempfile.mkdtemp(), 0, [], ExitStack()
        args = ['--headless=new', '--no-sandbox', '--remote-debugging-port=0', f'--user-data-dir={self.folder}',
                '--disable-gpu',
                '--hide-scrollbars', '--no-first-run', '--disable-background-networking', 'about:blank']
        self.process = subprocess.Popen([chromium(), *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try: self.connect()
        except BaseException: self.__exit__(); raise
        return self

    def connect(self):
        from websockets.sync.client import connect
        port = Path(self.folder)/'DevToolsActivePort'
        for _ in range(600):
            if port.exists() and len(port.read_text().split()) == 2: break
            if self.process.poll() is not None: raise RuntimeError(f'chromium ended with {self.process.returncode}')
            time.sleep(.1)
        where, path = port.read_text().split()
        self.session = None
        self.socket = self.stack.enter_context(connect(f'ws://127.0.0.1:{where}{path}', max_size=None,
                                                       compression=None, ping_interval=None))
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Network', 'Log'): self.call(f'{domain}.enable')
        self.call('Network.setCacheDisabled', cacheDisabled=True)

    def __exit__(self, *args):
        self.stack.close()
        self.process.terminate(); self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, method, **params):
        "What `method` returns; events that come before it are kept in `events`"
        self.n += 1
        self.socket.send(json.dumps(dict(id=self.n, method=method, params=params)
                                    | (dict(sessionId=self.session) if self.session else {})))
        while (got := json.loads(self.socket.recv(timeout=120))).get('id') != self.n: self.events.append(got)
        if 'error' in got: raise RuntimeError(f"{method}: {got['error']['message']}")
        return got['result']

    def open(self, url):
        "Go to `url` and wait until it is loaded; returns the events of that"
        self.events.clear()
        self.call('Page.navigate', url=url)
        while not any(e.get('method') == 'Page.loadEventFired' for e in self.events):
            self.events.append(json.loads(self.socket.recv(timeout=120)))

    def js(self, code):
        "The value of the expression `code`"
        got = self.call('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in got: raise RuntimeError(got['exceptionDetails'])
        return got['result'].get('value')

    def screen(self, width, scheme, height=900):
        "Set the window's width and the preferred colours"
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])

    def shot(self, path, height=2600):
        "Write a PNG of the page's first `height` pixels"
        tall = min(height, self.js('document.documentElement.scrollHeight'))
        width = self.js('innerWidth')
        png = self.call('Page.captureScreenshot', captureBeyondViewport=True,
                        clip=dict(x=0, y=0, width=width, height=tall, scale=1))
        path.write_bytes(base64.b64decode(png['data']))

def complaints(events, home):
    "What went wrong while a page was loaded: errors on the console, failed requests, requests to elsewhere"
    for e in events:
        p = e.get('params', {})
        match e.get('method'):
            case 'Runtime.exceptionThrown': yield f"error: {p['exceptionDetails'].get('exception', {}).get('description', p['exceptionDetails']['text'])}" # noqa: E501
            case 'Runtime.consoleAPICalled' if p['type'] in ('error',
                                                             'assert'): yield f"on the console: {[a.get('value') for a in p['args']]}" # noqa: E501
            case 'Log.entryAdded' if p['entry']['level'] == 'error': yield f"in the log: {p['entry']['text']} {p['entry'].get('url', '')}" # noqa: E501
            case 'Network.loadingFailed' if not p.get('canceled'): yield f"a request failed: {p['errorText']}"
            case 'Network.responseReceived' if p['response']['status'] >= 400: yield f"{p['response']['status']}: {p['response']['url']}" # noqa: E501
            case 'Network.requestWillBeSent' if not p['request']['url'].startswith(
                (home, 'data:', 'blob:')): yield f"fetches {p['request']['url']}"

def layout(browser):
    "What is wrong with the open page's layout, at each width and in each scheme"
    for width in widths:
        for scheme in schemes:
            browser.screen(width, scheme)
            m, where = browser.js(measure), f'at {width} pixels, {scheme}'
            if m['over'] > 0: yield f"{m['over']} pixels too wide {where}: {m['widest']}"
            shades = [m['page'], 1 - m['ink']] + ([m['code']] if m['code'] is not None else [])
            if any((s > .5) != (scheme == 'light') for s in shades):
                yield f'page, text or code in the colours of the other scheme {where}: {shades}'

def dead(links, ids, site, home, repository):
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

def found_by_search(browser, home, word='AKDCallback', page='callback.distill.html', tries=100):
    "What is wrong with the search for `word`, which `page` defines"
    browser.open(f'{home}/search.html')
    browser.js(f"const box = document.querySelector('input[name=q]'); box.value = '{word}'; box.form.submit()")
    for _ in range(tries):
        hits = browser.js("[...document.querySelectorAll('#search-results li a')].map(o => o.href)")
        if any(page in h for h in hits): return []
        time.sleep(.2)
    return [f'search.html: {word} does not find {page}, but {hits[:5]}']

def check_page(browser, home, page, shots=None):
    "`(problems, links, ids)` of one page"
    browser.screen(1280, 'light')
    browser.open(f'{home}/{page}')
    seen = browser.js(look)
    links, ids = seen.pop('links'), set(seen.pop('ids'))
    problems = (list(complaints(browser.events, home))
                + [f'{what}: {o.strip()[:120]}' for what,found in seen.items() for o in found])
    problems += layout(browser)
    for width,scheme in [(w, s) for w in widths for s in schemes] if shots else []:
        browser.screen(width, scheme)
        browser.shot(shots/f"{page.removesuffix('.html').replace('/', '_')}_{width}_{scheme}.png")
    return [f'{page}: {p}' for p in problems], links, ids

def check(site, shots=None, only=None):
    "All that is wrong with the site in folder `site`, a line each; with pictures of every page in the folder `shots`"
    # Sphinx's own
    pages = sorted({f.relative_to(site).as_posix() for f in site.rglob('*.html')} - {'search.html', 'genindex.html'})
    problems, links, ids = [], {}, {}
    if shots: shots.mkdir(parents=True, exist_ok=True)
    with served(site) as home, Browser() as browser:
        for page in pages:
            if only and page not in only: continue
            found, links[page], ids[page] = check_page(browser, home, page, shots)
            problems += found
        problems += list(dead(links, ids, site, home, Links().repository)) + found_by_search(browser, home)
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
