"""Extensions of dmapath. Environment: DMAPATH_WERROR=1 turns warnings into errors, DMAPATH_SANITIZE=address,undefined
builds with sanitizers, DMAPATH_ANNOTATE=1 writes cython's line scores beside the generated C, DMAPATH_ONLY (a list with
commas) builds these modules alone, DMAPATH_FLAGS are more of the compiler's flags."""

import glob
import os
import subprocess

from Cython.Build import cythonize
from setuptools import Extension, setup

SANITIZE = os.environ.get("DMAPATH_SANITIZE", "")
ONLY = [name for name in os.environ.get("DMAPATH_ONLY", "").split(",") if name]
CORE = ["ext/core/core.c", "ext/core/mem.c"]
MEM = ["ext/core/mem.c", "ext/core/util.c"]
#: Module -> C sources that it links. Only one links the core; mem.c holds no data of its own; util.c numbers threads for
#: each extension that links it.
MODULES = {
    "dmapath.backends.base": [],
    "dmapath.backends.direct": MEM,
    "dmapath.backends.grant": MEM,
    "dmapath.backends.python": [],
    "dmapath.backends.iommu": CORE,
    "dmapath.memory": MEM,
    "dmapath.xen": MEM,
    "dmapath.swiotlb": ["ext/core/swiotlb.c", *MEM],
    "dmapath._callbacks": [],
    "dmapath.request": [],
    "dmapath.bio": [],
    "dmapath.mr": [],
    "dmapath.wrapper": [],
    "dmapath.tap": [],
    "dmapath.device": MEM,
    "dmapath.hmm": MEM,
    "dmapath.engine": MEM,
    "dmapath._bench": MEM,
    "dmapath.descriptors": [],
    "dmapath.devices.nvme": ["ext/devices/nvme.c"],
    "dmapath.devices.rnic": ["ext/devices/rnic.c"],
    "dmapath.drivers.nvme": [],
    "dmapath.mmio": [],
    "dmapath.drivers.registered": ["ext/core/util.c"],
    "dmapath.drivers.rnic": ["ext/core/util.c"],
}
#: The same for RDMA hardware, built where rdma-core's headers are.
VERBS = {
    "dmapath.verbs.bridge": [],
    "dmapath.verbs.resources": [],
    "dmapath.verbs.queue": [],
    "dmapath.verbs.backend": MEM,
    "dmapath.verbs._plain": ["ext/bench/verbs_plain.c"],
}

flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g1", "-fvisibility=hidden", "-Wall", "-Wextra",
         # generated code: unused entry points and parameters, and comparisons that are true by type
         "-Wno-unused-function", "-Wno-unused-parameter", "-Wno-sign-compare", "-Wno-missing-field-initializers",
         "-Wno-type-limits", "-Wno-cast-function-type"]
flags += os.environ.get("DMAPATH_FLAGS", "").split()
link: list[str] = []
if os.environ.get("DMAPATH_WERROR"):
    flags.append("-Werror")
if SANITIZE:
    flags += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
    link.append(f"-fsanitize={SANITIZE}")



def has_verbs() -> bool:
    """Whether libibverbs can be compiled against; a build that must be whole (DMAPATH_WERROR) says so where not."""
    cc = os.environ.get("CC", "cc").split()
    there = subprocess.run([*cc, "-E", "-x", "c", "-"], input="#include <infiniband/verbs.h>\n", text=True, check=False,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0  # fmt: skip
    if not there:
        print("dmapath: rdma-core's headers are missing (apt-get install libibverbs-dev): built without the verbs back end")
        if os.environ.get("DMAPATH_WERROR"):
            raise SystemExit("dmapath: DMAPATH_WERROR wants the whole package")
    return there


if has_verbs():
    MODULES |= VERBS
extensions = [
    Extension(name, [name.replace(".", "/") + ".pyx", *sources],
              include_dirs=["ext/include", "ext/core", "ext/bench", "ext/devices"],
              extra_compile_args=flags, extra_link_args=link,
              libraries=["ibverbs"] if name in VERBS else [],
              depends=sorted(glob.glob("ext/**/*.[ch]", recursive=True)))
    for name, sources in MODULES.items()
    if name in ONLY or not ONLY
]

setup(
    ext_modules=cythonize(
        extensions,
        nthreads=os.cpu_count() or 1,
        build_dir="build/cython",
        annotate=bool(os.environ.get("DMAPATH_ANNOTATE")),
        compiler_directives={"language_level": "3", "embedsignature": True,
                             "cdivision": True},
    ),
)
