"""gpt2cli doctor: report what this machine has, what is wrong with it, and how to fix that."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt2cli import __version__, console, machine
from gpt2cli.console import counted, say, visible
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


PACKAGES = (
    "tensorflow",
    "keras",
    "ai-edge-litert",
    "numpy",
    "tiktoken",
    "tokenizers",
    "safetensors",
)
EXTRAS = {"serve": "starlette", "torch": "torch"}  # extra -> a package that only it installs
# Instructions that speed up products: AVX2 and FMA for float32, VNNI for int8, AMX for int8 and
# bfloat16.
CPU_FLAGS = ("avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile")
# Loaded by TensorFlow's CUDA build; the numbers are the ABI's, as in tensorflow[and-cuda].
CUDA_LIBRARIES = ("libcuda.so.1", "libcudart.so.12", "libcublas.so.12", "libcudnn.so.9")
CUDA_PACKAGES = ("cuda_runtime", "cublas", "cudnn", "nccl")
OLDEST_DRIVER = "525.60.13"  # for CUDA 12, by NVIDIA's release notes
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")
WSL = Path("/dev/dxg")  # WSL2 reaches Windows' driver through it and has no kernel driver
SMI = ("--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits")
SMI_SECONDS = 30  # longer only if the driver hangs
IMPORT_SECONDS = 300  # longer only if a file system or the driver hangs
SHARED_MEMORY = 512e6  # bytes that NCCL needs for a few GPUs; a Docker container has 64 MB
GIGABYTE = 1e9
USES = "sample, interactive, evaluate and serve"  # commands that use a model
TRAINING = "train, convert, export and init"  # commands that need TensorFlow
INSTALL_GPU = 'bin/install gpu, or pip install ".[gpu]" in a clone'
LIBDEVICE_ADVICE = (
    f"XLA does not find CUDA's libdevice.10.bc: {INSTALL_GPU}, or set "
    "XLA_FLAGS=--xla_gpu_cuda_data_dir=FOLDER to the folder that contains nvvm/libdevice"
)
IMPORT_ADVICE = (  # pattern in the end of a failed import -> advice
    (r"SIGILL|SIGABRT.*AVX", "the processor lacks instructions such as AVX: use another machine"),
    (r"not finished", "the disk is slow or a driver hangs: try again, then restart the machine"),
    (r"SIGKILL|MemoryError", "out of memory: the machine or container needs 2 GB"),
    (r"No module named 'tensorflow'", f"pip install tensorflow; for a GPU: {INSTALL_GPU}"),
    (r"lib(cu|nv|nccl)\w*\.so", f"install CUDA's libraries: {INSTALL_GPU}"),
    (r"", "show all with --verbose, or reinstall: pip install --force-reinstall tensorflow"),
)


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        name: the thing that was checked.
        found: its state.
        advice: how to fix it; None if it is not a problem.
    """

    name: str
    found: str
    advice: str | None = None

    def __str__(self) -> str:
        line = f"{self.name:<12} {visible(self.found)}"
        return line if self.advice is None else f"{line}\n{'':<12} -> {visible(self.advice)}"


Findings = Iterator[Finding]


def run(options: DoctorOptions) -> None:
    """Print each finding; UserError at the end if one keeps gpt2cli from working."""
    problems = 0
    for finding in itertools.chain(
        check_software(),
        check_processor(),
        check_memory(),
        check_disk(),
        check_nvidia_smi(),
        check_litert(options.verbose),
        check_tensorflow(options.verbose),
        check_hosts(),
        list_models(options),
    ):
        print(finding, flush=True)
        problems += finding.advice is not None
    if problems:
        raise UserError(f"{counted(problems, 'problem')} found; see the lines marked ->")


def check_software() -> Findings:
    """Check Python; list the packages."""
    is_supported = (3, 10) <= sys.version_info[:2] < (3, 14)
    advice = None if is_supported else "use Python 3.10 to 3.13, for which TensorFlow has wheels"
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("gpt2cli", f"{__version__}, Python {platform.python_version()}, {system}", advice)
    installed = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed.append(f"{name} {importlib.metadata.version(name)}")
    yield Finding("packages", ", ".join(installed))
    extras = [extra for extra, package in EXTRAS.items() if importlib.util.find_spec(package)]
    yield Finding("extras", ", ".join(extras) or "none")


def check_processor() -> Findings:
    """Check the instructions that matter; count the cores this process may use."""
    name, flags = machine.processor()
    name = name or platform.processor() or platform.machine()
    advice = None
    if flags and "avx" not in flags:
        advice = "TensorFlow needs AVX: use a newer processor, or enable AVX in the virtual machine"
    yield Finding("processor", f"{name}, {machine.cores()} of {os.cpu_count()} cores", advice)
    if flags:
        useful = [flag for flag in CPU_FLAGS if flag in flags]
        yield Finding("", " ".join(useful) or "no instructions that speed up GPT-2")
    if machine.gains_by_bfloat16() is False:
        yield Finding("", "training with --precision bfloat16 is no faster here than with float32")


def check_memory() -> Findings:
    """Check the free memory, by the machine's and a container's limit."""
    free = machine.free_memory()
    if free is not None:
        advice = "TensorFlow needs more, even for the smallest model" if free < GIGABYTE else None
        yield Finding("memory", f"{free / GIGABYTE:.1f} GB free", advice)


def check_disk() -> Findings:
    """Check the room for models and runs, and the folder for converted programs."""
    free = shutil.disk_usage(".").free
    advice = None
    if free < 2e9:
        advice = "free some space: 124M takes 0.5 GB, and each of its training checkpoints 1.5 GB"
    yield Finding("disk", f"{free / GIGABYTE:.1f} GB free in {Path.cwd()}", advice)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if os.path.isabs(home) and os.access(folder, os.W_OK):
        yield Finding("cache", f"{home} is writable")
    else:
        found = f"{home} is not writable, so a model of an unusual size starts slowly each time"
        yield Finding("cache", found, "set XDG_CACHE_HOME to a writable folder (absolute path)")


def check_nvidia_smi() -> Findings:
    """List each GPU's memory, or the reason why nvidia-smi fails, where it is installed."""
    status, text = outcome(SMI_SECONDS, "nvidia-smi", *SMI)
    if status:  # no advice, as this may be a machine without GPUs
        first = text.partition("\n")[0]
        yield Finding("nvidia-smi", f"fails: {first or status}")
        return
    for name, total, free, driver in re.findall(r"^(.+), (.+), (.+), (.+)$", text, re.M):
        room = ""
        if total.isdigit() and free.isdigit():  # "[N/A]" where the GPU shares the machine's memory
            free, total = (int(n) * 2**20 / GIGABYTE for n in (free, total))
            room = f", {free:.1f} of {total:.1f} GB free"
        yield Finding("nvidia-smi", f"{name}{room}, driver {driver}")


def outcome(seconds: float, *words: str) -> tuple[int | None, str]:
    """Run a program; return its exit status (or minus a signal) and its output.

    The status is None where there is no such program.
    """
    try:
        ended = subprocess.run(
            words, timeout=seconds, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except OSError:
        return None, ""
    except subprocess.TimeoutExpired:
        return 124, f"not finished in {seconds} seconds"  # the status of timeout(1)
    return ended.returncode, (ended.stdout + ended.stderr).decode("utf-8", "replace").strip()


def check_litert(verbose: bool) -> Findings:
    """Check that LiteRT, which generates on a CPU, can be imported and computes with XNNPACK."""
    if end := end_of_import(verbose, "gpt2cli.inference.engines.litert_program"):
        advice = "reinstall it: pip install --force-reinstall ai-edge-litert"
        yield Finding("litert", f"cannot be imported: {end}", advice)
        return
    try:
        off, is_fast = product_of_litert()
    except Exception as error:
        found = str(error).strip().partition("\n")[0][:150]
        yield Finding("litert", found, "see the message; --verbose shows more")
        return
    version = importlib.metadata.version("ai-edge-litert")
    how, advice = "with XNNPACK", ""
    if not off < 1e-3:  # it may be NaN
        how, advice = "wrong numbers", "reinstall ai-edge-litert, or use another machine"
    elif not is_fast:
        how, advice = "without XNNPACK: slow", "use x86-64 or a 64-bit Arm processor"
    yield Finding("litert", f"{version}, computes {how}", advice or None)
    yield Finding("", f"runs {USES}, on a CPU")


def product_of_litert() -> tuple[float, bool]:
    """Multiply with a program of models/tiny's size.

    Returns:
        The largest error beside NumPy's product, and whether XNNPACK was used.
    """
    import numpy as np

    from gpt2cli.inference.engines.litert_program import Program
    from gpt2cli.inference.engines.litert_runtime import Tensor
    from gpt2cli.model.sizes import ModelConfig

    random = np.random.default_rng(0)
    table = random.normal(size=(8, 160)).astype(np.float32)
    x, product = Tensor(2, 160), Tensor(2, 8)
    x.array[:] = random.normal(size=x.array.shape)
    config = ModelConfig(n_vocab=8, n_ctx=1, n_embd=160, n_head=5, n_layer=4)
    program = Program("head", config, lambda name, shape: table, "float32")
    program({"x": x}, [product])
    return float(np.abs(product.array - x.array @ table.T).max()), program.uses_xnnpack()


def check_tensorflow(verbose: bool) -> Findings:
    """Check that TensorFlow can be imported, computes, compiles with XLA, and sees the GPUs."""
    if not machine.has_tensorflow():
        yield Finding("tensorflow", f"is not installed; {TRAINING} need it, and so do GPUs")
        if driver := driver_version():
            found = f"NVIDIA driver {driver}, but no TensorFlow, which would use the GPU"
            yield Finding("gpu", found, f"install TensorFlow for CUDA: {INSTALL_GPU}")
        return
    if end := end_of_import(verbose, "gpt2cli.tensorflow"):
        advice = next(advice for pattern, advice in IMPORT_ADVICE if re.search(pattern, end))
        yield Finding("tensorflow", f"cannot be imported: {end}", advice)
        return
    from gpt2cli import tensorflow

    yield from check_devices(tensorflow)
    also = f", and on GPUs {USES}" if tensorflow.GPUS else ""
    yield Finding("", f"runs {TRAINING}{also}")
    yield from check_gpus(tensorflow)


def end_of_import(verbose: bool, module: str) -> str | None:
    """Import a module in a child process; return how that failed, None if it succeeded.

    A missing processor instruction would kill this process.
    """
    # Verbose, for the last words of native code.
    code = (
        f"import sys; sys.path[:] = {[*map(str, sys.path)]}; from gpt2cli import console; "
        f"console.verbose = True; import {module}"
    )
    status, text = outcome(IMPORT_SECONDS, sys.executable, "-c", code)
    if not status:
        return None
    if verbose:
        say(*text.splitlines())
    # TensorFlow's own ImportError quotes the loader's and ends with a request to report an issue.
    lines = re.findall(r"^[\w.]+Error: .*[^:\n]$", text, re.M) or text.splitlines() or [""]
    names = {number.value: number.name for number in signal.Signals}
    how = f"exit status {status}" if status > 0 else names.get(-status, f"signal {-status}")
    return ", ".join(filter(None, (how, lines[-1][:300])))


def check_devices(tensorflow: Any) -> Findings:
    """Describe this TensorFlow; check that it computes on each device."""
    tf = tensorflow.tf
    built = tf.sysconfig.get_build_info()
    cuda = "without CUDA"
    if built.get("is_cuda_build"):
        cuda = f"for CUDA {built.get('cuda_version')}, cuDNN {built.get('cudnn_version')}"
    yield Finding("tensorflow", f"{tf.__version__}, built {cuda}")
    for device in tf.config.list_logical_devices():
        if device.device_type not in ("CPU", "GPU"):
            continue
        found, advice = "computes and compiles", None
        try:
            with console.without_noise(), tf.device(device.name):
                product = tf.function(lambda x: tf.reduce_sum(x @ x), jit_compile=True)
                if float(product(tf.ones([64, 64]))) != 64**3:
                    found, advice = "computes wrong numbers", "do not use this device"
        except Exception as error:
            found = str(error).strip().partition("\n")[0][:150]
            advice = "see the message; --verbose shows more"
            if "libdevice" in str(error):
                advice = LIBDEVICE_ADVICE
        yield Finding("", f"{device.name.removeprefix('/device:')} {found}", advice)


def check_gpus(tensorflow: Any) -> Findings:
    """List the GPUs TensorFlow sees; explain why it sees none where the machine has one."""
    for gpu in tensorflow.GPUS:
        details = tensorflow.tf.config.experimental.get_device_details(gpu)
        capability = ".".join(map(str, details.get("compute_capability", ("?",))))
        card = f"{details.get('device_name', 'unknown')}, compute capability {capability}"
        yield Finding("gpu", f"{gpu.name.removeprefix('/physical_device:')} {card}")
    if len(tensorflow.GPUS) > 1:
        yield from check_several_gpus()
    if tensorflow.GPUS:
        return
    driver = driver_version()
    if driver is None:
        wsl = "WSL2 without nvidia-smi and libcuda: install NVIDIA's driver for Windows"
        yield Finding("gpu", f"none ({wsl if WSL.exists() else 'no NVIDIA driver'})")
    elif not tensorflow.tf.test.is_built_with_cuda():
        advice = f"install TensorFlow for CUDA: {INSTALL_GPU}"
        yield Finding("gpu", f"NVIDIA driver {driver}, but TensorFlow without CUDA", advice)
    else:
        found = f"NVIDIA driver {driver}, but TensorFlow sees no GPU"
        yield Finding("gpu", found, _unseen_advice(driver))


def check_several_gpus() -> Findings:
    """Check NCCL and its shared memory, which GPUs need to add up their gradients."""
    if can_load("libnccl.so.2"):
        yield Finding("nccl", "can be loaded")
    else:
        yield Finding("nccl", "libnccl.so.2 is missing", f"install nvidia-nccl: {INSTALL_GPU}")
    with contextlib.suppress(OSError):
        size = shutil.disk_usage("/dev/shm").total
        advice = None
        if size < SHARED_MEMORY:
            advice = (
                "NCCL needs more: docker run --shm-size 1g or --ipc=host; in Kubernetes mount an "
                "emptyDir with medium Memory at /dev/shm"
            )
        yield Finding("/dev/shm", f"{size / 1e6:,.0f} MB", advice)


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, None without one."""
    text = ""
    with contextlib.suppress(OSError):
        text = KERNEL_DRIVER.read_text()
    if not text:
        status, text = outcome(SMI_SECONDS, "nvidia-smi", *SMI)
        text = text.partition("\n")[0].rpartition(",")[2] if status == 0 else ""
    if not text and not (WSL.exists() and can_load("libcuda.so.1")):
        return None
    return (re.search(r"\b\d{3}\.[\d.]+", text) or ["unknown"])[0]


def _unseen_advice(driver: str) -> str:
    """Return the advice where TensorFlow for CUDA sees no GPU although there is a driver."""
    status, listed = outcome(SMI_SECONDS, "nvidia-smi", "-L")
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        first = chosen.partition(",")[0].strip()  # CUDA stops at the first that does not exist
        if first in ("", "-1"):
            return "CUDA_VISIBLE_DEVICES hides it: unset it"
        gpus = re.findall(r"^GPU (\d+):|UUID: ([^)]+)", listed, re.M)
        exists = any(first == number or uuid.startswith(first) for number, uuid in gpus)
        if status == 0 and not exists:
            return f"CUDA_VISIBLE_DEVICES={chosen} names no GPU of this machine: fix or unset it"
    numbers, oldest = (tuple(map(int, re.findall(r"\d+", v))) for v in (driver, OLDEST_DRIVER))
    if numbers and numbers < oldest:
        return f"update the driver: CUDA 12 needs {OLDEST_DRIVER} or later"
    missing = [name for name in CUDA_LIBRARIES if not can_load(name)]
    if missing not in ([], ["libcuda.so.1"]):
        return f"missing: {', '.join(missing)}. Install all but libcuda (the driver): {INSTALL_GPU}"
    if missing or status is None:
        container = "in a container use docker run --gpus all, in Kubernetes request nvidia.com/gpu"
        if not chosen:
            return container
        return f"CUDA_VISIBLE_DEVICES={chosen} may name no GPU: fix or unset it; or, {container}"
    if status:
        return "see the error of nvidia-smi; after a driver update restart the machine"
    return "--verbose shows TensorFlow's reason"


def can_load(name: str) -> bool:
    """Return whether a shared library is on the loader's path or in a package of NVIDIA's."""
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


def check_hosts() -> Findings:
    """Check TF_CONFIG, if it is set."""
    if not os.environ.get("TF_CONFIG"):
        return
    try:
        found = cluster.of_strategy("auto")
    except UserError as error:
        yield Finding("TF_CONFIG", "is wrong", str(error))
        return
    role = "writes the run" if found.is_chief else "computes"
    own = f" ({found.own})" if found.own else ""
    yield Finding("TF_CONFIG", f"{counted(found.hosts, 'host')}; this one{own} {role}")


def list_models(options: DoctorOptions) -> Findings:
    """List the models and runs."""
    for name, folder in (("models", options.models_dir), ("runs", options.checkpoint_dir)):
        found = ", ".join(folders.names_in(folder)) or "none"
        yield Finding(name, f"{found} (in {folder})")
