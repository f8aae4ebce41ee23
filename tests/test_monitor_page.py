"The panel in JupyterLab: it shows a live run, asks once, and stops it."
import os, subprocess, sys
from unittest import mock

import pytest
from playwright.sync_api import expect

from app_pages import open_apps # noqa: F401, a fixture
from enigma_lab.apps import monitor
from enigma_lab.lab.runs import start_run
from jupyter_lab import no_cell_failed, opened
from test_door import environment
from test_lampboard import WIDTHS, axe # noqa: F401, a fixture

pytestmark = pytest.mark.proof('apps.base', 'apps.monitor')

expect.set_options(timeout=30_000) # a busy machine is slow, and not wrong

pytest_plugins = 'jupyter_lab'

TRAINS = """
import signal, time
from enigma_lab.lab import runs
from enigma_lab.lab.runs import beating, start_run
runs.environment = dict # the real one imports torch, for seconds
run, heard, step = start_run('train_toy', dict(data='auto')), [], 0
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
run.log(measure=dict(loss='nll_nats', unit='nats per token', counted='tokens'))
with beating(run):
    while not heard:
        step += 1
        row = dict(step=step, progress=min(.9, step/9000), wall_s=step*.1)
        run.log(**row, loss=1 + 3/step, tokens_per_s=5100)
        if step % 20 == 0: run.log(**row, val_nll_nats=1.1 + 3/step, val_ppl=4.06)
        if step == 30: print('<b>thirty</b>', file=open(run.path/'log.txt', 'w'))
        time.sleep(.1)
    (run.path/'checkpoints'/f'checkpoint-{step}').mkdir(parents=True)
    (run.path/'checkpoints'/f'checkpoint-{step}'/'digests.json').write_text('{}')
    run.note(stopped='SIGTERM', stopped_step=step)
"""

@pytest.fixture
def training(lab, tmp_path_factory):
    "A toy training whose record lies where the panel looks."
    place = tmp_path_factory.getbasetemp()/'lab0'/'runs'
    assert place.is_dir()
    process = subprocess.Popen([sys.executable, '-c', TRAINS],
                               env=dict(environment(), ENIGMA_RUNS=str(place)))
    yield process
    process.kill(); process.wait()

def picture(page, name):
    "Keep a picture for who wants to look, in $ENIGMA_PICTURES."
    if folder := os.environ.get('ENIGMA_PICTURES'): page.screenshot(path=f'{folder}/{name}.png')

def test_a_live_run_is_shown_and_stopped(lab, browser, training):
    with opened(lab, browser, '60_monitor.ipynb', '.monitor-table') as page:
        assert no_cell_failed(page)
        part = lambda name: page.locator(f'.monitor-{name}').first
        part('table').scroll_into_view_if_needed()
        expect(part('table')).to_contain_text('running')
        expect(part('closely')).to_contain_text('<b>thirty</b>') # a text, no markup
        expect(part('closely').locator('svg[role=img]')).to_be_visible()
        first = part('closely').inner_text()
        page.wait_for_timeout(3000)
        assert part('closely').inner_text() != first # it is drawn again
        picture(page, 'panel-1400')
        part('stop').click()
        expect(part('said')).to_contain_text('It ends with a checkpoint')
        expect(part('stop')).to_be_hidden()
        part('no').click()
        expect(part('stop')).to_be_visible()
        assert training.poll() is None
        part('stop').focus()
        page.keyboard.press('Enter') # by the keyboard alone
        expect(part('sure')).to_be_visible()
        part('sure').focus()
        expect(part('sure')).to_be_focused()
        page.keyboard.press('Enter')
        expect(part('said')).to_contain_text('resume=auto goes on from checkpoint-')
        assert training.wait(30) == 0
        expect(part('table')).to_contain_text('stopped')
        expect(part('stop')).to_be_disabled()
        picture(page, 'panel-stopped')
        page.keyboard.press('Control+b') # the list of files leaves
        for width in (800, 390):
            page.set_viewport_size(dict(width=width, height=900))
            part('table').scroll_into_view_if_needed()
            page.wait_for_timeout(500)
            picture(page, f'panel-{width}')
            wider = part('closely').evaluate('e => e.scrollWidth - e.clientWidth')
            assert wider <= 1 # what does not fit is wrapped


# beside Python on a bare page

@pytest.fixture
def runs(tmp_path, monkeypatch):
    "Two runs of this process, at work."
    monkeypatch.setenv('ENIGMA_RUNS', str(tmp_path/'runs'))
    found = [start_run('toys', dict(data='auto'), name) for name in ('one', 'two')]
    for i, run in enumerate(found):
        run.log(measure=dict(loss='nll_nats', unit='nats per token', counted='tokens'))
        for step in range(1, 40):
            run.log(step=step, progress=step/90, wall_s=step*1., loss=1 + 3/step + i)
        (run.path/'log.txt').write_text('a <b>line</b> ' + 'long'*80, encoding='utf-8')
        (run.path/'beat').touch()
    return found

def tell(page):
    "Hand what Python shows to the page, as a kernel does."
    page.evaluate("""shown => { models[0].set('shown', shown)
        models[0].tell('change:shown') }""", page.apps[0].shown)

def visit(open_apps, **how): # noqa: F811
    return open_apps(monitor.MonitorApp(), ready='.monitor-run', **how)

def part(page, name): return page.locator(f'.monitor-{name}')

def test_it_asks_before_it_stops(open_apps, runs): # noqa: F811
    page, stopped = visit(open_apps), []
    part(page, 'stop').focus()
    page.keyboard.press('Enter')
    expect(part(page, 'no')).to_be_focused() # the harmless one
    expect(part(page, 'said')).to_contain_text('It ends with a checkpoint')
    page.keyboard.press('Escape')
    expect(part(page, 'stop')).to_be_focused()
    expect(part(page, 'said')).to_have_text('')
    asked = lambda found: stopped.append(found[0].name) or ['it has stopped']
    with mock.patch.object(monitor, 'stop_runs', asked):
        part(page, 'stop').click()
        part(page, 'sure').click()
        expect(part(page, 'said')).to_contain_text('is asked to stop')
        while page.apps[0].shown['words'] != 'it has stopped': page.wait_for_timeout(50)
    tell(page)
    expect(part(page, 'said')).to_have_text('it has stopped')
    assert stopped == [part(page, 'run').input_value()] and page.asked == ['stop']

def test_a_look_disturbs_nobody(open_apps, runs): # noqa: F811
    page = visit(open_apps)
    first = part(page, 'run').input_value()
    other = next(run.name for run in runs if run.name != first)
    part(page, 'run').select_option(other)
    tell(page) # the kernel was busy: it shows the first one still
    assert part(page, 'run').input_value() == other
    expect(part(page, 'closely')).to_contain_text(first)
    page.wait_for_function(f"window.saved?.run === '{other}'")
    page.apps[0].state = dict(run=other)
    tell(page)
    expect(part(page, 'closely')).to_contain_text(other)
    expect(part(page, 'closely')).to_contain_text('a <b>line</b>')
    part(page, 'table').focus()
    page.evaluate("window.row = document.querySelector('.monitor-table tr')")
    tell(page)
    assert page.evaluate('row.isConnected') # what is the same is not drawn again
    expect(part(page, 'table')).to_be_focused()

def test_a_silent_kernel_is_gone(open_apps, browser, runs): # noqa: F811
    context = browser.new_context()
    context.clock.install()
    page = visit(open_apps, context=context)
    page.apps[0].every = 2.
    page.apps[0].refresh()
    tell(page)
    banner = page.locator('.banner')
    page.clock.run_for(15_000)
    expect(banner).to_be_hidden()
    page.clock.run_for(15_000)
    expect(banner).to_contain_text('The kernel is gone: run the cell again. The runs go on')
    tell(page) # it was asleep
    expect(banner).to_be_hidden()

@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
@pytest.mark.parametrize('alone', [False, True], ids=['kernel', 'alone'])
def test_it_fits_and_axe_finds_nothing(open_apps, axe, runs, dark, alone): # noqa: F811
    page = visit(open_apps, dark=dark, alone=alone)
    app = page.locator('.monitor')
    if alone: expect(part(page, 'said')).to_contain_text('This page has no kernel')
    else: part(page, 'stop').click()
    assert (app.get_attribute('data-dark') is not None) == dark
    expect(part(page, 'closely').locator('svg[role=img]')).to_be_visible()
    page.evaluate(axe)
    for width in WIDTHS:
        page.set_viewport_size(dict(width=width, height=900))
        page.wait_for_timeout(300) # colours have settled
        inner, outer = page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
        assert inner <= outer
        picture(page, f"monitor-{width}-{'alone-' * alone}{'dark' if dark else 'light'}")
        found = page.evaluate("axe.run('.monitor').then(found => found.violations)")
        assert [(v['id'], [n['html'][:90] for n in v['nodes']]) for v in found
                if v['impact'] in ('serious', 'critical')] == []
