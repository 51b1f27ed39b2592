"Take the pictures of the documentation from a running system: `make screenshots`. It needs Chromium and ten minutes."
import io, json, os, shutil, subprocess, tempfile
from contextlib import contextmanager
from pathlib import Path
import httpx
from PIL import Image
from playwright.sync_api import sync_playwright
from helpers import command, free_port, require, root, stop, wait_for
from plant_mlops.data.synthetic import LABELS, draw_jpeg

TOKEN = 'for-these-pictures'
BROWSER_ARGS = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking']

def plant(*args, home) -> str:
    "Standard output of a command, with the settings of a user: `helpers.plant` would train less."
    return subprocess.run(command(*args, home=home), check=True, capture_output=True, text=True, cwd=home).stdout

@contextmanager
def server(home, name, port, path='/'):
    "A server of a home while the block runs: its URL."
    url = f'http://127.0.0.1:{port}'
    env = os.environ | dict(PLANT_TOKEN=TOKEN)
    p = subprocess.Popen(command(name, '--port', port, home=home), cwd=home, env=env,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: httpx.get(url + path).status_code == 200, 120, name)
        yield url
    finally: stop(p)

def send_traffic(api, n=240):
    "Request predictions, and give feedback on a quarter of them."
    for i in range(n):
        label = LABELS[i % 2]
        photo = draw_jpeg(label, 1000 + i, i)
        answer = httpx.post(f'{api}/predict', content=photo, headers={'Content-Type': 'image/jpeg'}, timeout=60).json()
        if i % 4: continue
        feedback = dict(id=answer['id'], label=label)
        httpx.post(f'{api}/feedback', json=feedback, headers={'Authorization': f'Bearer {TOKEN}'})

def save(png, path, box=None):
    "Save a picture as JPEG, or a part of it: (left, upper, right, lower), in pixels."
    image = Image.open(io.BytesIO(png)).convert('RGB')
    if box: image = image.crop([min(edge, limit) for edge, limit in zip(box, (*image.size, *image.size))])
    image.save(root/'nbs'/path, quality=82, optimize=True)
    print(f'nbs/{path}')

def take_page(browser, api, home):
    "The page of the server, with an answer."
    file = home/'a-photo.jpg'
    file.write_bytes(draw_jpeg(LABELS[0], 7, 7))
    page = browser.new_page(viewport=dict(width=1020, height=1010))
    page.goto(f'{api}/ui/')
    page.wait_for_selector('.pm-head h1')
    page.set_input_files('.pm-photo input[type=file]', str(file))
    page.wait_for_selector('.pm-card h2')
    page.wait_for_timeout(2000)
    save(page.screenshot(), 'serve/app.jpg')

def heading_positions(page) -> dict:
    "The y of each section's heading, in pixels; the first of those with the same name."
    positions = {}
    for heading in page.locator('h2').all():
        name = heading.inner_text().replace('¶', '').strip()
        positions.setdefault(name, max(0, int(heading.bounding_box()['y']) - 20))
    return positions

def take_dashboard(browser, url):
    "The top of the dashboard, and the sections Mistakes and Traffic."
    width = 1180
    page = browser.new_page(viewport=dict(width=width, height=8000)) # so that nothing has to be scrolled
    page.goto(url)
    is_filled = r"/\d:\d\d/.test(document.querySelector('.pm-status')?.innerText)"
    page.wait_for_function(is_filled, timeout=120_000)
    page.locator('button:has-text("Hour")').click()
    page.wait_for_timeout(4000)
    page.add_style_tag(content='.pm-bar { position: static !important }')
    y = heading_positions(page)
    png = page.screenshot()
    save(png, 'apps/dashboard-top.jpg', (0, 0, width, 1500))
    save(png, 'apps/dashboard-mistakes.jpg', (0, y['Mistakes'], width, y['Traffic']))
    save(png, 'apps/dashboard-traffic.jpg', (0, y['Traffic'], width, y['Drift']))

def take_report(browser, home):
    "The plots in the report of a training."
    run = json.loads(plant('job', 'show', 'train', '--json', home=home))
    page = browser.new_page(viewport=dict(width=750, height=1215))
    page.goto((home/'store'/run['report'].replace('.ipynb', '.html')).as_uri())
    page.wait_for_timeout(1000)
    top = int(page.locator('h2:has-text("Training")').bounding_box()['y']) - 20
    save(page.screenshot(full_page=True), 'jobs/report.jpg', (0, top, 750, top + 1215))

def main():
    home = Path(tempfile.mkdtemp(prefix='plant-pictures-'))
    try:
        plant('job', 'run', '--all', home=home)
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=require('chromium'), args=BROWSER_ARGS)
            with server(home, 'serve', free_port(), '/ready') as api:
                send_traffic(api)
                take_page(browser, api, home)
                plant('drift', home=home)
            with server(home, 'dashboard', free_port()) as url: take_dashboard(browser, url)
            take_report(browser, home)
            browser.close()
    finally: shutil.rmtree(home)

if __name__ == '__main__': main()
