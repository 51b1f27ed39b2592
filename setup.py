"Everything about the package is in settings.ini; this file hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
extras = ['log', 'heic', 'batch', 'dask', 'ray', 'train', 'app', 'dashboard', 'jobs', 'kubeflow', 'airflow', 'celery', 'dev']

def lines(key): return [o.strip() for o in cfg[key].splitlines() if o.strip()]

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(Path(__file__).parent/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license=cfg['license'],
    keywords=cfg['keywords'].split(),
    classifiers=['Programming Language :: Python :: 3 :: Only', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[cfg['lib_name'], cfg['lib_name'] + '.*']),
    package_data={cfg['lib_name']: ['**/*.sql', '**/*.ipynb', '**/*.j2', '**/*.yaml', '**/*.css', '**/*.js', '**/*.html', '**/*.svg']},
    install_requires=lines('requirements'),
    extras_require={o: lines(f'{o}_requirements') for o in extras},
    entry_points={'console_scripts': lines('console_scripts'), 'plant_mlops.workloads': lines('workloads'),
                  'nbdev': [f"{cfg['lib_name']} = {cfg['lib_name']}._modidx:d"]},
)
