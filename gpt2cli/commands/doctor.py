"""gpt2cli doctor: what this machine has, what is wrong with it, and what to do."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from gpt2cli import __version__, cluster, folders
from gpt2cli.errors import UserError

PACKAGES = ("tensorflow", "keras", "numpy", "tiktoken", "tokenizers", "safetensors")
EXTRAS = {"serve": "starlette", "torch": "torch"}  # and a package that shows it is there
# what makes products faster: AVX2 and FMA for float32, VNNI for int8, AMX for both and bfloat16
CPU_FLAGS = ("avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile")
# of TensorFlow's CUDA build; the numbers are the ABI's, as in the packages of tensorflow[and-cuda]
CUDA_LIBRARIES = ("libcuda.so.1", "libcudart.so.12", "libcublas.so.12", "libcudnn.so.9")
CUDA_PACKAGES = ("cuda_runtime", "cublas", "cudnn")
GIGABYTE = 1e9


class Finding(NamedTuple):
    """A line: what was looked at, what was found, and if that is a problem what to do."""

    name: str
    found: str
    advice: str | None = None

    def __str__(self):
        line = f"{self.name:<12} {self.found}"
        return line if self.advice is None else f"{line}\n{'':<12} -> {self.advice}"


def run(config):
    """Print what is found; UserError at the end if something of it keeps gpt2cli from working."""
    found, bad = [], 0
    for look in (versions, processor, memory, disk, tensorflow, gpus, hosts, models):
        for finding in look(config):
            print(finding, flush=True)
            found.append(finding)
            bad += finding.advice is not None
    if bad:
        raise UserError(f"{bad} thing{'s' * (bad > 1)} to mend; see the lines with ->")


def versions(config):
    """gpt2cli, Python and packages."""
    python = sys.version_info[:2]
    right = (3, 10) <= python < (3, 14)
    advice = None if right else "use Python 3.10 to 3.13, for which TensorFlow has wheels"
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("gpt2cli", f"{__version__}, Python {platform.python_version()}, {system}", advice)
    there = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            there[name] = importlib.metadata.version(name)
    yield Finding("packages", ", ".join(f"{name} {version}" for name, version in there.items()))
    has = [extra for extra, package in EXTRAS.items() if importlib.util.find_spec(package)]
    yield Finding("extras", ", ".join(has) or "none")


def processor(config):
    """Cores that may be used, and the instructions that matter."""
    from gpt2cli import engine

    text = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
    named = re.search(r"^model name\s*: (.*)", text, re.M)
    flags = set((re.search(r"^flags\s*: (.*)", text, re.M) or ["", ""])[1].split())
    has = [flag for flag in CPU_FLAGS if flag in flags]
    name = named[1] if named else platform.processor() or platform.machine()
    advice = None
    if flags and "avx" not in flags:
        advice = "TensorFlow's packages need AVX: use a newer processor, or let the machine show it"
    yield Finding("processor", f"{name}, {engine.cores()} of {os.cpu_count()} cores", advice)
    if flags:
        yield Finding("", " ".join(has) or "none of the instructions that help")


def memory(config):
    """What is free, by the machine's and a container's limit."""
    from gpt2cli import engine

    free = engine.free_memory()
    if free is None:
        return
    advice = "less than TensorFlow needs for the smallest model" if free < GIGABYTE else None
    yield Finding("memory", f"{free / GIGABYTE:.1f} GB free", advice)


def disk(config):
    """Room for models and runs, and the folder of compiled skeletons."""
    free = shutil.disk_usage(".").free
    advice = "a download of 124M takes 0.5 GB, a training's checkpoint 1.5" if free < 2e9 else None
    yield Finding("disk", f"{free / GIGABYTE:.1f} GB free in {Path.cwd()}", advice)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    writable = os.path.isabs(home) and os.access(folder, os.W_OK)
    said = "can be written" if writable else "cannot be written: skeletons are made at each start"
    advice = None if writable else "set XDG_CACHE_HOME to a folder of your own"
    yield Finding("cache", f"{home} {said}", advice)


def tensorflow(config):
    """Whether TensorFlow computes, and XLA compiles."""
    from gpt2cli import engine

    tf = engine.tf
    built = tf.sysconfig.get_build_info()
    cuda = "without CUDA"
    if built.get("is_cuda_build"):
        cuda = f"for CUDA {built.get('cuda_version')}, cuDNN {built.get('cudnn_version')}"
    yield Finding("tensorflow", f"{tf.__version__}, built {cuda}")
    for device in tf.config.list_logical_devices():
        if device.device_type not in ("CPU", "GPU"):
            continue
        try:
            with engine.without_noise(), tf.device(device.name):
                product = tf.function(lambda x: tf.reduce_sum(x @ x), jit_compile=True)
                right = float(product(tf.ones([64, 64]))) == 64**3
            said, advice = "computes and compiles" if right else "computes wrong numbers", None
            advice = None if right else "do not use this device"
        except Exception as error:
            said = str(error).strip().partition("\n")[0][:150]
            advice = _libdevice_advice(str(error)) or "see the message; --verbose shows more"
        yield Finding("", f"{device.name.removeprefix('/device:')} {said}", advice)


def _libdevice_advice(text):
    if "libdevice" in text:
        return (
            "XLA does not find CUDA's libdevice.10.bc: pip install 'gpt2cli[gpu]', or set "
            "XLA_FLAGS=--xla_gpu_cuda_data_dir=FOLDER to the one that has nvvm/libdevice"
        )
    return None


def gpus(config):
    """The GPUs that TensorFlow sees; why it sees none where the machine has one."""
    from gpt2cli import engine

    for gpu in engine.GPUS:
        details = engine.tf.config.experimental.get_device_details(gpu)
        capability = ".".join(map(str, details.get("compute_capability", ("?",))))
        said = f"{details.get('device_name', 'unknown')}, compute capability {capability}"
        yield Finding("gpu", f"{gpu.name.removeprefix('/physical_device:')} {said}")
    if engine.GPUS:
        return
    driver = driver_version()
    if driver is None:
        yield Finding("gpu", "none (no NVIDIA driver)")
        return
    if not engine.tf.test.is_built_with_cuda():
        advice = "pip install 'gpt2cli[gpu]', a TensorFlow for CUDA"
        yield Finding("gpu", f"NVIDIA's driver {driver}, but a TensorFlow without CUDA", advice)
        return
    missing = [name for name in CUDA_LIBRARIES if not can_load(name)]
    advice = "a container needs `docker run --gpus all`, Kubernetes nvidia.com/gpu"
    if missing:
        names = ", ".join(missing)
        advice = f"missing: {names}. pip install 'gpt2cli[gpu]' has all but libcuda, the driver's"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        advice = "CUDA_VISIBLE_DEVICES hides it: unset it"
    yield Finding("gpu", f"NVIDIA's driver {driver}, but TensorFlow sees no GPU", advice)


def driver_version():
    """The version of NVIDIA's kernel driver, or None."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        return (re.search(r"\b\d{3}\.[\d.]+", text) or ["unknown"])[0]
    return None


def can_load(name):
    """Whether a shared library is there, on the loader's path or in one of NVIDIA's packages."""
    places = [name]
    with contextlib.suppress(ImportError, AttributeError):
        import nvidia

        roots = [Path(root) for root in nvidia.__path__]
        places += [str(r / package / "lib" / name) for r in roots for package in CUDA_PACKAGES]
    for place in places:
        with contextlib.suppress(OSError):
            ctypes.CDLL(place)
            return True
    return False


def hosts(config):
    """What TF_CONFIG says, if it is set."""
    if not os.environ.get("TF_CONFIG"):
        return
    try:
        found = cluster.of_strategy("auto")
        role = "writes the run" if found.is_chief else "computes"
        yield Finding("TF_CONFIG", f"{found.hosts} hosts; this one {role}")
    except UserError as error:
        yield Finding("TF_CONFIG", "is wrong", str(error))


def models(config):
    """The models and runs that are here."""
    for name, folder in (("models", config.models_dir), ("runs", config.checkpoint_dir)):
        found = ", ".join(folders.names_in(folder)) or "none"
        yield Finding(name, f"{found} (in {folder})")
