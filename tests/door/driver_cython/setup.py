from Cython.Build import cythonize
from setuptools import Extension, setup

import dmapath

setup(ext_modules=cythonize([Extension("dmapath_checksum_driver", ["dmapath_checksum_driver.pyx"],
                                       include_dirs=[dmapath.get_include()])], language_level="3"))
