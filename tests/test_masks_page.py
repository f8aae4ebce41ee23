"The masks page in a real JupyterLab, at 800 pixels, used as a person does."
import pytest
from playwright.sync_api import expect

from jupyter_lab import keys_stay, no_cell_failed, opened, set_knob

pytestmark = pytest.mark.proof('apps.widget', 'apps.masks')

pytest_plugins = 'jupyter_lab'

INJECTION = '<img src=x onerror="window.hacked = true">'

@pytest.fixture(scope='module')
def page(lab, browser):
    with opened(lab, browser, '50_masks.ipynb', '.masks-app .masks-run input') as page:
        page.set_viewport_size(dict(width=800, height=1000))
        yield page

def app(page): return page.locator('.masks-app').last

def pictures(page, where):
    "The images of a part of the page, all of them decoded."
    found = app(page).locator(f'.masks-{where} img')
    assert all(found.evaluate_all('all => all.map(x => x.complete && x.naturalWidth > 0)'))
    return found.evaluate_all('all => all.map(x => x.src)')

def rows_change(page, before):
    "The rows once they are others."
    page.wait_for_function("""before => {
        const app = [...document.querySelectorAll('.masks-app')].pop()
        const now = [...app.querySelectorAll('.masks-images img')].map(x => x.src)
        return now.length == 3 && now.join() != before.join()
    }""", arg=before)
    return pictures(page, 'images')

def test_three_models_draw_from_the_same_noise(page):
    assert 'untrained toy' in app(page).inner_text()
    assert pictures(page, 'images') == []
    set_knob(page, 'steps', 6)
    set_knob(page, 'images', 5)
    app(page).locator('button.masks-draw').click()
    drawn = rows_change(page, [])
    assert len(set(drawn)) == 3
    set_knob(page, 'after step', 2)
    early = rows_change(page, drawn)
    assert len(set(early)) == 3 and not set(early) & set(drawn)
    set_knob(page, 'after step', 0)
    assert len(set(rows_change(page, early))) == 1

def test_a_layer_has_its_map(page):
    layer = app(page).locator('.masks-layer select')
    layer.select_option('down_blocks.0.resnets.0.conv1')
    expect(app(page).locator('.masks-map img')).to_have_count(9) # a kernel of three by three
    convolution = pictures(page, 'map')
    layer.select_option('mid_block.attentions.0.to_q')
    expect(app(page).locator('.masks-map img')).to_have_count(1)
    assert not set(pictures(page, 'map')) & set(convolution)
    for case in ('dropped by both', 'lost', 'gained', 'kept by both'):
        expect(app(page).locator('.masks-map')).to_contain_text(case)
    row = app(page).locator('.masks-table tr', has_text='mid_block.attentions.0.to_q')
    expect(row.locator('td').nth(2)).to_have_text('16') # groups of four in eight by eight

def test_it_fits_a_narrow_window(page):
    inner, outer, right = app(page).evaluate(
        'x => [x.scrollWidth, x.clientWidth, x.getBoundingClientRect().right]')
    assert inner <= outer + 1 and right <= 800

def test_a_wrong_name_is_text_and_loses_nothing(page):
    rows = pictures(page, 'images')
    field = app(page).locator('.masks-run input')
    field.fill(INJECTION); field.press('Tab')
    expect(app(page).locator('.masks-said')).to_contain_text('<img src=x')
    assert pictures(page, 'images') == rows
    assert page.evaluate('window.hacked') is None and no_cell_failed(page)

def test_keys_stay_on_the_page(page): keys_stay(page, '.masks-note', 'button.masks-draw')
