"The masks page as a person uses it: with Python behind it, without a kernel, in JupyterLab."
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from app_pages import open_apps # noqa: F401, a fixture
from enigma_lab.apps.masks import CASES, KNOBS, MasksApp, film, load_masked, row_names
from enigma_lab.ddpm.model import sample_images
from enigma_lab.lab.runs import find_run
from jupyter_lab import keys_stay, no_cell_failed, opened
from test_lampboard import axe, reach # noqa: F401, `axe` is a fixture
from test_monitor_page import picture

pytestmark = pytest.mark.proof('apps.base', 'apps.masks')

pytest_plugins = 'jupyter_lab'

WIDTHS = 390, 800, 1280
RUN = 'showcase/maskpro'
INJECTION = '<img src=x onerror="window.hacked = true">'

@pytest.fixture
def visit(open_apps): # noqa: F811
    "Open a page with apps whose questions these tests answer, as a kernel does."
    return lambda *apps, **how: open_apps(*apps or [MasksApp(RUN)], ready='canvas[width]', **how)

@pytest.fixture(scope='module')
def models(): return load_masked(RUN)

def app(page): return page.locator('.masks').last

def named(page, role, name, **options):
    return app(page).get_by_role(role, name=name, exact=True, **options)

def films(page):
    "The pictures of the rows, as arrays."
    urls = app(page).locator('.film').evaluate_all("""rows => rows.map(row =>
        getComputedStyle(row.firstChild).backgroundImage.slice(5, -2))""")
    return [np.array(Image.open(io.BytesIO(base64.b64decode(url.split(',')[1])))) for url in urls]

def last_images(whole, models, steps, images, seed):
    "Compare the end of each film with the sampler, which is not the page's."
    for pixels, name in zip(whole, row_names(models[0], {})):
        drawn = sample_images(models[0][name], models[1], images, steps, seed, batch_size=images)
        row = ((drawn.clamp(-1, 1) + 1)*127.5).round().byte().numpy()[:, 0]
        assert (pixels[-row.shape[1]:] == np.concatenate(list(row), 1)).all(), name

def test_all_rows_play_from_the_same_noise(visit, models):
    page = visit()
    slider, whole = named(page, 'slider', 'after step'), films(page)
    assert len(whole) == len(models[0]) >= 3
    last_images(whole, models, **KNOBS)
    side = whole[0].shape[0]//(KNOBS['steps'] + 1)
    assert all((pixels[:side] == whole[0][:side]).all() for pixels in whole) # the noise
    expect(app(page).locator('.bar .count')).to_have_text('step 24 of 24') # it has played
    named(page, 'button', 'Play').click()
    expect(named(page, 'button', 'Pause')).to_be_visible()
    slider.fill('0') # a hand on the slider stops it
    expect(named(page, 'button', 'Play')).to_be_visible()
    where = lambda: app(page).locator('.film').first.locator('.tile').nth(2).evaluate(
        'tile => tile.style.backgroundPosition')
    assert where() == f'{100*2/7:.4f}% 0%'
    slider.fill('6')
    assert where() == f'{100*2/7:.4f}% 25%' # six of 24 steps
    assert slider.get_attribute('aria-valuetext') == 'step 6 of 24'
    expect(app(page).get_by_role('img', name='all weights, after step 6')).to_be_visible()

def test_knobs_are_what_is_drawn(visit, models):
    page = visit()
    app(page).get_by_text('Knobs').click()
    for name, value in dict(seed=3, steps=5, images=2).items():
        named(page, 'spinbutton', name).fill(str(value))
    named(page, 'button', 'Draw anew').click()
    expect(named(page, 'slider', 'after step')).to_have_attribute('max', '5')
    last_images(films(page), models, steps=5, images=2, seed=3)
    named(page, 'spinbutton', 'steps').fill('51')
    named(page, 'spinbutton', 'steps').press('Enter')
    expect(app(page).locator('.wrong')).to_have_text(
        'steps must be a whole number from 1 to 50, got 51')
    assert len(films(page)) == len(models[0]) # what was there stays
    page.wait_for_timeout(400)
    assert page.evaluate('window.saved.knobs') == dict(seed=3, steps=5, images=2)

def test_the_blind_test_counts(visit, models):
    page, right, orders = visit(reduced_motion='reduce'), 0, set()
    for turn in range(6):
        choices = app(page).locator('.choice')
        names = choices.evaluate_all('all => all.map(x => x.dataset.name)')
        assert sorted(names) == sorted(models[0])
        assert 'weights' not in choices.first.inner_text() # the answer is not written on it
        orders.add(tuple(names))
        name = 'dense' if turn % 2 else 'learned'
        right += name == 'dense'
        app(page).locator(f'.choice[data-name={name}]').click()
        expect(app(page).get_by_text(f'{right} of {turn + 1} right')).to_be_visible()
        expect(app(page).locator('.choice.dense')).to_contain_text('all weights')
        assert choices.first.is_disabled()
        named(page, 'button', 'Next').click()
    assert len(orders) > 1 # one in 7,776 by chance with three rows

def test_the_gap_is_the_records(visit):
    page, m = visit(), find_run(RUN).metrics
    row = app(page).locator('.gaps li', has_text='learned').last
    share, low, high = (f"{100*m[f'gap_recovered{end}']:.0f} %" for end in ('', '_from', '_to'))
    expect(row.locator('.count')).to_have_text(f'{share} ({low} to {high})')
    left, width, whole = row.locator('.interval').evaluate("""x => {
        const a = x.getBoundingClientRect(), b = x.parentNode.getBoundingClientRect()
        return [a.left - b.left, a.width, b.width] }""")
    assert abs(left/whole - m['gap_recovered_from']) < .02
    assert abs(width/whole - m['gap_recovered_to'] + m['gap_recovered_from']) < .02

def test_a_layer_opens_and_its_groups_are_told(visit, models):
    page = visit()
    dense, before, now = (models[0][name] for name in ('dense', 'initial', 'learned'))
    weight = lambda model, name: model.get_submodule(name).weight.detach()
    colours = [[int(c[k:k + 2], 16) for k in (1, 3, 5)] for c in CASES.values()]
    for name in 'mid_block.attentions.0.to_q', 'down_blocks.0.resnets.0.conv1':
        named(page, 'combobox', 'layer').select_option(name)
        app(page).get_by_role('img', name=f'masks of {name}; arrow keys choose a group').wait_for()
        a, b = ((weight(model, name) != 0).long() for model in (before, now))
        case = (a + 2*b).reshape(*a.shape[:2], *(a.shape[2:] or (1, 1))).numpy()
        O, I, H, W = case.shape
        canvas = app(page).locator('canvas')
        pixels = np.array(canvas.evaluate("""x => [...x.getContext('2d').getImageData(0, 0,
            x.width, x.height).data]"""), np.uint8).reshape(H*(O + 1) - 1, W*(I + 1) - 1, 4)
        for h in range(H):
            for w in range(W):
                tile = pixels[h*(O + 1):h*(O + 1) + O, w*(I + 1):w*(I + 1) + I, :3]
                assert (tile == np.array(colours)[case[:, :, h, w]]).all()
        for kind, count in zip(CASES, np.bincount(case.ravel(), minlength=4)):
            expect(app(page).locator('.legend')).to_contain_text(f'{kind} {count:,}')
        canvas.focus()
        for key in 'ArrowDown', 'ArrowRight', 'ArrowRight', 'ArrowLeft': canvas.press(key)
        four = weight(dense, name).reshape(case.shape)[1, 4:8, 0, 0].half().tolist()
        kept = lambda mask: ''.join('□■'[x] for x in mask.reshape(case.shape)[1, 4:8, 0, 0])
        said = app(page).locator('.group').inner_text()
        assert said.startswith('output 1, inputs 4 to 7')
        assert 'weights ' + ', '.join(f'{x:.3f}' for x in four) + '. Kept' in said
        assert f'before {kept(a)}, now {kept(b)}.' in said
    part = app(page).locator('.strip span').nth(3)
    title = part.get_attribute('title')
    part.click()
    assert named(page, 'combobox', 'layer').input_value() == title.split(',')[0]
    expect(app(page).get_by_text(title, exact=True)).to_be_visible()

def test_a_wrong_run_is_text_and_loses_nothing(visit):
    page = visit(reduced_motion='reduce')
    rows = [pixels.tobytes() for pixels in films(page)]
    named(page, 'combobox', 'run').evaluate("""(field, words) => {
        field.append(new Option(words, words))
        field.value = words
        field.dispatchEvent(new Event('change')) }""", INJECTION)
    expect(app(page).locator('.wrong')).to_contain_text(f'got {INJECTION!r}')
    assert named(page, 'combobox', 'run').input_value() == RUN
    assert [pixels.tobytes() for pixels in films(page)] == rows

def test_two_at_once_and_by_keyboard(visit):
    page = visit(MasksApp(RUN), MasksApp(RUN), reduced_motion='reduce')
    first, second = page.locator('.masks').first, page.locator('.masks').last
    first.get_by_role('slider', name='after step').fill('3')
    assert second.get_by_role('slider', name='after step').input_value() == '24'
    ids = page.evaluate('[...document.querySelectorAll("[id]")].map(x => x.id)')
    assert len(ids) == len(set(ids)) > 3
    names = set(reach(page))
    assert not {'run', 'Play', 'after step', 'Draw anew', 'Knobs', 'image A', 'layer'} - names

@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_every_width_and_both_grounds(visit, axe, dark): # noqa: F811
    page = visit(dark=dark, reduced_motion='reduce')
    app(page).get_by_text('Knobs').click()
    app(page).locator('.choice').first.click()
    assert (app(page).get_attribute('data-dark') is not None) == dark
    page.evaluate(axe)
    for width in WIDTHS:
        page.set_viewport_size(dict(width=width, height=900))
        page.wait_for_timeout(500) # colours have settled
        over = app(page).evaluate("""app => [...app.querySelectorAll('*')].filter(x =>
            x.getBoundingClientRect().right > innerWidth + 1).map(x => x.outerHTML.slice(0, 80))""")
        inner, outer = page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
        assert over == [] and inner <= outer
        picture(page, f"masks-{width}-{'dark' if dark else 'light'}")
        found = page.evaluate("axe.run('.masks').then(found => found.violations)")
        assert [(v['id'], [n['html'][:90] for n in v['nodes']]) for v in found
                if v['impact'] in ('serious', 'critical')] == []

def test_without_a_kernel_the_first_film_plays(open_apps, models): # noqa: F811
    page = open_apps(made := MasksApp(RUN), ready='canvas[width]', alone=True)
    last_images(films(page), models, **KNOBS)
    layers = {json.loads(key)[1]['name'] for key in made.told if '"layer"' in key}
    other = next(row['name'] for row in made.answer_look(RUN)['layers']
                 if row['name'] not in layers)
    for name, says in ((max(layers), ''), (other, 'This page has no kernel')):
        named(page, 'combobox', 'layer').select_option(name)
        expect(app(page).locator('.wrong')).to_contain_text(says)
    app(page).locator('.choice').first.click()
    expect(app(page).get_by_text('of 1 right')).to_be_visible()
    assert page.locator('.banner:visible').count() == 0

def test_in_jupyterlab(lab, browser):
    with opened(lab, browser, '50_masks.ipynb', '.enigma-view .masks canvas[width]') as page:
        first = page.locator('.enigma-view:not([data-app] *) .masks').first
        expect(first.locator('.film').first).to_be_visible()
        assert 'untrained toy' in first.text_content() # this folder has no runs
        first.get_by_role('slider', name='after step').fill('2')
        expect(first.locator('.bar .count')).to_have_text('step 2 of 24')
        first.get_by_role('button', name='Draw anew').click()
        expect(first.get_by_role('button', name='Draw anew')).to_be_enabled()
        assert no_cell_failed(page)
        keys_stay(page, 'h2')

def test_a_film_is_all_steps(models):
    "One picture: a row of images for each step."
    import torch
    x = torch.linspace(-1, 1, 3*2*1*4*4).reshape(3, 2, 1, 4, 4)
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(film(x).split(',')[1]))))
    assert pixels.shape == (12, 8)
    assert (pixels[4:8, 4:] == ((x[1, 1, 0] + 1)*127.5).round().byte().numpy()).all()
