"A bare page with apps on it and Python behind them, for the tests of all apps."
import itertools
import json

import pytest

from enigma_lab.apps import chat, complete
from test_lampboard import watch

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>An app</title>
<body style="margin: 12px; background: {}"><main><h1>An app</h1>{}</main></body></html>"""
# what a widget's front end is given, as JupyterLab gives it
BRIDGE = """
window.asked = []; window.models = []
const bridge = (values, i) => {
  const ears = []
  const model = { get: key => values[key], set(key, value) { values[key] = value },
    save_changes() { window.saved = values.state }, off() {},
    on: (name, ear) => ears.push([name, ear]),
    tell: (name, said) => ears.forEach(([heard, ear]) => heard === name && ear(said)),
    send: content => { if (window.gone) return
      asked.push(content)
      kernel(i, content).then(said => window.gone || model.tell('msg:custom', said)) } }
  models.push(model)
  return model
}
document.querySelectorAll('.place').forEach((el, i) => render({ el, model:
  bridge(JSON.parse(el.dataset.values), i) }))
"""

def element(tag, inside, **properties):
    quoted = {name: value.replace('&', '&amp;').replace('"', '&quot;')
              for name, value in properties.items()}
    return f'<{tag}{"".join(f""" {k}="{v}" """ for k, v in quoted.items())}>{inside}</{tag}>'

def page_of(apps, dark=False, alone=False):
    "Write a page with apps that ask `kernel`, or, `alone`, as they stand in the site."
    values = lambda app: json.dumps({name: getattr(app, name) for name in ('state', 'shown')
                                     if hasattr(app, name)})
    place = lambda app: element('div', '', **{'class': 'place', 'data-values': values(app)}
                                ) + element('style', app._css)
    body = ''.join(app.static_html() if alone else place(app) for app in apps)
    if not alone: body += element('script', f'{apps[0]._esm}\n{BRIDGE}', type='module')
    return PAGE.format('#111' if dark else '#fff', body)

@pytest.fixture
def open_apps(browser, tmp_path, monkeypatch):
    "Open a page whose apps ask Python; it may load nothing else and report no error."
    pages, clock = [], itertools.count(0, .05)
    # a piece for each question, however fast the machine writes
    for app in chat, complete: monkeypatch.setattr(app, 'monotonic', lambda: next(clock))
    def open_apps(*apps, ready, width=800, dark=False, alone=False, context=None, file=None,
                  **options):
        path = tmp_path/(file or f'page{len(pages)}.html')
        path.write_text(page_of(apps, dark, alone), encoding='utf-8')
        page = (context or browser.new_context(viewport=dict(width=width, height=900),
            permissions=['clipboard-read', 'clipboard-write'], **options)).new_page()
        watch(page, path.as_uri())
        page.set_default_timeout(120_000)
        page.apps, page.asked, page.sent = apps, [], []
        def kernel(i, content):
            page.asked.append(content['question'])
            page.sent.append(apps[i].answer(content))
            return page.sent[-1]
        page.expose_function('kernel', kernel)
        page.goto(path.as_uri())
        for one in page.locator(f'.{apps[0].name}').all(): one.locator(ready).first.wait_for()
        pages.append(page)
        return page
    yield open_apps
    for page in pages:
        assert not page.wrong, page.wrong
        assert page.evaluate('window.hacked') is None
    for page in pages: page.close()
