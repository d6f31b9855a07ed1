"""Reading and writing adapter files: safetensors alone, whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class AdapterError(ValueError):
    """An adapter that cannot be read, or does not fit the model. The model is as it was."""


def read_safetensors(function: str, path: Path) -> dict[str, Tensor]:
    """The tensors in `path`, on the CPU; `function` is named in errors.

    Raises:
        FileNotFoundError: there is no such file. AdapterError: it is not safetensors, or not whole.
    """
    from safetensors import SafetensorError  # here, so that importing dora_ext needs torch alone
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{function}: no file {path}")
    if path.suffix in _PICKLES:
        raise AdapterError(
            f"{function}: {path} is a pickle, which can run code when it is read; save it as safetensors first"
        )
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{function}: {path}: corrupt, truncated or not safetensors: {error}") from error


def refuse(function: str, problems: list[str]) -> None:
    """Raise an AdapterError that lists the problems, if there are any."""
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise AdapterError(f"{function}: the adapter does not fit the model:\n  {shown}")


def replace_files(folder: Path, writers: dict[str, Callable[[Path], object]]) -> None:
    """Each file is written under a temporary name in the same folder and synced; only then do all take their places."""
    from safetensors import SafetensorError

    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            temporary[name].touch()
            mode = temporary[name].stat().st_mode
            try:
                write(temporary[name])
            except SafetensorError as error:
                raise OSError(f"save_adapter: cannot write {folder / name}: {error}") from error
            with open(temporary[name], "rb+") as file:
                os.fchmod(file.fileno(), mode)  # safetensors lets nobody but the owner read
                os.fsync(file.fileno())
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
