"Package metadata, read from settings.ini: edit there, not here."
import shlex, shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

extras = {key.removesuffix('_requirements'): shlex.split(value)
          for key, value in cfg.items() if key.endswith('_requirements')}
# bench: unmaintained peers, to measure against; swanlab: another protobuf than what was tested
extras['all'] = sorted(set(sum(
    (extras[key] for key in extras if key not in ('bench', 'swanlab')), [])))

class BuildWithNotebooks(build_py):
    "Put copies of the training notebooks into the wheel: an installation has no nbs/."
    def run(self):
        super().run()
        to = Path(self.build_lib)/cfg['lib_name']/'notebooks'
        if self.editable_mode: return
        to.mkdir(parents=True, exist_ok=True)
        for path in Path('nbs').glob('train_*.ipynb'): shutil.copy(path, to)

setup(
    cmdclass=dict(build_py=BuildWithNotebooks),
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], author_email=cfg['author_email'], keywords=cfg['keywords'],
    license='MIT', license_files=['LICENSE'], url=cfg['git_url'],
    long_description=open('README.md', encoding='utf-8').read(),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['enigma_lab', 'enigma_lab.*']),
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg['requirements']), extras_require=extras,
    entry_points={
        'console_scripts': [cfg['console_scripts']],
        'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
        'papermill.io': ['enigma-lab-door=enigma_lab.lab.papermill_plugin:install'],
    })
