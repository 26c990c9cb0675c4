"""Builds qkv_fast._core: the C core of src/, one object per file, linked with the Cython boundary.

Why not a plain list of sources: each file of src/kernels/ is compiled for the CPU it is named after, so each
has flags of its own. A path is first tried on the compiler, with a few lines that only its target can build;
if that fails, its table is left out and cpu.c never hears of it (QKV_HAVE_<PATH> stays undefined). The
package's metadata and what goes into its archives are in pyproject.toml and MANIFEST.in.

Environment: QKV_FAST_WERROR=1 makes warnings in the core errors; QKV_FAST_REQUIRE_PATHS="avx2 avx512" makes
it an error to leave one of these out (releases set it), and builds those that are built only if asked for. CC,
CFLAGS and LDFLAGS mean what they always do.
"""

import copy
import os
import re
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from sysconfig import get_platform

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError
from setuptools.modified import newer_group

# Every compiler builds this, and its object says what for: one that builds for two targets at once says both.
TARGETS = """
const char qkv_target[] =
#if defined(__x86_64__) || defined(_M_X64)
    "qkv-target-x86_64";
#elif (defined(__aarch64__) && !defined(__ARM_BIG_ENDIAN)) || defined(_M_ARM64)
    "qkv-target-aarch64";
#else
    "qkv-target-other";
#endif
"""
X86_64 = "#include <immintrin.h>\n"
AARCH64 = "#include <arm_neon.h>\n"


@dataclass(frozen=True)
class CpuPath:
    """src/kernels/<name>.c: its target, the flags it needs, those it gets if the compiler knows them, its probe, and
    whether it is built only where QKV_FAST_REQUIRE_PATHS names it."""

    name: str
    target: str = ""
    flags: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    probe: str = ""
    only_if_required: bool = False

    @property
    def source(self) -> str:
        return f"src/kernels/{self.name}.c"

    @property
    def macro(self) -> tuple[str, str]:
        return (f"QKV_HAVE_{self.name.upper()}", "1")


AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mavx512cd")
# gcc would begin more loads than registers hold, and move what it has loaded along for later steps of a product.
NEON = ("-fno-schedule-insns", "-fno-predictive-commoning")

PATHS = (
    CpuPath("portable"),
    CpuPath(
        "avx2",
        target="x86_64",
        flags=AVX2,
        probe=X86_64 + "__m256d f(__m256d a);\n"
        "__m256d f(__m256d a) { return _mm256_fmadd_pd(a, _mm256_permute4x64_pd(a, 1), a); }\n",
    ),
    CpuPath(
        "avx512",
        target="x86_64",
        flags=AVX512,
        optional=("-mprefer-vector-width=512",),
        probe=X86_64 + "__m512 f(__m512 a, __mmask16 m);\n"
        "__m512 f(__m512 a, __mmask16 m) { return _mm512_and_ps(_mm512_mask_fmadd_ps(a, m, a, a), a); }\n",
    ),
    CpuPath(
        "avx512bf16",
        target="x86_64",
        flags=(*AVX512, "-mavx512bf16"),
        optional=("-mprefer-vector-width=512",),
        probe=X86_64 + "__m512 f(__m512 a, __m512bh b, float c);\n"  # some clang cannot take a broadcast for pairs
        "__m512 f(__m512 a, __m512bh b, float c) { return _mm512_dpbf16_ps(a, b, (__m512bh)_mm512_set1_ps(c)); }\n",
    ),
    CpuPath(  # not yet run on a CPU that has it
        "amx",
        target="x86_64",
        flags=(*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        optional=("-mprefer-vector-width=512",),
        probe=X86_64 + "void f(void);\nvoid f(void) { _tile_dpbf16ps(0, 1, 2); }\n",
        only_if_required=True,
    ),
    CpuPath(  # for tests
        "amx_emulated",
        target="x86_64",
        flags=(*AVX2, "-O2", "-DQKV_SANITIZED", "-Wno-psabi"),
        probe=X86_64 + "__m256 f(__m256 a);\n__m256 f(__m256 a) { return _mm256_fmadd_ps(a, a, a); }\n",
        only_if_required=True,
    ),
    CpuPath(
        "neon",
        target="aarch64",
        optional=NEON,
        probe=AARCH64 + "float32x4_t f(float32x4_t a);\n"
        "float32x4_t f(float32x4_t a) { return vfmaq_laneq_f32(a, a, a, 3); }\n",
    ),
    CpuPath(
        "neonbf16",
        target="aarch64",
        flags=("-march=armv8.2-a+bf16",),
        optional=NEON,
        probe=AARCH64 + "float32x4_t f(float32x4_t a, bfloat16x8_t b);\n"
        "float32x4_t f(float32x4_t a, bfloat16x8_t b) { return vbfdotq_laneq_f32(a, b, b, 3); }\n",
    ),
)

# The core computes what it says: no value-changing optimisation, and no link-time one, which would carry code
# from a file built for a newer CPU into one built for every CPU. These flags come last on the command line,
# after whatever Python or CFLAGS brought: from 3.15 on, frame pointers (PEP 831), which cost kernels a register.
UNIX_FLAGS = (
    *("-O3", "-std=c11", "-fvisibility=hidden", "-pthread", "-fomit-frame-pointer"),
    *("-fno-lto", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno"),
)
CLANG_CL_TARGETS = {
    "win-amd64": ("--target=x86_64-pc-windows-msvc",),
    "win-arm64": ("--target=arm64-pc-windows-msvc",),
}
CLANG_CL_FLAGS = ("/O2", "/std:c11", "/GL-", "/clang:-O3", "/clang:-ffp-contract=off")
CL_FLAGS = ("/O2", "/std:c11", "/experimental:c11atomics", "/GL-", "/fp:precise")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wvla", "-Wframe-larger-than=16384")


def core_sources() -> list[str]:
    """The files of the core that are built for every CPU."""
    return sorted(path.as_posix() for path in Path("src").glob("*.c"))


def headers() -> list[str]:
    """What a C file may include: any of these being newer makes an object stale."""
    return sorted(path.as_posix() for path in Path("src").rglob("*.h"))


def dependencies() -> list[str]:
    """What makes the extension stale, its own .pyx aside."""
    kernels = [path.source for path in PATHS]
    return ["setup.py", "qkv_fast/_qkv.pxd", *core_sources(), *kernels, *headers()]


class Core:
    """Compiles the core, given a setuptools compiler that knows what Python and the environment ask of it."""

    def __init__(self, compiler, build_dir: str, *, debug_info: bool, extra_flags: tuple[str, ...] = ()):
        self.compiler = copy.copy(compiler)
        self.compiler.include_dirs = []  # Python's own headers are out of the core's reach
        self.style = self._style()
        flags = {"unix": UNIX_FLAGS, "clang-cl": CLANG_CL_FLAGS, "cl": CL_FLAGS}[self.style]
        if self.style == "clang-cl":  # Arm machines may have one that was built for x86-64, and builds for it unasked
            flags += CLANG_CL_TARGETS.get(get_platform(), ())
        if self.style == "unix":
            flags += ("-g",) if debug_info else ("-g0",)
            flags += WARNINGS if os.environ.get("QKV_FAST_WERROR") == "1" else ()
        self.flags = [*flags, *extra_flags]
        # Objects of another compiler or of other flags are never taken for ours.
        command = repr((getattr(self.compiler, "compiler_so", None) or self.compiler.cc, self.flags))
        self.build_dir = os.path.join(build_dir, f"core-{zlib.crc32(command.encode()):08x}")

    def _style(self) -> str:
        if self.compiler.compiler_type != "msvc":
            return "unix"
        self.compiler.initialize()
        clang_cl = shutil.which(os.environ.get("CC", "cl"))
        if not clang_cl or Path(clang_cl).stem.lower() != "clang-cl":
            return "cl"
        self.compiler.cc = clang_cl
        return "clang-cl"

    def compile(self, source: str, flags=(), macros=(), *, force: bool = False) -> str:
        (target,) = self.compiler.object_filenames([source], output_dir=self.build_dir)
        if force or newer_group([source, *headers(), "setup.py"], target):
            self.compiler.compile(
                [source],
                output_dir=self.build_dir,
                macros=list(macros),
                include_dirs=["src"],
                extra_postargs=[*self.flags, *flags],
            )
        return target

    def targets(self) -> set[str]:
        """What this compiler builds for: asked first, since a probe for another target would print its errors."""
        source = Path(self.build_dir, "probe_target.c")
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(TARGETS)
        (built,) = self.compiler.compile([str(source)], self.build_dir, extra_postargs=self.flags)
        found = re.findall(rb"qkv-target-(\w+)", Path(built).read_bytes())
        return {name.decode() for name in found}

    def path_flags(self, path: CpuPath, targets: set[str]) -> list[str] | None:
        """The flags that this compiler takes for `path`, or None if it cannot build it for its targets."""
        if not path.probe:
            return list(path.flags)
        if targets != {path.target}:
            return None
        # Neither cl nor mingw's gcc builds SIMD paths: the first takes any intrinsic under any flags, so that
        # a probe says nothing, and the second does not align the stack for 32-byte spills.
        if self.style == "cl" or self.compiler.compiler_type in ("mingw32", "cygwin"):
            return None
        probe = Path(self.build_dir, f"probe_{path.name}.c")
        probe.write_text(path.probe)
        for flags in dict.fromkeys([path.flags + path.optional, path.flags]):
            try:
                self.compiler.compile([str(probe)], self.build_dir, extra_postargs=[*self.flags, *flags])
            except CompileError:
                continue
            return list(flags)
        return None

    def build(self, *, force: bool = False) -> dict[str, str]:
        """Compiles every file of the core that is out of date: {source: object}, in a fixed order."""
        kernels = {file.as_posix() for file in Path("src/kernels").glob("*.c")}
        if strangers := kernels - {path.source for path in PATHS}:
            raise OptionError(f"setup.py: no entry in PATHS for {', '.join(sorted(strangers))}")
        targets = self.targets()
        required = os.environ.get("QKV_FAST_REQUIRE_PATHS", "").split()
        wanted = [path for path in PATHS if path.name in required or not path.only_if_required]
        found = {path: flags for path in wanted if (flags := self.path_flags(path, targets)) is not None}
        names = [path.name for path in found]
        print(f"qkv_fast: this compiler builds the CPU paths {', '.join(names)}")
        if missing := [name for name in required if name not in names]:
            raise CompileError(f"QKV_FAST_REQUIRE_PATHS: this compiler cannot build {', '.join(missing)}")
        macros = [path.macro for path in found]
        # Several compilers run at once; the paths, of which the last take longest, begin first.
        work = {path.source: (flags, ()) for path, flags in reversed(found.items())}
        work |= {source: ((), macros) for source in core_sources()}
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with ThreadPoolExecutor(cpus) as pool:
            begun = {
                source: pool.submit(self.compile, source, flags, defined, force=force)
                for source, (flags, defined) in work.items()
            }
            return {source: begun[source].result() for source in sorted(begun)}


class BuildExt(build_ext):
    def finalize_options(self):
        super().finalize_options()
        self.cython_c_in_temp = True
        self.cython_directives = {"language_level": 3, "binding": False, "freethreading_compatible": True}
        # An in-place or editable build keeps its symbols, for debuggers and profilers; a wheel has none.
        self.development = bool(self.inplace)
        self.force = self.force or os.environ.get("QKV_FAST_WERROR") == "1"

    def build_extension(self, ext):
        import numpy

        ext.include_dirs += ["src", numpy.get_include()]
        core = Core(self.compiler, self.build_temp, debug_info=self.development)
        if core.style == "unix":
            ext.libraries += ["m"]
            ext.extra_compile_args += ["-fvisibility=hidden", "-fno-lto", "-g" if self.development else "-g0"]
            # Under its opposite gcc links start-up code that makes the whole process flush subnormals.
            ext.extra_link_args += ["-pthread", "-fno-lto", "-fno-fast-math"]
            if not self.development and sys.platform != "darwin":
                ext.extra_link_args += ["-Wl,-s"]
        ext.extra_objects += core.build(force=self.force).values()
        super().build_extension(ext)


class CoreTests(Command):
    """Builds each tests/core/*.c, with the core, into an executable, under the sanitizers asked for."""

    description = "build the C core's own tests"
    user_options = [  # noqa: RUF012 (setuptools' own form)
        ("build-dir=", None, "where the executables go (build/core_tests)"),
        ("sanitize=", None, "as for -fsanitize=: address,undefined or thread"),
        ("unoptimised", None, "for what is built to see that it builds"),
    ]
    boolean_options = ["unoptimised"]  # noqa: RUF012

    def initialize_options(self):
        self.build_dir = "build/core_tests"
        self.sanitize = ""
        self.unoptimised = False

    def finalize_options(self):
        self.flags = ("-UNDEBUG", "-fno-omit-frame-pointer")
        if self.sanitize:
            self.flags += (f"-fsanitize={self.sanitize}", "-fno-sanitize-recover=all")
            # Instrumented, -O3 with full debug information takes gcc minutes. Red zones are not our frames.
            self.flags += ("-O1", "-g1", "-Wno-frame-larger-than", "-DQKV_SANITIZED")
        if self.unoptimised:  # where Zig would sanitize, and frames are as large as can be
            self.flags += ("-O0", "-g0", "-fno-sanitize=undefined", "-Wno-frame-larger-than")

    def run(self):
        from distutils.ccompiler import new_compiler
        from distutils.sysconfig import customize_compiler

        compiler = new_compiler()
        customize_compiler(compiler)
        core = Core(compiler, self.build_dir, debug_info=True, extra_flags=self.flags)
        objects = core.build().values()
        for source in sorted(Path("tests/core").glob("*.c")):
            test = core.compile(source.as_posix())
            core.compiler.link_executable(
                [test, *objects], source.stem, self.build_dir, libraries=["m"], extra_postargs=core.flags
            )


if __name__ == "__main__":  # tests read the tables above without building anything
    setup(
        ext_modules=[Extension("qkv_fast._core", ["qkv_fast/_core.pyx"], depends=dependencies())],
        cmdclass={"build_ext": BuildExt, "core_tests": CoreTests},
    )
