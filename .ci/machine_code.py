"""What the CUDA compiler made of our kernels.

python machine_code.py log FILE           nvcc's and ptxas' output (-Xptxas -v): no warnings of ours, no spills
python machine_code.py sass CUOBJDUMP SO  the kernels that claim tensor cores use them, on every architecture
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

# Kernels that claim tensor cores for 16-bit inputs. Any other kernel with such an instruction is an error as well, so
# that this list stays complete.
TENSOR_CORE_KERNELS = [
    "norm_rows_kernel",
    "norm_nf4_rows_kernel",
    "norm_columns_kernel",
    "norm_high_rank_kernel",
    "compose_mma_kernel",
    "compose_channels_kernel",
    "compose_high_rank_kernel",
    "adapter_backward_kernel",
    "decode_dense_kernel",
    "decode_nf4_kernel",
    "decode_slices_kernel",
    "decode_ring_kernel",
]
# Of these, what is empty before Hopper.
SINCE_HOPPER = ["decode_ring_kernel"]
# Made of wgmma on Hopper, and empty for every other architecture: whoever launches them asks for the device.
WGMMA_KERNELS = ["product_kernel", "norm_hopper_kernel", "adapter_backward_hopper_kernel"]
HALF, BFLOAT16 = "6__half", "13__nv_bfloat16"  # as they stand in mangled names


def check_log(text: str) -> list[str]:
    found = [line for line in text.splitlines() if re.search(r"csrc/\S+[:(]\d+.*\b(warning|error)\b", line)]
    found += [line for line in text.splitlines() if re.search(r"ptxas.*\bwarning\b", line)]
    kernels = defaultdict(list)  # architecture -> kernels seen
    kernel = arch = ""
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel, arch = match.groups()
            kernels[arch].append(kernel)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spills and "dora_ext" in kernel and spills.groups() != ("0", "0"):
            found.append(f"{arch} {kernel}: {spills.group(0)}")
    for arch, names in sorted(kernels.items()):
        print(f"{arch}: {len(names)} kernels compiled")
    return found or ([] if len(kernels) >= 3 else [f"expected three architectures in the log, found {sorted(kernels)}"])


def check_sass(cuobjdump: str, library: str) -> list[str]:
    sass = subprocess.run([cuobjdump, "-sass", library], capture_output=True, text=True, check=True).stdout
    counts: dict[str, dict[str, int]] = defaultdict(dict)  # architecture -> kernel -> tensor-core instructions
    wgmma: dict[tuple[str, str], int] = defaultdict(int)  # those of a whole warpgroup
    lengths: dict[tuple[str, str], int] = defaultdict(int)  # instructions of all kinds, without the padding
    arch = kernel = ""
    for line in sass.splitlines():
        if match := re.match(r"\s*arch = (sm_\d+)", line):
            arch = match.group(1)
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = match.group(1)
            counts[arch][kernel] = wgmma[arch, kernel] = lengths[arch, kernel] = 0  # each file has its own copy
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S", line):
            lengths[arch, kernel] += 1
            counts[arch][kernel] += bool(re.search(r"\bHG?MMA\b", line))
            wgmma[arch, kernel] += bool(re.search(r"\bHGMMA\b", line))
    found = [] if len(counts) >= 3 else [f"expected three architectures in {library}, found {sorted(counts)}"]
    for arch, kernels in sorted(counts.items()):
        for name, instructions in kernels.items():
            if instructions and not any(claim in name for claim in TENSOR_CORE_KERNELS + WGMMA_KERNELS):
                found.append(f"{arch}: {name} uses tensor cores; add it to TENSOR_CORE_KERNELS")
        for claim in TENSOR_CORE_KERNELS:
            # Turing's tensor cores know no bfloat16; there it is computed without them.
            types = [HALF] if arch == "sm_75" else [HALF, BFLOAT16]
            mine = {n: c for n, c in kernels.items() if claim in n and any(t in n for t in types)}
            # Tiles that need more shared memory than Turing has are left empty there.
            without = [name for name, n in mine.items() if not n and lengths[arch, name] > 8]
            print(f"{arch} {claim}: {len(mine)} for 16-bit inputs, {sum(mine.values())} tensor-core instructions")
            may_be_empty = arch == "sm_75" or (claim in SINCE_HOPPER and arch != "sm_90")
            left_empty = may_be_empty and mine and not without
            if without or not (any(mine.values()) or left_empty):
                found.append(f"{arch}: {claim} claims tensor cores; without them: {without or 'not found at all'}")
        for claim in WGMMA_KERNELS:
            mine = [name for name in kernels if claim in name]
            print(f"{arch} {claim}: {len(mine)} kernels, {sum(wgmma[arch, n] for n in mine)} wgmma instructions")
            if arch == "sm_90":
                wrong = [name for name in mine if not wgmma[arch, name]]
            else:
                wrong = [name for name in mine if lengths[arch, name] > 8]
            if not mine or wrong:
                found.append(f"{arch}: {claim}: expected wgmma on sm_90 and nothing elsewhere: {wrong or 'not found'}")
    return found


if __name__ == "__main__":
    problems = check_log(Path(sys.argv[2]).read_text()) if sys.argv[1] == "log" else check_sass(*sys.argv[2:])
    print("\n".join(problems) or f"machine code, {sys.argv[1]}: good")
    raise SystemExit(1 if problems else 0)
