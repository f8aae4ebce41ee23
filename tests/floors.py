"""Print the oldest versions that the core requirements promise, for pip.

Continuous integration installs them and runs `tests/test_bare.py`: what is promised is tested.
It needs nothing but Python.
"""
import re
from configparser import ConfigParser
from pathlib import Path

def floors(root=Path(__file__).resolve().parent.parent):
    "Read `name>=version` from settings.ini; return 'name==version', or the name if there is none."
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    found = []
    for text in config['DEFAULT']['requirements'].split():
        name, floor = re.match(r'([\w-]+)(?:.*?>=([\d.]+))?', text).groups()
        found.append(f'{name}=={floor}' if floor else name)
    return found

if __name__ == '__main__': print(*floors())
