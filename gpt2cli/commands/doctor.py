"""gpt2cli doctor: what this machine has, what is wrong with it, and what to do."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gpt2cli import __version__, machine
from gpt2cli.errors import UserError
from gpt2cli.flags import check
from gpt2cli.options import FolderOptions
from gpt2cli.storage import folders
from gpt2cli.training import hosts as cluster


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(FolderOptions):
    """Report the hardware and software gpt2cli can use, and how to fix problems.

    Examples:
        gpt2cli doctor
        gpt2cli doctor --verbose
    """

    def __post_init__(self) -> None:
        check(self)


PACKAGES = ("tensorflow", "keras", "numpy", "tiktoken", "tokenizers", "safetensors")
EXTRAS = {"serve": "starlette", "torch": "torch"}  # and a package that shows it is there
# what makes products faster: AVX2 and FMA for float32, VNNI for int8, AMX for both and bfloat16
CPU_FLAGS = ("avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile")
# of TensorFlow's CUDA build; the numbers are the ABI's, as in the packages of tensorflow[and-cuda]
CUDA_LIBRARIES = ("libcuda.so.1", "libcudart.so.12", "libcublas.so.12", "libcudnn.so.9")
CUDA_PACKAGES = ("cuda_runtime", "cublas", "cudnn", "nccl")
OLDEST_DRIVER = "525.60.13"  # that CUDA 12 runs on, by NVIDIA's release notes
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")
WSL = Path("/dev/dxg")  # WSL2's door to Windows' driver, which has no kernel driver in Linux
SMI = ("--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits")
SMI_SECONDS, IMPORT_SECONDS = 30, 300  # longer only where a driver or a file system hangs
SHARED_MEMORY = 512e6  # NCCL's for a few GPUs; a container of Docker's has 64 MB
GIGABYTE = 1e9
IMPORT_ADVICE = (  # what is in the end of a failed import, and what to do then
    (r"SIGILL|SIGABRT.*AVX", "the processor lacks instructions, as AVX: use another machine"),
    (r"no end in", "a slow disk, or a driver that hangs: try again, then restart the machine"),
    (r"SIGKILL|MemoryError", "memory ran out: the machine or container needs 2 GB"),
    (r"No module named 'tensorflow'", "pip install tensorflow, for a GPU 'gpt2cli[gpu]'"),
    (r"lib(cu|nv|nccl)\w*\.so", "pip install 'gpt2cli[gpu]', which has CUDA's libraries"),
    (r"", "--verbose shows all of it; install it anew: pip install --force-reinstall tensorflow"),
)


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
    bad = 0
    for look in (versions, processor, memory, disk, cards, tensorflow, hosts, models):
        for finding in look(config):
            print(finding, flush=True)
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
    yield Finding("processor", f"{name}, {machine.cores()} of {os.cpu_count()} cores", advice)
    if flags:
        yield Finding("", " ".join(has) or "none of the instructions that help")


def memory(config):
    """What is free, by the machine's and a container's limit."""
    free = machine.free_memory()
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


def cards(config):
    """Each GPU's memory, or why nvidia-smi cannot tell it, where there is one."""
    status, text = outcome(SMI_SECONDS, "nvidia-smi", *SMI)
    if status:  # no advice: this may be a machine for CPUs
        first = text.partition("\n")[0]
        yield Finding("nvidia-smi", f"fails: {first or status}")
        return
    for name, total, free, driver in re.findall(r"^(.+), (.+), (.+), (.+)$", text, re.M):
        if total.isdigit() and free.isdigit():  # "[N/A]" where the memory is the machine's
            free, total = (int(n) * 2**20 / GIGABYTE for n in (free, total))
            name += f", {free:.1f} of {total:.1f} GB free"
        yield Finding("nvidia-smi", f"{name}, driver {driver}")


def outcome(seconds, *words, **environment):
    """A program's exit status (minus a signal) and all that it said; None if it is not there."""
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "env": os.environ | environment}
    try:
        ended = subprocess.run(words, timeout=seconds, **pipes)
    except OSError:
        return None, ""
    except subprocess.TimeoutExpired:
        return 124, f"no end in {seconds} seconds"  # the status that timeout(1) gives
    return ended.returncode, (ended.stdout + ended.stderr).decode("utf-8", "replace").strip()


def tensorflow(config):
    """Whether TensorFlow can be imported and computes, XLA compiles, and GPUs are seen."""
    if end := end_of_import(config.verbose):
        advice = next(advice for pattern, advice in IMPORT_ADVICE if re.search(pattern, end))
        yield Finding("tensorflow", f"cannot be imported: {end}", advice)
        return
    from gpt2cli import tensorflow as engine

    yield from devices(engine)
    yield from gpus(engine)


def end_of_import(verbose):
    """How a process ends that imports TensorFlow, and its last words; None if all is well.

    Not this process: an instruction that the processor lacks would end it.
    """
    code = f"import sys; sys.path[:] = {[*map(str, sys.path)]}; import gpt2cli.tensorflow"
    words = (sys.executable, "-c", code)  # verbose, for the last words of native code
    status, text = outcome(IMPORT_SECONDS, *words, GPT2CLI_VERBOSE="1")
    if not status:
        return None
    if verbose:
        print(text, file=sys.stderr)
    # TensorFlow's own ImportError has the loader's in it, and ends with where to ask for help
    said = re.findall(r"^[\w.]+Error: .*[^:\n]$", text, re.M) or text.splitlines() or [""]
    names = {number.value: number.name for number in signal.Signals}
    how = f"exit status {status}" if status > 0 else names.get(-status, f"signal {-status}")
    return ", ".join(filter(None, (how, said[-1][:300])))


def devices(engine):
    """What this TensorFlow is, and whether it computes on each device."""
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
            said = "computes and compiles" if right else "computes wrong numbers"
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


def gpus(engine):
    """The GPUs that TensorFlow sees; why it sees none where the machine has one."""
    for gpu in engine.GPUS:
        details = engine.tf.config.experimental.get_device_details(gpu)
        capability = ".".join(map(str, details.get("compute_capability", ("?",))))
        said = f"{details.get('device_name', 'unknown')}, compute capability {capability}"
        yield Finding("gpu", f"{gpu.name.removeprefix('/physical_device:')} {said}")
    if len(engine.GPUS) > 1:
        yield from several_gpus()
    if engine.GPUS:
        return
    driver = driver_version()
    if driver is None:
        wsl = "WSL2, but no nvidia-smi and no libcuda: NVIDIA's driver for Windows has them"
        yield Finding("gpu", f"none ({wsl if WSL.exists() else 'no NVIDIA driver'})")
        return
    if not engine.tf.test.is_built_with_cuda():
        advice = "pip install 'gpt2cli[gpu]', a TensorFlow for CUDA"
        yield Finding("gpu", f"NVIDIA's driver {driver}, but a TensorFlow without CUDA", advice)
        return
    said = f"NVIDIA's driver {driver}, but TensorFlow sees no GPU"
    yield Finding("gpu", said, _unseen_advice(driver))


def several_gpus():
    """What GPUs need to add their gradients up: NCCL, and memory that its processes share."""
    there = can_load("libnccl.so.2")
    advice = None if there else "pip install 'gpt2cli[gpu]' has it, as nvidia-nccl"
    yield Finding("nccl", "can be loaded" if there else "libnccl.so.2 is missing", advice)
    with contextlib.suppress(OSError):
        size = shutil.disk_usage("/dev/shm").total
        advice = (
            "NCCL needs more: `docker run --shm-size 1g` or --ipc=host, in Kubernetes an emptyDir "
            "with medium Memory at /dev/shm"
        )
        advice = advice if size < SHARED_MEMORY else None
        yield Finding("/dev/shm", f"{size / 1e6:,.0f} MB", advice)


def driver_version():
    """The version of NVIDIA's driver, or None."""
    text = ""
    with contextlib.suppress(OSError):
        text = KERNEL_DRIVER.read_text()
    if not text:
        status, text = outcome(SMI_SECONDS, "nvidia-smi", *SMI)
        text = text.partition("\n")[0].rpartition(",")[2] if status == 0 else ""
    if not text and not (WSL.exists() and can_load("libcuda.so.1")):
        return None
    return (re.search(r"\b\d{3}\.[\d.]+", text) or ["unknown"])[0]


def _unseen_advice(driver):
    """What to do where TensorFlow for CUDA sees no GPU of a driver."""
    status, listed = outcome(SMI_SECONDS, "nvidia-smi", "-L")
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        first = told.partition(",")[0].strip()  # CUDA stops at the first that is not there
        if first in ("", "-1"):
            return "CUDA_VISIBLE_DEVICES hides it: unset it"
        there = re.findall(r"^GPU (\d+):|UUID: ([^)]+)", listed, re.M)
        named = any(first == number or uuid.startswith(first) for number, uuid in there)
        if status == 0 and not named:
            return f"CUDA_VISIBLE_DEVICES={told} names no GPU of this machine: mend or unset it"
    numbers, oldest = (tuple(map(int, re.findall(r"\d+", v))) for v in (driver, OLDEST_DRIVER))
    if numbers and numbers < oldest:
        return f"update the driver: CUDA 12 needs {OLDEST_DRIVER} or later"
    missing = [name for name in CUDA_LIBRARIES if not can_load(name)]
    if missing not in ([], ["libcuda.so.1"]):
        names = ", ".join(missing)
        return f"missing: {names}. pip install 'gpt2cli[gpu]' has all but libcuda, the driver's"
    if missing or status is None:
        wrong = (
            f"CUDA_VISIBLE_DEVICES={told} may name no GPU: mend or unset it; or " if told else ""
        )
        return f"{wrong}a container needs `docker run --gpus all`, Kubernetes nvidia.com/gpu"
    if status:
        return "see what nvidia-smi says; after an update of the driver restart the machine"
    return "--verbose shows TensorFlow's reason"


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
        count = f"{found.hosts} host{'s' * (found.hosts > 1)}"
        own = f" ({found.own})" if found.own else ""
        yield Finding("TF_CONFIG", f"{count}; this one{own} {role}")
    except UserError as error:
        yield Finding("TF_CONFIG", "is wrong", str(error))


def models(config):
    """The models and runs that are here."""
    for name, folder in (("models", config.models_dir), ("runs", config.checkpoint_dir)):
        found = ", ".join(folders.names_in(folder)) or "none"
        yield Finding(name, f"{found} (in {folder})")
