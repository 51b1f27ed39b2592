"Photos of realistic sizes, drawn: what the load test and the benchmark of serving send."
import io
import numpy as np
from PIL import Image
from plant_mlops.data.synthetic import draw

SIZES = dict(thumbnail=(341, 256), web=(1600, 1200), phone=(4000, 3000)) # pixels: as shops show them, as sites do, as telephones take them

def camera_photo(
    size: tuple, # width, height in pixels
    seed: int = 0, # the same seed makes the same photo
    label: str = 'dandelion', # what is drawn
) -> bytes: # JPEG: 30 kB as a thumbnail, 0.7 MB at 2 megapixels, 4 MB at 12
    "A drawing as a camera would save it: enlarged, with the noise of a sensor that makes real files as large as they are."
    w, h = size
    im = draw(label, seed, (341, 256)) if w < 500 else draw(label, seed, (400, 300)).resize(size, Image.Resampling.BICUBIC)
    if w >= 500:
        noise = np.random.default_rng(seed).integers(-14, 15, (h, w, 1), dtype=np.int16)
        im = Image.fromarray((np.asarray(im, np.int16) + noise).clip(0, 255).astype(np.uint8))
    im.save(out := io.BytesIO(), 'JPEG', quality=90)
    return out.getvalue()

def form(
    files: list, # JPEGs
    field: str = 'file', # of the form
) -> tuple: # body, its content type
    "What a browser sends: the files in a multipart form."
    head = '--drawn-photo\r\nContent-Disposition: form-data; name="{}"; filename="{}.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    return b''.join(head.format(field, i).encode() + o + b'\r\n' for i, o in enumerate(files)) + b'--drawn-photo--\r\n', 'multipart/form-data; boundary=drawn-photo'
