"""Builds what runs the Metal code on Linux, into build/host_metal.

    python tests/host_metal/build.py [TARGET...]

- extension/_ext.*.so: the package's extension with csrc/eval_metal.cpp over a
  mock of Metal. See mock_metal.cpp.
- {asan,asan-contracted,tsan}/driver: runs single kernels under sanitizers. See
  driver.cpp.
- programs/{faults,threads,refusals,large}: tests in C++. See the files of these names.
"""

import fcntl
import importlib.metadata
import importlib.util
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Paths are relative to ROOT, so that a copy of the tree can be built further.
HERE = "tests/host_metal"
BUILD = "build/host_metal"
WHEELS = "build/macos-wheels"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# Targets: the extension, and the primitive of the stand-in for mx.fast.metal_kernel.
EXTENSION = f"extension/_ext{SUFFIX}"
CUSTOM = f"custom/_custom_kernel{SUFFIX}"

METAL_FILES = [
    "metal/adadelta.metal",
    "metal/norm.metal",
    "metal/update.h",
    "metal/adadelta_step.h",
    "metal/rounding.h",
    "metal/any_layout.h",
]
METAL = ["-D__METAL_VERSION__=310", f"-I{HERE}/include", "-Imetal"]
# C++ for OpenCL has Metal's address spaces once the generic one is taken away.
OPENCL = [
    *["-x", "clcpp", "-cl-std=CLC++2021", "-cl-no-stdinc", "-nostdinc"],
    *["-Xclang", "-cl-ext=-all,+cl_khr_fp16", *METAL],
]
CPP = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Half arithmetic is rounded to half each time. Attributes are Metal's own.
KERNELS = [
    *METAL,
    *[f"-I{BUILD}", "-Wno-unknown-attributes"],
    "-Wno-duplicate-decl-specifier",  # `constant` is const here, and MLX says both
    *["-Xclang", "-ffloat16-excess-precision=none"],
]
SEPARATE = "-ffp-contract=off"
# The CPU kernels, quick to compile: without their clones for each vector width.
PLAIN = "-O1 -ffp-contract=off -fno-math-errno -DADADELTA_CLONES="
CONTRACTED = "-ffp-contract=fast" + " -mfma" * (platform.machine() == "x86_64")
# GCC's run-time libraries, which are there anyway, serve clang's code as well, all
# but what newer ones add: checked function pointers, separate memory functions.
ASAN = "-fsanitize=address,undefined -fno-sanitize=function -fno-sanitize-recover=all"
TSAN = "-fsanitize=thread -mllvm -tsan-instrument-memintrinsics=false"
DRIVERS = {
    "asan": f"-O1 {ASAN} {SEPARATE}",
    "asan-contracted": f"-O1 {ASAN} {CONTRACTED}",
    "tsan": f"-O1 {TSAN} {SEPARATE}",
}
# Headers of macOS that metal_cpp includes; apple.h has what they declare.
APPLE_HEADERS = [
    *["CoreFoundation/CoreFoundation.h", "CoreGraphics/CGColorSpace.h"],
    *["CoreGraphics/CGGeometry.h", "IOSurface/IOSurfaceRef.h"],
    *["TargetConditionals.h", "dispatch/dispatch.h", "mach/mach.h"],
    *["objc/message.h", "objc/runtime.h"],
]


def run(command: list[str], text: str = "") -> str:
    """Runs a command in ROOT; its output, or an error that quotes all of it."""
    done = subprocess.run(
        command, cwd=ROOT, input=text, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def find_package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def clang() -> list[str]:
    """A clang beside this machine's C++ library."""
    return [
        *[sys.executable, "-m", "ziglang", "clang", "--driver-mode=g++"],
        f"--target={platform.machine()}-linux-gnu",
        *["-resource-dir", str(find_package("ziglang") / "lib")],
    ]


def fetch_metal_headers() -> str:
    """The headers of MLX's macOS wheel, downloaded once: mlx/backend/metal/kernels,
    which Apple's compiler takes, and Apple's own metal_cpp."""
    version = importlib.metadata.version("mlx")
    target = f"{BUILD}/mlx-metal-{version}"
    if (ROOT / target).exists():
        return f"{target}/mlx/include"
    pattern = f"mlx_metal-{version}-*.whl"
    if not any((ROOT / WHEELS).glob(pattern)):
        run(
            [
                *[sys.executable, "-m", "pip", "download", f"mlx-metal=={version}"],
                *["--quiet", "--no-deps", "--only-binary=:all:", "--dest", WHEELS],
                *["--python-version", "3.12", "--platform", "macosx_14_0_arm64"],
            ]
        )
    partial = ROOT / f"{target}.partial"
    wanted = ("mlx/include/metal_cpp", "mlx/include/mlx/backend/metal/kernels")
    with zipfile.ZipFile(next((ROOT / WHEELS).glob(pattern))) as archive:
        archive.extractall(
            partial, [name for name in archive.namelist() if name.startswith(wanted)]
        )
    partial.rename(ROOT / target)
    return f"{target}/mlx/include"


def metal_source(name: str) -> str:
    """A file of metal/ with its headers in place of their #include."""
    text = (ROOT / "metal" / name).read_text()
    return re.sub(r'#include "(.+)"\n', lambda match: metal_source(match[1]), text)


def write_if_changed(path: str, text: str) -> None:
    file = ROOT / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def ninja_file() -> str:
    """Everything to build, for ninja."""
    mlx, nanobind = find_package("mlx"), find_package("nanobind")
    include = ["-Icsrc", "-Imetal", f"-I{HERE}", f"-I{BUILD}/apple"]
    include += ["-isystem", str(mlx / "include")]
    include += ["-isystem", f"{fetch_metal_headers()}/metal_cpp"]
    binding = [
        *["-isystem", sysconfig.get_path("include")],
        *["-isystem", str(nanobind / "include"), "-isystem", str(nanobind / "src")],
        *["-isystem", str(nanobind / "ext/robin_map/include")],
        *["-fno-strict-aliasing", "-DNB_DOMAIN=mlx", "-DMLX_ADADELTA_HAS_METAL=0"],
    ]
    arm64 = ["-D__arm64__"] * (platform.machine() == "aarch64")
    lines = [
        "ninja_required_version = 1.8",
        f"builddir = {BUILD}",
        f"python = {shlex.quote(sys.executable)}",
        # The package's own: a fresh machine has no other.
        f"ninja = {shlex.quote(str(Path(sysconfig.get_path('scripts'), 'ninja')))}",
        f"clang = {shlex.join(clang())}",
        f"cpp = {shlex.join(CPP)}",
        "rule compile",
        "  command = $compiler $cpp $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compiling $out",
        "rule link",
        "  command = g++ $in -o $out $flags",
        "  description = linking $out",
        "rule signatures",
        f"  command = $clang {shlex.join(OPENCL)} -E -P $in | $python $script > $out",
        "rule configure",
        f"  command = $python -m cmake -S . -B {BUILD}/cmake -G Ninja "
        "-DCMAKE_MAKE_PROGRAM=$ninja -DPython_EXECUTABLE=$python > $out.log",
        "  restat = 1",
        # As shipped: CMakeLists.txt embeds the Metal source.
        f"build {BUILD}/cmake/metal_source.cpp: configure | CMakeLists.txt "
        f"csrc/metal_source.cpp.in {' '.join(METAL_FILES)}",
        f"build {BUILD}/kernels.inc: signatures {' '.join(METAL_FILES[:2])} | "
        f"{' '.join(METAL_FILES[2:])} "
        f"{HERE}/include/metal_stdlib {HERE}/signatures.py",
        f"  script = {HERE}/signatures.py",
    ]

    def compile(
        folder: str, source: str, compiler: str, flags: str, needs: str = ""
    ) -> str:
        target = f"{BUILD}/{folder}/{Path(source).stem}.o"
        lines.append(f"build {target}: compile {source}{needs and ' | ' + needs}")
        lines.append(f"  compiler = {compiler}")
        lines.append(f"  flags = {flags}")
        return target

    def executor(folder: str, flags: str) -> list[str]:
        kernels = f"{shlex.join(KERNELS)} {flags}"
        inc = f"{BUILD}/kernels.inc"
        return [
            compile(folder, f"{HERE}/kernels.cpp", "$clang", kernels, inc),
            compile(folder, f"{HERE}/executor.cpp", "$clang", flags),
        ]

    def link(target: str, objects: list[str], flags: str) -> None:
        lines.append(f"build {BUILD}/{target}: link {' '.join(objects)}")
        lines.append(f"  flags = {flags}")

    gcc = f"-O1 {shlex.join(include)} {' '.join(map(shlex.quote, binding))}"
    metal = f"-O1 -fblocks {shlex.join([*include, *arm64])}"
    objects = [
        compile("extension", source, "g++", gcc)
        for source in (
            *[f"csrc/{x}.cpp" for x in ("bindings", "adadelta", "layout", "norm")],
            "csrc/fallback.cpp",
            f"{HERE}/eval_cpu.cpp",
            f"{BUILD}/cmake/metal_source.cpp",
            f"{BUILD}/nb_combined.cpp",
        )
    ]
    objects += [
        compile("extension", source, "$clang", metal)
        for source in ("csrc/eval_metal.cpp", f"{HERE}/mock_metal.cpp")
    ]
    library = f"-L{shlex.quote(str(mlx / 'lib'))} -lmlx"
    library += f" -Wl,-rpath,{shlex.quote(str(mlx / 'lib'))}"
    kernels = executor("extension", f"-O2 {SEPARATE}")
    link(EXTENSION, objects + kernels, f"-shared {library}")
    custom = compile("custom", f"{HERE}/custom_kernel.cpp", "g++", gcc)
    shared = [f"{BUILD}/extension/{name}.o" for name in ("nb_combined", "executor")]
    link(CUSTOM, [custom, *shared], f"-shared {library}")
    # The same without Python, and with the CPU kernels.
    python = ("bindings.o", "extension/eval_cpu.o", "nb_combined.o")
    shared = [name for name in objects + kernels if not name.endswith(python)]
    shared += [
        compile("programs", f"csrc/cpu/{name}.cpp", "g++", f"{gcc} {PLAIN}")
        for name in ("eval", "job", "norm")
    ]
    for name in ("faults", "threads", "refusals", "large"):
        program = compile("programs", f"{HERE}/{name}.cpp", "g++", gcc)
        link(f"programs/{name}", [*shared, program], library)
    for name, flags in DRIVERS.items():
        driver = compile(name, f"{HERE}/driver.cpp", "$clang", flags)
        sanitize = re.search(r"-fsanitize=\S+", flags)
        assert sanitize is not None
        link(f"{name}/driver", [*executor(name, flags), driver], sanitize[0])
    return "\n".join([*lines, ""])


def build(*targets: str) -> None:
    """Brings targets (paths below build/host_metal) up to date; all by default."""
    (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
    with (ROOT / BUILD / "lock").open("w") as lock:
        # One at a time: two processes of pytest would write to the same files.
        fcntl.flock(lock, fcntl.LOCK_EX)
        for header in APPLE_HEADERS:
            write_if_changed(f"{BUILD}/apple/{header}", '#include "apple.h"\n')
        # A source of our own, because ninja's file bears no path with a space.
        write_if_changed(f"{BUILD}/nb_combined.cpp", "#include <nb_combined.cpp>\n")
        write_if_changed(f"{BUILD}/build.ninja", ninja_file())
        ninja = [sys.executable, "-m", "ninja", "-f", f"{BUILD}/build.ninja"]
        paths = [f"{BUILD}/{target}" for target in targets]
        subprocess.run([*ninja, *paths], cwd=ROOT, check=True)


if __name__ == "__main__":
    build(*sys.argv[1:])
