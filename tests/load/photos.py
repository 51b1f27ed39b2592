"Drawn photos of realistic sizes, for the load test and the benchmark of serving."
import io
import numpy as np
from PIL import Image
from plant_mlops.data.synthetic import draw

SIZES = dict(thumbnail=(341, 256), web=(1600, 1200), phone=(4000, 3000)) # pixels

def add_noise(photo: Image.Image, seed: int) -> Image.Image:
    "A photo with the noise of a sensor, which makes real files as large as they are."
    noise = np.random.default_rng(seed).integers(-14, 15, (photo.height, photo.width, 1), dtype=np.int16)
    return Image.fromarray((np.asarray(photo, np.int16) + noise).clip(0, 255).astype(np.uint8))

def camera_photo(
    size: tuple, # width, height in pixels
    seed: int = 0, # the same seed makes the same photo
    label: str = 'dandelion', # what is drawn
) -> bytes: # JPEG: 30 kB as a thumbnail, 0.7 MB at 2 megapixels, 4 MB at 12
    "A drawing as a camera would save it: a large one is enlarged and has noise."
    if size[0] < 500: photo = draw(label, seed, (341, 256))
    else: photo = add_noise(draw(label, seed, (400, 300)).resize(size, Image.Resampling.BICUBIC), seed)
    file = io.BytesIO()
    photo.save(file, 'JPEG', quality=90)
    return file.getvalue()

BOUNDARY = 'drawn-photo'

def form(
    files: list, # JPEGs
    field: str = 'file', # of the form
) -> tuple: # body, its content type
    "The files as the multipart form that a browser sends."
    parts = []
    for i, data in enumerate(files):
        head = (f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{i}.jpg"\r\n'
                'Content-Type: image/jpeg\r\n\r\n')
        parts += [head.encode(), data, b'\r\n']
    return b''.join(parts) + f'--{BOUNDARY}--\r\n'.encode(), f'multipart/form-data; boundary={BOUNDARY}'
