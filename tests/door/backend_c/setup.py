from setuptools import Extension, setup

import dmapath

setup(ext_modules=[Extension("dmapath_window", ["window.c"], include_dirs=[dmapath.get_include()])])
