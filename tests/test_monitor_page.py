"The panel in JupyterLab: it shows a live run, asks once, and stops it."
import os, subprocess, sys

import pytest
from playwright.sync_api import expect

from jupyter_lab import no_cell_failed, opened
from test_door import environment

pytestmark = pytest.mark.proof('apps.monitor')

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
